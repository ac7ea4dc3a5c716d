r"""The second-moment merge: adapted copies of any linear layer become one.

For a layer with inputs h minimise over W

.. math:: \mathrm{tr}\,(W - W_0)\, G_{reg}\, (W - W_0)^\top + \rho\, \|W - W_0\|_F^2
          + \sum_n \mu_n\, \mathrm{tr}\,(W - W_n)\, G_n\, (W - W_n)^\top

with G_n = E[h h^T] over the inputs that concept n sends through the layer and G_reg that of
unrelated ones. The gradient 2 ((W - W0) S - sum_n mu_n (W_n - W0) G_n) vanishes at

.. math:: S = G_{reg} + \rho I + \sum_n \mu_n G_n, \qquad P_n = \mu_n G_n S^{-1}, \qquad
          W = W_0 + \sum_n (W_n - W_0)\, P_n .

The maps P_n (d, d) belong to the input, not to the layer: one Cholesky factor and one solve for all
layers that are fed by it, in float64, and then one product a layer. For G = dL/dW

.. math:: \bar W_n = G\, P_n^\top, \qquad \bar W_0 = G - \sum_n \bar W_n, \qquad
          \bar P_n = (W_n - W_0)^\top G,

and with E_n = \bar P_n S^{-1}: dG_n = mu_n sym(E_n) + mu_n dS, dG_reg = dS,
dS = -sum_n sym(P_n^T E_n), drho = tr dS, dmu_n = <G_n, E_n> + <G_n, dS>. The rules stand in
``moment_derivatives``; every order follows from them.

What it contains: G_n = C_n^T C_n of token rows is the soft form of ``merge_kv`` and, with given
values, UCE, TIME and MEMIT; its limit for mu to infinity is the hard form. G_reg = 0, rho = 0 is
RegMean. All G equal to I is the mean of the copies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from immunize_ext.errors import NotPositiveDefiniteError
from immunize_ext.ops import operators  # noqa: F401 - defines moment_solve
from immunize_ext.ops.arguments import (
    any_true,
    require_finite,
    require_positive,
    require_same_device,
)
from immunize_ext.ops.derivatives import carries_derivative, payload
from immunize_ext.ops.merge_problem import require_floating
from immunize_ext.ops.moment_derivatives import product, solve

__all__ = ["MomentFactor", "merge_moments"]

_EPS = torch.finfo(torch.float64).eps


class MomentFactor:
    r"""Cholesky factor of S, and the maps of the copies, for one input of one or many layers.

    .. math:: S = G_{reg} + \rho I + \sum_n \mu_n G_n = L L^\top, \qquad P_n = \mu_n G_n S^{-1}

    Attributes:
        chol: L (d, d), float64.
        hardness: mu (N,), float64.
        ridge: The absolute ridge rho.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import MomentFactor
        >>> factor = MomentFactor.from_moments([torch.eye(2), torch.eye(2)], ridge=0.0)
        >>> factor.concepts, factor.dim, factor.maps()[0]
        (2, 2, tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]], dtype=torch.float64))
    """

    def __init__(
        self,
        moments: tuple[Tensor, ...],
        hardness: Tensor,
        given_ridge: Tensor,
        regularization: Tensor | None,
        relative: bool,
    ) -> None:
        """Factor what :meth:`from_moments` has checked."""
        self._given, self.hardness = moments, hardness
        self._given_ridge, self._relative = given_ridge, relative
        self._regularization = regularization
        followed = (*moments, hardness, given_ridge)
        followed += () if regularization is None else (regularization,)
        # In a graph that is traced, and within transforms of torch.func, there is no asking.
        self._traced = torch.compiler.is_compiling()
        self._moving = (
            self._traced
            or torch._C._are_functorch_transforms_active()
            or any(carries_derivative(tensor) for tensor in followed)
        )
        self._followed = () if self._traced else followed
        self._versions = self._current_versions()
        self._kept: dict[torch.dtype, Tensor] = {}
        with _no_inference():
            if not self._moving:
                # Numbers of its own: what the caller changes later is no part of the factor.
                self._given = tuple(_symmetric(g) for g in moments)
                self.hardness = hardness.clone()
            s, ridge = self._sum()
            self.chol = _factor(s.detach())
        self._s = None if self._moving else s
        self._ridge = ridge.detach()

    def _current_versions(self) -> tuple[int, ...]:
        return tuple(tensor._version for tensor in self._followed)

    def _sum(self) -> tuple[Tensor, Tensor]:
        """S and the absolute ridge, with their derivatives."""
        weighted = [mu * g for mu, g in zip(self.hardness.unbind(), self.moments, strict=True)]
        total = sum(weighted[1:], weighted[0])
        if self._regularization is not None:
            total = total + _symmetric(self._regularization)
        ridge = self._given_ridge
        if self._relative:
            ridge = ridge * total.diagonal(dim1=-2, dim2=-1).mean(-1)
        identity = torch.eye(total.shape[-1], dtype=total.dtype, device=total.device)
        return total + ridge * identity, ridge

    @property
    def moments(self) -> tuple[Tensor, ...]:
        """G_n (d, d), float64, one a concept, with their derivatives; see :attr:`s`."""
        return tuple(_symmetric(g) for g in self._given) if self._moving else self._given

    @property
    def s(self) -> Tensor:
        """S (d, d) with its derivatives.

        Summed anew where there are any: merges that share a factor must not share a graph, which
        the first backward pass would free.
        """
        if self._s is not None:
            return self._s
        if not self._traced and self._current_versions() != self._versions:
            raise ValueError(
                "MomentFactor: moments must be those that were factored, got some that were "
                "changed in place since; build it again with MomentFactor.from_moments"
            )
        return self._sum()[0]

    @property
    def ridge(self) -> float:
        """The absolute ridge."""
        return float(self._ridge)

    @property
    def dim(self) -> int:
        """Width d of the input."""
        return self.chol.shape[-1]

    @property
    def concepts(self) -> int:
        """Number N of copies that are merged."""
        return len(self._given)

    @classmethod
    def from_moments(
        cls,
        moments: Sequence[Tensor],
        *,
        regularization: Tensor | None = None,
        hardness: float | Tensor = 1.0,
        ridge: float | Tensor = 1e-6,
        relative: bool = True,
    ) -> MomentFactor:
        r"""Factor S = G_reg + rho I + sum_n mu_n G_n.

        Args:
            moments: G_n (d, d), one a concept, symmetric, positive semidefinite; any floating
                dtype. Of :func:`~immunize_ext.ops.collect_moments` the ``mean``, E[h h^T], or the
                ``gram``, the sum over rows, which weighs each concept by its number of inputs.
            regularization: G_reg (d, d) of unrelated inputs, which W shall treat as W0 does; None
                for none.
            hardness: mu, one number or one a concept (N,). Infinite hardness has no moments that
                would do: :func:`~immunize_ext.ops.merge_kv` takes rows.
            ridge: rho, how strongly W is held to W0 in all directions; not negative.
            relative: Whether the ridge is in units of the mean diagonal of S without it.

        Returns:
            The factor. Gradients reach moments, regularization, hardness and ridge.

        Raises:
            NotPositiveDefiniteError: If S is numerically singular: fewer inputs than d, and no
                ridge.
            ValueError: If shapes, dtypes or devices do not fit, a matrix is not symmetric or not
                finite, or hardness or ridge is out of range.

        Note:
            Deterministic for a given number of threads.

        Source:
            DERIVED: the common minimiser of RegMean (Jin et al., ICLR 2023) and of the closed forms
            of MIMA, UCE and MEMIT.

        Example:
            >>> import torch
            >>> from immunize_ext.ops import MomentFactor
            >>> factor = MomentFactor.from_moments([torch.diag(torch.tensor([3.0, 1.0]))], ridge=1)
            >>> factor.ridge, factor.s.diagonal().tolist()
            (2.0, [5.0, 3.0])
        """
        function = "MomentFactor.from_moments"
        if len(moments) == 0:
            raise ValueError(f"{function}: moments must hold one matrix a concept, got none")
        named = [(f"moments[{n}]", g) for n, g in enumerate(moments)]
        if regularization is not None:
            named.append(("regularization", regularization))
        for name, g in named:
            require_floating(function, name, g)
            side = moments[0].shape[-1] if moments[0].dim() else 0
            if g.dim() != 2 or g.shape[0] != g.shape[1] or g.shape[1] != side or side == 0:
                raise ValueError(
                    f"{function}: {name} must have shape (d, d) with d >= 1, the same for all, got "
                    f"{tuple(g.shape)}"
                )
        require_same_device(function, named)
        for name, g in named:
            require_finite(function, name, g)
            if any_true((g - g.mT).abs().amax() > 1e-4 * g.abs().amax()):
                raise ValueError(
                    f"{function}: {name} must be symmetric, got a matrix that differs from its "
                    "transpose; pass h^T h of the inputs h"
                )
        device = moments[0].device
        mu = torch.as_tensor(hardness, dtype=torch.float64, device=device)
        if mu.dim() > 1 or (mu.dim() == 1 and mu.shape[0] != len(moments)):
            raise ValueError(
                f"{function}: hardness must be a number or have shape ({len(moments)},), one a "
                f"concept, got {tuple(mu.shape)}"
            )
        rho = torch.as_tensor(ridge, dtype=torch.float64, device=device)
        if not torch.compiler.is_compiling():
            require_positive(function, "hardness", mu)
            if any_true(torch.isinf(mu)):
                raise ValueError(
                    f"{function}: hardness must be finite, got infinity; hard constraints take "
                    "rows: merge_kv"
                )
            if any_true(~(torch.isfinite(rho) & (rho >= 0))):
                raise ValueError(f"{function}: ridge must be finite and not negative, got {ridge}")
        with _no_inference():
            given = tuple(_plain(g) for g in moments)
            held = None if regularization is None else _plain(regularization)
            return cls(given, _plain(mu).expand(len(moments)), _plain(rho), held, relative)

    def weighted(self) -> Tensor:
        """The stack of mu_n G_n (N d, d)."""
        return torch.cat(
            [mu * g for mu, g in zip(self.hardness.unbind(), self.moments, strict=True)], -2
        )

    def maps(self) -> Tensor:
        """P_n = mu_n G_n S^-1 (N, d, d), float64; kept where nothing is differentiated in them."""
        return self.stacked_maps(torch.float64).unflatten(-2, (self.concepts, self.dim))

    def stacked_maps(self, dtype: torch.dtype) -> Tensor:
        """P_n below each other (N d, d), in a dtype."""
        if dtype in self._kept:
            return self._kept[dtype]
        found = solve(self.weighted(), self.s, self.chol).to(dtype)
        if self._moving or payload(found) is None:
            return found
        if type(found) is Tensor and not found.is_inference():
            self._kept[dtype] = found
        return found

    def solve(self, n: Tensor) -> Tensor:
        """N S^-1 of n (o, d), float64, with its derivatives."""
        return solve(n, self.s, self.chol)

    def to(self, device: torch.device | str) -> MomentFactor:
        """The factor on another device.

        Args:
            device: Target device.

        Returns:
            A new factor, or this one if it is there already. Gradients reach what they reached.
        """
        if self.chol.device == torch.device(device):
            return self
        held = self._regularization
        return MomentFactor(
            tuple(g.to(device) for g in self._given),
            self.hardness.to(device),
            self._given_ridge.to(device),
            None if held is None else held.to(device),
            self._relative,
        )

    def __repr__(self) -> str:
        device = str(self.chol.device)
        return f"MomentFactor(dim={self.dim}, concepts={self.concepts}, device={device!r})"


def merge_moments(
    base: Sequence[Tensor],
    copies: Sequence[Sequence[Tensor]],
    factors: MomentFactor | Sequence[MomentFactor],
) -> list[Tensor]:
    r"""Merge adapted copies of linear or convolution layers by the moments of their inputs.

    .. math:: W_l = W_{0,l} + \sum_n (W_{n,l} - W_{0,l})\, \mu_n G_n
              \Bigl(G_{reg} + \rho I + \sum_m \mu_m G_m\Bigr)^{-1}

    Args:
        base: W0, one (o_l, d_l) tensor a layer, or (o_l, i, *kernel) of a convolution, whose input
            are the unfolded patches, d_l = i * kernel. float16, bfloat16, float32 or float64; the
            maps are computed in float64 whatever they are, the product of a layer in float32 or,
            for float64 weights, in float64.
        copies: ``copies[n][l]``, layer l adapted to concept n, shape and dtype of base.
        factors: Of the inputs: one for all layers, or one a layer; layers fed by the same input
            share theirs.

    Returns:
        The merged weights, one a layer, shape and dtype of base. Where all copies equal base, base
        bit for bit.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit, an argument is not finite, or the dtype
            of base cannot hold the result. Inside ``torch.compile`` what depends on the numbers is
            a RuntimeError without a name.

    Note:
        Deterministic for a given number of threads. Derivatives of every order and direction, for
        base, copies and what the factors are made of. On CUDA the float32 product of a layer
        follows torch's setting of TF32.

    Source:
        RegMean (Jin et al., ICLR 2023) without base and ridge; DERIVED with them.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import MomentFactor, merge_moments
        >>> first, second = torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.0, 1]))
        >>> base, copies = torch.zeros(1, 2), [torch.full((1, 2), 2.0), torch.full((1, 2), 4.0)]
        >>> factor = MomentFactor.from_moments([first, second], ridge=0.0)
        >>> merge_moments([base], [[copy] for copy in copies], factor)  # each rules its own inputs
        [tensor([[2., 4.]])]
    """
    by_layer = check_copies("merge_moments", base, copies, factors)
    merged = []
    for layer, (w0, factor) in enumerate(zip(base, by_layer, strict=True)):
        wide = torch.float64 if w0.dtype == torch.float64 else torch.float32
        flat = w0.flatten(1).to(wide)
        moved = torch.cat([copy[layer].flatten(1).to(wide) - flat for copy in copies], -1)
        added = product(moved, factor.stacked_maps(wide))
        merged.append((flat + added).to(w0.dtype).reshape(w0.shape).contiguous())
    _require_finite_result(merged, base, copies)
    return merged


def check_copies(
    function: str,
    base: Sequence[Tensor],
    copies: Sequence[Sequence[Tensor]],
    factors: MomentFactor | Sequence[MomentFactor],
    names: Sequence[str] | None = None,
) -> list[MomentFactor]:
    """Check base, copies and factors against each other; the factor of each layer.

    With names, those of other weights than the copies that the factors are of.
    """
    called = [f"copies[{n}]" for n in range(len(copies))] if names is None else list(names)
    if len(base) == 0:
        raise ValueError(f"{function}: base must not be empty")
    given = [factors] * len(base) if isinstance(factors, MomentFactor) else list(factors)
    if len(given) != len(base):
        raise ValueError(
            f"{function}: factors must be one, or one a layer, {len(base)}, got {len(given)}"
        )
    for n, layers in enumerate(copies):
        if len(layers) != len(base):
            raise ValueError(
                f"{function}: {called[n]} must hold one weight a layer, {len(base)}, got "
                f"{len(layers)}"
            )
    for layer, (w0, factor) in enumerate(zip(base, given, strict=True)):
        require_floating(function, f"base[{layer}]", w0)
        width = math.prod(w0.shape[1:])
        if w0.dim() < 2 or width != factor.dim:
            raise ValueError(
                f"{function}: base[{layer}] must have shape (o, {factor.dim}), the width of its "
                f"factor, or (o, i, *kernel) with as many columns, got {tuple(w0.shape)}"
            )
        if names is None and factor.concepts != len(copies):
            raise ValueError(
                f"{function}: copies must be those of {factor.concepts} concepts, as the factor of "
                f"layer {layer} has it, got {len(copies)}"
            )
        named = [("the factor", factor.chol), (f"base[{layer}]", w0)]
        for n, layers in enumerate(copies):
            copy = layers[layer]
            require_floating(function, f"{called[n]}[{layer}]", copy)
            if copy.shape != w0.shape or copy.dtype != w0.dtype:
                raise ValueError(
                    f"{function}: {called[n]}[{layer}] must have the shape and dtype of "
                    f"base[{layer}], {tuple(w0.shape)} {w0.dtype}, got {tuple(copy.shape)} "
                    f"{copy.dtype}"
                )
            named.append((f"{called[n]}[{layer}]", copy))
        require_same_device(function, named)
    return given


def _require_finite_result(
    merged: Sequence[Tensor], base: Sequence[Tensor], copies: Sequence[Sequence[Tensor]]
) -> None:
    """Look at the results, and only where one is not finite at the arguments."""
    bad = torch.stack([~torch.isfinite(w.detach()).all() for w in merged])
    if torch.compiler.is_compiling():
        torch._assert_async(
            ~bad.any(),
            "merge_moments: an argument is not finite or a result overflows; the same call without "
            "torch.compile says which",
        )
        return
    numbers = payload(bad)
    if numbers is None or not bool(numbers.any()):
        return
    layer = numbers.reshape(-1, len(merged)).any(0).nonzero().flatten().tolist()[0]
    require_finite("merge_moments", f"base[{layer}]", base[layer])
    for n, layers in enumerate(copies):
        require_finite("merge_moments", f"copies[{n}][{layer}]", layers[layer])
    raise ValueError(
        f"merge_moments: the merged weights of layer {layer} overflow {base[layer].dtype}; raise "
        "the ridge or use weights of a wider dtype"
    )


@contextmanager
def _no_inference() -> Iterator[None]:
    """What is kept for backward passes must be no inference tensor."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():  # in this order: the first enables gradients
        yield


