"""What nvcc's code for the CUDA kernels costs: traffic, bank conflicts, barriers, occupancy.

``python csrc/simt/ptx/costs.py`` runs the PTX of each kernel on a problem of typical shape (see
``build.py``; nothing is timed, no GPU is needed) and writes ``benchmarks/results/ptx_costs.json``,
of which ``.ci/cuda_build.py`` makes a table; ``--check`` compares.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import runpy
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[2]
RECORD = ROOT / "benchmarks" / "results" / "ptx_costs.json"
REGISTERS = ROOT / "benchmarks" / "results" / "ptxas.json"
ARCH = "sm_90"
COUNTS = ("sectors", "least_sectors", "wavefronts", "least_wavefronts")

# A multiprocessor of sm_90: CUDA C++ Programming Guide, technical specifications per compute
# capability. A block takes 1 KiB of shared memory for itself, a warp registers by 256.
THREADS, WARPS, BLOCKS, REGISTER_FILE, SHARED = 2048, 64, 32, 65536, 228 * 1024
RESERVED_SHARED, REGISTER_UNIT = 1024, 256

HEADER = """## What the code moves

Written by `make cuda` from `benchmarks/results/ptx_costs.json`. The PTX that nvcc made for sm_90 is
run on the CPU (`csrc/simt/ptx`) on the problems named, and its accesses are counted; nothing is
timed. *Resident* are the warps that registers and shared memory leave a multiprocessor, of 64, if
there are blocks enough. *Sectors* are the 32-byte pieces of global memory that all warps touch, and
in brackets how many times the least that the same lanes could touch; caches are not modelled.
*Wavefronts* are the passes that shared memory takes, and in brackets how many times the least that
accesses of that width can have: above 1 there are bank conflicts. *Barriers* are those of a block.

| kernel | problem | registers | shared (bytes) | resident | sectors | wavefronts | barriers |
|---|---|---:|---:|---:|---:|---:|---:|
"""


def occupancy(registers: int, threads: int, shared: int) -> int:
    """Return the warps of a kernel that a multiprocessor of sm_90 can hold at the same time.

    Example:
        >>> occupancy(32, 256, 0), occupancy(128, 256, 0), occupancy(128, 256, 100_000)
        (64, 16, 16)
    """
    warps = -(-threads // 32)
    of_a_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    blocks = min(
        BLOCKS,
        WARPS // warps,
        REGISTER_FILE // of_a_warp // warps,
        SHARED // (shared + RESERVED_SHARED),
    )
    return blocks * warps


def totals(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Add up what the launches of each kernel cost.

    Example:
        >>> one = dict.fromkeys(COUNTS, 2) | {"kernel": "k", "threads": 32, "barriers": 1}
        >>> total = totals([one | {"dynamic_shared": 8}, one | {"dynamic_shared": 8}])
        >>> total["k"]["sectors"], total["k"]["barriers"]
        (4, 1)
    """
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        row = found.setdefault(
            record["kernel"], dict.fromkeys(COUNTS, 0) | dict.fromkeys(["launches", "barriers"], 0)
        )
        row["launches"] += 1
        row["threads"] = record["threads"]
        row["dynamic_shared"] = record["dynamic_shared"]
        row["barriers"] = max(row["barriers"], record["barriers"])
        for count in COUNTS:
            row[count] += record[count]
    return found


