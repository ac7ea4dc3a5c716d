"""A judge of generated digits: a classifier that has seen none of the images anyone else uses."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from immunize_ext._extras import require_extra
from immunize_ext.text_to_image.digits.images import digit_images

_FOLDS = 5


class DigitJudge:
    """Says which digit an 8 x 8 image shows: a support vector machine on the ``judge`` images.

    It is fitted when it is made (milliseconds), so nothing has to be stored or trusted.

    Attributes:
        accuracy: Share of its own images that it gets right when they are left out of the fit, by
            5-fold cross-validation.

    Raises:
        MissingExtraError: If scikit-learn is not installed.

    Note:
        Deterministic.

    Example:
        >>> judge = DigitJudge()
        >>> images, _ = digit_images("attack", 4)
        >>> judge.score((images + 1) / 2, 4) > 0.9
        True
    """

    def __init__(self) -> None:
        self._svm = require_extra("sklearn.svm", extra="data", purpose="the judge of digits")
        images, labels = digit_images("judge")
        self._features = ((images + 1.0) / 2.0).flatten(1).numpy()
        self._labels: NDArray[np.int64] = labels.numpy()
        self._classifier = self._new().fit(self._features, self._labels)

    def _new(self):  # type: ignore[no-untyped-def]
        return self._svm.SVC(kernel="rbf", C=10.0, gamma=0.15)

    @cached_property
    def accuracy(self) -> float:
        """Cross-validated accuracy on real images."""
        # Every fifth image of each digit is left out in turn; the images stand in digits' order.
        fold = np.arange(len(self._labels)) % _FOLDS
        right = 0
        for left_out in range(_FOLDS):
            inside = fold != left_out
            fitted = self._new().fit(self._features[inside], self._labels[inside])
            right += int((fitted.predict(self._features[~inside]) == self._labels[~inside]).sum())
        return right / len(self._labels)

    def predict(self, images: Tensor) -> NDArray[np.int64]:
        """Digits that images show.

        Args:
            images: Shape ``(n, 1, 8, 8)``, in [0, 1] as pipelines return them.

        Returns:
            The digits, shape ``(n,)``.

        Raises:
            ValueError: If the shape or the range is another, or a pixel is not finite.
        """
        if images.ndim != 4 or tuple(images.shape[1:]) != (1, 8, 8):
            raise ValueError(
                f"DigitJudge.predict: images must have shape (n, 1, 8, 8), got "
                f"{tuple(images.shape)}"
            )
        if not len(images):
            return np.zeros(0, dtype=np.int64)
        pixels = images.detach().cpu().double()
        if not bool(pixels.isfinite().all()):
            raise ValueError("DigitJudge.predict: images must be finite, got NaN or infinity")
        low, high = float(pixels.min()), float(pixels.max())
        if low < -1e-3 or high > 1.0 + 1e-3:
            raise ValueError(
                f"DigitJudge.predict: images must lie in [0, 1], got [{low:.4g}, {high:.4g}]; map "
                "images in [-1, 1] with (x + 1) / 2"
            )
        found: NDArray[np.int64] = self._classifier.predict(pixels.flatten(1).numpy())
        return found

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
