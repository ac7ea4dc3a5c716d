"""Do the tests notice?  Plausible faults, planted one at a time, against the tests that claim them.

    make mutants                        every fault of .ci/mutants.toml that has no verdict yet
    make mutants MUTANTS="--only merge" those whose name or file matches
    make mutants MUTANTS=--check        only whether every fault can still be planted

A fault is a piece of text that stands exactly once in the files of a pattern, what to write in its
place, and the tests that have to fail then: it names no line, and moving a file does not touch it.
The checkout is copied once to .mutants/tree and only the copy is changed. Verdicts are kept in
.mutants/results.json under a digest of the fault, the file and its tests, so an interrupted run
goes on where it stopped and a changed file is judged again.

Verdicts: killed (a test failed, or ran ten times as long as without the fault), survived, broken
(it does not compile), unjudged (its tests fail without any fault). Exit status 1 for anything but
killed that ``reason`` does not explain, and for a fault that can no longer be planted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMPILED = {".cpp", ".h", ".inl"}
# What a copy of the checkout does without.
LEFT_OUT = (
    *(".git", ".venv*", ".mutants*", ".nightly", "__pycache__", "*.egg-info", ".*_cache"),
    *("runs", "dist"),
)


@dataclass(frozen=True)
class Mutant:
    """One planted fault.

    Attributes:
        name: unique, in words.
        where: glob of the files that hold ``old`` once.
        old: the text as it is.
        new: the fault.
        tests: what pytest is given.
        reason: why no test can tell the difference, where that is so.
    """

    name: str
    where: str
    old: str
    new: str
    tests: tuple[str, ...]
    reason: str = ""

    def place(self, root: Path) -> Path:
        """The one file with the text; ``LookupError`` where there is none or several."""
        files = [path for path in sorted(root.glob(self.where)) if path.is_file()]
        counts = {path: path.read_text(encoding="utf-8").count(self.old) for path in files}
        if sum(counts.values()) != 1:
            raise LookupError(
                f"{self.name}: the text must stand once in {self.where}, found "
                f"{sum(counts.values())} times in {len(files)} files; write the entry anew"
            )
        return next(path for path, count in counts.items() if count)

    def digest(self, root: Path) -> str:
        """What a verdict depends on, as far as it can be seen cheaply."""
        parts = [self.old, self.new, *self.tests, self.place(root).read_text(encoding="utf-8")]
        parts += [
            path.read_text(encoding="utf-8")
            for test in self.tests
            if (path := root / test.split("::")[0]).is_file()
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def read_mutants(path: Path) -> list[Mutant]:
    """The list, with groups of tests written out."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    groups: dict[str, list[str]] = table["tests"]
    found = []
    for entry in table["mutant"]:
        tests = tuple(test for name in entry.pop("tests") for test in groups.get(name, [name]))
        found.append(Mutant(tests=tests, **entry))
    names = [mutant.name for mutant in found]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"mutants: names must be unique, got twice: {', '.join(sorted(twice))}")
    return found


@contextmanager
def planted(mutant: Mutant, root: Path) -> Iterator[Path]:
    """The fault in the tree, and the tree as it was again."""
    path = mutant.place(root)
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        yield path
    finally:
        path.write_text(before, encoding="utf-8")


def copy_of(root: Path, work: Path) -> Path:
    """A copy of the checkout with today's files; objects compiled there before stay."""
    tree = work / "tree"
    for old in ("immunize_ext", "python_tests", "csrc"):
        for path in (tree / old).rglob("*"):
            gone = not (root / path.relative_to(tree)).exists()
            if gone and path.is_file() and path.suffix != ".so":
                path.unlink()
    ignore = shutil.ignore_patterns(*LEFT_OUT, "build")
    shutil.copytree(root, tree, ignore=ignore, dirs_exist_ok=True)
    return tree


