"""What masks, gates and other averages leave of the merge's objective, on the digits pipeline.

    python -m benchmarks.merge_choice --write docs/merge.md    or --check

Three erased digits are taught for 20 steps of Adam, one copy of the denoiser each; the moments of
their inputs are collected, and the copies of all attention layers merged. Left is the objective of
the second-moment merge, of all layers together, as a share of what it is if nothing is merged; mean
and range over five seeds of the draws. No protection is measured here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from immunize_ext.ops import (
    MomentFactor,
    best_gates,
    best_layers,
    gate_layers,
    keep_columns,
    keep_rows,
    merge_moments,
    merge_report,
    row_scores,
)
from immunize_ext.storage import environment

from ._page import filled, parser, run, table
from .merge_sensitivity import ranged, spread

FILE = "merge_choice.json"
SEEDS = 5
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
Layers = list[Tensor]
Scope = Literal["kv", "attn"]


class Problem:
    """Base, copies and factors of one seed, in float64 and as matrices."""

    def __init__(self, seed: int, *, inner_steps: int, scope: Scope) -> None:
        from immunize_ext.text_to_image.immunizers import MIMA, MomentMerge
        from immunize_ext.text_to_image.immunizers.loop import Run

        from .protection.mima_task import mima_task

        task = mima_task()
        settings = MIMA(
            merge="moments",
            scope=scope,
            inner_optimizer="adam",
            inner_rate=1e-3,
            inner_steps=inner_steps,
            seed=seed,
        )
        under_way = Run(settings, task.model.clone(), task.fitted, None, None)
        leaves = {n: p.detach().clone().requires_grad_() for n, p in under_way.moved.items()}
        settings.adapted(under_way, leaves, 0)  # collects the moments
        assert isinstance(under_way.merge, MomentMerge)
        draws = settings.inner_draws(under_way, 0)
        copies = [
            settings.adapt(under_way, leaves, [d[n] for d in draws], settings.differentiation())
            for n in range(len(under_way.pools))
        ]
        self.names = list(under_way.merge.factors)
        self.factors: list[MomentFactor] = list(under_way.merge.factors.values())
        self.base = self._matrices(leaves)
        self.copies = [self._matrices(copy) for copy in copies]
        self.merged = merge_moments(self.base, self.copies, self.factors)

    def _matrices(self, parameters: dict[str, Tensor]) -> Layers:
        return [parameters[name].detach().double().flatten(1) for name in self.names]

    @property
    def weights(self) -> int:
        """Of all layers."""
        return sum(w.numel() for w in self.base)

    def left(self, weights: Layers) -> float:
        """Of the objective."""
        found = merge_report(weights, self.base, self.copies, None, self.factors).left
        assert found is not None
        return found


def by_copies(problem: Problem, rule: Callable[[list[Tensor]], Tensor]) -> Layers:
    """W0 and what a rule makes of the updates of a layer."""
    return [
        w0 + rule([copy[layer] - w0 for copy in problem.copies])
        for layer, w0 in enumerate(problem.base)
    ]


def averages(problem: Problem) -> dict[str, float]:
    """Whole layers, merged in other ways."""
    from peft.utils import merge_utils

    mean = by_copies(problem, lambda deltas: torch.stack(deltas).mean(0))
    diagonals = [[g.diagonal() for g in factor.moments] for factor in problem.factors]
    ones = torch.ones(len(problem.copies), dtype=torch.float64)
    every = [w.shape[0] for w in problem.base]

    def gated(ways: Sequence[Layers], groups: int | Sequence[int]) -> Layers:
        gates = best_gates(problem.base, ways, problem.merged, problem.factors, groups=groups)
        return gate_layers(problem.base, ways, gates)

    fisher = []
    for layer, w0 in enumerate(problem.base):
        weights = torch.stack(diagonals[layer])
        deltas = torch.stack([copy[layer] - w0 for copy in problem.copies])
        total = weights.sum(0) + problem.factors[layer].ridge
        fisher.append(w0 + (weights[:, None] * deltas).sum(0) / total)
    torch.manual_seed(0)
    ways = {
        "moments (the least there is)": problem.merged,
        "one gate a row and copy": gated(problem.copies, every),
        "one gate a layer and copy": gated(problem.copies, 1),
        "one gate a row of the mean (FiLM)": gated([mean], every),
        "one gate a layer of the mean": gated([mean], 1),
        "mean": mean,
        "diagonal of the moments (Fisher)": fisher,
        "TIES, density 0.5": by_copies(problem, lambda d: merge_utils.ties(d, ones, density=0.5)),
        "DARE, density 0.5": by_copies(
            problem, lambda d: merge_utils.dare_linear(d, ones / len(ones), density=0.5)
        ),
    }
    return {name: problem.left(weights) for name, weights in ways.items()}


def masks(problem: Problem, share: float, seed: int) -> dict[str, float]:
    """A part of the merge, by several choices of about as many weights."""
    base, merged, factors = problem.base, problem.merged, problem.factors
    budget = int(share * problem.weights)
    sizes = [w.numel() for w in base]
    scores = row_scores(base, merged, factors)
    per_row = torch.cat([torch.full((len(w),), w.shape[1]) for w in base])
    generator = torch.Generator().manual_seed(seed)

    def rows_by(worth: Tensor) -> Layers:
        """Rows of the largest worth a weight, until the budget is spent."""
        order = (worth / per_row).argsort(descending=True)
        taken = torch.zeros(len(worth), dtype=torch.bool)
        taken[order[per_row[order].cumsum(0) <= budget]] = True
        parts = taken.split([len(w) for w in base])
        return [
            torch.where(t[:, None], w, w0) for t, w, w0 in zip(parts, merged, base, strict=True)
        ]

    layers = best_layers([float(s.sum()) for s in scores], sizes, budget=budget)[-1].layers
    magnitude = torch.cat([(w - w0).square().sum(1) for w, w0 in zip(merged, base, strict=True)])
    within = []
    columns = []
    for w0, w, factor in zip(base, merged, factors, strict=True):
        within += keep_rows([w0], [w], factor, round(share * len(w))).weights
        columns += keep_columns(w0, w, factor, round(share * w.shape[1])).weights
    ways = {
        "rows, by score": rows_by(torch.cat(scores)),
        "rows, by score, the same share of every layer": within,
        "rows, by size of their change": rows_by(magnitude),
        "rows, at random": rows_by(torch.rand(len(per_row), generator=generator)),
        "columns, one by one, the same share of every layer": columns,
        "layers, by knapsack": [
            w if layer in layers else w0
            for layer, (w, w0) in enumerate(zip(merged, base, strict=True))
        ],
    }
    return {name: problem.left(weights) for name, weights in ways.items()}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything."""
    torch.set_num_threads(1)
    quick = arguments.quick
    scope: Scope = "kv" if quick else "attn"
    problems = [
        Problem(seed, inner_steps=1 if quick else 20, scope=scope)
        for seed in range(2 if quick else SEEDS)
    ]
    whole = [averages(problem) for problem in problems]
    parts_ = {
        share: [masks(problem, share, seed) for seed, problem in enumerate(problems)]
        for share in SHARES
    }
    return {
        "environment": environment(),
        "seeds": len(problems),
        "layers": len(problems[0].base),
        "weights": problems[0].weights,
        "whole": {name: {"left": spread([row[name] for row in whole])} for name in whole[0]},
        "parts": [
            {
                "share": share,
                "found": {name: {"left": spread([row[name] for row in rows])} for name in rows[0]},
            }
            for share, rows in parts_.items()
        ],
    }


def parts(results: dict[str, Any]) -> dict[str, str]:
    """Blocks of docs/merge.md."""
    shares = results["parts"]
    return {
        "averages": f"{results['layers']} layers, {results['weights']} weights, "
        f"{results['seeds']} seeds.\n\n"
        + table(
            ["merge", "left of the objective"],
            [[name, ranged(one, "left")] for name, one in results["whole"].items()],
        ),
        "masks": table(
            ["what is merged", *(f"1/{1 / row['share']:.0f} of the weights" for row in shares)],
            [
                [name, *(ranged(row["found"][name], "left") for row in shares)]
                for name in shares[0]["found"]
            ],
        ),
    }


PAGE = Path(__file__).resolve().parents[1] / "docs" / "merge.md"


def page(results: dict[str, Any]) -> str:
    """docs/merge.md with its blocks in their places."""
    return filled(PAGE.read_text(encoding="utf-8"), parts(results))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write or check."""
    return run(FILE, page, measure, parser("masks and gates of the merge"), argv)


if __name__ == "__main__":
    sys.exit(main())
