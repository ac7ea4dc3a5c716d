r"""How far features can move under every change of some layers that is allowed, sample by sample.

In a chain h_{l+1} = phi_l(W_l h_l) let W_l + Delta_l with Delta_l = Delta_l P_l and
|Delta_l|_2 <= c_l, and let phi_l be L_l-Lipschitz. With e_l the distance of the inputs of layer l,

.. math:: e_{l+1} \le L_l \bigl( (|W_l|_2 + c_l)\, e_l + c_l\, |P_l h_l| \bigr), \qquad e_1 = 0,

since (W + Delta) h' - W h = (W + Delta)(h' - h) + Delta h. Only the model before is run: the bound
holds for every model that training may lead to, before a step of it is taken. An answer y whose
logits lead by f_y - f_j > |w_y - w_j| e for all others j is kept by all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from immunize_ext.ops.local_control import InputSubspace
from immunize_ext.probing.extractors.feature_extractor import block_root

# Lipschitz constants of what stands between linear layers; sup |phi'| of GELU and SiLU rounded up.
_LIPSCHITZ: dict[type[nn.Module], float] = {
    nn.Identity: 1.0,
    nn.Flatten: 1.0,
    nn.Dropout: 1.0,
    nn.ReLU: 1.0,
    nn.Tanh: 1.0,
    nn.Sigmoid: 0.25,
    nn.Softplus: 1.0,
    nn.GELU: 1.13,
    nn.SiLU: 1.1,
}

# Of the bound, for the rounding of norms and of a forward pass in float64.
_SLACK = 1e-10


class Allowed(NamedTuple):
    """The changes that a layer may undergo: Delta = Delta P with |Delta|_2 <= c.

    Attributes:
        subspace: What P takes out.
        limit: c.
    """

    subspace: InputSubspace
    limit: float


def drift_bound(extractor: nn.Module, allowed: Mapping[str, Allowed], inputs: Tensor) -> Tensor:
    """The most that the features of each sample can move under any change that is allowed.

    Args:
        extractor: The model before: a sequence of linear layers and of functions of single entries
            with a known Lipschitz constant.
        allowed: By name of the layer; all others, and all biases, stay.
        inputs: Samples, shape ``(n, ...)``.

    Returns:
        Bounds on the distance of the features before and after, shape ``(n,)``, float64.

    Raises:
        ValueError: If the model holds something else, or a name is none of a linear layer.

    Note:
        Deterministic; computed in float64, whatever the weights' dtype: what a forward pass in
        float32 rounds comes on top.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).double()
        >>> seen = InputSubspace.of(torch.tensor([[1.0, 0.0]]))
        >>> x = torch.tensor([[5.0, 0.0], [5.0, 2.0]])
        >>> [round(v, 6) for v in drift_bound(model, {"0": Allowed(seen, 0.5)}, x).tolist()]
        [0.0, 1.0]
    """
    name = "drift_bound"
    chain = _chain(name, block_root(extractor), "")
    linear = [layer for layer, module in chain if isinstance(module, nn.Linear)]
    if unknown := [layer for layer in allowed if layer not in linear]:
        raise ValueError(
            f"{name}: allowed must name linear layers of the model, got {unknown[0]!r}; there are "
            f"{', '.join(linear) or 'none'}"
        )
    bound = torch.zeros(len(inputs), dtype=torch.float64, device=inputs.device)
    h = inputs.to(torch.float64)
    with torch.no_grad():
        for layer, module in chain:
            if not isinstance(module, nn.Linear):
                bound = bound * _LIPSCHITZ[type(module)]
                # Functions of single entries have no dtype; dropout is none in evaluation mode.
                h = h if isinstance(module, nn.Dropout) else module(h)
                continue
            weight = module.weight.to(torch.float64)
            size = float(torch.linalg.matrix_norm(weight, 2))
            added = torch.zeros_like(bound)
            if layer in allowed:
                subspace, limit = allowed[layer]
                size, added = size + limit, limit * subspace.rest(h)
            bound = (size * bound + added) * (1.0 + _SLACK)
            bias = None if module.bias is None else module.bias.to(torch.float64)
            h = nn.functional.linear(h, weight, bias)
    if h.dim() != 2:
        raise ValueError(f"{name}: extractor must yield (n, p), got {tuple(h.shape)}")
    return bound


def certified_answers(logits: Tensor, weight: Tensor, labels: Tensor, bound: Tensor) -> Tensor:
    """Which answers are right and stay right however features move within bounds.

    Args:
        logits: Of the model before, shape ``(n, k)``.
        weight: That of the linear head, shape ``(k, p)``, which stays.
        labels: Right classes, shape ``(n,)``.
        bound: On the move of the features, shape ``(n,)``.

    Returns:
        Boolean, shape ``(n,)``.

    Example:
        >>> logits, bound = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([1.0, 1.5])
        >>> certified_answers(logits, torch.eye(2), torch.tensor([0, 0]), bound).tolist()
        [True, False]
    """
    logits, weight = logits.to(torch.float64), weight.to(torch.float64)
    lead = logits.gather(1, labels[:, None]) - logits
    reach = torch.cdist(weight, weight)[labels] * bound[:, None]
    others = torch.ones_like(lead, dtype=torch.bool).scatter_(1, labels[:, None], value=False)
    return ((lead > reach) | ~others).all(1)


def _chain(name: str, module: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """The layers of a sequence in their order, by name."""
    if isinstance(module, nn.Sequential):
        return [
            item
            for child, inner in module.named_children()
            for item in _chain(name, inner, f"{path}.{child}" if path else child)
        ]
    if type(module) is nn.Linear or type(module) in _LIPSCHITZ:
        return [(path, module)]
    known = ", ".join(sorted(kind.__name__ for kind in _LIPSCHITZ))
    raise ValueError(
        f"{name}: extractor must be a sequence of Linear and of {known}, got "
        f"{type(module).__name__}, whose Lipschitz constant is not known; rule='null-space' needs "
        "none"
    )
