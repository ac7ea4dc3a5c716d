"""Concept files and the digits as concepts."""

from __future__ import annotations

import pytest
import torch

from immunize_ext.text_to_image.concepts import Concept, ConceptSet, load_concepts
from immunize_ext.text_to_image.digits.concepts import digit_concepts

yaml = pytest.importorskip("yaml")
pillow = pytest.importorskip("PIL.Image")


def _image(path, value: int, size=(4, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pillow.new("RGB", size, (value, 0, 255)).save(path)


def _content() -> dict:
    return {
        "concepts": [
            {
                "name": "van_gogh",
                "prompts": ["An artwork of {}", "A painting in the style of Van Gogh"],
                "anchor": "art",
                "images": {"attack": "art/attack", "immunize": "art/immunize"},
            }
        ],
        "retain": [{"name": "monet", "prompts": ["An artwork of Monet"]}],
        "captions": "captions.txt",
    }


@pytest.fixture
def folder(tmp_path):
    for index, split in enumerate(("attack", "immunize")):
        for value in range(2 + index):
            # No picture in both: content counts, not names.
            _image(tmp_path / "art" / split / f"{value}.png", 51 * value + 7 * index)
    (tmp_path / "captions.txt").write_text("a cat\n\n  a dog \n", encoding="utf-8")
    return tmp_path


def _write(folder, content) -> str:
    file = folder / "concepts.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(file)


def test_a_file_is_read(folder):
    found = load_concepts(_write(folder, _content()))
    (concept,) = found.concepts
    assert found.names == ("van_gogh",)
    assert concept.prompts == ("An artwork of van gogh", "A painting in the style of Van Gogh")
    assert concept.anchor == "art"
    assert found.captions == ("a cat", "a dog")
    images = concept.images("attack")
    assert images.shape == (2, 3, 4, 4)
    # 0, 51 and 255 of 255 in [-1, 1].
    torch.testing.assert_close(images[1, :, 0, 0], torch.tensor([-0.6, -1.0, 1.0]))
    assert len(concept.images("immunize")) == 3
    with pytest.raises(ValueError, match="split must be one of attack, immunize"):
        concept.images("judge")
    with pytest.raises(ValueError, match="'monet' must have images"):
        found.retain[0].images("attack")


def test_images_are_resized(folder):
    _image(folder / "art/attack/9.png", 0, size=(6, 5))
    path = _write(folder, _content())
    with pytest.raises(ValueError, match="one size"):
        load_concepts(path).concepts[0].images("attack")
    assert load_concepts(path, size=8).concepts[0].images("attack").shape == (3, 3, 8, 8)
    assert load_concepts(path, size=(2, 3)).concepts[0].images("attack").shape == (3, 3, 2, 3)


def _without(key):
    def change(content):
        del content["concepts"][0][key]

    return change


def _with(key, value):
    def change(content):
        content["concepts"][0][key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(targets=[]), r"the file must hold only .*, got 'targets'"),
        (lambda c: c.update(concepts=[]), r"concepts must be a list of concepts, got \[\]"),
        (lambda c: c.update(captions=[1]), r"captions must be a list of texts, got 1"),
        (_without("name"), r"concepts\[0\].name must be a text, got None"),
        (_without("prompts"), r"concepts\[0\].prompts must be a list of texts"),
        (_with("prompts", [" "]), r"concepts\[0\].prompts must be a list of texts, got ' '"),
        (_with("anchor", 3), r"concepts\[0\].anchor must be a text, got 3"),
        (_with("label", "x"), r"concepts\[0\].label must be an integer"),
        (_with("colour", "red"), r"concepts\[0\] must hold only .*, got 'colour'"),
        (_without("images"), r"concepts\[0\].images must be a table"),
        (_with("images", {"attack": "art/attack"}), r"name a folder for attack and immunize"),
        (
            _with("images", {"attack": "art/attack", "immunize": "art/attack"}),
            r"share no image between attack and immunize",
        ),
        (_with("images", {"attack": 1, "immunize": "art/immunize"}), r"be the path of a folder"),
        (lambda c: c["retain"][0].update(name="van_gogh"), r"got 'van_gogh' twice"),
    ],
)
def test_what_is_wrong_is_named_with_the_file(folder, change, message):
    content = _content()
    change(content)
    path = _write(folder, content)
    with pytest.raises(ValueError, match=message) as caught:
        load_concepts(path)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(captions="none.txt"), "captions: there is no file"),
        (
            _with("images", {"attack": "none", "immunize": "art/immunize"}),
            r"images.attack: there is no",
        ),
    ],
)
def test_missing_files_are_named(folder, change, message):
    content = _content()
    change(content)
    with pytest.raises(FileNotFoundError, match=message):
        load_concepts(_write(folder, content))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_concepts(folder / "other.yaml")


def test_a_file_that_is_not_yaml_is_named(folder):
    file = folder / "bad.yaml"
    file.write_text("concepts: [", encoding="utf-8")
    with pytest.raises(ValueError, match="must be YAML"):
        load_concepts(file)
    (folder / "art/attack/0.png").unlink()
    (folder / "art/attack/1.png").unlink()
    with pytest.raises(ValueError, match="hold images"):
        load_concepts(_write(folder, _content()))


