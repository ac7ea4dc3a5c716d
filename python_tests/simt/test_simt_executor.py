"""The executor runs right kernels right, under every schedule, and catches each planted mistake."""

import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

FOLDER = Path(__file__).resolve().parents[2] / "csrc" / "simt"
SEEDS = range(12)
PROFILE = settings(max_examples=20, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def kernels(simt: ModuleType) -> Any:
    return simt.selftest


def caught(simt: ModuleType, message: str) -> Any:
    return pytest.raises(simt.SimtError, match=message)


def assert_names_line(error: BaseException, source: str) -> None:
    """The message names a line of selftest.cuh, and that line contains ``source``."""
    if shutil.which("addr2line") is None:
        return
    lines = (FOLDER / "selftest.cuh").read_text(encoding="utf-8").splitlines()
    named = [int(number) for number in re.findall(r"selftest\.cuh:(\d+)", str(error))]
    assert any(source in lines[number - 1] for number in named), str(error)


# --- right kernels -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@PROFILE
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 300),
    warps=st.sampled_from([1, 2, 3, 7, 32]),
    seed=st.integers(0, 2**64 - 1),
)
def test_block_reduction_equals_numpy(
    kernels: Any, dtype: Any, rows: int, columns: int, warps: int, seed: int
) -> None:
    x = np.random.default_rng(columns).standard_normal((rows, columns)).astype(dtype)
    out = kernels.row_sum(x, threads=32 * warps, seed=seed)
    assert out.dtype == dtype
    eps = np.finfo(dtype).eps
    np.testing.assert_array_less(
        np.abs(out - x.astype(np.float64).sum(axis=1)),
        columns * eps * np.abs(x).sum(axis=1) + np.finfo(dtype).tiny,
    )
    # The order of additions is fixed by the kernel, so every schedule gives the same bits.
    np.testing.assert_array_equal(out, kernels.row_sum(x, threads=32 * warps, seed=0))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (7, 9), (33, 20), (1, 40)])
def test_transpose_equals_numpy(kernels: Any, dtype: Any, shape: tuple[int, int]) -> None:
    x = np.arange(np.prod(shape), dtype=dtype).reshape(shape)
    for seed in SEEDS:
        np.testing.assert_array_equal(kernels.transpose(x, seed=seed), x.T)


