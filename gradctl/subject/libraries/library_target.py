"""A target that names a model of a library, as the module that any other target is."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from gradctl.core.library_targets import LibraryModel


def library_module(named: LibraryModel, name: str) -> ModuleType:
    """Return a module with ``make_model``, whose arguments are settings of the model, and with ``example_inputs``."""
    module = ModuleType(name)
    inputs: dict[str, Any] = {}

    def make_model(**settings: Any) -> Any:
        model, found = _build(named, settings)
        inputs.update(found)
        return model

    module.make_model, module.example_inputs = make_model, lambda: inputs  # type: ignore[attr-defined]
    return module


def _build(named: LibraryModel, settings: dict[str, Any]) -> Any:
    if named.library == "timm":
        from gradctl.subject.libraries.timm_models import timm_model

        return timm_model(named, settings)
    from gradctl.subject.libraries.transformers_models import checkpoint, tiny_model

    return checkpoint(named, settings) if named.folder else tiny_model(named, settings)
