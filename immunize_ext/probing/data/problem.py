"""A primary task and the harmful ones: what an immunizer is handed, and where to get it by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from immunize_ext.probing.data.digits import (
    class_names,
    digits_task,
    load_digits,
    side_targets,
)
from immunize_ext.probing.data.download import fetch_house_prices, fetch_mnist
from immunize_ext.probing.data.features import FILES, features_task, load_features, target_names
from immunize_ext.probing.data.house_prices import house_prices_task
from immunize_ext.probing.data.mnist import load_mnist, mnist_task
from immunize_ext.probing.data.samples import Samples
from immunize_ext.probing.data.task import Task
from immunize_ext.settings import hint
from immunize_ext.storage import tensor_digest

TaskT = TypeVar("TaskT")


@dataclass(frozen=True)
class Problem(Generic[TaskT]):
    """What to keep and what to make hard.

    Attributes:
        primary: The task to keep: a :class:`Task`, or samples for a deep extractor.
        harmful: The tasks to make hard, in the same form; at least one.
        head: Head of the primary task that is trained along, for methods that train one; a linear
            one when ``None``.
        benign: Other tasks that are to stay easy, for methods that look after them.

    Example:
        >>> from immunize_ext.probing.data import digits_task
        >>> problem = Problem.of(digits_task((3,), (8,)), digits_task((4,), (9,)))
        >>> len(problem.harmful), problem.only_harm("toy").name
        (1, 'digit 4 against 9')
    """

    primary: TaskT
    harmful: tuple[TaskT, ...]
    head: nn.Module | None = None
    benign: tuple[TaskT, ...] = ()

    def __post_init__(self) -> None:
        if not self.harmful:
            raise ValueError("Problem: harmful must hold at least one task, got none")
        named = [("primary", self.primary), *(("harmful", task) for task in self.harmful)]
        named += [("benign", task) for task in self.benign]
        widths = [(role, task.num_features) for role, task in named if isinstance(task, Task)]
        for role, width in widths[1:]:
            if width != widths[0][1]:
                raise ValueError(
                    f"Problem: {role} must have the {widths[0][1]} features of primary, got "
                    f"{width}; preprocess both tasks alike"
                )

    @classmethod
    def of(cls, primary: Any, *harmful: Any, head: nn.Module | None = None) -> Problem[TaskT]:
        """One primary task against the others: tasks, arrays, or samples for a deep extractor."""
        return cls(primary, harmful, head)

    def as_tasks(self) -> Problem[Task]:
        """The problem as linear methods see it: arrays become tasks (:meth:`Task.of`).

        Example:
            >>> import numpy as np
            >>> x, y = np.eye(10), np.arange(10.0)
            >>> Problem.of((x, y), (x, y[::-1].copy())).as_tasks().harmful[0].name
            'harmful task'
        """
        primary: Any = self.primary
        harmful, benign = (
            tuple(Task.of(one, name) for one in tasks)  # type: ignore[arg-type]
            for name, tasks in (("harmful task", self.harmful), ("benign task", self.benign))
        )
        return Problem(Task.of(primary, "primary task"), harmful, self.head, benign)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Problem[TaskT]:
        """The problem with its tasks on another device or of another dtype.

        Immunizers and attacks work where the tasks are. Samples that are no :class:`Task` are drawn
        batch by batch, and stay as they are.
        """

        def moved(task: Any) -> Any:
            return task.to(device, dtype) if isinstance(task, Task) else task

        harmful, benign = (tuple(map(moved, tasks)) for tasks in (self.harmful, self.benign))
        return Problem(moved(self.primary), harmful, self.head, benign)

    def only_harm(self, function: str) -> TaskT:
        """The harmful task of a method that takes one.

        Raises:
            ValueError: If there are several.
        """
        if len(self.harmful) > 1:
            raise ValueError(
                f"{function}: harmful must be one task, got {len(self.harmful)}; "
                "use the method several-harms"
            )
        return self.harmful[0]

    def digest(self) -> str:
        """SHA-256 over all numbers: whether a later attack or a resumed run sees the same data."""
        return tensor_digest(
            (f"{index}.{name}", value)
            for index, task in enumerate((self.primary, *self.harmful, *self.benign))
            for name, value in _tensors(task)
        )


def _tensors(task: object) -> list[tuple[str, Tensor]]:
    names = ("x_train", "y_train", "x_test", "y_test")
    if isinstance(task, Task):
        return [(name, getattr(task, name).to(torch.float64)) for name in names]
    samples = Samples(task)
    if samples.tensors is not None:
        return list(zip(("inputs", "labels"), samples.tensors, strict=True))
    # A data set may be larger than memory: its length and samples from all over it have to do.
    count = len(samples)
    chosen = sorted({round(i * (count - 1) / 15) for i in range(16)})
    inputs, labels = samples.batch(chosen)
    return [("inputs", inputs), ("labels", labels), ("count", torch.tensor(count))]


_DEFAULTS = {"digits": ("4,6:2,3,7", ("5,9:0,1,8",)), "mnist": ("4", ("9",))}


def parse_sides(text: str, names: Sequence[str] = ()) -> tuple[tuple[int, ...], ...]:
    """Read a task as the command line writes it.

    ``"4,6:2,3"`` is classes against classes, ``"4"`` one class alone; ``"0:1,2:3"`` has more than
    two sides, each a class to tell from the others. ``"0-4"`` alone is short for ``"0:1:2:3:4"``,
    and within a side, as in ``"0-4:5-9"``, for ``"0,1,2,3,4"``.

    Args:
        text: The task.
        names: What the classes are called, in the order of their ids, where they have names:
            ``"cat,dog:cow"``.

    Returns:
        The classes of each side; one side for one class alone.

    Raises:
        ValueError: If the text has another form, or a class is on two sides.

    Example:
        >>> parse_sides("4,6:2,3"), parse_sides("9")
        (((4, 6), (2, 3)), ((9,),))
        >>> parse_sides("0-2"), parse_sides("0-1:2")
        (((0,), (1,), (2,)), ((0, 1), (2,)))
        >>> parse_sides("dog:cat", ("cat", "cow", "dog"))
        ((2,), (0,))
    """
    if names:
        words = [side.split(",") for side in text.split(":")]
        unknown = [word for side in words for word in side if word not in names]
        if unknown:
            raise ValueError(
                f"a task must name classes among {', '.join(names)}, got {unknown[0]!r} in {text!r}"
                f"{hint(unknown[0], names)}"
            )
        return _apart(text, tuple(tuple(map(names.index, side)) for side in words))
    try:
        sides = tuple(
            tuple(one for part in side.split(",") for one in _range(part))
            for side in text.split(":")
        )
    except ValueError:
        raise ValueError(
            f"a task must look like '4,6:2,3,7' (classes against classes), '0:1:2' or '0-2' (each "
            f"told from the others) or '4' (one class), got {text!r}"
        ) from None
    if len(sides) == 1 and "-" in text and "," not in text:
        sides = tuple((one,) for one in sides[0])
    return _apart(text, sides)


def _apart(text: str, sides: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """The sides, if no class is on two of them."""
    every = [one for side in sides for one in set(side)]
    both = sorted({one for one in every if every.count(one) > 1})
    if both:
        where = "both sides" if len(sides) == 2 else "two sides"
        raise ValueError(f"a task must not have a class on {where}, got {both[0]} in {text!r}")
    return sides


def _range(part: str) -> tuple[int, ...]:
    """Classes of ``"3"`` or of ``"3-5"``."""
    ends = [int(end) for end in part.split("-")]
    if len(ends) > 2 or ends[-1] < ends[0]:
        raise ValueError
    return tuple(range(ends[0], ends[-1] + 1))


def check_names(data: str, primary: str | None, harmful: tuple[str, ...]) -> None:
    """Refuse names of data and tasks that cannot be, before anything is read.

    Args:
        data: As for :func:`load_problem`, like the others.
        primary: The task to keep.
        harmful: The tasks to make hard.

    Raises:
        FileNotFoundError: If a file of features is not there.
        ValueError: If one of them has another form, or one is missing.

    Example:
        >>> check_names("digits", "3:8", ())
        Traceback (most recent call last):
        ValueError: harmful must name a task, got none; give --harmful
    """
    file = data.endswith(FILES)
    if data == "house":
        if primary is not None or harmful:
            raise ValueError("house has its two tasks; leave out primary and harmful")
        return
    if not file and data not in _DEFAULTS:
        raise ValueError(
            f"data must be digits, mnist, house or a file ending in {' or '.join(FILES)}, got "
            f"{data!r}{hint(data, (*_DEFAULTS, 'house'))}"
        )
    for text in (data, primary, *harmful):
        if text is not None and text.endswith(FILES) and not Path(text).is_file():
            raise FileNotFoundError(f"{text} must be a file of features, but it is not there")
    for text in (primary, *harmful):
        if text is None or text.endswith(FILES):
            continue
        sides = parse_sides(text, target_names(data) if file else ())
        if not file and max(max(side) for side in sides) > 9:
            raise ValueError(
                f"{data}: a task must hold digits from 0 to 9, got {text!r}; in YAML, quote tasks: "
                "'4:9' alone is the number 249 there"
            )
    if file or primary is not None or harmful:
        if not harmful:
            raise ValueError("harmful must name a task, got none; give --harmful")
        if primary is None and not file:
            raise ValueError("primary must name a task, got none; give --primary")


def load_problem(
    data: str = "digits",
    primary: str | None = None,
    harmful: tuple[str, ...] = (),
    *,
    data_dir: str | None = None,
    size: int = 28,
    max_train: int | None = None,
    seed: int = 0,
) -> Problem[Task]:
    """Load the two sides of an immunization by name.

    Args:
        data: ``digits``, ``mnist``, ``house``, or a file of features (.npz, .safetensors).
        primary: The task to keep: classes against classes (``4,6:2,3,7``), several to be told
            apart (``0:1:2`` or ``0-2``), one class (``4``), whose images then get a constant label,
            or a file; nothing for ``house`` and for a file that is one task.
        harmful: The tasks to make hard, in the same form.
        data_dir: Folder of the files of ``mnist`` and ``house``; fetched into a cache when omitted.
        size: Side of MNIST images.
        max_train: Largest number of training samples of each task; all when omitted.
        seed: Seed of splits and orders.

    Returns:
        The problem.

    Raises:
        ConnectionError: If files have to be fetched and there is no network.
        FileNotFoundError: If a file is missing.
        ValueError: If an argument is out of range.

    Example:
        >>> load_problem("digits", "3:8", ("4:9",)).harmful[0].name
        'digit 4 against 9'
    """
    if max_train is not None and max_train < 1:
        raise ValueError(f"max_train must be at least 1, got {max_train}")
    check_names(data, primary, harmful)
    if data == "house":
        folder = _folder(data, data_dir)
        first, second = (house_prices_task(folder, r) for r in ("primary", "harmful"))
        return Problem.of(_cut(first, max_train), _cut(second, max_train))
    if primary is None and not harmful:
        primary, harmful = _DEFAULTS[data]
    tasks = []
    for text in (primary, *harmful):
        if text is not None and text.endswith(FILES):
            task = features_task(text, seed=seed)
        elif data.endswith(FILES):
            task = features_task(data, seed=seed) if text is None else _classes(data, text, seed)
        else:
            assert text is not None  # check_names asked
            task = _digits(data, parse_sides(text), data_dir, size, seed)
        tasks.append(_cut(task, max_train))
    return Problem(tasks[0], tuple(tasks[1:]))


def other_pairs(
    data: str,
    primary: str | None,
    harmful: tuple[str, ...],
    *,
    data_dir: str | None = None,
    size: int = 28,
    max_train: int | None = None,
    seed: int = 0,
) -> list[Task]:
    """Pairs of classes of the same data that are neither the primary nor a harmful task.

    What an attacker may choose from whom the immunizer did not think of. Arguments as for
    :func:`load_problem`.

    Returns:
        One task a pair, each class against each; none for ``house`` and for files of one task.

    Example:
        >>> len(other_pairs("digits", "3:8", ("4:9",)))  # of 45 pairs
        43
    """
    if primary is None and not harmful and data in _DEFAULTS:
        primary, harmful = _DEFAULTS[data]
    named = [text for text in (primary, *harmful) if text is not None]
    if data == "house" or not named or any(text.endswith(FILES) for text in named):
        return []
    names = target_names(data) if data.endswith(FILES) else ()
    taken = {frozenset(parse_sides(text, names)) for text in named}
    classes: list[int] = list(range(10))
    if data.endswith(FILES):
        classes = sorted(int(label) for label in load_features(data, seed=seed)[1].unique())
    texts = [
        f"{names[one]}:{names[other]}" if names else f"{one}:{other}"
        for one, other in combinations(classes, 2)
        if frozenset({(one,), (other,)}) not in taken
    ]
    tasks = [
        _classes(data, text, seed)
        if data.endswith(FILES)
        else _digits(data, parse_sides(text), data_dir, size, seed)
        for text in texts
    ]
    return [_cut(task, max_train) for task in tasks]


def _digits(
    data: str,
    sides: tuple[tuple[int, ...], ...],
    data_dir: str | None,
    size: int,
    seed: int,
) -> Task:
    first, *others = sides
    if data == "digits":
        if others:
            return digits_task(first, *others, seed=seed)
        return _one_class(*load_digits(), None, first, seed)
    folder = _folder(data, data_dir)
    if others:
        return mnist_task(folder, first, *others, size=size, seed=seed)
    train, test = (_mnist(str(folder), size, part) for part in (True, False))
    return _one_class(*train, test, first, seed)


@lru_cache(maxsize=2)
def _mnist(folder: str, size: int, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels, kept for the next point of a sweep: unpacking takes seconds."""
    return load_mnist(folder, train=train, size=size)


