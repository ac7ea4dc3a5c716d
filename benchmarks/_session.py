"""What every benchmark script does around its rows: arguments, threads, table, result file."""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import _results
from ._environment import environment_record
from ._timing import (
    Budget,
    Contender,
    IncorrectContenderError,
    copy_bandwidth,
    fixed_threads,
    measure,
    refuse_fallback,
)

RESULTS = Path("benchmarks/results")
DEFAULT_BUDGET = Budget()
# A GPU settles in less time, and the whole run there has to fit into ten minutes with the tests.
GPU_SECONDS = 4.0
QUICK_BUDGET = Budget(seconds=0.2, min_rounds=2, max_rounds=2, turn_seconds=0.002)


@dataclass(frozen=True)
class Options:
    """The command line of a benchmark script.

    Attributes:
        quick: Tiny sizes and two rounds: does everything run? Targets are not judged.
        device: Where the contenders run.
        threads: Threads of torch and of the BLAS of numpy and scipy.
        seconds: Time per row; None: each row's own.
        compiled_baseline: Also time ``torch.compile`` of the bare composition.
        rows: Patterns of row names; empty: all.
        sweeps: Also run the rows for the plots of cost against size.
        out: Folder for the result file; None: print only.
    """

    quick: bool
    device: torch.device
    threads: int
    seconds: float | None
    compiled_baseline: bool
    rows: tuple[str, ...]
    sweeps: bool
    out: Path | None


@dataclass(frozen=True)
class Case:
    """One row before it is measured.

    Attributes:
        identifier: Name of the row, for ``--rows`` and the result file.
        title: The work in words.
        sizes: The numbers that define it.
        dtype: Of the tensors that the operators get.
        per: What a time is for: ``call``, ``matrix`` ...
        build: Makes inputs and contenders; called when the row's turn comes, so that only one
            row's tensors exist at a time.
        targets: Numbers to reach.
        missing: What the row should have and this version of the package lacks.
        note: Anything a reader has to know.
        sweep: ``{"name": ..., "x": name of the size, "value": ...}`` for rows of a plot.
        budget: How long to measure.
    """

    identifier: str
    title: str
    sizes: Mapping[str, int]
    dtype: str
    per: str
    build: Callable[[], list[Contender]]
    targets: tuple[_results.Target, ...] = ()
    missing: tuple[str, ...] = ()
    note: str = ""
    sweep: Mapping[str, Any] | None = None
    budget: Budget = DEFAULT_BUDGET


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments that all benchmark scripts share."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--quick", action="store_true", help="tiny sizes, nothing is judged")
    result.add_argument("--device", choices=_results.DEVICES, default="cpu")
    result.add_argument(
        "--threads", type=_positive, default=os.cpu_count() or 1, help="default: all cores"
    )
    result.add_argument("--seconds", type=float, default=None, help="time per row")
    result.add_argument(
        "--compile", action="store_true", help="also time torch.compile of the bare composition"
    )
    result.add_argument(
        "--rows",
        action="append",
        default=[],
        metavar="PATTERN",
        help="only these rows (repeatable)",
    )
    result.add_argument("--no-sweeps", action="store_true", help="leave out the rows of the plots")
    result.add_argument("--out", type=Path, default=None, help=f"folder, {RESULTS} for instance")
    return result


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def options(arguments: argparse.Namespace) -> Options:
    """The parsed arguments, checked."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA device, and torch sees none")
    if arguments.seconds is not None and not arguments.seconds > 0:
        raise ValueError(f"--seconds must be positive, got {arguments.seconds}")
    return Options(
        quick=arguments.quick,
        device=torch.device(arguments.device),
        threads=arguments.threads,
        seconds=arguments.seconds,
        compiled_baseline=arguments.compile,
        rows=tuple(arguments.rows),
        sweeps=not arguments.no_sweeps,
        out=arguments.out,
    )


def selected(cases: Sequence[Case], chosen: Options) -> list[Case]:
    """The rows that the command line asks for."""
    kept = [
        case
        for case in cases
        if (chosen.sweeps or case.sweep is None)
        and (
            not chosen.rows
            or any(fnmatch.fnmatch(case.identifier, pattern) for pattern in chosen.rows)
        )
    ]
    if not kept:
        known = ", ".join(case.identifier for case in cases)
        raise ValueError(f"--rows {' '.join(chosen.rows)} fits no row; there are: {known}")
    return kept


def run_case(case: Case, chosen: Options) -> dict[str, Any]:
    """Measure one row."""
    budget = case.budget
    if chosen.quick:
        budget = QUICK_BUDGET
    elif chosen.seconds is not None:
        budget = Budget(chosen.seconds, budget.min_rounds, budget.max_rounds)
    elif chosen.device.type == "cuda":
        budget = Budget(
            min(budget.seconds, GPU_SECONDS), min(budget.min_rounds, 3), budget.max_rounds
        )
    return _results.row_record(
        identifier=case.identifier,
        title=case.title,
        sizes=case.sizes,
        dtype=case.dtype,
        per=case.per,
        measurements=measure(case.build(), chosen.device, budget),
        targets=case.targets,
        missing=case.missing,
        note=case.note,
        sweep=case.sweep,
        judge=not chosen.quick,
    )


def machine_in_words(environment: Mapping[str, Any]) -> str:
    """Device, threads and torch of a result."""
    threads = environment["threads"]
    return (
        f"{environment['device_name']}, {threads} thread{'' if threads == 1 else 's'}, "
        f"torch {environment['torch']}"
    )


def format_row(row: Mapping[str, Any]) -> str:
    """One row as text: contenders with their ratios to ours, then the targets."""
    sizes = ", ".join(f"{name} {value}" for name, value in row["sizes"].items())
    lines = [f"{row['id']}: {row['title']}", f"  {row['dtype']}, ms per {row['per']}; {sizes}"]
    if row["note"]:
        lines.append(f"  note: {row['note']}")
    lines.append(
        f"  {'contender':<22}{'forward':>10}{'backward':>10}{'both':>10}"
        f"{'quartiles':>21}{'/ ours':>9}{'rel. err.':>10}{'MiB':>8}"
    )
    ours = next(
        (
            entry["both"]["median"]
            for entry in row["contenders"]
            if entry["name"] == "ours" and entry["both"]
        ),
        None,
    )
    for entry in row["contenders"]:
        if entry["refused"] is not None:
            lines.append(f"  {entry['name']:<22}not timed: {entry['refused']}")
            continue
        both = entry["both"]
        backward = entry["backward"]
        ratio = f"{both['median'] / ours:>9.2f}" if ours else f"{'':>9}"
        error = entry["relative_error"]
        peak = entry["peak_mib"]
        lines.append(
            f"  {entry['name']:<22}{entry['forward']['median']:>10.4g}"
            f"{'-' if backward is None else format(backward['median'], '.4g'):>10}"
            f"{both['median']:>10.4g}"
            f"{'[{:.4g}, {:.4g}]'.format(both['q25'], both['q75']):>21}"
            f"{ratio}"
            f"{'-' if error is None else format(error, '.0e'):>10}"
            f"{'-' if peak is None else format(peak, '.1f'):>8}"
        )
    for target in row["targets"]:
        outcome = {True: "met", False: "missed", None: "not judged"}[target["met"]]
        measured = "-" if target["measured"] is None else f"{target['measured']:.2f}x"
        lines.append(f"  target: {target['wording']}: {measured}, {outcome}")
    lines.extend(f"  missing: {what}" for what in row["missing"])
    return "\n".join(lines)


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many targets were met, and which were not."""
    targets = [(row["id"], target) for row in rows for target in row["targets"]]
    judged = [(name, target) for name, target in targets if target["met"] is not None]
    lines = [
        f"targets: {sum(target['met'] for _, target in judged)} met, "
        f"{sum(not target['met'] for _, target in judged)} missed, "
        f"{len(targets) - len(judged)} not judged"
    ]
    lines.extend(
        f"  missed: {name}: {target['wording']}: {target['measured']:.2f}x"
        for name, target in judged
        if not target["met"]
    )
    lines.extend(f"  missing: {row['id']}: {what}" for row in rows for what in row["missing"])
    return "\n".join(lines)


