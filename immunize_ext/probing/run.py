"""Condition-number immunization from settings to a folder: run, attack again, compare, sweep.

    from immunize_ext.probing import run
    found = run.run(run.RunSettings(data="digits", method="closed-form"), "runs/kappa")
    print(found.summary())

Whatever ``immunize kappa`` and its relatives do is one of these functions.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch

from immunize_ext import report
from immunize_ext.probing import attack_report, comparison_report
from immunize_ext.probing import comparison as points_of_runs
from immunize_ext.probing import report as pages
from immunize_ext.probing.attacks import (
    ATTACKS,
    AttackName,
    HarmChoice,
    LossName,
    attack_at_budgets,
    choose_harm,
    compare_attack,
    knows,
    label_of,
)
from immunize_ext.probing.certificates import Certificate, certify
from immunize_ext.probing.data import (
    Problem,
    Task,
    check_names,
    gram_equivalent,
    load_problem,
    other_pairs,
)
from immunize_ext.probing.evaluation import (
    ROLES,
    Evaluation,
    evaluate,
    needs_samples,
    standard_attacks,
)
from immunize_ext.probing.immunizers import METHODS, Immunized, MethodName, grid_of, knob_of
from immunize_ext.probing.immunizers import label_of as method_label
from immunize_ext.probing.results import Alternative, AttackRow
from immunize_ext.runtime import named_device
from immunize_ext.seams import Attack, Immunizer, Progress
from immunize_ext.settings import build, check_types, plain, settings_of
from immunize_ext.storage import (
    SCHEMA,
    ManyRuns,
    check_target,
    environment,
    read_results,
    run_directory,
    work_folder,
    write_json,
    write_json_lines,
    write_whole,
)
from immunize_ext.sweep import run_sweep

KIND = "kappa"
MODEL = "immunized.safetensors"
METRICS = "metrics.jsonl"

# What is true of the default tasks of the digits, and a reader has to know.
CHOSEN_TASKS = (
    "The two tasks of this run, the usual ones of the digits, were chosen because the effect is "
    "plain. Over 20 random pairs of such tasks with 3 splits each, gradient descent on the harmful "
    "task became 6.1 times slower in the median (quartiles 2.8 and 22), in 3 of 60 runs not at "
    "all; the primary task, kept as fast on its training data, became slower on its test data in "
    "17 of 60 runs, by at most 2.3 times."
)


@dataclass(frozen=True)
class MeasureSettings:
    """What runs and sweeps have in common.

    Attributes:
        data: ``digits``, ``mnist``, ``house``, or a file of features (.npz, .safetensors).
        data_dir: Folder of the files of ``mnist`` and ``house``; a cache, filled from the network
            once, when omitted.
        settings: Settings of the method by name.
        ridge: Ridge on each K, relative to its largest eigenvalue.
        rank_rtol: Rank tolerance of the rank-aware condition numbers, a share of the largest
            singular value; that of float64 when omitted. Features that a float32 network computed
            want ``1.2e-7`` times their number.
        size: Side of MNIST images: 28, 14 or 7.
        max_train: Largest number of training samples of each task; all when omitted.
        attacks: Attacks beside those that every report shows (of a sweep: all that are run);
            ``all`` for all.
        attack_settings: Settings of single attacks by name.
        loss: What attackers minimise: ``squared`` or ``logistic``.
        base_budget: Steps of an attacker without immunization.
        limit: Largest slow-down looked for.
        device: Where to compute: ``cpu``, ``cuda``, ``cuda:1``.
        dtype: Data type of inputs and labels; extractors are float64 always.
    """

    data: str = "digits"
    data_dir: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    ridge: float = 1e-2
    rank_rtol: float | None = None
    size: int = 28
    max_train: int | None = None
    attacks: tuple[AttackName | Literal["all"] | str, ...] = ()
    attack_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    loss: LossName = "squared"
    base_budget: int = 1000
    limit: float = 64.0
    device: str = "cpu"
    dtype: Literal["float64", "float32"] = "float64"

    def __post_init__(self) -> None:
        check_types(self)
        _check_attacks(self.attacks, self.attack_settings)
        named_device(self.device, here=False)  # a file may come from another machine
        if self.base_budget < 1 or not self.limit >= 1.0:
            raise ValueError(
                f"base_budget and limit must be at least 1, got {self.base_budget} and {self.limit}"
            )
        if not self.ridge > 0.0:
            raise ValueError(f"ridge must be positive, got {self.ridge}; 1e-2 is a usual value")
        if self.rank_rtol is not None and not 0.0 <= self.rank_rtol < 1.0:
            raise ValueError(f"rank_rtol must be at least 0 and below 1, got {self.rank_rtol}")
        if self.size not in (28, 14, 7):
            raise ValueError(f"size must be 28, 14 or 7, got {self.size}")
        if self.max_train is not None and self.max_train < 1:
            raise ValueError(f"max_train must be at least 1, got {self.max_train}")

    def chosen_attacks(self, *, standard: bool) -> list[Attack[Any, Any]]:
        """The attacks with their settings, in the order of the registry.

        Args:
            standard: Whether those of every report are among them.

        Raises:
            ValueError: If a name or a setting is unknown, or an attack that was asked for cannot
                minimise the loss.
        """
        return attacks_of(self.attacks, self.attack_settings, self.loss, standard=standard)


def _check_attacks(names: Sequence[str], attack_settings: Mapping[str, Any]) -> None:
    for name in (*(name for name in names if name != "all"), *attack_settings):
        ATTACKS.find(name, "attacks")


def attacks_of(
    names: Sequence[str],
    attack_settings: Mapping[str, Mapping[str, Any]],
    loss: LossName,
    *,
    standard: bool,
) -> list[Attack[Any, Any]]:
    """Attacks by name with their settings; ``all`` stands for all that can minimise the loss.

    Raises:
        ValueError: If a name or a setting is unknown, settings are given for an attack that is not
            run, or one that was asked for cannot minimise the loss.
    """
    usual = [attack.name for attack in standard_attacks(loss)] if standard else []
    every = [name for name in ATTACKS if knows(ATTACKS[name], loss)] if "all" in names else []
    asked = [name for name in names if name != "all"]
    _check_attacks(names, attack_settings)
    chosen = {*usual, *every, *asked}
    idle = [name for name in attack_settings if name not in chosen]
    if idle:
        raise ValueError(f"attacks: {idle[0]} must be run to have settings; name it among attacks")
    found = []
    for name in ATTACKS:
        if name in chosen:
            if not knows(ATTACKS[name], loss):
                raise ValueError(
                    f"attacks: {name} must be able to minimise the {loss} loss, which it cannot; "
                    "leave it out"
                )
            values = attack_settings.get(name, {})
            found.append(ATTACKS.build(name, values, "attacks", loss=loss))
    return found


@dataclass(frozen=True)
class RunSettings(MeasureSettings):
    """One immunization of a linear extractor, and how it is judged.

    Attributes:
        primary: The task to keep: classes against classes (``4,6:2,3,7``), several to be told
            apart (``0:1:2`` or ``0-2``), or one class (``4``), whose images then get a constant
            label, as in the papers' code; nothing for ``house`` and for a file that is one task.
        harmful: The tasks to make hard, in the same form, or files of features; several for the
            method ``several-harms``.
        method: How to immunize.
        compare: Methods tried on the same tasks, with their usual settings, for a table beside.
        certificate: Whether the page says what each kind of attacker pays
            (:func:`~immunize_ext.probing.certificates.certify`), on the samples of the run.
        unseen: Whether the harm that an attacker would choose is searched for, among all pairs of
            classes that the method did not see; always done for several harmful tasks.
        seed: Seed of splits, immunizer and random draws of metrics.
    """

    primary: str | None = None
    harmful: tuple[str, ...] = ()
    method: MethodName | str = "closed-form"
    compare: tuple[MethodName | str, ...] = ()
    certificate: bool = True
    unseen: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        METHODS.find(self.method, "method")
        for name in self.compare:
            METHODS.find(name, "compare")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")

    def immunizer(self, method: str | None = None) -> Immunizer[Any, Any, Any]:
        """The method with its settings, or another one with its usual settings.

        Raises:
            ValueError: If a name or a setting is unknown or out of range, or the method does not
                take as many harmful tasks.
        """
        values = self.settings if method is None else {}
        name = self.method if method is None else method
        shared = {"seed": self.seed, "ridge": self.ridge}
        found = METHODS.build(name, values, "method", **shared)
        if len(self.harmful) > 1 and not getattr(found, "takes_several", False):
            raise ValueError(
                f"{name} must have one harmful task, got {len(self.harmful)}; "
                "use --method several-harms"
            )
        return found

    def load(self) -> Problem[Task]:
        """The tasks, on the device.

        Raises:
            ValueError: If this machine does not have it.
        """
        device = named_device(self.device)
        found = load_problem(
            self.data,
            self.primary,
            self.harmful,
            data_dir=self.data_dir,
            size=self.size,
            max_train=self.max_train,
            seed=self.seed,
        )
        return found.to(device, getattr(torch, self.dtype))


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        settings: What was asked for.
        immunizer: The method with its settings.
        immunized: The extractor.
        evaluations: One for each harmful task, in their order.
        alternatives: Other methods on the same tasks: RIR and slow-downs of gradient descent.
        unseen: The harm that an attacker would choose; ``None`` where it was not searched for.
        seconds: Wall-clock time by stage.
        data: Digest of the data.
        certificate: What each kind of attacker pays, on the harmful task that the report shows.
    """

    settings: RunSettings
    immunizer: Immunizer[Any, Any, Any]
    immunized: Immunized
    evaluations: tuple[Evaluation, ...]
    alternatives: tuple[Alternative, ...]
    seconds: dict[str, float]
    data: str
    unseen: HarmChoice | None = None
    certificate: Certificate | None = None

    @property
    def evaluation(self) -> Evaluation:
        """The evaluation that the report shows: that of the harmful task slowed least."""
        return self.evaluations[_least_slowed(self.evaluations)]

    def results(self) -> dict[str, Any]:
        """Exactly what ``results.json`` holds."""
        knob = knob_of(self.immunizer)
        found = {
            "schema": SCHEMA,
            "kind": KIND,
            "method": self.settings.method,
            "method_label": method_label(self.immunizer),
            "knob": None if knob is None else {"name": knob, "value": self._config(knob)},
            "request": plain(self.settings),
            **self.evaluation.to_dict(),
            "config": self.immunized.config,
            "history": self.immunized.history[:1] + self.immunized.history[1:][-1:],
            "seconds": self.seconds,
            "seeds": {"split": self.settings.seed, "immunizer": self.settings.seed},
            "data_sha256": self.data,
            "environment": environment(self.immunized.theta.device),
            "notes": self._notes(),
        }
        if self.alternatives:
            found["alternatives"] = list(self.alternatives)
        if self.certificate is not None:
            found["certificate"] = self.certificate.to_dict()
            # Of the run, with the other stages.
            found["certificate"].pop("seconds")
        if self.unseen is not None:
            found["unseen_harms"] = self.unseen.to_dict()
        if len(self.evaluations) > 1:
            found["harmful_tasks"] = [
                {
                    "name": one.tasks["harmful"]["name"],
                    "rir": one.rir,
                    "share_of_ceiling": one.share_of_ceiling,
                    "slowdown": one.slowdown["harmful"],
                    "slowdown_is_lower_bound": one.slowdown_is_lower_bound["harmful"],
                }
                for one in self.evaluations
            ]
        return found

    def _config(self, knob: str) -> Any:
        return self.immunized.config.get(knob, getattr(self.immunizer, knob))

    def _notes(self) -> list[str]:
        notes = []
        usual = self.settings.primary is None and not self.settings.harmful
        if self.settings.data == "digits" and usual:
            notes.append(CHOSEN_TASKS)
        if len(self.evaluations) > 1:
            notes.append(
                f"This run protects against {len(self.evaluations)} harmful tasks; the page shows "
                "the one that is slowed least, results.json all of them."
            )
        return notes

    def summary(self) -> str:
        """What a newcomer needs to see, in plain text."""
        return pages.summary(self.results())

    def write(self, out: str | Path, *, force: bool = False) -> Path:
        """Write the run folder, all of it or nothing.

        It holds ``results.json``, ``metrics.jsonl``, ``immunized.safetensors`` (read it with
        :meth:`immunize_ext.probing.immunizers.Immunized.load`), the plots as PNG and
        ``report.html``, one file that needs nothing else.

        Raises:
            FileExistsError: If the target exists and ``force`` is not given, or is no run folder.
            MissingExtraError: If a package that draws is not installed.
        """
        results = self.results()
        rows = [{"kind": "immunize", **record} for record in self.immunized.history]
        with run_directory(out, force=force) as folder:
            report.write(results, folder)
            write_json_lines(folder / METRICS, [*rows, *self.evaluation.metrics()])
            self.immunized.save(folder / MODEL)
            write_json(folder / "results.json", results)
        return Path(out)