def _one_class(
    images: np.ndarray,
    labels: np.ndarray,
    test: tuple[np.ndarray, np.ndarray] | None,
    digits: tuple[int, ...],
    seed: int,
) -> Task:
    """Images of these digits alone with the label +1, as the released code has them."""
    chosen = np.flatnonzero(np.isin(labels, digits))
    chosen = chosen[np.random.default_rng(seed).permutation(len(chosen))]
    if test is None:
        cut = round(0.6 * len(chosen))
        parts = images[chosen[:cut]], images[chosen[cut:]]
    else:
        parts = images[chosen], test[0][np.isin(test[1], digits)]
    tensors = [torch.from_numpy(np.ascontiguousarray(part)) for part in parts]
    ones = [torch.ones(len(part), dtype=torch.float64) for part in tensors]
    name = f"images of digit {' or '.join(map(str, digits))}, constant label"
    return Task(name, tensors[0], ones[0], tensors[1], ones[1])


def _classes(path: str, text: str, seed: int) -> Task:
    """Some classes of a file of features: +1 against -1, several, or one with the label +1."""
    names = target_names(path)
    sides = parse_sides(text, names)
    name = Path(path).stem
    found = load_features(path, seed=seed)
    parts = []
    for x, y in (found[:2], found[2:]):
        for wanted in sum(sides, ()):
            if not bool((y == wanted).any()):
                raise ValueError(
                    f"{name}: both parts must hold the classes of {text!r}, got no "
                    f"{names[wanted] if names else wanted}"
                )
        kept = torch.isin(y, y.new_tensor(sum(sides, ())))
        parts += [x[kept], side_targets(y[kept].to(torch.int64), *sides).to(x.dtype)]
    x_train, y_train, x_test, y_test = parts
    called = [[names[one] for one in side] for side in sides] if names else sides
    return Task(f"{name}, {text}", x_train, y_train, x_test, y_test, class_names(*called))


def _cut(task: Task, count: int | None) -> Task:
    if count is None:
        return task
    return replace(task, x_train=task.x_train[:count], y_train=task.y_train[:count])


def _folder(data: str, data_dir: str | None) -> Path:
    """The folder of the files: the one given, or the cache, into which they are fetched once."""
    if data_dir is None:
        fetch = fetch_house_prices if data == "house" else fetch_mnist
        try:
            return fetch()
        except ConnectionError as error:
            raise ConnectionError(f"{error} with --data-dir") from None
    if not Path(data_dir).is_dir():
        raise FileNotFoundError(f"data_dir must name a folder, got {data_dir}")
    return Path(data_dir)
