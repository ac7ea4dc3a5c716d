"""What results show of themselves in a notebook: the verdict and who gets through, as a table."""

import numpy as np
import pytest

from immunize_ext._extras import MissingExtraError
from immunize_ext.probing import METHODS, Problem, Task, evaluate
from immunize_ext.probing.certificates import certify
from immunize_ext.report import page
from immunize_ext.seams import AttackCurve
from immunize_ext.text_to_image.evaluation import Comparison, TextToImageEvaluation

pytest.importorskip("jinja2")


def task(seed: int) -> Task:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(60, 5)) * np.linspace(0.5, 2.0, 5)
    return Task.of((x, np.sign(x @ rng.normal(size=5))), f"<task {seed}>")


def attacked_pipeline() -> TextToImageEvaluation:
    def curve(scores: list[float]) -> AttackCurve:
        config = {"steps": 20, "trained_parameters": 1}
        return AttackCurve("lora", "three", [0, 20], {"accuracy": scores}, config=config)

    curves = {"unprotected": (curve([0.0, 0.875]),), "immunized": (curve([0.0, 0.125]),)}
    compared = Comparison("lora", "three", "target", curves)
    names, shares = ("lora",), ("accuracy",)
    return TextToImageEvaluation(
        names, ("three",), ("accuracy",), (0,), 0.8, (compared,), {}, {}, 8, shares
    )


def test_an_evaluation_shows_its_verdict_and_every_attacker() -> None:
    keep, harm = task(0), task(1)
    immunized = METHODS["closed-form"].fit(None, Problem.of(keep, harm))
    found = evaluate(immunized, keep, harm, base_budget=50, limit=4.0)
    shown = found._repr_html_()
    assert shown is not None
    assert shown.startswith("<p><b>")
    for attacker in found.attackers.values():
        assert f'<th scope="row">{attacker["label"]}</th>' in shown
    for text in found.warnings:
        assert text.split(";")[0].split("<")[0][:30] in shown


def test_a_certificate_shows_its_sentences() -> None:
    keep, harm = task(0), task(1)
    immunized = METHODS["closed-form"].fit(None, Problem.of(keep, harm))
    shown = certify(immunized, keep, harm, draws=1)._repr_html_()
    assert shown is not None
    assert "which is a theorem" in shown
    assert '<th scope="row">gradient descent</th>' in shown


def test_attacks_on_a_pipeline_show_both_models_at_every_step() -> None:
    shown = attacked_pipeline()._repr_html_()
    assert shown is not None
    assert '<th scope="row">LoRA, without</th>' in shown
    assert "<b>88%</b>" in shown
    assert "<b>12%</b>" in shown
    assert "<th>Accuracy after steps</th><th>0</th><th>20</th>" in shown


def test_names_are_text() -> None:
    shown = str(page.body(page.brief("<b>", "<i>", rows=[["<u>", "<s>"]], header=["<p>", "x"])))
    assert not any(tag in shown for tag in ("<i>", "<u>", "<s>", "<b><b>"))


def test_without_the_extra_the_repr_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise MissingExtraError("jinja2", extra="report", purpose="pages")

    monkeypatch.setattr(page, "require_extra", missing)
    page._environment.cache_clear()
    assert attacked_pipeline()._repr_html_() is None
