"""What is installed, what was built for what, what is wrong, and the command that mends it."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType

import torch

from immunize_ext import _load
from immunize_ext._version import __version__

EXTRAS = MappingProxyType(
    {
        "data": ("scikit-learn", "pandas"),
        "diffusion": ("diffusers", "transformers", "peft", "accelerate", "safetensors"),
        "report": ("jinja2", "matplotlib", "rich"),
    }
)


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: What was looked at.
        text: What was found.
        fix: What to do about it; the empty string if nothing is wrong.
    """

    subject: str
    text: str
    fix: str = ""

    @property
    def ok(self) -> bool:
        """True if there is nothing to do."""
        return not self.fix


@dataclass(frozen=True)
class Diagnosis:
    """All findings, in the order of the report."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """True if there is nothing to do."""
        return all(finding.ok for finding in self.findings)


def diagnose() -> Diagnosis:
    """Look at the installation.

    Loads the compiled part and, where torch sees a GPU, asks for its compute capability.  Runs the
    compilers with ``--version``; changes nothing.

    Returns:
        The findings; ``diagnose().ok`` tells whether something is wrong.

    Example:
        >>> [finding.subject for finding in diagnose().findings][:3]
        ['immunize_ext', 'python', 'torch']
    """
    return Diagnosis(
        (
            Finding("immunize_ext", __version__),
            Finding("python", f"{platform.python_version()} on {platform.platform()}"),
            _torch(),
            *(_package(name) for name in ("numpy", "scipy", "jsonargparse", "docstring-parser")),
            *_compiled(),
            *_gpus(),
            *_tools(),
            *(_extra(name) for name in EXTRAS),
        )
    )


def doctor_report() -> str:
    """Return the findings as text, with what is wrong and the remedy at the end.

    Returns:
        One line for each finding, and at the end a numbered list of what to do, or the statement
        that nothing is wrong.

    Example:
        >>> print(doctor_report().splitlines()[0].split()[0])
        immunize_ext
    """
    diagnosis = diagnose()
    width = max(len(finding.subject) for finding in diagnosis.findings)
    lines = [
        f"{finding.subject:<{width}}  {'' if finding.ok else 'PROBLEM: '}{finding.text}"
        for finding in diagnosis.findings
    ]
    problems = [finding for finding in diagnosis.findings if not finding.ok]
    lines.append("")
    if not problems:
        lines.append("Nothing is wrong.")
    else:
        lines.append("What to do:")
        for number, finding in enumerate(problems, 1):
            lines.append(f"  {number}. {finding.subject.strip()}: {finding.fix}")
    return "\n".join(lines)


def _torch() -> Finding:
    cuda = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
    return Finding("torch", f"{torch.__version__}, built {cuda}, {threads}")


def _package(name: str) -> Finding:
    try:
        return Finding(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", f"pip install {name}")


def _compiled() -> Iterator[Finding]:
    outcome = _load.status()
    record = outcome.built_for
    if not outcome.loaded:
        disabled = os.environ.get("IMMUNIZE_EXT_DISABLE", "0") not in ("", "0")
        fix = "unset IMMUNIZE_EXT_DISABLE" if disabled else _load.build_command()
        yield Finding("compiled operators", f"not loaded: {outcome.reason}", fix)
        cause = outcome.error
        while cause is not None:
            yield Finding("  raised", f"{type(cause).__name__}: {cause}")
            cause = cause.__cause__
        if record is not None and record.get("compiled"):
            yield Finding("  built for", _built_for(record))
        return

    from immunize_ext import _C

    info = _C.build_info()
    yield Finding("compiled operators", f"loaded, {_built_for(info)}, by {info['compiler']}")
    yield Finding("  CPU kernels", f"{_C.instructions()} (IMMUNIZE_EXT_INSTRUCTIONS)")
    assert record is not None  # loading needs it
    differ = [key for key in ("package", "torch") if record.get(key) != info[key]]
    if differ:
        yield Finding(
            "  build record",
            "; ".join(f"{key} {record.get(key)} recorded, {info[key]} compiled" for key in differ),
            _load.build_command(),
        )
    if info["package"] != __version__:
        yield Finding(
            "  version",
            f"the binary is of immunize_ext {info['package']}, the Python code of {__version__}",
            _load.build_command(),
        )
    if not info["parallel"]:
        yield Finding(
            "  threads",
            "compiled without OpenMP: every operator runs on one thread",
            f"use a compiler with OpenMP, then {_load.build_command()}",
        )


def _built_for(facts: dict[str, object]) -> str:
    cuda = "CPU only"
    if facts["cuda"]:
        architectures = facts["cuda_arch_list"]
        assert isinstance(architectures, list)
        cuda = f"CUDA {facts['cuda']} for {', '.join(architectures)}"
    return f"torch {facts['torch']}, Python {facts['python']}, {cuda}"


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding("GPU", "torch sees none")
        return
    record = _load.status().built_for or {}
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        capability = torch.cuda.get_device_capability(index)
        text = f"{name}, compute capability {capability[0]}.{capability[1]}"
        fix = ""
        if not record.get("cuda"):
            text += "; the compiled operators are for the CPU, so here the torch-only ones run"
        elif not runs_on(capability, record["cuda_arch_list"]):
            text += f"; the compiled operators are for {', '.join(record['cuda_arch_list'])}"
            architecture = f"{capability[0]}.{capability[1]}+PTX"
            fix = f"TORCH_CUDA_ARCH_LIST={architecture} IMMUNIZE_EXT_CUDA=1 {_load.build_command()}"
        yield Finding(f"GPU {index}", text, fix)


def runs_on(capability: tuple[int, int], arch_list: list[str]) -> bool:
    """Tell whether code for ``arch_list`` runs on a GPU of this compute capability.

    Machine code runs within its major version, from its minor version on; PTX runs on every
    later GPU.

    Args:
        capability: Compute capability, as ``torch.cuda.get_device_capability`` returns it.
        arch_list: Entries of ``TORCH_CUDA_ARCH_LIST``, e.g. ``["8.0", "9.0+PTX"]``.

    Returns:
        True if one of the entries does.

    Example:
        >>> runs_on((8, 6), ["8.0", "9.0+PTX"]), runs_on((12, 0), ["8.0", "9.0+PTX"])
        (True, True)
        >>> runs_on((7, 5), ["8.0", "9.0+PTX"]), runs_on((12, 0), ["8.0", "9.0"])
        (False, False)
    """
    for entry in arch_list:
        match = re.match(r"(\d+)\.(\d+)[af]?(\+PTX)?$", entry)
        if match is None:
            continue
        built = (int(match.group(1)), int(match.group(2)))
        if built[0] == capability[0] and built <= capability:
            return True
        if match.group(3) and built <= capability:
            return True
    return False


def _tools() -> Iterator[Finding]:
    compiler = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0]
    found = _version_line(compiler)
    if found:
        yield Finding("C++ compiler", found)
    else:
        missing = "" if _load.available() else "install a C++20 compiler, e.g. apt-get install g++"
        yield Finding("C++ compiler", f"{compiler} not found", missing)
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = os.path.join(home, "bin", "nvcc") if home else "nvcc"
    yield Finding("nvcc", _version_line(nvcc, pattern=r"release \d+\.\d+.*") or "not found")
    yield Finding("ninja", _version_line("ninja") or "not found; builds take longer without it")


def _version_line(tool: str, pattern: str = r".+") -> str:
    """Return the path of the tool and the first line of its version that matches; else ''."""
    path = shutil.which(tool)
    if path is None:
        return ""
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    match = re.search(pattern, done.stdout)
    return f"{match.group(0).strip()} ({path})" if match else path


def _extra(name: str) -> Finding:
    versions, missing = [], []
    for package in EXTRAS[name]:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    text = ", ".join(versions) or "nothing installed"
    if missing:
        text += f"; missing {', '.join(missing)}: pip install 'immunize_ext[{name}]'"
    return Finding(f"extra [{name}]", text)
