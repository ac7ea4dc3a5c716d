"""The command ``immunize``: one function a command. Each parses, builds settings, calls and prints.

What a command does can be done in Python by what it calls: ``probing.run`` and
``text_to_image.run``. Heavy imports stand inside the functions: ``immunize --help`` and
``immunize doctor`` have to work where optional packages do not.

Exit status: 0 done, 1 ``doctor`` found something wrong, 2 the request cannot be carried out (one
line says what to do, nothing is half-written), 130 and 143 interrupted.
"""

from __future__ import annotations

import argparse
import inspect
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple, NoReturn, TypeAlias

from immunize_ext import _help
from immunize_ext._extras import MissingExtraError, require_extra
from immunize_ext._version import __version__
from immunize_ext.flags import (
    USAGE_ERROR,
    CommandParser,
    add_flags,
    add_registry_flags,
    build_of_flags,
    flag_of,
    given,
    offer,
    read_settings,
)
from immunize_ext.runtime import Interrupted, check_count, interruptible, progress_bar, threads
from immunize_ext.seams import Progress
from immunize_ext.settings import Registry, settings_of, suggestion

Command: TypeAlias = Callable[[CommandParser, Sequence[str]], int]

# Flags that have another name now, and keys of config files likewise.
_ALIASES = MappingProxyType({"--c": "--strength", "--attackers": "--attacks", "--seeds": "--seed"})
_OLD_NAMES = MappingProxyType({k[2:]: v[2:] for k, v in _ALIASES.items()})


# --- the two wings --------------------------------------------------------------------------------


class _Wing(NamedTuple):
    """A wing as its commands see it.

    Attributes:
        run: Its module ``run``.
        methods: Its methods.
        attacks: Its attacks.
        packages: What a run needs beside torch: module, extra, purpose.
    """

    run: ModuleType
    methods: Registry[Any]
    attacks: Registry[Any]
    packages: tuple[tuple[str, str, str], ...]


_PAGES = ("matplotlib", "report", "the plots"), ("safetensors", "report", "the immunized model")


def _probing() -> _Wing:
    from immunize_ext.probing import run
    from immunize_ext.probing.attacks import ATTACKS
    from immunize_ext.probing.immunizers import METHODS

    return _Wing(run, METHODS, ATTACKS, _PAGES)


def _text_to_image() -> _Wing:
    # Which image processor transformers falls back to is no news to who asked for a run.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for package in ("diffusers", "transformers", "peft", "accelerate"):
        require_extra(package, extra="diffusion", purpose="text-to-image models")
    from immunize_ext.text_to_image import run
    from immunize_ext.text_to_image.attacks import ATTACKS
    from immunize_ext.text_to_image.immunizers import METHODS

    return _Wing(run, METHODS, ATTACKS, _PAGES)


def _wing_of(kind: str, folder: str) -> _Wing:
    if kind == "demo":
        raise ValueError(f"{folder} holds two runs; give {folder}/features or {folder}/pipeline")
    return _probing() if kind.startswith("kappa") else _text_to_image()


# --- what commands share --------------------------------------------------------------------------


def _add_common_flags(
    parser: CommandParser, out: str, *, jobs: bool = False, words: str = "run directory"
) -> None:
    parser.add_argument("--out", default=out, metavar="DIR", help=f"{words} (default: {out})")
    parser.add_argument("--force", action="store_true", help=f"replace an existing {words}")
    parser.add_argument("--quiet", action="store_true", help="print the result alone")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads of each process (default: 1, or torch's)"
    )
    if jobs:
        parser.add_argument(
            "--jobs", type=int, default=1, metavar="N", help="processes (default: 1)"
        )


def _add_settings(parser: CommandParser, wing: _Wing, cls: type, *leave_out: str) -> None:
    parser.add_argument(
        "--config", metavar="FILE", help="YAML of these settings; flags override it"
    )
    add_flags(parser, cls, leave_out=("settings", "attack_settings", *leave_out))
    add_registry_flags(parser, wing.methods, wing.attacks, cls)


def _read(arguments: argparse.Namespace, wing: _Wing, cls: type, **fixed: Any) -> Any:
    return read_settings(arguments, cls, wing.methods, wing.attacks, old_names=_OLD_NAMES, **fixed)


@contextmanager
def _working(arguments: argparse.Namespace, default_threads: int | None = 1) -> Iterator[Progress]:
    """Progress, threads, and what an interruption leaves."""
    import torch

    count = getattr(arguments, "threads", None)
    if count is None:
        count = torch.get_num_threads() if default_threads is None else default_threads
    check_count("--threads", count)
    check_count("--jobs", getattr(arguments, "jobs", 1))
    out = getattr(arguments, "out", None)
    try:
        with threads(count), progress_bar(arguments.quiet) as progress:
            yield progress
    except KeyboardInterrupt as stop:
        stop.add_note("nothing was written" if out is None else _left_behind(Path(out)))
        raise


