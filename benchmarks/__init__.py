"""Benchmarks: one script per claim, correctness asserted before timing, results as JSON.

``python -m benchmarks.run --out benchmarks/results`` runs them all; see ``benchmarks/README.md``.
"""
