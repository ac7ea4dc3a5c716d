"""Reads PTX as nvcc prints it into programs for ``interpreter.h``.

A program is flat: every register, special register, parameter and constant is a numbered slot of a
thread's frame, labels are positions, vectors and pairs are listed element by element.  What an
instruction means is the interpreter's business; only the forms of an operand are known here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Slots that the interpreter fills before a thread starts, in this order; the first is a sink.
SPECIAL = (
    "_", "%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ntid.y", "%ntid.z",
    "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid",
)  # fmt: skip
SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
DYNAMIC = 1 << 20  # where dynamic shared memory begins; static arrays follow in the same steps

COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
ENTRY = re.compile(r"^(?:\.visible |\.weak )?\.entry (\S+?)\((.*?)\)(.*?)^\{(.*?)^\}", re.M | re.S)
FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', re.M)
PARAMETER = re.compile(r"\.param (?:\.align \d+ )?\.[a-z](\d+) (\S+?)(?:\[(\d+)\])?$")
BOUND = re.compile(r"\.maxntid (\d+)(?:, (\d+), (\d+))?")
SHARED = re.compile(r"\.shared \.align \d+ \.b8 ([\w$]+)\[(\d*)\];")
# A label, a directive or an instruction; braces around statements only open a scope.
STATEMENT = re.compile(r"\s*(?:([$\w]+):|(\.[^;\n]*(?:;|\n|$))|((?:\{[^{};]*\}|[^;{}])+);|[{}])")
REGISTER = re.compile(r"\.reg \.\w+\s+(%\w+?)(<\d+>)?\s*;")
GUARD = re.compile(r"@(!?)(%\w+)\s+")
ADDRESS = re.compile(r"\[\s*([%$\w.]+?)\s*((?:\+\s*-?\d+)*)\s*\]")
LOCATION = re.compile(r"\.loc\s+(\d+) (\d+)")


class PtxError(ValueError):
    """PTX in a form that is not known; the message quotes it."""


@dataclass
class Instruction:
    """One instruction: what it is called, its slots, and the offset of an address or a target."""

    name: str
    slots: list[int]
    offset: int = 0
    guard: int = -1  # slot of the predicate
    negated: bool = False
    file: str = ""
    line: int = 0


@dataclass
class Program:
    """One kernel."""

    name: str
    parameters: list[int]  # bytes of each
    max_threads: int
    shared: list[tuple[str, int]]  # static arrays: name, bytes
    constants: list[tuple[int, int]] = field(default_factory=list)  # slot, bits
    slots: int = 0
    code: list[Instruction] = field(default_factory=list)


def constant(text: str) -> int | None:
    """Return the bits of a literal, None if ``text`` is none.

    Example:
        >>> hex(constant("0f3F800000")), constant("-1") == 2**64 - 1
        ('0x3f800000', True)
    """
    if re.fullmatch(r"0[fF][0-9A-Fa-f]{8}|0[dD][0-9A-Fa-f]{16}", text):
        return int(text[2:], 16)
    if re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?", text):
        return int(text.rstrip("U"), 0) & (2**64 - 1)
    return None


def elements(text: str) -> list[str]:
    """Split operands at commas outside of brackets.

    Example:
        >>> elements("{%f1, %f2}, [%rd1+8]")
        ['{%f1, %f2}', '[%rd1+8]']
    """
    return [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", text) if part.strip()]


class Reader:
    """Reads the body of one kernel."""

    def __init__(self, program: Program, symbols: dict[str, int], parameters: list[str]) -> None:
        self.program = program
        self.slots = {name: slot for slot, name in enumerate((*SPECIAL, *parameters))}
        self.symbols = symbols
        self.constants: dict[int, int] = {}
        self.labels: dict[str, int] = {}
        self.prefixes: set[str] = set()  # of the kernel's registers
        self.scopes: list[dict[str, str]] = []  # registers that inline assembly declares anew

    def declare(self, directive: str) -> None:
        """Open or close a scope, or note the registers that one declares."""
        if directive == "{":
            self.scopes.append({})
        elif directive == "}":
            self.scopes.pop()
        elif declared := REGISTER.fullmatch(directive):
            name, numbered = declared[1], declared[2] is not None
            if numbered and not self.scopes:
                self.prefixes.add(name)
            elif self.scopes and not numbered:
                self.scopes[-1][name] = f"{name}@{len(self.slots)}"
            else:
                raise PtxError(f"declaration {directive!r} in {self.program.name}")

    def new_slot(self, key: str) -> int:
        """Return the slot called ``key``."""
        return self.slots.setdefault(key, len(self.slots))

    def constant_slot(self, bits: int) -> int:
        """Return a slot that holds ``bits``."""
        if bits not in self.constants:
            self.constants[bits] = self.new_slot(f"#{bits}")
        return self.constants[bits]

    def slot(self, operand: str) -> int:
        """Return the slot of a register, symbol or literal."""
        for scope in reversed(self.scopes):
            if operand in scope:
                return self.new_slot(scope[operand])
        if operand in self.slots:
            return self.slots[operand]
        if operand in self.symbols:
            return self.constant_slot(self.symbols[operand])
        bits = constant(operand)
        if bits is not None:
            return self.constant_slot(bits)
        if operand.rstrip("0123456789") in self.prefixes:
            return self.new_slot(operand)
        raise PtxError(f"operand {operand!r} in {self.program.name}")

    def instruction(self, text: str) -> Instruction:
        """Read one instruction; targets of branches stay names in ``labels`` until the end."""
        result = Instruction("", [])
        if guard := GUARD.match(text):
            result.negated, result.guard = guard[1] == "!", self.slot(guard[2])
            text = text[guard.end() :]
        result.name, _, rest = text.partition(" ") if " " in text else (text, "", "")
        operands = elements(rest)
        if result.name.startswith("bra"):
            result.name = "bra"
            result.offset = self.labels.setdefault(operands[0], len(self.labels))
            return result
        if result.name.startswith("mov.b") and "{" in rest:
            packs = operands[1].startswith("{")
            wide = int(result.name[5:])
            parts = operands[1 if packs else 0].count(",") + 1
            result.name = f"mov.{'pack' if packs else 'unpack'}.b{wide // parts}"
        if result.name.startswith("shfl.") and "|" not in operands[0]:
            operands[0] += "|_"
        for operand in operands:
            if address := ADDRESS.fullmatch(operand):
                result.slots.append(self.slot(address[1]))
                result.offset = sum(int(n) for n in re.findall(r"-?\d+", address[2]))
            elif operand.startswith("{"):
                result.slots += [self.slot(part) for part in elements(operand[1:-1])]
            else:
                result.slots += [self.slot(part) for part in operand.split("|")]
        return result

    def read(self, body: str, files: dict[str, str]) -> None:
        """Fill the program."""
        positions: dict[str, int] = {}
        place = ("ptx", 0)
        for label, directive, text in statements(body):
            if label:
                positions[label] = len(self.program.code)
            elif directive:
                self.declare(directive)
                if location := LOCATION.match(directive):
                    place = (files.get(location[1], "ptx"), int(location[2]))
            elif text:
                instruction = self.instruction(" ".join(text.split()))
                instruction.file, instruction.line = place
                self.program.code.append(instruction)
        targets = {number: name for name, number in self.labels.items()}
        for instruction in self.program.code:
            if instruction.name == "bra":
                instruction.offset = positions[targets[instruction.offset]]
        self.program.constants = [(slot, bits) for bits, slot in self.constants.items()]
        self.program.slots = len(self.slots)


def statements(body: str) -> Iterator[tuple[str, str, str]]:
    """Yield label, directive and instruction; two of them are empty."""
    at = 0
    while at < len(body.rstrip()):
        match = STATEMENT.match(body, at)
        if match is None:
            raise PtxError(f"statement {body[at : at + 60]!r}")
        at = match.end()
        brace = match[0].strip() if match[0].strip() in ("{", "}") else ""
        yield match[1] or "", match[2] or brace, (match[3] or "").strip()


def parse(text: str) -> list[Program]:
    """Return the kernels of a PTX file."""
    text = COMMENT.sub("", text)
    files = {number: Path(name).name for number, name in FILE.findall(text)}
    outside = ENTRY.sub("", text)
    programs = []
    for name, parameters, directives, body in ENTRY.findall(text):
        found = [PARAMETER.search(part.strip()) for part in elements(parameters)]
        if None in found:
            raise PtxError(f"parameters {parameters!r} of {name}")
        sizes = [SIZES[m[1]] * int(m[3] or 1) for m in found if m is not None]
        shared = [(n, int(size)) for n, size in SHARED.findall(body) if size]
        # Arrays of device functions are declared outside.
        shared += [(n, int(size)) for n, size in SHARED.findall(outside) if size and n in body]
        symbols = {n: DYNAMIC for n, size in SHARED.findall(outside) if not size}
        symbols |= {n: DYNAMIC * (2 + i) for i, (n, _) in enumerate(shared)}
        bound = BOUND.search(directives)
        threads = 1024
        if bound is not None:
            threads = int(bound[1]) * int(bound[2] or 1) * int(bound[3] or 1)
        program = Program(name, sizes, threads, shared)
        Reader(program, symbols, [m[2] for m in found if m is not None]).read(body, files)
        programs.append(program)
    return programs
