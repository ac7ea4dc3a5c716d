"""The certificate of a finished run: measured, written beside it, drawn.

What was made of samples is not judged on them: the run's method is applied again to every second
harmful sample, and the attackers have the others.

    from immunize_ext.probing import certification
    print(certification.certify_run("runs/kappa").summary())

``immunize certify`` is this function.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from immunize_ext import report
from immunize_ext.probing import certificate_report
from immunize_ext.probing.certificates import certify
from immunize_ext.probing.data import Problem, Task
from immunize_ext.probing.immunizers import METHODS, Immunized
from immunize_ext.probing.run import RunSettings, reopen
from immunize_ext.seams import Progress
from immunize_ext.settings import check_types, settings_of
from immunize_ext.storage import SCHEMA, environment, to_json

KIND = "kappa-certificate"


@dataclass(frozen=True)
class CertificationSettings:
    """How a run is certified.

    Attributes:
        benign: Other tasks of the same data that nobody wants to make hard, in the form of the
            run's own: their price is measured beside.
        draws: Draws of few samples.
        seed: Seed of the draws; that of the run when omitted.
        own_samples: Judge the very extractor of the run, on the harmful samples it was made of: for
            a method of your own that is not registered. Locks look better there than they are.
        data_dir: Where the data is now.
        device: Where to compute; where the run did when omitted.
    """

    benign: tuple[str, ...] = ()
    draws: int = 8
    seed: int | None = None
    own_samples: bool = False
    data_dir: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}")


@dataclass(frozen=True)
class CertifiedRun:
    """What was measured.

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
        return f"{certificate_report.summary(self.record)}\n\nadded: {self.path}"


def certify_run(
    folder: str | Path,
    settings: CertificationSettings | None = None,
    *,
    progress: Progress | None = None,
) -> CertifiedRun:
    """Measure what a finished run costs each kind of attacker.

    Args:
        folder: The run folder; nothing that is in it is changed.
        settings: How.
        progress: Called with what is measured and the share done so far.

    Returns:
        What was added under ``folder/certificates``: a JSON file and its page.

    Raises:
        FileNotFoundError: If there is no such run.
        MissingExtraError: If a package that draws is not installed.
        ValueError: If it is no single run, its data has changed, its method is not registered, or
            a setting is out of range.
    """
    settings = settings or CertificationSettings()
    report.check_extras()
    changes = {
        name: value
        for name in ("data_dir", "device")
        if (value := getattr(settings, name)) is not None
    }
    about, immunized, problem = reopen(folder, "certify", **changes)
    benign = _benign(about, problem, settings.benign)
    seed = about.seed if settings.seed is None else settings.seed
    attacked = problem.harmful
    # Making it again counts as much as one certificate.
    first, count = 0, len(attacked)
    if not settings.own_samples:
        first, count = 1, count + 1
        immunized, attacked = _made_again(immunized, problem, progress, 1.0 / count)
    certificates = []
    for index, task in enumerate(attacked, first):

        def part(text: str, share: float, index: int = index) -> None:
            if progress is not None:
                progress(text, (index + share) / count)

        found = certify(
            immunized,
            problem.primary,
            task,
            benign=benign,
            ridge=about.ridge,
            draws=settings.draws,
            seed=seed,
            progress=part,
        )
        certificates.append({"harmful": task.name, **found.to_dict()})
    record = to_json(
        {
            "schema": SCHEMA,
            "kind": KIND,
            "method": immunized.method,
            "primary": problem.primary.name,
            "benign": [task.name for task in benign],
            "own_samples": settings.own_samples,
            "draws": settings.draws,
            "seed": seed,
            "certificates": certificates,
            "environment": environment(),
        }
    )
    return CertifiedRun(record, report.write_record(record, Path(folder) / "certificates"))


def _benign(about: RunSettings, problem: Problem[Task], names: tuple[str, ...]) -> tuple[Task, ...]:
    """Tasks of the run's data by name, of the width of its features."""
    if not names:
        return ()
    if about.data == "house":
        raise ValueError(f"certify: benign must be left out for house, got {', '.join(names)}")
    found = replace(about, primary=names[0], harmful=names).load().harmful
    return replace(problem, benign=found).benign


def _made_again(
    immunized: Immunized, problem: Problem[Task], progress: Progress | None, share: float
) -> tuple[Immunized, tuple[Task, ...]]:
    """The run's method on one half of the harmful samples, and the tasks of who has the other."""
    if immunized.method not in METHODS:
        raise ValueError(
            f"certify: method must be a registered one, to be applied to half of the samples, got "
            f"{immunized.method!r}; register it, or judge it on its own with --own-samples"
        )
    known = settings_of(type(METHODS[immunized.method]))
    config = {name: value for name, value in immunized.config.items() if name in known}
    owners, attackers = zip(*(task.halves() for task in problem.harmful), strict=True)

    def part(text: str, done: float) -> None:
        if progress is not None:
            progress(f"half of the samples: {text}", done * share)

    again = METHODS.build(immunized.method, config, "certify").fit(
        immunized.theta0, Problem.of(problem.primary, *owners, head=problem.head), progress=part
    )
    return again, attackers
