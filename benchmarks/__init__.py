"""Benchmarks: one script per claim, correctness asserted before timing, results as JSON.

``python -m benchmarks.run --out benchmarks/results`` runs them all; see ``benchmarks/README.md``.
"""

import importlib.util
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent

# ``python -m`` puts this checkout first. Where the operators were installed by ``pip install .``,
# the package of the checkout has no binary and would hide the one that has.
if not any((_ROOT / "immunize_ext").glob("_C*.so")):
    _here = [entry for entry in sys.path if Path(entry or ".").resolve() == _ROOT]
    sys.path[:] = [entry for entry in sys.path if entry not in _here] + _here

if importlib.util.find_spec("threadpoolctl") is None:
    sys.exit("benchmarks: threadpoolctl is missing; pip install 'immunize_ext[data,report]'")
