"""Files of static forms: what is saved comes back, what is no model is named, and nothing runs without trust."""

from __future__ import annotations

import io
import os
import resource
import struct
import zipfile

import pytest
import torch
from torch import nn

from gradctl.core.errors import ResourceError, TargetError, TrustError
from gradctl.forms.artifact import artifact_format, ensure_fits, load, place, save, staged_file
from gradctl.forms.table import form_named
from gradctl.subject.instance import Instance
from gradctl.subject.subject import Subject

FORMS = {"trace": ".pt", "script": ".pt", "export": ".pt2"}


def two_layers(hidden=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, hidden), nn.BatchNorm1d(hidden), nn.Linear(hidden, 2)).eval()


def instance_of(model, inputs=None):
    return Instance(
        Subject(target="net.py:model", model=model, args=(torch.randn(5, 4) if inputs is None else inputs,))
    )


@pytest.fixture(params=FORMS)
def saved(request, tmp_path):
    """Give a form's name and a file of it."""
    path = tmp_path / f"model{FORMS[request.param]}"
    save(form_named(request.param).capture(instance_of(two_layers())), path)
    return request.param, path


def message_of(path, *, trusted=True):
    with pytest.raises((TargetError, TrustError)) as caught:
        load(path, trusted=trusted)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(str(path), "FILE")


def test_what_is_saved_comes_back_as_the_form_it_was(saved):
    form, path = saved
    loaded = load(path, trusted=True)
    model, x = two_layers(), torch.randn(5, 4)
    assert loaded.form == form
    assert torch.equal(loaded.call(x), model(x))
    assert loaded.parameters.keys() == dict(model.named_parameters()).keys()
    assert loaded.buffers.keys() == dict(model.named_buffers()).keys()


def test_a_frozen_parameter_comes_back_frozen(tmp_path):
    for form, suffix in FORMS.items():
        model = two_layers()
        model[0].bias.requires_grad_(False)
        save(form_named(form).capture(instance_of(model)), tmp_path / f"model{suffix}")
        assert not load(tmp_path / f"model{suffix}", trusted=True).parameters["0.bias"].requires_grad


def test_tied_weights_come_back_as_one_tensor(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    for form, suffix in FORMS.items():
        save(form_named(form).capture(instance_of(model)), tmp_path / f"model{suffix}")
        parameters = load(tmp_path / f"model{suffix}", trusted=True).parameters
        assert parameters["0.weight"].data_ptr() == parameters["1.weight"].data_ptr()


def test_without_trust_nothing_is_loaded(saved):
    form, path = saved
    what = "an exported program with pickled parts" if form == "export" else "a TorchScript program"
    assert message_of(path, trusted=False) == (
        f"GC901 FILE is {what}, code that runs when loaded. Pass --trust if you trust its author."
    )


class RunsWhenLoaded(nn.Module):
    """Makes a file when TorchScript loads it: a program may say how its state is put back."""

    def __init__(self, path: str):
        super().__init__()
        self.path, self.held = path, torch.ones(1)

    def forward(self, x):
        return x * self.held

    @torch.jit.export
    def __getstate__(self):
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        self.path, self.training = state[0], state[1]
        self.held = torch.from_file(state[0], True, 4)  # makes the file, as long as four floats


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_code_in_a_torchscript_file_does_not_run_without_trust(tmp_path):
    path, sprung = tmp_path / "model.pt", tmp_path / "sprung"
    torch.jit.save(torch.jit.script(RunsWhenLoaded(str(sprung))), path)
    assert "GC901 FILE is a TorchScript program" in message_of(path, trusted=False)
    assert not sprung.exists()
    load(path, trusted=True)
    assert sprung.exists()


def test_code_in_an_exported_file_does_not_run_without_trust(tmp_path):
    path, sprung = tmp_path / "model.pt2", tmp_path / "sprung"
    save(form_named("export").capture(instance_of(two_layers())), path)
    planted = io.BytesIO()
    torch.save(Trap(sprung), planted)
    with zipfile.ZipFile(path) as whole:
        members = {name: whole.read(name) for name in whole.namelist()}
    assert "archive/data/sample_inputs/model.pt" in members
    with zipfile.ZipFile(path, "w") as changed:
        for name, content in members.items():
            changed.writestr(name, planted.getvalue() if "sample_inputs" in name else content)
    assert "GC901 FILE is an exported program with pickled parts" in message_of(path, trusted=False)
    assert not sprung.exists()
    message_of(path, trusted=True)
    assert sprung.exists()


@pytest.mark.parametrize("trusted", [True, False])
def test_a_file_that_unpacks_to_far_more_than_it_has_is_not_unpacked(tmp_path, trusted):
    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/models/model.json", bytes(2**28 + 1))
    assert message_of(path, trusted=trusted) == (
        f"GC903 FILE has {path.stat().st_size:,} bytes and unpacks to 268,435,457. "
        "Write it without compression if that is right."
    )


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.pt2")
    said = "GC142 FILE is a pipe or a device, not a file. Write its contents to a file."
    assert message_of(tmp_path / "model.pt2") == said


def test_the_kind_is_told_by_content_and_not_by_the_suffix(saved):
    form, path = saved
    renamed = path.rename(path.with_suffix(".bin"))
    assert artifact_format(renamed) == ("export" if form == "export" else "torchscript")


def test_an_empty_file_says_so(tmp_path):
    (tmp_path / "model.pt2").touch()
    assert message_of(tmp_path / "model.pt2") == "GC142 FILE is empty. Write it again."


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.99])
def test_a_file_that_is_cut_off_says_so(saved, kept):
    _, path = saved
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert message_of(path) == (
        "GC142 FILE is cut off: it begins like a zip archive, and its end is missing. Write or copy it again."
    )


