"""Concepts: what a text-to-image model shall unlearn and be hard to teach again, and what it keeps.

A concept has a name, prompts that ask for it, images that show it, and an anchor, the word that
erasure puts in its place. A set of them is read from a file, ``concepts.yaml``::

    concepts:                       # what to erase and immunize against
      - name: van_gogh
        aliases: [vincent]          # other words for it in prompts; may be left out
        prompts: ["An artwork of Van Gogh", "A painting in the style of Van Gogh"]
        anchor: art
        images:                     # folders, relative to this file
          attack: images/van_gogh/attack
          immunize: images/van_gogh/immunize
    retain:                         # what has to stay; images may be left out
      - name: monet
        prompts: ["An artwork of Monet"]
    captions: captions.txt          # unrelated captions, one a line, or a list of them

``{}`` in a prompt stands for the name. The two folders of a concept must share no picture, under
whatever file names. Names are found in prompts as :mod:`immunize_ext.text_to_image.names` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from immunize_ext._extras import require_extra
from immunize_ext.images import SUFFIXES, image_files, read_rgb, same_pictures
from immunize_ext.settings import hint, parse_yaml
from immunize_ext.storage import digest
from immunize_ext.text_to_image.names import find_names, same_name

T = TypeVar("T")

# Names stand in file names, tables and plots.
_LONGEST_NAME = 100


@dataclass(frozen=True)
class Concept:
    """Something that can be asked of a text-to-image model.

    Attributes:
        name: What it is called; unique in a set, up to 100 characters.
        prompts: Prompts that ask for it, the canonical one first.
        anchor: The word that erasure puts in its place, or ``None``.
        label: Class that a judge knows it by, or ``None``.
        source: Gives the images of a split, shape ``(n, c, h, w)`` in [-1, 1]; raises
            ``ValueError`` for a split that there is not.
        aliases: Other words for it in prompts.
    """

    name: str
    prompts: tuple[str, ...]
    anchor: str | None = None
    label: int | None = None
    source: Callable[[str], Tensor] | None = field(default=None, repr=False, compare=False)
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse names that no file can bear, and prompts without text."""
        if not self.name.strip() or len(self.name) > _LONGEST_NAME or not self.name.isprintable():
            raise ValueError(
                f"Concept: name must have 1 to {_LONGEST_NAME} printable characters, got "
                f"{self.name[:40]!r} of {len(self.name)}"
            )
        if not self.prompts:
            raise ValueError(f"Concept: {self.name!r} must have at least one prompt, got none")
        for text in (*self.prompts, *self.aliases):
            if not text.strip():
                raise ValueError(
                    f"Concept: prompts and aliases of {self.name!r} must have text, got {text!r}; "
                    "leave empty ones out"
                )

    @property
    def spoken(self) -> str:
        """The name as a prompt says it: ``van gogh``."""
        return self.name.replace("_", " ")

    @property
    def words(self) -> tuple[str, ...]:
        """All that it is called in prompts."""
        return (self.name, *self.aliases)

    def named_in(self, prompt: str) -> list[str]:
        """Where a prompt names it, as it is written there."""
        return find_names(prompt, self.words)

    def digest(self) -> str:
        """Of everything that decides what is learned of it: words and the content of images."""
        images = []
        for split in ("attack", "immunize"):
            with suppress(ValueError):  # a concept need not have both
                images.append((split, self.images(split)))
        said = (self.name, self.prompts, self.anchor, self.label, self.aliases)
        return digest(said, images)[:16]

    def images(self, split: str) -> Tensor:
        """Images of a split, shape ``(n, c, h, w)``, float32 in [-1, 1].

        Args:
            split: ``"attack"`` or ``"immunize"``; the bundled digits have ``"train"`` and
                ``"judge"`` as well.

        Returns:
            The images, always in the same order.

        Raises:
            ValueError: If the concept has no such images.
        """
        if self.source is None:
            raise ValueError(
                f"Concept.images: concept {self.name!r} must have images for {split!r}, got none; "
                "name a folder under 'images' in the concepts file"
            )
        return self.source(split)


