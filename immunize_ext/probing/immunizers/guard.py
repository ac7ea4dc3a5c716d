r"""What a deep extractor may become: changes of its layers that keep the primary task.

Three kinds, of which two are guarantees and one is a budget (``immunize_ext.ops`` has the layer):

    null-space     each layer answers what it answered to every training input of the task to keep,
                   whatever the architecture, up to rounding and to directions of its inputs below
                   sqrt(d eps) of the largest, which their Gram matrix does not show; so do the
                   features, and the head. The report bounds, by layer, what those let through;
    certified      Delta = Delta P, |Delta|_2 <= c in each layer, with c the largest multiple of
                   |W|_2 for which a given share of the right answers stays right under *every*
                   such change (``metrics.drift``): computed before the first step;
    gauss-newton   <Delta, B Delta A> at most the layer's part of a budget, and <g, Delta> <= 0 with
                   g the layer's gradient of the loss to keep. To second order, and as far as K-FAC
                   is the curvature, the loss rises by no more than the budget. The half-space is
                   needed: a trained network's g is small, but not beside sqrt(budget).

Guided are gradients, before the optimizer sees them, and what it made of them. The head, biases and
all that is neither linear nor a convolution stay as they are.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from immunize_ext.ops.local_control import (
    InputSubspace,
    clip_spectral_norm,
    gauss_newton_step,
    project_out,
)
from immunize_ext.ops.moments import collect_moments
from immunize_ext.probing.data.samples import Samples
from immunize_ext.probing.extractors.feature_extractor import block_root
from immunize_ext.probing.metrics.drift import Allowed, certified_answers, drift_bound

RuleName: TypeAlias = Literal["null-space", "certified", "gauss-newton"]
"""What changes are allowed."""

# Of |W|_2: what the search for a certified limit starts from, and how often it halves its range.
_WIDEST, _NARROWEST, _HALVINGS = 10.0, 1e-8, 30


@dataclass(frozen=True)
class LocalControl:
    """What changes of the layers of a deep extractor are allowed (module docstring).

    Attributes:
        rule: ``"null-space"``, ``"certified"`` or ``"gauss-newton"``.
        explained: Share of the mean square of a layer's inputs whose directions ``"certified"``
            leaves alone; the others may change within a limit.
        certified: Share of the answers that are right on the training samples, of which it is to be
            certain that they stay.
        budget: What the loss may rise by for ``"gauss-newton"``, all layers alike.
        ridge: Ridge on both of its factors, relative to their mean diagonal.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> LocalControl("certified", certified=0.95).rule
        'certified'
    """

    rule: RuleName = "null-space"
    explained: float = 0.99
    certified: float = 0.9
    budget: float = 1e-2
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        if self.rule not in get_args(RuleName):
            raise ValueError(
                f"LocalControl: rule must be one of {', '.join(get_args(RuleName))}, got "
                f"{self.rule!r}"
            )
        for name in ("explained", "certified"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(
                    f"LocalControl: {name} must be above 0 and at most 1, got {getattr(self, name)}"
                )
        for name in ("budget", "ridge"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0.0):
                raise ValueError(f"LocalControl: {name} must be finite and positive, got {value}")


class Room(ABC):
    """The changes of one layer, as a matrix, that are allowed."""

    @abstractmethod
    def direct(self, gradient: Tensor) -> Tensor:
        """A gradient as the direction to take inside."""

    @abstractmethod
    def keep(self, change: Tensor) -> Tensor:
        """A change brought back inside."""

    @abstractmethod
    def extent(self, change: Tensor) -> float:
        """How far a change goes, as a share of the most that is allowed."""

    @abstractmethod
    def size(self, change: Tensor) -> dict[str, float]:
        """How far a change inside goes, and how far it might."""


@dataclass(frozen=True)
class Ball(Room):
    """Delta = Delta P with |Delta|_2 <= limit; no limit where nothing of the task is left."""

    allowed: Allowed

    def direct(self, gradient: Tensor) -> Tensor:
        """Without its part along the inputs of the task."""
        return project_out(gradient, self.allowed.subspace.basis)

    def keep(self, change: Tensor) -> Tensor:
        """The nearest one."""
        inside = project_out(change, self.allowed.subspace.basis)
        limit = self.allowed.limit
        return inside if math.isinf(limit) else clip_spectral_norm(inside, limit)

    def extent(self, change: Tensor) -> float:
        """|Delta|_2 in units of the limit."""
        return float(torch.linalg.matrix_norm(change.to(torch.float64), 2)) / self.allowed.limit

    def size(self, change: Tensor) -> dict[str, float]:
        """Free directions, norm and its limit, and the most that this norm moves outputs by.

        ``drift`` bounds sqrt(E |Delta h|^2) over the inputs of the task, for every change inside.
        """
        norm = float(torch.linalg.matrix_norm(change.to(torch.float64), 2))
        subspace, limit = self.allowed
        drift = subspace.drift(norm, len(change))
        return {"free": float(len(subspace.tail)), "norm": norm, "limit": limit, "drift": drift}


@dataclass(frozen=True)
class Ellipsoid(Room):
    """<Delta, B Delta A> <= budget; with a slope of what is kept also <slope, Delta> <= 0."""

    inputs: Tensor
    outputs: Tensor
    budget: float
    slope: Tensor | None = None

    def direct(self, gradient: Tensor) -> Tensor:
        """Downhill where a unit of damage buys most, as long as the gradient itself."""
        step = -gauss_newton_step(gradient, self.inputs, self.outputs, 1.0).change
        size = step.norm()
        return step * (gradient.norm() / size) if float(size) > 0.0 else step

    def keep(self, change: Tensor) -> Tensor:
        """Without its part uphill, nearest in the metric of the damage; shorter where too long."""
        if self.slope is not None and float(uphill := (self.slope * change).sum()) > 0.0:
            down = gauss_newton_step(self.slope, self.inputs, self.outputs, 1.0)
            change = change + (uphill / down.worth) * down.change
        damage = self._damage(change)
        return change * math.sqrt(self.budget / damage) if damage > self.budget else change

    def extent(self, change: Tensor) -> float:
        """The root of the damage in units of the budget."""
        return math.sqrt(self._damage(change) / self.budget)

    def size(self, change: Tensor) -> dict[str, float]:
        """The rise of the loss to second order, and its limit."""
        return {"predicted": self._damage(change) / 2.0, "limit": self.budget / 2.0}

    def _damage(self, change: Tensor) -> float:
        wide = change.to(torch.float64)
        return float((wide * (self.outputs @ wide @ self.inputs)).sum())


class Guard:
    """Keeps the layers of an extractor in their rooms, and everything else where it is.

    Args:
        control: What is allowed.
        extractor: The model, at the start.
        head: The head of the task to keep, which stays.
        parameters: What an optimizer moves, by name.
        samples: Training samples of the task to keep.
        device: Where the model is.
        batch_size: Samples that go through it at once.

    Raises:
        ValueError: If there is no layer to move, a kind does not fit the model, or fewer answers
            can be certified than shall be.
    """

    def __init__(
        self,
        control: LocalControl,
        extractor: nn.Module,
        head: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        samples: Samples,
        device: torch.device,
        batch_size: int,
    ) -> None:
        self.parameters = parameters
        self.start = {name: value.detach().clone() for name, value in parameters.items()}
        root = block_root(extractor)
        names = _layers(root, parameters)
        moments = _Moments(extractor, head, names, samples, device, batch_size)
        rooms: Mapping[str, Room]
        self.found: dict[str, Any] = {"rule": control.rule}
        if control.rule == "gauss-newton":
            budget = 2.0 * control.budget / len(names)
            factors, slopes = moments.factors(control.ridge), moments.slopes()
            rooms = {name: Ellipsoid(*factors[name], budget, slopes[name]) for name in names}
        elif control.rule == "null-space":
            found = moments.subspaces(1.0)
            rooms = {name: Ball(Allowed(found[name], math.inf)) for name in names}
            if not any(len(found[name].tail) for name in names):
                raise ValueError(
                    "LocalControl: rule='null-space' must have layers whose training inputs leave "
                    f"directions free, got full rank in {', '.join(names)}; take wider layers, "
                    "fewer samples, or rule='certified'"
                )
        else:
            allowed, share = _largest(control, extractor, head, moments, samples, device)
            rooms = {name: Ball(one) for name, one in allowed.items()}
            self.found["certified"] = share
        self.rooms = {f"{name}.weight": room for name, room in rooms.items()}

    def direct(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Gradients in the order of the parameters, guided; 0 for what stays."""
        found = []
        for name, gradient in zip(self.parameters, gradients, strict=True):
            room = self.rooms.get(name)
            guided = torch.zeros_like(gradient)
            if room is not None:
                guided = room.direct(gradient.flatten(1)).reshape(gradient.shape)
            found.append(guided)
        return found

    @torch.no_grad()
    def keep(self) -> None:
        """Bring the parameters back to where they may be."""
        for name, parameter in self.parameters.items():
            start, room = self.start[name], self.rooms.get(name)
            if room is not None:
                change = (parameter - start).flatten(1)
                # Projected in float64: W0 + Delta is then rounded once.
                start = start.to(torch.float64) + room.keep(change.to(torch.float64)).reshape(
                    start.shape
                )
            parameter.copy_(start)

    @torch.no_grad()
    def report(self) -> dict[str, Any]:
        """What was allowed and what was used, layer by layer, as plain values."""
        layers = {}
        for name, room in self.rooms.items():
            size = room.size((self.parameters[name] - self.start[name]).flatten(1))
            # JSON has no infinity: what has no limit says none.
            kept = {key: value for key, value in size.items() if math.isfinite(value)}
            layers[name.removesuffix(".weight")] = kept
        return {**self.found, "layers": layers}


