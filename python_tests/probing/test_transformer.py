"""Immunizers in scikit-learn's clothes."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn")

from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from immunize_ext.probing import METHODS, Problem, Task
from immunize_ext.probing.transformer import ImmunizedFeatures

RNG = np.random.default_rng(0)
X, Z = RNG.normal(size=(60, 4)), RNG.normal(size=(50, 4)) * [1.0, 2.0, 3.0, 4.0]
Y, W = X @ [1.0, 2.0, 0.0, 1.0], Z[:, 3]


def transformer(**settings: Any) -> ImmunizedFeatures:
    return ImmunizedFeatures(harmful=(Z, W), method="closed-form", settings=settings or None)


def test_it_is_the_method() -> None:
    found = transformer(strength=10.0).fit(X, Y)
    tasks = [Task.of((x, y, x, y)) for x, y in ((X, Y), (Z, W))]
    expected = METHODS.build("closed-form", {"strength": 10.0}, "test").fit(
        None, Problem.of(*tasks)
    )
    np.testing.assert_array_equal(found.immunized_.theta.numpy(), expected.theta.numpy())
    np.testing.assert_allclose(found.transform(X), X @ expected.theta.numpy())
    assert found.n_features_in_ == 4
    assert list(found.get_feature_names_out()) == [f"immunizedfeatures{i}" for i in range(4)]


def test_it_is_copied_kept_and_used_as_estimators_are() -> None:
    made = transformer(strength=10.0)
    copied = clone(made)
    assert copied.get_params()["settings"] == {"strength": 10.0}
    fitted = copied.fit(X, Y)
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.transform(X), fitted.transform(X))
    line = make_pipeline(made, Ridge(1e-9))
    assert line.fit(X, Y).score(X, Y) > 0.999
    strengths = [{"strength": 1.0}, {"strength": 100.0}]
    search = GridSearchCV(line, {"immunizedfeatures__settings": strengths}, cv=2).fit(X, Y)
    assert search.best_params_["immunizedfeatures__settings"] in strengths


@pytest.mark.parametrize(
    ("made", "x", "words"),
    [
        (ImmunizedFeatures(), X, r"harmful must be \(x, y\) .* got none"),
        (ImmunizedFeatures((Z, W, W)), X, "got 3 parts"),  # type: ignore[arg-type]
        (ImmunizedFeatures((Z, W), method="whitning"), X, "did you mean whitening"),
        (ImmunizedFeatures((Z, W), settings={"strenght": 3}), X, "did you mean strength"),
        (transformer(), X[:, :3], "features"),
    ],
)
def test_mistakes_are_told(made: ImmunizedFeatures, x: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        made.fit(x, Y)


def test_before_and_beside_fit() -> None:
    with pytest.raises(NotFittedError):
        transformer().transform(X)
    with pytest.raises(ValueError, match="must have 4 features as in fit, got 3"):
        transformer().fit(X, Y).transform(X[:, :3])
