"""Threads change no bit of a result, and there are never more of them than were asked for.

Not in a batch, whose matrices are worked on in parallel and ask for threads themselves; not in the
worker of a data loader, which has one, and whose parent's threads did not survive the fork; and
calls from several threads of Python do not disturb each other.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from spectrum_bounds import same_bits
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from immunize_ext import ops
from immunize_ext.ops.regularizers import gram_r_ill, gram_r_well, r_ill, r_well


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(autouse=True)
def _threads_stay() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def with_cluster(p: int, count: int) -> Tensor:
    """A symmetric matrix whose largest eigenvalue is repeated ``count`` times."""
    basis, _ = torch.linalg.qr(gaussian(p, p, seed=4))
    values = torch.linspace(0.0, 1.0, p, dtype=torch.float64)
    values[p - count :] = 2.0
    h = (basis * values) @ basis.mT
    return (h + h.mT) / 2


def with_singular_cluster(n: int, p: int, count: int) -> Tensor:
    """A matrix whose largest singular value is repeated ``count`` times."""
    u, _ = torch.linalg.qr(gaussian(n, p, seed=5))
    v, _ = torch.linalg.qr(gaussian(p, p, seed=6))
    sigma = torch.linspace(2.0, 1.0, p, dtype=torch.float64)
    sigma[:count] = 2.0
    return (u * sigma) @ v.mT


def deficient() -> Tensor:
    """Features without full rank, whose null space is proven by products."""
    return gaussian(500, 60, seed=7) @ gaussian(60, 100, seed=8)


# What is measured, and of which matrix. The losses have one output each.
LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[], Tensor]]] = {
    "r_well, 64 x 784": (r_well, lambda: gaussian(64, 784)),
    "r_ill, 64 x 784": (r_ill, lambda: gaussian(64, 784)),
    # Vectors longer than what torch adds up on one thread.
    "r_well, 40000 rows": (r_well, lambda: gaussian(40000, 3)),
    "r_ill, 40000 columns": (r_ill, lambda: gaussian(3, 40000)),
    "gram_r_ill, 40000 rows": (gram_r_ill, lambda: gaussian(40000, 3)),
    "gram_r_well, 40000 columns, rank deficient": (
        gram_r_well,
        lambda: gaussian(4, 2, seed=9) @ gaussian(2, 40000, seed=10),
    ),
    "condition number, one row of 70000": (ops.condition_number, lambda: gaussian(1, 70000)),
    "log condition number, 40000 rows, kappa 1e9": (
        ops.log_condition_number,
        lambda: gaussian(40000, 3) * torch.tensor([1.0, 1e-4, 1e-9], dtype=torch.float64),
    ),
    "singular cluster, 40000 rows": (
        lambda a: ops.extremal_singular_values(a).sigma_max,
        lambda: with_singular_cluster(40000, 3, 2),
    ),
    "gram_r_well, 64 x 784": (gram_r_well, lambda: gaussian(64, 784)),
    "gram_r_ill, 784 x 64": (gram_r_ill, lambda: gaussian(784, 64)),
    "gram_r_ill, rank deficient": (gram_r_ill, deficient),
    "condition number": (ops.condition_number, lambda: gaussian(200, 300)),
    "symmetric": (lambda h: ops.symmetric_extremes(h).lambda_max, lambda: with_cluster(300, 1)),
    "cluster of 24": (
        lambda h: ops.symmetric_extremes(h).lambda_max,
        lambda: with_cluster(300, 24),
    ),
    "cluster of 24, a third repeated": (
        lambda h: ops.symmetric_extremes(h).lambda_max,
        lambda: with_cluster(72, 24),
    ),
    "singular cluster of 24": (
        lambda a: ops.extremal_singular_values(a).sigma_max,
        lambda: with_singular_cluster(500, 200, 24),
    ),
}


@same_bits
@pytest.mark.parametrize("name", LOSSES)
def test_threads_change_no_bit(name):
    """Values and gradients with one, two and four threads."""
    loss, matrix = LOSSES[name]
    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(1)  # the matrix itself is made with one
        a = matrix().requires_grad_()
        torch.set_num_threads(threads)
        value = loss(a)
        (grad,) = torch.autograd.grad(value, a)
        found.append((value.detach(), grad))
    for value, grad in found[1:]:
        assert torch.equal(value, found[0][0])
        assert torch.equal(grad, found[0][1])


def work_on_small_batches(queue: multiprocessing.Queue) -> None:
    """Forward and backward of small batches, as a data loader's worker would ask for them."""
    a = gaussian(8, 5, 7).requires_grad_()
    ops.condition_number(a).sum().backward()
    h = gaussian(8, 6, 6)
    symmetric = (h + h.mT).requires_grad_()
    ops.symmetric_extremes(symmetric).lambda_max.sum().backward()
    gram_r_well(gaussian(16, 5, 7)).sum()
    queue.put("done")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_small_batches_in_a_forked_child():
    """OpenMP's threads do not survive a fork: what asks for them in the child waits for ever."""
    torch.set_num_threads(2)
    a, b = gaussian(600, 600), gaussian(600, 600)
    (a * b + a).sum()  # torch's threads run once in the parent
    ops.condition_number(gaussian(8, 100, 200))  # and those of the operators
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=work_on_small_batches, args=(queue,))
    child.start()
    child.join(60)
    hung = child.is_alive()
    if hung:
        child.kill()
        child.join()
    assert not hung
    assert queue.get(timeout=10) == "done"


