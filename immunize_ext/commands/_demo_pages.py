"""The run directory of the demo: both jobs of the package in one report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from immunize_ext.probing.plots import draw_svg
from immunize_ext.probing.report import render_body
from immunize_ext.report.page import document
from immunize_ext.storage import run_directory, write_json, write_json_lines
from immunize_ext.text_to_image.plots import draw_curves_png
from immunize_ext.text_to_image.report import ATTACK_LABELS, page_body
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
    assert mima.evaluation is not None  # digits have a judge
    kappa_results: dict[str, Any] = {**kappa.evaluation.results(), **kappa.extra()}
    mima_results = results_of(mima)
    first = page_body(mima.evaluation, mima_results, methods=mima_results["mima"]["methods"])
    second = render_body(kappa.evaluation, kappa_results, draw_svg(kappa.evaluation))
    body = f"""<nav><p>Two jobs, two measurements: <a href="#text-to-image">a text-to-image model
that is hard to teach erased concepts again</a>, and <a href="#features">features from which one
task is slow to learn while another stays fast</a>.</p></nav>
<div id="text-to-image">{first}</div>
<hr>
<div id="features">{second}</div>"""
    with run_directory(target, force=force) as folder:
        mima.immunized.save(folder / "pipeline")
        kappa.evaluation.immunized.save(folder / "immunized.safetensors")
        (folder / "curves.png").write_bytes(draw_curves_png(mima.evaluation, ATTACK_LABELS))
        page = document("Two immunizations, attacked", body)
        (folder / "report.html").write_text(page, encoding="utf-8")
        write_json_lines(folder / "metrics.jsonl", kappa.evaluation.metrics())
        write_json(
            folder / "results.json",
            {
                "kind": "demo",
                "kappa": kappa_results,
                "mima": mima_results["mima"],
                "mima_run": {k: v for k, v in mima_results.items() if k != "mima"},
                "seconds": {
                    "kappa": kappa.seconds["total"],
                    "mima": mima.seconds["total"],
                    "total": kappa.seconds["total"] + mima.seconds["total"],
                },
                "environment": mima_results["environment"],
            },
        )
    return Path(target)
