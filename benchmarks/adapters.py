"""Claim: merging LoRA adapters in factor space costs what its factors cost, whatever the weights.

``python -m benchmarks.adapters [--out benchmarks/results]``

All cross-attention K and V matrices of Stable Diffusion 1.4, three adapters of rank 8, by token
constraints (24 tokens) and by moments of the inputs. Beside it the dense merge of this package,
which is given the weights that the adapters make, a competent user's few lines of torch for the
same result in factor space, and floors: the products and solves with the right sizes alone. The
dense merge and the factored one are compared before anything is timed.

Objectives: the merge's own objective, relative to the best (no adapter) of zero, of what else is
done with several adapters (``adapter_peers``), and of the merge truncated by an SVD of Delta and in
the metric of the objective; each as it comes, and times the one factor that suits it best.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from immunize_ext.ops import (
    LowRank,
    MomentFactor,
    RegularizationFactor,
    merge_adapters,
    merge_adapters_kv,
    merge_kv,
    merge_moments,
    truncate_adapter,
)
from immunize_ext.storage import environment, write_whole

from ._page import fill
from .merge import SD14_WIDTHS

D, RANK, CONCEPTS, TOKENS, CAPTIONS = 768, 8, 3, 8, 4000
WIDTHS = tuple(width for width in SD14_WIDTHS for _ in range(2))
SEED = 20261128


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Standard normal numbers, float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(scale)


def problem(
    seed: int, widths: Sequence[int] = WIDTHS
) -> tuple[list[Tensor], list[list[LowRank]], list[Tensor], Tensor]:
    """W0, adapters, tokens and captions; text features have a decaying spectrum."""
    decay = torch.logspace(0, -2, D)
    base = [normal(o, D, seed=seed + k, scale=D**-0.5) for k, o in enumerate(widths)]
    adapters = [
        [
            LowRank(
                normal(o, RANK, seed=seed + 1000 * (n + 1) + k, scale=0.1),
                normal(RANK, D, seed=seed + 1000 * (n + 1) + 500 + k, scale=D**-0.5),
            )
            for k, o in enumerate(widths)
        ]
        for n in range(CONCEPTS)
    ]
    tokens = [normal(TOKENS, D, seed=seed + 9000 + n) * decay for n in range(CONCEPTS)]
    return base, adapters, tokens, normal(CAPTIONS, D, seed=seed + 9900) * decay


def minima(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The least processor seconds of each, called in turn; the quick ones more often.

    Processor time of the one thread that works: it does not count what other programs take.
    """
    best = dict.fromkeys(contenders, float("inf"))
    for turn in range(4 * rounds):
        for name, call in contenders.items():
            if turn < rounds or best[name] < _QUICK:
                started = time.thread_time()
                call()
                best[name] = min(best[name], time.thread_time() - started)
    return best


_QUICK = 0.05


def _assert_equal(
    updates: Sequence[LowRank], base: Sequence[Tensor], merged: Sequence[Tensor]
) -> float:
    """The largest relative difference of an update of both ways."""
    worst = 0.0
    for update, w0, w in zip(updates, base, merged, strict=True):
        wide = w.double() - w0.double()
        worst = max(worst, float((update.delta.double() - wide).norm() / wide.norm()))
    return worst


