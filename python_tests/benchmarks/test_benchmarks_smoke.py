"""Benchmarks: baselines are right, the harness keeps its rules, results are complete."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

pytest.importorskip("threadpoolctl")

from sample_inputs import compiled_only

from benchmarks import (
    _baselines,
    _environment,
    _expected,
    _results,
    _session,
    _timing,
    khatri_rao,
    merge,
    plots,
    readme_table,
    run,
    spectrum,
)

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
BRIEF = _timing.Budget(seconds=0.0, min_rounds=3, max_rounds=3, turn_seconds=0.0)
SHAPES = [(5, 12), (12, 5), (6, 6)]


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def central_difference(function, x, direction, h=1e-5):
    return (function(x + h * direction) - function(x - h * direction)) / (2 * h)


# --- right values, in numpy -------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("formula", [_expected.gram_r_well, _expected.gram_r_ill])
def test_expected_regularizers_follow_their_definition(shape, formula):
    x = normal(*shape).numpy()
    value, gradient = formula(x).values[0], formula(x).gradients[0]
    eigenvalues = np.linalg.eigvalsh(x.T @ x)[::-1]
    k = min(shape)
    if formula is _expected.gram_r_well:
        by_definition = eigenvalues[0] ** 2 / 2 - np.sum(eigenvalues**2) / (2 * shape[1])
    else:
        by_definition = 1 / (np.sum(eigenvalues**2) / (2 * k) - eigenvalues[k - 1] ** 2 / 2)
    assert_allclose(value, by_definition, rtol=1e-10)
    direction = normal(*shape, seed=1).numpy()
    slope = central_difference(lambda z: formula(z).values[0], x, direction)
    assert_allclose(np.sum(gradient * direction), slope, rtol=1e-6)


def test_expected_log_condition_number():
    vectors = np.linalg.qr(normal(6, 6).numpy())[0]
    eigenvalues = np.array([0.1, 0.3, 1.0, 2.0, 3.0, 5.0])
    answer = _expected.log_condition_number(eigenvalues, vectors)
    h = (vectors * eigenvalues) @ vectors.T
    assert_allclose(answer.values[0], np.log(np.linalg.cond(h)), rtol=1e-12)
    direction = normal(6, 6, seed=1).numpy()
    direction = direction + direction.T
    slope = central_difference(lambda z: np.log(np.linalg.cond(z)), h, direction)
    assert_allclose(np.sum(answer.gradients[0] * direction), slope, rtol=1e-6)


def merge_problem():
    base = [normal(width, 7, seed=width) for width in (3, 4)]
    concepts = [
        [weight + 0.1 * normal(*weight.shape, seed=10 + n) for weight in base] for n in range(2)
    ]
    embeddings = [normal(2, 7, seed=20), normal(1, 7, seed=21)]
    grads = [normal(*weight.shape, seed=30) for weight in base]
    return base, concepts, embeddings, normal(15, 7, seed=40), grads


def expected_merge(base, concepts, embeddings, c_reg, grads):
    return _expected.merge(
        [w.numpy() for w in base],
        [[w.numpy() for w in weights] for weights in concepts],
        [c.numpy() for c in embeddings],
        c_reg.numpy(),
        [g.numpy() for g in grads],
    )


def test_expected_merge_meets_its_constraints_and_is_optimal():
    base, concepts, embeddings, c_reg, grads = merge_problem()
    merged = expected_merge(base, concepts, embeddings, c_reg, grads).merged
    c = torch.cat(embeddings).numpy()
    null = np.linalg.svd(c)[2][c.shape[0] :]  # W may move along these rows only
    for layer, w in enumerate(merged):
        for n, rows in enumerate(embeddings):
            assert_allclose(w @ rows.numpy().T, (concepts[n][layer] @ rows.mT).numpy(), atol=1e-12)
        slope = (w - base[layer].numpy()) @ c_reg.numpy().T @ c_reg.numpy() @ null.T
        assert_allclose(slope, 0, atol=1e-11)


@pytest.mark.parametrize("argument", ["base", "concepts", "embeddings", "c_reg"])
def test_expected_merge_gradients_match_central_differences(argument):
    base, concepts, embeddings, c_reg, grads = merge_problem()
    answer = expected_merge(base, concepts, embeddings, c_reg, grads)
    got = {
        "base": answer.grad_base[1],
        "concepts": answer.grad_concepts[1][0],
        "embeddings": answer.grad_embeddings[0],
        "c_reg": answer.grad_c_reg,
    }[argument]

    def loss(step):
        moved = {
            "base": lambda: ([base[0], base[1] + step], concepts, embeddings, c_reg),
            "concepts": lambda: (
                base,
                [concepts[0], [concepts[1][0] + step, concepts[1][1]]],
                embeddings,
                c_reg,
            ),
            "embeddings": lambda: (base, concepts, [embeddings[0] + step, embeddings[1]], c_reg),
            "c_reg": lambda: (base, concepts, embeddings, c_reg + step),
        }[argument]()
        merged = expected_merge(*moved, grads).merged
        return sum(np.sum(w * g.numpy()) for w, g in zip(merged, grads, strict=True))

    direction = normal(*got.shape, seed=50)
    slope = (loss(1e-5 * direction) - loss(-1e-5 * direction)) / 2e-5
    assert_allclose(np.sum(got * direction.numpy()), slope, rtol=1e-6)


@pytest.mark.parametrize(
    ("got", "error"),
    [([1.0, 2.0], 0.0), ([1.0, 2.2], 0.2 / math.sqrt(5)), ([math.nan, 2.0], math.inf)],
)
def test_relative_error(got, error):
    tensor = torch.tensor(got, dtype=torch.float64)
    assert _expected.relative_error([tensor], [np.array([1.0, 2.0])]) == pytest.approx(error)
    assert _expected.relative_error([tensor[:1]], [np.array([1.0, 2.0])]) == math.inf


# --- baselines --------------------------------------------------------------------------------


def published_in_numpy(x, width):
    k = x.T @ x
    spectrum_of = np.linalg.eigvalsh(k + 1e-6 * np.eye(k.shape[0]))
    kept = spectrum_of[spectrum_of > 1e-6]
    frobenius = np.sum(k**2) / (2 * width)
    return kept[-1] ** 2 / 2 - frobenius, 1 / (frobenius - kept[0] ** 2 / 2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["eigvalsh", "svd"])
@pytest.mark.parametrize("width", [None, 3])
def test_published_regularizers(shape, method, width):
    x = normal(*shape).requires_grad_()
    well = _baselines.published_r_well(x, width=width, method=method)
    ill = _baselines.published_r_ill(x, width=width, method=method)
    expected_well, expected_ill = published_in_numpy(x.detach().numpy(), width or shape[1])
    assert_allclose(well.item(), expected_well, rtol=1e-10)
    assert_allclose(ill.item(), expected_ill, rtol=1e-10)
    (grad_well,) = torch.autograd.grad(well, x)
    (grad_ill,) = torch.autograd.grad(ill, x)
    right = _expected.gram_r_ill(
        x.detach().numpy(), width=width or shape[1], floor_smallest=shape[0] < shape[1]
    )
    if width is None:
        assert_allclose(
            grad_well, _expected.gram_r_well(x.detach().numpy()).gradients[0], rtol=1e-5
        )
    assert _expected.relative_error([grad_ill], right.gradients) < 1e-4


def test_published_smallest_eigenvalue_of_a_singular_matrix_is_its_ridge():
    x = normal(5, 40)
    largest, smallest = _baselines.published_extremes(x.mT @ x)
    assert_allclose(largest.item(), np.linalg.norm(x.numpy(), 2) ** 2, rtol=1e-6)
    assert_allclose(smallest.item(), 1e-6, rtol=1e-3)


def test_published_regularizers_take_batches_one_by_one():
    x = normal(2, 3, 4, 6)
    batch = _baselines.published_r_well(x)
    assert batch.shape == (2, 3)
    assert batch[1, 2] == _baselines.published_r_well(x[1, 2])


@pytest.mark.parametrize("shape", [*SHAPES, (3, 5, 12), (2, 9, 4)])
@pytest.mark.parametrize("values_of", [_baselines.bare_gram_values, _baselines.svd_gram_values])
def test_gram_values(shape, values_of):
    x = normal(*shape)
    values = values_of(x)
    sigma = np.linalg.svd(x.numpy(), compute_uv=False)
    assert_allclose(values.lambda_max, sigma[..., 0] ** 2, rtol=1e-10)
    assert_allclose(values.lambda_min, sigma[..., -1] ** 2, rtol=1e-8)
    assert_allclose(values.squared_frobenius, np.sum(sigma**4, axis=-1), rtol=1e-10)
    assert (values.rank == min(shape[-2:])).all()


def test_gram_values_leave_out_what_does_not_count():
    x = torch.cat([normal(3, 8), torch.zeros(2, 8, dtype=torch.float64)])
    values = _baselines.svd_gram_values(x)
    assert values.rank == 3
    assert_allclose(values.lambda_min, np.linalg.svd(x.numpy(), compute_uv=False)[2] ** 2)


def test_regularizers_from_values():
    values = _baselines.GramValues(*(torch.tensor(float(value)) for value in (3, 1, 14, 3)))
    assert_allclose(_baselines.r_well_of(values, 3).item(), 9 / 2 - 14 / 6, rtol=1e-6)
    assert_allclose(_baselines.r_ill_of(values).item(), 1 / (14 / 6 - 1 / 2), rtol=1e-6)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (2, 4, 9)])
def test_gram_floor_is_the_frobenius_part(shape):
    x = normal(*shape)
    thin = _baselines.gram_floor(x)
    assert thin.shape[-2:] == (4, 4)
    k = (x.mT @ x).numpy()
    assert_allclose(thin.square().sum((-2, -1)), np.sum(k**2, axis=(-2, -1)), rtol=1e-12)
    assert_allclose(_baselines.gram_floor_backward(x, thin), x.numpy() @ k, rtol=1e-11)


@pytest.fixture
def hessian():
    vectors = np.linalg.qr(normal(30, 30).numpy())[0]
    eigenvalues = np.concatenate([[0.01], np.linspace(0.5, 1.0, 28), [4.0]])
    return (vectors * eigenvalues) @ vectors.T


def test_iterative_extremes(hessian):
    assert_allclose(_baselines.eigsh_extremes(hessian), (4.0, 0.01), rtol=1e-8)
    largest, smallest = _baselines.lobpcg_extremes(torch.from_numpy(hessian))
    assert_allclose((largest.item(), smallest.item()), (4.0, 0.01), rtol=1e-4)
    x = normal(8, 20).numpy()
    sigma = np.linalg.svd(x, compute_uv=False)
    assert_allclose(_baselines.svds_extremes(x), sigma[[0, -1]], rtol=1e-6)


def test_hessian_floor_iterates_towards_both_extremes(hessian):
    top, bottom = _baselines.hessian_floor(torch.from_numpy(hessian))
    assert_allclose((top.mT @ torch.from_numpy(hessian) @ top).item(), 4.0, rtol=1e-3)
    assert_allclose((bottom.mT @ torch.from_numpy(hessian) @ bottom).item(), 0.01, rtol=1e-3)
    assert np.linalg.matrix_rank(_baselines.hessian_floor_backward(top, bottom).numpy()) == 2


def test_published_log_condition_number(hessian):
    h = torch.from_numpy(hessian).requires_grad_()
    value = _baselines.published_log_condition_number(h)
    assert_allclose(value.item(), math.log((4.0 + 1e-6) / (0.01 + 1e-6)), rtol=1e-9)
    (gradient,) = torch.autograd.grad(value, h)
    eigenvalues, vectors = np.linalg.eigh(hessian)
    right = _expected.log_condition_number(eigenvalues, vectors)
    assert _expected.relative_error([gradient], right.gradients) < 1e-3


def published(base, concepts, embeddings, c_reg):
    return _baselines.published_merge(base, concepts, embeddings, c_reg)


def bare(base, concepts, embeddings, c_reg):
    return _baselines.bare_merge(base, concepts, embeddings, _baselines.bare_factor(c_reg))


@pytest.mark.parametrize("way", [published, bare])
def test_merge_baselines(way):
    base, concepts, embeddings, c_reg, grads = merge_problem()
    right = expected_merge(base, concepts, embeddings, c_reg, grads)
    inputs = [*base, *concepts[0], *concepts[1], *embeddings, c_reg]
    for tensor in inputs:
        tensor.requires_grad_()
    merged = way(base, concepts, embeddings, c_reg)
    assert _expected.relative_error(merged, right.merged) < 1e-12
    gradients = torch.autograd.grad(merged, inputs, grads)
    expected = [
        *right.grad_base,
        *right.grad_concepts[0],
        *right.grad_concepts[1],
        *right.grad_embeddings,
        right.grad_c_reg,
    ]
    assert _expected.relative_error(gradients, expected) < 1e-10


def test_model_sizes():
    assert merge.model_sizes(merge.SD14_WIDTHS, 768).record() == {
        "matrices": 32,
        "output_rows": 24960,
        "d": 768,
        "concepts": 2,
        "s": 24,
        "m": 4000,
    }
    assert merge.model_sizes(merge.SDXL_WIDTHS, 2048).record()["matrices"] == 140


# --- harness ----------------------------------------------------------------------------------


def contender(name="c", role="ours", error=0.0, *, calls=None, backward=True, items=1):
    def forward():
        if calls is not None:
            calls.append(name)
        return (torch.ones(()),)

    return _timing.Contender(
        name,
        f"contender {name}",
        role,
        forward,
        (lambda values: values) if backward else None,
        None if role == "floor" else lambda values, gradients: error,
        tolerance=1e-3,
        items=items,
    )


@pytest.fixture
def scripted_clock(monkeypatch):
    """Calls of a contender take the forward times 1, 2, 3 ... ms and half as much backward."""
    counts = {}

    def time_call(contender, device):
        counts[contender.name] = counts.get(contender.name, 0) + 1
        forward = float(counts[contender.name])
        return forward, forward / 2 if contender.backward is not None else 0.0

    monkeypatch.setattr(_timing, "time_call", time_call)
    monkeypatch.setattr(_timing, "peak_memory_mib", lambda contender, device: 1.0)
    return counts


def test_measure_drops_the_first_call_and_divides_by_items(scripted_clock):
    first, second = _timing.measure([contender("a"), contender("b", items=2)], CPU, BRIEF)
    # Call 1 decides how many fit a turn; calls 2, 3, 4 are the rounds.
    assert first.samples == [(2.0, 1.0), (3.0, 1.5), (4.0, 2.0)]
    assert first.forward == _timing.Statistic(3.0, 2.5, 3.5, 2.0, 3)
    assert first.backward.median == 1.5
    assert first.both.median == 4.5
    assert second.both.median == 2.25
    assert first.peak_mib == 1.0


def test_measure_drops_the_first_call_of_a_turn(scripted_clock):
    budget = _timing.Budget(seconds=0.0, min_rounds=2, max_rounds=2, turn_seconds=0.003)
    (entry,) = _timing.measure([contender("a", backward=False)], CPU, budget)
    # Call 1 takes 1 ms, so 3 calls make a turn; calls 2 and 6 open the turns and are dropped.
    assert [forward for forward, _ in entry.samples] == [3, 4, 5, 7, 8, 9]
    assert entry.backward is None
    assert entry.both == entry.forward


def test_measure_lets_contenders_take_turns():
    calls = []
    names = ["a", "b", "c"]
    _timing.measure([contender(name, calls=calls) for name in names], CPU, BRIEF)
    rounds = [calls[start : start + 3] for start in range(6, 15, 3)]
    assert [sorted(turns) for turns in rounds] == [names] * 3
    assert calls[:6] == names * 2


def test_measure_refuses_a_wrong_baseline_before_any_timing(scripted_clock):
    with pytest.raises(_timing.IncorrectContenderError, match=r"b \(contender b\).*2.0e-03"):
        _timing.measure([contender("a"), contender("b", "baseline", 2e-3)], CPU, BRIEF)
    assert scripted_clock == {}


def test_measure_refuses_nan(scripted_clock):
    with pytest.raises(_timing.IncorrectContenderError, match="nan"):
        _timing.measure([contender("a", error=math.nan)], CPU, BRIEF)


def test_measure_leaves_out_a_wrong_rival_and_says_why(scripted_clock):
    wrong, fine = _timing.measure(
        [contender("a", "rival", 0.5), contender("b", "rival", 1e-4)], CPU, BRIEF
    )
    assert wrong.both is None
    assert "5.0e-01 exceeds 1e-03" in wrong.refused
    assert fine.refused is None
    assert "a" not in scripted_clock


def test_measure_leaves_out_a_rival_that_fails(scripted_clock):
    def fail():
        raise RuntimeError("no convergence\nat all")

    failing = _timing.Contender("a", "a", "rival", fail, check=lambda values, gradients: 0.0)
    (entry,) = _timing.measure([failing], CPU, BRIEF)
    assert entry.refused == "RuntimeError: no convergence"


def test_measure_wants_checks_and_distinct_names():
    unchecked = _timing.Contender("a", "a", "ours", lambda: ())
    with pytest.raises(ValueError, match="has no check"):
        _timing.measure([unchecked], CPU, BRIEF)
    with pytest.raises(ValueError, match="distinct names"):
        _timing.measure([contender("a"), contender("a")], CPU, BRIEF)
    (entry,) = _timing.measure([contender("a", "floor")], CPU, BRIEF)
    assert entry.relative_error is None


def test_summary_of_one_sample():
    assert _timing.summarise([2.0]) == _timing.Statistic(2.0, 2.0, 2.0, 2.0, 1)


def test_threads_are_restored():
    before = torch.get_num_threads()
    with _timing.fixed_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_sees_a_large_temporary():
    def forward():
        return (torch.ones(2**23, dtype=torch.float64).sum(),)  # 64 MiB

    large = _timing.Contender("a", "a", "floor", forward)
    peak = _timing.peak_memory_mib(large, CPU)
    if peak is None:
        pytest.skip("the peak of the resident set cannot be reset here")
    assert 60 < peak < 200


def test_copy_bandwidth_is_positive():
    assert _timing.copy_bandwidth(CPU, mebibytes=1, repeats=2) > 0


# --- refusal of the fallback ------------------------------------------------------------------


def refuse(what):
    raise RuntimeError(f"{what} needs the compiled operators; build them with: pip install .")


@pytest.mark.parametrize(
    ("script", "name"), [(spectrum, "benchmarks.spectrum"), (merge, "benchmarks.merge")]
)
def test_fallback_is_not_timed(script, name, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(_timing._load, "require_compiled", refuse)
    assert script.main(["--quick", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.err.strip() == f"{name}: " + f"{name} needs the compiled operators; " + (
        "build them with: pip install ."
    )
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


def test_fallback_of_a_device_without_kernels_is_not_timed(monkeypatch):
    monkeypatch.setattr(_timing._load, "require_compiled", lambda what: None)
    monkeypatch.setattr(_timing, "has_kernel", lambda name, device: False)
    with pytest.raises(RuntimeError, match="compiled operators for cpu"):
        _timing.refuse_fallback("benchmarks.spectrum", CPU)


# --- results ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "value", "measured", "met"),
    [("faster", 4.0, 5.0, True), ("faster", 6.0, 5.0, False), ("within", 0.1, 0.2, False)],
)
def test_targets(kind, value, measured, met):
    target = _results.Target(kind, "other", value)
    medians = {"ours": 2.0, "other": 10.0}
    judged = _results.evaluate(target, medians, judge=True)
    assert judged["measured"] == pytest.approx(measured)
    assert judged["met"] is met
    assert _results.evaluate(target, medians, judge=False)["met"] is None
    assert _results.evaluate(target, {"ours": 2.0}, judge=True)["measured"] is None


def record(case_id, medians, *, quick=False, sweep=None):
    """A row with given medians."""
    measurements = []
    for name, median in medians.items():
        entry = _timing.Measurement(contender(name, "baseline"), relative_error=0.0)
        entry.both = entry.forward = _timing.Statistic(median, median, median, median, 3)
        measurements.append(entry)
    return _results.row_record(
        identifier=case_id,
        title=f"row {case_id}",
        sizes={"n": 1},
        dtype="float64",
        per="call",
        measurements=measurements,
        targets=[_results.Target("faster", "published", 2.0)],
        missing=["a tracker"],
        note="",
        sweep=sweep,
        judge=not quick,
    )


def result(benchmark, rows, *, quick=False):
    environment = _environment.environment_record(CPU, 2, f"benchmarks.{benchmark}", ["--x"])
    return _results.document(benchmark, environment, {"quick": quick}, rows)


def test_result_files_are_written_whole_and_read_back(tmp_path):
    content = result("spectrum", [record("a", {"ours": 1.0, "published": 3.0})])
    path = tmp_path / "new" / _results.file_name("spectrum", "cpu")
    _results.write(path, content)
    assert [entry.name for entry in path.parent.iterdir()] == ["spectrum-cpu.json"]
    assert _results.read(path) == content
    (path.parent / "ptxas.json").write_text("{}", encoding="utf-8")
    assert _results.read_folder(path.parent) == [content]
    path.write_text(json.dumps(content)[:-9], encoding="utf-8")
    with pytest.raises(ValueError, match=r"spectrum-cpu.json must be a result file"):
        _results.read(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content.pop("rows"), "result lacks rows"),
        (lambda content: content.update(schema=99), "schema must be 1"),
        (lambda content: content["environment"].pop("threads"), "environment lacks threads"),
        (lambda content: content["rows"][0].pop("dtype"), r"rows\[0\] lacks dtype"),
        (
            lambda content: content["rows"][0]["contenders"][0].update(both=None),
            "ours has no time and no reason",
        ),
        (
            lambda content: content["rows"][0]["contenders"][0]["both"].pop("q25"),
            "ours.both lacks q25",
        ),
        (lambda content: content["rows"][0]["targets"][0].update(met="yes"), "met has type str"),
    ],
)
def test_incomplete_results_are_refused(damage, message):
    content = json.loads(json.dumps(result("spectrum", [record("a", {"ours": 1.0})])))
    _results.validate(content)
    damage(content)
    with pytest.raises(ValueError, match=message):
        _results.validate(content)


def test_environment_names_no_folder_of_this_machine():
    arguments = ["--quick", "--out", str(ROOT), f"--out={ROOT}"]
    environment = _environment.environment_record(CPU, 2, "benchmarks.spectrum", arguments)
    assert environment["command"] == "python -m benchmarks.spectrum --quick --out PATH --out=PATH"
    text = json.dumps(environment)
    assert str(ROOT) not in text
    assert sys.prefix not in text
    assert environment["torch"] == torch.__version__
    assert environment["cpu"]


# --- scripts ----------------------------------------------------------------------------------


@pytest.fixture
def any_route(monkeypatch):
    """Let the scripts run where the compiled part is switched off, which is tested above."""
    monkeypatch.setattr(_session, "refuse_fallback", lambda what, device: None)


@pytest.mark.usefixtures("any_route")
@pytest.mark.parametrize(
    ("script", "name"),
    # A tracker that always decomposes is refused by its row.
    [pytest.param(spectrum, "spectrum", marks=compiled_only), (merge, "merge")],
)
def test_quick_run(script, name, tmp_path, capsys):
    assert script.main(["--quick", "--threads", "1", "--out", str(tmp_path)]) == 0
    content = _results.read(tmp_path / f"{name}-cpu.json")
    assert content["settings"]["quick"] is True
    assert content["settings"]["copy_bandwidth_bytes_per_second"] > 0
    options = _session.options(_session.parser("").parse_args(["--quick"]))
    assert [row["id"] for row in content["rows"]] == [
        case.identifier for case in script.cases(options)
    ]
    for row in content["rows"]:
        timed = {entry["name"]: entry for entry in row["contenders"] if entry["both"]}
        assert timed["ours"]["relative_error"] < 1e-3
        # Tiny matrices are compared with what one would write instead, and have no other floor.
        if row["id"].startswith(("tiny-", "one-")):
            assert {"eigvalsh", "svdvals"} & timed.keys()
        else:
            grid = row["id"].startswith("grid-")
            assert timed.keys() >= ({"bare", "floor"} if grid else {"composite", "floor"})
        assert all(target["met"] is None for target in row["targets"])
        assert all(target["measured"] is not None for target in row["targets"])
    printed = capsys.readouterr().out
    assert "not judged" in printed
    assert f"written: {tmp_path}" in printed

    pytest.importorskip("matplotlib")
    written = plots.draw(content, tmp_path / "plots")
    assert len(written) == len(plots.sweeps(content)) >= 2
    assert all("<svg" in path.read_text(encoding="utf-8") for path in written)
    (against,) = plots.draw_ratios(content, tmp_path / "plots")
    assert "<svg" in against.read_text(encoding="utf-8")
    for sweep, curves in plots.ratios(content).values():
        for ours, curve in curves.items():
            bare = sweep.curves[ours.replace("ours", "bare")]
            assert curve.medians[0] == bare.medians[0] / sweep.curves[ours].medians[0]
            assert all(a <= b for a, b in zip(curve.q25, curve.q75, strict=True))


@pytest.mark.usefixtures("any_route")
def test_quick_run_of_per_sample_gradients(capsys):
    assert khatri_rao.main(["--quick", "--threads", "1"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in khatri_rao.LAYERS)


@pytest.mark.usefixtures("any_route")
def test_a_wrong_operator_fails_the_run(monkeypatch, capsys, tmp_path):
    wrong = spectrum.OURS._replace(r_ill=lambda x: 2 * _baselines.published_r_ill(x))
    monkeypatch.setattr(spectrum, "OURS", wrong)
    arguments = ["--quick", "--rows", "samples-4", "--out", str(tmp_path)]
    assert spectrum.main(arguments) == 1
    assert "row samples-4: ours" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("any_route")
def test_a_wrong_row_is_left_out_and_the_others_are_measured(monkeypatch, capsys, tmp_path):
    real, written = _session.run_case, []

    def run_case(case, chosen):
        written.append((tmp_path / "spectrum-cpu.json").is_file())
        if case.identifier == "samples-4":
            raise _timing.IncorrectContenderError("ours is wrong")
        return real(case, chosen)

    monkeypatch.setattr(_session, "run_case", run_case)
    rows = ["--rows", "pair-64x784", "--rows", "samples-4", "--rows", "samples-8"]
    assert spectrum.main(["--quick", *rows, "--out", str(tmp_path)]) == 1
    assert "row samples-4: ours is wrong" in capsys.readouterr().err
    content = _results.read(tmp_path / "spectrum-cpu.json")
    assert [row["id"] for row in content["rows"]] == ["pair-64x784", "samples-8"]
    # The file is there as soon as the first row is measured.
    assert written == [False, True, True]


@pytest.mark.usefixtures("any_route")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "nothing"], "fits no row; there are: pair-64x784"),
        (["--seconds", "-1"], "--seconds must be positive"),
        pytest.param(
            ["--device", "cuda"],
            "torch sees none",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_bad_command_lines(arguments, message, capsys):
    assert spectrum.main(["--quick", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_full_rows_have_the_targets_of_the_design():
    """Targets are data; this pins the numbers that the project has set itself."""
    options = _session.options(_session.parser("").parse_args([]))
    targets = {
        case.identifier: {(t.challenger, t.against): t.value for t in case.targets}
        for case in [*spectrum.cases(options), *merge.cases(options)]
        if case.sweep is None
    }
    ours = "ours"
    assert targets["pair-64x784"] == {
        (ours, "published"): 200,
        (ours, "composite"): 2.2,
        (ours, "floor"): 1.6,
    }
    assert targets["groups-20x100x768"][ours, "published"] == 130
    assert targets["batch-90x64x784"][ours, "published"] == 180
    assert targets["tall-12000x784"][ours, "published"] == 2.2
    assert targets["hessian-2048"][ours, "published"] == 4
    assert targets["sd14-weights"][ours, "published"] == 18
    assert targets["sd14-embeddings"][ours, "published"] == 150
    assert targets["sdxl-weights"]["ours_cached", "composite"] == 3


def test_run_passes_its_arguments_on(monkeypatch, capsys):
    commands = []

    def pretend(command, check):
        commands.append(command[1:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(run.subprocess, "run", pretend)
    assert run.main(["--device", "cuda", "--out", "folder"]) == 0
    given = ["--device", "cuda", "--out", "folder"]
    assert commands == [
        ["-m", "benchmarks.spectrum", *given],
        ["-m", "benchmarks.merge", *given],
        ["-m", "benchmarks.plots", "--results", "folder"],
    ]
    assert run.main(["--rows", "pair*"]) == 2
    assert "--rows belongs to one benchmark" in capsys.readouterr().err


# --- table of the README ----------------------------------------------------------------------


@pytest.fixture
def results(tmp_path):
    """A folder with results for every line of the table."""
    folder = tmp_path / "results"
    names = (
        "published",
        "composite",
        "bare",
        "bare_cached",
        "ours",
        "ours_cached",
        "floor",
        "floor_cached",
        "svdvals",
    )
    medians = dict(zip(names, (200.0, 8.0, 5.0, 6.0, 2.0, 1.5, 1.6, 1.0, 3.0), strict=True))
    for benchmark in ("spectrum", "merge"):
        rows = dict.fromkeys(line.row for line in readme_table.LINES if line.benchmark == benchmark)
        content = result(benchmark, [record(row, medians) for row in rows])
        _results.write(folder / _results.file_name(benchmark, "cpu"), content)
    return folder


def test_readme_table(results, capsys):
    assert readme_table.main(["--results", str(results)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == (
        "| R_well or R_ill of features, 64 x 784, per matrix | 2 | 100x | 4.0x | 2.5x | 1.2x |"
    )
    assert "log kappa, one 8 x 8 | 2 |  |  | 1.5x |  |" in lines[9]
    assert "| 1.5 |  |  | 4.0x | 1.5x |" in lines[13]
    assert "`python -m benchmarks.spectrum --x`" in lines[-2]


BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


def test_readme_check(results, tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text(f"# Title\n{BEGIN}\nold\n{END}\nend\n", encoding="utf-8")
    check = ["--results", str(results), "--check", str(page)]
    assert readme_table.main(check) == 1
    assert "differs" in capsys.readouterr().err
    assert readme_table.main(["--results", str(results), "--write", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Title\n")
    assert text.endswith(f"{END}\nend\n")
    assert readme_table.main(check) == 0
    page.write_text(text.replace("100x", "101x"), encoding="utf-8")
    assert readme_table.main(check) == 1
    page.write_text("# Title\n", encoding="utf-8")
    assert readme_table.main(check) == 2
    assert BEGIN in capsys.readouterr().err


def test_readme_table_refuses_what_it_cannot_show(results, tmp_path, capsys):
    assert readme_table.main(["--results", str(tmp_path)]) == 2
    assert "there are no result files" in capsys.readouterr().err
    path = results / "merge-cpu.json"
    content = _results.read(path)
    content["settings"]["quick"] = True
    _results.write(path, content)
    assert readme_table.main(["--results", str(results)]) == 2
    assert "quick run" in capsys.readouterr().err
    path.unlink()
    assert readme_table.main(["--results", str(results)]) == 2
    assert "there is no result file merge-cpu.json" in capsys.readouterr().err


def test_plots_want_results(tmp_path, capsys):
    assert plots.main(["--results", str(tmp_path)]) == 2
    assert "there are no result files" in capsys.readouterr().err
