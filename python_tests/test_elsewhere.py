"""Both wings on another device: nothing is left on the CPU, and the numbers are the same."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import elsewhere
import numpy as np
import pytest
import torch

from immunize_ext.hub import is_hub_id, model_folder
from immunize_ext.probing import run as features
from immunize_ext.probing.attacks import ATTACKS, attack_at_budgets, knows
from immunize_ext.probing.data import Problem, Task
from immunize_ext.probing.evaluation import evaluate
from immunize_ext.probing.immunizers import METHODS
from immunize_ext.runtime import named_device
from immunize_ext.settings import settings_of

SHORT = {
    "steps": 3,
    "epochs": 1,
    "inner_steps": 1,
    "batch_size": 2,
    "images": 2,
    "retain_batch": 2,
    "probe_every": 1,
    "record_every": 1,
}


def short(entry: Any) -> Any:
    own = settings_of(type(entry))
    return replace(entry, **{name: value for name, value in SHORT.items() if name in own})


def task(name: str, seed: int) -> Task:
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(60, 6)) * np.linspace(0.5, 2.0, 6))
    y = torch.from_numpy(np.sign(rng.normal(size=6) @ x.numpy().T))
    return Task(name, x[:40], y[:40], x[40:], y[40:])


PRIMARY, HARMFUL = task("keep", 0), task("harm", 1)


@pytest.fixture
def there() -> Iterator[torch.device]:
    with warnings.catch_warnings(), elsewhere.elsewhere() as device:
        warnings.simplefilter("ignore")
        yield device


# --- the device itself ----------------------------------------------------------------------------


def test_what_an_accelerator_refuses_is_refused(there: torch.device) -> None:
    moved = torch.ones(3).to(there)
    for wrong in (
        lambda: moved + torch.ones(3),
        lambda: torch.stack([moved, torch.zeros(3)]),
        lambda: torch.zeros(3)[moved.to(torch.int64)],
        lambda: torch.randn(3, generator=torch.Generator(), device=there),
        lambda: torch.empty(3, device=there).normal_(generator=torch.Generator()),
        lambda: moved.numpy(),
    ):
        with pytest.raises((elsewhere.OtherDeviceError, TypeError)):
            wrong()
    assert moved.device == there
    assert (moved * 2.0 + torch.tensor(1.0)).cpu().tolist() == [3.0] * 3
    assert moved[torch.tensor([0, 1])].tolist() == [1.0, 1.0]
    assert torch.as_tensor(2.0, device=there).device == there
    leaf = moved.clone().requires_grad_()
    (leaf.square().sum() * 3.0).backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [6.0] * 3


# --- features -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_methods_of_features_work_where_the_tasks_are(name: str, there: torch.device) -> None:
    method = short(METHODS[name])
    problem = Problem.of(PRIMARY, HARMFUL)
    here = method.fit(None, problem)
    made = method.fit(None, problem.to(there))
    assert made.theta.device == made.theta0.device == there
    torch.testing.assert_close(elsewhere.back(made.theta), here.theta, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", ["squared", "logistic"])
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_on_features_work_where_the_task_is(
    name: str, loss: Any, there: torch.device
) -> None:
    if not knows(ATTACKS[name], loss):
        pytest.skip(f"{name} does not minimise the {loss} loss")
    attack = ATTACKS.build(name, {}, "attacks", loss=loss)
    theta = torch.diag(torch.linspace(1.0, 3.0, 6, dtype=torch.float64))
    eye = torch.eye(6, dtype=torch.float64)
    (here,) = attack_at_budgets(HARMFUL, theta, eye, budgets=[3], attacker=attack)
    moved = HARMFUL.to(there)
    thetas = theta.to(there), eye.to(there)
    (found,) = attack_at_budgets(moved, *thetas, budgets=[3], attacker=attack)
    assert tuple(found) == pytest.approx(tuple(here), rel=1e-7)


def test_everything_is_measured_where_the_tasks_are(there: torch.device) -> None:
    problem = Problem.of(PRIMARY, HARMFUL)
    found = []
    for where in (problem, problem.to(there)):
        made = METHODS["closed-form"].fit(None, where)
        tasks = where.primary, where.harmful[0]
        judged = evaluate(made, *tasks, base_budget=20, limit=2.0, stop_early=True)
        found.append((judged.rir, judged.slowdown))
    assert found[0][0] == pytest.approx(found[1][0])
    assert found[0][1] == found[1][1]


# --- text-to-image --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    pytest.importorskip("diffusers")
    from immunize_ext.text_to_image import TextToImage
    from immunize_ext.text_to_image.digits.pipeline import load_digits_pipeline

    found = TextToImage(load_digits_pipeline())
    for part in (found.unet, found.vae, *found.text_encoders):
        elsewhere.move(part)
    return found


def concepts() -> Any:
    from immunize_ext.text_to_image.digits.concepts import digit_concepts

    return digit_concepts(("three",))


@pytest.mark.parametrize("name", ["mima", "imma", "joint_training", "loss_ascent", "merge_only"])
def test_methods_of_models_work_where_the_model_is(
    name: str, model: Any, there: torch.device
) -> None:
    from immunize_ext.text_to_image.immunizers import METHODS as OTHERS

    made = replace(short(OTHERS[name]), steps=1).fit(model, concepts())
    assert made.model.device == there


@pytest.mark.parametrize("name", ["lora", "kv_fine_tuning", "dreambooth_without_prior"])
def test_attacks_on_models_work_where_the_model_is(
    name: str, model: Any, there: torch.device
) -> None:
    from immunize_ext.text_to_image.attacks import ATTACKS as OTHERS
    from immunize_ext.text_to_image.attacks.target import Target

    def score(attacked: Any, step: int) -> dict[str, float]:
        return {"mean": float(attacked.generate(["a three"], steps=1).mean())}

    target = Target(concepts().concepts, evaluate=score)
    curve = short(OTHERS[name]).run(model, target, steps=1)
    assert curve.steps == [0, 1]


# --- names ----------------------------------------------------------------------------------------


def test_names_of_devices() -> None:
    assert named_device("cpu") == torch.device("cpu")
    assert named_device("cuda:1", here=False) == torch.device("cuda", 1)
    for name, words in (
        ("cdua", "did you mean cuda"),
        ("meta", "must be cpu, cuda"),
        ("cuda:x", "must be cpu"),
    ):
        with pytest.raises(ValueError, match=words):
            named_device(name)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"does not find; use --device cpu"):
            named_device("cuda")


def test_a_run_on_a_device_that_is_not_here_is_refused_before_any_work(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    settings = features.RunSettings(device="cuda")  # what a file from elsewhere may hold
    with pytest.raises(ValueError, match="does not find; use --device cpu"):
        features.run(settings, tmp_path / "run")
    assert not any(tmp_path.iterdir())


def test_a_run_in_single_precision_says_nearly_the_same(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    usual = {"data": "digits", "base_budget": 50, "limit": 2.0, "method": "whitening"}
    found = [
        features.run(features.RunSettings(**usual, dtype=dtype))  # type: ignore[arg-type]
        for dtype in ("float64", "float32")
    ]
    assert found[1].immunized.theta.dtype == torch.float64
    assert found[0].evaluation.rir == pytest.approx(found[1].evaluation.rir, rel=1e-3)
    assert found[0].data != found[1].data


# --- names on a hub -------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A hub that holds what is put into the folder it gives; notes what was asked."""
    package = pytest.importorskip("huggingface_hub")
    asked: dict[str, Any] = {}

    def fetch(repository: str, **more: Any) -> str:
        asked.update(more, repository=repository)
        if asked.get("error"):
            raise asked["error"]
        return str(tmp_path)

    monkeypatch.setattr(package, "snapshot_download", fetch)
    return asked


