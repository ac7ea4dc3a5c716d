"""The loop of text-to-image immunizers: what it moves, keeps, records, refuses and survives."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_pipelines import RandomImages, concept, tiny_pipeline, tiny_xl_pipeline
from immunizer_settings import SMALL, concepts, weights
from torch import nn

from immunize_ext.text_to_image.concepts import ConceptSet
from immunize_ext.text_to_image.immunizers import (
    METHODS,
    MIMA,
    DiffusionIMMA,
    ImmunizationError,
    ImmunizedPipeline,
    JointTraining,
    LossAscent,
    ManyWords,
    MergeOnly,
)
from immunize_ext.text_to_image.model import TextToImage

pytest.importorskip("accelerate")

ASCENT = {name: value for name, value in SMALL.items() if name != "inner_rate"}
# Words of the small tokenizer.
WORDS: dict[str, Any] = {
    "rare_words": ("sks",),
    "unrelated_prompts": ("a red dog",),
    "attacker_steps": 2,
}
ALL = {
    "mima": MIMA(**SMALL),
    "mima-unrolled": MIMA(**SMALL, hypergradient="unrolled", inner_steps=2),
    "mima-alternating": MIMA(**SMALL, variant="alternating"),
    "mima-exponentiated": MIMA(**SMALL, weighting="exponentiated", concept_rate=0.5),
    "mima-cvar": MIMA(**SMALL, weighting="cvar"),
    "imma": DiffusionIMMA(**SMALL),
    "imma-unrolled": DiffusionIMMA(**SMALL, hypergradient="unrolled"),
    "imma-alternating": DiffusionIMMA(**SMALL, variant="alternating"),
    "joint": JointTraining(**SMALL),
    "joint-alternating-exponentiated": JointTraining(
        **SMALL, variant="alternating", weighting="exponentiated", concept_rate=0.5
    ),
    "ascent": LossAscent(**ASCENT),
    "merge-only": MergeOnly(**SMALL),
    "many-words": ManyWords(**ASCENT, scope="attn2", **WORDS),
    "many-words-everything": ManyWords(**ASCENT, **WORDS),
}
EVERY = pytest.mark.parametrize("name", ALL)


def model() -> TextToImage:
    return TextToImage(tiny_pipeline())


def targets(name: str) -> ConceptSet:
    return concepts("three") if name.startswith("imma") else concepts()


def equal(left: TextToImage, right: TextToImage) -> bool:
    mine, theirs = weights(left), weights(right)
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


@EVERY
def test_every_method_moves_its_scope_of_a_clone_and_nothing_else(name: str) -> None:
    base = model()
    before, state = weights(base), torch.random.get_rng_state()
    immunized = ALL[name].fit(base, targets(name))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in weights(base).items())
    after = weights(immunized.model)
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    assert moved
    assert all(".attn2." in key for key in moved) == (ALL[name].scope == "attn2")
    # All of it lives in weights: processors are the defaults, and stay what they were.
    kinds = [{type(p) for p in m.unet.attn_processors.values()} for m in (base, immunized.model)]
    assert kinds[0] == kinds[1]
    assert type(METHODS[immunized.method]) is type(ALL[name])
    assert json.loads(json.dumps(immunized.config)) is not None
    for record in immunized.history:
        assert record["seconds"] > 0.0
        assert 0.0 <= record["clamped"] <= 1.0
    assert 0.0 <= immunized.merge_share < 1.0
    assert immunized.peak_memory > 0


@EVERY
def test_a_fit_is_deterministic_and_follows_its_seed(name: str) -> None:
    chosen = ALL[name]
    first, again = (chosen.fit(model(), targets(name)) for _ in range(2))
    assert equal(first.model, again.model)


def test_sdxl() -> None:
    immunized = MIMA(**SMALL).fit(TextToImage(tiny_xl_pipeline()), concepts())
    assert len(immunized.history) == 2


class StoppedError(Exception):
    """Someone pulled the plug."""


def stop_half_way(words: str, share: float) -> None:
    if share >= 0.5:
        raise StoppedError(words)


@pytest.mark.parametrize("name", [key for key in ALL if key != "merge-only"])
def test_two_and_two_steps_are_four(name: str, tmp_path: Path) -> None:
    chosen: Any = replace(ALL[name], steps=4, checkpoint_every=2)
    straight = chosen.fit(model(), targets(name))
    if "steps" in chosen.free:
        replace(chosen, steps=2).fit(model(), targets(name), resume=tmp_path)
    else:
        with pytest.raises(StoppedError):
            chosen.fit(model(), targets(name), progress=stop_half_way, resume=tmp_path)
    resumed = chosen.fit(model(), targets(name), resume=tmp_path)
    assert equal(straight.model, resumed.model)
    clock = {"seconds", "merge_seconds", "hypergradient_seconds"}
    histories = [
        [{k: v for k, v in record.items() if k not in clock} for record in found.history]
        for found in (straight, resumed)
    ]
    assert histories[0] == histories[1]


def test_a_checkpoint_is_neither_overwritten_nor_taken_for_another(tmp_path: Path) -> None:
    MIMA(**SMALL).fit(model(), concepts(), resume=tmp_path)
    file = next(tmp_path.iterdir())
    content = file.read_bytes()
    again = MIMA(**SMALL).fit(model(), concepts(), resume=tmp_path)
    assert equal(again.model, MIMA(**SMALL).fit(model(), concepts()).model)
    with pytest.raises(ValueError, match=r"with seed = 1, got 0"):
        MIMA(**SMALL, seed=1).fit(model(), concepts(), resume=tmp_path)
    other = model()
    with torch.no_grad():
        next(p for n, p in other.unet.named_parameters() if "attn2" in n).add_(1.0)
    with pytest.raises(ValueError, match="with model = "):
        MIMA(**SMALL).fit(other, concepts(), resume=tmp_path)
    for changed in (
        replace(concept("five"), source=RandomImages("other", 6)),
        concept("five", prompts=("a photo of the digit five", "a red five")),
    ):
        problem = replace(concepts(), concepts=(concept("three"), changed))
        with pytest.raises(ValueError, match="with concepts = "):
            MIMA(**SMALL).fit(model(), problem, resume=tmp_path)
    assert file.read_bytes() == content


def test_a_longer_run_is_not_taken_for_a_shorter_one(tmp_path: Path) -> None:
    longer = LossAscent(**ASCENT | {"steps": 4})
    longer.fit(model(), concepts(), resume=tmp_path)
    with pytest.raises(ValueError, match="is at step 4, beyond the 1 that are asked for"):
        LossAscent(**ASCENT | {"steps": 1}).fit(model(), concepts(), resume=tmp_path)


def test_a_model_that_checkpoints_already_is_immunized_alike() -> None:
    plain = MIMA(**SMALL).fit(model(), concepts())
    left_on = model()
    left_on.unet.enable_gradient_checkpointing()
    assert equal(plain.model, MIMA(**SMALL).fit(left_on, concepts()).model)
    assert left_on.unet.is_gradient_checkpointing


def test_what_the_merge_did_is_measured_and_said(tmp_path: Path) -> None:
    far = MIMA(**SMALL | {"inner_rate": 1e4, "loss_clamp": 1e9}, probe_every=1)
    immunized = far.fit(model(), concepts(), resume=tmp_path)
    changes = [record["merge_change"] for record in immunized.history]
    assert max(changes) > 1.0
    worst = changes.index(max(changes)) + 1
    assert any(text.startswith(f"merge at step {worst}: layer") for text in immunized.warnings)
    immunized.save(tmp_path / "saved")
    assert ImmunizedPipeline.load(tmp_path / "saved").warnings == immunized.warnings
    near = MIMA(**SMALL | {"inner_rate": 1e-6}, probe_every=1).fit(model(), concepts())
    assert max(record["merge_change"] for record in near.history) < 1e-2
    assert not any("times its own norm" in text for text in near.warnings)
    # Merged once at the end, it is measured there.
    assert "merge_change" in MergeOnly(**SMALL).fit(model(), concepts()).history[-1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_model_read_from_its_folder_shows_what_it_shall_keep(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    TextToImage(tiny_pipeline(dtype=dtype)).save(tmp_path / "half")
    without_images = replace(concept("six"), source=None)
    problem = replace(concepts(), retain=(without_images,))
    immunized = MIMA(**SMALL).fit(TextToImage.from_pretrained(tmp_path / "half"), problem)
    assert {p.dtype for p in immunized.model.unet.parameters()} == {dtype}


@pytest.mark.parametrize(
    "chosen",
    [
        MIMA(**SMALL),
        MIMA(**SMALL, hypergradient="unrolled", inner_steps=2),
        LossAscent(**ASCENT, scope="all"),
    ],
    ids=["first-order", "unrolled", "all"],
)
def test_checkpointing_gives_the_same_steps(chosen: Any) -> None:
    plain = chosen.fit(model(), concepts())
    saving = replace(chosen, gradient_checkpointing=True).fit(model(), concepts())
    for one, other in zip(plain.history, saving.history, strict=True):
        # Recomputation repeats the same products; their sums may be taken in another order.
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert not saving.model.unet.is_gradient_checkpointing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hypergradient", ["first_order", "unrolled"])
def test_a_half_precision_model_stays_one_and_still_moves(
    dtype: torch.dtype, hypergradient: Any
) -> None:
    base = TextToImage(tiny_pipeline(dtype=dtype))
    settings = SMALL | {"learning_rate": 1e-2}
    immunized = MIMA(**settings, hypergradient=hypergradient).fit(base, concepts())
    assert {p.dtype for p in immunized.model.unet.parameters()} == {dtype}
    assert not equal(base, immunized.model)
    assert immunized.model.generate(["a photo of the digit three"], steps=2).isfinite().all()


def test_precisions_may_follow_each_other_in_one_process() -> None:
    exact = MIMA(**SMALL).fit(model(), concepts())
    mixed = MIMA(**SMALL, mixed_precision="bf16").fit(model(), concepts())
    assert {p.dtype for p in mixed.model.unet.parameters()} == {torch.float32}
    # bfloat16 has 8 bits; losses around 1.
    assert mixed.history[0]["loss"] == pytest.approx(exact.history[0]["loss"], rel=0.05)
    assert mixed.history[0]["loss"] != exact.history[0]["loss"]


def test_accumulated_batches_are_averaged() -> None:
    both = MIMA(**SMALL, gradient_accumulation=2).fit(model(), concepts())
    assert len(both.history) == 2
    assert all(torch.isfinite(torch.tensor(list(r.values()))).all() for r in both.history)


def test_losses_at_the_clamp_give_no_gradient_and_are_counted() -> None:
    settings = SMALL | {"loss_clamp": 1e-3}
    with pytest.raises(ImmunizationError, match="above loss_clamp"):
        LossAscent(**{k: v for k, v in settings.items() if k != "inner_rate"}).fit(
            model(), concepts()
        )
    middle = ASCENT | {"loss_clamp": 1.0, "batch_size": 6}
    record = LossAscent(**middle).fit(model(), concepts()).history[0]
    assert 0.0 < record["clamped"] < 1.0


def test_a_layer_without_gradient_is_named() -> None:
    base = model()
    for name, parameter in base.unet.named_parameters():
        if name.startswith("mid_block") and "attn2.to_out.0" in name:
            nn.init.zeros_(parameter)
    with pytest.raises(ImmunizationError, match=r"mid_block.*attn2.*gets no gradient"):
        LossAscent(**ASCENT).fit(base, concepts())


@pytest.mark.parametrize("out", [False, True])
def test_a_loss_that_is_not_finite_stops_the_run_and_loses_nothing(
    out: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = model()
    before = weights(base)
    folder = tmp_path if out else None
    settings = ASCENT | {"steps": 5}
    original = LossAscent.adapted

    def poisoned(self: Any, run: Any, parameters: Any, step: int) -> Any:
        found = original(self, run, parameters, step)
        return {k: v * float("nan") for k, v in found.items()} if step == 3 else found

    with monkeypatch.context() as patch:
        patch.setattr(LossAscent, "adapted", poisoned)
        with pytest.raises(ImmunizationError, match="the loss became nan in step 4") as caught:
            LossAscent(**settings, probe_every=1).fit(base, concepts(), resume=folder)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[k], v) for k, v in weights(base).items())
    assert len(caught.value.immunized.history) == 3
    assert not equal(caught.value.immunized.model, base)
    if out:
        straight = LossAscent(**settings, probe_every=1).fit(model(), concepts())
        resumed = LossAscent(**settings, probe_every=1).fit(model(), concepts(), resume=folder)
        assert equal(straight.model, resumed.model)


def test_the_best_iterate_is_kept() -> None:
    # Steps far too large: what comes after the first is worse, and is not what is handed back.
    immunized = LossAscent(
        **ASCENT | {"steps": 6, "learning_rate": 3.0, "retain_weight": 100.0}, probe_every=1
    ).fit(model(), concepts())
    objectives = [record["objective"] for record in immunized.history]
    best = objectives.index(min(objectives)) + 1
    shorter = LossAscent(
        **ASCENT | {"steps": best, "learning_rate": 3.0, "retain_weight": 100.0}, probe_every=1
    ).fit(model(), concepts())
    assert equal(immunized.model, shorter.model)


def test_imma_takes_one_concept() -> None:
    with pytest.raises(ValueError, match="exactly one, got 2"):
        DiffusionIMMA(**SMALL).fit(model(), concepts())


def test_settings_out_of_range_are_refused() -> None:
    for change, words in [
        ({"steps": 0}, "steps must be at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
        ({"retain_batch": 0}, "retain_batch must be at least 1"),
        ({"prompts": 0}, "prompts must be at least 1"),
        ({"ridge": float("inf")}, "ridge must be finite"),
        ({"merge_prompts": 0}, "merge_prompts must be at least 1"),
        ({"inner_steps": 0}, "inner_steps must be at least 1"),
        ({"hypergradient_steps": 0}, "hypergradient_steps must be at least 1"),
        ({"hypergradient": "second_order"}, "hypergradient must be one of first_order, unrolled"),
        ({"inner_optimizer": "adamw"}, "inner_optimizer must be one of sgd, momentum, adam"),
        ({"curvature": "fisher"}, "curvature must be one of hessian"),
        ({"inner_rate": 0.0}, "inner_rate must be positive"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be"),
        (
            {"variant": "alternating", "hypergradient": "unrolled"},
            "hypergradient must be 'first_order' in the alternating variant",
        ),
    ]:
        with pytest.raises(ValueError, match=words):
            MIMA(**SMALL | change)
    with pytest.raises(ValueError, match="scope must be one of"):
        MIMA(**SMALL, scope="attn3").fit(model(), concepts())  # type: ignore[arg-type]
    bare = ConceptSet(concepts().concepts)
    with pytest.raises(ValueError, match="at least one caption"):
        MIMA(**SMALL).fit(model(), bare)


def test_saved_is_loaded_by_us_and_by_plain_diffusers(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    immunized = MIMA(**SMALL).fit(model(), concepts())
    immunized.save(tmp_path / "immunized")
    again = ImmunizedPipeline.load(tmp_path / "immunized")
    assert equal(immunized.model, again.model)
    assert (again.method, again.history) == (immunized.method, immunized.history)
    assert again.config == json.loads(json.dumps(immunized.config))
    plain = TextToImage(DiffusionPipeline.from_pretrained(tmp_path / "immunized"))
    assert equal(immunized.model, plain)
    with pytest.raises(FileExistsError):
        immunized.save(tmp_path / "immunized")
    with pytest.raises(FileNotFoundError, match=r"immunized\.json"):
        ImmunizedPipeline.load(tmp_path)


def test_a_full_disk_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    immunized = MIMA(**SMALL).fit(model(), concepts())
    immunized.save(tmp_path / "immunized")
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def full(*args: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(immunized.model.unet, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        immunized.save(tmp_path / "immunized", overwrite=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == files


_TWO_PROCESSES = """
import sys, torch
torch.set_num_threads(1)
from attack_pipelines import tiny_pipeline
from immunizer_settings import SMALL, concepts, weights
from immunize_ext.text_to_image.immunizers import LossAscent
from immunize_ext.text_to_image.model import TextToImage
import os
settings = {name: value for name, value in SMALL.items() if name != "inner_rate"}
found = LossAscent(**settings).fit(TextToImage(tiny_pipeline()), concepts())
torch.save(weights(found.model), f"{sys.argv[1]}/{os.environ.get('RANK', '0')}.pt")
"""


@pytest.mark.slow
def test_two_processes_make_the_same_steps_as_two_accumulated_batches(tmp_path: Path) -> None:
    script = tmp_path / "fit.py"
    script.write_text(_TWO_PROCESSES)
    here = Path(__file__).resolve().parent
    paths = [str(here), str(here.parents[1]), *sys.path]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    alone = LossAscent(**ASCENT, gradient_accumulation=2).fit(model(), concepts())
    for name, value in weights(alone.model).items():
        # The same sums in another order, and two steps of Adam, which divides by their size.
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-5)
    assert not equal(alone.model, model())


def test_a_tracker_gets_the_settings_and_every_step(tmp_path: Path) -> None:
    """What accelerate's tracker wrote, read back with its own reader."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    immunized = MIMA(**SMALL, log_with="tensorboard").fit(model(), concepts(), resume=tmp_path)
    folders = [path.parent for path in tmp_path.rglob("events.out.tfevents.*")]
    found: dict[str, list[tuple[int, float]]] = {}
    for folder in folders:
        events = reader.EventAccumulator(str(folder))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    for name in ("loss", "retain", "clamped", "gradient_norm", "merge_seconds"):
        logged = [(int(record["step"]), record[name]) for record in immunized.history]
        assert found[name] == [(step, pytest.approx(value, rel=1e-6)) for step, value in logged]
    settings = next(tmp_path.rglob("hparams.yml")).read_text(encoding="utf-8")
    assert "learning_rate: 0.001" in settings


@pytest.mark.filterwarnings("ignore:.*no supported trackers:UserWarning")  # ours is an error
def test_a_tracker_that_cannot_serve_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"mima: log_with must name a tracker.*'nonsense'"):
        MIMA(**SMALL, log_with="nonsense").fit(model(), concepts(), resume=tmp_path)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(ValueError, match=r"mima: log_with.* installed, got 'tensorboard'"):
        MIMA(**SMALL, log_with="tensorboard").fit(model(), concepts(), resume=tmp_path)
    monkeypatch.undo()
    pytest.importorskip("tensorboard")
    with pytest.raises(ValueError, match="a folder in resume"):
        MIMA(**SMALL, log_with="tensorboard").fit(model(), concepts())
