"""The command line: the demo from end to end, interruptions, and every refusal in one line."""

from __future__ import annotations

import functools
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from immunize_ext import _help, storage
from immunize_ext._version import __version__
from immunize_ext.cli import COMMANDS, main, parsers
from immunize_ext.flags import CommandParser
from immunize_ext.probing import run as probing
from immunize_ext.probing.run import CHOSEN_TASKS

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs with few steps, so that they take a second or two."""
    real = probing.run

    def run_small(settings: probing.RunSettings, *arguments: Any, **more: Any) -> probing.Run:
        return real(replace(settings, base_budget=300, limit=8.0), *arguments, **more)

    monkeypatch.setattr(probing, "run", run_small)


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run a command that must be refused: status 2, one line, nothing written. Gives the line."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main(arguments) == 2
        assert sorted(tmp_path.rglob("*")) == before
        captured = capsys.readouterr()
        line = [text for text in captured.err.splitlines() if not text.startswith("[")]
        assert captured.out == ""
        assert len(line) == 1
        return line[0]

    return run


@pytest.mark.usefixtures("small")
def test_demo_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "runs" / "demo"
    assert main(["demo", "--skip-mima", "--out", str(target), "--seed", "1"]) == 0
    captured = capsys.readouterr()
    assert "harmful task  digits 5 or 9 against 0, 1 or 8" in captured.out
    table = [line.split("  ") for line in captured.out.splitlines() if "Whitens" in line]
    assert sum("as fast as before" in cell for cell in table[0]) == 2
    assert str(target / "report.html") in captured.out
    # One line per stage where there is no terminal to draw a bar on.
    assert "[100%] writing the report" in captured.err
    results = json.loads((target / "results.json").read_text())
    assert (results["kind"], results["schema"]) == ("demo", storage.SCHEMA)
    found = results["kappa"]
    assert found == json.loads((target / "features" / "results.json").read_text())
    assert found["seeds"] == {"split": 1, "immunizer": 1}
    assert found["slowdown"]["harmful"]["gradient_descent"] > 2.0
    assert found["slowdown"]["harmful"]["whitened"] == 1.0
    assert len(found["alternatives"]) == 4
    assert found["notes"] == [CHOSEN_TASKS]
    assert sorted(path.name for path in target.parent.iterdir()) == ["demo"]

    # What the demo leaves is a run: attacked again, compared.
    features = str(target / "features")
    assert main(["attack", features, "--attackers", "nesterov", "--quiet"]) == 0
    assert "Nesterov" in capsys.readouterr().out
    assert main(["report", features, "--out", str(tmp_path / "report")]) == 0
    assert "closed-form" in capsys.readouterr().out
    for command in ("attack", "report"):
        assert main([command, str(target)]) == 2
        assert f"give {target}/features or {target}/pipeline" in capsys.readouterr().err

    # The same again: refused, then replaced, with the same numbers.
    assert main(["demo", "--out", str(target), "--quiet"]) == 2
    again = ["demo", "--skip-mima", "--out", str(target), "--quiet", "--force", "--seed", "1"]
    assert main(again) == 0
    assert capsys.readouterr().err.count("\n") == 1
    repeated = json.loads((target / "results.json").read_text())["kappa"]
    for key in ("slowdown", "rir", "config", "alternatives"):
        assert repeated[key] == found[key]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("method", ["condition-number", "condition-number-plain", "whitening"])
def test_demo_knows_every_method(method: str, tmp_path: Path) -> None:
    argv = ["demo", "--skip-mima", "--quiet", "--method", method, "--primary", "3:8"]
    assert main([*argv, "--harmful", "4:9", "--out", str(tmp_path / "demo")]) == 0
    found = json.loads((tmp_path / "demo" / "results.json").read_text())["kappa"]
    assert found["method"] == method
    assert found["notes"] == []  # said of the default tasks alone
    assert found["tasks"]["primary"]["name"] == "digit 3 against 8"


def test_note_about_the_tasks_matches_its_measurement() -> None:
    path = ROOT / "benchmarks" / "protection" / "digit_tasks.json"
    if not path.is_file():
        pytest.skip("benchmarks are not part of this installation")
    summary = json.loads(path.read_text())["summary"]
    harmful, primary = summary["harmful gradient_descent"], summary["primary gradient_descent"]
    low, median, high = harmful["quartiles"]
    assert f"became {median:.1f} times slower in the median" in CHOSEN_TASKS
    assert f"(quartiles {low:.1f} and {high:.0f}), in {harmful['not_slower']} of " in CHOSEN_TASKS
    assert f"in {primary['of'] - primary['not_slower']} of {primary['of']} runs" in CHOSEN_TASKS
    assert f"by at most {primary['max']:.1f} times" in CHOSEN_TASKS


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"immunize_ext {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["sweep", "--help"], *([name, "--help"] for name in COMMANDS if name != "sweep")],
    ids=" ".join,
)
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"usage: immunize{' ' if arguments[1:] else ''}")
    assert captured.err == ""


@pytest.mark.parametrize("words", [[], ["sweep"]], ids=str)
def test_a_bare_command_shows_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    bare = capsys.readouterr().out
    assert main([*words, "--help"]) == 0
    assert bare == capsys.readouterr().out
    assert "commands:\n" in bare


class Parsed(Exception):  # noqa: N818
    """The command line was understood."""


def test_help_shows_every_command_an_example_that_parses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("diffusers")

    def stop(self: CommandParser, argv: list[str]) -> None:
        raise Parsed(real(self, argv))

    real = CommandParser.parse_args
    names = {*parsers()}
    assert names == {*COMMANDS, "sweep kappa", "sweep mima"} - {"sweep"}
    for name in sorted(names):
        assert main([*name.split(), "--help"]) == 0
        page = capsys.readouterr().out
        examples = page.partition("\nexample:\n")[2].strip().splitlines()
        assert examples, name
        for line in examples:
            words = line.split(" > ")[0].split()
            assert words[: 2 + name.count(" ")] == ["immunize", *name.split()]
            monkeypatch.setattr(CommandParser, "parse_args", stop)
            if name == "attack":  # the run of the example is not there
                assert main(words[1:]) == 2
                assert "must be a run directory" in capsys.readouterr().err
            else:
                with pytest.raises(Parsed):
                    main(words[1:])
            monkeypatch.setattr(CommandParser, "parse_args", real)
            assert capsys.readouterr().err == ""


def test_help_comes_from_what_was_kept_of_the_same_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    kept = tmp_path / "immunize_ext" / "help.json"
    start = "import sys; from immunize_ext import _help; from pathlib import Path; "
    start += f"_help.SHIPPED = Path({str(tmp_path / 'none.json')!r}); "
    start += "from immunize_ext.cli import main; "

    def run(before: str = "") -> subprocess.CompletedProcess[str]:
        code = f"{start}{before}sys.exit(main(['kappa', '--method', 'lock', '--help']))"
        return subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
        )

    first = run()
    assert first.returncode == 0, first.stderr
    assert "method lock:" in first.stdout
    assert "--variance-floor X" in first.stdout
    without = "sys.modules['torch'] = None; sys.modules['numpy'] = None; "
    assert run(without).stdout == first.stdout
    # Of other sources it is not shown.
    kept.write_text(kept.read_text().replace('"digest": "', '"digest": "0'))
    assert run(without).returncode != 0

    monkeypatch.setattr(_help, "SHIPPED", tmp_path / "none.json")
    for damaged in ("", "[]", '{"digest": 3}', '{"pages": 3}'):
        kept.write_text(damaged)
        assert _help.recall("immunize kappa") is None
    page = _help.Page("immunize x", None, "A text.", [], [])
    _help.remember({"immunize x": page})
    assert _help.recall("immunize x") == page
    assert _help.recall("immunize y") is None


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    assert main(["completion", shell]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    assert subprocess.run([shell, "-n", str(script)], check=False).returncode == 0
    if shell != "bash":
        return
    for typed, found in (
        ("ka", "kappa"),
        ("sweep m", "mima"),
        ("kappa --method clo", "closed-form"),
        ("kappa --grading li", "linear"),
        ("mima --attacks textual", "textual_inversion"),
        ("mima --lora.ra", "--lora.rank"),
        ("completion z", "zsh"),
    ):
        line = f"immunize {typed}".split()
        words = " ".join(line)
        ask = (
            f"source {script}; COMP_WORDS=({words}); COMP_CWORD={len(line) - 1}; "
            f"COMP_LINE='{words}'; COMP_POINT={len(words)}; "
            "f=$(complete -p immunize | sed 's/.*-F \\([^ ]*\\).*/\\1/'); "
            f"$f immunize {line[-1]} {line[-2]}; echo ${{COMPREPLY[@]}}"
        )
        done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=False)
        assert done.stdout.split() == [found], (typed, done.stderr)


def test_help_needs_neither_torch_nor_optional_packages(tmp_path: Path) -> None:
    code = """
    import sys
    for name in ("torch", "numpy", "jsonargparse", "yaml", "rich", "jinja2", "matplotlib"):
        sys.modules[name] = None
    from immunize_ext.cli import main
    assert main(["--help"]) == 0
    assert main(["--version"]) == 0
    assert main(["kapa"]) == 2
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)
    assert done.stderr == "immunize: kapa is no command; did you mean kappa; see immunize --help\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("immunise",), "immunise is no command; known are demo, kappa"),
        (("sweep", "kapa"), "kapa is no command; did you mean kappa; see immunize sweep --help"),
        (("attack",), "required: RUN; see immunize attack --help"),
        (("demo", "--sead", "1"), "did you mean --seed; see immunize demo --help"),
        (("demo", "--seed", "one"), "--seed must be an integer, got 'one'"),
        (("completion", "bsh"), "SHELL: bsh is no shell; did you mean bash"),
        (("kappa", "--threads", "x"), "--threads must be an integer, got 'x'; see"),
        (("kappa", "--device", "cdua"), "device must be cpu, cuda"),
        (("kappa", "--dtype", "float46"), "got 'float46'; did you mean float64"),
        (("kappa", "--loss", "sqared"), "got 'sqared'; did you mean squared"),
        (("kappa", "--data", "digit"), "got 'digit'; did you mean digits"),
        (("kappa", "--compare", "lok"), "lok is no method; did you mean lock"),
        (
            ("demo", "--strength", "much"),
            "--strength must be a finite number or 'auto', got 'much'",
        ),
        (("demo", "--method", "magic"), "magic is no method; known are"),
        (("demo", "--skip-mima", "--strength", "0.5"), "strength must be finite and at least 1"),
        (
            ("demo", "--skip-mima", "--primary", "cats:dogs", "--harmful", "4"),
            "a task must look like '4,6:2,3,7'",
        ),
        (("demo", "--skip-mima", "--primary", "4", "--harmful", "1:1"), "on both sides"),
        (("demo", "--ridge", "-1"), "ridge must be positive, got -1.0"),
        (("demo", "--ridge", "0"), "ridge must be positive, got 0.0"),
        (("demo", "--seed", "-1"), "seed must not be negative, got -1"),
        (("demo", "--threads", "0"), "--threads must be at least 1, got 0"),
        (("demo", "--threads", "100000"), "--threads must be at most"),
        (("kappa", "--threads", "100000"), "--threads must be at most"),
        (("sweep", "kappa", "--jobs", "100000"), "--jobs must be at most"),
        (("kappa", "--method", "condition-number", "--learning-rate", "0"), "learning_rate must"),
        (("kappa", "--base-budget", "x"), "--base-budget must be an integer, got 'x'"),
        (("kappa", "--method", "whitning"), "--method: whitning is no method; did you mean whiten"),
        (("kappa", "--attacks", "nestrov"), "nestrov is no attack; did you mean nesterov"),
        (("kappa", "--data", "nofile.npz"), "nofile.npz must be a file of features, but it is not"),
        (("kappa", "--base-budget", "0"), "base_budget and limit must be at least 1"),
        (("kappa", "--limit", "inf"), "limit must be a finite number"),
        (("kappa", "--set", "strength=.inf"), "strength must be a finite number or 'auto'"),
        (("kappa", "--set", "strength=[1"), "strength must have a plain value"),
        (("kappa", "--config", "missing.yaml"), "which is not there"),
    ],
)
def test_refusals(refused: Callable[..., str], arguments: tuple[str, ...], words: str) -> None:
    line = refused(*arguments)
    assert line.startswith("immunize")
    assert words in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--steps", ".inf"), "steps must be an integer"),
        (("--set", "checkpoint_every=0"), "checkpoint_every must be"),
        (("--guidance", "inf"), "guidance must be a finite number"),
        (("--targets", "tree"), "got 'tree'; did you mean three"),
        (("--control", "sixx"), "got 'sixx'; did you mean six"),
        (("--prompts", "rare_tokn"), "got 'rare_tokn'; did you mean rare_token"),
        (("--model", "digist"), "did you mean digits"),
        (("--dtype", "float23"), "got 'float23'; did you mean float32"),
        (("--seed", "0", "0"), "seeds must be different seeds"),
        (("--threshold", "nan"), "threshold must be a finite number"),
        (("--threshold", "-5"), "threshold must lie in (0, 1]"),
        (("--evaluate-at", "99999"), "evaluate_at must ascend from 0 to at most"),
        (("--images", ".inf"), "images must be an integer"),
        (("--images", "0"), "images must be at least 1"),
        (("--targets", "three", "three"), "targets must be different"),
    ],
)
def test_refusals_of_text_to_image_runs(
    refused: Callable[..., str], arguments: tuple[str, ...], words: str
) -> None:
    pytest.importorskip("diffusers")
    assert words in refused("mima", *arguments)