def _left_behind(out: Path) -> str:
    from immunize_ext.storage import work_folder
    from immunize_ext.sweep import SWEEP, finished

    if (out / SWEEP).is_file() and not (out / "results.json").is_file():
        return f"{len(finished(out))} points are kept in {out}; the same command goes on from there"
    work = work_folder(out)
    with suppress(OSError):
        work.rmdir()  # where nothing is in it
        out.parent.rmdir()
    if work.is_dir():
        return (
            f"what is done is kept in {work}; the same command goes on from there, and who does "
            "not want that removes it"
        )
    return "nothing was written"


def _print_done(text: str, what: str, path: Path, seconds: float | None = None) -> None:
    took = "" if seconds is None else f"  ({seconds:.1f} s)"
    print(f"{text}\n\n{what}: {path}{took}")


def _run(
    arguments: argparse.Namespace, wing: _Wing, settings: Any, default_threads: int | None = 1
) -> int:
    from immunize_ext.storage import check_target

    # Asked before the work, not after it.
    check_target(arguments.out, force=arguments.force)
    for package, extra, purpose in wing.packages:
        require_extra(package, extra=extra, purpose=purpose)
    started = time.perf_counter()
    with _working(arguments, default_threads) as progress:
        found = wing.run.run(
            settings,
            arguments.out,
            force=arguments.force,
            progress=progress,
            **({"jobs": arguments.jobs} if "jobs" in arguments else {}),
        )
    out = Path(arguments.out)
    page = out / "report.html"
    page = page if page.is_file() else out / "results.json"
    _print_done(found.summary(), "report", page, time.perf_counter() - started)
    return 0


# --- commands -------------------------------------------------------------------------------------


def kappa(parser: CommandParser, argv: Sequence[str]) -> int:
    """Condition-number immunization of features: immunize, attack, write a report.

    Make one task slow to learn from features while another stays as fast as it was, attack both,
    and write a run directory with results.json, the immunized theta and report.html.

    Example:
        immunize kappa --data digits --primary 3:8 --harmful 4:9 --method whitening --out runs/white
    """
    wing = _probing()
    _add_common_flags(parser, "runs/kappa")
    _add_settings(parser, wing, wing.run.RunSettings)
    arguments = parser.parse_args(argv)
    return _run(arguments, wing, _read(arguments, wing, wing.run.RunSettings))


def deep(parser: CommandParser, argv: Sequence[str]) -> int:
    """Condition-number immunization of a deep extractor: immunize blocks, attack, write results.

    Make one or several tasks slow to learn from the features of a network while another stays, by
    training its last blocks; attack both networks by training a head, the last blocks, LoRA or
    everything; write a run directory with results.json, metrics.jsonl and the immunized blocks.
    Several harms are weighted by --weighting; --corridor keeps the condition number of the task to
    keep between two values. There is no report.html: immunize report, attack and certify read runs
    of features and refuse this one; its numbers are in results.json.

    Example:
        immunize deep --harmful 5:6 7:8 --weighting cvar --corridor 1 1000 --out runs/deep
    """
    from immunize_ext.probing import deep_run
    from immunize_ext.probing.immunizers import DeepExtractorImmunizer
    from immunize_ext.settings import typed

    _add_common_flags(parser, "runs/deep")
    add_flags(parser, deep_run.DeepRunSettings, leave_out=("settings",))
    own = [name for name in settings_of(DeepExtractorImmunizer) if name not in ("seed", "blocks")]
    others = [name for name in settings_of(DeepExtractorImmunizer) if name not in own]
    add_flags(parser, DeepExtractorImmunizer, leave_out=others)
    arguments = parser.parse_args(argv)
    values = given(arguments, deep_run.DeepRunSettings)
    method = {k: v for k, v in given(arguments, DeepExtractorImmunizer).items() if k in own}
    spelled = {name: flag_of(name) for name in method}
    values["settings"] = typed(DeepExtractorImmunizer, method, "flags", spelled)
    settings = build_of_flags(deep_run.DeepRunSettings, values)
    wing = _probing()._replace(run=deep_run)
    return _run(arguments, wing, settings)


