"""The adapter to lmms-eval."""