def test_overwritten_weights_are_found_by_their_checksum_where_torch_loads_them(saved):
    form, path = saved
    content = path.read_bytes()
    weight = struct.pack("<f", float(two_layers()[0].weight.detach().flatten()[0]))
    path.write_bytes(content.replace(weight, struct.pack("<f", 7.0)))
    (torch.export.load if form == "export" else torch.jit.load)(str(path))  # torch says nothing
    assert "FILE is damaged: 'archive/data/" in message_of(path)
    assert message_of(path).endswith("does not have its checksum. Write or copy it again.")


def test_a_member_whose_name_is_no_text_is_damaged(saved):
    _, path = saved
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("wörter", b"")
    path.write_bytes(path.read_bytes().replace("ö".encode(), b"\xff\xff"))
    said = message_of(path)
    assert said.startswith(
        "GC142 FILE is damaged (UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in position 1"
    )
    assert said.endswith("). Write or copy it again.")


def test_a_file_that_is_missing_names_the_nearest(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"PK")
    with pytest.raises(TargetError, match=r"GC142 there is no file '.*/mdel.pt' \(did you mean 'model.pt'\?\)\."):
        load(tmp_path / "mdel.pt", trusted=True)


def test_a_folder_is_no_file(tmp_path):
    assert message_of(tmp_path) == "GC142 FILE is a folder; name a file in it."


def test_a_state_dict_is_no_model(tmp_path):
    torch.save(two_layers().state_dict(), tmp_path / "weights.pt")
    assert message_of(tmp_path / "weights.pt") == (
        "GC142 FILE holds no model: it is what torch.save wrote, weights or a pickled object. "
        "Give weights with --weights."
    )


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"a.txt": "x"}, "a zip archive of another kind. A model file is TorchScript, .pt2 or .onnx."),
        (
            {"m/archive_format": "pt2", "m/data/aotinductor/model/a.so": "x"},
            "a compiled package (AOTInductor) without its program. Save it with torch.export.save.",
        ),
    ],
    ids=["foreign", "compiled"],
)
def test_another_archive_is_no_model(tmp_path, members, said):
    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    assert message_of(tmp_path / "model.pt2") == f"GC142 FILE holds no model: it is {said}"


def test_a_text_file_is_no_model(tmp_path):
    (tmp_path / "model.pt").write_text("hello")
    assert message_of(tmp_path / "model.pt") == (
        "GC142 FILE holds no model: it is no zip archive. A model file is TorchScript, .pt2 or .onnx."
    )


