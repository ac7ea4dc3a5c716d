"""Build of the compiled part ``immunize_ext._C``; everything else is in pyproject.toml.

The package installs with or without the compiled part.  Three environment variables steer it:

``IMMUNIZE_EXT_BUILD``    ``auto`` (default): compile if possible, else install pure Python and say
                          why; ``0``: pure Python; ``1``: compile, or fail.
``IMMUNIZE_EXT_CUDA``     ``auto`` (default): CUDA kernels iff torch is a CUDA build and a matching
                          nvcc is found; ``0``: CPU only; ``1``: CUDA, or fail.
``TORCH_CUDA_ARCH_LIST``  GPU architectures, default ``8.0;9.0+PTX``, and ``10.0;12.0`` where the
                          toolkit knows them.

What was decided and why is printed as one line and stored in ``immunize_ext/_build_info.json``,
which ``immunize_ext._load`` reads before it touches the binary.
"""

import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, ExecError, LinkError, PlatformError

ROOT = Path(__file__).resolve().parent
EXTENSION = "immunize_ext._C"
RECORD = "_build_info.json"
BUILD_COMMAND = "pip install --no-build-isolation ."
NO_TORCH = f"torch cannot be imported here: pip install torch first, then {BUILD_COMMAND}"

# What a compiler, linker, ninja or nvcc that fails or is missing raises.  torch's ninja backend
# raises RuntimeError, its compiler probe OSError; a mistake in this file is not in the list.
BUILD_FAILURES = (
    RuntimeError,
    OSError,
    subprocess.CalledProcessError,
    CompileError,
    ExecError,
    LinkError,
    PlatformError,
)


class Decision(NamedTuple):
    """What to build, and the reason to print."""

    build: bool
    cuda: bool
    reason: str


class Toolkit(NamedTuple):
    """A CUDA toolkit: its folder and the release that its nvcc reports (``13.0``)."""

    home: str
    release: str | None


def read_switch(name: str) -> str:
    """Return the environment variable ``name``, which must be auto, 0 or 1."""
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"setup.py: {name} must be auto, 0 or 1, got {value!r}")
    return value


def decide(
    build: str,
    cuda: str,
    *,
    torch_version: str | None,
    torch_cuda: str | None,
    toolkit: Toolkit | None,
    has_cuda_sources: bool,
) -> Decision:
    """Decide what to build; ``SystemExit`` where a variable demands what cannot be had."""
    if build == "0":
        if cuda == "1":
            raise SystemExit("setup.py: IMMUNIZE_EXT_CUDA=1 contradicts IMMUNIZE_EXT_BUILD=0")
        return Decision(False, False, "IMMUNIZE_EXT_BUILD=0")
    if torch_version is None:
        if build == "1" or cuda == "1":
            raise SystemExit(f"setup.py: {NO_TORCH}")
        return Decision(False, False, NO_TORCH)
    if cuda == "0":
        return Decision(True, False, "IMMUNIZE_EXT_CUDA=0")

    obstacle = None
    if torch_cuda is None:
        obstacle = f"torch {torch_version} is a build without CUDA"
    elif toolkit is None:
        obstacle = "no CUDA toolkit found (no CUDA_HOME, no nvcc in PATH, no /usr/local/cuda)"
    elif toolkit.release is None:
        obstacle = f"no nvcc that runs in {toolkit.home}"
    elif toolkit.release.split(".")[0] != torch_cuda.split(".")[0]:
        obstacle = (
            f"nvcc of {toolkit.home} is CUDA {toolkit.release}, but torch {torch_version} is built "
            f"for CUDA {torch_cuda}; the major versions must be equal"
        )
    elif not has_cuda_sources:
        obstacle = "there are no CUDA sources in csrc/cuda"
    if obstacle is None:
        assert toolkit is not None  # for the type checker; every other case set an obstacle
        forced = "IMMUNIZE_EXT_CUDA=1, " if cuda == "1" else ""
        return Decision(True, True, f"{forced}nvcc {toolkit.release}, torch for CUDA {torch_cuda}")
    if cuda == "1":
        raise SystemExit(f"setup.py: IMMUNIZE_EXT_CUDA=1, but {obstacle}")
    return Decision(True, False, obstacle)


