"""The roofline page: what it measures runs, and the committed page is what its JSON says."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
roofline = pytest.importorskip("benchmarks.roofline")


@pytest.fixture(scope="module")
def found():
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(roofline, "refuse_fallback", lambda what, device: None)
    yield roofline.measure(quick=True, threads=1)
    monkeypatch.undo()


def test_every_work_is_timed_and_has_a_roof(found):
    assert len(found["rows"]) == len({row["name"] for row in found["rows"]}) >= 10
    for row in found["rows"]:
        assert 0 < row["q25"] <= row["seconds"] <= row["q75"]
        least = row["operations"] / found["peaks"][row["peak"]]
        assert row["roof"] == max(least, row["bytes"] / found["bandwidth"])
        assert row["name"] in roofline.page(found)


def test_the_counts_are_those_of_the_products():
    works = {work.name: work for work in roofline._features(3, 4, 10, roofline.torch.float32)}
    forward = works["R_ill, 3 of 4 x 10, float32, forward"]
    # Half of a symmetric product, 2 n^2 p / 2 a matrix, and the tridiagonal form.
    assert forward.operations == pytest.approx(3 * (4 * 4 * 10 + 4 / 3 * 4**3))
    assert forward.bytes == 3 * 4 * 10 * 4
    backward = works["R_ill, 3 of 4 x 10, float32, backward"]
    assert backward.bytes == 2 * forward.bytes


def test_the_page_is_what_the_results_say():
    file = ROOT / "benchmarks" / "results" / roofline.FILE
    if not file.is_file():
        pytest.skip("no results are here, as in an installed package")
    assert roofline.main(["--check", str(ROOT / "docs" / "roofline.md")]) == 0
