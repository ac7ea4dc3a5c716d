"""Memory of large outputs waits between calls: warm, bounded, not shared. Instruction sets."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

import immunize_ext
from immunize_ext import _load
from immunize_ext.memory import cached_bytes, empty_cache
from immunize_ext.ops import RegularizationFactor, merge_kv

pytestmark = pytest.mark.skipif(not _load.available(), reason="needs compiled operators")

WIDTH = 512


def merge(rows: int, layers: int = 2) -> list[Tensor]:
    """Merged weights of ``rows`` x 512 float32: 2 KiB a row."""
    base = [torch.full((rows, WIDTH), float(layer)) for layer in range(layers)]
    adapted = [w + 1.0 for w in base]
    token = torch.zeros(1, WIDTH)
    token[0, 0] = 1.0
    return merge_kv(base, [adapted], [token], RegularizationFactor.identity(WIDTH))


@pytest.fixture(autouse=True)
def nothing_waits() -> None:
    gc.collect()
    empty_cache()


def test_what_one_call_gave_back_serves_the_next() -> None:
    first = merge(512)
    places = {w.data_ptr() for w in first}
    assert cached_bytes() == 0
    del first
    assert cached_bytes() == 2 * 2**20
    second = merge(512)
    assert {w.data_ptr() for w in second} == places
    assert cached_bytes() == 0
    # Not what happened to stand there: every entry is written anew.
    for layer, w in enumerate(second):
        assert w[0, 0] == layer + 1
        assert (w[:, 1:] == layer).all()


def test_live_tensors_share_nothing() -> None:
    kept: list[Tensor] = []
    for _ in range(6):
        found = merge(512)
        kept.append(found.pop())  # the other one's memory goes round
        del found
    spans = sorted((w.data_ptr(), w.data_ptr() + w.nbytes) for w in kept)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    for k, w in enumerate(kept):
        w.fill_(float(k))
    assert [w.unique().tolist() for w in kept] == [[float(k)] for k in range(6)]


def test_no_more_waits_than_was_in_use_at_once() -> None:
    for rows in (512, 640, 768, 896):  # blocks of four sizes, never two of them at once
        merge(rows)
        assert cached_bytes() == 2 * rows * WIDTH * 4
    held = merge(512)  # of the larger blocks that wait, as many go as are needed for these
    assert cached_bytes() + 2 * 2**20 <= 2 * 896 * WIDTH * 4
    del held


def test_what_no_call_uses_goes_back() -> None:
    merge(2048)
    assert cached_bytes() == 2 * 4 * 2**20
    for _ in range(40):
        merge(512)
    assert cached_bytes() == 2 * 2**20


def test_empty_cache_gives_back_what_waits_and_nothing_else() -> None:
    kept, gone = merge(512)
    del gone
    copy = kept.clone()
    assert immunize_ext.empty_cache() == 2**20
    assert cached_bytes() == 0
    assert empty_cache() == 0
    assert torch.equal(kept, copy)
    del kept
    assert cached_bytes() == 2**20


def test_small_outputs_are_left_to_malloc() -> None:
    merge(128)
    assert cached_bytes() == 0


def test_memory_comes_back_from_any_thread() -> None:
    held = [merge(512)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert cached_bytes() == 2 * 2**20

    def work() -> None:
        for _ in range(20):
            a, b = merge(512), merge(640)
            assert a[1][3, 0] == 2.0
            assert b[1][3, 1] == 1.0

    threads = [threading.Thread(target=work) for _ in range(3)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    # Each had at most its a and b of one turn and of the turn before.
    assert 0 < cached_bytes() <= 3 * 2 * (2 * 2**20 + 2 * 5 * 2**18)


def run(script: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


TRAIN = """
import gc
from pathlib import Path
import torch
from immunize_ext.memory import cached_bytes
from immunize_ext.ops import RegularizationFactor, merge_kv

torch.set_num_threads(1)
base = [torch.randn(512, 512) for _ in range(2)]
adapted = [(w + 0.1).requires_grad_() for w in base]
token = torch.randn(2, 512)
factor = RegularizationFactor.identity(512)

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

