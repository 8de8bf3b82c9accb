"""The one model of a server, in the form that transformers' handlers ask for."""

from __future__ import annotations

from typing import Any

from transformers.cli.serving.model_manager import ModelManager


class OneModel(ModelManager):
    """A model that is loaded already, and stays."""

    def __init__(self, name: str, model: Any, processor: Any) -> None:
        super().__init__()
        self.force_model, self.model, self.processor = name, model, processor

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Return the model and its processor."""
        return self.model, self.processor

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """Return what `/v1/models` lists."""
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "dynllava"}]