def run(
    settings: RunSettings,
    out: str | Path | None = None,
    *,
    force: bool = False,
    jobs: int = 1,
    progress: Progress | None = None,
) -> Run:
    """Immunize, attack, measure.

    Args:
        settings: What to do. All of it is checked before any work.
        out: The run folder to write, all of it or nothing. Where the method was cut off, the same
            call goes on from what it left beside it.
        force: Whether an existing run folder is replaced.
        jobs: Processes; attacks on a linear extractor take seconds, so one is always used.
        progress: Called with what is being done and the share done so far.

    Returns:
        All measurements.

    Raises:
        FileExistsError: If ``out`` exists and ``force`` is not given, or is no run folder.
        MissingExtraError: If a package that the data or the page needs is not installed.
        ValueError: If a setting is unknown or out of range.

    Note:
        Deterministic given ``settings``, but for the seconds.
    """
    attacks = settings.chosen_attacks(standard=True)
    for method in (None, *settings.compare):
        settings.immunizer(method)
    check_names(settings.data, settings.primary, settings.harmful)
    named_device(settings.device)
    if out is None:
        return _measured(settings, attacks, progress=progress)
    check_target(out, force=force)
    report.check_extras()
    work = work_folder(out)
    found = _measured(settings, attacks, progress=progress, resume=work)
    if progress is not None:
        progress("writing the report", 1.0)
    found.write(out, force=force)
    shutil.rmtree(work, ignore_errors=True)
    return found


