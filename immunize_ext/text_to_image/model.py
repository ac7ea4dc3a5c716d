"""A text-to-image pipeline as training loops see it.

The loops need four things of a pipeline: what the text becomes, what an image becomes, the
denoising loss, and images for a prompt. Everything else stays diffusers' business.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from immunize_ext._extras import require_extra
from immunize_ext.hub import model_folder
from immunize_ext.storage import check_sealed, digest, new_folder, seal_folder
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
        hidden: Text features that the K and V projections receive, shape ``(b, t, d)``.
        pooled: Pooled text features, shape ``(b, d2)``, of models that take them (SDXL).
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
    """A thin view on a diffusers text-to-image pipeline (Stable Diffusion 1, 2 or XL).

    Args:
        pipeline: The pipeline; not copied.

    Attributes:
        pipeline: The pipeline itself.
        unet: The denoiser, without the wrapper of ``torch.compile`` if it has one.
        text_encoders: One or two text encoders.
        tokenizers: Their tokenizers.
        vae: The autoencoder.
        scheduler: The noise schedule for training, DDPM with the pipeline's own settings.

    Raises:
        ValueError: If the pipeline lacks one of these parts, or is meant for something else than
            images of a text: it takes images or masks as well, classes, or flow matching.
    """

    def __init__(self, pipeline: Any) -> None:
        diffusers = require_extra("diffusers", extra="diffusion", purpose="text-to-image models")
        for part in ("unet", "text_encoder", "tokenizer", "vae", "scheduler"):
            if getattr(pipeline, part, None) is None:
                raise ValueError(
                    f"TextToImage: pipeline must have {part}, got {type(pipeline).__name__} "
                    "without it; give a Stable Diffusion 1, 2 or XL pipeline"
                )
        self.pipeline = pipeline
        self.unet: Any = _uncompiled(pipeline.unet)
        self.vae: Any = pipeline.vae
        names = [""] + (["_2"] if getattr(pipeline, "text_encoder_2", None) is not None else [])
        self.text_encoders: list[Any] = [getattr(pipeline, f"text_encoder{n}") for n in names]
        self.tokenizers: list[Any] = [getattr(pipeline, f"tokenizer{n}") for n in names]
        _check_kind(pipeline, self.unet)
        self.scheduler: Any = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)

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
        encoded = self.pipeline.encode_prompt(
            prompt=texts,
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        hidden = encoded[0]
        pooled = encoded[2] if len(encoded) > 2 else None
        return Conditioning(hidden, pooled, self._mask(texts, hidden.shape[1]).to(hidden.device))

    def _mask(self, texts: list[str], length: int) -> Tensor:
        tokens = self.tokenizers[0](
            texts,
            padding="max_length",
            max_length=length,
            truncation=True,
            return_special_tokens_mask=True,
            return_tensors="pt",
        )
        # CLIP pads with its end of text: padding shows in the attention mask only.
        return (tokens["special_tokens_mask"] == 0) & (tokens["attention_mask"] == 1)

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
            mask[:, : self._shared_prefix(texts)] = False
        for text, own in zip(texts, mask, strict=True):
            # Left out silently, a concept would be lost without a sign.
            if not bool(own.any()):
                raise ValueError(
                    f"TextToImage.token_features: prompts must have tokens of their own, got "
                    f"{text!r} among {len(texts)}; leave it out"
                )
        return hidden[mask]

    def _shared_prefix(self, texts: list[str]) -> int:
        """Number of leading positions, special tokens included, that are the same in all."""
        ids = [self.tokenizers[0](text)["input_ids"] for text in texts]
        count = 0
        for column in zip(*ids, strict=False):
            if len(set(column)) > 1:
                break
            count += 1
        return count

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

        ``mean over (c, h, w) of (prediction(x_t, t, text) - target)^2`` with
        ``x_t = sqrt(abar_t) x + sqrt(1 - abar_t) noise``.

        Args:
            latents: Clean latents x, shape ``(b, c, h, w)``.
            conditioning: The text of each, or of one prompt for all.
            generator: Where noise and time steps are drawn from; the global one when omitted.
            noise: The noise, like ``latents``; drawn when omitted.
            timesteps: Time steps, shape ``(b,)``, integer; drawn when omitted.
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
            timesteps = torch.randint(
                0,
                self.scheduler.config.num_train_timesteps,
                (count,),
                generator=generator,
                device=generator.device if generator is not None else "cpu",
            )
        timesteps = timesteps.to(latents.device)
        if noise.shape != latents.shape or timesteps.shape != (count,):
            raise ValueError(
                f"TextToImage.noise_loss: noise and timesteps must have shapes "
                f"{tuple(latents.shape)} and ({count},), got {tuple(noise.shape)} and "
                f"{tuple(timesteps.shape)}"
            )
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        target = self.target(latents, noise, timesteps)
        prediction = self._predict(noisy, timesteps, conditioning, parameters)
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
        return self._predict(noisy, timesteps, conditioning, parameters)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should predict, shape as ``latents``; see ``noise_loss``."""
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "v_prediction":
            velocity: Tensor = self.scheduler.get_velocity(latents, noise, timesteps)
            return velocity
        if kind == "sample":
            return latents
        raise ValueError(
            "TextToImage.noise_loss: prediction_type must be epsilon, v_prediction or sample, got "
            f"{kind!r}"
        )

    def _predict(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        parameters: Mapping[str, Tensor] | None,
    ) -> Tensor:
        noisy = noisy.to(self.dtype)
        count = len(noisy)
        arguments: dict[str, Any] = {
            "encoder_hidden_states": _rows(conditioning.hidden, count).to(noisy.dtype),
            "return_dict": False,
        }
        if conditioning.pooled is not None:
            arguments["added_cond_kwargs"] = {
                "text_embeds": _rows(conditioning.pooled, count).to(noisy.dtype),
                "time_ids": self._time_ids(noisy),
            }
        if parameters is None:
            prediction: Tensor = self.unet(noisy, timesteps, **arguments)[0]
        else:
            # Parameters are moved in float32 where the model is kept in half precision.
            own = {name: self.unet.get_parameter(name).dtype for name in parameters}
            given = {name: value.to(own[name]) for name, value in parameters.items()}
            prediction = functional_call(self.unet, given, (noisy, timesteps), arguments)[0]
        return prediction

    def _time_ids(self, noisy: Tensor) -> Tensor:
        """SDXL's size conditioning: original size, crop corner, target size, in pixels."""
        scale = int(getattr(self.pipeline, "vae_scale_factor", 1))
        height, width = (side * scale for side in noisy.shape[-2:])
        row = torch.tensor([height, width, 0, 0, height, width], dtype=noisy.dtype)
        return row.to(noisy.device).expand(len(noisy), 6)

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
            ).images
        finally:
            self.pipeline.set_progress_bar_config(**bars)
            for module, mode in training.items():
                module.training = mode
        return images.to(torch.float32)

    def _modules(self) -> list[nn.Module]:
        return [self.unet, self.vae, *self.text_encoders]

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


