"""The table's own rules: what a bar means, what is written, and what a command returns."""

import json

from tests.benchmarks.report import Row, publish


def test_a_bar_is_a_least_or_a_most_and_a_row_without_one_is_a_result():
    assert Row("a", 2.0, "x").ok
    assert Row("a", 2.0, "x", bar=2.0).ok
    assert not Row("a", 1.9, "x", bar=2.0).ok
    assert Row("a", 1.9, "x", bar=2.0, is_limit=True).ok
    assert not Row("a", float("nan"), "x", bar=2.0).ok


def test_the_same_rows_are_shown_and_written_and_a_missed_bar_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [Row("speed", 12345.6, "tokens/s"), Row("ratio", 0.5, "x", bar=1.0)]
    assert publish("toy", rows, kind="faults", rounds=3) == 1
    shown = capsys.readouterr().out
    assert "12,346 tokens/s" in shown
    assert ">= 1 MISSED" in shown
    written = json.loads((tmp_path / "build/faults/toy.json").read_text())
    assert written["config"] == {"rounds": 3}
    assert {"machine", "commit", "rows"} <= set(written)
    assert [(r["name"], r["value"], r["bar"], r["ok"]) for r in written["rows"]] == [
        ("speed", 12345.6, None, True),
        ("ratio", 0.5, 1.0, False),
    ]
    assert publish("toy", rows[:1]) == 0
