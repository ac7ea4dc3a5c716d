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
            Steps that stand before this one in a pipeline do not see it; where there are any, mark
            the rows instead (:meth:`fit`).
        method: Name of a method (:data:`immunize_ext.probing.METHODS`).
        settings: Settings of the method by name.

    Attributes:
        immunized_: What the method gave, with theta, settings and history.
        n_features_in_: Number p of features.
        feature_names_in_: Their names, where the inputs had some.

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

    def fit(
        self, X: ArrayLike, y: ArrayLike, harmful_rows: ArrayLike | None = None
    ) -> ImmunizedFeatures:
        """Immunize against the harmful task.

        Args:
            X: Inputs of the task to keep, shape ``(n, p)``.
            y: Their targets, shape ``(n,)``: numbers, or names or whole numbers of classes; 0 and 1
                are classes in any dtype.
            harmful_rows: Which of these samples are those of the harmful task, boolean ``(n,)``, in
                place of ``harmful``; the others are to be kept. By scikit-learn's metadata routing
                a pipeline hands it on, and a search splits it like y:
                ``set_fit_request(harmful_rows=True)``.

        Returns:
            Itself.

        Raises:
            ValueError: If there is no harmful task or two, shapes do not fit, or a name or a
                setting is unknown.

        Example:
            >>> rng = np.random.default_rng(0)
            >>> x = rng.normal(size=(80, 3))
            >>> x[40:] *= [1.0, 2.0, 3.0]
            >>> features = ImmunizedFeatures(method="whitening")
            >>> features.fit(x, x[:, 0], harmful_rows=np.arange(80) >= 40).transform(x).shape
            (80, 3)
        """
        method = METHODS.build(self.method, dict(self.settings or {}), "ImmunizedFeatures")
        labels = None if y is None else label_array(y)
        x, y = _validation.validate_data(
            self, X, labels, ensure_min_samples=2, **_as_targets(labels)
        )
        primary, harmful = self._tasks(x, y, harmful_rows)
        tasks = _whole("to keep", *primary), _whole("to make hard", *harmful)
        self.immunized_ = method.fit(None, Problem.of(*tasks))
        self._n_features_out = self.immunized_.theta.shape[1]
        return self

    def _tasks(self, x: Any, y: Any, rows: ArrayLike | None) -> tuple[Any, Any]:
        """Samples of the task to keep and of the harmful one."""
        if rows is None:
            if self.harmful is None or len(self.harmful) != 2:
                raise ValueError(
                    "ImmunizedFeatures: harmful must be (x, y) of the task to make hard, got "
                    f"{'none' if self.harmful is None else f'{len(self.harmful)} parts'}; or mark "
                    "its samples with harmful_rows"
                )
            z, labels = self.harmful[0], label_array(self.harmful[1])
            return (x, y), _validation.check_X_y(z, labels, **_as_targets(labels))
        chosen = np.asarray(rows)
        if self.harmful is not None:
            raise ValueError(
                "ImmunizedFeatures: harmful must be None beside harmful_rows, got both"
            )
        if chosen.dtype != np.bool_ or chosen.shape != (len(x),) or len({*chosen.tolist()}) < 2:
            raise ValueError(
                f"ImmunizedFeatures: harmful_rows must be {len(x)} booleans, of both kinds, got "
                f"{chosen.dtype} of shape {chosen.shape}"
            )
        return (x[~chosen], y[~chosen]), (x[chosen], y[chosen])

    def transform(self, X: ArrayLike) -> NDArray[np.float64]:
        """Features of inputs.

        Args:
            X: Shape ``(n, p)``.

        Returns:
            ``X @ theta``, shape ``(n, q)``; q = p but for methods that take directions away.

        Raises:
            ValueError: If the number or the names of features are others than were fitted.
            sklearn.exceptions.NotFittedError: Before :meth:`fit`.
        """
        _validation.check_is_fitted(self, "immunized_")
        x = _validation.validate_data(self, X, dtype=np.float64, reset=False)
        found: NDArray[np.float64] = x @ self.immunized_.theta.cpu().numpy()
        return found

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags


def _as_targets(labels: NDArray[Any] | None) -> dict[str, Any]:
    """What scikit-learn is to make of inputs and targets; names of classes are no numbers."""
    texts = labels is not None and labels.dtype.kind in "US"
    return {"dtype": np.float64, "y_numeric": not texts}


def _whole(name: str, x: Any, y: Any) -> Task:
    """A task whose samples are all to train on; who fits a transformer tests elsewhere."""
    if y.dtype.kind in "bf" and np.isin(y, (0, 1)).all():
        y = y.astype(np.int64)
    inputs, targets = (np.ascontiguousarray(part) for part in (x, y))
    return Task.of((inputs, targets, inputs, targets), name)
