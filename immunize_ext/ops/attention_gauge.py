r"""The freedom inside each head of attention: a change of basis that no output sees.

With R and S in GL(d_h) acting on the channels of one head,

    q -> R q,  k -> R^-T k:  q^T k stays;        v -> S v,  W_O -> W_O S^-1:  W_O v stays,

for every input. Weights, their condition numbers and their gradients are others. So this keeps a
function exactly, and it undoes whatever rests on the weights of a head alone: ``balance_attention``
finds, with one decomposition a head, the representative W_Q W_Q^T = W_K W_K^T = diag and W_V W_V^T
= W_O^T W_O = diag, the same one from wherever in the orbit it starts. What it changes for a learner
is its step, so it protects from nobody who tunes one or scales coordinates as Adam does.

Rotary embeddings and norms of q and k stand between W_Q, W_K and their product, and a norm or a
clip may stand between W_V and W_O, under any name. So a gauge is allowed in modules whose forward
is known, and elsewhere by the word of the caller.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from immunize_ext.ops.arguments import require_finite, require_floating_matrix

__all__ = [
    "AttentionLayers",
    "HeadWeights",
    "attention_gauge",
    "balance_attention",
    "find_attention",
]


class HeadWeights(NamedTuple):
    """The four matrices of attention as layers store them, a bias being one more input column.

    Attributes:
        query: Shape ``(heads * c, d)``.
        key: Shape ``(groups * c, d)``; several heads share one key where groups < heads.
        value: Shape ``(groups * e, d)``.
        output: Shape ``(o, heads * e)``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor


def attention_gauge(
    weights: HeadWeights,
    *,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    heads: int,
) -> HeadWeights:
    r"""Change the basis inside each head, so that attention computes what it did.

    .. math:: (W_Q, W_K, W_V, W_O) \mapsto (R W_Q,\, R^{-\top} W_K,\, S W_V,\, W_O S^{-1})

    Args:
        weights: The four matrices.
        keys: R, shape ``(groups, c, c)``, invertible; the identity when omitted.
        values: S, shape ``(groups, e, e)``, invertible; the identity when omitted.
        heads: Number of heads of the query.

    Returns:
        The four matrices of the same function, in their dtypes. R^-1 and S^-1 lead back.

    Raises:
        ValueError: If shapes do not fit, or something is not finite.
        torch.linalg.LinAlgError: If a matrix is singular.

    Note:
        Differentiable in all tensors. Computed in float64: outputs move by rounding times
        kappa(R) and kappa(S).

    Example:
        >>> import torch
        >>> from immunize_ext.ops import HeadWeights, attention_gauge
        >>> w = HeadWeights(*(torch.eye(2, dtype=torch.float64) for _ in range(4)))
        >>> r = torch.tensor([[[4.0]], [[0.5]]])
        >>> moved = attention_gauge(w, keys=r, heads=2)
        >>> moved.query.diagonal().tolist(), (moved.query * moved.key).diagonal().tolist()
        ([4.0, 0.5], [1.0, 1.0])
    """
    name = "attention_gauge"
    q, k, v, o = _split(name, weights, heads)
    if keys is not None:
        r = _gauge(name, "keys", keys, k.shape[0], k.shape[1])
        q, k = r @ q, torch.linalg.solve(r.mT, k)
    if values is not None:
        s = _gauge(name, "values", values, v.shape[0], v.shape[1])
        v, o = s @ v, torch.linalg.solve(s.mT, o)
    return _joined((q, k, v, o), weights)