class LayerWorth(NamedTuple):
    """What a layer is worth to an immunizer.

    Attributes:
        layer: Its name.
        harm: |g|^2, g the gradient of log kappa_H.
        free: |g P|^2 / |g|^2, the share outside of the training inputs of the task to keep.
        worth: q = <g, B^-1 g A^-1>: a change that raises the loss to keep by eps / 2 raises log
            kappa_H by sqrt(eps q).
    """

    layer: str
    harm: float
    free: float
    worth: float


def rank_layers(
    gradients: Mapping[str, Tensor],
    extractor: nn.Module,
    head: nn.Module,
    source: Any,
    *,
    explained: float = 1.0,
    ridge: float = 1e-3,
    batch_size: int = 64,
) -> list[LayerWorth]:
    """Layers by harm done for damage taken, the best first.

    Args:
        gradients: Of log kappa_H, or of whatever shall rise, by name of the layer.
        extractor: The model.
        head: The head of the task to keep.
        source: Training samples of that task.
        explained: As in :class:`LocalControl`, for ``free``.
        ridge: As there.
        batch_size: Samples that go through the model at once.

    Returns:
        One entry a layer.

    Raises:
        ValueError: If a name is none of a linear layer or ungrouped convolution.

    Example:
        >>> model, head = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> body = nn.Sequential(model, nn.Tanh(), nn.Linear(2, 2))
        >>> source = torch.randn(8, 2), torch.tensor([0, 1] * 4)
        >>> slopes = {"0": torch.ones(2, 2), "2": torch.zeros(2, 2)}
        >>> [one.layer for one in rank_layers(slopes, body, head, source)]
        ['0', '2']
    """
    device = next(iter(extractor.parameters())).device
    samples = Samples(source, name="primary")
    moments = _Moments(extractor, head, list(gradients), samples, device, batch_size)
    subspaces, factors = moments.subspaces(explained), moments.factors(ridge)
    found = []
    for name, gradient in gradients.items():
        g = gradient.detach().flatten(1).to(torch.float64)
        harm = float(g.square().sum())
        left = float(project_out(g, subspaces[name].basis).square().sum())
        worth = float(gauss_newton_step(g, *factors[name], 1.0).worth) ** 2
        found.append(LayerWorth(name, harm, left / harm if harm > 0.0 else 0.0, worth))
    return sorted(found, key=lambda one: -one.worth)


