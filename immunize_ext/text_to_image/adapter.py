"""The adapter of a run: what immunization, or erasure, did to the model, as a LoRA file.

Whoever holds the base model and this file has the immunized model, and whoever leaves the file out
has the base model: it is for keeping, comparing and passing on what a method did, and protects
nothing that ships beside the base model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from immunize_ext.ops.lora_change import ChangeAdapter, adapter_of_change
from immunize_ext.ops.lora_files import LoraFormat, write_lora
from immunize_ext.settings import build, settings_of
from immunize_ext.storage import RESULTS, read_results
from immunize_ext.text_to_image.model import TextToImage
from immunize_ext.text_to_image.run import ERASURE, KIND, PIPELINE
from immunize_ext.text_to_image.settings import ModelSettings
from immunize_ext.text_to_image.task import load_alone


@dataclass(frozen=True)
class ExportedAdapter:
    """An adapter that was made of a run.

    Attributes:
        change: The adapter, the ranks of the change, and what the adapter misses.
        weights: Numbers in the weights that changed.
        base: What it is to be added to, as the run names it.
        path: Its folder, if it was written.
    """

    change: ChangeAdapter
    weights: int
    base: str
    path: Path | None

    def summary(self) -> str:
        """Ranks and residuals in a few lines."""
        layers = self.change.layers.values()
        kept = [layer.rank for layer in layers]
        true, missed = self.change.ranks.values(), self.change.residuals.values()
        numbers = sum(layer.up.numel() + layer.down.numel() for layer in layers)
        biases = sum(layer.bias is not None for layer in layers)
        ceilings = [min(layer.up.shape[0], layer.down.shape[1]) for layer in layers]
        full = sum(rank == most for rank, most in zip(true, ceilings, strict=True))
        lines = [
            f"{len(kept)} layers, rank {_extent(kept)}; numerical rank of the change "
            f"{_extent(true)} ({full} of full rank)",
            f"left out: {_extent(missed, '.2g')} of a layer's change, in norm",
            f"{numbers:,} numbers for {self.weights:,} in the weights that changed"
            + ("; --rank makes it smaller than these" if numbers >= self.weights else ""),
        ]
        if biases:
            lines.append(
                f"{biases} biases changed and are in it (lora_bias): libraries load it, and refuse "
                "to fuse it into layers without a bias"
            )
        return "\n".join([*lines, f"to be added to: {self.base}"])


def _extent(values: Any, form: str = "d") -> str:
    low, high = (format(value, form) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def export_lora(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    format: LoraFormat = "diffusers",
    rank: int | None = None,
    model: str | None = None,
) -> ExportedAdapter:
    """Make the adapter that turns the model of a run into its immunized one.

    Args:
        folder: A run folder of ``immunize mima`` or ``imma`` (its first seed), or what
            ``immunize erase`` wrote.
        out: Folder to create; nothing is written when omitted.
        format: ``"diffusers"`` for ``pipeline.load_lora_weights``, ``"peft"`` for
            ``PeftModel.from_pretrained`` of its denoiser.
        rank: Most that is kept of a layer; all that rounding leaves when omitted
            (:func:`~immunize_ext.ops.adapter_of_change`).
        model: The base model, where it stands elsewhere by now: a folder or a name.

    Returns:
        The adapter.

    Raises:
        FileExistsError: If ``out`` exists.
        FileNotFoundError: If there is no such run, or its base model is gone.
        ValueError: If it is no run of a text-to-image model, or the base model is not the one
            that it began with: another part than the denoiser differs, or parameters that no LoRA
            adapter holds.

    Example:
        >>> import tempfile
        >>> from immunize_ext.text_to_image import adapter, run
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = run.erase(run.EraseSettings(targets=("three",)), f"{folder}/erased")
        ...     found = adapter.export_lora(f"{folder}/erased", rank=8)
        >>> len(found.change.layers), {layer.rank for layer in found.change.layers.values()}
        (8, {8})
    """
    function, path = "export_lora", Path(folder)
    if out is not None and Path(out).exists():  # asked before the work, not after it
        raise FileExistsError(f"{out} exists; choose another folder or remove it")
    config, pipeline, wanted = _made_of(function, path)
    names = [name for name in settings_of(ModelSettings) if name not in ("concepts", "targets")]
    known = {name: config[name] for name in names if config.get(name) is not None}
    settings = replace(build(ModelSettings, known, "results.json"), device="cpu")
    if model is not None:
        settings = replace(settings, model=model)
    before, after = load_alone(settings), TextToImage.from_pretrained(pipeline)
    if wanted is not None and before.digest() != wanted:
        raise ValueError(
            f"{function}: the base model must be the one that was erased from, got another in "
            f"{settings.model}; give it with --model"
        )
    _refuse_other_parts(function, before, after)
    change = adapter_of_change(before.unet, after.unet, prefix=before.backbone.component, rank=rank)
    weights = sum(
        layer.up.shape[0] * layer.down.shape[1]
        for name, layer in change.layers.items()
        if change.ranks[name] > 0
    )
    written = None if out is None else write_lora(change.layers, out, format=format)
    return ExportedAdapter(change, weights, settings.model, written)


def _made_of(function: str, folder: Path) -> tuple[Mapping[str, Any], Path, str | None]:
    """Settings of a run or an erasure, the folder of its pipeline, and the digest of its base."""
    if not (folder / RESULTS).is_file() and (folder / ERASURE).is_file():
        record = json.loads((folder / ERASURE).read_text(encoding="utf-8"))
        return record["config"], folder, record["base_model_digest"]
    results = read_results(folder)
    if results["kind"] != KIND:
        raise ValueError(
            f"{function}: {folder} must be a run of a text-to-image model or an erasure, got "
            f"{results['kind']}, which has no adapter"
        )
    return results["config"], folder / PIPELINE, None


def _refuse_other_parts(function: str, before: TextToImage, after: TextToImage) -> None:
    for name, part in after.pipeline.components.items():
        if not isinstance(part, torch.nn.Module) or part is after.unet:
            continue
        other = before.pipeline.components.get(name)
        old = {} if other is None else other.state_dict()
        new = part.state_dict()
        if old.keys() != new.keys() or any(not torch.equal(old[n], new[n]) for n in new):
            raise ValueError(
                f"{function}: the {name} of the base model must be that of the immunized one, got "
                "another; give the model that the run began with (--model)"
            )
