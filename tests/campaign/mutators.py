"Structured damage: each function returns damaged bytes, drawn by a seeded generator."

import json
import random

HUGE = [0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
VALUES = [None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf")]
VALUES += ["", "0", "-1", "nan", "a" * 5000, "\x00", "\ud800", "é", "[/red]", "\x1b[2J", "<b>", "../../etc/passwd"]
VALUES += [[], {}, [[]], [0] * 6, {"a": 1}, [None] * 3]
WORDS = [
    "nan",
    "inf",
    "-inf",
    "1e999",
    "-1",
    "0",
    "",
    "1_0",
    "0x10",
    "１",
    "99999999999999999999",
    "a",
    "\x00",
    "\t",
    " = ",
]


def on_bytes(data: bytes, rng: random.Random) -> bytes:
    "Bits, ranges and lengths, whatever the format."
    data, kind = bytearray(data), rng.randrange(9)
    size = len(data)
    start = rng.randrange(size + 1)
    end = min(size, start + rng.choice([1, 2, 4, 8, 64, 1024]))
    if kind == 0 and size:
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif kind == 1 and size:
        data[rng.randrange(size)] = rng.randrange(256)
    elif kind == 2:
        del data[start:]
    elif kind == 3:
        del data[start:end]
    elif kind == 4:
        data[start:start] = data[start:end]
    elif kind == 5:
        data[start:start] = rng.randbytes(rng.randint(1, 64))
    elif kind == 6:
        data[start:end] = bytes(end - start) if rng.random() < 0.5 else b"\xff" * (end - start)
    elif kind == 7:
        data += rng.choice([b"\n", b"\0", b" ", bytes(data[: rng.randint(1, 4096)]), rng.randbytes(7)])
    else:
        other = rng.randrange(size + 1)
        part, data[start:end] = data[other : other + end - start], b""
        data[other:other] = part
    return bytes(data)


def on_numbers(data: bytes, rng: random.Random, places: list[tuple[int, int]]) -> bytes:
    "A binary number, at one of the places (offset, width), is another."
    offset, width = rng.choice(places)
    old = int.from_bytes(data[offset : offset + width], "little")
    value = rng.choice([*HUGE, old + 1, old - 1, 2 * old, old // 2, rng.getrandbits(8 * width)])
    return data[:offset] + (value % 256**width).to_bytes(width, "little") + data[offset + width :]


def on_lines(data: bytes, rng: random.Random) -> bytes:
    "Lines, words and line ends of a text."
    lines, kind = data.decode().split("\n"), rng.randrange(9)
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(other, lines[at])
    elif kind == 2:
        lines[at], lines[other] = lines[other], lines[at]
    elif kind in (3, 4, 5):
        words = lines[at].split(" " if "\t" not in lines[at] else "\t")
        words[rng.randrange(len(words))] = rng.choice(WORDS)
        lines[at] = (" " if "\t" not in lines[at] else "\t").join(words)
    elif kind == 6:
        return rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\n", b" "]) + data
    elif kind == 7:
        return data.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\n", b"\x0b", b""]))
    else:
        lines[at] = rng.choice([lines[at] * 2, lines[at].upper(), lines[at][::-1], " " + lines[at], lines[at] + " "])
    return "\n".join(lines).encode()


def _places(value, path=()):
    "The paths of all values of a tree; of long lists only some."
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from _places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(min(len(value), 40)):
            yield from _places(value[index], (*path, index))


def on_json(data: bytes, rng: random.Random) -> bytes:
    "Values, keys and lists of a JSON tree."
    tree = json.loads(data)
    path = rng.choice(list(_places(tree)))
    if not path:
        return json.dumps(rng.choice([*VALUES, [tree], {"a": tree}])).encode()
    parent = tree
    for step in path[:-1]:
        parent = parent[step]
    key, kind = path[-1], rng.randrange(10)
    if kind < 4:
        parent[key] = rng.choice(VALUES)
    elif kind == 4:
        del parent[key]
    elif kind == 5 and isinstance(parent, dict):
        mark = "\ue000twice"
        parent[mark] = rng.choice([parent[key], *VALUES])
        return json.dumps(tree).replace(json.dumps(mark), json.dumps(key)).encode()
    elif kind == 6 and isinstance(parent, dict):
        parent[rng.choice([key.upper(), key + "s", "", "__class__"])] = parent.pop(key)
    elif kind == 6 or kind == 5:
        parent.insert(rng.randrange(len(parent) + 1), rng.choice([parent[key], *VALUES]))
    elif kind == 7:
        other = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        parent[key], parent[other] = parent[other], parent[key]
    elif kind == 8:
        value = parent[key]
        if isinstance(value, list) and value:
            parent[key] = value * rng.choice([2, 10, 20_000 // len(value) + 1])
        elif isinstance(value, bool | int | float):
            parent[key] = value + rng.choice([1, -1, 0.5, 1e6, 2**40])
        else:
            parent[key] = rng.choice([[value], {"a": value}, str(value)])
    else:
        for _ in range(rng.choice([1, 3, 200, 3000])):
            parent[key] = [parent[key]] if rng.random() < 0.99 else {"a": parent[key]}
            if rng.random() < 0.01:
                break
    return json.dumps(tree).encode()
