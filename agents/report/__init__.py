"""Self-contained pages that say what a run was worth, for somebody who has seen nothing else."""

from __future__ import annotations

from agents.report.comparison import write_comparison
from agents.report.live import LiveReport
from agents.report.page import write_report
from agents.report.rebuild import rebuild

__all__ = ["LiveReport", "rebuild", "write_comparison", "write_report"]