TASKS = Path("/proc/self/task")
counts_threads = pytest.mark.skipif(not TASKS.is_dir(), reason="counts the threads in /proc")


def value_and_gradient(loss: Callable[[Tensor], Tensor], matrix: Tensor) -> tuple[Tensor, Tensor]:
    a = matrix.clone().requires_grad_()
    value = loss(a)
    (grad,) = torch.autograd.grad(value, a)
    return value.detach(), grad


@same_bits
@pytest.mark.parametrize(
    "name", ["gram_r_ill, 784 x 64", "gram_r_ill, rank deficient", "symmetric", "cluster of 24"]
)
def test_calls_from_several_threads_of_python_change_no_bit(name):
    """Four at once, each of which may have two threads."""
    torch.set_num_threads(1)
    loss, matrix = LOSSES[name][0], LOSSES[name][1]()

    def call(_: int) -> tuple[Tensor, Tensor]:
        torch.set_num_threads(2)
        return value_and_gradient(loss, matrix)

    right = value_and_gradient(loss, matrix)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(call, range(8)):
            assert all(torch.equal(one, other) for one, other in zip(found, right, strict=True))


@same_bits
@counts_threads
@pytest.mark.parametrize("shape", [(1, 64, 784), (5, 784, 40), (4, 230, 250), (300, 8, 9)])
def test_a_batch_asks_for_no_threads_within_threads(shape):
    torch.set_num_threads(2)
    a, b = gaussian(600, 600), gaussian(600, 600)
    (a * b + a).sum()  # torch's threads are there
    before = len(os.listdir(TASKS))
    x = gaussian(*shape).requires_grad_()
    gram_r_ill(x).sum().backward()
    ops.symmetric_extremes(x.detach() @ x.detach().mT).lambda_min.sum()
    assert len(os.listdir(TASKS)) <= before


@same_bits
@counts_threads
def test_calls_at_the_same_time_share_their_threads():
    """Beside a call that is under way one of two threads is left: no further one is started."""
    large, small = with_cluster(800, 1), with_cluster(300, 1)

    def call(h: Tensor) -> int:
        torch.set_num_threads(2)
        before = len(os.listdir(TASKS))
        ops.symmetric_extremes(h)
        return len(os.listdir(TASKS)) - before

    for _ in range(20):
        with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
            one.submit(call, small).result()  # its own threads are there
            first = one.submit(call, large)
            time.sleep(0.005)
            more = other.submit(call, small).result()
            if not first.done():
                assert more == 0
                return
    pytest.skip("the machine never had two calls at once")


class Spectra(Dataset):
    """R_ill of matrices large enough for threads, and how many it left behind beside Python's."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x = gaussian(3, 200, 300, seed=index)
        before = len(os.listdir(TASKS)) - threading.active_count()
        value = gram_r_ill(x)
        return value, len(os.listdir(TASKS)) - threading.active_count() - before


@same_bits
@counts_threads
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_worker_of_a_data_loader_has_one_thread():
    torch.set_num_threads(2)
    right = [gram_r_ill(gaussian(3, 200, 300, seed=index)) for index in range(4)]
    found = list(DataLoader(Spectra(), batch_size=None, num_workers=2, timeout=60))
    for (value, more), same in zip(found, right, strict=True):
        assert torch.equal(value, same)
        assert more == 0