def test_yaml_runs_no_code(folder):
    file = folder / "evil.yaml"
    file.write_text("!!python/object/apply:os.getcwd []", encoding="utf-8")
    with pytest.raises(ValueError, match="must be YAML"):
        load_concepts(file)


def test_digits_two_to_ten_targets():
    pytest.importorskip("sklearn")
    from immunize_ext.text_to_image.digits.images import DIGIT_NAMES

    for count in range(1, 11):
        found = digit_concepts(DIGIT_NAMES[:count])
        assert len(found.concepts) == count
        assert len(found.retain) == 10 - count
        # No caption of the regularization set names what is to be forgotten.
        assert not any(name in text.split() for name in found.names for text in found.captions)
        assert len(found.captions) >= 8
    assert found.concepts[3].images("immunize").shape == (24, 1, 8, 8)


def test_selecting_and_bad_names():
    found = digit_concepts()
    assert found.select(["eight"]).names == ("eight",)
    assert found.select(["eight"]).retain == found.retain
    with pytest.raises(ValueError, match="got 'six'"):
        found.select(["six"])
    with pytest.raises(ValueError, match="got 'ten'"):
        digit_concepts(["ten"])
    with pytest.raises(ValueError, match="'three' twice"):
        digit_concepts(["three"], retain=["three"])
    with pytest.raises(ValueError, match="at least one"):
        ConceptSet(())
    with pytest.raises(ValueError, match="twice"):
        ConceptSet((Concept("a", ("a",)), Concept("a", ("a",))))


def test_one_picture_in_two_splits_is_found_by_its_content(folder):
    (folder / "art/immunize/other name.png").write_bytes((folder / "art/attack/1.png").read_bytes())
    with pytest.raises(ValueError, match=r"share no image .*1\.png and .*other name\.png"):
        load_concepts(_write(folder, _content()))


def test_leftovers_of_macos_are_no_images(folder):
    (folder / "art/attack/._0.png").write_bytes(b"Mac OS X")
    assert len(load_concepts(_write(folder, _content())).concepts[0].images("attack")) == 2


def test_a_key_that_stands_twice_is_refused(folder):
    file = folder / "twice.yaml"
    file.write_text("captions: [a]\ncaptions: [b]\n", encoding="utf-8")
    with pytest.raises(ValueError, match="the key 'captions' stands twice"):
        load_concepts(file)


@pytest.mark.parametrize(
    ("name", "prompt", "found"),
    [
        ("van_gogh", "An artwork of Van Gogh", ["Van Gogh"]),
        ("Van Gogh", "in VAN-GOGH's style, by van  gogh.", ["VAN-GOGH", "van  gogh"]),
        ("cat", "a cat near a cathedral", ["cat"]),
        ("cat", "cat_photo and CAT!", ["cat", "CAT"]),
        ("O'Keeffe", "by O\u2019Keeffe and OKeeffe", ["O\u2019Keeffe", "OKeeffe"]),
        ("van gogh", "a vangogh", []),
        ("c\u00e9zanne", "by Ce\u0301zanne", ["C\u00e9zanne"]),
        ("St. Ives", "near St Ives", ["St Ives"]),
    ],
)
def test_names_are_found_as_words(name, prompt, found):
    assert Concept(name, ("x",)).named_in(prompt) == found


def test_a_concept_is_known_by_its_aliases_too(folder):
    content = _content()
    content["concepts"][0]["aliases"] = ["Vincent van Gogh", "the Dutch master"]
    (concept,) = load_concepts(_write(folder, content)).concepts
    assert concept.aliases == ("Vincent van Gogh", "the Dutch master")
    text = "by vincent van gogh, the dutch master"
    assert concept.named_in(text) == ["vincent van gogh", "the dutch master"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Concept("x" * 300, ("x",)), "1 to 100 printable characters, got 'xxx"),
        (lambda: Concept("a\nb", ("x",)), "printable"),
        (lambda: Concept("cat", ()), "'cat' must have at least one prompt"),
        (lambda: Concept("cat", ("a cat", " ")), "prompts and aliases of 'cat' must have text"),
        (lambda: ConceptSet((Concept("cat", ("a",)),), (), ("", "x")), r"captions\[0\] must have"),
        (
            lambda: ConceptSet((Concept("a b", ("a",)), Concept("A_b", ("a",)))),
            "names must differ in words, got 'a b' and 'A_b'",
        ),
    ],
)
def test_names_and_texts_that_no_run_could_use_are_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_digest_tells_words_and_content_apart(folder):
    path = _write(folder, _content())
    before = load_concepts(path).digest()
    assert load_concepts(path).digest() == before
    _image(folder / "art/attack/1.png", 52)
    changed = load_concepts(path).digest()
    assert changed != before
    content = _content()
    content["concepts"][0]["prompts"][1] = "A painting by Van Gogh"
    assert load_concepts(_write(folder, content)).digest() not in (before, changed)
