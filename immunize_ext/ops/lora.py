"""A merge as the LoRA adapter that it is: W_l = W0_l + R_l B has rank s at most, exactly."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from immunize_ext.ops.factor import RegularizationFactor
from immunize_ext.ops.lora_files import LoraFormat, LoraLayer, write_lora
from immunize_ext.ops.merge import solve_merge


class MergeAdapter(NamedTuple):
    """The factors of a merge, per layer: ``delta_l = up[l] @ down``.

    Attributes:
        down: B (r, d), the same for all layers.
        up: R_l (o_l, r), one a layer.
        skipped: Layers that ``on_error="skip"`` left out; their up is zero, and they stay out of
            files.
    """

    down: Tensor
    up: list[Tensor]
    skipped: tuple[int, ...] = ()


def as_lora(
    base: Sequence[Tensor],
    concepts: Sequence[Sequence[Tensor]] | None,
    embeddings: Sequence[Tensor],
    factor: RegularizationFactor,
    *,
    values: Sequence[Tensor] | None = None,
    hardness: float | Tensor = torch.inf,
    contradictions: Literal["raise", "average"] = "raise",
    names: Sequence[str] | None = None,
    on_error: Literal["raise", "skip"] = "raise",
) -> MergeAdapter:
    r"""Return a merge as an exact low-rank adapter instead of merged weights; no SVD.

    .. math:: W_l - W_{0,l} = R_l B, \qquad \text{lora\_B} = R_l,\ \text{lora\_A} = B

    Args:
        base: As for :func:`~immunize_ext.ops.merge_kv`.
        concepts: As for merge_kv.
        embeddings: As for merge_kv.
        factor: As for merge_kv.
        values: As for merge_kv.
        hardness: As for merge_kv.
        contradictions: As for merge_kv.
        names: As for merge_kv.
        on_error: As for merge_kv: with ``"skip"`` one bad layer does not cost the others.

    Returns:
        The adapter. Its rank is the number of tokens, less those that were dropped as repeats. In
        float64 for float64 weights, in float32 for all others.

    Raises:
        ContradictoryTargetsError: As merge_kv.
        ValueError: As merge_kv.

    Note:
        Deterministic. Without derivatives; differentiate merge_kv.

    Source:
        DERIVED from the closed form of MIMA (AAAI 2025) and Custom Diffusion (CVPR 2023).

    Example:
        >>> import torch
        >>> from immunize_ext.ops import RegularizationFactor, as_lora, merge_kv
        >>> base, adapted = torch.eye(4, dtype=torch.float64), 2 * torch.eye(4, dtype=torch.float64)
        >>> token, factor = torch.ones(1, 4, dtype=torch.float64), RegularizationFactor.identity(4)
        >>> problem = ([base], [[adapted]], [token], factor)
        >>> adapter = as_lora(*problem)
        >>> torch.allclose(base + adapter.up[0] @ adapter.down, merge_kv(*problem)[0])
        True
    """
    with torch.no_grad():
        solution = solve_merge(
            base, concepts, embeddings, factor, values, hardness, contradictions, names, on_error
        )
        used = (solution.b != 0).any(-1)  # rows of dropped tokens are exact zeros
        down = solution.b[used].to(solution.residual[0].dtype)
        up = [residual[:, used] for residual in solution.residual]
        return MergeAdapter(down, up, solution.skipped)


def lora_state_dict(
    adapter: MergeAdapter, modules: Sequence[str], *, format: LoraFormat, prefix: str = "unet"
) -> dict[str, Tensor]:
    """Name the tensors of an adapter as a library expects them.

    Args:
        adapter: What :func:`as_lora` returned.
        modules: For each layer the name of its ``nn.Linear`` in the model, as in
            ``model.named_modules()``.
        format: ``"peft"`` or ``"diffusers"``.
        prefix: With ``"diffusers"``, which part of the pipeline the names belong to.

    Returns:
        The state dict. The scale of the adapter is 1: lora_alpha equals the rank.

    Raises:
        ValueError: If the number of modules is not that of the layers, or names repeat.

    Example:
        >>> import torch
        >>> from immunize_ext.ops.lora import MergeAdapter, lora_state_dict
        >>> adapter = MergeAdapter(torch.ones(1, 3), [torch.ones(2, 1)])
        >>> sorted(lora_state_dict(adapter, ["attn2.to_k"], format="diffusers"))
        ['unet.attn2.to_k.lora_A.weight', 'unet.attn2.to_k.lora_B.weight']
    """
    if len(modules) != len(adapter.up) or len(set(modules)) != len(modules):
        raise ValueError(
            f"lora_state_dict: modules must hold {len(adapter.up)} different names, one a layer, "
            f"got {len(modules)}, {len(set(modules))} of them different"
        )
    if format not in ("peft", "diffusers"):
        raise ValueError(f"lora_state_dict: format must be 'peft' or 'diffusers', got {format!r}")
    root = "base_model.model" if format == "peft" else prefix
    state: dict[str, Tensor] = {}
    for layer, (module, up) in enumerate(zip(modules, adapter.up, strict=True)):
        if layer in adapter.skipped:
            continue
        # A copy each: safetensors refuses tensors that share memory.
        state[f"{root}.{module}.lora_A.weight"] = adapter.down.clone().contiguous()
        state[f"{root}.{module}.lora_B.weight"] = up.clone().contiguous()
    return state


def save_lora(
    adapter: MergeAdapter,
    modules: Sequence[str],
    folder: str | os.PathLike[str],
    *,
    format: LoraFormat,
    prefix: str = "unet",
) -> Path:
    """Write an adapter to a new folder that PEFT or diffusers loads; whole or not at all.

    Args:
        adapter: What :func:`as_lora` returned.
        modules: As for :func:`lora_state_dict`.
        folder: Folder to create.
        format: ``"peft"``: adapter_model.safetensors with adapter_config.json, for
            ``PeftModel.from_pretrained``. ``"diffusers"``: pytorch_lora_weights.safetensors, for
            ``pipeline.load_lora_weights``.
        prefix: As for :func:`lora_state_dict`.

    Returns:
        The folder.

    Raises:
        FileExistsError: If the folder exists.
        ImportError: If safetensors is not installed.
        ValueError: As :func:`lora_state_dict`.

    Example:
        >>> import tempfile, torch
        >>> from immunize_ext.ops import MergeAdapter, read_lora, save_lora
        >>> adapter = MergeAdapter(down=torch.ones(1, 3), up=[torch.ones(2, 1)])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = save_lora(adapter, ["attn2.to_k"], f"{folder}/lora", format="diffusers")
        ...     [*read_lora(written)]
        ['unet.attn2.to_k']
    """
    lora_state_dict(adapter, modules, format=format, prefix=prefix)  # refuses what does not fit
    part = prefix if format == "diffusers" else "model"  # which PEFT leaves out
    layers = {
        f"{part}.{module}": LoraLayer(up, adapter.down)
        for layer, (module, up) in enumerate(zip(modules, adapter.up, strict=True))
        if layer not in adapter.skipped
    }
    return write_lora(layers, folder, format=format)
