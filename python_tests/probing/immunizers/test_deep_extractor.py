"""Deep extractors: which weights move, what stays frozen, gradients by hand, resumed runs."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from immunize_ext.errors import NumericalWarning
from immunize_ext.ops.regularizers import gram_r_ill, gram_r_well
from immunize_ext.probing.data import Problem
from immunize_ext.probing.extractors.feature_extractor import FeatureExtractor, block_state
from immunize_ext.probing.immunizers import DeepExtractorImmunizer, ImmunizedExtractor
from immunize_ext.probing.immunizers.deep_extractor import Features, probe_targets, terms_of

pytest.importorskip("safetensors")

Pair = tuple[torch.Tensor, torch.Tensor]

SCALES = torch.tensor([3.0, 2.0, 1.0, 0.5, 1.0, 1.0])
FAST: dict[str, Any] = {"learning_rate": 1e-2, "batch_size": 32}


def vectors(seed: int, flip: bool = False, n: int = 240) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator) * (SCALES.flip(0) if flip else SCALES)
    return x, (x[:, 0] > 0).long()


def body() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 4))


def images(seed: int, n: int = 48, size: int = 8) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, 1, size, size, generator=generator),
        torch.arange(n) % 3,
    )


def vit() -> FeatureExtractor:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.2,
    )
    return FeatureExtractor(transformers.ViTModel(config, add_pooling_layer=False), name="vit")


def resnet() -> FeatureExtractor:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=1,
        embedding_size=4,
        hidden_sizes=[4, 4, 8, 8],
        depths=[1, 1, 1, 1],
        layer_type="basic",
    )
    return FeatureExtractor(transformers.ResNetModel(config), name="resnet")


PRIMARY, HARMFUL = vectors(0), vectors(1, flip=True)


def test_it_raises_kappa_of_the_harm_and_lowers_that_of_the_primary() -> None:
    immunized = DeepExtractorImmunizer(("3",), steps=200, **FAST).fit(
        body(), Problem.of(PRIMARY, HARMFUL)
    )
    ratio = immunized.rir(PRIMARY, HARMFUL, group_size=100)
    for policy in ("official", "ridge", "rank_aware"):
        log_i, log_ii = ratio.full[policy]  # type: ignore[index]
        assert log_i > math.log(2.0)
        assert log_ii < 0.0
        assert ratio.mean_rir(policy) > 3.0  # type: ignore[arg-type]
    losses = [record["loss"] for record in immunized.history]
    assert sum(losses[-20:]) < sum(losses[:20])


@pytest.mark.parametrize(
    ("objective", "value"),
    [
        ("r_ill", "r_ill"),
        ("r_well", "r_well"),
        ("kappa_log_ratio", "kappa_log_ratio"),
        ("imma", "imma"),
    ],
)
def test_baselines_lower_their_own_objective(objective: str, value: str) -> None:
    immunizer = DeepExtractorImmunizer(("3",), objective=objective, steps=120, **FAST)  # type: ignore[arg-type]
    history = immunizer.fit(body(), Problem.of(PRIMARY, HARMFUL)).history
    first, last = (sum(r[value] for r in part) for part in (history[:10], history[-10:]))
    assert last < first


def test_difference_of_condition_numbers() -> None:
    terms = terms_of("kappa_difference", classes=2, inner_steps=1)
    x, h = PRIMARY[0].double(), HARMFUL[0].double()
    sigma = [torch.linalg.svdvals(t) for t in (x, h)]
    expected = (sigma[0][0] / sigma[0][-1]) ** 2 - (sigma[1][0] / sigma[1][-1]) ** 2
    torch.testing.assert_close(terms[0].value(Features(x, h, HARMFUL[1])), expected)
    immunizer = DeepExtractorImmunizer(("3",), objective="kappa_difference", steps=3, **FAST)
    assert len(immunizer.fit(body(), Problem.of(PRIMARY, HARMFUL)).history) == 3


def test_normalisers_are_those_of_the_regularizers() -> None:
    well, ill = terms_of("condition_number", classes=2, inner_steps=1, p=224.0, k=2.0)
    rows = torch.randn(9, 4, dtype=torch.float64)
    features = Features(rows, rows, torch.zeros(9))
    assert well.value(features) == gram_r_well(rows, p=224.0) != gram_r_well(rows)
    assert ill.value(features) == gram_r_ill(rows, k=2.0) != gram_r_ill(rows)
    # And a run takes them: R_well is logged under its normaliser.
    history = [
        DeepExtractorImmunizer(("3",), steps=1, p=p, **FAST)
        .fit(body(), Problem.of(PRIMARY, HARMFUL))
        .history[0]["r_well"]
        for p in (None, 1e6)
    ]
    assert history[0] < history[1]


def test_imma_is_minus_the_loss_of_a_probe() -> None:
    x, y = HARMFUL[0].double(), HARMFUL[1]
    targets = probe_targets(y, 2, torch.float64)
    assert targets.sum(0).abs().max() < 1e-9
    (none,) = terms_of("imma", classes=2, inner_steps=1)
    (many,) = terms_of("imma", classes=2, inner_steps=2000)
    at = Features(x, x, y)
    centred = x - x.mean(0)
    best = targets - centred @ torch.linalg.lstsq(centred, targets).solution
    share = float(best.square().mean() / targets.square().mean())
    assert float(many.value(at)) == pytest.approx(-share, rel=1e-4)
    assert -1.0 <= float(none.value(at)) <= float(many.value(at))
    one_class = Features(x, x, torch.zeros_like(y))
    assert float(many.value(one_class)) == 0.0


def test_first_step_by_hand() -> None:
    # One batch of everything, plain SGD, given lambdas, preconditioned last layer.
    model, ridge = body(), 1e-2
    head = nn.Linear(4, 2)
    immunizer = DeepExtractorImmunizer(
        ("3",),
        steps=1,
        batch_size=240,
        learning_rate=1e-3,
        momentum=0.0,
        head_weight_decay=0.0,
        lambda_well=1e-3,
        lambda_ill=2.0,
        precondition="last",
        precondition_ridge=ridge,
    )
    immunized = immunizer.fit(model, Problem.of(PRIMARY, HARMFUL, head=head))
    last = model.eval()[3]
    hidden = [model[:3](x).detach() for x in (PRIMARY[0], HARMFUL[0])]
    loss = functional.cross_entropy(head(last(hidden[0])), PRIMARY[1], label_smoothing=0.1)
    expected = torch.autograd.grad(loss, last.weight)[0].double()
    for rows, function, weight in ((hidden[0], gram_r_well, 1e-3), (hidden[1], gram_r_ill, 2.0)):
        (gradient,) = torch.autograd.grad(function(last(rows)), last.weight)
        gram = rows.double().mT @ rows.double()
        gram += ridge * gram.trace() / 8 * torch.eye(8, dtype=torch.float64)
        # nn.Linear stores theta^T: K^-1 stands on the right.
        expected = expected + weight * torch.linalg.solve(gram, gradient.double().mT).mT
    moved = block_state(immunized.extractor, ["3"])["3.weight"].double()
    # float32 weights: gradients agree to about its precision times the condition number of K.
    torch.testing.assert_close((last.weight - moved) / 1e-3, expected, rtol=2e-2, atol=2e-4)
    assert immunized.history[0]["lambda_ill"] == 2.0


def test_lambdas_balance_gradient_norms() -> None:
    model = body().eval()
    one = DeepExtractorImmunizer(("3",), steps=1, batch_size=240, share=0.5).fit(
        model, Problem.of(PRIMARY, HARMFUL)
    )
    last = model[3]
    head = nn.Linear(4, 2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        head.weight.copy_(torch.randn(2, 4, generator=generator) / 2.0)
        head.bias.zero_()
    features = [model(x) for x in (PRIMARY[0], HARMFUL[0])]
    values = (
        functional.cross_entropy(head(features[0]), PRIMARY[1], label_smoothing=0.1),
        gram_r_well(features[0]),
        gram_r_ill(features[1]),
    )
    norms = []
    for value in values:
        parts = torch.autograd.grad(value, list(last.parameters()), retain_graph=True)
        norms.append(math.sqrt(sum(float(part.square().sum()) for part in parts)))
    assert one.config["lambdas"]["well"] == pytest.approx(0.5 * norms[0] / norms[1], rel=1e-4)
    assert one.config["lambdas"]["ill"] == pytest.approx(0.5 * norms[0] / norms[2], rel=1e-4)
    anew = DeepExtractorImmunizer(("3",), steps=3, rebalance_every=2, **FAST)
    found = [r["lambda_ill"] for r in anew.fit(model, Problem.of(PRIMARY, HARMFUL)).history]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(("make", "count", "size"), [(vit, 1, 8), (resnet, 2, 64)])
def test_only_the_chosen_blocks_move(make: Any, count: int, size: int) -> None:
    model = make().train()
    before = copy.deepcopy(model.state_dict())
    modes = {name: module.training for name, module in model.named_modules()}
    immunizer = DeepExtractorImmunizer(count, steps=3, batch_size=12, learning_rate=1e-2)
    primary, harmful = images(0, size=size), images(1, size=size)
    immunized = immunizer.fit(model, Problem.of(primary, harmful))
    # The user's model is left alone: weights, statistics, modes.
    assert all(torch.equal(v, model.state_dict()[name]) for name, v in before.items())
    assert modes == {name: module.training for name, module in model.named_modules()}
    after = immunized.extractor.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    chosen = tuple(f"model.{block}." for block in immunized.blocks)
    assert len(immunized.blocks) == count
    assert moved
    assert all(name.startswith(chosen) for name in moved)
    # Statistics stay, in the blocks as well.
    assert not any("running" in name or "num_batches" in name for name in moved)
    original = immunized.original().state_dict()
    assert all(torch.equal(v, original[name]) for name, v in before.items())
    assert immunized.rir(primary, harmful, groups=3, group_size=20).mean_rir() != 1.0
    with pytest.warns(NumericalWarning, match="rank-deficient"):
        immunized.rir(primary, harmful, groups=2, group_size=5)


@pytest.mark.parametrize("objective", ["condition_number", "imma"])
def test_two_and_two_steps_are_four(objective: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "blocks": 1,
        "objective": objective,
        "batch_size": 10,
        "learning_rate": 1e-2,
        "seed": 4,
    }
    model, problem = vit(), Problem.of(images(0), images(1))

    def run(steps: int, folder: Path | None = None) -> ImmunizedExtractor:
        return DeepExtractorImmunizer(steps=steps, **settings).fit(model, problem, resume=folder)

    whole, half = run(4), run(2, tmp_path)
    joined = run(4, tmp_path)
    for first, second in (
        (whole.extractor.state_dict(), joined.extractor.state_dict()),
        (whole.head.state_dict(), joined.head.state_dict()),
        (whole.momentum, joined.momentum),
        (whole.theta0, joined.theta0),
    ):
        assert first.keys() == second.keys()
        assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert whole.history == joined.history
    assert whole.config == joined.config
    assert len(half.history) == 2
    # To resume a finished run is to hand it back.
    assert run(4, tmp_path).history == whole.history
    with pytest.raises(ValueError, match="steps must be at least the 4 that are done"):
        run(3, tmp_path)


def test_it_says_in_a_line_what_it_is() -> None:
    found = DeepExtractorImmunizer(("3",), steps=1, **FAST).fit(
        body(), Problem.of(PRIMARY, HARMFUL)
    )
    text = repr(found)
    assert text == "ImmunizedExtractor('condition_number', Sequential, blocks ['3'], 1 steps)"


def test_save_and_load(tmp_path: Path) -> None:
    model = body()
    immunized = DeepExtractorImmunizer(("3",), steps=2, **FAST).fit(
        model, Problem.of(PRIMARY, HARMFUL)
    )
    path = tmp_path / "run.safetensors"
    immunized.save(path)
    loaded = ImmunizedExtractor.load(path, model)
    assert torch.equal(loaded.extractor(PRIMARY[0]), immunized.extractor(PRIMARY[0]))
    assert torch.equal(loaded.original()(PRIMARY[0]), model.eval()(PRIMARY[0]))
    assert torch.equal(loaded.head.weight, immunized.head.weight)  # type: ignore[arg-type]
    assert (loaded.history, loaded.config) == (immunized.history, immunized.config)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight[0, 0] += 1e-6
    with pytest.raises(ValueError, match="extractor must be the backbone that"):
        ImmunizedExtractor.load(path, other)
    with pytest.raises(ValueError, match="extractor must be the backbone that"):
        ImmunizedExtractor.load(path, nn.Linear(2, 2))
    with pytest.raises(FileNotFoundError):
        ImmunizedExtractor.load(tmp_path / "none.safetensors", model)
    deep = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    DeepExtractorImmunizer(("3",), steps=1, **FAST).fit(
        model, Problem.of(PRIMARY, HARMFUL, head=deep)
    ).save(path)
    with pytest.raises(ValueError, match="head must be given where it is no linear layer"):
        ImmunizedExtractor.load(path, model)
    with pytest.raises(ValueError, match="head must fit the file"):
        ImmunizedExtractor.load(path, model, head=nn.Linear(4, 2))
    assert len(list(ImmunizedExtractor.load(path, model, head=deep).head.parameters())) == 4


def test_runs_repeat_and_leave_the_global_state_alone() -> None:
    model = body()
    state = torch.get_rng_state()
    weights = [
        DeepExtractorImmunizer(("3",), steps=3, seed=seed, **FAST)
        .fit(model, Problem.of(PRIMARY, HARMFUL))
        .extractor.state_dict()["3.weight"]
        for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_data_sets_regression_and_callback() -> None:
    x, y = PRIMARY[0], PRIMARY[0].sum(1)
    seen: list[float] = []
    immunized = DeepExtractorImmunizer(("3",), steps=40, **FAST).fit(
        body(),
        Problem.of(TensorDataset(x, y), TensorDataset(*HARMFUL), head=nn.Linear(4, 1)),
        progress=lambda text, share: seen.append(share),
    )
    assert seen == [step / 40 for step in range(2, 41, 2)]
    assert immunized.history[-1]["loss"] < immunized.history[0]["loss"]
    pair = DeepExtractorImmunizer(("3",), steps=1, **FAST).fit(body(), Problem.of((x, y), HARMFUL))
    assert pair.head.weight.shape == (1, 4)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": 0}, "blocks must be finite and positive"),
        ({"objective": "mima"}, "objective must be one of"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1"),
        ({"label_smoothing": -0.1}, "label_smoothing must be at least 0"),
        ({"lambda_ill": math.nan}, "lambda_ill must be finite"),
        ({"p": 0.0}, "p must be finite and positive, got 0.0"),
        ({"k": math.inf}, "k must be finite and positive, got inf"),
        ({"head_learning_rate": -1.0}, "head_learning_rate must be finite and positive"),
        ({"objective": "imma", "precondition": "last"}, "precondition must be None"),
    ],
)
def test_settings_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepExtractorImmunizer(**settings)


def test_fits_refused() -> None:
    model = body()
    with pytest.raises(ValueError, match="blocks must be at most the 2 blocks found"):
        DeepExtractorImmunizer(3).fit(model, Problem.of(PRIMARY, HARMFUL))
    with pytest.raises(ValueError, match=r"precondition must name a linear layer in 3, got '0'"):
        DeepExtractorImmunizer(("3",), precondition="0").fit(model, Problem.of(PRIMARY, HARMFUL))
    with pytest.raises(ValueError, match="must keep the features finite"):
        DeepExtractorImmunizer(("3",), learning_rate=1e30).fit(model, Problem.of(PRIMARY, HARMFUL))
    with pytest.raises(ValueError, match="primary labels must be classes from 0 on"):
        DeepExtractorImmunizer(("3",)).fit(model, Problem.of((PRIMARY[0], PRIMARY[1] - 1), HARMFUL))
    with pytest.raises(ValueError, match="primary must say its classes"):
        DeepExtractorImmunizer(("3",)).fit(model, Problem.of(TensorDataset(*PRIMARY), HARMFUL))
    with pytest.raises(ValueError, match=r"model must yield features \(n, p\)"):
        DeepExtractorImmunizer(("0",)).fit(
            nn.Sequential(nn.Conv2d(1, 2, 3)), Problem.of(images(0), images(1))
        )
    side = nn.ModuleDict({"used": nn.Linear(6, 4), "unused": nn.Linear(6, 4)})

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = side

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            features: torch.Tensor = self.parts["used"](x.requires_grad_())
            return features

    with pytest.raises(ValueError, match="blocks must have a part in the features"):
        DeepExtractorImmunizer(("parts.unused",)).fit(Half(), Problem.of(PRIMARY, HARMFUL))


@pytest.mark.parametrize("change", ["settings", "model", "problem", "head"])
def test_another_run_is_not_gone_on_from(change: str, tmp_path: Path) -> None:
    model, head = body(), nn.Linear(4, 2)
    settings: dict[str, Any] = {**FAST, "steps": 2}
    primary = PRIMARY
    DeepExtractorImmunizer(("3",), **settings).fit(
        model, Problem.of(primary, HARMFUL, head=head), resume=tmp_path
    )
    if change == "settings":
        settings["momentum"] = 0.8
    elif change == "problem":
        primary = (PRIMARY[0] * (1 + 1e-6), PRIMARY[1])
    else:
        with torch.no_grad():
            (model[3] if change == "model" else head).weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="same settings, model and problem, got another's"):
        DeepExtractorImmunizer(("3",), **settings).fit(
            model, Problem.of(primary, HARMFUL, head=head), resume=tmp_path
        )


def test_one_block_of_a_plain_mlp_is_its_last_layer() -> None:
    immunized = DeepExtractorImmunizer(1, steps=1, **FAST).fit(body(), Problem.of(PRIMARY, HARMFUL))
    assert immunized.blocks == ["3"]


@pytest.mark.parametrize("rate", [10.0, 1000.0])
def test_a_run_that_diverges_says_where_and_what_to_do(rate: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    immunizer = DeepExtractorImmunizer(("2", "4"), steps=60, batch_size=32, learning_rate=rate)
    with pytest.raises(ValueError, match=r"at step \d+ of 60.*; lower learning_rate or share"):
        immunizer.fit(model, Problem.of(PRIMARY, HARMFUL))


SECOND = vectors(5, flip=True)[0].roll(1, 1), HARMFUL[1]
WHOLE: dict[str, Any] = {"batch_size": 240, "learning_rate": 1e-2, "momentum": 0.0}


def moved(*harms: Pair, **settings: Any) -> torch.Tensor:
    """What one step makes of the chosen block."""
    chosen = DeepExtractorImmunizer(("3",), steps=1, **{**WHOLE, **settings})
    before = body()[3].weight
    return chosen.fit(body(), Problem.of(PRIMARY, *harms)).extractor[3].weight - before  # type: ignore[index]


@pytest.mark.parametrize("precondition", [None, "3"])
def test_several_harms_are_the_mean_of_each_with_its_own_k(precondition: str | None) -> None:
    settings = {"objective": "r_ill", "lambda_ill": 1e4, "precondition": precondition}
    settings = {**settings, "weight": None}
    both = moved(HARMFUL, SECOND, **settings)
    each = [moved(harm, **settings) for harm in (HARMFUL, SECOND)]
    torch.testing.assert_close(both, (each[0] + each[1]) / 2.0, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(each[0], each[1], rtol=1e-3)
    # The same harm twice is that harm; a share of one half is the least protected alone.
    torch.testing.assert_close(moved(HARMFUL, HARMFUL, **settings), each[0], rtol=1e-4, atol=1e-7)


def test_the_least_protected_harm_counts_most() -> None:
    settings = {**FAST, "batch_size": 240, "steps": 12}
    problem: Problem[Any] = Problem.of(PRIMARY, HARMFUL, SECOND)
    found = DeepExtractorImmunizer(("3",), weighting="cvar", worst_share=0.5, **settings)
    for record in found.fit(body(), problem).history:
        phi = [record[f"protected_{h}"] for h in (1, 2)]
        assert record["log_kappa_harmful"] == min(record[f"log_kappa_harmful_{h}"] for h in (1, 2))
        assert record[f"weight_{1 + phi.index(min(phi))}"] == 1.0
    hedged = DeepExtractorImmunizer(("3",), weighting="exponentiated", harm_rate=0.5, **settings)
    history = hedged.fit(body(), problem).history
    met = torch.zeros(2, dtype=torch.float64)
    for record in history:
        expected = (-0.5 * met).softmax(0)
        assert [record["weight_1"], record["weight_2"]] == pytest.approx(expected.tolist())
        met += torch.tensor([record["protected_1"], record["protected_2"]])
    assert history[0]["protected_1"] == history[0]["protected_2"] == 0.0
    with pytest.raises(ValueError, match="weighting must be one of"):
        DeepExtractorImmunizer(("3",), weighting="worst")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="harm_rate must be finite"):
        DeepExtractorImmunizer(("3",), harm_rate=-1.0)


def test_imma_weighs_by_what_its_probe_leaves_also_of_other_numbers_of_classes() -> None:
    three = HARMFUL[0], HARMFUL[1] + (HARMFUL[0][:, 1] > 0).long()
    problem: Problem[Any] = Problem.of(PRIMARY, HARMFUL, three)
    found = DeepExtractorImmunizer(
        ("3",), objective="imma", weighting="cvar", steps=3, **{**FAST, "batch_size": 240}
    ).fit(body(), problem)
    alone = DeepExtractorImmunizer(
        ("3",), objective="imma", steps=1, **{**FAST, "batch_size": 240}
    ).fit(body(), Problem.of(PRIMARY, HARMFUL))
    first = found.history[0]
    assert first["protected_1"] == pytest.approx(-alone.history[0]["imma"], rel=1e-5)
    assert 0.0 < min(first["protected_1"], first["protected_2"]) <= 1.0


def test_several_harms_go_on_where_they_stopped(tmp_path: Path) -> None:
    problem: Problem[Any] = Problem.of(PRIMARY, HARMFUL, SECOND)
    settings: dict[str, Any] = {**FAST, "weighting": "exponentiated", "harm_rate": 0.5}

    def run(steps: int, folder: Path | None = None) -> ImmunizedExtractor:
        return DeepExtractorImmunizer(("3",), steps=steps, **settings).fit(
            body(), problem, resume=folder
        )

    run(3, tmp_path)
    gone_on, whole = run(6, tmp_path), run(6)
    assert gone_on.history == whole.history
    assert torch.equal(gone_on.extractor[3].weight, whole.extractor[3].weight)  # type: ignore[index]
