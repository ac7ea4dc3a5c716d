"""A method and an attack of one's own: one registration line each, and they are everywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from immunize_ext.cli import main
from immunize_ext.seams import AttackCurve
from immunize_ext.text_to_image import run as runs
from immunize_ext.text_to_image.attacks import ATTACKS
from immunize_ext.text_to_image.immunizers import METHODS, ImmunizedPipeline


@dataclass(frozen=True)
class Nudge:
    """Adds noise to the last layer.

    Attributes:
        strength: Size of the noise.
        seed: Seed of it.
    """

    method: ClassVar[str] = "nudge"
    label: ClassVar[str] = "A <small> nudge"

    strength: float = 0.5
    seed: int = 0

    def fit(
        self, model: Any, problem: Any, *, progress: Any = None, resume: Any = None
    ) -> ImmunizedPipeline:
        """Add it."""
        del progress, resume
        clone = model.clone()
        bias = clone.unet.conv_out.bias
        noise = torch.randn(bias.shape, generator=torch.Generator().manual_seed(self.seed))
        with torch.no_grad():
            bias.add_(self.strength * noise)
        config = asdict(self) | {
            "concepts": list(problem.names),
            "captions": len(problem.captions),
        }
        record = {"step": 1.0, "seconds": 0.1, "merge_seconds": 0.0}
        return ImmunizedPipeline(clone, self.method, config, [record])


@dataclass(frozen=True)
class Stare:
    """Looks at the model, and learns nothing.

    Attributes:
        name: Its name.
        eyes: How many eyes it has.
    """

    name: str = "stare"
    eyes: int = 2

    def prompts(self, target: Any) -> dict[str, str]:
        """The canonical one."""
        return {concept.name: concept.prompts[0] for concept in target.concepts}

    def run(
        self,
        model: Any,
        target: Any,
        *,
        steps: int,
        seed: int = 0,
        progress: Any = None,
    ) -> AttackCurve:
        """Judge the model as it is."""
        del progress
        places = list(target.evaluate_at)
        found = [target.evaluate(model, step) for step in places]
        scores = {name: [one[name] for one in found] for name in found[0]}
        config = {"steps": steps, "seed": seed, "eyes": self.eyes, "trained_parameters": 0}
        names = "+".join(target.names)
        return AttackCurve(self.name, names, places, scores, [], 0.1, 0, config)


@pytest.fixture
def registered() -> Iterator[None]:
    METHODS.register(Nudge)
    ATTACKS.register(Stare)
    yield
    del METHODS._found["nudge"], ATTACKS._found["stare"]


@pytest.mark.usefixtures("registered")
def test_flags_help_results_and_report_follow_from_registering(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["mima", "--method", "nudge", "--attacks", "stare", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--strength" in said
    assert "Size of the noise" in said
    assert "--stare.eyes" in said
    assert "How many eyes it has (default: 2)" in said

    config = tmp_path / "run.yaml"
    config.write_text(
        "method: nudge\nattacks: [stare, lora]\nattack_settings: {stare: {eyes: 3}}\n"
    )
    out = tmp_path / "run"
    arguments = ["mima", "--config", str(config), "--strength", "0.25", "--targets", "three"]
    arguments += ["--attack-steps", "1", "--images", "2", "--sampling-steps", "1"]
    assert main([*arguments, "--out", str(out), "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "Stare" in said

    results = json.loads((out / "results.json").read_text())
    assert results["method"] == "nudge"
    assert results["method_label"] == "A <small> nudge"
    assert results["immunizer"]["strength"] == 0.25
    assert results["attacks"]["stare"] == {"label": "Stare"}
    curve = results["evaluation"]["comparisons"][0]["curves"]["immunized"][0]
    assert (curve["attack"], curve["target"], curve["config"]["eyes"]) == ("stare", "three", 3)
    assert [row["label"] for row in results["mima"]["methods"]] == [
        "A <small> nudge",
        "Plain loss ascent",
    ]
    page = (out / "report.html").read_text()
    assert "A &lt;small&gt; nudge" in page
    assert "A <small> nudge" not in page
    assert "Stare" in page

    assert main(["mima", "--method", "nudg", "--out", str(tmp_path / "no")]) == 2
    assert "did you mean nudge" in capsys.readouterr().err
    assert main([*arguments, "--strength", "much", "--out", str(tmp_path / "no")]) == 2
    assert "strength must be a finite number, got 'much'" in capsys.readouterr().err


@pytest.mark.usefixtures("registered")
def test_python_does_what_the_command_does_in_three_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seeds: list[int] = []
    fit = Nudge.fit

    def seen(self: Nudge, *args: Any, **others: Any) -> ImmunizedPipeline:
        seeds.append(self.seed)
        return fit(self, *args, **others)

    monkeypatch.setattr(Nudge, "fit", seen)
    settings = runs.RunSettings(
        method="nudge",
        settings={"strength": 0.25},
        targets=("three",),
        attacks=("stare",),
        attack_steps=1,
        images=2,
        sampling_steps=1,
        seeds=(0, 1),
    )
    found = runs.run(settings)
    assert found.results()["evaluation"]["seeds"] == seeds == [0, 1]
    assert "Stare" in found.summary()
