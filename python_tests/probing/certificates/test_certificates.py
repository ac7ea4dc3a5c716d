"""What each kind of attacker pays, against numbers that are known."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from immunize_ext.cli import main
from immunize_ext.probing.certificate_report import sentences
from immunize_ext.probing.certificates import (
    EXPONENT,
    Spectrum,
    aligned,
    best_risk,
    certify,
    effective_ridge,
    expected_risk,
    factorisation_steps,
    format_floor,
    gaussian_kappa_left,
    kappa_under,
    kernel_probe,
    layer_features,
    layer_probes,
    linear_information,
    perceptron_probe,
    raised,
    rewhitened,
    sample_curve,
    samples_to,
    served,
    work_cap,
)
from immunize_ext.probing.certification import CertificationSettings, certify_run
from immunize_ext.probing.data import Problem, Task, digits_task
from immunize_ext.probing.immunizers import METHODS, Immunized
from immunize_ext.report import render
from immunize_ext.storage import to_json


def positive(p: int, kappa: float, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.standard_normal((p, p)))
    return torch.from_numpy((q * np.logspace(0, math.log10(kappa), p)) @ q.T)


def gaussian_task(n: int, theta: Tensor | None = None, seed: int = 0) -> Task:
    """Six features of uneven variance and a target that two of them explain."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * n, 6, generator=generator, dtype=torch.float64)
    x = x * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.3, 0.1], dtype=torch.float64)
    y = x[:, 1] / 2.0 + 3.0 * x[:, 3] + torch.randn(2 * n, generator=generator).double() / 2.0
    x = x if theta is None else x @ theta
    return Task("gaussian", x[:n], y[:n], x[n:], y[n:])


# --- condition numbers by optimizer ---------------------------------------------------------------


def test_kappa_by_optimizer() -> None:
    h = positive(12, 1e4)
    values = np.linalg.eigvalsh(h.numpy())
    for name in ("gradient_descent", "momentum", "conjugate_gradients", "full_matrix_adagrad"):
        assert float(kappa_under(name, h)) == pytest.approx(1e4, rel=1e-9)
    scale = 1 / np.sqrt(np.diag(h.numpy()))
    jacobi = np.linalg.eigvalsh(h.numpy() * scale * scale[:, None])
    assert float(kappa_under("diagonal", h)) == pytest.approx(jacobi[-1] / jacobi[0], rel=1e-9)
    assert float(kappa_under("nystrom", h, rank=3)) == pytest.approx(values[-4] / values[0])
    assert float(kappa_under("diagonal", torch.diag(torch.from_numpy(values)))) == pytest.approx(1)
    assert EXPONENT["momentum"] == 0.5
    assert EXPONENT["whitening"] == 0.0


@pytest.mark.parametrize("optimizer", ["gradient_descent", "diagonal", "nystrom"])
def test_kappa_has_right_gradients(optimizer: str) -> None:
    h = positive(5, 50.0, seed=3).requires_grad_()

    def symmetric(a: Tensor) -> Tensor:
        return kappa_under(optimizer, (a + a.mT) / 2.0, rank=2 * (optimizer == "nystrom"))

    assert torch.autograd.gradcheck(symmetric, (h,))


@pytest.mark.parametrize("optimizer", ["whitening", "newton", "kfac", "closed_form"])
def test_whitening_learners_are_refused_with_the_theorem(optimizer: str) -> None:
    with pytest.raises(ValueError, match="takes the very steps it takes without theta"):
        kappa_under(optimizer, torch.eye(3))


def test_kappa_refusals() -> None:
    with pytest.raises(ValueError, match="optimizer must be one of gradient_descent"):
        kappa_under("sgdd", torch.eye(3))
    with pytest.raises(ValueError, match="positive definite"):
        kappa_under("gradient_descent", torch.diag(torch.tensor([1.0, -1.0])))
    with pytest.raises(ValueError, match="positive definite"):
        kappa_under("diagonal", torch.diag(torch.tensor([1.0, 0.0])))
    with pytest.raises(ValueError, match="rank must be between 0 and 2"):
        kappa_under("nystrom", torch.eye(3), rank=3)


# --- work and undoing -----------------------------------------------------------------------------


