"""Files of tensors are data from strangers: what lies about its size, holds code or names other files is refused."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from gradctl.core.errors import GradctlError, TargetError, TrustError
from gradctl.core.target_files import INPUT_SUFFIXES
from gradctl.subject.inputs.tensor_file import read_tensors

HEADER = "{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
AGAIN = "Write or copy it again."


def read(path):
    return read_tensors(path, INPUT_SUFFIXES, "Save tensors.")


def refusal(path, error=TargetError):
    with pytest.raises(GradctlError) as caught:
        read(path)
    assert type(caught.value) is error
    return str(caught.value).replace(str(path), "FILE")


def npy(header, content=b""):
    """Return an ``.npy`` file with this header, right or wrong."""
    line = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(line)) + line + content


def archive(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as written:
        for name, content in members.items():
            written.writestr(name, content)
    return path


def checkpoint(path, **changes):
    """Write what ``torch.save`` writes of a dict with one tensor, some members of it changed."""
    whole = io.BytesIO()
    torch.save({"x": torch.ones(4)}, whole)
    with zipfile.ZipFile(whole) as written:
        members = {name: written.read(name) for name in written.namelist()}
    changed = {
        name: changes.get(name.rpartition("/")[2].partition(".")[0]) or content for name, content in members.items()
    }
    return archive(path, changed)


# ------------------------------------------------------------------ kinds of files


@pytest.mark.parametrize("suffix", INPUT_SUFFIXES)
def test_a_pipe_is_not_waited_for(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    os.mkfifo(path)
    assert refusal(path) == "GC122 FILE is a pipe or a device, not a file. Write its contents to a file."


def test_a_device_is_not_read_to_its_end(tmp_path):
    (tmp_path / "x.pt").symlink_to("/dev/zero")
    assert refusal(tmp_path / "x.pt").startswith("GC122 FILE is a pipe or a device")


def test_a_link_to_a_file_is_a_file(tmp_path):
    np.savez(tmp_path / "real.npz", x=np.ones(3, np.float32))
    (tmp_path / "link.npz").symlink_to("real.npz")
    assert read(tmp_path / "link.npz")["x"].tolist() == [1.0] * 3


# ------------------------------------------------------------------ .npz


@pytest.mark.parametrize(
    ("member", "said"),
    [
        (
            npy(HEADER.format(dtype="<f8", shape="(10**12,)").replace("10**12", "1" + "0" * 12)),
            "says 8000000000000 bytes",
        ),
        (npy(HEADER.format(dtype="<f8", shape=f"({2**62}, {2**62})")), f"says {2**127} bytes"),
        (npy(HEADER.format(dtype="|V1000000000", shape="(1,)")), "says 1000000000 bytes"),
        (npy("(" * 9000), "its header is no Python literal"),
        (npy("-" * 9000 + "1"), "its header is no Python literal"),
        (npy("[" * 150 + "]" * 150), "(Header is not a dictionary"),
        (npy(HEADER.format(dtype="<f4", shape="(-1,)"), b"1234"), "negative dimensions"),
        (b"\x93NUMPY\x09\x00", "(its .npy format 9.0 is not supported)"),
        (b"words of text", "the magic string is not correct"),
    ],
    ids=[
        "terabytes",
        "beyond counting",
        "one of a gigabyte",
        "brackets",
        "signs",
        "a list",
        "negative",
        "format",
        "text",
    ],
)
def test_an_array_that_lies_is_damaged_and_takes_no_memory(tmp_path, member, said):
    message = refusal(archive(tmp_path / "x.npz", {"x.npy": member}))
    assert message.startswith("GC122 FILE is damaged, or no npz file (")
    assert said in message
    assert message.endswith(AGAIN)


def test_an_archive_that_unpacks_to_far_more_than_it_has_is_not_unpacked(tmp_path):
    path = archive(tmp_path / "x.npz", {"x.npy": bytes(2**28 + 1)}, zipfile.ZIP_DEFLATED)
    assert refusal(path, TrustError) == (
        f"GC903 FILE has {path.stat().st_size:,} bytes and unpacks to 268,435,457. "
        "Write it without compression if that is right."
    )


def test_zeros_that_are_no_harm_are_unpacked(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", x=np.zeros(2**20, np.float32))
    assert read(tmp_path / "x.npz")["x"].shape == (2**20,)


def test_a_member_that_says_less_than_it_has_is_damaged(tmp_path):
    path = archive(tmp_path / "x.npz", {"x.npy": npy(HEADER.format(dtype="<f4", shape="(1,)"), b"1234") + bytes(50)})
    content = path.read_bytes()
    size = struct.pack("<I", len(npy(HEADER.format(dtype="<f4", shape="(1,)"), b"1234")) + 50)
    path.write_bytes(content.replace(size, struct.pack("<I", 3)))
    assert refusal(path).startswith("GC122 FILE is damaged, or no npz file (")


def test_an_array_of_objects_is_not_unpickled(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.array([Trap(tmp_path / "sprung")], dtype=object))
    assert refusal(tmp_path / "x.npz", TrustError) == (
        "GC901 FILE holds pickled objects, which run code when loaded. Save tensors."
    )
    assert not (tmp_path / "sprung").exists()
    np.load(tmp_path / "x.npz", allow_pickle=True)["x"]
    assert (tmp_path / "sprung").exists()


# ------------------------------------------------------------------ .pt


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("old", [False, True], ids=["archive", "old format"])
def test_a_checkpoint_with_code_in_it_is_not_run(tmp_path, old):
    path = tmp_path / "x.pt"
    torch.save({"x": torch.ones(1), "trap": Trap(tmp_path / "sprung")}, path, _use_new_zipfile_serialization=not old)
    assert refusal(path, TrustError).startswith("GC901 FILE holds pickled code (posix.mkdir), which runs when loaded.")
    assert not (tmp_path / "sprung").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "sprung").exists()


def test_a_checkpoint_that_unpacks_to_far_more_than_it_has_is_not_unpacked(tmp_path):
    path = archive(tmp_path / "x.pt", {"x/data/0": bytes(2**28 + 1)}, zipfile.ZIP_DEFLATED)
    assert refusal(path, TrustError).startswith("GC903 FILE has ")


@pytest.mark.parametrize(
    ("pickled", "said"),
    [
        (b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b".", "it lies too deep in others"),
        (b"\x80\x02]q\x00h\x00a.", "it holds itself"),
        (b"\x80\x02" + b"]" + b"q\x00]h\x00ah\x00a" * 40 + b".", "hold each other 2.2e+12 times"),
    ],
    ids=["deep", "in itself", "each twice"],
)
def test_lists_that_cannot_be_followed_are_damaged(tmp_path, pickled, said):
    message = refusal(checkpoint(tmp_path / "x.pt", data=pickled))
    assert message.startswith("GC122 FILE is damaged, or no torch.save file (")
    assert said in message


def test_a_storage_that_is_larger_than_its_record_is_damaged(tmp_path):
    whole = zipfile.ZipFile(checkpoint(tmp_path / "right.pt")).read("archive/data.pkl")
    assert whole.count(b"K\x04") == 2, "the number of elements of the storage, and of the tensor"
    message = refusal(
        checkpoint(tmp_path / "x.pt", data=whole.replace(b"K\x04", b"\x8a\x06" + (10**12).to_bytes(6, "little")))
    )
    assert "record size (16 bytes) does not match expected size (4000000000000 bytes" in message


# ------------------------------------------------------------------ .pb


def pb(path, **fields):
    path.write_bytes(
        TensorProto(**{"name": "x", "dims": [1], "data_type": TensorProto.FLOAT, **fields}).SerializeToString()
    )
    return path


def test_a_tensor_in_another_file_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.bin").write_bytes(b"1234")
    location = onnx.StringStringEntryProto(key="location", value="secret.bin")
    path = pb(tmp_path / "x.pb", data_location=TensorProto.EXTERNAL, external_data=[location])
    assert onnx.numpy_helper.to_array(TensorProto.FromString(path.read_bytes())).tobytes() == b"1234"
    assert refusal(path, TrustError) == "GC902 FILE keeps its numbers in another file, which is not read. Save tensors."


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"data_type": 99, "raw_data": b"1234"}, "its type is 99, which ONNX does not have"),
        ({"dims": [-1], "raw_data": b"12345678"}, "its sizes are [-1]"),
        ({"dims": [2**62, 2**62], "raw_data": b"1234"}, "cannot reshape array of size 1"),
        ({"raw_data": b"12345678"}, "cannot reshape array of size 2"),
    ],
    ids=["type", "negative", "beyond counting", "too long"],
)
def test_a_tensor_that_lies_is_damaged(tmp_path, fields, said):
    message = refusal(pb(tmp_path / "x.pb", **fields))
    assert message.startswith("GC122 FILE is damaged, or no ONNX tensor file (")
    assert said in message


# ------------------------------------------------------------------ .safetensors


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 10**5) + b"[" * 10**5,
        struct.pack("<Q", 57) + b'{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,4611]}}'[:57],
        pickle.dumps(Trap("sprung")),
    ],
    ids=["header", "depth", "offsets", "pickle"],
)
def test_a_damaged_header_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(content)
    assert refusal(tmp_path / "x.safetensors").startswith("GC122 FILE is damaged, or no safetensors file (")
    assert not (tmp_path / "sprung").exists()
