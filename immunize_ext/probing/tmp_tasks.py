"""The two sides of a condition-number run, from its settings."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from immunize_ext.probing.data import (
    Task,
    digits_task,
    features_task,
    fetch_house_prices,
    fetch_mnist,
    house_prices_task,
    load_digits,
    load_mnist,
    mnist_task,
)
from immunize_ext.probing.tmp_config import KappaConfig
from immunize_ext.storage import tensor_digest

FILES = (".npz", ".safetensors")


_DEFAULTS = {"digits": ("4,6:2,3,7", ("5,9:0,1,8",)), "mnist": ("4", ("9",))}


def parse_sides(text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Read ``"4,6:2,3"`` as classes against classes, and ``"4"`` as one class alone.

    Args:
        text: A task as the command line writes it.

    Returns:
        Positive and negative classes; none of the latter for one class alone.

    Raises:
        ValueError: If the text has another form.

    Example:
        >>> parse_sides("4,6:2,3"), parse_sides("9")
        (((4, 6), (2, 3)), ((9,), ()))
    """
    sides = text.split(":")
    try:
        classes = tuple(tuple(int(part) for part in side.split(",")) for side in sides)
        if len(classes) > 2 or min(min(side) for side in classes) < 0:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"a task must look like '4,6:2,3,7' (classes against classes) or '4' (one class), got "
            f"{text!r}"
        ) from None
    negative = classes[1] if len(classes) == 2 else ()
    both = sorted(set(classes[0]) & set(negative))
    if both:
        raise ValueError(f"a task must not have a class on both sides, got {both[0]} in {text!r}")
    return classes[0], negative


def load_tasks(config: KappaConfig) -> tuple[Task, list[Task]]:
    """Load the primary and the harmful tasks.

    Args:
        config: The settings.

    Returns:
        The primary task and the harmful ones.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the settings fit no data.
    """
    if config.max_train is not None and config.max_train < 1:
        raise ValueError(f"max_train must be at least 1, got {config.max_train}")
    if config.data == "house":
        if config.primary is not None or config.harmful:
            raise ValueError("house has its two tasks; leave out primary and harmful")
        folder = _folder(config)
        primary, harmful = (house_prices_task(folder, r) for r in ("primary", "harmful"))
        return _cut(primary, config), [_cut(harmful, config)]
    file = config.data.endswith(FILES)
    if not file and config.data not in _DEFAULTS:
        raise ValueError(
            f"data must be digits, mnist, house or a file ending in {' or '.join(FILES)}, got "
            f"{config.data!r}"
        )
    primary_text, harmful_texts = config.primary, config.harmful
    if not file and primary_text is None and not harmful_texts:
        primary_text, harmful_texts = _DEFAULTS[config.data]
    if not harmful_texts:
        raise ValueError("harmful must name a task, got none; give --harmful")
    if primary_text is None and not file:
        raise ValueError("primary must name a task, got none; give --primary")
    primary = _one(config, primary_text)
    return _cut(primary, config), [_cut(_one(config, text), config) for text in harmful_texts]


def _one(config: KappaConfig, text: str | None) -> Task:
    if text is not None and text.endswith(FILES):
        return features_task(text, seed=config.seed)
    if config.data.endswith(FILES):
        task = features_task(config.data, seed=config.seed)
        return task if text is None else _select(task, text)
    assert text is not None  # asked by the caller
    positive, negative = parse_sides(text)
    if max(positive + negative) > 9:
        raise ValueError(f"{config.data}: a task must hold digits from 0 to 9, got {text!r}")
    if config.data == "digits":
        if negative:
            return digits_task(positive, negative, seed=config.seed)
        return _one_class(*load_digits(), None, positive, config.seed)
    folder = _folder(config)
    if negative:
        return mnist_task(folder, positive, negative, size=config.size, seed=config.seed)
    return _one_class(
        *_mnist(str(folder), config.size, True),
        _mnist(str(folder), config.size, False),
        positive,
        config.seed,
    )


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


def _select(task: Task, text: str) -> Task:
    """Some classes of a file of features: +1 against -1, or one class with the label +1."""
    positive, negative = parse_sides(text)
    parts = []
    for x, y in ((task.x_train, task.y_train), (task.x_test, task.y_test)):
        for wanted in positive + negative:
            if not bool((y == wanted).any()):
                raise ValueError(
                    f"{task.name}: both parts must hold the classes of {text!r}, got no {wanted}"
                )
        is_positive = torch.isin(y, y.new_tensor(positive))
        kept = is_positive | torch.isin(y, y.new_tensor(negative))
        labels = is_positive.to(x.dtype) * 2.0 - 1.0
        parts += [x[kept], labels[kept]]
    return Task(f"{task.name}, {text}", *parts)


def _cut(task: Task, config: KappaConfig) -> Task:
    count = config.max_train
    if count is None:
        return task
    return Task(task.name, task.x_train[:count], task.y_train[:count], task.x_test, task.y_test)


def _folder(config: KappaConfig) -> Path:
    """The folder of the files: the one given, or the cache, into which they are fetched once."""
    if config.data_dir is None:
        fetch = fetch_house_prices if config.data == "house" else fetch_mnist
        try:
            return fetch()
        except ConnectionError as error:
            raise ConnectionError(f"{error} with --data-dir") from None
    if not Path(config.data_dir).is_dir():
        raise FileNotFoundError(f"data_dir must name a folder, got {config.data_dir}")
    return Path(config.data_dir)


def fingerprint(tasks: list[Task]) -> str:
    """SHA-256 over all numbers of some tasks: whether a later attack sees the same data."""
    return tensor_digest(
        (f"{index}.{name}", getattr(task, name).to(torch.float64))
        for index, task in enumerate(tasks)
        for name in ("x_train", "y_train", "x_test", "y_test")
    )