def speed(rounds: int) -> dict[str, Any]:
    """Seconds of every way, and what the factored and the dense result differ by."""
    base, adapters, tokens, captions = problem(SEED)
    factor = RegularizationFactor.from_embeddings(captions, ridge=1e-6)
    held = captions.double()
    moments = [t.double().mT @ t.double() for t in tokens]
    regularization = held.mT @ held / CAPTIONS

    def new_factor() -> MomentFactor:
        return MomentFactor.from_moments(moments, regularization=regularization, ridge=1e-6)

    moment_factor = new_factor()
    copies = [
        [w + one.up @ one.down for w, one in zip(base, layers, strict=True)] for layers in adapters
    ]
    wide_base = [w.double() for w in base]
    wide = [[LowRank(a.up.double(), a.down.double()) for a in one] for one in adapters]
    wide_copies = [[w + a.up @ a.down for w, a in zip(wide_base, one, strict=True)] for one in wide]
    differ = {
        "tokens": _assert_equal(
            merge_adapters_kv(wide, tokens, factor),
            wide_base,
            merge_kv(wide_base, wide_copies, tokens, factor),
        ),
        "moments": _assert_equal(
            merge_adapters(wide, moment_factor),
            wide_base,
            merge_moments(wide_base, wide_copies, moment_factor),
        ),
    }
    c = torch.cat(tokens).double()
    weighted = [g @ torch.cholesky_inverse(moment_factor.chol) for g in moments]

    def few_lines_tokens() -> list[Tensor]:
        """W/o checks: B once, then each layer's block."""
        a = torch.cholesky_solve(c.mT, factor.chol)
        b = torch.linalg.solve(c @ a, a.mT).float().split(TOKENS)
        return [
            torch.cat(
                [one[k].down @ t.mT @ b_n for one, t, b_n in zip(adapters, tokens, b, strict=True)]
            )
            for k in range(len(WIDTHS))
        ]

    maps = [m.float() for m in weighted]

    def few_lines_moments() -> list[Tensor]:
        return [
            torch.cat([one[k].down @ m for one, m in zip(adapters, maps, strict=True)])
            for k in range(len(WIDTHS))
        ]

    rows = len(WIDTHS) * RANK
    stacked, solved = normal(rows, D, seed=1).double(), normal(CONCEPTS * rows, D, seed=2).double()

    def floor_tokens() -> None:
        """The solve with all tokens, and two thin products a concept."""
        torch.cholesky_solve(c.mT, factor.chol)
        for t in tokens:
            met = stacked @ t.double().mT
            met @ t.double()

    def floor_moments() -> None:
        """A product a concept and one solve, float64."""
        for g in moments:
            stacked @ g
        torch.cholesky_solve(solved.mT, moment_factor.chol)

    few_error = max(
        float((one.down - few).norm() / one.down.norm())
        for one, few in zip(
            merge_adapters_kv(adapters, tokens, factor), few_lines_tokens(), strict=True
        )
    )
    moment_factor.stacked_maps(torch.float32)  # the dense merge need not make them again
    contenders: dict[str, Callable[[], Any]] = {
        "tokens: factored": lambda: merge_adapters_kv(adapters, tokens, factor),
        "tokens: dense (merge_kv), copies given": lambda: merge_kv(base, copies, tokens, factor),
        "tokens: dense, copies made": lambda: merge_kv(
            base,
            [[w + a.up @ a.down for w, a in zip(base, one, strict=True)] for one in adapters],
            tokens,
            factor,
        ),
        "tokens: a few lines, factored, float32": few_lines_tokens,
        "tokens: floor": floor_tokens,
        "moments: factored": lambda: merge_adapters(adapters, moment_factor),
        "moments: factored, maps given": lambda: merge_adapters(adapters, moment_factor, maps=True),
        "moments: dense (merge_moments), copies given, maps made": lambda: merge_moments(
            base, copies, new_factor()
        ),
        "moments: factored, factor made": lambda: merge_adapters(adapters, new_factor()),
        "moments: dense (merge_moments), copies and maps given": lambda: merge_moments(
            base, copies, moment_factor
        ),
        "moments: a few lines, factored, float32, maps given": few_lines_moments,
        "moments: floor": floor_moments,
    }
    seconds = minima(contenders, rounds)

    def ratio(slow: str, fast: str) -> float:
        return seconds[slow] / seconds[fast]

    dense_moments = "moments: dense (merge_moments), copies"
    ratios = {
        "tokens": {
            "dense / factored": ratio("tokens: dense (merge_kv), copies given", "tokens: factored"),
            "dense with copies made / factored": ratio(
                "tokens: dense, copies made", "tokens: factored"
            ),
            "few lines / factored": ratio(
                "tokens: a few lines, factored, float32", "tokens: factored"
            ),
            "factored / floor": ratio("tokens: factored", "tokens: floor"),
        },
        "moments, factor given": {
            "dense / factored": ratio(f"{dense_moments} and maps given", "moments: factored"),
            "factored / floor": ratio("moments: factored", "moments: floor"),
        },
        "moments, maps given": {
            "dense / factored": ratio(
                f"{dense_moments} and maps given", "moments: factored, maps given"
            ),
            "few lines / factored": ratio(
                "moments: a few lines, factored, float32, maps given",
                "moments: factored, maps given",
            ),
        },
        "moments, factor made in the call": {
            "dense / factored": ratio(
                f"{dense_moments} given, maps made", "moments: factored, factor made"
            ),
        },
    }
    return {
        "sizes": {
            "matrices": len(WIDTHS),
            "output_rows": sum(WIDTHS),
            "d": D,
            "adapters": CONCEPTS,
            "rank": RANK,
            "tokens": CONCEPTS * TOKENS,
        },
        "rounds": rounds,
        "processor_seconds": seconds,
        "ratios": ratios,
        "relative_difference_of_dense_and_factored_in_float64": differ,
        "relative_error_of_the_few_lines_tokens": few_error,
    }


# --- objectives -----------------------------------------------------------------------------------


