"""What iterative immunizers of a linear extractor share: the loop, its records, its checkpoints."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from immunize_ext.ops.spectrum import gram_extremes
from immunize_ext.probing.data.problem import Problem
from immunize_ext.probing.data.scale import excess_exponent, in_range, unit_scale
from immunize_ext.probing.data.task import Task
from immunize_ext.probing.immunizers.control import ControllerName, CorridorController
from immunize_ext.probing.immunizers.corridor import check_corridor, project_to_corridor
from immunize_ext.probing.immunizers.immunized import Immunized
from immunize_ext.probing.metrics.hessian import check_ridge, with_ridge
from immunize_ext.seams import Progress
from immunize_ext.settings import plain
from immunize_ext.storage import load_checkpoint, save_checkpoint, tensor_digest

# Usual values of the knobs of iterative methods, for a frontier.
FEW_STEPS = (10.0, 30.0, 100.0, 300.0)


# How often a run reports and saves where it stands.
_PARTS = 20


def check_settings(
    name: str,
    positive: dict[str, float],
    choices: dict[str, tuple[str, ...]],
    given: dict[str, str],
) -> None:
    """Refuse numbers that are not finite and positive, and words that are not known."""
    for argument, value in positive.items():
        if not (math.isfinite(value) and value > 0.0):
            raise ValueError(f"{name}: {argument} must be finite and positive, got {value}")
    for argument, allowed in choices.items():
        if given[argument] not in allowed:
            raise ValueError(
                f"{name}: {argument} must be one of {', '.join(allowed)}, got {given[argument]!r}"
            )


def batch_indices(count: int, size: int, step: int, *, seed: int, role: int) -> Tensor:
    """Which samples a step sees: a function of the step, so that a run can go on anywhere.

    Samples are shuffled anew each epoch, and those that do not fill a batch wait for another one:
    Gram matrices are not normalised, so a ragged batch of a few rows has another scale, and R_ill,
    which is 1 over a fourth power of the features, would rule the step alone.

    Args:
        count: Number of samples.
        size: Samples in a batch; all of them where there are fewer.
        step: The step, from 0.
        seed: Seed of the orders.
        role: Which of several parts draws, so that each has orders of its own.

    Returns:
        ``min(size, count)`` indices.

    Example:
        >>> first, second = (batch_indices(5, 2, s, seed=0, role=0) for s in (0, 1))
        >>> len(set(first.tolist()) | set(second.tolist()))
        4
    """
    epoch, place = divmod(step, max(1, count // size))
    generator = torch.Generator().manual_seed((seed * 2_000_003 + 2 * epoch + role) % 2**63)
    order = torch.randperm(count, generator=generator)
    return order[place * size : (place + 1) * size]


def log_kappa_of(features: Tensor) -> Tensor:
    """Log of the condition number of F^T F, differentiable."""
    extremes = gram_extremes(features * unit_scale(features))
    return (extremes.lambda_max / extremes.lambda_min).log()


@dataclass
class Descent:
    """One run of an iterative method: where it stands, and what it saw.

    Attributes:
        name: Who runs it; stands in errors.
        primary: Rows whose Gram matrix is K_P with its ridge, shape ``(n + p, p)``.
        harmful: The same for K_H.
        start: theta_0, shape ``(p, p)``, float64.
        theta: The iterate, changed in place.
        corridor: The least and the largest kappa_P, or ``None``.
        controller: What keeps to the corridor; ``None`` projects.
        optimizer: What moves theta, where a torch optimizer does.
        tensors: What else changes in place: heads, the best iterate.
        marks: What else has to be known to go on.
        found: Settings that were left open, as the run chose them.
        history: One record for each iterate that was looked at.
    """

    name: str
    primary: Tensor
    harmful: Tensor
    start: Tensor
    theta: Tensor
    corridor: tuple[float, float] | None
    controller: CorridorController | None = None
    optimizer: torch.optim.Optimizer | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    marks: dict[str, float] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        name: str,
        model: Tensor | None,
        problem: Problem[Task],
        ridge: float,
        corridor: tuple[float, float] | None,
        controller: CorridorController | None = None,
    ) -> Descent:
        """Take the inputs of two tasks and the start, checked against each other."""
        check_ridge(name, ridge)
        primary, harmful = problem.primary, problem.only_harm(f"{name}.fit")
        start = identity_or(model, primary, name)
        rows = [with_ridge(t.x_train.to(torch.float64), ridge) for t in (primary, harmful)]
        descent = cls(name, rows[0], rows[1], start, start.clone(), corridor, controller)
        if controller is None:
            descent.theta = descent.settled(start).clone()
        return descent

    def record(self, step: int, **values: float) -> dict[str, float]:
        """Append the record of the iterate."""
        theta = self.theta.detach()
        logs = [float(log_kappa_of(rows @ theta)) for rows in (self.primary, self.harmful)]
        names = ("log_kappa_primary", "log_kappa_harmful")
        base = [self.history[0][n] for n in names] if self.history else logs
        record = {
            "step": float(step),
            **dict(zip(names, logs, strict=True)),
            "log_rir": (logs[1] - base[1]) - (logs[0] - base[0]),
            **values,
        }
        if self.controller is not None:
            record["multiplier"] = self.marks.get("multiplier", 0.0)
        self.history.append(record)
        return record

    def settled(self, theta: Tensor, before: Tensor | None = None) -> Tensor:
        """An iterate checked finite and kept to the corridor, if there is one.

        Args:
            theta: The iterate that a method proposes.
            before: The one that it comes from; ``self.theta`` when omitted.
        """
        if not bool(torch.isfinite(theta).all()):
            raise ValueError(
                f"{self.name}.fit: step sizes must keep theta finite, got NaN or infinity after "
                f"step {len(self.history)}; lower the step size"
            )
        if self.corridor is None:
            return theta
        if self.controller is not None:
            return self._steered(theta, self.theta.detach() if before is None else before)
        return project_to_corridor(theta, self.primary, self.corridor)

    @torch.enable_grad()
    def _steered(self, theta: Tensor, before: Tensor) -> Tensor:
        """The controller's correction, in E of theta' = theta exp(E), where no scale counts.

        With F = A theta the gradient of log kappa_P in E is N = F^T d log kappa / dF, symmetric.
        """
        assert self.controller is not None
        features = (self.primary @ before).requires_grad_()
        value = log_kappa_of(features)
        (gradient,) = torch.autograd.grad(value, features)
        normal = features.detach().mT @ gradient
        normal = (normal + normal.mT) / 2.0
        change = torch.linalg.solve(before, theta) - torch.eye(
            len(theta), dtype=theta.dtype, device=theta.device
        )
        share = self.controller.correction(
            float(value.detach()),
            float((normal * change).sum()),
            float(normal.square().sum()),
            float(change.norm()),
            self.marks,
        )
        return theta @ torch.linalg.matrix_exp(share * normal)

    def move(self) -> None:
        """One step of the optimizer, checked and kept to the corridor."""
        assert self.optimizer is not None  # the method made one
        before = self.theta.detach().clone()
        self.optimizer.step()
        with torch.no_grad():
            self.theta.copy_(self.settled(self.theta.detach(), before))

    def state(self) -> dict[str, Tensor]:
        """Everything that changes, by name."""
        found = {"theta": self.theta, **self.tensors}
        for index, parameter in enumerate(self._parameters()):
            assert self.optimizer is not None  # it has parameters
            for name, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    found[f"optimizer.{index}.{name}"] = value
        return found

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` gave."""
        with torch.no_grad():
            for name, tensor in {"theta": self.theta, **self.tensors}.items():
                tensor.copy_(state[name])
        parameters = self._parameters()
        for key, value in state.items():
            if key.startswith("optimizer."):
                assert self.optimizer is not None  # it was there when the state was taken
                _, index, name = key.split(".", 2)
                self.optimizer.state[parameters[int(index)]][name] = value

    def _parameters(self) -> list[Tensor]:
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return [parameter for group in groups for parameter in group["params"]]


