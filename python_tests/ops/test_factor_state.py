"""What becomes of a factor: changed captions, copies, pickles, inference mode, forked processes."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sample_inputs import compiled_only, gaussian, taking_route
from torch import Tensor

from immunize_ext.ops import RegularizationFactor, merge_kv
from immunize_ext.storage import save_checkpoint

BASE, TOKEN, VALUE = gaussian(2, 4, seed=1), gaussian(1, 4, seed=2), gaussian(2, 1, seed=3)


def merge(factor: RegularizationFactor) -> Tensor:
    return merge_kv([BASE], None, [TOKEN], factor, values=[VALUE])[0]


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("which", ["captions", "ridge"])
def test_a_stale_factor_is_refused(route: str, relative: bool, which: str) -> None:
    """Backward took the captions of now and the matrix of then: a gradient of neither."""
    captions = gaussian(9, 4, seed=4).requires_grad_()
    ridge = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    factor = RegularizationFactor.from_embeddings(captions, ridge=ridge, relative=relative)
    with taking_route(route):
        merge(factor).sum().backward()
        with torch.no_grad():
            (captions if which == "captions" else ridge).mul_(2)
        with pytest.raises(ValueError, match="merge_kv: factor must be of the present C_reg"):
            merge(factor)
        with pytest.raises(ValueError, match="must be of the present C_reg"):
            copy.deepcopy(factor)
        merge(RegularizationFactor.from_embeddings(captions, ridge=ridge, relative=relative))


def test_a_factor_without_gradients_keeps_its_numbers() -> None:
    captions = gaussian(9, 4, seed=4)
    factor = RegularizationFactor.from_embeddings(captions)
    before = merge(factor)
    captions.mul_(2)
    assert torch.equal(merge(factor), before)


def test_a_copy_has_its_own_numbers_and_the_same_captions() -> None:
    captions = gaussian(9, 4, seed=4).requires_grad_()
    factor = RegularizationFactor.from_embeddings(captions * 1.0, ridge=0.5)  # no leaf
    copied = copy.deepcopy(factor)
    assert copied.chol.data_ptr() != factor.chol.data_ptr()
    assert copied.source is factor.source
    found = torch.autograd.grad(merge(copied).sum(), captions, retain_graph=True)
    truth = torch.autograd.grad(merge(factor).sum(), captions)
    assert torch.equal(*found, *truth)


def test_a_pickle_keeps_the_numbers() -> None:
    captions = (gaussian(9, 4, seed=4).requires_grad_() * 1.0).requires_grad_()
    factor = RegularizationFactor.from_embeddings(captions, ridge=0.5)
    factor.tag = "encoder"
    loaded = pickle.loads(pickle.dumps(factor))
    assert loaded.source is None
    assert torch.equal(loaded.chol, factor.chol)
    assert (loaded.ridge, loaded.samples, loaded.tag) == (factor.ridge, 9, "encoder")
    assert torch.equal(merge(loaded), merge(factor).detach())
    assert loaded.condition == pytest.approx(factor.condition)


def test_a_factor_of_inference_mode_serves_training(route: str) -> None:
    captions, base = gaussian(9, 4, seed=4), BASE.clone().requires_grad_()
    token = TOKEN.clone().requires_grad_()
    with taking_route(route), torch.inference_mode():
        factors = [
            RegularizationFactor.from_embeddings(captions, ridge=0.5),
            RegularizationFactor.from_embeddings(captions.clone(), ridge=0.5),
            RegularizationFactor.identity(4),
        ]
        moved = [factor.to("cpu") for factor in factors]
    with taking_route(route):
        for factor in (*factors, *moved):
            (merged,) = merge_kv([base], None, [token], factor, values=[VALUE])
            grads = torch.autograd.grad(merged.sum(), [base, token])
            assert all(bool(grad.isfinite().all()) for grad in grads)


def test_factors_are_row_major(route: str, tmp_path: Path) -> None:
    """LAPACK returns columns; .view and custom kernels of a caller would read them wrongly."""
    path = tmp_path / "factor.safetensors"
    with taking_route(route):
        factor = RegularizationFactor.from_embeddings(gaussian(9, 4, seed=4))
        factor.save(path)
        for one in (
            factor,
            factor.to("cpu"),
            copy.deepcopy(factor),
            RegularizationFactor.load(path),
            RegularizationFactor(factor.chol.mT.contiguous().mT, ridge=0.0, samples=9),
        ):
            assert one.chol.is_contiguous()
            assert torch.equal(one.chol, factor.chol)


def test_a_file_with_more_in_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "factor.safetensors"
    tensors = {"chol": torch.eye(2).double(), "other": torch.eye(2).double()}
    kind, values = "immunize_ext.RegularizationFactor/1", {"ridge": 1.0, "samples": 0, "tag": None}
    save_checkpoint(path, tensors, kind=kind, values=values)
    with pytest.raises(ValueError, match=r"nothing else, got .*other"):
        RegularizationFactor.load(path)


FORK = """
import os, sys, torch
from immunize_ext.ops import RegularizationFactor, merge_kv
torch.set_num_threads(2)
a = torch.randn(600, 600)
(a @ a).sum()  # threads have run
torch.randn(4_000_000).exp().sum()
base, token, value = torch.randn(5, 7), torch.randn(2, 7), torch.randn(5, 2)
# Made here: LAPACK's Cholesky, as torch calls it, does not end in a child.
factor = RegularizationFactor.from_embeddings(torch.randn(30, 7), ridge=0.1)
child = os.fork()
if child == 0:
    base.requires_grad_()
    (merged,) = merge_kv([base], None, [token], factor, values=[value])
    merged.sum().backward()
    os._exit(0 if bool(merged.isfinite().all()) else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@compiled_only  # torch's own threads, which the torch-only route runs on, survive no fork
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_small_merge_ends_in_a_forked_process() -> None:
    """The threads of the parent are gone there; waiting for them would never end."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK],
        timeout=120,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr
