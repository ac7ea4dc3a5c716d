"""Similarity of images to reference images and to prompts: CLIP, DINO, LPIPS.

All take images as ``TextToImage.generate`` gives them: floating, in [0, 1], shape ``(b, c, h, w)``
with one or three channels. What a model wants instead (its size, its mean and spread, [-1, 1] for
LPIPS) is made here, once, so that no caller has to know; images in another range are refused,
because a metric fed with them gives numbers that look fine.

Models come as objects or from a local folder; nothing is downloaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from immunize_ext._extras import require_extra
from immunize_ext.hub import model_folder
from immunize_ext.storage import digest
from immunize_ext.text_to_image.concepts import Concept
from immunize_ext.text_to_image.digits.judge import DigitJudge, Errors
from immunize_ext.text_to_image.metrics.generation import JudgeErrors
from immunize_ext.text_to_image.pipeline_folder import refuse_code

Pairs = Literal["all", "matched"]


Triple = tuple[float, float, float]


# What the published models were trained with.
_CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)


_CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)


_IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)


_IMAGENET_STD: Triple = (0.229, 0.224, 0.225)


_SAFELY = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}


# Bicubic resizing and rounding overshoot the range a little; a wrong range overshoots it a lot.
_SLACK = 1e-3


def check_images(function: str, argument: str, images: Tensor) -> Tensor:
    """Refuse anything but floating images in [0, 1], and give them three channels.

    Args:
        function: Who asks; stands in the error.
        argument: Name of the argument; stands in the error.
        images: Shape ``(b, c, h, w)``, c = 1 or 3.

    Returns:
        float32 images of shape ``(b, 3, h, w)``.

    Raises:
        ValueError: If shape, dtype or range is another one, or a value is not finite.

    Example:
        >>> check_images("demo", "images", torch.zeros(1, 1, 8, 8)).shape
        torch.Size([1, 3, 8, 8])
        >>> check_images("demo", "images", -torch.ones(1, 3, 8, 8))
        Traceback (most recent call last):
            ...
        ValueError: demo: images must lie in [0, 1], got values from -1 to -1; for images in \
[-1, 1] give (images + 1) / 2
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3) or images.shape[0] == 0:
        raise ValueError(
            f"{function}: {argument} must have shape (b, c, h, w) with 1 or 3 channels and at "
            f"least one image, got {tuple(images.shape)}"
        )
    if not images.is_floating_point():
        raise ValueError(
            f"{function}: {argument} must be floating, got {images.dtype}; divide bytes by 255"
        )
    images = images.detach().to(torch.float32)
    if not bool(torch.isfinite(images).all()):
        raise ValueError(f"{function}: {argument} must be finite, got NaN or infinity")
    low, high = float(images.min()), float(images.max())
    if low < -_SLACK or high > 1.0 + _SLACK:
        advice = "divide by 255" if high > 2.0 else "for images in [-1, 1] give (images + 1) / 2"
        raise ValueError(
            f"{function}: {argument} must lie in [0, 1], got values from {low:.3g} to {high:.3g}; "
            f"{advice}"
        )
    return images.clamp(0.0, 1.0).expand(-1, 3, -1, -1)


def _prepared(images: Tensor, size: int, mean: Triple, std: Triple) -> Tensor:
    """Shorter side to ``size`` (bicubic, antialiased), centre crop, normalised."""
    height, width = images.shape[-2:]
    scale = size / min(height, width)
    target = max(size, round(height * scale)), max(size, round(width * scale))
    if target != (height, width):
        images = functional.interpolate(
            images, target, mode="bicubic", align_corners=False, antialias=True
        ).clamp(0.0, 1.0)
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    images = images[..., top : top + size, left : left + size]
    shape = (1, 3, 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)


def _cosine(function: str, a: Tensor, b: Tensor, pairs: Pairs) -> float:
    """Mean cosine of all pairs of rows, or of rows with the same index; at most 1."""
    if pairs not in ("all", "matched"):
        raise ValueError(f"{function}: pairs must be 'all' or 'matched', got {pairs!r}")
    if pairs == "matched" and len(a) != len(b):
        raise ValueError(
            f"{function}: matched pairs need as many on both sides, got {len(a)} and {len(b)}; "
            "use pairs='all'"
        )
    a, b = (functional.normalize(x.to(torch.float64), dim=-1) for x in (a, b))
    values = (a * b).sum(-1) if pairs == "matched" else a @ b.mT
    return float(values.clamp(-1.0, 1.0).mean())


