"""Folders of images, one folder a class, and their features under a backbone, kept in a cache.

Features are computed once for a list of files, a backbone and its weights: the name of the cache
file is a hash of all three and of what is in the files, so another backbone, other weights, a file
more or a picture replaced by another one gives another cache file and never the wrong features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from immunize_ext._extras import require_extra
from immunize_ext.images import SUFFIXES, content_digest, image_files, read_rgb
from immunize_ext.probing.data.digits import check_seed, class_names, side_targets
from immunize_ext.probing.data.samples import Samples
from immunize_ext.probing.data.task import Task
from immunize_ext.probing.extractors.feature_extractor import (
    FeatureExtractor,
    Preprocessing,
    extract_features,
    fingerprint,
)
from immunize_ext.storage import load_checkpoint, save_checkpoint

_KIND = "immunize_ext.features/1"


class ImageFolder:
    """Images of a folder with one subfolder for each class, read when they are asked for.

    Attributes:
        root: The folder.
        classes: Names of the subfolders, in alphabetical order.
        files: Paths relative to ``root``, class by class, in alphabetical order.
        labels: Class of each file, int64.
        preprocessing: How images become inputs.
    """

    def __init__(self, root: str | Path, preprocessing: Preprocessing | None = None) -> None:
        """Look for the images.

        Args:
            root: The folder; images are looked for in its subfolders, at any depth.
            preprocessing: How images become inputs; ImageNet's when omitted.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If a subfolder has no image, or there is no subfolder.
        """
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"ImageFolder: root must name a folder, got {root}")
        self.preprocessing = preprocessing or Preprocessing()
        found = sorted(p for p in self.root.iterdir() if p.is_dir() and p.name[0] != ".")
        self.classes = [folder.name for folder in found]
        if not self.classes:
            raise ValueError(
                f"ImageFolder: root must have a folder for each class, got none in {root}"
            )
        self.files: list[Path] = []
        labels = []
        for label, folder in enumerate(found):
            images = image_files(folder, recursive=True)
            if not images:
                raise ValueError(
                    f"ImageFolder: every class must have images ({', '.join(SUFFIXES)}), got none "
                    f"in {folder}"
                )
            self.files += [image.relative_to(self.root) for image in images]
            labels += [label] * len(images)
        self.labels = torch.tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Input ``(3, size, size)``, float32, and class of an image.

        Raises:
            ValueError: If the file is no image.
        """
        image = read_image(self.root / self.files[index], self.preprocessing.size)
        return self.preprocessing(image), int(self.labels[index])


def read_image(path: str | Path, size: int) -> Tensor:
    """Read an image (:mod:`immunize_ext.images`), resize its shorter side, cut out the middle.

    Args:
        path: An image file.
        size: Height and width of the result.

    Returns:
        Shape ``(3, size, size)``, float32 in [0, 1].

    Raises:
        FileNotFoundError: If there is no such file.
        MissingExtraError: If Pillow is not installed.
        ValueError: If the file is no image.
    """
    pillow = require_extra("PIL.Image", extra="diffusion", purpose="reading images")
    image = read_rgb(path, function="read_image")
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), pillow.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.reshape(size, size, 3).permute(2, 0, 1).to(torch.float32) / 255.0


