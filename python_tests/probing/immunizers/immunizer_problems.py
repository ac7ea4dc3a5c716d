"""Small random tasks that the tests of several immunizers share."""

import torch

from immunize_ext.probing.data import Task


def task(seed: int, p: int = 5, n: int = 30) -> Task:
    """A regression task whose inputs have spread-out singular values in random directions."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, p, dtype=torch.float64, generator=generator)
    square = torch.randn(p, p, dtype=torch.float64, generator=generator)
    basis = torch.linalg.qr(square).Q
    x = x * torch.logspace(0, -1, p, dtype=torch.float64) @ basis
    y = x.sum(1) + 0.1 * torch.randn(n, dtype=torch.float64, generator=generator)
    cut = 2 * n // 3
    return Task(f"task {seed}", x[:cut], y[:cut], x[cut:], y[cut:])


def kappa(x: torch.Tensor, theta: torch.Tensor) -> float:
    """Condition number of theta^T x^T x theta."""
    sigma = torch.linalg.svdvals(x @ theta)
    return float(sigma[0] / sigma[-1]) ** 2
