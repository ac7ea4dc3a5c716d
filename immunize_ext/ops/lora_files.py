r"""Files of LoRA adapters, as PEFT and diffusers write them, in and out.

An adapter is a table from the full name of a module, ``unet.mid_block. ... .to_k``, to its factors
and scale, W = W0 + s up down. What a library spreads over tensors, a config file and metadata is
brought together here:

- s = lora_alpha / r, or lora_alpha / sqrt(r) for rank-stabilised LoRA, by module where alpha or
  rank have patterns; in diffusers' files an ``.alpha`` beside the factors, else lora_alpha of the
  metadata, else 1.
- Factors of a convolution, (r, i, *kernel) and (o, r, 1, ...), as matrices, with their kernel.
- A bias of the up factor (PEFT's ``lora_bias``), which is added to the layer's own with the same s.

What is no sum of such terms is refused by name: DoRA, whose magnitudes rescale the rows of
W0 + s up down, so that its update depends on W0; copies of the model's own biases; whole modules.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from immunize_ext._extras import require_extra
from immunize_ext.ops.lora_merge import LowRank, merge_adapters, truncate_adapter
from immunize_ext.ops.moment_merge import MomentFactor
from immunize_ext.storage import new_folder

__all__ = ["LoraLayer", "merge_lora_adapters", "read_lora", "write_lora"]

LoraFormat = Literal["peft", "diffusers"]
FILES = {"peft": "adapter_model.safetensors", "diffusers": "pytorch_lora_weights.safetensors"}
CONFIG = "adapter_config.json"
_ROOT = "base_model.model."

_DOWN, _UP = ("lora_A", "lora.down", "lora_down"), ("lora_B", "lora.up", "lora_up")
_FACTOR = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_A|lora_B|lora[._]down|lora[._]up)(\.default)?\.weight$"
)
_BIAS = re.compile(r"^(?P<module>.+)\.(lora_B|lora[._]up)(\.default)?\.bias$")


class LoraLayer(NamedTuple):
    """The update of one module, s up down, and of its bias, s bias.

    Attributes:
        up: (o, r).
        down: (r, d), with d = i * kernel for a convolution.
        scale: s.
        kernel: (i, *kernel) of a convolution, () for a linear layer.
        bias: (o,), None where it stays as it is.
    """

    up: Tensor
    down: Tensor
    scale: float = 1.0
    kernel: tuple[int, ...] = ()
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """Number r of rows of down."""
        return self.down.shape[0]


LoraLayers = dict[str, LoraLayer]


def read_lora(path: str | os.PathLike[str], *, prefix: str = "unet") -> LoraLayers:
    """Read an adapter that PEFT or diffusers wrote.

    Args:
        path: Its folder, or its safetensors file. PEFT's adapter_config.json must stand beside it.
        prefix: Which part of a pipeline PEFT's names belong to, which do not say it.

    Returns:
        The layers by full name.

    Raises:
        FileNotFoundError: If there is no adapter.
        MissingExtraError: If safetensors is not installed.
        ValueError: If the file holds anything that is no sum of low-rank terms (DoRA, whole
            modules), names of another tool, or factors that do not fit each other.

    Example:
        >>> import tempfile, torch
        >>> from immunize_ext.ops import LoraLayer, read_lora, write_lora
        >>> layers = {"unet.attn2.to_k": LoraLayer(torch.ones(2, 1), torch.ones(1, 3))}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = read_lora(write_lora(layers, f"{folder}/adapter", format="diffusers"))
        >>> found["unet.attn2.to_k"].scale
        1.0
    """
    function, file = "read_lora", _file_of(Path(path))
    safetensors = require_extra("safetensors", extra="report", purpose="adapter files")
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{function}: {file} must be a safetensors file, got: {error}") from None
    of_peft = any(name.startswith(_ROOT) for name in state)
    if of_peft:
        state = {f"{prefix}.{name.removeprefix(_ROOT)}": tensor for name, tensor in state.items()}
        configs = {prefix: _config_beside(function, file)}
    else:
        configs = _configs_of_metadata(metadata)
    return _layers_of(function, file, state, configs)


def write_lora(
    layers: Mapping[str, LoraLayer], folder: str | os.PathLike[str], *, format: LoraFormat
) -> Path:
    """Write an adapter to a new folder that PEFT or diffusers loads; whole or not at all.

    Args:
        layers: The layers by full name. Scales go into the down factors: the file's scale is 1.
        folder: Folder to create.
        format: ``"peft"``: adapter_model.safetensors with adapter_config.json, for
            ``PeftModel.from_pretrained``. ``"diffusers"``: pytorch_lora_weights.safetensors, for
            ``pipeline.load_lora_weights``.

    Returns:
        The folder.

    Raises:
        FileExistsError: If the folder exists.
        MissingExtraError: If safetensors is not installed.
        ValueError: If the format is unknown, or PEFT's, which knows one model, and the layers
            belong to several parts of a pipeline.

    Example:
        >>> import tempfile, torch
        >>> from immunize_ext.ops import LoraLayer, read_lora, write_lora
        >>> layer = LoraLayer(up=torch.ones(3, 1), down=torch.ones(1, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = write_lora({"unet.to_k": layer}, f"{folder}/one", format="diffusers")
        ...     [*read_lora(written)]
        ['unet.to_k']
    """
    function, target = "write_lora", Path(folder)
    safetensors = require_extra("safetensors.torch", extra="report", purpose="adapter files")
    if format not in FILES:
        raise ValueError(f"{function}: format must be 'peft' or 'diffusers', got {format!r}")
    if len(layers) == 0:
        raise ValueError(f"{function}: layers must hold at least one, got none")
    parts = sorted({name.partition(".")[0] for name in layers})
    if format == "peft" and len(parts) > 1:
        raise ValueError(
            f"{function}: layers must belong to one model for format 'peft', got parts "
            f"{', '.join(parts)}; use 'diffusers'"
        )
    if target.exists():
        raise FileExistsError(f"{function}: {target} exists; choose another folder or remove it")
    # All layers have one or none does, in what libraries make of the file.
    biased = any(layer.bias is not None for layer in layers.values())
    state = {}
    for name, layer in layers.items():
        module = _ROOT + name.partition(".")[2] if format == "peft" else name
        down, up = layer.scale * layer.down if layer.scale != 1.0 else layer.down, layer.up
        if layer.kernel:
            down = down.reshape(layer.rank, *layer.kernel)
            up = up.reshape(*up.shape, *(1,) * (len(layer.kernel) - 1))
        tensors = {"lora_A.weight": down, "lora_B.weight": up}
        if biased:
            bias = up.new_zeros(len(up)) if layer.bias is None else layer.scale * layer.bias
            tensors["lora_B.bias"] = bias.to(up)
        # A copy each: safetensors refuses tensors that share memory.
        for part, tensor in tensors.items():
            state[f"{module}.{part}"] = tensor.detach().cpu().contiguous().clone()
    with new_folder(target) as writing:
        safetensors.save_file(state, writing / FILES[format], metadata={"format": "pt"})
        if format == "peft":
            ranks = {name.partition(".")[2]: layer.rank for name, layer in layers.items()}
            config = json.dumps(peft_config(ranks, biased=biased), indent=2) + "\n"
            (writing / CONFIG).write_text(config, encoding="utf-8")
        if target.exists():  # someone was faster
            raise FileExistsError(f"{function}: {target} exists; choose another folder")
    return target


def peft_config(ranks: Mapping[str, int], *, biased: bool = False) -> dict[str, Any]:
    """PEFT's config of an adapter with scale 1: by module name, its rank."""
    most = max(ranks.values())
    # A pattern matches the end of a name unless it says where to begin.
    different = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != most}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "r": most,
        "lora_alpha": most,
        "lora_dropout": 0.0,
        "bias": "none",
        **({"lora_bias": True} if biased else {}),
        # One pattern of full names: names in a list match the ends of other names as well, and PEFT
        # would wrap those modules with adapters that do nothing but cost.
        "target_modules": "|".join(re.escape(name) for name in ranks),
        "inference_mode": True,
        **({"rank_pattern": different, "alpha_pattern": different} if different else {}),
    }


