"""What a linear probe of an earlier layer finds: who holds the weights need not take the last one.

A protection of the last features, or of the last blocks, says nothing about what comes before them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from immunize_ext.probing.certificates.linear_information import probe
from immunize_ext.probing.data.samples import Samples, Source
from immunize_ext.probing.extractors.feature_extractor import block_root, find_stages

OUTPUT = "output"
"""Name of what the extractor itself yields."""


class LayerProbe(NamedTuple):
    """The best linear probe of one layer.

    Attributes:
        layer: Name of the block, or ``output``.
        features: Their number; maps are averaged over places, tokens over the sequence.
        r2: Share of the variance of the test labels that it explains.
        accuracy: Its right answers; ``None`` for a regression.
    """

    layer: str
    features: int
    r2: float
    accuracy: float | None


def layer_features(
    extractor: nn.Module,
    batches: Iterable[Tensor],
    layers: Sequence[str] | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Features of many inputs at several layers, in evaluation mode and without gradients.

    Args:
        extractor: Yields ``(n, p)`` for a batch; its training mode is put back afterwards.
        batches: Batches of inputs, in order; moved to the extractor's device.
        layers: Names of blocks; those that follow each other in the model when omitted
            (:func:`~immunize_ext.probing.extractors.find_stages`).
        dtype: dtype of the result.

    Returns:
        By name of the layer features ``(n, q)`` on the CPU, in the order of the model, and
        ``output`` last.

    Raises:
        ValueError: If there is no batch, or a layer is not called or yields no tensor.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
        >>> {name: tuple(z.shape) for name, z in layer_features(model, [torch.ones(4, 3)]).items()}
        {'0': (4, 5), '1': (4, 2), 'output': (4, 2)}
    """
    root = block_root(extractor)
    names = find_stages(extractor) if layers is None else list(layers)
    seen: dict[str, list[Tensor]] = {name: [] for name in (*names, OUTPUT)}

    def keep(name: str, output: Any) -> None:
        seen[name].append(_pooled(name, output).to("cpu", dtype))

    hooks = [
        root.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: keep(name, output)
        )
        for name in names
    ]
    device = next((value.device for value in extractor.parameters()), torch.device("cpu"))
    modes = {module: module.training for module in extractor.modules()}
    extractor.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                keep(OUTPUT, extractor(batch.to(device)))
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    missing = [name for name, parts in seen.items() if len(parts) != len(seen[OUTPUT]) or not parts]
    if missing:
        raise ValueError(
            f"layer_features: layers must be called once a batch, got {missing[0]!r}, which was "
            "not, or no batch"
        )
    return {name: torch.cat(parts) for name, parts in seen.items()}


def _pooled(name: str, output: Any) -> Tensor:
    value = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(value, Tensor) or value.dim() < 2:
        raise ValueError(
            f"layer_features: layers must yield tensors with a row for each sample, got "
            f"{type(value).__name__} from {name!r}"
        )
    if value.dim() == 3:
        return value.mean(1)
    return value.flatten(2).mean(2) if value.dim() > 3 else value


def layer_probes(
    extractor: nn.Module,
    train: Source,
    test: Source,
    layers: Sequence[str] | None = None,
    *,
    batch_size: int = 64,
) -> list[LayerProbe]:
    """Fit a linear probe on every layer of a network, and judge it on other samples.

    Args:
        extractor: Yields ``(n, p)`` for a batch.
        train: Inputs and labels of the attacker: -1 and +1 for a classification.
        test: Those to judge by.
        layers: As for :func:`layer_features`.
        batch_size: Samples that go through the network at once.

    Returns:
        One probe a layer, that of the output last, each at its best ridge.

    Raises:
        ValueError: As :func:`layer_features`.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).double()
        >>> _ = model[0].weight.data.copy_(torch.eye(2)), model[1].weight.data.zero_()
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 1.0], [-1.0, 1.0]]).double()
        >>> found = layer_probes(model, (x, x[:, 0]), (x, x[:, 0]))
        >>> [(one.layer, round(one.r2, 6)) for one in found]
        [('0', 1.0), ('1', 0.0), ('output', 0.0)]
    """
    parts, labels = [], []
    for name, source in (("train", train), ("test", test)):
        samples = Samples(source, name=name)
        parts.append(layer_features(extractor, samples.batches(batch_size), layers))
        labels.append(samples.batch(list(range(len(samples))))[1].to("cpu", torch.float64))
    classify = all(set(y.unique().tolist()) <= {-1.0, 1.0} for y in labels)
    return [
        LayerProbe(
            name, z.shape[1], *probe(z, labels[0], parts[1][name], labels[1], classify=classify)
        )
        for name, z in parts[0].items()
    ]
