"""The names that the tensors of an arranged model have in the user's model, whatever wraps or moves its modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gradctl.forms.form import named_tensors
from gradctl.subject.instance import Instance
from gradctl.subject.signature import module_of

# What wrappers of torch put between a model and its parameters, in their names.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class UserNames:
    """The names in a model, taken before it is arranged: its modules are found again by identity, copies by name.

    Args:
        instance: the private copy of the model.
    """

    def __init__(self, instance: Instance) -> None:
        self._module = module_of(instance.model)
        leaf_names = (name for leaf in instance.leaves for name in (leaf.name, *leaf.tied))
        parameters, buffers = named_tensors(self._module)
        self._known = frozenset((*parameters, *buffers, *(name.removeprefix("param:") for name in leaf_names)))
        self._names: dict[int, list[str]] = {}
        self._modules = _modules(self._module)  # kept: the identity of one that is replaced is not to be reused
        for name, module in self._modules.items():
            self._names.setdefault(id(module), []).append(name)

    def parameters(self, model: Any) -> dict[str, Tensor]:
        """Return the parameters of an arranged model by the names in the user's; those of the user's, if a function."""
        return self._named(model, 0)

    def buffers(self, model: Any) -> dict[str, Tensor]:
        """Return the buffers of an arranged model by the names in the user's; those of the user's, if a function."""
        return self._named(model, 1)

    def _named(self, model: Any, which: int) -> dict[str, Tensor]:
        arranged = module_of(model)
        module = self._module if arranged is None else arranged
        modules = _modules(module)
        return {self._name(path, modules): each for path, each in named_tensors(module)[which].items()}

    def _name(self, path: str, modules: Mapping[str, nn.Module]) -> str:
        """Return the name of one tensor: the path below a module of the user's, if one holds it."""
        parts, found = path.split("."), list[list[str]]()
        for depth in range(len(parts)):
            names = self._names.get(id(modules.get(".".join(parts[:depth]))), ())
            if names:
                found.append([self._bare(".".join(filter(None, (name, *parts[depth:])))) for name in names])
        if not found:
            return self._bare(path)
        outer, inner = found[0][0], found[-1]
        return outer if outer in inner else inner[0]  # a module with several names has the one on its path

    def _bare(self, name: str) -> str:
        """Return a name without what wrappers of torch add to it."""
        if name in self._known:
            return name
        bare = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        return bare if bare in self._known else name


def _modules(module: nn.Module | None) -> dict[str, nn.Module]:
    return dict(module.named_modules(remove_duplicate=False)) if module is not None else {}
