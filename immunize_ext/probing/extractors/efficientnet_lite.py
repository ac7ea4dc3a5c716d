"""EfficientNet-Lite0: inverted residual blocks with ReLU6 and without squeeze-and-excitation.

Module names are those of the public TensorFlow port, so that its weights load as they are.
Convolutions pad as TensorFlow does with ``SAME``: what is missing is split between the two sides,
and an odd rest goes to the right and the bottom. A symmetric padding would shift each map by a
pixel wherever the stride is 2.

Source: Tan and Le, "EfficientNet", ICML 2019, table 1; the Lite variant of the TensorFlow TPU
repository (no squeeze-and-excitation, ReLU6, fixed stem and head).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

# (repeats, kernel, stride of the first, expansion, output channels) of each stage.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


FEATURES = 1280


_EPS, _MOMENTUM = 1e-3, 0.01


class SameConv2d(nn.Conv2d):
    """A convolution without bias whose output has ``ceil(size / stride)`` rows and columns."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, kernel, stride=stride, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Pad and convolve maps of shape ``(n, c, h, w)``."""
        padding: list[int] = []
        for axis in (1, 0):  # functional.pad starts at the last axis
            size, kernel, stride = input.shape[2 + axis], self.kernel_size[axis], self.stride[axis]
            missing = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            padding += [missing // 2, missing - missing // 2]
        return super().forward(functional.pad(input, padding))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_EPS, momentum=_MOMENTUM)


class InvertedResidual(nn.Module):
    """Expand, convolve each channel apart, project; add the input where shapes allow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expands = expansion != 1
        self.adds = stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv = SameConv2d(inputs, inner, 1)
            self._bn0 = _norm(inner)
        self._depthwise_conv = SameConv2d(inner, inner, kernel, stride, groups=inner)
        self._bn1 = _norm(inner)
        self._project_conv = SameConv2d(inner, outputs, 1)
        self._bn2 = _norm(outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``(n, c, h, w)`` to ``(n, c', h', w')``."""
        hidden = inputs
        if self.expands:
            hidden = functional.relu6(self._bn0(self._expand_conv(hidden)))
        hidden = functional.relu6(self._bn1(self._depthwise_conv(hidden)))
        hidden = self._bn2(self._project_conv(hidden))
        return inputs + hidden if self.adds else hidden


class EfficientNetLite0(nn.Module):
    """The network up to its 1280 pooled features; :meth:`logits` gives the ImageNet classes.

    Example:
        >>> EfficientNetLite0().eval()(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 1280])
    """

    def __init__(self, classes: int = 1000) -> None:
        """Create the network with random weights."""
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, 2)
        self._bn0 = _norm(32)
        blocks, channels = [], 32
        for repeats, kernel, stride, expansion, outputs in STAGES:
            for index in range(repeats):
                first = stride if index == 0 else 1
                blocks.append(InvertedResidual(channels, outputs, kernel, first, expansion))
                channels = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv2d(channels, FEATURES, 1)
        self._bn1 = _norm(FEATURES)
        self._fc = nn.Linear(FEATURES, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Features ``(n, 1280)`` of images ``(n, 3, h, w)`` preprocessed as (x - 127) / 128."""
        hidden = functional.relu6(self._bn0(self._conv_stem(inputs)))
        for block in self._blocks:
            hidden = block(hidden)
        return functional.relu6(self._bn1(self._conv_head(hidden))).mean((2, 3))

    def logits(self, features: Tensor) -> Tensor:
        """Class scores of features."""
        scores: Tensor = self._fc(features)
        return scores


def load_state(model: nn.Module, state: dict[str, Tensor], *, function: str, source: str) -> None:
    """Load weights, all or none of them, and say in one line what does not fit.

    Args:
        model: Where they go.
        state: The weights.
        function: Name of the caller, for messages.
        source: Where they are from, for messages.

    Raises:
        ValueError: If a name or shape does not fit; the model is then as it was.
    """
    own = model.state_dict()
    # Files older than the counter of batch norm lack it; it has no part in evaluation.
    counters = {name: v for name, v in own.items() if name.endswith("num_batches_tracked")}
    state = counters | state
    missing = sorted(set(own) - set(state))
    extra = sorted(set(state) - set(own))
    wrong = [name for name in own if name in state and own[name].shape != state[name].shape]
    problems = [
        f"{label} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for label, names in (("no", missing), ("unknown", extra), ("another shape of", wrong))
        if names
    ]
    if problems:
        raise ValueError(
            f"{function}: {source} must hold the weights of {type(model).__name__}, got "
            f"{', '.join(problems)}"
        )
    if not all(bool(torch.isfinite(v).all()) for v in state.values() if v.is_floating_point()):
        raise ValueError(f"{function}: {source} must hold finite weights, got NaN or infinity")
    model.load_state_dict(state)