@pytest.mark.parametrize("seed", SEEDS)
def test_collectives_equal_their_definition(kernels: Any, seed: int) -> None:
    x = np.random.default_rng(seed).integers(0, 10, 96, dtype=np.int32)
    vote = (x > 5).reshape(3, 32)
    warps = x.reshape(3, 32)
    lane = np.arange(32)
    per_warp = [
        vote @ (1 << lane.astype(np.uint64)).astype(np.uint32),
        vote.any(axis=1),
        vote.all(axis=1),
    ]
    expected = [
        np.full(96, vote.any()),
        np.full(96, vote.all()),
        np.full(96, vote.sum()),
        *(np.repeat(value.astype(np.uint32).view(np.int32), 32) for value in per_warp),
        warps[:, lane // 8 * 8 + 3].ravel(),
        warps[:, np.where(lane % 16 >= 2, lane - 2, lane)].ravel(),
        warps[:, np.where(lane + 5 < 32, lane + 5, lane)].ravel(),
        warps[:, lane ^ 17].ravel(),
    ]
    out = kernels.collectives(x, seed=seed)
    for k, row in enumerate(expected):
        np.testing.assert_array_equal(out[k], row, err_msg=f"row {k}")


def test_syncwarp_orders_a_warp(kernels: Any) -> None:
    x = np.arange(96, dtype=np.float32)
    for seed in SEEDS:
        out = kernels.reverse_warp(x, seed=seed)
        np.testing.assert_array_equal(out[0], x.reshape(3, 32)[:, ::-1].ravel())


def test_last_block_pattern(kernels: Any) -> None:
    x = np.random.default_rng(0).standard_normal(32 * 9).astype(np.float32)
    results = {kernels.last_block_sum(x, seed=seed) for seed in SEEDS}
    assert len(results) == 1
    np.testing.assert_allclose(results.pop(), x.sum(dtype=np.float64), rtol=1e-5)


def test_integer_atomics_do_not_depend_on_the_order(kernels: Any) -> None:
    x = np.random.default_rng(0).integers(0, 7, 500, dtype=np.int32)
    for seed in SEEDS:
        counts, largest = kernels.histogram(x, 10, seed=seed)
        np.testing.assert_array_equal(counts, np.bincount(x, minlength=10))
        assert largest == x.max()


def test_packs(kernels: Any) -> None:
    x = np.arange(132, dtype=np.float32)
    np.testing.assert_array_equal(kernels.scale_packs(x, 2.0), 2 * x)
    # 4 elements of shift are 16 bytes: aligned again.
    np.testing.assert_array_equal(kernels.scale_packs(x, 2.0, shift=4), 2 * x)


# --- planted mistakes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "message", "line"),
    [
        ("missing_barrier", r"data race: row\[\d+\]|uninitialised: row\[\d+\]", "row["),
        ("missing_syncwarp", r"data race: row\[\d+\]|uninitialised: row\[\d+\]", "row["),
        ("missing_second_barrier", r"data race: row\[\d+\] is .* with no barrier between", "row["),
        ("uninitialised_global", r"uninitialised: out\[\d+\] is read", "out[threadIdx.x] +="),
        ("uninitialised_shared", r"thread \(5, 0, 0\): uninitialised: row\[5\]", "= row["),
        ("out_of_bounds_read", r"thread \(0, 0, 0\): out of bounds: x\[-1\] of 64", "- 1]"),
    ],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_mistake_of_a_kernel_with_input(
    simt: ModuleType, kernels: Any, kernel: str, message: str, line: str, seed: int
) -> None:
    x = np.arange(64, dtype=np.float32)
    with caught(simt, message) as info:
        getattr(kernels, kernel)(x, seed=seed)
    assert re.match(r"\w+(<\w+>)?, block \(0, 0, 0\), thread \(\d+, 0, 0\): ", str(info.value))
    assert_names_line(info.value, line)


@pytest.mark.parametrize("seed", SEEDS)
def test_divergent_barrier(simt: ModuleType, kernels: Any, seed: int) -> None:
    with caught(
        simt,
        r"divergent barrier: .*threads 0-31 wait at __syncthreads \(selftest.cuh:\d+\); "
        r"threads 32-63 wait at __syncthreads \(selftest.cuh:\d+\)",
    ):
        kernels.divergent_barrier(64, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_barrier_after_exit(simt: ModuleType, kernels: Any, seed: int) -> None:
    with caught(simt, r"divergent barrier: .*threads 50-63 exited; threads 0-49 wait at"):
        kernels.barrier_after_exit(64, 50, seed=seed)
    kernels.barrier_after_exit(64, 64, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_divergent_shuffle(simt: ModuleType, kernels: Any, seed: int) -> None:
    with caught(simt, r"threads 0-15,32-47 wait at a warp shuffle .* with mask 0xffffffff"):
        kernels.divergent_shuffle(64, seed=seed)


def test_shuffle_from_absent_lane(simt: ModuleType, kernels: Any) -> None:
    with caught(simt, r"the shuffle at selftest.cuh:\d+ reads lane \d+, which does not take part"):
        kernels.shuffle_from_absent_lane(7)
    np.testing.assert_array_equal(kernels.shuffle_from_absent_lane(32), np.full(32, 32.0))


def test_out_of_bounds_write(simt: ModuleType, kernels: Any) -> None:
    for seed in SEEDS:
        with caught(simt, r"thread \(63, 0, 0\): out of bounds: out\[64\] of 64") as info:
            kernels.out_of_bounds_write(64, seed=seed)
        assert_names_line(info.value, "out[threadIdx.x + 1] = 1;")


def test_out_of_bounds_atomic(simt: ModuleType, kernels: Any) -> None:
    with caught(simt, r"out of bounds: counts\[3\] of 3") as info:
        kernels.histogram(np.array([0, 1, 3], dtype=np.int32), 3)
    assert_names_line(info.value, "atomicAdd(counts + bin, 1)")


def test_misaligned_pack(simt: ModuleType, kernels: Any) -> None:
    with caught(simt, r"misaligned: x\[\d+\] is not aligned to 16 bytes") as info:
        kernels.scale_packs(np.arange(64, dtype=np.float32), 2.0, shift=1)
    assert_names_line(info.value, "load_pack<4>")


def test_unwritten_output(simt: ModuleType, kernels: Any) -> None:
    with caught(simt, r"no kernel wrote out\[3\] of 64 elements"):
        kernels.unwritten_output(64)


def test_race_between_blocks(simt: ModuleType, kernels: Any) -> None:
    blocks = set()
    for seed in SEEDS:
        with caught(simt, r"data race: out\[0\] is written .* by another block's thread") as info:
            kernels.race_between_blocks(3, seed=seed)
        blocks.add(str(info.value).split("thread")[0])
    assert len(blocks) == 3  # each of them came second for some seed
    assert kernels.race_between_blocks(1) == 0


def test_maximum_across_blocks_without_an_atomic(simt: ModuleType, kernels: Any) -> None:
    x = np.array([3, 1, 4, 1, 5], dtype=np.int32)
    for seed in SEEDS:
        with caught(simt, r"data race: largest\[0\] is .* by another block's thread"):
            kernels.plain_maximum(x, seed=seed)
    assert kernels.plain_maximum(x[:1]) == 3


def test_missing_fence(simt: ModuleType, kernels: Any) -> None:
    x = np.ones(32 * 4, dtype=np.float32)
    for seed in SEEDS:
        with caught(simt, r"partial\[\d\] is read .* with no fence and atomic between"):
            kernels.missing_fence(x, seed=seed)


def test_atomic_beside_plain_access(simt: ModuleType, kernels: Any) -> None:
    for seed in SEEDS:
        with caught(simt, r"data race: out\[0\]"):
            kernels.atomic_and_plain(64, seed=seed)


@pytest.mark.parametrize("n", [32, 256])  # one block: the order of its threads; eight blocks
def test_order_of_float_atomics_shows_between_seeds(kernels: Any, n: int) -> None:
    x = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    results = [kernels.atomic_float_sum(x, seed=seed) for seed in SEEDS]
    assert len(set(results)) > 1
    assert results == [kernels.atomic_float_sum(x, seed=seed) for seed in SEEDS]
    np.testing.assert_allclose(results, x.sum(dtype=np.float64), rtol=1e-4)


def test_local_array_overflow(simt: ModuleType, kernels: Any) -> None:
    x = np.zeros(5, dtype=np.int32)
    assert kernels.local_array_overflow(x, 3) == 0
    with caught(simt, r"index beyond a local array") as info:
        kernels.local_array_overflow(x, 4)
    assert_names_line(info.value, "values[i] = x[i]")


def test_signed_overflow(simt: ModuleType, kernels: Any) -> None:
    assert kernels.index_overflow(1000, 1000) == 10**6
    with caught(simt, r"signed integer overflow \(selftest.cuh:\d+\)"):
        kernels.index_overflow(2**16, 2**15)


@pytest.mark.parametrize("columns", [64, 96])
def test_indices_of_32_bits(simt: ModuleType, kernels: Any, columns: int) -> None:
    rows = 2**26 + 1
    assert kernels.wide_index(rows, columns, 1)
    with caught(simt, r"signed integer overflow \(selftest.cuh:\d+\)"):
        kernels.narrow_index(rows, columns, 1)
    assert not kernels.unsigned_index(rows, columns, 1)  # wraps: the last row stays unwritten
    assert kernels.narrow_index(1000, columns, 1000)
    assert kernels.unsigned_index(1000, columns, 1000)


def test_a_batch_in_the_second_dimension_of_the_grid(simt: ModuleType, kernels: Any) -> None:
    kernels.batch_in_y(65_535, 7, 1)
    with pytest.raises(simt.LaunchError, match=r"grid must be .* got \(7, 65536, 1\)"):
        kernels.batch_in_y(65_536, 7, 0)


def test_const_memory_that_the_launch_writes(simt: ModuleType, kernels: Any) -> None:
    x = np.arange(64, dtype=np.float32)
    with caught(simt, r"alias: both\[\d+\] is read .*and was written") as info:
        kernels.written_before_read(x)
    assert_names_line(info.value, "= x[blockDim.x")
    with caught(simt, r"alias: both\[\d+\] is written .*and was read") as info:
        kernels.read_before_written(x)
    assert_names_line(info.value, "mine[0]")


def test_kernels_that_do_not_end(simt: ModuleType, kernels: Any) -> None:
    with caught(simt, r"no barrier and no end after \d+ accesses; .*\(selftest.cuh:\d+\)") as info:
        kernels.spin(64)
    assert_names_line(info.value, "while (flag[0] == 0)")
    with caught(simt, r"no end after \d+ barriers"):
        kernels.endless_barriers(1)


def test_executor_works_after_an_error(simt: ModuleType, kernels: Any) -> None:
    x = np.arange(64, dtype=np.float32)
    for seed in SEEDS:
        with caught(simt, "divergent barrier"):
            kernels.divergent_barrier(64, seed=seed)
        with caught(simt, "signed integer overflow"):
            kernels.index_overflow(2**16, 2**15)
        np.testing.assert_array_equal(kernels.reverse_warp(x, seed=seed)[0, :32], x[31::-1])


# --- limits of a launch --------------------------------------------------------------------------


def test_dynamic_shared_memory_limits(simt: ModuleType, kernels: Any) -> None:
    static = 4  # the kernel has an array beside it
    kernels.dynamic_shared(227 * 1024 - static)
    with caught(simt, r"shared array one: 4 bytes of static and 232448 of dynamic shared memory"):
        kernels.dynamic_shared(227 * 1024)
    with pytest.raises(simt.LaunchError, match=r"232449 bytes .* the device has 232448"):
        kernels.dynamic_shared(227 * 1024 + 1)
    with pytest.raises(simt.LaunchError, match=r"102400 bytes .* the device has 101376"):
        kernels.dynamic_shared(100 * 1024, device_limit=99 * 1024)
    with caught(simt, r"out of bounds: dynamic shared memory\[0\] of 0 elements"):
        kernels.dynamic_shared(0)


def test_launch_bounds(simt: ModuleType, kernels: Any) -> None:
    kernels.too_many_threads(64)
    with pytest.raises(simt.LaunchError, match=r"more threads than the 64 of __launch_bounds__"):
        kernels.too_many_threads(65)
    kernels.bound_of_a_template(128)
    with pytest.raises(simt.LaunchError, match=r"more threads than the 128 of __launch_bounds__"):
        kernels.bound_of_a_template(160)
    kernels.launch_empty_kernel((1, 1, 1), (1024, 1, 1))  # without bounds


@pytest.mark.parametrize("grid", [(65536, 1, 1), (1, 65535, 1), (1, 1, 65535), (3, 4, 5)])
def test_valid_grid(kernels: Any, grid: tuple[int, int, int]) -> None:
    kernels.launch_empty_kernel(grid, (2, 1, 1))


@pytest.mark.parametrize(
    ("grid", "block", "message"),
    [
        ((0, 1, 1), (1, 1, 1), r"grid must be .* got \(0, 1, 1\)"),
        ((1, 65536, 1), (1, 1, 1), r"grid must be .* got \(1, 65536, 1\)"),
        ((1, 1, 65536), (1, 1, 1), r"grid must be .* got \(1, 1, 65536\)"),
        ((2**31, 1, 1), (1, 1, 1), r"grid must be .* got \(2147483648, 1, 1\)"),
        ((2**31 - 1, 1, 1), (1, 1, 1), r"grid .* is valid, but too large to be run"),
        ((1, 1, 1), (0, 1, 1), r"block must be .* got \(0, 1, 1\)"),
        ((1, 1, 1), (1025, 1, 1), r"block must be .* got \(1025, 1, 1\)"),
        ((1, 1, 1), (1, 1, 65), r"block must be .* got \(1, 1, 65\)"),
        ((1, 1, 1), (32, 32, 2), r"block must have at most 1024 threads, got \(32, 32, 2\)"),
    ],
)
def test_invalid_launch(
    simt: ModuleType, kernels: Any, grid: Any, block: Any, message: str
) -> None:
    with pytest.raises(simt.LaunchError, match="^empty_kernel: " + message):
        kernels.launch_empty_kernel(grid, block)


# --- the build -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("simt")
def test_second_build_compiles_nothing(
    simt_build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def record(command: list[str]) -> str:
        commands.append(command)
        return str(run(command))

    run = simt_build.run
    monkeypatch.setattr(simt_build, "run", record)
    assert simt_build.build().exists()
    assert [command[1:] for command in commands] == [["--version"]]


def test_compiler_error_is_shown(
    simt_build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "broken.cpp").write_text("int f() { return undeclared; }\n", encoding="utf-8")
    monkeypatch.setattr(simt_build, "OUTPUT", tmp_path / "out")
    monkeypatch.setattr(simt_build, "sources", lambda: [tmp_path / "broken.cpp"])
    with pytest.raises(simt_build.BuildError, match=r"broken\.cpp:1.*undeclared"):
        simt_build.build()


@pytest.mark.slow
def test_selftest_compiles_with_nvcc(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    target = str(tmp_path / "selftest.o")
    command = [nvcc, "-std=c++17", "-arch=sm_90", "-c", str(FOLDER / "selftest.cu"), "-o", target]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stderr