sizes = []
for step in range(%d):
    loss = sum(w.sum() for w in merge_kv(base, [adapted], [token], factor))
    loss.backward()
    for w in adapted:
        w.grad = None
    if step in (%d, %d, %d):
        gc.collect()
        sizes.append(resident())
# A leak goes on; a page that is touched late comes once.
print(min(sizes[1] - sizes[0], sizes[2] - sizes[1]), cached_bytes())
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_resident_memory_is_flat_over_a_thousand_steps() -> None:
    growth, waiting = map(int, run(TRAIN % (1000, 100, 550, 999)).split())
    assert growth < 2**19
    assert 0 < waiting <= 6 * 2**20  # two outputs, two gradients and those of the base


def test_the_environment_turns_it_off() -> None:
    assert run(TRAIN % (3, 0, 1, 2), IMMUNIZE_EXT_POOL="0").split()[-1] == "0"


FORK = """
import os, threading
import torch
from immunize_ext.memory import cached_bytes, empty_cache
from python_tests.test_memory import merge

torch.set_num_threads(1)
stop = threading.Event()

def busy():
    while not stop.is_set():
        merge(256)

thread = threading.Thread(target=busy)
thread.start()
for _ in range(50):
    child = os.fork()
    if child == 0:
        # What takes the pool's lock. Not the merge itself: a fork may catch the other thread with
        # a lock of MKL's, which no child gets back.
        cached_bytes()
        empty_cache()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
thread.join()
print("done")
"""


def test_a_child_forked_while_another_thread_merges_finds_the_pool_unlocked() -> None:
    assert run(FORK) == "done"


COMPUTE = """
import torch
from immunize_ext import _C
from immunize_ext.ops import RegularizationFactor, log_condition_number, merge_kv

torch.manual_seed(0)
total = 0.0
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    for d in (7, 40, 768):
        base = [torch.randn(37, d).to(dtype), torch.randn(4, d).to(dtype)]
        adapted = [[(w + torch.randn_like(w)).requires_grad_() for w in base] for _ in range(2)]
        c = [torch.randn(s, d, dtype=torch.float64, requires_grad=True) for s in (1, 4)]
        factor = RegularizationFactor.identity(d)
        merged = merge_kv(base, adapted, c, factor)
        loss = sum((w.double() ** 2).sum() for w in merged)
        grads = torch.autograd.grad(loss, [*adapted[0], *adapted[1], *c])
        total += float(loss) / d + sum(float(g.double().abs().sum()) for g in grads) / d
x = torch.randn(20, 64, 50, dtype=torch.float64)
print(_C.instructions(), repr(total), repr(float(log_condition_number(x).sum())))
"""


def test_every_instruction_set_computes_the_same_up_to_rounding() -> None:
    found = {}
    for asked in ("baseline", "avx2", "avx512"):
        done = subprocess.run(
            [sys.executable, "-c", COMPUTE],
            capture_output=True,
            text=True,
            env={**os.environ, "IMMUNIZE_EXT_INSTRUCTIONS": asked, "IMMUNIZE_EXT_BUILD": "1"},
            check=False,
        )
        if "must name what this processor has" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        name, merged, kappa = done.stdout.split()
        assert name == asked
        found[asked] = (float(merged), float(kappa))
    assert "baseline" in found
    for merged, kappa in found.values():
        # Sums of float32 products of 768 terms and bfloat16 results, added over 37 rows.
        assert merged == pytest.approx(found["baseline"][0], rel=1e-4)
        assert kappa == pytest.approx(found["baseline"][1], rel=1e-12)


def test_an_unknown_instruction_set_is_refused_by_name() -> None:
    script = "from immunize_ext import _load; print(_load.status().reason)"
    reason = run(script, IMMUNIZE_EXT_INSTRUCTIONS="sse9")
    assert "IMMUNIZE_EXT_INSTRUCTIONS must be baseline, avx2 or avx512, got sse9" in reason