def balance_attention(
    weights: HeadWeights, *, heads: int, keys: bool = True, values: bool = True
) -> HeadWeights:
    r"""The one representative of a head whose two sides weigh the same: every gauge undone.

    .. math:: W_Q^\top W_K = U \Sigma V^\top \;\Rightarrow\;
              W_Q \mapsto \Sigma^{1/2} U^\top,\ W_K \mapsto \Sigma^{1/2} V^\top

    and alike for W_O and W_V. What attackers do first, and what a claim about weights has to be
    checked against.

    Args:
        weights: The four matrices.
        heads: Number of heads of the query.
        keys: Whether W_Q and W_K are balanced; not where something stands between them.
        values: Whether W_V and W_O are.

    Returns:
        The balanced matrices: up to rounding the same from anywhere in the orbit where the
        singular values of each head differ; signs are such that the largest entry of a row of
        W_K and W_V is positive.

    Raises:
        ValueError: If shapes do not fit, or something is not finite.

    Note:
        Deterministic. Signs and order are step functions; no derivative flows. Computed in float64.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import HeadWeights, attention_gauge, balance_attention
        >>> w = HeadWeights(*(torch.eye(2, dtype=torch.float64) for _ in range(4)))
        >>> far = attention_gauge(w, values=torch.tensor([[[1e3]], [[1e-3]]]), heads=2)
        >>> balance_attention(far, heads=2).value.diagonal().tolist()
        [1.0, 1.0]
    """
    with torch.no_grad():
        q, k, v, o = _split("balance_attention", weights, heads)
        if keys:
            k, q = _balanced(k, q)
        if values:
            v, o = _balanced(v, o)
        return _joined((q, k, v, o), weights)


class AttentionLayers(NamedTuple):
    """The layers of one attention module.

    Attributes:
        query: The layer W_Q, and so on.
        key: W_K.
        value: W_V.
        output: W_O.
        heads: Number of heads of the query.
        free_keys: Whether nothing stands between q, k and their product.
        free_values: Whether nothing but the mixing of tokens stands between v and W_O.
        module: Class of the module, for messages.
    """

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    heads: int
    free_keys: bool
    free_values: bool
    module: str

    def weights(self) -> HeadWeights:
        """The four matrices with their biases as last columns; that of W_O stays out."""
        q, k, v = (_with_bias(one) for one in (self.query, self.key, self.value))
        return HeadWeights(q, k, v, self.output.weight)

    @torch.no_grad()
    def set(self, weights: HeadWeights) -> None:
        """Put matrices into the layers, all or none.

        Raises:
            ValueError: If one has not the shape of :meth:`weights`, or is not finite in the dtype
                of its layer.
        """
        name, parts = "AttentionLayers.set", []
        layers = zip(HeadWeights._fields, self[:4], weights, self.weights(), strict=True)
        for argument, layer, value, old in layers:
            require_floating_matrix(name, argument, value)
            if value.shape != old.shape:
                raise ValueError(
                    f"{name}: {argument} must have shape {tuple(old.shape)}, got "
                    f"{tuple(value.shape)}"
                )
            columns = layer.in_features
            parts.append((argument, layer.weight, value[:, :columns]))
            if columns < value.shape[1]:
                parts.append((argument, layer.bias, value[:, columns]))
        cast = [(argument, old, value.to(old)) for argument, old, value in parts]
        for argument, old, value in cast:
            require_finite(name, f"{argument} in {old.dtype}", value)
        for _, old, value in cast:
            old.copy_(value)

    def gauge(self, *, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        """Change the basis in place (:func:`attention_gauge`), all layers or none.

        Raises:
            ValueError: If ``keys`` or ``values`` are given where they are not free, and as
                :func:`attention_gauge`.
        """
        if keys is not None and not self.free_keys:
            raise self._refused("keys", "W_Q, W_K and the product of q and k")
        if values is not None and not self.free_values:
            raise self._refused("values", "W_V and W_O")
        self.set(attention_gauge(self.weights(), keys=keys, values=values, heads=self.heads))

    def balance(self) -> None:
        """Undo every gauge of what is free in place (:func:`balance_attention`).

        Raises:
            ValueError: If neither keys nor values are free.
        """
        if not (self.free_keys or self.free_values):
            raise self._refused("values", "W_V and W_O")
        keys, values = self.free_keys, self.free_values
        self.set(balance_attention(self.weights(), heads=self.heads, keys=keys, values=values))

    def _refused(self, side: str, between: str) -> ValueError:
        return ValueError(
            f"AttentionLayers: {side} must be left alone in {self.module}, where rotary "
            f"embeddings, norms or clips may stand between {between}; if you know that nothing "
            f"does, say so by find_attention(model, {side}=True), which is then your promise"
        )


# What libraries call W_Q, W_K, W_V and W_O; an output may also be the ``dense`` of a sibling.
_NAMES = (
    (("to_q", "to_k", "to_v"), ("to_out.0",)),
    (("q_proj", "k_proj", "v_proj"), ("out_proj", "o_proj")),
    (("query", "key", "value"), ("output.dense", "out")),
)
_HEADS = ("heads", "num_heads", "num_attention_heads", "n_heads")
# Modules whose forward was read, exactly these: in all of them v meets nothing but the mixing of
# tokens on its way to W_O, and in those under True nothing happens to q and k before their product.
_FREE_KEYS = {
    f"transformers.models.{family}.modeling_{family}.{name}": keys
    for keys, names in (
        (
            True,
            {
                "bert": "BertSelfAttention",
                "clip": "CLIPAttention",
                "deit": "DeiTAttention",
                "dinov2": "Dinov2Attention",
                "opt": "OPTAttention",
                "roberta": "RobertaSelfAttention",
                "siglip": "SiglipAttention",
                "vit": "ViTAttention",
            },
        ),
        (
            False,
            {
                "gemma": "GemmaAttention",
                "llama": "LlamaAttention",
                "mistral": "MistralAttention",
                "qwen2": "Qwen2Attention",
                "qwen3": "Qwen3Attention",
            },
        ),
    )
    for family, name in names.items()
}
_BACKENDS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_DIFFUSERS = "diffusers.models.attention_processor."
_PROCESSORS = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
)


