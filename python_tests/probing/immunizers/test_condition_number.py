"""Algorithm 1: the two ways to precondition agree, steps are bounded, runs repeat."""

import math
import re
import warnings

import pytest
import torch

from immunize_ext.errors import NumericalWarning
from immunize_ext.probing.data import Problem, Task
from immunize_ext.probing.immunizers import (
    ConditionNumberImmunizer,
    ill_step_bound,
    well_step_bound,
)
from immunize_ext.probing.metrics import relative_immunization_ratio, with_ridge


def task(seed: int, p: int = 5, n: int = 30) -> Task:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(p, dtype=torch.float64, generator=generator) * 3 + 0.3
    x = torch.randn(n, p, dtype=torch.float64, generator=generator) * scales
    y = x.sum(-1).sign()
    return Task(f"task {seed}", x[:20], y[:20], x[20:], y[20:])


PRIMARY, HARMFUL = task(0), task(1)


def test_it_raises_rir() -> None:
    immunized = ConditionNumberImmunizer(steps=60, ridge=1e-3).fit(
        None, Problem.of(PRIMARY, HARMFUL)
    )
    ratio = relative_immunization_ratio(
        PRIMARY.x_train, HARMFUL.x_train, immunized.theta, ridge=1e-3
    )
    assert ratio.i > 1.0
    assert ratio.ii <= 1.0 + 1e-9
    assert ratio.rir > 2.0


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_implicit_and_explicit_preconditioner_agree(ridge: float) -> None:
    thetas = [
        ConditionNumberImmunizer(steps=10, ridge=ridge, keep="last", preconditioner=kind)  # type: ignore[arg-type]
        .fit(None, Problem.of(PRIMARY, HARMFUL))
        .theta
        for kind in ("implicit", "explicit")
    ]
    torch.testing.assert_close(*thetas, rtol=1e-7, atol=1e-8)


def test_plain_gradients_are_another_method() -> None:
    thetas = [
        ConditionNumberImmunizer(steps=3, keep="last", preconditioner=kind)  # type: ignore[arg-type]
        .fit(None, Problem.of(PRIMARY, HARMFUL))
        .theta
        for kind in ("implicit", "none")
    ]
    assert float((thetas[0] - thetas[1]).norm()) > 1e-3


