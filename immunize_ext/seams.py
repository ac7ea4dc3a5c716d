"""The types that both wings pass everything through.

A wing defines what its models, problems and targets are; these say what can be done with them. A
new method or attack is one file with one frozen dataclass that has these methods, and one line that
registers it: flags, help, YAML keys, results and report rows follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

Progress: TypeAlias = Callable[[str, float], None]
"""What a long piece of work calls: what it is doing, and the share that is done."""

ModelT = TypeVar("ModelT", contravariant=True)
ProblemT = TypeVar("ProblemT", contravariant=True)
ImmunizedT = TypeVar("ImmunizedT", covariant=True)
TargetT = TypeVar("TargetT", contravariant=True)


class Immunizer(Protocol[ModelT, ProblemT, ImmunizedT]):
    """A method: a frozen dataclass of settings.

    Attributes:
        method: Its name, unique in its wing.
    """

    method: ClassVar[str]

    def fit(
        self,
        model: ModelT,
        problem: ProblemT,
        *,
        progress: Progress | None = None,
        resume: Path | None = None,
    ) -> ImmunizedT:
        """Immunize a model; the one given is not changed.

        Args:
            model: What to immunize.
            problem: What to keep, and what to make hard.
            progress: Called with what was done and the share done so far.
            resume: A folder for checkpoints. What a run with the same settings, model and problem
                left there is gone on from; a checkpoint of anything else is an error.
        """


class Attack(Protocol[ModelT, TargetT]):
    """An attacker: a frozen dataclass of settings.

    Attributes:
        name: Its name, unique in its wing.
    """

    @property
    def name(self) -> str:
        """The name in curves, results and reports."""

    def run(
        self,
        model: ModelT,
        target: TargetT,
        *,
        steps: int,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> AttackCurve:
        """Attack a model, which is not changed, and record how far each step gets."""


@dataclass(frozen=True)
class AttackCurve:
    """What one attack on one model got, step by step.

    Attributes:
        attack: Name of the attack.
        target: What it wanted; several names are joined by ``+``.
        steps: Steps at which it was judged, ascending; 0 is before the first step.
        scores: By name of the score, its value at each of ``steps``.
        losses: Training loss of every step, judged or not; may be empty.
        seconds: Wall-clock time of the attack's own steps, judging left out.
        peak_memory: Most bytes held at once; 0 where nobody measured.
        config: Settings, seed, prompts, learning rate: all that is needed to run it again.
    """

    attack: str
    target: str
    steps: list[int]
    scores: dict[str, list[float]]
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    peak_memory: int = 0
    config: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        last = max([*self.steps[-1:], len(self.losses)])
        scores = ", ".join(self.scores) or "no score"
        return f"AttackCurve({self.attack!r} on {self.target!r}, {last} steps, {scores})"

    def score(self, name: str) -> list[float]:
        """Values of one score.

        Raises:
            ValueError: If there is no such score.
        """
        if name not in self.scores:
            raise ValueError(
                f"AttackCurve.score: name must be one of {sorted(self.scores)}, got {name!r}"
            )
        return self.scores[name]

    def steps_to(self, name: str, threshold: float, *, below: bool = False) -> int | None:
        """First judged step at which a score is at least (``below``: at most) a threshold.

        Example:
            >>> curve = AttackCurve("lora", "three", [0, 10], {"accuracy": [0.1, 0.9]})
            >>> curve.steps_to("accuracy", 0.8), curve.steps_to("accuracy", 0.05, below=True)
            (10, None)
        """
        for step, value in zip(self.steps, self.score(name), strict=True):
            if (value <= threshold) if below else (value >= threshold):
                return step
        return None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can say it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AttackCurve:
        """Take back what :meth:`to_dict` gave.

        Raises:
            ValueError: If a field is missing, unknown or does not fit the others.

        Example:
            >>> curve = AttackCurve("lora", "three", [0, 1], {"accuracy": [0.0, 0.5]}, [0.9])
            >>> AttackCurve.from_dict(curve.to_dict()) == curve
            True
        """
        try:
            curve = cls(**values)
        except TypeError as error:
            raise ValueError(
                f"AttackCurve.from_dict: values must hold the fields of a curve: {error}"
            ) from None
        for name, scores in curve.scores.items():
            if len(scores) != len(curve.steps):
                raise ValueError(
                    f"AttackCurve.from_dict: {name} must have one value for each of "
                    f"{len(curve.steps)} steps, got {len(scores)}"
                )
        return curve