def find_attention(
    model: nn.Module, *, keys: bool | None = None, values: bool | None = None
) -> dict[str, AttentionLayers]:
    """Find the attention of a model by the names that diffusers and transformers give its layers.

    Args:
        model: The model.
        keys: Whether nothing stands between q, k and their product, in all that is found: your
            promise, by which a gauge of keys may change the function if it does not hold. When
            omitted it is so where the forward of a module is known (in diffusers ``Attention`` with
            a plain processor; in transformers BERT, RoBERTa, CLIP, SigLIP, ViT, DeiT, DINOv2, OPT)
            and in no other.
        values: Whether nothing but the mixing of tokens stands between v and W_O: as ``keys``,
            and when omitted so in Llama, Mistral, Gemma, Qwen2 and Qwen3 as well.

    Returns:
        Layers by name of the module that holds W_K; empty if there are none. Packed projections
        (``nn.MultiheadAttention``), heads with added keys (``add_k_proj``) and projections that
        are no plain ``nn.Linear`` (adapters, quantized, parametrized) are none of these.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import find_attention
        >>> block = torch.nn.Module()
        >>> for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        ...     block.add_module(name, torch.nn.Linear(4, 4))
        >>> block.num_heads = 2
        >>> found = find_attention(torch.nn.ModuleDict({"layer": block}), values=True)
        >>> {name: (one.free_keys, one.free_values) for name, one in found.items()}
        {'layer': (False, True)}
    """
    found = {}
    modules: dict[str, nn.Module] = dict(model.named_modules())
    for name, module in modules.items():
        parent = modules.get(name.rpartition(".")[0], module)
        for inner, outs in _NAMES:
            layers = [one for part in inner if (one := _linear(module, part)) is not None]
            places = [(place, out) for place in (module, parent) for out in outs]
            place, out = next((p for p in places if _linear(*p) is not None), (module, ""))
            output = _linear(place, out)
            if output is None or len(layers) < 3 or getattr(module, "add_k_proj", None):
                continue
            if heads := _heads(module):
                query, key, value = layers
                beside = [] if place is module else [place, place.get_submodule(out.split(".")[0])]
                free_keys, free_values = _free(module, beside, [*layers, output])
                found[name] = AttentionLayers(
                    query,
                    key,
                    value,
                    output,
                    heads,
                    free_keys=free_keys if keys is None else keys,
                    free_values=free_values if values is None else values,
                    module=_class(module),
                )
    return found


def _linear(module: nn.Module, path: str) -> nn.Linear | None:
    try:
        found = module.get_submodule(path)
    except AttributeError:
        return None
    # Not isinstance: what derives from it computes or stores its weight in another way.
    return found if type(found) is nn.Linear else None


def _heads(module: nn.Module) -> int | None:
    for holder in (module, getattr(module, "config", None)):
        for name in _HEADS:
            if isinstance(value := getattr(holder, name, None), int):
                return value
    return None


