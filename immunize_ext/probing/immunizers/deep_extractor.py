"""The objectives for deep extractors, as terms of the features of two batches.

    condition_number    lambda_P R_well(H_P) + lambda_H R_ill(H_H)
    r_ill, r_well       one of them alone
    kappa_difference    kappa(H_P) - kappa(H_H)
    kappa_log_ratio     log kappa(H_P) - log kappa(H_H)
    imma                minus the harmful loss of a linear probe after a few steps, relative to the
                        loss of the best constant

H = F^T F of a batch's features F. Each is added to the loss of the primary task. Against several
harms every term that has H_H is the mean over them, weighted by how well each is protected.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from immunize_ext.errors import EqualSingularValuesError
from immunize_ext.ops.precondition import Preconditioner
from immunize_ext.ops.regularizers import gram_r_ill, gram_r_well
from immunize_ext.ops.spectrum import GramExtremes
from immunize_ext.ops.streaming import StreamedGram
from immunize_ext.probing.data.problem import Problem
from immunize_ext.probing.data.samples import Samples, Source
from immunize_ext.probing.extractors.feature_extractor import (
    block_root,
    block_state,
    choose_blocks,
    freeze_except,
)
from immunize_ext.probing.immunizers.control import ControllerName, CorridorController
from immunize_ext.probing.immunizers.guard import Guard, LocalControl
from immunize_ext.probing.immunizers.imma import probe_after_steps
from immunize_ext.probing.immunizers.immunized import ImmunizedExtractor
from immunize_ext.probing.immunizers.loop import (
    Checkpoint,
    batch_indices,
    check_settings,
    log_kappa_of,
    run_digest,
)
from immunize_ext.seams import Progress
from immunize_ext.settings import plain
from immunize_ext.worst_case import Weighting, check_weighting, harm_weights

DeepObjective = Literal[
    "condition_number", "r_ill", "r_well", "kappa_difference", "kappa_log_ratio", "imma"
]


Role = Literal["primary", "harmful"]


@dataclass(frozen=True)
class Features:
    """Features of the primary batch and of one harm's, and the labels of the latter."""

    primary: Tensor
    harmful: Tensor
    harmful_labels: Tensor


@dataclass(frozen=True)
class Term:
    """One term of an objective.

    Attributes:
        name: What its lambda is called: ``"well"``, ``"ill"`` or ``"weight"``.
        value: Its value.
        role: The task whose features alone it depends on; ``None`` where it needs both.
    """

    name: str
    value: Callable[[Features], Tensor]
    role: Role | None = None


