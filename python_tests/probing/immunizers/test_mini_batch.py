"""Algorithm 1 on mini-batches: the first step by hand, both optimizers, heads, refusals."""

import math

import pytest
import torch
from immunizer_problems import kappa, task
from torch import nn

from immunize_ext.ops.regularizers import gram_r_ill, gram_r_well
from immunize_ext.probing.data import Problem, Task
from immunize_ext.probing.immunizers import MiniBatchImmunizer
from immunize_ext.probing.immunizers.loop import batch_indices

PRIMARY, HARMFUL = task(0, n=60), task(1, n=60)


def classification(seed: int) -> Task:
    base = task(seed, n=60)
    return Task(base.name, base.x_train, base.y_train.sign(), base.x_test, base.y_test.sign())


def test_it_raises_rir() -> None:
    immunized = MiniBatchImmunizer(epochs=40, batch_size=10).fit(None, Problem.of(PRIMARY, HARMFUL))
    harmful = kappa(HARMFUL.x_train, immunized.theta) / kappa(HARMFUL.x_train, immunized.theta0)
    primary = kappa(PRIMARY.x_train, immunized.theta) / kappa(PRIMARY.x_train, immunized.theta0)
    assert harmful / primary > 2.0
    assert immunized.history[0]["step"] == 0.0
    assert immunized.history[-1]["step"] == 40 * 4
    assert immunized.history[-1]["log_rir"] > math.log(2.0)


@pytest.mark.parametrize("preconditioner", ["batch", "full", "none"])
def test_first_step_of_sgd_by_hand(preconditioner: str) -> None:
    # One batch of all samples, so that batch and data agree; K^-1 stands on the input side.
    rate, well, ill, ridge = 1e-3, 0.7, 3.0, 1e-2
    n = len(PRIMARY.x_train)
    immunized = MiniBatchImmunizer(
        epochs=1,
        batch_size=n,
        optimizer="sgd",
        learning_rate=rate,
        lambda_well=well,
        lambda_ill=ill,
        preconditioner=preconditioner,  # type: ignore[arg-type]
        precondition_ridge=ridge,
        seed=3,
    ).fit(None, Problem.of(PRIMARY, HARMFUL))
    x, y, h = PRIMARY.x_train, PRIMARY.y_train, HARMFUL.x_train
    p = x.shape[1]
    generator = torch.Generator().manual_seed(3)
    omega = torch.randn(p, dtype=torch.float64, generator=generator) / math.sqrt(p)
    theta = torch.eye(p, dtype=torch.float64).requires_grad_()
    (expected,) = torch.autograd.grad((x @ theta @ omega - y).square().mean(), theta)
    for rows, function, weight in ((x, gram_r_well, well), (h, gram_r_ill, ill)):
        (gradient,) = torch.autograd.grad(function(rows @ theta), theta)
        if preconditioner != "none":
            gram = rows.mT @ rows
            identity = torch.eye(p, dtype=torch.float64)
            gradient = torch.linalg.solve(gram + ridge * gram.trace() / p * identity, gradient)
        expected = expected + weight * gradient
    torch.testing.assert_close(
        immunized.theta, theta.detach() - rate * expected, rtol=1e-9, atol=1e-12
    )


def test_batches_smaller_than_the_number_of_features() -> None:
    immunized = MiniBatchImmunizer(epochs=3, batch_size=3).fit(None, Problem.of(PRIMARY, HARMFUL))
    assert torch.isfinite(immunized.theta).all()


def test_any_head_and_logistic_loss() -> None:
    primary = classification(0)
    torch.manual_seed(1)
    head = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
    before = [weight.clone() for weight in head.parameters()]
    immunized = MiniBatchImmunizer(
        epochs=60, batch_size=20, loss="logistic", optimizer="sgd", momentum=0.9, record_every=1
    ).fit(None, Problem.of(primary, HARMFUL, head=head))
    assert immunized.history[-1]["loss"] < immunized.history[0]["loss"]
    assert immunized.history[-1]["step"] == 60 * 2
    assert all(torch.equal(a, b) for a, b in zip(before, head.parameters(), strict=True))


