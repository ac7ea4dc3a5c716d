"""A saved immunized pipeline under the hands of plain diffusers and PEFT, without this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

from attack_pipelines import concept, tiny_pipeline
from immunizer_settings import SMALL, concepts

from immunize_ext.text_to_image.attacks import LoRAAttack
from immunize_ext.text_to_image.immunizers import MIMA, ImmunizedPipeline
from immunize_ext.text_to_image.model import TextToImage

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "protection" / "plain_lora.py"
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a pipeline, and what the script made of it."""
    folder = tmp_path_factory.mktemp("plain")
    MIMA(**SMALL).fit(TextToImage(tiny_pipeline()), concepts()).save(folder / "immunized")
    three = concept()
    np.save(folder / "images.npy", three.images("attack").numpy())
    saved, images, out = (str(folder / n) for n in ("immunized", "images.npy", "plain"))
    command = [sys.executable, str(SCRIPT), saved, images, three.prompts[0], out]
    subprocess.run(
        [*command, "--steps", str(STEPS), "--count", "2"],
        check=True,
        capture_output=True,
        cwd=folder,
    )
    return folder


def test_the_same_attack_gives_the_same_curve(folder: Path) -> None:
    """Loss for loss and factor for factor: the built-in attack is the plain one."""
    model = ImmunizedPipeline.load(folder / "immunized").model
    adapted = LoRAAttack().adapt(model, [concept()], steps=STEPS)
    plain = json.loads((folder / "plain" / "losses.json").read_text())
    assert plain == pytest.approx(adapted.curve.losses, rel=1e-4)
    assert len({round(loss, 6) for loss in plain}) == STEPS
    factors = torch.load(folder / "plain" / "lora.pt", weights_only=True)
    assert {f"unet.{name}" for name in factors} == set(adapted.weights)
    for name, factor in factors.items():
        torch.testing.assert_close(factor, adapted.weights[f"unet.{name}"], rtol=1e-2, atol=1e-4)


def test_it_draws_without_us(folder: Path) -> None:
    drawn = np.load(folder / "plain" / "images.npy")
    assert drawn.shape == (2, 8, 8, 3)
    assert np.isfinite(drawn).all()
    assert drawn.std() > 0.0