def test_refusals_of_imma_say_how_many_concepts(refused: Callable[..., str]) -> None:
    pytest.importorskip("diffusers")
    assert "--targets must be one concept, got none; give --targets" in refused("imma")
    several = refused("imma", "--targets", "three", "four")
    assert "--targets must be one concept, got 2; use `immunize mima` for several" in several


def test_a_run_that_is_not_there_is_looked_for_beside_it(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "runs" / "white").mkdir(parents=True)
    (tmp_path / "runs" / "white" / "results.json").write_text("{}")
    for command in ("attack", "certify", "report"):
        assert "did you mean runs/white" in refused(command, "runs/whit")


def test_attack_says_where_it_writes(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text(
        json.dumps({"schema": storage.SCHEMA, "kind": "kappa"})
    )
    line = refused("attack", "run", "--out", "X")
    assert "unrecognized arguments: --out X; attack writes into RUN/attacks; see" in line


def test_existing_output_is_refused_at_once(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    assert "runs/demo exists; choose another folder, or replace it" in refused("demo")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    assert "is not a run directory" in refused("demo", "--out", "photos", "--force")
    (tmp_path / "file").write_text("")
    assert "is a file, not a folder" in refused("demo", "--out", "file/run")


@pytest.mark.parametrize(("package", "extra"), [("sklearn", "data"), ("matplotlib", "report")])
def test_missing_extra_is_named(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, package: str, extra: str
) -> None:
    real = importlib.import_module

    def missing(name: str) -> Any:
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=package)
        return real(name)

    monkeypatch.setattr("immunize_ext._extras.importlib.import_module", missing)
    assert f"pip install 'immunize_ext[{extra}]'" in refused("demo")


# --- interruptions and defects -------------------------------------------------------------------


def raising(error: BaseException) -> Callable[..., Any]:
    def run(*_: object, **__: object) -> None:
        raise error

    return run


def test_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probing, "run", raising(KeyboardInterrupt()))
    assert main(["demo", "--skip-mima", "--quiet"]) == 130
    assert capsys.readouterr().err == "immunize: interrupted; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_says_what_is_kept_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(settings: Any, out: Path, **_: object) -> None:
        work = storage.work_folder(out)
        work.mkdir(parents=True)
        (work / "checkpoint").touch()
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probing, "run", run)
    assert main(["kappa", "--quiet"]) == 130
    line = capsys.readouterr().err
    assert "interrupted; what is done is kept in runs/.kappa.work; the same command goes on" in line

    def sweep(settings: Any, out: str, **_: object) -> None:
        from immunize_ext.sweep import run_sweep

        points = {"a": functools.partial(dict, x=1), "b": functools.partial(stop)}
        run_sweep(out, "kappa-sweep", points)

    monkeypatch.setattr(probing, "sweep", sweep)
    assert main(["sweep", "kappa", "--quiet"]) == 130
    line = capsys.readouterr().err
    assert "interrupted; 1 points are kept in runs/sweep-kappa; the same command goes on" in line


