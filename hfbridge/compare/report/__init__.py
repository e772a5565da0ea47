"""A page and figures of a recorded comparison."""

from hfbridge.compare.report.page import write_report

__all__ = ["write_report"]