def labels(rows: Sequence[Mapping[str, Any]]) -> str:
    """What each name of the tables stands for."""
    named = {entry["name"]: entry["label"] for row in rows for entry in row["contenders"]}
    return "\n".join(["contenders:", *(f"  {name:<22}{named[name]}" for name in named)])


def run(
    benchmark: str,
    module: str,
    make_cases: Callable[[Options], list[Case]],
    argv: Sequence[str] | None,
    description: str,
) -> int:
    """Main program of a benchmark script.

    Args:
        benchmark: Name of the result file.
        module: Name for ``python -m``.
        make_cases: All rows for given options.
        argv: Arguments; None: those of the process.
        description: For ``--help``.

    Returns:
        Exit status: 0; 1 if a contender that must be right is wrong, whose row is then left out; 2
        for a bad command line or a missing compiled part.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        chosen = options(parser(description).parse_args(arguments))
        refuse_fallback(module, chosen.device)
        cases = selected(make_cases(chosen), chosen)
    except (ValueError, RuntimeError) as error:
        print(f"{module}: {error}", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    path = None
    if chosen.out is not None:
        path = chosen.out / _results.file_name(benchmark, chosen.device.type)
    status = 0
    with fixed_threads(chosen.threads):
        environment = environment_record(chosen.device, chosen.threads, module, arguments)
        bandwidth = copy_bandwidth(chosen.device, mebibytes=4 if chosen.quick else 256)
        settings = {
            "quick": chosen.quick,
            "device": chosen.device.type,
            "threads": chosen.threads,
            "seconds_per_row": chosen.seconds,
            "copy_bandwidth_bytes_per_second": bandwidth,
        }
        print(
            f"{benchmark} on {machine_in_words(environment)}, copy bandwidth "
            f"{bandwidth / 1e9:.1f} GB/s"
        )
        if environment["busy_at_start"]:
            print(f"warning: the machine is busy (load {environment['load_at_start']:.1f})")
        for case in cases:
            try:
                rows.append(run_case(case, chosen))
            except IncorrectContenderError as error:
                # The row is left out, and the run fails; the others are worth their time still.
                print(f"{module}: row {case.identifier}: {error}", file=sys.stderr)
                status = 1
                continue
            print(f"\n{format_row(rows[-1])}", flush=True)
            if path is not None:  # row by row: a machine that is taken away leaves what was done
                _results.write(path, _results.document(benchmark, environment, settings, rows))
    if rows:
        print(f"\n{labels(rows)}\n\n{summary(rows)}")
    if rows and path is not None:
        print(f"written: {path}")
    return status