def find_toolkit() -> Toolkit | None:
    """Find a CUDA toolkit: CUDA_HOME or CUDA_PATH, the nvcc in PATH, /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc")
    if nvcc is None and Path("/usr/local/cuda/bin/nvcc").exists():
        nvcc = "/usr/local/cuda/bin/nvcc"
    if nvcc is None:
        return None
    release = re.search(r"release (\d+\.\d+)", run_tool(nvcc, "--version"))
    if home is None:
        # The nvcc in PATH may be a wrapper script or a link; nvcc itself knows its folder.
        top = re.search(r"^#\$ TOP=(.+)$", run_tool(nvcc, "--dryrun", "x.cu"), re.MULTILINE)
        home = os.path.normpath(top.group(1)) if top else str(Path(nvcc).parent.parent)
    return Toolkit(home, release.group(1) if release else None)


def default_arch_list(release: str) -> str:
    """Return the architectures to compile for with a toolkit of this release.

    PTX stays that of 9.0: every later card can compile it, those between the listed ones too.
    """
    major, minor = map(int, release.split("."))
    return "8.0;9.0+PTX" + (";10.0;12.0" if (major, minor) >= (12, 8) else "")


def run_tool(*command: str) -> str:
    """Return what ``command`` prints, the empty string if it cannot be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout + done.stderr


def compiler_name() -> str:
    """Return the first line that the C++ compiler prints about its version."""
    command = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()
    lines = run_tool(command[0], "--version").splitlines()
    return lines[0].strip() if lines else f"{command[0]} (not found)"


def sources(*patterns: str) -> list[str]:
    """Return the files of ``csrc`` that match, relative to this file and in a fixed order."""
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


def pip_cuda_folders(torch_cuda: str) -> list[Path]:
    """Return the nvidia/* folders that pip put beside torch: headers that a bare nvcc lacks."""
    import torch

    nvidia = Path(torch.__file__).resolve().parent.parent / "nvidia"
    major = torch_cuda.split(".")[0]
    # CUDA 13 wheels share one folder; CUDA 12 wheels have one for each library.
    shared = nvidia / f"cu{major}"
    return [shared] if shared.is_dir() else sorted(p for p in nvidia.glob("*") if p.is_dir())


def make_extension(decision: Decision, toolkit: Toolkit | None, version: str) -> Extension:
    """Describe ``immunize_ext._C``."""
    if decision.cuda:
        assert toolkit is not None
        assert toolkit.release is not None  # decide() saw to it
        os.environ["CUDA_HOME"] = toolkit.home  # before cpp_extension is imported: it looks then
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default_arch_list(toolkit.release))
    import torch
    from torch.utils import cpp_extension

    arch_list = os.environ["TORCH_CUDA_ARCH_LIST"] if decision.cuda else ""
    macros = {
        "IMMUNIZE_EXT_VERSION": version,
        "IMMUNIZE_EXT_TORCH_VERSION": torch.__version__,
        "IMMUNIZE_EXT_CUDA_ARCH_LIST": arch_list,
    }
    defines = [f'-D{name}="{value}"' for name, value in macros.items()]
    cxx = ["-O3", "-g0", "-Wall", "-fvisibility=hidden", "-fvisibility-inlines-hidden", *defines]
    parallel = torch.__config__.parallel_info()
    if "backend: OpenMP" in parallel and sys.platform != "darwin":
        # at::parallel_for is a template over "#pragma omp parallel": without the flag it is a
        # plain loop.  Only compile with it: linking would load the compiler's own libgomp as well,
        # with its own threads and deaf to torch.set_num_threads.  Left undefined, the symbols
        # resolve to the runtime that libtorch_cpu brought.
        cxx.append("-fopenmp")
    nvcc = ["-O3", "-Xcompiler", "-fvisibility=hidden", *defines]

    files = sources("csrc/*.cpp", "csrc/cpu/*.cpp")
    options: dict[str, Any] = {
        "include_dirs": [str(ROOT / "csrc")],
        "depends": sources("csrc/**/*.h", "csrc/**/*.inl", "csrc/**/*.cuh"),
        "extra_compile_args": {"cxx": cxx, "nvcc": nvcc},
    }
    if not decision.cuda:
        return cpp_extension.CppExtension(EXTENSION, files, **options)
    cxx.append("-DIMMUNIZE_EXT_WITH_CUDA")
    nvcc.append("-DIMMUNIZE_EXT_WITH_CUDA")
    files += sources("csrc/cuda/*.cpp", "csrc/cuda/*.cu")
    extension = cpp_extension.CUDAExtension(EXTENSION, files, **options)
    # Last, so that the toolkit's own headers come first where both have a file.
    for folder in pip_cuda_folders(torch.version.cuda):
        extension.include_dirs += [str(p) for p in [folder / "include"] if p.is_dir()]
        extension.library_dirs += [str(p) for p in [folder / "lib"] if p.is_dir()]
    return extension


