"""The word that was meant, or all that are known."""

from cascade_model.nearest import cure


def test_the_most_similar_word_is_offered_at_its_place():
    assert cure("num_worker", ["seed", "num_workers"], "a.") == "did you mean `a.num_workers`?"
    assert cure("qqq", ["b", "a"]) == "known are b, a"


def test_how_alike_a_word_must_be_can_be_said():
    assert cure("deploy", ["export"]) == "did you mean `export`?"
    assert cure("deploy", ["export"], cutoff=0.6) == "known are export"
