"""What an immunized linear extractor costs each kind of attacker: the certificate of a run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from immunize_ext.probing.attacks import ATTACKS, AttackComparison, compare_attack
from immunize_ext.probing.attacks.registry import GradientDescent
from immunize_ext.probing.certificates.few_samples import (
    COUNTS,
    LEARNT,
    REFERENCE,
    Curve,
    best_of,
    error_of_constant,
    sample_curve,
    samples_to,
)
from immunize_ext.probing.certificates.learning_curve import Spectrum
from immunize_ext.probing.certificates.linear_information import linear_information, probe
from immunize_ext.probing.certificates.nonlinear_probes import kernel_probe, perceptron_probe
from immunize_ext.probing.certificates.number_formats import (
    UNIT_ROUNDOFF,
    format_floor,
    served,
)
from immunize_ext.probing.certificates.rewhitening import (
    aligned,
    gaussian_kappa_left,
    raised,
    rewhitened,
)
from immunize_ext.probing.certificates.work import factorisation_steps, work_cap
from immunize_ext.probing.data import Task, gram_equivalent
from immunize_ext.probing.data.scale import in_range
from immunize_ext.probing.immunizers import Immunized
from immunize_ext.probing.metrics import EXPONENT, WHITENING, kappa_under, with_ridge
from immunize_ext.quantities import Slowdown, slowdown
from immunize_ext.report.page import in_notebook
from immunize_ext.seams import Progress

# Multiples of the number of features: how many unlabelled inputs the attacker whitens with.
MULTIPLES = (1.5, 4.0, 10.0)

# Relative ridges of the whitening; the attacker takes the best.
WHITENING_RIDGES = (1e-1, 1e-4, 1e-8)

# The largest slow-down looked for there.
WHITENED_LIMIT = 16.0

# How much of the variances the few-sample attacker takes away; he takes the best.
POWERS = (0.25, 0.5, 0.75, 1.0)

# By how much who looks for a direction that was made small raises one octave of the spectrum.
SEARCH_GAIN = 10.0

# A leading share of the spectrum that a low-rank preconditioner takes away.
NYSTROM_SHARE = 0.1


@dataclass(frozen=True)
class Delay:
    """What one kind of optimizer pays, by its condition number.

    Attributes:
        optimizer: Its name in :data:`immunize_ext.probing.metrics.EXPONENT`.
        exponent: The power of kappa by which its steps grow.
        log_kappa_before: Log of the condition number that it sees without immunization.
        log_kappa_after: The same with it.
        factor: exp(exponent (after - before)): how many times more steps, by the spectrum alone.
    """

    optimizer: str
    exponent: float
    log_kappa_before: float
    log_kappa_after: float
    factor: float


@dataclass(frozen=True)
class Work:
    """The cap on any slow-down, in work.

    Attributes:
        factorisation: What whitening and one step cost, in steps of gradient descent.
        steps_before: Steps of gradient descent on the harmful task without immunization.
        cap: The ratio: no invertible theta makes a free attacker slower than this.
        measured: The slow-down of gradient descent in steps.
        measured_is_lower_bound: Whether that was cut off by the budget.
    """

    factorisation: float
    steps_before: int
    cap: float
    measured: float
    measured_is_lower_bound: bool


@dataclass(frozen=True)
class Undoing:
    """Gradient descent on the harmful task after whitening by unlabelled inputs.

    Attributes:
        inputs: m, of the primary and the harmful task in turn.
        factor: Steps with theta over those of plain gradient descent without immunization, at the
            attacker's best ridge.
        is_lower_bound: Whether that was cut off by the budget.
        factor_without: The same attacker where there is no theta to undo.
        gaussian_kappa: The kappa that theory leaves for Gaussian inputs of one covariance.
    """

    inputs: int
    factor: float
    is_lower_bound: bool
    factor_without: float
    gaussian_kappa: float


@dataclass(frozen=True)
class FewSamples:
    """Learning one task from few labelled samples.

    Attributes:
        role: ``harmful``, ``primary`` or ``benign``.
        name: The task's.
        reference: The number of samples that factors are multiples of: 40, or the most there are.
        constant: Error of the best constant answer, which shows no skill.
        without: Error by number of samples without immunization.
        given: With the features as they are.
        whitened: With features re-whitened, wholly or in part, by unlabelled inputs of the primary
            task; at each number the best power.
        searched: With one octave of the spectrum raised in the search for a direction that was
            made small; at each number the best octave, as no validation could do better. For the
            harmful task alone.
        sibling: With features mapped onto those of a public model that was not immunized, by
            unlabelled inputs of both tasks.
        factor_given: How many times more samples for what ``reference`` gave without; infinite if
            more than were tried, ``None`` where that was hardly better than the constant.
        factor_best: The same for the best of the attackers without a public model.
        factor_sibling: The same for who has one.
    """

    role: str
    name: str
    reference: int
    constant: float
    without: Curve
    given: Curve
    whitened: Curve
    searched: Curve
    sibling: Curve
    factor_given: float | None
    factor_best: float | None
    factor_sibling: float | None


@dataclass(frozen=True)
class Format:
    """What a linear probe finds in features that are served in a number format.

    Attributes:
        role: ``harmful`` or ``primary``.
        number_format: Its name.
        explained: Predicted share of the variance explained, for any optimizer and any data.
        measured: R^2 of the best ridge probe on rounded features.
        accuracy: Its accuracy; ``None`` for regression.
        queries: Jittered queries an input that bring back half of what the format took.
    """

    role: str
    number_format: str
    explained: float
    measured: float
    accuracy: float | None
    queries: float


@dataclass(frozen=True)
class Linear:
    """What linear and other probes find with all data.

    Attributes:
        role: ``harmful``, ``primary`` or ``benign``.
        name: The task's.
        r2_before: R^2 of the best linear probe without immunization.
        r2_after: The same with it.
        accuracy_before: Accuracy without; ``None`` for regression.
        accuracy_after: Accuracy with.
        kernel_before: Of a Gaussian kernel probe without: accuracy, or R^2 of a regression; of
            benign tasks ``None``, like the following.
        kernel_after: The same with.
        perceptron_before: Of a perceptron with one hidden layer without.
        perceptron_after: The same with.
        leak: p / n: the R^2 that a direction estimated from n samples leaves.
    """

    role: str
    name: str
    r2_before: float
    r2_after: float
    accuracy_before: float | None
    accuracy_after: float | None
    kernel_before: float | None
    kernel_after: float | None
    perceptron_before: float | None
    perceptron_after: float | None
    leak: float


@dataclass(frozen=True)
class Certificate:
    """What each kind of attacker pays; every field says how it was found.

    Attributes:
        invertible: Whether theta loses no direction of the features.
        delays: By kind of optimizer; empty for a theta that is not invertible.
        work: The cap in work; ``None`` where theta is not invertible, which whitening does not
            undo, and where whitening does not learn the harm as well as gradient descent does.
        undoing: The price of whitening.
        few_samples: Of the harmful task, the primary one, and benign ones.
        formats: Of the harmful and the primary task, by number format.
        linear: Of the harmful task, the primary one, and benign ones.
        seconds: Time of each part.
    """

    invertible: bool
    delays: list[Delay] = field(default_factory=list)
    work: Work | None = None
    undoing: list[Undoing] = field(default_factory=list)
    few_samples: list[FewSamples] = field(default_factory=list)
    formats: list[Format] = field(default_factory=list)
    linear: list[Linear] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return asdict(self)

    def _repr_html_(self) -> str | None:
        """What a notebook shows."""
        return in_notebook("kappa-certificate-part", self.to_dict())


def certify(
    immunized: Immunized,
    primary: Task,
    harmful: Task,
    *,
    benign: Sequence[Task] = (),
    ridge: float = 1e-2,
    draws: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> Certificate:
    """Measure what an immunized linear extractor costs each kind of attacker.

    Args:
        immunized: The extractor and the one before.
        primary: The task to keep.
        harmful: The task that was made hard.
        benign: Other tasks that nobody wants to make hard.
        ridge: Ridge on each K, relative to its largest eigenvalue, for the condition numbers.
        draws: Draws of few samples.
        seed: Their seed.
        progress: Called with what is measured and the share done so far.

    Returns:
        The certificate.

    Note:
        Deterministic given ``seed``; computed in float64.

    Source:
        The impossibility for whitening learners and the cap are proven in the modules
        ``metrics.optimizers`` and ``work``; learning curves follow Hastie et al. (2022).

    Example:
        >>> from immunize_ext.probing.data import Problem, digits_task
        >>> from immunize_ext.probing.immunizers import METHODS
        >>> problem = Problem.of(digits_task((3,), (8,)), digits_task((4,), (9,)))
        >>> immunized = METHODS["lock"].fit(None, problem)
        >>> found = certify(immunized, problem.primary, problem.harmful[0], draws=2)
        >>> found.invertible, found.linear[0].r2_before > 0.8, found.linear[0].r2_after < 0.1
        (False, True, True)
    """
    primary, harmful = in_range((primary, harmful))
    theta, before = (t.to(torch.float64) for t in (immunized.theta, immunized.theta0))
    invertible = theta.shape[0] == theta.shape[1]
    roles = [("harmful", harmful), ("primary", primary)]
    every = [*roles, *(("benign", task) for task in benign)]
    seconds: dict[str, float] = {}

    def part(index: int, name: str, measure: Callable[[], Any]) -> Any:
        if progress is not None:
            progress(name.replace("_", " "), index / 6)
        started = time.perf_counter()
        found = measure()
        seconds[name] = time.perf_counter() - started
        return found

    thetas = before, theta
    delays = part(0, "delays", lambda: _delays(harmful, *thetas, ridge) if invertible else [])
    work, undoing = None, []
    if invertible:
        # One run of gradient descent, without and with theta, is what both are measured by.
        descent, work = part(1, "work", lambda: _work(harmful, *thetas))
        undoing = part(2, "undoing", lambda: _undoing(primary, harmful, *thetas, descent))
    few = part(
        3,
        "few_samples",
        lambda: [_few(role, task, primary, *thetas, draws, seed) for role, task in every],
    )
    formats = part(
        4, "formats", lambda: [row for role, t in roles for row in _formats(role, t, theta)]
    )
    linear = part(5, "linear", lambda: [_linear(role, task, *thetas, seed) for role, task in every])
    return Certificate(invertible, delays, work, undoing, few, formats, linear, seconds)


def _delays(harmful: Task, before: Tensor, after: Tensor, ridge: float) -> list[Delay]:
    rows = with_ridge(harmful.x_train.to(torch.float64), ridge)
    hessians = [(rows @ theta).mT @ (rows @ theta) for theta in (before, after)]
    rank = max(1, round(NYSTROM_SHARE * len(before)))
    found = []
    for name, exponent in EXPONENT.items():
        logs = [0.0, 0.0]
        if name not in WHITENING:
            extra = rank if name == "nystrom" and rank < len(before) else 0
            logs = [math.log(float(kappa_under(name, h, rank=extra))) for h in hessians]
        factor = math.exp(exponent * (logs[1] - logs[0]))
        found.append(Delay(name, exponent, logs[0], logs[1], factor))
    return found


def _work(harmful: Task, before: Tensor, after: Tensor) -> tuple[AttackComparison, Work | None]:
    task = gram_equivalent(harmful)
    done = compare_attack(task, after, before, attacker="gradient_descent")
    # The cap is that of one who gets there by whitening, in one step: on few samples nobody may.
    solved = ATTACKS["whitened"].run(before, task, steps=1)
    if not done.base_steps or min(solved.score("test_loss")) > done.target:
        return done, None
    shape = len(harmful.x_train), harmful.num_features
    return done, Work(
        factorisation=factorisation_steps(*shape),
        steps_before=done.base_steps,
        cap=work_cap(*shape, done.base_steps),
        measured=done.slowdown.ratio,
        measured_is_lower_bound=done.slowdown.censored,
    )


def _undoing(
    primary: Task, harmful: Task, before: Tensor, after: Tensor, plain: AttackComparison
) -> list[Undoing]:
    mixed = _in_turn(primary.x_train, harmful.x_train).to(torch.float64)
    task, features = gram_equivalent(harmful), primary.num_features
    base = plain.base_steps or 0
    budget = round(WHITENED_LIMIT * max(base, 1))

    def slowed(theta: Tensor) -> Slowdown:
        curve = GradientDescent().run(theta, task, steps=budget, stop_at=plain.target)
        return slowdown(curve.steps_to("test_loss", plain.target, below=True), base, budget)

    found = []
    for count in (math.ceil(multiple * features) for multiple in MULTIPLES):
        if count > len(mixed):
            break
        slowdowns = [
            min(
                slowed(rewhitened(theta, mixed[:count], ridge=ridge, centre=False))
                for ridge in WHITENING_RIDGES
            )
            for theta in (after, before)
        ]
        found.append(
            Undoing(
                count,
                slowdowns[0].ratio,
                slowdowns[0].censored,
                slowdowns[1].ratio,
                gaussian_kappa_left(count, features),
            )
        )
    return found


def _in_turn(first: Tensor, second: Tensor) -> Tensor:
    """Rows of both in turn, as many of each."""
    count = min(len(first), len(second))
    return torch.stack([first[:count], second[:count]], dim=1).flatten(0, 1)


def _few(
    role: str, task: Task, primary: Task, before: Tensor, after: Tensor, draws: int, seed: int
) -> FewSamples:
    def curve(theta: Tensor, until: float = -math.inf) -> Curve:
        return sample_curve(task, theta, counts=COUNTS, draws=draws, seed=seed, until=until)

    without, given = curve(before), curve(after)
    reference = max((n for n in without if n <= REFERENCE), default=min(without))
    target, constant = without[reference], error_of_constant(task)
    unlabelled = primary.x_train
    whitened = best_of(
        *(curve(rewhitened(after, unlabelled, power=power), target) for power in POWERS)
    )
    both = _in_turn(primary.x_train, task.x_train)
    searched: Curve = {}
    if role == "harmful":
        searched = best_of(
            *(
                curve(raised(after, both, *octave, SEARCH_GAIN), target)
                for octave in _octaves(after.shape[1])
            )
        )
    sibling = curve(aligned(after, before, both), target)
    start = samples_to(without, target)
    factors: list[float | None] = [None, None, None]
    if target < LEARNT * constant:
        tried = given, best_of(given, whitened, searched), sibling
        factors = [samples_to(c, target) / start for c in tried]
    curves = without, given, whitened, searched, sibling
    return FewSamples(role, task.name, reference, constant, *curves, *factors)


def _octaves(count: int) -> list[tuple[int, int]]:
    """The first, the second, the third and fourth, the next four of so many, and so on."""
    ends = [0, *(2**k for k in range(count.bit_length()) if 2**k < count), count]
    return list(pairwise(ends))


def _formats(role: str, task: Task, theta: Tensor) -> list[Format]:
    z, z_test = (x.to(torch.float64) @ theta for x in (task.x_train, task.x_test))
    spectrum, mean_square = Spectrum.of(task, theta), float(z.square().mean())
    found = []
    for name in UNIT_ROUNDOFF:
        floor = format_floor(spectrum, mean_square, name)
        seen = probe(
            served(z, name),
            task.y_train,
            served(z_test, name),
            task.y_test,
            classify=task.is_classification,
        )
        found.append(Format(role, name, floor.explained, seen.r2, seen.accuracy, floor.queries))
    return found


def _linear(role: str, task: Task, before: Tensor, after: Tensor, seed: int) -> Linear:
    old, new = (linear_information(task, theta) for theta in (before, after))
    others: list[float | None] = [None] * 4
    if role != "benign":
        others = [
            probe(task, theta, seed=seed)
            for probe in (kernel_probe, perceptron_probe)
            for theta in (before, after)
        ]
    return Linear(
        role,
        task.name,
        old.r2,
        new.r2,
        old.accuracy,
        new.accuracy,
        kernel_before=others[0],
        kernel_after=others[1],
        perceptron_before=others[2],
        perceptron_after=others[3],
        leak=task.num_features / len(task.x_train),
    )
