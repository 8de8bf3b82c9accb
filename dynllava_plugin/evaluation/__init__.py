"""Evaluation in lmms-eval and VLMEvalKit: one engine, two thin adapters, one registry, one table."""