def test_the_cap_of_house_prices() -> None:
    """200 samples of 79 features, 77 steps of gradient descent before: the cap is 0.30."""
    assert factorisation_steps(200, 79) == pytest.approx(23.35, abs=0.01)
    assert work_cap(200, 79, 77) == pytest.approx(0.30, abs=0.005)
    with pytest.raises(ValueError, match="steps_before"):
        work_cap(200, 79, 0)


def test_kappa_left_after_whitening_is_that_of_marchenko_and_pastur() -> None:
    """Whatever kappa was designed, m = 4 p Gaussian inputs leave 9."""
    p, m, n = 100, 400, 20_000
    generator = torch.Generator().manual_seed(0)
    unlabelled = torch.randn(m, p, generator=generator, dtype=torch.float64)
    x = torch.randn(n, p, generator=generator, dtype=torch.float64)
    assert gaussian_kappa_left(m, p) == pytest.approx(9.0)
    found = []
    for kappa in (1.0, 1e2, 1e6, 1e10):
        theta = positive(p, math.sqrt(kappa), seed=1)
        z = x @ rewhitened(theta, unlabelled, ridge=0.0)
        sigma = torch.linalg.svdvals(z - z.mean(0))
        found.append(float(sigma[0] / sigma[-1]) ** 2)
    # p = 100 is not infinity, and n adds (1 + sqrt(p/n))^2 / (1 - sqrt(p/n))^2 at most.
    assert found[0] == pytest.approx(9.0, rel=0.3)
    assert found == pytest.approx([found[0]] * 4, rel=1e-4), "the designed kappa is gone"
    assert gaussian_kappa_left(100, 100) == math.inf


# --- learning curves ------------------------------------------------------------------------------


def power_law() -> Spectrum:
    i = torch.arange(1, 101, dtype=torch.float64)
    energies = i**-2.0
    return Spectrum(i**-1.5, energies / energies.sum(), torch.tensor(0.05, dtype=torch.float64))


@pytest.mark.parametrize(("samples", "ridge"), [(20, 1e-3), (40, 1.0), (60, 1e-3), (60, 1.0)])
def test_expected_risk_is_that_of_simulated_learners(samples: int, ridge: float) -> None:
    a, energies, noise = (t.numpy() for t in power_law())
    rng = np.random.default_rng(samples)
    risks = []
    for _ in range(60):
        x = rng.standard_normal((samples, 100))
        w = np.sqrt(energies) * rng.choice([-1.0, 1.0], 100)
        y = x @ w + math.sqrt(noise) * rng.standard_normal(samples)
        z = x * np.sqrt(a)
        head = z.T @ np.linalg.solve(z @ z.T + ridge * np.eye(samples), y)
        risks.append(((np.sqrt(a) * head - w) ** 2).sum() + noise)
    error = np.std(risks) / math.sqrt(len(risks))
    truth = float(expected_risk(power_law(), samples, ridge))
    # Four standard errors of the simulation, and 6 % of the limit of many features.
    assert abs(np.mean(risks) - truth) <= 4 * error + 0.06 * truth


def test_the_prior_that_a_spectrum_holds() -> None:
    """Known values: 80 samples reach .084 with the prior, .365 whitened; 200 whitened .096."""
    original = power_law()
    white = original._replace(variances=torch.ones(100, dtype=torch.float64))
    assert best_risk(original, 80) == pytest.approx(0.084, abs=0.002)
    assert best_risk(white, 80) == pytest.approx(0.365, abs=0.002)
    assert best_risk(white, 200) == pytest.approx(0.096, abs=0.002)


def test_risk_is_differentiable_twice() -> None:
    a, energies, noise = power_law()
    parts = [t[:6].clone().requires_grad_() for t in (a, energies)]
    ridge = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)

    def risk(a: Tensor, energies: Tensor, ridge: Tensor) -> Tensor:
        return expected_risk(Spectrum(a, energies, noise), 4, ridge)

    assert torch.autograd.gradcheck(risk, (*parts, ridge))
    assert torch.autograd.gradgradcheck(risk, (*parts, ridge))