def test_a_model_by_its_name(hub: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    name = "CompVis/stable-diffusion-v1-4@main"
    folder = model_folder(name, function="model", index="model_index.json", variant="fp16")
    assert folder == tmp_path
    assert (hub["repository"], hub["revision"]) == ("CompVis/stable-diffusion-v1-4", "main")
    # Plain files alone: neither code nor pickles, and no second copy of the weights.
    for file, wanted in (
        ("unet/model.fp16.safetensors", True),
        ("tokenizer/merges.txt", True),
        ("unet/model.bin", False),
        ("pipeline.py", False),
        ("v1-4-pruned.safetensors", False),
        ("unet/model.safetensors", False),
    ):
        assert any(fnmatch(file, pattern) for pattern in hub["allow_patterns"]) == wanted, file
    with pytest.raises(FileNotFoundError, match=r"must hold config\.json, got another kind"):
        model_folder(name, function="model", index="config.json")
    # A folder that is there is itself.
    assert model_folder(tmp_path, function="model", index="x") == tmp_path
    assert not is_hub_id(str(tmp_path))
    assert not is_hub_id("digits")


def test_a_model_that_cannot_be_fetched_is_one_line(hub: dict[str, Any]) -> None:
    from huggingface_hub import errors

    hub["error"] = errors.LocalEntryNotFoundError("a page of text\nwith lines")
    with pytest.raises(FileNotFoundError) as caught:
        model_folder("owner/model", function="model", index="model_index.json")
    text = str(caught.value)
    assert text.startswith("model: owner/model must be a folder or a model that can be fetched")
    assert "hf download owner/model" in text
    assert "\n" not in text
