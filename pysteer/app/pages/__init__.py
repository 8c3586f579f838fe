"""What each page shows: from a query to the facts its template takes."""

from pysteer.app.pages.curves import curves_page
from pysteer.app.pages.features import features_page
from pysteer.app.pages.grid import grid_page
from pysteer.app.pages.live import live_action, live_page
from pysteer.app.pages.query import Query
from pysteer.app.pages.research import dynamics_page, weights_page
from pysteer.app.pages.rows import rows_csv, rows_page
from pysteer.app.pages.runs import compare_page, run_page, runs_page

__all__ = [
    "Query",
    "compare_page",
    "curves_page",
    "dynamics_page",
    "features_page",
    "grid_page",
    "live_action",
    "live_page",
    "rows_csv",
    "rows_page",
    "run_page",
    "runs_page",
    "weights_page",
]
