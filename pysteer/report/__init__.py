"""Figures, image sheets and the self-contained HTML report of a run."""

from pysteer.report.figures import Bar, DoseCurve, DosePoint, control_bars, dose_response
from pysteer.report.report import Details, Facts, Figure, Paragraph, Report, Section, Table, render
from pysteer.report.sheets import Row, comparison_grid, labelled_rows, png

__all__ = [
    "Bar",
    "Details",
    "DoseCurve",
    "DosePoint",
    "Facts",
    "Figure",
    "Paragraph",
    "Report",
    "Row",
    "Section",
    "Table",
    "comparison_grid",
    "control_bars",
    "dose_response",
    "labelled_rows",
    "png",
    "render",
]