def merge_lora_adapters(
    adapters: Sequence[Mapping[str, LoraLayer]],
    factors: Mapping[str, MomentFactor] | None = None,
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
) -> LoraLayers:
    r"""Merge adapters of one model, layer by layer, exactly and in factor space.

    Args:
        adapters: What :func:`read_lora` returned. A layer that some of them leave alone counts as
            an update of zero there.
        factors: The factor of each layer's input, of
            :func:`~immunize_ext.ops.factor_layers`; None where nothing is known of the inputs,
            which merges as if all were alike: the weighted mean of the updates.
        weights: mu of each adapter, where there are no factors; default 1.
        rank: Of the merged layers; the best of that rank in the metric of the merge. Default: the
            sum of the adapters' ranks, without loss.

    Returns:
        The merged adapter, scale 1, in float32, or float64 where adapters are.

    Raises:
        EqualSingularValuesError: As :func:`~immunize_ext.ops.truncate_adapter`.
        ValueError: If adapters do not fit each other or the factors.

    Note:
        Deterministic for a given number of threads. Derivatives as merge_adapters has them.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import LoraLayer, merge_lora_adapters
        >>> layer = LoraLayer(torch.ones(2, 1), torch.ones(1, 3), scale=2.0)
        >>> merged = merge_lora_adapters([{"unet.to_k": layer}, {"unet.to_v": layer}])
        >>> merged["unet.to_k"].rank, merged["unet.to_k"].down.tolist()
        (1, [[1.0, 1.0, 1.0]])
    """
    function = "merge_lora_adapters"
    if len(adapters) == 0:
        raise ValueError(f"{function}: adapters must hold at least one, got none")
    if factors is not None and weights is not None:
        raise ValueError(
            f"{function}: weights must not be given with factors, which have their hardness"
        )
    mu = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    if len(mu) != len(adapters) or not all(math.isfinite(w) and w > 0 for w in mu):
        raise ValueError(
            f"{function}: weights must be {len(adapters)} positive numbers, one an adapter, got "
            f"{mu}"
        )
    merged: LoraLayers = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter):
        present = next(adapter[name] for adapter in adapters if name in adapter)
        if any(name in adapter and adapter[name].bias is not None for adapter in adapters):
            raise ValueError(
                f"{function}: adapters must hold updates of matrices alone, got a bias (lora_bias) "
                f"of {name!r}"
            )
        columns = [
            _present(function, name, n, adapter.get(name), present)
            for n, adapter in enumerate(adapters)
        ]
        # Exact for the narrow ones; a file holds one dtype.
        wide = torch.float32
        for layer in columns:
            wide = torch.promote_types(wide, torch.promote_types(layer.up.dtype, layer.down.dtype))
        updates = [LowRank(layer.up.to(wide), layer.down.to(wide)) for layer in columns]
        scales = [[layer.scale] for layer in columns]
        if factors is None:
            one = _mean_of(updates, scales, mu)
            metric = torch.eye(present.down.shape[1], dtype=torch.float64, device=one.up.device)
        elif name not in factors:
            raise ValueError(
                f"{function}: factors must hold every layer of the adapters, got none for {name!r};"
                " collect the moments of that layer"
            )
        else:
            factor = factors[name]
            (one,) = merge_adapters([[update] for update in updates], factor, scales=scales)
            metric = factor.s
        if rank is not None:
            one = truncate_adapter(one, metric, rank)
        merged[name] = LoraLayer(one.up, one.down, 1.0, present.kernel)
    return merged


