"""Which route serves a tensor on which device."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from sample_inputs import POLICY, compiled_only, gaussian

from immunize_ext import _load
from immunize_ext.errors import FallbackWarning
from immunize_ext.ops import operators


@pytest.fixture
def _not_warned_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_load, "_warned", threading.Event())


@compiled_only
def test_kernels_of_the_build_are_known_by_name() -> None:
    assert operators.has_kernel("gram_extremes", "cpu")
    assert operators.has_kernel("merge_apply", "cpu")
    assert not operators.has_kernel("gram_extremes", "xpu")
    assert not operators.has_kernel("gram_extremes_double_backward", "cpu"), "one for all devices"


@compiled_only
@pytest.mark.usefixtures("_not_warned_yet")
def test_an_operator_without_a_kernel_says_so_once() -> None:
    """The kernel that the dispatcher finds for a device the build knows nothing of."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)
    call = torch.ops.immunize_ext.gram_extremes.default.redispatch
    a = gaussian(3, 4)
    with pytest.warns(FallbackWarning, match="there are no kernels for tensors on cpu"):
        found = call(keys, a, *POLICY)
    torch.testing.assert_close(found[0], torch.linalg.svdvals(a)[0].square())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(keys, a, *POLICY)


@compiled_only
@pytest.mark.usefixtures("_not_warned_yet")
def test_what_has_no_kernel_anywhere_does_not_warn() -> None:
    a = gaussian(3, 4).requires_grad_()
    largest = torch.ops.immunize_ext.gram_extremes(a, *POLICY)[0]
    (grad,) = torch.autograd.grad(largest, a, create_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grad.square().sum().backward()


@compiled_only
def test_fallbacks_only_replaces_the_kernels_and_puts_them_back() -> None:
    """Bitwise: eigh of the thin Gram matrix against our reduction."""
    a = gaussian(40, 60)
    call = torch.ops.immunize_ext.gram_extremes
    before = call(a, *POLICY)
    with operators.fallbacks_only():
        inside = call(a, *POLICY)
    after = call(a, *POLICY)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert not torch.equal(before[6], inside[6])
    torch.testing.assert_close(before[:6], inside[:6], rtol=1e-11, atol=0)