def _plain(tensor: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    return tensor.clone()


def _symmetric(g: Tensor) -> Tensor:
    wide = g.to(torch.float64)
    return 0.5 * (wide + wide.mT)


def _factor(s: Tensor) -> Tensor:
    """Cholesky factor of S, or what S lacks.

    A pivot below d eps times the largest diagonal is rounding, whether Cholesky got past it or not.
    """
    with torch.no_grad():
        chol, info = torch.linalg.cholesky_ex(s)
        chol = chol.contiguous()
        if torch.compiler.is_compiling():
            torch._assert_async(
                (info == 0).all(),
                "MomentFactor.from_moments: S is not positive definite; the same call without "
                "torch.compile says which ridge would do",
            )
        numbers, failed = payload(chol), payload(info)
        if numbers is None or failed is None:
            return chol
        diagonal = payload(s.diagonal(dim1=-2, dim2=-1))
        assert diagonal is not None
        dim = s.shape[-1]
        tolerance = dim * _EPS * diagonal.amax(-1)
        pivots = numbers.diagonal(dim1=-2, dim2=-1).square().amin(-1)
        bad = (failed != 0) | ~(pivots > tolerance)
        if not bool(bad.any()):
            return chol
        whole = payload(s)
        assert whole is not None
        first = whole.reshape(-1, dim, dim)[int(bad.flatten().to(torch.int8).argmax())]
        eigenvalues = torch.linalg.eigvalsh(first)
        least, largest = float(eigenvalues[0]), max(float(eigenvalues[-1]), 0.0)
        rank = int((eigenvalues > dim * _EPS * largest).sum())
        # Lifts the smallest eigenvalue to ten times the tolerance.
        needed = 10 * dim * _EPS * largest - least
        mean = float(first.diagonal().mean())
        raise NotPositiveDefiniteError(
            "MomentFactor.from_moments: S = G_reg + ridge I + sum mu G must be positive definite, "
            f"got numerical rank {rank} of {dim}; "
            + (
                f"raise the ridge by at least {needed:.3g} in units of S ({needed / mean:.3g} "
                "relative)"
                if mean > 0
                else "all moments are zero: pass a positive ridge with relative=False"
            ),
            rank=rank,
            needed_ridge=needed,
        )
