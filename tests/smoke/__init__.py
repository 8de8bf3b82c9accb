"""`make smoke`: every benchmark's miniature through both harnesses, each cell of the table computed once more."""
