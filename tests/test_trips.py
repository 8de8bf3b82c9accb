"""A reader who follows a call opens few files (`python -m tests.trips` lists them)."""

from tests.trips import LIMITS, trips


def test_a_question_a_prefill_and_a_step_cross_few_files():
    found = trips()
    for name in ("engine question", "prefill", "decode step"):
        assert len(found[name]) <= LIMITS[name], found[name]
