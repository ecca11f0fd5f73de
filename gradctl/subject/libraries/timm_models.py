"""Models of the ``timm`` library, with drawn weights: nothing is downloaded."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gradctl.core.errors import TargetError, is_out_of_memory, nearest
from gradctl.core.library_targets import LibraryModel
from gradctl.subject.frames import first_line, user_frames

_BATCH = 2


def timm_model(named: LibraryModel, settings: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model in evaluation mode and its images, of the smallest size that it is made for.

    ``settings`` are arguments of ``timm.create_model``.

    Raises:
        TargetError: GC125 if timm has no such model; GC108 if it does not take the settings.
    """
    timm: Any = importlib.import_module("timm")
    known = timm.list_models()
    if named.name not in known:
        said = f"timm has no model {named.name!r}{nearest(named.name, known)}"
        raise TargetError("GC125", f"{said}. timm.list_models() lists all {len(known)}.")
    try:
        model = timm.create_model(named.name, pretrained=False, **settings).eval()
    except Exception as error:  # of the library, on the user's settings
        if is_out_of_memory(error):
            raise
        said = f"timm.create_model({named.name!r}) raised {first_line(error)}."
        raise TargetError("GC108", said, details=user_frames(error)) from error
    made_for = model.default_cfg
    size = made_for.get("min_input_size") or made_for["input_size"]
    generator = torch.Generator().manual_seed(torch.initial_seed())
    name = next(iter(inspect.signature(model.forward).parameters))
    return model, {name: torch.randn(_BATCH, *size, generator=generator)}
