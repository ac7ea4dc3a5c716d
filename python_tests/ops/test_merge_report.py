"""merge_report: which concept was lost, how far each layer moved, and what to do about it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from immunize_ext.ops import (
    LowRank,
    MergeReport,
    MomentFactor,
    RegularizationFactor,
    gate_layers,
    merge_adapters,
    merge_adapters_kv,
    merge_kv,
    merge_moments,
    merge_report,
)

D = 8


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem(
    embeddings: list[Tensor], ridge: float = 0.1, samples: int = 40
) -> tuple[list[Tensor], list[list[Tensor]], list[Tensor], RegularizationFactor]:
    base = [random(5, D, seed=1), random(3, D, seed=2)]
    concepts = [
        [w + 0.1 * random(*w.shape, seed=10 * n + layer) for layer, w in enumerate(base)]
        for n in range(len(embeddings))
    ]
    factor = RegularizationFactor.from_embeddings(random(samples, D, seed=3), ridge=ridge)
    return base, concepts, embeddings, factor


def report_of(embeddings: list[Tensor], **options: object) -> MergeReport:
    args = problem(embeddings)
    merged = merge_kv(*args, **options)  # type: ignore[arg-type]
    options.pop("contradictions", None)
    return merge_report(merged, *args, **options, names=["cat", "dog"])  # type: ignore[arg-type]


def test_hard_constraints_are_met_for_every_concept() -> None:
    report = report_of([random(2, D, seed=4), random(1, D, seed=5)])
    # Rounding of an s x s solve: eps times kappa(T), and some room for norms.
    bound = 100 * torch.finfo(torch.float64).eps * report.condition_t
    assert set(report.residual) == {"cat", "dog"}
    assert max(report.residual.values()) < bound
    assert report.rank == report.tokens == 3
    assert report.warnings == ()


def test_residual_names_the_concept_that_was_overwritten() -> None:
    args = problem([random(1, D, seed=4), random(1, D, seed=5)])
    merged = merge_kv(*args)
    forgotten = [w.clone() for w in merged]
    # Move the weights along the second token, orthogonally to the first: only "dog" is lost.
    first, second = args[2][0][0], args[2][1][0]
    direction = second - first * (first @ second) / (first @ first)
    forgotten[0] += 0.5 * torch.outer(torch.ones(5, dtype=torch.float64), direction)
    report = merge_report(forgotten, *args, names=["cat", "dog"])
    assert report.residual["cat"] < 1e-12
    assert report.residual["dog"] > 0.1


def test_soft_constraints_show_what_was_given_up() -> None:
    embeddings = [random(1, D, seed=4), random(1, D, seed=5)]
    soft = report_of(embeddings, hardness=0.1)
    softer = report_of(embeddings, hardness=0.01)
    assert 1e-3 < max(soft.residual.values()) < max(softer.residual.values())


def test_condition_numbers_are_those_of_the_matrices() -> None:
    args = problem([random(2, D, seed=4)])
    base, _, embeddings, factor = args
    report = merge_report(merge_kv(*args), *args)
    q = factor.chol @ factor.chol.mT
    t = embeddings[0] @ torch.linalg.solve(q, embeddings[0].mT)
    assert report.condition_q == pytest.approx(float(torch.linalg.cond(q)), rel=1e-9)
    assert report.condition_t == pytest.approx(float(torch.linalg.cond(t)), rel=1e-9)
    assert report.ridge == factor.ridge
    assert len(report.relative_change) == len(base)


def test_relative_change_of_an_identity_edit_is_zero() -> None:
    base, _, embeddings, factor = problem([random(2, D, seed=4)])
    args = (base, [base], embeddings, factor)
    report = merge_report(merge_kv(*args), *args)
    assert report.relative_change == [0.0, 0.0]
    assert report.residual == {"concept 0": 0.0}


def test_repeated_tokens_are_reported() -> None:
    token = random(1, D, seed=4)
    report = report_of([token, torch.cat([token, random(1, D, seed=5)])], contradictions="average")
    assert (report.rank, report.tokens) == (2, 3)
    assert any("repeat" in warning for warning in report.warnings)


def test_nearly_repeated_tokens_are_reported() -> None:
    token = random(1, D, seed=4)
    report = report_of([token, token + 1e-5 * random(1, D, seed=6)])
    assert report.condition_t > 1e8
    assert any("nearly coincide" in warning for warning in report.warnings)
    assert "nearly coincide" in str(report)


def test_too_few_captions_are_reported() -> None:
    base, concepts, embeddings, _ = problem([random(1, D, seed=4)])
    factor = RegularizationFactor.from_embeddings(random(3, D, seed=3), ridge=1e-3)
    args = (base, concepts, embeddings, factor)
    report = merge_report(merge_kv(*args), *args)
    assert any("3 rows for 8 columns" in warning for warning in report.warnings)


def test_a_change_larger_than_the_layer_is_reported() -> None:
    base, _, embeddings, factor = problem([random(1, D, seed=4)])
    args = (base, [[100.0 * w for w in base]], embeddings, factor)
    report = merge_report(merge_kv(*args), *args)
    assert max(report.relative_change) > 1
    assert any("times its own norm" in warning for warning in report.warnings)


def test_values_and_weights_give_the_same_report() -> None:
    base, concepts, embeddings, factor = problem([random(2, D, seed=4)])
    values = [w @ embeddings[0].mT for w in concepts[0]]
    by_weights = (base, concepts, embeddings, factor)
    one = merge_report(merge_kv(*by_weights), *by_weights)
    merged = merge_kv(base, None, embeddings, factor, values=values)
    other = merge_report(merged, base, None, embeddings, factor, values=values)
    assert one.relative_change == pytest.approx(other.relative_change, rel=1e-12)
    assert one.condition_t == other.condition_t


def test_wrong_number_of_layers_is_refused() -> None:
    args = problem([random(1, D, seed=4)])
    with pytest.raises(ValueError, match="merged must hold one weight a layer, 2, got 1"):
        merge_report(merge_kv(*args)[:1], *args)


def moments() -> tuple[list[Tensor], list[list[Tensor]], MomentFactor]:
    base, copies, *_ = problem([random(1, D, seed=4)] * 2)
    grams = [(h := random(rows, D, seed=rows)).mT @ h for rows in (12, 20)]
    hardness = torch.tensor([0.5, 2.0])
    return base, copies, MomentFactor.from_moments(grams, ridge=1e-3, hardness=hardness)


def objective(
    weights: list[Tensor], base: list[Tensor], copies: list[list[Tensor]], factor: MomentFactor
) -> float:
    total = 0.0
    for layer, w in enumerate(weights):
        total += factor.ridge * float((w - base[layer]).square().sum())
        for n, gram in enumerate(factor.moments):
            away = w - copies[n][layer]
            total += float(factor.hardness[n] * ((away @ gram) * away).sum())
    return total


def test_by_moments_the_share_of_the_objective_that_is_left() -> None:
    base, copies, factor = moments()
    best = merge_moments(base, copies, factor)
    mean = [(one + two) / 2 for one, two in zip(*copies, strict=True)]
    at_base = objective(base, base, copies, factor)
    for weights in (best, mean, base):
        report = merge_report(weights, base, copies, None, factor, names=["cat", "dog"])
        assert report.left == pytest.approx(objective(weights, base, copies, factor) / at_base)
        assert report.least == pytest.approx(objective(best, base, copies, factor) / at_base)
    assert report.residual == {"cat": pytest.approx(1.0), "dog": pytest.approx(1.0)}
    assert any("cat keeps little of its copy" in warning for warning in report.warnings)
    assert report.condition_t is report.tokens is None
    assert "of the objective left" in str(report)
    exact = merge_report(copies[0], base, copies, None, factor)
    assert exact.residual["concept 0"] == 0.0
    assert exact.residual["concept 1"] > 0.1


def test_what_an_exact_merge_leaves_keeps_its_digits() -> None:
    """One copy and a small ridge: the objective is the ridge's alone, far below eps of the base's.

    W = W0 + D mu (mu + r)^-1 leaves D^2 mu r / (mu + r), a share of r / (mu + r).
    """
    base, copies = [random(5, D, seed=1)], [[random(5, D, seed=2)]]
    moment = torch.eye(D, dtype=torch.float64)
    for ridge in (0.0, 1e-20):
        factor = MomentFactor.from_moments([moment], ridge=ridge)
        report = merge_report(copies[0], base, copies, None, factor)
        assert report.left == pytest.approx(ridge, rel=1e-6, abs=0.0)
        # Solving rounds the best weights themselves, to squares of eps.
        assert 0.0 <= report.least < 2 * ridge + 1e-30


def test_regularization_counts_in_what_is_left() -> None:
    base, copies, factor = moments()
    held = 0.5 * torch.eye(D, dtype=torch.float64)
    with_it = MomentFactor.from_moments(
        factor.moments,
        regularization=held,
        ridge=1e-3,
        hardness=factor.hardness,
        relative=False,
    )
    as_ridge = MomentFactor.from_moments(
        factor.moments, ridge=0.501, hardness=factor.hardness, relative=False
    )
    one, other = (merge_report(copies[0], base, copies, None, f) for f in (with_it, as_ridge))
    assert one.left == pytest.approx(other.left, rel=1e-12)
    assert one.least == pytest.approx(other.least, rel=1e-12)


def test_factors_of_layers_and_gated_weights_are_measured_too() -> None:
    base, copies, factor = moments()
    other = MomentFactor.from_moments([2.0 * g for g in factor.moments], ridge=0.5)
    factors = [factor, other]
    merged = merge_moments(base, copies, factors)
    half = gate_layers(base, [merged], [torch.tensor([0.5])] * 2)
    whole, gated = (merge_report(w, base, copies, None, factors) for w in (merged, half))
    assert whole.left == pytest.approx(whole.least)
    assert gated.left == pytest.approx(0.75 * whole.left + 0.25)  # a parabola, 1 at the base
    assert gated.relative_change == pytest.approx([0.5 * c for c in whole.relative_change])
    assert gated.ridge == other.ridge
    assert gated.condition_q == pytest.approx(max(float(torch.linalg.cond(f.s)) for f in factors))


def test_adapters_are_reported_as_the_weights_they_make() -> None:
    base, _, factor = moments()
    adapters = [
        [LowRank(random(w.shape[0], 2, seed=n), random(2, D, seed=n + 5)) for w in base]
        for n in (30, 40)
    ]
    dense = [[w + a.delta for w, a in zip(base, one, strict=True)] for one in adapters]
    merged = merge_adapters(adapters, factor)
    with_base = merge_report(merged, base, adapters, None, factor)
    truth = merge_report(merge_moments(base, dense, factor), base, dense, None, factor)
    alone = merge_report(merged, None, adapters, None, factor)
    for one in (with_base, alone):
        assert one.residual == pytest.approx(truth.residual, rel=1e-9)
        assert one.left == pytest.approx(truth.left, rel=1e-9)
    assert with_base.relative_change == pytest.approx(truth.relative_change, rel=1e-9)
    largest = max(float(one[0].delta.norm()) for one in adapters)
    assert alone.relative_change[0] == pytest.approx(float(merged[0].delta.norm()) / largest)

    tokens = [random(2, D, seed=7), random(1, D, seed=8)]
    captions = RegularizationFactor.from_embeddings(random(40, D, seed=3), ridge=0.1)
    by_tokens = merge_adapters_kv(adapters, tokens, captions)
    for start in (base, None):
        report = merge_report(by_tokens, start, adapters, tokens, captions)
        assert max(report.residual.values()) < 1e-12
        assert report.rank == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"embeddings": [random(1, D, seed=1)] * 2}, "concepts alone must be given with a Moment"),
        ({"concepts": None}, "concepts alone must be given with a MomentFactor"),
        ({"base": None, "concepts": None}, "base must be given where values are"),
        ({"factor": RegularizationFactor.identity(D)}, "embeddings must be given with a Regular"),
        ({"concepts": []}, "merge_report: concepts must hold at least one"),
        ({"base": None, "concepts": []}, "merge_report: concepts must hold at least one"),
        (
            {"base": None, "concepts": [[random(5, D, seed=1)]] * 2},
            r"concepts\[0\] must hold one weight a layer, 2, got 1",
        ),
        (
            {"merged": [LowRank(random(4, 1, seed=1), random(1, D, seed=2))] * 2},
            r"merge_report: merged\[0\] must be an adapter of base\[0\]",
        ),
        (
            {
                "merged": [random(4, D, seed=1)] * 2,
                "embeddings": [random(1, D, seed=1)] * 2,
                "factor": RegularizationFactor.identity(D),
            },
            r"merge_report: merged\[0\] must have the shape of base\[0\]",
        ),
        ({"factor": []}, "factors must be one, or one a layer, 2, got 0"),
    ],
)
def test_what_does_not_fit_the_factor_is_refused(changes: dict[str, object], words: str) -> None:
    base, copies, factor = moments()
    given = {"merged": base, "base": base, "concepts": copies, "embeddings": None, "factor": factor}
    with pytest.raises(ValueError, match=words):
        merge_report(**given | changes)  # type: ignore[arg-type]
