from __future__ import annotations

import argparse
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from gradctl.core.errors import GradctlError, TargetError, TrustError
from gradctl.subject.loading.weights import load_weights


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.fc1 = nn.Linear(4, 3)
        self.bn = nn.BatchNorm1d(3)
        self.fc2 = nn.Linear(3, 2)

    def forward(self, x):
        return self.fc2(self.bn(self.fc1(x)))


class Tied(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def same(one, other):
    return all(value.equal(other.state_dict()[name]) for name, value in one.state_dict().items())


def loaded(path, model=None):
    model = model if model is not None else Net(seed=1)
    load_weights(model, path, "net.py")
    return model


def message(path, model=None, error=TargetError):
    with pytest.raises(error) as caught:
        loaded(path, model)
    assert caught.value.exit_code == 2
    return str(caught.value)


# Files that fit


def saved(state, path):
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin", ".PT"])
def test_a_state_dict_is_loaded(tmp_path, suffix):
    assert same(loaded(saved(Net().state_dict(), tmp_path / f"w{suffix}")), Net())


def test_the_old_format_of_torch_save_is_loaded(tmp_path):
    torch.save(Net().state_dict(), tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert same(loaded(tmp_path / "w.pt"), Net())


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_a_state_dict_inside_a_checkpoint_is_loaded(tmp_path, key):
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}, key: Net().state_dict()}, tmp_path / "w.pt")
    assert same(loaded(tmp_path / "w.pt"), Net())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_that_all_names_have_are_understood(tmp_path, prefix):
    state = {prefix + name: value for name, value in Net().state_dict().items()}
    assert same(loaded(saved(state, tmp_path / "w.safetensors")), Net())


def test_weights_of_a_compiled_model_fit_the_plain_one_and_back(tmp_path):
    compiled = torch.compile(Net())
    assert same(loaded(saved(compiled.state_dict(), tmp_path / "compiled.pt")), Net())
    assert same(loaded(saved(Net().state_dict(), tmp_path / "plain.pt"), torch.compile(Net(seed=1)))._orig_mod, Net())


def test_a_submodule_that_is_called_module_keeps_its_name(tmp_path):
    def wrapped(seed):
        model = nn.Module()
        model.module, model.other = Net(seed), nn.Linear(1, 1)
        return model

    assert same(loaded(saved(wrapped(0).state_dict(), tmp_path / "w.pt"), wrapped(1)).module, Net())
    state = {f"module.{name}": value for name, value in wrapped(0).state_dict().items()}
    assert same(loaded(saved(state, tmp_path / "w.pt"), wrapped(1)).module, Net())


@pytest.mark.parametrize("name", ["embedding.weight", "head.weight"])
def test_of_tied_weights_one_name_is_enough(tmp_path, name):
    model = loaded(saved({name: Tied().embedding.weight.detach()}, tmp_path / "w.safetensors"), Tied(seed=1))
    assert model.head.weight is model.embedding.weight
    assert same(model, Tied())


def test_what_safetensors_saves_of_a_tied_model_is_loaded(tmp_path):
    save_model(Tied(), str(tmp_path / "w.safetensors"))
    assert same(loaded(tmp_path / "w.safetensors", Tied(seed=1)), Tied())


def test_parameters_that_share_memory_as_two_objects_are_tied_too(tmp_path):
    def shared(seed):
        model = Tied(seed)
        model.head.weight = nn.Parameter(model.embedding.weight.detach())
        return model

    path = saved({"embedding.weight": shared(0).embedding.weight.detach()}, tmp_path / "w.safetensors")
    assert same(loaded(path, shared(1)), Tied())


def test_a_file_from_before_batches_were_counted_is_loaded(tmp_path):
    state = {name: value for name, value in Net().state_dict().items() if "num_batches" not in name}
    assert loaded(saved(state, tmp_path / "w.safetensors")).fc1.weight.equal(Net().fc1.weight)


