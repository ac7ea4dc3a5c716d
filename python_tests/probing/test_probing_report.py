"""Reports: complete run directories, honest sentences, a page that stands alone."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from immunize_ext.probing.tmp_write import write_run

from immunize_ext._extras import MissingExtraError
from immunize_ext.probing.attacks import AttackComparison, AttackCurve
from immunize_ext.probing.data import Task
from immunize_ext.probing.evaluation import Evaluation, evaluate, log_spaced_steps
from immunize_ext.probing.immunizers import ClosedFormImmunizer, ConditionNumberImmunizer, Immunized
from immunize_ext.probing.metrics import RelativeImmunizationRatio
from immunize_ext.probing.report import describe_attack, headline, render_html, times
from immunize_ext.quantities import Slowdown
from immunize_ext.storage import check_target, run_directory, to_json


def task(seed: int, *, labels: bool = True, n: int = 80, p: int = 5) -> Task:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.linspace(0.3, 3.0, p, dtype=torch.float64)
    whitened = torch.randn(n, p, dtype=torch.float64, generator=generator)
    x = whitened * (scales if seed % 2 else scales.flip(0))
    y = whitened.sum(-1) + 0.3 * torch.randn(n, dtype=torch.float64, generator=generator)
    y = y.sign() if labels else y
    # A name that would break the page if it were not escaped.
    return Task(f"task <{seed}> & more", x[:50], y[:50], x[50:], y[50:])


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    primary, harmful = task(1), task(2)
    immunized = ClosedFormImmunizer(strength=10.0).fit(primary, harmful)
    return evaluate(immunized, primary, harmful, base_budget=200, limit=16.0)


def replaced(evaluation: Evaluation, **slowdowns: Slowdown) -> Evaluation:
    """The same evaluation with other slow-downs of gradient descent, by role."""
    comparisons = {role: dict(found) for role, found in evaluation.comparisons.items()}
    for role, slowdown in slowdowns.items():
        old = comparisons[role]["gradient_descent"]
        comparisons[role]["gradient_descent"] = AttackComparison(
            **{**vars(old), "slowdown": slowdown}
        )
    return Evaluation(**{**vars(evaluation), "comparisons": comparisons})


# --- measurements -------------------------------------------------------------------------------


def test_results_hold_what_a_report_needs(evaluation: Evaluation) -> None:
    results = evaluation.results()
    assert results["method"] == "closed_form"
    assert set(results["rir"]) == {"official", "ridge", "rank_aware"}
    assert results["rir"]["ridge"] == pytest.approx(results["i"] / results["ii"])
    assert results["ceiling"] == pytest.approx(results["rir"]["ridge"], rel=1e-6)
    assert results["share_of_ceiling"] == pytest.approx(1.0, rel=1e-6)
    for role in ("harmful", "primary"):
        assert results["slowdown"][role]["whitened"] == 1.0
        assert results["slowdown"][role]["closed_form_ridge"] == 1.0
    assert results["config"]["strength"] == 10.0
    assert {"torch", "compiled_operators", "python"} <= set(results["environment"])


def test_evaluation_on_each_device(device: torch.device) -> None:
    primary, harmful = task(1).to(device), task(2).to(device)
    for immunizer in (
        ClosedFormImmunizer(strength=10.0),
        ConditionNumberImmunizer(steps=3, preconditioner="explicit"),
    ):
        immunized = immunizer.fit(primary, harmful)
        assert immunized.theta.device.type == device.type
        found = evaluate(immunized, primary, harmful, base_budget=50, limit=2.0)
        assert found.results()["environment"]["device"].startswith(device.type)
        assert found.comparisons["harmful"]["whitened"].slowdown == (1.0, False)


def test_metrics_rows_follow_the_curves(evaluation: Evaluation) -> None:
    rows = evaluation.metrics()
    assert [row["step"] for row in rows if row["kind"] == "immunize"] == [0.0, 1.0]
    curve = evaluation.comparisons["harmful"]["gradient_descent"].immunized
    mine = [
        row
        for row in rows
        if row["kind"] == "attack"
        and (row["role"], row["attacker"], row["immunized"])
        == ("harmful", "gradient_descent", True)
    ]
    assert mine[0]["step"] == 0
    assert mine[-1]["step"] == curve.steps
    for row in mine:
        assert row["test_loss"] == float(curve.test_loss[row["step"]])


def test_warnings_name_what_is_wrong(evaluation: Evaluation) -> None:
    same = replaced(evaluation, harmful=Slowdown(1.0, False))
    assert any("does not work" in text for text in same.warnings())
    costly = replaced(evaluation, primary=Slowdown(3.0, False))
    assert any("primary task is slowed as well (3.0x" in text for text in costly.warnings())
    few = evaluation.tasks["harmful"]
    short = Task(few.name, few.x_train[:3], few.y_train[:3], few.x_test, few.y_test)
    scarce = Evaluation(
        **{
            **vars(evaluation),
            "tasks": {**evaluation.tasks, "harmful": short},
            "ceiling_growth": 50.0,
        }
    )
    assert any("fewer training samples (3) than features (5)" in t for t in scarce.warnings())
    assert any("grows 50 times" in text for text in scarce.warnings())


def test_warning_when_rir_is_high_for_the_wrong_reason(evaluation: Evaluation) -> None:
    # kappa_H fell by e, kappa_P by e^3: RIR is e^2.
    ratio = RelativeImmunizationRatio("ridge", 1e-2, 2.0, 3.0, 1.0, 4.0, 5, 5, 5, 5)
    easier = Evaluation(**{**vars(evaluation), "rir": {**evaluation.rir, "ridge": ratio}})
    assert any("although RIR is 7.39" in text for text in easier.warnings())


def test_log_spaced_steps() -> None:
    assert log_spaced_steps(0, 5) == [0]
    steps = log_spaced_steps(1000, 20)
    assert steps[0] == 0
    assert steps[-1] == 1000
    assert steps == sorted(set(steps))


# --- words --------------------------------------------------------------------------------------


def comparison(base_steps: int, steps: int | None, ratio: float) -> AttackComparison:
    curve = AttackCurve("gradient_descent", torch.ones(1281), torch.ones(1281), None, torch.ones(1))
    result = Slowdown(ratio, steps is None)
    return AttackComparison("gradient_descent", "t", 0.1, base_steps, steps, result, curve, curve)


@pytest.mark.parametrize(
    ("base_steps", "steps", "ratio", "sentence"),
    [
        (10, 345, 34.5, "34 times slower: 345 steps instead of 10."),
        (10, 25, 2.5, "2.5 times slower: 25 steps instead of 10."),
        (10, 10, 1.0, "Not slowed at all: 10 steps, 10 before."),
        (1, 1, 1.0, "Not slowed at all: 1 step, 1 before."),
        (100, 50, 0.5, "2.0 times faster: 50 steps instead of 100."),
        (
            10,
            None,
            128.0,
            "Not there after 1,280 steps: more than 128 times the 10 steps it took before.",
        ),
    ],
)
def test_sentences(base_steps: int, steps: int | None, ratio: float, sentence: str) -> None:
    assert describe_attack(comparison(base_steps, steps, ratio)) == sentence


def test_headline_is_no_better_than_the_numbers(evaluation: Evaluation) -> None:
    expected = {
        (30.0, 1.0): "Slower to misuse, not locked",
        (1.5, 1.0): "Slightly slower to misuse",
        (1.0, 1.0): "No protection on these tasks",
        (0.5, 0.1): "No protection on these tasks",
        (30.0, 4.0): "Slower to misuse, and slower to use",
    }
    for (harm, cost), words in expected.items():
        found = replaced(evaluation, harmful=Slowdown(harm, False), primary=Slowdown(cost, False))
        assert headline(found) == words
    censored = replaced(evaluation, harmful=Slowdown(1.0, True), primary=Slowdown(0.9, False))
    assert headline(censored) == "Slower to misuse, not locked"
    assert times(Slowdown(128.0, True)) == ">128×"


# --- run directories ----------------------------------------------------------------------------


def test_run_directory_is_complete(evaluation: Evaluation, tmp_path: Path) -> None:
    target = tmp_path / "runs" / "first"
    assert write_run(evaluation, target, extra={"seconds": {"total": 1.0}}) == target
    assert sorted(path.name for path in target.iterdir()) == [
        "accuracy.png",
        "convergence.png",
        "immunized.safetensors",
        "metrics.jsonl",
        "report.html",
        "results.json",
        "spectra.png",
    ]
    assert [path.name for path in target.parent.iterdir()] == ["first"]
    results = json.loads((target / "results.json").read_text())
    assert results["seconds"] == {"total": 1.0}
    for line in (target / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    for name in ("accuracy", "convergence", "spectra"):
        assert (target / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    again = Immunized.load(target / "immunized.safetensors")
    assert torch.equal(again.theta, evaluation.immunized.theta)


def test_regression_has_no_accuracy_plot(tmp_path: Path) -> None:
    primary, harmful = task(1, labels=False), task(2, labels=False)
    immunized = ClosedFormImmunizer(strength=5.0).fit(primary, harmful)
    found = evaluate(immunized, primary, harmful, base_budget=100, limit=4.0)
    target = write_run(found, tmp_path / "run")
    assert not (target / "accuracy.png").exists()
    assert "Right answers" not in (target / "report.html").read_text()


def test_failure_leaves_nothing(
    evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("immunize_ext.probing.tmp_write.write_json_lines", fail)
    with pytest.raises(OSError, match="disk full"):
        write_run(evaluation, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_interruption_keeps_the_old_run(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "run"

    def write(text: str, raised: type[BaseException] | None = None) -> None:
        with run_directory(target, force=True) as writing:
            (writing / "results.json").write_text(text)
            if raised is not None:
                raise raised

    write("old")
    with pytest.raises(error):
        write("new", error)
    assert (target / "results.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_force_replaces_all_of_the_old_run(tmp_path: Path) -> None:
    target = tmp_path / "run"
    for name in ("old", "new"):
        with run_directory(target, force=True) as writing:
            (writing / "results.json").write_text(name)
            (writing / f"{name}.png").write_text("")
    assert sorted(path.name for path in target.iterdir()) == ["new.png", "results.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_existing_run_is_refused_without_force(tmp_path: Path) -> None:
    target = tmp_path / "run"
    target.mkdir()
    with pytest.raises(FileExistsError, match=r"exists; choose another folder, or .*--force"):
        check_target(target, force=False)
    check_target(target, force=True)  # empty: nothing to lose


def test_force_never_deletes_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    for name in ("photos", "file", "link"):
        with pytest.raises(FileExistsError, match="is not a run directory"):
            check_target(tmp_path / name, force=True)


def test_run_directory_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "ordinary").mkdir()
    with run_directory(tmp_path / "run") as writing:
        (writing / "results.json").write_text("")
    assert (tmp_path / "run").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_json_is_strict() -> None:
    value = {"a": [math.inf, -math.inf, math.nan, 1.0], 2: (True, None)}
    assert to_json(value) == {"a": ["inf", "-inf", None, 1.0], "2": [True, None]}
    json.dumps(to_json(value), allow_nan=False)


# --- the page -----------------------------------------------------------------------------------


class Page(HTMLParser):
    """Collects what a page refers to, its identifiers and its visible text."""

    VOID = ("meta", "link", "img", "br", "hr", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.identifiers: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self._attributes(attributes)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._attributes(attributes)

    def _attributes(self, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("href", "src", "xlink:href"):
                self.references.append(value or "")
            if name == "id":
                self.identifiers.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(text)


@pytest.fixture(scope="module")
def page_text(evaluation: Evaluation) -> str:
    from immunize_ext.probing.plots import draw_svg

    results = {
        **evaluation.results(),
        "notes": ["a <note>"],
        "alternatives": [
            {
                "name": "Other & co",
                "rir": 1234567.0,
                "share_of_ceiling": 0.5,
                "harmful": [128.0, True],
                "primary": [0.5, False],
            }
        ],
    }
    return render_html(evaluation, results, draw_svg(evaluation))


def test_page_is_well_formed_and_stands_alone(page_text: str) -> None:
    page = Page(page_text)
    assert page.open == []
    assert "script" not in page.tags
    # References only within the page, to identifiers that exist and are unique.
    assert all(reference.startswith("#") for reference in page.references)
    assert {reference[1:] for reference in page.references} <= set(page.identifiers)
    assert len(page.identifiers) == len(set(page.identifiers))
    for used in re.findall(r"url\(#([^)]*)\)", page_text):
        assert used in page.identifiers
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page_text)


def test_page_adapts_to_phone_and_dark_mode(page_text: str) -> None:
    assert 'name="viewport"' in page_text
    assert "prefers-color-scheme: dark" in page_text
    # No colour of a plot is fixed.
    svg = "".join(re.findall(r"<svg.*?</svg>", page_text, flags=re.DOTALL))
    assert "var(--harmful)" in svg
    assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) == set()


def test_page_says_it_all(page_text: str) -> None:
    text = " ".join("".join(Page(page_text).words).split())
    for words in (
        "What was protected",
        "Against whom",
        "At what cost",
        "whitens the features first, or solves for the head in closed form, is not slowed at all",
        "task <2> & more",  # escaped once, not twice
        "a <note>",
        "Other & co",
        "1.23·106",  # an exponent, as a superscript
        ">128×",
    ):
        assert words in text


def test_every_plot_has_its_sentence(page_text: str) -> None:
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page_text)
    assert len(captions) == page_text.count("<figure>") == 12
    assert all(caption.strip() for caption in captions)
    assert sum("Not slowed at all" in caption for caption in captions) >= 2


def test_plots_leave_matplotlib_alone(evaluation: Evaluation) -> None:
    import matplotlib

    from immunize_ext.probing.plots import draw_svg

    before = dict(matplotlib.rcParams)
    first, again = draw_svg(evaluation), draw_svg(evaluation)
    assert dict(matplotlib.rcParams) == before
    assert first == again


def test_missing_matplotlib_is_named(
    evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name="matplotlib")

    monkeypatch.setattr("immunize_ext._extras.importlib.import_module", missing)
    with pytest.raises(MissingExtraError, match=r"pip install 'immunize_ext\[report\]'"):
        write_run(evaluation, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