def mima(parser: CommandParser, argv: Sequence[str]) -> int:
    """Immunize a text-to-image model against several concepts, attack it, report.

    Erase concepts from a text-to-image model, make them hard to teach again, attack the result and
    its unprotected twin, and write a run directory with the immunized pipeline, results.json and
    report.html. Run it again to go on where it was cut off.

    Example:
        immunize mima --targets three five --attacks lora --seed 0 1 --out runs/two
        immunize mima --model models/sd14 --concepts mine.yaml --device cuda --out runs/sd14
    """
    wing = _text_to_image()
    _add_common_flags(parser, "runs/mima", jobs=True)
    _add_settings(parser, wing, wing.run.RunSettings)
    arguments = parser.parse_args(argv)
    settings = _read(arguments, wing, wing.run.RunSettings)
    return _run(arguments, wing, settings, _threads_for(settings))


def imma(parser: CommandParser, argv: Sequence[str]) -> int:
    """Immunize a text-to-image model against one concept, attack it, report.

    As `immunize mima`, for one concept: give it with --targets.

    Example:
        immunize imma --targets three --attacks lora --out runs/three
    """
    wing = _text_to_image()
    _add_common_flags(parser, "runs/imma", jobs=True)
    _add_settings(parser, wing, wing.run.RunSettings, "method")
    arguments = parser.parse_args(argv)
    settings = _read(arguments, wing, wing.run.RunSettings, method="imma")
    if not settings.targets and settings.model == "digits":
        raise ValueError("--targets must be one concept, got none; give --targets")
    if len(settings.targets) > 1:
        raise ValueError(
            f"--targets must be one concept, got {len(settings.targets)}; use `immunize mima` for "
            "several"
        )
    return _run(arguments, wing, settings, _threads_for(settings))


def _threads_for(settings: Any) -> int | None:
    # Layers of the digits are so small that a second thread only waits for the first.
    return 1 if settings.model == "digits" else None


def erase(parser: CommandParser, argv: Sequence[str]) -> int:
    """Erase concepts from a text-to-image model (UCE).

    Map the words of concepts to their anchors in closed form, and write the edited pipeline, with
    a record of what was done (erasure.json) in it. The model given is not changed.

    Example:
        immunize erase --targets three five --out runs/erased
    """
    wing = _text_to_image()
    _add_common_flags(parser, "runs/erased", words="pipeline")
    add_flags(parser, wing.run.EraseSettings)
    arguments = parser.parse_args(argv)
    settings = build_of_flags(wing.run.EraseSettings, given(arguments, wing.run.EraseSettings))
    with _working(arguments, _threads_for(settings)) as progress:
        found = wing.run.erase(
            settings,
            arguments.out,
            force=arguments.force,
            command=shlex.join([*parser.prog.split(), *argv]),
            progress=progress,
        )
    print(found.summary())
    print(f"pipeline: {arguments.out}")
    return 0


def _sweep(parser: CommandParser, argv: Sequence[str], wing: _Wing, out: str) -> int:
    _add_common_flags(parser, out, jobs=True, words="sweep directory")
    parser.add_argument(
        "--scheduler",
        metavar="WHERE",
        default="local",
        help="where points run: local, dask://HOST:PORT or submitit (default: local, --jobs)",
    )
    _add_settings(parser, wing, wing.run.SweepSettings)
    arguments = parser.parse_args(argv)
    settings = _read(arguments, wing, wing.run.SweepSettings)
    require_extra("matplotlib", extra="report", purpose="the heat maps")
    from immunize_ext.schedulers import executor_of

    logs = Path(arguments.out).with_name(f".{Path(arguments.out).name}.submitit")
    with _working(arguments) as progress, executor_of(arguments.scheduler, logs) as executor:
        found = wing.run.sweep(
            settings,
            arguments.out,
            force=arguments.force,
            jobs=arguments.jobs,
            executor=executor,
            progress=progress,
        )
    _print_done(found.summary(), "report", Path(arguments.out) / "report.html")
    return 0


def _sweep_kappa(parser: CommandParser, argv: Sequence[str]) -> int:
    """Condition-number immunization: pairs of tasks x methods x knobs x seeds.

    Example:
        immunize sweep kappa --pairs 3/8 4/9 --methods closed-form whitening --seed 0 1 --jobs 2
    """
    return _sweep(parser, argv, _probing(), "runs/sweep-kappa")


def _sweep_mima(parser: CommandParser, argv: Sequence[str]) -> int:
    """Text-to-image runs over the number of concepts, captions, inner steps, ridge and seeds.

    Example:
        immunize sweep mima --counts 1 2 3 --attacks lora --seed 0 1 --jobs 2
    """
    return _sweep(parser, argv, _text_to_image(), "runs/mima-sweep")


