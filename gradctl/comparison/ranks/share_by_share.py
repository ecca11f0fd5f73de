"""One process that runs share after share of a batch: the reference of a model whose samples affect each other.

Batch normalisation, for example, has the statistics of each rank's share in data parallelism, on purpose.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gradctl.forms.form import named_tensors
from gradctl.forms.ranks.sharing import Shard, Shares, as_call, as_returned, given_inputs
from gradctl.subject.instance import Instance
from gradctl.subject.signature import module_of


class ShareByShare:
    """A call of the model on each share, whose outputs, or losses, are made whole.

    Args:
        instance: the private copy that runs.
        shares: which rank has which share.
        shard: returns the share of a rank.
    """

    applies_loss = True

    def __init__(self, instance: Instance, shares: Shares, shard: Shard) -> None:
        self._instance, self._shares, self._shard = instance, shares, shard

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the whole outputs; buffers are those that the first share leaves, as DDP sends them to all ranks."""
        before = self._buffers()
        shapes = {name: each.shape for name, each in self._call(args, kwargs).items()}
        self._write(before)
        parts: dict[str, list[Tensor | None]] = {name: [None] * self._shares.world for name in shapes}
        kept: dict[str, Tensor] = {}
        for group in self._shares.groups:
            share = self._shard(given_inputs(args, kwargs), group[0], self._shares.world)
            for name, each in self._call(*as_call(share, args, kwargs)).items():
                parts.setdefault(name, [None] * self._shares.world)[group[0]] = each
            kept = kept or self._buffers()
            self._write(before)
        self._write(kept)
        found = {name: self._shares.whole(name, each, shapes[name], is_output=True) for name, each in parts.items()}
        return as_returned({name: each for name, each in found.items() if each is not None})

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        return dict(self._instance.call_as_seeded(self._instance.model, args, kwargs))

    def _buffers(self) -> dict[str, Tensor]:
        found = named_tensors(module_of(self._instance.model))[1]
        return {name: each.detach().clone() for name, each in found.items()}

    def _write(self, values: dict[str, Tensor]) -> None:
        for name, each in named_tensors(module_of(self._instance.model))[1].items():
            if name in values and each.shape == values[name].shape:
                each.data.copy_(values[name])  # not counted as a version: a graph may have saved the buffer
