"""For Lightning: kappa in the log.

The regularizer is added where the loss is made:

def training_step(self, batch, _):
with self.regularizer.watching(self):
loss = ...
return loss + self.regularizer.penalty(self, loss)
"""

from __future__ import annotations

from typing import Any

from immunize_ext._extras import require_extra
from immunize_ext.callbacks.features import FeatureMonitor

_lightning: Any = require_extra("lightning.pytorch", extra="training", purpose="KappaCallback")


class KappaCallback(_lightning.Callback):
    """Measure a module's features before the first step and after every so many.

    The numbers go to the loggers, and to the trainer's ``callback_metrics``, by which checkpoints
    and early stopping can be chosen.

    Args:
        monitor: What is measured.
        every: Optimizer steps between two measurements.

    Raises:
        ValueError: If ``every`` is below 1.
    """

    def __init__(self, monitor: FeatureMonitor, *, every: int = 100) -> None:
        if every < 1:
            raise ValueError(f"KappaCallback: every must be at least 1 step, got {every}")
        self.monitor = monitor
        self.every = every
        self._measured = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Measure the module as it comes."""
        found = self.monitor.measure(pl_module)
        self._measured = trainer.global_step
        for logger in trainer.loggers:  # self.log waits for the end of an epoch here
            logger.log_metrics(found, step=trainer.global_step)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure where it is time; batches of one optimizer step count once."""
        step = trainer.global_step
        if step % self.every == 0 and step != self._measured:
            self._measured = step
            pl_module.log_dict(self.monitor.measure(pl_module), batch_size=1)
