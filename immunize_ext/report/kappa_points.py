"""Finished condition-number runs as points: slow-down of the harm against that of the primary task.

Two methods are compared at equal cost: only runs whose primary slow-down, for the same attacker,
is within a budget count, and of those the one that slows the harm most. No run is interpolated.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from immunize_ext.attacks import ATTACKERS

# Primary slow-downs at which methods are compared; 1: the owner pays nothing.
BUDGETS = (0.5, 1.0, 2.0)
HEADLINE_BUDGET = 1.0

# The attacker who may choose: least slow-down of the harm, largest of the primary task.
WORST = "worst"


@dataclass(frozen=True)
class Point:
    """One run.

    Attributes:
        name: Where it was found.
        method: Its method with the variant.
        knob: Name and value of the method's knob; ``None`` without one.
        tasks: What it is about: the same for runs that may be compared.
        seed: Its seed.
        harmful: Slow-down of the harmful task by attacker.
        primary: Slow-down of the primary task by attacker.
        bounded: Attackers whose harmful slow-down is a lower bound.
        rir: RIR by rank policy.
        share_of_ceiling: Its share of the ceiling.
        seconds: What immunizing took.
    """

    name: str
    method: str
    knob: tuple[str, float | str] | None
    tasks: str
    seed: int
    harmful: dict[str, float]
    primary: dict[str, float]
    bounded: frozenset[str]
    rir: dict[str, float]
    share_of_ceiling: float
    seconds: float

    def is_lower_bound(self, attacker: str) -> bool:
        """Whether the attack on the harmful task was cut off by its budget."""
        if attacker != WORST:
            return attacker in self.bounded
        names = [n for n in self.harmful if n in self.primary and ATTACKERS[n].sees_theta]
        least = min(names, key=lambda name: self.harmful[name])
        return least in self.bounded

    def slowdowns(self, attacker: str) -> tuple[float, float] | None:
        """Slow-down of the primary and of the harmful task; ``None`` if not measured."""
        if attacker == WORST:
            names = [n for n in self.harmful if n in self.primary and ATTACKERS[n].sees_theta]
            if not names:
                return None
            return max(self.primary[n] for n in names), min(self.harmful[n] for n in names)
        if attacker not in self.harmful or attacker not in self.primary:
            return None
        return self.primary[attacker], self.harmful[attacker]


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)  # strict JSON writes "inf", and NaN as null


def point_of(name: str, results: dict[str, Any]) -> Point:
    """Take a point out of ``results.json`` of a run, or of a point of a sweep.

    Args:
        name: Where it was found.
        results: Its content.

    Returns:
        The point.

    Raises:
        ValueError: If a field is missing.
    """
    try:
        request, knob = results["request"], results["knob"]
        bounds = results["slowdown_is_lower_bound"]["harmful"]
        tasks = [f"{role}: {results['tasks'][role]['name']}" for role in ("primary", "harmful")]
        keys = ("data", "size", "max_train", "loss", "ridge", "base_budget", "limit")
        return Point(
            name=name,
            method=results["method_label"],
            knob=None if knob is None else (knob["name"], knob["value"]),
            # Runs under other conditions are other tasks.
            tasks="; ".join([*tasks, *(f"{k} {request[k]}" for k in keys)]),
            seed=int(request["seed"]),
            harmful={n: _number(v) for n, v in results["slowdown"]["harmful"].items()},
            primary={n: _number(v) for n, v in results["slowdown"]["primary"].items()},
            bounded=frozenset(n for n, bound in bounds.items() if bound),
            rir={policy: _number(value) for policy, value in results["rir"].items()},
            share_of_ceiling=_number(results["share_of_ceiling"]),
            seconds=_number(results["seconds"]["immunize"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name}: results.json must be of a finished kappa run, got {error!r}; run it again"
        ) from None


def equal_cost(
    points: Iterable[Point], attacker: str, budgets: Sequence[float] = BUDGETS
) -> dict[str, dict[str, Any]]:
    """The most that each method slows the harm within budgets of primary slow-down.

    Args:
        points: The runs.
        attacker: Whose slow-downs count, on both tasks; or :data:`WORST`.
        budgets: Largest primary slow-downs.

    Returns:
        By method, then by budget: ``median`` over tasks and seeds of the best slow-down within the
        budget, ``min``, ``max``, ``lower_bounds`` (how many of these were cut off), ``cells``
        (tasks and seeds where a run is within it) and ``of``.

    Example:
        >>> point = Point("a", "m", None, "t", 0, {"lbfgs": 3.0}, {"lbfgs": 0.9}, frozenset(), {},
        ...               1.0, 0.0)
        >>> equal_cost([point], "lbfgs", [0.5, 1.0])["m"]["1"]["median"]
        3.0
    """
    methods: dict[str, dict[tuple[str, int], list[tuple[float, float, bool]]]] = {}
    for point in points:
        found = point.slowdowns(attacker)
        if found is not None:
            cells = methods.setdefault(point.method, {})
            cut_off = point.is_lower_bound(attacker)
            cells.setdefault((point.tasks, point.seed), []).append((*found, cut_off))
    table: dict[str, dict[str, Any]] = {}
    for method, cells in methods.items():
        table[method] = {}
        for budget in budgets:
            best = [
                max(within)
                for runs in cells.values()
                if (within := [(harm, cut) for cost, harm, cut in runs if cost <= budget])
            ]
            values = [harm for harm, _ in best]
            table[method][f"{budget:g}"] = {
                "median": statistics.median(values) if values else None,
                "min": min(values, default=None),
                "max": max(values, default=None),
                "lower_bounds": sum(cut for _, cut in best),
                "cells": len(best),
                "of": len(cells),
            }
    return table


def curves(points: Iterable[Point], attacker: str) -> dict[str, list[tuple[float, float]]]:
    """Each method's curve: geometric means over tasks and seeds, one for each value of its knob.

    Args:
        points: The runs.
        attacker: Whose slow-downs count, or :data:`WORST`.

    Returns:
        By method: primary and harmful slow-down, in the order of the knob.
    """
    groups: dict[str, dict[float, list[tuple[float, float]]]] = {}
    for point in points:
        found = point.slowdowns(attacker)
        if found is None:
            continue
        value = point.knob[1] if point.knob is not None else 0.0
        # Calibrated strengths differ between tasks, and belong together.
        key = float(value) if isinstance(value, (int, float)) else math.inf
        groups.setdefault(point.method, {}).setdefault(key, []).append(found)
    return {
        method: [
            (
                statistics.geometric_mean([max(cost, 1e-9) for cost, _ in by_value[key]]),
                statistics.geometric_mean([max(harm, 1e-9) for _, harm in by_value[key]]),
            )
            for key in sorted(by_value)
        ]
        for method, by_value in groups.items()
    }
