"""Loading of the compiled part, and life without it."""

import importlib.machinery
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from immunize_ext import _load
from immunize_ext.errors import FallbackWarning

PACKAGE = Path(_load.__file__).parent
needs_binary = pytest.mark.skipif(
    not _load.available(), reason=f"no compiled part: {_load.status().reason}"
)


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The build record of a package folder that holds an empty binary besides."""
    (tmp_path / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}").touch()
    path = tmp_path / "_build_info.json"
    monkeypatch.delenv("IMMUNIZE_EXT_DISABLE", raising=False)
    monkeypatch.setattr(_load, "_PACKAGE", tmp_path)
    monkeypatch.setattr(_load, "_RECORD", path)
    return path


def write(path: Path, **changes: Any) -> dict[str, Any]:
    facts = {"compiled": True, "reason": "", "torch": torch.__version__, "python": "3.11.7"}
    path.write_text(json.dumps(facts | changes))
    return facts | changes


def load(record: Path) -> _load.LoadStatus:
    assert record == _load._RECORD
    return _load._load()


def run_python(code: str, folder: Path, **changes: str) -> str:
    keep = {k: v for k, v in os.environ.items() if not k.startswith("IMMUNIZE_EXT_")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=folder,  # not the checkout: its package would be found first
        env=keep | changes,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- judged by the record, before the binary is touched -------------------------------------------


def test_built_for_another_torch(record: Path) -> None:
    facts = write(record, torch="2.0.1+cu118")
    outcome = load(record)
    assert not outcome.loaded
    assert outcome.reason == (
        f"it was built for torch 2.0.1+cu118, but torch {torch.__version__} is installed"
    )
    assert outcome.built_for == facts
    assert outcome.installed == torch.__version__
    assert outcome.error is None


def test_local_version_of_torch_counts(record: Path) -> None:
    write(record, torch=torch.__version__.partition("+")[0] + "+other")
    assert "was built for torch" in load(record).reason


MINOR, PATCH = torch.__version__.partition("+")[0].rpartition(".")[::2]


def test_another_patch_release_is_loaded(record: Path) -> None:
    """The loader goes on to the binary, which is empty here."""
    write(record, torch=f"{MINOR}.{int(PATCH) + 1}+cpu", cuda=None)
    assert "is incomplete" in load(record).reason


def test_another_minor_release_is_refused(record: Path) -> None:
    first, _, second = MINOR.partition(".")
    other = f"{first}.{int(second) + 1}.{PATCH}"
    write(record, torch=other, cuda=None)
    assert load(record).reason.startswith(f"it was built for torch {other}, but torch ")


@pytest.mark.parametrize(
    ("built", "built_cuda", "installed", "cuda", "loads"),
    [
        ("2.13.0+cpu", None, "2.13.1+cpu", None, True),
        ("2.13.1", None, "2.13.0", "13.0", True),  # CPU kernels under a torch with CUDA
        ("2.13.0+cu126", "12.6", "2.13.1+cu126", "12.6", True),
        ("2.13.0+cu126", "12.6", "2.13.0+cu130", "13.0", False),
        ("2.13.0+cu126", "12.6", "2.13.0+cpu", None, False),
        ("2.13.0", None, "2.14.0", None, False),
        ("2.1.0", None, "2.13.0", None, False),
        ("2.13.0a0+git1a2b", None, "2.13.0", None, False),
        ("2.13.0a0+git1a2b", None, "2.13.0a0+git3c4d", None, False),
        ("2.13.0a0+git1a2b", None, "2.13.0a0+git1a2b", None, True),
        ("2.13.0+rocm6.4", None, "2.13.0+cpu", None, False),
        ("2.13.0rc1", None, "2.13.0", None, False),
    ],
)
def test_what_was_built_for_one_torch_serves_its_minor(
    built: str, built_cuda: str | None, installed: str, cuda: str | None, loads: bool
) -> None:
    assert _load.fits({"torch": built, "cuda": built_cuda}, installed, cuda) is loads


def test_built_for_another_python(record: Path) -> None:
    write(record, python="3.8.1")
    for binary in record.parent.glob("_C*"):
        binary.rename(record.parent / "_C.cpython-38-other.so")
    assert "built for Python 3.8.1, but there is no binary for this Python" in load(record).reason


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_unreadable_record(record: Path, text: str) -> None:
    record.write_text(text, encoding="latin-1")
    outcome = load(record)
    assert (outcome.loaded, outcome.built_for) == (False, None)
    assert "_build_info.json is missing or unreadable" in outcome.reason


def test_missing_record(record: Path) -> None:
    assert "_build_info.json is missing" in load(record).reason


def test_record_of_a_failed_build(record: Path) -> None:
    write(record, compiled=False, reason="the build failed: no compiler")
    assert load(record).reason == "the compiled part was not built: the build failed: no compiler"


@needs_binary
def test_names_that_are_looked_for_are_those_of_the_stub() -> None:
    stub = (PACKAGE / "_C.pyi").read_text(encoding="utf-8")
    assert sorted(_load._CALLED) == sorted(re.findall(r"^def (\w+)", stub, re.MULTILINE))
    (binary,) = PACKAGE.glob(f"_C*{importlib.machinery.EXTENSION_SUFFIXES[0]}")
    assert not _load._names_not_in(binary)


@needs_binary
@pytest.mark.parametrize("missing", [1, 1000, 0.5])
def test_every_truncation_is_seen(tmp_path: Path, missing: float) -> None:
    (binary,) = PACKAGE.glob(f"_C*{importlib.machinery.EXTENSION_SUFFIXES[0]}")
    whole = binary.read_bytes()
    assert _load._is_whole(binary)
    copy = tmp_path / binary.name
    copy.write_bytes(whole[: -int(missing if missing >= 1 else missing * len(whole))])
    assert not _load._is_whole(copy)
    copy.write_bytes(b"")
    assert not _load._is_whole(copy)


def test_switched_off(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(record)
    monkeypatch.setenv("IMMUNIZE_EXT_DISABLE", "1")
    assert load(record).reason == "it is switched off by IMMUNIZE_EXT_DISABLE=1"


# --- what the user is told ------------------------------------------------------------------------


@pytest.fixture
def not_loaded(monkeypatch: pytest.MonkeyPatch) -> ImportError:
    """The state after a failed attempt, with no warning given yet."""
    error = ImportError("undefined symbol: _ZN2at4Tensor")
    outcome = _load.LoadStatus(False, "the binary cannot be loaded", None, "2.13.0", error)
    monkeypatch.setattr(_load, "_status", outcome)
    monkeypatch.setattr(_load, "_warned", type(_load._warned)())
    return error


def test_warns_once_at_the_callers_line(not_loaded: ImportError) -> None:
    with pytest.warns(FallbackWarning, match="the binary cannot be loaded") as caught:
        [_load.warn_fallback(reason) for reason in (None, "another reason")]
    (only,) = caught
    assert only.filename == __file__
    assert _load.build_command() in str(only.message)
    assert isinstance(only.message, Warning)
    assert only.message.__cause__ is not_loaded


def test_warning_inside_compile_breaks_no_graph(not_loaded: ImportError) -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def double(x: torch.Tensor) -> torch.Tensor:
        _load.warn_fallback()
        return 2 * x

    assert torch.equal(double(torch.ones(2)), torch.full((2,), 2.0))


def test_require_compiled_keeps_the_cause(not_loaded: ImportError) -> None:
    with pytest.raises(RuntimeError, match=r"^bench_kappa needs the compiled operators") as caught:
        _load.require_compiled("bench_kappa")
    assert caught.value.__cause__ is not_loaded
    assert _load.build_command() in str(caught.value)


@needs_binary
def test_status_is_one_object() -> None:
    assert _load.status() is _load.status()
    _load.require_compiled("this test")


# --- in a process of its own ----------------------------------------------------------------------

FALLBACK = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import immunize_ext, torch
    assert not [w for w in caught if "immunize_ext" in str(w.message)]
    from immunize_ext import _load
    from immunize_ext.ops import condition_number, log_condition_number
    a = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)).requires_grad_()
    kappa = condition_number(a)
    (gradient,) = torch.autograd.grad(kappa, a)
    log_condition_number(a)
torch.testing.assert_close(kappa.item(), 4.0)
torch.testing.assert_close(gradient, torch.diag(torch.tensor([1.0, 0.0, -4.0]).double()))
(warning,) = [w for w in caught if issubclass(w.category, immunize_ext.errors.FallbackWarning)]
assert warning.filename == "<string>"
print(_load.available(), type(_load.status().error).__name__, warning.message, sep="|")
"""