def _measured(
    settings: RunSettings,
    attacks: Sequence[Attack[Any, Any]],
    *,
    details: bool = True,
    progress: Progress | None = None,
    resume: Path | None = None,
) -> Run:
    tell = progress or (lambda text, share: None)
    immunizer = settings.immunizer()
    marks = [time.perf_counter()]
    tell("loading the data", 0.0)
    problem = settings.load()
    for role, task in (("primary", problem.primary), *(("harmful", t) for t in problem.harmful)):
        tell(f"{role} task: {task.name} ({task.summary}, {len(task.x_train)} samples)", 0.02)
    marks.append(time.perf_counter())
    tell(f"immunizing: {method_label(immunizer)}", 0.05)
    immunized = immunizer.fit(None, problem, progress=_part(progress, 0.05, 0.2), resume=resume)
    marks.append(time.perf_counter())
    count = len(problem.harmful)
    evaluations = [
        evaluate(
            immunized,
            problem.primary,
            task,
            ridge=settings.ridge,
            rank_rtol=settings.rank_rtol,
            base_budget=settings.base_budget,
            limit=settings.limit,
            attacks=attacks,
            stop_early=True,
            details=details,
            seed=settings.seed,
            progress=_part(progress, 0.2 + 0.5 * i / count, 0.2 + 0.5 * (i + 1) / count),
        )
        for i, task in enumerate(problem.harmful)
    ]
    unseen = None
    if details:
        unseen = _unseen(settings, immunized, _part(progress, 0.7, 0.75))
    marks.append(time.perf_counter())
    certificate = None
    if details and settings.certificate:
        certificate = certify(
            immunized,
            problem.primary,
            problem.harmful[_least_slowed(evaluations)],
            ridge=settings.ridge,
            draws=4,
            seed=settings.seed,
            progress=_part(progress, 0.75, 0.85),
        )
    marks.append(time.perf_counter())
    alternatives = []
    for index, method in enumerate(settings.compare):
        tell(f"comparing: {method}", 0.85 + 0.15 * index / len(settings.compare))
        alternatives.append(_alternative(settings, method, problem, evaluations[0].ceiling))
    marks.append(time.perf_counter())
    stages = ("load", "immunize", "measure", "certify", "compare")
    seconds = {name: marks[i + 1] - marks[i] for i, name in enumerate(stages)}
    seconds["total"] = marks[-1] - marks[0]
    return Run(
        settings,
        immunizer,
        immunized,
        tuple(evaluations),
        tuple(alternatives),
        seconds,
        problem.digest(),
        unseen,
        certificate,
    )


