"""The run directory of the demo: both jobs of the package in one report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from immunize_ext import report
from immunize_ext.storage import run_directory, write_json, write_json_lines
from immunize_ext.text_to_image.run import TextToImageRun
from immunize_ext.text_to_image.tmp_config import TextToImageConfig
from immunize_ext.text_to_image.tmp_results import results_of

if TYPE_CHECKING:
    from immunize_ext.demo import DemoResult


def mima_config(seed: int) -> TextToImageConfig:
    """The text-to-image half: three erased digits, LoRA and full fine-tuning, one seed."""
    return TextToImageConfig(seeds=(seed,), images=16, new_word=None)


def write(kappa: DemoResult, mima: TextToImageRun, target: str, *, force: bool) -> Path:
    """Write the run directory: all of it or nothing.

    Args:
        kappa: The condition-number half.
        mima: The text-to-image half.
        target: The folder.
        force: Whether an existing run directory is replaced.

    Returns:
        The folder.

    Raises:
        FileExistsError: If it exists and ``force`` is not given, or is no run directory.
    """
    kappa_results = {"kind": "kappa", **kappa.evaluation.results(), **kappa.extra()}
    mima_results = results_of(mima)
    results: dict[str, Any] = {
        "schema": 2,
        "kind": "demo",
        "kappa": kappa_results,
        "mima": mima_results,
        "seconds": {
            "kappa": kappa.seconds["total"],
            "mima": mima.seconds["total"],
            "total": kappa.seconds["total"] + mima.seconds["total"],
        },
        "environment": mima_results["environment"],
    }
    with run_directory(target, force=force) as folder:
        mima.immunized.save(folder / "pipeline")
        kappa.evaluation.immunized.save(folder / "immunized.safetensors")
        report.write(results, folder)
        write_json_lines(folder / "metrics.jsonl", kappa.evaluation.metrics())
        write_json(folder / "results.json", results)
    return Path(target)