def make_record(decision: Decision, version: str) -> dict[str, Any]:
    """Return the facts about this build that can be read without loading the binary."""
    record: dict[str, Any] = {
        "compiled": decision.build,
        "reason": decision.reason,
        "package": version,
        "python": platform.python_version(),
        "torch": None,
        "cuda": None,
        "cuda_arch_list": [],
        "compiler": None,
    }
    if decision.build:
        import torch

        record["torch"] = torch.__version__
        record["compiler"] = compiler_name()
    if decision.cuda:
        record["cuda"] = torch.version.cuda
        record["cuda_arch_list"] = re.split(r"[;\s]+", os.environ["TORCH_CUDA_ARCH_LIST"].strip())
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the record beside the package's modules."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def make_build_py(record: dict[str, Any]) -> type[build_py]:
    """Return a build_py that writes the record of a pure-Python package."""

    class BuildPy(build_py):
        def run(self) -> None:
            super().run()
            package = Path(self.get_package_dir("immunize_ext"))
            folder = package if self.editable_mode else Path(self.build_lib, "immunize_ext")
            write_record(folder, record)
            print(
                f"immunize_ext: pure-Python package without compiled operators ({record['reason']})"
            )

    return BuildPy


def make_build_ext(base: type[build_ext], record: dict[str, Any], must: bool) -> type[build_ext]:
    """Return a build_ext that writes the record and, unless ``must``, survives a failure."""

    class BuildExt(base):  # type: ignore[misc, valid-type]
        def finalize_options(self) -> None:
            super().finalize_options()
            self.force = True  # a library left by an earlier build may be for another torch

        def run(self) -> None:
            self.in_source_tree = bool(self.inplace)  # run() of setuptools changes self.inplace
            kind = f"CUDA {record['cuda']}" if record["cuda"] else "CPU only"
            print(
                f"immunize_ext: compiling for torch {record['torch']}, {kind} ({record['reason']})",
                flush=True,
            )
            try:
                super().run()
            except BUILD_FAILURES as error:
                if must:
                    raise
                self.give_up(error)
            for folder in self.target_folders():
                write_record(folder, record)

        def target_folders(self) -> list[Path]:
            folders = [Path(self.build_lib, "immunize_ext")]
            if self.in_source_tree:
                build = self.get_finalized_command("build_py")
                folders.append(Path(build.get_package_dir("immunize_ext")))
            return folders

        def give_up(self, error: BaseException) -> None:
            text = " ".join(str(error).split()) or type(error).__name__
            record.update(compiled=False, reason=f"the build failed: {text}"[:500])
            self.extensions = []
            for folder in self.target_folders():
                for stale in folder.glob("_C*" + (sysconfig.get_config_var("EXT_SUFFIX") or "")):
                    stale.unlink()
            print(
                f"immunize_ext: {record['reason']}; installing the pure-Python package. To see "
                f"the compiler's messages: IMMUNIZE_EXT_BUILD=1 {BUILD_COMMAND} -v",
                file=sys.stderr,
                flush=True,
            )

    return BuildExt


def main() -> None:
    """Decide, then hand over to setuptools."""
    build, cuda = read_switch("IMMUNIZE_EXT_BUILD"), read_switch("IMMUNIZE_EXT_CUDA")
    version = runpy.run_path(str(ROOT / "immunize_ext" / "_version.py"))["__version__"]
    torch_version = torch_cuda = toolkit = None
    if build != "0":
        try:
            import torch
        except ImportError:
            pass
        else:
            torch_version, torch_cuda = torch.__version__, torch.version.cuda
    if torch_cuda is not None and cuda != "0":
        toolkit = find_toolkit()
    decision = decide(
        build,
        cuda,
        torch_version=torch_version,
        torch_cuda=torch_cuda,
        toolkit=toolkit,
        has_cuda_sources=bool(sources("csrc/cuda/*.cu")),
    )
    if not decision.build:
        setup(cmdclass={"build_py": make_build_py(make_record(decision, version))})
        return

    scripts = sysconfig.get_path("scripts")  # ninja installed by pip, virtual env not activated
    os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)])
    extension = make_extension(decision, toolkit, version)
    from torch.utils.cpp_extension import BuildExtension

    record = make_record(decision, version)
    setup(
        ext_modules=[extension],
        cmdclass={"build_ext": make_build_ext(BuildExtension, record, must=build == "1")},
    )


if __name__ == "__main__":
    main()
