"""Inputs for a model of the ``transformers`` library, by the names of forward's parameters and by its configuration.

A name may have several formats, which the signature does not tell: audio features by time or by frequency first, one
image or several. So there are several candidates, in order, and the first that the model takes is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Generator, Tensor

from gradctl.subject.libraries.tiny_configuration import VOCABULARY, is_configuration

_BATCH, _LENGTH, _FRAMES, _SAMPLES, _PATCHES = 2, 7, 2, 1600, 16
_SIDE = 64  # of an image whose size no configuration sets
_MEDIA = ("pixel_values", "pixel_values_videos", "input_features", "input_values")
# Parameters with a default that are given wherever forward has them.
_OPTIONAL = {"input_ids", "bbox", "past_values", "past_observed_mask", "bool_masked_pos", "spatial_shapes"} | {
    *("pixel_attention_mask", "qformer_input_ids", "image_attention_mask", "visual_feats", "visual_pos"),
}


class UnknownInput(Exception):
    """A model requires an input of which nothing is known."""


class ModelInputs:
    """Values for the parameters of one model's forward; the same for the same seed, whatever was drawn before."""

    def __init__(self, model: Any, seed: int) -> None:
        self.model, self.seed = model, seed
        self.parameters = inspect.signature(model.forward).parameters
        self._configurations = list(_configurations(model.config))

    def find(self, *names: str, default: Any = None) -> Any:
        """Return the first of these fields that a configuration has; those of the model itself come first."""
        found = (vars(each).get(name) for name in names for each in self._configurations)
        return next((value for value in found if value is not None), default)

    def candidates(self) -> Iterator[dict[str, Any]]:
        """Yield inputs by name, first those with images for a model of text and images.

        Raises:
            UnknownInput: forward requires a parameter for which no input is known.
        """
        yield from self._with_images()
        least = self._least()
        if unknown := sorted(least - _MAKERS.keys()):
            raise UnknownInput(f"its forward requires {', '.join(unknown)}, for which gradctl has no inputs")
        for more in ((), *((name,) for name in _MEDIA if name in self.parameters.keys() - least)):
            names = [name for name in self.parameters if name in least or name in more]
            for variant in range(max((len(_MAKERS[name]) for name in names), default=0)):
                yield self._made(names, variant)

    def _least(self) -> set[str]:
        """Return the names of the parameters that are given in any case."""
        main = self.model.main_input_name
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        required = {each.name for each in self.parameters.values() if each.default is each.empty}
        required -= {each.name for each in self.parameters.values() if each.kind in variadic}
        wanted = {main} if isinstance(main, str) else {*main}
        if self.model.config.is_encoder_decoder:
            wanted |= {"decoder_input_ids"}
        least = required | ((wanted | _OPTIONAL) & self.parameters.keys())
        return least - {"input_ids"} if "inputs" in least else least

    def _made(self, names: Collection[str], variant: int) -> dict[str, Any]:
        """Return one value for each name, drawn anew; of fewer formats than ``variant``, the last one."""
        draw = _Draw(self)
        made = {}
        for name in names:
            makers = _MAKERS[name]
            # Codebooks are read or written, in place of text; not beside it.
            is_text = name == "input_ids" and not {"decoder_input_ids", *_MEDIA}.isdisjoint(names)
            made[name] = makers[0 if is_text else min(variant, len(makers) - 1)](draw)
        return made

    def _with_images(self) -> Iterator[dict[str, Any]]:
        """Yield text with a place for each feature of an image, and the image."""
        token = self.find("image_token_id", "image_token_index")
        features_of = getattr(self.model, "get_image_features", None)
        if token is None or features_of is None or not {"input_ids", "pixel_values"} <= self.parameters.keys():
            return
        extra = self.parameters.keys() & (_OPTIONAL | {"image_grid_thw"}) - {"input_ids"}
        for variant in range(len(_MAKERS["pixel_values"])):
            images = self._made([*sorted(extra & {"image_grid_thw"}), "pixel_values"], variant)
            try:
                with torch.no_grad():
                    count = _count(features_of(**images), self.find("hidden_size"))
            except Exception:  # this model takes images of another format
                continue
            text = self._made(["input_ids", *sorted(extra - {"image_grid_thw"})], 0)
            places = torch.full((_BATCH, count // _BATCH), token)
            text["input_ids"] = torch.cat([text["input_ids"][:, :2], places, text["input_ids"][:, 2:]], 1)
            if "mm_token_type_ids" in self.parameters:
                text["mm_token_type_ids"] = (text["input_ids"] == token).long()
            yield {**text, **images}


def _count(features: Any, width: int) -> int:
    """Return the number of features of all images: rows of ``width``, that of the text's hidden states."""
    found = getattr(features, "pooler_output", features)
    tensors = [found] if isinstance(found, Tensor) else [each for each in found if isinstance(each, Tensor)]
    return sum(each.numel() for each in tensors) // width


def _configurations(configuration: Any) -> Iterator[Any]:
    """Yield a configuration and those in it, that of the text before others."""
    yield configuration
    inner = [(name, each) for name, each in vars(configuration).items() if is_configuration(each)]
    for _, each in sorted(inner, key=lambda item: "text" not in item[0]):
        yield from _configurations(each)


class _Draw:
    """Draws the values of one set of inputs."""

    def __init__(self, inputs: ModelInputs) -> None:
        self.find = inputs.find
        self.generator = Generator().manual_seed(inputs.seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def ids(self, *shape: int) -> Tensor:
        """Return tokens, none of them special, but for the last of each row, which ends it."""
        words = self.find("vocab_size", default=VOCABULARY)
        drawn = torch.randint(words // 2, words, shape, generator=self.generator)
        for name, column in (("question_token_id", 0), ("eos_token_id", -1)):
            if type(token := self.find(name)) is int:
                drawn[:, column] = token
        return drawn

    def images(self, *leading: int) -> Tensor:
        colours = self.find("num_channels", "in_channels", "in_chans", default=3)
        return self.normal(*leading, colours, *self.sides())

    def sides(self) -> tuple[int, int]:
        """Return height and width of an image."""
        size = self.find("image_size", "img_size", default=_SIDE)
        return (size, size) if isinstance(size, int) else tuple(size[-2:])

    def patch(self) -> int:
        size = self.find("patch_size", default=8)
        return int(size if isinstance(size, int) else size[-1])

    def codebooks(self) -> int:
        return int(self.find("num_codebooks", "num_channels", default=1))

    def spectrum(self) -> tuple[int, int]:
        """Return the number of frequencies of audio features, and of their times."""
        names = ("feature_projection_input_dim", "input_dim", "num_mel_bins", "input_feat_per_channel", "feature_size")
        return self.find(*names, "mel_bins", default=80), 2 * self.find("max_source_positions", default=32)


def _tokens_of_codebooks() -> list[Callable[[_Draw], Tensor]]:
    """Return the formats of tokens: text, and one row or one column for each codebook of audio."""
    return [
        lambda draw: draw.ids(_BATCH, _LENGTH),
        lambda draw: draw.ids(_BATCH * draw.codebooks(), _LENGTH),
        lambda draw: draw.ids(_BATCH, _LENGTH, draw.codebooks()),
    ]


# The formats of a value by the name of the parameter, the most common one first.
_MAKERS: dict[str, list[Callable[[_Draw], Tensor]]] = {
    "input_ids": _tokens_of_codebooks(),
    "decoder_input_ids": _tokens_of_codebooks(),
    "inputs": [lambda draw: draw.ids(_BATCH, _LENGTH)],
    "visual_feats": [lambda draw: draw.normal(_BATCH, _LENGTH, draw.find("visual_feat_dim", default=2048))],
    "visual_pos": [lambda draw: draw.normal(_BATCH, _LENGTH, 4)],
    "image_attention_mask": [lambda draw: torch.ones(_BATCH, _LENGTH, _FRAMES, dtype=torch.long)],
    "qformer_input_ids": [lambda draw: draw.ids(_BATCH, _LENGTH)],
    "attention_mask": [lambda draw: torch.ones(_BATCH, _LENGTH, dtype=torch.long)],
    "bbox": [
        lambda draw: torch.tensor([1, 2, 3, 4]).repeat(_BATCH, _LENGTH, 1),
        lambda draw: draw.normal(_BATCH, _LENGTH, 8),
    ],
    "pixel_values": [
        lambda draw: draw.images(_BATCH),
        lambda draw: draw.images(_BATCH, draw.find("num_frames", default=_FRAMES)),
        lambda draw: draw.images(_BATCH, 2),
        lambda draw: draw.normal(_BATCH, _PATCHES, 3 * draw.patch() ** 2),
        lambda draw: draw.normal(
            _BATCH * _PATCHES, 3 * draw.find("temporal_patch_size", default=1) * draw.patch() ** 2
        ),
    ],
    "pixel_values_videos": [
        lambda draw: draw.images(_BATCH, draw.find("num_frames", "frames_per_clip", default=_FRAMES))
    ],
    "image_grid_thw": [lambda draw: torch.tensor([[1, 4, 4]] * _BATCH)],
    "pixel_attention_mask": [lambda draw: torch.ones(_BATCH, _PATCHES, dtype=torch.long)],
    "spatial_shapes": [lambda draw: torch.tensor([[4, 4]] * _BATCH)],
    "bool_masked_pos": [lambda draw: torch.arange((draw.sides()[0] // draw.patch()) ** 2).repeat(_BATCH, 1) % 2 == 0],
    "input_features": [
        lambda draw: draw.normal(_BATCH, *draw.spectrum()),
        lambda draw: draw.normal(_BATCH, *reversed(draw.spectrum())),
    ],
    "input_values": [
        lambda draw: draw.normal(_BATCH, _SAMPLES),
        lambda draw: draw.normal(_BATCH, draw.find("max_length", default=1024), draw.spectrum()[0]),
        lambda draw: draw.normal(_BATCH, 1, _SAMPLES),
    ],
    "past_values": [
        lambda draw: draw.normal(
            _BATCH, draw.find("context_length", default=32), draw.find("num_input_channels", "input_size", default=1)
        ),
        lambda draw: draw.normal(_BATCH, draw.find("context_length", default=32)),
    ],
    "past_observed_mask": [
        lambda draw: torch.ones(
            _BATCH, draw.find("context_length", default=32), draw.find("num_input_channels", "input_size", default=1)
        )
    ],
    "flattened_patches": [
        lambda draw: torch.cat(
            [
                torch.arange(1.0, 9.0).reshape(1, 8, 1).repeat(_BATCH, 1, 2),  # row and column, from 1
                draw.normal(_BATCH, 8, draw.find("patch_embed_hidden_size", default=768)),
            ],
            -1,
        )
    ],
}
