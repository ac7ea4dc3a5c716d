"""Compiles the CUDA extension against a CUDA build of torch; needs nvcc, but no GPU.

Makes a second virtual environment (5.5 GB, kept), builds the package there for sm_80 to sm_120 and
PTX, imports what was built, runs what of it needs no GPU (cuda_compositions.py), and reads what
ptxas said about each kernel.  Fails when a kernel spills registers or has a stack frame (on
Blackwell: more than the committed table says), and when the library lacks code for one of the
architectures.  ``docs/cuda_kernels.md`` and
``benchmarks/results/ptxas.json`` are written anew, or with ``--check`` compared: it fails where
they say something else.  The page's second table is that of ``csrc/simt/ptx/costs.py``.
"""

import argparse
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "build" / "cuda"
LIBRARY = OUTPUT / "lib"
ARCH_LIST = "8.0;9.0+PTX;10.0;12.0"
EXPECTED_CODE = {"sm_80", "sm_90", "compute_90", "sm_100", "sm_120"}  # what ARCH_LIST means
BLACKWELL = {"sm_100", "sm_120"}
TOOLS = ("setuptools>=77", "wheel", "ninja", "numpy")
NEEDED_GIGABYTES = 12  # torch with its CUDA libraries, and as much again while pip unpacks
TABLE = ROOT / "docs" / "cuda_kernels.md"
RECORD = ROOT / "benchmarks" / "results" / "ptxas.json"
COSTS = ROOT / "benchmarks" / "results" / "ptx_costs.json"
HEADER = """# What the compiler made of the CUDA kernels

Written by `python .ci/cuda_build.py`: registers, static shared memory, stack and spills of each
kernel as ptxas ({nvcc}) reports them. Nothing in the tables of kernels was measured on a GPU.
`python .ci/cuda_build.py --check`, a step of `.ci/run` where there is an nvcc, compares this table
with what the compiler says now. No kernel may spill or have a stack frame on sm_80 and sm_90; on
sm_100 and sm_120 none may more than the table says.

Where the package launches no kernel of its own on CUDA, a library has the better one: the
preconditioned gradient beyond a side of 128 or in Woodbury form (cuBLAS: triangular solves and
products with many right-hand sides; up to 128 `small_precondition` fuses them), the eigenvectors of
symmetric, possibly indefinite matrices and the second derivatives (cuSOLVER), the solves with the
factor of Q for more than 128 tokens (cuBLAS; for fewer `solve_triangular`), and features whose thin
side is beyond the shared memory of a block, up to 14 at a time of side 256 and of side 784 whatever
their number (`csrc/thin_gram.h`: cuSOLVER's eigenvectors, proven on the features; what lies below
the noise of the Gram matrix is found from the features by products and smaller decompositions,
`csrc/thin_gram_eigenpairs.h`; what is refused starts Jacobi's method). These
compositions are run on CPU tensors in the same step.

## Features with a small thin side

`small_ends` takes them first: Gram matrix, tridiagonal form, Sturm counts, two vectors, and a test
of the two triplets on the matrix itself (`csrc/cuda/spectrum_tridiagonal.cuh`). What the test
refuses (condition numbers from about 4e6, rank-deficient features, clusters in doubt) goes to
`small_extremes`, one-sided Jacobi. Microseconds of the kernels for float64:

| problem | Jacobi for all | `small_ends` at first: estimated | `small_ends` at first: measured |
|---|---:|---:|---:|
| one 64 x 784 | 2215 | 90 | 254 |
| 90 of 64 x 784 | 2488 | 100 | 297 |
| 20 of 100 x 768 | 5800 (operator less its other parts) | 170 | 474 |
| 1000 of 32 x 32 | 1565 | 65 | 278 |
| 1000 of 8 x 8 | 109 | 15 | 58 |

Measured on an NVIDIA H100 80GB HBM3 with torch 2.11.0+cu130, 28 November 2026. The estimates had
added up latencies of what must follow each other. The instructions tell why they were too low: at
64 x 784 the first warp ran 81 000 of PTX and all warps 648 000 (Nsight Compute: 716 000 in 546 000
cycles; a warp issued one in 12 cycles, 4.6 of them at barriers). Of those of the first warp the
tridiagonal form took 36 %, the Gram matrix, of one block, a quarter, the Sturm counts 13 %.

Changed since, and **not measured yet**: matrices of more than 64 rows on the long side are
multiplied by a block for each part of 64 rows or more (`ends_gram`); rows of G stay in registers
while T is formed; counts are unrolled, and pivots are quotients of minors, without a chain of
divisions; a matrix with a side up to 32 takes one warp, so that 1000 of them run at the same time
on 132 multiprocessors where two rounds were needed.

## Registers

"""

