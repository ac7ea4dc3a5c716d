"""Tasks with more than two classes: labels, targets, heads with several outputs, accuracy."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sample_inputs import gaussian
from torch import Tensor

from immunize_ext.probing import evaluate
from immunize_ext.probing.attacks import ATTACKS, compare_attack
from immunize_ext.probing.attacks.losses import LOSSES, SoftmaxLoss, SquaredLoss
from immunize_ext.probing.certificates import certify
from immunize_ext.probing.certificates.linear_information import linear_information
from immunize_ext.probing.data import Problem, Task, gram_equivalent
from immunize_ext.probing.data.classes import answered, class_rows, class_targets
from immunize_ext.probing.immunizers import METHODS, best_head, lock_price
from immunize_ext.probing.immunizers.lock import cross_covariance
from immunize_ext.probing.metrics import (
    Moments,
    best_constant,
    conjugate_gradient_steps,
    few_sample_error,
    gradient_descent_steps,
    line_search_norm_ratio,
    tuned_risk,
)

CLASSES = 4


def labelled(seed: int, count: int = 90, classes: int = CLASSES, p: int = 6) -> tuple:
    """Classes around means that stand out of unequal noise."""
    ids = torch.arange(count) % classes
    spread = torch.tensor([3.0, 2.0, 1.0, 1.0, 0.5, 0.3], dtype=torch.float64)[:p]
    means = 1.5 * gaussian(classes, p, seed=seed)
    return (means[ids] + gaussian(count, p, seed=seed + 1)) * spread, ids


def task(seed: int = 1, **about: int) -> Task:
    return Task.of(labelled(seed, **about))


def binary(seed: int = 1) -> Task:
    return task(seed, classes=2)


def two_columns(one: Task) -> Task:
    """The same task with a column for each of its two classes."""
    parts = {
        n: torch.stack([-y, y], 1) for n, y in (("y_train", one.y_train), ("y_test", one.y_test))
    }
    return replace(one, **parts)


# --- labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names", [["cat", "dog", "emu", "fox"], np.array(["cat", "dog", "emu", "fox"]), [3, 5, 7, 11]]
)
def test_labels_of_every_kind_become_columns_in_sorted_order(names):
    x, ids = labelled(1)
    labels = [names[3 - i] for i in ids.tolist()]
    found = Task.of((x, labels), "toy")
    assert found.classes == tuple(map(str, names))
    assert found.num_classes == CLASSES
    assert (found.kind, found.summary) == ("classification", "4 classes")
    rows = class_rows(3 - ids, CLASSES, torch.float64)
    kept = torch.arange(len(ids)) % 5 != 4
    assert torch.equal(found.y_train, rows[kept])
    assert torch.equal(found.y_test, rows[~kept])
    assert torch.equal(found.y_train.sum(1).abs() < 1e-15, torch.ones(int(kept.sum())).bool())


def test_two_classes_become_minus_and_plus_one():
    x, _ = labelled(1)
    for labels, names in (
        (np.arange(90) % 2, ("0", "1")),
        (np.arange(90) % 2 == 1, ("False", "True")),
        (["no", "yes"] * 45, ("no", "yes")),
    ):
        found = Task.of((x, labels))
        assert found.classes == names
        assert found.y_train[:2].tolist() == [-1.0, 1.0]
        assert found.num_classes == 2


def test_numbers_stay_numbers():
    x, _ = labelled(1)
    assert Task.of((x, torch.arange(90))).kind == "regression"  # too many to be classes
    assert Task.of((x, (np.arange(90) % 3).astype(float))).kind == "regression"
    signs = Task.of((x, 2 * (torch.arange(90) % 2) - 1))
    assert signs.kind == "classification"
    assert signs.classes == ()


def test_several_outputs_that_are_no_classes_are_a_regression():
    x, _ = labelled(1)
    found = Task("two", x, x[:, :2], x, x[:, :2])
    assert (found.kind, found.num_classes) == ("regression", 0)


def test_refusals():
    x, ids = labelled(1)
    with pytest.raises(ValueError, match="must hold classes of y_train, got owl"):
        Task.of((x, ["cat", "dog", "emu"] * 30, x[:3], ["cat", "dog", "owl"]))
    y = class_targets(ids, CLASSES)
    with pytest.raises(ValueError, match="y_test must have the outputs of y_train"):
        Task("toy", x, y, x, y[:, :3])
    with pytest.raises(ValueError, match=r"class ids or names to Task\.of"):
        Task("toy", x, ids, x, ids)
    with pytest.raises(ValueError, match="'squared' for a regression task"):
        replace(ATTACKS["adam"], loss="logistic").run(
            None, Task("two", x, x[:, :2], x, x[:, :2]), steps=1
        )


def test_cuts_keep_the_outputs_and_the_names():
    whole = Task.of((labelled(1)[0], ["a", "b", "c"] * 30))
    for part in (*whole.halves(), *whole.folds(3), whole.to(dtype=torch.float32)):
        assert part.classes == ("a", "b", "c")
        assert part.num_classes == 3
    short = gram_equivalent(whole)
    assert len(short.x_train) == 7
    assert short.num_classes == 3
    w = gaussian(6, 3, seed=5)
    losses = [float((t.x_train @ w - t.y_train).square().mean()) for t in (whole, short)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_a_tie_is_no_answer():
    y = class_rows(torch.tensor([0, 1, 2]), 3, torch.float64)
    scores = torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.3, 0.2], [0.5, 0.1, 0.5]])[:, None]
    assert answered(scores, y).flatten().tolist() == [False, True, False]


# --- losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_softmax_slope_against_finite_differences(classes):
    loss, n = SoftmaxLoss(), 7
    y = class_rows(torch.arange(n) % classes, classes, torch.float64)
    scores = 2.0 * gaussian(n, classes, seed=3)
    slope = loss.slope(scores, y)
    h = 1e-6
    for i in range(n):
        for j in range(classes):
            step = torch.zeros_like(scores)
            step[i, j] = h
            difference = (loss.total(scores + step, y) - loss.total(scores - step, y)) / (2 * h)
            assert float(slope[i, j]) == pytest.approx(float(difference), abs=1e-8)
    truth = torch.nn.functional.cross_entropy(scores, y.argmax(1), reduction="none")
    torch.testing.assert_close(loss.each(scores, y), truth, rtol=1e-13, atol=1e-15)
    leaf = scores.clone().requires_grad_()
    hessian = torch.autograd.functional.hessian(lambda s: loss.total(s, y), leaf).reshape(
        scores.numel(), -1
    )
    image = gaussian(n, classes, seed=4)
    along = float(image.flatten() @ hessian @ image.flatten())
    assert loss.bend(scores, image) == pytest.approx(along, rel=1e-11)
    assert float(torch.linalg.eigvalsh(hessian)[-1]) <= loss.curvature


def test_softmax_of_a_wide_margin_keeps_its_digits():
    y = class_rows(torch.tensor([0]), 3, torch.float64)
    scores = torch.tensor([[40.0, 0.0, 0.0]], dtype=torch.float64)
    assert float(SoftmaxLoss().each(scores, y)) == pytest.approx(2.0 * math.exp(-40.0), rel=1e-12)


@pytest.mark.parametrize("loss", [SquaredLoss(), SoftmaxLoss()], ids=["squared", "softmax"])
def test_exact_step_is_the_minimum_along_the_line(loss):
    x, ids = labelled(4)
    y = class_targets(ids, CLASSES)
    scores = 0.3 * gaussian(90, CLASSES, seed=6)
    image = -x @ (x.mT @ loss.slope(scores, y)) / 100.0
    t = loss.exact_step(scores, image, y)
    derivative = float((loss.slope(scores + t * image, y) * image).sum())
    assert float(t) > 0.0
    assert abs(derivative) <= 1e-7 * abs(float((loss.slope(scores, y) * image).sum()))


def test_exact_step_on_separable_data_ends_where_nothing_is_left():
    y = class_rows(torch.arange(6) % 3, 3, torch.float64)
    loss = SoftmaxLoss()
    t = loss.exact_step(torch.zeros_like(y), y, y)
    assert float(loss.total(t * y, y)) <= 1e-12


# --- attackers ------------------------------------------------------------------------------------

THETA = torch.eye(6, dtype=torch.float64) + 0.3 * gaussian(6, 6, seed=9)


@pytest.mark.parametrize("loss", ["squared", "logistic"])
@pytest.mark.parametrize("name", list(ATTACKS))
def test_two_columns_are_the_binary_task(name, loss):
    """Squared: the same losses and steps. Softmax: W = (-w, w) / 2 has the binary losses."""
    attack = ATTACKS[name]
    if loss not in getattr(attack, "losses", ()):
        pytest.skip(f"{name} knows the squared loss alone")
    attack = replace(attack, loss=loss)
    one = binary()
    curves = [attack.trace(THETA, t, steps=4) for t in (one, two_columns(one))]
    # Of these the shape of the head, or the size of its gradient, sets the rates.
    if name == "shampoo" or (loss == "logistic" and name in ("adam", "adam_cosine", "adagrad")):
        for curve in curves:
            assert float(curve.test_loss.min()) < float(curve.test_loss[0, 0])
        return
    for field in ("train_loss", "test_loss", "test_accuracy"):
        a, b = (getattr(curve, field) for curve in curves)
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("loss", ["squared", "logistic"])
@pytest.mark.parametrize("name", list(ATTACKS))
def test_every_attacker_learns_the_classes(name, loss):
    attack = ATTACKS[name]
    if loss not in getattr(attack, "losses", ()):
        pytest.skip(f"{name} knows the squared loss alone")
    curve = replace(attack, loss=loss).run(THETA, task(), steps=60)
    assert min(curve.score("test_loss")) < 0.8 * curve.score("test_loss")[0]
    assert curve.score("test_accuracy")[0] == 0.0  # all scores are equal
    assert max(curve.score("test_accuracy")) > 0.6


def test_the_whitened_attacker_is_done_in_one_step():
    given = task()
    curve = ATTACKS["whitened"].run(THETA, given, steps=2)
    solution = torch.linalg.lstsq(given.x_train @ THETA, given.y_train).solution
    residual = given.x_train @ THETA @ solution - given.y_train
    assert curve.score("train_loss")[1] == pytest.approx(float(residual.square().mean()), rel=1e-10)
    assert curve.score("train_loss")[2] == pytest.approx(curve.score("train_loss")[1], rel=1e-12)
    right = (given.x_test @ THETA @ solution).argmax(1) == given.y_test.argmax(1)
    assert curve.score("test_accuracy")[1] == pytest.approx(float(right.double().mean()))


def test_logistic_attackers_reach_the_optimum_of_torch():
    x, ids = labelled(7, count=60)
    ids[::5] = (ids[::5] + 1) % CLASSES  # not separable
    given = Task.of((x, ids, x, ids))
    curve = replace(ATTACKS["lbfgs"], loss="logistic").run(None, given, steps=200)
    w = torch.zeros(6, CLASSES, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [w], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        value = torch.nn.functional.cross_entropy(x @ w, ids)
        value.backward()
        return value

    solver.step(closure)
    assert min(curve.score("train_loss")) == pytest.approx(float(closure()), rel=1e-6)


@pytest.mark.parametrize("loss", list(LOSSES))
def test_no_scale_of_the_features_helps(loss):
    given = task()
    attack = replace(ATTACKS["conjugate_gradients"], loss=loss)
    found = [
        compare_attack(given, scale * THETA, attacker=attack, base_budget=30, limit=3.0)
        for scale in (1.0, 2.0**40)
    ]
    assert found[0] == found[1]


# --- metrics --------------------------------------------------------------------------------------


def test_step_counts_of_the_spectrum_are_those_of_runs():
    given = task()
    z = given.x_train @ THETA
    least = linear_least_loss(z, given.y_train)
    for name, count in (
        ("gradient_descent", gradient_descent_steps),
        ("conjugate_gradients", conjugate_gradient_steps),
    ):
        steps = count(z, given.y_train, tolerance=0.05)
        losses = ATTACKS[name].run(THETA, given, steps=2000).score("train_loss")
        assert steps == next(i for i, v in enumerate(losses) if v <= 1.05 * least)


def linear_least_loss(z: Tensor, y: Tensor) -> float:
    return float((z @ torch.linalg.lstsq(z, y).solution - y).square().mean())


def test_metrics_of_two_columns_are_those_of_the_binary_task():
    one = binary()
    both = one, two_columns(one)
    ratios = [line_search_norm_ratio(t.x_train, t.y_train, steps=9) for t in both]
    torch.testing.assert_close(*ratios, rtol=1e-11, atol=1e-14)
    first, second = (few_sample_error(t, THETA, samples=20, draws=4) for t in both)
    assert first[:4] == pytest.approx(second[:4], rel=1e-10)
    assert best_constant(both[0]) == pytest.approx(best_constant(both[1]))
    first, second = (linear_information(t, THETA) for t in both)
    assert (first.r2, first.accuracy) == pytest.approx((second.r2, second.accuracy))
    metric = THETA @ THETA.mT
    risks = [tuned_risk(Moments.of(t), metric, [10, 40]) for t in both]
    torch.testing.assert_close(*risks, rtol=1e-10, atol=1e-12)
    heads = [best_head(t.x_train, t.y_train).loss(t.x_train, t.y_train) for t in both]
    assert heads[0] == pytest.approx(heads[1], rel=1e-12)
    null = gaussian(6, 2, seed=3)
    prices = [lock_price(t.x_train, t.y_train, null) for t in both]
    assert prices[0] == pytest.approx(prices[1], rel=1e-10)


# --- immunizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_takes_them(name):
    method = METHODS[name]
    if hasattr(method, "steps"):
        method = replace(method, steps=3)
    if hasattr(method, "epochs"):
        method = replace(method, epochs=1)
    if name == "condition-number":
        method = replace(method, keep="last")
    if name == "pencil-lock":
        method = replace(method, directions=2)
    immunized = method.fit(None, Problem.of(task(1), task(3)))
    assert bool(torch.isfinite(immunized.theta).all())


def test_a_method_without_labels_does_not_see_how_many_there_are():
    x, ids = labelled(1)
    found = [
        METHODS["closed-form"].fit(None, Problem.of((x, y), task(3))).theta
        for y in (ids, torch.sign(x[:, 0]))
    ]
    assert torch.equal(*found)


def test_a_lock_takes_one_direction_less_than_classes():
    harm = task(3)
    locked = replace(METHODS["lock"], variance_floor=0.0).fit(None, Problem.of(task(1), harm))
    assert locked.theta.shape == (6, 6 - (CLASSES - 1))
    left = cross_covariance(harm.x_train @ locked.theta, harm.y_train)
    assert float(left.abs().max()) < 1e-12
    assert linear_information(harm, locked.theta).r2 < 0.1 < linear_information(harm).r2


def test_label_directions_lose_their_share_of_variance():
    """Of the directions v that classes are read from, Var(x theta v') falls by c for every one."""
    harm = task(3)
    found = METHODS["label-direction"].fit(None, Problem.of(task(1), harm))
    assert int(torch.linalg.matrix_rank(found.theta)) == 6
    one = few_sample_error(harm, samples=8, draws=20)
    other = few_sample_error(harm, found.theta, samples=8, draws=20)
    assert other.loss > 1.2 * one.loss


@pytest.mark.parametrize("loss", ["squared", "logistic"])
def test_mini_batches_train_a_head_for_all_classes(loss):
    method = replace(METHODS["mini-batch"], loss=loss, epochs=30, batch_size=24)
    history = method.fit(None, Problem.of(task(1), task(3))).history
    assert history[-1]["loss"] < history[0]["loss"]
    with pytest.raises(ValueError, match=r"head must yield \(24, 4\) for a batch, got \(24, 1\)"):
        method.fit(None, Problem.of(task(1), task(3), head=torch.nn.Linear(6, 1)))


# --- everything -----------------------------------------------------------------------------------


def test_an_evaluation_and_a_certificate():
    primary, harmful = task(1), task(3)
    immunized = METHODS["closed-form"].fit(None, Problem.of(primary, harmful))
    found = evaluate(immunized, primary, harmful, base_budget=60, limit=4.0)
    assert found.tasks["harmful"]["classes"] == CLASSES
    facts = found.attacks["harmful"]["whitened"]
    assert 0.5 < facts["final_test_accuracy_without"] <= 1.0
    assert found.slowdown["harmful"]["whitened"] == 1.0
    few = found.details["few_samples"]["without"]
    assert few["constant_error_rate"] == pytest.approx(0.75, abs=0.1)
    assert few["error_rate"] < few["constant_error_rate"]
    certificate = certify(immunized, primary, harmful, draws=1)
    assert certificate.linear[0].accuracy_before == pytest.approx(
        certificate.linear[0].accuracy_after, abs=0.1
    )
    assert certificate.linear[0].kernel_before > 0.5