def test_weights_in_half_precision_are_loaded_into_float32(tmp_path):
    model = loaded(saved(Net().half().state_dict(), tmp_path / "w.safetensors"))
    assert model.fc1.weight.equal(Net().fc1.weight.half().float())


def test_a_method_of_a_module_takes_the_weights_of_its_module(tmp_path):
    model = Net(seed=1)
    loaded(saved(Net().state_dict(), tmp_path / "w.pt"), model.forward)
    assert same(model, Net())


# Files that do not fit

RENAME = "Rename them in the file, or load it in your factory."


def test_missing_and_unknown_names_are_listed_with_the_nearest(tmp_path):
    state = Net().state_dict()
    state["fc2.b"] = state.pop("fc2.bias")
    path = saved(dict(state), tmp_path / "w.safetensors")
    assert message(path) == (
        f"GC121 {path}: 2 of 10 names do not fit the model: missing fc2.bias; unknown fc2.b (did you mean 'fc2.bias'?)."
        f" {RENAME}"
    )


def test_of_many_names_the_first_few_are_listed(tmp_path):
    path = saved({"a": torch.ones(1)}, tmp_path / "w.safetensors")
    assert message(path) == (
        f"GC121 {path}: 9 of 10 names do not fit the model: missing fc1.weight, fc1.bias, bn.weight and 5 more; "
        f"unknown a. {RENAME}"
    )


def test_a_wrong_shape_is_named_with_both_shapes(tmp_path):
    state = dict(Net().state_dict(), **{"fc1.weight": torch.ones(3, 5)})
    path = saved(state, tmp_path / "w.safetensors")
    assert message(path) == (
        f"GC121 {path}: 1 of 9 names do not fit the model: of another shape fc1.weight ([3, 5], not [3, 4]). {RENAME}"
    )


def test_tied_weights_that_differ_in_the_file_are_not_loaded_half(tmp_path):
    state = {"embedding.weight": torch.ones(5, 3), "head.weight": torch.zeros(5, 3)}
    path = saved(state, tmp_path / "w.safetensors")
    assert message(path, Tied()) == (
        f"GC121 {path}: 1 of 2 names do not fit the model: one tensor in the model and two in the file "
        f"embedding.weight and head.weight. {RENAME}"
    )


def test_a_prefix_that_only_some_names_have_is_no_prefix(tmp_path):
    state = {name if "bn" in name else f"module.{name}": value for name, value in Net().state_dict().items()}
    path = saved(state, tmp_path / "w.pt")
    assert "unknown module.fc1.weight (did you mean 'fc1.weight'?)" in message(path)


def test_a_model_that_refuses_is_quoted(tmp_path):
    class Picky(Net):
        def _load_from_state_dict(self, *args):
            raise ValueError("version 2 is wanted")

    path = saved(Net().state_dict(), tmp_path / "w.pt")
    assert message(path, Picky()) == (
        f"GC121 {path}: the model refuses them: ValueError: version 2 is wanted. {RENAME}"
    )


def test_a_function_has_no_weights(tmp_path):
    assert message(saved(Net().state_dict(), tmp_path / "w.pt"), torch.sin) == (
        "GC121 net.py is a function, which has no weights. Leave out --weights."
    )


# Files that cannot be read


def test_a_missing_file_names_the_nearest(tmp_path):
    saved(Net().state_dict(), tmp_path / "weights.pt")
    assert message(tmp_path / "weight.pt") == (
        f"GC122 there is no file '{tmp_path}/weight.pt' (did you mean 'weights.pt'?)."
    )


def test_a_wrong_suffix_lists_what_is_understood(tmp_path):
    assert message(tmp_path / "w.h5") == (
        f"GC122 {tmp_path}/w.h5 has an unsupported suffix; supported: .safetensors, .pt, .pth, .bin."
    )


