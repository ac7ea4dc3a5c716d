"""Image folders: order, preprocessing, the cache and what makes it stale."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from immunize_ext.probing.data import ImageFolder, folder_features, image_folder_task
from immunize_ext.probing.data.image_folder import cache_key, read_image
from immunize_ext.probing.extractors.feature_extractor import FeatureExtractor, Preprocessing

pillow = pytest.importorskip("PIL.Image")
pytest.importorskip("safetensors")

PREPROCESSING = Preprocessing(4, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def draw(path: Path, seed: int, size: tuple[int, int] = (8, 6)) -> None:
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    pillow.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for index in range(5):
        draw(tmp_path / "images" / "cat" / f"{index}.png", index)
        draw(tmp_path / "images" / "dog" / "deep" / f"{index}.PNG", 10 + index)
    (tmp_path / "images" / "dog" / "notes.txt").write_text("no image")
    return tmp_path / "images"


class Counting(nn.Module):
    """A small backbone that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 5, 2)
        self.calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        features: torch.Tensor = self.convolution(images)
        return features


def backbone() -> FeatureExtractor:
    return FeatureExtractor(Counting(), name="counting", preprocessing=PREPROCESSING)


def test_order_and_preprocessing(root: Path) -> None:
    folder = ImageFolder(root, PREPROCESSING)
    assert folder.classes == ["cat", "dog"]
    assert [file.name for file in folder.files] == [f"{i}.png" for i in range(5)] + [
        f"{i}.PNG" for i in range(5)
    ]
    image, label = folder[5]
    assert image.shape == (3, 4, 4)
    assert label == 1
    torch.testing.assert_close(image, (read_image(root / folder.files[5], 4) - 0.5) / 0.25)


def test_an_image_of_the_right_size_is_left_as_it_is(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", 0, (6, 4))
    pixels = np.asarray(pillow.open(tmp_path / "a.png"), dtype=np.float32) / 255.0
    # Shorter side 4 already: only the middle four of six columns are cut out.
    np.testing.assert_array_equal(
        read_image(tmp_path / "a.png", 4).permute(1, 2, 0), pixels[:, 1:5]
    )


def test_features_are_computed_once(root: Path) -> None:
    extractor = backbone()
    seen: list[int] = []
    features, labels, classes = folder_features(root, extractor, batch_size=4, progress=seen.append)
    assert seen == [4, 8, 10]
    assert features.shape == (10, 5)
    assert labels.tolist() == [0] * 5 + [1] * 5
    assert classes == ["cat", "dog"]
    images = torch.stack([image for image, _ in ImageFolder(root, PREPROCESSING)])  # type: ignore[attr-defined]
    torch.testing.assert_close(features, extractor(images).detach(), rtol=1e-5, atol=1e-6)
    calls = extractor.model.calls
    again, _, _ = folder_features(root, extractor)
    assert torch.equal(again, features)
    assert extractor.model.calls == calls
    assert len(list((root / ".features").iterdir())) == 1


def test_what_makes_other_features_makes_another_key(root: Path) -> None:
    extractor = backbone()
    keys = {cache_key(ImageFolder(root, PREPROCESSING), extractor)}
    keys.add(cache_key(ImageFolder(root), extractor))
    keys.add(cache_key(ImageFolder(root, PREPROCESSING), extractor.model))
    with torch.no_grad():
        extractor.model.convolution.bias[0] += 1e-7
    keys.add(cache_key(ImageFolder(root, PREPROCESSING), extractor))
    draw(root / "cat" / "1.png", 1, (9, 9))
    keys.add(cache_key(ImageFolder(root, PREPROCESSING), extractor))
    draw(root / "cat" / "5.png", 5)
    keys.add(cache_key(ImageFolder(root, PREPROCESSING), extractor))
    assert len(keys) == 6


def read_cache(file: Path) -> tuple[dict[str, str], torch.Tensor]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata()), opened.get_tensor(
            "features"
        ).clone()  # not a map of the file


