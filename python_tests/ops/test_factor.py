"""RegularizationFactor: the factor of Q, what it refuses, and its file."""

from __future__ import annotations

import json
import os
import stat
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sample_inputs import EPS, gaussian

from immunize_ext import reference
from immunize_ext.errors import NotPositiveDefiniteError, NumericalWarning
from immunize_ext.ops import RegularizationFactor, merge_kv
from immunize_ext.ops.operators import has_kernel
from immunize_ext.testing import strategies
from immunize_ext.testing.samples import text_embeddings

from_embeddings = RegularizationFactor.from_embeddings

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def gram_of(factor: RegularizationFactor) -> torch.Tensor:
    return factor.chol @ factor.chol.mT


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 2.0])
@pytest.mark.parametrize("relative", [True, False])
def test_factors_the_regularised_gram_matrix(dtype, ridge, relative):
    c_reg = gaussian(30, 6, dtype=dtype)
    factor = from_embeddings(c_reg, ridge=ridge, relative=relative)
    wide = c_reg.double()
    absolute = reference.absolute_ridge(wide.numpy(), ridge, relative=relative)
    truth = wide.mT @ wide + absolute * torch.eye(6).double()
    torch.testing.assert_close(gram_of(factor), truth, rtol=1e-13, atol=1e-13)
    assert factor.chol.dtype == torch.float64
    assert torch.equal(factor.chol, factor.chol.tril())
    assert factor.ridge == pytest.approx(absolute, rel=1e-14)
    assert (factor.dim, factor.samples, factor.device.type) == (6, 30, "cpu")


@given(text=strategies.embeddings(full_rank=True, max_exponent=9.0))
def test_text_like_features_in_float32(text):
    """Accumulated in float64: in float32 the Cholesky factorisation itself fails at kappa 1e7."""
    factor = from_embeddings(text.rows)
    wide = text.rows.double()
    truth = wide.mT @ wide
    assert float((gram_of(factor) - truth).norm()) <= 100 * EPS * float(truth.norm())
    kappa = float(np.linalg.cond(text.rows.double().numpy())) ** 2
    # Forming Q moves its smallest eigenvalue by eps lambda_max times the side.
    assert factor.condition == pytest.approx(kappa, rel=1e-6 + 100 * 60 * EPS * kappa)


@given(data=st.data())
def test_streamed_blocks_equal_one_shot(data):
    """Any split into blocks, any chunk: the same sum up to rounding, and the same ridge."""
    c_reg = gaussian(40, 5, seed=data.draw(st.integers(0, 10)), dtype=torch.float32)
    cuts = sorted(data.draw(st.lists(st.integers(0, 40), max_size=6)))
    blocks = [c_reg[a:b] for a, b in zip([0, *cuts], [*cuts, 40], strict=True)]
    chunk = data.draw(st.integers(1, 50))
    streamed = from_embeddings(iter(blocks), ridge=0.01, chunk=chunk)
    whole = from_embeddings(c_reg, ridge=0.01)
    torch.testing.assert_close(streamed.chol, whole.chol, rtol=1e-12, atol=1e-13)
    assert streamed.samples == 40
    assert streamed.ridge == pytest.approx(whole.ridge, rel=1e-13)


def test_streaming_holds_one_block_at_a_time():
    """Blocks are dropped as soon as they are used, so memory does not grow with their number."""
    alive: list[weakref.ref] = []
    most = 0

    def blocks():
        nonlocal most
        for k in range(20):
            block = gaussian(10, 4, seed=k)
            alive.append(weakref.ref(block))
            yield block
            del block
            most = max(most, sum(ref() is not None for ref in alive))

    from_embeddings(blocks())
    assert most <= 2


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e3, 1e12])
def test_relative_ridge_has_no_scale(scale):
    c_reg = gaussian(3, 8)
    unit, scaled = from_embeddings(c_reg, ridge=0.1), from_embeddings(scale * c_reg, ridge=0.1)
    torch.testing.assert_close(scaled.chol / scale, unit.chol, rtol=1e-12, atol=1e-13)
    assert scaled.condition == pytest.approx(unit.condition, rel=1e-10)


def test_absolute_ridge_has_one():
    c_reg = gaussian(3, 8)
    unit = from_embeddings(c_reg, ridge=0.1, relative=False)
    scaled = from_embeddings(1e3 * c_reg, ridge=0.1, relative=False)
    assert unit.ridge == scaled.ridge == 0.1
    assert scaled.condition > 1e5 * unit.condition


