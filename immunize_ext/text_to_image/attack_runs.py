"""Runs of attacks, one file each: what was computed once is not computed again.

A run is one attack, on one concept or several jointly, with one seed, on one model. Its file is
named by these four, the model by a digest of its weights, so that the unprotected model of several
comparisons is attacked once. A file is written whole or not at all, and holds what was asked for:
a run asked for differently is refused rather than mixed in.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from immunize_ext.storage import load_checkpoint, save_checkpoint, tensor_digest, to_json
from immunize_ext.text_to_image.attacks import (
    Adaptation,
    AttackCurve,
    ConceptScores,
    TextToImageAttack,
)
from immunize_ext.text_to_image.concepts import Concept
from immunize_ext.text_to_image.metrics.generation import Measure, Sampling
from immunize_ext.text_to_image.model import TextToImage

Side = Literal["unprotected", "immunized"]


SIDES: tuple[Side, ...] = ("unprotected", "immunized")


Progress = Callable[[str, float], None]


_KIND = "immunize_ext attack run 1"


# An attacker whose run diverges tries a smaller rate; after this many halvings it gives up.
_HALVINGS = 4


@dataclass(frozen=True)
class Job:
    """One run that is wanted.

    Attributes:
        side: Which model.
        attack: The attack.
        concepts: What it wants; several are learned jointly.
        seed: Its seed, and that of the images it is judged on.
        prompt: Another wording than the attack's own.
        kept: Images kept at each evaluated step.
    """

    side: Side
    attack: TextToImageAttack
    concepts: tuple[Concept, ...]
    seed: int
    prompt: str | None = None
    kept: int = 0

    @property
    def concept(self) -> str:
        """Names of the concepts, joined by ``+``."""
        return "+".join(concept.name for concept in self.concepts)

    @property
    def title(self) -> str:
        """What is shown while it runs."""
        return f"{self.attack.name} on {self.concept}, seed {self.seed}, {self.side} model"


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        curve: What the attack got.
        grids: Images kept, by concept and step, ``(kept, c, h, w)`` uint8.
    """

    curve: AttackCurve
    grids: dict[str, dict[int, Tensor]]


@dataclass(frozen=True)
class Budget:
    """What every run gets.

    Attributes:
        steps: Optimizer steps.
        evaluate_at: Steps at which it is judged.
        measures: By name; the first is the one that counts.
        sampling: How images are generated; each seed has noise of its own.
    """

    steps: int
    evaluate_at: tuple[int, ...]
    measures: Mapping[str, Measure]
    sampling: Sampling


def model_digest(model: TextToImage) -> str:
    """Digest of a model's weights: equal for equal models, wherever they were loaded from."""
    parts = {"unet": model.unet, "vae": model.vae}
    parts |= {f"text{i}": encoder for i, encoder in enumerate(model.text_encoders)}
    return tensor_digest(
        (f"{part}.{name}", tensor)
        for part, module in parts.items()
        for name, tensor in sorted(module.state_dict().items())
    )[:16]


def _attack_settings(attack: TextToImageAttack) -> dict[str, Any]:
    if isinstance(attack, Adaptation):
        return attack.settings()
    return {"kind": type(attack).__name__, "settings": repr(attack)}


