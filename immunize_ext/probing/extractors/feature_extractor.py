"""Deep extractors: any module that yields features, which of its blocks change, and which do not.

Blocks are chosen by their module names, as a whole and exactly: ``layers.1`` is not ``layers.11``,
and choosing a transformer block leaves the norms of all other blocks alone. What is not chosen is
frozen with everything that moves in it: weights, batch-norm statistics and dropout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from immunize_ext.storage import tensor_digest

Pool = Literal["auto", "first", "mean"]


@dataclass(frozen=True)
class Preprocessing:
    """How images become inputs: resized, cropped in the middle, shifted and scaled by channel.

    Attributes:
        size: Height and width of the input.
        mean: Subtracted from each channel, on a scale of 0 to 1.
        std: Divided by afterwards, on the same scale.
    """

    size: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __call__(self, images: Tensor) -> Tensor:
        """Shift and scale images of shape ``(*, c, h, w)`` in [0, 1]."""
        shape = (-1, 1, 1)
        mean = torch.tensor(self.mean, dtype=images.dtype, device=images.device).reshape(shape)
        std = torch.tensor(self.std, dtype=images.dtype, device=images.device).reshape(shape)
        return (images - mean) / std


class FeatureExtractor(nn.Module):
    """A model whose output becomes one row of features for each sample.

    Maps of shape ``(n, p, h, w)`` are averaged over h and w. Of tokens ``(n, t, p)`` the first is
    taken (the class token of a ViT), or their mean. An output of the transformers library counts by
    its tokens, or by its pooled map where its features are maps.

    Attributes:
        model: The model itself; its module names are those that blocks are chosen by.
        name: What it is called.
        preprocessing: How images become its inputs, or ``None``.

    Example:
        >>> extractor = FeatureExtractor(torch.nn.Conv2d(1, 4, 3), name="toy")
        >>> extractor(torch.zeros(2, 1, 5, 5)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str = "",
        pool: Pool = "auto",
        preprocessing: Preprocessing | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            model: Takes a batch of inputs as its one argument.
            name: What it is called.
            pool: How tokens become one row: the ``"first"``, their ``"mean"``, or ``"auto"``,
                which is the first.
            preprocessing: How images become its inputs.

        Raises:
            ValueError: If ``pool`` is unknown.
        """
        super().__init__()
        if pool not in ("auto", "first", "mean"):
            raise ValueError(
                f"FeatureExtractor: pool must be 'auto', 'first' or 'mean', got {pool!r}"
            )
        self.model = model
        self.name = name or type(model).__name__
        self.pool = pool
        self.preprocessing = preprocessing

    def forward(self, inputs: Tensor) -> Tensor:
        """Features of shape ``(n, p)``."""
        output: Any = self.model(inputs)
        if not isinstance(output, Tensor):
            output = self._of_output(output)
        if output.dim() == 4:
            output = output.mean((2, 3))
        elif output.dim() == 3:
            output = output.mean(1) if self.pool == "mean" else output[:, 0]
        if output.dim() != 2:
            raise ValueError(
                f"FeatureExtractor: {self.name} must yield (n, p), (n, t, p) or (n, p, h, w), got "
                f"{tuple(output.shape)}; wrap it in a module that does"
            )
        features: Tensor = output
        return features

    def _of_output(self, output: Any) -> Tensor:
        hidden = getattr(output, "last_hidden_state", None)
        if not isinstance(hidden, Tensor):
            raise ValueError(
                f"FeatureExtractor: {self.name} must yield a tensor, or an output with "
                f"last_hidden_state, got {type(output).__name__}; wrap it in a module that does"
            )
        pooled = getattr(output, "pooler_output", None)
        # The pooler of a ViT is a layer trained for another task, or not at all: tokens are better.
        return pooled if hidden.dim() == 4 and isinstance(pooled, Tensor) else hidden


def block_root(extractor: nn.Module) -> nn.Module:
    """The module whose names choose blocks: the model inside a :class:`FeatureExtractor`."""
    return extractor.model if isinstance(extractor, FeatureExtractor) else extractor


def find_stages(extractor: nn.Module) -> list[str]:
    """Names of the blocks that follow each other in a model, from first to last.

    These are the siblings ``layer1``, ``layer2``, ... of a ResNet, or else the outermost list of at
    least two modules of one class: stages, or transformer blocks; or else the layers with weights
    of the outermost sequence where they are of one class, as in a plain MLP. A list with more
    weights after it than in it is passed over: its last block would be one in the middle of the
    model.

    Args:
        extractor: The model.

    Returns:
        The names; empty if there is no such list. The paper immunizes the last two of a ResNet18
        and the last one of a ViT.

    Example:
        >>> stages = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
        >>> find_stages(torch.nn.ModuleDict({"body": stages, "last": torch.nn.Linear(3, 2)}))
        ['body.0', 'body.1']
        >>> find_stages(torch.nn.Sequential(stages[0], torch.nn.ReLU(), stages[1]))
        ['0', '2']
    """
    root = block_root(extractor)
    parents = sorted(root.named_modules(), key=lambda item: item[0].count(".") + bool(item[0]))
    for kind in ("numbered", "one class", "sequence"):
        for prefix, parent in parents:
            children = [(name, child) for name, child in parent.named_children()]
            one_class = len({type(child) for _, child in children}) == 1
            if kind == "numbered":
                children = [item for item in children if re.fullmatch(r"layer\d+", item[0])]
            elif kind == "one class":
                if not (isinstance(parent, (nn.ModuleList, nn.Sequential)) and one_class):
                    continue
            else:
                weighted = {type(c) for _, c in children if any(True for _ in c.parameters())}
                if not isinstance(parent, nn.Sequential) or len(weighted) != 1:
                    continue
            children = [item for item in children if any(True for _ in item[1].parameters())]
            names = [f"{prefix}.{name}" if prefix else name for name, _ in children]
            if len(names) >= 2 and _is_last(root, names):
                return names
    return []


def _is_last(root: nn.Module, names: list[str]) -> bool:
    """Whether a list of blocks has at least as many weights as what comes after it."""
    sizes = [(in_blocks(name, names), value.numel()) for name, value in root.named_parameters()]
    end = max(i for i, (inside, _) in enumerate(sizes) if inside) + 1
    return sum(n for inside, n in sizes if inside) >= sum(n for _, n in sizes[end:])


def select_blocks(extractor: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the modules that patterns choose, without those inside another chosen one.

    Args:
        extractor: The model.
        patterns: Whole module names; ``*`` and ``?`` as in file names, where ``*`` matches dots.

    Returns:
        The names, in the order of the model.

    Raises:
        ValueError: If a pattern matches no module with parameters.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        >>> select_blocks(model, ["1"])
        ['1']
    """
    if isinstance(patterns, str) or not patterns:
        raise ValueError(f"select_blocks: patterns must be a list of names, got {patterns!r}")
    root = block_root(extractor)
    names = [
        name
        for name, module in root.named_modules()
        if name and any(True for _ in module.parameters())
    ]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            known = find_stages(extractor) or [name for name in names if "." not in name]
            raise ValueError(
                f"select_blocks: blocks must name modules with parameters, got {pattern!r}, which "
                f"matches none; there are for instance {', '.join(known[-4:])}"
            )
    chosen: list[str] = []
    for name in names:
        inside = any(name.startswith(f"{other}.") for other in chosen)
        if not inside and any(fnmatchcase(name, pattern) for pattern in patterns):
            chosen.append(name)
    return chosen


def choose_blocks(extractor: nn.Module, blocks: int | Sequence[str], *, function: str) -> list[str]:
    """Names of the blocks that a number or patterns choose.

    Args:
        extractor: The model.
        blocks: How many of the last ones (:func:`find_stages`), or patterns
            (:func:`select_blocks`).
        function: Who asks; stands in errors.

    Returns:
        The names, in the order of the model.

    Raises:
        ValueError: If there are fewer blocks, or a pattern matches none.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        >>> choose_blocks(model, 1, function="toy"), choose_blocks(model, ("0",), function="toy")
        (['1'], ['0'])
    """
    if not isinstance(blocks, int):
        return select_blocks(extractor, blocks)
    stages = find_stages(extractor)
    if len(stages) < blocks:
        raise ValueError(
            f"{function}: blocks must be at most the {len(stages)} blocks found in "
            f"{type(block_root(extractor)).__name__}, got {blocks}; name modules instead"
        )
    return stages[-blocks:]


def freeze_except(extractor: nn.Module, blocks: Sequence[str]) -> dict[str, nn.Parameter]:
    """Freeze a model but for some blocks, and put all of it into evaluation mode.

    Args:
        extractor: The model; changed in place.
        blocks: What :func:`select_blocks` returned.

    Returns:
        The parameters that are left to train, by their name in the model.
    """
    extractor.eval()
    extractor.requires_grad_(False)
    root = block_root(extractor)
    for name in blocks:
        root.get_submodule(name).requires_grad_(True)
    return {name: value for name, value in root.named_parameters() if value.requires_grad}


def in_blocks(name: str, blocks: Iterable[str]) -> bool:
    """Whether a parameter, buffer or module belongs to one of the blocks."""
    return any(name == block or name.startswith(f"{block}.") for block in blocks)


def block_state(extractor: nn.Module, blocks: Sequence[str]) -> dict[str, Tensor]:
    """Copies of the parameters and buffers of some blocks, by their name in the model."""
    state = block_root(extractor).state_dict()
    return {
        name: value.detach().clone() for name, value in state.items() if in_blocks(name, blocks)
    }


def fingerprint(extractor: nn.Module, *, without: Sequence[str] = ()) -> str:
    """A hash of all weights and buffers of a model, their names and dtypes.

    Args:
        extractor: The model.
        without: Blocks to leave out.

    Returns:
        64 hexadecimal digits; equal for equal weights only.
    """
    named = sorted(block_root(extractor).state_dict().items())
    return tensor_digest(item for item in named if not in_blocks(item[0], without))


def extract_features(
    extractor: nn.Module,
    batches: Iterable[Tensor],
    *,
    dtype: torch.dtype = torch.float64,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Features of many inputs, in evaluation mode and without gradients.

    Args:
        extractor: Yields ``(n, p)`` for a batch; its training mode is put back afterwards.
        batches: Batches of inputs, in order; moved to the extractor's device.
        dtype: dtype of the result.
        progress: Called after each batch with the number of samples so far.

    Returns:
        Features of shape ``(n, p)`` on the CPU.

    Raises:
        ValueError: If there is no batch, or features are no matrix or not finite.

    Example:
        >>> batches = [torch.zeros(2, 3), torch.ones(1, 3)]
        >>> extract_features(nn.Identity(), batches).shape
        torch.Size([3, 3])
    """
    device = next((value.device for value in extractor.parameters()), torch.device("cpu"))
    modes = {module: module.training for module in extractor.modules()}
    found, count = [], 0
    extractor.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                features = extractor(batch.to(device))
                if features.dim() != 2:
                    raise ValueError(
                        f"extract_features: extractor must yield (n, p), got "
                        f"{tuple(features.shape)}; wrap it in FeatureExtractor"
                    )
                found.append(features.to("cpu", dtype))
                count += len(features)
                if progress is not None:
                    progress(count)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not found:
        raise ValueError("extract_features: batches must hold at least one batch, got none")
    result = torch.cat(found)
    if not bool(torch.isfinite(result).all()):
        raise ValueError(
            "extract_features: features must be finite, got NaN or infinity; check the inputs and "
            "their preprocessing"
        )
    return result
