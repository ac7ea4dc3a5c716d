"""What an immunizer hands back, and its file."""

from pathlib import Path

import pytest
import torch

from immunize_ext.ops import RegularizationFactor
from immunize_ext.probing.immunizers import Immunized


def make() -> Immunized:
    return Immunized(
        method="closed_form",
        theta=torch.randn(3, 3, dtype=torch.float64),
        theta0=torch.eye(3, dtype=torch.float64),
        config={"strength": 3.0, "seed": 1, "rotate": True, "name": "x", "nothing": None},
        history=[{"step": 0.0, "log_rir": 0.0}],
    )


def test_round_trip(tmp_path: Path) -> None:
    immunized = make()
    immunized.save(tmp_path / "immunized.safetensors")
    again = Immunized.load(tmp_path / "immunized.safetensors")
    assert torch.equal(again.theta, immunized.theta)
    assert torch.equal(again.theta0, immunized.theta0)
    assert (again.method, again.config, again.history) == (
        immunized.method,
        immunized.config,
        immunized.history,
    )


def test_it_says_in_a_line_what_it_is() -> None:
    text = repr(make())
    assert text.startswith("Immunized('closed_form', theta (3, 3), 1 records, {'strength': 3.0")
    assert "tensor" not in text


def test_features_keep_the_dtype_and_the_batch() -> None:
    x = torch.randn(2, 5, 3)
    features = make().features(x)
    assert features.shape == (2, 5, 3)
    assert features.dtype == torch.float32


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Immunized.load(tmp_path / "none.safetensors")
    # A pickle is refused without being opened as one; so is a checkpoint of another kind.
    torch.save({"theta": torch.eye(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="must name a safetensors file"):
        Immunized.load(tmp_path / "other.pt")
    RegularizationFactor.identity(3).save(tmp_path / "factor.safetensors")
    with pytest.raises(ValueError, match=r"must hold .*Immunized/1, got .*Factor/1"):
        Immunized.load(tmp_path / "factor.safetensors")


def test_a_save_that_fails_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "immunized.safetensors"
    make().save(target)
    before = target.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        make().save(target)
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]
