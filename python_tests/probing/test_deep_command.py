"""``immunize deep`` from end to end: several harms, a corridor, attackers, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from immunize_ext.cli import main
from immunize_ext.probing import deep_run
from immunize_ext.probing.extractors import FeatureExtractor, Preprocessing, load_backbone
from immunize_ext.probing.extractors.feature_extractor import select_blocks
from immunize_ext.probing.immunizers import ImmunizedExtractor

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")


def small(name: str = "", *, pretrained: bool = True, **options: Any) -> FeatureExtractor:
    """A network of two blocks in the place of a backbone."""
    del name, pretrained, options
    generator = torch.Generator().manual_seed(0)
    body = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU()),
        nn.Sequential(nn.Conv2d(6, 8, 3, stride=2), nn.Tanh()),
    )
    for parameter in body.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3.0)
    return FeatureExtractor(body, name="small", preprocessing=Preprocessing(224)).eval()


@pytest.fixture(autouse=True)
def backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep_run, "load_backbone", small)


QUICK = ["--side", "16", "--max-images", "20", "--steps", "4", "--attack-steps", "3", "--quiet"]


def test_a_run_with_a_corridor_and_several_harms(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep"
    flags = ["--harmful", "5:6", "7:8", "--weighting", "cvar", "--corridor", "1", "1e6"]
    flags += ["--attacks", "head", "lora", "--batch-size", "40", "--seed", "3"]
    assert main(["deep", *flags, *QUICK, "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert set(results["harms"]) == {"5:6", "7:8"}
    growth = [one["log_kappa_growth"] for one in results["harms"].values()]
    assert results["least_log_kappa_growth"] == min(growth)
    assert results["mean_log_kappa_growth"] == pytest.approx(sum(growth) / 2.0)
    assert set(results["harms"]["5:6"]["accuracy"]) == {"head", "lora"}
    assert results["in_corridor"] == 1.0
    assert (results["config"]["weighting"], results["config"]["seed"]) == ("cvar", 3)
    said = capsys.readouterr().out
    assert said.index("growth of log kappa") < said.index("in its corridor: 100.0%")
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 4
    assert {r["weight_1"] for r in records} == {0.0, 1.0} or {r["weight_1"] for r in records} <= {
        0.0,
        1.0,
    }
    loaded = ImmunizedExtractor.load(out / "immunized.safetensors", small())
    assert loaded.blocks == ["1"]
    # It is no run of features: who attacks or compares those says so.
    assert main(["attack", str(out)]) == 2
    assert "must be of kind" in capsys.readouterr().err


def test_a_folder_of_images_and_named_blocks(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    for number, name in enumerate(("a", "b", "c", "d")):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for index in range(8):
            pillow.new("RGB", (20, 18), (60 * number, 30 * index, 90)).save(folder / f"{index}.png")
    flags = ["--data", str(tmp_path / "images"), "--primary", "0:1", "--harmful", "2:3"]
    flags += ["--blocks", "0", "1", "--batch-size", "6", "--attacks", "full"]
    assert main(["deep", *flags, *QUICK, "--out", str(tmp_path / "deep")]) == 0
    results = json.loads((tmp_path / "deep" / "results.json").read_text())
    assert results["config"]["blocks"] == ["0", "1"]
    assert list(results["harms"]["2:3"]["accuracy"]) == ["full"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--primary", "4"], "must have two sides or more, got '4'"),
        (["--weighting", "worst"], "--weighting must be"),
        (["--corridor", "5", "2"], "corridor"),
        (["--attacks", "nobody"], "--attacks must be"),
        (["--harmful", "5:12"], "must name classes that the data has, 0 to 9, got 12"),
        (["--side", "0"], "side, max_images and attack_steps must be at least 1"),
        (["--harmful", "5:6", "7:8", "6:5"], "harmful must hold each task once, got 6:5 again"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["deep", *QUICK, *flags, "--out", str(tmp_path / "deep")]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert not (tmp_path / "deep").exists()


def test_an_existing_folder_is_refused_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(deep_run, "load_backbone", never)
    (tmp_path / "something").touch()
    with pytest.raises(FileExistsError):
        deep_run.run(deep_run.DeepRunSettings(), tmp_path)


def test_a_lost_task_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A head that hardly trains answers by chance, where ridge regression does not."""
    flags = ["--learning-rate", "1e-7", "--attacks", "head", "--max-images", "60"]
    assert main(["deep", *QUICK, *flags, "--out", str(tmp_path / "deep")]) == 0
    results = json.loads((tmp_path / "deep" / "results.json").read_text())
    assert results["kept_before"] > 0.6 > results["kept"] + deep_run.MOST_LOST
    (warning,) = results["warnings"]
    assert f"warning: {warning}" in capsys.readouterr().out
    run = deep_run.DeepRun(deep_run.DeepRunSettings(), None, {}, 0.0, 0.9, 0.93, 0.0)  # type: ignore[arg-type]
    assert run.warnings == []


# Fewer images than features, for speed.
@pytest.mark.filterwarnings("ignore::immunize_ext.errors.NumericalWarning")
def test_random_weights_of_a_deep_network_have_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the batch norms that a fresh network has they vanish, and R_ill after one step."""
    monkeypatch.setattr(deep_run, "load_backbone", load_backbone)
    flags = ["--no-pretrained", "--max-images", "8", "--steps", "3", "--batch-size", "20"]
    flags += ["--attacks", "head", "--attack-steps", "1", "--quiet"]
    assert main(["deep", *flags, "--out", str(tmp_path / "deep")]) == 0
    results = json.loads((tmp_path / "deep" / "results.json").read_text())
    assert results["config"]["steps"] == 3
    norm = nn.BatchNorm1d(2)
    images = 3.0 + 5.0 * torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    deep_run._calibrate(norm, images)
    torch.testing.assert_close(norm.running_mean, images.mean(0))
    torch.testing.assert_close(norm.running_var, images.var(0))
    assert (norm.momentum, norm.training) == (0.1, False)


def test_a_module_named_by_a_number_is_a_pattern() -> None:
    immunizers = [deep_run.DeepRunSettings(blocks=(b,)).immunizer() for b in ("1", "[1]")]
    assert [one.blocks for one in immunizers] == [1, ("[1]",)]
    assert select_blocks(small(), ["[0]"]) == ["0"]
