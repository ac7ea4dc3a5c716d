r"""What changed between two models, as a LoRA adapter.

    Delta = W - W0 = U diag(s) V^T,      up = U_r diag(s_r)^(1/2),  down = diag(s_r)^(1/2) V_r^T

The rank that is kept is the least r whose tail is no more than one rounding of the weights:

    (s_{r+1}^2 + s_{r+2}^2 + ...)^(1/2) <= u |W|_F,      u: unit roundoff of the weights' dtype,

and of the SVD itself, max(o, d) eps s_1 in float64, which counts for float64 weights alone.

If an update of rank r was added and the sum rounded once, W = fl(W0 + Delta*), every entry is off
by at most u |W_ij|, so |Delta - Delta*|_F <= u |W|_F, and by Eckart and Young no matrix of rank r,
so none of the truncations of Delta either, has a larger tail than that. The rank found is then at
most r: rounding, which makes every difference of stored weights a matrix of full rank, adds nothing
to it. What is left out is no more than what storing the weights has left out already.

A bias that changed goes into the bias of the up factor (``lora_bias`` of PEFT).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from immunize_ext.ops.lora_files import LoraLayer, LoraLayers

__all__ = ["ChangeAdapter", "adapter_of_change"]

_DENSE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ChangeAdapter(NamedTuple):
    """The change of a model as an adapter, and how well it fits.

    Attributes:
        layers: The adapter by full name of the module; scale 1.
        ranks: By the same names the numerical rank of the change, whatever rank was kept.
        residuals: By the same names |Delta - up down|_F / |Delta|_F, of the factors as they are
            stored.
    """

    layers: LoraLayers
    ranks: dict[str, int]
    residuals: dict[str, float]


def adapter_of_change(
    before: nn.Module, after: nn.Module, *, prefix: str = "unet", rank: int | None = None
) -> ChangeAdapter:
    r"""Return what turns one model into another, as a LoRA adapter.

    .. math:: W = W_0 + \mathrm{up}\,\mathrm{down}, \qquad
              \min_r \{ r : \|\Delta - \Delta_r\|_F \le u \|W\|_F \}

    Args:
        before: The model that the adapter will be added to.
        after: The same model with other weights, on any device.
        prefix: Part of a pipeline that the model is; it begins the names of the layers.
        rank: Most that is kept of a layer, the best approximation of that rank in the Frobenius
            norm; the numerical rank of the change when omitted, which loses nothing that the
            weights' dtype could hold.

    Returns:
        The adapter of the layers that changed, in float32, or float64 for float64 weights. A layer
        of which only the bias changed has factors of rank 1 that are zero.

    Raises:
        ValueError: If the models do not have the same tensors, nothing changed, rank is below 1, or
            something changed that is neither weight nor bias of a linear layer or an ungrouped
            convolution: no LoRA adapter holds it.

    Note:
        Deterministic for a given number of threads; without derivatives. One SVD a layer, in
        float64.

    Source:
        Eckart and Young 1936. Bound on the rank: DERIVED above.

    Example:
        >>> import copy, torch
        >>> from immunize_ext.ops import adapter_of_change
        >>> before = torch.nn.Sequential(torch.nn.Linear(5, 4))
        >>> after = copy.deepcopy(before)
        >>> with torch.no_grad():
        ...     _ = after[0].weight.add_(torch.ones(4, 1) @ torch.ones(1, 5))
        >>> found = adapter_of_change(before, after, prefix="model")
        >>> found.ranks
        {'model.0': 1}
        >>> layer = found.layers["model.0"]
        >>> torch.allclose(before[0].weight + layer.up @ layer.down, after[0].weight)
        True
    """
    function = "adapter_of_change"
    if rank is not None and rank < 1:
        raise ValueError(f"{function}: rank must be at least 1, got {rank}")
    old, new = before.state_dict(), after.state_dict()
    shapes = [{name: tuple(value.shape) for name, value in state.items()} for state in (old, new)]
    if shapes[0] != shapes[1]:
        other = sorted(name for name, _ in shapes[0].items() ^ shapes[1].items())
        raise ValueError(
            f"{function}: before and after must have the same tensors, got {_some(other)} in one "
            "alone or in another shape; give the model that the other one was made of"
        )
    changed = [name for name in old if not torch.equal(old[name].to(new[name]), new[name])]
    if not changed:
        raise ValueError(f"{function}: after must differ from before, got the same weights")
    dense = {
        f"{name}.{part}": name
        for name, module in before.named_modules()
        if isinstance(module, _DENSE) and getattr(module, "groups", 1) == 1
        for part in ("weight", "bias")
    }
    if other := [name for name in changed if name not in dense]:
        raise ValueError(
            f"{function}: nothing but weights and biases of linear layers and ungrouped "
            f"convolutions may differ, got {_some(other)}, which no LoRA adapter holds; was before "
            "the model that the other one was made of? If so, keep the whole model"
        )
    found = ChangeAdapter({}, {}, {})
    for module in dict.fromkeys(dense[name] for name in changed):
        weight, bias = f"{module}.weight", f"{module}.bias"
        w0, w = (state[weight].detach().to("cpu", torch.float64) for state in (old, new))
        layer, full, residual = _low_rank(w0, w, new[weight].dtype, rank)
        if bias in changed:
            moved = new[bias].detach().to("cpu", torch.float64) - old[bias].detach().cpu()
            layer = layer._replace(bias=moved.to(layer.up.dtype))
        name = f"{prefix}.{module}"
        found.layers[name] = layer
        found.ranks[name], found.residuals[name] = full, residual
    return found


def _low_rank(
    w0: Tensor, w: Tensor, dtype: torch.dtype, rank: int | None
) -> tuple[LoraLayer, int, float]:
    """The change of one weight: its factors, its numerical rank, and what the factors miss."""
    kernel = tuple(w.shape[1:]) if w.dim() > 2 else ()
    delta = (w - w0).flatten(1)
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    tails = s.square().flip(0).cumsum(0).flip(0).sqrt()  # of keeping 0, 1, 2, ... terms
    rounding = 0.5 * torch.finfo(dtype).eps * w.norm()
    rounding += max(delta.shape) * torch.finfo(torch.float64).eps * s[0]
    full = int((tails > rounding).sum())
    kept = full if rank is None else min(full, rank)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    root = s[:kept].sqrt()
    up, down = (u[:, :kept] * root).to(wide), (root[:, None] * vh[:kept]).to(wide)
    missed = delta - up.to(delta) @ down.to(delta)
    norm = float(delta.norm())
    residual = float(missed.norm()) / norm if norm > 0.0 else 0.0
    if kept == 0:  # libraries know no rank 0
        up, down = up.new_zeros(len(delta), 1), down.new_zeros(1, delta.shape[1])
    return LoraLayer(up, down, 1.0, kernel), full, residual


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
