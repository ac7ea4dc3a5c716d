"""RFD, the worst case over attackers, and the norm ratio under exact line search."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from immunize_ext.probing.attacks import compare_attack
from immunize_ext.probing.data import Task
from immunize_ext.probing.metrics import (
    AttackerSteps,
    line_search_norm_ratio,
    relative_degradation,
    worst_case,
)
from immunize_ext.quantities import slowdown

accuracies = st.lists(st.tuples(st.floats(0.01, 1.0), st.floats(0.0, 1.0)), min_size=1, max_size=20)


@given(pairs=accuracies)
def test_signed_degradation_is_within_the_absolute_one(pairs: list[tuple[float, float]]) -> None:
    base, immunized = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    found = relative_degradation(base, immunized)
    assert abs(found.signed) <= found.absolute + 1e-12
    if bool((immunized <= base).all()):
        assert found.signed == pytest.approx(found.absolute)
    flipped = relative_degradation(base, immunized, higher_is_better=False)
    assert flipped == pytest.approx((-found.signed, found.absolute))


def test_identical_curves_have_no_degradation() -> None:
    curve = torch.linspace(0.1, 0.9, 7)
    assert relative_degradation(curve, curve) == (0.0, 0.0)


def test_help_to_the_attacker_shows_in_the_sign_alone() -> None:
    found = relative_degradation(torch.tensor([0.5, 0.5]), torch.tensor([0.75, 0.75]))
    assert found == (-50.0, 50.0)


def test_degradation_refusals() -> None:
    with pytest.raises(ValueError, match="cut both curves to equal length"):
        relative_degradation(torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match=r"base must be positive at every step, got 0\.0"):
        relative_degradation(torch.tensor([0.0, 1.0]), torch.ones(2))


steps = st.builds(
    AttackerSteps,
    base_steps=st.integers(0, 100),
    steps=st.one_of(st.none(), st.integers(0, 5000)),
    budget=st.integers(5000, 10000),
)


@given(attackers=st.dictionaries(st.sampled_from("abcdef"), steps, min_size=1))
def test_worst_case_is_no_better_than_any_attacker(attackers: dict[str, AttackerSteps]) -> None:
    case = worst_case(attackers)
    ratios = {n: slowdown(a.steps, a.base_steps, a.budget) for n, a in attackers.items()}
    assert case.least_slowdown == ratios[case.least_slowed]
    assert all(case.least_slowdown.ratio <= other.ratio for other in ratios.values())
    assert case.slowdown.ratio <= ratios[case.fastest_base].ratio
    # Free choice of the attacker costs at least what the least slowed one pays.
    assert case.slowdown.ratio >= case.least_slowdown.ratio * (1 - 1e-12)


def test_worst_case_of_a_real_attack_is_whitening() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, dtype=torch.float64, generator=generator)
    y = x.sum(1) + torch.randn(60, dtype=torch.float64, generator=generator)
    task = Task("toy", x[:40], y[:40], x[40:], y[40:])
    theta = torch.diag(torch.tensor([1.0, 1.0, 0.1, 0.03], dtype=torch.float64))
    names = ("gradient_descent", "whitened")
    found = {name: compare_attack(task, theta, attacker=name) for name in names}
    case = worst_case(
        {n: AttackerSteps(c.base_steps, c.steps, c.immunized.steps[-1]) for n, c in found.items()}
    )
    assert found["gradient_descent"].slowdown.ratio > 5.0
    assert (case.least_slowed, case.least_slowdown.ratio) == ("whitened", 1.0)
    assert (case.fastest, case.slowdown.ratio) == ("whitened", 1.0)


def test_worst_case_refuses_nobody() -> None:
    with pytest.raises(ValueError, match="at least one attacker"):
        worst_case({})


@given(seed=st.integers(0, 2**31 - 1), p=st.integers(1, 5))
def test_norm_ratio_under_line_search_keeps_to_kantorovich(seed: int, p: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * p, p, dtype=torch.float64, generator=generator)
    y = torch.randn(3 * p, dtype=torch.float64, generator=generator)
    ratios = line_search_norm_ratio(x, y, steps=12)
    values = torch.linalg.eigvalsh(x.mT @ x)
    spread = float(values[-1] / values[0])
    # Kantorovich bounds the decay in the norm of the Hessian, which kappa compares with this one.
    decay = ((spread - 1.0) / (spread + 1.0)) ** 2
    assert float(ratios[0]) == 1.0
    assert (ratios <= spread * decay ** torch.arange(13) * (1 + 1e-9) + 1e-20).all()


def test_norm_ratio_edges() -> None:
    assert line_search_norm_ratio(torch.eye(2), torch.zeros(2), steps=1).tolist() == [0.0, 0.0]
    wide = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert float(line_search_norm_ratio(wide, torch.ones(2), steps=1)[1]) == pytest.approx(0.0)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        line_search_norm_ratio(wide, torch.ones(2), steps=0)
    with pytest.raises(ValueError, match=r"y must have shape \(n,\)"):
        line_search_norm_ratio(wide, torch.ones(3))