def identity_or(model: Tensor | None, like: Task, name: str) -> Tensor:
    """The extractor to start from, float64: the one given, or the identity."""
    p = like.num_features
    if model is None:
        return torch.eye(p, dtype=torch.float64, device=like.x_train.device)
    if model.shape != (p, p):
        raise ValueError(f"{name}.fit: model must have shape ({p}, {p}), got {tuple(model.shape)}")
    return model.detach().to(torch.float64)


class Checkpoint:
    """Where a run stands, in a folder; of one run alone.

    Args:
        folder: The folder, made if it is missing; ``None`` keeps nothing.
        name: Who runs; stands in errors.
        digest: What tells one run from another.
    """

    _KIND = "immunize_ext.Descent/1"

    def __init__(self, folder: Path | None, name: str, digest: Callable[[], str]) -> None:
        self._name = name
        self._file = None if folder is None else Path(folder) / "descent.safetensors"
        self._digest = "" if folder is None else digest()

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and values of the same run; ``None`` where nothing is kept.

        Raises:
            ValueError: If they are of another run, or damaged.
        """
        if self._file is None or not self._file.is_file():
            return None
        function = f"{self._name}.fit"
        tensors, values = load_checkpoint(self._file, kind=self._KIND, function=function)
        if values.pop("digest") != self._digest:
            raise ValueError(
                f"{function}: resume must be the folder of a run with the same settings, model and "
                f"problem, got another's in {self._file.parent}; choose another folder, or remove "
                "this one"
            )
        return tensors, values

    def save(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Replace what is kept."""
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            values = {**values, "digest": self._digest}
            save_checkpoint(self._file, tensors, kind=self._KIND, values=values)


