"""Operator tests under AddressSanitizer and UndefinedBehaviorSanitizer.

The CPU operators are compiled once more with both into a copy of the package; its tests then run
with libasan preloaded, since Python itself is not built with it. Torch's own leaks and the memory
that its allocators keep are not looked for; every report that a sanitizer makes ends the process.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .counts import Count

FLAGS = "-fsanitize=address,undefined -fno-omit-frame-pointer"
OPTIONS = {
    # handle_segv=0: faulthandler and ours come first. The second one: torch is no ASan build.
    "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
}
REPORT = re.compile(r"(ERROR: AddressSanitizer[^\n]*|[^\n]*: runtime error: [^\n]*)")
# What another process or another torch does: forks of an ASan build, compilers, child pythons.
LEFT_OUT = "not forked and not compile and not inductor and not subprocess and not export"
COPIED = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "immunize_ext")


def build(root: Path, tree: Path) -> None:
    """Compile the operators of the checkout with both sanitizers, where that is not done yet."""
    tree.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if (root / name).is_dir():
            ignore = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json")
            shutil.copytree(root / name, tree / name, ignore=ignore, dirs_exist_ok=True)
        else:
            shutil.copy2(root / name, tree / name)
    setup = (tree / "setup.py").read_text(encoding="utf-8")
    # As slow to run as it gets either way: an optimised build takes three times as long to make.
    (tree / "setup.py").write_text(setup.replace('"-O3", "-g0"', '"-O1", "-g0"'), encoding="utf-8")
    environment = {
        **os.environ,
        "CFLAGS": FLAGS,
        "LDFLAGS": FLAGS.split()[0],
        "IMMUNIZE_EXT_BUILD": "1",
        "IMMUNIZE_EXT_CUDA": "0",
        "PYTHONPATH": str(tree),
    }
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tree, env=environment, check=True)


def library(name: str) -> str:
    """Path of a library of the compiler."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    command = [compiler, f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def environment(tree: Path) -> dict[str, str]:
    """In which Python takes the sanitized operators."""
    return {
        **os.environ,
        **OPTIONS,
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "2",
        "PYTHONMALLOC": "malloc",
    }


def sanitizers(root: Path, tests: Sequence[str], folder: str) -> dict[str, Count]:
    """Each file of tests in a process of its own: how many tests ran, and what was reported."""
    tree = root / folder
    build(root, tree)
    files: list[Path] = []
    for name in tests:
        path = root / name
        files += sorted(path.glob("test_*.py")) if path.is_dir() else [path]
    found: dict[str, Count] = {}
    for file in files:
        count = Count()
        command = [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"),
            *("-k", LEFT_OUT, "-m", "not slow and not gpu", str(file)),
        ]
        done = subprocess.run(
            command,
            cwd=root,
            env=environment(tree),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        output = done.stdout + done.stderr
        passed = sum(int(n) for n in re.findall(r"(\d+) passed", output))
        failed = sum(int(n) for n in re.findall(r"(\d+) (?:failed|error)", output))
        for _ in range(passed):
            count.survived("passed")
        for words in dict.fromkeys(REPORT.findall(output)):
            count.lose(words[:400])
        for words in re.findall(r"^(?:FAILED|ERROR) .*", output, re.MULTILINE)[:failed]:
            count.lose(words[:400])
        if done.returncode not in (0, 1, 5) and not count.lost:
            count.lose(f"exit status {done.returncode}: {output[-300:]}")
        found[file.name] = count
        print(f"  {file.name}: {count.tried} tried, {count.lost} lost", flush=True)
    return found