def _uncompiled(part: Any) -> Any:
    """What ``torch.compile`` wrapped."""
    return getattr(part, "_orig_mod", part)


def _check_kind(pipeline: Any, unet: Any) -> None:
    """Refuse pipelines for something else than images of a text."""
    kind, config = type(pipeline).__name__, unet.config
    latents = getattr(pipeline.vae.config, "latent_channels", config.in_channels)
    takes = inspect.signature(type(pipeline).__call__).parameters
    given = next((name for name in ("image", "mask_image", "gligen_phrases") if name in takes), "")
    reason = ""
    if getattr(pipeline, "controlnet", None) is not None:
        reason = "a ControlNet"
    elif config.in_channels != latents:
        reason = f"a denoiser of {config.in_channels} channels beside latents of {latents}"
    elif given:
        reason = f"one that takes {given}"
    elif str(getattr(config, "attention_type", "")).startswith("gated"):
        reason = "grounded attention (GLIGEN)"
    elif getattr(config, "class_embed_type", None) or getattr(config, "num_class_embeds", None):
        reason = "a denoiser with classes"
    elif getattr(config, "encoder_hid_dim_type", None) == "ip_image_proj":
        reason = "a loaded IP-Adapter (unload_ip_adapter takes it out)"
    elif "Flow" in type(pipeline.scheduler).__name__:
        reason = f"flow matching ({type(pipeline.scheduler).__name__})"
    elif any(p.dtype.itemsize < 2 for p in unet.parameters()):
        reason = "weights in 8 bits (float16 is the least)"
    if reason:
        raise ValueError(
            f"TextToImage: pipeline must make images of a text alone, got {kind} with {reason}; "
            "give a plain Stable Diffusion 1, 2 or XL text-to-image pipeline"
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