def test_effective_ridge_solves_its_equation() -> None:
    a = power_law().variances
    for samples, ridge in ((1, 0.0), (99, 0.0), (100, 1e-8), (5000, 3.0)):
        k = float(effective_ridge(a, samples, ridge))
        assert float((a / (a + k)).sum()) + ridge / k == pytest.approx(samples, rel=1e-9)
    with pytest.raises(ValueError, match="below 100 without a ridge, got 100"):
        effective_ridge(a, 100)


def test_spectrum_of_a_task_adds_up() -> None:
    task = gaussian_task(400)
    spectrum = Spectrum.of(task)
    y = task.y_train
    assert float(spectrum.energies.sum() + spectrum.noise) == pytest.approx(
        float((y - y.mean()).square().mean()), rel=1e-12
    )
    # 0.25 is the variance of the noise in the targets.
    assert float(spectrum.noise) == pytest.approx(0.25, rel=0.2)
    # An invertible theta moves variances, not energies in all.
    moved = Spectrum.of(task, positive(6, 1e6, seed=5))
    assert float(moved.energies.sum()) == pytest.approx(float(spectrum.energies.sum()), rel=1e-9)


def test_samples_to() -> None:
    curve = {10: 0.4, 40: 0.2, 160: 0.1}
    assert samples_to(curve, 0.5) == 10.0
    assert samples_to(curve, 0.15) == pytest.approx(80.0)
    assert samples_to(curve, 0.05) == math.inf


# --- number formats -------------------------------------------------------------------------------


@pytest.mark.parametrize("number_format", ["bfloat16", "float16", "int8"])
def test_what_a_format_leaves_is_what_a_probe_finds(number_format: str) -> None:
    """One direction holds the target and is made small; rounding takes half of it away."""
    generator = torch.Generator().manual_seed(0)
    n, p = 8000, 12
    x = torch.randn(2 * n, p, generator=generator, dtype=torch.float64)
    y = x[:, 0].clone()
    q, _ = torch.linalg.qr(torch.randn(p, p, generator=generator, dtype=torch.float64))
    small = {"bfloat16": 2.0**-9, "float16": 2.0**-12, "int8": 2.0**-8}[number_format]
    scale = torch.ones(p, dtype=torch.float64)
    scale[0] = small
    z = (x * scale) @ q  # the rotation spreads the direction over all coordinates
    task = Task("small", z[:n], y[:n], z[n:], y[n:])
    floor = format_floor(Spectrum.of(task), float(z.square().mean()), number_format)
    rounded = Task("r", served(z[:n], number_format), y[:n], served(z[n:], number_format), y[n:])
    measured = linear_information(rounded).r2
    assert floor.explained_exact == pytest.approx(1.0, abs=1e-6)
    assert 0.1 < measured < 0.9
    # The unit of a format holds within a binade: rounding errors are smaller for small numbers.
    assert floor.explained == pytest.approx(measured, abs=0.35)
    assert (floor.queries > 1.0) == (floor.explained < floor.explained_exact / 2.0)


def test_formats_leave_large_directions_alone() -> None:
    task = gaussian_task(500)
    spectrum, mean_square = Spectrum.of(task), float(task.x_train.square().mean())
    floors = {name: format_floor(spectrum, mean_square, name) for name in ("float32", "bfloat16")}
    assert floors["float32"].explained == pytest.approx(floors["float32"].explained_exact)
    assert floors["bfloat16"].queries == 1.0
    with pytest.raises(ValueError, match="number_format must be one of"):
        format_floor(spectrum, mean_square, "fp8")
    with pytest.raises(ValueError, match="number_format must be one of"):
        served(task.x_train, "fp8")


# --- certificates ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problem() -> Problem[Task]:
    return Problem.of(digits_task((3,), (8,)), digits_task((4,), (9,)))


