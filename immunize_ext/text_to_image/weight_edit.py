"""Edits of a model's weights: all of them or none, and reversible."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

import torch
from torch import Tensor, nn


class WeightEdit:
    """An edit that was applied; :meth:`undo` takes it back bit for bit.

    Usable as a context manager, which undoes the edit at the end of the block.
    """

    def __init__(self, parameters: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
        """Remember what was there before; :func:`apply_edit` makes one."""
        self._parameters = dict(parameters)
        self._saved: dict[str, Tensor] | None = dict(saved)

    @property
    def active(self) -> bool:
        """Whether the edit is still in the model."""
        return self._saved is not None

    def undo(self) -> None:
        """Put the old weights back. A second call does nothing."""
        if self._saved is None:
            return
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self._saved[name])
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
        ValueError: If a name is unknown, two names share storage, or a value has another shape or
            dtype or is not finite. The message names the parameter; the model is unchanged.

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
    owners: dict[int, str] = {}
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
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"apply_edit: {name} must be finite, got NaN or infinity")
        storage = parameter.data_ptr()
        if storage in owners:
            raise ValueError(
                f"apply_edit: {name} and {owners[storage]} are the same weight; give it one value"
            )
        owners[storage] = name
        chosen[name] = parameter
    edit = WeightEdit(chosen, {name: p.detach().clone() for name, p in chosen.items()})
    try:
        with torch.no_grad():
            for name, parameter in chosen.items():
                parameter.copy_(weights[name])
    except BaseException:
        edit.undo()
        raise
    return edit
