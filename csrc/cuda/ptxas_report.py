"""What ptxas says about each kernel: registers, shared memory, spills, stack frame.

``python csrc/cuda/ptxas_report.py compile FILE.cu`` compiles a file for ``--arch`` (nothing is run,
no GPU is needed); ``... read LOG`` reads what ``nvcc -Xptxas -v`` printed elsewhere, ``-`` for
standard input.  The table goes to standard output, and to ``--json`` and ``--markdown``.

Exit status 1 if a kernel spills registers or has a stack frame; kernels that ``--allow-stack``
matches may have one.  A stack frame is an array that did not fit into registers: as slow as spills.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '([^']+)' for '([^']+)'")
FUNCTION = re.compile(r"Function properties for (\S+)")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


@dataclass
class Usage:
    """Resources of one kernel, or of one function that was not inlined, on one architecture."""

    name: str
    arch: str
    registers: int | None = None  # None for a function: it uses those of its kernel
    shared: int = 0  # bytes of static shared memory
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0


def parse(text: str) -> list[Usage]:
    """Read the output of ``nvcc -Xptxas -v``; names stay mangled, order and duplicates are kept."""
    usages: list[Usage] = []
    kernel: Usage | None = None
    frame_of: Usage | None = None
    for line in text.splitlines():
        if entry := ENTRY.search(line):
            kernel = Usage(name=entry[1], arch=entry[2])
            usages.append(kernel)
        elif kernel is None:
            continue
        elif function := FUNCTION.search(line):
            if function[1] == kernel.name:
                frame_of = kernel
            else:
                frame_of = Usage(name=function[1], arch=kernel.arch)
                usages.append(frame_of)
        elif (frame := FRAME.search(line)) and frame_of is not None:
            frame_of.stack, frame_of.spill_stores, frame_of.spill_loads = map(int, frame.groups())
        elif used := USED.search(line):
            kernel.registers = int(used[1])
            shared = SHARED.search(line)
            kernel.shared = int(shared[1]) if shared else 0
    return usages


def short_name(signature: str) -> str:
    """Return a demangled name without return type, arguments and anonymous namespaces.

    Example:
        >>> short_name("void ns::sum<float, (int)4>(float const*, float*)")
        'ns::sum<float, 4>'
    """
    signature = signature.replace("(anonymous namespace)::", "")
    signature = re.sub(r"\((?:int|bool|unsigned int|long|unsigned long)\)(?=-?\d)", "", signature)
    depth = 0
    start = 0
    for i, character in enumerate(signature):
        if character == "<":
            depth += 1
        elif character == ">":
            depth -= 1
        elif depth == 0 and character == " ":
            start = i + 1
        elif depth == 0 and character == "(":
            return signature[start:i]
    return signature[start:]


def demangle(usages: Iterable[Usage]) -> list[Usage]:
    """Return the usages with readable names, sorted, each once; ``c++filt`` does it if present."""
    unique = {(usage.name, usage.arch): usage for usage in usages}
    rows = [Usage(**asdict(usage)) for usage in unique.values()]
    tool = shutil.which("c++filt")
    if tool is not None and rows:
        text = "\n".join(row.name for row in rows)
        done = subprocess.run([tool], input=text, capture_output=True, text=True, check=True)
        for row, signature in zip(rows, done.stdout.splitlines(), strict=True):
            row.name = short_name(signature)
    return sorted(rows, key=lambda row: (row.name, row.arch))


def complaints(usages: Iterable[Usage], allow_stack: str | None = None) -> list[str]:
    """Return one line for each kernel that spills or has a stack frame that is not allowed."""
    found = []
    for usage in usages:
        where = f"{usage.name} ({usage.arch})"
        if usage.spill_stores or usage.spill_loads:
            found.append(
                f"{where} spills registers: {usage.spill_stores} bytes stored, "
                f"{usage.spill_loads} loaded"
            )
        elif usage.stack and not (allow_stack and re.search(allow_stack, usage.name)):
            found.append(f"{where} has a stack frame of {usage.stack} bytes")
    return found


def markdown(usages: Sequence[Usage]) -> str:
    """Return a table with a row for each kernel and architecture."""
    lines = [
        "| kernel | arch | registers | shared (bytes) | stack (bytes) | spills (bytes) |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for usage in usages:
        registers = "" if usage.registers is None else str(usage.registers)
        spills = usage.spill_stores + usage.spill_loads
        lines.append(
            f"| `{usage.name}` | {usage.arch} | {registers} | {usage.shared} | {usage.stack} "
            f"| {spills} |"
        )
    return "\n".join(lines) + "\n"


def compile_file(source: Path, archs: Sequence[str], nvcc: str) -> str:
    """Compile ``source`` for each architecture and return what ptxas printed."""
    targets = []
    for arch in archs:
        number = arch.removeprefix("sm_")
        targets += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
    with tempfile.TemporaryDirectory() as folder:
        target = str(Path(folder, "out.o"))
        command = [nvcc, "-std=c++17", *targets, "-Xptxas", "-v", "-c", str(source), "-o", target]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"ptxas_report: {' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def write(usages: Sequence[Usage], json_path: Path | None, markdown_path: Path | None) -> None:
    """Write the table where it is asked for."""
    if json_path is not None:
        rows = [asdict(usage) for usage in usages]
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if markdown_path is not None:
        markdown_path.parent.mkdir(parents=True, exist_ok=True)
        markdown_path.write_text(markdown(usages), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    compiling = commands.add_parser("compile", help="compile .cu files")
    compiling.add_argument("files", type=Path, nargs="+")
    compiling.add_argument("--arch", action="append", help="default: sm_80 and sm_90")
    compiling.add_argument("--nvcc", default="nvcc")
    reading = commands.add_parser("read", help="read a log")
    reading.add_argument("log", type=argparse.FileType("r", encoding="utf-8"))
    for command in (compiling, reading):
        command.add_argument("--allow-stack", metavar="REGEX")
        command.add_argument("--json", type=Path, metavar="PATH")
        command.add_argument("--markdown", type=Path, metavar="PATH")
    options = parser.parse_args(arguments)
    if options.command == "compile":
        if shutil.which(options.nvcc) is None:
            parser.error(f"{options.nvcc} not found; install the CUDA toolkit or give --nvcc")
        archs = options.arch or ["sm_80", "sm_90"]
        text = "".join(compile_file(path, archs, options.nvcc) for path in options.files)
    else:
        text = options.log.read()
    usages = demangle(parse(text))
    if not usages:
        print("ptxas_report: no kernel found; was nvcc run with -Xptxas -v?", file=sys.stderr)
        return 2
    print(markdown(usages), end="")
    write(usages, options.json, options.markdown)
    found = complaints(usages, options.allow_stack)
    for line in found:
        print(f"ptxas_report: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
