"""Builds ``immunize_ext_ptx``: what nvcc made of the CUDA kernels, run on the CPU.

For tests only.  nvcc compiles ``csrc/cuda/*.cu`` to host code and PTX; the host code is linked with
``cudart.cpp`` in place of CUDA's runtime, and the PTX, read by ``parse.py``, is what its launches
run.  The binding files of ``csrc/simt/bindings`` are compiled over these launchers, so the same
tests run against both.  Without nvcc, only programs given as text can be run.
"""

import importlib.util
import json
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[2]
OUTPUT = ROOT / "build" / "ptx"
MODULE = "immunize_ext_ptx"
ARCH = "90"
# Of these, the kernels are launched by the test module itself.
WITHOUT_LAUNCHERS = {"selftest.cpp"}


def sibling(path: Path) -> ModuleType:
    """Import a Python file beside this one, which is no part of a package."""
    name = f"immunize_ext_{path.parent.name}_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


simt = sibling(FOLDER.parent / "build.py")
parser = sibling(FOLDER / "parse.py")


def cuda_includes(nvcc: str) -> list[str]:
    """Return the folders of CUDA's headers, which only nvcc knows."""
    listing = simt.run([nvcc, "--dryrun", "-c", "x.cu"], errors_too=True)
    found = re.findall(r'"-I(?:system" ")?([^"]+)"', listing.replace("-isystem", "-Isystem"))
    return [f"-isystem{folder}" for folder in dict.fromkeys(found)]


def release(nvcc: str) -> str:
    """Return ``release 13.0, V13.0.88``."""
    version = re.search(r"release [^\n]*", simt.run([nvcc, "--version"]))
    return version[0] if version else "unknown release"


def cuda_sources() -> list[Path]:
    """Return the files that nvcc compiles."""
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def compile_cuda(source: Path, nvcc: str, version: str) -> tuple[Path, str]:
    """Compile a file to host code and PTX, which lies beside it; return the object and its hash.

    The code is portable, so that no assembler has to run.
    """
    kept = OUTPUT / source.stem
    kept.mkdir(parents=True, exist_ok=True)
    target = f"-gencode=arch=compute_{ARCH},code=compute_{ARCH}"
    command = [nvcc, "-std=c++17", "-O3", "-lineinfo", "-DIMMUNIZE_EXT_WITH_CUDA", target]
    command += ["-cudart=none", "-Xcompiler=-fPIC", "--keep", f"--keep-dir={kept}"]
    return simt.compile_file(source, command, version, OUTPUT)


def compile_host(source: Path, includes: list[str], version: str) -> tuple[Path, str]:
    """Compile a file with g++: a binding over launchers of nvcc, or a part of the executor."""
    command = [simt.compiler(), *simt.flags(source, sanitize=False), "-O2"]
    if source.parent.name == "bindings":
        command += ["-DIMMUNIZE_EXT_WITH_CUDA", *includes]
    return simt.compile_file(source, command, version, OUTPUT)


def build(nvcc: str | None) -> tuple[Path, list[Path]]:
    """Compile what changed; return the module and the PTX files."""
    with simt.locked(OUTPUT):
        version = simt.run([simt.compiler(), "--version"])
        host = sorted(FOLDER.glob("*.cpp"))
        objects, texts = [], []
        includes: list[str] = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            if nvcc is not None:
                includes = cuda_includes(nvcc)
                nvcc_version = simt.run([nvcc, "--version"])
                bindings = sorted((FOLDER.parent / "bindings").glob("*.cpp"))
                host += [path for path in bindings if path.name not in WITHOUT_LAUNCHERS]
                objects += pool.map(
                    lambda source: compile_cuda(source, nvcc, nvcc_version), cuda_sources()
                )
                texts = [OUTPUT / path.stem / f"{path.stem}.ptx" for path in cuda_sources()]
            objects += pool.map(lambda source: compile_host(source, includes, version), host)
        return simt.link(objects, MODULE if nvcc else f"{MODULE}_bare", OUTPUT), texts


def read(path: Path) -> list[Any]:
    """Return the programs of a PTX file as ``load`` takes them; what was read is kept."""
    text = path.read_text(encoding="utf-8")
    kept = path.with_suffix(".json")
    key = simt.digest(text.encode(), (FOLDER / "parse.py").read_bytes())
    if kept.exists():
        known = json.loads(kept.read_text(encoding="utf-8"))
        if known["key"] == key:
            return list(known["programs"])
    programs = [astuple(program) for program in parser.parse(text)]
    kept.write_text(json.dumps({"key": key, "programs": programs}), encoding="utf-8")
    return programs


def load(nvcc: str | None) -> ModuleType:
    """Build and import the module, with the programs of all kernels where nvcc is given."""
    if MODULE not in sys.modules:
        library, texts = build(nvcc)
        module = simt.import_library(MODULE, library)
        for path in texts:
            module.load(read(path))
    return sys.modules[MODULE]


if __name__ == "__main__":
    try:
        print(build(shutil.which("nvcc"))[0])
    except simt.BuildError as error:
        sys.exit(f"csrc/simt/ptx/build.py: {error}")
