"""Building and installing: what setup.py decides, and what a package gets that it cannot compile.

Nothing here touches the checkout: builds run in a copy of it, with the kernels left out where they
do not matter, since compiling them takes a minute.
"""

import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    """setup.py as a module; it builds only when it is run as a script."""
    spec = importlib.util.spec_from_file_location("immunize_ext_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a build needs."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    ignore = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    for name in ("csrc", "immunize_ext"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    return copy


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def fake_nvcc(folder: Path, release: str) -> Path:
    lines = f'#!/bin/sh\necho "Cuda compilation tools, release {release}, V{release}.89"\n'
    return write_program(folder / "bin" / "nvcc", lines)


def environment(**changes: str) -> dict[str, str]:
    keep = {k: v for k, v in os.environ.items() if not k.startswith("IMMUNIZE_EXT_")}
    for name in ("CUDA_HOME", "CUDA_PATH", "PYTHONPATH"):
        keep.pop(name, None)
    return keep | changes


def install(checkout: Path, target: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-v"]
    command += ["--no-build-isolation", "--no-deps", "--target", str(target), str(checkout)]
    return subprocess.run(
        command,
        env=environment(**changes),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def run_python(code: str, cwd: Path, **changes: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code],
        env=environment(**changes),
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def decision_lines(output: str) -> list[str]:
    lines = [line.strip() for line in output.splitlines()]
    return [line for line in lines if line.startswith("immunize_ext: ")]


# --- what is decided ------------------------------------------------------------------------------


@pytest.fixture
def decide(setup_py: ModuleType) -> Callable[..., tuple[bool, bool, str]]:
    def call(build: str = "auto", cuda: str = "auto", **facts: object) -> tuple[bool, bool, str]:
        defaults = {
            "torch_version": "2.13.0+cu130",
            "torch_cuda": "13.0",
            "toolkit": setup_py.Toolkit("/opt/cuda", "13.0"),
            "has_cuda_sources": True,
        }
        return setup_py.decide(build, cuda, **(defaults | facts))

    return call


@pytest.mark.parametrize("name", ["IMMUNIZE_EXT_CUDA", "IMMUNIZE_EXT_BUILD"])
@pytest.mark.parametrize("value", ["", "yes", "2", "AUTO", " 1"])
def test_switch_refuses_other_values(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=f"{name} must be auto, 0 or 1, got {value!r}"):
        setup_py.read_switch(name)


@pytest.mark.parametrize("value", ["auto", "0", "1"])
def test_switch_accepts(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("IMMUNIZE_EXT_CUDA", value)
    assert setup_py.read_switch("IMMUNIZE_EXT_CUDA") == value
    monkeypatch.delenv("IMMUNIZE_EXT_CUDA")
    assert setup_py.read_switch("IMMUNIZE_EXT_CUDA") == "auto"


def test_cuda_torch_and_matching_nvcc_give_cuda(decide: Callable) -> None:
    assert decide()[:2] == (True, True)
    assert decide(cuda="1")[:2] == (True, True)
    assert decide(cuda="0")[:2] == (True, False)


def test_minor_cuda_versions_may_differ(setup_py: ModuleType, decide: Callable) -> None:
    assert decide(toolkit=setup_py.Toolkit("/opt/cuda", "13.2"))[:2] == (True, True)


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        (
            {"torch_version": "2.13.0+cpu", "torch_cuda": None},
            "torch 2.13.0+cpu is a build",
        ),
        ({"toolkit": None}, "no CUDA toolkit found"),
        ({"toolkit": ("/opt/cuda", None)}, "no nvcc that runs in /opt/cuda"),
        ({"toolkit": ("/opt/cuda", "12.9")}, "is CUDA 12.9, but torch"),
        ({"has_cuda_sources": False}, "no CUDA sources"),
    ],
)
def test_without_matching_cuda_the_cpu_part_is_built(
    setup_py: ModuleType, decide: Callable, facts: dict, text: str
) -> None:
    if facts.get("toolkit"):
        facts = {"toolkit": setup_py.Toolkit(*facts["toolkit"])}
    build, cuda, reason = decide(**facts)
    assert (build, cuda) == (True, False)
    assert text in reason
    with pytest.raises(SystemExit, match=re.escape(f"IMMUNIZE_EXT_CUDA=1, but {reason}")):
        decide(cuda="1", **facts)


def test_without_torch_the_package_is_pure_python(decide: Callable) -> None:
    build, cuda, reason = decide(torch_version=None, torch_cuda=None)
    assert (build, cuda) == (False, False)
    assert "pip install torch first, then pip install --no-build-isolation ." in reason
    for demand in ({"build": "1"}, {"cuda": "1"}):
        with pytest.raises(SystemExit, match="pip install torch first"):
            decide(torch_version=None, torch_cuda=None, **demand)


def test_pure_python_on_request(decide: Callable) -> None:
    assert decide(build="0") == (False, False, "IMMUNIZE_EXT_BUILD=0")
    with pytest.raises(SystemExit, match="contradicts"):
        decide(build="0", cuda="1")


@pytest.mark.parametrize("place", ["PATH", "CUDA_HOME"])
def test_toolkit_is_the_first_nvcc(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    fake_nvcc(tmp_path, "11.8")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    if place == "PATH":
        monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    else:
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup_py.find_toolkit() == setup_py.Toolkit(str(tmp_path), "11.8")


@pytest.mark.parametrize(
    ("release", "blackwell"), [("12.4", False), ("12.8", True), ("13.0", True), ("14.1", True)]
)
def test_blackwell_is_compiled_for_where_the_toolkit_knows_it(
    setup_py: ModuleType, release: str, blackwell: bool
) -> None:
    listed = setup_py.default_arch_list(release).split(";")
    assert listed[:2] == ["8.0", "9.0+PTX"]
    assert listed[2:] == (["10.0", "12.0"] if blackwell else [])


def test_toolkit_without_a_working_nvcc(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup_py.find_toolkit() == setup_py.Toolkit(str(tmp_path), None)


def test_nvcc_wrapper_in_path_names_the_real_folder(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = (
        "#!/bin/sh\n"
        'case "$1" in\n'
        '  --version) echo "release 13.0, V13.0.48" ;;\n'
        "  --dryrun) echo '#$ TOP=/opt/cuda-13.0/bin/..' >&2 ;;\n"
        "esac\n"
    )
    write_program(tmp_path / "bin" / "nvcc", script)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    assert setup_py.find_toolkit() == setup_py.Toolkit("/opt/cuda-13.0", "13.0")


# --- what is built --------------------------------------------------------------------------------


def test_source_package_holds_the_native_sources(checkout: Path, tmp_path: Path) -> None:
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    run_python(code, checkout, IMMUNIZE_EXT_BUILD="0")
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    wanted = {str(p.relative_to(checkout)) for p in (checkout / "csrc").rglob("*") if p.is_file()}
    assert wanted >= {"csrc/module.cpp", "csrc/checks.h"}
    assert wanted | {"setup.py", "LICENSE", "immunize_ext/py.typed"} <= names
    assert not [name for name in names if name.endswith((".so", "_build_info.json"))]


LOADED = "from immunize_ext import _load; s = _load.status(); print(s.loaded, s.reason, sep='|')"


@pytest.mark.slow
def test_other_nvcc_first_in_path_gives_a_working_cpu_build(checkout: Path, tmp_path: Path) -> None:
    fake = tmp_path / "other cuda"
    fake_nvcc(fake, "9.1")
    # Nothing but the module itself and what it speaks for, which compile in seconds.
    for source in (checkout / "csrc" / "cpu").iterdir():
        if source.name not in ("instructions.h", "pool.h", "pool.cpp"):
            source.unlink()
    for source in (checkout / "csrc").glob("*.cpp"):
        if source.name not in ("module.cpp", "rules.cpp"):
            source.unlink()
    path = os.pathsep.join([str(fake / "bin"), os.environ["PATH"]])
    result = install(checkout, tmp_path / "site", PATH=path, IMMUNIZE_EXT_BUILD="1")
    assert result.returncode == 0, result.stdout
    (line,) = decision_lines(result.stdout)
    assert "CPU only" in line
    record = json.loads((tmp_path / "site/immunize_ext/_build_info.json").read_text())
    assert (record["compiled"], record["cuda"], record["cuda_arch_list"]) == (True, None, [])
    code = "import immunize_ext._load as l; assert l.available(), l.status(); "
    code += "from immunize_ext import _C; import json; print(json.dumps(_C.build_info()))"
    info = json.loads(run_python(code, tmp_path, PYTHONPATH=str(tmp_path / "site")))
    for key in ("package", "torch", "cuda", "cuda_arch_list", "python"):
        assert info[key] == record[key]
    assert info["cxx_standard"] >= 202002
    assert info["parallel"]


@pytest.mark.slow
def test_no_compiler_gives_the_pure_python_package(checkout: Path, tmp_path: Path) -> None:
    broken = {"CC": "/bin/false", "CXX": "/bin/false"}
    result = install(checkout, tmp_path / "site", **broken)
    assert result.returncode == 0, result.stdout
    decided, failed = decision_lines(result.stdout)
    assert decided.startswith("immunize_ext: compiling for torch")
    assert "the build failed" in failed
    assert "IMMUNIZE_EXT_BUILD=1 pip install --no-build-isolation . -v" in failed
    assert not list((tmp_path / "site").rglob("*.so"))
    site = str(tmp_path / "site")
    loaded, _, reason = run_python(LOADED, tmp_path, PYTHONPATH=site).strip().partition("|")
    assert loaded == "False"
    assert "the compiled part was not built: the build failed" in reason

    demanded = install(checkout, tmp_path / "demanded", IMMUNIZE_EXT_BUILD="1", **broken)
    assert demanded.returncode != 0
    assert not (tmp_path / "demanded").exists()


@pytest.mark.slow
def test_isolated_build_without_torch_gives_the_pure_python_package(
    checkout: Path, tmp_path: Path
) -> None:
    # pip's build environment has no torch; here a module of that name that cannot be imported.
    hidden = tmp_path / "hidden"
    write_program(hidden / "torch.py", "raise ImportError('no torch in this environment')\n")
    result = install(checkout, tmp_path / "site", PYTHONPATH=str(hidden))
    assert result.returncode == 0, result.stdout
    (line,) = decision_lines(result.stdout)
    assert "pip install torch first, then pip install --no-build-isolation ." in line
    (wheel_info,) = (tmp_path / "site").glob("*.dist-info/WHEEL")
    assert "Root-Is-Purelib: true" in wheel_info.read_text()
    out = run_python(LOADED, tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert out.startswith("False|the compiled part was not built: torch cannot be imported")

    demanded = install(
        checkout, tmp_path / "demanded", PYTHONPATH=str(hidden), IMMUNIZE_EXT_CUDA="1"
    )
    assert demanded.returncode != 0
    assert "pip install torch first" in demanded.stdout


@pytest.mark.slow
def test_failed_rebuild_leaves_no_binary_of_the_earlier_one(checkout: Path) -> None:
    package = checkout / "immunize_ext"
    stale = package / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    stale.write_text("left by an earlier build")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(
        command,
        cwd=checkout,
        env=environment(CC="/bin/false", CXX="/bin/false"),
        capture_output=True,
        check=True,
    )
    assert not stale.exists()
    assert json.loads((package / "_build_info.json").read_text())["compiled"] is False
