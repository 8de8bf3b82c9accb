"""Benchmarks: ratios of one interleaved run, raw rows kept."""
