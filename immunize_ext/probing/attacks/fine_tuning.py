"""Attackers of a deep extractor who train more than a head.

    head         a linear head alone
    last_block   the last blocks as well, as immunizers choose them
    lora         B A added to every linear and every dense convolution's weight, A random, B 0
    full         everything

Each trains by Adam on the cross-entropy, in evaluation mode: statistics of batch norms stay. The
head sees features that were centred and scaled to root mean square 1 by what the extractor gives at
the start, so that no scale which an immunization leaves behind is taken for protection.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from immunize_ext.probing.data.samples import Samples, Source
from immunize_ext.probing.extractors.feature_extractor import (
    block_root,
    choose_blocks,
    extract_features,
    in_blocks,
)

TrainedPart = Literal["head", "last_block", "lora", "full"]
"""What a :class:`FineTuningAttack` trains."""

_NAME = "FineTuningAttack"


class FineTuned(NamedTuple):
    """What an attacker got.

    Attributes:
        accuracy: Right answers on the test samples by number of steps, at the rate that is best
            there: the attacker's hindsight.
        rates: That rate.
        trained: How many numbers were trained, the head's included.
    """

    accuracy: dict[int, float]
    rates: dict[int, float]
    trained: int


@dataclass(frozen=True)
class FineTuningAttack:
    """Teach an extractor a task, and see how much of it is learnt after some steps.

    Attributes:
        part: What is trained: ``"head"``, ``"last_block"``, ``"lora"`` or ``"full"``.
        learning_rates: Rates of Adam that are tried for it.
        head_learning_rate: That of the head where more than the head is trained.
        evaluate_at: Steps after which the test samples are looked at; the last ends the attack.
        batch_size: Samples in a step; a smaller training part is one batch.
        rank: Of ``"lora"``.
        blocks: Those of ``"last_block"``: how many of the last ones, or names.
        seed: Of the batches, and of A.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.randn(200, 4, generator=generator)
        >>> pair = x, (x[:, 0] > 0).long()
        >>> body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6))
        >>> found = FineTuningAttack("full", evaluate_at=(0, 60)).run(body, pair, pair)
        >>> found.accuracy[60] > 0.9, found.trained
        (True, 108)
    """

    part: TrainedPart = "full"
    learning_rates: tuple[float, ...] = (1e-3, 1e-2)
    head_learning_rate: float = 1e-2
    evaluate_at: tuple[int, ...] = (0, 10, 40)
    batch_size: int = 32
    rank: int = 4
    blocks: int | tuple[str, ...] = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.part not in get_args(TrainedPart):
            raise ValueError(
                f"{_NAME}: part must be one of {', '.join(get_args(TrainedPart))}, got "
                f"{self.part!r}"
            )
        rates = (*self.learning_rates, self.head_learning_rate)
        if not self.learning_rates or not all(math.isfinite(r) and r > 0.0 for r in rates):
            raise ValueError(f"{_NAME}: learning rates must be finite and positive, got {rates}")
        steps = self.evaluate_at
        if not steps or min(steps) < 0 or list(steps) != sorted(set(steps)):
            raise ValueError(f"{_NAME}: evaluate_at must ascend from 0 or more, got {list(steps)}")
        if min(self.batch_size, self.rank) < 1:
            raise ValueError(
                f"{_NAME}: batch_size and rank must be at least 1, got {self.batch_size} and "
                f"{self.rank}"
            )

    def run(self, extractor: nn.Module, train: Source, test: Source) -> FineTuned:
        """Attack a copy of an extractor.

        Args:
            extractor: Yields features ``(n, p)``; not changed.
            train: Inputs and classes from 0 on, of the attacker.
            test: Those to judge by.

        Returns:
            What was learnt at each of ``evaluate_at``, by the rate that is best there.

        Raises:
            ValueError: If blocks or labels do not fit.

        Note:
            Deterministic given ``seed``; torch's global random state is neither read nor changed. A
            rate at which losses stop being finite counts with what it had reached.
        """
        parts = Samples(train, name="train"), Samples(test, name="test")
        labels = [part.batch(list(range(len(part))))[1].to(torch.int64) for part in parts]
        if int(min(y.min() for y in labels)) < 0:
            raise ValueError(f"{_NAME}.run: labels must be classes from 0 on, got negative ones")
        features = extract_features(extractor, parts[0].batches(_JUDGED), dtype=torch.float32)
        middle = features.mean(0)
        scale = float((features - middle).square().mean().sqrt())
        start = _Start(middle, 1.0 / scale if scale > 0.0 else 1.0, int(labels[0].max()) + 1)
        curves: dict[float, dict[int, float]] = {}
        trained = 0
        for rate in self.learning_rates:
            learner = _Learner(self, extractor, start, rate)
            trained = learner.trained
            curves[rate] = learner.curve(*parts)
        best = {step: max(curves, key=lambda r: curves[r][step]) for step in self.evaluate_at}
        return FineTuned({s: curves[r][s] for s, r in best.items()}, best, trained)


# Samples that go through the model at once where nothing is trained.
_JUDGED = 256


class _Start(NamedTuple):
    middle: Tensor
    scale: float
    classes: int


class _Learner:
    """One attack at one rate: what it trains, and the model that this makes."""

    def __init__(
        self, attack: FineTuningAttack, extractor: nn.Module, start: _Start, rate: float
    ) -> None:
        self.attack, self.extractor, self.start = attack, extractor, start
        # Without gradients: what is not trained must not gather any.
        weights = {name: p.detach() for name, p in extractor.named_parameters()}
        self.weights = weights
        self.device = next(iter(weights.values())).device
        self.head = torch.zeros(start.classes, len(start.middle) + 1, device=self.device)
        self.moved = {n: weights[n].clone() for n in _moved(attack, extractor, weights)}
        # Weight, A and B by name.
        self.factors: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        generator = torch.Generator().manual_seed(attack.seed)
        for name in _dense(extractor) if attack.part == "lora" else ():
            weight = weights[name]
            inputs = weight[0].numel()
            first = torch.randn(attack.rank, inputs, generator=generator) / inputs**0.5
            self.factors[name] = (
                weight,
                first.to(weight),
                weight.new_zeros(len(weight), attack.rank),
            )
        rest = [*self.moved.values(), *(one for _, *pair in self.factors.values() for one in pair)]
        groups = [{"params": [self.head], "lr": attack.head_learning_rate if rest else rate}]
        if rest:
            groups.append({"params": rest, "lr": rate})
        for leaf in (self.head, *rest):
            leaf.requires_grad_()
        self.trained = sum(leaf.numel() for leaf in (self.head, *rest))
        self.optimizer = torch.optim.Adam(groups)

    def scores(self, inputs: Tensor) -> Tensor:
        """Class scores of a batch."""
        changed = {
            name: weight + (second @ first).reshape(weight.shape)
            for name, (weight, first, second) in self.factors.items()
        }
        features = functional_call(
            self.extractor, self.weights | self.moved | changed, (inputs.to(self.device),)
        ).to(self.head.dtype)
        features = (features - self.start.middle.to(features)) * self.start.scale
        return features @ self.head[:, :-1].mT + self.head[:, -1]

    def curve(self, train: Samples, test: Samples) -> dict[int, float]:
        """Accuracy at the steps that are asked for."""
        attack, found, finite = self.attack, dict[int, float](), True
        modes = {module: module.training for module in self.extractor.modules()}
        self.extractor.eval()
        try:
            for step in range(attack.evaluate_at[-1] + 1):
                if step in attack.evaluate_at:
                    last = found[max(found)] if found else 0.0
                    found[step] = self._accuracy(test) if finite else last
                if finite and step < attack.evaluate_at[-1]:
                    finite = self._step(train, step)
        finally:
            for module, mode in modes.items():
                module.training = mode
        return found

    def _step(self, train: Samples, step: int) -> bool:
        size = min(self.attack.batch_size, len(train))
        epoch, place = divmod(step, len(train) // size)
        generator = torch.Generator().manual_seed(self.attack.seed * 1_000_003 + epoch)
        order = torch.randperm(len(train), generator=generator)
        inputs, labels = train.batch(order[place * size : (place + 1) * size])
        loss = functional.cross_entropy(self.scores(inputs), labels.to(self.device, torch.int64))
        if not bool(torch.isfinite(loss)):
            return False
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return True

    @torch.no_grad()
    def _accuracy(self, test: Samples) -> float:
        right = 0
        for begin in range(0, len(test), _JUDGED):
            chosen = list(range(begin, min(begin + _JUDGED, len(test))))
            inputs, labels = test.batch(chosen)
            right += int((self.scores(inputs).argmax(1).cpu() == labels.cpu()).sum())
        return right / len(test)


def _moved(
    attack: FineTuningAttack, extractor: nn.Module, weights: Mapping[str, Tensor]
) -> list[str]:
    """Names of the parameters that are trained themselves."""
    if attack.part in ("head", "lora"):
        return []
    if attack.part == "full":
        return list(weights)
    blocks = choose_blocks(extractor, attack.blocks, function=f"{_NAME}.run")
    named = block_root(extractor).named_parameters()
    inside = {id(parameter) for name, parameter in named if in_blocks(name, blocks)}
    return [name for name, parameter in extractor.named_parameters() if id(parameter) in inside]


def _dense(extractor: nn.Module) -> list[str]:
    """Names of the weights that LoRA adds to."""
    return [
        f"{name}.weight" if name else "weight"
        for name, module in extractor.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    ]