def sweep(parser: CommandParser, argv: Sequence[str]) -> int:
    """Many runs: over tasks, methods, settings and seeds; resumable, parallel.

    Each finished point is a file; the same command goes on where the last one stopped.
    """
    return _choose(parser, argv, {"kappa": _sweep_kappa, "mima": _sweep_mima})


def attack(parser: CommandParser, argv: Sequence[str]) -> int:
    """Attack a finished run with other attackers or budgets.

    Attack a finished run again: both tasks of `immunize kappa`, the concepts of `immunize mima` and
    `imma`. The results and their page are added under RUN/attacks; nothing of the run is changed.
    `immunize attack RUN --help` lists what attacks of that run can be told.

    Example:
        immunize attack runs/white --attacks adam lbfgs --budgets 100 1000
    """
    from immunize_ext.storage import RESULTS, read_results

    parser.usage = f"{parser.prog} RUN [OPTIONS]"
    parser.hints["--out"] = "attack writes into RUN/attacks"
    parser.add_argument("run_folder", metavar="RUN", help="run directory")
    parser.add_argument("--quiet", action="store_true", help="print the table alone")
    parser.add_argument("--threads", type=int, metavar="N", help="threads (default: 1)")
    # Which flags there are depends on the kind of the run, which has to be found first.
    names = [text for text in argv if not text.startswith("-")]
    runs = [name for name in names if (Path(name) / RESULTS).is_file()]
    if not names or (not set(argv).isdisjoint(("-h", "--help")) and not runs):
        parser.parse_args(argv)  # says that RUN is missing, or helps
    folder = (runs or names)[0]
    kind = read_results(folder)["kind"]
    wing = _wing_of(kind, folder)
    if kind.endswith("-sweep"):
        raise ValueError(
            f"attack: {folder} must be a single run, got a sweep, which keeps no models; sweep "
            "again with --attacks"
        )
    cls = wing.run.AttackSettings
    wing = wing._replace(methods=Registry("method", key="method"))  # nothing is immunized
    _add_settings(parser, wing, cls)
    arguments = parser.parse_args(argv)
    settings = _read(arguments, wing, cls)
    with _working(arguments) as progress:
        found = wing.run.attack(arguments.run_folder, settings, progress=progress)
    print(found.summary())
    return 0


def certify(parser: CommandParser, argv: Sequence[str]) -> int:
    """Certify a finished run: what each kind of attacker pays.

    Delay by kind of optimizer, the cap in work, the price of undoing in unlabelled inputs and in
    labelled samples, what number formats leave, and what is gone for linear probes. The result and
    its page are added under RUN/certificates; nothing of the run is changed.

    Example:
        immunize certify runs/white
    """
    from immunize_ext.probing.certification import CertificationSettings, certify_run

    parser.usage = f"{parser.prog} RUN [OPTIONS]"
    parser.hints["--out"] = "certify writes into RUN/certificates"
    parser.add_argument("run_folder", metavar="RUN", help="run directory of `immunize kappa`")
    parser.add_argument("--quiet", action="store_true", help="print the result alone")
    parser.add_argument("--threads", type=int, metavar="N", help="threads (default: 1)")
    wing = _probing()._replace(
        methods=Registry("method", key="method"), attacks=Registry("attack", key="name")
    )
    _add_settings(parser, wing, CertificationSettings)
    arguments = parser.parse_args(argv)
    settings = _read(arguments, wing, CertificationSettings)
    with _working(arguments) as progress:
        found = certify_run(arguments.run_folder, settings, progress=progress)
    print(found.summary())
    return 0


def report(parser: CommandParser, argv: Sequence[str]) -> int:
    """Compare finished runs at equal cost to the primary task.

    Compare finished runs and sweeps of one kind: how much each method slows the harm where what
    shall be kept is as good, with plots. Runs of earlier versions are read too.

    Example:
        immunize report runs/white runs/lock --out runs/both
    """
    from immunize_ext.storage import check_target, read_results

    parser.usage = f"{parser.prog} RUN [RUN ...] [OPTIONS]"
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run or sweep directories")
    parser.add_argument("--out", default="runs/report", metavar="DIR", help="directory to write")
    parser.add_argument("--force", action="store_true", help="replace an existing report")
    arguments = parser.parse_args(argv)
    if len(set(arguments.runs)) < len(arguments.runs):
        raise ValueError("report: no run may be given twice")
    kinds = {
        read_results(folder)["kind"].removesuffix("-sweep"): folder for folder in arguments.runs
    }
    if len(kinds) > 1:
        first, second = list(kinds.values())[:2]
        raise ValueError(f"report: runs must be of one kind, got {first} beside {second}")
    ((kind, folder),) = kinds.items()
    wing = _wing_of(kind, folder)
    check_target(arguments.out, force=arguments.force)
    require_extra("matplotlib", extra="report", purpose="the plots")
    found = wing.run.compare(arguments.runs, arguments.out, force=arguments.force)
    _print_done(found.summary(), "report", Path(arguments.out) / "report.html")
    return 0


