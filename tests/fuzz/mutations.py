"""Ways to damage a file: bytes anywhere, and the parts that a format puts its trust in."""

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

CANARY = "pysteer-canary"  # what runs code leaves a file of this name in the working folder
DEEP = 3000

# What a JSON value turns into. Numbers that are far too large, words that are nearly right, and other types.
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.5, 1e308, float("nan"),
    float("inf"), "", "x", "0", "-1", "../../etc/passwd", "/etc/passwd", "\u0000", "\ud800", "a" * 5000, [], {},
    [[]], [None], [1, 2, 3], [-1], [2**40, 2**40], [0], ["x"], {"a": {}}, {"": None}, [1e308], [[1, 2], [3]],
]  # fmt: skip

# Programs for a pickle, in the place of a value.
ATTACKS = [
    b"cposix\nsystem\n(S'touch " + CANARY.encode() + b"'\ntR",
    b"cbuiltins\neval\n(S\"open('" + CANARY.encode() + b"', 'w')\"\ntR",
    b"(S'touch " + CANARY.encode() + b"'\niposix\nsystem\n",
    b"\x8c\x05posix\x8c\x06system\x93(S'touch " + CANARY.encode() + b"'\ntR",
    b"cbuiltins\ngetattr\n(ctorch\nhub\nS'load'\ntR",
    b"cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR",
    b"ctorch\nFloatTensor\n(J\xff\xff\xff\x7ftR",
    b"ctorch._utils\n_rebuild_tensor_v2\n(NtR",
    b"ccollections\nOrderedDict\n(NtR",
    b"ctorch.serialization\nload\n(S'x'\ntR",
    b"ctorch\nload\n(S'x'\ntR",
    b"r\xff\xff\xff\x7f",  # memo of 2 billion entries
    b"N" * 500,
    b"(" * 2000,
    b"]" + b"]a" * 2000,
    b"X\xff\xff\xff\x7f",
    b"\x8a\xff" + b"\xff" * 255,
]

_BYTES = st.sampled_from([0, 1, 2, 7, 10, 34, 44, 48, 57, 58, 91, 93, 123, 125, 127, 128, 192, 254, 255])


@st.composite
def damaged(draw: Callable[..., Any], whole: dict[str, bytes]) -> tuple[str, bytes]:
    """Name and new content of one of the files of a folder."""
    name = draw(st.sampled_from(sorted(whole)))
    data = whole[name]
    ways = [_flipped, _cut, _spliced]
    if name.endswith(".safetensors"):
        ways += [_header_length, _header_values, _header_values]
    elif name.endswith(".json"):
        ways += [_json_values, _json_values, _json_values]
    elif name.endswith(".yml"):
        ways += [_yaml_lines, _yaml_lines, _yaml_lines]
    elif zipfile.is_zipfile(io.BytesIO(data)) and not name.endswith(".parquet"):
        ways += [_program, _program, _program]
    elif name.endswith(".gguf"):
        ways += [_numbers, _numbers]
    return name, draw(st.sampled_from(ways))(draw, data)


def _place(draw: Callable[..., Any], data: bytes) -> int:
    return draw(st.integers(0, max(len(data) - 1, 0)))


def _flipped(draw: Callable[..., Any], data: bytes) -> bytes:
    made = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        made[_place(draw, data)] = draw(_BYTES)
    return bytes(made)


def _cut(draw: Callable[..., Any], data: bytes) -> bytes:
    place = _place(draw, data)
    return data[:place] if draw(st.booleans()) else data[place:]


def _spliced(draw: Callable[..., Any], data: bytes) -> bytes:
    first, second, target = [*sorted((_place(draw, data), _place(draw, data))), _place(draw, data)]
    piece = data[first:second] * draw(st.sampled_from([0, 1, 2]))
    return data[:target] + piece + data[target + draw(st.sampled_from([0, len(piece), 9])) :]