def _mean_of(updates: list[LowRank], scales: list[list[float]], mu: list[float]) -> LowRank:
    """What merge_adapters makes of equal moments, without a matrix (d, d)."""
    up = torch.cat([update.up for update in updates], -1)
    wide = torch.float64 if up.dtype == torch.float64 else torch.float32
    downs = [
        (weight / sum(mu) * scale[0]) * update.down.to(torch.float64)
        for update, scale, weight in zip(updates, scales, mu, strict=True)
    ]
    return LowRank(up, torch.cat(downs).to(wide))


def _present(
    function: str, name: str, n: int, layer: LoraLayer | None, like: LoraLayer
) -> LoraLayer:
    """A layer, or an update of rank zero in its place."""
    if layer is None:
        return LoraLayer(like.up[:, :0], like.down[:0], 1.0, like.kernel)
    fits = layer.up.shape[0] == like.up.shape[0] and layer.down.shape[1] == like.down.shape[1]
    if not fits or layer.kernel != like.kernel:
        raise ValueError(
            f"{function}: adapters must be of one model, got {name!r} from {layer.down.shape[1]} "
            f"to {layer.up.shape[0]} in adapter {n} and from {like.down.shape[1]} to "
            f"{like.up.shape[0]} in another"
        )
    return layer


# --- reading --------------------------------------------------------------------------------------


def _file_of(path: Path) -> Path:
    if path.is_file():
        return path
    for name in FILES.values():
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(
        f"read_lora: {path} must be a safetensors file or a folder with "
        f"{' or '.join(FILES.values())}"
    )


