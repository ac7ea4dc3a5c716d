"""Extremes of a symmetric matrix along a training trajectory, warm-started and proven.

From one step to the next a Hessian changes little, so the last vectors are nearly right and the
factorisation of an earlier matrix is a good preconditioner. What is cheap to improve is not thereby
known to be the extreme: another eigenvalue may have overtaken it. So each warm result is proven, by
the distance to a matrix whose spectrum is known or by a Cholesky factorisation, and where the proof
fails the matrix is decomposed anew. A tracker returns what ``symmetric_extremes`` would, or that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from immunize_ext.ops.arguments import require_finite, spectrum_policy
from immunize_ext.ops.fallback import padded_width
from immunize_ext.ops.spectrum import (
    SingularExtremes,
    SymmetricExtremes,
    cluster_tolerance,
    extremal_singular_values,
)

_LONGEST_PAUSE = 32
_STATE = ("vectors", "matrix", "reflectors", "tridiagonal", "ends")


class _Tracked(torch.autograd.Function):
    """Values that were found outside autograd, with the derivatives of ``symmetric_extremes``."""

    @staticmethod
    def forward(
        h: Tensor, values: Tensor, multiplicity: Tensor, vectors: Tensor, cluster_rtol: float
    ) -> tuple[Tensor, Tensor]:
        return values[0].clone(), values[1].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        h, _, multiplicity, vectors, ctx.cluster_rtol = inputs
        ctx.save_for_backward(h, *multiplicity, *vectors)

    @staticmethod
    def backward(ctx: Any, grad_max: Tensor, grad_min: Tensor) -> tuple[Any, ...]:
        grad = torch.ops.immunize_ext.symmetric_extremes_backward(
            grad_max, grad_min, *ctx.saved_tensors, ctx.cluster_rtol
        )
        return grad, None, None, None, None


class SpectrumTracker(nn.Module):
    r"""Largest and smallest eigenvalue of one slowly changing symmetric matrix.

    .. math:: \lambda_{\max}(H_t),\ \lambda_{\min}(H_t), \quad t = 0, 1, 2, \dots

    Equivalent to :func:`~immunize_ext.ops.symmetric_extremes` on every matrix of the trajectory.
    The first call decomposes its matrix. Later calls start from the last vectors, and decompose
    again only where an extreme was overtaken, became repeated, or moved too far to follow: where
    the step times the spread of the spectrum over the gap beside the extreme is about 1. A
    trajectory of such steps costs what ``symmetric_extremes`` does.

    Args:
        cluster_rtol: As in :func:`~immunize_ext.ops.symmetric_extremes`.

    Attributes:
        warm_calls: How many calls were served from the last vectors.
        cold_calls: How many calls decomposed their matrix.

    Note:
        Nothing that autograd holds is changed by a later call: several forwards may precede their
        backwards. Derivatives are those of ``symmetric_extremes``. Use one tracker for each matrix.
        Not for use inside ``torch.func`` transforms or ``torch.compile``; on devices without the
        kernel every call is cold.

    Source:
        Weyl's inequality and the residual bound: Parlett 1998, 10.3 and 11.7. Inertia by
        factorisation: Sylvester.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import SpectrumTracker
        >>> tracker = SpectrumTracker()
        >>> h = torch.diag(torch.tensor([-5.0, 0.1, 4.0], dtype=torch.float64))
        >>> [tracker(h * (1 + 1e-4 * step)).lambda_max.item() for step in range(2)]
        [4.0, 4.0004]
        >>> tracker.cold_calls + tracker.warm_calls  # 1 and 1, where the kernels are compiled
        2
    """

    def __init__(self, *, cluster_rtol: float | None = None) -> None:
        """Start with no trajectory."""
        super().__init__()
        self.cluster_rtol = cluster_rtol
        self.warm_calls = 0
        self.cold_calls = 0
        for name in _STATE:
            self.register_buffer(name, None)
        self._served = False  # whether the state has served a warm call
        self._rest, self._pause = 0, 1  # calls to go without a state, and how many next time

    def forward(self, h: Tensor) -> SymmetricExtremes:
        """Extremes of the next matrix of the trajectory.

        Args:
            h: Symmetric matrix (p, p), real floating point; no batch.

        Returns:
            ``lambda_max`` and ``lambda_min`` () in h's dtype; ``multiplicity_max`` and
            ``multiplicity_min`` () int64.

        Raises:
            ValueError: As :func:`~immunize_ext.ops.symmetric_extremes`, or if h has batch
                dimensions.
        """
        tolerance = cluster_tolerance("SpectrumTracker", h, self.cluster_rtol)
        if h.dim() != 2:
            raise ValueError(
                f"SpectrumTracker: h must have shape (p, p), got {tuple(h.shape)}; "
                "use one tracker for each matrix of a batch"
            )
        values, multiplicity, vectors = self._advance(h.detach(), tolerance)
        largest, smallest = _Tracked.apply(h, values, multiplicity, vectors, tolerance)
        return SymmetricExtremes(
            largest.to(h.dtype), smallest.to(h.dtype), multiplicity[0], multiplicity[1]
        )

    def _advance(self, h: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
        """Values, multiplicities and vectors of h; the state becomes that of h, in new tensors."""
        state = [self._buffers[name] for name in _STATE]
        if state[1] is not None and state[1].shape == h.shape and state[1].device == h.device:
            values, vectors, proven = torch.ops.immunize_ext.symmetric_track(h, tolerance, *state)
            if proven:
                self.warm_calls += 1
                self._served, self._pause = True, 1
                self._buffers["vectors"] = vectors
                return values, torch.ones(2, dtype=torch.int64, device=h.device), vectors
            if not self._served:
                # Steps too long to follow. What a warm call starts from costs more than the
                # extremes alone, so it is made anew after a pause only, each longer than the last.
                self._forget()
                self._rest, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
        self.cold_calls += 1
        if self._rest == 0:
            try:
                return self._refer(h, tolerance)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                self._forget()
        else:
            self._rest -= 1
        largest, smallest, *counts, v_max, v_min = torch.ops.immunize_ext.symmetric_extremes(
            h, tolerance
        )
        return torch.stack([largest, smallest]), torch.stack(counts), torch.stack([v_max, v_min])

    def _refer(self, h: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
        """Decompose h and keep what a warm call starts from."""
        values, multiplicity, *rest = torch.ops.immunize_ext.symmetric_reference(h, tolerance)
        self._served = False
        self._buffers.update(zip(_STATE, rest, strict=True))
        return values, multiplicity, rest[0]

    def _forget(self) -> None:
        self._buffers.update(dict.fromkeys(_STATE))

    def reset(self) -> None:
        """Forget the trajectory: the next call is cold."""
        self._forget()
        self._served, self._rest, self._pause = False, 0, 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, kept in before.items():
            after = self._buffers[name]
            # .half() and the like are about weights; the state stays float64.
            if kept is not None and after is not None and after.dtype != kept.dtype:
                self._buffers[name] = kept.to(after.device)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """Copies of the tensors that a warm call starts from; nothing before the first call."""
        for name in _STATE:
            value = self._buffers[name]
            if value is not None:
                destination[prefix + name] = value.clone()

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        state = {
            key.removeprefix(prefix): value
            for key, value in state_dict.items()
            if key.startswith(prefix)
        }
        if not state:
            self.reset()
            return
        if set(state) != set(_STATE):
            raise ValueError(
                f"SpectrumTracker: state must have the entries {sorted(_STATE)}, "
                f"got {sorted(state)}; pass what state_dict returned"
            )
        p = state["matrix"].shape[0] if state["matrix"].dim() == 2 else 0
        width = padded_width(p)
        shapes = {
            "vectors": (2, p),
            "matrix": (p, p),
            "reflectors": (p, width),
            "tridiagonal": (3, width),
            "ends": (5,),
        }
        for name, shape in shapes.items():
            if tuple(state[name].shape) != shape or state[name].dtype != torch.float64:
                raise ValueError(
                    f"SpectrumTracker: {name} of the state must have shape {shape} and dtype "
                    f"float64, got {tuple(state[name].shape)} and {state[name].dtype}"
                )
        self.reset()
        for name in _STATE:
            self._buffers[name] = state[name].detach().clone().contiguous()


# Below this lambda_min / lambda_max the Gram matrix, whose rounding is eps lambda_max, does not
# tell enough of the vector of sigma_min: half its digits are left where that begins.
_TOO_ILL = 1e-8

# Where following pays: on one core 1.3 times at 512 x 512, 1.8 at 768 and 2.6 at 1024, all as the
# step allows a warm call. Smaller ones and those much longer than wide are decomposed faster than
# their Gram matrix is formed and the extremes of that are proven.
_WORTHWHILE_SIDE, _WORTHWHILE_ASPECT = 512, 2.0


class SingularTracker(nn.Module):
    r"""Largest and smallest singular value of one slowly changing matrix, of any shape.

    .. math:: \sigma_{\max}(W_t),\ \sigma_{\min}(W_t), \quad t = 0, 1, 2, \dots

    Equivalent to :func:`~immunize_ext.ops.extremal_singular_values` on every matrix of the
    trajectory. A :class:`SpectrumTracker` follows the Gram matrix of the thin side; the values are
    then lengths |W v| of the matrix itself along the vectors that it found, so that rounding of the
    Gram matrix counts in second order. Where an extreme is repeated, or kappa is above 1e4, the
    matrix is decomposed as without a tracker; so it is where that is faster, below a side of 512
    and beyond twice as long as wide.

    Args:
        rank_rtol: As in :func:`~immunize_ext.ops.extremal_singular_values`.
        cluster_rtol: As in :func:`~immunize_ext.ops.extremal_singular_values`.

    Attributes:
        gram: The tracker of the Gram matrix, with its counts of warm and cold calls.
        decompositions: How many calls decomposed the matrix itself.

    Note:
        Derivatives are those of ``extremal_singular_values``; of the first order where the values
        come from the tracker. Otherwise as :class:`SpectrumTracker`.

    Source:
        As :class:`SpectrumTracker`; lengths along approximate vectors: Parlett 1998, 4.6.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import SingularTracker
        >>> tracker = SingularTracker()
        >>> w = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
        >>> [round(tracker(w * (1 + 1e-4 * t)).sigma_min.item(), 6) for t in range(3)]
        [1.0, 1.0001, 1.0002]
        >>> tracker.gram.warm_calls, tracker.decompositions  # too small for more than that
        (0, 3)
    """

    def __init__(
        self, *, rank_rtol: float | None = None, cluster_rtol: float | None = None
    ) -> None:
        """Start with no trajectory."""
        super().__init__()
        self.rank_rtol, self.cluster_rtol = rank_rtol, cluster_rtol
        self.gram = SpectrumTracker(cluster_rtol=cluster_rtol)
        self.decompositions = 0

    def forward(self, w: Tensor) -> SingularExtremes:
        """Extremes of the next matrix of the trajectory.

        Args:
            w: Matrix (n, p), real floating point; no batch.

        Returns:
            As :func:`~immunize_ext.ops.extremal_singular_values`, without batch dimensions.

        Raises:
            ValueError: As :func:`~immunize_ext.ops.extremal_singular_values`, or if w has batch
                dimensions.
        """
        policy = spectrum_policy(
            "SingularTracker", "w", w, "numerical", self.rank_rtol, self.cluster_rtol
        )
        if w.dim() != 2:
            raise ValueError(
                f"SingularTracker: w must have shape (n, p), got {tuple(w.shape)}; "
                "use one tracker for each matrix of a batch"
            )
        require_finite("SingularTracker", "w", w)
        side = min(w.shape)
        if side < _WORTHWHILE_SIDE or max(w.shape) > _WORTHWHILE_ASPECT * side:
            return self._decompose(w)
        tall = w if w.shape[0] >= w.shape[1] else w.mT
        rows = tall.detach().to(torch.float64)
        h = rows.mT @ rows
        # Twice the tolerance: that of sigma is half that of its square.
        tolerance = min(2.0 * policy.cluster_rtol, 0.5)
        found, multiplicity, vectors = self.gram._advance((h + h.mT) / 2, tolerance)
        if bool((multiplicity > 1).any()) or not bool(
            found[1] > max(_TOO_ILL, policy.rank_rtol**2) * found[0]
        ):
            return self._decompose(w)
        # With v held, d|W v| = (W v / |W v|)^T dW v: the derivative of a simple singular value.
        lengths = torch.linalg.vector_norm(tall.to(torch.float64) @ vectors.mT, dim=0)
        largest, smallest = lengths.to(w.dtype)
        rank = torch.full_like(multiplicity[0], side)
        return SingularExtremes(largest, smallest, rank, multiplicity[0], multiplicity[1])

    def _decompose(self, w: Tensor) -> SingularExtremes:
        self.decompositions += 1
        return extremal_singular_values(w, rank_rtol=self.rank_rtol, cluster_rtol=self.cluster_rtol)

    def reset(self) -> None:
        """Forget the trajectory: the next call is cold."""
        self.gram.reset()
