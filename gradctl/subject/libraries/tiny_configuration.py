"""A configuration of the ``transformers`` library with small sizes.

A size is set by the name of its field, so that sizes which have to agree stay equal: each hidden size becomes 32, each
number of heads 2, each intermediate size 64. Numbers of channels in a list are divided by 8. Lists with one entry for
each layer keep one layer of each kind. Fields that the class computes from others are left to it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

HIDDEN, HEADS, VOCABULARY = 32, 2, 128
_HEAD_SIZE = HIDDEN // HEADS
_MOST_LAYERS = 4
_CHANNELS = 8  # by which the numbers of channels in a list are divided

# By the name of a field, the first that matches: the largest value of an integer.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size.*|.*_vocab_size|num_embeddings", VOCABULARY),
    (r".*mamba_(d_head|head_dim)|rotary_dim", _HEAD_SIZE),
    (r"mamba_d_ssm|mamba_intermediate_size", 2 * HIDDEN),
    (r"mamba_(n|num)_heads|coordinate_size", 4),
    (r"(mamba_)?n_groups|n_group|topk_group|num_expert_group|first_k_dense_replace|num_groups|n_shared_experts", 1),
    (r"num_kv_shared_layers", 0),
    (r"upsample_groups|d_latents", HIDDEN),
    (r"(.*_)?(key_value|kv)_heads|n_head_kv", 1),
    (r"(.*_)?(n|num)_(key_|value_|attention_)?heads?|n_heads?|.*attention_heads", HEADS),
    (r"(.*_)?head_dim|d_kv|dim_head|d_head|kv_channels|.*head_size", _HEAD_SIZE),
    (r".*_rank|shape_size|.*state_size|.*d_state|num_queries|num_query_tokens|.*num_latents|patch_size", 8),
    (r"(.*_)?(intermediate|ffn|feedforward|inner|ff|mlp)_(size|dim|hidden_size|hidden_dim)|d_ff|d_inner|n_inner", 64),
    (r"(.*_)?(hidden|embed|embedding|projection|proj|projector|decoder)_(size|dim|hidden_size|dims)s?", HIDDEN),
    (
        r"d_model|n_embd|dim|hidden_dim|emb_dim|(.*_)?(hidden_size|hidden_dim)|classifier_proj_size|condition_dim",
        HIDDEN,
    ),
    (r"num_blocks|depth|(.*_)?(num_|n_)?(hidden_)?layers?|n_layer", 2),
    (r"(.*_)?position_embeddings|(.*_)?positions|context_length|max_seq_len|model_max_length", 64),
    (r"moe_num_experts|n_routed_experts|num_local_experts|num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|num_selected_experts|window_size", 2),
    (r"sliding_window|local_attention|attention_window|chunk_size|context_size", 4),
    (r"image_size|img_size", 32),
)
_KEY_VALUE_HEADS = re.compile(r"(.*_)?(key_value|kv)_heads")
_CHANNEL_LISTS = re.compile(r"(?!.*(kernel|patch|image|pool)).*(channels|sizes|dims?)")
_BLOCK_LISTS = {"depths", "stage_num_blocks"}
# Lists of layers whose values are read elsewhere, such as the features that a neck takes from a backbone.
_INDEXES = re.compile(r".*(out_indices|_indexes|_indices|hook_ids|layer_ids|feature_layer)")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "depth", "encoder_layers")
_TOKEN = re.compile(r".*_token_id|.*_token_index")
# Set although the configuration has None there: without them a model cannot be built, or takes no batch.
_TOKENS_ALWAYS = {"pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id"}
_SIZES_ALWAYS = {"vocab_size", "head_dim", "num_key_value_heads", "num_experts_per_tok", "n_routed_experts"} | {
    "moe_intermediate_size",
    "n_shared_experts",
}
_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
# Of model types whose sizes depend on each other in a way of their own, or whose configuration has no defaults.
_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bros": {"hidden_size": 64},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROTARY)},
    "efficientnet": {"width_coefficient": 1.0, "depth_coefficient": 1.0},
    "falcon_h1": {"mamba_d_head": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "levit": {"patch_size": 16},
    "lilt": {"hidden_size": 48},
    "mobilevitv2": {"image_size": 128},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "qwen4_exp_text": {"token_budget": 4, "compress_ratio": 2},
    "superpoint": {"keypoint_decoder_dim": 65},
    "xmod": {"default_language": "en_XX"},
}


def tiny_configuration(kind: Any, given: Mapping[str, Any], *, keep_lists: bool = False) -> Any:
    """Return a configuration of a class with small sizes.

    Args:
        kind: the class.
        given: fields that are set as they are.
        keep_lists: leave numbers of channels in lists; some networks compute with these in their own way.
    """
    numbers: dict[str, int] = {}
    return _Shrinker(lambda name: numbers.setdefault(name, len(numbers)), keep_lists).shrunk(kind(), given)


@dataclasses.dataclass(frozen=True, slots=True)
class _Shrinker:
    """Makes small configurations; ``token`` numbers the special tokens, from 0 and each once in all of a model."""

    token: Callable[[str], int]
    keep_lists: bool

    def shrunk(self, default: Any, given: Mapping[str, Any]) -> Any:
        """Return a small configuration of the class of ``default``."""
        kind = type(default)
        given = {**_EXCEPTIONS.get(default.model_type, {}), **given}
        values = _values(default)
        fields = [each.name for each in dataclasses.fields(kind) if not each.name.startswith("_")]
        layers = _Layers(values, fields)
        left = given.keys() | _computed(default)
        names = [name for name in fields if name in values and name not in left]
        settings = {name: self._setting(name, values[name], values, layers) for name in names}
        return kind(**{**settings, **layers.settings(values), **given})

    def _setting(self, name: str, value: Any, values: Mapping[str, Any], layers: _Layers) -> Any:
        """Return the value of one field."""
        if name in ("rope_parameters", "use_cache"):
            return _rotary(value, values) if name == "rope_parameters" else False
        if is_configuration(value):
            return self.shrunk(_supported(value), {})
        if _INDEXES.fullmatch(name) and not _TOKEN.fullmatch(name):
            return layers.indexes(value)
        if isinstance(value, list | tuple) and not _TOKEN.fullmatch(name):
            return layers.one_for_each(value) or self._list(name, value)
        return self._number(name, value, values)

    def _number(self, name: str, value: Any, values: Mapping[str, Any]) -> Any:
        if _TOKEN.fullmatch(name):
            return self.token(name) if name in _TOKENS_ALWAYS or type(value) is int else value
        return limit(name) if value is None and name in _SIZES_ALWAYS else _size(name, value, values)

    def _list(self, name: str, value: Any) -> Any:
        if name in _BLOCK_LISTS:
            return type(value)(min(each, 2) for each in value)
        if name == "num_heads" and value and all(each % min(value) == 0 for each in value):
            return type(value)(each // min(value) for each in value)
        return _divided(value) if _CHANNEL_LISTS.fullmatch(name) and not self.keep_lists else value


class _Layers:
    """Which layers stay: one of each kind, and as many as the longest list of layers that are read elsewhere."""

    def __init__(self, values: Mapping[str, Any], fields: Sequence[str]) -> None:
        self.name = next((each for each in _LAYERS if each in fields and type(values.get(each)) is int), None)
        self.count = values[self.name] if self.name else 0
        lists = [each for each in values.values() if self.is_one_for_each(each)]
        of_kinds = {each: index for index, each in reversed(list(enumerate(zip(*lists, strict=True))))}
        chosen = sorted(of_kinds.values())[:_MOST_LAYERS] or [0]
        self.chosen = chosen + chosen[-1:] * (max(2, _most_read(values)) - len(chosen))

    def is_one_for_each(self, value: Any) -> bool:
        """Return whether a value is a list with the kind of each layer."""
        is_list = isinstance(value, list | tuple) and len(value) == self.count > 2
        return is_list and all(isinstance(each, str | int | float) for each in value)

    def one_for_each(self, value: Any) -> Any:
        """Return a list for each layer with those that stay; None for any other list."""
        return type(value)(value[index] for index in self.chosen) if self.is_one_for_each(value) else None

    def indexes(self, value: Any) -> Any:
        """Return numbers of layers, of the last ones that stay."""
        if isinstance(value, list | tuple) and self.name:
            return type(value)(range(len(self.chosen))[-len(value) :]) if value else value
        return min(value, len(self.chosen) - 1) if type(value) is int and self.name else value

    def settings(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the number of layers, and the stages of a backbone that are read.

        The stem is stage 0, and each layer or group of layers is one.
        """
        settings: dict[str, Any] = {self.name: len(self.chosen)} if self.name else {}
        if read := values.get("_out_indices"):
            is_layer = self.name is not None and len(values.get("stage_names") or ()) == self.count + 1
            settings["out_indices"] = list(range(len(self.chosen) + 1))[-len(read) :] if is_layer else list(read)
        return settings


