"""docs/backbones.md comes from its result file, and says what that holds."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
backbones = pytest.importorskip("benchmarks.backbones")

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "backbones.md"


def results() -> dict[str, Any]:
    file = ROOT / "benchmarks" / "results" / backbones.FILE
    return json.loads(file.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def test_page_is_what_the_result_file_says() -> None:
    assert backbones.page(results()) == PAGE.read_text(encoding="utf-8")
    changed = copy.deepcopy(results())
    changed["families"]["FLUX"]["seeds"][0]["erasure"]["edited"] += 0.1
    assert backbones.page(changed) != PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("family", ["SDXL", "SD3", "FLUX"])
def test_what_the_page_claims(family: str) -> None:
    for seed in results()["families"][family]["seeds"]:
        steps, merges = seed["erasure"], seed["merges"]
        # The vector tells what the tokens no longer do; edited too, little is left.
        assert steps["tokens"] > 0.4 * steps["before"]
        assert steps["edited"] < 0.25 * steps["before"]
        assert merges["exact"]["constraints"] < 1e-12
        for kind in ("modulated", "propagated"):
            if kind in merges and "moments" in merges[kind]:
                assert merges[kind]["moments"] < merges[kind]["mean"]


def test_a_model_is_measured() -> None:
    model = backbones.TextToImage(backbones.tiny_flux_pipeline(0))
    found = backbones.classes(model)
    assert found["entrances"] == {"pooled": 1, "context": 1}
    assert sum(found[kind] for kind in (*backbones.CLASSES, "none")) == sum(
        type(module).__name__ == "Linear" for module in model.unet.modules()
    )
