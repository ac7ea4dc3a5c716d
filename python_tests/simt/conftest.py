"""Fixtures of the tests that run CUDA kernels on the CPU."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_script(path: Path) -> ModuleType:
    """Import a Python file that is no part of a package."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def simt_build() -> ModuleType:
    """``csrc/simt/build.py`` as a module."""
    return load_script(ROOT / "csrc" / "simt" / "build.py")


@pytest.fixture(scope="session")
def simt(simt_build: ModuleType) -> ModuleType:
    """``immunize_ext_simt``: a submodule for each file of ``csrc/simt/bindings``."""
    try:
        simt_build.compiler()
    except simt_build.BuildError as error:
        pytest.skip(f"the simulated kernels cannot be compiled: {error}")
    module: ModuleType = simt_build.load()
    return module
