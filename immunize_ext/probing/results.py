"""What pages and comparisons read out of the results of a condition-number run, of any schema."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

from immunize_ext.quantities import Slowdown
from immunize_ext.report.words import real

ROLES = ("harmful", "primary")


# --- parts of results.json that several modules read or write -------------------------------------


class Alternative(TypedDict):
    """Another method on the tasks of a run.

    Attributes:
        name: The method with its variant.
        rir: RIR at the ridge of the run.
        share_of_ceiling: Its share of the ceiling.
        i: Part of the harmful task.
        ii: Part of the primary task.
        harmful: Slow-down of gradient descent, and whether it is a lower bound: a pair.
        primary: The same of the primary task.
    """

    name: str
    rir: float
    share_of_ceiling: float
    i: float
    ii: float
    harmful: list[float]
    primary: list[float]


class AttackRow(TypedDict):
    """A later attack on one task; budgets are there where they were asked for."""

    attacker: str
    role: str
    task: str
    slowdown: float
    is_lower_bound: bool
    steps_without: int
    steps_with: int | None
    learning_rate_without: float | None
    learning_rate_with: float | None
    budgets: NotRequired[list[dict[str, float | None]]]


class Cell(TypedDict):
    """The best runs of a method within a budget of primary slow-down, over tasks and seeds.

    Attributes:
        median: Median of the slow-downs of the harm; ``None`` where no run is within.
        min: The least.
        max: The largest.
        is_lower_bound: Which of these are lower bounds; not kept by schema 1.
        lower_bounds: How many of the best runs rest on an attack that was cut off.
        cells: Tasks and seeds with a run within.
        of: All tasks and seeds.
    """

    median: float | None
    min: float | None
    max: float | None
    is_lower_bound: dict[str, bool]
    lower_bounds: int
    cells: int
    of: int


class Extent(TypedDict):
    """Mean, extremes and quartiles of a number over points; ``None`` where no point has it."""

    mean: float | None
    min: float | None
    max: float | None
    quartiles: list[float] | None


class RirExtent(Extent):
    """The same of RIR, with how many are below 1."""

    below_1: int


class ExtentBounds(TypedDict):
    """Which numbers of an extent are lower bounds."""

    mean: bool
    min: bool
    max: bool
    quartiles: list[bool]


class SlowdownExtent(Extent):
    """The same of slow-downs, with how many are none."""

    is_lower_bound: ExtentBounds
    not_slower: int


class SweepMethod(TypedDict):
    """One method with its variant over its points of a sweep."""

    points: int
    rir: dict[str, RirExtent]
    share_of_ceiling: Extent
    seconds_immunize: float
    seconds_total: float
    slowdown: dict[str, dict[str, SlowdownExtent]]


# --- what is read --------------------------------------------------------------------------------


# Results of schema 1 name their attackers by key alone; these are all that there were.
_SCHEMA_1_LABELS = {
    "gradient_descent": "Gradient descent",
    "line_search": "Gradient descent with line search",
    "conjugate_gradients": "Conjugate gradients",
    "whitened": "Whitens the features first",
    "closed_form_ridge": "Solves in closed form",
    "standardised": "Standardises the features first",
    "nesterov": "Nesterov's accelerated gradient",
    "lbfgs": "L-BFGS",
    "momentum": "Gradient descent with momentum 0.9",
    "sgd_momentum": "SGD with momentum 0.9",
    "adam": "Adam",
    "adagrad": "Adagrad",
}


_SCHEMA_1_UNAFFECTED = ("whitened", "closed_form_ridge")


@dataclass(frozen=True)
class AttackerInfo:
    """An attacker, as results know it.

    Attributes:
        label: What reports call it.
        sees_theta: Whether an invertible theta can slow it at all.
    """

    label: str
    sees_theta: bool = True


def attackers_of(results: Mapping[str, Any]) -> dict[str, AttackerInfo]:
    """The attackers of a run by name, in the order of reports.

    Args:
        results: Content of ``results.json``, or a point of a sweep.
    """
    known = {name: AttackerInfo(**found) for name, found in results.get("attackers", {}).items()}
    names = [name for role in ROLES for name in results.get("slowdown", {}).get(role, {})]
    missing = [name for name in dict.fromkeys(names) if name not in known]
    return known | {name: _named(name) for name in missing}


def _named(name: str) -> AttackerInfo:
    label = _SCHEMA_1_LABELS.get(name, name.replace("_", " ").capitalize())
    return AttackerInfo(label, name not in _SCHEMA_1_UNAFFECTED)


@dataclass(frozen=True)
class Attacked:
    """One attacker on one task.

    Attributes:
        role: ``"harmful"`` or ``"primary"``.
        attacker: Who attacks.
        slowdown: How many times more steps it needs.
        facts: What else was measured: steps, budget, target, curves; empty for points of sweeps.
    """

    role: str
    attacker: AttackerInfo
    slowdown: Slowdown
    facts: Mapping[str, Any]

    @property
    def before(self) -> int:
        """Steps without immunization."""
        return int(self.facts["steps_without"])

    @property
    def learns(self) -> bool:
        """Whether there was anything to slow: without immunization it beats the untrained head."""
        return bool(self.facts.get("steps_without", 1))

    @property
    def after(self) -> int | None:
        """Steps with immunization; ``None`` if the attacker did not get there."""
        steps = self.facts["steps_with"]
        return None if steps is None else int(steps)

    @property
    def budget(self) -> int:
        """Steps that it was given with immunization."""
        return int(self.facts["budget_with"])

    @property
    def curves(self) -> Mapping[str, Mapping[str, Any]] | None:
        """Steps, losses and accuracies ``"without"`` and ``"with"``; ``None`` in schema 1."""
        return self.facts.get("curves")

    def at(self, key: str, step: int) -> tuple[float, float] | None:
        """Values at the last step drawn that is not beyond one, without and with immunization."""
        if self.curves is None or any(key not in curve for curve in self.curves.values()):
            return None
        found = []
        for side in ("without", "with"):
            steps = self.curves[side]["steps"]
            index = max(i for i, drawn in enumerate(steps) if drawn <= step)
            found.append(real(self.curves[side][key][index]))
        return found[0], found[1]


def attacked(results: Mapping[str, Any]) -> dict[str, dict[str, Attacked]]:
    """All attacks of a run, by role and attacker."""
    infos = attackers_of(results)
    found: dict[str, dict[str, Attacked]] = {}
    for role in ROLES:
        ratios, bounds = results["slowdown"][role], results["slowdown_is_lower_bound"][role]
        facts = results.get("attacks", {}).get(role, {})
        found[role] = {
            name: Attacked(
                role, infos[name], Slowdown(real(ratio), bool(bounds[name])), facts.get(name, {})
            )
            for name, ratio in ratios.items()
        }
    return found
