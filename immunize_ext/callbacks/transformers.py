"""For ``transformers.Trainer``: kappa in the log, and the regularizer in the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from immunize_ext._extras import require_extra
from immunize_ext.callbacks.features import FeatureMonitor, FeatureRegularizer

_transformers: Any = require_extra("transformers", extra="training", purpose="KappaCallback")


class KappaCallback(_transformers.TrainerCallback):
    """Measure a model's features before the first step and after every so many.

    Args:
        monitor: What is measured.
        every: Optimizer steps between two measurements.
        log: What takes the numbers: ``trainer.log``, which writes to every tracker of the run. When
            omitted they stand in ``trainer.state.log_history`` alone.

    Raises:
        ValueError: If ``every`` is below 1.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> monitor = FeatureMonitor(["body"], primary=torch.randn(20, 3))
        >>> callback = KappaCallback(monitor, every=50)  # Trainer(..., callbacks=[callback])
        >>> callback.every
        50
    """

    def __init__(
        self,
        monitor: FeatureMonitor,
        *,
        every: int = 100,
        log: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"KappaCallback: every must be at least 1 step, got {every}")
        self.monitor = monitor
        self.every = every
        self.log = log

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the model as it comes; a run that is resumed compares with where it went on."""
        self._measure(state, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure where it is time."""
        if state.global_step % self.every == 0:
            self._measure(state, kwargs["model"])

    def _measure(self, state: Any, model: nn.Module) -> None:
        found = self.monitor.measure(model)  # by all processes: weights may be spread over them
        if self.log is not None:
            self.log(found)
        else:
            epoch = state.epoch or 0.0
            state.log_history.append({**found, "epoch": epoch, "step": state.global_step})


class ImmunizingTrainerMixin:
    """Adds a :class:`~immunize_ext.callbacks.FeatureRegularizer` to the loss of a Trainer.

    Stands before the Trainer: ``class MyTrainer(ImmunizingTrainerMixin, Trainer)``. Evaluation and
    prediction see the loss as it is.

    Args:
        *args: As the Trainer takes them.
        immunization: The term; without it the Trainer is as it was.
        **kwargs: As the Trainer takes them.

    Example:
        >>> from transformers import Trainer
        >>> class MyTrainer(ImmunizingTrainerMixin, Trainer):
        ...     pass
        >>> MyTrainer.compute_loss is ImmunizingTrainerMixin.compute_loss
        True
    """

    def __init__(
        self, *args: Any, immunization: FeatureRegularizer | None = None, **kwargs: Any
    ) -> None:
        self.immunization = immunization
        super().__init__(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The Trainer's loss, and while it trains the term beside it."""
        trainer: Any = super()
        about = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        if self.immunization is None or not model.training:
            return trainer.compute_loss(model, inputs, **about)
        with self.immunization.watching(model):
            found = trainer.compute_loss(model, inputs, **about)
        loss = found[0] if return_outputs else found
        scale = self._share_of_a_step(num_items_in_batch)
        loss = loss + self.immunization.penalty(model, loss, scale=scale)
        return (loss, *found[1:]) if return_outputs else loss

    def _share_of_a_step(self, num_items_in_batch: Any) -> float:
        """What the term is divided by here, because the Trainer will not do it.

        Where batches are accumulated, a loss that is a mean over all of them already (counted by
        ``num_items_in_batch``) is taken as it is, any other is divided by their number.
        """
        trainer: Any = self
        whole = getattr(trainer, "loss_is_scaled_for_ga", None)
        if whole is None:
            counted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
            whole = counted or trainer.compute_loss_func is not None
        usual = trainer.args.gradient_accumulation_steps
        steps = getattr(trainer, "current_gradient_accumulation_steps", usual)
        return 1.0 / steps if whole else 1.0
