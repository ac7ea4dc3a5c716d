"""Several evaluations of one method, made into one: an immunization of its own for every seed."""

from __future__ import annotations

from collections.abc import Sequence

from immunize_ext.metrics.generation import RetainedQuality
from immunize_ext.metrics.spread import Spread
from immunize_ext.report.attack_runs import SIDES
from immunize_ext.report.text_to_image_evaluation import Comparison, TextToImageEvaluation


def pool(evaluations: Sequence[TextToImageEvaluation]) -> TextToImageEvaluation:
    """Join evaluations that differ in their seeds alone.

    Each of them may be of an immunization with a seed of its own, so that the spread of the result
    holds that of the immunizer as well as that of the attacks.

    Args:
        evaluations: What was measured, in the order of the seeds.

    Returns:
        One evaluation over all seeds; images are those of the first.

    Raises:
        ValueError: If there is none, they compared different things, or share a seed.
    """
    if not evaluations:
        raise ValueError("pool: evaluations must hold at least one, got none")
    first = evaluations[0]
    for other in evaluations[1:]:
        for name in ("attacks", "targets", "measures", "threshold"):
            if getattr(other, name) != getattr(first, name):
                raise ValueError(
                    f"pool: evaluations must agree in {name}, got {getattr(first, name)} and "
                    f"{getattr(other, name)}"
                )
    seeds = tuple(seed for evaluation in evaluations for seed in evaluation.seeds)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"pool: seeds must differ, got {seeds}")
    return TextToImageEvaluation(
        attacks=first.attacks,
        targets=first.targets,
        measures=first.measures,
        seeds=seeds,
        threshold=first.threshold,
        comparisons=tuple(
            _joined([evaluation.comparisons[index] for evaluation in evaluations])
            for index in range(len(first.comparisons))
        ),
        retained_before=_kept([evaluation.retained_before for evaluation in evaluations]),
        retained_after=_kept([evaluation.retained_after for evaluation in evaluations]),
        grids=first.grids,
    )


def _joined(parts: Sequence[Comparison]) -> Comparison:
    first = parts[0]
    if any(
        (p.attack, p.concept, p.role) != (first.attack, first.concept, first.role) for p in parts
    ):
        raise ValueError("pool: evaluations must have compared the same attacks and concepts")
    return Comparison(
        first.attack,
        first.concept,
        first.role,
        {side: tuple(curve for part in parts for curve in part.curves[side]) for side in SIDES},
    )


def _kept(parts: Sequence[dict[str, RetainedQuality]]) -> dict[str, RetainedQuality]:
    return {
        measure: RetainedQuality(
            {
                concept: Spread.of(
                    v for part in parts for v in part[measure].by_concept[concept].values
                )
                for concept in parts[0][measure].by_concept
            },
            Spread.of(value for part in parts for value in part[measure].mean.values),
        )
        for measure in parts[0]
    }
