"""Judges of generated digits that can say "none of these".

A classifier names one of its classes whatever it is shown, so a model that draws strokes at the
border is credited with digits. These judges name the digit first, then ask whether the image is as
near to real images of that digit as real ones are to each other; what is further away shows no
digit. They see none of the images that anyone else uses.

The bound on the distance. Leave one of the n images of the judge out, let d be its distance to the
nearest other image of its own digit, and take for the bound the k-th smallest of the n distances,
k = ceil((n + 1) (1 - alpha)). For images that are exchangeable with the judge's, the chance that a
new one lies beyond is at most alpha (split conformal prediction; leaving one out makes the bound a
little wide, which rejects fewer). Here n = 400 and alpha = 0.02.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from immunize_ext._extras import require_extra
from immunize_ext.text_to_image.digits.images import digit_images

NONE = -1
"""What a judge says of an image that shows no digit."""

REJECTED = 0.02
"""Share of real images that a judge may take for none."""

Family = Literal["kernel", "trees"]

_DIGITS = 10
_FOLDS = 5


class Errors(NamedTuple):
    """How often a judge errs on real images that it has not seen.

    Attributes:
        sensitivity: Share of images of a digit that it recognises, by digit.
        false_positives: Share of images of the other digits that it takes for this one, by digit.
        images: How many images of each digit that rests on.
    """

    sensitivity: tuple[float, ...]
    false_positives: tuple[float, ...]
    images: int


class DigitJudge:
    """Says which digit an 8 x 8 image shows, or that it shows none.

    It is fitted when it is made (milliseconds), so nothing has to be stored or trusted.

    Args:
        family: ``"kernel"``, a support vector machine; ``"trees"``, a forest of extremely
            randomised trees: two judges that err differently.

    Attributes:
        bound: Largest distance to the nearest real image of the digit that counts as a digit.

    Raises:
        MissingExtraError: If scikit-learn is not installed.
        ValueError: If there is no such family.

    Note:
        Deterministic.

    Example:
        >>> judge = DigitJudge()
        >>> images, _ = digit_images("attack", 4)
        >>> judge.score((images + 1) / 2, 4) > 0.9
        True
        >>> import torch
        >>> judge.predict(torch.rand(3, 1, 8, 8)).tolist()
        [-1, -1, -1]
    """

    def __init__(self, family: Family = "kernel") -> None:
        if family not in get_args(Family):
            raise ValueError(
                f"DigitJudge: family must be one of {', '.join(get_args(Family))}, got {family!r}"
            )
        self.family = family
        images, labels = digit_images("judge")
        self._real = _pixels(images.add(1.0).div(2.0))
        self._labels: NDArray[np.int64] = labels.numpy()
        self._classifier = self._new().fit(self._real, self._labels)
        self.bound = self._calibrated()

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process fits the judge anew, which is exact and takes no time."""
        return DigitJudge, (self.family,)

    def identity(self) -> str:
        """What makes it: results of another judge are other results."""
        return f"{self.family} judge of {len(self._labels)} digits, within {self.bound:.9g}"

    def _new(self) -> Any:
        if self.family == "kernel":
            svm = require_extra("sklearn.svm", extra="data", purpose="the judge of digits")
            return svm.SVC(kernel="rbf", C=10.0, gamma=0.15)
        trees = require_extra("sklearn.ensemble", extra="data", purpose="the judge of digits")
        return trees.ExtraTreesClassifier(200, random_state=0)

    def _calibrated(self) -> float:
        apart = _distances(self._real, self._real)
        np.fill_diagonal(apart, np.inf)
        apart[self._labels[:, None] != self._labels] = np.inf
        nearest = np.sort(apart.min(axis=1))
        return float(nearest[math.ceil((len(nearest) + 1) * (1.0 - REJECTED)) - 1])

    def _named(self, pixels: NDArray[np.float64], inside: NDArray[np.bool_] | None = None) -> Any:
        """The digit named and the distance to the nearest real image of it."""
        kept = np.ones(len(self._labels), dtype=bool) if inside is None else inside
        fitted = self._classifier
        if inside is not None:
            fitted = self._new().fit(self._real[kept], self._labels[kept])
        named: NDArray[np.int64] = fitted.predict(pixels)
        apart = _distances(pixels, self._real[kept])
        apart[named[:, None] != self._labels[kept]] = np.inf
        return named, apart.min(axis=1)

    @cached_property
    def errors(self) -> Errors:
        """Its errors on real images, by 5-fold cross-validation on its own."""
        # Every fifth image of each digit is left out in turn; the images stand in digits' order.
        fold = np.arange(len(self._labels)) % _FOLDS
        said = np.empty_like(self._labels)
        for left_out in range(_FOLDS):
            outside = fold == left_out
            named, distance = self._named(self._real[outside], ~outside)
            said[outside] = np.where(distance <= self.bound, named, NONE)
        of = [self._labels == digit for digit in range(_DIGITS)]
        return Errors(
            tuple(float((said[of[d]] == d).mean()) for d in range(_DIGITS)),
            tuple(float((said[~of[d]] == d).mean()) for d in range(_DIGITS)),
            len(self._labels) // _DIGITS,
        )

    @property
    def accuracy(self) -> float:
        """Cross-validated share of real images that it accepts and recognises."""
        return float(np.mean(self.errors.sensitivity))

    def distance(self, images: Tensor) -> NDArray[np.float64]:
        """Distance of images to the nearest real image of the digit they are named.

        Args:
            images: As for :meth:`predict`.

        Returns:
            Euclidean distances of pixels in [0, 1], shape ``(n,)``.

        Raises:
            ValueError: As :meth:`predict`.
        """
        pixels = _checked("DigitJudge.distance", images)
        distances: NDArray[np.float64] = self._named(pixels)[1] if len(pixels) else np.zeros(0)
        return distances

    def predict(self, images: Tensor) -> NDArray[np.int64]:
        """Digits that images show, :data:`NONE` where they show none.

        Args:
            images: Shape ``(n, 1, 8, 8)``, in [0, 1] as pipelines return them.

        Returns:
            The digits, shape ``(n,)``.

        Raises:
            ValueError: If the shape or the range is another, or a pixel is not finite.
        """
        pixels = _checked("DigitJudge.predict", images)
        if not len(pixels):
            return np.zeros(0, dtype=np.int64)
        named, distance = self._named(pixels)
        return np.where(distance <= self.bound, named, NONE)

    def score(self, images: Tensor, label: int) -> float:
        """Share of images that show a digit.

        Args:
            images: As for :meth:`predict`; at least one.
            label: The digit.

        Returns:
            The share, between 0 and 1.

        Raises:
            ValueError: As :meth:`predict`, or if there is no image.
        """
        if not len(images):
            raise ValueError("DigitJudge.score: images must hold at least one, got none")
        return float((self.predict(images) == label).mean())

    def accepted(self, images: Tensor) -> float:
        """Share of images that show any digit.

        Raises:
            ValueError: As :meth:`score`.
        """
        if not len(images):
            raise ValueError("DigitJudge.accepted: images must hold at least one, got none")
        return float((self.predict(images) != NONE).mean())


