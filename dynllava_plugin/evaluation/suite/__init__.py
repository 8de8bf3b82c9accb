"""`dynllava eval`: many benchmarks, both harnesses, one table."""
