"""The report on kernels, read from what nvcc 13.0 really printed for five small ones."""

import json
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = Path(__file__).with_name("ptxas_output.txt")


@pytest.fixture(scope="module")
def report() -> Any:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "csrc" / "cuda" / "ptxas_report.py")))


@pytest.fixture(scope="module")
def usages(report: Any) -> Any:
    return report.parse(OUTPUT.read_text(encoding="utf-8"))


def find(usages: Any, part: str, arch: str) -> Any:
    (found,) = (usage for usage in usages if part in usage.name and usage.arch == arch)
    return found


def test_every_kernel_and_function_is_found_on_both_architectures(usages: Any) -> None:
    for arch in ("sm_80", "sm_90"):
        names = [usage.name for usage in usages if usage.arch == arch]
        assert names == [
            "_ZN5probe8spillingIdLi24EEEvPKT_PS1_",
            "_ZN5probe5plainEPKfPf",
            "_ZN5probe4sineEPKdPd",
            "__internal_trig_reduction_slowpathd",
            "_ZN5probe7callingEPKdPd",
            "_ZN5probe5outerEPKdi",
        ]


def test_values(report: Any, usages: Any) -> None:
    spilling = find(usages, "spilling", "sm_80")
    assert spilling == report.Usage(
        name=spilling.name,
        arch="sm_80",
        registers=32,
        shared=0,
        stack=2232,
        spill_stores=4112,
        spill_loads=4328,
    )
    plain = find(usages, "plain", "sm_90")
    assert (plain.registers, plain.shared, plain.stack) == (12, 256, 0)
    assert find(usages, "outer", "sm_90").registers is None


def test_complaints(report: Any, usages: Any) -> None:
    sm_90 = [usage for usage in report.demangle(usages) if usage.arch == "sm_90"]
    if shutil.which("c++filt") is None:
        pytest.skip("c++filt is not installed; names stay mangled")
    spills = "probe::spilling<double, 24> (sm_90) spills registers: 4136 bytes stored, 4360 loaded"
    assert report.complaints(sm_90) == [
        "probe::calling (sm_90) has a stack frame of 64 bytes",
        "probe::sine (sm_90) has a stack frame of 40 bytes",
        spills,
    ]
    assert report.complaints(sm_90, allow_stack=r"^probe::(sine|calling)$") == [spills]
    # Spills are never allowed.
    assert report.complaints(sm_90, allow_stack=".*") == [spills]


@pytest.mark.parametrize(
    ("signature", "name"),
    [
        ("void ns::sum<float, (int)4>(float const*, float*)", "ns::sum<float, 4>"),
        ("ns::plain(float const*, float*)", "ns::plain"),
        (
            "void ns::f<ns::Pack<double, 2>, (bool)1>(ns::Pack<double, 2>*)",
            "ns::f<ns::Pack<double, 2>, 1>",
        ),
        ("void ns::(anonymous namespace)::g<int>(int)", "ns::g<int>"),
        ("__internal_trig_reduction_slowpathd", "__internal_trig_reduction_slowpathd"),
    ],
)
def test_short_name(report: Any, signature: str, name: str) -> None:
    assert report.short_name(signature) == name


def test_command_line(report: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = ["--json", str(tmp_path / "a" / "u.json"), "--markdown", str(tmp_path / "u.md")]
    assert report.main(["read", str(OUTPUT), *outputs]) == 1
    printed = capsys.readouterr()
    assert "spills registers" in printed.err
    assert (tmp_path / "u.md").read_text(encoding="utf-8") == printed.out
    rows = json.loads((tmp_path / "a" / "u.json").read_text(encoding="utf-8"))
    assert len(rows) == 12
    assert printed.out.count("\n") == 2 + len(rows)

    kept = [line for line in OUTPUT.read_text(encoding="utf-8").splitlines() if "gmem" in line]
    (tmp_path / "empty.txt").write_text("\n".join(kept), encoding="utf-8")
    assert report.main(["read", str(tmp_path / "empty.txt")]) == 2


@pytest.mark.slow
def test_selftest_kernels_neither_spill_nor_need_a_stack(
    report: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    source = str(ROOT / "csrc" / "simt" / "selftest.cu")
    command = ["compile", source, "--arch", "sm_90"]
    assert report.main([*command, "--allow-stack", "local_array_overflow$"]) == 0
    assert "immunize_ext::selftest::row_sum<double>` | sm_90" in capsys.readouterr().out
    # That one indexes a local array by a variable: it must be seen.
    assert report.main(command) == 1
    assert "local_array_overflow (sm_90) has a stack frame" in capsys.readouterr().err


def test_architectures_in_a_library() -> None:
    script = ROOT / ".ci" / "cuda_build.py"
    if not script.exists():
        pytest.skip("a source package has no .ci folder")
    build = runpy.run_path(str(script))
    listing = (
        "ELF file    1: _C.cpython-311-x86_64-linux-gnu.1.sm_80.cubin\n"
        "ELF file    2: _C.cpython-311-x86_64-linux-gnu.2.sm_90.cubin\n"
        "ELF file    3: _C.cpython-311-x86_64-linux-gnu.3.sm_100.cubin\n"
        "ELF file    4: _C.cpython-311-x86_64-linux-gnu.4.sm_120.cubin\n"
        "PTX file    1: _C.cpython-311-x86_64-linux-gnu.1.sm_90.ptx\n"
    )
    assert build["embedded_code"](listing) == build["EXPECTED_CODE"]
    assert build["embedded_code"](listing.splitlines()[0]) == {"sm_80"}
