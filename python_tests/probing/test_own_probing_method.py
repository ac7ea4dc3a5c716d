"""A method and an attack of one's own: one dataclass and one line each, and all else follows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from immunize_ext.cli import main
from immunize_ext.probing import run
from immunize_ext.probing.attacks import ATTACKS, AttackCurve, label_of
from immunize_ext.probing.data import Problem, Task
from immunize_ext.probing.immunizers import METHODS, Immunized
from immunize_ext.seams import Progress

pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")


@dataclass(frozen=True)
class Stretch:
    """Stretch one feature.

    Attributes:
        factor: By how much it is stretched.
        feature: Which one.
    """

    method: ClassVar[str] = "stretch"
    knob: ClassVar[str | None] = "factor"
    grid: ClassVar[tuple[float, ...]] = (2.0, 4.0)

    factor: float = 3.0
    feature: int = 0

    def fit(
        self,
        model: torch.Tensor | None,
        problem: Problem[Task],
        *,
        progress: Progress | None = None,
        resume: Path | None = None,
    ) -> Immunized:
        p = problem.primary.num_features
        theta0 = torch.eye(p, dtype=torch.float64) if model is None else model
        theta = theta0.clone()
        theta[:, self.feature] *= self.factor
        config = {"factor": self.factor, "feature": self.feature}
        return Immunized(self.method, theta, theta0, config, [{"step": 0.0}])


@dataclass(frozen=True)
class Lazy:
    """Shrink towards the solution, slowly.

    Attributes:
        patience: Steps until half of the way is done.
    """

    name: ClassVar[str] = "lazy"
    label: ClassVar[str] = "Takes its time & <smiles>"

    patience: int = 2

    def run(
        self,
        model: torch.Tensor | None,
        target: Task,
        *,
        steps: int,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> AttackCurve:
        theta = torch.eye(target.num_features, dtype=torch.float64) if model is None else model
        best = torch.linalg.lstsq(target.x_train @ theta, target.y_train[:, None]).solution
        losses = []
        for step in range(steps + 1):
            head = best * (1.0 - 0.5 ** (step / self.patience))
            residual = (target.x_test @ theta @ head)[:, 0] - target.y_test
            losses.append(float(residual.square().mean()))
        config = {"patience": self.patience}
        return AttackCurve(
            self.name, target.name, list(range(steps + 1)), {"test_loss": losses}, config=config
        )


@pytest.fixture
def registered() -> Iterator[None]:
    """Both in their registries, and out of them again."""
    METHODS.register(Stretch)
    ATTACKS.register(Lazy)
    yield
    for registry, name in ((METHODS, "stretch"), (ATTACKS, "lazy")):
        registry._found.pop(name)  # type: ignore[attr-defined]


@pytest.fixture
def features(tmp_path: Path) -> list[str]:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(150, 4)) * np.array([3.0, 2.0, 1.0, 0.5])
    y = np.repeat([0, 1, 2], 50)
    x[y == 1] += 1.0
    x[y == 2, 1] -= 2.0
    np.savez(tmp_path / "features.npz", x=x, y=y)
    return ["--data", str(tmp_path / "features.npz"), "--primary", "0:1", "--harmful", "0:2"]


@pytest.mark.usefixtures("registered")
def test_both_stand_in_the_registries_with_their_settings() -> None:
    assert METHODS.all_settings()["factor"] == ["stretch"]
    assert ATTACKS.all_settings()["patience"] == ["lazy"]
    assert label_of(ATTACKS["lazy"]) == "Takes its time & <smiles>"


@pytest.mark.usefixtures("registered")
def test_run_and_results(features: list[str]) -> None:
    settings = run.RunSettings(
        data=features[1],
        primary="0:1",
        harmful=("0:2",),
        method="stretch",
        settings={"factor": 5.0},
        attacks=("lazy",),
        attack_settings={"lazy": {"patience": 4}},
        base_budget=40,
        limit=4.0,
    )
    results = run.run(settings).results()
    assert (results["method"], results["method_label"]) == ("stretch", "stretch")
    assert results["knob"] == {"name": "factor", "value": 5.0}
    assert results["config"] == {"factor": 5.0, "feature": 0}
    assert results["attackers"]["lazy"] == {"label": Lazy.label, "sees_theta": True}
    # Whoever solves for the head is not slowed, however lazily.
    assert results["slowdown"]["harmful"]["lazy"] == 1.0
    assert set(results["attacks"]["primary"]["lazy"]["curves"]) == {"without", "with"}
    assert "lazy" in results["worst_case"]["harmful"]["iterative_attackers"].values()


@pytest.mark.usefixtures("registered")
def test_what_is_wrong_is_said_before_the_run(features: list[str]) -> None:
    def refused(**more: Any) -> str:
        settings = run.RunSettings(data=features[1], primary="0:1", harmful=("0:2",), **more)
        with pytest.raises(ValueError, match=r"\w") as caught:
            run.run(settings, progress=lambda text, share: pytest.fail(text))
        return str(caught.value)

    assert "did you mean factor" in refused(method="stretch", settings={"facter": 1})
    assert "factor must be" in refused(method="stretch", settings={"factor": "much"})
    assert "did you mean patience" in refused(
        attacks=("lazy",), attack_settings={"lazy": {"patient": 1}}
    )
    assert "must be run to have settings" in refused(attack_settings={"lazy": {"patience": 1}})
    assert "cannot" in refused(data_dir=None, loss="logistic", attacks=("lazy",))


@pytest.mark.usefixtures("registered")
def test_flags_help_yaml_and_page(
    features: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kappa", "--method", "stretch", "--attacks", "lazy", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--factor X" in text
    assert "By how much it is stretched" in text
    assert "--lazy.patience N" in text
    assert "Steps until half of the way is done" in text
    config = tmp_path / "run.yaml"
    config.write_text("method: stretch\nfactor: 7\nfeature: 1\nlazy:\n  patience: 3\n")
    command = ["kappa", "--config", str(config), *features, "--factor", "2.5", "--quiet"]
    command += ["--attacks", "lazy", "--base-budget", "30", "--limit", "4"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    assert Lazy.label in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["config"] == {"factor": 2.5, "feature": 1}
    assert results["request"]["attack_settings"] == {"lazy": {"patience": 3}}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Takes its time &amp; &lt;smiles&gt;" in page
    assert "<smiles>" not in page
    attacked = ["attack", str(tmp_path / "run"), "--attacks", "lazy", "--lazy.patience", "9"]
    assert main([*attacked, "--quiet"]) == 0
    added = json.loads((tmp_path / "run" / "attacks" / "001.json").read_text())
    assert added["attackers"]["lazy"]["label"] == Lazy.label


@pytest.mark.usefixtures("registered")
def test_sweep_over_the_knob(features: list[str], tmp_path: Path) -> None:
    settings = run.SweepSettings(
        data=features[1], pairs=("0:1/0:2",), methods=("stretch",), frontier=True
    )
    found = run.sweep(settings, tmp_path / "sweep")
    assert set(found.results()["methods"]) == {"stretch, factor = 2", "stretch, factor = 4"}
