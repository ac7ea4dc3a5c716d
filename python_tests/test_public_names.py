"""What is public is reachable, takes what people have, and names what there is."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from typing import Any, get_args

import numpy as np
import pytest
import torch

import immunize_ext
from immunize_ext import probing
from immunize_ext.probing.attacks import ATTACKS, AttackName, compare_attack
from immunize_ext.probing.data import Problem, Task
from immunize_ext.probing.immunizers import METHODS, MethodName
from immunize_ext.settings import settings_of


@pytest.mark.parametrize("package", ["", ".bilevel", ".ops", ".probing", ".text_to_image"])
def test_what_is_public_is_reachable_and_listed(package: str) -> None:
    module = importlib.import_module(f"immunize_ext{package}")
    names = set(module.__all__)
    if package == ".text_to_image":
        names -= {"digits"} if importlib.util.find_spec("sklearn") is None else set()
    for name in sorted(names):
        assert getattr(module, name) is not None
    assert names <= set(dir(module))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        getattr(module, "nonsense")  # noqa: B009


def test_one_import_reaches_everything_and_costs_nothing() -> None:
    code = """
import sys, immunize_ext
assert "torch" not in sys.modules
run = immunize_ext.probing.run
assert run.RunSettings and immunize_ext.text_to_image.attacks.ATTACKS
assert immunize_ext.testing and immunize_ext.reference and immunize_ext.ops.merge_kv
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_of_methods_and_attacks_are_types() -> None:
    """A new one is added to the Literal beside the registry, for editors to offer it."""
    own = {name for name, entry in METHODS.items() if type(entry).__module__.startswith("immunize")}
    assert set(get_args(MethodName)) == own
    own = {name for name, entry in ATTACKS.items() if type(entry).__module__.startswith("immunize")}
    assert set(get_args(AttackName)) == own
    # A setting of any text is read as one, whatever names its type lists for editors.
    assert settings_of(probing.RunSettings)["method"].type is str
    assert settings_of(probing.RunSettings)["attacks"].type == tuple[str, ...]


def test_names_of_the_other_wing_are_types() -> None:
    pytest.importorskip("diffusers")
    from immunize_ext.text_to_image import attacks, immunizers

    for registry, names in (
        (immunizers.METHODS, immunizers.MethodName),
        (attacks.ATTACKS, attacks.AttackName),
    ):
        entries: Any = registry.items()
        own = {name for name, one in entries if type(one).__module__.startswith("immunize")}
        assert set(get_args(names)) == own


def test_arrays_tensors_and_tasks_are_the_same_to_everything() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 4)), rng.normal(size=50)
    whole = Task.of((x, y), "toy")
    assert whole.x_test.tolist() == x[4::5].tolist()
    parts = (whole.x_train.numpy(), whole.y_train.numpy(), whole.x_test, whole.y_test)
    made = Task.of(parts)
    assert torch.equal(made.x_train, whole.x_train)
    assert Task.of(whole) is whole
    problem: Any = Problem.of((x, y), (x[:, ::-1].copy(), y))
    tasks = problem.as_tasks()
    assert (tasks.primary.name, tasks.harmful[0].name) == ("primary task", "harmful task")
    for name in ("closed-form", "label-direction", "lock", "several-harms", "multiplicative"):
        found = [METHODS[name].fit(None, given).theta for given in (problem, tasks)]
        assert torch.equal(*found)
    immunized = METHODS["whitening"].fit(None, problem)
    by_arrays = compare_attack((x, y), immunized.theta, base_budget=20, limit=2.0)
    by_task = compare_attack(whole, immunized.theta, base_budget=20, limit=2.0)
    assert by_arrays.slowdown == by_task.slowdown
    curve: Any = ATTACKS["gradient_descent"]
    assert curve.run(None, (x, y), steps=2).losses == curve.run(None, whole, steps=2).losses
    assert Task.of((np.arange(10).reshape(5, 2), np.arange(5))).x_train.dtype == torch.float64
    assert Task.of((x.astype(np.float32), y)).y_train.dtype == torch.float32


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (3, r"must be a Task, \(x, y\) or .* got int"),
        ((1, 2, 3), "got tuple of 3"),
        ((np.ones((4, 2)), np.ones(4)), "at least 5 rows"),
        ((np.ones(9), np.ones(9)), "must be a matrix"),
        ((np.ones((9, 2)), np.ones(8)), "a target for each"),
    ],
)
def test_what_is_no_task_is_refused_in_our_words(data: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Task.of(data)


def test_a_pipeline_and_a_folder_are_models_too(tmp_path: Any) -> None:
    pytest.importorskip("diffusers")
    from immunize_ext.text_to_image import TextToImage
    from immunize_ext.text_to_image.digits.concepts import digit_concepts
    from immunize_ext.text_to_image.digits.pipeline import load_digits_pipeline
    from immunize_ext.text_to_image.immunizers import METHODS as OTHERS

    model = TextToImage(load_digits_pipeline())
    model.save(tmp_path / "model")
    concepts = digit_concepts(("three",))
    found = [
        OTHERS["erasure"].fit(given, concepts).model.digest()
        for given in (model, model.pipeline, tmp_path / "model")
    ]
    assert found[0] == found[1] == found[2]
    assert immunize_ext.text_to_image.TextToImage.of(model) is model


def test_every_public_function_has_an_example() -> None:
    pytest.importorskip("diffusers")
    packages = ["", ".ops", ".ops.regularizers", ".ops.erasure", ".testing", ".reference"]
    packages += [f".probing{part}" for part in ("", ".data", ".metrics", ".attacks")]
    packages += [f".probing.{part}" for part in ("immunizers", "extractors", "certificates")]
    packages += [f".text_to_image{part}" for part in ("", ".attacks", ".immunizers", ".metrics")]
    found = set()
    for package in packages:
        module = importlib.import_module(f"immunize_ext{package}")
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if inspect.isfunction(value) and ">>>" not in (value.__doc__ or ""):
                found.add(name)
    assert found == set()