def test_certificate_of_an_invertible_extractor(problem: Problem[Task]) -> None:
    immunized = METHODS["closed-form"].fit(None, problem)
    found = certify(immunized, problem.primary, problem.harmful[0], draws=2)
    delays = {row.optimizer: row for row in found.delays}
    assert found.invertible
    ratio = immunized.history[1]["log_kappa_harmful"] - immunized.history[0]["log_kappa_harmful"]
    descent = delays["gradient_descent"]
    assert descent.factor == pytest.approx(math.exp(ratio), rel=1e-6)
    assert delays["momentum"].factor == pytest.approx(descent.factor**0.5)
    assert delays["whitening"].factor == 1.0
    # No coordinate scaling gets below kappa / p, which the equal diagonal sees to.
    floor = descent.log_kappa_after - math.log(64)
    assert delays["diagonal"].log_kappa_after >= floor
    assert found.work is not None
    assert found.work.cap == pytest.approx(found.work.factorisation / found.work.steps_before)
    harm, own = found.linear
    assert harm.r2_after == pytest.approx(harm.r2_before, abs=0.03), "nothing is gone"
    assert [row.role for row in found.few_samples] == ["harmful", "primary"]
    assert found.few_samples[0].searched
    assert not found.few_samples[1].searched
    assert own.r2_after == pytest.approx(own.r2_before, abs=0.03)
    assert set(found.seconds) >= {"delays", "work", "undoing", "few_samples", "formats", "linear"}


def test_certificate_of_a_lock(problem: Problem[Task]) -> None:
    immunized = METHODS["lock"].fit(None, problem)
    found = certify(immunized, problem.primary, problem.harmful[0], draws=2)
    harm, own = found.linear
    assert not found.invertible
    assert found.delays == []
    assert found.work is None
    assert harm.r2_before > 0.8
    assert harm.r2_after <= 4.0 * harm.leak
    assert own.r2_after > own.r2_before - 0.05
    for after in (harm.kernel_after, harm.perceptron_after):
        assert after is not None
        assert after > 0.85, "a probe that is not linear gets round it, and the page says so"
    said = " ".join(sentences(json.loads(json.dumps(to_json(found.to_dict())))))
    assert "a perceptron is right on" in said
    assert "Probes that are not linear get round it" in said
    assert math.isinf(found.few_samples[0].factor_best)


@pytest.mark.parametrize("samples", [4, 25])
def test_factors_of_a_task_with_few_samples(problem: Problem[Task], samples: int) -> None:
    """Multiples are of what there is, and where nothing is learnt there is none."""
    harm = problem.harmful[0]
    few = replace(harm, x_train=harm.x_train[:samples], y_train=harm.y_train[:samples])
    immunized = METHODS["label-direction"].fit(None, problem)
    found = certify(immunized, problem.primary, few, draws=2)
    row = found.few_samples[0]
    assert row.reference == {4: 4, 25: 20}[samples]
    assert 0.4 < row.constant <= 0.5
    assert row.factor_best is not None
    assert not math.isnan(row.factor_best)
    record = json.loads(json.dumps(to_json(found.to_dict())))
    said = " ".join(sentences(record))
    assert f"For what {row.reference} labelled samples gave" in said
    assert said.count("For what 40 labelled samples gave") == 1, "that of the task to keep"
    # Labels that the inputs do not tell, nine in ten of one class.
    generator = torch.Generator().manual_seed(0)
    train, test = (
        torch.where(torch.rand(n, generator=generator) < 0.1, -1.0, 1.0).to(harm.x_train)
        for n in (len(harm.x_train), len(harm.x_test))
    )
    blind = certify(immunized, problem.primary, replace(harm, y_train=train, y_test=test), draws=2)
    row = blind.few_samples[0]
    assert (row.factor_given, row.factor_best) == (None, None)
    assert 0.05 < row.constant < 0.15
    said = " ".join(sentences(json.loads(json.dumps(to_json(blind.to_dict())))))
    assert "nothing is learnt of the harmful task, even without immunization" in said
    assert "for the best constant answer" in said


def test_a_public_model_undoes_a_price_and_no_lock(problem: Problem[Task]) -> None:
    """Unlabelled inputs that go through both models bring the variances back, and the prior."""
    owners, attackers = problem.harmful[0].halves()
    prices = {}
    for method in ("label-direction", "lock"):
        immunized = METHODS[method].fit(None, Problem.of(problem.primary, owners))
        row = certify(immunized, problem.primary, attackers, draws=4).few_samples[0]
        prices[method] = row.factor_given, row.factor_best, row.factor_sibling
        if method == "label-direction":
            back = aligned(immunized.theta, immunized.theta0, problem.primary.x_train)
            seen = problem.primary.x_train.double()
            torch.testing.assert_close(seen @ back, seen, rtol=0, atol=1e-6)
    given, best, sibling = prices["label-direction"]
    assert given is not None
    assert best is not None
    assert given > 1.8
    assert best > 1.3
    assert sibling == pytest.approx(1.0, abs=0.05)
    assert prices["lock"] == (math.inf, math.inf, math.inf)