def build_pipeline(parser: CommandParser, argv: Sequence[str]) -> int:
    """Train the small Stable Diffusion pipeline of digits that comes with the package.

    Train a complete Stable Diffusion pipeline on 8 x 8 handwritten digits, in diffusers' layout. A
    few minutes on two cores; the same seed and threads give the same bytes.

    Example:
        immunize build-pipeline --seed 1 --out runs/digits
    """
    _add_common_flags(parser, "runs/digits", words="pipeline")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed (default: 0)")
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help="optimizer steps")
    arguments = parser.parse_args(argv)
    require_extra("diffusers", extra="diffusion", purpose="the digits pipeline")
    require_extra("sklearn", extra="data", purpose="the digits data set")
    from immunize_ext.text_to_image.digits.images import DIGIT_NAMES
    from immunize_ext.text_to_image.digits.judge import DigitJudge
    from immunize_ext.text_to_image.digits.pipeline import build_digits_pipeline
    from immunize_ext.text_to_image.model import TextToImage

    with _working(arguments) as progress:
        pipeline = build_digits_pipeline(
            arguments.out,
            seed=arguments.seed,
            steps=arguments.steps,
            overwrite=arguments.force,
            progress=lambda text, share: progress(text, 0.95 * share),
        )
        progress("judging", 0.95)
        model, judge = TextToImage(pipeline), DigitJudge()
        scores = [
            judge.score(model.generate([f"a photo of the digit {name}"] * 32), digit)
            for digit, name in enumerate(DIGIT_NAMES)
        ]
    print(
        f"{sum(scores) / 10:.1%} of images show the digit that was asked for (least "
        f"{min(scores):.1%}); the judge itself gets {judge.accuracy:.1%} of real images right"
    )
    print(f"pipeline: {arguments.out}")
    return 0


def merge_adapters(parser: CommandParser, argv: Sequence[str]) -> int:
    """Merge LoRA adapters of one model into one, exactly.

    Adapters of PEFT and diffusers, folders or safetensors files, become one adapter: the up factors
    as they are, beside each other, the down factors solved for anew. With --moments, which
    `immunize_ext.ops.collect_moments` collects and saves, each adapter rules the inputs that its
    own concept sends through a layer; without, the result is the weighted mean. DoRA is refused.

    Example:
        immunize merge-adapters lora/cat lora/dog --format peft --out runs/both
    """
    parser.usage = f"{parser.prog} ADAPTER [ADAPTER ...] [OPTIONS]"
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="folders or files")
    parser.add_argument(
        "--out", default="runs/adapter", metavar="DIR", help="folder to write (%(default)s)"
    )
    parser.add_argument(
        "--format", choices=("peft", "diffusers"), default="diffusers", help="(%(default)s)"
    )
    parser.add_argument(
        "--prefix", default="unet", metavar="PART", help="what PEFT's names belong to (%(default)s)"
    )
    parser.add_argument(
        "--weights", nargs="+", type=float, metavar="MU", help="one an adapter (default: 1)"
    )
    parser.add_argument(
        "--moments", nargs="+", metavar="FILE", help="of each adapter's concept, in their order"
    )
    parser.add_argument("--regularization", metavar="FILE", help="moments of unrelated inputs")
    parser.add_argument(
        "--ridge", type=float, metavar="X", help="of the moments, relative (default: 1e-6)"
    )
    parser.add_argument(
        "--rank", type=int, metavar="R", help="the best of that rank (default: without loss)"
    )
    arguments = parser.parse_args(argv)
    from immunize_ext.ops import (
        LayerMoments,
        factor_layers,
        merge_lora_adapters,
        read_lora,
        write_lora,
    )

    out, count = Path(arguments.out), len(arguments.adapters)
    if out.exists():  # asked before the work, not after it
        raise FileExistsError(f"{out} exists; choose another folder or remove it")
    for flag in ("weights", "moments"):
        values = getattr(arguments, flag)
        if values is not None and len(values) != count:
            raise ValueError(f"--{flag} must be given once an adapter, {count}, got {len(values)}")
    if arguments.moments is None and (arguments.regularization or arguments.ridge is not None):
        raise ValueError("--regularization and --ridge must be given with --moments, got none")
    adapters = [read_lora(path, prefix=arguments.prefix) for path in arguments.adapters]
    factors = None
    if arguments.moments is not None:
        import torch

        held = arguments.regularization
        found = factor_layers(
            [LayerMoments.load(path) for path in arguments.moments],
            regularization=None if held is None else LayerMoments.load(held),
            hardness=torch.tensor(arguments.weights or [1.0] * count, dtype=torch.float64),
            ridge=1e-6 if arguments.ridge is None else arguments.ridge,
        )
        # Collected in a model, layers have the names they have there.
        named = {name for adapter in adapters for name in adapter}
        factors = {
            name if name in named else f"{arguments.prefix}.{name}": factor
            for name, factor in found.items()
        }
    merged = merge_lora_adapters(
        adapters,
        factors,
        weights=arguments.weights if factors is None else None,
        rank=arguments.rank,
    )
    write_lora(merged, out, format=arguments.format)
    ranks = sorted({layer.rank for layer in merged.values()})
    how = "by the moments of their inputs" if factors is not None else "by their mean"
    print(
        f"{count} adapters merged {how}: {len(merged)} layers, rank "
        + (f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}")
    )
    print(f"adapter: {out}")
    return 0


