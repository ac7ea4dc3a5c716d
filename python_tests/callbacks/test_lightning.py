"""Lightning's callback: on Lightning where it is installed, and on what it asks of it elsewhere."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import pytest

# Lightning as far as the callback knows it.
STUB = """
import sys, types
import torch
from immunize_ext.callbacks import FeatureMonitor

if STUBBED:
    pytorch = types.ModuleType("lightning.pytorch")
    pytorch.Callback = object
    package = types.ModuleType("lightning")
    package.pytorch = pytorch
    sys.modules.update({"lightning": package, "lightning.pytorch": pytorch})
from immunize_ext.callbacks.lightning import KappaCallback

x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
monitor = FeatureMonitor(["body"], primary=x, harmful=x * torch.tensor([1.0, 2.0, 3.0]))
"""

BY_HAND = """
class Logger:
    def log_metrics(self, found, step): seen.append((step, sorted(found)))
class Trainer:
    global_step, loggers = 0, [Logger()]
class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(3, 2)
    def forward(self, x): return self.body(x)
    def log_dict(self, found, batch_size): seen.append((Trainer.global_step, sorted(found)))
seen, trainer, module = [], Trainer(), Module()
callback = KappaCallback(monitor, every=2)
callback.on_train_start(trainer, module)
for step in (0, 1, 2, 2, 3, 4):  # the batches of step 2 are accumulated
    Trainer.global_step = step
    callback.on_train_batch_end(trainer, module, None, None, 0)
names = ["log_kappa_harmful/body", "log_kappa_primary/body", "rir/body"]
assert seen == [(step, names) for step in (0, 2, 4)], seen
try:
    KappaCallback(monitor, every=0)
except ValueError as error:
    assert "every must be at least 1" in str(error)
else:
    raise AssertionError
"""

REAL = """
import logging, lightning.pytorch as pl
from immunize_ext.callbacks import FeatureRegularizer
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)
        self.regularizer = FeatureRegularizer(["body"], harmful=x, objective="kappa_log_ratio")
    def forward(self, x): return self.head(self.body(x))
    def training_step(self, batch, _):
        with self.regularizer.watching(self):
            loss = self(batch).square().mean()
        return loss + self.regularizer.penalty(self, loss)
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=0.1)

trainer = pl.Trainer(max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False,
                     enable_progress_bar=False, enable_model_summary=False,
                     callbacks=[KappaCallback(monitor, every=2)])
trainer.fit(Module(), torch.utils.data.DataLoader(list(x), batch_size=6))
found = trainer.callback_metrics
assert {"rir/body", "log_kappa_primary/body"} <= set(found), found
assert float(found["rir/body"]) != 1.0
"""


def run(stubbed: bool, code: str) -> None:
    # In a process of its own: a stub would stay, and the real one changes settings of torch.
    text = STUB.replace("STUBBED", str(stubbed)) + code
    done: Any = subprocess.run([sys.executable, "-W", "ignore", "-c", text], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_measured_at_the_start_and_at_every_so_many_steps() -> None:
    run(True, BY_HAND)


def test_inside_lightning() -> None:
    if importlib.util.find_spec("lightning") is None:
        pytest.skip("Lightning is not installed")
    run(False, REAL)
