"""`immunize merge-adapters`: the same as the functions it calls, and one line where it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sample_inputs import gaussian

from immunize_ext.cli import main
from immunize_ext.ops import (
    InputMoments,
    LayerMoments,
    LoraLayer,
    factor_layers,
    merge_lora_adapters,
    read_lora,
    write_lora,
)

pytest.importorskip("safetensors")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two adapters, one of each library, and moments of the inputs under the model's own names."""
    monkeypatch.chdir(tmp_path)
    for n, form in enumerate(("peft", "diffusers")):
        layers = {
            f"unet.{name}": LoraLayer(
                gaussian(4, 2, seed=n).float(), gaussian(2, 3, seed=5 + n).float()
            )
            for name in ("a", "b")
        }
        write_lora(layers, tmp_path / form, format=form)  # type: ignore[arg-type]
        h = gaussian(9, 3, seed=10 + n)
        shared = InputMoments(h.mT @ h, 9)
        LayerMoments({"a": shared, "b": shared}).save(tmp_path / f"{n}.safetensors")
    return tmp_path


def merged_by_hand(files: Path, **options: object) -> dict[str, LoraLayer]:
    adapters = [read_lora(files / form) for form in ("peft", "diffusers")]
    return merge_lora_adapters(adapters, **options)  # type: ignore[arg-type]


def assert_same(found: dict[str, LoraLayer], truth: dict[str, LoraLayer]) -> None:
    assert set(found) == set(truth)
    for name, layer in truth.items():
        assert torch.equal(found[name].up, layer.up)
        assert torch.equal(found[name].down, layer.down)


def test_by_their_mean(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["merge-adapters", "peft", "diffusers", "--out", "merged", "--weights", "1", "3"]) == 0
    )
    said = capsys.readouterr().out
    assert "2 adapters merged by their mean: 2 layers, rank 4" in said
    assert_same(read_lora(files / "merged"), merged_by_hand(files, weights=[1.0, 3.0]))


def test_by_moments(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["merge-adapters", "peft", "diffusers", "--out", "merged", "--format", "peft"]
    command += ["--moments", "0.safetensors", "1.safetensors", "--regularization", "0.safetensors"]
    assert main([*command, "--ridge", "0.1", "--rank", "3"]) == 0
    assert "by the moments of their inputs: 2 layers, rank 3" in capsys.readouterr().out
    moments = [LayerMoments.load(files / f"{n}.safetensors") for n in range(2)]
    factors = factor_layers(moments, regularization=moments[0], ridge=0.1)
    named = {f"unet.{name}": factor for name, factor in factors.items()}
    assert_same(read_lora(files / "merged"), merged_by_hand(files, factors=named, rank=3))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "required: ADAPTER; see immunize merge-adapters --help"),
        (("peft", "nothing"), "nothing must be a safetensors file or a folder"),
        (("peft", "diffusers", "--weights", "1"), "--weights must be given once an adapter, 2"),
        (("peft", "--moments", "0.safetensors", "1.safetensors"), "--moments must be given once"),
        (("peft", "--ridge", "1"), "must be given with --moments"),
        (("peft", "--weights", "0"), "weights must be 1 positive numbers"),
        (("peft", "--rank", "0"), "rank must be at least 1, got 0"),
        (("peft", "--out", "diffusers"), "diffusers exists; choose another folder"),
        (("peft", "--moments", "peft"), "peft"),
    ],
)
def test_refusals(
    files: Path, arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(files.rglob("*"))
    assert main(["merge-adapters", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("immunize")
    assert words in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""
    assert sorted(files.rglob("*")) == before
