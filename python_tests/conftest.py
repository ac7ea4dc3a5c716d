"""Fixtures for all tests: devices, tolerances, development data, hypothesis profile, seeds."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from immunize_ext.testing.profiles import register_profiles

register_profiles()

# Relative and absolute tolerance per dtype, for torch.testing.assert_close. Absolute ones assume
# values of order 1; scale the data, not the tolerance.
TOLERANCES = {
    torch.float64: (1e-10, 1e-12),
    torch.float32: (1e-5, 1e-6),
    torch.bfloat16: (2e-2, 2e-2),
    torch.float16: (2e-3, 2e-3),
}

# Where the development data sets lie: beside the repository, unless the variable says otherwise.
DATA_VARIABLE = "IMMUNIZE_EXT_SHARED_DATA"
DEFAULT_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        # The workers share the cores; more threads than cores would only wait for each other.
        torch.set_num_threads(1)


def _devices() -> list[object]:
    found: list[object] = ["cpu"]
    if torch.cuda.is_available():
        found.append(pytest.param("cuda", marks=pytest.mark.gpu))
    return found


@pytest.fixture(params=_devices())
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device of this machine in turn; tests on a GPU carry the mark ``gpu``."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def tolerance() -> Callable[[torch.dtype], dict[str, float]]:
    """Tolerances of a dtype as keyword arguments of ``torch.testing.assert_close``."""

    def of(dtype: torch.dtype) -> dict[str, float]:
        rtol, atol = TOLERANCES[dtype]
        return {"rtol": rtol, "atol": atol}

    return of


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the development data sets (MNIST, House Prices); skips where it is missing."""
    folder = Path(os.environ.get(DATA_VARIABLE, DEFAULT_DATA))
    if not folder.is_dir():
        pytest.skip(f"development data sets are not at hand; set {DATA_VARIABLE} to their folder")
    return folder


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
