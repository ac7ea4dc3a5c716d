"""Features of a model's layers: captured on their way, measured, and pulled apart or together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from immunize_ext.probing.extractors.feature_extractor import FeatureExtractor, Pool
from immunize_ext.probing.immunizers.deep_extractor import Features, Term, terms_of
from immunize_ext.probing.metrics.rir import RirPolicy, feature_ratio
from immunize_ext.settings import suggestion

Batch: TypeAlias = "Tensor | Mapping[str, Any] | tuple[Any, ...]"
"""What a model is called with: a tensor, a table of keyword arguments, or a tuple of arguments."""

Rows: TypeAlias = "Pool | Callable[[Tensor], Tensor]"
"""How the output of a layer becomes rows: by name as in ``FeatureExtractor``, or by a function."""

Objective = Literal["condition_number", "r_ill", "r_well", "kappa_log_ratio"]


# --- capturing ------------------------------------------------------------------------------------


@contextmanager
def captured(function: str, model: nn.Module, layers: Sequence[str], pool: Rows) -> Iterator[Any]:
    """Keep what layers put out in the calls inside the block: the last of each, as rows.

    Yields:
        A table from layer to features ``(n, p)``, in the graph where there is one.
    """
    modules, found = dict(bare(model).named_modules()), {}
    for name in layers:
        if name not in modules or not name:
            raise ValueError(
                f"{function}: layers must name modules of {type(bare(model)).__name__}, got "
                f"{name!r}; {suggestion(name, [known for known in modules if known])}"
            )

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            found[name] = _rows(name, output, pool)

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    if missing := [name for name in layers if name not in found]:
        raise ValueError(
            f"{function}: layers must be reached by the model's forward, got {missing[0]!r}, which "
            "was not"
        )


def bare(model: nn.Module) -> nn.Module:
    """The model inside what distributes it."""
    inner = getattr(model, "module", None)
    return inner if isinstance(inner, nn.Module) else model


def _rows(name: str, output: Any, pool: Rows) -> Tensor:
    if isinstance(output, tuple):
        output = output[0]  # blocks of transformers put the features first
    if not isinstance(pool, str):
        return pool(output)
    rows: Tensor = FeatureExtractor(nn.Identity(), name=f"layer {name}", pool=pool)(output)
    return rows


def _call(model: nn.Module, batch: Batch) -> None:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Mapping):
        model(**{name: _moved(value, device) for name, value in batch.items()})
    elif isinstance(batch, tuple):
        model(*(_moved(value, device) for value in batch))
    else:
        model(_moved(batch, device))


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


# --- measuring ------------------------------------------------------------------------------------


class FeatureMonitor:
    """kappa of layers' features on fixed batches, and RIR against where they began.

    Args:
        layers: Names of modules, as in ``model.named_modules()``.
        primary: A batch of the task to keep, as the model takes it: a tensor, a table of keyword
            arguments, or a tuple of arguments.
        harmful: A batch of the task to make hard; without it only kappa of the other is measured.
        pool: How the output of a layer becomes one row a sample: ``"first"`` token, their
            ``"mean"``, ``"auto"`` (the first; maps are averaged), or a function of the output.
        policy: Which smallest eigenvalue kappa means
            (:class:`~immunize_ext.probing.metrics.RelativeImmunizationRatio`).
        ridge: Of policy ``"ridge"``, in units of the largest eigenvalue of the features at first.

    Attributes:
        base: Features at the first measurement, by role and layer; ``None`` before it. RIR is
            relative to these; set it to ``None`` to begin anew.

    Raises:
        ValueError: If there is no layer.

    Note:
        Deterministic; in evaluation mode, without gradients, whatever the mode of the model, which
        is as it was afterwards. With fewer samples than features kappa is that of the samples'
        span: take batches of several times as many samples as a layer has features.

    Source:
        Zheng et al., ICML 2025, eq. 15 and 17.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 1))
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> monitor = FeatureMonitor(["0"], primary=x, harmful=x)
        >>> sorted(monitor.measure(model))
        ['log_kappa_harmful/0', 'log_kappa_primary/0', 'rir/0']
        >>> monitor.measure(model)["rir/0"]
        1.0
    """

    def __init__(
        self,
        layers: Sequence[str],
        *,
        primary: Batch,
        harmful: Batch | None = None,
        pool: Rows = "auto",
        policy: RirPolicy = "ridge",
        ridge: float = 1e-4,
    ) -> None:
        self.layers = _checked_layers("FeatureMonitor", layers)
        self.batches = {"primary": primary}
        if harmful is not None:
            self.batches["harmful"] = harmful
        self.pool = pool
        self.policy: RirPolicy = policy
        self.ridge = ridge
        self.base: dict[tuple[str, str], Tensor] | None = None

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Measure a model; the first one that is measured is what RIR compares with.

        Args:
            model: The model, bare or as ``DistributedDataParallel`` wraps it. All processes have to
                call this where its weights are spread over them.

        Returns:
            ``log_kappa_primary/LAYER``, ``log_kappa_harmful/LAYER`` and ``rir/LAYER``: natural
            logarithms of condition numbers, and a ratio above 1 where the harm became relatively
            harder.

        Raises:
            ValueError: If a layer is unknown or not reached, or features are no matrix.
        """
        now: dict[tuple[str, str], Tensor] = {}
        inner = bare(model)
        modes = {module: module.training for module in inner.modules()}
        inner.eval()
        try:
            for role, batch in self.batches.items():
                watched = captured("FeatureMonitor", inner, self.layers, self.pool)
                with torch.no_grad(), watched as found:
                    _call(inner, batch)
                now |= {(role, name): _wide(rows).cpu() for name, rows in found.items()}
        finally:
            for module, mode in modes.items():
                module.training = mode
        if self.base is None:
            self.base = now
        numbers: dict[str, float] = {}
        for layer in self.layers:
            changes = {}
            for role in self.batches:
                pair = now[role, layer], self.base[role, layer]
                ratio = feature_ratio(*pair, policy=self.policy, ridge=self.ridge, rank_rtol=None)
                numbers[f"log_kappa_{role}/{layer}"] = float(ratio.log_kappa)
                changes[role] = ratio.log
            if "harmful" in changes:
                numbers[f"rir/{layer}"] = float((changes["harmful"] - changes["primary"]).exp())
        return numbers


