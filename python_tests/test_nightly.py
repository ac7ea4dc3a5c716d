"""A small share of every part of the nightly run, and whether the parts notice what is broken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("hypothesis")
pytest.importorskip("safetensors")
ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / ".ci" / "nightly").is_dir():
    pytest.skip("the nightly run is not part of a source package", allow_module_level=True)
sys.path.insert(0, str(ROOT / ".ci"))

from nightly import flips, fuzz, page, sanitizers  # noqa: E402

from immunize_ext import ops  # noqa: E402


@pytest.mark.parametrize("operator", fuzz.OPERATORS)
def test_fuzzed_operators_are_right(operator: str) -> None:
    found = fuzz.fuzz(operator, 12, start=1)
    assert found.tried >= 12
    assert found.lost == 0, found.losses


def test_fuzz_notices_a_wrong_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.extremal_singular_values

    def wrong(a: torch.Tensor, **options: object) -> object:
        found = right(a, **options)
        return found._replace(sigma_min=found.sigma_min * (1 + 1e-6))

    monkeypatch.setattr(ops, "extremal_singular_values", wrong)
    found = fuzz.fuzz("extremal_singular_values", 12, start=1)
    assert found.lost > 0
    assert "smallest" in found.losses[0]


@pytest.mark.parametrize("kind", flips.KINDS)
def test_flipped_bits_are_refused_or_harmless(kind: str, tmp_path: Path) -> None:
    if "image" in kind or "concepts" in kind:
        pytest.importorskip("PIL")
    found = flips.flips(kind, 10, 1, tmp_path)
    assert found.tried == 10
    assert found.lost == 0, found.losses


def test_a_flip_that_passes_is_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """YAML has no checksum: taken for a file that has, some flip is another number."""
    plain = flips.KINDS["settings (YAML)"]
    monkeypatch.setitem(flips.KINDS, "sealed", flips.Kind(plain.make, plain.read, ours=True))
    assert flips.flips("sealed", 60, 1, tmp_path).lost > 0


@pytest.mark.slow
def test_a_command_that_is_killed_is_gone_on_from(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    counts = tmp_path / "counts.json"
    command = [sys.executable, "-W", "ignore", "-m", "nightly", "kills", "--only", "kappa"]
    done = subprocess.run(
        [*command, "--trials", "2", "--seed", "1", "--out", str(counts)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(counts.read_text())["kills"]["counts"]["kappa"]["tried"] == 2


def environment() -> dict[str, str]:
    """With the nightly run, and this checkout, on the path."""
    import os

    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / '.ci'}"}


def test_reports_of_sanitizers_are_found() -> None:
    said = (
        "csrc/cpu/merge.cpp:12:3: runtime error: signed integer overflow: 2147483647 + 1\n"
        "==12==ERROR: AddressSanitizer: heap-buffer-overflow on address 0x6020 at pc 0x7f\n"
    )
    first, second = sanitizers.REPORT.findall(said)
    assert first.endswith("signed integer overflow: 2147483647 + 1")
    assert second.startswith("ERROR: AddressSanitizer: heap-buffer-overflow")


def test_the_page_is_what_the_counts_say() -> None:
    record = json.loads(page.RECORD.read_text(encoding="utf-8"))
    assert page.PAGE.read_text(encoding="utf-8") == page.page(record)
    assert sum(c["tried"] for c in record["fuzz"]["counts"].values()) >= 20_000
    for part in page.PARTS:
        for name, count in record.get(part, {"counts": {}})["counts"].items():
            assert count["lost"] == len(count["losses"]) == 0, name
