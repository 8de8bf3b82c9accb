"""Transformers' `Auto*` classes know our families once this package is imported, though neither imports the other.

Every `AutoModel...` and `pipeline` reads a checkpoint's config through `AutoConfig` first; `AutoProcessor` goes by the
processor's files. So these two, at any call, first import our families, which register themselves. Where transformers
isn't imported yet, that is arranged as soon as it is: importing this package takes neither it nor torch.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_AUTO_CLASSES = {
    "transformers.models.auto.configuration_auto": ("AutoConfig", ("from_pretrained", "for_model")),
    "transformers.models.auto.processing_auto": ("AutoProcessor", ("from_pretrained",)),
}
_FAMILIES = "dynllava_plugin.model.processing"  # registers LLaVA-1.5's processor and imports all families


def register_at_first_use() -> None:
    """Have `AutoConfig` and `AutoProcessor` import our families before they read a checkpoint."""
    sys.meta_path.insert(0, _AutoClassFinder())
    for name in _AUTO_CLASSES:
        if name in sys.modules:
            _import_families_before(sys.modules[name])


class _AutoClassFinder(MetaPathFinder):
    """Finds the modules of transformers' auto classes where they are, and has something done behind their import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _AUTO_CLASSES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_arrange(module: ModuleType) -> None:
            execute(module)
            _import_families_before(module)

        spec.loader.exec_module = execute_and_arrange  # type: ignore[method-assign]
        return spec


def _import_families_before(module: ModuleType) -> None:
    """Wrap the class methods of `module` that need our families."""
    name, methods = _AUTO_CLASSES[module.__name__]
    auto_class = getattr(module, name)
    for method in methods:
        setattr(auto_class, method, _after_families(auto_class.__dict__[method]))


def _after_families(method: Any) -> Any:
    stock = method.__func__

    @functools.wraps(stock)
    def wrapped(cls: Any, *args: Any, **kwargs: Any) -> Any:
        import_module(_FAMILIES)
        return stock(cls, *args, **kwargs)

    return classmethod(wrapped)
