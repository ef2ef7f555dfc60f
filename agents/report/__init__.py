"""Self-contained HTML reports of runs."""

from __future__ import annotations

from agents.report.pages import LiveReport, write_report, write_reports
from agents.report.sections import SECTIONS, Section

__all__ = ["SECTIONS", "LiveReport", "Section", "write_report", "write_reports"]
