"""Every number in the tables of docs/mima.md comes from a committed result file."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
mima_page = pytest.importorskip("benchmarks.protection.mima_page")


def test_page_is_what_the_result_files_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["mima_page", "--check", str(ROOT / "docs" / "mima.md")])
    assert mima_page.main() == 0


def test_a_changed_number_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "mima.md").read_text(encoding="utf-8")
    changed = text.replace("| 0.99 (", "| 0.98 (", 1)
    assert changed != text
    page = tmp_path / "mima.md"
    page.write_text(changed, encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["mima_page", "--check", str(page)])
    assert mima_page.main() == 1
    monkeypatch.setattr("sys.argv", ["mima_page", "--write", str(page)])
    assert mima_page.main() == 0
    assert page.read_text(encoding="utf-8") == text
