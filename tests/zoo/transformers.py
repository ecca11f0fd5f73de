"""Tiny models of the `transformers` library, built from configuration classes alone: nothing is downloaded.

Each entry of ``TRANSFORMERS`` builds (model in evaluation mode, positional inputs, keyword inputs). Widths are 16 to
32, two layers; the architecture is what is tested, not its size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["TRANSFORMERS", "Case", "built"]

Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

_TEXT = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_DECODER = _TEXT | {"intermediate_size": 32, "num_key_value_heads": 1, "max_position_embeddings": 32}
_MARKS = {"bos_token_id": 0, "eos_token_id": 1}


def built(model_class: str, configuration_class: str, **settings: Any) -> nn.Module:
    """Return a tiny model in evaluation mode, weights drawn from a seed.

    Args:
        model_class, configuration_class: names in the library.
        settings: of the configuration.
    """
    # Imported here, so that a run which needs none of these models does not pay for the library.
    import transformers

    configuration = getattr(transformers, configuration_class)(**settings)
    # The plain attention is differentiable twice and in forward mode; the key-value cache is of no use here.
    configuration._attn_implementation = "eager"
    if hasattr(configuration, "num_local_experts"):
        configuration._experts_implementation = "batched_mm"  # the others choose rows by value, or have no float32
    if hasattr(configuration, "use_cache"):
        configuration.use_cache = False
    # transformers initialises most weights with a deviation of 0.02, which makes tiny models all but constant.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(configuration)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
    return model.eval()


def _ids(*shape: int, high: int = 50) -> Tensor:
    return torch.randint(2, high, shape, generator=torch.Generator().manual_seed(1))


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _text(model_class: str, configuration_class: str, **settings: Any) -> Case:
    return built(model_class, configuration_class, **settings), (), {"input_ids": _ids(2, 7)}


def _image(model_class: str, configuration_class: str, size: int = 32, **settings: Any) -> Case:
    return built(model_class, configuration_class, **settings), (), {"pixel_values": _normal(2, 3, size, size)}


def _bert() -> Case:
    return _text("BertModel", "BertConfig", **_TEXT, intermediate_size=32)


def _bert_masked() -> Case:
    model, _, kwargs = _bert()
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
    return model, (), kwargs | {"attention_mask": mask}


def _distilbert() -> Case:
    return _text("DistilBertModel", "DistilBertConfig", vocab_size=50, dim=16, n_layers=2, n_heads=2, hidden_dim=32)


def _roberta() -> Case:
    return _text("RobertaModel", "RobertaConfig", **_TEXT, intermediate_size=32, max_position_embeddings=32)


def _albert() -> Case:
    return _text("AlbertModel", "AlbertConfig", **_TEXT, intermediate_size=32, embedding_size=16)


def _electra() -> Case:
    return _text("ElectraModel", "ElectraConfig", **_TEXT, intermediate_size=32, embedding_size=16)


def _gpt2() -> Case:
    return _text(
        "GPT2LMHeadModel", "GPT2Config", vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, **_MARKS
    )


def _gpt_neox() -> Case:
    return _text("GPTNeoXForCausalLM", "GPTNeoXConfig", **_TEXT, intermediate_size=32, max_position_embeddings=32)


def _llama() -> Case:
    return _text("LlamaForCausalLM", "LlamaConfig", **_DECODER)


def _mistral() -> Case:
    return _text("MistralModel", "MistralConfig", **_DECODER, sliding_window=4)


def _qwen2() -> Case:
    return _text("Qwen2Model", "Qwen2Config", **_DECODER)


def _gemma() -> Case:
    return _text("GemmaModel", "GemmaConfig", **_DECODER, head_dim=8, pad_token_id=0)


def _mixtral() -> Case:
    return _text("MixtralModel", "MixtralConfig", **_DECODER, num_local_experts=3, num_experts_per_tok=2)


def _mamba() -> Case:
    return _text(
        "MambaModel", "MambaConfig", vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=2
    )


def _t5() -> Case:
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    model = built("T5ForConditionalGeneration", "T5Config", **sizes, decoder_start_token_id=0)
    return model, (), {"input_ids": _ids(2, 6), "labels": _ids(2, 5)}


def _bart() -> Case:
    layers = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    wide = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32}
    return _text("BartModel", "BartConfig", vocab_size=50, d_model=16, **layers, **wide, pad_token_id=1)


def _vit() -> Case:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return _image("ViTModel", "ViTConfig", size=16, **sizes, image_size=16, patch_size=8)


def _swin() -> Case:
    sizes = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
    return _image("SwinModel", "SwinConfig", size=16, **sizes, image_size=16, patch_size=2)


def _convnext() -> Case:
    return _image("ConvNextModel", "ConvNextConfig", num_stages=2, hidden_sizes=[8, 16], depths=[1, 1])


def _resnet() -> Case:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return _image("ResNetModel", "ResNetConfig", **sizes)


def _segformer() -> Case:
    sizes = {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [8, 16],
        "patch_sizes": [3, 3],
        "strides": [4, 2],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
        "decoder_hidden_size": 16,
    }
    return _image("SegformerForSemanticSegmentation", "SegformerConfig", **sizes)


def _clip() -> Case:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text = sizes | _MARKS | {"vocab_size": 50, "max_position_embeddings": 16}
    vision = sizes | {"image_size": 16, "patch_size": 8}
    model = built("CLIPModel", "CLIPConfig", text_config=text, vision_config=vision, projection_dim=8)
    return model, (), {"input_ids": _ids(2, 7), "pixel_values": _normal(2, 3, 16, 16)}


def _whisper() -> Case:
    layers = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    sizes = {"vocab_size": 50, "d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}
    lengths = {"max_source_positions": 10, "max_target_positions": 16}
    model = built("WhisperModel", "WhisperConfig", **layers, **sizes, **special, **lengths)
    return model, (), {"input_features": _normal(2, 8, 20), "decoder_input_ids": _ids(2, 4)}


def _wav2vec2() -> Case:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    convolutions = {"conv_dim": [8, 8], "conv_kernel": [4, 3], "conv_stride": [4, 2], "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    model = built("Wav2Vec2Model", "Wav2Vec2Config", **sizes, **convolutions, **positions, vocab_size=50)
    return model, (), {"input_values": _normal(2, 160)}


TRANSFORMERS: dict[str, Callable[[], Case]] = {
    "bert": _bert,
    "bert-masked": _bert_masked,
    "distilbert": _distilbert,
    "roberta": _roberta,
    "albert": _albert,
    "electra": _electra,
    "gpt2": _gpt2,
    "gpt-neox": _gpt_neox,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "gemma": _gemma,
    "mixtral": _mixtral,
    "mamba": _mamba,
    "t5": _t5,
    "bart": _bart,
    "vit": _vit,
    "swin": _swin,
    "convnext": _convnext,
    "resnet": _resnet,
    "segformer": _segformer,
    "clip": _clip,
    "whisper": _whisper,
    "wav2vec2": _wav2vec2,
}
