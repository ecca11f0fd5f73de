"""Torch calls whose gradient is documented not to be the derivative: recorded at the point, replayed beside it.

1. ``embedding``: no gradient passes the rows at ``padding_idx``, nor what ``max_norm`` does to the weight.
2. Fake quantisation, whose gradient is a clamp's, and a Gamma sample, an implicit reparameterisation: elementwise.
3. ``gumbel_softmax(hard=True)``: straight-through by ``detach``, inside of the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradctl.subject.frames import user_location
from gradctl.subject.torch_private import standard_gamma
from gradctl.tracing.recording import BranchChanged, Cut

RecordCut = Callable[[Any, Any, Any], tuple[Any, Cut | None]]

_STRAIGHT_THROUGH = {
    torch.fake_quantize_per_tensor_affine,
    torch.fake_quantize_per_channel_affine,
    torch.fused_moving_avg_obs_fake_quant,
}


def documented_gradient(func: Any, args: Any, kwargs: Any) -> RecordCut | None:
    """Return the function that makes and records such a call; None for any other call."""
    if func is F.embedding:
        return _record_embedding
    if func in _STRAIGHT_THROUGH or func is standard_gamma:
        return _record_elementwise
    is_hard = func is F.gumbel_softmax and _gumbel_arguments(args, kwargs).get("hard")
    return _record_hard_gumbel if is_hard else None


def _record_embedding(func: Any, args: Any, kwargs: Any) -> tuple[Any, Cut | None]:
    _, weight, padding, max_norm = _embedding_arguments(args, kwargs)
    before = weight.detach().clone() if max_norm is not None else None
    result = func(*args, **kwargs)
    if not weight.requires_grad or (padding is None and before is None):
        return result, None
    change = None if before is None else weight.detach() - before
    return result, Cut(func, (result.detach().clone(), change), False, None, replay=_replay_embedding)


def _replay_embedding(cut: Cut, func: Any, args: Any, kwargs: Any) -> Any:
    index, weight, padding, max_norm = _embedding_arguments(args, kwargs)
    recorded, change = cut.value
    if change is not None:
        with torch.no_grad():
            weight.detach().add_(change)
    result = func(index, weight, padding) if max_norm is not None else func(*args, **kwargs)
    if result.shape != recorded.shape:
        raise BranchChanged
    if padding is None:
        return result
    return torch.where((index == padding % weight.shape[0]).unsqueeze(-1), recorded, result)


def _embedding_arguments(args: Any, kwargs: Any) -> tuple[Tensor, Tensor, int | None, float | None]:
    named = dict(zip(("input", "weight", "padding_idx", "max_norm"), args, strict=False)) | kwargs
    return named["input"], named["weight"], named.get("padding_idx"), named.get("max_norm")


def _record_elementwise(func: Any, args: Any, kwargs: Any) -> tuple[Any, Cut | None]:
    x = args[0] if args else kwargs["input"]
    result = func(*args, **kwargs)
    if not (result.requires_grad and x.requires_grad):
        return result, None
    (slope,) = torch.autograd.grad(result, x, torch.ones_like(result), retain_graph=True)
    value = (x.detach().clone(), result.detach().clone(), slope)
    moves = func is not standard_gamma
    return result, Cut(func, value, False, user_location(), moves=moves, replay=_replay_elementwise)


def _replay_elementwise(cut: Cut, func: Any, args: Any, kwargs: Any) -> Any:
    x0, y0, slope = cut.value
    x: Tensor = args[0] if args else kwargs["input"]
    if x.shape != x0.shape:
        raise BranchChanged
    if func is standard_gamma:
        func(x0, *args[1:], **kwargs)  # rejection sampling uses as many random numbers as at the point
    return y0 + slope * (x - x0)


def _record_hard_gumbel(func: Any, args: Any, kwargs: Any) -> tuple[Any, Cut | None]:
    state = torch.get_rng_state()
    hard = func(*args, **kwargs)
    torch.set_rng_state(state)
    added = (hard - _soft_gumbel(args, kwargs)).detach()
    return hard, Cut(func, added, False, user_location(), moves=True, replay=_replay_hard_gumbel)


def _replay_hard_gumbel(cut: Cut, func: Any, args: Any, kwargs: Any) -> Any:
    return _soft_gumbel(args, kwargs) + cut.value


def _soft_gumbel(args: Any, kwargs: Any) -> Tensor:
    return F.gumbel_softmax(**_gumbel_arguments(args, kwargs) | {"hard": False})


def _gumbel_arguments(args: Any, kwargs: Any) -> dict[str, Any]:
    return dict(zip(("logits", "tau", "hard", "eps", "dim"), args, strict=False), **kwargs)
