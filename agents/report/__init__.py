"""A self-contained page that says what a run was worth, for somebody who has seen nothing else."""

from __future__ import annotations

from agents.report.page import write_report

__all__ = ["write_report"]
