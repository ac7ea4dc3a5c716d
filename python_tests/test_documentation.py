"""Every Python example of the README, CONTRIBUTING and docs/ runs as it is printed.

A file's ``python`` blocks run one after the other in one namespace, as a reader would type them,
in an empty folder. Examples of another kind carry another word after the backticks.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
FILES = [
    path
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
    if path.exists() and "```python\n" in path.read_text(encoding="utf-8")
]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = path.read_text(encoding="utf-8")
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        # Blank lines in front, so that a traceback names the line of the document.
        lines_before = text.count("\n", 0, block.start(1))
        code = compile("\n" * lines_before + block.group(1), str(path), "exec")
        exec(code, namespace)


def test_the_readme_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    text = README.read_text(encoding="utf-8")
    block = BLOCK.search(text)
    assert block is not None
    said = re.match(r"\n\n```text\n(.*?)^```$", text[block.end() :], re.MULTILINE | re.DOTALL)
    assert said is not None
    exec(block.group(1), {"__name__": "__main__"})
    assert capsys.readouterr().out == said.group(1)


def test_speeds_of_the_readme_are_those_that_were_measured() -> None:
    rows = re.findall(r"^\| (.+) \| ([\d.]+) ms \|(.*)$", README.read_text(), re.MULTILINE)
    measured = [line.split("|") for line in (ROOT / "docs" / "speed.md").read_text().splitlines()]
    assert len(rows) == 4
    for name, milliseconds, others in rows:
        found = [
            [cell.strip().rstrip("x") for cell in cells[3:5]]
            for cells in measured
            if len(cells) > 4 and cells[2].strip() == milliseconds
        ]
        assert re.findall(r"([\d.]+) times", others) in found, name


def test_the_site_has_every_page() -> None:
    listed = re.findall(r"(\S+\.(?:md|ipynb))$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    found = (*ROOT.glob("docs/*.md"), *ROOT.glob("docs/notebooks/*.ipynb"))
    pages = {str(path.relative_to(ROOT)) for path in found}
    assert pages <= set(listed)
    missing = [
        page for page in listed if not page.startswith("api/") and not (ROOT / page).is_file()
    ]
    assert missing == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_fence_is_closed(path: Path) -> None:
    fences = re.findall(r"^```", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(fences) % 2 == 0
