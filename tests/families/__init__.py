"""Tiny stock models and checkpoints of every family, and a slow oracle: none of it imports the package."""
