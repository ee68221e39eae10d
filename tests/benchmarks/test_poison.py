"""The verdict on poison rows finds each thing that may be wrong."""

import json

import pytest

from tests.benchmarks.poison import judged

PLANTED = {(1, "broken_json"), (7, "empty_prompt")}
LETTERS = sorted(PLANTED)


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, (True, 2)),
        ({"is_green": False}, (False, 2)),
        ({"letters": LETTERS[:1]}, (False, 1)),
        ({"letters": [*LETTERS, LETTERS[0]]}, (False, 3)),
        ({"letters": [(1, "broken_json"), (7, "broken_json")]}, (False, 2)),
        ({"whole": ("rows_out", 9)}, (False, 2)),
    ],
)
def test_a_job_is_judged_by_its_end_its_letters_and_its_count(tmp_path, changes, verdict):
    (tmp_path / "manifest.json").write_text(json.dumps({"counts": {"rows_out": 8}}))
    facts = {"is_green": True, "letters": LETTERS, "planted": PLANTED, "whole": ("rows_out", 8)}
    assert judged(tmp_path, **(facts | changes)) == verdict


def test_a_job_without_its_manifest_has_not_ended_well(tmp_path):
    whole = ("rows_out", 8)
    told = judged(tmp_path, is_green=True, letters=LETTERS, planted=PLANTED, whole=whole)
    assert told == (False, 2)
