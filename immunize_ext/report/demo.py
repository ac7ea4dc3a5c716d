"""The page of the demo: the pages of its runs in one document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from immunize_ext.report.page import Page, body, page_of, register

_PARTS = {
    "mima": (
        "text-to-image",
        "a text-to-image model that is hard to teach erased concepts again",
    ),
    "kappa": ("features", "features from which one task is slow to learn while another stays fast"),
}


def runs_of(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The results of the demo's runs by kind, of any schema.

    Args:
        results: Content of ``results.json``. Schema 1 has no kind in its parts, and keeps what is
            not measured of the text-to-image run apart.
    """
    found = {kind: results[kind] for kind in _PARTS if kind in results}
    if "mima_run" in results:
        found["mima"] = {**results["mima_run"], "mima": results["mima"]}
    return {kind: {**run, "kind": kind} for kind, run in found.items()}


@register("demo")
def page(results: Mapping[str, Any]) -> Page:
    """The page of both runs."""
    parts = []
    for kind, run in runs_of(results).items():
        identifier, words = _PARTS[kind]
        one = page_of(run)
        parts.append({"id": identifier, "words": words, "body": body(one, identifier=identifier)})
    return Page("Two immunizations, attacked", "demo.html.j2", {"parts": parts})
