"""Immunization of a deep extractor from settings to a folder: what ``immunize deep`` does.

from immunize_ext.probing import deep_run
found = deep_run.run(deep_run.DeepRunSettings(primary="0-4", harmful=("5-9",)), "runs/deep")
print(found.summary())
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from immunize_ext.probing.attacks.fine_tuning import FineTuningAttack, TrainedPart
from immunize_ext.probing.data import Problem, load_digits, load_mnist
from immunize_ext.probing.data.digits import PIXEL_MEAN, PIXEL_STD
from immunize_ext.probing.data.image_folder import ImageFolder
from immunize_ext.probing.data.mnist import PIXEL_MEAN as MNIST_MEAN
from immunize_ext.probing.data.mnist import PIXEL_STD as MNIST_STD
from immunize_ext.probing.data.problem import parse_sides
from immunize_ext.probing.data.samples import Samples
from immunize_ext.probing.extractors import FeatureExtractor, Preprocessing, load_backbone
from immunize_ext.probing.immunizers import DeepExtractorImmunizer, ImmunizedExtractor
from immunize_ext.report.tables import text_table
from immunize_ext.runtime import named_device
from immunize_ext.seams import Progress
from immunize_ext.settings import build, check_types, plain
from immunize_ext.storage import (
    RESULTS,
    SCHEMA,
    check_target,
    environment,
    run_directory,
    write_json,
    write_json_lines,
)

MODEL, METRICS = "immunized.safetensors", "metrics.jsonl"
# Share of right answers on the task to keep beyond whose loss a run warns.
MOST_LOST = 0.05

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class DeepRunSettings:
    """One immunization of a deep extractor, and who attacks it.

    Attributes:
        backbone: ``efficientnet-lite0``, ``timm:NAME``, ``torchvision:NAME`` or
            ``transformers:NAME``.
        pretrained: Whether its weights are loaded; random ones show mechanics alone, with batch
            norms that have the statistics of the images.
        data: ``digits``, ``mnist``, or a folder with a subfolder of images for each class.
        data_dir: Folder of the files of ``mnist``; a cache, filled once, when omitted.
        side: Height and width of the images.
        max_images: Largest number of training images of each class; a third as many are for tests.
        primary: The task to keep: classes to be told apart (``0-4``) or against each other
            (``0,1:2,3``), by their place in alphabetical order.
        harmful: The tasks to make hard, in the same form; several are weighted (``--weighting``).
        blocks: Which blocks change: how many of the last ones, or names and patterns; a module
            whose name is a number is chosen alone by a pattern (``[1]``).
        settings: Settings of the immunizer by name.
        attacks: What attackers train: ``head``, ``last_block``, ``lora``, ``full``.
        attack_steps: Steps of an attacker.
        device: Where to compute.
        seed: Seed of draws, immunizer and attackers.
    """

    backbone: str = "efficientnet-lite0"
    pretrained: bool = True
    data: str = "digits"
    data_dir: str | None = None
    side: int = 32
    max_images: int = 100
    primary: str = "0-4"
    harmful: tuple[str, ...] = ("5-9",)
    blocks: tuple[str, ...] = ("1",)
    settings: Mapping[str, Any] = field(default_factory=dict)
    attacks: tuple[TrainedPart, ...] = ("head", "last_block", "full")
    attack_steps: int = 40
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        named_device(self.device, here=False)
        if min(self.side, self.max_images, self.attack_steps) < 1:
            raise ValueError(
                f"side, max_images and attack_steps must be at least 1, got {self.side}, "
                f"{self.max_images} and {self.attack_steps}"
            )
        for text in (self.primary, *self.harmful):
            if len(parse_sides(text)) < 2:
                raise ValueError(
                    f"a task of a deep extractor must have two sides or more, got {text!r}; "
                    "write 0-4 or 0:1"
                )
        if not self.harmful:
            raise ValueError("harmful must hold at least one task, got none")
        seen = [sorted(map(sorted, parse_sides(text))) for text in self.harmful]
        twice = [text for k, text in enumerate(self.harmful) if seen[k] in seen[:k]]
        if twice:
            raise ValueError(f"harmful must hold each task once, got {twice[0]} again")
        self.immunizer()
        for part in self.attacks:
            self.attack(part)

    def immunizer(self) -> DeepExtractorImmunizer:
        """The immunizer with its settings."""
        number = self.blocks[0] if len(self.blocks) == 1 else ""
        blocks = int(number) if number.isdigit() else self.blocks
        return build(
            DeepExtractorImmunizer,
            {**self.settings, "seed": self.seed},
            "settings",
            DeepExtractorImmunizer(blocks),
        )

    def attack(self, part: TrainedPart) -> FineTuningAttack:
        """An attacker with its settings."""
        few = part in ("head", "lora")
        return FineTuningAttack(
            part,
            learning_rates=(3e-3, 3e-2) if few else (3e-4, 3e-3),
            evaluate_at=(self.attack_steps,),
            blocks=self.immunizer().blocks,
            seed=self.seed,
        )


@dataclass(frozen=True)
class DeepRun:
    """A finished run.

    Attributes:
        settings: What was asked for.
        immunized: The extractor.
        harms: By harm its RIR, how much log kappa grew, and accuracies of attackers before and
            after.
        log_kappa_primary_growth: How much log kappa_P grew; the largest of the harms' samples.
        kept: Right answers on the task to keep, test images.
        kept_before: The same before, of a head fitted to the features by ridge regression.
        seconds: CPU seconds.
    """

    settings: DeepRunSettings
    immunized: ImmunizedExtractor
    harms: dict[str, dict[str, Any]]
    log_kappa_primary_growth: float
    kept: float
    kept_before: float
    seconds: float

    @property
    def warnings(self) -> list[str]:
        """What whoever serves the extractor has to know."""
        if self.kept_before - self.kept <= MOST_LOST:
            return []
        return [
            f"the task to keep was lost: {self.kept:.1%} of it right, {self.kept_before:.1%} "
            "before; take more --steps, a smaller --share, or a larger --head-learning-rate"
        ]

    @cached_property
    def _record(self) -> dict[str, Any]:
        growth = [one["log_kappa_growth"] for one in self.harms.values()]
        found = {
            "schema": SCHEMA,
            "kind": "deep",
            "request": plain(self.settings),
            "config": self.immunized.config,
            "harms": self.harms,
            "least_log_kappa_growth": min(growth),
            "mean_log_kappa_growth": sum(growth) / len(growth),
            "log_kappa_primary_growth": self.log_kappa_primary_growth,
            "kept": self.kept,
            "kept_before": self.kept_before,
            "warnings": self.warnings,
            "seconds": self.seconds,
            "environment": environment(),
        }
        corridor = self.immunized.config["corridor"]
        if corridor is not None:
            logs = [one["log_kappa_corridor"] for one in self.immunized.history]
            low, high = (math.log(end) for end in corridor)
            found["in_corridor"] = sum(low <= v <= high for v in logs) / len(logs)
        return found

    def results(self) -> dict[str, Any]:
        """Exactly what ``results.json`` holds."""
        return self._record

    def summary(self) -> str:
        """The harms, least protected first, and what was kept."""
        names = list(self.settings.attacks)
        rows = [
            ("harm", "growth of log kappa", "RIR", *(f"{name}: before, after" for name in names))
        ]
        for name, one in sorted(self.harms.items(), key=lambda h: h[1]["log_kappa_growth"]):
            attacks = (one["accuracy"][attack] for attack in names)
            cells = (f"{before:.3f}, {after:.3f}" for before, after in attacks)
            rows.append((name, f"{one['log_kappa_growth']:+.2f}", f"{one['rir']:.3g}", *cells))
        found = self.results()
        lines = [
            text_table(rows),
            "",
            f"  least {found['least_log_kappa_growth']:+.2f}, mean "
            f"{found['mean_log_kappa_growth']:+.2f}; log kappa of the task kept "
            f"{self.log_kappa_primary_growth:+.2f}, {self.kept:.1%} of it right "
            f"({self.kept_before:.1%} before)",
        ]
        if "in_corridor" in found:
            lines.append(
                f"  steps at which the controller believed kappa_P in its corridor: "
                f"{found['in_corridor']:.1%}"
            )
        lines += [f"  warning: {text}" for text in self.warnings]
        return "\n".join(lines)


def run(
    settings: DeepRunSettings,
    out: str | Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> DeepRun:
    """Immunize, attack with and without, and write the folder.

    Args:
        settings: What to do.
        out: The folder: ``results.json``, ``metrics.jsonl`` and ``immunized.safetensors``
            (:meth:`~immunize_ext.probing.immunizers.ImmunizedExtractor.load`).
        force: Whether an existing one is replaced.
        progress: Called with what is being done and the share done so far.

    Returns:
        The run.

    Raises:
        FileExistsError: If ``out`` exists and ``force`` is not given, or is no run folder.
        FileNotFoundError: If data or weights are missing.
        ValueError: If settings do not fit the data or the backbone.
    """
    check_target(out, force=force)
    started = time.process_time()
    say = progress or (lambda text, share: None)
    say("backbone and images", 0.0)
    extractor = load_backbone(settings.backbone, pretrained=settings.pretrained)
    extractor = extractor.to(named_device(settings.device))
    images = _images(settings, extractor)
    primary, *harmful = (
        [_task(part, text) for part in images] for text in (settings.primary, *settings.harmful)
    )
    problem: Problem[Any] = Problem(primary[0], tuple(pair[0] for pair in harmful))
    if not settings.pretrained:
        _calibrate(extractor, primary[0][0])
    immunized = settings.immunizer().fit(
        extractor, problem, progress=lambda text, share: say(text, 0.1 + 0.5 * share)
    )
    original = immunized.original()
    harms, owns = {}, []
    for index, (text, (train, test)) in enumerate(zip(settings.harmful, harmful, strict=True)):
        size = min(100, len(train[1]), len(primary[0][1]))
        ratio = immunized.rir(primary[0], train, group_size=size).full["ridge"]
        log_i, log_ii = (float(value) for value in ratio)
        owns.append(log_ii)
        accuracy = {}
        for part in settings.attacks:
            say(f"{part} on {text}", 0.6 + 0.4 * index / len(harmful))
            got = (
                settings.attack(part).run(model, train, test).accuracy[settings.attack_steps]
                for model in (original, immunized.extractor)
            )
            accuracy[part] = list(got)
        harms[text] = {
            "log_kappa_growth": log_i,
            "rir": math.exp(log_i - log_ii),
            "accuracy": accuracy,
        }
    kept = _right(immunized.extractor, immunized.head, primary[1])
    before = _right(original, _ridge_head(original, primary[0]), primary[1])
    seconds = time.process_time() - started
    found = DeepRun(settings, immunized, harms, max(owns), kept, before, seconds)
    with run_directory(out, force=force) as folder:
        write_json(folder / RESULTS, found.results())
        write_json_lines(folder / METRICS, immunized.history)
        immunized.save(folder / MODEL)
    return found


@torch.no_grad()
def _calibrate(extractor: nn.Module, images: Tensor) -> None:
    """Give batch norms of random weights the statistics of the images.

    With those that they start from (mean 0, variance 1) features of a deep network all but vanish,
    and R_ill with them.
    """
    norms = [m for m in extractor.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over batches
        norm.train()
    device = next(extractor.parameters()).device
    for part in images.split(100):
        extractor(part.to(device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    extractor.eval()


@torch.no_grad()
def _right(extractor: nn.Module, head: nn.Module, samples: Pair) -> float:
    inputs, labels = samples
    device = next(extractor.parameters()).device
    scores = [head(extractor(part.to(device))).argmax(1).cpu() for part in inputs.split(100)]
    return float((torch.cat(scores) == labels).double().mean())


@torch.no_grad()
def _ridge_head(extractor: nn.Module, samples: Pair) -> nn.Linear:
    """The head that ridge regression on classes finds for centred features."""
    inputs, labels = samples
    device = next(extractor.parameters()).device
    features = torch.cat([extractor(part.to(device)).cpu() for part in inputs.split(100)])
    x, y = features.double(), functional.one_hot(labels).double()
    mean, centre = x.mean(0), y.mean(0)
    gram = (x - mean).mT @ (x - mean)
    gram.diagonal().add_(1e-3 * gram.diagonal().mean().clamp(min=1e-12))
    weight = torch.linalg.solve(gram, (x - mean).mT @ (y - centre)).mT
    head = nn.Linear(x.shape[1], y.shape[1])
    head.weight.copy_(weight)
    head.bias.copy_(centre - weight @ mean)
    return head.to(device)


def _task(images: Pair, text: str) -> Pair:
    """Images of the classes of a task; labels are sides."""
    inputs, classes = images
    sides = parse_sides(text)
    known = set(classes.tolist())
    missing = [one for side in sides for one in side if one not in known]
    if missing:
        raise ValueError(
            f"deep: {text!r} must name classes that the data has, 0 to {max(known)}, got "
            f"{missing[0]}"
        )
    side_of = {one: number for number, side in enumerate(sides) for one in side}
    chosen = torch.tensor([int(one) in side_of for one in classes])
    return inputs[chosen], torch.tensor([side_of[int(one)] for one in classes[chosen]])


def _images(settings: DeepRunSettings, extractor: FeatureExtractor) -> list[Pair]:
    """Training and test images of all classes, as the backbone takes them, and their classes."""
    usual = extractor.preprocessing or Preprocessing()
    preprocessing = Preprocessing(settings.side, usual.mean, usual.std)
    most = settings.max_images
    if settings.data == "mnist":
        parts = [load_mnist(settings.data_dir, train=train) for train in (True, False)]
        found = [
            _first_of_each(classes, n)
            for (_, classes), n in zip(parts, (most, -(-most // 3)), strict=True)
        ]
        grey = [
            (torch.from_numpy(images[chosen]) * MNIST_STD + MNIST_MEAN).reshape(-1, 1, 28, 28)
            for (images, _), chosen in zip(parts, found, strict=True)
        ]
        classes = [torch.from_numpy(c[chosen]) for (_, c), chosen in zip(parts, found, strict=True)]
        return [
            (preprocessing(_coloured(images, settings.side)), labels)
            for images, labels in zip(grey, classes, strict=True)
        ]
    generator = np.random.default_rng(settings.seed)
    if settings.data == "digits":
        pixels, digits = load_digits()
        scaled = torch.from_numpy((pixels * PIXEL_STD + PIXEL_MEAN) / 16.0).reshape(-1, 1, 8, 8)
        order = generator.permutation(len(digits))
        train, test = _split(digits[order], most)
        every = preprocessing(_coloured(scaled[order], settings.side))
        labels = torch.from_numpy(digits[order])
        return [(every[part], labels[part]) for part in (train, test)]
    folder = ImageFolder(settings.data, preprocessing)
    order = generator.permutation(len(folder))
    train, test = _split(folder.labels.numpy()[order], most)
    return [Samples(folder).batch(order[part].tolist()) for part in (train, test)]


def _coloured(grey: Tensor, side: int) -> Tensor:
    large = functional.interpolate(grey.float().clamp(0.0, 1.0), size=(side, side), mode="bilinear")
    return large.expand(-1, 3, -1, -1)


def _first_of_each(classes: Any, most: int) -> Any:
    return np.sort(
        np.concatenate([np.flatnonzero(classes == c)[:most] for c in np.unique(classes)])
    )


def _split(classes: Any, most: int) -> tuple[Any, Any]:
    """Places of at most so many training images of each class, and of a third as many others."""
    train, test = [], []
    for one in np.unique(classes):
        places = np.flatnonzero(classes == one)
        count = min(most, max(1, 3 * len(places) // 4))
        train.append(places[:count])
        test.append(places[count : count + -(-count // 3)])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))
