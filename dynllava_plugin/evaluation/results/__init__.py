"""What the harnesses wrote, as tables."""