def test_ridge_goes_to_the_diagonal_alone():
    c_reg = gaussian(20, 4)
    difference = gram_of(from_embeddings(c_reg, ridge=3.0, relative=False)) - gram_of(
        from_embeddings(c_reg)
    )
    torch.testing.assert_close(difference, 3 * torch.eye(4).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("ridge", [1e-12, 1e-8, 1e-4, 1e-2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fewer_captions_than_columns_need_only_a_ridge(ridge, dtype):
    """Rank 5 of 16: the constraint is met for every ridge, float32 features included."""
    factor = from_embeddings(gaussian(5, 16, dtype=dtype), ridge=ridge)
    base, token, value = gaussian(8, 16, seed=1), gaussian(2, 16, seed=2), gaussian(8, 2, seed=3)
    (merged,) = merge_kv([base], None, [token], factor, values=[value])
    # kappa(T) grows as 1 / ridge at worst: one token direction outside the captions is enough.
    torch.testing.assert_close(merged @ token.mT, value, rtol=0, atol=1e-8)


def test_identity():
    factor = RegularizationFactor.identity(3)
    assert torch.equal(factor.chol, torch.eye(3).double())
    assert (factor.dim, factor.samples, factor.condition) == (3, 0, 1.0)


def test_condition_and_repr():
    factor = from_embeddings(torch.diag(torch.tensor([1.0, 2.0, 10.0])))
    assert factor.condition == pytest.approx(100.0, rel=1e-12)
    assert "dim=3" in repr(factor)
    assert "samples=3" in repr(factor)


def test_move_to_another_device_keeps_everything():
    c_reg = gaussian(9, 3).requires_grad_()
    factor = from_embeddings(c_reg, ridge=0.1)
    assert factor.to("cpu") is factor
    moved = factor.to("meta")
    assert moved.device.type == "meta"
    assert (moved.ridge, moved.samples) == (factor.ridge, factor.samples)
    assert moved.source is not None
    assert moved.ridge_tensor is not None


# --- gradients reach C_reg and the ridge ----------------------------------------------------------


@pytest.mark.parametrize("relative", [True, False])
def test_gradient_of_the_trace_of_the_inverse(relative):
    """tr(Q^-1) through the merge route: -2 C_reg Q^-2, and the ridge's share."""
    c_reg = gaussian(12, 4).requires_grad_()
    ridge = torch.tensor(0.3).double().requires_grad_()

    def inverse_trace(c, mu):
        # W = W0 + R B with C = I: B = T^-1 A^T = I, so look at soft rows: T = Q^-1 + I.
        factor = from_embeddings(c, ridge=mu, relative=relative)
        eye = torch.eye(4).double()
        merged = merge_kv([0 * eye], None, [eye], factor, values=[eye], hardness=1.0)[0]
        return merged.diagonal().sum()  # tr (Q + I)^-1

    found = torch.autograd.grad(inverse_trace(c_reg, ridge), (c_reg, ridge))

    def truth(c, mu):
        absolute = mu * c.square().sum() / 4 if relative else mu
        q = c.mT @ c + (absolute + 1) * torch.eye(4).double()
        return torch.linalg.inv(q).diagonal().sum()

    expected = torch.autograd.grad(truth(c_reg, ridge), (c_reg, ridge))
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-13)


def test_no_gradient_is_kept_where_none_is_asked_for():
    factor = from_embeddings(gaussian(9, 3), ridge=0.1)
    assert factor.source is None
    assert factor.ridge_tensor is None
    with torch.no_grad():
        assert not from_embeddings(gaussian(9, 3).requires_grad_()).chol.requires_grad


# --- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(tmp_path, dtype):
    factor = from_embeddings(gaussian(20, 5, dtype=dtype), ridge=1e-3)
    path = tmp_path / "factor.safetensors"
    factor.save(path)
    loaded = RegularizationFactor.load(str(path))
    assert torch.equal(loaded.chol, factor.chol)
    assert (loaded.ridge, loaded.samples, loaded.dim) == (factor.ridge, factor.samples, factor.dim)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name], "no temporary file is left"


def test_file_has_the_permissions_of_any_other(tmp_path):
    """A cache is shared: the umask of the user decides, not that of a temporary file."""
    path, plain = tmp_path / "factor.safetensors", tmp_path / "plain"
    RegularizationFactor.identity(2).save(path)
    plain.write_bytes(b"")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_save_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "factor.safetensors"
    RegularizationFactor.identity(2).save(path)
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        RegularizationFactor.identity(3).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_save_overwrites(tmp_path):
    path = tmp_path / "factor.safetensors"
    RegularizationFactor.identity(2).save(path)
    RegularizationFactor.identity(3).save(path)
    assert RegularizationFactor.load(path).dim == 3


def test_load_refuses_what_is_no_factor(tmp_path):
    with pytest.raises(FileNotFoundError, match="must name a file"):
        RegularizationFactor.load(tmp_path / "missing")
    text = tmp_path / "text"
    text.write_text("no tensors here")
    with pytest.raises(ValueError, match="must name a safetensors file"):
        RegularizationFactor.load(text)
    half = tmp_path / "half"
    RegularizationFactor.identity(4).save(half)
    half.write_bytes(half.read_bytes()[:-20])
    with pytest.raises(ValueError, match="must name a safetensors file"):
        RegularizationFactor.load(half)


def write(path, chol, *, name="chol", **metadata):
    from safetensors.torch import save_file

    header = {"kind": "immunize_ext.RegularizationFactor/1", "ridge": "0.0", "samples": "3"}
    save_file({name: chol}, path, metadata={**header, **metadata})


@pytest.mark.parametrize(
    "chol",
    [
        pytest.param(torch.eye(3), id="float32"),
        pytest.param(torch.ones(2, 3).double().tril(), id="not square"),
        pytest.param(torch.zeros(3).double(), id="a vector"),
        pytest.param(-torch.eye(3).double(), id="negative pivot"),
        pytest.param(torch.full((3, 3), float("nan")).double(), id="nan"),
        pytest.param(
            torch.tensor([[1.0, 0.0], [float("nan"), 1.0]]).double(), id="nan below the diagonal"
        ),
        pytest.param(torch.ones(3, 3).double(), id="not triangular"),
    ],
)
def test_load_refuses_damaged_factors(tmp_path, chol):
    path = tmp_path / "factor.safetensors"
    write(path, chol)
    with pytest.raises(ValueError, match="must hold a float64 Cholesky factor"):
        RegularizationFactor.load(path)


def test_load_refuses_another_format(tmp_path):
    path = tmp_path / "factor.safetensors"
    write(path, torch.eye(2).double(), kind="something/2")
    with pytest.raises(ValueError, match="got something/2"):
        RegularizationFactor.load(path)
    write(path, torch.eye(2).double(), name="factor")
    with pytest.raises(ValueError, match="must hold a float64 Cholesky factor"):
        RegularizationFactor.load(path)


def test_factor_of_other_captions_is_refused_by_its_tag(tmp_path):
    """Of the same width it would fit every shape and edit wrongly."""
    path, untagged = tmp_path / "tagged.safetensors", tmp_path / "untagged.safetensors"
    factor = from_embeddings(gaussian(20, 5), ridge=1e-3)
    factor.save(path, tag="CLIP ViT-L/14, 20 captions")
    factor.save(untagged)
    loaded = RegularizationFactor.load(path, tag="CLIP ViT-L/14, 20 captions")
    assert loaded.tag == RegularizationFactor.load(path).tag == "CLIP ViT-L/14, 20 captions"
    assert torch.equal(loaded.chol, factor.chol)
    assert RegularizationFactor.load(untagged).tag is None
    with pytest.raises(ValueError, match="factor of 'OpenCLIP', got 'CLIP ViT-L/14, 20 captions'"):
        RegularizationFactor.load(path, tag="OpenCLIP")
    with pytest.raises(ValueError, match="factor of 'OpenCLIP', got one without a tag"):
        RegularizationFactor.load(untagged, tag="OpenCLIP")
    loaded.save(path)  # keeps its tag
    assert RegularizationFactor.load(path).tag == loaded.tag


def test_file_of_an_earlier_version_without_tag_loads(tmp_path):
    path = tmp_path / "factor.safetensors"
    write(path, torch.eye(3).double())
    assert RegularizationFactor.load(path).tag is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_captions_are_widened_piece_by_piece(dtype):
    """One buffer serves all pieces, the last one shorter; captions of width 1 as well."""
    for m, d in ((1200, 7), (513, 1), (512, 3), (5, 2)):
        c_reg = gaussian(m, d, dtype=dtype)
        found = from_embeddings(c_reg, ridge=1e-3).chol
        truth = from_embeddings(c_reg.double(), ridge=1e-3).chol
        assert torch.equal(found, truth)
    columns = gaussian(7, 1200, dtype=dtype).mT
    truth = from_embeddings(columns.double().contiguous(), ridge=1e-3).chol
    torch.testing.assert_close(from_embeddings(columns, ridge=1e-3).chol, truth)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (127, 12), (300, 25), (1000, 97)])
