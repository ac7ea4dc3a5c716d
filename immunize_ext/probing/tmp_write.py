"""One report per run: measurements, plots and a page that anyone can read.

Importable without matplotlib; only drawing needs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from immunize_ext.probing.evaluation import ATTACKER_NAMES, Evaluation, evaluate
from immunize_ext.report import write
from immunize_ext.storage import (
    check_target,
    environment,
    run_directory,
    write_json,
    write_json_lines,
)

__all__ = [
    "ATTACKER_NAMES",
    "Evaluation",
    "check_target",
    "environment",
    "evaluate",
    "run_directory",
    "write_run",
]


def write_run(
    evaluation: Evaluation,
    target: str | Path,
    *,
    force: bool = False,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write a run directory: all of it or nothing.

    It holds ``results.json``, ``metrics.jsonl``, ``immunized.safetensors`` (read it with
    :meth:`immunize_ext.probing.immunizers.Immunized.load`), the plots as PNG and ``report.html``, one file
    that needs nothing else.

    Args:
        evaluation: What was measured.
        target: The run directory; its parents are made.
        force: Whether an existing run directory is replaced.
        extra: More entries for ``results.json``: ``seconds``, ``seeds``, ``alternatives``,
            ``notes``.

    Returns:
        The run directory.

    Raises:
        FileExistsError: If the target exists and ``force`` is not given, or is no run directory.
        MissingExtraError: If matplotlib is not installed.
    """
    results = {"kind": "kappa", **evaluation.results(), **(extra or {})}
    with run_directory(target, force=force) as folder:
        write(results, folder)
        write_json_lines(folder / "metrics.jsonl", evaluation.metrics())
        evaluation.immunized.save(folder / "immunized.safetensors")
        write_json(folder / "results.json", results)
    return Path(target)