def objectives(seeds: Sequence[int]) -> dict[str, Any]:
    """What each way of combining leaves of the objective, as a share of what no adapter leaves.

    f(Delta) = tr Delta S Delta^T - 2 tr Delta N^T + sum mu tr D_n G_n D_n^T, N = sum mu D_n G_n.
    """
    from .adapter_peers import others, svd

    found: dict[str, list[tuple[float, float]]] = {}
    for seed in seeds:
        layer, o = 0, WIDTHS[0]
        _, adapters, _, captions = problem(seed, WIDTHS[:1])
        decay = torch.logspace(0, -2, D)
        mixing = [normal(40, D, seed=seed + 7000 + n) * decay for n in range(CONCEPTS)]
        moments = [m.double().mT @ m.double() for m in mixing]
        held = captions.double()
        factor = MomentFactor.from_moments(
            moments, regularization=0.1 * held.mT @ held / CAPTIONS, ridge=1e-6
        )
        updates = [LowRank(a[layer].up.double(), a[layer].down.double()) for a in adapters]
        deltas = [one.delta for one in updates]
        s = factor.s
        wanted = sum(
            (d @ g for d, g in zip(deltas, moments, strict=True)), torch.zeros(o, D).double()
        )
        nothing = sum(float(((d @ g) * d).sum()) for d, g in zip(deltas, moments, strict=True))

        def left(
            delta: Tensor, s: Tensor = s, wanted: Tensor = wanted, nothing: float = nothing
        ) -> tuple[float, float]:
            """As it is, and times the factor that suits it best."""
            square = float(((delta @ s) * delta).sum())
            along = float((delta * wanted).sum())
            best = 1.0 - along * along / square / nothing
            return 1.0 + (square - 2.0 * along) / nothing, best

        (merged,) = merge_adapters([[one] for one in updates], factor)
        torch.manual_seed(seed)
        ways = {
            "moments, full rank (24)": merged.delta,
            f"moments, rank {RANK}, in the metric": truncate_adapter(merged, s, RANK).delta,
            f"moments, rank {RANK}, by an SVD of Delta": svd(merged.delta, RANK),
            **others(updates, RANK),
        }
        for name, delta in ways.items():
            found.setdefault(name, []).append(left(delta))
    return {
        name: _spread([one for one, _ in v], [best for _, best in v]) for name, v in found.items()
    }


def _spread(values: Sequence[float], best: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": sum(values) / len(values),
        "least": min(values),
        "largest": max(values),
        "seeds": list(values),
        "with_best_factor": sum(best) / len(best),
    }


# --- the page -------------------------------------------------------------------------------------


def table(content: dict[str, Any]) -> str:
    """The numbers of docs/merge.md, from the results."""
    seconds, ratios = content["speed"]["processor_seconds"], content["speed"]["ratios"]
    dense = "moments: dense (merge_moments), copies"
    rows = [
        (
            "by tokens, the copies of the dense merge given",
            seconds["tokens: factored"],
            seconds["tokens: dense (merge_kv), copies given"],
            seconds["tokens: floor"],
        ),
        (
            "by tokens, its copies made from the adapters",
            seconds["tokens: factored"],
            seconds["tokens: dense, copies made"],
            seconds["tokens: floor"],
        ),
        (
            "by moments, the maps P_n kept",
            seconds["moments: factored, maps given"],
            seconds[f"{dense} and maps given"],
            None,
        ),
        (
            "by moments, the factor kept",
            seconds["moments: factored"],
            seconds[f"{dense} and maps given"],
            seconds["moments: floor"],
        ),
        (
            "by moments, everything made in the call",
            seconds["moments: factored, factor made"],
            seconds[f"{dense} given, maps made"],
            None,
        ),
    ]
    lines = ["| merge | factored, ms | dense, ms | ratio | floor, ms |", "|---|---|---|---|---|"]
    for name, factored, whole, least in rows:
        floor = "" if least is None else f"{1e3 * least:.1f}"
        milliseconds = f"{1e3 * factored:.1f} | {1e3 * whole:.0f}"
        lines.append(f"| {name} | {milliseconds} | {whole / factored:.1f} | {floor} |")
    few = ratios["tokens"]["few lines / factored"]
    lines += [
        "",
        f"A few lines of torch in float32 and without checks take {few:.2f} of the time by tokens.",
        "",
        "| three adapters of rank 8 combined by | left of the objective | with its best factor |",
        "|---|---|---|",
    ]
    for name, one in content["objectives"].items():
        spread = f"{one['mean']:.3f} ({one['least']:.3f} to {one['largest']:.3f})"
        lines.append(f"| {name} | {spread} | {one['with_best_factor']:.3f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: 5)")
    parser.add_argument("--seeds", type=int, default=5, help="of the objectives (default: 5)")
    parser.add_argument("--objectives", action="store_true", help="leave the times as they are")
    parser.add_argument("--page", type=Path, help="write the table into this page as well")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "adapters-cpu.json"
    if arguments.objectives:
        content = json.loads(path.read_text(encoding="utf-8"))
    else:
        content = {"environment": environment(), "speed": speed(arguments.rounds)}
    content["objectives"] = objectives(range(arguments.seeds))
    write_whole(path, content)
    if arguments.page is not None:
        fill(arguments.page, {"adapters": table(content)})
    for kind, ratios in content["speed"]["ratios"].items():
        print(kind, ", ".join(f"{name} {ratio:.3g}" for name, ratio in ratios.items()))
    for name, one in content["objectives"].items():
        print(f"{name:<52} {one['mean']:.4f} ({one['least']:.4f} to {one['largest']:.4f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