def test_first_step_is_the_update_of_algorithm_1() -> None:
    settings = {"learning_rate": 1e-2, "lambda_well": 1e-3, "lambda_ill": 50.0, "ridge": 1e-2}
    settings |= {"unsafe_step": "warn", "rotate": False}
    immunizer = ConditionNumberImmunizer(steps=1, keep="last", **settings)  # type: ignore[arg-type]
    immunized = immunizer.fit(None, Problem.of(PRIMARY, HARMFUL))
    p = PRIMARY.num_features
    omega = torch.randn(p, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    omega = omega / math.sqrt(p)
    residual = PRIMARY.x_train @ omega - PRIMARY.y_train
    task_gradient = 2.0 / 20 * torch.outer(PRIMARY.x_train.mT @ residual, omega)

    def outer(x: torch.Tensor, kind: str) -> torch.Tensor:
        rows = with_ridge(x, 1e-2)
        hessian = rows.mT @ rows
        eigenvalues, vectors = torch.linalg.eigh(hessian)
        if kind == "well":
            top = vectors[:, -1]
            return eigenvalues[-1] * torch.outer(top, top) - hessian / p
        low = vectors[:, 0]
        denominator = hessian.square().sum() / (2 * p) - eigenvalues[0] ** 2 / 2
        return (eigenvalues[0] * torch.outer(low, low) - hessian / p) / denominator**2

    # K^-1 grad R = 2 theta G at theta = I.
    expected = (
        torch.eye(p, dtype=torch.float64)
        - 1e-2 * task_gradient
        - 1e-2 * 1e-3 * 2 * outer(PRIMARY.x_train, "well")
        - 1e-2 * 50.0 * 2 * outer(HARMFUL.x_train, "ill")
    )
    torch.testing.assert_close(immunized.theta, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("keep", ["last", "best"])
def test_coordinates_of_the_harm_end_with_equal_curvature(keep: str) -> None:
    """No coordinate scaling gets below kappa / p; nothing that is no coordinate changes."""
    problem = Problem.of(PRIMARY, HARMFUL)
    turned, plain = (
        ConditionNumberImmunizer(steps=20, keep=keep, rotate=rotate).fit(None, problem)  # type: ignore[arg-type]
        for rotate in (True, False)
    )
    h = with_ridge(HARMFUL.x_train, 1e-2) @ turned.theta
    diagonal = h.square().sum(0)
    torch.testing.assert_close(diagonal, diagonal.mean().expand_as(diagonal), rtol=1e-9, atol=0)
    metrics = [one.theta @ one.theta.mT for one in (turned, plain)]
    torch.testing.assert_close(*metrics, rtol=1e-9, atol=1e-12)
    assert turned.history == plain.history
    assert float((turned.theta - plain.theta).norm()) > 1e-3


def test_balance_of_the_first_update() -> None:
    immunizer = ConditionNumberImmunizer(
        steps=1, first_change=0.01, ill_share=0.5, keep="last", unsafe_step="warn"
    )
    config = immunizer.fit(None, Problem.of(PRIMARY, HARMFUL)).config
    for name, share in (("lambda_well", 1.0), ("lambda_ill", 0.5)):
        other = {"lambda_well": 0.0, "lambda_ill": 0.0, name: config[name]}
        # A head without gradient on theta: one regularizer is all that moves it.
        silent = Task("silent", PRIMARY.x_train, torch.zeros(20).double(), *_test_part())
        alone = ConditionNumberImmunizer(
            steps=1, keep="last", unsafe_step="warn", rotate=False, **other
        )
        moved = alone.fit(None, Problem.of(silent, HARMFUL))
        start = torch.eye(5, dtype=torch.float64)
        task_only = ConditionNumberImmunizer(
            steps=1, keep="last", lambda_well=0.0, lambda_ill=0.0, rotate=False
        ).fit(None, Problem.of(silent, HARMFUL))
        change = (moved.theta - task_only.theta).norm() / start.norm()
        assert float(change) == pytest.approx(0.01 * share, rel=1e-6)


def _test_part() -> tuple[torch.Tensor, torch.Tensor]:
    return PRIMARY.x_test, torch.zeros(10, dtype=torch.float64)


def test_history_and_progress() -> None:
    seen: list[float] = []
    immunized = ConditionNumberImmunizer(steps=7).fit(
        None, Problem.of(PRIMARY, HARMFUL), progress=lambda text, share: seen.append(share)
    )
    assert seen == [step / 7 for step in range(8)]
    assert [record["step"] for record in immunized.history] == list(range(8))
    first = immunized.history[0]
    assert first["log_rir"] == 0.0
    assert set(first) == {
        "step",
        "log_kappa_primary",
        "log_kappa_harmful",
        "log_rir",
        "r_well",
        "r_ill",
        "loss",
        "well_step_over_bound",
        "ill_step_over_bound",
    }
    last = immunized.history[-1]
    assert last["loss"] < first["loss"]
    assert last["log_rir"] == pytest.approx(
        (last["log_kappa_harmful"] - first["log_kappa_harmful"])
        - (last["log_kappa_primary"] - first["log_kappa_primary"])
    )


def test_runs_repeat_bitwise_and_leave_the_random_state() -> None:
    state = torch.get_rng_state()
    first, again = (
        ConditionNumberImmunizer(steps=5).fit(None, Problem.of(PRIMARY, HARMFUL)) for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.theta, again.theta)
    assert first.history == again.history
    other = ConditionNumberImmunizer(steps=5, keep="last", seed=1).fit(
        None, Problem.of(PRIMARY, HARMFUL)
    )
    assert not torch.equal(other.theta, first.theta)


def test_clipped_steps_stay_within_their_bounds() -> None:
    immunized = ConditionNumberImmunizer(
        steps=30, first_change=0.5, ill_share=3.0, keep="last"
    ).fit(None, Problem.of(PRIMARY, HARMFUL))
    for record in immunized.history:
        assert record["well_step_over_bound"] <= 0.9 + 1e-9
        assert record["ill_step_over_bound"] <= 0.25 + 1e-9


def test_unsafe_steps_warn_once_or_raise_and_offer_the_largest_safe_one() -> None:
    rows = with_ridge(PRIMARY.x_train, 1e-2)
    bound = well_step_bound(rows)
    settings = {
        "steps": 3,
        "learning_rate": 1e-2,
        "lambda_well": 3.0 * bound / 1e-2,
        "keep": "last",
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ConditionNumberImmunizer(lambda_ill=0.0, unsafe_step="warn", **settings).fit(  # type: ignore[arg-type]
            None, Problem.of(PRIMARY, HARMFUL)
        )
    messages = [str(w.message) for w in caught if w.category is NumericalWarning]
    assert len(messages) == 1
    assert f"lambda_well must be below {bound / 1e-2:.3g} at step 0" in messages[0]
    with pytest.raises(ValueError, match=r"lambda_well must be below .* at step 0"):
        ConditionNumberImmunizer(lambda_ill=0.0, unsafe_step="raise", **settings).fit(  # type: ignore[arg-type]
            None, Problem.of(PRIMARY, HARMFUL)
        )
    ill_bound = ill_step_bound(with_ridge(HARMFUL.x_train, 1e-2))
    with pytest.raises(
        ValueError, match=re.escape(f"lambda_ill must be below {ill_bound / 1e-2:.3g}")
    ):
        ConditionNumberImmunizer(
            steps=3,
            learning_rate=1e-2,
            lambda_well=0.0,
            lambda_ill=2.0 * ill_bound / 1e-2,
            unsafe_step="raise",
        ).fit(None, Problem.of(PRIMARY, HARMFUL))


def test_divergence_is_an_error() -> None:
    immunizer = ConditionNumberImmunizer(
        steps=200, lambda_well=1e6, lambda_ill=0.0, preconditioner="none"
    )
    with pytest.raises(ValueError, match=r"must (keep theta|be) finite"):
        immunizer.fit(None, Problem.of(PRIMARY, HARMFUL))


def test_best_is_never_worse_for_the_primary_task() -> None:
    for preconditioner in ("implicit", "none"):
        immunized = ConditionNumberImmunizer(steps=40, preconditioner=preconditioner).fit(  # type: ignore[arg-type]
            None, Problem.of(PRIMARY, HARMFUL)
        )
        ratio = relative_immunization_ratio(
            PRIMARY.x_train, HARMFUL.x_train, immunized.theta, ridge=1e-2
        )
        assert ratio.log_ii <= 1e-9
        allowed = [
            r["log_kappa_harmful"]
            for r in immunized.history
            if r["log_kappa_primary"] <= immunized.history[0]["log_kappa_primary"]
        ]
        assert ratio.log_kappa_harmful == pytest.approx(max(allowed), abs=1e-9)


def test_adam_runs_without_bounds() -> None:
    immunized = ConditionNumberImmunizer(steps=20, optimizer="adam").fit(
        None, Problem.of(PRIMARY, HARMFUL)
    )
    assert math.isnan(immunized.history[-1]["well_step_over_bound"])
    assert torch.isfinite(immunized.theta).all()


def test_it_starts_from_a_given_theta() -> None:
    theta0 = torch.randn(5, 5, dtype=torch.float64)
    kept = theta0.clone()
    immunized = ConditionNumberImmunizer(steps=3, keep="last").fit(
        theta0, Problem.of(PRIMARY, HARMFUL)
    )
    assert torch.equal(theta0, kept)
    assert torch.equal(immunized.theta0, theta0)
    assert immunized.history[0]["log_rir"] == 0.0


def test_float32_tasks_are_computed_in_float64() -> None:
    immunized = ConditionNumberImmunizer(steps=2).fit(
        None, Problem.of(PRIMARY.to(dtype=torch.float32), HARMFUL.to(dtype=torch.float32))
    )
    assert immunized.theta.dtype == torch.float64
    assert immunized.features(PRIMARY.x_train.float()).dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be finite and positive"),
        ({"learning_rate": 0.0}, "learning_rate must be finite and positive, got 0.0"),
        ({"lambda_ill": math.inf}, "lambda_ill must be finite"),
        ({"optimizer": "sgd"}, "optimizer must be one of gd, adam"),
        ({"preconditioner": "left"}, "preconditioner must be one of"),
        ({"unsafe_step": "ignore"}, "unsafe_step must be one of"),
        ({"keep": "first"}, "keep must be one of last, best"),
    ],
)
def test_refused_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConditionNumberImmunizer(**settings)  # type: ignore[arg-type]


def test_refused_tasks() -> None:
    with pytest.raises(ValueError, match="harmful must have the 5 features of primary, got 4"):
        ConditionNumberImmunizer().fit(None, Problem.of(PRIMARY, task(1, p=4)))
    with pytest.raises(ValueError, match="ridge must be finite"):
        ConditionNumberImmunizer(ridge=-1.0).fit(None, Problem.of(PRIMARY, HARMFUL))


@pytest.mark.parametrize("optimizer", ["gd", "adam"])
def test_corridor_is_held_at_every_step(optimizer: str) -> None:
    corridor = (3.0, 5.0)
    immunizer = ConditionNumberImmunizer(
        steps=15,
        optimizer=optimizer,  # type: ignore[arg-type]
        corridor=corridor,
        keep="last",
    )
    fitted = immunizer.fit(None, Problem.of(PRIMARY, HARMFUL))
    for record in fitted.history:
        assert 3.0 * (1 - 1e-6) <= math.exp(record["log_kappa_primary"]) <= 5.0 * (1 + 1e-6)
    assert fitted.config["corridor"] == [3.0, 5.0]
    assert torch.equal(fitted.theta0, torch.eye(fitted.theta.shape[0], dtype=torch.float64))
    with pytest.raises(ValueError, match="corridor must be two numbers"):
        ConditionNumberImmunizer(corridor=(0.5, 1.0))


def test_the_best_iterate_is_kept_and_not_the_last() -> None:
    problem = Problem.of(PRIMARY, HARMFUL)
    settings = {"steps": 40, "first_change": 0.2, "ill_share": 1.0}
    last, best = (
        ConditionNumberImmunizer(keep=keep, **settings).fit(None, problem)  # type: ignore[arg-type]
        for keep in ("last", "best")
    )
    assert last.history == best.history
    first = best.history[0]["log_kappa_primary"]
    allowed = [r for r in best.history if r["log_kappa_primary"] <= first]
    wanted = max(allowed, key=lambda record: record["log_kappa_harmful"])
    assert 0 < wanted["step"] < 40  # the case at hand: the last iterate is not the best
    ratio = relative_immunization_ratio(PRIMARY.x_train, HARMFUL.x_train, best.theta, ridge=1e-2)
    assert ratio.log_kappa_harmful == pytest.approx(wanted["log_kappa_harmful"], rel=1e-9)
    assert not torch.equal(last.theta, best.theta)


def test_an_untouched_extractor_is_not_handed_back_in_silence() -> None:
    immunizer = ConditionNumberImmunizer(steps=2, lambda_well=0.0, lambda_ill=0.0)
    with pytest.warns(NumericalWarning, match="the extractor is the one it started from"):
        immunizer.fit(None, Problem.of(PRIMARY, PRIMARY))
