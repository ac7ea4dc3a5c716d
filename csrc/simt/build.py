"""Builds ``immunize_ext_simt``: the CUDA kernels as Python functions that run on the CPU.

For tests only; not part of the package.  ``python csrc/simt/build.py`` compiles what changed and
prints the path of the module; tests call :func:`load`.

A file is compiled again when its text, a header it includes, the flags or the compiler changed.
Results go to ``build/simt``.  Several processes may build at once: one does, the others wait.
"""

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
OUTPUT = ROOT / "build" / "simt"
MODULE = "immunize_ext_simt"

FLAGS = [
    "-std=c++17",
    "-O1",
    "-g1",  # line tables: errors name the line of the kernel
    "-fPIC",
    "-fvisibility=hidden",
    "-U_FORTIFY_SOURCE",  # its longjmp refuses to leave the stack
    "-Wall",
    "-Wextra",
    "-Wno-unused-function",  # kernels are static; a file need not use all of a header
    "-ffp-contract=off",
    "-ftrivial-auto-var-init=pattern",  # a local that was never set is a huge number
]
# See arithmetic_checks.cpp, which must be compiled without.
SANITIZE = [
    "-fsanitize=signed-integer-overflow,integer-divide-by-zero,shift,bounds",
    "-fno-sanitize-recover=all",
]
UNSANITIZED = {"arithmetic_checks.cpp", "module.cpp"}


class BuildError(RuntimeError):
    """The compiler is missing or refused a file; the message holds what it printed."""


def sources() -> list[Path]:
    """Return the C++ files of the module."""
    return [*sorted(FOLDER.glob("*.cpp")), *sorted((FOLDER / "bindings").glob("*.cpp"))]


def compiler() -> str:
    """Return the path of g++; ``CXX`` overrides it."""
    name = os.environ.get("CXX", "g++")
    path = shutil.which(name)
    if path is None:
        raise BuildError(f"{name} not found; install g++ or set CXX")
    return path


def flags(source: Path, sanitize: bool = True) -> list[str]:
    """Return the compiler flags of a file."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise BuildError("torch is not installed; its copy of pybind11 is needed")
    includes = [Path(torch.origin).parent / "include", sysconfig.get_path("include")]
    return [
        *FLAGS,
        *(SANITIZE if sanitize and source.name not in UNSANITIZED else []),
        *(f"-isystem{folder}" for folder in includes),
    ]


def run(command: list[str], *, errors_too: bool = False) -> str:
    """Run a command and return what it printed; its warnings go to stderr, or with the rest."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    if errors_too:
        return done.stdout + done.stderr
    sys.stderr.write(done.stderr)
    return done.stdout


def digest(*parts: bytes) -> str:
    """Return a hash of all parts and of where each ends."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()[:16]


def content_hash(paths: list[Path], command: list[str], version: str) -> str:
    """Return a hash of the files' content and of how they are compiled."""
    return digest(
        version.encode(), *(c.encode() for c in command), *(p.read_bytes() for p in paths)
    )


def headers(depfile: Path) -> list[Path]:
    """Return the files of this repository that a compiler's depfile lists."""
    words = depfile.read_text(encoding="utf-8").replace("\\\n", " ").split(": ", 1)[1].split()
    paths = {Path(word).resolve() for word in words}
    return sorted(path for path in paths if path.is_relative_to(ROOT / "csrc"))


def compile_file(
    source: Path, compile_it: list[str], version: str, folder: Path
) -> tuple[Path, str]:
    """Compile ``source`` unless nothing changed; return the object file and its hash."""
    command = [*compile_it, "-c", str(source)]
    target = folder / f"{source.parent.name}-{source.stem}.o"
    record = target.with_suffix(".json")
    if target.exists() and record.exists():
        known = json.loads(record.read_text(encoding="utf-8"))
        paths = [ROOT / path for path in known["files"]]
        complete = all(path.exists() for path in paths)
        if complete and content_hash(paths, command, version) == known["hash"]:
            return target, known["hash"]
    record.unlink(missing_ok=True)
    depfile = target.with_suffix(".d")
    run([*command, "-o", str(target), "-MMD", "-MF", str(depfile)])
    paths = headers(depfile)
    key = content_hash(paths, command, version)
    files = [str(path.relative_to(ROOT)) for path in paths]
    text = json.dumps({"hash": key, "files": files}, indent=2)
    record.write_text(text + "\n", encoding="utf-8")
    return target, key


def link(objects: list[tuple[Path, str]], module: str, folder: Path) -> Path:
    """Link object files, given with their hashes, unless that was done; return the library."""
    library = folder / f"{module}-{digest(*(key.encode() for _, key in objects))}.so"
    if not library.exists():
        # A running process may still want the lines of the one that it loaded.
        for old in sorted(folder.glob(f"{module}-*.so"), key=os.path.getmtime)[:-3]:
            old.unlink()
        partial = library.with_suffix(".partial")
        run([compiler(), "-shared", "-o", str(partial), *(str(path) for path, _ in objects)])
        partial.replace(library)
    return library


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of an output folder; it is released even if the process is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build() -> Path:
    """Compile what changed and return the path of the module."""
    with locked(OUTPUT):
        version = run([compiler(), "--version"])

        def compile_one(source: Path) -> tuple[Path, str]:
            return compile_file(source, [compiler(), *flags(source)], version, OUTPUT)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return link(list(pool.map(compile_one, sources())), MODULE, OUTPUT)


def import_library(module: str, library: Path) -> ModuleType:
    """Import a library as ``module``, once a process."""
    if module not in sys.modules:
        loader = importlib.machinery.ExtensionFileLoader(module, str(library))
        spec = importlib.util.spec_from_loader(module, loader)
        assert spec is not None
        sys.modules[module] = importlib.util.module_from_spec(spec)
        loader.exec_module(sys.modules[module])
    return sys.modules[module]


def load() -> ModuleType:
    """Build and import the module."""
    return sys.modules.get(MODULE) or import_library(MODULE, build())


if __name__ == "__main__":
    try:
        print(build())
    except BuildError as error:
        sys.exit(f"csrc/simt/build.py: {error}")
