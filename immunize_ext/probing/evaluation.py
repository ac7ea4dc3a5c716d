"""What is known of an immunized extractor, measured once, as plain values: what results.json holds.

Both tasks are attacked by every attacker and judged on their own test parts; the condition numbers
come from the training inputs, which is what an attacker's optimizer sees. Nothing here draws: a
page is made of these values alone, now or years later.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from immunize_ext.probing.attacks import (
    ATTACKS,
    STANDARD,
    AttackComparison,
    AttackCurve,
    LossName,
    compare_attack,
    knows,
    label_of,
)
from immunize_ext.probing.data import Problem, Task, TaskLike, gram_equivalent, gram_rows
from immunize_ext.probing.data.scale import excess_exponent, in_range
from immunize_ext.probing.immunizers import METHODS, Immunized, knob_of
from immunize_ext.probing.metrics import (
    AttackerSteps,
    RelativeImmunizationRatio,
    WorstCase,
    ceiling_table,
    few_sample_error,
    grouped_linear_rir,
    leading_subspace_angles,
    line_search_norm_ratio,
    log_rir_ceiling,
    relative_degradation,
    relative_immunization_ratio,
    spectral_slowdown,
    with_ridge,
    worst_case,
)
from immunize_ext.quantities import Slowdown
from immunize_ext.report.page import in_notebook
from immunize_ext.seams import Attack, Progress

ROLES: tuple[Literal["harmful", "primary"], ...] = ("harmful", "primary")


POLICIES: tuple[Literal["official", "ridge", "rank_aware"], ...] = (
    "official",
    "ridge",
    "rank_aware",
)


# An accuracy that falls by less than this is "hardly changed".
ACCURACY_MARGIN = 0.02


# Points of a curve, and eigenvalues of a spectrum, that are kept for plots.
_CURVE_POINTS, _EIGENVALUES = 120, 256


# Steps at which the norm ratio under exact line search is quoted.
NORM_RATIO_STEPS = (1, 3, 10, 30, 100)


GROUPS, GROUP_SIZE, FEW_SAMPLES, SUBSPACE = 20, 100, 50, 5


Table = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """What was measured; the fields are keys of ``results.json``.

    Attributes:
        tasks: By role: name, kind, numbers of samples and of features.
        attackers: Who attacked, in the order of reports: label, and whether theta can slow it.
        rir: RIR by rank policy.
        log_rir: Its logarithm.
        ridge: The relative ridge of the condition numbers.
        ceiling: The largest RIR that any theta could reach at this ridge.
        ceiling_growth: Factor by which the ceiling grows when the ridge falls tenfold.
        share_of_ceiling: RIR divided by its ceiling.
        i: (i) at this ridge, the harmful task's part.
        ii: (ii) at this ridge, the primary task's part.
        condition_numbers: By rank policy: both parts, logarithms of kappas before and after, ranks.
        slowdown: By role and attacker: how many times more steps.
        slowdown_is_lower_bound: Which of these were cut off by the budget.
        attacks: By role and attacker: steps, target, learning rates, and both curves, thinned.
        warnings: What a reader has to know before quoting the numbers, one sentence each.
        details: The measurements beside RIR and the attacks, by name; empty for points of sweeps.
    """

    tasks: dict[str, Table]
    attackers: dict[str, Table]
    rir: dict[str, float]
    log_rir: dict[str, float]
    ridge: float
    ceiling: float
    ceiling_growth: float
    share_of_ceiling: float
    i: float
    ii: float
    condition_numbers: dict[str, Table]
    slowdown: dict[str, dict[str, float]]
    slowdown_is_lower_bound: dict[str, dict[str, bool]]
    attacks: dict[str, dict[str, Table]]
    warnings: list[str] = field(default_factory=list)
    details: Table = field(default_factory=dict)

    def to_dict(self) -> Table:
        """Everything, as JSON can say it; details stand beside the rest."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "details"}
        return {**found, **self.details}

    def _repr_html_(self) -> str | None:
        """What a notebook shows."""
        return in_notebook("kappa-evaluation", self.to_dict())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evaluation:
        """Take back what :meth:`to_dict` gave, also out of a results.json.

        Args:
            values: The content; keys that are no measurement are left alone.

        Raises:
            ValueError: If a field is missing.
        """
        own = [f.name for f in fields(cls) if f.name not in ("details", "warnings")]
        missing = [name for name in own if name not in values]
        if missing:
            raise ValueError(
                f"Evaluation.from_dict: values must hold {missing[0]}, got none; give the results "
                "of a whole run"
            )
        details = {name: _number(values[name]) for name in DETAILS if name in values}
        found = {name: _number(values[name]) for name in own}
        return cls(**found, warnings=list(values.get("warnings", ())), details=details)

    def metrics(self) -> list[Table]:
        """The curves as rows for ``metrics.jsonl``, one a step that is kept."""
        rows: list[Table] = []
        for role, attacks in self.attacks.items():
            for name, facts in attacks.items():
                for side, curve in facts.get("curves", {}).items():
                    about = {
                        "kind": "attack",
                        "role": role,
                        "attacker": name,
                        "immunized": side == "with",
                    }
                    columns = zip(*curve.values(), strict=True)
                    keys = ["step", *(key for key in curve if key != "steps")]
                    rows += [about | dict(zip(keys, row, strict=True)) for row in columns]
        return rows