def test_a_folder_is_refused(tmp_path):
    (tmp_path / "w.pt").mkdir()
    assert message(tmp_path / "w.pt") == f"GC122 {tmp_path}/w.pt is a folder; name a file in it."


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_an_empty_file_is_named(tmp_path, suffix):
    path = tmp_path / f"w.{suffix}"
    path.write_bytes(b"")
    assert message(path) == f"GC122 {path} is empty. Write it again."


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_file_cut_off_anywhere_is_damaged(tmp_path, suffix):
    path = saved(dict(Net().state_dict()), tmp_path / f"w.{suffix}")
    whole = path.read_bytes()
    for length in (1, 5, 9, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        kind = "torch.save" if suffix == "pt" else "safetensors"
        said = message(path)
        assert said.startswith(f"GC122 {path} is damaged, or no {kind} file")
        assert said.endswith("Write or copy it again.")
        assert "\n" not in said
        assert len(said) < len(str(path)) + 250


@pytest.mark.parametrize("content", [b"hello, world", b"\n", b"PK\x03\x04 and then nothing", b"(" * 50])
def test_bytes_that_are_no_checkpoint_are_damaged(tmp_path, content):
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    assert message(path).startswith(f"GC122 {path} is damaged, or no torch.save file")


def test_a_file_without_a_state_dict_says_what_it_holds(tmp_path):
    for content, what in (
        (torch.ones(2), "an object of type 'Tensor'"),
        ({"epoch": 3, "loss": 0.1}, "a dict with epoch, loss"),
        ({}, "a dict with nothing in it"),
        ({0: torch.ones(1)}, "a dict with 0"),
    ):
        torch.save(content, tmp_path / "w.pt")
        assert message(tmp_path / "w.pt") == (
            f"GC122 {tmp_path}/w.pt holds {what}, and no state dict. Save model.state_dict()."
        )


def test_a_file_that_the_system_refuses_says_why(tmp_path):
    path = tmp_path / f"{'w' * 300}.pt"
    assert message(path) == f"GC122 {path} cannot be read: File name too long."


# Files that would run code

REMEDY = "which runs when loaded. Save a state dict: torch.save(model.state_dict(), 'w.pt')."


def test_a_pickled_model_is_refused_with_its_classes(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "w.pt")
    assert message(tmp_path / "w.pt", error=TrustError) == (
        f"GC901 {tmp_path}/w.pt holds pickled code (torch.nn.modules.linear.Linear), {REMEDY}"
    )


def test_of_many_classes_three_are_named(tmp_path):
    torch.save(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Tanh(), nn.GELU()), tmp_path / "w.pt")
    assert message(tmp_path / "w.pt", error=TrustError) == (
        f"GC901 {tmp_path}/w.pt holds pickled code (torch.nn.modules.activation.GELU, "
        f"torch.nn.modules.activation.ReLU, torch.nn.modules.activation.Tanh, …), {REMEDY}"
    )


def test_a_checkpoint_with_its_arguments_is_refused(tmp_path):
    torch.save({"args": argparse.Namespace(lr=1), "model": Net().state_dict()}, tmp_path / "w.pt")
    assert "holds pickled code (argparse.Namespace)" in message(tmp_path / "w.pt", error=TrustError)


def test_the_old_format_names_one_class(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert message(tmp_path / "w.pt", error=TrustError) == (
        f"GC901 {tmp_path}/w.pt holds pickled code (torch.nn.modules.linear.Linear), {REMEDY}"
    )


class Trap:
    def __reduce__(self):
        return (os.mkdir, ("sprung",))


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_is_refused_and_does_not_run(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pt").write_bytes(pickle.dumps(Trap(), protocol=protocol))
    with pytest.raises(GradctlError) as caught:
        loaded(tmp_path / "w.pt")
    assert isinstance(caught.value, TrustError)
    torch.save({"w": torch.ones(1), "trap": Trap()}, tmp_path / "w.pt")
    assert "holds pickled code (posix.mkdir)" in message(tmp_path / "w.pt", error=TrustError)
    assert not (tmp_path / "sprung").exists()


def test_a_torchscript_program_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "w.pt")
    assert message(tmp_path / "w.pt", error=TrustError) == f"GC901 {tmp_path}/w.pt is a TorchScript program, {REMEDY}"