def test_a_benign_task_has_rows_of_its_own(problem: Problem[Task]) -> None:
    other = digits_task((0,), (1,))
    immunized = METHODS["whitening"].fit(None, problem)
    found = certify(immunized, problem.primary, problem.harmful[0], benign=[other], draws=1)
    few, linear = found.few_samples[2], found.linear[2]
    assert (few.role, few.name) == (linear.role, linear.name) == ("benign", other.name)
    assert linear.r2_after == linear_information(other, immunized.theta).r2
    assert linear.kernel_after is None
    record = json.loads(json.dumps(to_json(found.to_dict())))
    assert f"a user needs {few.factor_best:.1f} times" in sentences(record)[4]
    assert other.name in sentences(record)[4]


def test_a_search_finds_what_was_made_small() -> None:
    """A direction that holds the labels, hidden by a factor of 10, in the octave of its rank."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 6, generator=generator, dtype=torch.float64)
    small = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6, 0.05], dtype=torch.float64)
    task = Task("hidden", x[:300], x[:300, 5].sign(), x[300:], x[300:, 5].sign())
    theta = torch.diag(small)
    back = raised(theta, task.x_train, 5, 6, 20.0)
    assert float(back[5, 5]) == pytest.approx(1.0, rel=0.05)
    curves = [sample_curve(task, one, counts=(20, 40), draws=4) for one in (theta, back)]
    assert all(curves[1][n] < curves[0][n] for n in (20, 40))


def test_probes_that_are_not_linear_learn_a_product_of_signs() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1600, 2, generator=generator, dtype=torch.float64)
    y = (x[:, 0] * x[:, 1]).sign()
    product = Task("product", x[:1000], y[:1000], x[1000:], y[1000:])
    assert linear_information(product).r2 < 0.05
    values = replace(product, y_train=x[:1000].prod(1), y_test=x[1000:].prod(1))
    for probe in (kernel_probe, perceptron_probe):
        assert probe(product) > 0.9
        assert probe(values) > 0.7, "R^2 of a regression"
        # No invertible map takes anything away, and no label is there where the features are gone.
        assert probe(product, torch.diag(torch.tensor([1.0, 1e-3])).double()) > 0.9
        assert probe(product, torch.zeros(2, 1, dtype=torch.float64)) < 0.6


def test_earlier_layers_keep_what_the_last_one_lost() -> None:
    """A network whose last layer is locked: the layer before it tells the classes as ever."""
    task = digits_task((4,), (9,))
    theta = METHODS["lock"].fit(None, Problem.of(digits_task((3,), (8,)), task)).theta
    first = torch.nn.Linear(64, 64, bias=False, dtype=torch.float64)
    last = torch.nn.Linear(64, theta.shape[1], bias=False, dtype=torch.float64)
    torch.nn.init.eye_(first.weight)
    last.weight.data.copy_(theta.mT)
    network = torch.nn.Sequential(first, last).train()
    parts = (task.x_train, task.y_train), (task.x_test, task.y_test)
    found = {one.layer: one for one in layer_probes(network, *parts)}
    assert list(found) == ["0", "1", "output"]
    assert (found["0"].r2, found["0"].accuracy) == pytest.approx(tuple(linear_information(task)))
    assert found["0"].accuracy is not None
    assert found["0"].accuracy > 0.95
    assert found["output"].r2 < 0.2
    assert network.training
    maps = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.Conv2d(3, 2, 3))
    z = layer_features(maps, [torch.ones(2, 1, 8, 8), torch.ones(1, 1, 8, 8)], ["0", "1"])
    assert {name: tuple(value.shape) for name, value in z.items() if name != "output"} == {
        "0": (3, 3),
        "1": (3, 2),
    }
    with pytest.raises(ValueError, match="must be called once a batch"):
        layer_features(network, [])


def test_a_lock_is_judged_on_samples_that_it_was_not_made_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On its own samples a lock leaves nothing; on others it leaks, and the certificate says so."""
    out = tmp_path / "run"
    quick = ["--base-budget", "50", "--limit", "4", "--quiet", "--attacks", "whitened"]
    assert main(["kappa", *quick, "--method", "lock", "--out", str(out)]) == 0
    for flags in ([], ["--own-samples"]):
        assert main(["certify", str(out), "--draws", "1", "--quiet", *flags]) == 0
    capsys.readouterr()
    others, own = (json.loads((out / "certificates" / f"00{n}.json").read_text()) for n in (1, 2))
    assert (others["own_samples"], own["own_samples"]) == (False, True)
    found = [record["certificates"][0]["linear"][0] for record in (others, own)]
    assert found[0]["r2_after"] > 2.0 * found[1]["r2_after"]
    # Half of the samples each: the owner's n_d is what the bound is made of.
    assert found[0]["leak"] == pytest.approx(2.0 * found[1]["leak"], rel=0.01)
    pages = [(out / "certificates" / f"00{n}.html").read_text() for n in (1, 2)]
    assert "from every second harmful sample" in pages[0]
    assert "samples that the lock was made of" in pages[1]
    assert "samples that the lock was made of" not in pages[0]


