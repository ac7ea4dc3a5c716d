"""Commands that are killed at a random moment and started again: nothing is lost, nothing differs.

Each command is run once to its end. Then, again and again, in a folder of its own: it is started,
killed with SIGKILL after a random part of that time, and started again until it is done. What
stands at its place after the kill must be whole, an earlier run that ``--force`` replaces included,
and what stands there at the end must equal the uninterrupted run in everything but seconds, with
nothing left beside it.

A process with the imports behind it is forked for each run, so that kills hit the work.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .counts import Count

DIGITS = ("--targets", "three", "five", "--attacks", "lora", "--attack-steps", "3")
QUICK = ("--images", "2", "--sampling-steps", "1", "--set", "steps=3", "--set", "probe_every=1")
PROBES = ("--max-train", "40", "--base-budget", "10", "--limit", "2")
# Arguments behind the name; the output folder, where there is one, is appended.
COMMANDS: dict[str, tuple[str, ...]] = {
    "kappa": ("kappa", "--method", "condition-number", "--set", "steps=20", *PROBES),
    "mima": ("mima", *DIGITS, *QUICK),
    "imma": ("imma", "--targets", "three", *DIGITS[3:], *QUICK),
    "erase": ("erase", "--targets", "three"),
    "sweep": (
        *("sweep", "kappa", "--pairs", "0/1", "--methods", "closed-form", "whitening"),
        *("--seed", "2", *PROBES[:2]),
    ),
    "attack": ("attack",),
    "demo": ("demo", "--skip-mima"),
}
TEXT_TO_IMAGE = ("mima", "imma", "erase")
# What a command imports: of probes, and of text-to-image models.
MODULES = (
    ("matplotlib.pyplot", "sklearn.datasets", "immunize_ext.cli", "immunize_ext.probing.run"),
    ("matplotlib.pyplot", "diffusers", "immunize_ext.cli", "immunize_ext.text_to_image.run"),
)


def run(arguments: Sequence[str], folder: Path, seconds: float | None) -> tuple[int | None, str]:
    """Exit status of the command in the folder, None where it was killed, and what it said."""
    said = folder.parent / f"{folder.name}.txt"
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            os.chdir(folder)
            output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            from immunize_ext.cli import main

            code = main([*arguments, "--quiet"])
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    if seconds is None:
        _, state = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(state), said.read_text(errors="replace")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, state = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(state), said.read_text(errors="replace")
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None, said.read_text(errors="replace") if said.exists() else ""


# What no two runs share, and the truncation last asked for, which transformers writes into the
# settings of a tokenizer where they were read from a folder: all of it defaults.
VOLATILE = {"created", "peak_memory", "stride", "truncation_side", "truncation_strategy"}


def _plain(value: Any) -> Any:
    """Without seconds, memory and the like."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if "seconds" not in k and k not in VOLATILE}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def content(folder: Path) -> dict[str, Any]:
    """What a folder holds, by name, as far as two equal runs share it."""
    from safetensors import safe_open
    from safetensors.torch import save

    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            found[name] = _plain(json.loads(path.read_text()))
        elif path.suffix == ".safetensors":
            # The order of metadata is not kept by the format's writer.
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                found[name] = (file.metadata(), save(tensors))
        elif path.name == "SHA256SUMS":
            found[name] = sorted(line.split()[-1] for line in path.read_text().splitlines())
        elif path.suffix == ".html":
            found[name] = path.stat().st_size > 1000  # its numbers are those of results.json
        else:
            found[name] = path.read_bytes()
    return found


def differences(a: dict[str, Any], b: dict[str, Any]) -> str:
    """Names of files that differ."""
    return ", ".join(sorted(name for name in {*a, *b} if a.get(name) != b.get(name)))