def probe_targets(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Centred targets of a squared-loss probe: one column per class, or the real labels."""
    if labels.dtype.is_floating_point:
        targets = labels.to(dtype)[:, None]
    else:
        targets = functional.one_hot(labels.to(torch.int64), classes).to(dtype)
    return targets - targets.mean(0)


def _imma(features: Features, classes: int, steps: int) -> Tensor:
    targets = probe_targets(features.harmful_labels, classes, features.harmful.dtype)
    centred = features.harmful - features.harmful.mean(0)
    probe = probe_after_steps(centred, targets, steps)
    residual = (centred @ probe - targets).square().mean()
    # A batch of one class has nothing to learn: the ratio is 0 there, and so is its gradient.
    return -residual / targets.square().mean().clamp_min(torch.finfo(targets.dtype).tiny)


def terms_of(
    objective: DeepObjective,
    *,
    classes: int,
    inner_steps: int,
    p: float | None = None,
    k: float | None = None,
) -> list[Term]:
    """The terms of an objective.

    Args:
        objective: Which (module docstring).
        classes: Number of harmful classes, for IMMA.
        inner_steps: Steps of the probe, for IMMA.
        p: Normaliser of R_well, as in :func:`~immunize_ext.ops.regularizers.gram_r_well`.
        k: Normaliser of R_ill, as in :func:`~immunize_ext.ops.regularizers.gram_r_ill`.

    Returns:
        One term, or two for ``"condition_number"``.
    """
    well = Term("well", lambda f: gram_r_well(f.primary, p=p), "primary")
    ill = Term("ill", lambda f: gram_r_ill(f.harmful, k=k), "harmful")
    if objective == "condition_number":
        return [well, ill]
    if objective in ("r_ill", "r_well"):
        return [ill if objective == "r_ill" else well]
    if objective == "imma":
        return [Term("weight", lambda f: _imma(f, classes, inner_steps), "harmful")]
    if objective == "kappa_log_ratio":
        return [Term("weight", lambda f: log_kappa_of(f.primary) - log_kappa_of(f.harmful))]
    return [Term("weight", lambda f: log_kappa_of(f.primary).exp() - log_kappa_of(f.harmful).exp())]


_NAME = "DeepExtractorImmunizer"


@dataclass(frozen=True)
class DeepExtractorImmunizer:
    """Immunize blocks of a deep extractor by SGD with momentum.

    Attributes:
        blocks: Which blocks change: how many of the last ones
            (:func:`immunize_ext.probing.extractors.feature_extractor.find_stages`), or patterns of
            module names. The paper takes the last two of a ResNet18 and the last one of a ViT.
        objective: ``"condition_number"`` (the method of the paper), ``"r_ill"``, ``"r_well"``,
            ``"kappa_difference"``, ``"kappa_log_ratio"`` or ``"imma"`` (its baselines).
        steps: Number of updates, counted from the very start where a run is resumed.
        batch_size: Samples of each task in a step; what does not fill a batch is left out.
        learning_rate: Of the blocks.
        head_learning_rate: Of the head; that of the blocks when ``None``.
        momentum: Nesterov momentum; 0 for plain SGD.
        head_weight_decay: Of the head; blocks have none.
        lambda_well: lambda_P, or ``None`` to give R_well ``share`` times the gradient norm of the
            primary loss.
        lambda_ill: lambda_H, the same for R_ill.
        p: Normaliser of R_well; the number of features when ``None``. The released code takes the
            last dimension of the inputs.
        k: Normaliser of R_ill; the rank of the batch's features when ``None``.
        weight: Weight of the one term of the other objectives; the same when ``None``.
        share: See ``lambda_well``.
        rebalance_every: Steps after which lambdas left open are balanced anew; ``None``: once.
        weighting: How several harms count: ``"mean"``, alike; ``"exponentiated"``, by
            exp(-harm_rate times phi_h summed over the steps so far); ``"cvar"``, the least
            protected alone. phi_h is by how much log kappa_H of harm h has grown since the first
            step; for ``"imma"``, the share of the loss that its probe leaves.
        harm_rate: eta of ``"exponentiated"``; 0 weighs all harms alike.
        worst_share: Share of the harms that ``"cvar"`` looks at.
        precondition: Name of a linear layer in the blocks, or ``"last"`` for the last one there:
            the gradients of R_well and R_ill are multiplied by K^-1 there, K of that layer's own
            inputs. ``None``: plain gradients.
        precondition_ridge: Ridge on that K, in units of its mean diagonal.
        corridor: The least and the largest kappa of H_P + a I over ``corridor_samples``, kept by
            corrections of each step (module ``control``); ``None`` leaves kappa_P free.
        controller: What kind of correction: ``"sqp"``, ``"pi"`` or ``"dual"``.
        corridor_every: Steps between two measurements of kappa_P and its gradient, each two passes
            over the samples; between them both are carried on to first order.
        corridor_samples: Samples of the primary task that are measured, the same each time; all
            when ``None``. What is kept on few of them is not kept on all.
        corridor_ridge: a, in units of the largest eigenvalue of H_P before the first step.
        local: What changes of the layers are allowed, so that the primary task is kept for certain
            or within a budget (module ``guard``); its head must be given, and stays as it is.
            ``None`` allows all.
        inner_steps: Steps of the probe for ``"imma"``.
        label_smoothing: Of the cross-entropy of the primary task.
        seed: Seed of the batches and of a head that is made here.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> scales = torch.tensor([3.0, 2.0, 1.0, 0.5, 1.0, 1.0])
        >>> x = torch.randn(80, 6, generator=generator) * scales
        >>> h = torch.randn(80, 6, generator=generator) * scales.flip(0)
        >>> y = (x[:, 0] > 0).long()
        >>> body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
        >>> immunizer = DeepExtractorImmunizer(("2",), steps=50, batch_size=16, learning_rate=0.01)
        >>> immunized = immunizer.fit(body, Problem.of((x, y), (h, y)))
        >>> len(immunized.history), immunized.rir((x, y), (h, y), group_size=40).mean_rir() > 1
        (50, True)
    """

    method: ClassVar[str] = "deep"
    takes_several: ClassVar[bool] = True

    blocks: int | tuple[str, ...] = 1
    objective: DeepObjective = "condition_number"
    steps: int = 200
    batch_size: int = 64
    learning_rate: float = 1e-3
    head_learning_rate: float | None = None
    momentum: float = 0.9
    head_weight_decay: float = 2e-5
    lambda_well: float | None = None
    lambda_ill: float | None = None
    p: float | None = None
    k: float | None = None
    weight: float | None = None
    share: float = 1.0
    rebalance_every: int | None = None
    weighting: Weighting = "mean"
    harm_rate: float = 0.1
    worst_share: float = 0.5
    precondition: str | None = None
    precondition_ridge: float = 1e-2
    corridor: tuple[float, float] | None = None
    controller: ControllerName = "sqp"
    corridor_every: int = 1
    corridor_samples: int | None = None
    corridor_ridge: float = 1e-4
    local: LocalControl | None = None
    inner_steps: int = 5
    label_smoothing: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        head_rate = self.learning_rate if self.head_learning_rate is None else 1.0
        check_settings(
            _NAME,
            {
                "blocks": self.blocks if isinstance(self.blocks, int) else 1,
                "steps": self.steps,
                "batch_size": self.batch_size,
                "learning_rate": self.learning_rate,
                "head_learning_rate": self.head_learning_rate or head_rate,
                "share": self.share,
                "rebalance_every": self.rebalance_every or 1,
                "precondition_ridge": self.precondition_ridge,
                "corridor_every": self.corridor_every,
                "corridor_samples": self.corridor_samples or 1,
                "corridor_ridge": self.corridor_ridge,
                "inner_steps": self.inner_steps,
            },
            {"objective": get_args(DeepObjective), "controller": get_args(ControllerName)},
            {"objective": self.objective, "controller": self.controller},
        )
        check_weighting(
            _NAME, self.weighting, self.harm_rate, self.worst_share, rate_name="harm_rate"
        )
        if self.corridor is not None:
            CorridorController(self.corridor, self.controller)
            if self.local is not None:
                raise ValueError(
                    f"{_NAME}: corridor must be None beside local, got {self.corridor}: its "
                    "corrections would lead out of what is allowed"
                )
        for name in ("lambda_well", "lambda_ill", "weight", "head_weight_decay"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"{_NAME}: {name} must be finite and not negative, got {value}")
        for name in ("p", "k"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0.0):
                raise ValueError(f"{_NAME}: {name} must be finite and positive, got {value}")
        for name in ("momentum", "label_smoothing"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(
                    f"{_NAME}: {name} must be at least 0 and below 1, got {getattr(self, name)}"
                )
        if self.batch_size < 2:
            raise ValueError(
                f"{_NAME}: batch_size must be at least 2, since one sample has one singular value, "
                f"got {self.batch_size}"
            )
        preconditioned = ("condition_number", "r_ill", "r_well")
        if self.precondition is not None and self.objective not in preconditioned:
            raise ValueError(
                f"{_NAME}: precondition must be None for objective {self.objective!r}, which mixes "
                f"both tasks or has no K, got {self.precondition!r}"
            )

    def fit(
        self,
        model: nn.Module,
        problem: Problem[Source],
        *,
        progress: Progress | None = None,
        resume: Path | None = None,
    ) -> ImmunizedExtractor:
        """Immunize against the harmful tasks while keeping the primary one.

        Args:
            model: The extractor, yielding features ``(n, p)`` in float32 or float64; copied, not
                changed.
            problem: Samples of all tasks: pairs of tensors or map-style data sets. Integer labels
                mean classes (cross-entropy), real ones regression (squared loss); those of the
                harmful task are used by ``"imma"`` alone. The head is copied.
            progress: Called with what was done and the share done so far.
            resume: A folder for checkpoints. What a run with the same settings, model and problem
                left there is gone on from, also to more steps than it had; the result is that of
                one run, to the bit. A checkpoint of anything else is an error.

        Returns:
            The immunized extractor with theta_0. ``history`` has a record for each step, of its
            batches before the update: ``step``, ``loss``, ``log_kappa_primary``,
            ``log_kappa_harmful``, and for each term its value and ``lambda_*``; with a corridor
            also ``log_kappa_corridor``, where the controller believes to be, and ``multiplier``,
            how much of the gradient of log kappa_P the step before was corrected by.
            Against several harms ``log_kappa_harmful`` is the least of them, and each has its own,
            ``log_kappa_harmful_1`` and so on, its phi, ``protected_1``, and its ``weight_1``.

        Raises:
            ValueError: If blocks, layer, labels or features do not fit, ``resume`` is of another
                run, or anything stops being finite.
            EqualSingularValuesError: If all eigenvalues of a batch's H_H are equal.

        Note:
            Deterministic given ``seed``, on the CPU also over threads of one count; torch's global
            random state is neither read nor changed. R_well and R_ill are computed in float64.

        Source:
            Zheng et al., ICML 2025, section 5.3; optimizer as in the released code.
        """
        samples = (
            Samples(problem.primary, name="primary"),
            *(Samples(harm, name="harmful") for harm in problem.harmful),
        )
        extractor = copy.deepcopy(model)
        blocks = choose_blocks(extractor, self.blocks, function=f"{_NAME}.fit")
        original = block_state(extractor, blocks)
        parameters = freeze_except(extractor, blocks)
        device = next(iter(parameters.values())).device
        run = _Run(self, extractor, parameters, blocks, samples, device)
        steering = None
        if self.corridor is not None:
            steering = _Steering(self, self.corridor, extractor, parameters, samples[0], device)
        head = run.make_head(problem.head)
        if self.local is not None:
            if problem.head is None:
                raise ValueError(
                    f"{_NAME}.fit: problem must have the head of the primary task for local to "
                    "keep its answers, got none; train one first: Problem.of(..., head=head)"
                )
            head.requires_grad_(False)
            run.guard = Guard(
                self.local, extractor, head, parameters, samples[0], device, self.batch_size
            )
            run.rows.clear()
        optimizer = self._optimizer(parameters, head)
        named = {**parameters, **{f"head.{n}": p for n, p in head.named_parameters()}}
        settings = {name: value for name, value in plain(self).items() if name != "steps"}
        weights = [(n, v) for n, v in extractor.state_dict().items()] + list(
            head.state_dict(prefix="head.").items()
        )
        checkpoint = Checkpoint(
            resume, _NAME, lambda: run_digest(settings, weights, problem.digest())
        )
        history: list[dict[str, float]] = []
        lambdas: dict[str, float] = {}
        if (loaded := checkpoint.load()) is not None:
            state, values = loaded
            history, lambdas = values["history"], values["lambdas"]
            run.recall(history)
            if len(history) > self.steps:
                raise ValueError(
                    f"{_NAME}.fit: steps must be at least the {len(history)} that are done in "
                    f"{resume}, got {self.steps}"
                )
            with torch.no_grad():
                for name, parameter in named.items():
                    parameter.copy_(state[name])
            for name, buffer in state.items():
                if name.startswith("momentum."):
                    parameter = named[name.removeprefix("momentum.")]
                    optimizer.state[parameter]["momentum_buffer"] = buffer.to(device)
            if steering is not None:
                steering.restore(state, values["steering"])
        every = max(1, self.steps // _PARTS)
        for step in range(len(history), self.steps):
            before = [] if steering is None else steering.look(step)
            record, lambdas = run.step(step, head, optimizer, lambdas)
            if steering is not None:
                record |= steering.record()
                steering.correct(before)
            history.append(record)
            if (step + 1) % every == 0 or step + 1 == self.steps:
                if progress is not None:
                    progress(f"{self.objective}, step {step + 1}", (step + 1) / self.steps)
                state = {**named, **{f"momentum.{n}": b for n, b in _buffers(named, optimizer)}}
                marks = {}
                if steering is not None:
                    state |= steering.state()
                    marks = steering.marks
                values = {"history": history, "lambdas": lambdas, "steering": marks}
                checkpoint.save(state, values)
        run.close()
        extractor.requires_grad_(False)
        return ImmunizedExtractor(
            method=self.objective,
            extractor=extractor,
            theta0=original,
            head=head.eval(),
            blocks=blocks,
            config={**plain(self), "lambdas": lambdas, **run.found()},
            history=history,
            momentum={name: buffer.clone() for name, buffer in _buffers(named, optimizer)},
        )

    def _optimizer(self, parameters: dict[str, nn.Parameter], head: nn.Module) -> torch.optim.SGD:
        rate = self.learning_rate if self.head_learning_rate is None else self.head_learning_rate
        groups: list[dict[str, Any]] = [{"params": list(parameters.values())}]
        head_parameters = [p for p in head.parameters() if p.requires_grad]
        if head_parameters:
            groups.append(
                {"params": head_parameters, "lr": rate, "weight_decay": self.head_weight_decay}
            )
        return torch.optim.SGD(
            groups, lr=self.learning_rate, momentum=self.momentum, nesterov=self.momentum > 0.0
        )


# How often a run reports and saves where it stands.
_PARTS = 20


def _buffers(
    named: dict[str, nn.Parameter], optimizer: torch.optim.SGD
) -> list[tuple[str, Tensor]]:
    """Momentum buffers by the name of their parameter."""
    found = ((name, optimizer.state.get(p, {}).get("momentum_buffer")) for name, p in named.items())
    return [(name, buffer.detach()) for name, buffer in found if buffer is not None]


class _Steering:
    """kappa_P of a deep extractor, streamed, and what its controller makes of a step."""

    def __init__(
        self,
        settings: DeepExtractorImmunizer,
        corridor: tuple[float, float],
        extractor: nn.Module,
        parameters: dict[str, nn.Parameter],
        samples: Samples,
        device: torch.device,
    ) -> None:
        self.controller = CorridorController(corridor, settings.controller)
        self.every, self.batch_size = settings.corridor_every, settings.batch_size
        self.extractor, self.parameters = extractor, parameters
        self.samples, self.device = samples, device
        count = min(settings.corridor_samples or len(samples), len(samples))
        self.chosen = batch_indices(len(samples), count, 0, seed=settings.seed, role=0)
        self.marks: dict[str, float] = {}
        self.normal: dict[str, Tensor] = {}
        # The model may not change the ruler it is measured with.
        self.floor = settings.corridor_ridge * self._streamed().extremes.lambda_max

    def _streamed(self) -> StreamedGram:
        def blocks() -> Iterator[Tensor]:
            for part in self.chosen.split(self.batch_size):
                yield self.extractor(self.samples.batch(part)[0].to(self.device))

        return StreamedGram(blocks, rank="full")

    def _log_kappa(self, extremes: GramExtremes) -> Tensor:
        return (extremes.lambda_max + self.floor).log() - (extremes.lambda_min + self.floor).log()

    def look(self, step: int) -> list[Tensor]:
        """Measure where that is due; the parameters before the step."""
        if step % self.every == 0 or not self.normal:
            self.marks["log_kappa"] = float(self._streamed().backward(self._log_kappa))
            for name, parameter in self.parameters.items():
                self.normal[name] = _or_zero(parameter.grad, parameter).clone()
                parameter.grad = None
        return [parameter.detach().clone() for parameter in self.parameters.values()]

    @torch.no_grad()
    def correct(self, before: list[Tensor]) -> None:
        """Correct the step that led from ``before`` to where the parameters are."""
        normal, steps = list(self.normal.values()), list(self.parameters.values())
        moved = [p - b for p, b in zip(steps, before, strict=True)]
        slope = sum(float((n * d).sum()) for n, d in zip(normal, moved, strict=True))
        square = _norm(normal) ** 2
        here = self.marks["log_kappa"]
        share = self.controller.correction(here, slope, square, _norm(moved), self.marks)
        for parameter, direction in zip(steps, normal, strict=True):
            parameter.add_(direction, alpha=share)
        self.marks["log_kappa"] = here + slope + share * square

    def record(self) -> dict[str, float]:
        """What the history shall have of the iterate before the step."""
        return {
            "log_kappa_corridor": self.marks["log_kappa"],
            "multiplier": self.marks.get("multiplier", 0.0),
        }

    def state(self) -> dict[str, Tensor]:
        """Tensors that a run goes on from."""
        return {
            "floor": self.floor,
            **{f"normal.{name}": value for name, value in self.normal.items()},
        }

    def restore(self, state: dict[str, Tensor], marks: dict[str, float]) -> None:
        """Take back what :meth:`state` and ``marks`` were."""
        self.marks, self.floor = dict(marks), state["floor"].to(self.device)
        for name, parameter in self.parameters.items():
            self.normal[name] = state[f"normal.{name}"].to(parameter.device)


class _Run:
    """One run: batches, features, gradients."""

    def __init__(
        self,
        settings: DeepExtractorImmunizer,
        extractor: nn.Module,
        parameters: dict[str, nn.Parameter],
        blocks: list[str],
        samples: Sequence[Samples],
        device: torch.device,
    ) -> None:
        self.settings = settings
        self.extractor = extractor
        self.parameters = parameters
        self.samples = samples
        self.device = device
        # Of a harm with fewer classes the further targets are 0, in the loss and in its reference.
        needed = samples[1:] if settings.objective == "imma" else ()
        classes = max((_classes(harm, "harmful") for harm in needed), default=0)
        self.terms = terms_of(
            settings.objective,
            classes=classes,
            inner_steps=settings.inner_steps,
            p=settings.p,
            k=settings.k,
        )
        self.guard: Guard | None = None
        # phi of every harm, summed over the steps so far, and log kappa_H in the first.
        self.met = torch.zeros(len(samples) - 1, dtype=torch.float64)
        self.first: Tensor | None = None
        self.rows: list[Tensor] = []
        self.layer = None if settings.precondition is None else self._linear(blocks)
        self._hook: Any = None
        if self.layer is not None:
            module = block_root(extractor).get_submodule(self.layer)
            self._hook = module.register_forward_pre_hook(
                lambda _, inputs: self.rows.append(inputs[0].detach().flatten(0, -2))
            )

    def found(self) -> dict[str, Any]:
        """What a guard allowed, and what of it was used."""
        return {} if self.guard is None else {"guard": self.guard.report()}

    def recall(self, history: Sequence[dict[str, float]]) -> None:
        """Take what harms met so far from the records of a run that goes on."""
        if history and len(self.met) > 1:
            self.first = _of_harms(history[0], "log_kappa_harmful", len(self.met))
            for record in history:
                self.met += _of_harms(record, "protected", len(self.met))

    def close(self) -> None:
        """Take the hook off the model."""
        if self._hook is not None:
            self._hook.remove()

    def _linear(self, blocks: list[str]) -> str:
        """Name of the linear layer whose gradient is preconditioned."""
        wanted = self.settings.precondition
        root = block_root(self.extractor)
        linear = [
            name
            for block in blocks
            for name, module in root.named_modules()
            if (name == block or name.startswith(f"{block}.")) and isinstance(module, nn.Linear)
        ]
        if wanted == "last" and linear:
            return linear[-1]
        if wanted not in linear:
            raise ValueError(
                f"{_NAME}.fit: precondition must name a linear layer in {', '.join(blocks)}, got "
                f"{wanted!r}; there are {', '.join(linear) or 'none'}"
            )
        return str(wanted)

    def make_head(self, head: nn.Module | None) -> nn.Module:
        """A copy of the head, or a linear one that fits features and labels."""
        if head is not None:
            return copy.deepcopy(head).to(self.device).requires_grad_(True).eval()
        inputs, labels = self.samples[0].batch([0])
        with torch.no_grad():
            features = self.extractor(inputs.to(self.device))
        self.rows.clear()
        if features.dim() != 2:
            raise ValueError(
                f"{_NAME}.fit: model must yield features (n, p), got {tuple(features.shape)}; "
                "wrap it in FeatureExtractor"
            )
        outputs = 1 if labels.dtype.is_floating_point else _classes(self.samples[0], "primary")
        p = features.shape[1]
        generator = torch.Generator().manual_seed(self.settings.seed)
        made = nn.Linear(p, outputs, device="meta", dtype=features.dtype).to_empty(device="cpu")
        with torch.no_grad():
            made.weight.copy_(torch.randn(outputs, p, generator=generator) / math.sqrt(p))
            made.bias.zero_()
        return made.to(self.device).eval()

    def step(
        self,
        step: int,
        head: nn.Module,
        optimizer: torch.optim.SGD,
        lambdas: dict[str, float],
    ) -> tuple[dict[str, float], dict[str, float]]:
        """One update; its record and the lambdas in force.

        Raises:
            EqualSingularValuesError: If all eigenvalues of a batch are equal.
            ValueError: If anything stops being finite.
        """
        try:
            return self._step(step, head, optimizer, lambdas)
        except EqualSingularValuesError as error:
            if step == 0:
                raise
            # Weights that ran away give features without a direction left.
            raise EqualSingularValuesError(
                f"{_NAME}.fit: at step {step} of {self.settings.steps}: {error}; lower "
                "learning_rate or share"
            ) from error

    def _step(
        self,
        step: int,
        head: nn.Module,
        optimizer: torch.optim.SGD,
        lambdas: dict[str, float],
    ) -> tuple[dict[str, float], dict[str, float]]:
        self.rows.clear()
        (x, y), *harms = (
            tuple(t.to(self.device) for t in batch.batch(self._indices(step, role)))
            for role, batch in enumerate(self.samples)
        )
        primary = self.extractor(x)
        features = [Features(primary, self.extractor(images), labels) for images, labels in harms]
        for found in (primary, *(one.harmful for one in features)):
            self._check_finite(step, bool(torch.isfinite(found).all()))
        loss = self._loss(head(primary), y)
        blocks = list(self.parameters.values())
        head_parameters = [p for p in head.parameters() if p.requires_grad]
        every = torch.autograd.grad(
            loss, blocks + head_parameters, retain_graph=True, allow_unused=True
        )
        gradients = [_or_zero(g, p) for g, p in zip(every, blocks + head_parameters, strict=True)]
        total, norm = gradients[: len(blocks)], _norm(gradients[: len(blocks)])
        record = {
            "step": float(step),
            "loss": float(loss.detach()),
            "log_kappa_primary": float(log_kappa_of(primary.detach())),
        }
        values = {
            term.name: [
                term.value(one) for one in (features[:1] if term.role == "primary" else features)
            ]
            for term in self.terms
        }
        weights = self._weigh(record, features, values)
        every_steps = self.settings.rebalance_every
        fresh = not lambdas or (every_steps is not None and step % every_steps == 0)
        lambdas = {} if fresh else dict(lambdas)
        for term in self.terms:
            given = getattr(self.settings, _SETTINGS[term.name])
            counts = [1.0] if term.role == "primary" else weights
            value = torch.stack(
                [c * v for c, v in zip(counts, values[term.name], strict=True)]
            ).sum()
            record[_VALUES.get(term.name, self.settings.objective)] = float(value.detach())
            if given != 0.0:
                parts = self._term_gradient(term, values[term.name], counts, blocks)
                if term.name not in lambdas:
                    size = _norm(parts)
                    balanced = self.settings.share * norm / size if size > 0.0 else 0.0
                    lambdas[term.name] = balanced if given is None else given
                total = [a + lambdas[term.name] * b for a, b in zip(total, parts, strict=True)]
            lambdas.setdefault(term.name, 0.0)
            record[f"lambda_{term.name}"] = lambdas[term.name]
        finite = all(math.isfinite(v) for v in record.values()) and math.isfinite(_norm(total))
        self._check_finite(step, finite)
        if self.guard is not None:
            total = self.guard.direct(total)
        for parameter, gradient in zip(
            blocks + head_parameters, total + gradients[len(blocks) :], strict=True
        ):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
        if self.guard is not None:
            self.guard.keep()
        return record, lambdas

    def _check_finite(self, step: int, finite: bool) -> None:
        if not finite:
            raise ValueError(
                f"{_NAME}.fit: step sizes must keep the features finite, got NaN or infinity at "
                f"step {step} of {self.settings.steps}; lower learning_rate or share"
            )

    def _weigh(
        self,
        record: dict[str, float],
        features: list[Features],
        values: dict[str, list[Tensor]],
    ) -> list[float]:
        """What each harm counts in this step; what a record says of harms is put into it."""
        logs = torch.tensor([float(log_kappa_of(one.harmful.detach())) for one in features])
        logs = logs.to(torch.float64)
        record["log_kappa_harmful"] = float(logs.min())
        if len(features) == 1:
            return [1.0]
        self.first = logs if self.first is None else self.first
        if self.settings.objective == "imma":
            protected = -torch.stack([v.detach() for v in values["weight"]]).to(logs)
        else:
            protected = logs - self.first
        settings = self.settings
        weights = harm_weights(
            settings.weighting,
            protected,
            self.met,
            rate=settings.harm_rate,
            share=settings.worst_share,
        )
        self.met = self.met + protected
        for name, of in (
            ("log_kappa_harmful", logs),
            ("protected", protected),
            ("weight", weights),
        ):
            record |= {f"{name}_{h}": float(v) for h, v in enumerate(of, start=1)}
        return [float(weight) for weight in weights]

    def _term_gradient(
        self,
        term: Term,
        values: Sequence[Tensor],
        counts: Sequence[float],
        blocks: list[nn.Parameter],
    ) -> list[Tensor]:
        """Gradient of a weighted term by the blocks, preconditioned where that is asked for."""
        counted = [
            (index, count, value)
            for index, (count, value) in enumerate(zip(counts, values, strict=True))
            if count > 0.0
        ]
        if self.layer is None or term.role is None:
            whole = torch.stack([count * value for _, count, value in counted]).sum()
            return self._gradient(whole, blocks)
        # Every harm has a K of its own.
        place = list(self.parameters).index(f"{self.layer}.weight")
        total: list[Tensor] | None = None
        for index, count, value in counted:
            gradients = self._gradient(count * value, blocks)
            rows = self.rows[0 if term.role == "primary" else 1 + index]
            factor = Preconditioner.from_features(rows, ridge=self.settings.precondition_ridge)
            gradients[place] = factor.apply(gradients[place])
            total = (
                gradients
                if total is None
                else [a + b for a, b in zip(total, gradients, strict=True)]
            )
        assert total is not None  # weights have the sum 1
        return total

    def _gradient(self, value: Tensor, blocks: list[nn.Parameter]) -> list[Tensor]:
        found = torch.autograd.grad(value, blocks, retain_graph=True, allow_unused=True)
        if all(gradient is None for gradient in found):
            raise ValueError(
                f"{_NAME}.fit: blocks must have a part in the features, got none of "
                f"{', '.join(list(self.parameters)[:2])}, ...; choose other blocks"
            )
        return [_or_zero(g, p) for g, p in zip(found, blocks, strict=True)]

    def _loss(self, output: Tensor, labels: Tensor) -> Tensor:
        if labels.dtype.is_floating_point:
            return (output.reshape(len(labels), -1).squeeze(1) - labels).square().mean()
        return functional.cross_entropy(
            output, labels.to(torch.int64), label_smoothing=self.settings.label_smoothing
        )

    def _indices(self, step: int, role: int) -> Tensor:
        """Which samples a step sees: a function of step and seed, so that runs can go on."""
        count, size = len(self.samples[role]), self.settings.batch_size
        # Orders go by epoch and by two roles; further harms have seeds of their own.
        seed = self.settings.seed + 1_000_003 * (role // 2)
        return batch_indices(count, size, step, seed=seed, role=role % 2)


_SETTINGS = {"well": "lambda_well", "ill": "lambda_ill", "weight": "weight"}


_VALUES = {"well": "r_well", "ill": "r_ill"}


def _or_zero(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if gradient is None else gradient


def _of_harms(record: dict[str, float], name: str, count: int) -> Tensor:
    values = [record[f"{name}_{h}"] for h in range(1, count + 1)]
    return torch.tensor(values, dtype=torch.float64)


def _norm(gradients: list[Tensor]) -> float:
    return math.sqrt(sum(float(g.to(torch.float64).square().sum()) for g in gradients))


def _classes(samples: Samples, name: str) -> int:
    """Number of classes: what the data set says, or one more than the largest label."""
    source = samples.source
    if samples.tensors is not None:
        labels = samples.tensors[1]
        if labels.dtype.is_floating_point:
            return 1
        if int(labels.min()) < 0:
            raise ValueError(
                f"{_NAME}.fit: {name} labels must be classes from 0 on, got {int(labels.min())}"
            )
        return int(labels.max()) + 1
    classes = getattr(source, "classes", None)
    if classes is None:
        raise ValueError(
            f"{_NAME}.fit: {name} must say its classes, got a {type(source).__name__} without the "
            "attribute 'classes'; set it to the list of class names, or give a head"
        )
    return len(classes)