def _number(value: Any) -> Any:
    """Plain values with infinities as numbers again; strict JSON has them as text."""
    if isinstance(value, Mapping):
        return {key: _number(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_number(item) for item in value]
    return (
        {"inf": math.inf, "-inf": -math.inf}.get(value, value) if isinstance(value, str) else value
    )


def log_spaced_steps(last: int, count: int) -> list[int]:
    """About ``count`` steps from 0 to ``last``, evenly spaced on a logarithmic axis."""
    spaced = np.geomspace(1, max(last, 1), count).round().astype(int)
    return sorted({0, *spaced.tolist()} & set(range(last + 1)))


def _thinned(curve: AttackCurve, quoted: Iterable[int], *, accuracy: bool) -> Table:
    """A curve at the steps that a plot can show and those that sentences quote, to six digits."""
    last = curve.steps[-1]
    wanted = {*log_spaced_steps(last, _CURVE_POINTS), *quoted, last}
    places = [index for index, step in enumerate(curve.steps) if step in wanted]
    found: Table = {"steps": [curve.steps[index] for index in places]}
    for name, values in curve.scores.items():
        if accuracy or name != "test_accuracy":
            found[name] = [float(f"{values[index]:.6g}") for index in places]
    return found


def _facts(comparison: AttackComparison, *, accuracy: bool, curves: bool) -> Table:
    """One attacker on one task."""
    quoted = {1, 10, 100, comparison.base_steps, comparison.steps or 0}
    sides = {"without": comparison.base, "with": comparison.immunized}
    facts: Table = {
        "target_test_loss": comparison.target,
        "steps_without": comparison.base_steps,
        "steps_with": comparison.steps,
        "budget_with": comparison.immunized.steps[-1],
    }
    for side, curve in sides.items():
        finite = [value for value in curve.score("test_loss") if math.isfinite(value)]
        facts[f"lowest_test_loss_{side}"] = min(finite, default=math.inf)
        if "learning_rate" in curve.config:
            facts[f"learning_rate_{side}"] = curve.config["learning_rate"]
        if accuracy and "test_accuracy" in curve.scores:
            facts[f"final_test_accuracy_{side}"] = curve.score("test_accuracy")[-1]
    if curves:
        facts["curves"] = {s: _thinned(c, quoted, accuracy=accuracy) for s, c in sides.items()}
    return facts


def _task_facts(task: Task) -> Table:
    return {
        "name": task.name,
        "kind": task.kind,
        "train_samples": task.x_train.shape[0],
        "test_samples": task.x_test.shape[0],
        "features": task.num_features,
        **({"classes": task.num_classes} if task.num_classes > 2 else {}),
    }


def _finite_exp(value: float) -> float:
    return math.exp(value) if value < 709.0 else math.inf


def _ratio_facts(value: RelativeImmunizationRatio) -> Table:
    return {
        "i": value.i,
        "ii": value.ii,
        "log_rir": value.log_rir,
        "log_kappa_harmful": [value.log_kappa_harmful_base, value.log_kappa_harmful],
        "log_kappa_primary": [value.log_kappa_primary_base, value.log_kappa_primary],
        "rank_harmful": [value.rank_harmful_base, value.rank_harmful],
        "rank_primary": [value.rank_primary_base, value.rank_primary],
    }


def standard_attacks(loss: LossName = "squared") -> list[Attack[Any, Any]]:
    """The attacks of every report, those that cannot minimise the loss left out."""
    return [
        ATTACKS.build(name, {}, "standard_attacks", loss=loss)
        for name in STANDARD
        if knows(ATTACKS[name], loss)
    ]


def evaluate(
    immunized: Immunized,
    primary: TaskLike,
    harmful: TaskLike,
    *,
    ridge: float = 1e-2,
    rank_rtol: float | None = None,
    tolerance: float = 0.1,
    base_budget: int = 2000,
    limit: float = 128.0,
    attacks: Sequence[Attack[Any, Any]] | None = None,
    stop_early: bool = False,
    details: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Attack both tasks, without and with immunization, and take the metrics.

    Args:
        immunized: The immunized extractor.
        primary: The task that was to be kept, or arrays (:meth:`Task.of`).
        harmful: The task that was to be made hard. Its labels are used here and only here.
        ridge: Relative ridge of the condition numbers.
        rank_rtol: Rank tolerance of the rank-aware condition numbers, as for
            :func:`~immunize_ext.probing.metrics.relative_immunization_ratio`: give that of the
            precision that features were computed in.
        tolerance: How close to the lowest test loss counts as reached.
        base_budget: Steps of an attacker without immunization.
        limit: Largest slow-down looked for.
        attacks: The attacks; those of every report when omitted.
        stop_early: Whether an attack with immunization ends soon after it got there.
        details: Whether curves, spectra and the measurements beside RIR are wanted.
        seed: Seed of attackers that draw, of random groups and of few-sample draws.
        progress: Called with what was done and the share done so far.

    Returns:
        All measurements.

    Raises:
        ValueError: If shapes do not fit or an argument is out of range.

    Note:
        Deterministic; computed in float64.

    Example:
        >>> from immunize_ext.probing.immunizers import METHODS
        >>> x = torch.eye(10, dtype=torch.float64) * torch.arange(1.0, 11.0)
        >>> task = x, x.sum(1)
        >>> immunized = METHODS["whitening"].fit(None, Problem.of(task, task))
        >>> sorted(evaluate(immunized, task, task, base_budget=9, limit=2.0).rir)
        ['official', 'rank_aware', 'ridge']
    """
    given = Task.of(primary, "primary task"), Task.of(harmful, "harmful task")
    primary, harmful = in_range(given)
    tasks = {"harmful": harmful, "primary": primary}
    chosen = standard_attacks() if attacks is None else list(attacks)
    short = {role: gram_equivalent(task) for role, task in tasks.items()}
    comparisons: dict[str, dict[str, AttackComparison]] = {role: {} for role in ROLES}
    jobs = [(attack, role) for attack in chosen for role in ROLES]
    for index, (attack, role) in enumerate(jobs):
        comparisons[role][attack.name] = compare_attack(
            tasks[role] if needs_samples(attack) else short[role],
            immunized.theta,
            immunized.theta0,
            attacker=attack,
            tolerance=tolerance,
            base_budget=base_budget,
            limit=limit,
            stop_early=stop_early,
            seed=seed,
        )
        if progress is not None:
            text = f"attacking the {role} task: {label_of(attack).lower()}"
            progress(text, (index + 1) / len(jobs))
    rows = {role: gram_rows(task.x_train) for role, task in tasks.items()}
    inputs = rows["primary"], rows["harmful"]
    exponent = excess_exponent(given)
    # The floor of the official policy alone is an absolute number.
    as_given = inputs
    if exponent:
        as_given = inputs[0] * 2.0**exponent, inputs[1] * 2.0**exponent
    ratios = {
        policy: relative_immunization_ratio(
            *(as_given if policy == "official" else inputs),
            immunized.theta,
            immunized.theta0,
            policy=policy,
            ridge=ridge,
            rank_rtol=rank_rtol,
        )
        for policy in POLICIES
    }
    log_ceiling, lower = (
        log_rir_ceiling(*inputs, immunized.theta0, ridge=r) for r in (ridge, ridge / 10.0)
    )
    accuracy = all(task.kind == "classification" for task in tasks.values())
    found: Table = {
        "tasks": {role: _task_facts(task) for role, task in tasks.items()},
        "attackers": {
            attack.name: {
                "label": label_of(attack),
                "sees_theta": bool(getattr(attack, "sees_theta", True)),
            }
            for attack in chosen
        },
        "rir": {policy: ratio.rir for policy, ratio in ratios.items()},
        "log_rir": {policy: ratio.log_rir for policy, ratio in ratios.items()},
        "ridge": ridge,
        "ceiling": _finite_exp(log_ceiling),
        "ceiling_growth": _finite_exp(lower - log_ceiling),
        "share_of_ceiling": math.exp(min(ratios["ridge"].log_rir - log_ceiling, 0.0)),
        "i": ratios["ridge"].i,
        "ii": ratios["ridge"].ii,
        "condition_numbers": {policy: _ratio_facts(ratio) for policy, ratio in ratios.items()},
        "slowdown": {
            role: {name: c.slowdown.ratio for name, c in by_name.items()}
            for role, by_name in comparisons.items()
        },
        "slowdown_is_lower_bound": {
            role: {name: c.slowdown.censored for name, c in by_name.items()}
            for role, by_name in comparisons.items()
        },
        "attacks": {
            role: {
                name: _facts(c, accuracy=accuracy, curves=details) for name, c in by_name.items()
            }
            for role, by_name in comparisons.items()
        },
    }
    unchanged = bool(torch.equal(immunized.theta, immunized.theta0))
    warnings = [
        *([_UNCHANGED] if unchanged else []),
        *warnings_of(found, {attack.name: attack for attack in chosen}, _milder(immunized)),
    ]
    if any(task.x_train.dtype != torch.float64 for task in tasks.values()) and (
        ratios["ridge"].log_kappa_harmful > math.log(1e7)
    ):
        warnings.append(_FLOAT32)
    if exponent:
        warnings.append(
            f"The features are of a size of about 2^{exponent}: spectra are those of the features "
            "divided by that, and only the official condition numbers see the size."
        )
    more = {}
    if details:
        problem: Problem[Task] = Problem.of(primary, harmful)
        more = _details(immunized, problem, comparisons, ridge=ridge, seed=seed)
    return Evaluation(**found, warnings=warnings, details=more)


def needs_samples(attack: Attack[Any, Any]) -> bool:
    """Whether the Gram matrix does not tell an attack all; of a stranger nobody knows."""
    loss = getattr(attack, "loss", "squared")
    return bool(getattr(attack, "needs_samples", True)) or loss != "squared"


# --- what a reader has to know --------------------------------------------------------------------


_UNCHANGED = "The extractor is the one that the run started from: nothing was immunized."


_FLOAT32 = (
    "kappa of the harmful task is above 1e7: a float32 solver stops short there, which is an "
    "artefact and not protection."
)


def accuracy_at(facts: Mapping[str, Any], step: int) -> tuple[float, float] | None:
    """Test accuracy of an attack at the last kept step up to one, without and with immunization.

    Args:
        facts: What results hold of one attacker on one task.
        step: The step.

    Returns:
        Both accuracies; ``None`` where there are none.
    """
    found = []
    for curve in facts.get("curves", {}).values():
        if "test_accuracy" not in curve:
            return None
        place = max(index for index, kept in enumerate(curve["steps"]) if kept <= step)
        found.append(float(curve["test_accuracy"][place]))
    return (found[0], found[1]) if found else None


def _milder(immunized: Immunized) -> str | None:
    """The setting of the method that makes it milder when it is lower; ``None`` without one.

    What a lock has taken away comes back with no setting.
    """
    if immunized.method not in METHODS or immunized.theta.shape[0] != immunized.theta.shape[1]:
        return None
    return knob_of(METHODS[immunized.method])


def warnings_of(
    found: Mapping[str, Any],
    attacks: Mapping[str, Attack[Any, Any]],
    milder: str | None = None,
) -> list[str]:
    """What a reader has to know before quoting the numbers, one sentence each.

    Args:
        found: The measurements, under the names of :class:`Evaluation`.
        attacks: The attacks by name.
        milder: The setting of the method that costs less when it is lower, if it has one.

    Returns:
        Sentences; none where there is nothing to warn of.
    """
    sentences = []
    log_i = _log(found["i"])
    log_rir = found["log_rir"]["ridge"]
    if log_i < -1e-9 < 0.0 < log_rir:
        sentences.append(
            f"The harmful task's condition number went down ((i) = {found['i']:.3g}) although RIR "
            f"is {found['rir']['ridge']:.3g}: RIR is high because the primary task got easier, not "
            "because the harmful one got harder."
        )
    sentences += _about_slowdowns(found, milder)
    for role in ROLES:
        sentences += _about_task(role, found["tasks"][role])
    sentences += _about_rates(found, attacks)
    if found["ceiling_growth"] > 10.0:
        sentences.append(
            f"The ceiling of RIR grows {found['ceiling_growth']:.3g} times when the ridge falls "
            f"tenfold: quote it only together with the ridge {found['ridge']:g}."
        )
    return sentences


def _log(value: float) -> float:
    return math.log(value) if value > 0.0 else -math.inf


def _about_slowdowns(found: Mapping[str, Any], milder: str | None) -> list[str]:
    sentences = []
    names = [n for n in ("gradient_descent", "line_search") if n in found["slowdown"]["harmful"]]

    def of(role: str, name: str) -> tuple[float, bool, str]:
        ratio = found["slowdown"][role][name]
        bound = found["slowdown_is_lower_bound"][role][name]
        return ratio, bound, str(Slowdown(ratio, bound))

    for name in names:
        label = found["attackers"][name]["label"].lower()
        ratio, bound, text = of("primary", name)
        if bound or ratio > 1.05:
            sentences.append(
                f"The primary task is slowed as well ({text} for {label})"
                + (f": a lower {milder.replace('_', ' ')} would avoid that." if milder else ".")
            )
    for name in names:
        label = found["attackers"][name]["label"].lower()
        ratio, bound, text = of("harmful", name)
        if found["attacks"]["harmful"][name]["steps_without"] == 0:
            sentences.append(
                f"The harmful task is hardly learnt by {label} even without immunization: its "
                "slow-down says nothing."
            )
        elif not bound and ratio <= 1.05:
            sentences.append(
                f"The harmful task is not slowed for {label} ({text}): on these tasks this "
                "protection does not work."
            )
    facts = found["attacks"]["harmful"].get("gradient_descent", {})
    pair = accuracy_at(facts, 100)
    if pair is not None and pair[0] - pair[1] < ACCURACY_MARGIN:
        sentences.append(
            f"After 100 steps the harmful task's test accuracy is {pair[1]:.1%} instead of "
            f"{pair[0]:.1%}: an attacker who only needs the right answer is hardly slowed."
        )
    return sentences


def _about_task(role: str, task: Mapping[str, Any]) -> list[str]:
    sentences = []
    if task["kind"] == "constant labels":
        sentences.append(
            f"The {role} task has one class: its attackers learn a constant from images of one "
            "kind, which says little about learning to tell classes apart."
        )
    if task["train_samples"] < task["features"]:
        sentences.append(
            f"The {role} task has fewer training samples ({task['train_samples']}) than features "
            f"({task['features']}): its condition number depends on the ridge."
        )
    return sentences


def _about_rates(found: Mapping[str, Any], attacks: Mapping[str, Attack[Any, Any]]) -> list[str]:
    sentences = []
    for role, by_name in found["attacks"].items():
        for name, facts in by_name.items():
            edges = getattr(attacks.get(name), "edge_rates", ())
            rates = [facts.get(f"learning_rate_{side}") for side in ("without", "with")]
            best = next((rate for rate in rates if rate in edges), None)
            if best is not None:
                label = found["attackers"][name]["label"]
                sentences.append(
                    f"{label} on the {role} task does best at {best:g}, "
                    "the end of the learning rates tried: it may be faster still beyond."
                )
    return sentences


# --- the measurements beside RIR and the attacks --------------------------------------------------


DETAILS = (
    "dimensions",
    "spectra",
    "ceiling_table",
    "subspace_angles",
    "norm_ratio",
    "spectral_slowdown",
    "worst_case",
    "rfd",
    "few_samples",
    "grouped_rir",
)


def _details(
    immunized: Immunized,
    problem: Problem[Task],
    comparisons: Mapping[str, Mapping[str, AttackComparison]],
    *,
    ridge: float,
    seed: int,
) -> Table:
    theta, theta0 = immunized.theta, immunized.theta0
    tasks = {"harmful": problem.harmful[0], "primary": problem.primary}
    rows = {role: gram_rows(task.x_train).to(torch.float64) for role, task in tasks.items()}
    short = {role: gram_equivalent(task) for role, task in tasks.items()}
    both = {"without": theta0, "with": theta}
    return {
        "dimensions": list(theta.shape),
        "spectra": {
            role: _spectrum(with_ridge(rows[role], ridge), theta0, theta) for role in ROLES
        },
        "ceiling_table": [
            row._asdict() for row in ceiling_table(rows["primary"], rows["harmful"], theta, theta0)
        ],
        "subspace_angles": _angles(rows, theta, theta0),
        "norm_ratio": {
            role: {
                key: _norm_ratio(task.x_train.to(torch.float64), task.y_train, extractor)
                for key, extractor in both.items()
            }
            for role, task in short.items()
        },
        "spectral_slowdown": {
            role: {
                name: spectral_slowdown(
                    task.x_train, task.y_train, theta, theta0, attacker=name
                ).ratio
                for name in ("gradient_descent", "conjugate_gradients")
            }
            for role, task in short.items()
        },
        "worst_case": {role: _worst(comparisons[role]) for role in ROLES if comparisons[role]},
        "rfd": {role: _degradation(role, tasks, comparisons) for role in ROLES},
        "few_samples": {
            key: few_sample_error(
                problem.primary,
                extractor,
                samples=min(FEW_SAMPLES, problem.primary.x_train.shape[0]),
                seed=seed,
            )._asdict()
            for key, extractor in both.items()
        },
        "grouped_rir": _grouped(tasks, theta, theta0, ridge, seed),
    }


def _spectrum(rows: Tensor, theta0: Tensor, theta: Tensor) -> Table:
    """Eigenvalues of one task's Hessian before and after, thinned to what a plot can show."""
    before, after = (
        torch.linalg.svdvals(rows @ t.to(torch.float64)).square().cpu() for t in (theta0, theta)
    )
    # Directions that a singular theta has taken away.
    after = torch.cat([after, after.new_zeros(max(0, len(before) - len(after)))])
    spaced = np.linspace(0, len(before) - 1, min(len(before), _EIGENVALUES)).round()
    places = np.unique(spaced.astype(int)).tolist()
    return {
        "places": [place + 1 for place in places],
        "before": [float(f"{value:.6g}") for value in before[places].tolist()],
        "after": [float(f"{value:.6g}") for value in after[places].tolist()],
    }


def _angles(rows: Mapping[str, Tensor], theta: Tensor, theta0: Tensor) -> Table:
    count = min(SUBSPACE, theta.shape[1], *(min(x.shape) for x in rows.values()))
    found = leading_subspace_angles(rows["primary"], rows["harmful"], theta, theta0, count=count)
    return {
        "count": count,
        "before_degrees": [math.degrees(float(angle)) for angle in found.before],
        "after_degrees": [math.degrees(float(angle)) for angle in found.after],
        "gap_before": found.gap_before,
        "gap_after": found.gap_after,
    }


def _norm_ratio(x: Tensor, y: Tensor, extractor: Tensor) -> dict[str, float]:
    ratios = line_search_norm_ratio(
        x @ extractor.to(torch.float64), y.to(torch.float64), steps=max(NORM_RATIO_STEPS)
    )
    return {str(step): float(ratios[step]) for step in NORM_RATIO_STEPS}


def _worst(comparisons: Mapping[str, AttackComparison]) -> Table:
    """The worst case over attackers whom theta can slow at all, and over all of them."""
    # Whom the untrained head satisfies does not take part: nothing is learnt there.
    steps = {
        name: AttackerSteps(c.base_steps, c.steps, c.immunized.steps[-1])
        for name, c in comparisons.items()
        if c.base_steps
    }
    if not steps:
        return {}
    seen = {n: s for n, s in steps.items() if getattr(ATTACKS.get(n), "sees_theta", True)}
    found = {"all_attackers": _case(worst_case(steps))}
    return {"iterative_attackers": _case(worst_case(seen)), **found} if seen else found


def _case(case: WorstCase) -> Table:
    return {
        "least_slowed": case.least_slowed,
        "least_slowdown": case.least_slowdown.ratio,
        "least_slowdown_is_lower_bound": case.least_slowdown.censored,
        "fastest_without": case.fastest_base,
        "fastest_with": case.fastest,
        "slowdown_of_a_free_choice": case.slowdown.ratio,
        "is_lower_bound": case.slowdown.censored,
    }


def _degradation(
    role: str,
    tasks: Mapping[str, Task],
    comparisons: Mapping[str, Mapping[str, AttackComparison]],
) -> Table:
    """RFD of gradient descent: of the test loss, and of the accuracy where there is one."""
    comparison = comparisons[role].get("gradient_descent")
    if comparison is None:
        return {}
    last = min(comparison.base.steps[-1], comparison.immunized.steps[-1], 100)
    found: Table = {"steps": last}
    scores = {"test_loss": False}
    if all(task.kind == "classification" for task in tasks.values()):
        scores["test_accuracy"] = True
    for name, higher in scores.items():
        curves = [
            torch.tensor(curve.score(name)[1 : last + 1], dtype=torch.float64)
            for curve in (comparison.base, comparison.immunized)
        ]
        if not bool((curves[0] > 0).all()):
            continue  # no success at all at some step: the ratio is not defined
        found[name] = relative_degradation(*curves, higher_is_better=higher)._asdict()
    return found


def _grouped(
    tasks: Mapping[str, Task], theta: Tensor, theta0: Tensor, ridge: float, seed: int
) -> Table:
    primary, harmful = (tasks[role].x_train for role in ("primary", "harmful"))
    size = min(GROUP_SIZE, primary.shape[0], harmful.shape[0])
    estimate = grouped_linear_rir(
        primary,
        harmful,
        theta,
        theta0,
        groups=GROUPS,
        group_size=size,
        ridge=ridge,
        seed=seed,
    )
    return {
        "groups": GROUPS,
        "group_size": size,
        "ridge": ridge,
        "mean": estimate.mean_rir,
        "log_spread": estimate.log_spread,
        "full_data": estimate.full.rir,
        "log_bias": estimate.log_bias,
    }
