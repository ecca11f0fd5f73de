"""``hf:TYPE`` is a small model of transformers with inputs of its kind; ``hf:FOLDER`` is what was saved there."""

from __future__ import annotations

import json
import random
import socket

import pytest
import torch
from torch import Tensor

from gradctl.core.errors import GradctlError
from gradctl.core.target_options import TargetOptions
from gradctl.subject.loading.load import load_subject
from gradctl.subject.tree import leaves
from tests.benchmarks.hf_coverage import tried, types_with_a_head
from tests.sweeps import sampled

transformers = pytest.importorskip("transformers")


def loaded(target, **options):
    return load_subject(TargetOptions(target, **options))


def outputs(subject):
    return dict(leaves(subject.model(*subject.args, **subject.kwargs)))


def shapes(subject):
    return {name: list(value.shape) for name, value in subject.kwargs.items()}


def message(target, **options):
    with pytest.raises(GradctlError) as caught:
        loaded(target, **options)
    assert caught.value.exit_code == 2
    return str(caught.value)


# A model type


@pytest.mark.parametrize(
    ("target", "model_class", "inputs"),
    [
        ("hf:llama", "LlamaForCausalLM", {"input_ids": [2, 7]}),
        ("hf:bert", "BertForMaskedLM", {"input_ids": [2, 7]}),
        ("hf:bert:BertForSequenceClassification", "BertForSequenceClassification", {"input_ids": [2, 7]}),
        ("hf:t5", "T5ForConditionalGeneration", {"input_ids": [2, 7], "decoder_input_ids": [2, 7]}),
        ("hf:vit", "ViTForImageClassification", {"pixel_values": [2, 3, 32, 32]}),
        ("hf:swin", "SwinForImageClassification", {"pixel_values": [2, 3, 64, 64]}),
        ("hf:wav2vec2", "Wav2Vec2ForCTC", {"input_values": [2, 1600]}),
        (
            "hf:whisper",
            "WhisperForConditionalGeneration",
            {"input_features": [2, 80, 128], "decoder_input_ids": [2, 7]},
        ),
        ("hf:llava", "LlavaForConditionalGeneration", {"input_ids": [2, 23], "pixel_values": [2, 3, 32, 32]}),
    ],
)
def test_a_type_has_inputs_of_its_kind(target, model_class, inputs):
    subject = loaded(target)
    assert (type(subject.model).__name__, shapes(subject)) == (model_class, inputs)
    assert sum(each.numel() for each in subject.model.parameters()) < 1e6
    assert not subject.model.training
    assert subject.notes == ()


def test_the_outputs_are_predictions_without_a_cache():
    assert list(outputs(loaded("hf:llama"))) == ["logits"]
    assert list(outputs(loaded("hf:granitemoe"))) == ["logits"]  # whose configuration has no use_cache


