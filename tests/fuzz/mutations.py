"""Mutations of files, drawn from a seed: of their bytes, and of what the bytes say.

Each is a function of a generator and a value, and gives another; ``mutated`` picks some of them.
"""

from __future__ import annotations

import io
import json
import random
import re
import struct
import zipfile
from collections.abc import Callable, Sequence

import onnx
from onnx import AttributeProto, ModelProto, TensorProto

from tests.fuzz.corpus import archives, configurations, onnx_models, reports, tensor_files

__all__ = ["KINDS", "mutated"]

_LARGE = (0, -1, 1, 2**15, 2**31 - 1, 2**31, -(2**31), 2**32, 2**40, 2**62, 2**63 - 1, -(2**63))
_NAMES = ("", "input", "x", "..", "/", "\0", "a" * 5000, "é\u2028", "%s%n", "[red]", "0.weight")
_LOCATIONS = (
    "/etc/passwd",
    "../secret.bin",
    "/dev/zero",
    "sub/../weights.bin",
    "",
    ".",
    "model.onnx",
    "link.bin",
    "pipe",
)


# ------------------------------------------------------------------ bytes


def flipped(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut_off(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    return content[: rng.randrange(len(content))]


def repeated(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    begin, end = _range(rng, content)
    return content[:end] + content[begin:end] * rng.choice([1, 2, 50]) + content[end:]


def removed(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    begin, end = _range(rng, content)
    return content[:begin] + content[end:]


def inserted(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.randbytes(rng.choice([1, 4, 100])) + content[at:]


def overwritten(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(content))
    filler = rng.choice([b"\0", b"\xff", b"\x80", b"\xff\xff\xff\xff\x0f", struct.pack("<q", rng.choice(_LARGE))])
    return content[:at] + filler + content[at + len(filler) :]


def spliced(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    other = rng.choice(others)
    return content[: rng.randrange(len(content))] + other[rng.randrange(len(other)) :]


def _range(rng: random.Random, content: bytes) -> tuple[int, int]:
    begin = rng.randrange(len(content))
    return begin, min(len(content), begin + rng.choice([1, 2, 8, 64, 500]))


OF_BYTES = (flipped, cut_off, repeated, removed, inserted, overwritten, spliced)


# ------------------------------------------------------------------ ONNX


def _graphs(model: ModelProto) -> list:
    found = [model.graph, *model.functions]
    for graph in found:
        for node in graph.node:
            for attribute in node.attribute:
                found.extend([attribute.g] if attribute.HasField("g") else [])
    return found


def _nodes(model: ModelProto) -> list:
    return [node for graph in _graphs(model) for node in graph.node]


def _constants(model: ModelProto) -> list[TensorProto]:
    inner = [each.t for node in _nodes(model) for each in node.attribute if each.HasField("t")]
    return [*model.graph.initializer, *inner] or [model.graph.initializer.add(name="unused", data_type=1, dims=[2])]


def operator(rng: random.Random, model: ModelProto) -> None:
    rng.choice(_nodes(model)).op_type = rng.choice([*sorted({each.name for each in onnx.defs.get_all_schemas()}), ""])


def value_name(rng: random.Random, model: ModelProto) -> None:
    node = rng.choice(_nodes(model))
    known = [name for each in _nodes(model) for name in (*each.input, *each.output)]
    field = rng.choice([node.input, node.output])
    if field:
        field[rng.randrange(len(field))] = rng.choice([*known, *_NAMES])
    else:
        field.append(rng.choice(known))


def cycle(rng: random.Random, model: ModelProto) -> None:
    nodes = _nodes(model)
    first, second = rng.choice(nodes), rng.choice(nodes)
    if first.input and second.output:
        first.input[0] = second.output[0]


def copied_node(rng: random.Random, model: ModelProto) -> None:
    copied = onnx.NodeProto()  # apart: protobuf copies no message into a part of itself
    copied.CopyFrom(rng.choice(_nodes(model)))
    rng.choice(_graphs(model)).node.append(copied)


def attribute(rng: random.Random, model: ModelProto) -> None:
    node = rng.choice(_nodes(model))
    names = [each.name for each in node.attribute] + ["axis", "axes", "to", "value", "kernel_shape", "perm", "body"]
    if not node.attribute or rng.random() < 0.3:
        node.attribute.add(name=rng.choice(names))
    each = rng.choice(list(node.attribute))
    each.type = rng.choice([each.type, rng.randrange(16)])
    each.i, each.f = rng.choice(_LARGE), rng.choice([0.0, float("nan"), 1e38])
    each.ints.extend(rng.choice(_LARGE) for _ in range(rng.randrange(9)))
    each.name = rng.choice(names)


def kernel(rng: random.Random, model: ModelProto) -> None:
    for node in _nodes(model):
        for each in node.attribute:
            if each.ints:
                each.ints[rng.randrange(len(each.ints))] = rng.choice(_LARGE)
            elif each.type == AttributeProto.INT:
                each.i = rng.choice(_LARGE)


def dimensions(rng: random.Random, model: ModelProto) -> None:
    tensor = rng.choice(_constants(model))
    if tensor.dims and rng.random() < 0.7:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(_LARGE)
    else:
        tensor.dims.extend(rng.choice(_LARGE) for _ in range(rng.choice([1, 2, 5000])))


def element_type(rng: random.Random, model: ModelProto) -> None:
    rng.choice(_constants(model)).data_type = rng.choice([*range(30), 999, -1, 2**31 - 1])


def raw_data(rng: random.Random, model: ModelProto) -> None:
    tensor = rng.choice(_constants(model))
    tensor.raw_data = rng.randbytes(rng.choice([0, 1, 3, 16, 4096]))
    if rng.random() < 0.3:
        tensor.float_data.extend([1.0] * rng.choice([1, 100]))
        tensor.int64_data.extend([rng.choice(_LARGE)] * rng.choice([1, 3]))


def constant(rng: random.Random, model: ModelProto) -> None:
    """Other values in a constant, of its own size: shapes and bounds that an operator reads."""
    tensor = rng.choice(_constants(model))
    if tensor.int64_data:
        tensor.int64_data[rng.randrange(len(tensor.int64_data))] = rng.choice(_LARGE)
    elif tensor.raw_data:
        tensor.raw_data = flipped(rng, tensor.raw_data, ())


def external(rng: random.Random, model: ModelProto) -> None:
    tensor = rng.choice(_constants(model))
    given = {each.key: each for each in tensor.external_data}
    tensor.data_location = rng.choice([1, 1, 1, 2, 77])
    key = rng.choice(["location", "offset", "length", "checksum", "basepath", ""])
    entry = given.get(key) or tensor.external_data.add(key=key)
    entry.value = (
        rng.choice(_LOCATIONS) if key in ("location", "basepath") else rng.choice([*map(str, _LARGE), "nan", ""])
    )
    if key != "location" and "location" not in given:
        tensor.external_data.add(key="location", value="weights.bin")


def port(rng: random.Random, model: ModelProto) -> None:
    each = rng.choice([*model.graph.input, *model.graph.output])
    kind = each.type.tensor_type
    change = rng.randrange(6)
    if change == 0:
        kind.elem_type = rng.choice([*range(28), 999])
    elif change == 1:
        kind.shape.dim.add(dim_value=rng.choice(_LARGE))
    elif change == 2 and kind.shape.dim:
        rng.choice(list(kind.shape.dim)).dim_value = rng.choice(_LARGE)
    elif change == 3 and kind.shape.dim:
        rng.choice(list(kind.shape.dim)).dim_param = rng.choice(_NAMES)
    elif change == 4:
        each.type.Clear()
    else:
        each.name = rng.choice(_NAMES)


def other_type(rng: random.Random, model: ModelProto) -> None:
    each = rng.choice([*model.graph.input, *model.graph.output]).type
    each.Clear()
    for _ in range(rng.choice([1, 2, 20])):
        kind = rng.choice(["sequence_type", "optional_type", "map_type"])
        each = each.map_type.value_type if kind == "map_type" else getattr(each, kind).elem_type
    each.tensor_type.elem_type = 1


def sparse(rng: random.Random, model: ModelProto) -> None:
    tensor = model.graph.sparse_initializer.add(dims=[rng.choice(_LARGE) for _ in range(rng.randrange(4))])
    tensor.values.name, tensor.values.data_type = rng.choice(["s", "0.weight"]), rng.choice([1, 7, 99])
    tensor.values.dims.append(rng.choice([2, *_LARGE]))
    tensor.values.float_data.extend([1.0, 2.0])
    tensor.indices.data_type = 7
    tensor.indices.dims.extend([rng.choice([2, *_LARGE])])
    tensor.indices.int64_data.extend([rng.choice(_LARGE), rng.choice(_LARGE)])


def opset(rng: random.Random, model: ModelProto) -> None:
    change = rng.randrange(4)
    if change == 0:
        model.opset_import.add(
            domain=rng.choice(["", "ai.onnx", "com.microsoft", "local", "x"]), version=rng.choice(_LARGE)
        )
    elif change == 1:
        rng.choice(list(model.opset_import)).version = rng.choice([*range(27), *_LARGE])
    elif change == 2:
        model.ir_version = rng.choice([*range(16), *_LARGE])
    else:
        del model.opset_import[:]


def function(rng: random.Random, model: ModelProto) -> None:
    """A function that calls itself, or calls another twice, which calls another twice, and so on."""
    depth = rng.choice([1, 2, 8, 40, 300])
    if not any(each.domain == "local" for each in model.opset_import):
        model.opset_import.add(domain="local", version=1)
    for level in range(depth):
        one = model.functions.add(name=f"f{level}", domain="local", input=["a"], output=["c"])
        one.opset_import.add(domain="", version=17)
        one.opset_import.add(domain="local", version=1)
        following = f"f{(level + 1) % depth}" if rng.random() < 0.97 else "f0"
        is_last = level == depth - 1 and rng.random() < 0.5
        one.node.add(
            op_type="Relu" if is_last else following, domain="" if is_last else "local", input=["a"], output=["b"]
        )
        one.node.add(
            op_type="Abs" if is_last else following, domain="" if is_last else "local", input=["b"], output=["c"]
        )
    node = rng.choice(list(model.graph.node))
    node.op_type, node.domain = "f0", "local"
    del node.attribute[:]
    del node.input[1:]


def own_subgraph(rng: random.Random, model: ModelProto) -> None:
    """A graph put into a node of itself, some levels deep."""
    for _ in range(rng.choice([1, 2, 4])):
        inner = onnx.GraphProto()
        inner.CopyFrom(model.graph)
        del inner.input[:]
        node = model.graph.node.add(
            op_type=rng.choice(["If", "Loop", "Scan", "SequenceMap"]), input=["c"], output=["deep"]
        )
        for name in ("then_branch", "else_branch", "body"):
            node.attribute.add(name=name, type=AttributeProto.GRAPH).g.CopyFrom(inner)


OF_MODELS = (
    operator, value_name, cycle, copied_node, attribute, kernel, dimensions, element_type, raw_data, constant, external,
    port, other_type, sparse, opset, function, own_subgraph,
)  # fmt: skip


def _message(fields: Sequence[tuple[int, bytes]]) -> bytes:
    return b"".join(_varint(number << 3 | 2) + _varint(len(content)) + content for number, content in fields)


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def nested(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """Append subgraphs or types that lie in each other, deeper than any library would build."""
    depth = rng.choice([20, 30, 33, 60, 99, 100, 101, 1000, 3000])
    wrap = rng.choice([_in_branch, _in_sequence, _in_optional])
    inner = b""
    for _ in range(depth):
        inner = wrap(inner)
    graph = _message([(1, inner)]) if wrap is _in_branch else _message([(11, _message([(1, b"deep"), (2, inner)]))])
    return content + _message([(7, graph)])


def _in_branch(inner: bytes) -> bytes:
    branch = _message([(1, b"then_branch"), (6, _message([(1, inner)] if inner else []))]) + b"\xa0\x01\x05"
    return _message([(2, b"y"), (4, b"If"), (5, branch)])


def _in_sequence(inner: bytes) -> bytes:
    return _message([(4, _message([(1, inner)]))])


def _in_optional(inner: bytes) -> bytes:
    return _message([(9, _message([(1, inner)]))])


def _mutated_onnx(rng: random.Random) -> bytes:
    whole = [each.SerializeToString() for each in onnx_models()]
    content = rng.choice(whole)
    drawn = rng.random()
    if drawn < 0.25:
        return rng.choice(OF_BYTES)(rng, content, whole)
    if drawn < 0.32:
        return nested(rng, content, whole)
    model = onnx.load_from_string(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        try:
            rng.choice(OF_MODELS)(rng, model)
        except (ValueError, TypeError, IndexError):  # what this field cannot hold, or nothing left to change
            continue
    return model.SerializeToString()


# ------------------------------------------------------------------ safetensors


def _mutated_safetensors(rng: random.Random, name: str) -> bytes:
    files = tensor_files()
    content = files[name]
    if rng.random() < 0.4:
        return rng.choice(OF_BYTES)(rng, content, list(files.values()))
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    each = rng.choice([value for key, value in header.items() if key != "__metadata__"])
    begin, end = each["data_offsets"]
    change = rng.randrange(12)
    if change == 0:
        each["data_offsets"] = [rng.choice([begin, *_LARGE]), rng.choice([end, *_LARGE])]
    elif change == 1:
        each["shape"] = [rng.choice(_LARGE) for _ in range(rng.choice([0, 1, 2, 3000]))]
    elif change == 2:
        each["dtype"] = rng.choice(["F128", "F4", "F8_E8M0", "BOOL", "C64", "I4", "", None, 3, "F64", "BF16", "U16"])
    elif change == 3:
        header[rng.choice(_NAMES)] = rng.choice([each, None, [], {"dtype": "F32"}])
    elif change == 4:
        header["__metadata__"] = rng.choice([{"a": 1}, {"a": "b" * 10**5}, [], {"a": {}}, None])
    elif change == 5:
        return struct.pack("<Q", rng.choice([0, 1, 2**27, 2**40, 2**63, 2**64 - 1])) + content[8:]
    elif change == 6:
        data = rng.choice([data[:-4], data + b"\0" * 4, b"", data * 3])
    elif change == 7:
        text = "[" * rng.choice([100, 10**4, 10**5])
        return struct.pack("<Q", len(text)) + text.encode() + data
    elif change == 8:
        each["dtype"] = rng.choice(["I32", "U32", "F32"])
        each["shape"] = rng.choice(
            [[(end - begin) // 4], [1, *each["shape"]], [*each["shape"], 1], [*each["shape"], 1, 1]]
        )
    elif change == 9:
        value = struct.pack("<f", rng.choice([float("nan"), float("inf"), 3e38, 1e-45, -0.0]))
        data = data[:begin] + value * ((end - begin) // 4) + data[end:]
    elif change == 10:
        header[rng.choice(_NAMES)] = {"dtype": "F32", "shape": [rng.choice([0, 0, 1])], "data_offsets": [len(data)] * 2}
    else:
        del each[rng.choice(list(each))]
    return _safetensors(_mutated_text(rng, json.dumps(header)) if rng.random() < 0.2 else json.dumps(header), data)


def _safetensors(header: str, data: bytes) -> bytes:
    encoded = header.encode(errors="surrogatepass")
    return struct.pack("<Q", len(encoded)) + encoded + data


# ------------------------------------------------------------------ zip archives


def _mutated_archive(rng: random.Random, *names: str) -> bytes:
    """Mutate a file, or one member of it, with a checksum that is right again."""
    files = archives()
    content = files[rng.choice(names)]
    if rng.random() < 0.5 or not zipfile.is_zipfile(io.BytesIO(content)):
        return rng.choice(OF_BYTES)(rng, content, list(files.values()))
    with zipfile.ZipFile(io.BytesIO(content)) as whole:
        members = {name: whole.read(name) for name in whole.namelist()}
    changed = rng.choice([name for name, member in members.items() if member])
    members[changed] = rng.choice(OF_BYTES)(rng, members[changed], [each for each in members.values() if each])
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return written.getvalue()


# ------------------------------------------------------------------ JSON and TOML


def _values(rng: random.Random, value: object) -> object:
    """Return the value with one inside it replaced, doubled or left out."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        change = rng.random()
        if change < 0.1:
            return {name: inner for name, inner in value.items() if name != key}
        if change < 0.2:
            return {**value, rng.choice([*_NAMES, key + "s"]): rng.choice(_STRANGE)}
        return {**value, key: _values(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.85:
        index = rng.randrange(len(value))
        return [*value[:index], _values(rng, value[index]), *value[index + rng.randrange(2) :]]
    alike = [each for each in _STRANGE if type(each) is type(value)]
    return rng.choice(alike if alike and rng.random() < 0.8 else _STRANGE)


_STRANGE: tuple[object, ...] = (
    *(None, True, False, -1, 0, 5, 2**53, 2**64, -(2**63), 10**400),
    *(0.5, -0.0, 1e308, float("nan"), float("inf"), [1e-320] * 50),
    *("", "nan", "\0\x1b[31m", "\ud800", "\ue000\u2028", "x" * 10**5, "[bold]", "<![CDATA[]]>", "::error::", "a\nb"),
    *([], {}, [[]], [None], {"": {}}),
)


def _mutated_json(rng: random.Random) -> bytes:
    files = reports()
    content = rng.choice(files)
    drawn = rng.random()
    if drawn < 0.25:
        return rng.choice(OF_BYTES)(rng, content, files)
    if drawn < 0.35:
        return _mutated_text(rng, content.decode()).encode(errors="surrogatepass")
    if drawn < 0.42:
        depth = rng.choice([100, 1000, 10**5])
        begin, end = rng.choice([("[", "]"), ('{"units":[', "]}"), ('{"a":', "}"), ("[", "")])
        return (begin * depth + end * depth).encode()
    value = json.loads(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        value = _values(rng, value)
    return json.dumps(value).encode()


def _mutated_text(rng: random.Random, text: str) -> str:
    """Return a text with one of its numbers, words or lines changed."""
    change = rng.randrange(4)
    tokens = list(re.finditer(r"-?\d+(\.\d+)?(e-?\d+)?|\"[^\"\n]*\"|\w+", text))
    one = rng.choice(tokens)
    if change == 0:
        new = rng.choice([*map(str, _LARGE), "9" * 5000, "1e999", "NaN", "-0", "0x1F", "1_000", "inf", "1979-05-27"])
    elif change == 1:
        new = rng.choice(["'", '"', '"\\ud800"', '"""', "true", "null", "{}", "[]", "[[", "=", "\\", "\0"])
    elif change == 2:
        new = one[0] * 2
    else:
        lines = text.splitlines(keepends=True)
        line = rng.choice(lines)
        return text.replace(line, line * rng.choice([0, 2, 1000]), 1)
    return text[: one.start()] + new + text[one.end() :]


def _mutated_toml(rng: random.Random) -> bytes:
    files = configurations()
    content = rng.choice(files)
    drawn = rng.random()
    if drawn < 0.3:
        return rng.choice(OF_BYTES)(rng, content, files)
    if drawn < 0.4:
        depth = rng.choice([100, 1000, 10**5])
        begin, end = rng.choice([("[", "]"), ("{a=", "}"), ("[", "")])
        return content + b"deep = " + (begin * depth + "1" + end * depth).encode()
    if drawn < 0.45:
        return content + b"[" + b".".join([b"a"] * rng.choice([100, 10**4])) + b"]\n"
    text = content.decode()
    for _ in range(rng.choice([1, 1, 2, 5])):
        text = _mutated_text(rng, text)
    return text.encode(errors="surrogatepass")


KINDS: dict[str, Callable[[random.Random], bytes]] = {
    "onnx": _mutated_onnx,
    "weights": lambda rng: _mutated_safetensors(rng, "weights"),
    "inputs": lambda rng: _mutated_safetensors(rng, "inputs"),
    "npz": lambda rng: _mutated_archive(rng, "npz"),
    "checkpoint": lambda rng: _mutated_archive(rng, "checkpoint", "old"),
    "program": lambda rng: _mutated_archive(rng, "program"),
    "json": _mutated_json,
    "toml": _mutated_toml,
}


def mutated(kind: str, number: int) -> bytes:
    """Return the mutated file of this kind and number; always the same bytes."""
    return KINDS[kind](random.Random(f"{kind} {number}"))
