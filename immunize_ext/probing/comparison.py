"""Finished condition-number runs as points: slow-down of the harm against that of the primary task.

Two methods are compared at equal cost: only runs whose primary slow-down is within a budget count,
and of those the one that slows the harm most. No run is interpolated. A number that rests on an
attack that was cut off says so wherever it goes: it is a lower bound.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from immunize_ext._version import __version__
from immunize_ext.probing.results import (
    ROLES,
    AttackerInfo,
    Cell,
    Extent,
    RirExtent,
    SlowdownExtent,
    SweepMethod,
    attackers_of,
)
from immunize_ext.quantities import Slowdown
from immunize_ext.report.words import real, slowed
from immunize_ext.storage import read_results
from immunize_ext.sweep import finished

# Primary slow-downs at which methods are compared; 1: the owner pays nothing.
BUDGETS = (0.5, 1.0, 2.0)


HEADLINE_BUDGET = 1.0


# Who may choose: the attacker among all that were tried, or among those who train step by step. The
# owner chooses too, among the latter: so one attacker more never makes a run too expensive.
WORST, WORST_STEPWISE = "worst", "worst_stepwise"


POLICIES = ("official", "ridge", "rank_aware")


@dataclass(frozen=True)
class Point:
    """One run.

    Attributes:
        name: Where it was found.
        method: Its method with the variant.
        knob: Name and value of the method's knob; ``None`` without one.
        tasks: What it is about: the same for runs that may be compared.
        seed: Its seed.
        slowdown: Slow-downs by role and attacker.
        attackers: Who was tried.
        rir: RIR by rank policy.
        share_of_ceiling: Its share of the ceiling.
        seconds: What immunizing took.
    """

    name: str
    method: str
    knob: tuple[str, float | str] | None
    tasks: str
    seed: int
    slowdown: dict[str, dict[str, Slowdown]]
    attackers: dict[str, AttackerInfo]
    rir: dict[str, float]
    share_of_ceiling: float
    seconds: float

    @property
    def complete(self) -> list[str]:
        """Attackers that were tried on both tasks."""
        return [n for n in self.attackers if all(n in self.slowdown[role] for role in ROLES)]

    def pair(
        self, attacker: str, among: Sequence[str] | None = None
    ) -> tuple[Slowdown, Slowdown] | None:
        """Slow-down of the primary and of the harmful task; ``None`` if not measured.

        Args:
            attacker: A name, :data:`WORST` or :data:`WORST_STEPWISE`.
            among: Who may be chosen; all who were tried on both tasks when omitted.
        """
        if attacker not in (WORST, WORST_STEPWISE):
            found = [self.slowdown[role].get(attacker) for role in ("primary", "harmful")]
            primary, harmful = found
            return None if primary is None or harmful is None else (primary, harmful)
        names = [n for n in self.complete if among is None or n in among]
        stepwise = [n for n in names if self.attackers[n].sees_theta]
        chosen = stepwise if attacker == WORST_STEPWISE else names
        if not chosen:
            return None
        cost = min(self.slowdown["primary"][n] for n in stepwise or names)
        return cost, min(self.slowdown["harmful"][n] for n in chosen)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, under the names of ``results.json`` of a comparison."""
        knob = self.knob
        return {
            "name": self.name,
            "method": self.method,
            "knob": None if knob is None else dict(zip(("name", "value"), knob, strict=True)),
            "tasks": self.tasks,
            "seed": self.seed,
            "attackers": {n: vars(info) for n, info in self.attackers.items()},
            "slowdown": {
                role: {n: s.ratio for n, s in found.items()}
                for role, found in self.slowdown.items()
            },
            "slowdown_is_lower_bound": {
                role: {n: s.censored for n, s in found.items()}
                for role, found in self.slowdown.items()
            },
            "rir": self.rir,
            "share_of_ceiling": self.share_of_ceiling,
            "seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Point:
        """Take back what :meth:`to_dict` gave; schema 1 did not keep which are lower bounds."""
        knob = values["knob"]
        return cls(
            values["name"],
            values["method"],
            None if knob is None else (knob["name"], knob["value"]),
            values["tasks"],
            int(values["seed"]),
            _slowdowns(values, values.get("slowdown_is_lower_bound", {})),
            attackers_of(values),
            {policy: real(value) for policy, value in values["rir"].items()},
            real(values["share_of_ceiling"]),
            real(values["seconds"]),
        )


def _slowdowns(
    values: Mapping[str, Any], bounds: Mapping[str, Any]
) -> dict[str, dict[str, Slowdown]]:
    return {
        role: {
            name: Slowdown(real(ratio), bool(bounds.get(role, {}).get(name, False)))
            for name, ratio in values["slowdown"][role].items()
        }
        for role in ROLES
    }


def point_of(name: str, results: Mapping[str, Any]) -> Point:
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
        tasks = [f"{role}: {results['tasks'][role]['name']}" for role in ("primary", "harmful")]
        keys = ("data", "size", "max_train", "loss", "ridge", "base_budget", "limit")
        return Point(
            name=name,
            method=results["method_label"],
            knob=None if knob is None else (knob["name"], knob["value"]),
            # Runs under other conditions are other tasks.
            tasks="; ".join([*tasks, *(f"{k} {request[k]}" for k in keys)]),
            seed=int(request["seed"]),
            slowdown=_slowdowns(results, results["slowdown_is_lower_bound"]),
            attackers=attackers_of(results),
            rir={policy: real(value) for policy, value in results["rir"].items()},
            share_of_ceiling=real(results["share_of_ceiling"]),
            seconds=real(results["seconds"]["immunize"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name}: results.json must be of a finished kappa run, got {error!r}; run it again"
        ) from None


def with_attacks(folder: Path, results: Mapping[str, Any]) -> Mapping[str, Any]:
    """Results with what later attacks added; of attacks with the run's own loss and limits.

    Where a run is against several harmful tasks, the least slow-down counts.

    Raises:
        ValueError: If a file of attacks is damaged.
    """
    merged = {r: dict(v) for r, v in results["slowdown"].items()}
    bounds = {r: dict(v) for r, v in results["slowdown_is_lower_bound"].items()}
    attackers = dict(results.get("attackers", {}))
    for path in sorted((folder / "attacks").glob("*.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} must be JSON, got: {error}; remove it") from error
        request = results["request"]
        if any(found[key] != request[key] for key in ("loss", "base_budget", "limit")):
            continue
        attackers = {**found.get("attackers", {}), **attackers}
        added: dict[tuple[str, str], tuple[float, bool]] = {}
        for row in found["attacks"]:
            key = row["role"], row["attacker"]
            value = real(row["slowdown"]), bool(row["is_lower_bound"])
            added[key] = min(added.get(key, value), value)
        for (role, name), (ratio, bound) in added.items():
            merged[role][name], bounds[role][name] = ratio, bound
    changed = {"slowdown": merged, "slowdown_is_lower_bound": bounds, "attackers": attackers}
    return {**results, **changed}


def load_points(folders: Sequence[str | Path]) -> list[Point]:
    """Runs and the points of sweeps, later attacks included.

    Args:
        folders: Run and sweep directories.

    Raises:
        FileNotFoundError: If one holds no results.
        ValueError: If one holds something else.
    """
    points = []
    for folder in map(Path, folders):
        results = read_results(folder)
        if results["kind"] == "kappa-sweep":
            for name, point in finished(folder).items():
                points.append(point_of(f"{folder.name}/{name}", point))
        else:
            points.append(point_of(folder.name, with_attacks(folder, results)))
    return points


# --- numbers over several runs, lower bounds among them ------------------------------------------


def bounded_quantile(values: Sequence[Slowdown], share: float) -> Slowdown:
    """Quantile of slow-downs of which some are lower bounds.

    Args:
        values: At least one.
        share: From 0, the least, to 1, the largest; between two values it is interpolated.

    Returns:
        The quantile. It is a lower bound if a cut-off attack stands at or below it: with more steps
        it might have moved beyond.

    Example:
        >>> values = [Slowdown(1.0, False), Slowdown(2.0, False), Slowdown(64.0, True)]
        >>> bounded_quantile(values, 0.5), bounded_quantile(values, 1.0)
        (Slowdown(ratio=2.0, censored=False), Slowdown(ratio=64.0, censored=True))
    """
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    part = place - math.floor(place)
    ratio = low.ratio if part == 0.0 else low.ratio + part * (high.ratio - low.ratio)
    return Slowdown(ratio, any(value.censored for value in ordered[: math.ceil(place) + 1]))


def _slowdown_extent(values: Sequence[Slowdown]) -> SlowdownExtent:
    """Mean, extremes and quartiles, and which of them are lower bounds."""
    quartiles = [bounded_quantile(values, share) for share in (0.25, 0.5, 0.75)]
    least, most = bounded_quantile(values, 0.0), bounded_quantile(values, 1.0)
    return {
        "mean": statistics.fmean(value.ratio for value in values),
        "min": least.ratio,
        "max": most.ratio,
        "quartiles": [value.ratio for value in quartiles],
        "is_lower_bound": {
            "mean": any(value.censored for value in values),
            "min": least.censored,
            "max": most.censored,
            "quartiles": [value.censored for value in quartiles],
        },
        "not_slower": sum(not slowed(value) for value in values),
    }


def equal_cost(
    points: Iterable[Point],
    attacker: str,
    budgets: Sequence[float] = BUDGETS,
    among: Sequence[str] | None = None,
) -> dict[str, dict[str, Cell]]:
    """The most that each method slows the harm within budgets of primary slow-down.

    Args:
        points: The runs.
        attacker: Whose slow-downs count, on both tasks; or :data:`WORST`, :data:`WORST_STEPWISE`.
        budgets: Largest primary slow-downs. A run whose primary attack was cut off is in none.
        among: Who may be chosen as the worst.

    Returns:
        Cells by method, then by budget.

    Example:
        >>> slowdown = {"harmful": {"lbfgs": Slowdown(3.0, True)},
        ...             "primary": {"lbfgs": Slowdown(0.9, False)}}
        >>> point = Point("a", "m", None, "t", 0, slowdown, {"lbfgs": AttackerInfo("L-BFGS")}, {},
        ...               1.0, 0.0)
        >>> cell = equal_cost([point], "lbfgs", [0.5, 1.0])["m"]["1"]
        >>> cell["median"], cell["is_lower_bound"]["median"]
        (3.0, True)
    """
    methods: dict[str, dict[tuple[str, int], list[tuple[Slowdown, Slowdown]]]] = {}
    for point in points:
        found = point.pair(attacker, among)
        if found is not None:
            cells = methods.setdefault(point.method, {})
            cells.setdefault((point.tasks, point.seed), []).append(found)
    table: dict[str, dict[str, Cell]] = {}
    for method, cells in methods.items():
        table[method] = {}
        for budget in budgets:
            best = [
                bounded_quantile(within, 1.0)
                for runs in cells.values()
                if (within := [h for c, h in runs if c.ratio <= budget and not c.censored])
            ]
            shares = {"median": 0.5, "min": 0.0, "max": 1.0}
            values = {k: bounded_quantile(best, share) for k, share in shares.items() if best}
            table[method][f"{budget:g}"] = {
                "median": values["median"].ratio if best else None,
                "min": values["min"].ratio if best else None,
                "max": values["max"].ratio if best else None,
                "is_lower_bound": {k: bool(best) and values[k].censored for k in shares},
                "lower_bounds": sum(value.censored for value in best),
                "cells": len(best),
                "of": len(cells),
            }
    return table


def curves(
    points: Iterable[Point], attacker: str, among: Sequence[str] | None = None
) -> dict[str, list[tuple[float, float]]]:
    """Each method's curve: geometric means over tasks and seeds, one for each value of its knob.

    Args:
        points: The runs.
        attacker: Whose slow-downs count, or :data:`WORST`, :data:`WORST_STEPWISE`.
        among: Who may be chosen as the worst.

    Returns:
        By method: primary and harmful slow-down, in the order of the knob.
    """
    groups: dict[str, dict[float, list[tuple[Slowdown, Slowdown]]]] = {}
    for point in points:
        found = point.pair(attacker, among)
        if found is None:
            continue
        value = point.knob[1] if point.knob is not None else 0.0
        # Calibrated strengths differ between tasks, and belong together.
        key = float(value) if isinstance(value, (int, float)) else math.inf
        groups.setdefault(point.method, {}).setdefault(key, []).append(found)
    return {
        method: [
            (
                statistics.geometric_mean([max(cost.ratio, 1e-9) for cost, _ in by_value[key]]),
                statistics.geometric_mean([max(harm.ratio, 1e-9) for _, harm in by_value[key]]),
            )
            for key in sorted(by_value)
        ]
        for method, by_value in groups.items()
    }


def common_attackers(points: Sequence[Point]) -> dict[str, AttackerInfo]:
    """Attackers that every point has on both tasks, in the order of reports."""
    known: dict[str, AttackerInfo] = {}
    for point in points:
        known |= {n: info for n, info in point.attackers.items() if n not in known}
    return {n: i for n, i in known.items() if points and all(n in p.complete for p in points)}


def compare(points: Sequence[Point]) -> dict[str, Any]:
    """Everything that the comparison says, as plain values.

    Args:
        points: At least one run with attacks.

    Returns:
        The results, of kind ``kappa-comparison``: runs, equal-cost tables and curves by attacker.

    Raises:
        ValueError: If no attacker is common to all runs.
    """
    attackers = common_attackers(points)
    if not attackers:
        raise ValueError(
            "report: runs must share an attacker, got none that all of them have; add one with "
            "immunize attack RUN --attackers gradient_descent, or sweep with --attackers"
        )
    names = list(attackers)
    chosen = [*names, *([WORST] if len(names) > 1 else [])]
    if 1 < sum(info.sees_theta for info in attackers.values()) < len(names):
        chosen.insert(-1, WORST_STEPWISE)
    return {
        "schema": 2,
        "kind": "kappa-comparison",
        "version": __version__,
        "attackers": {n: vars(info) for n, info in attackers.items()},
        "runs": [point.to_dict() for point in points],
        "equal_primary_slowdown": {n: equal_cost(points, n, among=names) for n in chosen},
        "frontier": {n: curves(points, n, names) for n in chosen},
    }


# --- sweeps -------------------------------------------------------------------------------------


def _variant(point: Mapping[str, Any]) -> str:
    """A method with the value of its knob."""
    knob = point["knob"]
    label = str(point["method_label"])
    if knob is None or knob["value"] is None:
        return label
    value = knob["value"]
    return f"{label}, {knob['name']} = {value:.4g}" if not isinstance(value, str) else label


def _extent(values: Sequence[float]) -> Extent:
    found = [value for value in values if not math.isnan(value)]
    if not found:
        return {"mean": None, "min": None, "max": None, "quartiles": None}
    quartiles = (
        statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
    )
    return {
        "mean": statistics.fmean(found),
        "min": min(found),
        "max": max(found),
        "quartiles": quartiles,
    }


def summarise(points: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Means, extremes and quartiles of each method over its points.

    Args:
        points: Points of a sweep by name.

    Returns:
        The results, of kind ``kappa-sweep``: by method, RIR under each rank policy with how many
        are below 1, share of the ceiling, seconds, slow-downs where they were measured, and a map
        of log RIR by pair of tasks.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for point in points.values():
        groups.setdefault(_variant(point), []).append(point)
    methods: dict[str, SweepMethod] = {}
    for name, members in groups.items():
        rir = {}
        for policy in POLICIES:
            values = [real(point["rir"][policy]) for point in members]
            rir[policy] = RirExtent(**_extent(values), below_1=sum(value < 1.0 for value in values))
        slowdowns = [_slowdowns(p, p["slowdown_is_lower_bound"]) for p in members]
        methods[name] = {
            "points": len(members),
            "rir": rir,
            "share_of_ceiling": _extent([real(p["share_of_ceiling"]) for p in members]),
            "seconds_immunize": sum(real(p["seconds"]["immunize"]) for p in members),
            "seconds_total": sum(real(p["seconds"]["total"]) for p in members),
            "slowdown": {
                role: {
                    attacker: _slowdown_extent([found[role][attacker] for found in slowdowns])
                    for attacker in slowdowns[0][role]
                }
                for role in ROLES
            },
        }
    maps = {}
    for name in methods:
        rows, columns, matrix = heat_map(points, name)
        maps[name] = {"rows": rows, "columns": columns, "log_rir": matrix.tolist()}
    first = next(iter(points.values()))
    attackers = {n: vars(i) for point in points.values() for n, i in attackers_of(point).items()}
    return {
        "schema": 2,
        "kind": "kappa-sweep",
        "points": len(points),
        "attackers": attackers,
        "methods": methods,
        "maps": maps,
        "environment": first["environment"],
    }


def heat_map(
    points: Mapping[str, Mapping[str, Any]], method: str, policy: str = "official"
) -> tuple[list[str], list[str], np.ndarray]:
    """Log RIR of one method by pair of tasks, mean over seeds.

    Args:
        points: Points of a sweep by name.
        method: A key of ``summarise(points)["methods"]``.
        policy: Rank policy of the RIR.

    Returns:
        Harmful tasks (rows), primary tasks (columns) and the matrix, NaN where there is no point.
    """
    cells: dict[tuple[str, str], list[float]] = {}
    for point in points.values():
        if _variant(point) == method:
            request = point["request"]
            harmful = "+".join(request["harmful"]) or point["tasks"]["harmful"]["name"]
            primary = request["primary"] or point["tasks"]["primary"]["name"]
            cells.setdefault((harmful, primary), []).append(real(point["log_rir"][policy]))
    rows = sorted({row for row, _ in cells})
    columns = sorted({column for _, column in cells})
    matrix = np.full((len(rows), len(columns)), math.nan)
    for (row, column), values in cells.items():
        matrix[rows.index(row), columns.index(column)] = statistics.fmean(values)
    return rows, columns, matrix
