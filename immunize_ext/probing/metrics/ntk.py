r"""The kernel of gradients (NTK) of chosen layers, and the fine-tuning that it foretells.

With f_i the output for sample i and w all weights that an attacker changes,

.. math:: K_{ij} = \nabla_w f_i \cdot \nabla_w f_j .

Gradient descent on the squared loss moves the residual r = f - y by -rate K r as long as K does not
change. So with K = U diag(k) U^T the loss after t steps is

.. math:: |r_t|^2 = \sum_i (1 - \text{rate}\, k_i)^{2t} (u_i^\top r_0)^2 .

Which layers enter the sum is the attacker's choice: the head alone is a linear probe, adapters are
linear layers like others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from immunize_ext.ops import khatri_rao_gram, log_condition_number
from immunize_ext.probing.metrics.convergence import first_step_within

_MOST_NUMBERS = 1 << 24  # of one block of per-sample gradients


def empirical_ntk(
    model: nn.Module,
    inputs: Tensor,
    layers: Sequence[str] | None = None,
    *,
    create_graph: bool = False,
) -> Tensor:
    r"""Inner products of the gradients of outputs in the weights of chosen layers.

    .. math:: K = J J^\top, \qquad J_{i\cdot} = \nabla_w f_i

    Linear layers, convolutions in one group that pad as ``nn.Conv2d`` does, and those of kernel 1
    take :func:`immunize_ext.ops.khatri_rao_gram` of what goes in and comes back. Gradients in all
    other weights (norms, embeddings, convolutions by channel) are formed sample by sample.

    Args:
        model: Gives one number ``(n,)`` or ``(n, 1)``, or k numbers ``(n, k)`` a sample, none of
            which depends on another sample.
        inputs: Batch of n samples.
        layers: Names of modules whose weights count, with all that is in them, or of single
            weights; all when omitted. Weights that do not require gradients never count.
        create_graph: Whether K shall be differentiable in the weights.

    Returns:
        K, shape ``(n k, n k)``, float64, samples first: that of ``(f(x) - y).flatten()``.

    Raises:
        ValueError: If a name fits no weight that requires gradients, an active batch norm or
            dropout mixes samples, or outputs have another shape.

    Note:
        Deterministic. Memory is that of n x n and the activations of the chosen layers, and of one
        block of per-sample gradients. Every module is left as it was, gradients included.

    Source:
        Jacot, Gabriel, Hongler, NeurIPS 2018.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False).double()
        >>> empirical_ntk(model, torch.eye(2, dtype=torch.float64))
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    weights = _chosen(model, layers)
    _require_independent_samples(model)
    linear = _linear_layers(model, weights)
    uses: list[tuple[nn.Module, Tensor, Tensor]] = []
    with torch.enable_grad(), _watched(linear, uses):
        outputs = model(inputs)
    n = len(inputs)
    outputs = outputs.unsqueeze(-1) if outputs.dim() == 1 else outputs
    if outputs.dim() != 2 or len(outputs) != n:
        raise ValueError(
            f"empirical_ntk: model must give (n,) or (n, k) for {n} samples, got "
            f"{tuple(outputs.shape)}"
        )
    side = n * outputs.shape[1]
    total = outputs.new_zeros((side, side), dtype=torch.float64)
    by_module: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
    for module, given, back in _returned(uses, outputs, create_graph):
        by_module.setdefault(module, []).append(_tokens(module, given, back, n))
    for module, parts in by_module.items():
        # A layer that is used twice has both as its tokens.
        a, g = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        k = outputs.shape[1]
        a = a if k == 1 else a.repeat_interleave(k, 0)
        wide = a.to(torch.float64), g.to(torch.float64)
        total = total + khatri_rao_gram(*wide, bias=linear[module])
    covered = {id(w) for module in linear for w in module.parameters(recurse=False)}
    rest = {name: w for w, name in weights.items() if id(w) not in covered}
    for j in _rows(model, inputs, rest, side, create_graph):
        total = total + j @ j.mT
    return total if create_graph else total.detach()


