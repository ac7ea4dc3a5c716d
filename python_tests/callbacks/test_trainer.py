"""Inside transformers' Trainer: what is logged, and what is added to the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers

from immunize_ext.callbacks import FeatureMonitor, FeatureRegularizer
from immunize_ext.callbacks.transformers import ImmunizingTrainerMixin, KappaCallback


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = self.head(self.body(x))[:, 0]
        return {"loss": (out - labels).square().mean(), "logits": out}


class Counting(Model):
    """Its loss is a share of one over all batches that are accumulated."""

    def forward(  # type: ignore[override]
        self, x: Tensor, labels: Tensor, num_items_in_batch: Any = None, **_: Any
    ) -> dict[str, Tensor]:
        found = super().forward(x, labels)
        if num_items_in_batch is not None:
            found["loss"] = found["loss"] * len(x) / num_items_in_batch
        return found


class Trainer(ImmunizingTrainerMixin, transformers.Trainer):
    pass


X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
Z = X.flip(-1) * torch.tensor([1.0, 2.0, 3.0, 4.0])
DATA = [{"x": x, "labels": x.sum()} for x in X]


def trained(
    folder: Path,
    *,
    counted: bool = False,
    batches: int = 1,
    every: int = 2,
    log: bool = False,
    immunization: FeatureRegularizer | None = None,
) -> Any:
    torch.manual_seed(0)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=8 // batches,
        gradient_accumulation_steps=batches,
        learning_rate=0.1,
        max_grad_norm=0.0,
        optim="sgd",
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    monitor = FeatureMonitor(["body"], primary={"x": X, "labels": X[:, 0]}, harmful=(Z, Z[:, 0]))
    trainer = Trainer(
        model=Counting() if counted else Model(),
        args=arguments,
        train_dataset=DATA,
        immunization=immunization,
    )
    trainer.add_callback(KappaCallback(monitor, every=every, log=trainer.log if log else None))
    trainer.train()
    return trainer


@pytest.mark.parametrize("log", [True, False])
def test_kappa_stands_in_the_log(tmp_path: Path, log: bool) -> None:
    trainer = trained(tmp_path, log=log)
    rows = [row for row in trainer.state.log_history if "rir/body" in row]
    assert [row["step"] for row in rows] == [0, 2]
    assert rows[0]["rir/body"] == 1.0 != rows[1]["rir/body"]
    assert set(rows[0]) >= {"log_kappa_primary/body", "log_kappa_harmful/body"}
    assert any("loss" in row for row in trainer.state.log_history)


def regularizer() -> FeatureRegularizer:
    weights = {"well": 1e-3, "ill": 10.0}
    return FeatureRegularizer(["body"], harmful={"x": Z, "labels": Z[:, 0]}, weights=weights)


def test_one_step_is_that_of_the_sum(tmp_path: Path) -> None:
    """Against the same step by hand; evaluation sees the plain loss."""
    trainer = trained(tmp_path, immunization=regularizer())
    plain = trained(tmp_path)
    assert not torch.equal(trainer.model.body.weight, plain.model.body.weight)
    inputs = {"x": X[:8], "labels": X[:8].sum(-1)}
    model = trainer.model.train()
    by_hand = regularizer()
    with by_hand.watching(model):
        loss = model(**inputs)["loss"]
    expected = loss + by_hand.penalty(model, loss)
    torch.testing.assert_close(trainer.compute_loss(model, dict(inputs)), expected)
    with_outputs = trainer.compute_loss(model, dict(inputs), return_outputs=True)
    torch.testing.assert_close(with_outputs[0], expected)
    assert with_outputs[1]["logits"].shape == (8,)
    torch.testing.assert_close(trainer.compute_loss(model.eval(), dict(inputs)), loss)


@pytest.mark.parametrize("counted", [True, False])
def test_accumulated_batches_weigh_as_one(tmp_path: Path, counted: bool) -> None:
    """R_ill alone depends on no training batch: its share must not grow with their number."""

    def ill() -> FeatureRegularizer:
        return FeatureRegularizer(
            ["body"], harmful=(Z, Z[:, 0]), objective="r_ill", weights={"ill": 1e3}
        )

    one, two = (
        trained(tmp_path, counted=counted, batches=batches, immunization=ill()).model
        for batches in (1, 2)
    )
    torch.testing.assert_close(one.body.weight, two.body.weight, rtol=1e-4, atol=1e-5)
    plain = trained(tmp_path, counted=counted).model
    assert (plain.body.weight - one.body.weight).abs().max() > 1e-3


def test_steps_are_counted_from_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every must be at least 1 step, got 0"):
        trained(tmp_path, every=0)
