"""The command line: the demo from end to end, and every refusal in one line."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import immunize_ext.demo
from immunize_ext._version import __version__
from immunize_ext.cli import main
from immunize_ext.demo import CHOSEN_TASKS, DemoConfig, run_demo

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo with few steps, so that it takes a second or two."""

    def run_small(config: DemoConfig, progress: Any = None) -> immunize_ext.demo.DemoResult:
        return run_demo(replace(config, base_budget=300, limit=8.0, steps=3), progress)

    monkeypatch.setattr("immunize_ext.demo.run_demo", run_small)


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
    assert results["seeds"] == {"split": 1, "immunizer": 1}
    assert results["slowdown"]["harmful"]["gradient_descent"] > 2.0
    assert results["slowdown"]["harmful"]["whitened"] == 1.0
    assert {row["name"] for row in results["alternatives"]} == set(
        immunize_ext.demo.METHOD_NAMES.values()
    )
    assert results["notes"] == [CHOSEN_TASKS]
    assert set(results["seconds"]) == {"load", "immunize", "attack", "compare", "total"}

    # The same again: refused, then replaced, with the same numbers.
    assert main(["demo", "--out", str(target), "--quiet"]) == 2
    assert (
        main(["demo", "--skip-mima", "--out", str(target), "--quiet", "--force", "--seed", "1"])
        == 0
    )
    assert capsys.readouterr().err.count("\n") == 1
    again = json.loads((target / "results.json").read_text())
    for key in ("slowdown", "rir", "config", "alternatives"):
        assert again[key] == results[key]


@pytest.mark.parametrize("method", ["condition-number", "condition-number-plain", "whitening"])
def test_demo_knows_every_method(method: str) -> None:
    config = DemoConfig(
        primary="3:8",
        harmful="4:9",
        method=method.replace("-", "_"),  # type: ignore[arg-type]
        steps=3,
        base_budget=100,
        limit=2.0,
        compare=False,
    )
    result = run_demo(config)
    assert result.alternatives == []
    assert result.notes == []  # said of the default tasks alone
    assert result.evaluation.tasks["primary"].name == "digit 3 against 8"


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


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["doctor", "--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert "usage: immunize" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "COMMAND; see immunize --help"),
        (("immunise",), "invalid choice: 'immunise'"),
        (("demo", "--seed", "one"), "invalid int value: 'one'; see immunize demo --help"),
        (("demo", "--strength", "much"), "must be a number or 'auto', got 'much'"),
        (("demo", "--method", "magic"), "invalid choice: 'magic'"),
        (("demo", "--strength", "0.5"), "strength must be finite and at least 1, got 0.5"),
        (("demo", "--primary", "cats:dogs"), "a task must look like '4,6:2,3,7'"),
        (("demo", "--harmful", "1:1"), "must not share a digit"),
        (("demo", "--ridge", "-1"), "ridge must be finite and not negative, got -1.0"),
        (("demo", "--ridge", "0"), "K_P must be positive definite"),
        (("demo", "--seed", "-1"), "seed must not be negative, got -1"),
    ],
)
def test_refusals(refused: Callable[..., str], arguments: tuple[str, ...], words: str) -> None:
    line = refused(*arguments)
    assert line.startswith("immunize")
    assert words in line


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
    import importlib

    real = importlib.import_module

    def missing(name: str) -> Any:
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=package)
        return real(name)

    monkeypatch.setattr("immunize_ext._extras.importlib.import_module", missing)
    assert f"pip install 'immunize_ext[{extra}]'" in refused("demo")


def test_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("immunize_ext.demo.run_demo", interrupt)
    assert main(["demo", "--skip-mima", "--quiet"]) == 130
    assert capsys.readouterr().err == "immunize: interrupted; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


def test_defects_keep_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("immunize_ext.demo.run_demo", defect)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["demo", "--skip-mima", "--quiet"])


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """A process started in the background ignores SIGINT, and its children would too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to send")
def test_real_interruption(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "immunize_ext", "demo", "--skip-mima"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "immunizing" in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
        assert process.wait() == 130
    assert rest.splitlines()[-1] == "immunize: interrupted; nothing was written"
    assert list(tmp_path.iterdir()) == []


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