MERGE_ON_H100 = """
## The merge on an H100

Measured on one NVIDIA H100 80GB HBM3, torch 2.11.0+cu130, on 28 November 2026, *before* the changes
below: two concepts of 12 tokens, gradients of all weights, factor of Q cached.

| measured before, us on the GPU | SD 1.4, d = 768, 24960 rows | SDXL, d = 2048, 166400 rows |
|---|---:|---:|
| `merge_apply_rows`, float32 | 217 | 6040 |
| `merge_backward_rows`, float32 | 202 | 5498 |
| `merge_apply_rows`, float16 | 208 | 3924 |
| `merge_backward_rows`, float16 | 168 | 3308 |
| solves with L and L^T, triangular part only (cuBLAS) | 583 | 1156 |
| `merge_pivoted_cholesky` | 32 | |
| float32 weights moved once by copies | 108 | 1900 |

A whole call took 5.8 ms at SD 1.4, forward and backward, of which kernels ran for 1.3 ms: launches
cost the host 8 to 20 us each. Nsight Compute saw 16 warps a multiprocessor (8 for SDXL) wait for
shared memory and for loads, at 40 % of the bandwidth of DRAM.

Changed since, and **not measured yet**; what follows are estimates from counts:

- The two solves are kernels of their own, no longer 24 triangular ones of a library and their
  products; what lies between them is seven launches, no longer some seventy. In one launch each
  they were measured at 104 and 84 us (L, L^T) for d = 768 and 467 and 409 us for d = 2048: a tile
  takes 2.6 and 1.8 us and 0.15 more for each tile before it. So beyond d = 768 the factor is cut
  into panels of up to 512 columns, of which `solve_triangular` does one and `subtract_solved`
  spreads the rest over the GPU: 240 and 190 us of chain and three launches of some 8 us at
  d = 2048, 265 and 210 us in all.
- The row kernels run 24 warps a multiprocessor for float32. Shared memory is now what bounds them
  together with DRAM: a block of 16 rows and 768 columns takes the wavefronts of the second table,
  at one a cycle 105 to 140 us for SD 1.4, beside 108 us for DRAM; as the two overlap only in part,
  140 to 160 us are expected. At SDXL the rows of W0 and of G are read twice: 2.4 ms for DRAM,
  and 3.5 to 4 ms expected.
- To reach the bandwidth of DRAM would need tensor cores: for 1024 products of 16 x 8 x 8, in TF32
  and split into three, fragments take 6 wavefronts, where these kernels take 18 to 24.
"""


