"""Ridge rows: their Gram matrix, their place before theta."""

import pytest
import torch

from immunize_ext.probing.metrics import with_ridge


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (2, 4, 3)])
def test_gram_of_the_longer_matrix(shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, dtype=torch.float64)
    gram = x.mT @ x
    largest = torch.linalg.eigvalsh(gram)[..., -1]
    expected = gram + 0.1 * largest[..., None, None] * torch.eye(3 if shape[-1] == 3 else 5)
    longer = with_ridge(x, 0.1)
    torch.testing.assert_close(longer.mT @ longer, expected)


def test_no_ridge_is_the_input_itself() -> None:
    x = torch.randn(5, 3)
    assert with_ridge(x, 0.0) is x


def test_gradient_treats_the_ridge_as_a_constant() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    (with_ridge(x, 0.1) * 2.0).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 2.0))


@pytest.mark.parametrize("ridge", [-1e-3, float("inf"), float("nan")])
def test_refusals(ridge: float) -> None:
    with pytest.raises(ValueError, match="with_ridge: ridge must be finite and not negative"):
        with_ridge(torch.randn(5, 3), ridge)
