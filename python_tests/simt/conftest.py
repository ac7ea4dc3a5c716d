"""Fixtures of the tests that run CUDA kernels on the CPU."""

import importlib.util
import os
import shutil
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
def ptx_build() -> ModuleType:
    """``csrc/simt/ptx/build.py`` as a module."""
    return load_script(ROOT / "csrc" / "simt" / "ptx" / "build.py")


@pytest.fixture(scope="session")
def simt(simt_build: ModuleType, ptx_build: ModuleType) -> ModuleType:
    """The kernels on the CPU: a submodule for each file of ``csrc/simt/bindings``.

    As g++ compiles them; or, with ``IMMUNIZE_EXT_SIMT=ptx``, as nvcc does.
    """
    try:
        simt_build.compiler()
    except simt_build.BuildError as error:
        pytest.skip(f"the simulated kernels cannot be compiled: {error}")
    if os.environ.get("IMMUNIZE_EXT_SIMT") == "ptx":
        nvcc = shutil.which("nvcc")
        assert nvcc is not None, "IMMUNIZE_EXT_SIMT=ptx needs nvcc"
        compiled: ModuleType = ptx_build.load(nvcc)
        return compiled
    module: ModuleType = simt_build.load()
    return module
