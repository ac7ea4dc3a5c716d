"""One condition-number run: load, immunize, attack, measure; and the same in short for sweeps."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from immunize_ext.probing.attacks import ATTACKERS, LossName, compare_attack
from immunize_ext.probing.attacks.compress import NEED_SAMPLES, compressed, gram_rows
from immunize_ext.probing.data import Task
from immunize_ext.probing.evaluation import (
    ROLES,
    Evaluation,
    attackers_in_words,
    evaluate,
    kappa_details,
)
from immunize_ext.probing.immunizers import Immunized
from immunize_ext.probing.metrics import log_rir_ceiling, relative_immunization_ratio
from immunize_ext.probing.tmp_config import KappaConfig
from immunize_ext.probing.tmp_methods import METHODS, check_method, fit, label
from immunize_ext.probing.tmp_tasks import fingerprint, load_tasks
from immunize_ext.probing.tmp_write import write_run
from immunize_ext.seams import Progress
from immunize_ext.storage import environment

KIND = "kappa"


POLICIES = ("official", "ridge", "rank_aware")


def check_config(config: KappaConfig) -> None:
    """Refuse what can be refused before any work.

    Raises:
        ValueError: If the method, an attacker, the loss or a number is out of range.
    """
    check_method(config)
    known = {*ATTACKERS, "all"}
    unknown = [name for name in config.attackers if name not in known]
    if unknown:
        raise ValueError(
            f"attackers must be among {', '.join(ATTACKERS)} or all, got {unknown[0]!r}"
        )
    if config.loss not in ("squared", "logistic"):
        raise ValueError(f"loss must be squared or logistic, got {config.loss!r}")
    if config.base_budget < 1 or not config.limit >= 1.0:
        raise ValueError(
            f"base_budget and limit must be at least 1, got {config.base_budget} and {config.limit}"
        )
    if not config.ridge > 0.0:
        raise ValueError(f"ridge must be positive, got {config.ridge}; 1e-2 is a usual value")
    if config.seed < 0:
        raise ValueError(f"seed must not be negative, got {config.seed}")
    if config.size not in (28, 14, 7):
        raise ValueError(f"size must be 28, 14 or 7, got {config.size}")


def chosen_attackers(config: KappaConfig) -> tuple[str, ...]:
    """Names of the further attackers of a run."""
    return tuple(ATTACKERS) if "all" in config.attackers else config.attackers


def identity(config: KappaConfig, immunized: Immunized) -> dict[str, Any]:
    """What a run is: kind, method, its knob, the request."""
    knob = METHODS[config.method].knob
    value = immunized.config.get("strength") if knob == "c" else getattr(config, knob or "", None)
    return {
        "kind": KIND,
        "method": config.method,
        "method_label": label(config),
        "knob": None if knob is None else {"name": knob, "value": value},
        "request": config.to_dict(),
    }


@dataclass(frozen=True)
class KappaRun:
    """A finished run.

    Attributes:
        config: What was asked for.
        evaluations: One for each harmful task, in their order.
        details: The further measurements of each.
        seconds: Wall-clock time by stage.
        data: Fingerprint of the data.
    """

    config: KappaConfig
    evaluations: list[Evaluation]
    details: list[dict[str, Any]]
    seconds: dict[str, float]
    data: str

    @property
    def weakest(self) -> int:
        """Index of the harmful task that is slowed least."""
        return min(
            range(len(self.evaluations)),
            key=lambda index: (
                self.evaluations[index].comparisons["harmful"]["gradient_descent"].slowdown.ratio
            ),
        )

    @property
    def evaluation(self) -> Evaluation:
        """The evaluation that the report shows: that of the harmful task slowed least."""
        return self.evaluations[self.weakest]

    def extra(self) -> dict[str, Any]:
        """What ``results.json`` holds beside the evaluation."""
        found = {
            **identity(self.config, self.evaluation.immunized),
            "seconds": self.seconds,
            "seeds": {"split": self.config.seed, "immunizer": self.config.seed},
            "data_sha256": self.data,
            **self.details[self.weakest],
        }
        if len(self.evaluations) > 1:
            found["harmful_tasks"] = [
                {
                    "name": one.tasks["harmful"].name,
                    "rir": {policy: ratio.rir for policy, ratio in one.rir.items()},
                    "share_of_ceiling": one.share_of_ceiling,
                    "slowdown": {
                        n: c.slowdown.ratio for n, c in one.comparisons["harmful"].items()
                    },
                    "slowdown_is_lower_bound": {
                        n: c.slowdown.censored for n, c in one.comparisons["harmful"].items()
                    },
                }
                for one in self.evaluations
            ]
            found["notes"] = [
                f"This run protects against {len(self.evaluations)} harmful tasks; the page shows "
                "the one that is slowed least, results.json all of them."
            ]
        return found

    def write(self, target: str | Path, *, force: bool = False) -> Path:
        """Write the run directory, all of it or nothing."""
        return write_run(
            self.evaluation,
            target,
            force=force,
            extra=self.extra(),
        )


def run_kappa(config: KappaConfig, progress: Progress) -> KappaRun:
    """Immunize, attack, measure; writes nothing.

    Args:
        config: What to do.
        progress: Called with what is being done and the share done so far.

    Returns:
        All measurements.

    Raises:
        ValueError: If a setting is out of range.
    """
    check_config(config)
    marks = [time.perf_counter()]
    progress("loading the data", 0.0)
    primary, harmful = load_tasks(config)
    marks.append(time.perf_counter())
    progress(f"immunizing: {label(config)}", 0.05)
    immunized = fit(config, primary, harmful)
    marks.append(time.perf_counter())
    evaluations: list[Evaluation] = []
    for index, task in enumerate(harmful):
        evaluations.append(
            evaluate(
                immunized,
                primary,
                task,
                ridge=config.ridge,
                base_budget=config.base_budget,
                limit=config.limit,
                attackers=chosen_attackers(config),
                loss=_loss(config.loss),
                stop_early=True,
                progress=lambda text, share, at=index: progress(  # type: ignore[misc]
                    text, 0.2 + 0.6 * (at + share) / len(harmful)
                ),
            )
        )
    marks.append(time.perf_counter())
    progress("measuring", 0.85)
    details = [kappa_details(one, seed=config.seed) for one in evaluations]
    marks.append(time.perf_counter())
    stages = ("load", "immunize", "attack", "measure")
    seconds = {name: marks[i + 1] - marks[i] for i, name in enumerate(stages)}
    seconds["total"] = marks[-1] - marks[0]
    return KappaRun(config, evaluations, details, seconds, fingerprint([primary, *harmful]))


def _loss(name: str) -> LossName:
    return "logistic" if name == "logistic" else "squared"


def short_results(config: KappaConfig) -> dict[str, Any]:
    """What a sweep keeps of one point: condition numbers, and the slow-downs asked for.

    Args:
        config: What to do; ``attackers`` are all that are run.

    Returns:
        Plain values under the names of ``results.json``.

    Raises:
        ValueError: If a setting is out of range.
    """
    check_config(config)
    started = time.perf_counter()
    primary, harmful = load_tasks(config)
    loaded = time.perf_counter()
    immunized = fit(config, primary, harmful)
    fitted = time.perf_counter()
    task = harmful[0]
    slowdown, bounds = _slowdowns(config, immunized, {"harmful": task, "primary": primary})
    ratios = _ratios(config, immunized, primary, task)
    finished = time.perf_counter()
    return {
        **identity(config, immunized),
        "tasks": {
            role: {"name": one.name, "features": one.num_features}
            for role, one in (("harmful", task), ("primary", primary))
        },
        **ratios,
        "attackers": attackers_in_words(slowdown["harmful"]),
        "slowdown": slowdown,
        "slowdown_is_lower_bound": bounds,
        "seconds": {
            "load": loaded - started,
            "immunize": fitted - loaded,
            "measure": finished - fitted,
            "total": finished - started,
        },
        "config": immunized.config,
        "environment": environment(),
    }


def _slowdowns(
    config: KappaConfig, immunized: Immunized, tasks: dict[str, Task]
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, bool]]]:
    """Slow-downs by role and attacker, and which are lower bounds."""
    slowdown: dict[str, dict[str, float]] = {role: {} for role in ROLES}
    bounds: dict[str, dict[str, bool]] = {role: {} for role in ROLES}
    for role, task in tasks.items():
        for name in chosen_attackers(config):
            if not ATTACKERS[name].knows(config.loss):
                continue
            whole = name in NEED_SAMPLES or config.loss != "squared"
            found = compare_attack(
                task if whole else compressed(task),
                immunized.theta,
                immunized.theta0,
                attacker=name,
                base_budget=config.base_budget,
                limit=config.limit,
                loss=_loss(config.loss),
            ).slowdown
            slowdown[role][name], bounds[role][name] = found.ratio, found.censored
    return slowdown, bounds


def _ratios(
    config: KappaConfig, immunized: Immunized, primary: Task, harmful: Task
) -> dict[str, Any]:
    rows = gram_rows(primary.x_train), gram_rows(harmful.x_train)
    ceiling = log_rir_ceiling(*rows, immunized.theta0, ridge=config.ridge)
    found = {
        policy: relative_immunization_ratio(
            *rows,
            immunized.theta,
            immunized.theta0,
            policy=policy,  # type: ignore[arg-type]
            ridge=config.ridge,
        )
        for policy in POLICIES
    }
    return {
        "rir": {policy: ratio.rir for policy, ratio in found.items()},
        "log_rir": {policy: ratio.log_rir for policy, ratio in found.items()},
        "ridge": config.ridge,
        "ceiling": math.exp(min(ceiling, 700.0)),
        "share_of_ceiling": math.exp(min(found["ridge"].log_rir - ceiling, 0.0)),
        "i": found["ridge"].i,
        "ii": found["ridge"].ii,
    }