class RunStore:
    """Finished runs in a folder; in memory only where there is no folder.

    Args:
        folder: Where files live; made when the first run is saved.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._memory: dict[Path, Run] = {}

    def path(self, job: Job, digest: str) -> Path:
        """File of a run, relative to the folder."""
        wording = "" if job.prompt is None else f"--{_safe(job.prompt)}"
        name = f"{_safe(job.attack.name)}--{_safe(job.concept)}{wording}--{job.seed}.safetensors"
        return Path(digest) / name

    def load(self, job: Job, digest: str, request: dict[str, Any]) -> Run | None:
        """A finished run, or ``None``.

        Raises:
            ValueError: If the file holds a run that was asked for differently.
        """
        path = self.path(job, digest)
        if self._folder is None or not (self._folder / path).is_file():
            return self._memory.get(path)
        tensors, values = load_checkpoint(
            self._folder / path, kind=_KIND, function="evaluate_text_to_image"
        )
        wanted = _plain(request)
        if values["request"] != wanted:
            changed = sorted(
                name
                for name in wanted.keys() | values["request"].keys()
                if wanted.get(name) != values["request"].get(name)
            )
            raise ValueError(
                f"evaluate_text_to_image: out must hold runs of this evaluation, got another "
                f"{', '.join(changed)} in {self._folder / path}; choose another folder or delete "
                "the file"
            )
        grids: dict[str, dict[int, Tensor]] = {}
        for name, images in tensors.items():
            concept, _, step = name.rpartition("@")
            grids.setdefault(concept, {})[int(step)] = images
        return Run(AttackCurve.from_dict(values["curve"]), grids)

    def save(self, job: Job, digest: str, request: dict[str, Any], run: Run) -> None:
        """Keep a finished run."""
        path = self.path(job, digest)
        if self._folder is None:
            self._memory[path] = run
            return
        target = self._folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(
            target,
            {
                f"{concept}@{step}": images
                for concept, steps in run.grids.items()
                for step, images in steps.items()
            },
            kind=_KIND,
            values={"curve": _plain(run.curve.to_dict()), "request": _plain(request)},
        )


def _plain(value: Any) -> Any:
    """A value as it reads back from a file."""
    return json.loads(json.dumps(to_json(value)))


def _safe(name: str) -> str:
    return re.sub(r"[^\w+.-]+", "_", name)


def request_of(job: Job, budget: Budget) -> dict[str, Any]:
    """All that decides the outcome of a run, apart from the model."""
    images = tensor_digest((concept.name, concept.images("attack")) for concept in job.concepts)
    return {
        "attack": _attack_settings(job.attack),
        "concepts": [concept.name for concept in job.concepts],
        "prompts": job.attack.prompts(job.concepts, job.prompt),
        "images": images[:16],
        "seed": job.seed,
        "steps": budget.steps,
        "evaluate_at": list(budget.evaluate_at),
        "measures": list(budget.measures),
        "sampling": asdict(budget.sampling.for_seed(job.seed)),
        "kept": job.kept,
    }


def execute(model: TextToImage, job: Job, budget: Budget) -> Run:
    """Run one attack.

    An attacker whose loss diverges lowers the learning rate: the run is repeated at half of it, up
    to four times, and the curve's ``config`` says at which rate it went. Divergence is no
    protection.

    Raises:
        FloatingPointError: If it still diverges.
    """
    attack = job.attack
    for attempt in range(_HALVINGS + 1):
        scores = ConceptScores(
            job.concepts,
            attack.prompts(job.concepts, job.prompt),
            budget.measures,
            budget.sampling.for_seed(job.seed),
            kept=job.kept,
        )
        try:
            curve = attack.run(
                model,
                job.concepts,
                steps=budget.steps,
                evaluate_at=budget.evaluate_at,
                evaluate=scores,
                seed=job.seed,
                prompt=job.prompt,
            )
            break
        except FloatingPointError as error:
            if attempt == _HALVINGS or not isinstance(attack, Adaptation):
                error.add_note(f"in the run: {job.title}")
                raise
            attack = replace(attack, learning_rate=attack.learning_rate / 2.0)
    grids = {
        concept: {
            step: (images.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
            for step, images in steps.items()
        }
        for concept, steps in scores.grids.items()
    }
    return Run(curve, grids)


def run_all(
    models: Mapping[Side, TextToImage],
    jobs: Sequence[Job],
    budget: Budget,
    *,
    out: str | os.PathLike[str] | None = None,
    processes: int = 1,
    progress: Progress | None = None,
) -> dict[int, Run]:
    """Run jobs that are not finished yet, and give all runs.

    Args:
        models: The models by side.
        jobs: What is wanted.
        budget: What every run gets.
        out: Folder of finished runs; nothing is kept when omitted.
        processes: Worker processes. Each uses an equal share of the threads, so the last bits of a
            run may depend on their number. A script that asks for more than one needs the usual
            ``if __name__ == "__main__":``.
        progress: Called with what was done and the share done so far.

    Returns:
        Runs by the index of their job.

    Raises:
        ValueError: If ``out`` holds runs of another evaluation, or ``processes`` is below 1.
        FloatingPointError: If an attack diverges at every rate.
    """
    if processes < 1:
        raise ValueError(f"evaluate_text_to_image: processes must be at least 1, got {processes}")
    store = RunStore(out)
    digests = {side: model_digest(model) for side, model in models.items()}
    requests = [request_of(job, budget) for job in jobs]
    found: dict[int, Run] = {}
    pending: dict[Path, list[int]] = {}
    for index, job in enumerate(jobs):
        run = store.load(job, digests[job.side], requests[index])
        if run is not None:
            found[index] = run
        else:
            # Two equal models (a method that changed nothing) share their runs.
            pending.setdefault(store.path(job, digests[job.side]), []).append(index)
    unique = [indices[0] for indices in pending.values()]
    shared = {indices[0]: indices for indices in pending.values()}
    finished = len(found)
    for index, run in _results(models, jobs, unique, budget, processes):
        job = jobs[index]
        store.save(job, digests[job.side], requests[index], run)
        for same in shared[index]:
            found[same] = run
        finished += len(shared[index])
        if progress is not None:
            progress(job.title, finished / len(jobs))
    return found


def _results(
    models: Mapping[Side, TextToImage],
    jobs: Sequence[Job],
    indices: Sequence[int],
    budget: Budget,
    processes: int,
) -> Iterator[tuple[int, Run]]:
    if processes == 1 or len(indices) < 2:
        for index in indices:
            yield index, execute(models[jobs[index].side], jobs[index], budget)
        return
    threads = max(1, torch.get_num_threads() // processes)
    with tempfile.TemporaryDirectory(prefix="immunize-") as folder:
        saved = {side: Path(folder) / side for side in models}
        for side, model in models.items():
            model.save(saved[side])
        devices = {side: str(model.device) for side, model in models.items()}
        pool = ProcessPoolExecutor(
            min(processes, len(indices)),
            mp_context=get_context("spawn"),
            initializer=_start_worker,
            initargs=(saved, devices, budget, threads),
        )
        with pool:
            futures = {pool.submit(_work, _portable(jobs[index])): index for index in indices}
            try:
                for future in as_completed(futures):
                    curve, grids = future.result()
                    tensors = {
                        concept: {step: torch.from_numpy(images) for step, images in steps.items()}
                        for concept, steps in grids.items()
                    }
                    yield futures[future], Run(curve, tensors)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


class _HeldImages:
    """Images of a concept as arrays, which can be sent to another process."""

    def __init__(self, concept: Concept) -> None:
        self.name, self.splits = concept.name, {}
        for split in ("attack", "immunize"):
            with suppress(ValueError):  # a concept need not have both
                self.splits[split] = concept.images(split).numpy()

    def __call__(self, split: str) -> Tensor:
        if split not in self.splits:
            raise ValueError(f"Concept.images: {self.name!r} must have images for {split!r}")
        return torch.from_numpy(self.splits[split])


def _portable(job: Job) -> Job:
    held = tuple(replace(concept, source=_HeldImages(concept)) for concept in job.concepts)
    return replace(job, concepts=held)


# What a worker process holds for all its runs.
_worker: dict[str, Any] = {}


def _start_worker(
    saved: Mapping[Side, Path], devices: Mapping[Side, str], budget: Budget, threads: int
) -> None:
    torch.set_num_threads(threads)
    _worker.update(saved=saved, devices=devices, budget=budget, models={})


def _work(job: Job) -> tuple[AttackCurve, dict[str, dict[int, Any]]]:
    models: dict[str, TextToImage] = _worker["models"]
    if job.side not in models:
        model = TextToImage.from_pretrained(_worker["saved"][job.side])
        model.pipeline.to(_worker["devices"][job.side])
        models[job.side] = model
    run = execute(models[job.side], job, _worker["budget"])
    # Arrays: tensors would travel as handles on memory that the worker owns.
    grids = {
        concept: {step: images.numpy() for step, images in steps.items()}
        for concept, steps in run.grids.items()
    }
    return run.curve, grids
