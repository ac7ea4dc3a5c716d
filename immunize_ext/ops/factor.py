"""The Cholesky factor of Q = C_reg^T C_reg + ridge I that all layers of a merge share."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from immunize_ext.errors import NotPositiveDefiniteError, NumericalWarning
from immunize_ext.ops import operators  # noqa: F401 - defines merge_gram
from immunize_ext.ops.arguments import require_finite, require_floating_matrix
from immunize_ext.ops.derivatives import carries_derivative
from immunize_ext.storage import load_checkpoint, save_checkpoint

_KIND = "immunize_ext.RegularizationFactor/1"
_EPS = torch.finfo(torch.float64).eps


class RegularizationFactor:
    r"""Cholesky factor of the regularisation Gram matrix, reusable across layers and steps.

    .. math:: Q = C_{reg}^\top C_{reg} + \text{ridge}\, I = L L^\top

    Build one with :meth:`from_embeddings`, :meth:`identity` or :meth:`load`.

    Attributes:
        chol: L (d, d), float64, lower triangular.
        ridge: The absolute ridge that was added, in the units of Q.
        samples: Number of rows of C_reg.
        source: C_reg (m, d) where gradients reach it, else None.
        tag: What the captions and the text encoder were, in the words of whoever saved the factor.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import RegularizationFactor
        >>> factor = RegularizationFactor.from_embeddings(torch.eye(3), ridge=0.5)
        >>> factor.dim, factor.ridge, round(factor.condition, 6)
        (3, 0.5, 1.0)
    """

    chol: Tensor
    ridge: float
    samples: int
    source: Tensor | None
    tag: str | None

    def __init__(
        self,
        chol: Tensor,
        *,
        ridge: float,
        samples: int,
        source: Tensor | None = None,
        given_ridge: Tensor | None = None,
        mean_diagonal: float | None = None,
        tag: str | None = None,
    ) -> None:
        """Wrap a factor that exists already; :meth:`from_embeddings` computes one.

        Args:
            chol: L (d, d), float64, lower triangular.
            ridge: The absolute ridge in L L^T.
            samples: Number of rows of C_reg.
            source: C_reg itself, where gradients shall reach it.
            given_ridge: The ridge as given, 0-dimensional, where gradients shall reach it or,
                through the mean diagonal, C_reg.
            mean_diagonal: Of C_reg^T C_reg where the ridge given is relative to it.
            tag: What the captions and the text encoder were.
        """
        # LAPACK returns columns; and what inference mode made could never be saved for a backward.
        with torch.inference_mode(False):
            self.chol = chol.clone() if chol.is_inference() else chol.contiguous()
        self.ridge = ridge
        self.samples = samples
        self.source = source
        self._given_ridge = given_ridge
        self._mean_diagonal = mean_diagonal
        self.tag = tag
        self._versions = self._current_versions()

    def _current_versions(self) -> tuple[int, ...]:
        """How often C_reg and the ridge were changed in place; inference tensors do not count."""
        followed = (self.source, self._given_ridge)
        return tuple(t._version for t in followed if t is not None and not t.is_inference())

    def require_current(self, function: str) -> None:
        """Refuse a factor whose C_reg or ridge was changed in place after it was built.

        Its numbers are those of the old values, its gradients would be those of neither.

        Args:
            function: The function that refuses.

        Raises:
            ValueError: If there was such a change.
        """
        if torch.compiler.is_compiling() or self._current_versions() == self._versions:
            return
        raise ValueError(
            f"{function}: factor must be of the present C_reg and ridge, got one that was built "
            "before they were changed in place; build it again with "
            "RegularizationFactor.from_embeddings"
        )

    def __getstate__(self) -> dict[str, Any]:
        """The numbers, as :meth:`save` keeps them: a pickled factor has no path to C_reg."""
        plain = {"source": None, "_given_ridge": None, "_mean_diagonal": None, "_versions": ()}
        return {**self.__dict__, **plain}

    def __deepcopy__(self, memo: dict[int, Any]) -> RegularizationFactor:
        """Numbers of its own, and gradients that reach the same C_reg and ridge."""
        copied = self._with(self.chol.clone(), self.source, self._given_ridge)
        memo[id(self)] = copied
        return copied

    def _with(
        self, chol: Tensor, source: Tensor | None, given_ridge: Tensor | None
    ) -> RegularizationFactor:
        self.require_current("RegularizationFactor")
        return RegularizationFactor(
            chol,
            ridge=self.ridge,
            samples=self.samples,
            source=source,
            given_ridge=given_ridge,
            mean_diagonal=self._mean_diagonal,
            tag=self.tag,
        )

    @property
    def dim(self) -> int:
        """Width d of the text features."""
        return self.chol.shape[-1]

    @property
    def ridge_tensor(self) -> Tensor | None:
        """The absolute ridge, 0-dimensional, where gradients reach it, else None.

        Made anew each time: merges that share a factor must not share a graph, which the first
        backward pass would free.
        """
        if self._given_ridge is None:
            return None
        ridge = self._given_ridge
        if self._mean_diagonal is not None:
            source = self.source
            scale = (
                self._mean_diagonal
                if source is None
                else source.to(torch.float64).square().sum() / self.dim
            )
            ridge = ridge * scale
        return ridge if carries_derivative(ridge) else None

    @property
    def device(self) -> torch.device:
        """Device of the factor."""
        return self.chol.device

    @classmethod
    def from_embeddings(
        cls,
        c_reg: Tensor | Iterable[Tensor],
        *,
        ridge: float | Tensor = 0.0,
        relative: bool = True,
        chunk: int = 512,
    ) -> RegularizationFactor:
        r"""Factor Q = C_reg^T C_reg + ridge I, streaming over the rows of C_reg.

        Args:
            c_reg: Text features (m, d) of unrelated captions, any floating dtype; or an iterable of
                (m_i, d) blocks, when they do not fit into memory together. The Gram matrix is
                accumulated in float64 either way.
            ridge: What is added to the diagonal of Q; non-negative; a number or a 0-dimensional
                tensor.
            relative: If true, ridge is in units of the mean diagonal of C_reg^T C_reg, so that the
                result does not depend on the scale of C_reg. Otherwise in units of Q.
            chunk: Where there is no kernel, rows of C_reg that are copied to float64 at a time; the
                last bits of Q depend on it there.

        Returns:
            The factor. Gradients reach c_reg and ridge where they are tensors that require them.

        Raises:
            NotPositiveDefiniteError: If Q is numerically singular; says its rank, and the smallest
                ridge that would do. Fewer captions than d need a ridge always.
            ValueError: If c_reg is not a finite (m, d) tensor, is empty, or ridge is negative.

        Note:
            Q is the same for any number of threads where there is a kernel (CPU), its factor for a
            given number.
            Warns with :class:`~immunize_ext.errors.NumericalWarning` if a positive
            ridge is below the resolution of float64 at the largest diagonal of Q, and if rows of
            less than float64 lack a direction but for their rounding and the ridge leaves it to
            that.

        Source:
            MIMA and Custom Diffusion, Q without ridge; the ridge is ours.

        Example:
            >>> import torch
            >>> from immunize_ext.ops import RegularizationFactor
            >>> captions = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
            >>> factor = RegularizationFactor.from_embeddings(captions, ridge=1e-6)
            >>> factor.chol.dtype, factor.samples
            (torch.float64, 200)
        """
        function = "RegularizationFactor.from_embeddings"
        whole = c_reg if isinstance(c_reg, Tensor) else None
        gram, samples, rows_eps = _stream_gram(function, c_reg, chunk)
        if samples == 0 and relative:
            raise ValueError(
                f"{function}: c_reg must hold at least one row for a relative ridge, got an empty "
                "tensor; pass captions, or relative=False with a positive ridge"
            )
        ridge_value = float(ridge.detach()) if isinstance(ridge, Tensor) else float(ridge)
        if not (math.isfinite(ridge_value) and ridge_value >= 0):
            raise ValueError(
                f"{function}: ridge must be finite and not negative, got {ridge_value}"
            )
        mean_diagonal = float(gram.diagonal().mean())
        absolute = ridge_value * mean_diagonal if relative else ridge_value
        largest = float(gram.diagonal().max())
        if 0.0 < absolute < _EPS * largest:
            warnings.warn(
                f"{function}: the ridge, {absolute:.3g}, is below the resolution of float64 at the "
                f"largest diagonal of Q, {largest:.3g}, and changes nothing; use at least "
                f"{_EPS * largest:.3g}",
                NumericalWarning,
                stacklevel=2,
            )
        gram.diagonal().add_(absolute)
        chol = _factor_or_explain(function, gram, samples, mean_diagonal if relative else None)
        # Fewer rows lack directions altogether, and tokens need not.
        if samples >= chol.shape[0]:
            _warn_of_rounded_rows(function, chol, absolute, mean_diagonal, rows_eps, relative)

        source = None
        if whole is not None and carries_derivative(whole):
            source = whole
        given = None
        if isinstance(ridge, Tensor) or (relative and source is not None and ridge_value > 0.0):
            given = torch.as_tensor(ridge, dtype=torch.float64, device=chol.device)
        return cls(
            chol,
            ridge=absolute,
            samples=samples,
            source=source,
            given_ridge=given,
            mean_diagonal=mean_diagonal if relative else None,
        )

    @classmethod
    def identity(
        cls, dim: int, *, scale: float = 1.0, device: torch.device | str = "cpu"
    ) -> RegularizationFactor:
        """Q = scale I: no captions, every direction of text space weighs the same.

        Args:
            dim: Width d of the text features.
            scale: What Q is a multiple of; matters with soft constraints only.
            device: Where the factor shall live.

        Returns:
            The factor of scale I, which counts as a ridge.

        Raises:
            ValueError: If dim or scale is not positive.

        Example:
            >>> from immunize_ext.ops import RegularizationFactor
            >>> RegularizationFactor.identity(2).chol
            tensor([[1., 0.],
                    [0., 1.]], dtype=torch.float64)
        """
        if dim < 1:
            raise ValueError(f"RegularizationFactor.identity: dim must be positive, got {dim}")
        if not 0 < scale < math.inf:
            raise ValueError(
                f"RegularizationFactor.identity: scale must be positive and finite, got {scale}"
            )
        chol = math.sqrt(scale) * torch.eye(dim, dtype=torch.float64, device=device)
        return cls(chol, ridge=scale, samples=0)

    @cached_property
    def condition(self) -> float:
        """Condition number of Q, from the singular values of L.

        Computed on first use at the cost of a singular value decomposition of L.
        """
        sigma = torch.linalg.svdvals(self.chol)
        return float((sigma[0] / sigma[-1]).square())

    def to(self, device: torch.device | str) -> RegularizationFactor:
        """Return the factor on another device.

        Args:
            device: Target device.

        Returns:
            A new factor, or this one if it is there already. Gradients still reach C_reg.
        """
        chol = self.chol.to(device)
        if chol is self.chol:
            return self
        source = None if self.source is None else self.source.to(device)
        given = None if self._given_ridge is None else self._given_ridge.to(device)
        return self._with(chol, source, given)

    def save(self, path: str | os.PathLike[str], *, tag: str | None = None) -> None:
        """Write the factor to a safetensors file, whole or not at all.

        Args:
            path: Target file; replaced if it exists.
            tag: Says what the factor belongs to (text encoder, captions), for :meth:`load` to
                compare; default the factor's own tag.

        Raises:
            MissingExtraError: If safetensors is not installed.
            OSError: If the file cannot be written; an existing one is then untouched.
        """
        values = {
            "ridge": self.ridge,
            "samples": self.samples,
            "tag": self.tag if tag is None else tag,
        }
        save_checkpoint(path, {"chol": self.chol}, kind=_KIND, values=values)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        tag: str | None = None,
        device: torch.device | str = "cpu",
    ) -> RegularizationFactor:
        """Read a factor that :meth:`save` wrote.

        Args:
            path: The file.
            tag: What the factor must belong to. The factor of another text encoder of the same
                width fits every shape and edits wrongly; with a tag it is refused.
            device: Where the factor shall live.

        Returns:
            The factor, without a path for gradients to C_reg.

        Raises:
            FileNotFoundError: If there is no such file.
            MissingExtraError: If safetensors is not installed.
            ValueError: If the file holds something else, or was saved with another tag or none.
        """
        function = "RegularizationFactor.load"
        tensors, values = load_checkpoint(path, kind=_KIND, function=function, device=device)
        if set(tensors) != {"chol"}:
            raise ValueError(
                f"{function}: {os.fspath(path)} must hold a float64 Cholesky factor and nothing "
                f"else, got {sorted(tensors)}"
            )
        chol = tensors["chol"]
        square = chol.dim() == 2 and chol.shape[0] == chol.shape[1] and chol.shape[0] > 0
        if (
            not square
            or chol.dtype != torch.float64
            or not bool((chol.diagonal() > 0).all())
            or not bool(torch.isfinite(chol).all())
            or bool(chol.triu(1).any())
        ):
            raise ValueError(
                f"{function}: {os.fspath(path)} must hold a float64 Cholesky factor (d, d), lower "
                f"triangular with positive diagonal, got {chol.dtype} {tuple(chol.shape)}"
            )
        found = values.get("tag")
        if tag is not None and found != tag:
            raise ValueError(
                f"{function}: {os.fspath(path)} must hold the factor of {tag!r}, got "
                f"{'one without a tag' if found is None else repr(found)}; compute it again"
            )
        return cls(chol, ridge=float(values["ridge"]), samples=int(values["samples"]), tag=found)

    def __repr__(self) -> str:
        return (
            f"RegularizationFactor(dim={self.dim}, samples={self.samples}, ridge={self.ridge:.3g}, "
            f"device={str(self.device)!r})"
        )


def _stream_gram(
    function: str, c_reg: Tensor | Iterable[Tensor], chunk: int
) -> tuple[Tensor, int, float]:
    """C_reg^T C_reg in float64, the number of rows and the coarsest epsilon that one has."""
    if chunk < 1:
        raise ValueError(f"{function}: chunk must be positive, got {chunk}")
    blocks = [c_reg] if isinstance(c_reg, Tensor) else c_reg
    gram: Tensor | None = None
    samples, rows_eps = 0, _EPS
    for block in blocks:
        empty = isinstance(block, Tensor) and block.dim() == 2 and block.shape[0] == 0
        if not empty or block.shape[1] == 0:
            require_floating_matrix(function, "c_reg", block)
        if block.dim() != 2:
            raise ValueError(
                f"{function}: c_reg must have shape (m, d), got {tuple(block.shape)}; flatten "
                "captions and tokens into rows with .reshape(-1, d)"
            )
        block = block.detach()
        if gram is None:
            d = block.shape[1]
            gram = torch.zeros(d, d, dtype=torch.float64, device=block.device)
        elif block.shape[1] != gram.shape[1]:
            raise ValueError(
                f"{function}: every block of c_reg must have width {gram.shape[1]}, got "
                f"{block.shape[1]}"
            )
        gram += torch.ops.immunize_ext.merge_gram(block, chunk)
        samples += block.shape[0]
        rows_eps = max(rows_eps, torch.finfo(block.dtype).eps)
        # Every entry is squared into the diagonal: one look there instead of a pass over c_reg.
        if not bool(torch.isfinite(gram.diagonal()).all()):
            require_finite(function, "c_reg", block)
            raise ValueError(
                f"{function}: c_reg must have squares that float64 can hold, got sums that "
                "overflow; scale c_reg down"
            )
    if gram is None:
        raise ValueError(f"{function}: c_reg must hold at least one block, got none")
    return gram, samples, rows_eps


def _warn_of_rounded_rows(
    function: str, chol: Tensor, ridge: float, mean: float, eps: float, relative: bool
) -> None:
    """Warn where a direction of Q is the rounding of its rows, and what is merged would follow it.

    Rows that lie in a plane (of a layer norm without weights, say) leave it by eps of their size
    when they are rounded, and so do tokens: Q has an eigenvalue of about eps^2 times the mean
    diagonal there. To change by E what a token c gives, W may use eps |c| across the plane at a
    cost of as many such eigenvalues as it would have to pay of ordinary ones within it; it then
    grows by E / (eps |c|). Only a ridge of eps times the mean diagonal makes the plane cheaper.
    """
    if eps <= _EPS or ridge >= eps * mean:
        return
    # Inverse iteration: the gap is wide where it matters, and elsewhere the bound is not needed.
    x = torch.arange(1, chol.shape[0] + 1, dtype=chol.dtype, device=chol.device).sin()[:, None]
    for _ in range(3):
        x = torch.cholesky_solve(x / x.norm(), chol)
    least = 1.0 / float(x.norm()) - ridge
    if least > (4.0 * eps) ** 2 * mean:
        return
    unit = "relative" if relative else "in units of Q"
    warnings.warn(
        f"{function}: c_reg must reach every direction by more than its rounding, got one where "
        f"the mean square of its rows is {max(least, 0.0) / mean:.1g} of the average, and the "
        f"ridge leaves the merge to it: weights would become some {1.0 / eps:.0e} times too large; "
        f"use a ridge of at least {eps * (1.0 if relative else mean):.2g} {unit}",
        NumericalWarning,
        stacklevel=3,
    )


def _factor_or_explain(
    function: str, q: Tensor, samples: int, mean_diagonal: float | None
) -> Tensor:
    """Cholesky factor of q, of which only the lower triangle counts, or what it lacks.

    A pivot L_ii^2 below d eps times the largest diagonal is rounding, whether or not Cholesky got
    past it: lambda_min <= min L_ii^2, so Q is then numerically singular.
    """
    dim = q.shape[-1]
    chol, info = torch.linalg.cholesky_ex(q)
    largest = float(q.diagonal().max())
    tolerance = dim * _EPS * largest
    if int(info) == 0 and float(chol.diagonal().square().min()) > tolerance:
        return chol
    if largest == 0.0:
        raise NotPositiveDefiniteError(
            f"{function}: Q must be positive definite, got zero: c_reg has no rows, or only "
            "numbers whose squares are 0 in float64, and the ridge is 0; pass captions, scale "
            "c_reg up, or pass a positive ridge with relative=False",
            rank=0,
        )
    eigenvalues = torch.linalg.eigvalsh(q)
    rank = int((eigenvalues > dim * _EPS * float(eigenvalues[-1])).sum())
    # Lifts the smallest eigenvalue to ten times the tolerance.
    needed = max(0.0, 10 * dim * _EPS * float(eigenvalues[-1]) - float(eigenvalues[0]))
    zero = (q.diagonal() <= tolerance).nonzero().flatten().tolist()
    hints = [f"use a ridge of at least {needed:.3g} in units of Q"]
    if mean_diagonal is not None and mean_diagonal > 0:
        hints[0] += f" ({needed / mean_diagonal:.3g} relative)"
    if samples < dim:
        hints.append(f"c_reg has {samples} rows for {dim} columns: more captions would do as well")
    if zero:
        hints.append(f"columns {zero[:8]} of c_reg are zero")
    raise NotPositiveDefiniteError(
        f"{function}: Q = C_reg^T C_reg + ridge I must be positive definite, got numerical rank "
        f"{rank} of {dim}; " + "; ".join(hints),
        rank=rank,
        needed_ridge=needed,
    )