def _checked_layers(function: str, layers: Sequence[str]) -> tuple[str, ...]:
    if isinstance(layers, str) or not layers:
        raise ValueError(f"{function}: layers must be a list of module names, got {layers!r}")
    return tuple(layers)


# --- the loss -------------------------------------------------------------------------------------


class FeatureRegularizer:
    r"""A term of the loss that keeps one task's features well-conditioned and another's not.

    .. math:: \sum_{\text{layers}} \lambda_P R_{well}(H_P) + \lambda_H R_{ill}(H_H),
              \qquad H = F^\top F

    F are the features of a layer: those of the training batch, caught while the loss is computed,
    and those of a harmful batch, for which the model is called once more.

    Args:
        layers: Names of modules whose features are meant, as in ``model.named_modules()``.
        harmful: A harmful batch as the model takes it (:class:`FeatureMonitor`), or an iterable of
            such, a loader for instance, which is begun again at its end.
        objective: ``"condition_number"`` (the sum above), ``"r_well"`` or ``"r_ill"`` (one of
            them), ``"kappa_log_ratio"`` (log kappa_P - log kappa_H, which is free of scale).
        weights: lambda by term: ``well`` and ``ill``, or ``weight`` of ``"kappa_log_ratio"``. One
            that is left out is chosen in the first step, so that the gradient of its term is
            ``share`` times that of the loss, and stays.
        share: See ``weights``.
        pool: As for :class:`FeatureMonitor`.

    Attributes:
        weights: The lambdas in force.
        last: Values of the terms in the last step, by name, to be logged.

    Raises:
        ValueError: If there is no layer, or objective or a weight are unknown or out of range.

    Note:
        Terms are computed in float64 from features in float32 at least. A batch of fewer samples
        than features has no smallest eigenvalue of all features, but one of its own span.

    Source:
        Zheng et al., ICML 2025, eq. 14; balancing as in
        :class:`~immunize_ext.probing.immunizers.DeepExtractorImmunizer`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
        >>> x, harm = torch.randn(40, 3), torch.randn(40, 3) * torch.tensor([1.0, 2.0, 3.0])
        >>> regularizer = FeatureRegularizer(["0"], harmful=harm)
        >>> with regularizer.watching(model):
        ...     loss = model(x).square().mean()
        >>> (loss + regularizer.penalty(model, loss)).backward()
        >>> sorted(regularizer.weights), model[0].weight.grad is not None
        (['ill', 'well'], True)
    """

    def __init__(
        self,
        layers: Sequence[str],
        *,
        harmful: Batch | Iterable[Batch],
        objective: Objective = "condition_number",
        weights: Mapping[str, float] | None = None,
        share: float = 1.0,
        pool: Rows = "auto",
    ) -> None:
        name = "FeatureRegularizer"
        self.layers = _checked_layers(name, layers)
        if objective not in get_args(Objective):
            raise ValueError(
                f"{name}: objective must be one of {', '.join(get_args(Objective))}, got "
                f"{objective!r}"
            )
        self.terms: list[Term] = terms_of(objective, classes=0, inner_steps=0)
        self.weights = dict(weights or {})
        known = [term.name for term in self.terms]
        for key, value in self.weights.items():
            if key not in known or not 0.0 <= value < float("inf"):
                raise ValueError(
                    f"{name}: weights must be finite and not negative, of {', '.join(known)}, got "
                    f"{key}={value}"
                )
        if not 0.0 < share < float("inf"):
            raise ValueError(f"{name}: share must be finite and positive, got {share}")
        self.share = share
        self.pool = pool
        self.last: dict[str, float] = {}
        self._harmful = harmful
        self._batches: Iterator[Batch] = iter(())
        self._primary: dict[str, Tensor] | None = None

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Catch the features of the training batch: compute the loss inside the block."""
        with captured("FeatureRegularizer", model, self.layers, self.pool) as found:
            yield
        self._primary = dict(found)

    def penalty(self, model: nn.Module, loss: Tensor, *, scale: float = 1.0) -> Tensor:
        """The term, to be added to the loss.

        Args:
            model: The model; it is called with the next harmful batch, in the mode that it is in.
            loss: The loss that was computed under :meth:`watching`, with its graph; read where
                weights are left to be chosen.
            scale: Factor on the term, of a loss that is a share of one over several batches.

        Returns:
            A scalar with a graph, in float32 at least.

        Raises:
            EqualSingularValuesError: If all eigenvalues of a batch's H_H are equal.
            ValueError: If nothing was watched, or a layer is not reached.
        """
        if self._primary is None:
            raise ValueError(
                "FeatureRegularizer: penalty must follow a forward pass under watching(model), got "
                "none"
            )
        primary, self._primary = self._primary, None
        inner = bare(model)
        with captured("FeatureRegularizer", inner, self.layers, self.pool) as harmful:
            _call(inner, self._next())
        pairs = [
            Features(_wide(primary[name]), _wide(harmful[name]), torch.empty(0))
            for name in self.layers
        ]
        values = {
            term.name: torch.stack([term.value(pair) for pair in pairs]).sum()
            for term in self.terms
        }
        self.last = {name: float(value.detach()) for name, value in values.items()}
        for name, value in values.items():
            if name not in self.weights:
                sizes = [_gradient_norm(part, inner) for part in (loss, scale * value)]
                # A term without a gradient says nothing about how it should weigh.
                self.weights[name] = self.share * sizes[0] / sizes[1] if sizes[1] > 0.0 else 0.0
        parts = [self.weights[name] * value for name, value in values.items()]
        return scale * torch.stack(parts).sum()

    def _next(self) -> Batch:
        if isinstance(self._harmful, (Tensor, Mapping, tuple)):
            return self._harmful
        for _ in range(2):  # where it is at its end, from the beginning
            for batch in self._batches:
                return batch
            self._batches = iter(self._harmful)
        for batch in self._batches:
            return batch
        raise ValueError("FeatureRegularizer: harmful must hold at least one batch, got none")


def _wide(features: Tensor) -> Tensor:
    return features if features.dtype == torch.float64 else features.float()


def _gradient_norm(value: Tensor, model: nn.Module) -> float:
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    squares = [g.double().square().sum() for g in found if g is not None]
    return float(torch.stack(squares).sum().sqrt())