def _least_slowed(evaluations: Sequence[Evaluation]) -> int:
    """Place of the harmful task that some attacker is slowed least on."""
    slowest = [min(one.slowdown["harmful"].values(), default=0.0) for one in evaluations]
    return slowest.index(min(slowest))


def _unseen(
    settings: RunSettings, immunized: Immunized, progress: Progress | None
) -> HarmChoice | None:
    """The harm that an attacker would choose among those the method did not see."""
    if not settings.unseen and len(settings.harmful) < 2:
        return None
    pool = other_pairs(
        settings.data,
        settings.primary,
        settings.harmful,
        data_dir=settings.data_dir,
        size=settings.size,
        max_train=settings.max_train,
        seed=settings.seed,
    )
    if not pool:
        return None
    found = choose_harm(
        immunized.theta,
        pool,
        immunized.theta0,
        base_budget=settings.base_budget,
        limit=settings.limit,
        seed=settings.seed,
        progress=progress,
    )
    return found if found.slowdowns else None


def _part(progress: Progress | None, first: float, last: float) -> Progress | None:
    """A progress whose shares are those of a part of the whole."""
    if progress is None:
        return None
    whole = progress
    return lambda text, share: whole(text, first + (last - first) * share)


def _alternative(
    settings: RunSettings, method: str, problem: Problem[Task], ceiling: float
) -> Alternative:
    """RIR of another method, and how much it slows gradient descent on both tasks."""
    immunizer = settings.immunizer(method)
    found = evaluate(
        immunizer.fit(None, problem),
        problem.primary,
        problem.harmful[0],
        ridge=settings.ridge,
        rank_rtol=settings.rank_rtol,
        base_budget=settings.base_budget,
        limit=settings.limit,
        attacks=attacks_of(("gradient_descent",), {}, settings.loss, standard=False),
        stop_early=True,
        details=False,
        seed=settings.seed,
    )
    harmful, primary = (
        [
            found.slowdown[role]["gradient_descent"],
            found.slowdown_is_lower_bound[role]["gradient_descent"],
        ]
        for role in ("harmful", "primary")
    )
    return {
        "name": method_label(immunizer),
        "rir": found.rir["ridge"],
        "share_of_ceiling": min(found.rir["ridge"] / ceiling, 1.0),
        "i": found.i,
        "ii": found.ii,
        "harmful": harmful,
        "primary": primary,
    }