def fail(message: str) -> NoReturn:
    """End the program with one line."""
    sys.exit(f"cuda_build: {message}")


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Run a command, show what it prints as it comes, and return it; exit if it fails."""
    print("+", " ".join(command), flush=True)
    text = []
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            text.append(line)
    if process.returncode != 0:
        fail(f"{command[0]} ended with status {process.returncode}")
    return "".join(text)


def installed_torch(python: Path) -> str | None:
    """Return the version of torch beside ``python``, None if there is none."""
    if not python.exists():
        return None
    code = "import importlib.metadata as m; print(m.version('torch'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def make_environment(folder: Path, torch: str) -> Path:
    """Make the virtual environment with ``torch`` unless it is there; return its Python."""
    python = folder / "bin" / "python"
    found = installed_torch(python)
    if found is not None and found.split("+")[0] == torch:
        return python
    free = shutil.disk_usage(folder.parent).free / 1e9
    if free < NEEDED_GIGABYTES:
        fail(f"{folder.name} needs {NEEDED_GIGABYTES} GB of free disk, there are {free:.1f}")
    if not python.exists():
        venv.create(folder, with_pip=True)
    run([str(python), "-m", "pip", "install", "--quiet", *TOOLS, f"torch=={torch}"])
    return python


def compile_extension(python: Path) -> str:
    """Build the package into ``build/cuda/lib`` from nothing; return what the build printed."""
    if not list((ROOT / "csrc" / "cuda").glob("*.cu")):
        fail("there are no CUDA sources in csrc/cuda")
    shutil.rmtree(OUTPUT, ignore_errors=True)
    environment = {
        **os.environ,
        "IMMUNIZE_EXT_BUILD": "1",
        "IMMUNIZE_EXT_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": ARCH_LIST,
        # nvcc appends this to its command line.
        "NVCC_APPEND_FLAGS": f"{os.environ.get('NVCC_APPEND_FLAGS', '')} -Xptxas -v".strip(),
        "MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count())),
    }
    build = [str(python), "setup.py", "build", "--build-base", str(OUTPUT)]
    return run([*build, "--build-lib", str(LIBRARY)], environment)


def check_import(python: Path) -> None:
    """Import the compiled part: every symbol must be found, GPU or not."""
    code = "import torch, immunize_ext._C as c; print(c.build_info())"
    run([str(python), "-c", f"import sys; sys.path.insert(0, {str(LIBRARY)!r}); {code}"])


def embedded_code(listing: str) -> set[str]:
    """Return the architectures in the output of ``cuobjdump --list-elf --list-ptx``.

    Example:
        >>> elf = "ELF file    1: _C.1.sm_90.cubin"
        >>> ptx = "PTX file    1: _C.1.sm_90.ptx"
        >>> sorted(embedded_code(elf + chr(10) + ptx))
        ['compute_90', 'sm_90']
    """
    machine = re.findall(r"^ELF file.*\.sm_(\d+)a?\.cubin", listing, re.MULTILINE)
    portable = re.findall(r"^PTX file.*\.sm_(\d+)a?\.ptx", listing, re.MULTILINE)
    return {f"sm_{n}" for n in machine} | {f"compute_{n}" for n in portable}


def check_embedded_code(python: Path) -> None:
    """Fail if the library lacks code for an architecture; cuobjdump comes with Triton."""
    tools = list(python.parent.parent.glob("lib/python*/site-packages/triton/**/bin/cuobjdump"))
    tool = shutil.which("cuobjdump") or (str(tools[0]) if tools else None)
    if tool is None:
        fail("cuobjdump not found, neither in PATH nor in the triton package")
    for library in LIBRARY.rglob("_C*.so"):
        found = embedded_code(run([tool, "--list-elf", "--list-ptx", str(library)]))
        if missing := EXPECTED_CODE - found:
            fail(f"{library.name} has code for {sorted(found)}, not for {sorted(missing)}")


def check_compositions(python: Path) -> None:
    """Run on CPU tensors what the CUDA build composes of torch operators."""
    script = ROOT / ".ci" / "cuda_compositions.py"
    run([str(python), str(script)], {**os.environ, "PYTHONPATH": str(LIBRARY)})


Row = Mapping[str, Any]


def differences(now: Sequence[Row], committed: Sequence[Row]) -> list[str]:
    """Return one line for each kernel that two tables do not describe alike.

    Example:
        >>> one = {"name": "sum", "arch": "sm_90", "registers": 32}
        >>> differences([{**one, "registers": 40}], [one])
        ['sum (sm_90) has registers 40, the committed table says 32']
    """
    found = []
    tables = [{(row["name"], row["arch"]): row for row in rows} for rows in (now, committed)]
    for name, arch in sorted(set().union(*tables)):
        one, other = (table.get((name, arch)) for table in tables)
        if one is None or other is None:
            where = "the committed table" if other is None else "the build"
            found.append(f"{name} ({arch}) is missing from {where}")
            continue
        found += [
            f"{name} ({arch}) has {key} {one[key]}, the committed table says {other.get(key)}"
            for key in one
            if one[key] != other.get(key)
        ]
    return found


def is_tolerated(row: Row, committed: Sequence[Row]) -> bool:
    """Whether a kernel spills, on Blackwell, no more than the committed table says.

    Example:
        >>> row = {"name": "k", "arch": "sm_120", "stack": 0, "spill_stores": 4, "spill_loads": 4}
        >>> is_tolerated(row, [row]), is_tolerated(row | {"spill_loads": 8}, [row])
        (True, False)
        >>> is_tolerated(row | {"arch": "sm_90"}, [row | {"arch": "sm_90"}])
        False
    """
    costs = ("stack", "spill_stores", "spill_loads")
    return row["arch"] in BLACKWELL and any(
        all(row[cost] <= known[cost] for cost in costs)
        for known in committed
        if (known["name"], known["arch"]) == (row["name"], row["arch"])
    )


def nvcc_release() -> str:
    """Return ``nvcc release 13.0, V13.0.88``, as far as nvcc says so."""
    version = re.search(r"release [^\n]*", run(["nvcc", "--version"]))
    return f"nvcc {version[0]}" if version else "nvcc"


def page(nvcc: str, rows: Sequence[Row]) -> str:
    """Return ``docs/cuda_kernels.md``: what ptxas says of each kernel, and what its code costs."""
    ptxas: dict[str, Any] = runpy.run_path(str(ROOT / "csrc" / "cuda" / "ptxas_report.py"))
    costs: dict[str, Any] = runpy.run_path(str(ROOT / "csrc" / "simt" / "ptx" / "costs.py"))
    counted = json.loads(COSTS.read_text(encoding="utf-8"))["kernels"]
    table: str = ptxas["markdown"]([ptxas["Usage"](**row) for row in rows])
    counts: str = costs["markdown"](counted, rows)
    return HEADER.format(nvcc=nvcc) + table + "\n" + counts + MERGE_ON_H100


def report(log: str, allow_stack: str | None, check: bool) -> int:
    """Write or compare, and print, the table of kernels; return how many complaints there are."""
    ptxas: dict[str, Any] = runpy.run_path(str(ROOT / "csrc" / "cuda" / "ptxas_report.py"))
    usages = ptxas["demangle"](ptxas["parse"](log))
    if not usages:
        fail("the build printed nothing about kernels")
    known = json.loads(RECORD.read_text(encoding="utf-8"))
    new = [usage for usage in usages if not is_tolerated(asdict(usage), known)]
    found: list[str] = ptxas["complaints"](new, allow_stack)
    nvcc = nvcc_release()
    text = page(nvcc, [asdict(usage) for usage in usages])
    print(text)
    if not check:
        ptxas["write"](usages, RECORD, None)
        TABLE.write_text(text, encoding="utf-8")
    elif nvcc not in TABLE.read_text(encoding="utf-8"):
        # Another compiler allocates other registers; what must not happen is checked above.
        print(f"cuda_build: {TABLE.name} was made by another compiler than {nvcc}; not compared")
    else:
        rows = [asdict(usage) for usage in usages]
        found += differences(rows, json.loads(RECORD.read_text(encoding="utf-8")))
        if TABLE.read_text(encoding="utf-8") != text:
            found.append(f"{TABLE.name} is not what the build says; run make cuda and commit it")
    for line in found:
        print(f"cuda_build: {line}", file=sys.stderr)
    return len(found)


def main() -> None:
    """Run all steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-cuda")
    parser.add_argument("--torch", default="2.14.1", help="a version with a CUDA build")
    parser.add_argument(
        "--allow-stack", metavar="REGEX", help="kernels that may have a stack frame"
    )
    parser.add_argument("--environment-only", action="store_true")
    parser.add_argument("--check", action="store_true", help="compare the tables, write nothing")
    options = parser.parse_args()
    if shutil.which("nvcc") is None:
        fail("nvcc not found; install the CUDA toolkit that torch was built for")
    python = make_environment(options.venv.absolute(), options.torch)
    if options.environment_only:
        return
    log = compile_extension(python)
    check_import(python)
    check_embedded_code(python)
    check_compositions(python)
    if report(log, options.allow_stack, options.check) > 0:
        sys.exit(1)


if __name__ == "__main__":
    main()