def run_digest(settings: dict[str, Any], model: Sequence[tuple[str, Tensor]], problem: str) -> str:
    """SHA-256 over the settings, the model and the problem of a run."""
    text = json.dumps([settings, tensor_digest(model), problem], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class LinearImmunizer(ABC):
    """A method for linear extractors: settings, and how to fit.

    Attributes:
        method: Its name, unique among methods.
        knob: The setting by which it trades slow-down of the harm for cost; ``None`` without one.
        grid: Values of the knob that a frontier tries.
        takes_several: Whether it protects against several harmful tasks at once.
        sees_scale: Whether multiplying all features by a number changes more than rounding.
    """

    method: ClassVar[str]
    knob: ClassVar[str | None] = None
    grid: ClassVar[tuple[float, ...]] = ()
    takes_several: ClassVar[bool] = False
    sees_scale: ClassVar[bool] = False

    def prepared(self, problem: Problem[Task]) -> Problem[Task]:
        """The problem as tasks whose squares float64 holds, scaled where nothing sees that.

        Raises:
            ValueError: If the size of the features is out of range and the method sees it.
        """
        problem = problem.as_tasks()
        tasks = problem.primary, *problem.harmful, *problem.benign
        exponent = excess_exponent(tasks)
        if exponent == 0:
            return problem
        if self.sees_scale:
            raise ValueError(
                f"{type(self).__name__}.fit: features must have a size between 2^-200 and 2^200, "
                f"whose fourth powers float64 holds, got about 2^{exponent}; multiply the inputs "
                f"of all tasks by 2.0 ** {-exponent}"
            )
        primary, *others = in_range(tasks)
        harms = len(problem.harmful)
        return replace(
            problem,
            primary=primary,
            harmful=tuple(others[:harms]),
            benign=tuple(others[harms:]),
        )

    @property
    def label(self) -> str:
        """What reports call it with its variant."""
        return self.method

    @abstractmethod
    def fit(
        self,
        model: Tensor | None,
        problem: Problem[Task],
        *,
        progress: Progress | None = None,
        resume: Path | None = None,
    ) -> Immunized:
        """Immunize a linear extractor; the one given is not changed.

        Args:
            model: theta_0, shape ``(p, p)``; the identity when ``None``.
            problem: The task to keep and the tasks to make hard; their training parts are used.
            progress: Called with what was done and the share done so far.
            resume: A folder for checkpoints. What a run with the same settings, model and problem
                left there is gone on from, to the bit; a checkpoint of anything else is an error.

        Returns:
            The immunized extractor and how it came about.

        Raises:
            ValueError: If shapes do not fit, there are more harmful tasks than the method takes,
                or ``resume`` is of another run.

        Note:
            Deterministic; computed in float64; torch's global random state is neither read nor
            changed.
        """


def controller_of(
    name: str, corridor: tuple[float, float] | None, kind: str
) -> CorridorController | None:
    """What keeps to a corridor; ``None`` where nothing does, or a projection."""
    if kind == "projection":
        return None
    if corridor is None:
        raise ValueError(
            f"{name}: corridor must be given for controller {kind!r} to keep to, got none; it is "
            "the least and the largest kappa_P"
        )
    return CorridorController(corridor, kind)  # type: ignore[arg-type]  # checked there


Advance = Callable[[int], None]


@dataclass(frozen=True)
class IterativeImmunizer(LinearImmunizer):
    """A method that goes step by step.

    Attributes:
        ridge: Ridge on each K, relative to its largest eigenvalue.
        corridor: The least and the largest kappa_P; ``None`` leaves kappa_P free.
        controller: How it is kept: ``"projection"`` holds it exactly, at the start and after each
            step (module ``corridor``); ``"sqp"``, ``"pi"`` and ``"dual"`` steer towards it from
            where the run starts (module ``control``), as has to be done for deep extractors.
    """

    _: KW_ONLY
    ridge: float = 1e-2
    corridor: tuple[float, float] | None = None
    controller: Literal["projection"] | ControllerName = "projection"

    def __post_init__(self) -> None:
        check_corridor(type(self).__name__, self.corridor)
        controller_of(type(self).__name__, self.corridor, self.controller)

    @abstractmethod
    def begin(self, descent: Descent, problem: Problem[Task]) -> tuple[int, Advance]:
        """Make ready.

        Args:
            descent: The run; heads and an optimizer are put into it.
            problem: The problem.

        Returns:
            The number of steps, and a function that is called with 0, 1, ..., up to this number: it
            records the iterate and, but for the last call, moves it.
        """

    def kept(self, descent: Descent) -> Tensor:
        """The iterate to hand back: the last one."""
        return descent.theta.detach()

    def fit(
        self,
        model: Tensor | None,
        problem: Problem[Task],
        *,
        progress: Progress | None = None,
        resume: Path | None = None,
    ) -> Immunized:
        """Immunize; arguments and errors as in the base class.

        Returns:
            The last iterate. ``history`` has a record for the start and for each step: ``step``,
            ``log_kappa_primary``, ``log_kappa_harmful``, ``log_rir`` (against the start), and what
            the class says.
        """
        problem = self.prepared(problem)
        name = type(self).__name__
        controller = controller_of(name, self.corridor, self.controller)
        descent = Descent.of(name, model, problem, self.ridge, self.corridor, controller)
        total, advance = self.begin(descent, problem)
        settings = {"method": self.method, **plain(self)}
        checkpoint = Checkpoint(
            resume,
            name,
            lambda: run_digest(settings, [("start", descent.start)], problem.digest()),
        )
        first = 0
        if (loaded := checkpoint.load()) is not None:
            descent.restore(loaded[0])
            first, descent.history = loaded[1]["step"], loaded[1]["history"]
            descent.marks = loaded[1]["marks"]
        every = max(1, total // _PARTS)
        for step in range(first, total + 1):
            advance(step)
            if (step + 1) % every == 0 or step == total:
                if progress is not None:
                    progress(f"{self.label}, step {step} of {total}", step / total)
                if step < total:
                    values = {
                        "step": step + 1,
                        "history": descent.history,
                        "marks": descent.marks,
                    }
                    checkpoint.save(descent.state(), values)
        config = {**plain(self), **descent.found}
        return Immunized(self.method, self.kept(descent), descent.start, config, descent.history)