def _layers(root: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Layers whose weights are matrices that multiply rows or patches."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    names = [
        name
        for name, module in root.named_modules()
        if f"{name}.weight" in parameters
        and isinstance(module, kinds)
        and getattr(module, "groups", 1) == 1
    ]
    if not names:
        raise ValueError(
            "LocalControl: blocks must hold a linear layer or an ungrouped convolution, got "
            f"{', '.join(list(parameters)[:3])}"
        )
    return names


class _Moments:
    """What layers receive from the samples of a task, and what its loss sends back to them."""

    def __init__(
        self,
        extractor: nn.Module,
        head: nn.Module,
        names: list[str],
        samples: Samples,
        device: torch.device,
        batch_size: int,
    ) -> None:
        self.extractor, self.head, self.names = extractor, head, names
        self.samples, self.device, self.batch_size = samples, device, batch_size
        self.root = block_root(extractor)
        prefix = "" if self.root is extractor else "model."
        paths = [f"{prefix}{name}" for name in names]
        batches = (batch.to(device) for batch in samples.batches(batch_size))
        found = collect_moments(extractor, paths, batches, share=False)
        self.inputs = {name: found[path] for name, path in zip(names, paths, strict=True)}

    def subspaces(self, explained: float) -> dict[str, InputSubspace]:
        """Directions that explain a share of the inputs.

        Eigenvalues of a Gram matrix are off by d eps of the largest: that much may be left in each
        of the other directions, even where it says 0.
        """
        found = {}
        for name, one in self.inputs.items():
            subspace = InputSubspace.of(one.gram, explained=explained, count=one.rows)
            unseen = len(one.gram) * torch.finfo(torch.float64).eps * one.mean.trace()
            found[name] = subspace._replace(tail=subspace.tail + unseen)
        return found

    def factors(self, ridge: float) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B of each layer, with their ridges."""
        outputs = self._output_moments()
        return {
            name: (_with_ridge(one.mean, ridge), _with_ridge(outputs[name], ridge))
            for name, one in self.inputs.items()
        }

    def slopes(self) -> dict[str, Tensor]:
        """The gradient of the mean loss by each layer's weight, as a matrix, float64."""
        weights = [self.root.get_parameter(f"{name}.weight") for name in self.names]
        sums = [torch.zeros_like(w.flatten(1), dtype=torch.float64) for w in weights]
        for batch, labels in self._batches():
            labels = labels.to(self.device)
            with torch.enable_grad():
                output = self.head(self.extractor(batch))
                if labels.dtype.is_floating_point:
                    loss = (output.reshape(len(labels), -1).squeeze(1) - labels).square().sum()
                else:
                    loss = functional.cross_entropy(output, labels.long(), reduction="sum")
            for total, part in zip(sums, torch.autograd.grad(loss, weights), strict=True):
                total += part.flatten(1) / len(self.samples)
        return dict(zip(self.names, sums, strict=True))

    def _output_moments(self) -> dict[str, Tensor]:
        """B of the Gauss-Newton matrix, exact: one pass back for each logit.

        Of cross-entropy, diag(p) - p p^T = sum_c p_c (e_c - p) (e_c - p)^T.
        """
        seen: dict[str, Tensor] = {}
        hooks = [
            self.root.get_submodule(name).register_forward_hook(
                lambda module, inputs, output, name=name: seen.update({name: output})
            )
            for name in self.names
        ]
        sums: dict[str, Tensor] = {}
        try:
            for batch, labels in self._batches():
                # So that there is a graph in a frozen model too; words have none of their own.
                batch.requires_grad_(batch.is_floating_point())
                with torch.enable_grad():
                    logits = self.head(self.extractor(batch))
                logits = logits.reshape(len(batch), -1)
                for row in _roots(logits.detach(), labels):
                    parts = torch.autograd.grad(
                        logits, [seen[name] for name in self.names], row, retain_graph=True
                    )
                    for name, part in zip(self.names, parts, strict=True):
                        is_map = part.dim() > 2 and not self._is_linear(name)
                        rows = part.flatten(2).mT if is_map else part
                        rows = rows.reshape(-1, rows.shape[-1]).to(torch.float64)
                        sums[name] = sums.get(name, 0.0) + rows.mT @ rows
        finally:
            for hook in hooks:
                hook.remove()
        return {name: value / len(self.samples) for name, value in sums.items()}

    def _is_linear(self, name: str) -> bool:
        return isinstance(self.root.get_submodule(name), nn.Linear)

    def _batches(self) -> Any:
        for start in range(0, len(self.samples), self.batch_size):
            end = min(start + self.batch_size, len(self.samples))
            batch, labels = self.samples.batch(list(range(start, end)))
            yield batch.to(self.device).detach().clone(), labels


