"""The operators without the compiled part: a process that never loads it, and ``torch.func`` there.

The other files ask both routes for their values and derivatives, in one process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from sample_inputs import gaussian, symmetric, taking_route

from immunize_ext import testing
from immunize_ext.ops import (
    Preconditioner,
    RegularizationFactor,
    extremal_singular_values,
    gram_extremes,
    khatri_rao_gram,
    log_condition_number,
    merge_kv,
    resolvent_traces,
    symmetric_extremes,
)
from immunize_ext.ops.regularizers import gram_r_ill, gram_r_well, r_ill, r_well

SCRIPT = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    sys.path.insert(0, sys.argv[1])
    import test_fallback
    found = test_fallback.everything()
texts = [str(w.message) for w in caught if "torch-only" in str(w.message)]
print(json.dumps({"found": found, "warnings": texts}))
"""


def everything() -> dict[str, list[float]]:
    """Values and gradients of every public operator, as numbers."""
    a = gaussian(3, 4).requires_grad_()
    h = symmetric(4).requires_grad_()
    factor = RegularizationFactor.from_embeddings(gaussian(20, 4, seed=1), ridge=0.1)
    token = gaussian(2, 4, seed=2)
    wide, ridges = gaussian(2, 4, seed=4).requires_grad_(), torch.tensor([0.1, 1.0]).double()

    def merged(w):
        return merge_kv([w], [[2 * w.detach()]], [token], factor)[0].square()

    functions = {
        "extremal_singular_values": (lambda x: sum(extremal_singular_values(x)[:2]), a),
        "gram_extremes": (lambda x: sum(gram_extremes(x)[:3]), a),
        "log_condition_number": (log_condition_number, a),
        "symmetric_extremes": (lambda x: symmetric_extremes(x).lambda_min, h),
        "r_well": (r_well, a),
        "r_ill": (r_ill, a),
        "gram_r_well": (gram_r_well, a),
        "gram_r_ill": (gram_r_ill, a),
        "merge_kv": (merged, a),
        "khatri_rao_gram": (lambda x: khatri_rao_gram(x, x.sin(), bias=True), a),
        "resolvent_traces": (lambda x: resolvent_traces(x @ x.mT, ridges, token).energies, wide),
        "precondition": (Preconditioner.from_features(gaussian(9, 4, seed=3)).apply, a),
    }
    results = {}
    for name, (function, leaf) in functions.items():
        value = function(leaf)
        (grad,) = torch.autograd.grad(value.sum(), leaf)
        results[name] = [*value.detach().flatten().tolist(), *grad.flatten().tolist()]
    return results


def test_a_process_without_the_compiled_part_gives_the_same_numbers():
    environment = {**os.environ, "IMMUNIZE_EXT_DISABLE": "1"}
    folders = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]
    environment["PYTHONPATH"] = os.pathsep.join([*folders, environment.get("PYTHONPATH", "")])
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT, folders[0]],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    answer = json.loads(finished.stdout.splitlines()[-1])
    assert len(answer["warnings"]) == 1, "said once, and not at every call"
    here = everything()
    assert answer["found"].keys() == here.keys()
    for name, numbers in here.items():
        assert answer["found"][name] == pytest.approx(numbers, rel=1e-10, abs=1e-11), name


@pytest.mark.parametrize(
    "function",
    [
        lambda a: extremal_singular_values(a)[:2],
        lambda a: gram_extremes(a)[:3],
        log_condition_number,
        r_well,
        gram_r_ill,
    ],
    ids=["extremal_singular_values", "gram_extremes", "log_condition_number", "r_well", "r_ill"],
)
def test_transforms_of_the_spectrum_composites(function):
    with taking_route("composite"):
        testing.check_transforms(function, [gaussian(3, 4)])


def test_transforms_of_the_merge_composite():
    factor = RegularizationFactor.from_embeddings(gaussian(20, 4, seed=1))

    def function(base, concept, token):
        return merge_kv([base], [[concept]], [token], factor)[0]

    inputs = [gaussian(3, 4), gaussian(3, 4, seed=2), gaussian(2, 4, seed=3)]
    with taking_route("composite"):
        testing.check_transforms(function, inputs)