def copy_package(folder: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__")
    return Path(shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=ignore))


def test_switched_off_operators_take_the_torch_route(tmp_path: Path) -> None:
    out = run_python(FALLBACK, tmp_path, PYTHONPATH=str(PACKAGE.parent), IMMUNIZE_EXT_DISABLE="1")
    assert out.startswith("False|NoneType|")
    assert "switched off by IMMUNIZE_EXT_DISABLE=1" in out


@needs_binary
@pytest.mark.parametrize(
    ("damage", "error", "text"),
    [
        ("older sources", "NoneType", "older sources, without ask_before_rules"),
        ("another file", "ImportError", "the binary cannot be loaded"),
        # Mapping a truncated library ends the process with SIGBUS, so it must not come to that.
        ("truncated", "NoneType", "is incomplete"),
    ],
)
def test_broken_binary_falls_back(tmp_path: Path, damage: str, error: str, text: str) -> None:
    package = copy_package(tmp_path)
    (binary,) = package.glob(f"_C*{importlib.machinery.EXTENSION_SUFFIXES[0]}")
    whole = binary.read_bytes()
    damaged = {
        "older sources": whole.replace(b"ask_before_rules\0", b"ask_behind_rules\0"),
        "another file": b"not a library",
        "truncated": whole[: len(whole) // 3],
    }
    binary.write_bytes(damaged[damage])
    out = run_python(FALLBACK, tmp_path, PYTHONPATH=str(tmp_path))
    assert out.startswith(f"False|{error}|")
    assert text in out
    assert binary.name in out


IMPORTED_FIRST = """
import immunize_ext
from immunize_ext import _load
assert _load.available(), _load.status()
from pathlib import Path
maps = Path("/proc/self/maps")
if maps.exists():
    openmp = {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line}
    assert len(openmp) <= 1, f"more than one OpenMP runtime: {openmp}"
import torch
torch.testing.assert_close(immunize_ext.ops.condition_number(torch.eye(3)), torch.tensor(1.0))
"""


@needs_binary
def test_import_before_torch_loads_and_brings_no_second_openmp(tmp_path: Path) -> None:
    run_python(IMPORTED_FIRST, tmp_path, PYTHONPATH=str(PACKAGE.parent))


GLOBAL_STATE = """
import random
import numpy, torch

def state():
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "cuda matmul tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark,
                  torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "torch rng": torch.random.get_rng_state().tolist(),
        "numpy rng": str(numpy.random.get_state()),
        "python rng": random.getstate(),
        "print options": vars(torch._tensor_str.PRINT_OPTS).copy(),
    }

def same(before, what):
    changed = [key for key, value in state().items() if value != before[key]]
    assert not changed, f"{what} changed {changed}"

before = state()
import immunize_ext
same(before, "import")
x = torch.arange(12.0).reshape(4, 3).requires_grad_()
immunize_ext.ops.condition_number(x).backward()
same(before, "a call")
"""


@pytest.mark.parametrize("disable", ["0", "1"])
def test_import_and_calls_leave_global_state_alone(tmp_path: Path, disable: str) -> None:
    run_python(GLOBAL_STATE, tmp_path, PYTHONPATH=str(PACKAGE.parent), IMMUNIZE_EXT_DISABLE=disable)
