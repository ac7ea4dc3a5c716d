"""Pages, tables and plots, drawn from results.json alone; knows no model and measures nothing."""

from __future__ import annotations

from typing import Any

from immunize_ext._moved import look_up
from immunize_ext.report.page import (
    Page,
    Panel,
    check_extras,
    register,
    render,
    write,
    write_record,
)

__all__ = ["Page", "Panel", "check_extras", "register", "render", "write", "write_record"]


def __getattr__(name: str) -> Any:
    return look_up(__name__, name)  # what stood here before