def _plain_settings(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Mean and spread as the folder's image processor has them; empty if it has none."""
    file = Path(folder) / "preprocessor_config.json"
    if not file.is_file():
        return {}
    settings = json.loads(file.read_text(encoding="utf-8"))
    names = (("mean", "image_mean"), ("std", "image_std"))
    return {ours: tuple(settings[theirs]) for ours, theirs in names if theirs in settings}


def _local(function: str, folder: str | os.PathLike[str]) -> str:
    """A folder of weights and settings alone, fetched where it is named as a hub has it."""
    folder = model_folder(os.fspath(folder), function=function, index="config.json")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{function}: path must be a folder with a model (config.json) or a name on "
            f"huggingface.co (owner/model), got {os.fspath(folder)}"
        )
    refuse_code(function, Path(folder))
    if not any(Path(folder).glob("*.safetensors")):
        raise ValueError(
            f"{function}: path must hold safetensors files, got none in {os.fspath(folder)}; "
            "pickled weights are not read: save the model with safe_serialization=True"
        )
    return os.fspath(folder)


def _image_size(model: nn.Module, size: int | None) -> int:
    if size is not None:
        return size
    config: Any = model.config
    config = getattr(config, "vision_config", config)
    return int(config.image_size)


class _Features:
    """A vision model with the input it wants; subclasses say which output is the feature."""

    _name = ""

    def __init__(
        self, model: nn.Module, *, size: int | None, mean: Triple, std: Triple, batch_size: int
    ) -> None:
        self.model = model.eval()
        self.size, self.mean, self.std = _image_size(model, size), mean, std
        self.batch_size = batch_size
        self._source: tuple[str, dict[str, Any]] | None = None

    def _forward(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError

    def identity(self) -> str:
        """Of the model and the input it is given."""
        return f"{self._name} {digest(self.model, self.size, self.mean, self.std)}"

    def __reduce__(self) -> Any:
        """Another process reads the folder that the model came from, if it came from one."""
        if self._source is None:
            return super().__reduce__()
        device = next(self.model.parameters()).device
        return _from_folder, (type(self), *self._source, device)

    def features(self, images: Tensor, argument: str = "images") -> Tensor:
        """Features of images in [0, 1], shape ``(b, f)``, on the model's device."""
        images = check_images(f"{self._name}", argument, images)
        weight = next(self.model.parameters())
        found = []
        with torch.no_grad():
            for chunk in images.split(self.batch_size):
                pixels = _prepared(chunk.to(weight.device), self.size, self.mean, self.std)
                found.append(self._forward(pixels.to(weight.dtype)).float())
        return torch.cat(found)

    def image_image(self, images: Tensor, references: Tensor, *, pairs: Pairs = "all") -> float:
        """Mean cosine similarity between images and reference images.

        Args:
            images: In [0, 1], shape ``(b, c, h, w)``.
            references: In [0, 1], shape ``(r, c, h', w')``.
            pairs: Every image with every reference, or the first with the first and so on.

        Returns:
            The mean, from -1 to 1; 1 for matched identical images.

        Raises:
            ValueError: If shape, dtype or range of one side is another one.
        """
        sides = self.features(images), self.features(references, "references")
        return _cosine(f"{self._name}.image_image", *sides, pairs)


def _from_folder(kind: Any, folder: str, settings: dict[str, Any], device: torch.device) -> Any:
    made = kind.from_pretrained(folder, **settings)
    made.model.to(device)
    return made


class ClipSimilarity(_Features):
    """CLIP similarity of images to images and to prompts.

    Args:
        model: A ``transformers`` CLIP model (or one with its ``get_image_features`` and
            ``get_text_features``).
        tokenizer: Its tokenizer; needed for prompts only.
        size: Side that images are brought to; that of the model's configuration when omitted.
        mean: Mean that the model was trained with, per channel.
        std: Spread that it was trained with, per channel.
        batch_size: Images in one forward pass.

    Note:
        Deterministic on the CPU; nothing is differentiable.

    Source:
        Radford et al., ICML 2021.
    """

    _name = "ClipSimilarity"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[..., Any] | None = None,
        *,
        size: int | None = None,
        mean: Triple = _CLIP_MEAN,
        std: Triple = _CLIP_STD,
        batch_size: int = 32,
    ) -> None:
        super().__init__(model, size=size, mean=mean, std=std, batch_size=batch_size)
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **settings: Any) -> ClipSimilarity:
        """Load model and tokenizer from a folder, or by their name on huggingface.co.

        Raises:
            FileNotFoundError: If there is no model in the folder, or it cannot be fetched.
            ValueError: If it asks for code, or its weights are pickled.
            MissingExtraError: If transformers is not installed.
        """
        folder = _local("ClipSimilarity.from_pretrained", path)
        transformers = require_extra("transformers", extra="diffusion", purpose="CLIP similarity")
        model = transformers.CLIPModel.from_pretrained(folder, **_SAFELY)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        made = cls(model, tokenizer, **(_plain_settings(folder) | settings))
        made._source = (os.path.abspath(folder), settings)
        return made

    def _forward(self, pixels: Tensor) -> Tensor:
        return _pooled(self.model.get_image_features(pixel_values=pixels))  # type: ignore[operator]

    def image_text(self, images: Tensor, prompts: Sequence[str], *, pairs: Pairs = "all") -> float:
        """Mean cosine similarity between images and prompts.

        Args:
            images: In [0, 1], shape ``(b, c, h, w)``.
            prompts: The prompts.
            pairs: Every image with every prompt, or the first with the first and so on.

        Returns:
            The mean, from -1 to 1.

        Raises:
            ValueError: If there is no tokenizer or no prompt, or the images are not as they must
                be.
        """
        name = f"{self._name}.image_text"
        if self.tokenizer is None:
            raise ValueError(f"{name}: a tokenizer must be given to ClipSimilarity, got none")
        if not prompts or isinstance(prompts, str):
            raise ValueError(f"{name}: prompts must be a list of prompts, got {prompts!r}")
        device = next(self.model.parameters()).device
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, return_tensors="pt"
        ).to(device)
        with torch.no_grad():
            found = self.model.get_text_features(  # type: ignore[operator]
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            )
        return _cosine(name, self.features(images), _pooled(found).float(), pairs)