def _config_beside(function: str, file: Path) -> dict[str, Any]:
    path = file.with_name(CONFIG)
    if not path.is_file():
        raise FileNotFoundError(
            f"{function}: {path} must be there: PEFT keeps lora_alpha in it, without which the "
            "scale of the adapter is not known"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{function}: {path} must be JSON, got: {error}") from None
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        got = found.get("peft_type") if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{function}: {path} must be the config of a LoRA adapter, got {got!r}")
    return found


def _configs_of_metadata(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """By part of the pipeline; newer versions of diffusers write them, flattened."""
    found = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    if "lora_alpha" in found:  # of a model alone, whose names have no part in front
        return {"": found}
    configs: dict[str, dict[str, Any]] = {}
    for key, value in found.items():
        part, _, setting = key.partition(".")
        configs.setdefault(part, {})[setting] = value
    return configs


def _layers_of(
    function: str, file: Path, state: Mapping[str, Tensor], configs: Mapping[str, dict[str, Any]]
) -> LoraLayers:
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        match = _FACTOR.match(name)
        if match is not None:
            part = "down" if match["part"] in _DOWN else "up"
            found.setdefault(match["module"], {})[part] = tensor
        elif (match := _BIAS.match(name)) is not None:
            found.setdefault(match["module"], {})["bias"] = tensor
        elif name.endswith(".alpha") and not name.startswith("lora_"):
            found.setdefault(name.removesuffix(".alpha"), {})["alpha"] = tensor
        else:
            raise ValueError(f"{function}: {file} {_refusal(name)}")
    for config in configs.values():
        for setting, words in _REFUSED_SETTINGS.items():
            if config.get(setting):
                raise ValueError(f"{function}: {file} {words}")
    layers = {}
    for module, tensors in found.items():
        if not {"down", "up"} <= set(tensors):
            missing = "up" if "down" in tensors else "down"
            raise ValueError(
                f"{function}: {file} must hold both factors of {module}, got no {missing}"
            )
        down, up = tensors["down"], tensors["up"]
        r = down.shape[0]
        fits = down.dim() >= 2 and up.dim() == down.dim() and up.shape[1] == r
        bias = tensors.get("bias")
        if not fits or any(size != 1 for size in up.shape[2:]):
            raise ValueError(
                f"{function}: {file} must hold factors (r, d) and (o, r) of {module}, got "
                f"{tuple(down.shape)} and {tuple(up.shape)}"
            )
        if bias is not None and bias.shape != up.shape[:1]:
            raise ValueError(
                f"{function}: {file} must hold a bias ({len(up)},) of {module}, got "
                f"{tuple(bias.shape)}"
            )
        part, _, inner = module.partition(".")
        config, relative = (
            (configs[""], module) if "" in configs else (configs.get(part, {}), inner)
        )
        alpha = tensors.get("alpha")
        kernel = tuple(down.shape[1:]) if down.dim() > 2 else ()
        scale = _scale(relative, r, None if alpha is None else float(alpha), config)
        if bias is not None and not bool(bias.any()):
            bias = None  # PEFT writes one for every layer or for none
        layers[module] = LoraLayer(up.flatten(1), down.flatten(1), scale, kernel, bias)
    if not layers:
        raise ValueError(f"{function}: {file} must hold factors of LoRA, got none")
    return layers


_DORA = (
    "holds DoRA, whose update depends on the weights it is added to; merge its dense weights with "
    "merge_moments or merge_kv, or train without use_dora"
)
_REFUSED_SETTINGS = {
    "use_dora": _DORA,
    "fan_in_fan_out": "holds transposed weights (fan_in_fan_out), which are not supported",
    "modules_to_save": "holds whole modules (modules_to_save), which are no low-rank updates",
}


def _refusal(name: str) -> str:
    if "lora_magnitude_vector" in name or name.endswith(".dora_scale"):
        return _DORA
    if re.match(r"^lora_(unet|te\d?|transformer)_", name):
        return (
            f"has names of another tool, {name!r}; load it into its pipeline and write it with "
            "save_lora_weights"
        )
    return f"must hold factors of LoRA and nothing else, got {name!r}"


def _scale(module: str, rank: int, alpha: float | None, config: Mapping[str, Any]) -> float:
    if alpha is None:
        alpha = config.get("lora_alpha")
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):  # as PEFT reads them
                alpha = value
                break
    if alpha is None or rank == 0:
        return 1.0
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