def merge_problem(m: ModuleType, dtype: str, d: int, s: int, rows: int) -> None:
    """One layer of a text-to-image model: forward, backward and the sum over rows."""
    import numpy as np

    random = np.random.default_rng(0)
    wide = np.float64 if dtype == "float64" else np.float32
    narrow = {"bfloat16": np.uint16, "float16": np.float16}.get(dtype, wide)
    held = np.float16 if dtype == "bfloat16" else narrow  # any bits will do

    def weights() -> Any:
        return random.standard_normal((1, rows, d)).astype(held).view(narrow)

    c, b = (random.standard_normal((1, s, d)).astype(wide) for _ in range(2))
    base, targets = [weights()], [weights(), weights()]
    tokens = [s // 2, s - s // 2]
    options = m.merge.Options()
    m.merge.apply(dtype, base, targets, tokens, False, c, b, options)
    m.merge.backward(dtype, base, tokens, c, b, True, True, True, options)
    coefficients = [random.standard_normal((1, rows, s)).astype(wide)]
    m.merge.sum_rows(dtype, coefficients, base, targets, tokens, 1.0, options)


def solve_problem(m: ModuleType, d: int, s: int) -> None:
    """The part of a merge that all layers share, of well-conditioned Q and T."""
    import numpy as np

    random = np.random.default_rng(0)
    factor = np.tril(random.standard_normal((1, d, d))) / d + np.eye(d)
    soft = np.zeros((1, s))
    z = m.triangular.solve(factor, random.standard_normal((1, s, d)), False, False)

    def gram(x: Any) -> Any:
        return np.ascontiguousarray(x @ x.swapaxes(1, 2))

    triangle, order, rank, t = m.merge_solve.pivoted_cholesky(gram(z), soft, 1e-12)
    first, inverse = m.merge_solve.orthonormalise(z, soft, triangle, order, rank)
    m.merge_solve.finish_root(gram(first), inverse, t, order, rank)
    m.triangular.solve(factor, np.ascontiguousarray(z.swapaxes(1, 2)), True, True)


def panels_problem(m: ModuleType, d: int, s: int) -> None:
    """Solves with the factor of Q alone, in the panels that a merge of this width takes."""
    import numpy as np

    random = np.random.default_rng(0)
    factor = np.tril(random.standard_normal((1, d, d))) / d + np.eye(d)
    rows = random.standard_normal((1, s, d))
    for transposed in (False, True):
        m.triangular.solve(factor, rows, transposed, False, 0, m.triangular.panel_width(d))


def precondition_problem(m: ModuleType, dtype: str, side: int, rows: int) -> None:
    """A gradient of `rows` rows."""
    import numpy as np

    z = np.random.default_rng(0).standard_normal((side, 2 * side))
    grad = np.random.default_rng(1).standard_normal((rows, side)).astype(dtype)
    getattr(m.precondition, f"small_{dtype}")(grad, np.linalg.cholesky(z @ z.T))


def gradients(batch: int, of_gram: bool) -> dict[str, Any]:
    """Incoming gradients."""
    import numpy as np

    names = ["grad_max", "grad_min", *(["grad_squared_frobenius"] if of_gram else [])]
    return {name: np.ones(batch) for name in names}


def small_problem(m: ModuleType, dtype: str, batch: int, n: int, p: int, of_gram: bool) -> None:
    """Extremes and their gradient, a block a matrix."""
    import numpy as np

    a = np.random.default_rng(0).standard_normal((batch, n, p)).astype(dtype)
    a[0, 0] = a[0, 1] = 0  # a cluster of zeros for nobody: only the test for one runs
    tolerance = max(n, p) * float(np.finfo(a.dtype).eps)
    forward = m.spectrum.small_extremes(a, tolerance, tolerance, of_gram=of_gram)
    m.spectrum.small_gradient(a, forward, gradients(batch, of_gram), tolerance, tolerance)


def ends_problem(m: ModuleType, dtype: str, n: int, p: int) -> None:
    """Extremes of features that need no Jacobi."""
    import numpy as np

    a = np.random.default_rng(0).standard_normal((1, n, p)).astype(dtype)
    tolerance = max(n, p) * float(np.finfo(a.dtype).eps)
    m.spectrum.small_extremes(a, tolerance, tolerance)


def large_problem(m: ModuleType, dtype: str, n: int, p: int) -> None:
    """Extremes by the blocked route, of columns that are nearly orthogonal: a sweep or two."""
    import numpy as np

    a = 1e-4 * np.random.default_rng(0).standard_normal((1, n, p))
    a[0, range(n), range(n)] += np.linspace(1.0, 2.0, n)
    m.spectrum.large_extremes(a.astype(dtype), 1e-6, 1e-6, watched=True)


Problem = tuple[str, Callable[[ModuleType], None]]
PROBLEMS: Sequence[Problem] = (
    ("64 x 768, s = 24", lambda m: merge_problem(m, "float32", 768, 24, 64)),
    ("64 x 768, s = 24", lambda m: merge_problem(m, "bfloat16", 768, 24, 64)),
    ("64 x 768, s = 24", lambda m: merge_problem(m, "float64", 768, 24, 64)),
    ("64 x 2048, s = 154", lambda m: merge_problem(m, "float16", 2048, 154, 64)),
    ("768, s = 24", lambda m: solve_problem(m, 768, 24)),
    ("1024, s = 4", lambda m: panels_problem(m, 1024, 4)),
    ("64 x 128", lambda m: precondition_problem(m, "float32", 128, 64)),
    ("8 of 8 x 8", lambda m: small_problem(m, "float32", 8, 8, 8, True)),
    ("32 x 128", lambda m: small_problem(m, "float32", 1, 32, 128, True)),
    ("32 x 128", lambda m: small_problem(m, "float64", 1, 32, 128, False)),
    ("64 x 784", lambda m: ends_problem(m, "float64", 64, 784)),
    ("64 x 80", lambda m: large_problem(m, "float32", 64, 80)),
)


def count(m: ModuleType) -> list[dict[str, Any]]:
    """Run all problems and return a row for each kernel and problem."""
    demangle = runpy.run_path(str(ROOT / "csrc" / "cuda" / "ptxas_report.py"))
    rows: list[dict[str, Any]] = []
    for label, run in PROBLEMS:
        m.count(True)
        run(m)
        m.count(False)
        for name, row in totals(m.take_counts()).items():
            usage = demangle["Usage"](name=name, arch=ARCH)
            (short,) = demangle["demangle"]([usage])
            named = {"kernel": short.name, "problem": label, **row}
            if named not in rows:  # kernels that do not depend on the type of the weights
                rows.append(named)
    return sorted(rows, key=lambda row: (row["kernel"], row["problem"]))


def markdown(rows: Iterable[Mapping[str, Any]], usages: Iterable[Mapping[str, Any]]) -> str:
    """Return the section of ``docs/cuda_kernels.md``; ``usages`` are rows of ``ptxas.json``."""
    of_arch = {usage["name"]: usage for usage in usages if usage["arch"] == ARCH}

    def against(row: Mapping[str, Any], what: str) -> str:
        least = row[f"least_{what}"]
        return "0" if least == 0 else f"{row[what]} ({row[what] / least:.2f})"

    lines = []
    for row in rows:
        usage = of_arch[row["kernel"]]
        shared = usage["shared"] + row["dynamic_shared"]
        resident = occupancy(usage["registers"], row["threads"], shared)
        lines.append(
            f"| `{row['kernel'].removeprefix('immunize_ext::')}` | {row['problem']} "
            f"| {usage['registers']} | {shared} | {resident} | {against(row, 'sectors')} "
            f"| {against(row, 'wavefronts')} | {row['barriers']} |"
        )
    return HEADER + "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args(arguments)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        parser.error("nvcc not found; install the CUDA toolkit")
    spec = importlib.util.spec_from_file_location("immunize_ext_ptx_build", FOLDER / "build.py")
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    found: dict[str, Any] = {"nvcc": build.release(nvcc), "kernels": count(build.load(nvcc))}
    if not options.check:
        RECORD.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        return 0
    known = json.loads(RECORD.read_text(encoding="utf-8"))
    if known["nvcc"] != found["nvcc"]:
        print(f"costs: {RECORD.name} is of {known['nvcc']}; not compared with {found['nvcc']}")
        return 0
    changed = [row for row in found["kernels"] if row not in known["kernels"]]
    gone = [row for row in known["kernels"] if row not in found["kernels"]]
    for sign, rows in (("+", changed), ("-", gone)):
        for row in rows:
            print(f"costs: {sign} {row}", file=sys.stderr)
    return 1 if changed or gone else 0


if __name__ == "__main__":
    sys.exit(main())
