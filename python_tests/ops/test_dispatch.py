"""Which route serves a tensor on which device."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from immunize_ext import _load
from immunize_ext.errors import FallbackWarning
from immunize_ext.ops import _dispatch

pytestmark = pytest.mark.skipif(not _load.available(), reason="the compiled part is not loaded")


def fake(device: str) -> Tensor:
    """A tensor that lives on a device this machine need not have."""
    with FakeTensorMode():
        return torch.empty(2, 3, device=device)


@pytest.fixture
def _not_warned_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_load, "_warned", threading.Event())


def test_cpu_and_meta_tensors_have_kernels() -> None:
    assert _dispatch.has_kernel(torch.empty(2, 3))
    assert _dispatch.has_kernel(torch.empty(2, 3, device="meta"))


def test_every_operator_of_the_schema_is_known() -> None:
    assert {"merge_solve", "merge_apply", "merge_apply_backward", "precondition"} <= (
        _dispatch._OPERATORS
    )
    assert _dispatch._CUDA_OPERATORS <= _dispatch._OPERATORS


@pytest.mark.usefixtures("_not_warned_yet")
def test_cuda_tensors_take_kernels_operator_by_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_CUDA_OPERATORS", frozenset({"merge_solve", "merge_apply"}))
    tensor = fake("cuda")
    assert _dispatch.has_kernel(tensor, "merge_solve", "merge_apply")
    with pytest.warns(FallbackWarning, match="no kernels for tensors on cuda in this build"):
        assert not _dispatch.has_kernel(tensor, "merge_apply", "precondition")
    assert not _dispatch.has_kernel(tensor)  # all of them, and it warns once
    monkeypatch.setattr(_dispatch, "_CUDA_OPERATORS", _dispatch._OPERATORS - _dispatch._CPU_ONLY)
    assert _dispatch.has_kernel(tensor)
    assert _dispatch._CPU_ONLY <= _dispatch._OPERATORS


@pytest.mark.usefixtures("_not_warned_yet")
def test_other_devices_take_the_torch_only_route() -> None:
    with pytest.warns(FallbackWarning, match="no kernels for tensors on xpu"):
        assert not _dispatch.has_kernel(fake("xpu"))