def export_lora(parser: CommandParser, argv: Sequence[str]) -> int:
    """Write what a run did to its model as a LoRA adapter.

    Take the difference between the immunized model of a run, or one that was erased, and the model
    it was made of, and write it as a LoRA adapter that diffusers or PEFT loads, at the numerical
    rank of the difference or at --rank. Says the ranks and what is left out. Whoever leaves the
    adapter out has the base model: a record of what was done, no protection.

    Example:
        immunize export-lora runs/mima --rank 16 --out runs/adapter
    """
    parser.usage = f"{parser.prog} RUN [OPTIONS]"
    parser.add_argument("run_folder", metavar="RUN", help="run directory, or an erased pipeline")
    parser.add_argument(
        "--out", default="runs/adapter", metavar="DIR", help="folder to write (%(default)s)"
    )
    parser.add_argument(
        "--format", choices=("peft", "diffusers"), default="diffusers", help="(%(default)s)"
    )
    parser.add_argument(
        "--rank", type=int, metavar="R", help="most that is kept of a layer (default: all)"
    )
    parser.add_argument(
        "--model", metavar="MODEL", help="the base model, where it stands elsewhere by now"
    )
    arguments = parser.parse_args(argv)
    _text_to_image()
    require_extra("safetensors", extra="report", purpose="adapter files")
    from immunize_ext.text_to_image.adapter import export_lora as export

    found = export(
        arguments.run_folder,
        arguments.out,
        format=arguments.format,
        rank=arguments.rank,
        model=arguments.model,
    )
    print(found.summary())
    print(f"adapter: {arguments.out}")
    return 0


def doctor(parser: CommandParser, argv: Sequence[str]) -> int:
    """Say what is installed, what is wrong and how to mend it.

    Example:
        immunize doctor
    """
    parser.parse_args(argv)
    from immunize_ext._doctor import diagnose, doctor_report

    print(doctor_report())
    return 0 if diagnose().ok else 1


# What the demo of features can be told; the rest is as it is.
_DEMO_FLAGS = ("primary", "harmful", "method", "ridge", "seed", "device")


def demo(parser: CommandParser, argv: Sequence[str]) -> int:
    """Both jobs on small real data: immunize, attack, one report.

    Both jobs of the package on handwritten digits: make one task slow to learn from features while
    another stays fast, and make erased concepts hard to teach a text-to-image model again; attack
    both, write one report. Takes two to three minutes on two cores and needs no network. The two
    runs stand in DIR/features and DIR/pipeline, where `immunize attack` and `report` take them.

    Example:
        immunize demo --skip-mima --method whitening --out runs/demo
    """
    wing = _probing()
    cls = wing.run.RunSettings
    _add_common_flags(parser, "runs/demo")
    add_flags(parser, cls, leave_out=[name for name in settings_of(cls) if name not in _DEMO_FLAGS])
    parser.add_argument(
        "--strength", metavar="C", help="of the method (default: auto, for closed-form)"
    )
    parser.add_argument(
        "--skip-mima", action="store_true", help="leave out the text-to-image half; takes seconds"
    )
    arguments = parser.parse_args(argv)
    values = {"base_budget": 2000, "limit": 128.0, **given(arguments, cls)}
    values["compare"] = [
        "closed-form",
        "condition-number",
        "condition-number-plain",
        "whitening",
    ]
    method = values.get("method", "closed-form")
    strength = arguments.strength or ("auto" if method == "closed-form" else None)
    if strength is not None:
        spelled = {"strength": "--strength"}
        given_to_method = {"strength": strength}
        values["settings"] = wing.methods.typed(method, given_to_method, "--method", spelled)
    features = build_of_flags(cls, values)
    runs: dict[str, tuple[_Wing, Any]] = {"features": (wing, features)}
    if not arguments.skip_mima:
        other = _text_to_image()
        # Beside the attacker that is held up one who gets through: by another word.
        pipeline = other.run.RunSettings(
            seeds=(features.seed,),
            device=features.device,
            images=16,
            attacks=("lora",),
            prompts=("canonical", "unrelated_word"),
        )
        runs["pipeline"] = (other, pipeline)
    return _demo(arguments, runs)