def _roots(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """Vectors s with sum s s^T the Hessian of each sample's loss by its logits."""
    if labels.dtype.is_floating_point:
        return [math.sqrt(2.0) * torch.ones_like(logits)]
    p = functional.softmax(logits, dim=1)
    each = torch.eye(p.shape[1], dtype=p.dtype, device=p.device)
    return [(row - p) * p[:, c, None].sqrt() for c, row in enumerate(each)]


def _with_ridge(matrix: Tensor, ridge: float) -> Tensor:
    mean = float(matrix.diagonal().mean())
    added = ridge * (mean if mean > 0.0 else 1.0)
    return matrix + added * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def _largest(
    control: LocalControl,
    extractor: nn.Module,
    head: nn.Module,
    moments: _Moments,
    samples: Samples,
    device: torch.device,
) -> tuple[dict[str, Allowed], float]:
    """The largest common multiple of |W|_2 that is certified, and the share it is certified for."""
    if not isinstance(head, nn.Linear) or head.out_features < 2:
        raise ValueError(
            "LocalControl: rule='certified' must have a linear head with an output for each class, "
            f"got {type(head).__name__}; its answers are what is certified"
        )
    inputs, labels = (part.to(device) for part in samples.batch(list(range(len(samples)))))
    with torch.no_grad():
        logits = head(extractor(inputs))
    labels = labels.to(torch.int64)
    right = logits.argmax(1) == labels
    if not bool(right.any()):
        raise ValueError(
            "LocalControl: rule='certified' must have right answers to keep, got none; train the "
            "head first"
        )
    subspaces = moments.subspaces(control.explained)
    root = block_root(extractor)
    weights = {n: root.get_parameter(f"{n}.weight").detach().flatten(1) for n in moments.names}
    sizes = {n: float(torch.linalg.matrix_norm(w.double(), 2)) for n, w in weights.items()}

    def allowed(scale: float) -> dict[str, Allowed]:
        return {n: Allowed(subspaces[n], scale * size) for n, size in sizes.items()}

    def share(scale: float) -> float:
        bound = drift_bound(extractor, allowed(scale), inputs)
        sure = certified_answers(logits, head.weight, labels, bound)
        return float(sure.double().sum() / right.double().sum())

    low, high = _NARROWEST, _WIDEST
    if (most := share(low)) < control.certified:
        raise ValueError(
            f"LocalControl: certified must be at most {most}, the share of the right answers that "
            f"lead by more than the least change moves them, got {control.certified}; ask for less "
            "or train the head further"
        )
    if share(high) >= control.certified:
        low = high
    for _ in range(_HALVINGS if low < high else 0):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if share(middle) >= control.certified else (low, middle)
    return allowed(low), share(low)