def _values(configuration: Any) -> dict[str, Any]:
    """Return the values of the fields, also of those that are kept under another name.

    ``getattr`` refuses a field that differs between the layers.
    """
    values = vars(configuration)
    renamed = {name: values[kept] for name, kept in configuration.attribute_map.items() if kept in values}
    return {**renamed, **values}


def _computed(default: Any) -> set[str]:
    """Return the integer fields that have no default: the class computes them from others, unless they are set."""
    kind = type(default)
    values, plain = _values(default), _values(kind())
    without = [each.name for each in dataclasses.fields(kind) if each.default is None]
    return {name for name in without if type(plain.get(name)) is int and values.get(name) == plain[name]}


def is_configuration(value: Any) -> bool:
    """Return whether a value of a configuration is a configuration itself."""
    return hasattr(value, "model_type") and dataclasses.is_dataclass(value)


def _most_read(values: Mapping[str, Any]) -> int:
    """Return the length of the longest list of layers that are read elsewhere."""
    lists = [each for name, each in values.items() if _INDEXES.fullmatch(name) and isinstance(each, list | tuple)]
    return max(map(len, lists), default=0)


@functools.cache
def limit(name: str) -> int | None:
    """Return the largest value of a size by the name of its field; None if the field is no size."""
    return next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)


