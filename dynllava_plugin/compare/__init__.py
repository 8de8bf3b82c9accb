"""`dynllava compare`: policies on one checkpoint, one set of questions and one clock."""