def stop() -> dict[str, Any]:
    raise KeyboardInterrupt


def test_defects_keep_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probing, "run", raising(RuntimeError("a defect")))
    with pytest.raises(RuntimeError, match="a defect"):
        main(["demo", "--skip-mima", "--quiet"])


def test_a_full_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    safetensors = pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    for error in (
        OSError(28, "No space left on device"),
        safetensors.SafetensorError("I/O error: No space left on device (os error 28)"),
    ):
        monkeypatch.setattr(probing, "run", raising(error))
        assert main(["kappa", "--quiet"]) == 2
        line = capsys.readouterr().err
        assert "No space left on device" in line
        assert line.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to send")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("background", [False, True])
def test_real_interruption(number: signal.Signals, background: bool, tmp_path: Path) -> None:
    def ignore() -> None:  # as a shell does for what it starts with &
        signal.signal(signal.SIGINT, signal.SIG_IGN if background else signal.SIG_DFL)

    command = [sys.executable, "-m", "immunize_ext", "demo", "--skip-mima"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=ignore,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "immunizing" in line:
                process.send_signal(number)
                break
        rest = process.stderr.read()
        assert process.wait() == 128 + number
    assert rest.splitlines()[-1] == "immunize: interrupted; nothing was written"
    assert list(tmp_path.iterdir()) == []


# --- output --------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "cp437", "utf-8"])
def test_a_finished_run_prints_on_any_terminal(encoding: str, tmp_path: Path) -> None:
    code = """
    import sys
    from immunize_ext import cli
    def report(parser, argv):
        print("Gr\u00f6\u00dfe \u2265 3\u00d7")
        print("\u2265", file=sys.stderr)
        return 0
    cli.COMMANDS = {"report": report}
    sys.exit(cli.main(["report"]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Gr\u00f6\u00dfe \u2265 3\u00d7".encode(encoding, errors="replace") in done.stdout


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    code = """
    import sys
    from immunize_ext import cli
    def report(parser, argv):
        for _ in range(100_000):
            print("line")
        return 0
    cli.COMMANDS = {"report": report}
    sys.exit(cli.main(["report"]))
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "line\n"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 0


@pytest.mark.parametrize(("healthy", "status"), [(True, 0), (False, 1)])
def test_doctor(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    healthy: bool,
    status: int,
) -> None:
    from immunize_ext import _doctor

    finding = _doctor.Finding("subject", "text", "" if healthy else "do this")
    monkeypatch.setattr(_doctor, "diagnose", lambda: _doctor.Diagnosis((finding,)))
    assert main(["doctor"]) == status
    assert "subject" in capsys.readouterr().out
