"""Raw spectral operators called with tensors that do not fit: a named error, never memory.

Each test plants one tensor of a wrong shape, type or device among good ones. Compiled operators
reach memory through raw pointers, so what they do not refuse they read beyond its end; the
torch-only ones do not, and leave what autograd saved for them to torch.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sample_inputs import compiled_only
from torch import Tensor

from immunize_ext import ops as public

ops = torch.ops.immunize_ext
POLICY = (1e-12, 1e-12, False)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_of(*shape: int) -> Tensor:
    """A symmetric matrix."""
    x = gaussian(*shape)
    return x.mT @ x


def extremal_backward() -> dict[str, Tensor]:
    a = gaussian(3, 5, 4)
    out = ops.extremal_singular_values(a, *POLICY)
    names = ("multiplicity_max", "multiplicity_min", "u_max", "v_max", "u_min", "v_min")
    return {
        "grad_max": gaussian(3),
        "grad_min": gaussian(3),
        "a": a,
        **dict(zip(names, out[3:], strict=True)),
    }


def gram_backward() -> dict[str, Tensor]:
    x = gaussian(3, 4, 5)
    out = ops.gram_extremes(x, *POLICY)
    names = ("multiplicity_max", "multiplicity_min", "u_max", "v_max", "u_min", "v_min")
    return {
        "grad_max": gaussian(3),
        "grad_min": gaussian(3),
        "grad_squared_frobenius": gaussian(3),
        "x": x,
        "lambda_max": out[0],
        "lambda_min": out[1],
        **dict(zip(names, out[4:10], strict=True)),
        "thin_gram": out[10],
    }


def regularizer_backward() -> dict[str, Tensor]:
    x = gaussian(3, 4, 5)
    out = ops.regularizer(x, True, True, None, None, *POLICY)
    names = ("coefficients", "multiplicity", "thin_vector", "companion")
    return {"grad": gaussian(3), "x": x, **dict(zip(names, out[1:], strict=True))}


def condition_backward() -> dict[str, Tensor]:
    a = gaussian(3, 4, 5)
    out = ops.condition_number(a, False, *POLICY)
    names = ("multiplicity_max", "multiplicity_min", "u_max", "v_max", "u_min", "v_min")
    return {
        "grad": gaussian(3),
        "a": a,
        "coefficients": out[1],
        **dict(zip(names, out[2:], strict=True)),
    }


def symmetric_backward() -> dict[str, Tensor]:
    h = gram_of(3, 4, 4)
    out = ops.symmetric_extremes(h, 1e-12)
    names = ("multiplicity_max", "multiplicity_min", "v_max", "v_min")
    return {
        "grad_max": gaussian(3),
        "grad_min": gaussian(3),
        "h": h,
        **dict(zip(names, out[2:], strict=True)),
    }


def track() -> dict[str, Tensor]:
    h = gram_of(40, 40)
    _, _, vectors, matrix, reflectors, tridiagonal, ends = ops.symmetric_reference(h, 1e-12)
    return {
        "h": h,
        "vectors": vectors,
        "matrix": matrix,
        "reflectors": reflectors,
        "tridiagonal": tridiagonal,
        "ends": ends,
    }


def call_track(h: Tensor, **state: Tensor) -> object:
    return ops.symmetric_track(h, 1e-12, *state.values())


def with_policy(operator: Callable[..., object], *extra: object) -> Callable[..., object]:
    return lambda **tensors: operator(*tensors.values(), *extra, *POLICY)


CASES: dict[str, tuple[Callable[[], dict[str, Tensor]], Callable[..., object], str]] = {
    "extremal_singular_values_backward": (
        extremal_backward,
        with_policy(ops.extremal_singular_values_backward),
        "a",
    ),
    "gram_extremes_backward": (gram_backward, with_policy(ops.gram_extremes_backward), "x"),
    "regularizer_backward": (
        regularizer_backward,
        with_policy(ops.regularizer_backward, True, True, None),
        "x",
    ),
    "condition_number_backward": (
        condition_backward,
        with_policy(ops.condition_number_backward),
        "a",
    ),
    "symmetric_extremes_backward": (
        symmetric_backward,
        lambda **tensors: ops.symmetric_extremes_backward(*tensors.values(), 1e-12),
        "h",
    ),
    "symmetric_track": (track, call_track, "h"),
}
EVERY_TENSOR = [
    (operator, name)
    for operator, (inputs, _, matrix) in CASES.items()
    for name in inputs()
    if name != matrix
]

every_operator = pytest.mark.parametrize("operator", CASES)
every_tensor = pytest.mark.parametrize(("operator", "name"), EVERY_TENSOR)


def call(operator: str, **planted: Tensor) -> object:
    inputs, function, _ = CASES[operator]
    return function(**{**inputs(), **planted})


@every_operator
def test_good_inputs_are_taken(operator):
    """The base of every case below is right, so that only what is planted can be refused."""
    call(operator)


@compiled_only
@every_tensor
def test_short_tensors_are_refused_by_name(operator, name):
    """The last dimension cut to one, or the first where there is only one of them."""
    good = CASES[operator][0]()[name]
    with pytest.raises(ValueError, match=rf"^{operator}: {name} must have shape .*, got \[1\b"):
        call(operator, **{name: good.new_zeros([1] * good.dim())})
    with pytest.raises(ValueError, match=rf"^{operator}: {name} must have shape"):
        call(operator, **{name: good[..., :1].contiguous()})


@compiled_only
@every_tensor
def test_the_right_number_of_elements_is_not_enough(operator, name):
    """A flat tensor of as many elements has another shape."""
    good = CASES[operator][0]()[name]
    planted = good.reshape(-1) if good.dim() > 1 else good.reshape(-1, 1)
    with pytest.raises(ValueError, match=rf"^{operator}: {name} must have shape"):
        call(operator, **{name: planted})


@compiled_only
@every_tensor
def test_other_types_are_refused_by_name(operator, name):
    """Saved tensors are float64 or int64; a gradient may have any real floating-point type."""
    good = CASES[operator][0]()[name]
    planted = good.to(torch.int32 if name.startswith("grad") else torch.float32)
    with pytest.raises(ValueError, match=rf"^{operator}: {name} must have"):
        call(operator, **{name: planted})


@every_tensor
def test_strided_tensors_are_read_as_they_are(operator, name):
    """The elements every second place apart."""
    good = CASES[operator][0]()[name]
    planted = torch.stack([good, torch.full_like(good, 7)], -1)[..., 0]
    assert not planted.is_contiguous()
    expected, got = call(operator), call(operator, **{name: planted})
    pairs = zip(expected, got, strict=True) if isinstance(expected, tuple) else [(expected, got)]
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)


@compiled_only
@pytest.mark.parametrize(
    ("reflectors", "tridiagonal"), [((40, 1), (3, 1)), ((1, 40), (3, 40)), ((40, 0), (3, 0))]
)
def test_a_tracker_state_of_another_side_is_refused(reflectors, tridiagonal):
    """Reflectors (40, 1) and a tridiagonal (3, 1) for p = 40 ended in a segmentation fault."""
    with pytest.raises(ValueError, match=r"^symmetric_track: reflectors must have shape \[40, "):
        call(
            "symmetric_track",
            reflectors=torch.zeros(reflectors, dtype=torch.float64),
            tridiagonal=torch.zeros(tridiagonal, dtype=torch.float64),
        )


@compiled_only
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_state_without_a_scale_is_refused(value):
    """The last of ``ends`` divides the matrix."""
    ends = track()["ends"].clone()
    ends[4] = value
    with pytest.raises(ValueError, match=r"^symmetric_track: ends must hold a positive scale"):
        call("symmetric_track", ends=ends)


@compiled_only
@pytest.mark.parametrize("name", ["vectors", "matrix", "reflectors", "tridiagonal", "ends"])
def test_a_state_that_is_not_a_number_proves_nothing(name):
    """The caller decomposes anew, unless the vectors are right as they are and proven so."""
    planted = torch.full_like(track()[name], torch.nan)
    if name == "ends":
        planted[4] = 1.0
    values, _, proven = call("symmetric_track", **{name: planted})
    right = torch.linalg.eigvalsh(track()["h"])[[-1, 0]]
    assert torch.allclose(values, right, rtol=1e-12) if proven else values.isnan().any()
    assert proven == (name in {"reflectors", "tridiagonal"})


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 4, 5), (0, 0)])
def test_matrices_that_are_not_square_are_refused(shape):
    """Every operator that takes h."""
    h = torch.zeros(shape, dtype=torch.float64)
    for name, arguments in (
        ("symmetric_extremes", (h, 1e-12)),
        ("symmetric_reference", (h, 1e-12)),
        ("symmetric_track", (h, 1e-12, *list(track().values())[1:])),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: h must have"):
            getattr(ops, name)(*arguments)


@pytest.mark.parametrize(
    ("name", "planted", "message"),
    [
        ("factor", torch.eye(3, dtype=torch.float64), "factor must have shape"),
        ("factor", torch.eye(4), "factor must have dtype"),
        ("basis", torch.zeros(4, dtype=torch.float64), "basis must have shape"),
        ("basis", torch.zeros(2, 3, dtype=torch.float64), "basis must have shape"),
        ("basis", torch.zeros(0, 4), "basis must have dtype"),
    ],
)
@pytest.mark.parametrize("samples", [0, 4])
def test_precondition_checks_every_tensor(name, planted, message, samples):
    """A factor and a basis of another side or type."""
    good = {
        "grad": gaussian(2, 4),
        "factor": torch.eye(4, dtype=torch.float64),
        "basis": torch.eye(4, dtype=torch.float64)[:samples],
    }
    with pytest.raises(ValueError, match=rf"^precondition: {message}"):
        ops.precondition(*{**good, name: planted}.values(), 1.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", [3, 16, 17, 25, 33, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_entry_that_is_not_finite_is_found_wherever_it_stands(dtype, side, bad):
    """Entries are looked at in blocks of rows: neither the first nor the last may hide it."""
    for place in {0, side // 2, side - 1}:
        h = torch.eye(side, dtype=dtype)
        h[place, place] = bad
        with pytest.raises(ValueError, match="h must be finite"):
            public.symmetric_extremes(h)
        for function in (public.extremal_singular_values, public.gram_extremes):
            with pytest.raises(ValueError, match="must be finite"):
                function(h)