# --- more attacks on a finished run ---------------------------------------------------------------


@dataclass(frozen=True)
class AttackSettings:
    """Further attacks on a finished run.

    Attributes:
        attacks: Attacks to run; ``all`` for all.
        attack_settings: Settings of single attacks by name.
        tasks: Which tasks: ``harmful``, ``primary``, or both.
        loss: What attackers minimise; that of the run when omitted.
        budgets: Also report what attackers have after these numbers of steps.
        base_budget: Steps of an attacker without immunization; that of the run when omitted.
        limit: Largest slow-down looked for; that of the run when omitted.
        data_dir: Where the data is now.
        device: Where to compute; where the run did when omitted.
    """

    attacks: tuple[AttackName | Literal["all"] | str, ...] = ("all",)
    attack_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tasks: tuple[Literal["harmful", "primary"], ...] = ROLES
    loss: LossName | None = None
    budgets: tuple[int, ...] = ()
    base_budget: int | None = None
    limit: float | None = None
    data_dir: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        _check_attacks(self.attacks, self.attack_settings)
        if any(budget < 1 for budget in self.budgets):
            raise ValueError(f"budgets must be at least 1 step, got {min(self.budgets)}")
        if not self.tasks:
            raise ValueError(f"tasks must be among {', '.join(ROLES)}, got none")


