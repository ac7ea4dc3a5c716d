"""The losses of a probe against autograd and against a fine search."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from immunize_ext.probing.attacks.losses import LOSSES, probe_loss

seeds = st.integers(0, 2**31 - 1)
names = st.sampled_from(sorted(LOSSES))


def scores_and_targets(seed: int, n: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores, image, y = torch.randn(3, n, dtype=torch.float64, generator=generator)
    return 3.0 * scores, image, torch.where(y > 0, 1.0, -1.0).double()


@given(seed=seeds, name=names)
def test_slope_and_curvature(seed: int, name: str) -> None:
    loss = LOSSES[name]
    scores, _, y = scores_and_targets(seed)
    leaf = scores.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss.total(leaf, y), leaf, create_graph=True)
    torch.testing.assert_close(loss.slope(scores, y), gradient.detach())
    (second,) = torch.autograd.grad(gradient.sum(), leaf)
    assert float(second.max()) <= loss.curvature * (1 + 1e-12)


# Separable along the line, with one score that hardly moves: the loss falls for longest there.
@example(seed=48858952, name="logistic")
@example(seed=794774442, name="logistic")
@example(seed=732020311, name="logistic")
@given(seed=seeds, name=names)
def test_exact_step_minimises_along_the_line(seed: int, name: str) -> None:
    loss = LOSSES[name]
    scores, image, y = scores_and_targets(seed)
    if float(loss.slope(scores, y) @ image) > 0.0:
        image = -image
    step = float(loss.exact_step(scores, image, y))
    least = float(loss.total(scores + step * image, y))
    for other in torch.linspace(0.0, 2.0 * step + 1.0, 200).tolist():
        assert least <= float(loss.total(scores + other * image, y)) * (1 + 1e-12) + 1e-13


def test_logistic_step_ends_where_scores_saturate() -> None:
    y = torch.tensor([1.0, -1.0], dtype=torch.float64)
    step = LOSSES["logistic"].exact_step(torch.zeros(2).double(), y, y)
    assert 30.0 < float(step) <= 2000.0


def test_logistic_step_along_no_descent_is_zero() -> None:
    y = torch.ones(2, dtype=torch.float64)
    for image in (-y, torch.zeros_like(y)):
        assert float(LOSSES["logistic"].exact_step(torch.zeros_like(y), image, y)) == 0.0


def test_reports_per_column() -> None:
    y = torch.tensor([1.0, -1.0], dtype=torch.float64)
    scores = torch.stack([y, -y], dim=1)
    assert LOSSES["squared"].report(scores, y).tolist() == [0.0, 4.0]
    expected = torch.nn.functional.softplus(torch.tensor([-1.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(LOSSES["logistic"].report(scores, y), expected)


def test_unknown_loss() -> None:
    with pytest.raises(ValueError, match="attack: loss must be one of squared, logistic"):
        probe_loss("attack", "hinge")
