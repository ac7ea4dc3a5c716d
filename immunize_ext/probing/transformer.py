"""Linear immunizers as scikit-learn has it: ``fit`` and ``transform``, in pipelines and searches.

    from immunize_ext.probing.transformer import ImmunizedFeatures
    features = ImmunizedFeatures(harmful=(x_harmful, y_harmful)).fit(x, y)
    features.transform(x)

Needs scikit-learn (extra ``data``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from immunize_ext._extras import require_extra
from immunize_ext.probing.data import Problem, Task
from immunize_ext.probing.data.classes import label_array
from immunize_ext.probing.immunizers import METHODS, MethodName

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_base: Any = require_extra("sklearn.base", extra="data", purpose="ImmunizedFeatures")
_validation: Any = require_extra(
    "sklearn.utils.validation", extra="data", purpose="ImmunizedFeatures"
)


class ImmunizedFeatures(
    _base.ClassNamePrefixFeaturesOutMixin, _base.TransformerMixin, _base.BaseEstimator
):
    """Features ``x @ theta``, slow to learn the harmful task from and as good for the one to keep.

    Args:
        harmful: The task to make hard: ``(x, y)``, the features those of the inputs to be fitted.
        method: Name of a method (:data:`immunize_ext.probing.METHODS`).
        settings: Settings of the method by name.

    Attributes:
        immunized_: What the method gave, with theta, settings and history.
        n_features_in_: Number p of features.

    Note:
        Deterministic; computed in float64 on the CPU.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x, z = rng.normal(size=(40, 3)), rng.normal(size=(40, 3)) * [1.0, 2.0, 3.0]
        >>> features = ImmunizedFeatures(harmful=(z, z[:, 0]), method="whitening")
        >>> features.fit_transform(x, x[:, 0]).shape
        (40, 3)
    """

    def __init__(
        self,
        harmful: tuple[ArrayLike, ArrayLike] | None = None,
        *,
        method: MethodName | str = "closed-form",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        # scikit-learn copies an estimator by its arguments: nothing is checked or changed here.
        self.harmful = harmful
        self.method = method
        self.settings = settings

    def fit(self, X: ArrayLike, y: ArrayLike) -> ImmunizedFeatures:
        """Immunize against the harmful task.

        Args:
            X: Inputs of the task to keep, shape ``(n, p)``.
            y: Their targets, shape ``(n,)``: numbers, or names or whole numbers of classes.

        Returns:
            Itself.

        Raises:
            ValueError: If there is no harmful task, shapes do not fit, or a name or a setting is
                unknown.
        """
        if self.harmful is None or len(self.harmful) != 2:
            raise ValueError(
                "ImmunizedFeatures: harmful must be (x, y) of the task to make hard, got "
                f"{'none' if self.harmful is None else f'{len(self.harmful)} parts'}"
            )
        method = METHODS.build(self.method, dict(self.settings or {}), "ImmunizedFeatures")
        primary, harm = _whole("to keep", X, y), _whole("to make hard", *self.harmful)
        self.immunized_ = method.fit(None, Problem.of(primary, harm))
        self.n_features_in_ = self._n_features_out = primary.num_features
        return self

    def transform(self, X: ArrayLike) -> NDArray[np.float64]:
        """Features of inputs.

        Args:
            X: Shape ``(n, p)``.

        Returns:
            ``X @ theta``, shape ``(n, p)``.

        Raises:
            ValueError: If the number of features is another one than was fitted.
            sklearn.exceptions.NotFittedError: Before :meth:`fit`.
        """
        _validation.check_is_fitted(self, "immunized_")
        x = _validation.check_array(X, dtype=np.float64)
        if x.shape[1] != self.n_features_in_:
            raise ValueError(
                f"ImmunizedFeatures: X must have {self.n_features_in_} features as in fit, got "
                f"{x.shape[1]}"
            )
        found: NDArray[np.float64] = x @ self.immunized_.theta.cpu().numpy()
        return found


def _whole(name: str, x: ArrayLike, y: ArrayLike) -> Task:
    """A task whose samples are all to train on; who fits a transformer tests elsewhere."""
    y = label_array(y)
    checked = _validation.check_X_y(x, y, dtype=np.float64, y_numeric=y.dtype.kind not in "US")
    inputs, targets = (np.ascontiguousarray(part) for part in checked)
    return Task.of((inputs, targets, inputs, targets), name)
