"""Immunizers in scikit-learn's clothes."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn")

from sklearn import config_context
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

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
    with pytest.raises(ValueError, match="X has 3 features, but ImmunizedFeatures is expecting 4"):
        transformer().fit(X, Y).transform(X[:, :3])


class Alternating(ImmunizedFeatures):
    """Every second sample is harmful: what scikit-learn's checks call has no harmful task."""

    def fit(self, X: Any, y: Any) -> Any:  # type: ignore[override]
        count = 0 if y is None else len(np.asarray(y))
        return super().fit(X, y, np.arange(count) % 2 == 1)


def test_scikit_learn_finds_nothing_amiss() -> None:
    check_estimator(Alternating(method="whitening"), on_skip=None)


def test_marked_rows_are_the_harmful_task() -> None:
    """Behind a scaler, which sees both tasks; one given by itself would not be scaled."""
    both, targets = np.vstack([X, Z]), np.concatenate([Y, W])
    rows = np.arange(110) >= 60
    scaled = StandardScaler().fit_transform(both)
    truth = ImmunizedFeatures((scaled[60:], W), settings={"strength": 10.0}).fit(scaled[:60], Y)
    with config_context(enable_metadata_routing=True):
        step = ImmunizedFeatures(settings={"strength": 10.0}).set_fit_request(harmful_rows=True)
        line = make_pipeline(StandardScaler(), step).fit(both, targets, harmful_rows=rows)
    np.testing.assert_allclose(line.transform(both), truth.transform(scaled), rtol=1e-12)


def test_classes_0_and_1_are_minus_and_plus_1() -> None:
    found = [transformer().fit(X, labels).transform(X) for labels in (Y > 0, 2.0 * (Y > 0) - 1.0)]
    np.testing.assert_array_equal(*found)


def test_columns_that_are_taken_away_are_counted() -> None:
    made = ImmunizedFeatures((Z, W), method="pencil-lock").fit(X, Y)
    assert made.transform(X).shape[1] == len(made.get_feature_names_out()) < 4


@pytest.mark.parametrize(
    ("made", "rows", "words"),
    [
        (transformer(), np.arange(60) > 3, "must be None beside harmful_rows, got both"),
        (ImmunizedFeatures(), np.arange(60), r"must be 60 booleans, .* got int64"),
        (ImmunizedFeatures(), np.zeros(60, bool), "must be 60 booleans, of both kinds"),
        (ImmunizedFeatures(), np.arange(50) > 3, r"got bool of shape \(50,\)"),
    ],
)
def test_rows_that_mark_nothing(made: ImmunizedFeatures, rows: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        made.fit(X, Y, harmful_rows=rows)
