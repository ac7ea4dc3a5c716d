"""What holds for every test of the operators: both routes, and the settings of torch left alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from sample_inputs import ROUTES, taking_route


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``route`` runs on the compiled kernels and on the torch-only route."""
    if "route" in metafunc.fixturenames:
        metafunc.parametrize("route", ROUTES)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A hook and no fixture, which hypothesis would not enter anew for every example."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    with taking_route(parameters.get("route", "kernel")):
        return (yield)


def _settings() -> dict[str, object]:
    return {
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "TF32 in matmul": torch.backends.cuda.matmul.allow_tf32,
        "TF32 in cuDNN": torch.backends.cudnn.allow_tf32,
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
    }


@pytest.fixture(autouse=True)
def _settings_stay_as_they_are() -> Iterator[None]:
    before = _settings()
    yield
    after = _settings()
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert not changed, f"global settings of torch changed (before, after): {changed}"


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before counts against the limit of recompilations of a function."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
