"""Memory of a merge: no float32 copy of half weights, outputs that stand on their own."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from immunize_ext.ops import RegularizationFactor, merge_kv
from immunize_ext.ops.operators import has_kernel

D, ROWS = 512, 2048  # 2 MiB a matrix of bfloat16

# Resident memory of one merge, with and without backward, in a process of its own. The mark is
# reset after the inputs are there; a first small merge has loaded whatever is loaded once.
MEASURE = """
import ctypes, gc, json, sys
from pathlib import Path
import torch
from immunize_ext.memory import empty_cache
from immunize_ext.ops import RegularizationFactor, merge_kv

torch.set_num_threads(1)
dtype, backward = getattr(torch, sys.argv[1]), sys.argv[2] == "backward"
layers, rows, d = 16, int(sys.argv[3]), int(sys.argv[4])

def status(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024

def weights(value, count, height=rows):
    return [torch.full((height, d), value, dtype=dtype) for _ in range(count)]

def step(base, adapted):
    for w in [*base, *adapted]:
        w.requires_grad_(backward)
    merged = merge_kv(base, [adapted], [token], factor)
    if backward:
        return merged, torch.autograd.grad(merged, [*base, *adapted], upstream[: len(base)])
    return merged

generator = torch.Generator().manual_seed(0)
token = torch.randn(3, d, generator=generator)
factor = RegularizationFactor.identity(d)
upstream = weights(1.0, layers)
step(weights(1.0, 1), weights(2.0, 1))
base, adapted = weights(1.0, layers), weights(1.5, layers)
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
result = step(base, adapted)
peak = status("VmHWM") - before
del result
gc.collect()
empty_cache()
ctypes.CDLL(None).malloc_trim(0)
print(json.dumps({"peak": peak, "kept": status("VmRSS") - before}))
"""


def measure(dtype: str, mode: str) -> dict[str, int]:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux: the peak of the resident memory is reset through /proc")
    if not has_kernel("merge_apply", "cpu"):
        pytest.skip("the torch-only route widens one layer at a time")
    command = [sys.executable, "-c", MEASURE, dtype, mode, str(ROWS), str(D)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("mode", "outputs"), [("forward", 1), ("backward", 3)])
def test_half_weights_are_never_widened_as_a_whole(dtype: str, mode: str, outputs: int) -> None:
    """The peak is that of the outputs: 32 MiB each of merged weights, dW0 and dW_1.

    A float32 copy of the model would be 64 MiB more. Allowed beside the outputs: the residuals
    (3 float32 a row), scratch of one thread (four blocks), and 6 MiB of pages and graph.
    """
    model = 16 * ROWS * D * 2
    found = measure(dtype, mode)
    residual = 16 * ROWS * 3 * 4
    assert found["peak"] >= 0.9 * outputs * model, "the measurement sees the outputs"
    assert found["peak"] <= outputs * model + 2 * residual + 6 * 2**20
    assert found["kept"] <= 6 * 2**20, "everything goes back with the last output"


def large_merge() -> list[Tensor]:
    """Three layers of 3 MiB, beyond what gets a block of its own."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    base = [normal(1024, 768) for _ in range(3)]
    adapted = [w + 0.1 for w in base]
    return merge_kv(base, [adapted], [normal(2, 768)], RegularizationFactor.identity(768))


def test_outputs_of_one_call_have_storages_of_their_own(tmp_path: Path) -> None:
    """What shares memory cannot be saved by safetensors and drags its neighbours into a pickle."""
    safetensors = pytest.importorskip("safetensors.torch")
    merged = large_merge()
    storages = [w.untyped_storage() for w in merged]
    assert len({s.data_ptr() for s in storages}) == 3
    for w, storage in zip(merged, storages, strict=True):
        assert w.is_contiguous()
        assert w.storage_offset() == 0
        assert storage.nbytes() == w.nbytes
        assert w.data_ptr() % 64 == 0
        assert len(pickle.dumps(w)) < 1.1 * w.nbytes
    safetensors.save_file({str(k): w for k, w in enumerate(merged)}, tmp_path / "merged")
    back = safetensors.load_file(tmp_path / "merged")
    for k, w in enumerate(merged):
        assert torch.equal(back[str(k)], w)


def test_outputs_outlive_each_other_and_can_be_resized() -> None:
    first, second, third = large_merge()
    truth = [w.clone() for w in (second, third)]
    del first
    again = large_merge()  # may take the place of what was freed, not of what is alive
    for found, right in zip((second, third), truth, strict=True):
        assert torch.equal(found, right)
    row = again[1][0].clone()
    again[1].untyped_storage().resize_(0)
    again[1].untyped_storage().resize_(again[1].nbytes)
    again[1].copy_(row.expand_as(again[1]))
    assert torch.equal(again[1][-1], row)
    third.resize_(2048, 768)[1024:].fill_(1.0)
    assert torch.equal(third[:1024], truth[1])
    assert torch.equal(second, truth[0])
