"""The released training procedure for condition-number immunization, from its description.

A linear layer with bias and random start, Adam on everything, a supervised loss and the two
regularizers of mini-batch Gram matrices, whose extreme eigenvalues come from a full ``eigvalsh`` of
S + 1e-6 I under autograd. What does not fill a batch is left out, K^{-1} multiplies the gradients
of the regularizers alone, and the metric sees the layer's output, bias included. Every choice in
which the released code and the paper part is a setting, so that the effect of each can be measured
alone. Written from descriptions; no code was copied.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from immunize_ext.ops import Preconditioner, gram_extremes
from immunize_ext.probing.data import Task

FLOOR = 1e-6


@dataclass(frozen=True)
class Published:
    """Settings of one run; the defaults are those of House Prices with the paper's epochs.

    Attributes:
        epochs: Passes over the training part.
        batch_size: Samples of each task in a step; ``None``: all.
        drop_last: Whether an epoch leaves out what does not fill a batch. Gram matrices are not
            normalised: in a batch of 8 rows R_ill has over 100 times the gradient it has in 64.
        learning_rate: Of the optimizer.
        lambda_well: Weight of R_well.
        lambda_ill: Weight of R_ill.
        side: Side on which K^{-1} multiplies the gradient of the stored weight (out, in): the
            input side is ``"right"``; the released code uses ``"left"``.
        ridges: What is added to K_P and K_H before they are inverted.
        start: Random weights and bias of ``nn.Linear``, or the identity without bias.
        width: K of the regularizers; the number of features when ``None``.
        optimizer: Adam, or plain gradient descent.
        schedule: A constant learning rate, or a cosine to 0.
        loss: Mean squared residual, or logistic loss of a label -1 or +1.
        precondition_loss: Whether K^{-1} multiplies the gradient of the loss as well.
        metric_bias: Whether the metric sees the bias.
        operators: Whether extremes and K^{-1} are those of this package's operators instead of
            eigenvalues and inverses of p x p matrices. What they stand for is the same.
    """

    epochs: int = 100
    batch_size: int | None = 64
    drop_last: bool = True
    learning_rate: float = 5e-3
    lambda_well: float = 100.0
    lambda_ill: float = 1e7
    side: Literal["right", "left", "none"] = "right"
    ridges: tuple[float, float] = (1.0, 1.0)
    start: Literal["random", "identity"] = "random"
    width: int | None = None
    optimizer: Literal["adam", "gd"] = "adam"
    schedule: Literal["constant", "cosine"] = "constant"
    loss: Literal["squared", "logistic"] = "squared"
    precondition_loss: bool = False
    metric_bias: bool = True
    operators: bool = False


@dataclass(frozen=True)
class PublishedRun:
    """What a run gave.

    Attributes:
        theta: The extractor, shape ``(p, p)``.
        bias: Its bias, shape ``(p,)``, where the metric sees one.
        train_loss: Loss on the primary training part.
        iterations: Steps taken.
        seconds: CPU time of the steps, which other work on the machine does not change.
        first_well: R_well in the first step, with the given ``width``.
    """

    theta: Tensor
    bias: Tensor | None
    train_loss: float
    iterations: int
    seconds: float
    first_well: float


class _Preconditioned(torch.autograd.Function):
    """A linear layer whose weight gradient is multiplied by K^{-1}, K = X^T X + ridge I."""

    @staticmethod
    def forward(ctx, x, weight, bias, ridge, settings):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        ctx.ridge, ctx.settings, ctx.has_bias = ridge, settings, bias is not None
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        side = ctx.settings.side
        if side == "left" and ctx.settings.operators:
            # K^{-1} (dY^T X) = (dY K^{-1})^T X: as many right-hand sides as there are samples.
            factor = Preconditioner.from_features(x, ridge=ctx.ridge, relative=False)
            grad_left = factor.apply(grad)
            return None, grad_left.mT @ x, grad.sum(0) if ctx.has_bias else None, None, None
        gradient = grad.mT @ x  # (out, in)
        if side != "none":
            # In float64: with a ridge of 1e-7 a batch K of MNIST is singular in float32.
            rows = x.to(torch.float64)
            k = rows.mT @ rows + ctx.ridge * torch.eye(x.shape[1], dtype=torch.float64)
            wide = gradient.to(torch.float64)
            left = side == "left"
            solved = torch.linalg.solve(k, wide if left else wide.mT)
            gradient = (solved if left else solved.mT).to(x.dtype)
        return None, gradient, grad.sum(0) if ctx.has_bias else None, None, None


def extremes(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Largest and smallest eigenvalue above the floor, and |S|_F^2, as the released code has them.

    Of S = features^T features, float64 but for the last.
    """
    gram = features.mT @ features
    eye = torch.eye(gram.shape[0], dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(gram.to(torch.float64) + FLOOR * eye)
    counted = eigenvalues[eigenvalues > FLOOR]
    smallest = counted[0] if len(counted) else eigenvalues[-1]
    return eigenvalues[-1], smallest, gram.square().sum()


def extremes_by_operators(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same on the thin side; an eigenvalue of 0 counts as the floor, with gradient 0.

    The released code counts whichever zeros rounding puts above the floor, 1e-6 all the same.
    """
    found = gram_extremes(features.to(torch.float64), rank="full")
    return found.lambda_max + FLOOR, found.lambda_min + FLOOR, found.squared_frobenius


def train(
    primary: Task, harmful: Task, settings: Published, *, seed: int, iterations: int | None = None
) -> PublishedRun:
    """Run the procedure, or its first iterations."""
    generator = torch.Generator().manual_seed(seed)
    x, y, x_harmful = (
        t.to(torch.float32) for t in (primary.x_train, primary.y_train, harmful.x_train)
    )
    p = x.shape[1]
    bound = 1.0 / math.sqrt(p)

    def uniform(*shape: int) -> Tensor:
        return (2.0 * torch.rand(*shape, generator=generator) - 1.0) * bound

    random = settings.start == "random"
    weight = (uniform(p, p) if random else torch.eye(p)).requires_grad_()
    bias = uniform(p).requires_grad_() if random else None
    head, head_bias = uniform(1, p).requires_grad_(), uniform(1).requires_grad_()
    parameters = [t for t in (weight, bias, head, head_bias) if t is not None]
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.SGD
    optimizer = kind(parameters, lr=settings.learning_rate)
    count = min(len(x), len(x_harmful))
    size = count if settings.batch_size is None else settings.batch_size
    batches = max(1, count // size) if settings.drop_last else math.ceil(count / size)
    total = settings.epochs * batches
    if settings.schedule == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    width = p if settings.width is None else settings.width

    def loss_of(features: Tensor, targets: Tensor) -> Tensor:
        scores = nn.functional.linear(features, head, head_bias)[:, 0]
        if settings.loss == "squared":
            return (scores - targets).square().mean()
        return nn.functional.softplus(-targets * scores).mean()

    done, first_well = 0, math.nan
    started = time.process_time()
    limit = total if iterations is None else min(iterations, total)
    while done < limit:
        orders = [torch.randperm(count, generator=generator) for _ in range(2)]
        pairs = list(zip(*(order.split(size) for order in orders), strict=True))
        for chosen, chosen_harmful in pairs[:batches]:
            if done == limit:
                break
            rows = x[chosen], x_harmful[chosen_harmful]
            both = [
                _Preconditioned.apply(part, weight, bias, ridge, settings)
                for part, ridge in zip(rows, settings.ridges, strict=True)
            ]
            look = extremes_by_operators if settings.operators else extremes
            (largest, _, square), (_, smallest, harmful_square) = map(look, both)
            well = largest.square() / 2 - square / (2 * width)
            ill = 1.0 / (harmful_square / (2 * width) - smallest.square() / 2)
            if done == 0:
                first_well = float(well.detach())
            plain = nn.functional.linear(rows[0], weight, bias)
            loss = loss_of(both[0] if settings.precondition_loss else plain, y[chosen])
            optimizer.zero_grad()
            (loss + settings.lambda_well * well + settings.lambda_ill * ill).backward()
            optimizer.step()
            if settings.schedule == "cosine":
                scheduler.step()
            done += 1
    seconds = time.process_time() - started
    with torch.no_grad():
        final = loss_of(nn.functional.linear(x, weight, bias), y)
    seen = bias.detach().to(torch.float64) if bias is not None and settings.metric_bias else None
    return PublishedRun(
        weight.detach().mT.to(torch.float64), seen, float(final), done, seconds, first_well
    )
