"""From a harness's question to an answer and what it cost: one engine for both harnesses."""
