"""What is captured of layers, kappa and RIR of it, and the term of the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from immunize_ext.callbacks import FeatureMonitor, FeatureRegularizer
from immunize_ext.ops import log_condition_number
from immunize_ext.ops.regularizers import gram_r_ill, gram_r_well


class Tokens(nn.Module):
    """Blocks on tokens (n, t, p) that give tuples, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
        self.spare, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        for block in self.body:
            x = self.drop(block(x))
        return {"logits": scale * self.head(x[:, 0])}


@pytest.fixture
def model() -> Tokens:
    torch.manual_seed(0)
    return Tokens()


def tokens(seed: int, *scales: float) -> Tensor:
    x = torch.randn(60, 3, 4, generator=torch.Generator().manual_seed(seed))
    return x * torch.tensor(scales or (1.0, 1.0, 1.0, 1.0))


def test_kappa_is_that_of_the_rows_in_evaluation_mode(model: Tokens) -> None:
    x = tokens(0, 4.0, 2.0, 1.0, 0.5)
    model.train()
    model.head.eval()
    options: dict[str, Any] = {"policy": "rank_aware"}
    found = FeatureMonitor(["body.0"], primary={"x": x, "scale": 3.0}, **options).measure(model)
    rows = model.body[0](x[:, 0]).detach().double()
    assert found == {
        "log_kappa_primary/body.0": pytest.approx(2 * float(log_condition_number(rows)), rel=1e-5)
    }
    assert model.drop.training
    assert not model.head.training
    mean = FeatureMonitor(["body.0"], primary=(x, 3.0), pool="mean", **options).measure(model)
    rows = model.body[0](x).mean(1).detach().double()
    truth = 2 * float(log_condition_number(rows))
    assert mean["log_kappa_primary/body.0"] == pytest.approx(truth, rel=1e-5)
    last = FeatureMonitor(["body.0"], primary=x, pool=lambda out: out[:, -1], **options)
    assert last.measure(model) != mean


def test_rir_compares_with_the_first_measurement(model: Tokens) -> None:
    """Scaling one direction of the features: kappa of both tasks, and their ratio, are known."""
    primary, harmful = tokens(1), tokens(2, 1.0, 1.0, 1.0, 0.2)
    monitor = FeatureMonitor(
        ["body.0", "body.1"], primary=primary, harmful=harmful, policy="rank_aware"
    )
    first = monitor.measure(model)
    assert first["rir/body.0"] == first["rir/body.1"] == 1.0
    with torch.no_grad():
        model.body[0].weight.copy_(model.body[0].weight @ torch.diag(torch.tensor([1, 1, 1, 0.1])))
    second = monitor.measure(model)
    change = {
        role: second[f"log_kappa_{role}/body.0"] - first[f"log_kappa_{role}/body.0"]
        for role in ("primary", "harmful")
    }
    rir = torch.tensor(change["harmful"] - change["primary"]).exp().item()
    assert second["rir/body.0"] == pytest.approx(rir, rel=1e-5)
    assert min(change.values()) > 1.0
    monitor.base = None
    assert monitor.measure(model)["rir/body.0"] == 1.0


def test_the_penalty_is_the_regularizers_of_both_batches(model: Tokens) -> None:
    x, harm = tokens(3), tokens(4, 1.0, 2.0, 3.0, 4.0)
    model.eval()
    weights = {"well": 0.5, "ill": 2.0}
    regularizer = FeatureRegularizer(["body.0", "body.1"], harmful=harm, weights=weights)
    with regularizer.watching(model):
        loss = model(x)["logits"].square().mean()
    penalty = regularizer.penalty(model, loss, scale=0.25)
    rows = []
    for batch in (x, harm):
        one = model.body[0](batch)
        rows.append((one[:, 0], model.body[1](one)[:, 0]))
    truth = sum(
        0.5 * gram_r_well(ours) + 2.0 * gram_r_ill(theirs)
        for ours, theirs in zip(*rows, strict=True)
    )
    torch.testing.assert_close(penalty, 0.25 * truth, rtol=1e-5, atol=0.0)
    assert regularizer.last["well"] == pytest.approx(
        sum(gram_r_well(ours).item() for ours in rows[0]), rel=1e-5
    )
    (weight,) = torch.autograd.grad(penalty, [model.body[0].weight])
    assert weight.abs().max() > 0


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_open_weights_are_balanced_once(model: Tokens, scale: float) -> None:
    model.eval()
    batches = [tokens(seed, 1.0, 2.0, 3.0, 4.0) for seed in (5, 6)]
    regularizer = FeatureRegularizer(
        ["body.1"], harmful=batches, objective="kappa_log_ratio", share=0.5
    )
    seen = []
    for _ in range(3):
        with regularizer.watching(model):
            loss = model(tokens(7))["logits"].square().mean()
        penalty = regularizer.penalty(model, loss, scale=scale)
        seen.append((regularizer.weights["weight"], regularizer.last["weight"]))
        sizes = [
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(
                        value, [*model.body.parameters()], retain_graph=True
                    )
                ]
            ).norm()
            for value in (loss, penalty)
        ]
    assert len({weight for weight, _ in seen}) == 1
    # The batches alternate and begin again: first, second, first.
    assert seen[0][1] == seen[2][1] != seen[1][1]
    every = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(
        model(tokens(7))["logits"].square().mean(), every, allow_unused=True
    )
    norm = torch.cat([g.flatten() for g in found if g is not None]).norm()
    # The last penalty is of the batch that the weight was chosen on.
    assert sizes[1] == pytest.approx(0.5 * float(norm), rel=1e-4)


def test_training_with_it_makes_the_harm_worse_conditioned(model: Tokens) -> None:
    primary, harmful = tokens(8, 1.0, 1.0, 2.0, 2.0), tokens(9, 2.0, 2.0, 1.0, 1.0)
    targets = primary[:, 0].sum(-1)
    monitor = FeatureMonitor(["body.0"], primary=primary, harmful=harmful)
    monitor.measure(model)
    regularizer = FeatureRegularizer(["body.0"], harmful=harmful, objective="kappa_log_ratio")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        with regularizer.watching(model):
            loss = (model(primary)["logits"].sum(-1) - targets).square().mean()
        (loss + regularizer.penalty(model, loss)).backward()
        optimizer.step()
    assert monitor.measure(model)["rir/body.0"] > 1.5


def test_mistakes_are_told(model: Tokens) -> None:
    x = tokens(0)
    with pytest.raises(ValueError, match=r"got 'body\.3'; did you mean body\."):
        FeatureMonitor(["body.3"], primary=x).measure(model)
    with pytest.raises(ValueError, match="got 'spare', which was not"):
        FeatureMonitor(["spare"], primary=x).measure(model)
    with pytest.raises(ValueError, match="layers must be a list of module names, got 'body'"):
        FeatureMonitor("body", primary=x)
    with pytest.raises(ValueError, match="objective must be one of condition_number"):
        FeatureRegularizer(["head"], harmful=x, objective="imma")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"of well, ill, got wel=1\.0"):
        FeatureRegularizer(["head"], harmful=x, weights={"wel": 1.0})
    with pytest.raises(ValueError, match="penalty must follow a forward pass"):
        FeatureRegularizer(["head"], harmful=x).penalty(model, torch.zeros(()))
    regularizer = FeatureRegularizer(["body.0"], harmful=[])
    with regularizer.watching(model):
        loss = model(x)["logits"].sum()
    with pytest.raises(ValueError, match="at least one batch, got none"):
        regularizer.penalty(model, loss)
