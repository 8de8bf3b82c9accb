"""The adapter to VLMEvalKit."""
