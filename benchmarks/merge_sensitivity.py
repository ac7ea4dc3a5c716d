"""What the key/value merge costs held-out text, against captions, ridge and overlap of concepts.

    python -m benchmarks.merge_sensitivity --write docs/merge.md    or --check
    python -m benchmarks.merge_sensitivity --quick                  # does everything run?

Text features are Gaussian with a decaying spectrum, so that the merge with infinitely many captions
is known: drift is measured on the population, in units of that merge's. The text encoder of the
digits pipeline stands beside them. Mean and range over five seeds.

**What to expect without a ridge.** A row of Delta minimises |X delta|^2 over the m captions X
subject to C delta = r. With delta = delta* + N z, N a basis of the kernel of C and delta* the
solution of the population, X delta* is independent of X N for Gaussian rows: z is a regression of
noise on d - s columns, so that

    E drift / drift* = 1 + (d - s) / (m - (d - s) - 1) = (m - 1) / (m - d + s - 1),

whatever the spectrum: kappa(Q) has no part in it. 1 / (1 - d/m)^2 is the usual bound of inverse
Wishart matrices; what is measured lies near its root.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from immunize_ext.errors import NotPositiveDefiniteError
from immunize_ext.ops import RegularizationFactor, concept_overlap, merge_kv, merge_report
from immunize_ext.storage import environment

from ._page import filled, parser, run, table

FILE = "merge_sensitivity.json"
SEEDS = 5
D, OUT, TOKENS = 96, 40, 6
SHARES = (0.25, 0.5, 1.0, 1.5, 2.0, 4.0, 8.0, 16.0)
KAPPAS = (1e2, 1e4, 1e6)
RIDGES: tuple[float | str, ...] = (0.0, 1e-6, 1e-4, 1e-2, "LW")
TOPICS = (1, 4, 16, 64, 256)
RANKS = (6, 12, 24, 48)
OVERLAPS = (0.0, 0.3, 0.6, 0.9, 0.99)
COUNTS = (2, 3, 5, 7, 9)


def predicted(m: int, d: int = D, s: int = TOKENS) -> float | None:
    """Expected inflation of Gaussian captions without a ridge; none where there is no merge."""
    return (m - 1) / (m - d + s - 1) if m >= d else None


class Population:
    """Gaussian text features: a mean direction that dominates, and a tail down to 1 / kappa."""

    def __init__(self, kappa: float, seed: int, d: int = D) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.d = d
        spectrum = torch.logspace(0, -torch.tensor(kappa).log10().item(), d).double()
        turn = torch.linalg.qr(self.normal(d, d)).Q
        self.root = turn * spectrum.sqrt()  # x = root z
        self.sigma = self.root @ self.root.mT

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, float64."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def rows(self, count: int) -> Tensor:
        """Text features."""
        return self.normal(count, self.d) @ self.root.mT

    def by_topics(self, count: int, topics: int, width: int = 8) -> Tensor:
        """Text features of few topics, each a mean and eight directions around it.

        Over all topics there are, their second moment is sigma.
        """
        means, around = self.rows(topics), self.rows(topics * width).reshape(topics, width, -1)
        which = torch.arange(count) % topics
        moved = torch.einsum("nw,nwd->nd", self.normal(count, width), around[which]) / width**0.5
        return (means[which] + moved) / 2**0.5

    def task(self, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
        """Base weights, tokens of concepts, and the outputs asked for."""
        base = self.normal(OUT, self.d) / self.d**0.5
        c = self.rows(tokens)
        return base, c, base @ c.mT + 0.3 * self.normal(OUT, tokens)


def shrunk(rows: Tensor) -> float:
    """The relative ridge that Ledoit and Wolf's estimator amounts to, (1 - a) Q + a mean I."""
    from sklearn.covariance import ledoit_wolf_shrinkage

    share = float(ledoit_wolf_shrinkage(rows.numpy(), assume_centered=True))
    return share / max(1.0 - share, 1e-12)