def folder_features(
    root: str | Path,
    extractor: nn.Module,
    *,
    cache: str | Path | None = None,
    preprocessing: Preprocessing | None = None,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor, list[str]]:
    """Features of all images of a folder, from the cache where they are there.

    Args:
        root: Folder with one subfolder for each class.
        extractor: The backbone (:func:`immunize_ext.probing.extractors.backbones.load_backbone`).
        cache: Folder of the cache; ``root/.features`` when omitted.
        preprocessing: How images become inputs; that of the extractor when omitted.
        batch_size: Images that go through the backbone at once.
        progress: Called after each batch with the number of images so far; not at all where the
            cache has the features.

    Returns:
        Features ``(n, p)``, float32; classes ``(n,)``, int64; names of the classes.

    Raises:
        FileNotFoundError: If there is no such folder.
        MissingExtraError: If Pillow or safetensors is not installed.
        ValueError: If a file is no image, a class has none, or features are not finite.

    Note:
        A cache file is written whole or not at all, and one that cannot be read is made anew.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> extractor = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for index, name in enumerate(("cat", "dog")):
        ...         (Path(root) / name).mkdir()
        ...         Image.new("RGB", (2, 2), (90 * index, 30, 60)).save(f"{root}/{name}/0.png")
        ...     found = folder_features(root, extractor, preprocessing=Preprocessing(size=2))
        >>> found[0].shape, found[1].tolist(), found[2]
        (torch.Size([2, 4]), [0, 1], ['cat', 'dog'])
    """
    if preprocessing is None and isinstance(extractor, FeatureExtractor):
        preprocessing = extractor.preprocessing
    folder = ImageFolder(root, preprocessing)
    path = Path(folder.root / ".features" if cache is None else cache) / (
        f"{cache_key(folder, extractor)}.safetensors"
    )
    if path.is_file():
        try:
            tensors, _ = load_checkpoint(path, kind=_KIND, function="folder_features")
        except ValueError:
            tensors = {}
        features = tensors.get("features")
        if features is not None and features.dim() == 2 and len(features) == len(folder):
            return features, folder.labels, folder.classes
    batches = Samples(folder, name="root").batches(batch_size)
    features = extract_features(extractor, batches, dtype=torch.float32, progress=progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [file.as_posix() for file in folder.files]
    save_checkpoint(path, {"features": features}, kind=_KIND, values={"files": files})
    return features, folder.labels, folder.classes


def cache_key(folder: ImageFolder, extractor: nn.Module) -> str:
    """What features depend on, as 64 hexadecimal digits: files by content, backbone, weights."""
    files = [[file.as_posix(), content_digest(folder.root / file)] for file in folder.files]
    about = {
        "files": files,
        "backbone": getattr(extractor, "name", type(extractor).__name__),
        "pool": getattr(extractor, "pool", ""),
        "weights": fingerprint(extractor),
        "preprocessing": repr(folder.preprocessing),
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def image_folder_task(
    root: str | Path,
    extractor: nn.Module,
    positive: Sequence[str],
    negative: Sequence[str],
    *others: Sequence[str],
    cache: str | Path | None = None,
    preprocessing: Preprocessing | None = None,
    train_fraction: float = 0.6,
    seed: int = 0,
    batch_size: int = 64,
    dtype: torch.dtype = torch.float64,
) -> Task:
    """Make the task of telling some classes of a folder from others, on a backbone's features.

    Args:
        root: Folder with one subfolder for each class.
        extractor: The backbone.
        positive: Classes labelled +1.
        negative: Classes labelled -1.
        others: Further groups of classes: each group is told from all others then, in this order.
        cache: Folder of the cache; ``root/.features`` when omitted.
        preprocessing: How images become inputs; that of the extractor when omitted.
        train_fraction: Share of the images of each class to train on.
        seed: Seed of the split and the order.
        batch_size: Images that go through the backbone at once.
        dtype: dtype of the task's tensors.

    Returns:
        The task; inputs are features, not standardised.

    Raises:
        FileNotFoundError: If there is no such folder.
        MissingExtraError: If Pillow or safetensors is not installed.
        ValueError: If a class is unknown or on two sides, a picture is in classes of two sides, a
            file is no image, or a part would be empty.

    Note:
        Files with the same content go into the same part, so that no picture is tested on that was
        trained on. Deterministic given ``seed``; torch's global random state is neither read nor
        changed.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> extractor = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for index in range(20):
        ...         folder = Path(root) / ("cat", "dog")[index % 2]
        ...         folder.mkdir(exist_ok=True)
        ...         Image.new("RGB", (2, 2), (10 * index, 30, 60)).save(folder / f"{index}.png")
        ...     task = image_folder_task(
        ...         root, extractor, ["cat"], ["dog"], preprocessing=Preprocessing(size=2)
        ...     )
        >>> task.x_train.shape, sorted(set(task.y_test.tolist()))
        (torch.Size([12, 4]), [-1.0, 1.0])
    """
    name = "image_folder_task"
    check_seed(name, seed)
    sides = [list(side) for side in (positive, negative, *others)]
    named = [one for side in sides for one in dict.fromkeys(side)]
    if len(set(named)) < len(named) or not all(sides):
        raise ValueError(
            f"{name}: positive and negative must each name classes and share none, as every other "
            f"side, got {' and '.join(map(str, sides))}"
        )
    if not 0.0 < train_fraction < 1.0:
        raise ValueError(f"{name}: train_fraction must be between 0 and 1, got {train_fraction}")
    folder = ImageFolder(root)
    classes = folder.classes
    unknown = [c for c in named if c not in classes]
    if unknown:
        raise ValueError(f"{name}: classes must be among {', '.join(classes)}, got {unknown[0]!r}")
    features, labels, classes = folder_features(
        root, extractor, cache=cache, preprocessing=preprocessing, batch_size=batch_size
    )
    generator = torch.Generator().manual_seed(seed)
    contents = _contents(name, folder, sides)
    parts: dict[str, list[Tensor]] = {"train": [], "test": []}
    for chosen in named:
        rows = torch.nonzero(labels == classes.index(chosen))[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        # Split by picture and not by file: copies go together.
        pictures = list(dict.fromkeys(contents[int(row)] for row in rows))
        cut = round(train_fraction * len(pictures))
        if not 0 < cut < len(pictures):
            raise ValueError(
                f"{name}: train_fraction must leave images of {chosen!r} to train and to test on, "
                f"got {train_fraction} of {len(pictures)}"
            )
        trained = set(pictures[:cut])
        is_trained = torch.tensor([contents[int(row)] in trained for row in rows])
        parts["train"].append(rows[is_trained])
        parts["test"].append(rows[~is_trained])
    tensors = []
    ids = [tuple(map(classes.index, side)) for side in sides]
    for part in ("train", "test"):
        rows = torch.cat(parts[part])
        rows = rows[torch.randperm(len(rows), generator=generator)]
        tensors += [features[rows].to(dtype), side_targets(labels[rows], *ids).to(dtype)]
    title = f"{Path(root).name}: {' against '.join(' or '.join(side) for side in sides)}"
    x_train, y_train, x_test, y_test = tensors
    return Task(title, x_train, y_train, x_test, y_test, class_names(*sides))


def _contents(name: str, folder: ImageFolder, sides: Sequence[Sequence[str]]) -> list[str]:
    """What is in each file; no picture may belong to two sides."""
    contents = [content_digest(folder.root / file) for file in folder.files]
    found: dict[str, tuple[int, str]] = {}
    for content, label, file in zip(contents, folder.labels.tolist(), folder.files, strict=True):
        side = next((i for i, names in enumerate(sides) if folder.classes[label] in names), None)
        if side is None:
            continue
        other, first = found.setdefault(content, (side, file.as_posix()))
        if other != side:
            raise ValueError(
                f"{name}: no picture may be in classes of two sides, got the same content in "
                f"{first} and {file.as_posix()}; remove one"
            )
    return contents