def _pooled(output: Any) -> Tensor:
    """Features as older transformers return them, bare, and as newer ones do, in an output."""
    found: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return found


class DinoSimilarity(_Features):
    """DINO similarity of images to images: cosine of the class tokens.

    Args:
        model: A ``transformers`` ViT or DINOv2 model (one whose ``last_hidden_state`` starts with
            the class token).
        size: Side that images are brought to; that of the model's configuration when omitted.
        mean: Mean that the model was trained with, per channel.
        std: Spread that it was trained with, per channel.
        batch_size: Images in one forward pass.

    Note:
        Deterministic on the CPU; nothing is differentiable.

    Source:
        Caron et al., ICCV 2021; Oquab et al., 2023.
    """

    _name = "DinoSimilarity"

    def __init__(
        self,
        model: nn.Module,
        *,
        size: int | None = None,
        mean: Triple = _IMAGENET_MEAN,
        std: Triple = _IMAGENET_STD,
        batch_size: int = 32,
    ) -> None:
        super().__init__(model, size=size, mean=mean, std=std, batch_size=batch_size)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **settings: Any) -> DinoSimilarity:
        """Load a model from a folder, or by its name on huggingface.co.

        Raises:
            FileNotFoundError: If there is no model in the folder, or it cannot be fetched.
            ValueError: If it asks for code, or its weights are pickled.
            MissingExtraError: If transformers is not installed.
        """
        folder = _local("DinoSimilarity.from_pretrained", path)
        transformers = require_extra("transformers", extra="diffusion", purpose="DINO similarity")
        model = transformers.AutoModel.from_pretrained(folder, **_SAFELY)
        made = cls(model, **(_plain_settings(folder) | settings))
        made._source = (os.path.abspath(folder), settings)
        return made

    def _forward(self, pixels: Tensor) -> Tensor:
        output: Tensor = self.model(pixel_values=pixels).last_hidden_state[:, 0]
        return output


