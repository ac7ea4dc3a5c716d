r"""Second moments of what layers of a model receive: collected in one pass, kept in a file.

.. math:: G = \sum_i h_i h_i^\top, \qquad E[h h^\top] = G / \text{rows}

h are the rows that a linear layer multiplies, or the unfolded patches of a convolution's input. The
sums are float64 whatever the model computes in, so the order of batches matters by rounding alone.
Layers that are handed the same tensor, as to_q, to_k and to_v of self-attention are, share one Gram
matrix: nothing is summed, and later factored, twice.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from immunize_ext.ops import operators  # noqa: F401 - defines merge_gram
from immunize_ext.ops.arguments import require_finite
from immunize_ext.ops.moment_merge import MomentFactor
from immunize_ext.storage import load_checkpoint, save_checkpoint

__all__ = ["InputMoments", "LayerMoments", "collect_moments", "factor_layers"]

_KIND = "immunize_ext.LayerMoments/1"


class InputMoments(NamedTuple):
    """Second moments of one input.

    Attributes:
        gram: The sum of h h^T (d, d), float64.
        rows: How many h were summed.
    """

    gram: Tensor
    rows: int

    @property
    def mean(self) -> Tensor:
        """E[h h^T] (d, d)."""
        return self.gram / self.rows


class LayerMoments(Mapping[str, InputMoments]):
    """Moments by name of the layer; layers with the same input hold the same object.

    Attributes:
        tag: What model and data they are of, in the words of whoever saved them.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import InputMoments, LayerMoments
        >>> shared = InputMoments(torch.eye(2, dtype=torch.float64), 2)
        >>> moments = LayerMoments({"to_k": shared, "to_v": shared})
        >>> moments.groups(), moments["to_k"].mean.diagonal().tolist()
        ([('to_k', 'to_v')], [0.5, 0.5])
    """

    def __init__(self, moments: Mapping[str, InputMoments], *, tag: str | None = None) -> None:
        """Take moments by layer."""
        self._moments = dict(moments)
        self.tag = tag

    def __getitem__(self, layer: str) -> InputMoments:
        return self._moments[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._moments)

    def __len__(self) -> int:
        return len(self._moments)

    def __repr__(self) -> str:
        return f"LayerMoments({len(self)} layers, {len(self.groups())} inputs)"

    def groups(self) -> list[tuple[str, ...]]:
        """Layers that share an input, in order."""
        found: dict[int, list[str]] = {}
        for layer, moments in self._moments.items():
            found.setdefault(id(moments), []).append(layer)
        return [tuple(layers) for layers in found.values()]

    def save(self, path: str | os.PathLike[str], *, tag: str | None = None) -> None:
        """Write the moments to a safetensors file, whole or not at all; a shared one once.

        Args:
            path: Target file; replaced if it exists.
            tag: What model and data they are of, for :meth:`load` to compare; default their own.

        Raises:
            MissingExtraError: If safetensors is not installed.
            OSError: If the file cannot be written; an existing one is then untouched.
        """
        groups = self.groups()
        tensors = {str(k): self[layers[0]].gram for k, layers in enumerate(groups)}
        values = {
            "layers": [list(layers) for layers in groups],
            "rows": [self[layers[0]].rows for layers in groups],
            "tag": self.tag if tag is None else tag,
        }
        save_checkpoint(path, tensors, kind=_KIND, values=values)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        tag: str | None = None,
        device: torch.device | str = "cpu",
    ) -> LayerMoments:
        """Read moments that :meth:`save` wrote.

        Args:
            path: The file.
            tag: What they must be of; others are refused.
            device: Where they shall live.

        Returns:
            The moments.

        Raises:
            FileNotFoundError: If there is no such file.
            MissingExtraError: If safetensors is not installed.
            ValueError: If the file holds something else, or was saved with another tag or none.
        """
        function = "LayerMoments.load"
        tensors, values = load_checkpoint(path, kind=_KIND, function=function, device=device)
        layers: list[list[str]] = values.get("layers", [])
        rows: list[int] = values.get("rows", [])
        if len(layers) != len(rows) or set(tensors) != {str(k) for k in range(len(layers))}:
            raise ValueError(
                f"{function}: {os.fspath(path)} must hold one Gram matrix an input and nothing "
                f"else, got {sorted(tensors)}"
            )
        for gram in tensors.values():
            square = gram.dim() == 2 and gram.shape[0] == gram.shape[1]
            if gram.dtype != torch.float64 or not square or not bool(torch.isfinite(gram).all()):
                raise ValueError(
                    f"{function}: {os.fspath(path)} must hold finite float64 matrices (d, d), got "
                    f"{gram.dtype} {tuple(gram.shape)}"
                )
        found = values.get("tag")
        if tag is not None and found != tag:
            raise ValueError(
                f"{function}: {os.fspath(path)} must hold the moments of {tag!r}, got "
                f"{'some without a tag' if found is None else repr(found)}; collect them again"
            )
        shared = [InputMoments(tensors[str(k)], int(count)) for k, count in enumerate(rows)]
        return cls(
            {layer: shared[k] for k, names in enumerate(layers) for layer in names}, tag=found
        )


def factor_layers(
    moments: Sequence[LayerMoments],
    *,
    regularization: LayerMoments | None = None,
    hardness: float | Tensor = 1.0,
    ridge: float = 1e-6,
    relative: bool = True,
) -> dict[str, MomentFactor]:
    """Factor the moments of several concepts: one Cholesky factor for each distinct input.

    Args:
        moments: Of each concept, with the same layers.
        regularization: Of unrelated inputs.
        hardness: As for :meth:`MomentFactor.from_moments`.
        ridge: As there.
        relative: As there.

    Returns:
        The factor of each layer; layers whose inputs are shared in all of them share theirs. The
        moments that enter are means over rows.

    Raises:
        NotPositiveDefiniteError: As MomentFactor.from_moments.
        ValueError: If layers differ, or as MomentFactor.from_moments.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import InputMoments, LayerMoments, factor_layers
        >>> shared = InputMoments(torch.eye(2, dtype=torch.float64), 1)
        >>> factors = factor_layers([LayerMoments({"to_k": shared, "to_v": shared})])
        >>> factors["to_k"] is factors["to_v"]
        True
    """
    if len(moments) == 0:
        raise ValueError("factor_layers: moments must hold those of one concept or more, got none")
    everything = [*moments, *([] if regularization is None else [regularization])]
    for one in everything[1:]:
        if set(one) != set(moments[0]):
            different = sorted(set(one) ^ set(moments[0]))
            raise ValueError(
                f"factor_layers: moments must be of the same layers, got {different[:4]} in some "
                "alone; collect them for the same layers"
            )
    made: dict[tuple[int, ...], MomentFactor] = {}
    found = {}
    for layer in moments[0]:
        key = tuple(id(one[layer]) for one in everything)
        if key not in made:
            made[key] = MomentFactor.from_moments(
                [one[layer].mean for one in moments],
                regularization=None if regularization is None else regularization[layer].mean,
                hardness=hardness,
                ridge=ridge,
                relative=relative,
            )
        found[layer] = made[key]
    return found


def collect_moments(
    model: nn.Module,
    layers: Sequence[str],
    batches: Iterable[Any],
    *,
    share: bool = True,
    select: Callable[[str, Tensor], Tensor] | None = None,
    tag: str | None = None,
) -> LayerMoments:
    r"""Run a model and sum the second moments of what some of its layers receive.

    .. math:: G_l = \sum_i h_{l,i} h_{l,i}^\top

    Args:
        model: The model; called without gradients, in the mode it is in (``model.eval()`` keeps
            dropout out).
        layers: Names of ``nn.Linear``, ``nn.Conv1d`` or ``nn.Conv2d`` modules with one group, as in
            ``model.named_modules()``. One that PEFT has wrapped counts as what it wraps.
        batches: What the model is called with, one after the other: a mapping as keyword arguments,
            a tuple or list as arguments, anything else as the one argument.
        share: Whether layers that are handed the same tensor share one matrix.
        select: What of an input counts, of a layer's name and what it received: ``x[mask]`` of a
            linear layer leaves padding out. Layers that share an input must share this too.
        tag: What model and data the moments are of.

    Returns:
        The moments: (d, d) of a linear layer with d inputs, (i k, i k) of a convolution with i
        channels and a kernel of k entries, in the order of ``convolution_matrix``.

    Raises:
        ValueError: If a name is none of a layer, a layer gets no input or one that is not finite,
            or layers that shared their input at first do not in a later call.

    Note:
        Deterministic. Rows count alike, those of padding tokens too unless ``select`` leaves them
        out. Biases are not looked at: merge them as other parameters, by the mean. Memory: one
        matrix for each distinct input, and the patches of one image.

    Source:
        RegMean (Jin et al., ICLR 2023); K-FAC's input factor (Martens, Grosse 2015).

    Example:
        >>> import torch
        >>> from immunize_ext.ops import collect_moments
        >>> class Two(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.k, self.v = torch.nn.Linear(2, 3), torch.nn.Linear(2, 4)
        ...
        ...     def forward(self, x):
        ...         return self.k(x).sum() + self.v(x).sum()
        >>> moments = collect_moments(Two(), ["k", "v"], [torch.eye(2), 2 * torch.eye(2)])
        >>> moments["k"] is moments["v"], moments["k"].rows, moments["k"].gram.diagonal().tolist()
        (True, 4, [5.0, 5.0])
    """
    if len(layers) == 0 or len(set(layers)) != len(layers):
        raise ValueError(
            f"collect_moments: layers must be different names, at least one, got {list(layers)}"
        )
    known = dict(model.named_modules())
    modules = {name: _layer(name, known) for name in layers}
    collecting = _Collection(share, select)
    handles = [
        module.register_forward_pre_hook(collecting.hook(name, module), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                if isinstance(batch, Mapping):
                    model(**batch)
                elif isinstance(batch, (tuple, list)):
                    model(*batch)
                else:
                    model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return collecting.result(layers, tag)


def _layer(name: str, known: Mapping[str, nn.Module]) -> nn.Module:
    module = known.get(name)
    wrapped = getattr(module, "base_layer", None)  # of an adapter of PEFT
    module = wrapped if isinstance(wrapped, nn.Module) else module
    if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        got = "no such module" if module is None else type(module).__name__
        raise ValueError(
            f"collect_moments: layers must name nn.Linear, nn.Conv1d or nn.Conv2d modules, got "
            f"{got} at {name!r}"
        )
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.groups != 1:
        raise ValueError(
            f"collect_moments: layers must be convolutions with one group, got {module.groups} at "
            f"{name!r}; each group has an input of its own"
        )
    return module


def _geometry(module: nn.Module) -> tuple[Any, ...]:
    """What turns an input into rows, beside the input: layers must agree in it to share."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        padding = tuple(module._reversed_padding_repeated_twice)
        shape = (module.kernel_size, module.stride, module.dilation)
        return (*shape, padding, module.padding_mode)
    return ()


def _rows(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """The rows (m, d) that the module's matrix multiplies, image by image for convolutions."""
    if isinstance(module, nn.Linear):
        yield x.reshape(-1, x.shape[-1])
        return
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    flat = isinstance(module, nn.Conv1d)
    if x.dim() == (2 if flat else 3):  # without a batch
        x = x.unsqueeze(0)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    if flat:
        padded = padded.unsqueeze(-2)
    one = (1,) if flat else ()
    kernel, stride, dilation = (
        (*one, *size) for size in (module.kernel_size, module.stride, module.dilation)
    )
    for image in padded.split(1):
        patches = functional.unfold(image, kernel, dilation=dilation, stride=stride)
        yield patches[0].mT


class _Sum:
    """The Gram matrix of a group of layers, and which tensors have entered it, in order."""

    def __init__(self, geometry: tuple[Any, ...]) -> None:
        self.geometry = geometry
        self.gram: Tensor | None = None
        self.rows = 0
        self.entered: list[int] = []

    def add(self, name: str, module: nn.Module, x: Tensor, number: int) -> None:
        for rows in _rows(module, x.detach()):
            gram = torch.ops.immunize_ext.merge_gram(rows, 512)
            self.gram = gram if self.gram is None else self.gram.add_(gram)
            self.rows += rows.shape[0]
            # Every entry is squared into the diagonal: one look there, none at all of the rows.
            if not bool(torch.isfinite(self.gram.diagonal()).all()):
                require_finite("collect_moments", f"the input of {name!r}", rows)
                raise ValueError(
                    f"collect_moments: the input of {name!r} must have squares that float64 can "
                    "hold, got sums that overflow"
                )
        self.entered.append(number)


class _Collection:
    """Which layer has received which tensor, and the sums."""

    def __init__(self, share: bool, select: Callable[[str, Tensor], Tensor] | None) -> None:
        self.share, self.select = share, select
        self.alive: list[tuple[weakref.ref[Tensor], int, int]] = []
        self.count = 0
        self.sums: dict[str, _Sum] = {}
        self.calls: dict[str, int] = {}

    def hook(self, name: str, module: nn.Module) -> Any:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.record(name, module, args[0] if args else kwargs["input"])

        return record

    def number(self, x: Tensor) -> int:
        """A number for a tensor as it is now: the same object, unchanged since, has the same."""
        version = 0 if x.is_inference() else x._version
        self.alive = [entry for entry in self.alive if entry[0]() is not None]
        for reference, seen, number in self.alive:
            if reference() is x and seen == version:
                return number
        self.count += 1
        self.alive.append((weakref.ref(x), version, self.count))
        return self.count

    def record(self, name: str, module: nn.Module, x: Tensor) -> None:
        number, call = self.number(x), self.calls.get(name, 0)
        self.calls[name] = call + 1
        if name not in self.sums:
            geometry = _geometry(module)
            shared = (
                one
                for one in self.sums.values()
                if self.share and one.entered == [number] and one.geometry == geometry
            )
            self.sums[name] = next(shared, None) or _Sum(geometry)
        group = self.sums[name]
        if call == len(group.entered):
            chosen = x if self.select is None else self.select(name, x)
            group.add(name, module, chosen, number)
        elif group.entered[call] != number:
            raise self._parted(name)

    def result(self, layers: Sequence[str], tag: str | None) -> LayerMoments:
        for name in layers:
            if name not in self.sums or self.sums[name].rows == 0:
                raise ValueError(
                    f"collect_moments: every layer must get an input, got none at {name!r}; pass "
                    "batches that reach it"
                )
            if self.calls[name] != len(self.sums[name].entered):
                raise self._parted(name)
        made: dict[int, InputMoments] = {}
        found = {}
        for name in layers:
            one = self.sums[name]
            assert one.gram is not None
            found[name] = made.setdefault(id(one), InputMoments(one.gram, one.rows))
        return LayerMoments(found, tag=tag)

    @staticmethod
    def _parted(name: str) -> ValueError:
        return ValueError(
            f"collect_moments: layers that share their input at first must go on to, got another "
            f"one at {name!r} in a later call; collect with share=False"
        )
