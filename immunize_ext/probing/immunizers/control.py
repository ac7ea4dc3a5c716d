r"""Feedback that keeps kappa_P in a corridor while a method moves theta for another reason.

A method proposes a displacement d. Where kappa_P cannot be projected (a deep extractor), it can be
steered: with x = log kappa_P, n its gradient and the corridor [a, b] of x, what is done instead is

.. math:: d + c\, n .

*sqp*: d + c n is the nearest step to d that keeps to the corridor, to first order:

    min |d' - d|^2  subject to  a' <= x + <n, d'> <= b',
    c = (clip(x + <n, d>, a', b') - x - <n, d>) / |n|^2.

Inside, [a', b'] = [a, b]: a step that stays there is not touched, one that would leave it loses
what would lead out (the tangent). Outside, b' = x - rho (x - b) moves back a share rho of the way
(the normal), at most ``reach``: x - b falls geometrically, with no multiplier to tune. The
multiplier that this amounts to, -c, is an output. What the first order left out of the last steps
is seen at the next measurement, and half as much again is kept from either end as a margin.

*pi* and *dual* are what is usual: a multiplier of the penalty, from the excess e = x - b,

    pi      I <- (I + k_i e)_+,  lambda = (k_p e + I)_+, held where it is cut off
    dual    lambda <- (lambda + s e)_+

with c = -lambda |d| / |n|: in units of the proposed step, so that no scale of theta or of a step
size has to be known. The lower end has a multiplier of its own, with the other sign.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from immunize_ext.probing.immunizers.corridor import check_corridor

ControllerName: TypeAlias = Literal["sqp", "pi", "dual"]
"""Kinds of :class:`CorridorController`."""

# Largest multiplier of pi and dual, in units of the proposed step.
_MOST = 100.0


@dataclass(frozen=True)
class CorridorController:
    """How far along the gradient of log kappa_P a step is corrected.

    Attributes:
        corridor: The least and the largest kappa_P.
        kind: ``"sqp"``, ``"pi"`` or ``"dual"`` (module docstring).
        gain: rho, the share of an excess that a step of ``"sqp"`` takes back.
        reach: The most that it takes back at once, in log kappa_P.
        proportional: k_p of ``"pi"``.
        integral: k_i of ``"pi"``.
        rate: s of ``"dual"``.

    Raises:
        ValueError: If the corridor is none, the kind is unknown or a number is out of range.

    Example:
        >>> controller = CorridorController((1.0, 30.0))
        >>> at_the_edge = math.log(30.0)
        >>> # The step would add 0.2 to log kappa_P; |n|^2 is 4: -0.05 n takes that out.
        >>> round(controller.correction(at_the_edge, 0.2, 4.0, 1.0, {}), 12)
        -0.05
        >>> controller.correction(at_the_edge, -0.2, 4.0, 1.0, {})
        0.0
    """

    corridor: tuple[float, float]
    kind: ControllerName = "sqp"
    gain: float = 1.0
    reach: float = 0.3
    proportional: float = 1.0
    integral: float = 0.02
    rate: float = 0.05

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_corridor(name, self.corridor)
        if self.kind not in get_args(ControllerName):
            raise ValueError(
                f"{name}: kind must be one of {', '.join(get_args(ControllerName))}, got "
                f"{self.kind!r}"
            )
        for setting in ("gain", "reach", "proportional", "integral", "rate"):
            value = getattr(self, setting)
            if not (math.isfinite(value) and value > 0.0):
                raise ValueError(f"{name}: {setting} must be finite and positive, got {value}")

    def correction(
        self, log_kappa: float, slope: float, square: float, length: float, state: dict[str, float]
    ) -> float:
        """The factor c of one step d, which becomes d + c n.

        Args:
            log_kappa: x where the step starts.
            slope: <n, d>, what d changes x by to first order.
            square: |n|^2 in the same metric.
            length: |d|.
            state: What the controller remembers, changed; empty at the start of a run.

        Returns:
            c; 0 where n is 0, since no step changes x there.
        """
        if not square > 0.0:
            return 0.0
        low, high = (math.log(end) for end in self.corridor)
        if self.kind == "sqp":
            margin = self._margin(log_kappa, (high - low) / 4.0, state)
            low, high = low + margin, high - margin
            upper = max(high, log_kappa) - self._back(log_kappa - high)
            lower = min(low, log_kappa) + self._back(low - log_kappa)
            ahead = log_kappa + slope
            found = (min(max(ahead, lower), upper) - ahead) / square
            state["expected"] = ahead + found * square
        else:
            multiplier = self._multiplier("upper", log_kappa - high, state)
            multiplier -= self._multiplier("lower", low - log_kappa, state)
            found = -multiplier * length / math.sqrt(square)
        state["multiplier"] = -found
        return found

    @staticmethod
    def _margin(log_kappa: float, most: float, state: dict[str, float]) -> float:
        """How far the last steps led from where they were expected; fades in some twenty looks."""
        error = abs(log_kappa - state.get("expected", log_kappa))
        if error > 0.0:  # 0 between two measurements, where nothing is learnt
            state["margin"] = max(1.5 * error, 0.95 * state.get("margin", 0.0))
        return min(state.get("margin", 0.0), most)

    def _back(self, excess: float) -> float:
        return min(self.gain * max(excess, 0.0), self.reach)

    def _multiplier(self, end: str, excess: float, state: dict[str, float]) -> float:
        before = state.get(end, 0.0)
        if self.kind == "dual":
            state[end] = min(max(before + self.rate * excess, 0.0), _MOST)
            return state[end]
        moved = max(before + self.integral * excess, 0.0)
        wanted = self.proportional * excess + moved
        if 0.0 <= wanted <= _MOST or moved < before:
            state[end] = moved
        return min(max(wanted, 0.0), _MOST)