@dataclass(frozen=True)
class ConceptSet:
    """What to immunize against, and what to keep.

    Attributes:
        concepts: What is erased and immunized against.
        retain: What has to stay.
        captions: Unrelated captions; their text features are C_reg of the merge.
    """

    concepts: tuple[Concept, ...]
    retain: tuple[Concept, ...] = ()
    captions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse empty sets and names that occur twice."""
        names = [concept.name for concept in (*self.concepts, *self.retain)]
        if not self.concepts:
            raise ValueError("ConceptSet: concepts must hold at least one concept, got none")
        for index, name in enumerate(names):
            for other in names[:index]:
                if name == other:
                    raise ValueError(f"ConceptSet: every name must occur once, got {name!r} twice")
                if same_name(name, other):
                    raise ValueError(
                        f"ConceptSet: names must differ in words, got {other!r} and {name!r}; "
                        "rename one of them"
                    )
        for index, caption in enumerate(self.captions):
            if not caption.strip():
                raise ValueError(f"ConceptSet: captions[{index}] must have text, got {caption!r}")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the concepts to immunize against."""
        return tuple(concept.name for concept in self.concepts)

    def digest(self) -> str:
        """Of everything in it: two sets that an immunizer can tell apart have different ones."""
        parts = [[concept.digest() for concept in part] for part in (self.concepts, self.retain)]
        return digest(parts, self.captions)[:16]

    def select(self, names: Iterable[str]) -> ConceptSet:
        """The set with only some of its concepts; the others are no longer in it.

        Args:
            names: Names of concepts to keep as targets.

        Returns:
            The smaller set.

        Raises:
            ValueError: If a name is unknown.
        """
        wanted = list(names)
        unknown = [name for name in wanted if name not in self.names]
        if unknown:
            raise ValueError(
                f"ConceptSet.select: names must be among {', '.join(self.names)}, got "
                f"{unknown[0]!r}{hint(unknown[0], self.names)}"
            )
        chosen = tuple(concept for concept in self.concepts if concept.name in wanted)
        return ConceptSet(chosen, self.retain, self.captions)