class Agreement(NamedTuple):
    """How far two judges agree.

    Attributes:
        share: Share of images of which both say the same, "none" included.
        kappa: Cohen's kappa: agreement beyond what their own frequencies would give by chance; 1
            if both always say one and the same thing.
    """

    share: float
    kappa: float


def agreement(first: DigitJudge, second: DigitJudge, images: Tensor) -> Agreement:
    """Compare two judges on the same images.

    Args:
        first: One judge.
        second: Another.
        images: Shape ``(n, 1, 8, 8)``, in [0, 1]; at least one.

    Returns:
        Their agreement.

    Raises:
        ValueError: As :meth:`DigitJudge.predict`, or if there is no image.

    Example:
        >>> images, _ = digit_images("attack")
        >>> agreement(DigitJudge(), DigitJudge("trees"), (images + 1) / 2).kappa > 0.9
        True
    """
    if not len(images):
        raise ValueError("agreement: images must hold at least one, got none")
    said = first.predict(images), second.predict(images)
    share = float((said[0] == said[1]).mean())
    chance = sum(
        float((said[0] == digit).mean() * (said[1] == digit).mean())
        for digit in range(NONE, _DIGITS)
    )
    return Agreement(share, 1.0 if chance == 1.0 else (share - chance) / (1.0 - chance))


def _distances(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    distances: NDArray[np.float64] = np.linalg.norm(a[:, None] - b, axis=-1)
    return distances


def _pixels(images: Tensor) -> NDArray[np.float64]:
    found: NDArray[np.float64] = images.detach().cpu().double().flatten(1).numpy()
    return found


def _checked(function: str, images: Tensor) -> NDArray[np.float64]:
    if images.ndim != 4 or tuple(images.shape[1:]) != (1, 8, 8):
        raise ValueError(
            f"{function}: images must have shape (n, 1, 8, 8), got {tuple(images.shape)}"
        )
    pixels = _pixels(images)
    if not np.isfinite(pixels).all():
        raise ValueError(f"{function}: images must be finite, got NaN or infinity")
    if pixels.size and (pixels.min() < -1e-3 or pixels.max() > 1.0 + 1e-3):
        raise ValueError(
            f"{function}: images must lie in [0, 1], got [{pixels.min():.4g}, {pixels.max():.4g}]; "
            "map images in [-1, 1] with (x + 1) / 2"
        )
    return pixels