def _free(module: nn.Module, beside: list[nn.Module], layers: list[nn.Linear]) -> tuple[bool, bool]:
    """Whether keys and values are known to be free: every forward on the way is the library's."""
    name = _class(module)
    if any("forward" in vars(one) for one in (module, *beside, *layers)):  # replaced in place
        return False, False
    if name == f"{_DIFFUSERS}Attention":
        plain = _class(module.processor) in {_DIFFUSERS + one for one in _PROCESSORS}
        normed = any(getattr(module, one, None) is not None for one in ("norm_q", "norm_k"))
        return plain and not normed, plain
    backend = getattr(getattr(module, "config", None), "_attn_implementation", None)
    file = type(module).__module__
    if backend not in _BACKENDS or any(type(one).__module__ != file for one in beside):
        return False, False
    # Older versions of BERT could add relative positions.
    absolute = getattr(module, "position_embedding_type", "absolute") == "absolute"
    return _FREE_KEYS.get(name, False) and absolute, name in _FREE_KEYS


def _class(one: object) -> str:
    return f"{type(one).__module__}.{type(one).__qualname__}"


def _with_bias(layer: nn.Linear) -> Tensor:
    weight: Tensor = layer.weight
    return weight if layer.bias is None else torch.cat([weight, layer.bias[:, None]], dim=1)


Parts = tuple[Tensor, Tensor, Tensor, Tensor]


def _split(name: str, weights: HeadWeights, heads: int) -> Parts:
    """By group, channels first, float64: (g, c, n d), (g, c, d), (g, e, d), (g, e, n o)."""
    for argument, matrix in zip(HeadWeights._fields, weights, strict=True):
        require_floating_matrix(name, argument, matrix)
        require_finite(name, argument, matrix)
        if matrix.dim() != 2:
            raise ValueError(f"{name}: {argument} must be a matrix, got {tuple(matrix.shape)}")
    query, key, value, output = (matrix.to(torch.float64) for matrix in weights)
    if heads < 1 or len(query) % heads or output.shape[1] % heads:
        raise ValueError(
            f"{name}: heads must divide the {len(query)} rows of query and the "
            f"{output.shape[1]} columns of output, got {heads}"
        )
    c, e = len(query) // heads, output.shape[1] // heads
    groups = len(key) // c
    if len(key) % c or not groups or heads % groups or len(value) != groups * e:
        raise ValueError(
            f"{name}: key and value must have rows for a divisor of the {heads} heads of {c} and "
            f"{e} channels, got {len(key)} and {len(value)}"
        )
    q = query.reshape(groups, -1, c, query.shape[1]).transpose(1, 2).flatten(2)
    o = output.mT.reshape(groups, -1, e, output.shape[0]).transpose(1, 2).flatten(2)
    return q, key.reshape(groups, c, -1), value.reshape(groups, e, -1), o


def _joined(parts: Parts, like: HeadWeights) -> HeadWeights:
    q, k, v, o = parts
    d, out = like.query.shape[1], like.output.shape[0]
    query = q.unflatten(2, (-1, d)).transpose(1, 2).flatten(0, 2)
    output = o.unflatten(2, (-1, out)).transpose(1, 2).flatten(0, 2).mT
    found = (query, k.flatten(0, 1), v.flatten(0, 1), output)
    pairs = zip(found, like, strict=True)
    return HeadWeights(*(one.to(dtype=old.dtype).contiguous() for one, old in pairs))


def _gauge(name: str, argument: str, matrix: Tensor, groups: int, side: int) -> Tensor:
    require_floating_matrix(name, argument, matrix)
    require_finite(name, argument, matrix)
    if matrix.shape != (groups, side, side):
        raise ValueError(
            f"{name}: {argument} must have shape ({groups}, {side}, {side}), got "
            f"{tuple(matrix.shape)}"
        )
    return matrix.to(torch.float64)


def _balanced(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both (g, c, n) with first^T second kept and both Gram matrices diag of one Sigma."""
    left, right = (torch.linalg.qr(one.mT) for one in (first, second))
    u, sigma, vh = torch.linalg.svd(left.R @ right.R.mT, full_matrices=False)
    root = sigma.sqrt()[..., None]
    found, beside = root * (left.Q @ u).mT, root * (right.Q @ vh.mT).mT
    peak = found.gather(-1, found.abs().argmax(-1, keepdim=True))
    sign = torch.where(peak < 0.0, -1.0, 1.0)
    short = first.shape[1] - found.shape[1]  # more channels than inputs: the others are idle
    pad = torch.nn.functional.pad
    return pad(sign * found, (0, 0, 0, short)), pad(sign * beside, (0, 0, 0, short))
