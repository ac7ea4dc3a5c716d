"""The outer loop of text-to-image immunizers, and its settings."""

from __future__ import annotations

import logging
import math
import time
from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.func import functional_call

from immunize_ext._extras import require_extra
from immunize_ext.bilevel import Parameters, Sweep
from immunize_ext.errors import NegativeCurvatureError
from immunize_ext.runtime import Meter
from immunize_ext.seams import Progress
from immunize_ext.text_to_image.concepts import Concept, ConceptSet
from immunize_ext.text_to_image.immunizers.batches import Batch, ConceptPool, Retain, generator_of
from immunize_ext.text_to_image.immunizers.concept_merge import ConceptMerge, Merge, summary
from immunize_ext.text_to_image.immunizers.immunized import ImmunizedPipeline
from immunize_ext.text_to_image.immunizers.parameters import Scope, scope_parameters
from immunize_ext.text_to_image.immunizers.state import LoopState, load_state, save_state
from immunize_ext.text_to_image.model import ModelLike, TextToImage, at_least_float
from immunize_ext.worst_case import Weighting, check_weighting, harm_weights

_LOG = logging.getLogger("immunize_ext")


# Purposes of the draws of one step; see batches.generator_of.
OUTER, INNER, RETAIN = 0, 1, 2


# The probe of the best iterate is drawn once, as if in a step before the first.
PROBE_STEP = -1


_FLOAT16_SCALE = 1024.0


# Losses by concept: of the steps before, and of the step at hand.
_MET, _NOW = "losses_met", "losses_now"


class ImmunizationError(ValueError):
    """An immunization that cannot go on: a loss that is not finite, a parameter without gradient.

    What was reached before is in the checkpoint, if one was asked for.

    Attributes:
        immunized: The model with the best parameters probed before the failure.
    """

    def __init__(self, message: str, immunized: ImmunizedPipeline) -> None:
        super().__init__(message)
        self.immunized = immunized


