"""The picture and the tables of the README say what the committed result files say."""

from __future__ import annotations

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

picture = pytest.importorskip("benchmarks.protection.picture")

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "docs" / "holds.svg"
SVG = "{http://www.w3.org/2000/svg}"


def section() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text.split("## What holds against whom")[1].split("\n## ")[0]


def mnist() -> list[dict[str, object]]:
    rows = picture.load("certificates")["rows"]
    return [row for row in rows if row["problem"].startswith("mnist")]


def test_the_committed_picture_is_what_the_result_files_say() -> None:
    assert COMMITTED.read_text(encoding="utf-8") == picture.drawn(), (
        "run: python -m benchmarks.protection.picture --write docs/holds.svg"
    )


def test_a_changed_number_is_found() -> None:
    found = picture.load("certificates")
    before = picture.features(found)
    for row in found["rows"]:
        row["samples_harm"] = float(row["samples_harm"]) * 1.5
    assert picture.features(found) != before

    counts, images, steps = picture.counts()
    panel = picture.text_to_image(counts, images, steps)
    for concept in counts["mima"]["lora"][0].values():
        concept["recognised"][-1] += images / 4
    assert picture.text_to_image(counts, images, steps) != panel


def test_it_can_be_read_without_being_seen_and_stays_within_its_frame() -> None:
    root = ElementTree.fromstring(COMMITTED.read_text(encoding="utf-8"))
    description = root.findtext(f"{SVG}desc") or ""
    width, height = (float(root.attrib[side]) for side in ("width", "height"))
    bars = [text.text or "" for text in root.iter(f"{SVG}text")]
    assert root.findtext(f"{SVG}title")
    assert all(
        number in description for number in bars if re.match(r"[\d.]+( times| right|$)", number)
    )
    for rectangle in root.iter(f"{SVG}rect"):
        at = {name: float(rectangle.get(name, 0)) for name in ("x", "y", "width", "height")}
        assert at["x"] + at["width"] <= width
        assert at["y"] + at["height"] <= height
    # Letters are 8 wide at most in the mean, in the widest usual font.
    for text in root.iter(f"{SVG}text"):
        x, length = float(text.attrib["x"]), 8 * len(text.text or "")
        left = width / 2 if x > width / 2 else 0.0
        if text.get("text-anchor") == "end":
            assert x - length > left + picture.NAME
        else:
            assert x + length < left + width / 2


def test_bars_are_long_where_much_is_lost_and_who_loses_nothing_gets_through() -> None:
    rows = [
        {"method": "lock", "price": "inf", "right": [0.9, 0.5]},
        {"method": "closed-form", "price": 10.0, "right": [0.9, 0.89]},
        {"method": "label-direction", "price": None, "right": [0.9, 0.9]},
    ]
    assert picture._price(rows, "lock", "price") == ("lock", 1.0, "not reached", "primary")
    assert picture._price(rows, "closed-form", "price").length == pytest.approx(1 / 3)
    assert picture._price(rows, "label-direction", "price").text == "nothing to learn"
    assert picture._loss(rows, "lock", "right")[1:] == (1.0, "0.50 right", "primary")
    through = picture._loss(rows, "closed-form", "right")
    assert through.length == pytest.approx(0.025)
    assert through.text.endswith("gets through")


def test_the_table_of_the_readme_is_what_the_result_file_says() -> None:
    lines = [line.strip("| ").split(" | ") for line in section().splitlines() if line[:1] == "|"]
    table = {cells[0].split()[0].strip("*"): cells[1:] for cells in lines}
    assert [cell.strip("`") for cell in table["attacker"]] == list(picture.METHODS)
    for column, method in enumerate(picture.METHODS):

        def median(key: str, place: int | None = None, method: str = method) -> float | None:
            return picture.median(mnist(), method, key, place)  # type: ignore[no-any-return]

        steps, samples = median("descent"), median("samples_harm")
        assert samples is not None
        wanted = {
            "descends:": "nothing" if steps is None else f"{steps:.0f}x",
            "few": "not" if math.isinf(samples) else f"{samples:.1f}x",
            "whitens": f"{median('r2_harm', 1):.2f}",
            "Gaussian": f"{median('kernel_harm', 1):.2f}",
            "owner": f"{median('samples_own'):.1f}x, {median('accuracy_own', 1):.2f}",
        }
        for attacker, start in wanted.items():
            assert table[attacker][column].startswith(start), (attacker, method)


def test_the_words_of_the_readme_are_what_the_result_file_says() -> None:
    counts, images, _ = picture.counts()
    shares = {
        (model, attack): f"{picture.share(runs, images):.2f}"
        for model, attacks in counts.items()
        for attack, runs in attacks.items()
    }
    said = re.findall(r"\b[01]\.\d\d\b", section()[section().index("Text-to-image") :])
    assert set(said) <= set(shares.values())
    for attack in ("lora", "lora:unrelated_word"):
        assert {shares["mima", attack], shares["erased", attack]} <= set(said)