def test_attention_implementations_differ_in_nothing_else():
    eager, sdpa = loaded("hf:gpt2@eager", seed=3), loaded("hf:gpt2@sdpa", seed=3)
    assert [each.model.config._attn_implementation for each in (eager, sdpa)] == ["eager", "sdpa"]
    for one, other in zip(eager.model.parameters(), sdpa.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(eager.kwargs["input_ids"], sdpa.kwargs["input_ids"])
    torch.testing.assert_close(outputs(eager)["logits"], outputs(sdpa)["logits"])


def test_the_seed_draws_weights_and_inputs_and_nothing_else_does():
    first, second = loaded("hf:vit"), loaded("hf:vit", seed=1)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    again = loaded("hf:vit")
    assert torch.equal(before, torch.get_rng_state())
    drawn = [(each.kwargs["pixel_values"], next(each.model.parameters())) for each in (first, again, second)]
    assert all(map(torch.equal, drawn[0], drawn[1]))
    assert not any(map(torch.equal, drawn[0], drawn[2]))


def test_every_gradient_is_large_enough_to_matter():
    """As transformers draws weights, those of the attention of a tiny model have next to no effect."""
    subject = loaded("hf:llama")
    outputs(subject)["logits"].square().sum().backward()
    sizes = [each.grad.norm() for each in subject.model.parameters()]
    assert min(sizes) > 1e-3 * max(sizes)


def test_a_layer_of_each_kind_stays():
    configuration = loaded("hf:qwen3_next").model.config
    assert configuration.num_hidden_layers == len(configuration.layer_types) == 2
    assert set(configuration.layer_types) == {"linear_attention", "full_attention"}


def test_where_the_default_class_does_not_run_the_next_one_is_taken():
    """In transformers 5.24, Llama4ForConditionalGeneration reads an output that its own model does not have."""
    assert type(loaded("hf:llama4").model).__name__ == "Llama4ForCausalLM"
    assert message("hf:llama4@eager").startswith("GC125 Llama4ForConditionalGeneration of hf:llama4 cannot be built")
    assert type(loaded("hf:llama4:Llama4ForCausalLM@eager").model).__name__ == "Llama4ForCausalLM"


def test_settings_are_fields_of_the_configuration():
    model = loaded("hf:llama", arguments=("num_hidden_layers=1", "tie_word_embeddings=True")).model
    assert len(model.model.layers) == 1
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert loaded("hf:vit", training=True).model.training


def test_nothing_is_downloaded(monkeypatch):
    def connect(*_):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    loaded("hf:detr:DetrForObjectDetection")  # its configuration has a backbone of timm by name
    loaded("hf:mixtral")


@pytest.mark.parametrize(
    ("target", "options", "said"),
    [
        (
            "hf:gpt2@sdp",
            {},
            "GC125 transformers has no attention implementation 'sdp' (did you mean 'sdpa'?). It has eager, ",
        ),
        (
            "hf:t5:T5ForCausalLM",
            {},
            "GC125 transformers has no model class 'T5ForCausalLM'",
        ),
        ("hf:bert:BertConfig", {}, "GC125 transformers has no model class 'BertConfig'"),
        (
            "hf:bert:GPT2LMHeadModel",
            {},
            "GC125 GPT2LMHeadModel of hf:bert cannot be built or run with small sizes (",
        ),
        (
            "hf:clip_text_model",
            {},
            "GC125 transformers has no class with a head for 'hf:clip_text_model'. Name one: hf:clip_text_model:CLASS.",
        ),
        (
            "hf:dinat",
            {},
            "GC125 DinatForImageClassification of hf:dinat cannot be built or run with small sizes (it needs the "
            "package natten). Write a factory for it: FILE.py:NAME.",
        ),
        (
            "hf:dots3_note",
            {},
            "GC125 Dots3NoteForConditionalGeneration of hf:dots3_note cannot be built or run with small sizes "
            "(ValueError: adapter_in_dim must match hidden_size). ",
        ),
        (
            "hf:pi0",
            {},
            "GC125 PI0ForConditionalGeneration of hf:pi0 cannot be built or run with small sizes (its forward requires "
            "state, for which gradctl has no inputs). ",
        ),
        (
            "hf:llama",
            {"arguments": ("num_layer=1",)},
            "GC108 LlamaConfig has no field 'num_layer' (did you mean ",
        ),
        ("hf:bert@flash_attention_2", {}, "GC125 BertForMaskedLM of hf:bert cannot be built or run with small sizes ("),
    ],
)
def test_what_is_refused_and_how(target, options, said):
    assert message(target, **options).startswith(said)


# A folder


@pytest.fixture
def saved(tmp_path):
    """Return a model that was saved, and its folder."""
    torch.manual_seed(4)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = transformers.BertForTokenClassification(transformers.BertConfig(vocab_size=40, **sizes)).eval()
    model.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved"


def test_a_checkpoint_is_the_model_that_was_saved(saved):
    model, folder = saved
    subject = loaded(f"hf:{folder}")
    assert type(subject.model) is type(model)
    assert torch.equal(outputs(subject)["logits"], model(**subject.kwargs).logits)
    assert loaded(f"hf:{folder}@eager").model.config._attn_implementation == "eager"


def test_a_class_that_the_checkpoint_has_no_weights_for_is_refused(saved):
    said = message(f"hf:{saved[1]}:BertForSequenceClassification")
    assert "has no weights for" in said
    assert said.startswith("GC121")


def test_pickled_weights_are_refused(saved):
    model, folder = saved
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert message(f"hf:{folder}") == (
        f"GC901 {folder} has pickled weights only (*.bin), which can run code when loaded. Save them with "
        "save_pretrained(folder, safe_serialization=True)."
    )


def test_code_beside_the_weights_is_not_run(saved):
    folder = saved[1]
    (folder / "own.py").write_text("raise SystemExit('it ran')")
    content = json.loads((folder / "config.json").read_text())
    of_own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(content | of_own))
    assert message(f"hf:{folder}") == (
        f"GC901 {folder} has a model in code of its own ('own'), which runs when it is loaded. If you trust its "
        "author, load it in a factory: FILE.py:NAME."
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "GC125 there is no file '{folder}/config.json'."),
        ("{", "GC125 {folder}/config.json is not JSON ("),
        ("[]", "GC125 {folder}/config.json holds no configuration: its JSON is not an object."),
        (
            '{"model_type": "bret"}',
            "GC125 {folder}/config.json has the unknown model_type 'bret' (did you mean 'bert'?).",
        ),
        ('{"model_type": "bert"}', "GC125 {folder} has no weights: no *.safetensors file is in it."),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused(content, said, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert message(f"hf:{tmp_path}").startswith(said.format(folder=tmp_path))


def test_damaged_weights_and_settings_are_refused(saved):
    folder = saved[1]
    assert message(f"hf:{folder}", arguments=("vocab_size=3",)) == (
        f"GC108 {folder} has a configuration of its own. Leave out --arg vocab_size."
    )
    (folder / "model.safetensors").write_bytes(b"\0" * 20)
    assert message(f"hf:{folder}").startswith(
        f"GC125 {folder} cannot be loaded as BertForTokenClassification and run ("
    )


@pytest.mark.parametrize(
    ("architectures", "said"),
    [
        ([3], "GC125 transformers has no model class '3'. For hf:bert: BertForMaskedLM, "),
        (3, "GC121 {folder} has no weights for "),  # for the default class, whose head was not saved
    ],
)
def test_a_class_that_the_configuration_cannot_mean_is_refused(architectures, said, saved):
    file = saved[1] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": architectures}))
    assert message(f"hf:{saved[1]}").startswith(said.format(folder=saved[1]))


# All types


@pytest.mark.parametrize("seed", sampled(range(12), always=[0]))
def test_a_type_is_built_and_run_or_refused_with_its_reason(seed):
    drawn = random.Random(seed).sample(types_with_a_head(), 6)
    outcomes = [tried(each) for each in drawn]
    assert [each for each in outcomes if each.state == "crashed"] == []
    assert [each.said for each in outcomes if each.state == "refused" and not each.said.startswith("GC125 ")] == []


def test_most_of_the_common_types_are_built():
    common = ["gpt2", "bert", "roberta", "t5", "bart", "llama", "mistral", "mixtral", "qwen3", "gemma3", "deepseek_v3"]
    common += ["vit", "convnext", "resnet", "segformer", "whisper", "wav2vec2", "qwen2_vl", "mamba2", "detr"]
    assert {each: tried(each).state for each in common} == dict.fromkeys(common, "built")


def test_the_inputs_are_tensors_of_a_model_that_has_gradients():
    subject = loaded("hf:gemma3")
    assert all(isinstance(each, Tensor) for each in subject.kwargs.values())
    assert outputs(subject)["logits"].requires_grad