def test_runs_repeat_and_leave_the_global_state_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (
        MiniBatchImmunizer(epochs=2, batch_size=10, seed=seed)
        .fit(None, Problem.of(PRIMARY, HARMFUL))
        .theta
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_lambdas_are_balanced_by_gradient_norms() -> None:
    config = (
        MiniBatchImmunizer(epochs=1, batch_size=40).fit(None, Problem.of(PRIMARY, HARMFUL)).config
    )
    doubled = MiniBatchImmunizer(epochs=1, batch_size=40, lambda_well=2 * config["lambda_well"])
    assert config["lambda_well"] > 0
    assert config["lambda_ill"] > 0
    # R_ill is balanced against R_well with its lambda.
    assert doubled.fit(None, Problem.of(PRIMARY, HARMFUL)).config["lambda_ill"] == pytest.approx(
        2 * config["lambda_ill"]
    )
    without = MiniBatchImmunizer(epochs=1, lambda_well=0.0, lambda_ill=0.0)
    assert without.fit(None, Problem.of(PRIMARY, HARMFUL)).config["lambda_ill"] == 0.0


def test_corridor_holds_kappa() -> None:
    immunized = MiniBatchImmunizer(epochs=2, batch_size=10, ridge=0.0, corridor=(5.0, 6.0))
    assert (
        5.0 - 1e-6
        <= kappa(PRIMARY.x_train, immunized.fit(None, Problem.of(PRIMARY, HARMFUL)).theta)
        <= 6.0 + 1e-6
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be finite and positive"),
        ({"optimizer": "lbfgs"}, "optimizer must be one of adam, sgd"),
        ({"loss": "hinge"}, "loss must be one of squared, logistic"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1"),
        ({"lambda_ill": -1.0}, "lambda_ill must be finite and not negative"),
        ({"preconditioner": "left"}, "preconditioner must be one of"),
    ],
)
def test_settings_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MiniBatchImmunizer(**settings)  # type: ignore[arg-type]


def test_fits_refused() -> None:
    with pytest.raises(ValueError, match="primary must have labels of -1 and \\+1"):
        MiniBatchImmunizer(loss="logistic").fit(None, Problem.of(PRIMARY, HARMFUL))
    with pytest.raises(ValueError, match="head must yield"):
        MiniBatchImmunizer().fit(None, Problem.of(PRIMARY, HARMFUL, head=nn.Linear(5, 3)))
    with pytest.raises(ValueError, match="harmful must have the 5 features"):
        MiniBatchImmunizer().fit(None, Problem.of(PRIMARY, task(1, p=4)))
    with pytest.raises(ValueError, match="must keep theta finite"):
        MiniBatchImmunizer(
            optimizer="sgd", learning_rate=1e30, lambda_well=1e30, lambda_ill=0.0
        ).fit(None, Problem.of(PRIMARY, HARMFUL))


def test_a_ragged_batch_is_dropped() -> None:
    """Of 200 rows in batches of 66 two are left over, whose R_ill would rule every fourth step."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(200, 5, dtype=torch.float64, generator=generator)
    tasks = [Task(name, x, x.sum(1), x, x.sum(1)) for name in ("primary", "harmful")]
    immunizer = MiniBatchImmunizer(epochs=2, batch_size=66, record_every=1)
    history = immunizer.fit(None, Problem.of(*tasks)).history
    assert history[-1]["step"] == 2 * 3
    # 1 / R_ill goes with the fourth power of the features: equal sizes, equal scale.
    values = [record["r_ill"] for record in history]
    assert max(values) < 10 * min(values)


def test_batches_are_a_function_of_the_step() -> None:
    def epoch(number: int) -> list[int]:
        steps = range(3 * number, 3 * number + 3)
        return [i for s in steps for i in batch_indices(10, 3, s, seed=1, role=0).tolist()]

    for number in (0, 1):
        assert len(epoch(number)) == len(set(epoch(number))) == 9
    assert epoch(0) != epoch(1)
    assert sorted(batch_indices(2, 5, 7, seed=0, role=1).tolist()) == [0, 1]
    other = batch_indices(10, 3, 0, seed=1, role=1).tolist()
    assert other != batch_indices(10, 3, 0, seed=1, role=0).tolist()
