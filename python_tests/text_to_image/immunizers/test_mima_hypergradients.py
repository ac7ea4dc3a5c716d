"""Hypergradients inside the loop: what is recorded, what is warned of, what stops a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attack_pipelines import tiny_pipeline
from immunizer_settings import SMALL, concepts

from immunize_ext.bilevel import GaussNewton, Hessian, Hypergradient, dot
from immunize_ext.errors import NegativeCurvatureError
from immunize_ext.text_to_image.immunizers import MIMA, DiffusionIMMA, ImmunizationError
from immunize_ext.text_to_image.immunizers.bilevel import denoising_loss
from immunize_ext.text_to_image.immunizers.loop import Run
from immunize_ext.text_to_image.model import TextToImage

pytest.importorskip("accelerate")


def model() -> TextToImage:
    return TextToImage(tiny_pipeline())


def test_steps_record_what_their_hypergradient_did() -> None:
    settings = {"inner_steps": 3, "probe_every": 5}
    exact = MIMA(**SMALL | settings, hypergradient="unrolled").fit(model(), concepts())
    last = MIMA(
        **SMALL | settings, hypergradient="truncated", hypergradient_steps=1, inner_optimizer="adam"
    ).fit(model(), concepts())
    first = MIMA(**SMALL | settings).fit(model(), concepts())
    for record in exact.history:
        assert record["products"] == 6.0  # two concepts, three steps
        assert 0.0 < record["hypergradient_seconds"] < record["seconds"]
        assert record["contraction"] > 0.0
        assert record["residual"] == 0.0
    assert {record["products"] for record in last.history} == {2.0}
    assert all("products" not in record for record in first.history)
    # The forward pass is the same.
    assert exact.history[0]["loss"] == pytest.approx(first.history[0]["loss"], rel=1e-5)
    assert exact.history[0]["gradient_norm"] != first.history[0]["gradient_norm"]


@pytest.mark.parametrize("solver", ["neumann", "cg"])
def test_implicit_hypergradients_in_the_loop(solver: Any) -> None:
    method = MIMA(**SMALL, hypergradient="implicit", curvature="gauss_newton", solver=solver)
    record = method.fit(model(), concepts()).history[0]
    assert 1.0 <= record["products"] <= 6.0
    assert record["residual"] < 1.0
    # I + gamma G is at least I: nothing grows on the way through its inverse.
    assert solver == "neumann" or record["contraction"] <= 1.0 + 1e-5


def test_a_denoising_loss_shows_its_prediction() -> None:
    run = Run(MIMA(**SMALL, hypergradient="unrolled"), model(), concepts(), None, None)
    batch = run.draw(0, 0)[0]
    loss = denoising_loss(run, batch)
    theta = {name: p.detach().clone() for name, p in run.moved.items()}
    assert torch.equal(loss(theta), batch.losses(run.model, theta).mean())
    generator = torch.Generator().manual_seed(0)
    way = {n: torch.randn(p.shape, generator=generator) for n, p in theta.items()}
    # d^T G d = |J d|^2 / n, by a difference of predictions.
    h = 1e-3
    ahead, behind = (
        loss.outputs({n: p + s * h * way[n] for n, p in theta.items()}) for s in (1.0, -1.0)
    )
    right = 2.0 * ((ahead - behind) / (2 * h)).square().mean()
    assert dot(way, GaussNewton(loss, theta)(way).moved) == pytest.approx(float(right), rel=1e-2)
    assert dot(way, Hessian(loss, theta)(way).moved) != pytest.approx(float(right), rel=1e-2)


def test_the_first_order_condition_is_reported_at_probes_one_and_four() -> None:
    small = SMALL | {"steps": 5, "probe_every": 1, "inner_rate": 1e-3}
    quiet = MIMA(**small).fit(model(), concepts())
    at = [record["step"] for record in quiet.history if "alpha_j" in record]
    assert at == [1.0, 4.0]
    assert not any("alpha |J|" in text for text in quiet.warnings)
    (found,) = [r["alpha_j"] for r in quiet.history if r["step"] == 1.0]
    # One step: alpha |J| is alpha times a property of the point.
    faster = MIMA(**small | {"steps": 1, "inner_rate": 2e-3}).fit(model(), concepts())
    assert faster.history[0]["alpha_j"] == pytest.approx(2.0 * found, rel=0.2)


@pytest.mark.parametrize(
    ("chosen", "names", "warned"),
    [
        (MIMA(**SMALL | {"inner_rate": 1e3}), ("three", "five"), True),
        (MIMA(**SMALL | {"inner_rate": 1e3}, merge="own_copies"), ("three", "five"), True),
        (DiffusionIMMA(**SMALL | {"inner_rate": 1e3}), ("three",), True),
        (MIMA(**SMALL, variant="alternating"), ("three", "five"), False),
    ],
    ids=["mima", "copies", "imma", "alternating"],
)
def test_above_one_a_run_says_so(chosen: Any, names: tuple[str, ...], warned: bool) -> None:
    immunized = chosen.fit(model(), concepts(*names))
    assert any("alpha |J| is at least" in text for text in immunized.warnings) is warned
    assert ("alpha_j" in immunized.history[-1]) is warned


def test_exact_hypergradients_need_no_condition() -> None:
    method = MIMA(**SMALL, hypergradient="unrolled")
    history = [{"step": 1.0, "alpha_j": 7.0}]
    assert method.remarks(history) == []
    (remark,) = MIMA(**SMALL).remarks(history)
    assert "at least 7 at step 1" in remark
    assert "lower inner_rate" in remark


def test_negative_curvature_stops_a_run_by_name() -> None:
    method = MIMA(**SMALL | {"inner_rate": 1e4}, hypergradient="implicit", hypergradient_steps=30)
    with pytest.raises(ImmunizationError, match=r"I \+ gamma A must be positive") as found:
        method.fit(model(), concepts())
    assert isinstance(found.value.__cause__, NegativeCurvatureError)
    assert "\n" not in str(found.value)


def test_secant_needs_no_plain_attention() -> None:
    assert not MIMA(**SMALL, hypergradient="unrolled", curvature="secant").double_backward()
    assert MIMA(**SMALL, hypergradient="unrolled").double_backward()
    assert Hypergradient().differentiates_twice is False