@dataclass(frozen=True)
class AttackRecord:
    """What further attacks gave.

    Attributes:
        record: The content of the file.
        path: The file; its page stands beside it.
    """

    record: dict[str, Any]
    path: Path

    def results(self) -> dict[str, Any]:
        """Exactly what the file holds."""
        return self.record

    def summary(self) -> str:
        """The table of attackers, and where it was added."""
        return f"{attack_report.summary(self.record)}\n\nadded: {self.path}"


def attack(
    folder: str | Path, settings: AttackSettings, *, progress: Progress | None = None
) -> AttackRecord:
    """Attack a finished run again and add the results as a file of their own.

    Args:
        folder: The run folder; nothing that is in it is changed.
        settings: The attacks.
        progress: Called with what is being done and the share done so far.

    Returns:
        What was added under ``folder/attacks``: a JSON file and its page.

    Raises:
        FileNotFoundError: If there is no such run.
        MissingExtraError: If a package that draws is not installed.
        ValueError: If it is no single run, its data has changed, or a setting is out of range.
    """
    report.check_extras()
    changes = {
        name: value
        for name in ("loss", "base_budget", "limit", "data_dir", "device")
        if (value := getattr(settings, name)) is not None
    }
    about, immunized, problem = reopen(folder, "attack", **changes)
    attacks = attacks_of(settings.attacks, settings.attack_settings, about.loss, standard=False)
    sides = {"primary": [problem.primary], "harmful": list(problem.harmful)}
    tasks = [(role, task) for role in settings.tasks for task in sides[role]]
    started = time.perf_counter()
    rows = []
    for index, (one, (role, task)) in enumerate(product(attacks, tasks)):
        if progress is not None:
            text = f"{label_of(one).lower()}, {role} task"
            progress(text, index / (len(attacks) * len(tasks)))
        rows.append(_attack_row(one, role, task, immunized, about, settings.budgets))
    record = {
        "schema": SCHEMA,
        "kind": "kappa-attack",
        "method": immunized.method,
        "loss": about.loss,
        "base_budget": about.base_budget,
        "limit": about.limit,
        "attackers": {
            one.name: {
                "label": label_of(one),
                "sees_theta": bool(getattr(one, "sees_theta", True)),
            }
            for one in attacks
        },
        "attacks": rows,
        "seconds": time.perf_counter() - started,
        "environment": environment(),
    }
    return AttackRecord(record, report.write_record(record, Path(folder) / "attacks"))


def reopen(
    folder: str | Path, function: str, **changes: Any
) -> tuple[RunSettings, Immunized, Problem[Task]]:
    """What a finished run was about, its extractor and its tasks.

    Args:
        folder: The run folder.
        function: Who asks; stands in errors.
        **changes: Settings of the run that are other ones now, ``data_dir`` for instance.

    Returns:
        Its settings, as far as data and attacks go, the immunized extractor and the problem.

    Raises:
        FileNotFoundError: If there is no such run.
        ValueError: If it is no single run, or its data has changed.
    """
    results = read_results(folder)
    if results["kind"] != KIND:
        raise ValueError(
            f"{function}: {folder} must be a single run, got a sweep, which keeps no extractors; "
            f"{'sweep again with --attacks' if function == 'attack' else 'give one run'}"
        )
    about = replace(_request(results["request"]), **changes)
    problem = about.load()
    immunized = Immunized.load(Path(folder) / MODEL, device=about.device)
    if problem.digest() != results.get("data_sha256"):
        raise ValueError(
            f"{function}: {about.data} must be the data that the run saw, got other numbers; give "
            "its folder with --data-dir"
        )
    return about, immunized, problem


def _request(values: Mapping[str, Any]) -> RunSettings:
    """What a run of any schema was asked for, as far as its data and attacks go."""
    left_out = ("method", "settings", "compare", "attacks", "attack_settings")
    names = [name for name in settings_of(RunSettings) if name not in left_out]
    known = {name: values[name] for name in names if values.get(name) is not None}
    return build(RunSettings, known, "results.json")


