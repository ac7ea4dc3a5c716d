"""Pages of every kind and schema: drawn from results alone, whole, and of text that stays text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from page_parser import ParsedPage
from saved_results import SAVED, saved

from immunize_ext import report
from immunize_ext._extras import MissingExtraError
from immunize_ext.report.page import Page, page_of
from immunize_ext.storage import migrate

# Breaks out of text, of an attribute and of mathematics in a plot, where it is not escaped.
ATTACK = "\"'><script>alert(1)</script><img src=x onerror=alert(1)> $x_{ & {{ 7 * 7 }}"


# What the code asks for by name: these are no text of anybody's.
STRUCTURE = {
    *("kappa", "kappa-sweep", "kappa-comparison", "mima", "mima-sweep", "demo"),
    *("harmful", "primary", "target", "control", "new_word", "joint", "inf", "-inf"),
    *("gradient_descent", "loss_ascent", "unprotected", "immunized"),
    *("ridge", "official", "rank_aware", "worst", "worst_stepwise", "image/png", "image/jpeg"),
}


# Names that stand as keys in results and as text in pages.
NAMES = {
    *("conjugate_gradients", "whitened", "adam", "three", "five", "eight", "six", "seven"),
    *("lora", "kv_fine_tuning", "full_fine_tuning", "accuracy", "closed-form"),
    *("closed-form, c = 3", "condition-number"),
}


def poisoned(value: Any, key: str = "") -> Any:
    """Results in which every name and every text attacks the page."""
    if isinstance(value, dict):
        return {(k + ATTACK if k in NAMES else k): poisoned(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [poisoned(item, key) for item in value]
    if isinstance(value, str) and value not in STRUCTURE and key not in ("base64", "media"):
        return value + ATTACK
    return value


@pytest.mark.parametrize(("schema", "kind"), SAVED)
def test_results_of_every_schema_have_a_page(schema: int, kind: str) -> None:
    text = report.render(saved(kind, schema))
    page = ParsedPage(text)
    page.check()
    # As the commands read them, too.
    assert report.render(migrate(saved(kind, schema))) == text
    assert "not defined" not in page.text
    assert page.text.count("Before you quote these numbers") <= 2


def test_all_kinds_are_kept() -> None:
    kinds = {kind for schema, kind in SAVED if schema == 1}
    assert kinds == {"kappa", "kappa-sweep", "kappa-comparison", "mima", "mima-sweep", "demo"}


@pytest.mark.parametrize(("schema", "kind"), SAVED)
def test_names_are_text(schema: int, kind: str) -> None:
    text = report.render(poisoned(saved(kind, schema)))
    page = ParsedPage(text)
    page.check()
    # It stands there as it was given, and nothing in it was worked out.
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert text.count("<img ") == text.count('<img src="data:image/')


def test_demo_of_this_schema_holds_both_pages() -> None:
    results = {"schema": 2, "kind": "demo", "kappa": saved("kappa"), "mima": saved("mima")}
    page = ParsedPage(report.render(results))
    page.check()
    assert {"text-to-image", "features"} <= set(page.identifiers)
    alone = ParsedPage(report.render({k: v for k, v in results.items() if k != "mima"}))
    assert "text-to-image" not in alone.identifiers
    assert "1 job, 1 measurement" in alone.text


def test_page_adapts_to_phone_and_dark_mode() -> None:
    text = report.render(saved("kappa"))
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    # No colour of a plot is fixed.
    svg = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert "var(--harmful)" in svg
    assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) == set()
    # Axes in powers of ten are written out: no mathematics is left in the text.
    assert "mathdefault" not in svg


@pytest.mark.parametrize("kind", ["kappa", "mima", "kappa-comparison", "kappa-sweep"])
def test_every_plot_has_its_sentence(kind: str) -> None:
    text = report.render(saved(kind))
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text, flags=re.DOTALL)
    assert len(captions) == text.count("<figure>") > 0
    assert all(caption.strip() for caption in captions)
    assert text.count('<svg role="img" aria-label="') == text.count("<svg ")


def test_written_whole(tmp_path: Path) -> None:
    report.write(saved("kappa"), tmp_path)
    names = ["accuracy.png", "convergence.png", "report.html", "spectra.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / "report.html").read_text() == report.render(saved("kappa"))
    for name in names:
        if name.endswith(".png"):
            assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_registered_kind_has_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("immunize_ext.report.page._makers", {})

    @report.register("weather")
    def page(results: Any) -> Page:
        return Page(results["city"], "plain.html.j2", {"facts": {"mean_rain": results["rain"]}})

    text = report.render({"kind": "weather", "city": "<Basel>", "rain": 2.5})
    assert "<h1>&lt;Basel&gt;</h1>" in text
    assert "mean rain" in text


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match=r"render: kind must be one of kappa, .*, got 'cake'"):
        report.render({"kind": "cake"})


def test_a_context_that_lacks_something_is_an_error() -> None:
    page = page_of(saved("kappa"))
    lacking = Page(page.title, page.template, {})
    with pytest.raises(Exception, match="is undefined"):
        report.page._document(lacking)


def test_drawing_leaves_matplotlib_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    first, again = report.render(saved("kappa")), report.render(saved("kappa"))
    assert dict(matplotlib.rcParams) == before
    assert first == again


def test_missing_packages_are_named_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("immunize_ext._extras.importlib.import_module", missing)
    with pytest.raises(MissingExtraError, match=r"pip install 'immunize_ext\[report\]'"):
        report.check_extras()
    with pytest.raises(MissingExtraError, match=r"pip install 'immunize_ext\[report\]'"):
        report.write(saved("kappa"), tmp_path)
    assert list(tmp_path.iterdir()) == []
