"""Runs of attacks, one file each: what was computed once is not computed again.

A run is one attack, on one concept or several jointly, with one seed, on one model. Its file
carries a digest of all that decides its outcome: the attack's settings, the model's weights, the
words and images of the concepts, what is measured and how. So the unprotected model of several
comparisons is attacked once, and nothing is taken for what it is not.
"""

from __future__ import annotations

import os
import pickle
import re
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from immunize_ext.seams import AttackCurve, Progress
from immunize_ext.settings import plain
from immunize_ext.storage import digest
from immunize_ext.sweep import run_jobs
from immunize_ext.text_to_image.attacks import Adaptation, ConceptScores, Target, TextToImageAttack
from immunize_ext.text_to_image.concepts import Concept
from immunize_ext.text_to_image.metrics.generation import Measure, Sampling, measure_identity
from immunize_ext.text_to_image.model import TextToImage
from immunize_ext.text_to_image.pictures import decode_images, encode_images, to_bytes

Side = Literal["unprotected", "immunized"]


SIDES: tuple[Side, ...] = ("unprotected", "immunized")


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
        """What is said of it where it fails."""
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

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can say it."""
        grids = {
            concept: {str(step): encode_images(images) for step, images in steps.items()}
            for concept, steps in self.grids.items()
        }
        return {"curve": self.curve.to_dict(), "grids": grids}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Run:
        """Take back what :meth:`to_dict` gave."""
        grids = {
            concept: {int(step): decode_images(images) for step, images in steps.items()}
            for concept, steps in values["grids"].items()
        }
        return cls(AttackCurve.from_dict(values["curve"]), grids)


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


def _attack_settings(attack: TextToImageAttack) -> dict[str, Any]:
    kind = f"{type(attack).__module__}.{type(attack).__qualname__}"
    settings: Any = attack
    return {"kind": kind, "settings": plain(settings) if is_dataclass(settings) else repr(settings)}


def made_of(job: Job, model: str, budget: Budget) -> str:
    """Digest of all that decides the outcome of a run.

    Args:
        job: The run.
        model: Digest of the model.
        budget: What it gets.
    """
    return digest(
        model,
        _attack_settings(job.attack),
        [concept.digest() for concept in job.concepts],
        job.attack.prompts(Target(job.concepts, job.prompt)),
        job.seed,
        job.kept,
        budget.steps,
        list(budget.evaluate_at),
        {name: measure_identity(measure) for name, measure in budget.measures.items()},
        list(budget.measures),
        asdict(budget.sampling),
    )


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
            attack.prompts(Target(job.concepts, job.prompt)),
            budget.measures,
            budget.sampling.for_seed(job.seed),
            kept=job.kept,
        )
        try:
            target = Target(job.concepts, job.prompt, scores, budget.evaluate_at)
            curve = attack.run(model, target, steps=budget.steps, seed=job.seed)
            break
        except FloatingPointError as error:
            if attempt == _HALVINGS or not isinstance(attack, Adaptation):
                error.add_note(f"in the run: {job.title}")
                raise
            attack = replace(attack, learning_rate=attack.learning_rate / 2.0)
    grids = {
        concept: {step: to_bytes(images) for step, images in steps.items()}
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
    executor: Executor | None = None,
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
        executor: Where they run instead of in processes of this machine; it needs to see the
            files of ``out``.
        progress: Called with what was done and the share done so far.

    Returns:
        Runs by the index of their job.

    Raises:
        ValueError: If ``processes`` is below 1.
        FloatingPointError: If an attack diverges at every rate.
    """
    if processes < 1:
        raise ValueError(f"evaluate_text_to_image: processes must be at least 1, got {processes}")
    digests = {side: model.digest() for side, model in models.items()}
    keys = [made_of(job, digests[job.side], budget) for job in jobs]
    names = [_file_name(job, key) for job, key in zip(jobs, keys, strict=True)]
    with ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(prefix="immunize-")
        kept = Path(out) if out is not None else Path(stack.enter_context(temporary))
        works: dict[str, _Local | _Remote] = {}
        elsewhere = executor is not None or processes > 1
        for job, key, name in zip(jobs, keys, names, strict=True):
            # Two equal models (a method that changed nothing) share their runs, and their names.
            if name in works:
                continue
            local = _Local(key, models[job.side], job, budget)
            works[name] = local.portable(kept / MODELS / digests[job.side]) if elsewhere else local
        if elsewhere:
            for side, model in models.items():
                if not (kept / MODELS / digests[side]).is_dir():
                    model.save(kept / MODELS / digests[side])
        found = run_jobs(
            works,
            kept,
            executor=executor,
            processes=processes,
            threads_each=max(1, torch.get_num_threads() // processes),
            progress=progress,
        )
    runs = {name: Run.from_dict(values) for name, values in found.items()}
    return {index: runs[name] for index, name in enumerate(names)}


# Where models stand that other processes read.
MODELS = "models"


def _file_name(job: Job, key: str) -> str:
    """Readable, and different for different runs."""
    words = re.sub(r"[^\w+.-]+", "_", f"{job.attack.name}--{job.concept}--{job.seed}")
    return f"{words[:60]}--{key[:16]}"


@dataclass(frozen=True)
class _Local:
    """A run in this process."""

    made_of: str
    model: TextToImage
    job: Job
    budget: Budget

    def __call__(self) -> dict[str, Any]:
        return execute(self.model, self.job, self.budget).to_dict()

    def portable(self, folder: Path) -> _Remote:
        """The same for another process, which reads the model from a folder."""
        held = tuple(replace(c, source=_HeldImages(c)) for c in self.job.concepts)
        return _Remote(
            self.made_of,
            str(folder.absolute()),
            str(self.model.device),
            replace(self.job, concepts=held),
            pickle.dumps(self.budget),
        )


@dataclass(frozen=True)
class _Remote:
    """A run in another process, which keeps the model and what measures for its next run."""

    made_of: str
    folder: str
    device: str
    job: Job
    budget: bytes

    def __call__(self) -> dict[str, Any]:
        model = _model(self.folder, self.device)
        return execute(model, self.job, _budget(self.budget)).to_dict()


@lru_cache(maxsize=2)
def _model(folder: str, device: str) -> TextToImage:
    model = TextToImage.from_pretrained(folder)
    model.pipeline.to(device)
    return model


@lru_cache(maxsize=1)
def _budget(pickled: bytes) -> Budget:
    found: Budget = pickle.loads(pickled)  # made by the process that asks
    return found


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