def compile_in(tree: Path) -> str:
    """Build the operators, where there are any; the end of the output where it fails."""
    if not (tree / "setup.py").is_file():
        return ""
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=tree,
        env={**os.environ, "IMMUNIZE_EXT_BUILD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if done.returncode == 0 else (done.stdout + done.stderr)[-2000:]


# Importing torch and diffusers takes longer than most tests: one process does it, and a fork of it
# runs the tests of each mutant. It imports nothing of the package.
SERVER = """
import importlib, json, os, pathlib, signal, sys, time
import pytest

for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name)
    except ImportError:
        pass
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        os.setsid()
        output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(job["tree"])
        os.environ.update(PYTHONPATH=job["tree"], PYTHONDONTWRITEBYTECODE="1")
        sys.dont_write_bytecode = True
        sys.path.insert(0, job["tree"])
        code = 70
        try:
            code = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *job["tests"]]))
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    end = time.monotonic() + job["limit"] if job["limit"] else float("inf")
    parent, status = os.getppid(), None
    while status is None:
        found, state = os.waitpid(child, os.WNOHANG)
        if found:
            status = os.waitstatus_to_exitcode(state)
        elif time.monotonic() > end or os.getppid() != parent:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            status = "late"
        else:
            time.sleep(0.02)
    print(json.dumps(status), flush=True)
"""
WARM = (
    *("torch", "numpy", "scipy.linalg", "mpmath", "hypothesis", "xdist", "sklearn.datasets"),
    *("matplotlib.pyplot", "jinja2", "diffusers", "transformers", "peft", "accelerate"),
    *("diffusers.models", "transformers.models.clip.modeling_clip", "safetensors.torch"),
)


class TestRunner:
    """Runs pytest on a tree, in a fork of a process that has the large imports behind it."""

    def __init__(self, work: Path) -> None:
        self._output = work / "output.txt"
        self._server: subprocess.Popen[str] | None = None

    def __call__(self, tree: Path, tests: Sequence[str], limit: float | None) -> tuple[str, str]:
        """Passed, failed or unusable, and the first line that says so."""
        if self._server is None:
            warm = WARM if (tree / "immunize_ext").is_dir() else ()
            self._server = subprocess.Popen(
                [sys.executable, "-c", SERVER, json.dumps(warm)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        job = {"tree": str(tree), "tests": tests, "limit": limit, "output": str(self._output)}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        status = json.loads(self._server.stdout.readline())
        if status == "late":
            return "failed", f"no end within {limit:.0f} s"
        if status == 0:
            return "passed", ""
        output = self._output.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
        # Python that the fault keeps from being imported is noticed as well, and so is a crash.
        noticed = status in (1, 2) or status < 0
        return ("failed" if noticed else "unusable"), lines[0] if lines else output[-500:]

    def close(self) -> None:
        """End the process."""
        if self._server is not None:
            self._server.communicate()
            self._server = None


class Run:
    """Verdicts of a list of mutants, kept in a file as they come."""

    def __init__(self, root: Path, work: Path) -> None:
        work.mkdir(exist_ok=True)
        self.root, self.results = root, work / "results.json"
        self.tree = copy_of(root, work)
        self._compiled = False
        self.run_tests = TestRunner(work)
        self.verdicts: dict[str, Any] = {}
        if self.results.is_file():
            self.verdicts = json.loads(self.results.read_text(encoding="utf-8"))
        self._baseline: dict[tuple[str, ...], tuple[float, str]] = {}

    def judge(self, mutant: Mutant, *, again: bool = False) -> dict[str, Any]:
        """The verdict on one mutant, from the file where it is known; "unjudged" is not kept."""
        digest = mutant.digest(self.tree)
        known = self.verdicts.get(mutant.name)
        if known and known["digest"] == digest and not again:
            return known
        compiled = mutant.place(self.tree).suffix in COMPILED
        if compiled and not self._compiled:
            if trouble := compile_in(self.tree):
                raise SystemExit(f"mutants: the copy does not compile\n{trouble}")
            self._compiled = True
        seconds, trouble = self._without(mutant.tests)
        if trouble:
            by = f"fails without a fault: {trouble}"
            return {"digest": digest, "verdict": "unjudged", "by": by, "file": mutant.where}
        limit = 10 * seconds + 60
        with planted(mutant, self.tree) as path:
            trouble = compile_in(self.tree) if compiled else ""
            if trouble:
                verdict, by = "broken", trouble
            else:
                outcome, by = self.run_tests(self.tree, mutant.tests, limit)
                verdict = {"passed": "survived", "failed": "killed"}.get(outcome, "broken")
        if compiled:
            compile_in(self.tree)  # ours again, for the tests of the next one
        found = {
            "digest": digest,
            "verdict": verdict,
            "by": by,
            "file": str(path.relative_to(self.tree)),
        }
        self.verdicts[mutant.name] = found
        part = self.results.with_suffix(".part")
        part.write_text(json.dumps(self.verdicts, indent=1, sort_keys=True), encoding="utf-8")
        part.replace(self.results)
        return found

    def _without(self, tests: tuple[str, ...]) -> tuple[float, str]:
        """Seconds of the tests without a fault; they must pass, or a kill says nothing."""
        if tests not in self._baseline:
            started = time.monotonic()
            _, first = self.run_tests(self.tree, tests, None)
            self._baseline[tests] = time.monotonic() - started, first
        return self._baseline[tests]


def report(mutants: Sequence[Mutant], verdicts: dict[str, Any]) -> str:
    """Counts by file, then what survived and why."""
    judged = [(m, verdicts[m.name]) for m in mutants if m.name in verdicts]
    files = sorted({found["file"] for _, found in judged})
    lines = []
    for file in files:
        words = [found["verdict"] for _, found in judged if found["file"] == file]
        lines.append(f"{words.count('killed'):4} of {len(words):3} killed  {file}")
    lines += [
        f"{found['verdict']}: {m.name} ({m.reason or 'no reason given'})"
        for m, found in judged
        if found["verdict"] != "killed"
    ]
    killed = sum(found["verdict"] == "killed" for _, found in judged)
    return "\n".join([*lines, f"{killed} of {len(judged)} killed"])


def main(arguments: Sequence[str] | None = None, root: Path | None = None) -> int:
    """Run the command; ``root`` is the checkout, by default the one this file stands in."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of a name or of a pattern of files")
    parser.add_argument("--check", action="store_true", help="plant nothing, run nothing")
    parser.add_argument("--again", action="store_true", help="judge anew what has a verdict")
    options = parser.parse_args(arguments)
    root = root or Path(__file__).resolve().parents[1]
    mutants = [
        mutant
        for mutant in read_mutants(root / ".ci" / "mutants.toml")
        if options.only in mutant.name or options.only in mutant.where
    ]
    stale, usable = [], []
    for mutant in mutants:
        try:
            mutant.place(root)
            usable.append(mutant)
        except LookupError as error:
            stale.append(str(error))
    print("\n".join([*stale, f"{len(usable)} of {len(mutants)} faults can be planted"]))
    if options.check:
        return int(bool(stale))
    # Python first: its faults need no compiler.
    usable.sort(key=lambda mutant: mutant.place(root).suffix in COMPILED)
    run, unexplained = Run(root, root / ".mutants"), 0
    for number, mutant in enumerate(usable, 1):
        found = run.judge(mutant, again=options.again)
        unexplained += found["verdict"] != "killed" and not mutant.reason
        why = f": {found['by']}" if found["verdict"] == "unjudged" else ""
        print(f"[{number}/{len(usable)}] {found['verdict']:8} {mutant.name}{why}", flush=True)
    run.run_tests.close()
    print(report(usable, run.verdicts))
    return int(bool(stale or unexplained))


if __name__ == "__main__":
    sys.exit(main())
