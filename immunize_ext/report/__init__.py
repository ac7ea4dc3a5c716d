"""Pages, tables and plots, drawn from results.json alone; knows no model and measures nothing."""

from __future__ import annotations

from immunize_ext.report.page import Page, Panel, check_extras, register, render, write

__all__ = ["Page", "Panel", "check_extras", "register", "render", "write"]