def kernel_descent_steps(
    kernel: Tensor, residual: Tensor, *, rate: float | None = None, share: float = 0.35
) -> float:
    r"""Steps of gradient descent until the squared loss is a share of what it was, from the kernel.

    .. math:: |r_t|^2 = \sum_i (1 - \text{rate}\, k_i)^{2t} (u_i^\top r_0)^2
              \le \text{share} \cdot |r_0|^2

    Exact for linear probes; for more layers as far as the kernel does not change on the way.

    Args:
        kernel: K, shape ``(n, n)``, symmetric.
        residual: r_0 = f - y, shape ``(n,)``.
        rate: Step of the weights along minus the gradient of |r|^2 / 2; 0.9 / lambda_max when
            omitted.
        share: Of the first loss; in (0, 1).

    Returns:
        The number of steps, a whole number; infinity where the kernel cannot fit that much, or a
        direction grows.

    Raises:
        ValueError: If shapes do not fit, or a number is out of range.

    Source:
        Jacot, Gabriel, Hongler, NeurIPS 2018, section 5; Lee et al., NeurIPS 2019, eq. 8.

    Example:
        >>> kernel = torch.diag(torch.tensor([1.0, 0.5], dtype=torch.float64))
        >>> kernel_descent_steps(kernel, torch.tensor([1.0, 1.0]), rate=1.0, share=0.25)
        1.0
    """
    name = "kernel_descent_steps"
    if kernel.dim() != 2 or kernel.shape != (len(residual),) * 2 or residual.dim() != 1:
        raise ValueError(
            f"{name}: kernel and residual must have shapes (n, n) and (n,), got "
            f"{tuple(kernel.shape)} and {tuple(residual.shape)}"
        )
    if not 0.0 < share < 1.0 or (rate is not None and not rate > 0.0):
        raise ValueError(f"{name}: share must be in (0, 1) and rate positive, got {share}, {rate}")
    values, columns = torch.linalg.eigh(kernel.detach().to(torch.float64))
    energy = (columns.mT @ residual.detach().to(torch.float64)).square()
    top = max(float(values[-1]), 0.0)
    # What cannot be told from 0 does not move: else rounding would foretell 1e16 steps.
    values = values.where(values > len(values) * torch.finfo(torch.float64).eps * top, 0.0)
    step = rate if rate is not None else (0.9 / top if top > 0.0 else 1.0)
    factor = (1.0 - step * values).abs()
    stays = factor >= 1.0
    goal = share * float(energy.sum())
    if bool(((factor > 1.0) & (energy > 0.0)).any()) or float(energy[stays].sum()) > goal:
        return math.inf
    log_factor = factor.log()

    def loss(steps: float) -> float:
        decay = torch.ones_like(energy) if steps == 0.0 else torch.exp(2.0 * steps * log_factor)
        return float((decay * energy).sum())

    return first_step_within(loss, goal)


def ntk_log_condition_number(
    model: nn.Module, inputs: Tensor, layers: Sequence[str] | None = None, *, floor: float = 0.0
) -> Tensor:
    r"""Logarithm of the condition number of the kernel of chosen layers: a term for a loss.

    .. math:: \log\kappa(K + \text{floor}\,\tfrac{\operatorname{tr} K}{n} I)

    On harmful samples raise it, and gradient descent on these layers is slow; on samples of the
    task to keep, lower it.

    Args:
        model: As for :func:`empirical_ntk`.
        inputs: Batch of n samples.
        layers: As for :func:`empirical_ntk`.
        floor: Added to K in units of its mean eigenvalue: what is smaller does not count.

    Returns:
        The number, float64, differentiable in the weights of the model.

    Raises:
        ValueError: As :func:`empirical_ntk`, or if floor is negative.

    Note:
        Deterministic. Derivatives as in :func:`immunize_ext.ops.log_condition_number`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> layers = torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)
        >>> model = torch.nn.Sequential(*layers)
        >>> inputs = torch.randn(6, 4)
        >>> before = ntk_log_condition_number(model, inputs, ["0"])
        >>> for _ in range(5):
        ...     loss = -ntk_log_condition_number(model, inputs, ["0"])
        ...     grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        ...     with torch.no_grad():
        ...         for weight, grad in zip(model.parameters(), grads, strict=True):
        ...             weight -= 0.01 * (0.0 if grad is None else grad)
        >>> bool(ntk_log_condition_number(model, inputs, ["0"]) > before)
        True
    """
    if not (math.isfinite(floor) and floor >= 0.0):
        raise ValueError(f"ntk_log_condition_number: floor must be at least 0, got {floor}")
    kernel = empirical_ntk(model, inputs, layers, create_graph=True)
    if floor > 0.0:
        size = kernel.diagonal().mean() * floor
        kernel = kernel + size * torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    return log_condition_number((kernel + kernel.mT) / 2)


# --- which weights --------------------------------------------------------------------------------


def _chosen(model: nn.Module, layers: Sequence[str] | None) -> dict[nn.Parameter, str]:
    """Weights that count, by themselves, with their names."""
    named = {p: name for name, p in model.named_parameters() if p.requires_grad}
    if layers is not None:
        for layer in layers:
            if not any(name == layer or name.startswith(f"{layer}.") for name in named.values()):
                raise ValueError(
                    f"empirical_ntk: layers must name modules or weights that require gradients, "
                    f"got {layer!r}; there are {', '.join(list(named.values())[:8])}"
                )
        named = {
            p: name
            for p, name in named.items()
            if any(name == layer or name.startswith(f"{layer}.") for layer in layers)
        }
    if not named:
        raise ValueError("empirical_ntk: model must have weights that require gradients, got none")
    return named