def test_damaged_cache_is_made_anew(root: Path, tmp_path: Path) -> None:
    extractor = backbone()
    features, _, _ = folder_features(root, extractor, cache=tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    whole, content = file.read_bytes(), read_cache(file)
    file.write_bytes(whole[: len(whole) // 2])
    again, _, _ = folder_features(root, extractor, cache=tmp_path / "cache")
    assert torch.equal(again, features)
    # Not byte by byte: safetensors writes its metadata in any order.
    metadata, stored = read_cache(file)
    assert metadata == content[0]
    assert torch.equal(stored, content[1])


def test_a_bad_image_leaves_no_cache(root: Path, tmp_path: Path) -> None:
    (root / "dog" / "z.jpg").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"z\.jpg must be an image"):
        folder_features(root, backbone(), cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_task(root: Path) -> None:
    extractor = backbone()
    state = torch.get_rng_state()
    task, again, other = (
        image_folder_task(root, extractor, ["cat"], ["dog"], seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert task.x_train.shape == (6, 5)
    assert task.y_train.sum() == task.y_test.sum() == 0
    assert task.name == "images: cat against dog"
    assert torch.equal(task.x_train, again.x_train)
    assert not torch.equal(task.x_train, other.x_train)
    rows = torch.cat([task.x_train, task.x_test])
    assert len(rows.unique(dim=0)) == 10


def test_several_classes(root: Path) -> None:
    (root / "cow").mkdir()
    for index in range(5):
        draw(root / "cow" / f"{index}.png", 200 + index)
    sides = (["cat"], ["dog"], ["cow"])
    task = image_folder_task(root, backbone(), *sides)
    assert (task.num_classes, task.classes) == (3, ("cat", "dog", "cow"))
    assert task.name == "images: cat against dog against cow"
    assert task.y_train.argmax(1).bincount().tolist() == [3, 3, 3]
    # Two sides of it are the task of two sides.
    two = image_folder_task(root, backbone(), ["cat", "cow"], ["dog"])
    assert (two.num_classes, two.classes) == (2, ("dog", "cat or cow"))
    with pytest.raises(ValueError, match="share none, as every other side"):
        image_folder_task(root, backbone(), *sides, ["dog"])


def test_an_image_replaced_by_one_of_the_same_size_is_seen(root: Path) -> None:
    extractor, file = backbone(), root / "cat" / "1.bmp"
    draw(file, 1)
    size = file.stat().st_size
    before, _, _ = folder_features(root, extractor)
    draw(file, 99)
    assert file.stat().st_size == size  # nothing else than the content has changed
    after, _, _ = folder_features(root, extractor)
    changed = (before != after).any(1)
    assert changed.tolist() == [False, True] + [False] * 9  # "1.bmp" stands before "1.png"


def test_what_macos_leaves_beside_an_image_is_no_image(root: Path) -> None:
    (root / "cat" / "._1.png").write_bytes(b"Mac OS X")
    assert len(folder_features(root, backbone())[0]) == 10


def test_images_are_read_as_they_were_meant(root: Path) -> None:
    clear = pillow.new("RGBA", (8, 6), (200, 0, 0, 0))
    clear.save(root / "cat" / "clear.png")
    assert torch.equal(read_image(root / "cat" / "clear.png", 4), torch.ones(3, 4, 4))


@pytest.mark.parametrize("seed", range(6))
def test_the_same_picture_is_not_tested_on_and_trained_on(seed: int, root: Path) -> None:
    for copy in ("a", "b", "c"):
        (root / "cat" / f"{copy}.png").write_bytes((root / "cat" / "0.png").read_bytes())
    task = image_folder_task(root, backbone(), ["cat"], ["dog"], seed=seed)
    assert len(task.x_train) + len(task.x_test) == 13
    shared = (task.x_train[:, None] == task.x_test[None]).all(-1)
    assert not shared.any()


def test_a_picture_on_both_sides_is_refused(root: Path) -> None:
    (root / "dog" / "wolf.png").write_bytes((root / "cat" / "3.png").read_bytes())
    with pytest.raises(ValueError, match=r"same content in cat/3\.png and dog/wolf\.png"):
        image_folder_task(root, backbone(), ["cat"], ["dog"])


def test_refusals(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="root must name a folder"):
        ImageFolder(tmp_path / "none")
    with pytest.raises(ValueError, match="must have a folder for each class"):
        ImageFolder(root / "cat")
    with pytest.raises(ValueError, match="classes must be among cat, dog, got 'cow'"):
        image_folder_task(root, backbone(), ["cat"], ["cow"])
    with pytest.raises(ValueError, match="must each name classes and share none"):
        image_folder_task(root, backbone(), ["cat"], ["cat"])
    with pytest.raises(ValueError, match="must leave images of 'cat'"):
        image_folder_task(root, backbone(), ["cat"], ["dog"], train_fraction=0.05)
    (root / "empty").mkdir()
    with pytest.raises(ValueError, match="every class must have images"):
        ImageFolder(root)
