"""Profiles of hypothesis, its absence, and the examples in the docstrings."""

import doctest
import importlib
import subprocess
import sys

import pytest
from hypothesis import settings

from immunize_ext import testing
from immunize_ext.testing import profiles

MODULES = ["", ".gradients", ".invariants", ".layouts", ".profiles", ".samples", ".strategies"]


@pytest.fixture(autouse=True)
def _restore_profile():
    before = settings.get_current_profile_name()
    yield
    settings.load_profile(before)


@pytest.mark.parametrize(
    ("name", "examples", "derandomize"),
    [("dev", 25, True), ("ci", 100, True), ("nightly", 2000, False)],
)
def test_profile_from_the_environment(monkeypatch, name, examples, derandomize):
    monkeypatch.setenv(profiles.PROFILE_VARIABLE, name)
    assert testing.register_profiles() == name
    loaded = settings()
    assert loaded.max_examples == examples
    assert loaded.derandomize == derandomize
    assert loaded.deadline is None
    assert loaded.print_blob


def test_default_profile(monkeypatch):
    monkeypatch.delenv(profiles.PROFILE_VARIABLE, raising=False)
    monkeypatch.delenv("CI", raising=False)
    assert testing.register_profiles() == "dev"
    monkeypatch.setenv("CI", "true")
    assert testing.register_profiles() == "ci"
    assert testing.register_profiles("nightly") == "nightly"


def test_unknown_profile_is_named(monkeypatch):
    monkeypatch.setenv(profiles.PROFILE_VARIABLE, "weekly")
    with pytest.raises(ValueError, match="IMMUNIZE_EXT_HYPOTHESIS_PROFILE must be one of dev"):
        testing.register_profiles()
    with pytest.raises(ValueError, match="profile must be one of"):
        testing.register_profiles("hourly")


def test_without_hypothesis_the_checks_work_and_the_strategies_name_the_extra():
    code = """
import sys
sys.modules["hypothesis"] = None
import torch
from immunize_ext import testing
testing.check_against_finite_differences(torch.sum, [torch.ones(2, dtype=torch.float64)])
for action in (
    lambda: __import__("immunize_ext.testing.strategies"),
    testing.register_profiles,
):
    try:
        action()
    except ImportError as error:
        assert "pip install 'immunize_ext[test]'" in str(error), error
    else:
        raise SystemExit("no error")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(f"immunize_ext.testing{name}")
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert found.attempted > 0
    assert found.failed == 0
