"""A model with its loss inside: what a graph that is to hold both is made of."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

from torch import nn

from gradctl.subject.instance import call_loss
from gradctl.subject.subject import Subject


def include_loss(subject: Subject) -> Subject:
    """Return a subject whose model returns the loss, if any; parameters, buffers and inputs keep their names."""
    loss, model = subject.loss, subject.model
    if loss is None:
        return subject
    if not isinstance(model, nn.Module):

        @functools.wraps(model)
        def function(*args: Any, **kwargs: Any) -> Any:
            return call_loss(loss, model(*args, **kwargs), args, kwargs)

        return replace(subject, model=function, loss=None)
    kind = type(model)

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return call_loss(loss, kind.forward(self, *args, **kwargs), args, kwargs)

    # Of a class of its own: a copy of the module, which every run is made on, keeps that.
    inside = copy.copy(model)
    inside.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return replace(subject, model=inside, loss=None)