def _supported(configuration: Any) -> Any:
    """Return a configuration, that of a ResNet in place of a backbone of timm: those have no sizes to set."""
    if configuration.model_type != "timm_backbone":
        return configuration
    resnet = importlib.import_module("transformers").ResNetConfig
    return resnet(out_indices=[1, 2, 3, 4][-len(configuration.out_indices or [4]) :])


def _size(name: str, value: Any, values: Mapping[str, Any]) -> Any:
    """Return an integer within its limit; anything else as it is."""
    most = limit(name)
    if type(value) is not int or most is None:
        return value
    if _KEY_VALUE_HEADS.fullmatch(name) and value == values.get(name.replace("key_value", "attention")):
        most = HEADS  # attention without groups stays so
    elif name == "embed_dim" and isinstance(values.get("num_heads"), list | tuple):
        most = HIDDEN // 2  # of the first of several stages, each twice as wide
    elif name in ("image_size", "img_size") and not _BLOCK_LISTS.isdisjoint(values):
        most = 64  # which several stages halve
    return min(value, most)


def _divided(value: Any) -> Any:
    """Return numbers of channels, divided; small ones (colours, groups) as they are."""
    if isinstance(value, list | tuple):
        return type(value)(map(_divided, value))
    return value // _CHANNELS if type(value) is int and value >= 2 * _CHANNELS else value


def _rotary(value: Any, values: Mapping[str, Any]) -> Any:
    """Return the parameters of a rotary embedding with sections (of text beside images) that fit the small head."""
    if value == {}:
        return value
    if value and all(isinstance(each, dict) for each in value.values()):
        return {key: _rotary(each, values) for key, each in value.items()}
    parameters = dict(value or {})
    factor = parameters.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0
    total = int(_HEAD_SIZE * factor) // 2
    side = total * 3 // 8
    return parameters | {"mrope_section": [total - 2 * side, side, side]}