class LpipsDistance:
    """LPIPS distance between images, and 1 - LPIPS as a similarity.

    Args:
        model: Anything that takes two batches in [-1, 1], shape ``(b, 3, h, w)``, and returns one
            distance a pair, as the networks of the lpips package and of torchmetrics do.

    Note:
        The images given here are in [0, 1] as everywhere; the range the network wants is made
        inside. Feeding [0, 1] to the network itself is the commonest mistake with this metric and
        gives better-looking numbers.

    Source:
        Zhang et al., CVPR 2018.
    """

    def __init__(self, model: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.model = model

    @classmethod
    def from_torchmetrics(cls, net: Literal["alex", "vgg", "squeeze"] = "alex") -> LpipsDistance:
        """Take the network of torchmetrics, whose backbone torchvision must have at hand.

        Raises:
            MissingExtraError: If torchmetrics or torchvision is not installed.
            ValueError: If the network is unknown.
        """
        if net not in ("alex", "vgg", "squeeze"):
            raise ValueError(f"LpipsDistance: net must be 'alex', 'vgg' or 'squeeze', got {net!r}")
        for module in ("torchmetrics", "torchvision"):
            require_extra(module, extra="metrics", purpose="LPIPS")
        image = require_extra("torchmetrics.image.lpip", extra="metrics", purpose="LPIPS")
        metric = image.LearnedPerceptualImagePatchSimilarity(net_type=net, normalize=False)
        return cls(metric.net.eval())

    def distance(self, images: Tensor, references: Tensor, *, pairs: Pairs = "all") -> float:
        """Mean LPIPS between images and reference images of the same size.

        Args:
            images: In [0, 1], shape ``(b, c, h, w)``.
            references: In [0, 1], shape ``(r, c, h, w)``.
            pairs: Every image with every reference, or the first with the first and so on.

        Returns:
            The mean, 0 for matched identical images.

        Raises:
            ValueError: If shape, dtype or range of one side is another one, or sizes differ.
        """
        name = "LpipsDistance.distance"
        if pairs not in ("all", "matched"):
            raise ValueError(f"{name}: pairs must be 'all' or 'matched', got {pairs!r}")
        first = check_images(name, "images", images)
        second = check_images(name, "references", references)
        if first.shape[1:] != second.shape[1:]:
            raise ValueError(
                f"{name}: references must have the size of images, got "
                f"{tuple(second.shape[2:])} and {tuple(first.shape[2:])}; resize one side"
            )
        if pairs == "matched":
            if len(first) != len(second):
                raise ValueError(
                    f"{name}: matched pairs need as many on both sides, got {len(first)} and "
                    f"{len(second)}; use pairs='all'"
                )
            blocks = [(first, second)]
        else:
            blocks = [(image.expand_as(second), second) for image in first]
        device = first.device
        if isinstance(self.model, nn.Module):
            device = next((p.device for p in self.model.parameters()), device)
        found = []
        with torch.no_grad():
            for left, right in blocks:
                value = self.model(
                    2.0 * left.to(device) - 1.0, 2.0 * right.to(device) - 1.0
                ).reshape(-1)
                if value.shape != (len(left),):
                    raise ValueError(
                        f"{name}: model must return one distance a pair, got {value.numel()} for "
                        f"{len(left)} pairs"
                    )
                found.append(value.to(torch.float64))
        return float(torch.cat(found).mean())

    def similarity(self, images: Tensor, references: Tensor, *, pairs: Pairs = "all") -> float:
        """1 - LPIPS, which grows with likeness as an attack's success does."""
        return 1.0 - self.distance(images, references, pairs=pairs)


class Judge(Protocol):
    """A classifier of images."""

    def score(self, images: Tensor, label: int) -> float:
        """Share of images that show a class."""


class JudgedAccuracy:
    """Share of images that a judge takes for the concept.

    Args:
        judge: Any classifier with ``score(images, label)``; the judge of the bundled digits when
            omitted.

    Example:
        >>> from immunize_ext.text_to_image.digits.concepts import digit_concept
        >>> four = digit_concept(4)
        >>> JudgedAccuracy()((four.images("attack") + 1) / 2, four) > 0.9
        True
    """

    is_share: ClassVar[bool] = True

    def __init__(self, judge: Judge | None = None) -> None:
        self.judge: Judge = DigitJudge() if judge is None else judge

    def __call__(self, images: Tensor, concept: Concept) -> float:
        """The share.

        Raises:
            ValueError: If the concept has no label that a judge could know it by.
        """
        if concept.label is None:
            raise ValueError(
                f"JudgedAccuracy: concept {concept.name!r} must have a label, got none; give it "
                "the class that the judge knows it by"
            )
        return self.judge.score(images, concept.label)

    def errors(self, concept: Concept) -> JudgeErrors | None:
        """How often the judge errs on the concept; ``None`` if it is not one that says."""
        found = getattr(self.judge, "errors", None)
        if not isinstance(found, Errors) or concept.label is None:
            return None
        return JudgeErrors(
            found.sensitivity[concept.label],
            found.false_positives[concept.label],
            found.images,
            found.images * (len(found.sensitivity) - 1),
        )

    def identity(self) -> str:
        """Of the judge."""
        return f"judged by {_identity_of(self.judge)}"


class AcceptedShare:
    """Share of images that a judge takes for anything it knows, whatever it is.

    What a model draws for a prompt can fail to be the concept and still be a picture, or be noise:
    the second is damage, and the accuracy alone does not tell them apart.

    Args:
        judge: A classifier with ``accepted(images)``; the judge of the bundled digits when omitted.

    Example:
        >>> from immunize_ext.text_to_image.digits.concepts import digit_concept
        >>> AcceptedShare()(torch.rand(8, 1, 8, 8), digit_concept(4))
        0.0
    """

    is_share: ClassVar[bool] = True

    def __init__(self, judge: DigitJudge | None = None) -> None:
        self.judge = DigitJudge() if judge is None else judge

    def __call__(self, images: Tensor, concept: Concept) -> float:
        """The share; the concept does not matter."""
        return self.judge.accepted(images)

    def identity(self) -> str:
        """Of the judge."""
        return f"accepted by {_identity_of(self.judge)}"


class ReferenceSimilarity:
    """Mean similarity of images to the concept's own images.

    Args:
        similarity: Of two batches in [0, 1]: ``ClipSimilarity(...).image_image``,
            ``DinoSimilarity(...).image_image`` or ``LpipsDistance(...).similarity``.
        split: Which images of the concept to compare with.
    """

    def __init__(
        self, similarity: Callable[[Tensor, Tensor], float], *, split: str = "attack"
    ) -> None:
        self.similarity, self.split = similarity, split

    def __call__(self, images: Tensor, concept: Concept) -> float:
        """The mean over all pairs."""
        return self.similarity(images, (concept.images(self.split) + 1.0) / 2.0)

    def identity(self) -> str:
        """Of the similarity and of what is compared with."""
        return f"{_identity_of(self.similarity)} to {self.split}"


class PromptSimilarity:
    """Mean CLIP similarity of images to the concept's first prompt.

    Args:
        clip: CLIP with its tokenizer.
    """

    def __init__(self, clip: ClipSimilarity) -> None:
        self.clip = clip

    def __call__(self, images: Tensor, concept: Concept) -> float:
        """The mean."""
        return self.clip.image_text(images, [concept.prompts[0]])

    def identity(self) -> str:
        """Of the model."""
        return f"{self.clip.identity()} to the prompt"


def _identity_of(part: Any) -> str:
    """Of a bound method by its object, and of an object by its own word or its kind."""
    owner = getattr(part, "__self__", part)
    own = getattr(owner, "identity", None)
    kind = part if hasattr(part, "__qualname__") else type(part)
    name = f"{kind.__module__}.{kind.__qualname__}"
    return name if own is None else f"{name} {own()}"
