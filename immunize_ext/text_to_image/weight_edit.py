"""Edits of a model's weights: all of them or none, and reversible."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from types import TracebackType
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

# Edits that are in a model, in the order they were made. An edit that is undone beneath a later one
# hands it what it had saved. Weak both ways: an edit that nobody holds cannot be undone any more.
_active: WeakKeyDictionary[nn.Module, list[ref[WeightEdit]]] = WeakKeyDictionary()


class WeightEdit:
    """An edit that was applied; :meth:`undo` takes it back bit for bit.

    Several edits of a model may be undone in any order. Usable as a context manager, which undoes
    the edit at the end of the block.
    """

    def __init__(self, model: nn.Module, saved: Mapping[str, Tensor]) -> None:
        """Remember what was there before; :func:`apply_edit` makes one."""
        self._model = model
        self._saved: dict[str, Tensor] | None = dict(saved)

    @property
    def active(self) -> bool:
        """Whether the edit is still in the model."""
        return self._saved is not None

    def undo(self) -> None:
        """Put the old weights back. A second call does nothing.

        They go where the names stand now: parameters that were exchanged since (by
        ``load_state_dict(assign=True)``, say) get them too.

        Raises:
            ValueError: If a parameter is gone or has another shape; nothing is then changed.
        """
        if self._saved is None:
            return
        edits = [edit for found in _active[self._model] if (edit := found()) is not None]
        later = edits[edits.index(self) + 1 :]
        now = dict(self._model.named_parameters())
        for name, saved in self._saved.items():
            if name not in now or now[name].shape != saved.shape:
                raise ValueError(
                    f"WeightEdit.undo: {name} must be a parameter of shape {tuple(saved.shape)} as "
                    "it was; the model was rebuilt since the edit"
                )
        with torch.no_grad():
            for name, saved in self._saved.items():
                above = next((edit._saved for edit in later if name in (edit._saved or {})), None)
                if above is None:
                    now[name].copy_(saved)
                else:
                    above[name] = saved
        _active[self._model] = [ref(edit) for edit in edits if edit is not self]
        self._saved = None

    def __enter__(self) -> WeightEdit:
        """Return the edit itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Undo the edit."""
        self.undo()


def apply_edit(model: nn.Module, weights: Mapping[str, Tensor]) -> WeightEdit:
    """Write new weights into a model: all of them, or none.

    Everything is checked before the first weight changes, and a failure while writing (an
    interrupt, a device error) restores what was written already.

    Args:
        model: The model.
        weights: Parameter name, as in ``model.named_parameters()``, to its new value, in the shape
            and dtype of the parameter.

    Returns:
        The edit, whose ``undo`` restores the old weights bit for bit.

    Raises:
        ValueError: If a name is unknown, two parameters share memory, or a value has another shape
            or dtype, is not finite or has no numbers (a meta tensor). The message names the
            parameter; the model is unchanged.

    Note:
        The old weights are copied, so an edit costs the memory of the layers it touches.

    Source:
        The order of checks and writes answers huggingface/peft#3682, where a merge wrote NaN into
        base weights before it raised.

    Example:
        >>> import torch
        >>> from immunize_ext.text_to_image.weight_edit import apply_edit
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> before = layer.weight.detach().clone()
        >>> with apply_edit(layer, {"weight": torch.ones(1, 2)}):
        ...     layer(torch.ones(2)).item()
        2.0
        >>> torch.equal(layer.weight, before)
        True
    """
    known: dict[str, Tensor] = dict(model.named_parameters())
    chosen: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name not in known:
            raise ValueError(
                f"apply_edit: weights must name parameters of the model, got {name!r}; "
                "list them with model.named_parameters()"
            )
        parameter = known[name]
        if value.shape != parameter.shape or value.dtype != parameter.dtype:
            raise ValueError(
                f"apply_edit: {name} must have shape {tuple(parameter.shape)} and dtype "
                f"{parameter.dtype}, got {tuple(value.shape)} {value.dtype}"
            )
        if parameter.is_meta or value.is_meta:
            raise ValueError(
                f"apply_edit: {name} must hold numbers, got a meta tensor; load the weights first"
            )
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"apply_edit: {name} must be finite, got NaN or infinity")
        chosen[name] = parameter
    _refuse_overlap(chosen)
    # Before anything is written: a value may be a weight of the model itself.
    copied = _copies(weights, chosen)
    edit = WeightEdit(model, {name: p.detach().clone() for name, p in chosen.items()})
    _active.setdefault(model, []).append(ref(edit))
    try:
        with torch.no_grad():
            for name, parameter in chosen.items():
                parameter.copy_(copied[name] if name in copied else weights[name])
    except BaseException:
        edit.undo()
        raise
    return edit


def _span(tensor: Tensor) -> tuple[int, int, int]:
    """Storage of a tensor, and the first and last byte of it there."""
    start = tensor.data_ptr()
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage().data_ptr(), start, start + (last + 1) * tensor.element_size()


def _refuse_overlap(chosen: Mapping[str, Tensor]) -> None:
    spans = sorted((_span(p), name) for name, p in chosen.items() if p.numel())
    for ((home, _, end), name), ((other, start, _), second) in pairwise(spans):
        if home == other and start < end:
            raise ValueError(
                f"apply_edit: {name} and {second} are the same weight, or share a part of it; give "
                "it one value, under one name"
            )


def _copies(weights: Mapping[str, Tensor], chosen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the values that live in memory which the edit writes to."""
    homes = {p.untyped_storage().data_ptr() for p in chosen.values() if p.numel()}
    return {
        name: value.detach().clone()
        for name, value in weights.items()
        if value.untyped_storage().data_ptr() in homes
    }
