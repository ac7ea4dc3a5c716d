"""Inputs without the usual numbers: 8-bit floats, complex matrices, meta and fake tensors."""

from __future__ import annotations

import pytest
import torch
from sample_inputs import diagonal, gaussian, symmetric, taking_route
from torch._subclasses.fake_tensor import FakeTensorMode

from immunize_ext.ops import (
    Preconditioner,
    SpectrumTracker,
    StreamedGram,
    condition_number,
    extremal_singular_values,
    gram_extremes,
    log_condition_number,
    symmetric_extremes,
)
from immunize_ext.ops.regularizers import gram_r_ill, gram_r_well, r_ill, r_well

EIGHT_BITS = [torch.float8_e4m3fn, torch.float8_e5m2]

MATRIX_FUNCTIONS = {
    "extremal_singular_values": lambda a: extremal_singular_values(a).sigma_min,
    "gram_extremes": lambda a: gram_extremes(a).lambda_min,
    "condition_number": condition_number,
    "log_condition_number": log_condition_number,
    "symmetric_extremes": lambda a: symmetric_extremes(a).lambda_min,
    "SpectrumTracker": lambda a: SpectrumTracker()(a).lambda_min,
    "r_well": r_well,
    "r_ill": r_ill,
    "gram_r_well": gram_r_well,
    "gram_r_ill": gram_r_ill,
    "StreamedGram": lambda a: StreamedGram([a]).extremes.lambda_min,
    "Preconditioner": lambda a: Preconditioner.from_features(a).apply(a),
}


@pytest.mark.parametrize("dtype", EIGHT_BITS)
@pytest.mark.parametrize("name", MATRIX_FUNCTIONS)
def test_eight_bits_are_exact_numbers_like_half_types(route, dtype, name):
    """Their eps, 1/8 or 1/4, as a tolerance would leave no singular value but the largest."""
    a = diagonal(1.0, 0.5, 0.25)
    function = MATRIX_FUNCTIONS[name]
    with taking_route(route):
        found = function(a.to(dtype))
        truth = function(a.float())
    assert torch.equal(found.double(), truth.to(found.dtype).double())


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_condition_number_and_gradient_of_eight_bits(dtype):
    a = diagonal(1.0, 0.5, 0.25).to(dtype).requires_grad_()
    kappa = condition_number(a)
    kappa.backward()
    assert kappa.item() == 4.0
    assert a.grad.float().diagonal().tolist() == [4.0, 0.0, -16.0]


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_not_finite_eight_bits_are_refused(dtype):
    a = torch.tensor([[1.0, float("nan")], [0.0, 1.0]]).to(dtype)
    for name in ("condition_number", "gram_r_well", "StreamedGram", "Preconditioner"):
        with pytest.raises(ValueError, match="finite"):
            MATRIX_FUNCTIONS[name](a)


@pytest.mark.parametrize("name", MATRIX_FUNCTIONS)
def test_complex_matrices_are_refused_without_wrong_advice(name):
    """.to(torch.float64), once proposed, drops the imaginary part: 2.473 where 3.179 is right."""
    with pytest.raises(ValueError, match=r"real floating-point|floating-point tensors") as told:
        MATRIX_FUNCTIONS[name](torch.eye(2, dtype=torch.complex128))
    assert ".to(torch.float64)" not in str(told.value)


def test_the_advice_for_complex_matrices_is_right():
    a, b = gaussian(3, 3), gaussian(3, 3, seed=1)
    truth = torch.linalg.cond(torch.complex(a, b))
    real = torch.cat([torch.cat([a, -b], -1), torch.cat([b, a], -1)], -2)
    torch.testing.assert_close(condition_number(real), truth)


WITHOUT_NUMBERS = [r_well, r_ill, gram_r_well, gram_r_ill, condition_number]


@pytest.mark.parametrize("function", WITHOUT_NUMBERS)
@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_meta_and_fake_tensors_tell_shape_and_dtype(function, kind, dtype):
    if kind == "meta":
        found = function(torch.empty(2, 3, 4, device="meta", dtype=dtype))
    else:
        with FakeTensorMode():
            found = function(torch.empty(2, 3, 4, dtype=dtype))
    assert found.shape == (2,)
    assert found.dtype == dtype


def test_normalisers_without_numbers():
    with FakeTensorMode():
        x = torch.empty(3, 4)
        assert r_well(x, p=torch.tensor(3.0)).shape == ()
        assert gram_r_ill(x, k=torch.tensor(2.0)).shape == ()
    with pytest.raises(ValueError, match="p must be positive"):
        r_well(gaussian(3, 4), p=torch.tensor([1.0, -1.0]))


def test_numbers_are_read_beneath_vmap():
    """What eager code refuses, one bad element of a vmapped batch refuses too."""
    batch = torch.stack([gaussian(3, 3), torch.eye(3).double()])
    with pytest.raises(ValueError, match="singular values that differ"):
        torch.func.vmap(r_ill)(batch)
    with pytest.raises(ValueError, match="p must be positive"):
        torch.func.vmap(lambda s, p: r_well(s, p=p))(batch, torch.tensor([1.0, -1.0]))
    assert torch.func.vmap(lambda h: symmetric_extremes(h).lambda_max)(
        torch.stack([symmetric(3), symmetric(3, seed=1)])
    ).shape == (2,)