def test_a_program_that_torch_cannot_read_says_what_torch_says(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        for name in ("model/constants.pkl", "model/code/a.py", "model/data.pkl", "model/version"):
            archive.writestr(name, "9999")
    said = message_of(tmp_path / "model.pt")
    assert said.startswith(f"GC142 FILE cannot be loaded by torch {torch.__version__}: RuntimeError: ")


def test_a_file_of_the_same_model_fits(saved):
    _, path = saved
    ensure_fits(load(path, trusted=True), instance_of(two_layers()))


def test_a_file_of_another_model_lists_what_differs(saved):
    _, path = saved
    torch.manual_seed(0)
    other = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2, bias=False)).eval()
    with pytest.raises(TargetError) as caught:
        ensure_fits(load(path, trusted=True), instance_of(other), "model.pt")
    assert str(caught.value) == (
        "GC141 model.pt is not a form of net.py:model: 9 of 9 names differ: unknown 2.bias, 1.running_mean, "
        "1.running_var and 1 more; of another shape 0.weight ([3, 4], not [6, 4]), 0.bias ([3], not [6]), "
        "1.weight ([3], not [6]) and 2 more."
    )


def test_a_frozen_program_holds_no_parameter(tmp_path):
    torch.jit.save(torch.jit.freeze(torch.jit.script(two_layers())), str(tmp_path / "model.pt"))
    with pytest.raises(TargetError, match="GC141 the file is not a form .* It holds none at all: was it frozen?"):
        ensure_fits(load(tmp_path / "model.pt", trusted=True), instance_of(two_layers()))


def doubled(x):
    return 2 * x.sin()


def test_a_plain_function_comes_back_and_fits(tmp_path):
    for form, suffix in FORMS.items():
        x = torch.randn(3)
        path = tmp_path / f"model{suffix}"
        save(form_named(form).capture(instance_of(doubled, x)), path)
        loaded = load(path, trusted=True)
        ensure_fits(loaded, instance_of(doubled, x))
        assert torch.equal(loaded.call(x), doubled(x))


def test_a_file_takes_its_place_only_when_it_is_moved(tmp_path):
    target = tmp_path / "model.pt"
    target.write_text("old")
    with staged_file(target) as beside:
        beside.write_text("new")
        assert beside.name == "model.pt"
    assert (target.read_text(), [file.name for file in tmp_path.iterdir()]) == ("old", ["model.pt"])
    with staged_file(target) as beside:
        beside.write_text("new")
        place(beside, target)
    assert (target.read_text(), [file.name for file in tmp_path.iterdir()]) == ("new", ["model.pt"])


def test_a_link_stays_a_link_to_what_is_written(tmp_path):
    (tmp_path / "real.pt").write_text("old")
    (tmp_path / "link.pt").symlink_to("real.pt")
    with staged_file(tmp_path / "link.pt") as beside:
        beside.write_text("new")
        place(beside, tmp_path / "link.pt")
    assert (tmp_path / "link.pt").is_symlink()
    assert (tmp_path / "real.pt").read_text() == "new"


def test_a_folder_that_is_missing_is_named(tmp_path):
    target = tmp_path / "missing" / "model.pt"
    with pytest.raises(ResourceError) as caught, staged_file(target):
        pass
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        f"GC131 {str(target)!r} cannot be written: there is no folder {str(target.parent)!r}. "
        "Create it, or use another "
        "path."
    )


def test_a_folder_in_the_place_of_the_file_is_refused(tmp_path):
    with pytest.raises(ResourceError, match="GC131 .* it is a folder. Give a path that you may write to."):
        with staged_file(tmp_path):
            pass


@pytest.mark.parametrize("form", FORMS)
def test_a_disk_that_refuses_is_no_fault_of_the_model(form, tmp_path):
    captured = form_named(form).capture(instance_of(two_layers(hidden=500)))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        with pytest.raises(
            ResourceError, match="GC131 .* cannot be written: File too large. Give a path that you may write to."
        ):
            save(captured, tmp_path / f"model{FORMS[form]}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
