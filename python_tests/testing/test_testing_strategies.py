"""Strategies and samples deliver the truth that they promise, judged by numpy and scipy."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from immunize_ext import reference, testing
from immunize_ext.testing import samples, strategies

testing.register_profiles()

KINDS = st.one_of(
    strategies.matrices(),
    strategies.matrices(dtype=torch.float32),
    strategies.ill_conditioned(layouts=testing.LAYOUTS, batch=(2,)),
    strategies.mixed_batches(layouts=testing.LAYOUTS),
    strategies.well_conditioned(batch=None, layouts=testing.LAYOUTS),
)


@given(KINDS)
def test_singular_values_are_the_promised_ones(sample):
    n, p = sample.matrix.shape[-2:]
    flat = sample.matrix.double().numpy().reshape(sample.value_bound.numel(), n, p)
    truth = sample.singular_values.numpy().reshape(len(flat), min(n, p))
    bounds = sample.value_bound.numpy().reshape(-1)
    for matrix, sigma, bound in zip(flat, truth, bounds, strict=True):
        # Divided by the largest entry: scipy's svdvals of 1e-150 is as good as of 1.
        scale = np.abs(matrix).max() or 1.0
        found = scipy.linalg.svdvals(matrix / scale) * scale
        rounding = 10 * max(n, p) * np.finfo(np.float64).eps * found[0]
        assert np.abs(found - sigma).max() <= bound + rounding


@given(KINDS)
def test_vectors_are_orthonormal_and_rebuild_the_matrix(sample):
    u, s, v = sample.u, sample.singular_values, sample.v
    eye = torch.eye(s.shape[-1], dtype=torch.float64)
    assert ((u.mT @ u - eye).abs() <= 1e-13).all()
    assert ((v.mT @ v - eye).abs() <= 1e-13).all()
    error = torch.linalg.matrix_norm((u * s.unsqueeze(-2)) @ v.mT - sample.matrix.double())
    size = np.sqrt(min(sample.matrix.shape[-2:]))
    assert (error <= size * sample.value_bound + 1e-13 * sample.sigma_max).all()


@given(KINDS)
def test_derived_quantities(sample):
    assert (sample.sigma_max >= sample.sigma_min).all()
    assert (sample.kappa >= 1).all()
    assert (sample.rank <= min(sample.matrix.shape[-2:])).all()
    assert ((sample.gap >= 0) & (sample.gap <= 1)).all()
    assert (sample.multiplicity_max >= 1).all()
    for which, value in (("max", sample.sigma_max), ("min", sample.sigma_min)):
        gradient = sample.gradient_of(which)
        built = (sample.u * sample.singular_values.unsqueeze(-2)) @ sample.v.mT
        # Divided first, so that 1e150 does not overflow in the comparison.
        scale = torch.where(sample.sigma_max > 0, sample.sigma_max, 1.0)[..., None, None]
        inner = (gradient * built / scale).sum((-1, -2))
        assert torch.allclose(inner, value / scale[..., 0, 0], rtol=1e-12, atol=1e-14)


@given(strategies.near_multiple(exact=True))
def test_exact_multiples(sample):
    assert sample.multiplicity_max > 1
    assert sample.multiplicity_min > 1
    expected = reference.extremal_singular_values_gradient(
        sample.matrix.numpy(), cluster_rtol=1e-12
    )
    assert np.allclose(expected.sigma_max, sample.gradient_of("max").numpy(), atol=1e-12)
    assert np.allclose(expected.sigma_min, sample.gradient_of("min").numpy(), atol=1e-12)


@given(strategies.near_multiple(exact=False, which="max", multiplicities=(2,)))
def test_gaps_are_within_the_promised_range(sample):
    s = sample.singular_values
    relative = float((s[0] - s[1]) / s[0])
    assert 0.5e-14 <= relative <= 1.1e-2
    assert float(sample.gap) <= relative


@given(strategies.rank_deficient())
def test_rank_deficient(sample):
    scale = float(sample.sigma_max) or 1.0
    found = np.linalg.matrix_rank(sample.matrix.numpy() / scale, tol=1e-8)
    assert found == int(sample.rank) < min(sample.matrix.shape)


@given(strategies.badly_scaled(batch=(3,)), strategies.badly_scaled(dtype=torch.float32))
def test_badly_scaled_stays_in_range(double, single):
    for sample in (double, single):
        assert torch.isfinite(sample.matrix).all()
        assert (sample.matrix.abs().amax((-1, -2)) > 0).all()


@pytest.mark.parametrize("aspect", ["wide", "tall", "square"])
def test_aspects(aspect):
    @given(strategies.well_conditioned(aspect=aspect))
    def check(sample):
        n, p = sample.matrix.shape
        assert {"wide": n < p, "tall": n > p, "square": n == p}[aspect]

    check()


@given(strategies.one_by_one(batch=(2,)))
def test_one_by_one(sample):
    assert torch.equal(sample.matrix.abs()[..., 0, 0], sample.sigma_max)
    assert torch.equal(sample.gradient_of("max"), sample.matrix.sign())


@given(st.data(), st.sampled_from(testing.LAYOUTS))
def test_layouts_hold_the_same_numbers(data, layout):
    sample = data.draw(strategies.well_conditioned(batch=(2,), min_side=2, max_side=4))
    moved = sample.in_layout(layout)
    expected = sample.matrix[:1].expand_as(sample.matrix) if layout == "expanded" else sample.matrix
    assert torch.equal(moved.matrix, expected)
    assert moved.guard.changed_entries() == 0
    if layout == "expanded":
        assert moved.matrix.stride(0) == 0
        assert torch.equal(moved.singular_values[1], sample.singular_values[0])


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_guarded_buffers(layout, dtype):
    values = torch.arange(24).reshape(2, 3, 4).to(dtype)
    held = testing.guarded(values, layout)
    contiguous = held.tensor.is_contiguous()
    assert contiguous == (layout == "contiguous")
    assert held.tensor.storage_offset() == 3
    outside = held.buffer.numel() - (12 if layout == "expanded" else 24)
    assert outside >= 6
    held.buffer[0] = 0  # a write in front of the tensor
    assert held.changed_entries() == 1
    held.tensor.zero_()
    assert held.changed_entries() > 2


def test_guarded_edge_cases():
    assert testing.guarded(torch.zeros(0, 3), "sliced").tensor.shape == (0, 3)
    assert testing.guarded(torch.zeros(0, 3, 2), "expanded").tensor.shape == (0, 3, 2)
    assert testing.guarded(torch.tensor(5.0), "offset").tensor == 5.0
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        testing.guarded(torch.zeros(3), "transposed")
    with pytest.raises(ValueError, match="layout must be one of"):
        testing.guarded(torch.zeros(3), "diagonal")


@given(strategies.embeddings(dtype=torch.float64))
def test_text_embeddings(text):
    rows = text.rows.numpy()
    assert np.abs(scipy.linalg.svdvals(rows) - text.singular_values.numpy()).max() <= (
        text.value_bound + 1e-13 * float(text.singular_values[0])
    )
    assert float(text.mean.min()) == -28.0 == float(text.mean[text.mean.abs().argmax()])
    for group in text.repeats:
        assert (rows[list(group)] == rows[group[0]]).all()
    if not text.repeats:
        assert np.allclose(rows.mean(axis=0), text.mean.numpy(), atol=1e-9)
    # The Gram matrix has the promised eigenvectors.
    v, s = text.v.numpy(), text.singular_values.numpy()
    assert np.allclose(rows.T @ rows @ v, v * s**2, atol=1e-10 * s[0] ** 2)


@given(strategies.embeddings(full_rank=True, dtype=torch.float64, min_exponent=9.0))
def test_text_embeddings_reach_the_promised_condition(text):
    assert 0.9e9 <= text.gram_condition <= 1.1e10
    s = scipy.linalg.svdvals(text.rows.numpy())
    assert np.isclose((s[0] / s[-1]) ** 2, text.gram_condition, rtol=1e-6)


def test_text_embeddings_overflow_half_precision_grams():
    text = testing.text_embeddings(np.random.default_rng(0), 2000, 16)
    assert float((text.rows.T @ text.rows).max()) > torch.finfo(torch.float16).max


@given(strategies.merge_problems_with_answer())
def test_answer_of_a_merge_is_optimal(problem):
    c = np.concatenate([part.numpy() for part in problem.embeddings])
    for base, values, answer in zip(problem.base, problem.values, problem.answer, strict=True):
        options = {
            "ridge": problem.ridge,
            "inverse_hardness": problem.inverse_hardness.numpy(),
        }
        arguments = (base.numpy(), values.numpy(), c, problem.c_reg.numpy())
        found = reference.merge_residuals(answer.numpy(), *arguments, **options)
        assert found.feasibility <= 1e-11
        assert found.stationarity <= 1e-11
        solved = reference.merge_null_space(*arguments, **options)
        assert np.linalg.norm(solved - answer.numpy()) <= 1e-8 * (1 + np.linalg.norm(solved))


@given(
    strategies.merge_problems(
        repeats=("none", "consistent", "contradictory"), weight_dtype=torch.float32
    )
)
def test_merge_problems_are_solvable_or_say_why_not(problem):
    arguments = (
        [w.numpy() for w in problem.base],
        [[w.numpy() for w in layers] for layers in problem.concepts],
        [part.numpy() for part in problem.embeddings],
        problem.c_reg.numpy(),
    )
    options = {"ridge": problem.ridge, "inverse_hardness": problem.inverse_hardness.numpy()}
    assert all(w.dtype == torch.float32 for w in problem.base)
    assert bool((problem.hardness == torch.inf).any())
    rows = torch.cat(problem.embeddings)
    for group in problem.repeats:
        assert (rows[list(group)] == rows[group[0]]).all()
    if problem.contradictory:
        with pytest.raises(ValueError, match="must agree"):
            reference.merge_layers(*arguments, **options)
        reference.merge_layers(*arguments, **options, contradictions="average")
    else:
        merged = reference.merge_layers(*arguments, **options)
        assert all(np.isfinite(w).all() for w in merged)


def test_samples_do_not_need_hypothesis():
    first = samples.matrix_from_spectrum(np.random.default_rng(3), 4, 5, np.ones((2, 4)))
    again = samples.matrix_from_spectrum(np.random.default_rng(3), 4, 5, np.ones((2, 4)))
    assert torch.equal(first.matrix, again.matrix)
    assert first.matrix.shape == (2, 4, 5)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda rng: samples.matrix_from_spectrum(rng, 2, 3, [1.0]), "must end in min"),
        (lambda rng: samples.matrix_from_spectrum(rng, 1, 1, [-1.0]), "not negative"),
        (lambda rng: samples.text_embeddings(rng, 3, 3, gram_condition=2.0), "at least 100"),
        (lambda rng: samples.text_embeddings(rng, 3, 3, repeat=4), "repeat between 1 and m"),
        (lambda rng: samples.merge_problem(rng, repeats="some"), "repeats must be"),
        (
            lambda rng: samples.merge_problem(rng, rows_per_concept=(1,), repeats="consistent"),
            "two",
        ),
    ],
)
def test_refusals_name_the_argument(call, match):
    with pytest.raises(ValueError, match=match):
        call(np.random.default_rng(0))


@pytest.mark.parametrize(
    ("strategy", "match"),
    [
        (strategies.near_multiple(which="middle"), "which must be"),
        (strategies.shapes(aspect="round"), "aspect must be"),
        (strategies.shapes(aspect="wide", min_side=3, max_side=3), "sides must allow"),
    ],
)
def test_wrong_options_of_a_strategy_are_named(strategy, match):
    @given(strategy)
    def use(sample):
        raise AssertionError("must not be reached")

    with pytest.raises(ValueError, match=match):
        use()
