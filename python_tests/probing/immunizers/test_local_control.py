"""What is promised of the task to keep holds: for every change allowed, and for those that came."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from immunizer_problems import task
from torch import Tensor, nn

from immunize_ext.ops import InputSubspace, clip_spectral_norm, project_out
from immunize_ext.probing.data import Problem, Task
from immunize_ext.probing.data.samples import Samples
from immunize_ext.probing.immunizers import (
    METHODS,
    DeepExtractorImmunizer,
    LocalControl,
    LocalControlImmunizer,
    rank_layers,
)
from immunize_ext.probing.immunizers.guard import Ball, Ellipsoid, _Moments
from immunize_ext.probing.metrics import Allowed, certified_answers, drift_bound

D = 6


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def net(seed: int, width: int = 40, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    body = nn.Sequential(
        nn.Linear(D, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4)
    ).to(dtype)
    with torch.no_grad():
        for i, parameter in enumerate(body.parameters()):
            parameter.copy_(draw(seed + i, *parameter.shape) / math.sqrt(parameter.shape[-1]))
    return body


def data(seed: int, n: int = 24, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = draw(seed, n, D).to(dtype)
    return x, (x[:, 0] > 0).long()


def trained(body: nn.Module, x: Tensor, y: Tensor) -> nn.Linear:
    """A head that answers the training samples, by least squares."""
    with torch.no_grad():
        features = torch.cat([body(x), torch.ones(len(x), 1, dtype=x.dtype)], 1)
        found = torch.linalg.lstsq(features, nn.functional.one_hot(y).to(x.dtype) * 2 - 1).solution
        head = nn.Linear(4, 2, dtype=x.dtype)
        head.weight.copy_(found[:-1].mT)
        head.bias.copy_(found[-1])
    return head


def run(local: LocalControl | None, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    (x, y), harmful = data(0, dtype=dtype), data(1, dtype=dtype)
    body = net(3, dtype=dtype)
    head = trained(body, x, y)
    method = DeepExtractorImmunizer(
        ("0", "2", "4"),
        objective="kappa_log_ratio",
        steps=12,
        batch_size=24,
        learning_rate=0.05,
        local=local,
        **settings,
    )
    return body, head, (x, y), method.fit(body, Problem.of((x, y), harmful, head=head))


# --- the bound ------------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.floats(0.3, 1.0), st.floats(0.001, 0.5), st.booleans())
def test_no_allowed_change_of_a_network_moves_features_further(
    seed: int, explained: float, limit: float, adversarial: bool
) -> None:
    body, (x, _), (unseen, _) = net(seed, 7), data(seed + 50), data(seed + 60)
    everything = torch.cat([x, 10.0 * unseen])
    changed, allowed, rows = copy.deepcopy(body), {}, x
    for name, layer in body.named_children():
        if isinstance(layer, nn.Linear):
            subspace = InputSubspace.of(rows.detach(), explained=explained)
            allowed[name] = Allowed(subspace, limit)
            o, d = layer.weight.shape
            delta = project_out(10.0 * draw(seed + 70 + o, o, d).double(), subspace.basis)
            if adversarial and len(subspace.tail):
                # Towards one sample, along the direction that the layer itself stretches most.
                reached = project_out(rows[0].detach(), subspace.basis)
                delta = torch.outer(torch.linalg.svd(layer.weight.detach()).U[:, 0], reached) * 1e3
            with torch.no_grad():
                changed.get_submodule(name).weight += clip_spectral_norm(delta, limit)
        rows = layer(rows)
    with torch.no_grad():
        moved = (changed(everything) - body(everything)).norm(dim=1)
    bound = drift_bound(body, allowed, everything)
    assert bool((moved <= bound + 1e-12 * body(everything).norm(dim=1)).all())


def test_bound_is_tight_for_one_layer() -> None:
    layer = nn.Sequential(nn.Linear(3, 2)).double()
    subspace = InputSubspace.of(torch.tensor([[1.0, 0.0, 0.0]]))
    x = torch.tensor([[7.0, 3.0, 4.0]], dtype=torch.float64)
    changed = copy.deepcopy(layer)
    with torch.no_grad():
        changed[0].weight += torch.tensor([[0.0, 0.06, 0.08], [0.0, 0.0, 0.0]])
    moved = float((changed(x) - layer(x)).norm().detach())
    assert (
        moved == pytest.approx(0.5) == float(drift_bound(layer, {"0": Allowed(subspace, 0.1)}, x))
    )


@given(st.integers(0, 2**31))
def test_certified_answers_stay_whatever_moves_within_the_bound(seed: int) -> None:
    features, weight = draw(seed, 30, 4).double(), draw(seed + 1, 3, 4).double()
    logits, bound = features @ weight.mT, draw(seed + 2, 30).double().abs()
    labels = draw(seed + 3, 30, 3).argmax(1)
    sure = certified_answers(logits, weight, labels, bound)
    assert not bool((sure & (logits.argmax(1) != labels)).any())
    for rival in range(3):  # the worst move: straight from the right answer to the rival
        toward = weight[rival] - weight[labels]
        toward = toward / toward.norm(dim=1, keepdim=True).clamp_min(1e-300)
        moved = (features + toward * bound[:, None] * (1 - 1e-9)) @ weight.mT
        assert bool((moved.argmax(1) == labels)[sure].all())


def test_models_without_a_known_constant_are_refused() -> None:
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"sequence of Linear and of .* got LayerNorm, whose"):
        drift_bound(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), {}, x)
    seen = InputSubspace.of(x)
    with pytest.raises(ValueError, match="allowed must name linear layers of the model, got 'x'"):
        drift_bound(nn.Sequential(nn.Linear(4, 4)), {"x": Allowed(seen, 1.0)}, x)


# --- deep extractors ------------------------------------------------------------------------------


def test_null_space_keeps_every_training_answer_exactly() -> None:
    body, head, (x, _), found = run(LocalControl())
    body.requires_grad_(False)
    after = found.extractor
    scale = body(x).norm()
    assert float((after(x) - body(x)).norm() / scale) < 1e-12
    moved = {n for n, p in after.named_parameters() if not torch.equal(p, body.get_parameter(n))}
    assert moved == {"2.weight", "4.weight"}  # the first layer sees all directions of its inputs
    first, last = found.history[0], found.history[-1]
    assert last["log_kappa_harmful"] > first["log_kappa_harmful"] + 0.1
    assert last["log_kappa_primary"] == pytest.approx(first["log_kappa_primary"], abs=1e-9)
    assert found.config["guard"]["layers"]["0"]["free"] == 0
    assert torch.equal(found.head.weight, head.weight)
    assert not any(layer["free"] == 40 for layer in found.config["guard"]["layers"].values())


def test_null_space_says_what_weak_directions_of_the_inputs_let_through() -> None:
    """A Gram matrix does not show what is below sqrt(d eps): such a direction counts as free."""
    (x, y), harmful = data(0), data(1)
    turn = torch.linalg.qr(draw(8, D, D).double()).Q
    x = x * torch.tensor([1.0] * 5 + [1e-9], dtype=torch.float64) @ turn
    body = net(3)
    method = DeepExtractorImmunizer(
        ("0",), objective="kappa_log_ratio", steps=5, learning_rate=1.0, local=LocalControl()
    )
    found = method.fit(body, Problem.of((x, y), harmful, head=trained(body, x, y)))
    size = found.config["guard"]["layers"]["0"]
    change = (found.extractor[0].weight - body[0].weight).detach()
    moved = float((x @ change.mT).square().sum(1).mean().sqrt())
    assert size["free"] == 1
    assert 1e-12 < moved <= size["drift"] < 1e-6 * size["norm"]


def test_drift_of_weak_directions_is_a_bound_where_their_eigenvalues_round_to_0() -> None:
    x, y = data(0)
    weak = x * torch.tensor([1.0] * 5 + [1e-9], dtype=torch.float64)
    body, device, zeros = net(3), torch.device("cpu"), 0
    for seed in range(20):
        rows = weak @ torch.linalg.qr(draw(seed, D, D).double()).Q
        moments = _Moments(body, nn.Identity(), ["0"], Samples((rows, y)), device, 24)
        subspace = moments.subspaces(1.0)["0"]
        zeros += InputSubspace.of(moments.inputs["0"].gram, count=24).tail.tolist() == [0.0]
        change = project_out(draw(seed + 1, 40, D).double(), subspace.basis)
        moved = float((rows @ change.mT).square().sum(1).mean().sqrt())
        assert 1e-12 < moved <= Ball(Allowed(subspace, math.inf)).size(change)["drift"]
    assert zeros > 0


def test_the_gradient_of_the_task_itself_has_nothing_outside_of_its_inputs() -> None:
    body, (x, y) = net(3), data(0)
    head = trained(body, x, y)
    nn.functional.cross_entropy(head(body(x)), y).backward()
    subspace = InputSubspace.of(body[:2](x).detach())
    gradient = body[2].weight.grad
    assert gradient is not None
    assert float(project_out(gradient, subspace.basis).norm() / gradient.norm()) < 1e-12


def test_null_space_in_float32_is_exact_to_its_rounding() -> None:
    body, _, (x, _), found = run(LocalControl(), torch.float32)
    with torch.no_grad():
        drift = (found.extractor(x) - body(x)).norm() / body(x).norm()
    assert float(drift) < 1e-5
    assert found.history[-1]["log_kappa_harmful"] > found.history[0]["log_kappa_harmful"]


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_what_was_certified_before_the_first_step_holds(share: float) -> None:
    body, head, (x, y), found = run(LocalControl("certified", explained=0.9, certified=share))
    guard = found.config["guard"]
    right = head(body(x)).argmax(1) == y
    assert share <= guard["certified"] <= 1.0
    after = found.head(found.extractor(x)).argmax(1) == y
    assert float((right & after).sum() / right.sum()) >= guard["certified"]
    for size in guard["layers"].values():
        assert size["norm"] <= size["limit"] * (1 + 1e-9)
    assert any(size["norm"] > 0.0 for size in guard["layers"].values())


def test_no_less_is_certified_than_was_asked_for() -> None:
    """50 answers lead by far, and 10 by less than the narrowest ball moves them."""
    sure = torch.tensor([[3.0, 0.1], [-3.0, 0.1]]).repeat(25, 1)
    x = torch.cat([sure, torch.tensor([[1e-12, 1.0]]).repeat(10, 1)]).double()
    body, head = nn.Sequential(nn.Linear(2, 2)).double(), nn.Linear(2, 2).double()
    with torch.no_grad():
        body[0].weight.copy_(torch.eye(2))
        head.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        for layer in (body[0], head):
            layer.bias.zero_()
    problem: Any = Problem.of((x, (x[:, 0] < 0).long()), (x[:20], torch.arange(20) % 2), head=head)

    def certified(share: float) -> float:
        rule = LocalControl("certified", explained=0.9, certified=share)
        found = DeepExtractorImmunizer(("0",), steps=1, batch_size=20, local=rule)
        return float(found.fit(body, problem).config["guard"]["certified"])

    with pytest.raises(ValueError, match=r"LocalControl: certified must be at most 0\.8333"):
        certified(1.0)
    assert certified(50 / 60) == 50 / 60


def test_gauss_newton_keeps_its_budget_and_its_prediction() -> None:
    body, head, (x, y), found = run(LocalControl("gauss-newton", budget=1e-6))
    guard = found.config["guard"]
    predicted = sum(layer["predicted"] for layer in guard["layers"].values())
    assert 0.5e-6 < predicted <= 1e-6 * (1 + 1e-9)

    def loss(extractor: nn.Module) -> float:
        return float(nn.functional.cross_entropy(head(extractor(x)), y).detach())

    assert loss(found.extractor) - loss(body) <= 1.5e-6
    assert found.history[-1]["log_kappa_harmful"] > found.history[0]["log_kappa_harmful"]


@given(st.integers(0, 2**31))
def test_what_is_brought_back_never_goes_uphill(seed: int) -> None:
    """The half-space and the ellipsoid at once; nearest in the metric of the damage."""
    roots = draw(seed, 4, 4).double(), draw(seed + 1, 3, 3).double()
    a, b = (r @ r.mT + 0.1 * torch.eye(len(r), dtype=r.dtype) for r in roots)
    slope, change = draw(seed + 2, 3, 4).double(), 5.0 * draw(seed + 3, 3, 4).double()

    def damage(delta: Tensor) -> float:
        return float((delta * (b @ delta @ a)).sum())

    found = Ellipsoid(a, b, 0.7, slope).keep(change)
    assert float((slope * found).sum()) <= 1e-9
    assert damage(found) <= 0.7 * (1 + 1e-9)
    wide = Ellipsoid(a, b, 1e9, slope).keep(change)
    other = draw(seed + 4, 3, 4).double()
    other = other if float((slope * other).sum()) <= 0.0 else -other
    assert damage(wide - change) <= damage(other - change) * (1 + 1e-9)


def test_slopes_are_those_of_the_mean_loss() -> None:
    body, (x, y) = net(3), data(0)
    head = trained(body, x, y)
    device = torch.device("cpu")
    found = _Moments(body, head, ["0", "4"], Samples((x, y)), device, 7).slopes()
    nn.functional.cross_entropy(head(body(x)), y).backward()
    for name, slope in found.items():
        torch.testing.assert_close(slope, body.get_submodule(name).weight.grad)


def test_output_factor_is_the_gauss_newton_matrix() -> None:
    """<Delta, B Delta A> of a last layer is d^2/dt^2 of the loss for one sample, exactly."""
    body, (x, y) = net(3), data(0, 1)
    head = nn.Linear(4, 3).double()
    body.requires_grad_(True)
    device = torch.device("cpu")
    moments = _Moments(body, head, ["4"], Samples((x, y)), device, 8)
    a, b = moments.factors(1e-14)["4"]
    delta = draw(9, 4, 40).double()

    def loss(t: Tensor) -> Tensor:
        features = nn.functional.linear(body[:4](x), body[4].weight + t * delta, body[4].bias)
        return nn.functional.cross_entropy(head(features), y)

    curvature = torch.autograd.functional.hessian(loss, torch.zeros((), dtype=torch.float64))
    assert float((delta * (b @ delta @ a)).sum()) == pytest.approx(float(curvature), rel=1e-8)


def test_convolutions_are_kept_by_their_patches() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 8, 3), nn.Flatten()).double()
    x, y = torch.randn(2, 1, 5, 5).double(), torch.tensor([0, 1])
    harmful = torch.randn(9, 1, 5, 5).double(), torch.arange(9) % 2
    head = nn.Linear(8, 2).double()
    for rule in ("null-space", "gauss-newton"):
        method = DeepExtractorImmunizer(
            ("2",),
            objective="r_ill",
            steps=3,
            batch_size=9,
            local=LocalControl(rule),  # type: ignore[arg-type]
        )
        found = method.fit(body, Problem.of((x, y), harmful, head=head))
        drift = float(((found.extractor(x) - body(x)).norm() / body(x).norm()).detach())
        assert not torch.equal(found.extractor[2].weight, body[2].weight)
        assert drift < (1e-10 if rule == "null-space" else 1.0)
    with pytest.raises(ValueError, match="got Conv2d, whose Lipschitz constant is not known"):
        DeepExtractorImmunizer(("2",), local=LocalControl("certified")).fit(
            body, Problem.of((x, y), harmful, head=head)
        )


def test_a_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    (x, y), body = data(0), net(3)
    problem: Any = Problem.of((x, y), data(1), head=trained(body, x, y))

    def fit(steps: int, folder: Path) -> Any:
        method = DeepExtractorImmunizer(
            ("2",), steps=steps, batch_size=12, learning_rate=0.01, local=LocalControl("certified")
        )
        return method.fit(body, problem, resume=folder)

    fit(3, tmp_path / "a")
    parts, whole = fit(6, tmp_path / "a"), fit(6, tmp_path / "b")
    assert torch.equal(parts.extractor[2].weight, whole.extractor[2].weight)
    assert parts.config == whole.config


def test_layers_are_ranked_by_harm_for_damage() -> None:
    body, (x, y) = net(3), data(0)
    head = trained(body, x, y)
    slopes = {name: draw(i, *body.get_submodule(name).weight.shape) for i, name in enumerate("024")}
    found = rank_layers(slopes, body, head, (x, y))
    assert [one.worth for one in found] == sorted((one.worth for one in found), reverse=True)
    free = {one.layer: one.free for one in found}
    assert free["0"] == pytest.approx(0.0, abs=1e-12)
    assert 0.2 < free["2"] < 0.9
    louder = rank_layers({**slopes, "0": 1e6 * slopes["0"]}, body, head, (x, y))
    assert louder[0].layer == "0"


def test_what_cannot_be_promised_is_refused() -> None:
    (x, y), body = data(0), net(3)
    head = trained(body, x, y)
    fit = DeepExtractorImmunizer(("0",), local=LocalControl()).fit
    with pytest.raises(ValueError, match="problem must have the head of the primary task"):
        fit(body, Problem.of((x, y), data(1)))
    with pytest.raises(ValueError, match=r"rule='null-space' must have layers whose .* rank in 0;"):
        fit(body, Problem.of((x, y), data(1), head=head))
    with pytest.raises(ValueError, match="corridor must be None beside local"):
        DeepExtractorImmunizer(corridor=(1.0, 2.0), local=LocalControl())
    certified = DeepExtractorImmunizer(("0",), local=LocalControl("certified")).fit
    with pytest.raises(ValueError, match="must have a linear head"):
        certified(body, Problem.of((x, y), data(1), head=nn.Sequential(head)))
    wrong = (head(body(x)).argmax(1) == 0).long()
    with pytest.raises(ValueError, match="must have right answers to keep, got none"):
        certified(body, Problem.of((x, wrong), data(1), head=head))
    for setting in ({"rule": "hope"}, {"explained": 0.0}, {"certified": 2.0}, {"budget": -1.0}):
        with pytest.raises(ValueError, match=f"LocalControl: {next(iter(setting))} must"):
            LocalControl(**setting)  # type: ignore[arg-type]


# --- linear extractors ----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["certified", "gauss-newton"])
@pytest.mark.parametrize("drift", [0.01, 0.3])
def test_features_drift_no_further_than_was_said(rule: Any, drift: float) -> None:
    primary, harmful = task(1), task(3)
    method = LocalControlImmunizer(rule=rule, drift=drift, explained=0.8, steps=40)
    found = method.fit(None, Problem.of(primary, harmful))
    bound, reached = found.config["drift_bound"], found.config["drift_found"]
    assert reached <= bound * (1 + 1e-9)
    assert bound <= drift * (1 + 1e-9)
    assert reached == found.history[-1]["drift"] > 0.2 * drift
    x = primary.x_train
    assert float((x @ found.theta - x).norm() / x.norm()) == pytest.approx(reached, rel=1e-9)
    assert found.history[-1]["log_kappa_harmful"] > found.history[0]["log_kappa_harmful"]


def test_linear_null_space_moves_no_feature_and_the_one_free_direction_alone() -> None:
    whole = task(1)
    flat = torch.cat([whole.x_train, whole.x_train[:, :1]], 1)
    test = torch.cat([whole.x_test, whole.x_test[:, :1]], 1)
    primary = Task("kept", flat, whole.y_train, test, whole.y_test)
    found = LocalControlImmunizer(rule="null-space", steps=20).fit(
        None, Problem.of(primary, task(3, p=6))
    )
    assert found.config["drift_found"] < 1e-13
    change = found.theta - torch.eye(6, dtype=torch.float64)
    last = torch.linalg.svd(flat).Vh[-1]
    torch.testing.assert_close(change, torch.outer(last, last @ change), atol=1e-12, rtol=0)
    assert found.history[-1]["log_rir"] > 1.0


def test_a_larger_drift_buys_more() -> None:
    found = [
        LocalControlImmunizer(drift=drift, steps=60).fit(None, Problem.of(task(1), task(3)))
        for drift in (0.03, 0.3)
    ]
    kappas = [one.history[-1]["log_kappa_harmful"] for one in found]
    assert kappas[0] < kappas[1]


@pytest.mark.parametrize("rule", ["null-space", "certified", "gauss-newton"])
def test_a_task_without_features_is_refused(rule: Any) -> None:
    whole = task(1)
    blind = Task("kept", 0.0 * whole.x_train, whole.y_train, whole.x_test, whole.y_test)
    with pytest.raises(ValueError, match="primary must have features that are not all 0"):
        LocalControlImmunizer(rule=rule).fit(None, Problem.of(blind, task(3)))


def test_linear_refusals() -> None:
    assert isinstance(METHODS["local-control"], LocalControlImmunizer)
    with pytest.raises(ValueError, match="primary must leave directions free for rule 'null-space"):
        LocalControlImmunizer(rule="null-space").fit(None, Problem.of(task(1), task(3)))
    with pytest.raises(ValueError, match="corridor must be None"):
        LocalControlImmunizer(corridor=(1.0, 9.0))
    with pytest.raises(ValueError, match="explained must be above 0"):
        LocalControlImmunizer(explained=0.0)
    with pytest.raises(ValueError, match="rule must be one of"):
        LocalControlImmunizer(rule="hope")  # type: ignore[arg-type]
