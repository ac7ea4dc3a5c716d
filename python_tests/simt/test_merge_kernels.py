"""The kernels of the key/value merge, run on the CPU, against numpy and the reference."""

from itertools import chain
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from immunize_ext.reference.merge import merge_layers

SEEDS = range(4)
PROFILE = settings(max_examples=15, deadline=None, derandomize=True)
NOT_FINITE, OVERFLOW = 1, 2
TILE_ROWS, TILE_TOKENS, CHUNK, PAIR_COLUMNS = 16, 16, 128, 512
PLACE_BYTES = 80  # what a block of the row kernels keeps about its rows, before the chunks
# Type of the weights: type to compute in, and how far a float64 result may be off in units of it.
EPS = {"float32": 2.0**-23, "float64": 2.0**-52, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def accumulate(dtype: str) -> Any:
    return np.float64 if dtype == "float64" else np.float32


def store(x: Any, dtype: str) -> Any:
    """``x`` in the type of the weights; bfloat16 as the upper half of a float32."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(x, dtype)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def wide(x: Any) -> Any:
    """Stored weights as float64."""
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.astype(np.float64)


class Case(NamedTuple):
    """A merge with B given: everything as the kernels take it."""

    dtype: str
    base: list[Any]
    targets: list[Any]
    rows: list[int]
    values: bool
    c: Any
    b: Any

    @property
    def starts(self) -> list[int]:
        return np.concatenate([[0], np.cumsum(self.rows)]).astype(int).tolist()

    def residual(self, layer: int) -> Any:
        w0, c = wide(self.base[layer]), wide(self.c)
        if self.values:
            return wide(self.targets[layer]) - w0 @ c.swapaxes(1, 2)
        parts = [
            (wide(self.targets[n * len(self.base) + layer]) - w0) @ c[:, begin:end].swapaxes(1, 2)
            for n, (begin, end) in enumerate(zip(self.starts, self.starts[1:], strict=False))
        ]
        return np.concatenate(parts, axis=2)


def make_case(
    dtype: str,
    outputs: list[int],
    rows: list[int],
    d: int,
    *,
    values: bool = False,
    batch: int = 1,
    seed: int = 0,
) -> Case:
    random = np.random.default_rng(seed)
    s = sum(rows)
    scale = accumulate(dtype)(1 / np.sqrt(d))
    c = random.standard_normal((batch, s, d)).astype(accumulate(dtype)) * scale
    b = random.standard_normal((batch, s, d)).astype(accumulate(dtype)) * scale
    base = [store(random.standard_normal((batch, o, d)), dtype) for o in outputs]
    if values:
        targets = [
            np.ascontiguousarray(random.standard_normal((batch, o, s)), accumulate(dtype))
            for o in outputs
        ]
    else:
        targets = [
            store(random.standard_normal((batch, o, d)), dtype) for _ in rows for o in outputs
        ]
    return Case(dtype, base, targets, rows, values, c, b)


@pytest.fixture(scope="module")
def merge(simt: ModuleType) -> Any:
    return simt.merge


def apply(merge: Any, case: Case, **options: Any) -> Any:
    return merge.apply(
        case.dtype, case.base, case.targets, case.rows, case.values, case.c, case.b,
        merge.Options(**options),
    )  # fmt: skip


def assert_near(got: Any, expected: Any, dtype: str, terms: int) -> None:
    """Equal up to rounding: of a sum of so many terms of order one, and of the stored result."""
    assert got.shape == expected.shape
    if expected.size == 0:
        return
    size = max(1.0, float(np.abs(expected).max()))
    working = np.finfo(accumulate(dtype)).eps
    bound = (8 * working * np.sqrt(terms + 1) + EPS[dtype]) * size
    assert float(np.abs(wide(got) - expected).max()) <= bound


def check_apply(merge: Any, case: Case, **options: Any) -> None:
    merged, residual, status = apply(merge, case, **options)
    assert not status.any()
    s, d = case.c.shape[1:]
    for layer in range(len(case.base)):
        expected = case.residual(layer)
        assert_near(residual[layer], expected, "float64" if case.dtype == "float64" else "float32",
                    d)  # fmt: skip
        update = expected @ wide(case.b)
        assert_near(merged[layer], wide(case.base[layer]) + update, case.dtype, d + s)


def test_constants(merge: Any) -> None:
    """The shapes below are chosen around these numbers."""
    assert merge.TILE_ROWS == TILE_ROWS
    assert merge.TILE_TOKENS == TILE_TOKENS
    assert merge.CHUNK == CHUNK
    assert merge.PAIR_COLUMNS == PAIR_COLUMNS
    assert merge.PLACE_BYTES == PLACE_BYTES


# --- forward -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize(
    ("outputs", "rows", "d"),
    [
        ([1], [1], 1),
        ([16], [16], 128),
        ([17, 15, 1], [3, 17], 136),
        ([16, 33], [1, 8, 9], 127),
        ([5], [24], 514),
        ([2, 3], [4, 2], 520),
        ([3], [0, 2, 0], 12),
    ],
)
def test_apply_equals_numpy_at_tile_edges(
    merge: Any, dtype: str, values: bool, outputs: list[int], rows: list[int], d: int
) -> None:
    case = make_case(dtype, outputs, rows, d, values=values)
    check_apply(merge, case, seed=d)


@PROFILE
@given(
    dtype=st.sampled_from(sorted(EPS)),
    outputs=st.lists(st.integers(0, 35), min_size=1, max_size=3),
    rows=st.lists(st.integers(0, 20), min_size=1, max_size=3),
    d=st.integers(1, 300),
    values=st.booleans(),
    batch=st.integers(1, 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_apply_equals_numpy_for_any_shape(
    merge: Any,
    dtype: str,
    outputs: list[int],
    rows: list[int],
    d: int,
    values: bool,
    batch: int,
    seed: int,
) -> None:
    case = make_case(dtype, outputs, rows, d, values=values, batch=batch, seed=seed)
    check_apply(merge, case, seed=seed)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("values", [False, True])
def test_apply_gives_the_same_bits_under_every_schedule(
    merge: Any, dtype: str, values: bool
) -> None:
    case = make_case(dtype, [18, 5], [3, 18], 132, values=values, batch=2)
    first = apply(merge, case, seed=0)
    for options in [{"seed": seed} for seed in SEEDS[1:]] + [{"largest_grid": 2}]:
        again = apply(merge, case, **options)
        for one, other in zip(first[0] + first[1], again[0] + again[1], strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("values", [False, True])
def test_apply_to_rows_that_do_not_fit_into_shared_memory(
    merge: Any, dtype: str, values: bool
) -> None:
    case = make_case(dtype, [17], [5, 20], 264, values=values)
    limit = 36 if dtype == "float64" else 18
    check_apply(merge, case, shared_limit=limit * 1024 + 2048)
    # Room for all rows' coefficients or for 16 of them only: panels.
    chunks = 2 * 16 * (128 + (2 if dtype == "float64" else 4)) * (8 if dtype == "float64" else 4)
    panel = 16 * 16 * (8 if dtype == "float64" else 4)
    if dtype != "float16":  # a result in half precision is rounded once a panel
        check_apply(merge, case, shared_limit=PLACE_BYTES + chunks + panel)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_apply_to_unaligned_tensors(merge: Any, dtype: str) -> None:
    check_apply(merge, make_case(dtype, [17, 2], [3, 4], 136), shift=1)


@pytest.mark.parametrize("dtype", EPS)
def test_concepts_equal_to_the_base_change_nothing(merge: Any, dtype: str) -> None:
    case = make_case(dtype, [17, 4], [3, 2], 130)
    case = case._replace(targets=case.base * 2)
    merged, residual, _ = apply(merge, case)
    for layer, base in enumerate(case.base):
        np.testing.assert_array_equal(merged[layer], base)
        assert not residual[layer].any()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("s", [3, 20])
def test_values_that_the_base_gives_already_change_nothing(merge: Any, dtype: str, s: int) -> None:
    case = make_case(dtype, [19], [s], 300, values=True)
    outputs = (wide(case.base[0]) @ wide(case.c).swapaxes(1, 2)).astype(case.base[0].dtype)
    outputs[0, 2] += 1
    merged, residual, _ = apply(merge, case._replace(targets=[outputs]))
    same = np.arange(19) != 2
    np.testing.assert_array_equal(merged[0][:, same], case.base[0][:, same])
    assert not residual[0][:, same].any()
    assert residual[0][0, 2].all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("where", ["base", "targets"])
def test_layers_that_are_not_finite_are_told(
    merge: Any, bad: float, values: bool, where: str
) -> None:
    case = make_case("float32", [4, 17, 5], [2, 3], 130, values=values)
    getattr(case, where)[1][0, 16, 1] = bad
    assert (apply(merge, case)[2] & NOT_FINITE).tolist() == [[0, NOT_FINITE, 0]]


@pytest.mark.parametrize(("dtype", "size"), [("float16", 3e2), ("float32", 1e25)])
@pytest.mark.parametrize("d", [130, 128])
def test_layers_that_their_dtype_cannot_hold_are_told(
    merge: Any, dtype: str, size: float, d: int
) -> None:
    """R and B are finite, R B in one layer of one batch element is not; in the last column too."""
    case = make_case(dtype, [4, 17, 5], [2], d, values=True, batch=2)
    case.c[:] = 0
    case.b[1, :, d - 1] = size
    case.targets[1][1, 16] = size
    merged, _, status = apply(merge, case)
    assert status.tolist() == [[0, 0, 0], [0, OVERFLOW, 0]]
    assert np.isinf(wide(merged[1])[1, 16, d - 1])


@pytest.mark.parametrize("values", [False, True])
def test_apply_equals_the_reference(merge: Any, values: bool) -> None:
    random = np.random.default_rng(5)
    d, rows, outputs = 40, [3, 5], [6, 20]
    c_reg = random.standard_normal((90, d))
    c = random.standard_normal((8, d))
    case = make_case("float64", outputs, rows, d, values=values)
    a = np.linalg.solve(c_reg.T @ c_reg, c.T)
    b = np.linalg.solve(c @ a, a.T)
    case = case._replace(c=c[None], b=b[None])
    merged, _, _ = apply(merge, case)
    base = [w[0] for w in case.base]
    given_values = [v[0] for v in case.targets] if values else None
    concepts = [[w[0] for w in case.targets[:2]], [w[0] for w in case.targets[2:]]]
    expected = merge_layers(
        base, None if values else concepts, [c[:3], c[3:]], c_reg, values=given_values
    )
    for got, right in zip(merged, expected, strict=True):
        np.testing.assert_allclose(got[0], right, rtol=1e-9, atol=1e-10)


# --- backward, row by row ------------------------------------------------------------------------


def backward(
    merge: Any, case: Case, grad: list[Any], needs: tuple[bool, ...], **options: Any
) -> Any:
    return merge.backward(
        case.dtype, grad, case.rows, case.c, case.b, *needs, merge.Options(**options)
    )


def check_backward(merge: Any, case: Case, needs: tuple[bool, ...], **options: Any) -> None:
    """``case.base`` stands for the gradients G."""
    grad = case.base
    grad_base, grad_targets, coefficients = backward(merge, case, grad, needs, **options)
    working = "float64" if case.dtype == "float64" else "float32"
    s, d = case.c.shape[1:]
    assert [bool(grad_base), bool(coefficients)] == [needs[0], needs[2]]
    assert len(grad_targets) == (len(grad) * len(case.rows) if needs[1] else 0)
    for layer, stored in enumerate(grad):
        g, c, b = wide(stored), wide(case.c), wide(case.b)
        dr = g @ b.swapaxes(1, 2)
        if needs[2]:
            assert_near(coefficients[layer], dr, working, d)
        if needs[0]:
            assert_near(grad_base[layer], g - dr @ c, case.dtype, d + s)
        for n, (begin, end) in enumerate(zip(case.starts, case.starts[1:], strict=False)):
            if needs[1]:
                got = grad_targets[n * len(grad) + layer]
                assert_near(got, dr[..., begin:end] @ c[:, begin:end], case.dtype, d + s)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(
    ("outputs", "rows", "d"),
    [
        ([1], [1], 1),
        ([16, 17], [16], 128),
        ([33, 1], [3, 17], 136),
        ([15], [1, 0, 9], 127),
        ([3], [24], 514),
    ],
)
def test_backward_equals_numpy_at_tile_edges(
    merge: Any, dtype: str, outputs: list[int], rows: list[int], d: int
) -> None:
    check_backward(merge, make_case(dtype, outputs, rows, d), (True, True, True), seed=d)


@PROFILE
@given(
    dtype=st.sampled_from(sorted(EPS)),
    outputs=st.lists(st.integers(0, 35), min_size=1, max_size=3),
    rows=st.lists(st.integers(0, 20), min_size=1, max_size=3),
    d=st.integers(1, 300),
    needs=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    batch=st.integers(1, 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_backward_equals_numpy_for_any_shape(
    merge: Any,
    dtype: str,
    outputs: list[int],
    rows: list[int],
    d: int,
    needs: tuple[bool, ...],
    batch: int,
    seed: int,
) -> None:
    case = make_case(dtype, outputs, rows, d, batch=batch, seed=seed)
    check_backward(merge, case, needs, seed=seed)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_backward_without_room_in_shared_memory(merge: Any, dtype: str) -> None:
    size, pack = (8, 2) if dtype == "float64" else (4, 4)
    chunks, panel = 2 * 16 * (128 + pack) * size, 16 * 16 * size
    case = make_case(dtype, [17], [5, 20], 264)
    for limit in (chunks + 2 * panel, chunks + panel):
        check_backward(merge, case, (True, True, True), shared_limit=PLACE_BYTES + limit)
    check_backward(merge, case, (True, True, True), shift=1)


def test_backward_gives_the_same_bits_under_every_schedule(merge: Any) -> None:
    case = make_case("float32", [18, 5], [3, 18], 132, batch=2)
    needs = (True, True, True)
    first = backward(merge, case, case.base, needs)
    for options in [{"seed": seed} for seed in SEEDS[1:]] + [{"largest_grid": 3}]:
        again = backward(merge, case, case.base, needs, **options)
        for one, other in zip(chain(*first), chain(*again), strict=True):
            np.testing.assert_array_equal(one, other)


# --- backward, sums over rows --------------------------------------------------------------------


def sum_rows(
    merge: Any, case: Case, coefficients: list[Any], sign: float = 1.0, **options: Any
) -> Any:
    return merge.sum_rows(
        case.dtype, coefficients, case.base, [] if case.values else case.targets, case.rows, sign,
        merge.Options(**options),
    )  # fmt: skip


def make_coefficients(case: Case) -> list[Any]:
    random = np.random.default_rng(1)
    s = case.c.shape[1]
    return [
        random.standard_normal((*w.shape[:2], s)).astype(accumulate(case.dtype)) for w in case.base
    ]


def check_sum(merge: Any, case: Case, sign: float = 1.0, **options: Any) -> None:
    coefficients = make_coefficients(case)
    got = sum_rows(merge, case, coefficients, sign, **options)
    expected = np.zeros(case.c.shape)
    layers = len(case.base)
    for layer, stored in enumerate(case.base):
        w0, p = wide(stored), coefficients[layer].astype(np.float64).swapaxes(1, 2)
        for n, (begin, end) in enumerate(zip(case.starts, case.starts[1:], strict=False)):
            x = w0 if case.values else wide(case.targets[n * layers + layer]) - w0
            expected[:, begin:end] += sign * p[:, begin:end] @ x
    working = "float64" if case.dtype == "float64" else "float32"
    total = sum(w.shape[1] for w in case.base)
    assert got.dtype == np.float64
    assert_near(got, expected, working, total)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize(
    ("outputs", "rows", "d"),
    [
        ([1], [1], 1),
        ([255, 1], [16], 8),
        ([257, 16, 17], [3, 17], 16),
        ([40, 256], [1, 9], 7),
        ([9], [24], 516),
        ([9, 0], [2, 0], 513),
    ],
)
def test_sums_equal_numpy_at_tile_edges(
    merge: Any, dtype: str, values: bool, outputs: list[int], rows: list[int], d: int
) -> None:
    case = make_case(dtype, outputs, rows, d, values=values)
    check_sum(merge, case, sign=-1.0 if values else 1.0, seed=d)


@PROFILE
@given(
    dtype=st.sampled_from(sorted(EPS)),
    outputs=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    rows=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    d=st.integers(1, 40),
    values=st.booleans(),
    batch=st.integers(1, 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_sums_equal_numpy_for_any_shape(
    merge: Any,
    dtype: str,
    outputs: list[int],
    rows: list[int],
    d: int,
    values: bool,
    batch: int,
    seed: int,
) -> None:
    case = make_case(dtype, outputs, rows, d, values=values, batch=batch, seed=seed)
    check_sum(merge, case, seed=seed)


def test_sums_give_the_same_bits_under_every_schedule(merge: Any) -> None:
    case = make_case("float32", [300, 40], [3, 18], 20, batch=2)
    coefficients = make_coefficients(case)
    first = sum_rows(merge, case, coefficients)
    for options in [{"seed": seed} for seed in SEEDS[1:]] + [{"largest_grid": 3}]:
        np.testing.assert_array_equal(first, sum_rows(merge, case, coefficients, **options))
    check_sum(merge, case, shift=1)
