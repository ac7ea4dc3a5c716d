"""A text-to-image pipeline as training loops see it.

The loops need four things of a pipeline: what the text becomes, what an image becomes, the
denoising loss, and images for a prompt. Everything else stays diffusers' business.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from immunize_ext._extras import require_extra
from immunize_ext.hub import model_folder
from immunize_ext.storage import check_sealed, digest, new_folder, seal_folder
from immunize_ext.text_to_image.backbones import (
    COMPONENTS,
    Backbone,
    Given,
    Segment,
    denoiser_of,
    supported,
)
from immunize_ext.text_to_image.objectives import Objective, objective_of
from immunize_ext.text_to_image.pipeline_folder import (
    INDEX,
    check_folder,
    forget_places,
    saved_dtype,
    weights_variant,
)
from immunize_ext.text_to_image.projections import refuse_adapters


class Conditioning(NamedTuple):
    """What prompts become.

    Attributes:
        hidden: Features of tokens, as they enter the denoiser, shape ``(b, t, d)``.
        pooled: Pooled text features, shape ``(b, d2)``, of models that take them (SDXL, SD3, FLUX).
        mask: True for tokens of the prompt itself, False for special tokens and padding, shape
            ``(b, t)``.
    """

    hidden: Tensor
    pooled: Tensor | None
    mask: Tensor

    def select(self, index: Tensor) -> Conditioning:
        """Rows of a batch, in the order of ``index``."""
        index = index.to(self.hidden.device)
        pooled = None if self.pooled is None else self.pooled[index]
        return Conditioning(self.hidden[index], pooled, self.mask[index])


ModelLike: TypeAlias = "TextToImage | str | Path | Any"
"""A model, a diffusers pipeline, a folder or a name: what :meth:`TextToImage.of` takes."""


class TextToImage:
    """A thin view on a diffusers text-to-image pipeline: Stable Diffusion 1, 2, XL or 3, or FLUX.

    Args:
        pipeline: The pipeline; not copied.

    Attributes:
        pipeline: The pipeline itself.
        unet: The denoiser, without the wrapper of ``torch.compile`` if it has one. Also that of a
            model whose denoiser is a transformer.
        backbone: The family it is of.
        text_encoders: One to three text encoders.
        tokenizers: Their tokenizers.
        vae: The autoencoder.
        objective: What the denoiser is trained for, as the scheduler says.

    Raises:
        ValueError: If the pipeline lacks one of these parts, or is meant for something else than
            images of a text: it takes images or masks as well, or classes.
    """

    def __init__(self, pipeline: Any) -> None:
        denoiser, family = denoiser_of(pipeline)
        needed = ["text_encoder", "tokenizer", "vae", "scheduler"]
        missing = [part for part in needed if getattr(pipeline, part, None) is None]
        if denoiser is None:
            missing.insert(0, " or ".join(COMPONENTS))
        if missing:
            raise ValueError(
                f"TextToImage: pipeline must have {missing[0]}, got {type(pipeline).__name__} "
                f"without it; give a pipeline of {supported()}"
            )
        if family is None:
            raise ValueError(
                f"TextToImage: pipeline must have a denoiser of a family that is known, got "
                f"{type(denoiser).__name__}; give a pipeline of {supported()}"
            )
        self.pipeline = pipeline
        self.backbone: Backbone = family
        self.unet: Any = denoiser
        self.vae: Any = pipeline.vae
        names = [
            n for n in family.encoders if getattr(pipeline, f"text_encoder{n}", None) is not None
        ]
        self.text_encoders: list[Any] = [getattr(pipeline, f"text_encoder{n}") for n in names]
        self.tokenizers: list[Any] = [getattr(pipeline, f"tokenizer{n}") for n in names]
        _check_kind(pipeline, family, denoiser)
        self.objective: Objective = objective_of(pipeline.scheduler)

    @classmethod
    def of(cls, model: ModelLike) -> TextToImage:
        """A model as it is, or the view on what is given.

        Args:
            model: A :class:`TextToImage`, a diffusers pipeline, or what :meth:`from_pretrained`
                takes: a folder, or a name on huggingface.co.

        Returns:
            The view; a pipeline is not copied.

        Raises:
            FileNotFoundError: If what is named is not there.
            ValueError: If it is a model of another kind.

        Example:
            >>> from immunize_ext.text_to_image.digits.pipeline import load_digits_pipeline
            >>> pipeline = load_digits_pipeline()
            >>> TextToImage.of(pipeline).pipeline is pipeline
            True
        """
        if isinstance(model, TextToImage):
            return model
        return cls.from_pretrained(model) if isinstance(model, (str, Path)) else cls(model)

    @classmethod
    def from_pipeline(cls, pipeline: Any) -> TextToImage:
        """View a pipeline; the same as the constructor."""
        return cls(pipeline)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        device: torch.device | str = "cpu",
    ) -> TextToImage:
        """Load a pipeline from a folder, or by its name on huggingface.co.

        Args:
            path: A folder in diffusers' layout with safetensors files, or ``owner/model`` (with
                ``@revision`` where it matters), which is fetched once. No code of it is run: a
                folder that asks for code is refused.
            dtype: Data type of all parts; the one that the denoiser was saved in when omitted.
            variant: Which files to read, such as ``"fp16"``; the only one there is when omitted.
            device: Where it shall be.

        Returns:
            The view on it.

        Raises:
            FileNotFoundError: If there is no such folder, it holds no pipeline, or what is named
                can not be fetched.
            ValueError: If it holds code, classes that diffusers and transformers do not have,
                pickled weights, another kind of pipeline, or a file that was damaged since
                :meth:`save` wrote it.
        """
        diffusers = require_extra("diffusers", extra="diffusion", purpose="text-to-image models")
        function = "TextToImage.from_pretrained"
        folder = model_folder(path, function=function, index=INDEX, variant=variant)
        if not (folder / INDEX).is_file():
            raise FileNotFoundError(
                f"{function}: {path} must be a folder with model_index.json; "
                "give the folder that DiffusionPipeline.save_pretrained wrote"
            )
        check_sealed(folder, function=function)
        check_folder(function, folder)
        variant = weights_variant(function, folder, variant)
        options: dict[str, Any] = {"torch_dtype": dtype or saved_dtype(folder, variant)}
        with _quiet_files():
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, variant=variant, **options
            )
        return cls(pipeline).to(device)

    def to(self, device: torch.device | str) -> TextToImage:
        """Move every part to a device, in place."""
        if self.device != torch.device(device):
            self.pipeline.to(device)
        return self

    def clone(self) -> TextToImage:
        """Copy every part, attention processors and hooks included."""
        kind = type(self.pipeline)
        modules, settings = kind._get_signature_keys(kind)
        parts: dict[str, Any] = {
            # torch.compile belongs to the original: a clone is there to be changed.
            name: copy.deepcopy(_uncompiled(getattr(self.pipeline, name, None)))
            for name in modules
        }
        for name in settings:
            if name in self.pipeline.config:
                parts[name] = self.pipeline.config[name]
        parts = {name: value for name, value in parts.items() if name != "self"}
        return type(self)(kind(**parts))

    def save(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        extra: Mapping[str, str] | None = None,
    ) -> None:
        """Write the pipeline in diffusers' layout: all of it, or nothing.

        Args:
            path: The folder to write; its parents are made.
            overwrite: Whether a pipeline that is there already is replaced.
            extra: Text files to put beside it, by their path in the folder.

        Raises:
            FileExistsError: If the folder exists and is not to be replaced, or holds something
                that is no pipeline.
            OSError: If it cannot be written; an existing one is then untouched.
            ValueError: If adapters are injected, under which no library would find the weights.
        """
        target = Path(path)
        if target.exists() and not (overwrite and (target / INDEX).is_file()):
            raise FileExistsError(
                f"TextToImage.save: {path} exists; choose another folder, or overwrite a pipeline "
                "with overwrite=True"
            )
        for part in self._modules():
            refuse_adapters("TextToImage.save", part.named_modules())
        with new_folder(target) as writing:
            with _quiet_files():
                self.pipeline.save_pretrained(writing, safe_serialization=True)
            forget_places(writing)
            for name, text in (extra or {}).items():
                (writing / name).write_text(text, encoding="utf-8")
            for file in writing.rglob("*.safetensors"):
                file.chmod(0o644)  # some versions of safetensors make them private
            seal_folder(writing)

    def digest(self) -> str:
        """Of all that decides what it does: equal for equal models, wherever they came from."""
        schedule = {k: v for k, v in self.scheduler.config.items() if k[0] != "_"}
        words = [tokenizer.get_vocab() for tokenizer in self.tokenizers]
        return digest(schedule, words, self._modules())[:16]

    @property
    def scheduler(self) -> Any:
        """The noise schedule for training, with the pipeline's own settings."""
        return self.objective.scheduler

    @property
    def _scale(self) -> int:
        """Pixels in the side of a latent."""
        return int(getattr(self.pipeline, "vae_scale_factor", 1))

    @property
    def image_size(self) -> int:
        """Side of the images that are drawn, in pixels.

        Set it where the denoiser has no size of its own (FLUX); elsewhere that has no effect. Then
        it stands in the settings of the autoencoder, and is saved with them.
        """
        own = self._own_size()
        return int(self.vae.config.sample_size) if own is None else own * self._scale

    @image_size.setter
    def image_size(self, size: int) -> None:
        if self._own_size() is None:
            self.vae.register_to_config(sample_size=size)

    def _own_size(self) -> int | None:
        """Side of the latents that the denoiser was made for."""
        side = getattr(self.unet.config, "sample_size", None)
        return None if side is None else int(side)

    @property
    def device(self) -> torch.device:
        """Device of the denoiser."""
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the denoiser's weights."""
        return next(self.unet.parameters()).dtype

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """What the denoiser sees of prompts, through the pipeline's own encoding.

        Args:
            prompts: One or more prompts.

        Returns:
            The features; differentiable in the text encoders' parameters.

        Raises:
            ValueError: If there is no prompt.
        """
        texts = list(prompts)
        if not texts:
            raise ValueError("TextToImage.conditioning: prompts must hold at least one, got none")
        hidden, pooled = self.backbone.encode(self.pipeline, texts, self.device)
        return Conditioning(hidden, pooled, self._mask(texts, hidden.shape[1]).to(hidden.device))

    def segments(self, length: int) -> tuple[Segment, ...]:
        """Which tokenizer accounts for which of ``length`` positions of the features."""
        return self.backbone.segments(self.pipeline, length)

    def _mask(self, texts: list[str], length: int) -> Tensor:
        mask = torch.zeros(len(texts), length, dtype=torch.bool)
        for segment in self.segments(length):
            tokens = self.tokenizers[segment.tokenizer](
                texts,
                padding="max_length",
                max_length=segment.length,
                truncation=True,
                return_special_tokens_mask=True,
                return_tensors="pt",
            )
            # CLIP pads with its end of text: padding shows in the attention mask only.
            words = (tokens["special_tokens_mask"] == 0) & (tokens["attention_mask"] == 1)
            mask[:, segment.start : segment.start + segment.length] = words
        return mask

    def token_features(
        self,
        prompts: Sequence[str],
        *,
        positions: Literal["tokens", "last", "all"] = "tokens",
        drop_shared_prefix: bool = False,
    ) -> Tensor:
        """Text features as the K and V projections receive them, one row a token.

        Args:
            prompts: One or more prompts.
            positions: ``"tokens"`` for every token of the prompts, without special tokens and
                padding; ``"last"`` for the last of each prompt; ``"all"`` for every position.
            drop_shared_prefix: Leave out the leading tokens that all prompts begin with. Text
                encoders that look backwards only give them the same features in each prompt.

        Returns:
            The rows in the order of the prompts, shape ``(s, d)``, detached.

        Raises:
            ValueError: If a prompt has no row, being empty or a part of the shared prefix.
        """
        texts = list(prompts)
        with torch.no_grad():
            hidden, _, mask = self.conditioning(texts)
        if positions == "all":
            mask = torch.ones_like(mask)
        elif positions == "last":
            order = torch.arange(mask.shape[1], device=mask.device)
            last = torch.where(mask, order, -1).amax(1, keepdim=True)
            mask = mask & (order == last)
        if drop_shared_prefix and len(texts) > 1:
            mask = mask.clone()
            for segment in self.segments(mask.shape[1]):
                if segment.looks_back:
                    shared = self._shared_prefix(texts, segment)
                    mask[:, segment.start : segment.start + shared] = False
        for text, own in zip(texts, mask, strict=True):
            # Left out silently, a concept would be lost without a sign.
            if not bool(own.any()):
                raise ValueError(
                    f"TextToImage.token_features: prompts must have tokens of their own, got "
                    f"{text!r} among {len(texts)}; leave it out"
                )
        return hidden[mask]

    def _shared_prefix(self, texts: list[str], segment: Segment) -> int:
        """Number of leading positions, special tokens included, that are the same in all."""
        ids = [self.tokenizers[segment.tokenizer](text)["input_ids"] for text in texts]
        count = 0
        for column in zip(*ids, strict=False):
            if len(set(column)) > 1:
                break
            count += 1
        return count

    @torch.no_grad()
    def received(self, conditioning: Conditioning, layer: str) -> Tensor:
        """What a layer of the denoiser that is reached by text alone receives for prompts.

        Args:
            conditioning: The prompts.
            layer: Name of the layer.

        Returns:
            Its input: ``(b, t, d)`` of one by which tokens enter, ``(b, d)`` of one that takes a
            vector a prompt. In SDXL the latter holds the size conditioning too.

        Raises:
            ValueError: If a call of the denoiser does not reach the layer.

        Note:
            The denoiser is called no further than to the layer.
        """
        heard: list[Tensor] = []

        def listen(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            heard.append(inputs[0].detach())
            raise _HeardError

        latents, count = self.backbone.sizes(self.unet.config).latents, len(conditioning.hidden)
        side = self.image_size // self._scale
        noisy = torch.zeros(count, latents[0], side, side, dtype=self.dtype, device=self.device)
        handle = self.unet.get_submodule(layer).register_forward_pre_hook(listen)
        try:
            self.predict(noisy, torch.zeros(count, device=self.device), conditioning)
        except _HeardError:
            return heard[0]
        finally:
            handle.remove()
        raise ValueError(
            f"TextToImage.received: {layer} must be reached by text, got no call of it"
        )

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Latents of images: the mean of the autoencoder's distribution, scaled for the denoiser.

        Args:
            images: Shape ``(b, c, h, w)``, in [-1, 1]; brought to the channels that the
                autoencoder has, where these are grey or colour.

        Returns:
            The latents, in the denoiser's data type.

        Raises:
            ValueError: If the shape or the range is another.
        """
        if images.ndim != 4:
            raise ValueError(
                f"TextToImage.latents: images must have shape (b, c, h, w), got "
                f"{tuple(images.shape)}"
            )
        if (
            images.numel()
            and not -1.0 - 1e-3 <= float(images.min()) <= float(images.max()) <= 1.001
        ):
            raise ValueError(
                "TextToImage.latents: images must lie in [-1, 1], got "
                f"[{float(images.min()):.4g}, {float(images.max()):.4g}]"
            )
        weight = next(self.vae.parameters())
        images = _with_channels(images, int(self.vae.config.in_channels))
        encoded = self.vae.encode(images.to(weight.device, weight.dtype))
        z = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        config: Any = self.vae.config
        shift = getattr(config, "shift_factor", None) or 0.0
        return ((z - shift) * config.scaling_factor).to(self.device, self.dtype)

    def noise_loss(
        self,
        latents: Tensor,
        conditioning: Conditioning,
        *,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        timesteps: Tensor | None = None,
        parameters: Mapping[str, Tensor] | None = None,
        reduction: Literal["mean", "none"] = "mean",
    ) -> Tensor:
        """The denoising loss: mean squared error of the predicted noise (or velocity).

        ``mean over (c, h, w) of (prediction(x_t, t, text) - target)^2``; x_t and the target are
        those of ``objective``: noise prediction or rectified flow
        (:mod:`immunize_ext.text_to_image.objectives`).

        Args:
            latents: Clean latents x, shape ``(b, c, h, w)``.
            conditioning: The text of each, or of one prompt for all.
            generator: Where noise and time steps are drawn from; the global one when omitted.
            noise: The noise, like ``latents``; drawn when omitted.
            timesteps: Time steps, shape ``(b,)``, as ``objective.draw`` gives them (integers for
                noise prediction, floats for flow matching); drawn when omitted.
            parameters: Values to use instead of the denoiser's own parameters, by name, in any
                floating dtype; gradients flow into them, the model is not touched.
            reduction: ``"none"`` for one loss a sample, shape ``(b,)``; ``"mean"`` for their mean.

        Returns:
            The loss, in float32 or better.

        Raises:
            ValueError: If shapes do not fit, or the schedule predicts something unknown.
        """
        count = len(latents)
        if len(conditioning.hidden) not in (1, count):
            raise ValueError(
                f"TextToImage.noise_loss: conditioning must have 1 or {count} rows, got "
                f"{len(conditioning.hidden)}"
            )
        if noise is None:
            noise = _draw_normal(latents, generator)
        if timesteps is None:
            timesteps = self.objective.draw(count, generator)
        timesteps = timesteps.to(latents.device)
        if noise.shape != latents.shape or timesteps.shape != (count,):
            raise ValueError(
                f"TextToImage.noise_loss: noise and timesteps must have shapes "
                f"{tuple(latents.shape)} and ({count},), got {tuple(noise.shape)} and "
                f"{tuple(timesteps.shape)}"
            )
        noisy = self.objective.mix(latents, noise, timesteps)
        target = self.objective.target(latents, noise, timesteps)
        prediction = self.predict(noisy, timesteps, conditioning, parameters=parameters)
        error = at_least_float(prediction) - at_least_float(target)
        losses = error.square().flatten(1).mean(1)
        return losses if reduction == "none" else losses.mean()

    def predict(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        *,
        parameters: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """What the denoiser predicts for noisy latents, shape as ``noisy``; see ``noise_loss``."""
        noisy = noisy.to(self.dtype)
        count = len(noisy)
        pooled = conditioning.pooled
        run: Callable[..., Any] = self.unet
        if parameters is not None:
            # Parameters are moved in float32 where the model is kept in half precision.
            own = {name: self.unet.get_parameter(name).dtype for name in parameters}
            given = {name: value.to(own[name]) for name, value in parameters.items()}

            def moved(*inputs: Any, **more: Any) -> Any:
                return functional_call(self.unet, given, inputs, more)

            run = moved

        called = Given(
            noisy,
            timesteps,
            _rows(conditioning.hidden, count).to(noisy.dtype),
            None if pooled is None else _rows(pooled, count).to(noisy.dtype),
            self._scale,
        )
        return self.backbone.predict(run, self.unet.config, called)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        steps: int = 20,
        guidance: float = 1.5,
        seed: int = 0,
    ) -> Tensor:
        """Images for prompts, by the pipeline itself.

        Args:
            prompts: One prompt an image.
            steps: Denoising steps.
            guidance: Classifier-free guidance scale.
            seed: Image i starts from seed ``seed + i``, whatever else is in the batch.

        Returns:
            Shape ``(b, c, h, w)``, float32 in [0, 1].

        Note:
            The global random generator is not used; the pipeline's progress bar is off meanwhile.
        """
        texts = list(prompts)
        generators = [torch.Generator().manual_seed(seed + index) for index in range(len(texts))]
        bars = dict(getattr(self.pipeline, "_progress_bar_config", {}))
        training = {m: m.training for part in self._modules() for m in part.modules()}
        size = {} if self._own_size() else dict.fromkeys(("height", "width"), self.image_size)
        self.pipeline.set_progress_bar_config(disable=True)
        try:
            for part in self._modules():
                part.eval()
            images = self.pipeline(
                texts,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=generators,
                output_type="pt",
                **size,
            ).images
        finally:
            self.pipeline.set_progress_bar_config(**bars)
            for module, mode in training.items():
                module.training = mode
        return images.to(torch.float32)

    def _modules(self) -> list[nn.Module]:
        return [self.unet, self.vae, *self.text_encoders]

    def unused(self, names: Iterable[str]) -> set[str]:
        """Those of ``names`` (``"unet. ..."``, as attacks name parameters) that no output needs."""
        part = self.backbone.component
        idle = tuple(f"{part}.{layer}." for layer in self.backbone.unused(self.unet.config))
        return {name for name in names if name.startswith(idle)} if idle else set()

    @contextmanager
    def math_attention(self) -> Iterator[None]:
        """Attention by plain matrix products in the block: it alone can be differentiated twice.

        Source:
            pytorch/pytorch#116350: flash and memory-efficient attention have no double backward.
        """
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            yield


# ITU-R BT.601, as image libraries turn colour into grey.
_LUMA = (0.299, 0.587, 0.114)


def _with_channels(images: Tensor, channels: int) -> Tensor:
    if images.shape[1] == 3 and channels == 1:
        return (images * images.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    return images.expand(-1, channels, -1, -1) if images.shape[1] == 1 else images


class _HeardError(Exception):
    """A layer has been reached; the rest of the call is of no interest."""


def _uncompiled(part: Any) -> Any:
    """What ``torch.compile`` wrapped."""
    return getattr(part, "_orig_mod", part)


def _check_kind(pipeline: Any, family: Backbone, denoiser: Any) -> None:
    """Refuse pipelines for something else than images of a text."""
    kind = type(pipeline).__name__
    takes = inspect.signature(type(pipeline).__call__).parameters
    given = next((name for name in ("image", "mask_image", "gligen_phrases") if name in takes), "")
    reason = family.refusal(pipeline)
    if getattr(pipeline, "controlnet", None) is not None:
        reason = "a ControlNet"
    elif reason:
        pass
    elif given:
        reason = f"one that takes {given}"
    elif any(p.dtype.itemsize < 2 for p in denoiser.parameters()):
        reason = "weights in 8 bits (float16 is the least)"
    if reason:
        raise ValueError(
            f"TextToImage: pipeline must make images of a text alone, got {kind} with {reason}; "
            f"give a plain text-to-image pipeline of {family.kinds}"
        )


def _rows(tensor: Tensor, count: int) -> Tensor:
    return tensor if len(tensor) == count else tensor.expand(count, *tensor.shape[1:])


def at_least_float(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is in float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def _draw_normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else "cpu"
    return torch.randn(like.shape, generator=generator, device=device).to(like)


@contextmanager
def _quiet_files() -> Iterator[None]:
    """No progress bars of the libraries that read and write models in the block."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_on = diffusers_logging.is_progress_bar_enabled()
    transformers_on = transformers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # The older name, which every supported version of diffusers takes.
            warnings.filterwarnings("ignore", message=".*`torch_dtype` is deprecated.*")
            yield
    finally:
        if diffusers_on:
            diffusers_logging.enable_progress_bar()
        if transformers_on:
            transformers_logging.enable_progress_bar()