def _require_independent_samples(model: nn.Module) -> None:
    for name, module in model.named_modules():
        mixes = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if module.training and (mixes or isinstance(module, nn.modules.dropout._DropoutNd)):
            raise ValueError(
                f"empirical_ntk: model must treat every sample alone and alike, got {name!r} in "
                "training mode; call model.eval()"
            )


def _linear_layers(model: nn.Module, weights: dict[nn.Parameter, str]) -> dict[nn.Module, bool]:
    """Layers whose gradients hooks can see, and whether their biases count.

    A weight that several modules share is none of them: its gradient has terms across its uses.
    """
    owners: dict[Any, int] = {}
    for module in model.modules():
        for weight in module._parameters.values():
            owners[weight] = owners.get(weight, 0) + 1
    return {
        module: module.bias in weights
        for module in model.modules()
        if _is_linear(module)
        and module.weight in weights
        and all(owners[own] == 1 for own in module.parameters(recurse=False))
    }


def _is_linear(module: nn.Module) -> bool:
    """Whether a weight's gradient is a sum of outer products that hooks can see."""
    if type(module) is nn.Linear:
        return True
    if not isinstance(module, nn.Conv2d) or module.groups != 1 or isinstance(module.padding, str):
        return False
    # A class of its own may pad by itself, which nobody sees where no neighbour is looked at.
    alone = module.kernel_size == (1, 1) and module.stride == (1, 1) and module.padding == (0, 0)
    return alone or (type(module) is nn.Conv2d and module.padding_mode == "zeros")


# --- what goes in and comes back ------------------------------------------------------------------


@contextmanager
def _watched(modules: Any, uses: list[tuple[nn.Module, Tensor, Tensor]]) -> Iterator[None]:
    """Every use of the modules, with what goes in and what comes out."""

    def seen(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        uses.append((module, args[0], output))
        return output.clone()  # what is changed in place afterwards is the copy

    handles = [module.register_forward_hook(seen) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _returned(
    uses: list[tuple[nn.Module, Tensor, Tensor]], outputs: Tensor, create_graph: bool
) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
    """For each use its input, and the gradients at its output: (n, k, ...)."""
    if not uses:
        return
    backs = []
    for column in outputs.unbind(1):
        backs.append(
            torch.autograd.grad(
                column.sum(),
                [output for _, _, output in uses],
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
            )
        )
    for (module, given, output), *of_columns in zip(uses, *backs, strict=True):
        filled = [torch.zeros_like(output) if g is None else g for g in of_columns]
        yield module, given if create_graph else given.detach(), torch.stack(filled, dim=1)


def _tokens(module: nn.Module, given: Tensor, back: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Inputs (n, t, d), and output gradients (n k, t, o)."""
    if len(given) != n:
        raise ValueError(
            f"empirical_ntk: layers must see the {n} samples in their first dimension, got "
            f"{tuple(given.shape)} at {module}"
        )
    back = back.flatten(0, 1)
    if isinstance(module, nn.Conv2d):
        settings = (module.kernel_size, module.dilation, module.padding, module.stride)
        patches = functional.unfold(given, *settings)  # type: ignore[arg-type]
        return patches.mT, back.flatten(2).mT
    return given.reshape(n, -1, given.shape[-1]), back.reshape(len(back), -1, back.shape[-1])


def _rows(
    model: nn.Module,
    inputs: Tensor,
    weights: dict[str, nn.Parameter],
    side: int,
    create_graph: bool,
) -> Iterator[Tensor]:
    """Blocks of columns of the Jacobian (n k, weights), sample by sample, float64."""
    held = dict(model.named_parameters())
    if not create_graph:  # no graph of what is held
        held = {name: p.detach() for name, p in held.items()}  # type: ignore[misc]

    def one(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(model, {**held, **values}, (sample[None],))
        return found.reshape(-1)

    of_samples: Callable[..., dict[str, Tensor]] = torch.func.vmap(
        torch.func.jacrev(one), in_dims=(None, 0)
    )
    for names in _groups(weights, _MOST_NUMBERS // max(side, 1)):
        jacobians = of_samples({name: held[name] for name in names}, inputs)
        parts = [jacobians[name].reshape(side, -1) for name in names]
        yield torch.cat(parts, dim=1).to(torch.float64)


def _groups(weights: dict[str, nn.Parameter], most: int) -> Iterator[list[str]]:
    """Names of weights that have so many numbers together, or of one that has more."""
    group: list[str] = []
    numbers = 0
    for name, weight in weights.items():
        if group and numbers + weight.numel() > most:
            yield group
            group, numbers = [], 0
        group.append(name)
        numbers += weight.numel()
    if group:
        yield group