def _attack_row(
    one: Attack[Any, Any],
    role: str,
    task: Task,
    immunized: Immunized,
    about: RunSettings,
    budgets: Sequence[int],
) -> AttackRow:
    target = task if needs_samples(one) else gram_equivalent(task)
    thetas = immunized.theta, immunized.theta0
    done = compare_attack(
        target,
        *thetas,
        attacker=one,
        base_budget=about.base_budget,
        limit=about.limit,
        seed=about.seed,
    )
    row: AttackRow = {
        "attacker": one.name,
        "role": role,
        "task": task.name,
        "slowdown": done.slowdown.ratio,
        "is_lower_bound": done.slowdown.censored,
        "steps_without": done.base_steps,
        "steps_with": done.steps,
        "learning_rate_without": done.base.config.get("learning_rate"),
        "learning_rate_with": done.immunized.config.get("learning_rate"),
    }
    if budgets:
        outcomes = attack_at_budgets(
            target, *thetas, budgets=budgets, attacker=one, seed=about.seed
        )
        row["budgets"] = [outcome._asdict() for outcome in outcomes]
    return row


# --- comparisons ----------------------------------------------------------------------------------


def compare(folders: Sequence[str | Path], out: str | Path, *, force: bool = False) -> ManyRuns:
    """Compare finished runs and sweeps at equal cost to the primary task.

    Args:
        folders: Run and sweep folders, of any schema.
        out: The folder to write.
        force: Whether an existing one is replaced.

    Returns:
        The comparison.

    Raises:
        FileExistsError: If ``out`` exists and ``force`` is not given, or is no run folder.
        FileNotFoundError: If a folder holds no run.
        ValueError: If the runs share no attacker.
    """
    check_target(out, force=force)
    report.check_extras()
    content = points_of_runs.compare(points_of_runs.load_points(folders))
    with run_directory(out, force=force) as folder:
        report.write(content, folder)
        write_json(folder / "results.json", content)
    return ManyRuns(content, Path(out), comparison_report.summary(content))