class Trials:
    """One command: its uninterrupted run, and what is killed and resumed against it."""

    def __init__(self, command: str, work: Path, generator: random.Random) -> None:
        self.command, self.work, self.random = command, work, generator
        # Into a folder that stands already, file by file.
        self.adds = command in ("attack", "sweep")
        self.base = work / "base"
        if command == "attack":
            self.base.mkdir(parents=True)
            status, said = run((*COMMANDS["kappa"], "--out", "run"), self.base, None)
            if status != 0:
                raise RuntimeError(f"kappa: exit status {status}: {said[-500:]}")
        whole = self._folder("whole")
        started = time.monotonic()
        status, said = run(self.arguments(), whole, None)
        self.seconds = time.monotonic() - started
        if status != 0:
            raise RuntimeError(f"{command}: exit status {status}: {said[-500:]}")
        self.whole = content(whole)

    def arguments(self, *more: str) -> tuple[str, ...]:
        """The command line."""
        if self.command == "attack":
            return ("attack", "run", *more)
        return (*COMMANDS[self.command], "--out", "run", *more)

    def _folder(self, name: str) -> Path:
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        if self.command == "attack":
            shutil.copytree(self.base, folder)
        else:
            folder.mkdir(parents=True)
        return folder

    def trial(self) -> tuple[str, str]:
        """Kill once or twice, go on, compare: what happened, and what was lost."""
        folder = self._folder("killed")
        force = not self.adds and self.random.random() < 0.3
        old = None
        if force:
            shutil.copytree(self.work / "whole" / "run", folder / "run")
            (folder / "run" / "old").write_text("of the old run")
            old = content(folder / "run")
        more = ("--force",) if force else ()
        done, moments = False, []
        for _ in range(self.random.choice((1, 1, 2))):
            moments.append(self.random.uniform(0.02, 1.0) * self.seconds)
            status, said = run(self.arguments(*more), folder, moments[-1])
            if status is not None:
                done = True
                if status != 0:
                    return "finished", f"exit status {status}: {said[-300:]}"
                break
            lost = self._whole_after_kill(folder, old)
            if lost:
                return "killed", f"killed after {moments[-1]:.3f} s: {lost}"
        if not done:
            if force and not (folder / "run" / "old").exists():
                done = True  # the kill came after the new run had taken its place
            elif (folder / "run").exists() and not (force or self.adds):
                done = True
        words = f"killed after {', '.join(f'{m:.3f}' for m in moments)} s{' --force' * force}"
        if not done:
            status, said = run(self.arguments(*more), folder, None)
            if status != 0:
                return "resumed", f"{words}: exit status {status}: {said[-300:]}"
        found = content(folder)
        wanted = dict(self.whole)
        if self.command == "attack":
            # A kill after the file was written leaves it; the second run then adds its own.
            found.pop("run/attacks/002.json", None)
            found.pop("run/attacks/003.json", None)
        beside = [n for n in found if n not in wanted and ".part" in n]
        if done and beside:
            return "killed", ""  # cleared by the next run that writes there
        different = differences(found, wanted)
        return ("killed" if moments else "finished"), f"{words}: {different}" if different else ""

    def _whole_after_kill(self, folder: Path, old: dict[str, Any] | None) -> str:
        run_folder = folder / "run"
        if self.command == "sweep":
            for path in run_folder.rglob("*.json"):
                if not path.name.startswith("."):
                    json.loads(path.read_text())
            return ""
        if self.command == "attack":
            for path in (run_folder / "attacks").glob("[0-9]*.json"):
                json.loads(path.read_text())
            return ""
        if not run_folder.exists():
            return "the old run is gone" if old is not None else ""
        found = content(run_folder)
        wanted = {k.removeprefix("run/"): v for k, v in self.whole.items() if k.startswith("run/")}
        if found == old or not differences(found, wanted):
            return ""
        return f"what stands there is neither whole nor old: {differences(found, wanted)}"


def kills(command: str, trials: int, seed: int, work: Path) -> Count:
    """So many trials of one command."""
    count = Count()
    subject = Trials(command, work / command, random.Random(f"{seed} {command}"))
    for _ in range(trials):
        try:
            what, lost = subject.trial()
        except Exception as error:
            count.lose(f"{type(error).__name__}: {error}"[:600])
            continue
        if lost:
            count.lose(lost[:600])
        else:
            count.survived(what)
    shutil.rmtree(work / command, ignore_errors=True)
    return count