def load_concepts(path: str | Path, *, size: int | tuple[int, int] | None = None) -> ConceptSet:
    """Read a concepts file (module docstring).

    Args:
        path: The file.
        size: Height and width that images are resized to; as they are when omitted.

    Returns:
        The set. Image files are looked for at once and read when they are asked for.

    Raises:
        FileNotFoundError: If the file, a folder or a captions file is missing.
        ValueError: If it says something else than the module docstring allows; the message names
            the file and the key.
        MissingExtraError: If PyYAML is not installed.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> text = '''
        ... concepts:
        ...   - name: cat
        ...     prompts: ["a photo of a {}"]
        ...     anchor: animal
        ...     images: {attack: ., immunize: other}
        ... captions: [a red car]
        ... '''
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     (Path(folder) / "other").mkdir()
        ...     Image.new("RGB", (2, 2), (90, 30, 60)).save(f"{folder}/0.png")
        ...     Image.new("RGB", (2, 2), (10, 20, 30)).save(f"{folder}/other/0.png")
        ...     _ = (Path(folder) / "concepts.yaml").write_text(text)
        ...     found = load_concepts(f"{folder}/concepts.yaml")
        >>> found.names, found.concepts[0].prompts, found.captions
        (('cat',), ('a photo of a cat',), ('a red car',))
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"load_concepts: there is no file {path}; give a concepts.yaml")
    try:
        content = parse_yaml(file.read_text(encoding="utf-8"))
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"load_concepts: {path} must be YAML, got: {reason}") from None
    reader = _Reader(file, size)
    table = reader.table(content, "the file", {"concepts", "retain", "captions"})
    return reader.make(
        ConceptSet,
        reader.concepts(table.get("concepts"), "concepts", images=True),
        reader.concepts(table.get("retain") or [], "retain", images=False),
        reader.captions(table.get("captions") or []),
    )


class _Reader:
    """Turns a parsed concepts file into concepts, or says where it is wrong."""

    def __init__(self, file: Path, size: int | tuple[int, int] | None) -> None:
        self.file = file
        self.size = (size, size) if isinstance(size, int) else size

    def fail(self, key: str, expected: str, got: object) -> ValueError:
        return ValueError(f"load_concepts: {self.file}: {key} must {expected}, got {got!r}")

    def make(self, cls: Callable[..., T], *values: Any) -> T:
        """What a dataclass refuses is named with the file."""
        try:
            return cls(*values)
        except ValueError as error:
            raise ValueError(f"load_concepts: {self.file}: {error}") from None

    def table(self, value: object, key: str, known: set[str]) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise self.fail(key, f"be a table with {', '.join(sorted(known))}", value)
        unknown = sorted(str(name) for name in value if name not in known)
        if unknown:
            raise self.fail(key, f"hold only {', '.join(sorted(known))}", unknown[0])
        return value

    def concepts(self, value: object, key: str, *, images: bool) -> tuple[Concept, ...]:
        if not isinstance(value, list) or (images and not value):
            raise self.fail(key, "be a list of concepts", value)
        return tuple(
            self.concept(entry, f"{key}[{index}]", images=images)
            for index, entry in enumerate(value)
        )

    def concept(self, value: object, key: str, *, images: bool) -> Concept:
        table = self.table(value, key, {"name", "aliases", "prompts", "anchor", "images", "label"})
        name = table.get("name")
        if not isinstance(name, str) or not name.strip():
            raise self.fail(f"{key}.name", "be a text", name)
        prompts = self.texts(table.get("prompts"), f"{key}.prompts")
        anchor = table.get("anchor")
        if anchor is not None and (not isinstance(anchor, str) or not anchor.strip()):
            raise self.fail(f"{key}.anchor", "be a text", anchor)
        label = table.get("label")
        if label is not None and not isinstance(label, int):
            raise self.fail(f"{key}.label", "be an integer", label)
        folders = table.get("images")
        source = None
        if folders is not None or images:
            source = self.source(folders, f"{key}.images", required=images)
        aliases = (
            tuple(self.texts(table["aliases"], f"{key}.aliases")) if "aliases" in table else ()
        )
        spoken = name.replace("_", " ")
        texts = tuple(text.replace("{}", spoken) for text in prompts)
        return self.make(Concept, name, texts, anchor, label, source, aliases)

    def texts(self, value: object, key: str) -> list[str]:
        if not isinstance(value, list) or not value:
            raise self.fail(key, "be a list of texts", value)
        for text in value:
            if not isinstance(text, str) or not text.strip():
                raise self.fail(key, "be a list of texts", text)
        return value

    def source(self, value: object, key: str, *, required: bool) -> Callable[[str], Tensor]:
        splits = {"attack", "immunize"}
        table = self.table(value, key, splits)
        missing = sorted(splits - table.keys())
        if required and missing:
            raise self.fail(key, f"name a folder for {' and '.join(sorted(splits))}", dict(table))
        files = {split: self.files(folder, f"{key}.{split}") for split, folder in table.items()}
        both = same_pictures(files.get("attack", ()), files.get("immunize", ()))
        if both:
            # By content: the same picture under two names would be trained and judged on.
            pair = " and ".join(map(str, both[0]))
            raise self.fail(key, "share no image between attack and immunize", pair)
        size = self.size

        def read(split: str) -> Tensor:
            if split not in files:
                raise ValueError(
                    f"Concept.images: split must be one of {', '.join(sorted(files))}, got "
                    f"{split!r}"
                )
            return _read_images(files[split], size)

        return read

    def files(self, value: object, key: str) -> list[Path]:
        if not isinstance(value, str):
            raise self.fail(key, "be the path of a folder", value)
        folder = self.file.parent / value
        if not folder.is_dir():
            raise FileNotFoundError(f"load_concepts: {self.file}: {key}: there is no {folder}")
        found = image_files(folder)
        if not found:
            raise self.fail(key, f"hold images ({', '.join(SUFFIXES)})", str(folder))
        return found

    def captions(self, value: object) -> tuple[str, ...]:
        if isinstance(value, str):
            file = self.file.parent / value
            if not file.is_file():
                raise FileNotFoundError(
                    f"load_concepts: {self.file}: captions: there is no file {file}"
                )
            lines = file.read_text(encoding="utf-8").splitlines()
            return tuple(line.strip() for line in lines if line.strip())
        return tuple(self.texts(value, "captions")) if value else ()


def _read_images(files: Sequence[Path], size: tuple[int, int] | None) -> Tensor:
    """Read image files as float32 in [-1, 1], shape ``(n, 3, h, w)``."""
    import numpy as np

    pillow = require_extra("PIL.Image", extra="diffusion", purpose="image files")
    images = []
    for file in files:
        picture = read_rgb(file, function="load_concepts")
        if size is not None:
            picture = picture.resize((size[1], size[0]), pillow.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(picture, dtype=np.float32))
        images.append(pixels.permute(2, 0, 1) / 127.5 - 1.0)
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise ValueError(
            f"load_concepts: images of a folder must have one size, got {len(shapes)} sizes in "
            f"{files[0].parent}; give size="
        )
    return torch.stack(images)
