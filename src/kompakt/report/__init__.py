"""Reports: tables for the terminal and one self-contained HTML page for a person."""

from kompakt.report.frontier import candidate_table
from kompakt.report.page import build_report, rebuild
from kompakt.report.tables import layer_table, stage_table, summary_table

__all__ = ["build_report", "candidate_table", "layer_table", "rebuild", "stage_table", "summary_table"]