def _demo(arguments: argparse.Namespace, runs: Mapping[str, tuple[_Wing, Any]]) -> int:
    from immunize_ext import report as pages
    from immunize_ext import storage

    storage.check_target(arguments.out, force=arguments.force)
    require_extra("sklearn", extra="data", purpose="the digits data set")
    pages.check_extras()
    started = time.perf_counter()
    work = storage.work_folder(arguments.out)
    found: dict[str, Any] = {}
    with _working(arguments) as progress:
        for name, (wing, settings) in runs.items():
            # The features take seconds, the pipeline minutes.
            low, high = {"features": (0.0, 0.1), "pipeline": (0.1, 1.0)}[name]
            high = high if len(runs) > 1 else 1.0

            def part(text: str, share: float, low: float = low, high: float = high) -> None:
                progress(text, low + (high - low) * share)

            found[name] = wing.run.run(settings, work / name, force=True, progress=part)
        results = {run.results()["kind"]: run.results() for run in found.values()}
        seconds = {kind: one["seconds"]["total"] for kind, one in results.items()}
        content = {
            "schema": storage.SCHEMA,
            "kind": "demo",
            **results,
            "seconds": {**seconds, "total": time.perf_counter() - started},
            "environment": storage.environment(),
        }
        with storage.run_directory(arguments.out, force=arguments.force) as folder:
            for name in found:
                (work / name).rename(folder / name)
            pages.write(content, folder)
            storage.write_json(folder / storage.RESULTS, content)
        shutil.rmtree(work, ignore_errors=True)
    words = "\n\n".join(run.summary() for run in found.values())
    _print_done(words, "report", Path(arguments.out) / "report.html", time.perf_counter() - started)
    return 0


def _choose(parser: CommandParser, argv: Sequence[str], commands: Mapping[str, Command]) -> int:
    """Run the command that is named first, with a parser of its own; help where none is."""
    if argv and argv[0] in commands:
        prog, rest = f"{parser.prog} {argv[0]}", argv[1:]
        # Where torch is there already, somebody may have registered methods of their own.
        keep = _help.asked_for(rest) and sys.modules.get("torch") is None
        page = _help.recall(prog) if keep and not _names_a_run(rest) else None
        if page is not None:
            print(_help.text(page, rest), end="")
            return 0
        return commands[argv[0]](_parser_of(prog, commands[argv[0]], keep), rest)
    width = max(map(len, commands)) + 2
    listed = [f"  {name:<{width}}{_first_line(command)}" for name, command in commands.items()]
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = f"{parser.prog} [-h] COMMAND ..."
    words = inspect.cleandoc(parser.description or "")
    parser.description = "\n".join([words, "", "commands:", *listed])
    parser.epilog = f"{parser.prog} COMMAND --help says what a command does, with an example."
    if not argv or _help.asked_for(argv[:1]):
        print(parser.format_help(), end="")
        return 0
    parser.add_argument("command", metavar="COMMAND", help=argparse.SUPPRESS)
    name = parser.parse_args(argv[:1]).command
    parser.error(f"{name} is no command; {suggestion(name, commands)}")


def _parser_of(prog: str, command: Command, keep: bool = False) -> CommandParser:
    return CommandParser(
        prog=prog,
        usage=f"{prog} [OPTIONS]",
        description=command.__doc__,
        aliases=_ALIASES,
        keep_help=(lambda page: _help.remember({prog: page})) if keep else None,
    )


def _names_a_run(argv: Sequence[str]) -> bool:
    """Whether help depends on a folder that is named."""
    return any(not word.startswith("-") and Path(word).is_dir() for word in argv)


class _Stopped(Exception):  # noqa: N818
    """Carries a parser out of its command before it parses."""


class _Collected(CommandParser):
    def parse_args(self, args: Any = None, namespace: Any = None) -> NoReturn:
        raise _Stopped(self)


