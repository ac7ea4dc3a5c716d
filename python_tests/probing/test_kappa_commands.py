"""``immunize kappa``, ``attack`` and ``report`` from end to end, and every refusal in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from page_parser import ParsedPage

from immunize_ext.cli import main
from immunize_ext.probing import run as probing
from immunize_ext.probing.evaluation import Evaluation
from immunize_ext.probing.immunizers import METHODS, Immunized, knob_of
from immunize_ext.storage import KINDS, to_json

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("yaml")
pytest.importorskip("safetensors")

QUICK = ["--base-budget", "50", "--limit", "4"]


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of five features: milliseconds a run."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(150, 5)) * np.array([3.0, 2.0, 1.0, 0.5, 0.3])
    y = np.repeat([0, 1, 2], 50)
    x[y == 1] += 1.0
    x[y == 2, 1] -= 2.0
    path = tmp_path_factory.mktemp("data") / "features.npz"
    np.savez(path, x=x, y=y)
    return path


def tasks_of(features: Path) -> list[str]:
    return ["--data", str(features), "--primary", "0:1", "--harmful", "0:2"]


@pytest.fixture(scope="module")
def finished(features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("runs") / "one"
    arguments = ["kappa", *tasks_of(features), "--out", str(target), "--strength", "10", "--quiet"]
    assert main([*arguments, *QUICK]) == 0
    return target


def results_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def test_run_directory_holds_what_the_kind_promises(finished: Path) -> None:
    results = results_of(finished)
    assert results["kind"] == "kappa"
    assert results["kind"] in KINDS
    assert results["method"] == "closed-form"
    assert set(results["rir"]) == {"official", "ridge", "rank_aware"}
    # The closed form is on the ceiling, and kappa_P is c (issue 6: to 1e-6).
    assert results["share_of_ceiling"] == pytest.approx(1.0, abs=1e-6)
    kappa_primary = results["condition_numbers"]["ridge"]["log_kappa_primary"][1]
    assert np.exp(kappa_primary) == pytest.approx(10.0, rel=1e-6)
    assert results["rir"]["ridge"] == pytest.approx(results["i"] / results["ii"])
    for role in ("harmful", "primary"):
        assert results["slowdown"][role]["whitened"] == 1.0
        assert results["slowdown"][role]["closed_form_ridge"] == 1.0
    assert results["schema"] == 2
    assert results["attackers"]["whitened"] == {
        "label": "Whitens the features first",
        "sees_theta": False,
    }
    for key in (
        "ceiling",
        "environment",
        "ceiling_table",
        "subspace_angles",
        "norm_ratio",
        "worst_case",
        "few_samples",
        "rfd",
        "grouped_rir",
        "spectral_slowdown",
        "spectra",
    ):
        assert results[key]
    assert set(results["seconds"]) == {
        "load",
        "immunize",
        "measure",
        "certify",
        "compare",
        "total",
    }
    assert results["certificate"]["few_samples"][0]["role"] == "harmful"
    assert results["worst_case"]["harmful"]["all_attackers"]["slowdown_of_a_free_choice"] <= 1.0


def test_theta_and_page_are_there(finished: Path) -> None:
    immunized = Immunized.load(finished / "immunized.safetensors")
    assert immunized.theta.shape == (5, 5)
    page = (finished / "report.html").read_text()
    # Of this toy whoever solves learns next to nothing, and the page does not call that free.
    undone = "learns hardly anything from these samples, immunized or not"
    for words in ("What was protected", "At what cost", undone, "ceiling of RIR"):
        assert words in page
    assert "Learnt from only" in page
    assert "What each kind of attacker pays" in page
    assert "whitening, Newton, K-FAC" in page


@pytest.mark.parametrize("method", [name for name in METHODS if name != "closed-form"])
def test_every_method_runs(method: str, features: Path, tmp_path: Path) -> None:
    own = METHODS.all_settings()
    more = ["--steps", "3"] if method in own["steps"] else []
    more += ["--epochs", "3"] if method in own["epochs"] else []
    more += ["--keep", "last"] if method in own["keep"] else []
    arguments = ["kappa", *tasks_of(features), "--method", method, *more, *QUICK, "--quiet"]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    results = results_of(tmp_path / "run")
    assert results["method"] == method
    knob = knob_of(METHODS[method])
    assert (results["knob"] or {}).get("name") == knob


def test_mini_batches_and_several_harms(features: Path, tmp_path: Path) -> None:
    batches = ["--method", "mini-batch", "--batch-size", "16", "--epochs", "2"]
    run = ["kappa", "--data", str(features), "--primary", "0:1", *QUICK, "--quiet"]
    assert main([*run, "--harmful", "0:2", *batches, "--out", str(tmp_path / "a")]) == 0
    assert results_of(tmp_path / "a")["method_label"] == "mini-batch, batches of 16"
    several = ["--harmful", "0:2", "1:2", "--method", "several-harms"]
    assert main([*run, *several, "--out", str(tmp_path / "b")]) == 0
    listed = results_of(tmp_path / "b")["harmful_tasks"]
    assert [task["name"] for task in listed] == ["features, 0:2", "features, 1:2"]


def test_results_are_exactly_what_python_gives_and_read_back(
    features: Path, tmp_path: Path
) -> None:
    settings = probing.RunSettings(
        data=str(features),
        primary="0:1",
        harmful=("0:2",),
        settings={"strength": 10.0},
        compare=("whitening",),
        base_budget=50,
        limit=4.0,
    )
    found = probing.run(settings, tmp_path / "run")
    results = json.loads(json.dumps(to_json(found.results())))
    assert results == results_of(tmp_path / "run")
    assert Evaluation.from_dict(results) == found.evaluation
    assert [row["name"] for row in results["alternatives"]] == ["whitening"]
    assert found.summary().splitlines()[0] in (tmp_path / "run" / "report.html").read_text()
    rows = [json.loads(r) for r in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    curve = results["attacks"]["harmful"]["gradient_descent"]["curves"]["with"]
    mine = [
        (row["step"], row["test_loss"])
        for row in rows
        if row["kind"] == "attack"
        and row["immunized"]
        and (row["role"], row["attacker"]) == ("harmful", "gradient_descent")
    ]
    assert mine == list(zip(curve["steps"], curve["test_loss"], strict=True))
    assert not list(tmp_path.glob(".*"))  # no work folder is left


def test_a_run_that_was_cut_off_goes_on(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = probing.RunSettings(
        data=str(features),
        primary="0:1",
        harmful=("0:2",),
        method="multiplicative",
        settings={"steps": 40},
        base_budget=50,
        limit=4.0,
    )
    whole = probing.run(settings)

    def cut_off(text: str, share: float) -> None:
        if "step 21" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        probing.run(settings, tmp_path / "run", progress=cut_off)
    assert not (tmp_path / "run").exists()
    texts: list[str] = []
    resumed = probing.run(
        settings, tmp_path / "run", progress=lambda text, share: texts.append(text)
    )
    assert any("step 39" in text for text in texts)
    assert not any("step 3 " in text for text in texts)
    assert torch.equal(resumed.immunized.theta, whole.immunized.theta)
    with pytest.raises(KeyboardInterrupt):
        probing.run(settings, tmp_path / "other", progress=cut_off)
    other = replace(settings, settings={"steps": 40, "eta_harmful": 0.2})
    with pytest.raises(ValueError, match="same settings, model and problem, got another's"):
        probing.run(other, tmp_path / "other")


def test_the_kind_of_each_task_is_said_before_the_run(
    features: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["kappa", "--primary", "4", "--harmful", "9", *QUICK]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().err.splitlines()
    said = [i for i, line in enumerate(lines) if "constant labels" in line]
    immunizing = next(i for i, line in enumerate(lines) if "immunizing" in line)
    assert len(said) == 2
    assert max(said) < immunizing


def test_labels_0_and_1_are_judged_as_minus_and_plus_1(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    x = generator.normal(size=(120, 4)) * np.array([3.0, 2.0, 1.0, 0.5])
    y = (x @ np.ones(4) > 0).astype(float)
    found = []
    for name, labels in (("zeros", y), ("signs", 2 * y - 1)):
        np.savez(tmp_path / f"{name}.npz", x=x, y=labels)
        np.savez(tmp_path / f"{name}-other.npz", x=x[:, ::-1], y=labels)
        settings = probing.RunSettings(
            data=str(tmp_path / f"{name}.npz"),
            harmful=(str(tmp_path / f"{name}-other.npz"),),
            base_budget=50,
            limit=4.0,
        )
        results = probing.run(settings).results()
        assert results["tasks"]["harmful"]["kind"] == "classification"
        found.append({key: results[key] for key in ("slowdown", "rir", "attacks")})
    assert found[0] == found[1]


def test_flags_override_the_config_file(features: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"data: {features}\nprimary: '0:1'\nharmful: '0:2'\nmethod: whitening\n"
        "base-budget: 50\nlimit: 4\nseed: 7\n"
    )
    run = ["kappa", "--config", str(config), "--seed", "3", "--quiet"]
    assert main([*run, "--out", str(tmp_path / "run")]) == 0
    request = results_of(tmp_path / "run")["request"]
    assert (request["seed"], request["method"], request["base_budget"]) == (3, "whitening", 50)


def test_one_digit_alone_has_a_constant_label(tmp_path: Path) -> None:
    run = ["kappa", "--primary", "4", "--harmful", "9", *QUICK, "--quiet"]
    assert main([*run, "--out", str(tmp_path / "run")]) == 0
    results = results_of(tmp_path / "run")
    assert results["tasks"]["primary"]["name"] == "images of digit 4, constant label"
    assert any("one class" in text for text in results["warnings"])
    assert not (tmp_path / "run" / "accuracy.png").exists()


# --- attack and report -------------------------------------------------------------------------


def test_attack_adds_and_changes_nothing(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.read_bytes() for p in finished.iterdir() if p.is_file()}
    run = ["attack", str(finished), "--attacks", "nesterov", "lbfgs", "--quiet"]
    assert main([*run, "--budgets", "5", "20"]) == 0
    assert {p: p.read_bytes() for p in finished.iterdir() if p.is_file()} == before
    assert "Nesterov" in capsys.readouterr().out
    added = json.loads((finished / "attacks" / "001.json").read_text())
    assert {(row["attacker"], row["role"]) for row in added["attacks"]} == {
        (name, role) for name in ("nesterov", "lbfgs") for role in ("harmful", "primary")
    }
    assert [row["steps"] for row in added["attacks"][0]["budgets"]] == [5, 20]
    assert main(["attack", str(finished), "--attacks", "whitened", "--quiet"]) == 0
    assert (finished / "attacks" / "002.json").is_file()
    page = ParsedPage((finished / "attacks" / "001.html").read_text())
    page.check()
    assert "Nesterov's accelerated gradient" in page.text


def test_attack_refuses_other_data(features: Path, tmp_path: Path) -> None:
    data = tmp_path / "features.npz"
    data.write_bytes(features.read_bytes())
    run = ["kappa", "--data", str(data), "--primary", "0:1", "--harmful", "0:2", "--quiet"]
    assert main([*run, *QUICK, "--out", str(tmp_path / "run")]) == 0
    with np.load(features) as arrays:
        np.savez(data, x=arrays["x"] * 2.0, y=arrays["y"])
    assert main(["attack", str(tmp_path / "run"), "--quiet"]) == 2
    assert not (tmp_path / "run" / "attacks").exists()


def test_report_compares_runs_at_equal_cost(
    finished: Path, features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "white"
    run = ["kappa", *tasks_of(features), "--method", "whitening", *QUICK, "--quiet"]
    assert main([*run, "--out", str(other)]) == 0
    capsys.readouterr()
    assert main(["report", str(finished), str(other), "--out", str(tmp_path / "report")]) == 0
    assert "closed-form" in capsys.readouterr().out
    comparison = results_of(tmp_path / "report")
    table = comparison["equal_primary_slowdown"]["gradient_descent"]
    assert set(table) == {"closed-form", "whitening"}
    for folder, method in ((finished, "closed-form"), (other, "whitening")):
        slowdown = results_of(folder)["slowdown"]
        within = slowdown["primary"]["gradient_descent"] <= 1.0
        assert table[method]["1"]["cells"] == int(within)
        if within:
            assert table[method]["1"]["median"] == slowdown["harmful"]["gradient_descent"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert "whitens the features first" in page
    assert "<svg" in page
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)


# --- refusals ----------------------------------------------------------------------------------


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run a command that must be refused: status 2, one line, nothing written. Gives the line."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main(arguments) == 2
        assert sorted(tmp_path.rglob("*")) == before
        captured = capsys.readouterr()
        lines = [text for text in captured.err.splitlines() if not text.startswith("[")]
        assert captured.out == ""
        assert len(lines) == 1
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["kappa", "--method", "magic"], "magic is no method"),
        (["kappa", "--primary", "4:x", "--harmful", "9"], "a task must look like"),
        (["kappa", "--primary", "4:4", "--harmful", "9"], "on both sides"),
        (["kappa", "--primary", "12", "--harmful", "9"], "digits from 0 to 9"),
        (["kappa", "--primary", "4:9"], "harmful must name a task"),
        (["kappa", "--data", "cifar"], "data must be digits, mnist, house"),
        (["kappa", "--data", "missing.npz", "--harmful", "4"], "missing.npz"),
        (["kappa", "--data", "mnist", "--data-dir", "nowhere"], "must name a folder"),
        (["kappa", "--strength", "0.5"], "at least 1"),
        (["kappa", "--ridge", "0"], "ridge must be positive"),
        (["kappa", "--seed", "-1"], "seed must not be negative"),
        (["kappa", "--attacks", "nobody"], "nobody is no attack"),
        (["kappa", "--loss", "hinge"], "'squared' or 'logistic'"),
        (["kappa", "--objective", "sum", "--method", "opt-kappa"], "objective must be"),
        (["kappa", "--batch-size", "few", "--method", "mini-batch"], "--batch-size must be"),
        (["kappa", "--harmful", "1:2", "3:4", "--primary", "5:6"], "use --method several-harms"),
        (["kappa", "--config", "missing.yaml"], "missing.yaml"),
        (["attack", "nothing"], "must be a run directory"),
        (["report", "nothing"], "must be a run directory"),
        (["sweep", "kappa", "--pairs", "4-9"], "a pair must look like"),
        (["sweep", "kappa", "--methods", "magic"], "magic is no method"),
        (["sweep", "kappa", "--strengths", "magic=1,3"], "must look like METHOD=1,3,10"),
        (["sweep", "kappa", "--jobs", "0"], "at least 1"),
        (["sweep", "nothing"], "nothing is no command"),
    ],
)
def test_refusals_are_one_line(
    arguments: list[str], words: str, refused: Callable[..., str]
) -> None:
    assert words in refused(*arguments)


@pytest.mark.parametrize(("data", "fetch"), [("mnist", "mnist"), ("house", "house_prices")])
def test_data_without_a_folder_is_fetched_and_without_a_network_said_to_be_missing(
    data: str, fetch: str, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def no_network() -> Path:
        asked.append(fetch)
        raise ConnectionError("no answer; give the folder")

    monkeypatch.setattr(f"immunize_ext.probing.data.problem.fetch_{fetch}", no_network)
    assert "give the folder with --data-dir" in refused("kappa", "--data", data)
    assert asked == [fetch]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("metod: whitening", "did you mean method"),
        ("seed: many", "seed must be an integer"),
        ("- a\n- b", "must hold names with values"),
        ("primary: 4:9", "harmful must name a task"),
        ("a: [", "must be a YAML file"),
        ("!!python/object/apply:os.getcwd []", "must be a YAML file"),
        ("method: null", "method must be a text"),
    ],
)
def test_bad_config_files(
    text: str, words: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    assert words in refused("kappa", "--config", "bad.yaml")


def test_an_existing_run_is_refused_before_any_work(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kappa", "--out", str(finished)]) == 2
    assert "--force" in capsys.readouterr().err


def test_unfinished_and_foreign_results_are_named(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    for name, text in (("json", "{"), ("kind", '{"kind": "other"}'), ("list", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(text)
    assert "must be JSON" in refused("report", "json")
    assert "must be of kind kappa" in refused("attack", "kind")
    assert "must be of kind kappa" in refused("report", "list")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    assert "not finished" in refused("report", "sweep")


def test_threads_are_put_back(finished: Path) -> None:
    before = torch.get_num_threads()
    assert main(["attack", str(finished), "--attacks", "whitened", "--quiet"]) == 0
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"base_budget": "x"}, "base_budget must be an integer, got 'x'"),
        ({"seed": "1"}, "seed must be an integer, got '1'"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
        ({"data": 3}, "data must be a text, got 3"),
        ({"method": "whitning"}, "method: whitning is no method; did you mean whitening"),
        ({"compare": ("whitning",)}, "compare: whitning is no method"),
        ({"attacks": ("nestrov",)}, "attacks: nestrov is no attack; did you mean nesterov"),
        ({"attack_settings": {"all": {}}}, "attacks: all is no attack"),
        ({"rank_rtol": 1.0}, "rank_rtol must be at least 0 and below 1, got 1.0"),
    ],
)
def test_settings_built_in_python_are_checked_at_once(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r"must|no ") as caught:
        probing.RunSettings(**values)
    assert str(caught.value).startswith(words)


def test_the_rank_tolerance_reaches_the_rank_aware_condition_numbers(features: Path) -> None:
    settings = probing.RunSettings(data=str(features), primary="0:1", harmful=("0:2",))
    # One feature is a copy of another, but for rounding in float32.
    values = dict(np.load(features))
    values["x"] = np.c_[values["x"], values["x"][:, :1].astype(np.float32) * np.float32(1 / 3)]
    np.savez(features.with_name("copied.npz"), **values)
    settings = replace(settings, data=str(features.with_name("copied.npz")))
    ranks = {
        tolerance: probing.measure_point(replace(settings, rank_rtol=tolerance))[
            "condition_numbers"
        ]["rank_aware"]["rank_harmful"][0]
        for tolerance in (None, 6 * 1.2e-7)
    }
    assert ranks == {None: 6, 6 * 1.2e-7: 5}


def test_settings_of_attacks_and_sweeps_are_checked_at_once() -> None:
    with pytest.raises(ValueError, match="methods: whitning is no method"):
        probing.SweepSettings(methods=("whitning",))
    with pytest.raises(ValueError, match="attacks: nestrov is no attack"):
        probing.AttackSettings(attacks=("nestrov",))
    with pytest.raises(ValueError, match="budgets must be a list, each an integer"):
        probing.AttackSettings(budgets=("3",))  # type: ignore[arg-type]
