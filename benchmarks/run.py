"""Run all benchmarks and draw the plots.

``python -m benchmarks.run [--device cpu|cuda] [--out benchmarks/results]``
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from ._session import RESULTS, parser

MODULES = ("benchmarks.spectrum", "benchmarks.merge")


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser((__doc__ or "").partition("\n")[0]).parse_args(given)
    if arguments.rows:
        print(
            "benchmarks.run: --rows belongs to one benchmark; use "
            + " or ".join(f"python -m {module}" for module in MODULES),
            file=sys.stderr,
        )
        return 2
    out = arguments.out or RESULTS
    passed = given if arguments.out is not None else [*given, "--out", str(out)]
    # A process each: none inherits threads, caches or a fragmented heap from the one before.
    for module in MODULES:
        status = subprocess.run([sys.executable, "-m", module, *passed], check=False).returncode
        if status != 0:
            return status
    draw = [sys.executable, "-m", "benchmarks.plots", "--results", str(out)]
    return 0 if arguments.no_sweeps else subprocess.run(draw, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