def test_gram_matrix_of_integers_is_exact(shape, dtype):
    """Sums of products of small integers have no rounding, so any wrong tile shows."""
    if not has_kernel("merge_gram", "cpu"):
        pytest.skip("the torch-only route takes torch's product")
    rows = torch.randint(-100, 101, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = rows.to(torch.int64)
    found = torch.ops.immunize_ext.merge_gram(rows)
    assert torch.equal(found, (exact.mT @ exact).to(torch.float64))


def test_gram_matrix_does_not_depend_on_threads():
    if not has_kernel("merge_gram", "cpu"):
        pytest.skip("the torch-only route takes torch's product")
    rows = gaussian(500, 200, seed=7)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(torch.ops.immunize_ext.merge_gram(rows))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[0].mT)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_metadata_is_readable(tmp_path):
    from safetensors import safe_open

    path = tmp_path / "factor.safetensors"
    from_embeddings(gaussian(20, 5), ridge=1e-3).save(path)
    with safe_open(str(path), framework="pt") as file:
        assert json.loads(file.metadata()["samples"]) == 20


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("streamed", [False, True])
def test_non_finite_captions_are_named(bad, streamed):
    c_reg = gaussian(9, 3)
    c_reg[4, 1] = bad
    with pytest.raises(ValueError, match="c_reg must be finite") as caught:
        from_embeddings([c_reg[:3], c_reg[3:]] if streamed else c_reg)
    assert not isinstance(caught.value, torch.linalg.LinAlgError), "not 'ill-conditioned'"


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (torch.zeros(3), {}, "shape"),
        (torch.zeros(2, 3, 4), {}, r"reshape\(-1, d\)"),
        (torch.zeros(3, 2, dtype=torch.int64), {}, "floating-point dtype"),
        ([gaussian(3, 2), gaussian(3, 4)], {}, "width 2, got 4"),
        ([], {}, "at least one block"),
        (torch.zeros(0, 4), {}, "at least one row"),
        (torch.zeros(0, 4), {"ridge": 1.0}, "at least one row"),
        (gaussian(9, 3), {"ridge": -1.0}, "ridge must be finite and not negative"),
        (gaussian(9, 3), {"ridge": float("nan")}, "ridge must be finite and not negative"),
        (gaussian(9, 3), {"ridge": float("inf")}, "ridge must be finite and not negative"),
        (gaussian(9, 3), {"chunk": 0}, "chunk must be positive"),
    ],
)
def test_bad_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=f"from_embeddings: .*{message}"):
        from_embeddings(arguments, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_too_few_captions_without_a_ridge(dtype):
    """The error tells the rank and the smallest ridge, and that ridge works."""
    c_reg = gaussian(5, 16, dtype=dtype)
    with pytest.raises(NotPositiveDefiniteError, match="5 rows for 16 columns") as caught:
        from_embeddings(c_reg)
    error = caught.value
    assert isinstance(error, torch.linalg.LinAlgError)
    assert error.rank == 5
    assert error.needed_ridge > 0
    from_embeddings(c_reg, ridge=error.needed_ridge, relative=False)


@pytest.mark.parametrize("column", [0, 2])
def test_dead_column_is_named(column):
    c_reg = gaussian(20, 4)
    c_reg[:, column] = 0
    with pytest.raises(NotPositiveDefiniteError, match=rf"columns \[{column}\] of c_reg are zero"):
        from_embeddings(c_reg)
    from_embeddings(c_reg, ridge=1e-6)


def test_equal_rows_are_rank_one():
    with pytest.raises(NotPositiveDefiniteError) as caught:
        from_embeddings(torch.ones(2, 2))
    assert caught.value.rank == 1


@pytest.mark.parametrize("shape", [(0, 4), (7, 4)])
def test_nothing_to_regularise_with(shape):
    zero = torch.zeros(shape)
    with pytest.raises(NotPositiveDefiniteError, match="got zero"):
        from_embeddings(zero, relative=False)
    factor = from_embeddings(zero, ridge=2.0, relative=False)
    torch.testing.assert_close(gram_of(factor), 2 * torch.eye(4).double())


def test_relative_ridge_of_zero_captions_is_refused():
    """A share of nothing is nothing: no division by zero, no silent identity."""
    with pytest.raises(NotPositiveDefiniteError):
        from_embeddings(torch.zeros(7, 4), ridge=0.5)


def test_nearly_singular_is_not_let_through():
    """Cholesky may get past a pivot that is nothing but rounding."""
    c_reg = gaussian(40, 5)
    c_reg[:, 4] = c_reg[:, 3] * (1 + 1e-15)
    with pytest.raises(NotPositiveDefiniteError) as caught:
        from_embeddings(c_reg)
    assert caught.value.rank == 4


def test_ridge_below_resolution_warns():
    with pytest.warns(NumericalWarning, match="below the resolution of float64"):
        from_embeddings(1e3 * gaussian(20, 4), ridge=1e-12, relative=False)


def test_captions_stay_as_they_are():
    c_reg = gaussian(9, 3)
    copy = c_reg.clone()
    factor = from_embeddings(c_reg, ridge=0.5)
    assert torch.equal(c_reg, copy)
    c_reg.zero_()
    assert torch.equal(factor.chol, from_embeddings(copy, ridge=0.5).chol)


def test_outlier_dimension_of_a_real_size():
    """200 captions of 96 columns with one at -28, as a text encoder gives them."""
    rows = text_embeddings(np.random.default_rng(0), 200, 96, gram_condition=1e7).rows
    factor = from_embeddings(rows)
    assert factor.condition == pytest.approx(1e7, rel=1e-2)
    with pytest.raises(NotPositiveDefiniteError) as caught:
        from_embeddings(rows[:60])
    assert caught.value.rank <= 60


def test_factor_that_is_not_finite_gives_no_numbers():
    """Wrapped by hand, past every check of from_embeddings and load: refused, not computed with."""
    chol = torch.eye(3).double()
    chol[2, 0] = float("nan")
    factor = RegularizationFactor(chol, ridge=0.0, samples=3)
    with pytest.raises(ValueError, match="merge_kv"):
        merge_kv([gaussian(2, 3)], [[gaussian(2, 3, seed=1)]], [gaussian(1, 3, seed=2)], factor)


# --- rows that lack a direction but for their rounding --------------------------------------------


def normalised(count: int, width: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows of a layer norm without weights: orthogonal to (1, ..., 1) but for their rounding."""
    x = gaussian(count, width, dtype=torch.float64, seed=seed)
    return torch.nn.functional.layer_norm(x, (width,)).to(dtype)


def test_rows_that_lie_in_a_plane_but_for_their_rounding_are_named():
    """With no ridge to speak of the merge follows rounding, 1e3 times further than it has to."""
    c_reg, tokens = normalised(300, 24, torch.float32), normalised(2, 24, torch.float32, seed=1)
    w0 = gaussian(5, 24, dtype=torch.float32, seed=2)
    adapted = [[w0 + 0.01 * gaussian(5, 24, dtype=torch.float32, seed=3)]]

    def change(factor: RegularizationFactor) -> float:
        return float((merge_kv([w0], adapted, [tokens], factor)[0] - w0).norm())

    with pytest.warns(NumericalWarning, match="by more than its rounding.*1.2e-07 relative"):
        unheld = from_embeddings(c_reg, ridge=1e-12)
    with pytest.warns(NumericalWarning, match="by more than its rounding.*in units of Q"):
        from_embeddings(c_reg, ridge=1e-9, relative=False)
    held = from_embeddings(c_reg, ridge=torch.finfo(torch.float32).eps)  # no warning: what it says
    assert change(held) < 1.0
    assert change(unheld) > 100 * change(held)


def test_small_directions_that_are_no_rounding_are_taken_as_they_are():
    """A warning here is an error."""
    c_reg = gaussian(300, 24, dtype=torch.float32)
    c_reg[:, 0] *= 1e-5
    from_embeddings(c_reg)
    from_embeddings(normalised(20, 24, torch.float32), ridge=1e-12)  # fewer rows than columns
    with pytest.raises(NotPositiveDefiniteError):
        from_embeddings(normalised(300, 24, torch.float64))
