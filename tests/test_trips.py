"""A reader who follows a call opens few files (`python -m tests.trips` lists them)."""

from tests.trips import LIMITS, trips


def test_trips_cross_few_files():
    found = trips()
    assert set(found) == set(LIMITS)
    for name, files in found.items():
        assert 1 < len(files) <= LIMITS[name], (name, files)