def _numbers(draw: Callable[..., Any], data: bytes) -> bytes:
    """A number of 4 or 8 bytes overwritten by one that is far too large, or off by little."""
    code = draw(st.sampled_from(["<I", "<Q"]))
    size, place = struct.calcsize(code), draw(st.integers(0, max(len(data) // 4 - 2, 0))) * 4
    value = draw(st.sampled_from([0, 1, 3, 9, 255, 2**16, 2**28, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]))
    return data[:place] + struct.pack(code, value % 2 ** (8 * size)) + data[place + size :]


# -------------------------------------------------------------------------------------------------------------- JSON


def _changed(draw: Callable[..., Any], value: Any) -> Any:
    """The value with one thing in it replaced, renamed or taken out."""
    if isinstance(value, dict) and value and draw(st.integers(0, 7)):
        key = draw(st.sampled_from(sorted(value)))
        way = draw(st.integers(0, 9))
        rest = {name: item for name, item in value.items() if name != key}
        if way == 0:
            return rest
        if way == 1:
            return {**rest, draw(st.sampled_from(["x", "", f"{key}x", "../up", "__class__"])): value[key]}
        return {**value, key: _changed(draw, value[key])}
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], _changed(draw, value[place]), *value[place + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and draw(st.booleans()):
        return value + draw(st.sampled_from([-1, 1, 256, 10**6, 10**9]))
    return draw(st.sampled_from(ODD))


def _text(value: Any) -> bytes:
    return json.dumps(value).encode()


def _json_values(draw: Callable[..., Any], data: bytes) -> bytes:
    way = draw(st.integers(0, 19))
    if way == 0:
        return b"[" * 100_000
    if way == 1:
        return b'{"a":' * DEEP + b"1" + b"}" * DEEP
    if way == 2:
        return b"9" * 5000
    return _text(_changed(draw, json.loads(data)))


def _header_length(draw: Callable[..., Any], data: bytes) -> bytes:
    own = struct.unpack("<Q", data[:8])[0]
    value = draw(st.sampled_from([0, 1, own - 1, own + 1, len(data), len(data) - 8, 2**27, 2**32, 2**63, 2**64 - 1]))
    return struct.pack("<Q", value) + data[8:]


def _header_values(draw: Callable[..., Any], data: bytes) -> bytes:
    """A safetensors file whose header is well-formed and wrong."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    if draw(st.integers(0, 2)):
        name = draw(st.sampled_from(sorted(name for name in header if name != "__metadata__")))
        way = draw(st.integers(0, 3))
        kinds = ["F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "U16", "U64", "C64", "F4", "x"]
        if way == 0:  # another type of the same size or not
            header[name]["dtype"] = draw(st.sampled_from(kinds))
        elif way == 1:  # a type with a shape to match
            kind, width = draw(
                st.sampled_from([("U8", 1), ("I8", 1), ("F8_E4M3", 1), ("F16", 2), ("U16", 2), ("I32", 4)])
            )
            first, last = header[name]["data_offsets"]
            header[name] |= {"dtype": kind, "shape": [(last - first) // width]}
        elif way == 2:
            shape = header[name]["shape"]
            header[name]["shape"] = draw(
                st.sampled_from([shape[::-1], [1, *shape], [*shape, 0], [2**40, 0], [2**33, 2**33]])
            )
        else:  # NaN, infinite and huge values
            first = header[name]["data_offsets"][0]
            value = draw(
                st.sampled_from(
                    [b"\xff" * 8, b"\x00\x00\x80\x7f" * 2, b"\x00\x00\x80\xff" * 2, b"\xff\xff\x7f\x7f" * 2]
                )
            )
            body = body[:first] + value + body[first + 8 :]
    else:
        header = _changed(draw, header)
    text = _text(header)
    return struct.pack("<Q", len(text)) + text + body


# -------------------------------------------------------------------------------------------------------------- YAML

_YAML = [
    "null", "true", "-1", "1e400", "0x7fffffffffffffff", "99999999999999999999", "2024-99-99", ".nan", ".inf",
    "!!python/object/apply:os.system ['touch pysteer-canary']", "!!python/name:os.system", "!!timestamp x",
    "!!int x", "!!set {a}", "!!float x", "${a}", "${oc.env:HOME}", "${oc.env:NO_SUCH_VARIABLE}", "${CFG}", "${",
    "*unknown", "&a [*a]", "[[[[]]]]", "{a: {b: [c]}}", "? x", "- x", "|", ">", "'", '"', "\t", "%TAG", "---", "@", "`",
    "[1, 2", "{a: ", "a: b: c", "1:2:3", "1_000", "\u0085", "12e03", "<<: x", "0o9", "1" * 5000, "[" * 1500, "- " * 500,
]  # fmt: skip


def _yaml_lines(draw: Callable[..., Any], data: bytes) -> bytes:
    lines = data.decode().splitlines()
    place = draw(st.integers(0, len(lines) - 1))
    key = lines[place].partition(":")[0]
    way = draw(st.integers(0, 9))
    if way == 0:
        lines = [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9 if level else ['1'])}]" for level in range(9)]
    elif way == 1:
        lines.insert(place, f"{key}x: 1")
    elif way == 2:
        lines.insert(place, draw(st.sampled_from(_YAML)))
    else:
        lines[place] = f"{key}: {draw(st.sampled_from(_YAML))}"
    return "\n".join(lines).encode()


# ------------------------------------------------------------------------------------------------------------ pickle


def _program(draw: Callable[..., Any], data: bytes) -> bytes:
    """A file of torch.save with a damaged or malicious pickle in it."""
    with zipfile.ZipFile(io.BytesIO(data)) as held:
        entries = {name: held.read(name) for name in held.namelist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    program = entries[name]
    way = draw(st.integers(0, 5))
    if way == 0:
        program = _flipped(draw, program)
    elif way == 1:
        program = _spliced(draw, program)
    elif way == 2:  # numbers: sizes, strides, offsets
        places = [place for place in range(2, len(program)) if program[place] in b"KMJ"]
        place = draw(st.sampled_from(places)) if places else 2
        value = draw(st.sampled_from([0, 1, 5, 200, 2**16, 2**30, 2**31 - 1, 2**32 - 1]))
        length = {b"K": 2, b"M": 3, b"J": 5}.get(program[place : place + 1], 1)
        program = program[:place] + b"J" + struct.pack("<I", value) + program[place + length :]
    elif way == 3:
        program = b"\x80\x02" + draw(st.sampled_from(ATTACKS)) + b"."
    elif way == 4:
        place = draw(st.integers(2, len(program) - 1))
        program = program[:place] + draw(st.sampled_from(ATTACKS)) + b"0" * draw(st.integers(0, 1)) + program[place:]
    else:
        program = pickle.dumps(
            draw(st.sampled_from([None, 1, "x", [], {}, [1], {"a": 1}, {1: 2}, {"state_dict": 3}])), 2
        )
    entries[name] = program
    out = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if draw(st.integers(0, 9)) == 0 else zipfile.ZIP_STORED
    with zipfile.ZipFile(out, "w", method) as made:
        for entry, content in entries.items():
            made.writestr(entry, content)
    return out.getvalue()
