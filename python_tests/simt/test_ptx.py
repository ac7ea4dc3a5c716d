"""The interpreter of PTX: right kernels run right, each planted mistake is caught.

The programs are those of ``small.ptx``, so no nvcc is needed.  What nvcc makes of the kernels of
this project is run by ``make ptx``: the other tests of this folder, over its code.
"""

import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parent
SEEDS = range(6)


@pytest.fixture(scope="module")
def ptx(ptx_build: ModuleType) -> ModuleType:
    """The module without kernels of nvcc, and the programs of ``small.ptx``."""
    module = ptx_build.load(None)
    module.load(programs(ptx_build, (FOLDER / "small.ptx").read_text(encoding="utf-8")))
    return module


def programs(build: ModuleType, text: str) -> list[Any]:
    return [build.astuple(program) for program in build.parser.parse(text)]


def caught(ptx: ModuleType, message: str) -> Any:
    return pytest.raises(ptx.SimtError, match=message)


def int32(value: int) -> bytes:
    return struct.pack("i", value)


# --- right kernels -------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 100, 300])
def test_a_loop_over_the_grid(ptx: ModuleType, n: int) -> None:
    x, y = (np.random.default_rng(k).standard_normal(300).astype(np.float32) for k in range(2))
    before = y.copy()
    ptx.launch("axpy", (3, 1, 1), (32, 1, 1), 0, [x, y, struct.pack("f", 0.5), int32(n)])
    exact = before.astype(np.float64) + 0.5 * x  # a fused product is rounded once
    np.testing.assert_array_equal(y[:n], exact.astype(np.float32)[:n])
    np.testing.assert_array_equal(y[n:], before[n:])


@pytest.mark.parametrize("seed", SEEDS)
def test_shared_memory(ptx: ModuleType, seed: int) -> None:
    x = np.arange(128, dtype=np.float32)
    out = np.zeros_like(x)
    ptx.launch("reverse", (1, 1, 1), (64, 1, 1), 256, [x, out], unwritten=[1], seed=seed)
    np.testing.assert_array_equal(out.reshape(64, 2), x.reshape(64, 2)[::-1])


@pytest.mark.parametrize("threshold", [False, True])
def test_shuffles_votes_and_atomics(ptx: ModuleType, threshold: bool) -> None:
    x = np.linspace(0.0, 6.0 if threshold else 4.0, 96)
    total, any_large = np.zeros(1), np.zeros(1, np.int32)
    ptx.launch("collectives", (1, 1, 1), (96, 1, 1), 0, [x, total, any_large], unwritten=[2])
    np.testing.assert_allclose(total, x.sum(), rtol=1e-14)
    assert any_large[0] == int(threshold)


def test_ballots(ptx: ModuleType) -> None:
    x = np.random.default_rng(0).standard_normal(96).astype(np.float32)
    out = np.zeros(96, np.uint32)
    ptx.launch("ballots", (1, 1, 1), (96, 1, 1), 0, [x, out], unwritten=[1])
    bits = ((x > 0).reshape(3, 32) << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32)
    np.testing.assert_array_equal(out, np.repeat(bits, 32))


def test_half_types_round_to_nearest_even(ptx: ModuleType) -> None:
    x = np.random.default_rng(0).standard_normal(64).astype(np.float32) * 100
    x[:6] = [1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8, np.inf, 1e6]
    out = np.zeros((64, 2), np.float32)
    ptx.launch("halves", (1, 1, 1), (64, 1, 1), 0, [x, out], unwritten=[1])
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(out[:, 0], x.astype(np.float16).astype(np.float32))
    bits = x.view(np.uint32)
    nearest = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    np.testing.assert_array_equal(out[:, 1], nearest)


def test_what_accesses_cost(ptx: ModuleType) -> None:
    x = np.zeros(256, np.float32)
    ptx.count(True)
    ptx.launch("reverse", (1, 1, 1), (64, 1, 1), 256, [x[:128], x[128:]], unwritten=[1])
    ptx.count(False)
    (row,) = ptx.take_counts()
    assert (row["blocks"], row["threads"], row["barriers"]) == (1, 64, 1)
    # 512 bytes read and as many written; two warps store two rows and load them, without conflict.
    assert row["sectors"] == row["least_sectors"] == 2 * 512 / 32
    assert row["wavefronts"] == row["least_wavefronts"] == 2 * 4


# --- planted mistakes ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_missing_barrier(ptx: ModuleType, seed: int) -> None:
    with caught(ptx, r"data race: row\[\d+\]|uninitialised: row\[\d+\]"):
        ptx.launch("race", (1, 1, 1), (64, 1, 1), 0, [np.zeros(64, np.float32)], seed=seed)


def test_read_only_load_of_what_the_launch_wrote(ptx: ModuleType) -> None:
    with caught(ptx, r"alias: argument 0\[\d+\] is read .*and was written"):
        ptx.launch("read_only", (1, 1, 1), (32, 1, 1), 0, [np.zeros(32, np.float32)])


def test_out_of_bounds(ptx: ModuleType) -> None:
    x, out = np.zeros(32, np.float32), np.zeros(33, np.float32)
    ptx.launch("shifted", (1, 1, 1), (32, 1, 1), 0, [x, out])
    with caught(ptx, "out of bounds: "):
        ptx.launch("shifted", (1, 1, 1), (32, 1, 1), 0, [x, out[:32]])


def test_uninitialised(ptx: ModuleType) -> None:
    x, out = np.zeros(32, np.float32), np.zeros(33, np.float32)
    with caught(ptx, r"uninitialised: argument 0\[\d+\] is read"):
        ptx.launch("shifted", (1, 1, 1), (32, 1, 1), 0, [x, out], unwritten=[0])


def test_more_threads_than_the_kernel_was_compiled_for(ptx: ModuleType) -> None:
    x = np.zeros(4, np.float32)
    with caught(ptx, r"128 x 1 x 1 threads, \.maxntid allows 64"):
        ptx.launch("axpy", (1, 1, 1), (128, 1, 1), 0, [x, x, struct.pack("f", 0), int32(4)])


# --- what is not known stops ---------------------------------------------------------------------

KERNEL = """
.visible .entry one(
	.param .u64 one_param_0
)
{
	.reg .b32 	%r<3>;

	%s
	ret;
}
"""


def test_an_unknown_instruction_is_named(ptx_build: ModuleType, ptx: ModuleType) -> None:
    text = KERNEL.replace("%s", "mma.sync.aligned.m8n8k4.row.col.f64 \t%r1, %r2;")
    with pytest.raises(ValueError, match=r"unknown PTX instruction mma\.sync\S+ in one"):
        ptx.load(programs(ptx_build, text))


@pytest.mark.parametrize(
    "line",
    ["mov.u32 \t%r1, %clock;", "mov.u32 \t%r1, nowhere;", "mov.u32 \t%r1, 0b11;"],
)
def test_an_unknown_operand_is_named(ptx_build: ModuleType, line: str) -> None:
    with pytest.raises(ValueError, match=r"^operand "):
        ptx_build.parser.parse(KERNEL.replace("%s", line))
