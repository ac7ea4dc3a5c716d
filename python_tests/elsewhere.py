"""A second device that computes: finds tensors left on the CPU where there is no accelerator.

Inside ``elsewhere()`` the device ``meta`` holds numbers. Its tensors compute on the CPU, but what
an accelerator refuses is refused: tensors of both devices in one operation (a number and an index
on the CPU are allowed, as CUDA allows them), a generator of the CPU to fill them, ``numpy()``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")

aten = torch.ops.aten
# May take tensors of both devices.
_BOTH = {aten.copy_.default, aten._to_copy.default, aten.index_put_.default, aten.index.Tensor}
_BOTH |= {aten.index_put.default, aten._index_put_impl_.default}


_IS_META = Tensor.is_meta.__get__  # type: ignore[attr-defined]


class OtherDeviceError(RuntimeError):
    """What an accelerator would refuse."""


class Elsewhere(Tensor):
    """A tensor of the other device; ``held`` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        made: Any = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:  # a copy to the CPU, which subclasses do not have
            return args[0].detach().held.tolist()
        if func is Tensor.new_tensor:  # not dispatched either
            made = args[0].held.new_tensor(*args[1:], **(kwargs or {}))
            return Elsewhere(made)
        if func == _IS_META:  # it has numbers
            return False
        if func is Tensor.numpy:
            raise OtherDeviceError("numpy() of a tensor elsewhere")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __deepcopy__(self, memo: Any) -> Any:
        made = Elsewhere(self.held.clone()).requires_grad_(self.requires_grad)
        return nn.Parameter(made, self.requires_grad) if isinstance(self, nn.Parameter) else made

    def __repr__(self) -> str:
        return f"Elsewhere({self.held})"


def _held(value: Any) -> Any:
    return value.held if isinstance(value, Elsewhere) else value


def _wrapped(value: Any) -> Any:
    plain = isinstance(value, Tensor) and not isinstance(value, Elsewhere)
    return Elsewhere(value) if plain else value


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat = tree_flatten((args, kwargs))[0]
    there = [value for value in flat if isinstance(value, Elsewhere)]
    asked = kwargs.get("device")
    asked = None if asked is None else torch.device(asked)
    if not there and asked != DEVICE:
        return func(*args, **kwargs)
    inner = dict(kwargs)
    if asked is not None:
        inner["device"] = torch.device("cpu")
    result_there = bool(there) if asked is None else asked == DEVICE
    if func is aten.copy_.default or func is aten._to_copy.default:
        result_there = isinstance(args[0], Elsewhere) if asked is None else result_there
    here = [
        value
        for value in flat
        if isinstance(value, Tensor) and not isinstance(value, Elsewhere) and value.dim()
    ]
    if func in (aten.index.Tensor, aten.index_put_.default) and not isinstance(args[0], Elsewhere):
        raise OtherDeviceError(f"{func}: indices elsewhere, the tensor on the CPU")
    if here and there and func not in _BOTH:
        raise OtherDeviceError(f"{func}: tensors on two devices")
    for value in flat:
        if isinstance(value, torch.Generator) and result_there:
            raise OtherDeviceError(f"{func}: a generator of the CPU for a tensor elsewhere")
    found = func(*tree_map(_held, args), **tree_map(_held, inner))
    if not result_there:
        if func._schema.is_mutable:  # a copy into a tensor of the CPU
            return args[0]
        return found
    found = tree_map(_wrapped, found)
    if there and asked is None:
        return return_and_correct_aliasing(func, args, kwargs, found)
    return found


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What makes tensors of numbers without being dispatched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        more = dict(kwargs or {})
        asked = more.get("device")
        makes = func in (torch.tensor, torch.as_tensor) and asked is not None
        if not makes or torch.device(asked) != DEVICE:
            return func(*args, **more)
        if isinstance(args[0], Tensor):
            return args[0].to(**more)
        return Elsewhere(func(*args, **{**more, "device": "cpu"}))


def _autocast(device_type: str, *args: Any, **more: Any) -> Any:
    return _AUTOCAST("cpu" if device_type == DEVICE.type else device_type, *args, **more)


_AUTOCAST = torch.autocast


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """Make ``torch.device("meta")`` a device that computes, in the block."""
    with patch.object(torch, "autocast", _autocast), _Functions(), _Mode():
        yield DEVICE


def move(module: nn.Module) -> nn.Module:
    """A module with its parameters and buffers on the other device."""
    for part in module.modules():
        for name, value in [*part._parameters.items()]:
            if value is not None:
                moved = Elsewhere(value.detach().clone())
                part._parameters[name] = nn.Parameter(moved, value.requires_grad)
        for name, value in [*part._buffers.items()]:
            if value is not None:
                part._buffers[name] = Elsewhere(value.detach().clone())
    return module


def back(value: Any) -> Any:
    """Tensors of any structure on the CPU."""
    return tree_map(_held, value)