@dataclass(frozen=True, kw_only=True)
class Immunizer(ABC):
    """Settings of the outer loop; methods add their own.

    The defaults suit the embedded digits pipeline. Runs on other models start from
    ``usual_rates`` (published for Stable Diffusion: 3e-5 for re-learning, 2e-5 for personalization,
    inner 5e-6, 500 steps).

    Attributes:
        steps: Outer steps.
        learning_rate: Of Adam, which moves the parameters.
        scope: What is moved: ``"attn2"`` (whole cross-attention blocks), ``"kv"`` or ``"all"``.
        batch_size: Images of each concept in a step.
        prompts: Prompts of each concept that are drawn from; all of them when ``None``.
        loss_clamp: Largest loss of a sample that is still raised.
        gradient_clip: Largest norm of the gradient.
        weighting: How concepts count: ``"mean"``, alike; ``"exponentiated"``, by exp(-concept_rate
            times the losses met so far), so that those which hold worst count most; ``"cvar"``, the
            worst of them alone.
        concept_rate: eta of ``"exponentiated"``; 0 weighs all concepts alike.
        worst_share: Share of the concepts that ``"cvar"`` looks at.
        retain_weight: w.
        retain_batch: Images of the retain term in a step.
        probe_every: Steps between probes of the objective; the best of them is kept.
        seed: Seed of all draws.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``; the moved parameters stay float32.
        gradient_accumulation: Batches summed into one step.
        gradient_checkpointing: Less memory for more time in the denoiser.
        log_with: A tracker that accelerate knows ("tensorboard", "wandb", ...), or ``None``.
        checkpoint_every: Steps between checkpoints, where a folder for them is given.

    A subclass names its ``method`` and, for reports, its ``label``.
    """

    method: ClassVar[str]

    label: ClassVar[str]

    usual_rates: ClassVar[Mapping[str, float]] = {"learning_rate": 3e-5}

    # What does not decide the outcome of a step: how long a run is, and what it leaves on the way.
    free: ClassVar[tuple[str, ...]] = ("steps", "checkpoint_every", "log_with")

    steps: int = 60
    learning_rate: float = 1e-2
    scope: Scope = "attn2"
    batch_size: int = 8
    prompts: int | None = 2
    loss_clamp: float = 1.0
    gradient_clip: float = 1.0
    weighting: Weighting = "mean"
    concept_rate: float = 0.02
    worst_share: float = 0.5
    retain_weight: float = 20.0
    retain_batch: int = 32
    probe_every: int = 10
    seed: int = 0
    mixed_precision: str = "no"
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    log_with: str | None = None
    checkpoint_every: int = 20

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        for name in (
            "steps",
            "batch_size",
            "retain_batch",
            "probe_every",
            "gradient_accumulation",
            "checkpoint_every",
        ):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{self.method}: {name} must be at least 1, got {getattr(self, name)}"
                )
        if self.prompts is not None and self.prompts < 1:
            raise ValueError(f"{self.method}: prompts must be at least 1, got {self.prompts}")
        for name in ("learning_rate", "loss_clamp", "gradient_clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0.0):
                raise ValueError(f"{self.method}: {name} must be positive and finite, got {value}")
        if not (math.isfinite(self.retain_weight) and self.retain_weight >= 0.0):
            raise ValueError(
                f"{self.method}: retain_weight must be finite and at least 0, got "
                f"{self.retain_weight}"
            )
        check_weighting(
            self.method,
            self.weighting,
            self.concept_rate,
            self.worst_share,
            rate_name="concept_rate",
        )
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise ValueError(
                f"{self.method}: mixed_precision must be 'no', 'bf16' or 'fp16', got "
                f"{self.mixed_precision!r}"
            )

    def with_seed(self, seed: int) -> Self:
        """The same method with another seed."""
        return replace(self, seed=seed)

    def adapted(self, run: Run, parameters: Parameters, step: int) -> Parameters:
        """What an attacker makes of the parameters, as a function of them; nothing by default.

        Args:
            run: The run.
            parameters: theta, by name.
            step: The step; seeds what is drawn.

        Returns:
            theta', by name.
        """
        del run, step
        return parameters

    def rate(self, step: int) -> float:
        """Adam's rate in a step."""
        del step
        return self.learning_rate

    def wordings(self, concept: Concept) -> Sequence[str]:
        """Prompts that a concept is shown with."""
        return concept.prompts[: self.prompts]

    def kept_prompts(self, problem: ConceptSet) -> Sequence[str]:
        """Prompts, beside their own and the empty one, under which concepts are kept."""
        del problem
        return ()

    def attacked_losses(self, run: Run, leaves: Parameters, step: int, batch: int) -> Tensor:
        """Losses that an attacker still meets after adapting, to be raised.

        Args:
            run: The run.
            leaves: theta, by name.
            step: The step, ``PROBE_STEP`` for a probe; with ``batch`` it seeds what is drawn.
            batch: Which of the accumulated batches.

        Returns:
            Loss of each sample, shape ``(concepts * batch_size,)``, concept by concept.
        """
        place = step * self.gradient_accumulation + batch
        attacked = self.adapted(run, leaves, place)
        return torch.cat(
            [drawn.losses(run.model, attacked) for drawn in run.draw(step, OUTER, batch)]
        )

    def over_concepts(self, run: Run, losses: Tensor, step: int) -> Tensor:
        """Weighted mean over concepts of their samples' losses, in the order of the concepts.

        Exponentiated weights are those of the steps before; a probe takes the plain mean for them,
        so that probes compare.
        """
        if self.weighting == "mean" or (self.weighting == "exponentiated" and step == PROBE_STEP):
            return losses.mean()
        means = losses.reshape(len(run.pools), -1).mean(1)
        before = run.memory.get(_MET, torch.zeros_like(means))
        weights = harm_weights(
            self.weighting, means, before, rate=self.concept_rate, share=self.worst_share
        )
        if self.weighting == "exponentiated":
            run.memory[_NOW] = run.memory[_NOW] + means.detach() / self.gradient_accumulation
        return weights @ means

    def prepare(self, run: Run, leaves: Parameters, step: int) -> None:
        """What changes before the step: concepts that met small losses so far count more."""
        del step
        if self.weighting == "exponentiated":
            nothing = next(iter(leaves.values())).new_zeros(len(run.pools))
            met, now = (run.memory.get(name, nothing) for name in (_MET, _NOW))
            # A new table: a checkpoint after a step that failed has the one before.
            run.memory = {**run.memory, _MET: met + now, _NOW: nothing}

    def needs_merge(self) -> bool:
        """Whether the method merges concepts."""
        return False

    def double_backward(self) -> bool:
        """Whether the method differentiates gradients, which only plain attention allows."""
        return False

    def resumable_after_failure(self) -> bool:
        """Whether a step that failed has left the parameters as they were."""
        return True

    def diagnosis(self, run: Run, leaves: Parameters, step: int) -> dict[str, float]:
        """What a probe's record says beside the objective.

        Args:
            run: The run.
            leaves: theta, by name.
            step: Steps done.
        """
        del run, leaves, step
        return {}

    def remarks(self, history: Sequence[Mapping[str, float]]) -> list[str]:
        """Sentences for a person about a run's records."""
        del history
        return []

    def check(self, problem: ConceptSet) -> None:
        """Refuse concepts that the method cannot take."""
        del problem

    def fit(
        self,
        model: ModelLike,
        problem: ConceptSet,
        *,
        progress: Progress | None = None,
        resume: Path | None = None,
    ) -> ImmunizedPipeline:
        """Immunize a clone of a model against concepts.

        Args:
            model: The model, its pipeline or its folder; it is not changed. Concepts to be
                re-learned should be erased in it.
            problem: What to immunize against, what to keep, captions for the merge.
            progress: Called with what was done and the share done so far.
            resume: Folder for checkpoints: one that is there is gone on from. None are written
                without it.

        Returns:
            The immunized model with its history; its weights are those of the best probe.

        Raises:
            ImmunizationError: If a loss or gradient is not finite, or a parameter gets no gradient
                in the first step. The model given is untouched; the state before the step that
                failed is in the checkpoint, the best model so far in the error.
            ValueError: If a setting does not fit, or the checkpoint is of other settings, another
                model or other concepts (words and images), or of a longer run.
            MissingExtraError: If accelerate is not installed.

        Note:
            Deterministic on the CPU for a given number of threads; a run that was stopped and goes
            on gives the same bits as one that was not.
        """
        self.check(problem)
        return Run(self, TextToImage.of(model).clone(), problem, resume, progress).run()


class Run:
    """One immunization under way.

    Attributes:
        model: The clone.
        device: Where it runs.
        names: Names of the concepts.
        pools: One a concept.
        merge: The merge, for methods that have one.
        inner_losses: Losses that the adaptations of this step met.
        sweeps: Backward passes through them, where they are differentiated.
        memory: What a method carries from step to step beside the parameters.
        scale: Factor on losses while their gradients are computed: those of float16 vanish below
            6e-8.
    """

    def __init__(
        self,
        immunizer: Immunizer,
        model: TextToImage,
        concepts: ConceptSet,
        resume: Path | None,
        progress: Progress | None,
    ) -> None:
        accelerate = require_extra("accelerate", extra="diffusion", purpose="immunizers")
        self.settings, self.model, self.concepts = immunizer, model, concepts
        self.folder, self.progress = None if resume is None else Path(resume), progress
        self.digest = model.digest()
        # Precision is not accelerate's business: it fixes one for the life of the process.
        try:
            self.accelerator: Any = accelerate.Accelerator(
                log_with=immunizer.log_with,
                project_dir=None if resume is None else str(resume),
            )
        except ValueError as error:
            raise ValueError(
                f"{immunizer.method}: log_with must name a tracker that accelerate knows, with a "
                f"folder in resume if it writes files, got {immunizer.log_with!r}: {error}"
            ) from None
        if immunizer.log_with is not None and not self.accelerator.log_with:
            # accelerate leaves out what it cannot import, and says so in its debug log alone.
            raise ValueError(
                f"{immunizer.method}: log_with must name a tracker that is installed, got "
                f"{immunizer.log_with!r}; pip install it, or leave log_with out"
            )
        # Alone, the run stays where the model is; of several processes each has a device.
        alone = self.accelerator.num_processes == 1
        self.device: torch.device = model.device if alone else self.accelerator.device
        model.pipeline.to(self.device)
        for part in (model.unet, model.vae, *model.text_encoders):
            part.requires_grad_(False).eval()
        # Left on by the caller, it would compute blocks anew with the denoiser's own parameters.
        model.unet.disable_gradient_checkpointing()
        if immunizer.gradient_checkpointing:
            _checkpoint_blocks(model.unet)
            # Older versions checkpoint in training mode only; there is no dropout in these models.
            model.unet.train()
        self.moved = scope_parameters(model.unet, immunizer.scope, function=immunizer.method)
        half = immunizer.mixed_precision == "fp16" or model.dtype == torch.float16
        self.scale = _FLOAT16_SCALE if half else 1.0
        self.names = list(concepts.names)
        self.pools = [self._pool(concept) for concept in concepts.concepts]
        self.retain = Retain(
            model,
            concepts.retain,
            seed=immunizer.seed,
            prompts=immunizer.kept_prompts(concepts),
        )
        self.merge: Merge | None = self._merge() if immunizer.needs_merge() else None
        self.inner_losses: list[float] = []
        self.sweeps: list[list[Sweep]] = []
        self.memory: Parameters = {}

    def _pool(self, concept: Concept) -> ConceptPool:
        return ConceptPool(self.model, concept.images("immunize"), self.settings.wordings(concept))

    def _merge(self) -> ConceptMerge:
        settings: Any = self.settings
        return ConceptMerge(
            self.model,
            self.concepts.concepts,
            self.concepts.captions,
            ridge=settings.ridge,
            prompts_per_concept=settings.merge_prompts,
        )

    def generator(self, step: int, purpose: int, batch: int = 0) -> torch.Generator:
        """What draws in a step: the same in every repetition, another in every process."""
        rank = self.accelerator.process_index
        processes = self.accelerator.num_processes
        place = (step * self.settings.gradient_accumulation + batch) * processes + rank
        return generator_of(self.settings.seed, place, purpose)

    def draw(self, step: int, purpose: int, batch: int = 0) -> list[Batch]:
        """A batch of every concept, the same in every repetition of the step."""
        generator = self.generator(step, purpose, batch)
        return [pool.draw(self.settings.batch_size, generator) for pool in self.pools]

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that forward passes are computed in."""
        precision = self.settings.mixed_precision
        if precision == "no":
            return nullcontext()
        dtype = torch.bfloat16 if precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype=dtype)

    def _attention(self) -> AbstractContextManager[Any]:
        return self.model.math_attention() if self.settings.double_backward() else nullcontext()

    @contextmanager
    def inner(self) -> Iterator[None]:
        """What an adaptation's losses are computed in, also when a backward pass asks for them."""
        with self.autocast(), self._attention():
            yield

    def config(self) -> dict[str, Any]:
        """Settings and concepts as plain values."""
        return {
            **asdict(self.settings),
            "concepts": self.names,
            "retain": [concept.name for concept in self.concepts.retain],
            "captions": len(self.concepts.captions),
        }

    def run(self) -> ImmunizedPipeline:
        """Run to the end."""
        settings = self.settings
        meter = Meter(self.device)
        with meter.measure():
            # Steps in half precision would be lost in rounding: what moves is float32 or better.
            leaves = {
                name: at_least_float(parameter.detach()).clone().requires_grad_()
                for name, parameter in self.moved.items()
            }
            optimizer = torch.optim.Adam(list(leaves.values()), lr=settings.learning_rate)
            state = self._start(leaves, optimizer)
            if settings.log_with is not None:
                self.accelerator.init_trackers("immunize", config=_flat(self.config()))
            if settings.double_backward():
                _LOG.info(
                    "%s: attention by plain products, which differentiate twice", settings.method
                )
            # All of a step: checkpointed blocks are computed anew in the midst of backward passes.
            with self._attention():
                while state.step < settings.steps:
                    self._step(leaves, optimizer, state)
                # Not in the checkpoint: a run that goes on from here must not know of it.
                if state.step % settings.probe_every != 0:
                    self._probe(leaves, state)
            self.accelerator.end_training()
        return self._result(state, meter.peak_memory)

    def _result(self, state: LoopState, peak_memory: int = 0) -> ImmunizedPipeline:
        """The clone with the best parameters, in the data types it had."""
        with torch.no_grad():
            for name, parameter in self.moved.items():
                parameter.copy_(state.best[name])
        if self.settings.gradient_checkpointing:
            self.model.unet.disable_gradient_checkpointing()
        self.model.unet.eval()
        return ImmunizedPipeline(
            self.model,
            self.settings.method,
            self.config(),
            state.history,
            peak_memory,
            (*state.warnings, *self.settings.remarks(state.history)),
        )

    def _start(self, leaves: Parameters, optimizer: torch.optim.Adam) -> LoopState:
        state = LoopState(0, math.inf, {n: p.detach().clone() for n, p in leaves.items()}, [])
        if self.folder is not None:
            found = load_state(
                self.folder, self._identity, leaves, optimizer, steps=self.settings.steps
            )
            state = found or state
        self.memory = state.memory
        return state

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with: all that decides what a step computes."""
        return run_identity(self.settings, self.digest, self.concepts)

    def _step(self, leaves: Parameters, optimizer: torch.optim.Adam, state: LoopState) -> None:
        settings, step = self.settings, state.step
        started, merged = time.perf_counter(), self.merge.seconds if self.merge else 0.0
        self.inner_losses.clear()
        self.sweeps.clear()
        optimizer.zero_grad(set_to_none=True)
        settings.prepare(self, leaves, step)
        sums = {"loss": 0.0, "least_loss": 0.0, "retain": 0.0, "clamped": 0.0}
        for batch in range(settings.gradient_accumulation):
            objective, parts = self._objective(leaves, step, batch)
            value = float(objective.detach())
            if not math.isfinite(value):
                raise self._failure(f"the loss became {value}", leaves, optimizer, state)
            try:
                share = self.scale / settings.gradient_accumulation
                self.accelerator.backward(objective * share)
            except NegativeCurvatureError as error:
                raise self._failure(str(error), leaves, optimizer, state) from error
            for name, part in parts.items():
                sums[name] += part / settings.gradient_accumulation
        self._share_gradients(leaves)
        if step == 0:
            self._check_gradients(leaves, optimizer, state)
        size = float(nn.utils.clip_grad_norm_(leaves.values(), settings.gradient_clip))
        if not math.isfinite(size):
            raise self._failure(f"the gradient's norm became {size}", leaves, optimizer, state)
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step)
        optimizer.step()
        inner = self.inner_losses
        record = {
            "step": float(step + 1),
            **sums,
            "inner_loss": sum(inner) / len(inner) if inner else 0.0,
            "gradient_norm": size,
            "seconds": time.perf_counter() - started,
            "merge_seconds": (self.merge.seconds - merged) if self.merge else 0.0,
            **_summary([sweep for found in self.sweeps for sweep in found]),
        }
        state.step += 1
        state.memory = self.memory
        state.history.append(record)
        if state.step % settings.probe_every == 0:
            self._probe(leaves, state)
        self.accelerator.log(record, step=state.step)
        last = state.step == settings.steps
        if last or state.step % settings.checkpoint_every == 0:
            self._save(leaves, optimizer, state)
        if self.progress is not None:
            words = f"{settings.method}, step {state.step} of {settings.steps}"
            self.progress(words, state.step / settings.steps)

    def _objective(
        self, leaves: Parameters, step: int, batch: int
    ) -> tuple[Tensor, dict[str, float]]:
        """What is minimised, and its parts."""
        settings = self.settings
        retained = self.generator(step, RETAIN, batch)
        with self.autocast():
            upper = settings.attacked_losses(self, leaves, step, batch)
            kept = self.retain.loss(self.retain.draw(settings.retain_batch, retained), leaves)
        raised = upper.clamp(max=settings.loss_clamp)
        objective = settings.retain_weight * kept - settings.over_concepts(self, raised, step)
        clamped = float((upper.detach() >= settings.loss_clamp).float().mean())
        return objective, {
            "loss": float(upper.detach().mean()),
            "least_loss": float(upper.detach().reshape(len(self.pools), -1).mean(1).min()),
            "retain": float(kept.detach()),
            "clamped": clamped,
        }

    def _probe(self, leaves: Parameters, state: LoopState) -> None:
        """The objective on draws that are always the same; the best parameters are kept."""
        inner = list(self.inner_losses)
        here = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
        with self._reported(state):
            objective, _ = self._objective(here, PROBE_STEP, 0)
        state.history[-1] |= self.settings.diagnosis(self, here, state.step)
        self.inner_losses[:] = inner
        # The mean over processes, so that all of them keep the same iterate.
        value = float(self.accelerator.reduce(objective.detach(), reduction="mean"))
        state.history[-1]["objective"] = value
        if value < state.best_objective:
            state.best_objective = value
            state.best = {n: p.detach().clone() for n, p in leaves.items()}

    @contextmanager
    def _reported(self, state: LoopState) -> Iterator[None]:
        """Look at the merge in the block: how far it moves each layer, and what that means."""
        if self.merge is None:
            yield
            return
        self.merge.reports = []
        try:
            yield
            if self.merge.reports:
                change, said = summary(self.merge.reports)
                # Of all probes, what is said of the merge that moved the layers farthest is kept.
                worst = max(record.get("merge_change", -1.0) for record in state.history)
                state.history[-1]["merge_change"] = change
                if said and change > worst:
                    state.warnings = [f"merge at step {state.step}: {text}" for text in said]
        finally:
            self.merge.reports = None

    def _save(self, leaves: Parameters, optimizer: torch.optim.Adam, state: LoopState) -> None:
        if self.folder is not None and self.accelerator.is_main_process:
            save_state(self.folder, self._identity, leaves, optimizer, state)

    def _share_gradients(self, leaves: Parameters) -> None:
        """Average gradients over processes, so that all of them make the same step."""
        if self.scale != 1.0:
            for leaf in leaves.values():
                if leaf.grad is not None:
                    leaf.grad.div_(self.scale)
        if self.accelerator.num_processes > 1:
            for leaf in leaves.values():
                grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                leaf.grad = self.accelerator.reduce(grad, reduction="mean")

    def _check_gradients(
        self, leaves: Parameters, optimizer: torch.optim.Adam, state: LoopState
    ) -> None:
        dead = [n for n, p in leaves.items() if p.grad is None or not bool(p.grad.any())]
        # A bias in front of a softmax over one key, say, has a gradient of zero by its nature;
        # a projection without any is a model that does not use what is moved.
        dead = [name for name in dead if name.endswith("weight")]
        if dead:
            raise self._failure(
                f"{dead[0]} gets no gradient ({len(dead)} of {len(leaves)} parameters); it has no "
                "part in the loss, or every sample's loss is above loss_clamp",
                leaves,
                optimizer,
                state,
            )

    def _failure(
        self, what: str, leaves: Parameters, optimizer: torch.optim.Adam, state: LoopState
    ) -> ImmunizationError:
        where = ""
        if self.folder is not None:
            intact = all(bool(leaf.detach().isfinite().all()) for leaf in leaves.values())
            if state.step > 0 and intact and self.settings.resumable_after_failure():
                self._save(leaves, optimizer, state)
            where = f"; the last checkpoint is in {self.folder}"
        return ImmunizationError(
            f"{self.settings.method}: {what} in step {state.step + 1}; the model is unchanged"
            f"{where}; lower learning_rate or inner_rate",
            self._result(state),
        )


def run_identity(settings: Any, model: str, problem: ConceptSet) -> dict[str, Any]:
    """What decides what each step of a run computes, as plain values.

    Args:
        settings: The method.
        model: Digest of the model.
        problem: The concepts.
    """
    found = {name: value for name, value in asdict(settings).items() if name not in settings.free}
    return {"method": settings.method, "model": model, "concepts": problem.digest(), **found}


def _summary(sweeps: Sequence[Sweep]) -> dict[str, float]:
    """What a step's record says of its backward passes through adaptations."""
    if not sweeps:
        return {}
    return {
        "products": float(sum(sweep.products for sweep in sweeps)),
        "hypergradient_seconds": math.fsum(sweep.seconds for sweep in sweeps),
        "contraction": math.fsum(sweep.contraction for sweep in sweeps) / len(sweeps),
        "residual": max(sweep.residual for sweep in sweeps),
    }


def _checkpoint_blocks(unet: Any) -> None:
    """Gradient checkpointing that knows which parameters a block had in its forward pass.

    The loop puts parameters into the denoiser for the time of a call. Backward passes, which
    compute blocks anew, come later, when the denoiser has its own again; so each block keeps those
    it was called with.
    """

    def checkpoint(block: nn.Module, *inputs: Any, **more: Any) -> Any:
        now: dict[str, Tensor] = dict(block.named_parameters())

        def again(*given: Any) -> Any:
            return functional_call(block, now, given, more)

        return torch.utils.checkpoint.checkpoint(again, *inputs, use_reentrant=False)

    try:
        unet.enable_gradient_checkpointing(gradient_checkpointing_func=checkpoint)
    except TypeError:
        raise ValueError(
            "Immunizer: gradient_checkpointing must be off with this version of diffusers, which "
            "takes no checkpointing function; install diffusers 0.33 or newer"
        ) from None


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values that any tracker can show."""
    return {
        name: value if isinstance(value, (int, float, str, bool)) else str(value)
        for name, value in config.items()
    }
