"""Benchmarks of our own: easy-VQA and long answers."""
