"""The methods that ``immunize kappa`` knows, and the knob by which each trades harm for cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from immunize_ext.probing.attacks.compress import compressed
from immunize_ext.probing.data import Task
from immunize_ext.probing.immunizers import (
    BaselineImmunizer,
    ClosedFormImmunizer,
    ConditionNumberImmunizer,
    ImmaImmunizer,
    Immunized,
    MiniBatchImmunizer,
    MultiplicativeImmunizer,
    SeveralHarmsImmunizer,
)
from immunize_ext.probing.tmp_config import KappaConfig

Fit = Callable[[KappaConfig, Task, list[Task]], Immunized]


@dataclass(frozen=True)
class Method:
    """One way to immunize.

    Attributes:
        fit: Immunizes with the settings of a run.
        help: One line for ``--help``.
        knob: The setting that trades slow-down of the harm for cost; ``None`` without one.
        grid: Values of the knob that a frontier tries.
    """

    fit: Fit
    help: str
    knob: str | None = None
    grid: tuple[float, ...] = ()


def _given(**settings: Any) -> dict[str, Any]:
    """Settings that were given; an immunizer has its own value for the others."""
    return {name: value for name, value in settings.items() if value is not None}


def _short(tasks: list[Task]) -> list[Task]:
    """Equal for what looks at all samples at once, and faster."""
    return [compressed(task) for task in tasks]


def _closed_form(config: KappaConfig, primary: Task, harmful: list[Task], **more: Any) -> Immunized:
    settings: dict[str, Any] = {"strength": config.c, "ridge": config.ridge, "seed": config.seed}
    if config.grading is not None:
        settings["grading"] = config.grading
    settings.update(more)
    # "auto" cuts the primary task into folds, which needs its samples.
    automatic = settings["strength"] == "auto"
    tasks = [primary, *harmful] if automatic else _short([primary, *harmful])
    return ClosedFormImmunizer(**settings).fit(tasks[0], tasks[1])


def _several(config: KappaConfig, primary: Task, harmful: list[Task]) -> Immunized:
    if isinstance(config.c, str):
        raise ValueError("several-harms: c must be a number, got 'auto'; 30 is a usual value")
    settings = _given(grading=config.grading)
    immunizer = SeveralHarmsImmunizer(
        strength=config.c, ridge=config.ridge, seed=config.seed, **settings
    )
    short = _short([primary, *harmful])
    return immunizer.fit(short[0], short[1:])


def _condition_number(
    config: KappaConfig, primary: Task, harmful: list[Task], **more: Any
) -> Immunized:
    if config.batch != "full":
        return _mini_batch(config, primary, harmful, **more)
    settings: dict[str, Any] = {
        "ill_share": config.ill_share,
        "ridge": config.ridge,
        "seed": config.seed,
        **_given(
            steps=config.steps,
            first_change=config.first_change,
            learning_rate=config.learning_rate,
        ),
        **more,
    }
    short = _short([primary, *harmful])
    return ConditionNumberImmunizer(**settings).fit(short[0], short[1])


def _mini_batch(config: KappaConfig, primary: Task, harmful: list[Task], **more: Any) -> Immunized:
    try:
        size = int(config.batch)
    except ValueError:
        raise ValueError(
            f"condition-number: batch must be 'full' or a number of samples, got {config.batch!r}"
        ) from None
    settings = {
        "batch_size": size,
        "ridge": config.ridge,
        "seed": config.seed,
        **_given(epochs=config.steps, learning_rate=config.learning_rate),
    }
    if "preconditioner" in more:
        settings["preconditioner"] = more["preconditioner"]
    return MiniBatchImmunizer(**settings).fit(primary, harmful[0])


def _baseline(config: KappaConfig, tasks: list[Task], objective: str, **more: Any) -> Immunized:
    settings: dict[str, Any] = {
        "ridge": config.ridge,
        **_given(steps=config.steps, first_change=config.first_change),
        **more,
    }
    short = _short(tasks)
    return BaselineImmunizer(objective, **settings).fit(short[0], short[1])  # type: ignore[arg-type]


def _opt_kappa(config: KappaConfig, primary: Task, harmful: list[Task]) -> Immunized:
    objectives = {"difference": "kappa_difference", "log-ratio": "kappa_log_ratio"}
    if config.objective not in objectives:
        raise ValueError(
            f"opt-kappa: objective must be {' or '.join(objectives)}, got {config.objective!r}"
        )
    objective = objectives[config.objective]
    return _baseline(config, [primary, *harmful], objective, optimizer="adam")


def _multiplicative(config: KappaConfig, primary: Task, harmful: list[Task]) -> Immunized:
    immunizer = MultiplicativeImmunizer(
        eta_harmful=config.eta_harmful, ridge=config.ridge, **_given(steps=config.steps)
    )
    short = _short([primary, *harmful])
    return immunizer.fit(short[0], short[1])


def _imma(config: KappaConfig, primary: Task, harmful: list[Task]) -> Immunized:
    immunizer = ImmaImmunizer(
        weight=config.weight,
        ridge=config.ridge,
        seed=config.seed,
        **_given(steps=config.steps, first_change=config.first_change),
    )
    short = _short([primary, *harmful])
    return immunizer.fit(short[0], short[1])


STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


SHARES = (0.1, 0.3, 1.0, 3.0)


FEW_STEPS = (10.0, 30.0, 100.0, 300.0)


METHODS: dict[str, Method] = {
    "closed-form": Method(
        _closed_form,
        "the best trade-off there is, graded in log l; c decides the strength",
        "c",
        STRENGTHS,
    ),
    "graded": Method(
        lambda config, p, h: _closed_form(config, p, h, grading="linear"),
        "the closed form graded in l itself",
        "c",
        STRENGTHS,
    ),
    "several-harms": Method(
        _several, "the closed form against several harmful tasks at once", "c", STRENGTHS
    ),
    "whitening": Method(
        lambda config, p, h: _closed_form(config, p, h, strength=1.0, grading="log"),
        "whiten the primary task: the closed form at c = 1, uses no harmful data",
    ),
    "condition-number": Method(
        _condition_number,
        "Algorithm 1 of the paper, full data or mini-batches",
        "ill_share",
        SHARES,
    ),
    "condition-number-plain": Method(
        lambda config, p, h: _condition_number(config, p, h, preconditioner="none"),
        "Algorithm 1 without K^-1",
        "ill_share",
        SHARES,
    ),
    "r-ill-only": Method(
        lambda config, p, h: _baseline(config, [p, *h], "r_ill"),
        "raise kappa of the harmful task, whatever it costs",
        "steps",
        FEW_STEPS,
    ),
    "r-well-only": Method(
        lambda config, p, h: _baseline(config, [p, *h], "r_well"),
        "lower kappa of the primary task, whatever the harm does",
        "steps",
        FEW_STEPS,
    ),
    "opt-kappa": Method(
        _opt_kappa, "descend on the kappas themselves (--objective)", "steps", FEW_STEPS
    ),
    "multiplicative": Method(
        _multiplicative, "multiplicative update of both log kappas", "eta_harmful", (0.03, 0.1, 0.3)
    ),
    "imma": Method(_imma, "bi-level, uses harmful labels", "weight", (0.3, 1.0, 3.0)),
}


def label(config: KappaConfig) -> str:
    """What reports call the method with its variant.

    Example:
        >>> label(KappaConfig(method="opt-kappa")), label(KappaConfig(batch="64"))
        ('opt-kappa, log-ratio', 'closed-form')
    """
    if config.method == "opt-kappa":
        return f"opt-kappa, {config.objective}"
    if config.method.startswith("condition-number") and config.batch != "full":
        return f"{config.method}, batches of {config.batch}"
    if config.method in ("closed-form", "several-harms") and config.grading is not None:
        return f"{config.method}, grading {config.grading}"
    return config.method


def check_method(config: KappaConfig) -> Method:
    """The method of a run.

    Raises:
        ValueError: If it is unknown, or does not fit the number of harmful tasks.
    """
    if config.method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {config.method!r}")
    if len(config.harmful) > 1 and config.method != "several-harms":
        raise ValueError(
            f"{config.method} must have one harmful task, got {len(config.harmful)}; "
            "use --method several-harms"
        )
    return METHODS[config.method]


def fit(config: KappaConfig, primary: Task, harmful: list[Task]) -> Immunized:
    """Immunize with the method of the settings."""
    return check_method(config).fit(config, primary, harmful)
