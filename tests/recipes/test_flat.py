"""Tables of a summary as flat rows and as CSV."""

import csv
import io

from pysteer.recipes.flat import csv_text, flat_rows


def test_intervals_become_columns_and_formulas_text():
    rows = [
        {"method": "=cmd()", "rate": {"value": 0.5, "low": 0.25, "high": 0.75, "n": 4}, "kept": {"shape": 1.0}},
        {"method": 'a "b", c', "extra": None},
    ]
    flat = flat_rows(rows)
    assert flat[0] == {"method": "=cmd()", "rate": 0.5, "rate_low": 0.25, "rate_high": 0.75, "kept": '{"shape": 1.0}'}
    read = list(csv.DictReader(io.StringIO(csv_text(flat))))
    assert [row["method"] for row in read] == ["'=cmd()", 'a "b", c']
    assert read[0]["rate_low"] == "0.25"
    assert read[1]["rate"] == ""


def test_what_is_no_table_has_no_rows():
    assert flat_rows({"a": 1}) == []
    assert flat_rows([3]) == [{"value": 3}]
