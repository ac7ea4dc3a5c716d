"""The loop that every attack on a text-to-image model runs, and its settings.

An attack trains on a few images of a concept with the denoising loss, as its user would. The model
it is given is never changed: it works on a clone. What moves differs from attack to attack and is
all that a subclass says.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from immunize_ext.runtime import Meter, own_randomness
from immunize_ext.seams import AttackCurve, Progress
from immunize_ext.text_to_image.attacks.prior import PriorPreservation, prior_preservation_loss
from immunize_ext.text_to_image.attacks.prompts import attack_prompt
from immunize_ext.text_to_image.attacks.target import Evaluate, Target
from immunize_ext.text_to_image.attacks.trainables import NewToken, Trainables, freeze
from immunize_ext.text_to_image.concepts import Concept
from immunize_ext.text_to_image.model import Conditioning, ModelLike, TextToImage

_MOMENTUM = 0.9


@dataclass
class Prepared:
    """A clone made ready: what moves in it.

    Attributes:
        trainables: What moves.
        tokens: New words, if any.
        lora: Settings of an adapter in the UNet, if any.
        text_lora: Settings of an adapter in each text encoder, if any.
        text_moves: Whether the text features change from step to step.
        before_training: What happens to the model before the first step; an attack of no steps
            leaves it as it is.
    """

    trainables: Trainables
    tokens: list[NewToken] = field(default_factory=list)
    lora: dict[str, Any] | None = None
    text_lora: dict[str, Any] | None = None
    text_moves: bool = False
    before_training: Callable[[], None] | None = None


class Adapted(NamedTuple):
    """A model after an attack.

    Attributes:
        model: The adapted clone.
        curve: How it went.
        weights: What the attack trained, by name.
        tokens: The new words, if any.
        lora: Settings of the adapter in the UNet, if there is one.
        text_lora: Settings of the adapters in the text encoders, if there are any.
    """

    model: TextToImage
    curve: AttackCurve
    weights: dict[str, Tensor]
    tokens: tuple[str, ...]
    lora: dict[str, Any] | None
    text_lora: dict[str, Any] | None = None


class _Pool(NamedTuple):
    """Samples an attack draws from: latents, and which prompt belongs to each."""

    latents: Tensor
    prompts: Tensor


@dataclass(frozen=True, kw_only=True)
class Adaptation(ABC):
    """Settings that all attacks share; see the subclasses.

    Defaults suit the embedded digits pipeline; runs on other models start from ``usual_rates``,
    those that scripts for Stable Diffusion have.

    Attributes:
        name: Name in curves and reports.
        learning_rate: Step size.
        images: Images per concept, drawn from the concept's ``attack`` split by the seed.
        batch_size: Images per step, at most those there are.
        prompt: How the concept is worded; see ``immunize_ext.text_to_image.attacks.prompts``.
        optimizer: ``"adamw"``, or ``"sgd"`` with momentum 0.9.
        weight_decay: Decoupled weight decay of AdamW; plain for SGD.
        gradient_clip: Largest norm of the whole gradient; ``None`` for no limit.
        snr_gamma: Cap of the signal-to-noise weighting; ``None`` for equal weights.
        gradient_checkpointing: Less memory for more time; gradients are the same.
        prior: Prior preservation; ``None`` for none.
    """

    labels: ClassVar[Mapping[str, str]] = {}

    usual_rates: ClassVar[Mapping[str, float]] = {}

    name: str = "adaptation"
    learning_rate: float = 1e-3
    images: int = 20
    batch_size: int = 20
    prompt: str = "canonical"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.01
    gradient_clip: float | None = 1.0
    snr_gamma: float | None = None
    gradient_checkpointing: bool = False
    prior: PriorPreservation | None = None

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        for setting in ("learning_rate", "gradient_clip", "snr_gamma"):
            value = getattr(self, setting)
            if value is not None and not (math.isfinite(value) and value > 0.0):
                raise ValueError(f"{self.name}: {setting} must be finite and positive, got {value}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0.0):
            raise ValueError(
                f"{self.name}: weight_decay must be finite and at least 0, got {self.weight_decay}"
            )
        for setting in ("images", "batch_size"):
            if getattr(self, setting) < 1:
                raise ValueError(
                    f"{self.name}: {setting} must be at least 1, got {getattr(self, setting)}"
                )
        if self.optimizer not in ("adamw", "sgd"):
            raise ValueError(
                f"{self.name}: optimizer must be 'adamw' or 'sgd', got {self.optimizer!r}"
            )

    @property
    def label(self) -> str:
        """What reports call it."""
        return self.labels.get(self.name, self.name.replace("_", " ").capitalize())

    @abstractmethod
    def _prepare(self, model: TextToImage, target: Sequence[Concept]) -> Prepared:
        """Say what moves; ``model`` is a frozen clone that may be changed."""

    def prompts(self, target: Target | Sequence[Concept]) -> dict[str, str]:
        """What this attack trains and generates each concept with.

        Args:
            target: What it wants, in the order given to :meth:`run`.

        Returns:
            Concept name to prompt.
        """
        wanted = Target.of(target)
        wording = self.prompt if wanted.prompt is None else wanted.prompt
        return {concept.name: attack_prompt(concept, wording) for concept in wanted.concepts}

    def run(
        self,
        model: ModelLike,
        target: Target | Sequence[Concept],
        *,
        steps: int,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> AttackCurve:
        """Attack a clone of a model, and measure it on the way.

        Args:
            model: What is attacked; it is not changed.
            target: What the attack wants and how it is judged, or its concepts alone.
            steps: Optimizer steps; none gives the model as it is.
            seed: Seed of everything random: which images, order, noise, initial weights.
            progress: Called with what was done and the share done so far.

        Returns:
            The curve.

        Raises:
            ValueError: If an argument is out of range.
            FloatingPointError: If the loss or a gradient is not finite.
            RuntimeError: If something that shall move gets no gradient.

        Note:
            Deterministic on the CPU: one seed gives one curve, bit for bit, whatever is evaluated
            and when. The global random generators are as they were.
        """
        return self.adapt(model, target, steps=steps, seed=seed, progress=progress).curve

    def adapt(
        self,
        model: ModelLike,
        target: Target | Sequence[Concept],
        *,
        steps: int,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Adapted:
        """As :meth:`run`, and give the adapted clone with its weights too."""
        model, wanted = TextToImage.of(model), Target.of(target)
        checkpoints = wanted.checkpoints(self.name, steps)
        with own_randomness(model.device, seed):
            clone = model.clone()
            freeze([clone.unet, clone.vae, *clone.text_encoders])
            prepared = self._prepare(clone, wanted.concepts)
            prepared.trainables.may_be_unused |= clone.unused(prepared.trainables.parameters)
            for module in (clone.unet, *clone.text_encoders):
                module.eval()
            if self.gradient_checkpointing:
                clone.unet.enable_gradient_checkpointing()
            run = _Run(self, clone, prepared, wanted.concepts, self.prompts(wanted), seed)
            curve = run.loop(steps, checkpoints, wanted.evaluate, progress)
            for token in prepared.tokens:
                token.settle()
        weights = {
            name: master.detach().clone() for name, master in prepared.trainables.masters.items()
        }
        words = tuple(token.token for token in prepared.tokens)
        return Adapted(clone, curve, weights, words, prepared.lora, prepared.text_lora)

    def settings(self) -> dict[str, Any]:
        """Settings as JSON can say them, with the kind of attack."""
        found: dict[str, Any] = {"kind": type(self).__name__}
        for entry in fields(self):
            value = getattr(self, entry.name)
            found[entry.name] = vars(value) if isinstance(value, PriorPreservation) else value
        return found


class _Run:
    """One attack under way on its own clone."""

    def __init__(
        self,
        attack: Adaptation,
        model: TextToImage,
        prepared: Prepared,
        concepts: Sequence[Concept],
        wording: dict[str, str],
        seed: int,
    ) -> None:
        self.attack, self.model, self.prepared = attack, model, prepared
        prepared.trainables.compute_in(model.dtype)
        self.concepts, self.seed = concepts, seed
        self.generator = torch.Generator().manual_seed(seed)
        self.prompts = [wording[concept.name] for concept in concepts]
        self.instances = self._instances()
        self.classes: _Pool | None = None
        if attack.prior is not None:
            self.classes = self._class_samples(attack.prior)
        self.conditioning: Conditioning | None = None
        if not prepared.text_moves:
            with torch.no_grad():
                self.conditioning = model.conditioning(self.prompts)

    def _instances(self) -> _Pool:
        latents, owners = [], []
        for index, concept in enumerate(self.concepts):
            images = concept.images("attack")
            if len(images) == 0:
                raise ValueError(
                    f"{self.attack.name}: concept {concept.name!r} must have images to attack "
                    "with, got none"
                )
            chosen = torch.randperm(len(images), generator=self.generator)[: self.attack.images]
            with torch.no_grad():
                latents.append(self.model.latents(images[chosen]))
            owners.append(torch.full((len(chosen),), index))
        return _Pool(torch.cat(latents), torch.cat(owners))

    def _class_samples(self, prior: PriorPreservation) -> _Pool:
        latents, owners = [], []
        for index, concept in enumerate(self.concepts):
            prompt = prior.prompt_for(concept)
            images = prior.class_images(self.model, prompt, seed=self.seed + index)
            with torch.no_grad():
                latents.append(self.model.latents(images))
            owners.append(torch.full((len(images),), len(self.prompts)))
            self.prompts.append(prompt)
        return _Pool(torch.cat(latents), torch.cat(owners))

    def _draw(self, pool: _Pool, count: int) -> tuple[Tensor, Tensor]:
        """Random samples of a pool, none twice while there are enough."""
        size = len(pool.latents)
        rounds = -(-count // size)
        index = torch.cat([torch.randperm(size, generator=self.generator) for _ in range(rounds)])
        index = index[:count]
        return pool.latents[index.to(pool.latents.device)], pool.prompts[index]

    def _loss(self) -> Tensor:
        count = min(self.attack.batch_size, len(self.instances.latents))
        latents, owners = self._draw(self.instances, count)
        if self.classes is not None:
            more, theirs = self._draw(self.classes, count)
            latents, owners = torch.cat([latents, more]), torch.cat([owners, theirs])
        timesteps = self.model.objective.draw(len(latents), self.generator)
        noise = torch.randn(latents.shape, generator=self.generator).to(latents)
        losses = self.model.noise_loss(
            latents,
            self._conditioning(owners),
            noise=noise,
            timesteps=timesteps,
            reduction="none",
        )
        if losses.shape != (len(latents),):
            raise ValueError(
                f"{self.attack.name}: noise_loss must give one loss a sample, shape "
                f"({len(latents)},), got {tuple(losses.shape)}"
            )
        weights = None
        if self.attack.snr_gamma is not None:
            weights = snr_weights(self.model.scheduler, timesteps, self.attack.snr_gamma).to(losses)
        if self.attack.prior is not None:
            return prior_preservation_loss(
                losses, prior_weight=self.attack.prior.weight, weights=weights
            )
        return (losses if weights is None else losses * weights).mean()

    def _conditioning(self, owners: Tensor) -> Conditioning:
        of_prompts = self.conditioning
        if of_prompts is None:
            of_prompts = self.model.conditioning(self.prompts)
        return of_prompts.select(owners)

    def _optimizer(self) -> torch.optim.Optimizer:
        leaves, attack = self.prepared.trainables.leaves, self.attack
        if attack.optimizer == "sgd":
            return torch.optim.SGD(
                leaves, attack.learning_rate, momentum=_MOMENTUM, weight_decay=attack.weight_decay
            )
        return torch.optim.AdamW(leaves, attack.learning_rate, weight_decay=attack.weight_decay)

    def _step(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        name, trainables = f"{self.attack.name}.run", self.prepared.trainables
        trainables.clear_gradients()
        loss = self._loss()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{name}: the loss must be finite, got {value} at step {step}; lower learning_rate "
                f"(now {self.attack.learning_rate:g})"
            )
        if loss.requires_grad:
            (loss * trainables.loss_scale).backward()
        trainables.collect_gradients()
        if step <= 2:
            trainables.check_gradients(name, step)
        trainables.check_finite(name, step)
        if self.attack.gradient_clip is not None:
            nn.utils.clip_grad_norm_(trainables.leaves, self.attack.gradient_clip)
        optimizer.step()
        trainables.publish()
        return value

    def loop(
        self,
        steps: int,
        checkpoints: list[int],
        evaluate: Evaluate | None,
        progress: Progress | None,
    ) -> AttackCurve:
        """Take the steps, and evaluate where asked."""
        meter = Meter(self.instances.latents.device)
        optimizer = self._optimizer()
        losses: list[float] = []
        scores: dict[str, list[float]] = {}
        done = 0
        first = self.prepared.before_training
        for until in dict.fromkeys([*checkpoints, steps]):
            with meter.measure():
                if first is not None and until > 0:
                    first()
                    first = None
                for step in range(done + 1, until + 1):
                    losses.append(self._step(optimizer, step))
                    if progress is not None:
                        progress(f"{self.attack.name}: step {step} of {steps}", step / steps)
            done = until
            if evaluate is not None and until in checkpoints:
                self._evaluate(evaluate, until, scores)
        self.prepared.trainables.clear_gradients()
        kept = checkpoints if evaluate is not None else []
        names = [concept.name for concept in self.concepts]
        config = self.attack.settings() | {
            "steps": steps,
            "evaluate_at": checkpoints,
            "seed": self.seed,
            "concepts": names,
            "prompts": self.prompts[: len(names)],
            "class_prompts": self.prompts[len(names) :],
            "images_used": len(self.instances.latents),
            "trained_parameters": sum(leaf.numel() for leaf in self.prepared.trainables.leaves),
        }
        return AttackCurve(
            attack=self.attack.name,
            target="+".join(names),
            steps=kept,
            scores=scores,
            losses=losses,
            seconds=meter.seconds,
            peak_memory=meter.peak_memory,
            config=config,
        )

    def _evaluate(self, evaluate: Evaluate, step: int, scores: dict[str, list[float]]) -> None:
        with own_randomness(self.instances.latents.device, self.seed), torch.no_grad():
            found = evaluate(self.model, step)
        self.prepared.trainables.check_dtypes(f"{self.attack.name}.run")
        if scores and set(found) != set(scores):
            raise ValueError(
                f"{self.attack.name}: evaluate must give the same scores at every step, got "
                f"{sorted(found)} at step {step} and {sorted(scores)} before"
            )
        for name, value in found.items():
            scores.setdefault(name, []).append(float(value))


def snr_weights(scheduler: Any, timesteps: Tensor, gamma: float) -> Tensor:
    """Weights that cap the signal-to-noise ratio at gamma, so that easy noise levels count less.

    With snr = a / (1 - a), a the scheduler's cumulative product at a step, the loss of predicting x
    counts min(snr, gamma). The losses of predicting the noise and v are snr and snr + 1 times that
    of x, so they count min(snr, gamma) / snr and min(snr, gamma) / (snr + 1).

    Args:
        scheduler: A diffusers scheduler with ``alphas_cumprod``.
        timesteps: Shape ``(b,)``.
        gamma: The cap.

    Returns:
        Weights, shape ``(b,)``, float32.

    Raises:
        ValueError: If the scheduler has no such product, being one of flow matching.

    Source:
        Hang et al., ICCV 2023.

    Example:
        >>> from types import SimpleNamespace
        >>> scheduler = SimpleNamespace(
        ...     alphas_cumprod=torch.tensor([0.9, 0.5]),
        ...     config=SimpleNamespace(prediction_type="epsilon"),
        ... )
        >>> [round(w, 4) for w in snr_weights(scheduler, torch.tensor([0, 1]), 3.0).tolist()]
        [0.3333, 1.0]
    """
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            "snr_gamma: must be None for flow matching, whose times are drawn by weight, got "
            f"{gamma} with {type(scheduler).__name__}"
        )
    a = scheduler.alphas_cumprod[timesteps.to(scheduler.alphas_cumprod.device)].to(torch.float32)
    snr = a / (1.0 - a)
    capped = snr.clamp(max=gamma)
    kind = scheduler.config.prediction_type
    if kind == "sample":
        return capped
    if kind == "v_prediction":
        return capped / (snr + 1.0)
    # At zero terminal signal the weight of the noise prediction is the limit, 1.
    return torch.where(snr == 0.0, 1.0, capped / snr)
