"""The report on the installation."""

import pytest

from immunize_ext import _doctor, _load


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch):
    """Set what the loader reports."""

    def set_state(**facts: object) -> None:
        defaults = {"reason": "because", "built_for": None, "installed": "2.13.0"}
        monkeypatch.setattr(_load, "_status", _load.LoadStatus(**(defaults | facts)))

    monkeypatch.delenv("IMMUNIZE_EXT_DISABLE", raising=False)
    return set_state


@pytest.mark.skipif(not _load.available(), reason=f"no compiled part: {_load.status().reason}")
def test_nothing_is_wrong_here() -> None:
    diagnosis = _doctor.diagnose()
    assert diagnosis.ok, _doctor.doctor_report()
    report = _doctor.doctor_report()
    assert report.endswith("Nothing is wrong.")
    assert "PROBLEM" not in report
    for word in ("immunize_ext", "torch", "C++ compiler", "nvcc", "extra [diffusion]"):
        assert word in report


def test_what_is_missing_comes_with_its_remedy_and_cause(state) -> None:
    cause = ImportError("undefined symbol")
    built_for = {"compiled": True, "torch": "2.11.0", "python": "3.11.7", "cuda": None}
    state(loaded=False, reason="built for torch 2.11.0", built_for=built_for, error=cause)
    diagnosis = _doctor.diagnose()
    assert not diagnosis.ok
    report = _doctor.doctor_report()
    assert "PROBLEM: not loaded: built for torch 2.11.0" in report
    assert "ImportError: undefined symbol" in report
    assert "torch 2.11.0, Python 3.11.7, CPU only" in report
    assert report.splitlines()[-1] == f"  1. compiled operators: {_load.build_command()}"


def test_switched_off_is_undone_by_the_switch(state, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMMUNIZE_EXT_DISABLE", "1")
    state(loaded=False)
    assert _doctor.doctor_report().endswith("1. compiled operators: unset IMMUNIZE_EXT_DISABLE")


def test_missing_compiler_is_a_problem_only_where_it_is_needed(
    state, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    state(loaded=False)
    assert "install a C++20 compiler" in _doctor.doctor_report()
    state(loaded=True)
    (finding,) = [f for f in _doctor._tools() if f.subject == "C++ compiler"]
    assert finding.ok
    assert finding.text == "/nowhere/c++ not found"


def test_missing_dependency_is_a_problem() -> None:
    finding = _doctor._package("no-such-distribution")
    assert (finding.ok, finding.fix) == (False, "pip install no-such-distribution")


@pytest.mark.parametrize(
    ("capability", "arch_list", "runs"),
    [
        ((8, 0), ["8.0", "9.0+PTX"], True),
        ((8, 9), ["8.0"], True),
        ((8, 0), ["8.6"], False),
        ((9, 0), ["8.0"], False),
        ((9, 0), ["8.0+PTX"], True),
        ((10, 0), ["8.0", "9.0+PTX"], True),
        ((7, 5), ["8.0", "9.0+PTX"], False),
        ((9, 0), ["9.0a"], True),
        ((9, 0), [], False),
        ((9, 0), ["Hopper"], False),
    ],
)
def test_runs_on(capability: tuple[int, int], arch_list: list[str], runs: bool) -> None:
    assert _doctor.runs_on(capability, arch_list) is runs
