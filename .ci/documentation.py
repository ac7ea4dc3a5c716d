"""The documentation site: gather the pages, write those of the API, build strictly.

    python .ci/documentation.py [--out build/site]

It is also a hook of mkdocs, which turns the roles of docstrings into plain code.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "build" / "pages"

# A page of the API for each entry: what it is called, and the modules on it.
API = {
    "ops": ("Operators", ["ops"]),
    "regularizers": ("Regularizers and erasure", ["ops.regularizers", "ops.erasure"]),
    "bilevel": ("Hypergradients", ["bilevel"]),
    "probing": (
        "Features",
        [
            "probing.run",
            "probing.data",
            "probing.immunizers",
            "probing.attacks",
            "probing.evaluation",
            "probing.metrics",
            "probing.certificates",
            "probing.extractors",
            "probing.transformer",
        ],
    ),
    "text_to_image": (
        "Text-to-image models",
        [
            "text_to_image.run",
            "text_to_image.settings",
            "text_to_image.model",
            "text_to_image.concepts",
            "text_to_image.immunizers",
            "text_to_image.attacks",
            "text_to_image.evaluation",
            "text_to_image.metrics",
            "text_to_image.text_layers",
            "text_to_image.weight_edit",
        ],
    ),
    "callbacks": (
        "Training loops of others",
        ["callbacks.features", "callbacks.transformers", "callbacks.lightning"],
    ),
    "testing": ("Tests of your own", ["testing"]),
    "settings": (
        "Settings and runs",
        ["seams", "settings", "sweep", "schedulers", "runtime", "hub", "errors"],
    ),
}

_LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")
_PAGE = re.compile(r'href="(\.\./[^":]*)\.md"')
_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc):<code>~?([^<]*)</code>")


def gather() -> None:
    """Put the pages of the repository where mkdocs looks, at the places they have."""
    shutil.rmtree(PAGES, ignore_errors=True)
    found = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
    found += sorted(ROOT.glob("docs/notebooks/*.ipynb"))
    seen: set[Path] = set()
    while found:
        page = found.pop()
        if page in seen or not page.is_file():
            continue
        seen.add(page)
        target = PAGES / page.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(page, target)
        if page.suffix == ".md":
            links = _LINK.findall(page.read_text(encoding="utf-8"))
            found += [(page.parent / link).resolve() for link in links]
    for name in ("CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "SECURITY.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, PAGES / name)


def write_api() -> None:
    """One page for each part of the API, which mkdocstrings fills from the docstrings."""
    for name, (title, modules) in API.items():
        page = PAGES / "api" / f"{name}.md"
        page.parent.mkdir(parents=True, exist_ok=True)
        blocks = "\n".join(f"::: immunize_ext.{module}\n" for module in modules)
        page.write_text(f"# {title}\n\n{blocks}", encoding="utf-8")


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Roles of docstrings (``:func:`~package.name```) as the name alone; links of notebooks."""
    if page.file.src_uri.endswith(".ipynb"):
        html = _PAGE.sub(r'href="\1.html"', html)  # mkdocs itself does those of Markdown alone
    return _ROLE.sub(lambda role: f"<code>{role[1].rpartition('.')[2] or role[1]}</code>", html)


def main() -> None:
    """Gather, write, build."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "site", metavar="DIR")
    out = parser.parse_args().out.resolve()
    gather()
    write_api()
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", out]
    subprocess.run([str(word) for word in command], cwd=ROOT, check=True)
    pages = sum(1 for _ in out.rglob("*.html"))
    print(f"{out}: {pages} pages")


if __name__ == "__main__":
    main()