# --- sweeps ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SweepSettings(MeasureSettings):
    """Many immunizations: pairs of tasks x methods x strengths x seeds.

    Settings of methods hold for those that have them. Without attacks, only condition numbers are
    measured.

    Attributes:
        pairs: Tasks to keep and to make hard, as ``4/9`` or ``4,6:2,3,7/5,9:0,1,8``; ``all`` for
            the 90 ordered pairs of digits.
        methods: The methods.
        strengths: Values of a method's knob by method, as ``closed-form=3,10,30``.
        frontier: Whether every method's knob takes its usual values.
        seeds: The seeds.
    """

    pairs: tuple[str, ...] = ("all",)
    methods: tuple[MethodName | str, ...] = ("closed-form",)
    strengths: Mapping[str, Any] = field(default_factory=dict)
    frontier: bool = False
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.methods:
            METHODS.find(name, "methods")
        for name in ("pairs", "methods", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be given, none of them twice, got {list(values)}")

    def points(self) -> dict[str, RunSettings]:
        """The settings of every point, checked, by a name that is fit for a file.

        Raises:
            ValueError: If a pair, a method, a knob or a setting is unknown or out of range.
        """
        knobs = self._knobs()
        common = {name: getattr(self, name) for name in settings_of(MeasureSettings)}
        found = {}
        for pair, method, seed in product(
            parse_pairs(self.pairs, self.data), self.methods, self.seeds
        ):
            primary, harmful = pair
            own = settings_of(type(METHODS.find(method, "methods")))
            values = {name: value for name, value in self.settings.items() if name in own}
            for value in knobs[method]:
                words = [self.data if primary is None else f"{primary}_{'+'.join(harmful)}", method]
                chosen = values
                if value is not None:
                    knob = knob_of(METHODS[method])
                    assert knob is not None  # _knobs asked
                    chosen = {**values, knob: value}
                    words.append(f"{knob}={value:g}")
                words.append(f"seed={seed}")
                point = RunSettings(
                    **{**common, "settings": chosen},
                    primary=primary,
                    harmful=harmful,
                    method=method,
                    seed=seed,
                )
                point.immunizer()
                check_names(point.data, point.primary, point.harmful)
                found[re.sub(r"[^A-Za-z0-9=.,+_-]", "-", "__".join(words))] = point
        return found

    def _knobs(self) -> dict[str, tuple[float | None, ...]]:
        """Values of the knob by method; ``None`` stands for the setting as it is."""
        known = {
            name for m in self.methods for name in settings_of(type(METHODS.find(m, "methods")))
        }
        unknown = [name for name in self.settings if name not in known]
        if unknown:
            raise ValueError(f"settings: {unknown[0]} must be a setting of a method of the sweep")
        found: dict[str, tuple[float | None, ...]] = {
            name: (self.frontier and grid_of(METHODS[name])) or (None,) for name in self.methods
        }
        for text, values in self.strengths.items():
            name = text.replace("_", "-")
            if name not in found:
                raise ValueError(
                    f"strengths: must look like METHOD=1,3,10 for a method of the sweep, got "
                    f"{text}={values}"
                )
            if knob_of(METHODS[name]) is None:
                raise ValueError(f"strengths: {name} has no knob; leave it out")
            found[name] = _numbers(name, values)
        return found


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    parts = values.split(",") if isinstance(values, str) else values
    try:
        found = tuple(map(float, parts if isinstance(parts, (list, tuple)) else [parts]))
    except (TypeError, ValueError):
        raise ValueError(f"strengths: values must be numbers, got {name}={values}") from None
    if len(set(found)) < len(found):
        raise ValueError(f"strengths: no value may come twice, got {name}={values}")
    return found


def parse_pairs(texts: Sequence[str], data: str) -> list[tuple[str | None, tuple[str, ...]]]:
    """Pairs of tasks as the command line writes them.

    Args:
        texts: ``all``, or ``P/H`` each.
        data: The data set; ``house`` has one pair of its own.

    Returns:
        Primary and harmful task of each pair.

    Raises:
        ValueError: If a text has another form.

    Example:
        >>> parse_pairs(["4/9"], "mnist"), len(parse_pairs(["all"], "digits"))
        ([('4', ('9',))], 90)
    """
    if list(texts) == ["all"]:
        if data == "house":
            return [(None, ())]
        if data not in ("digits", "mnist"):
            raise ValueError(f"pairs: must name pairs for {data}, got all")
        return [(str(a), (str(b),)) for a, b in product(range(10), repeat=2) if a != b]
    found: list[tuple[str | None, tuple[str, ...]]] = []
    for text in texts:
        sides = text.split("/")
        if len(sides) != 2 or not all(sides):
            raise ValueError(f"pairs: a pair must look like 4/9 or 3:8/4:9, got {text!r}")
        found.append((sides[0], (sides[1],)))
    return found


def measure_point(settings: RunSettings) -> dict[str, Any]:
    """What a sweep keeps of one point: condition numbers, and the slow-downs asked for.

    Args:
        settings: What to do; ``attacks`` are all that are run.

    Returns:
        Plain values under the names of ``results.json``.
    """
    attacks = settings.chosen_attacks(standard=False)
    return _measured(settings, attacks, details=False).results()


@dataclass(frozen=True)
class Sweep(ManyRuns):
    """A finished sweep.

    Attributes:
        points: The results of each point, by name.
    """

    points: dict[str, dict[str, Any]]


def sweep(
    settings: SweepSettings,
    out: str | Path,
    *,
    force: bool = False,
    jobs: int = 1,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Sweep:
    """Do what is missing of a sweep, and make its summary.

    Args:
        settings: The points. All of it is checked before any work.
        out: The sweep folder: a file for each point, ``results.json``, heat maps, ``report.html``.
            The same call goes on with one that was cut off.
        force: Whether points of other settings are dropped.
        jobs: Processes, where there is no executor.
        executor: Where the points run (:func:`immunize_ext.sweep.run_jobs`).
        progress: Called after each point.

    Returns:
        The sweep.

    Raises:
        FileExistsError: If ``out`` holds something else, or a sweep of other settings.
        ValueError: If a setting is unknown or out of range.

    Note:
        Processes import the package anew: methods and attacks of your own have to be registered by
        a module that they import as well, or ``jobs`` has to be 1.
    """
    points = settings.points()
    settings.chosen_attacks(standard=False)
    report.check_extras()
    done = run_sweep(
        out,
        f"{KIND}-sweep",
        {name: partial(measure_point, point) for name, point in points.items()},
        force=force,
        executor=executor,
        processes=jobs,
        progress=progress,
    )
    content = points_of_runs.summarise(done)
    report.write(content, Path(out))
    write_whole(Path(out) / "results.json", content)
    words = comparison_report.sweep_summary(content)
    return Sweep(content, Path(out), words, done)