def parsers() -> dict[str, CommandParser]:
    """The parser of every command that can be made here, by what one types for it.

    Those of commands whose optional packages are missing are left out.
    """
    found: dict[str, CommandParser] = {}
    inner = {"sweep kappa": _sweep_kappa, "sweep mima": _sweep_mima}
    for words, command in {**COMMANDS, **inner}.items():
        prog = f"immunize {words}"
        made = _Collected(
            prog=prog, usage=f"{prog} [OPTIONS]", description=command.__doc__, aliases=_ALIASES
        )
        with suppress(MissingExtraError):
            try:
                if words != "sweep":
                    command(made, [])
            except _Stopped:
                found[words] = made
    return found


def keep_help(path: Path = _help.SHIPPED) -> None:
    """Write the help of every command to a file, from which ``--help`` shows it at once."""
    _help.remember({made.prog: made.page() for made in parsers().values()}, path)


def completion(parser: CommandParser, argv: Sequence[str]) -> int:
    """Print a script that completes commands, flags and values in a shell.

    Write it to where the shell looks for completions. Methods and attacks of other packages are in
    it where they are installed.

    Example:
        immunize completion bash > ~/.local/share/bash-completion/completions/immunize
        immunize completion zsh > ~/.zsh/completions/_immunize
    """
    parser.usage = f"{parser.prog} SHELL"
    shells = ("bash", "zsh", "tcsh")
    offer(parser.add_argument("shell", metavar="SHELL", help=f"one of {', '.join(shells)}"), shells)
    shell = parser.parse_args(argv).shell
    if shell not in shells:
        parser.error(f"SHELL: {shell} is no shell; {suggestion(shell, shells)}")
    import shtab

    whole = argparse.ArgumentParser(prog="immunize", description="Model immunization.")
    whole.add_argument("--version", action="version", version="", help="print the version")
    branches = whole.add_subparsers()
    made = parsers()
    below = None
    for words, one in made.items():
        for action in one._actions:
            if action.dest in ("out", "run_folder", "runs", "data_dir"):
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
            elif action.dest in ("config", "concepts"):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif values := getattr(action, "completions", None):
                action.choices = values
        command, _, part = words.partition(" ")
        line = _first_line(COMMANDS[command])
        if part and below is None:
            below = branches.add_parser(command, help=line).add_subparsers()
        place, name = (below, part) if part and below is not None else (branches, words)
        place.add_parser(name, help=line, parents=[one], add_help=False)
    print(shtab.complete(whole, shell))
    return 0


# In the order in which ``immunize --help`` lists them.
COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "demo": demo,
        "kappa": kappa,
        "deep": deep,
        "mima": mima,
        "imma": imma,
        "erase": erase,
        "sweep": sweep,
        "attack": attack,
        "certify": certify,
        "report": report,
        "export-lora": export_lora,
        "merge-adapters": merge_adapters,
        "build-pipeline": build_pipeline,
        "doctor": doctor,
        "completion": completion,
    }
)


def _first_line(command: Command) -> str:
    return (command.__doc__ or "").partition("\n")[0].rstrip(".")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; those of the process when omitted.

    Returns:
        The exit status.

    Example:
        >>> main(["--version"])
        immunize_ext 0.1.0
        0
    """
    for stream in (sys.stdout, sys.stderr):
        # What a terminal cannot show must not make a finished run fail.
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    parser = CommandParser(
        prog="immunize",
        description="Make a model's features slow to misuse, and measure whether they are.",
    )
    parser.add_argument("--version", action="version", version=f"immunize_ext {__version__}")
    try:
        with interruptible():
            status = _choose(parser, list(sys.argv[1:] if argv is None else argv), COMMANDS)
            sys.stdout.flush()
            return status
    except SystemExit as exit_request:  # argparse: --help, --version and usage errors
        return exit_request.code if isinstance(exit_request.code, int) else USAGE_ERROR
    except KeyboardInterrupt as stop:
        left = "; ".join(getattr(stop, "__notes__", ())) or "nothing was written"
        print(f"immunize: interrupted; {left}", file=sys.stderr)
        return 128 + (stop.signal if isinstance(stop, Interrupted) else signal.SIGINT)
    except BrokenPipeError:
        # Whoever read the output has seen enough of it; what was asked for is done.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not isinstance(error, _expected()):
            raise  # a defect, which deserves its traceback
        print(f"immunize: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_ERROR


def _expected() -> tuple[type[Exception], ...]:
    """What bad values, missing files and extras, and a full disk raise: it says what to do."""
    found: list[type[Exception]] = [ValueError, OSError, MissingExtraError]
    if "torch" in sys.modules:
        from immunize_ext.errors import NotPositiveDefiniteError

        found.append(NotPositiveDefiniteError)
    if "safetensors" in sys.modules:
        found.append(sys.modules["safetensors"].SafetensorError)
    return tuple(found)