def test_a_method_that_is_not_registered_is_judged_on_its_own(tmp_path: Path) -> None:
    out = tmp_path / "run"
    quick = ["--base-budget", "50", "--limit", "4", "--quiet", "--attacks", "whitened"]
    assert main(["kappa", *quick, "--method", "closed-form", "--out", str(out)]) == 0
    foreign = replace(Immunized.load(out / "immunized.safetensors"), method="mine")
    foreign.save(out / "immunized.safetensors")
    with pytest.raises(ValueError, match=r"must be a registered one.*--own-samples"):
        certify_run(out)
    settings = CertificationSettings(draws=1, own_samples=True)
    assert certify_run(out, settings).record["method"] == "mine"


def test_command_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(240, 5)) * np.array([3.0, 2.0, 1.0, 0.5, 0.3])
    y = np.repeat([0, 1, 2], 80)
    x[y == 1] += 1.0
    x[y == 2, 1] -= 2.0
    np.savez(tmp_path / "features.npz", x=x, y=y)
    data = ["--data", str(tmp_path / "features.npz"), "--primary", "0:1", "--harmful", "0:2"]
    quick = ["--base-budget", "50", "--limit", "4", "--quiet"]
    for method in ("closed-form", "lock"):
        out = tmp_path / method
        assert main(["kappa", *data, *quick, "--method", method, "--out", str(out)]) == 0
        capsys.readouterr()
        assert main(["certify", str(out), "--draws", "1", "--quiet"]) == 0
        said = capsys.readouterr().out
        assert "added:" in said
        record = json.loads((out / "certificates" / "001.json").read_text())
        assert record["kind"] == "kappa-certificate"
        assert record["certificates"][0]["invertible"] == (method != "lock")
        page = (out / "certificates" / "001.html").read_text()
        assert ("whitening, Newton, K-FAC" in page) == (method != "lock")
        assert "features, 0:2" in page
    # The record is all that the page is made of.
    assert render(record) == page
    flags = ["--draws", "1", "--quiet", "--benign", "1:2", "1:0"]
    assert main(["certify", str(tmp_path / "lock"), *flags]) == 0
    assert "on the benign task “features, 1:2”" in capsys.readouterr().out
    record = json.loads((tmp_path / "lock" / "certificates" / "002.json").read_text())
    assert record["benign"] == ["features, 1:2", "features, 1:0"]
    assert "benign task “features, 1:0”" in (tmp_path / "lock/certificates/002.html").read_text()
    assert main(["certify", str(tmp_path / "lock"), "--benign", "1:7"]) == 2
    assert "got no 7" in capsys.readouterr().err
    assert main(["certify", str(tmp_path)]) == 2
    assert "must be a run directory" in capsys.readouterr().err
    assert main(["certify", str(out), "--draws", "0"]) == 2