def factor_of(rows: Tensor, ridge: float | str) -> RegularizationFactor | None:
    """The factor; none where it is singular."""
    relative = shrunk(rows) if isinstance(ridge, str) else ridge
    try:
        return RegularizationFactor.from_embeddings(rows, ridge=relative)
    except NotPositiveDefiniteError:
        return None


def drift(delta: Tensor, sigma: Tensor) -> float:
    """Mean square change of outputs on the population."""
    return float(((delta @ sigma) * delta).sum())


def measured(
    population: Population, task: tuple[Tensor, Tensor, Tensor], factor: RegularizationFactor
) -> dict[str, float]:
    """Inflation on the population, residual of tokens with float32 weights, kappa(Q)."""
    base, c, values = task
    exact = RegularizationFactor(torch.linalg.cholesky(population.sigma), ridge=0.0, samples=0)
    (best,) = merge_kv([base], None, [c], exact, values=[values])
    (merged,) = merge_kv([base], None, [c], factor, values=[values])
    single = (base.float(), values.float())
    half = merge_kv([single[0]], None, [c], factor, values=[single[1]])
    report = merge_report(half, [single[0]], None, [c], factor, values=[single[1]])
    least = drift(best - base, population.sigma)
    return {
        "inflation": drift(merged - base, population.sigma) / least,
        "residual": report.residual["concept 0"],
        "kappa_q": report.condition_q,
        "kappa_t": float(report.condition_t or 0.0),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and range."""
    return {"mean": statistics.fmean(values), "least": min(values), "largest": max(values)}


def pooled(rows: Iterable[dict[str, float] | None]) -> dict[str, Any] | None:
    """Mean and range of each number over seeds; none where one had no merge."""
    found = list(rows)
    if any(row is None for row in found):
        return None
    return {key: spread([row[key] for row in found if row]) for key in found[0] or {}}


def over_seeds(
    seeds: int, kappa: float, draw: Callable[[Population], Tensor], ridge: float | str
) -> dict[str, Any] | None:
    """One cell: the same populations and tasks for every cell of a seed."""

    def one(seed: int) -> dict[str, float] | None:
        population = Population(kappa, seed)
        task = population.task()
        factor = factor_of(draw(population), ridge)
        return None if factor is None else measured(population, task, factor)

    return pooled(one(seed) for seed in range(seeds))


def captions(seeds: int, shares: Sequence[float]) -> list[dict[str, Any]]:
    """|C_reg| against ridge and spectrum."""
    return [
        {
            "kappa": kappa,
            "share": share,
            "ridge": ridge,
            "predicted": predicted(int(share * D)),
            "found": over_seeds(seeds, kappa, lambda p, n=int(share * D): p.rows(n), ridge),  # type: ignore[misc]
        }
        for kappa in KAPPAS
        for share in shares
        for ridge in RIDGES
    ]


def diversity(seeds: int, topics: Sequence[int]) -> list[dict[str, Any]]:
    """As many captions, 4 d, of ever more topics."""
    return [
        {
            "topics": count,
            "ridge": ridge,
            "found": over_seeds(seeds, 1e4, lambda p, k=count: p.by_topics(4 * D, k), ridge),  # type: ignore[misc]
        }
        for count in topics
        for ridge in (0.0, 1e-4, 1e-2, "LW")
    ]


def low_rank_factor(rows: Tensor, rank: int) -> RegularizationFactor:
    """The r leading eigenpairs of Q, and for all other directions the mean of what is left.

    Where nothing is left, a relative ridge of 1e-4.

    Woodbury's identity applies its inverse in O(r d); here it is formed, which gives the same.
    """
    values, vectors = torch.linalg.eigh(rows.mT @ rows)
    rest = max(float(values[:-rank].mean()), 1e-4 * float(values.mean()))
    values = torch.cat([torch.full_like(values[:-rank], rest), values[-rank:]])
    q = (vectors * values) @ vectors.mT
    return RegularizationFactor(torch.linalg.cholesky(q), ridge=rest, samples=len(rows))


def low_rank(seeds: int, ranks: Sequence[int]) -> list[dict[str, Any]]:
    """Low rank and a ridge in place of the whole Cholesky factor."""
    found = []
    for share in (0.5, 4.0):
        for rank in ranks:

            def one(seed: int, share: float = share, rank: int = rank) -> dict[str, float]:
                population = Population(1e4, seed)
                task = population.task()
                factor = low_rank_factor(population.rows(int(share * D)), rank)
                return measured(population, task, factor)

            found.append({"share": share, "rank": rank, "found": pooled(map(one, range(seeds)))})
    return found


def low_rank_seconds(rounds: int, d: int = 768, m: int = 4000, rank: int = 64) -> dict[str, float]:
    """Processor seconds of both factors at CLIP's width, least of several turns.

    Nystrom: Y = X^T X Omega, and the factor of rank r that it gives; its application to 24 tokens
    by Woodbury's identity, as the Cholesky factor's.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(m, d, generator=generator) * torch.logspace(0, -2, d)
    c = torch.randn(24, d, generator=generator, dtype=torch.float64)
    omega = torch.linalg.qr(torch.randn(d, rank, generator=generator)).Q

    def whole() -> Tensor:
        factor = RegularizationFactor.from_embeddings(x, ridge=1e-4)
        return torch.cholesky_solve(c.mT, factor.chol)

    def nystrom() -> Tensor:
        y = (x.mT @ (x @ omega)).double()
        core = torch.linalg.cholesky(omega.double().mT @ y)
        f = torch.linalg.solve_triangular(core, y.mT, upper=False)  # f^T f is near Q
        ridge = 1e-4 * float(f.square().sum()) / d
        inner = f @ f.mT + ridge * torch.eye(rank, dtype=torch.float64)
        return (c.mT - f.mT @ torch.linalg.solve(inner, f @ c.mT)) / ridge

    best = {"cholesky": float("inf"), "nystrom": float("inf")}
    for _ in range(rounds):
        for name, call in (("cholesky", whole), ("nystrom", nystrom)):
            started = time.thread_time()
            call()
            best[name] = min(best[name], time.thread_time() - started)
    return {**best, "rank": float(rank), "d": float(d), "captions": float(m)}


def overlap(seeds: int, counts: Sequence[int]) -> list[dict[str, Any]]:
    """N concepts of one token each, any two of them at the same cosine in the metric of Q^-1."""
    found = []
    for count in counts:
        for rho in OVERLAPS:

            def one(seed: int, count: int = count, rho: float = rho) -> dict[str, float]:
                population = Population(1e4, seed)
                base = population.normal(OUT, D) / D**0.5
                wanted = torch.full((count, count), rho).double().fill_diagonal_(1.0)
                axes = torch.linalg.qr(population.normal(D, count)).Q
                c = (axes @ torch.linalg.cholesky(wanted).mT).mT @ population.root.mT
                values = base @ c.mT + 0.3 * population.normal(OUT, count)
                factor = factor_of(population.rows(4 * D), 0.0)
                assert factor is not None
                row = measured(population, (base, c, values), factor)
                (merged,) = merge_kv([base], None, [c], factor, values=[values])
                among = concept_overlap(list(c.split(1)), factor)
                asked = float((values - base @ c.mT).square().sum())
                pairs = among[~torch.eye(count, dtype=torch.bool)]
                return {
                    **row,
                    "overlap": float(pairs.mean()),
                    "moved": drift(merged - base, population.sigma) / asked * count,
                }

            alone, together = 1.0 - rho, 1.0 + (count - 1) * rho
            inflation = predicted(4 * D, s=count)
            assert inflation is not None
            found.append(
                {
                    "concepts": count,
                    "rho": rho,
                    "kappa_t": together / alone,
                    # N E tr R T^-1 R^T / |R|^2 for targets without a preference, inflated.
                    "moved": ((count - 1) / alone + 1.0 / together)
                    * (predicted(4 * D, s=count) or 1.0),
                    "found": pooled(map(one, range(seeds))),
                }
            )
    return found


def digits() -> dict[str, Any]:
    """The text encoder of the digits pipeline: its spectrum, and what its concepts share."""
    from immunize_ext.text_to_image.digits.concepts import DIGIT_TEMPLATES, NEUTRAL_CAPTIONS
    from immunize_ext.text_to_image.digits.images import DIGIT_NAMES
    from immunize_ext.text_to_image.digits.pipeline import load_digits_pipeline
    from immunize_ext.text_to_image.model import TextToImage

    model = TextToImage(load_digits_pipeline())
    texts = [t.format(n) for t in DIGIT_TEMPLATES for n in DIGIT_NAMES] + list(NEUTRAL_CAPTIONS)
    rows = model.token_features(texts).double()
    factor = RegularizationFactor.from_embeddings(rows, ridge=1e-4)
    styles = ("a handwritten {}", "a drawing of the number {}", "a photo of the digit {}")
    sets = {
        f"{count} digits, two templates": [
            [t.format(n) for t in DIGIT_TEMPLATES[:2]] for n in DIGIT_NAMES[:count]
        ]
        for count in (3, 5, 9)
    }
    sets["9 of digit and style"] = [
        [s.format(n)] for n in ("three", "five", "eight") for s in styles
    ]
    found = {}
    for name, prompts in sets.items():
        tokens = [model.token_features(texts, positions="last") for texts in prompts]
        among = concept_overlap(tokens, factor)
        pairs = among[~torch.eye(len(among), dtype=torch.bool)]
        z = torch.linalg.solve_triangular(factor.chol, torch.cat(tokens).double().mT, upper=False)
        sigma = torch.linalg.svdvals(z)
        found[name] = {
            "overlap": spread(pairs.tolist()),
            "kappa_t": float((sigma[0] / sigma[-1]).square()),
        }
    distinct = torch.unique(rows.round(decimals=5), dim=0)
    values = torch.linalg.eigvalsh(rows.mT @ rows)
    return {
        "d": rows.shape[1],
        "captions": len(texts),
        "rows": len(rows),
        "distinct_rows": len(distinct),
        "rank": int((values > 1e-10 * values[-1]).sum()),
        "kappa_q_at_1e-4": factor.condition,
        "concepts": found,
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything."""
    torch.set_num_threads(1)
    quick = arguments.quick
    seeds = 2 if quick else SEEDS
    return {
        "environment": environment(),
        "seeds": seeds,
        "sizes": {"d": D, "rows": OUT, "tokens": TOKENS},
        "captions": captions(seeds, (0.5, 4.0) if quick else SHARES),
        "diversity": diversity(seeds, (1, 64) if quick else TOPICS),
        "low_rank": low_rank(seeds, (12,) if quick else RANKS),
        "low_rank_seconds": low_rank_seconds(1 if quick else 15),
        "overlap": overlap(seeds, (2, 9) if quick else COUNTS),
        "digits": digits(),
    }


# --- the page -------------------------------------------------------------------------------------


def in_words(ridge: float | str) -> str:
    """A ridge."""
    return "Ledoit-Wolf" if isinstance(ridge, str) else power(ridge)


def power(value: float) -> str:
    """A power of ten, or zero."""
    return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-") if value else "0"


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if value < 1e3 else f"{float(f'{value:.3g}'):,.0f}"


def ranged(found: dict[str, Any] | None, key: str) -> str:
    """Mean and range, or that there is no merge."""
    if found is None:
        return "singular"
    one = found[key]
    return f"{number(one['mean'])} ({number(one['least'])} to {number(one['largest'])})"


def parts(results: dict[str, Any]) -> dict[str, str]:
    """Blocks of docs/merge.md."""
    cells = {(r["kappa"], r["share"], r["ridge"]): r for r in results["captions"]}
    shares = sorted({share for _, share, _ in cells})
    middle = KAPPAS[1]

    def line(share: float) -> list[str]:
        expected = cells[middle, share, 0.0]["predicted"]
        bound = f"{number((1 - 1 / share) ** -2)}" if share > 1 else ""
        return [
            f"{share:g} d",
            "" if expected is None else number(expected),
            bound,
            *(ranged(cells[middle, share, ridge]["found"], "inflation") for ridge in RIDGES),
        ]

    def spectrum_line(kappa: float, share: float) -> list[str]:
        one = [cells[kappa, share, ridge]["found"] for ridge in RIDGES]
        return [
            power(kappa),
            f"{share:g} d",
            *("singular" if f is None else number(f["inflation"]["mean"]) for f in one),
        ]

    residuals = [r["found"]["residual"]["largest"] for r in results["captions"] if r["found"]]
    topics = {(r["topics"], r["ridge"]): r["found"] for r in results["diversity"]}
    ridges = list(dict.fromkeys(ridge for _, ridge in topics))
    ranks = {(r["rank"], r["share"]): r["found"] for r in results["low_rank"]}
    seconds = results["low_rank_seconds"]
    digits_ = results["digits"]
    return {
        "captions": table(
            ["captions", "expected", "bound", *(f"ridge {in_words(r)}" for r in RIDGES)],
            map(line, shares),
        ),
        "spectra": table(
            ["kappa", "captions", *(f"ridge {in_words(r)}" for r in RIDGES)],
            [spectrum_line(k, s) for k in KAPPAS for s in (0.5, 2.0, 16.0)],
        )
        + f"\n\nTokens are met in every cell: the largest residual, of float32 weights, is "
        f"{max(residuals):.0e}.",
        "diversity": table(
            ["topics", *(f"ridge {in_words(r)}" for r in ridges)],
            [
                [str(count), *(ranged(topics[count, ridge], "inflation") for ridge in ridges)]
                for count in dict.fromkeys(count for count, _ in topics)
            ],
        ),
        "low-rank": table(
            ["rank", "0.5 d captions", "4 d captions"],
            [
                [str(rank), *(ranged(ranks[rank, share], "inflation") for share in (0.5, 4.0))]
                for rank in dict.fromkeys(rank for rank, _ in ranks)
            ],
        )
        + f"\n\nAt d = {seconds['d']:.0f} and {seconds['captions']:.0f} captions the Cholesky "
        f"factor and its application to 24 tokens take {1e3 * seconds['cholesky']:.0f} ms, Nystrom "
        f"of rank {seconds['rank']:.0f} takes {1e3 * seconds['nystrom']:.0f} ms, on one thread.",
        "overlap": table(
            ["concepts", "overlap", "kappa(T)", "expected", "drift", "expected", "residual"],
            [
                [
                    str(r["concepts"]),
                    ranged(r["found"], "overlap"),
                    ranged(r["found"], "kappa_t"),
                    number(r["kappa_t"]),
                    ranged(r["found"], "moved"),
                    number(r["moved"]),
                    f"{r['found']['residual']['largest']:.0e}",
                ]
                for r in results["overlap"]
                if r["concepts"] in (2, 5, 9)
            ],
        ),
        "digits": f"The text encoder of the digits pipeline is {digits_['d']} wide; its "
        f"{digits_['captions']} prompts have {digits_['distinct_rows']} different token rows of "
        f"rank {digits_['rank']}.\n\n"
        + table(
            ["concepts", "largest cosine of two, mean and range", "kappa(T)"],
            [
                [name, ranged(one, "overlap"), number(one["kappa_t"])]
                for name, one in digits_["concepts"].items()
            ],
        ),
    }


PAGE = Path(__file__).resolve().parents[1] / "docs" / "merge.md"


def page(results: dict[str, Any]) -> str:
    """docs/merge.md with its blocks in their places."""
    return filled(PAGE.read_text(encoding="utf-8"), parts(results))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write or check."""
    return run(FILE, page, measure, parser("sensitivity of the merge"), argv)


if __name__ == "__main__":
    sys.exit(main())
