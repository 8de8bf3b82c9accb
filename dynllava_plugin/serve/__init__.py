"""`dynllava serve`: transformers' OpenAI-compatible server over one checkpoint, with a policy per request."""
