"Files that claim, or unpack to, far more than they can hold: refused with memory below ten times the file and 64 MB."

import io
import json
import os
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import limited
import numpy as np
import pytest
from PIL import Image

from w2r2.scans.annotations import write_label_images
from w2r2.scans.ply import Mesh, write_ply
from w2r2.scans.recording import Frame, SensHeader
from w2r2.scans.sens import write_sens

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
ENVIRONMENT = os.environ | {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}


def png(width, height, mode="L", **options) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (width, height)).save(stream, "PNG", **options)
    return stream.getvalue()


def zipped(path: Path, members: dict, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method, compresslevel=9) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def zeros_for_an_image(path):
    zipped(path, {"instance-filt/0.png": png(8, 8) + bytes(2**30)})


def huge_image(path):
    zipped(path, {"instance-filt/0.png": png(16_000, 16_000)})


def images_that_overlap(path):
    "Entries that all point to the same bytes."
    zipped(path, {"instance-filt/0.png": png(1700, 1700, "I;16")})
    data = path.read_bytes()
    at = data.index(b"PK\1\2")
    entry, end = data[at : data.index(b"PK\5\6")], data[data.index(b"PK\5\6") :]
    entries = b"".join(entry.replace(b"/0.png", f"/{n % 10}.png".encode()) for n in range(10))
    end = end[:8] + struct.pack("<HHL", 10, 10, len(entries)) + end[16:]
    path.write_bytes(data[:at] + entries + end)


def endless_contents(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("instance-filt/0.png", png(8, 8))
        for number in range(150_000):
            archive.writestr(f"{number}.txt", b"")


def zeros_as_boxes(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, shape, dtype in (
            ("ins_boxes", (2**22, 6), "<f8"),
            ("ins_labels", (2**22,), "<U16"),
            ("ins_scores", (2**22,), "<f8"),
        ):
            header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode() + b"\n"
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            archive.writestr(
                f"{name}.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(size)
            )


def many_short_names(path):
    count = 2**21
    np.savez_compressed(
        path,
        ins_boxes=np.zeros((count, 6), np.int8),
        ins_labels=np.full(count, "a"),
        ins_scores=np.zeros(count, np.int8),
    )


def header_of_a_petabyte(path):
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (100000000000000, 6)}\n"
    blob = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    zipped(path, {f"{name}.npy": blob for name in ("ins_boxes", "ins_labels", "ins_scores")})


def field_of_zeros(path):
    np.savez_compressed(path, points=np.zeros((2**21, 3)), vectors=np.zeros((2**21, 20)))


def half_a_field_of_zeros(path):
    "Twice as large when it is read as float32, and large enough a file that ten times that is more than 64 MB."
    noise = np.random.default_rng(0).integers(0, 2**16, (2**20, 5), np.uint16).view(np.float16)
    count = 58_300_000 // 24
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in (("points", np.zeros((count, 3), "f4")), ("vectors", np.zeros((count, 6), "f2"))):
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array)
        archive.writestr("noise", noise.tobytes())


def field_of_a_petabyte(path):
    header_of_a_petabyte(path)
    with zipfile.ZipFile(path) as archive:
        blob = archive.read("ins_boxes.npy")
    zipped(path, {"points.npy": blob, "vectors.npy": blob})


def array_beside_a_mesh(shape: str):
    def make(path):
        write_ply(path, Mesh(np.zeros((9, 3), np.float32), np.zeros((1, 3), np.int32), np.zeros((9, 3), np.uint8)))
        header = b"{'descr': '<f8', 'fortran_order': False, 'shape': %s}\n" % shape.encode()
        blob = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
        path.with_suffix(".npy").write_bytes(blob + bytes(72))

    return make


def zeros_in_xz(path):
    zipped(path, {"ins_boxes.npy": bytes(2**29)}, zipfile.ZIP_LZMA)


def recording(path, color: bytes, depth: bytes, color_size=(64, 48), compression="jpeg"):
    header = SensHeader(np.eye(4), np.eye(4), color_size, (80, 60), color_compression=compression)
    frame = Frame(header, np.eye(4), {"color": color, "depth": depth}.__getitem__)
    write_sens(path, header, [frame])


def depth_of_zeros(path):
    recording(path, b"", zlib.compress(bytes(2**30), 9))


def endless_scans(path):
    "A progressive jpeg that goes over its pixels again and again."
    stream = io.BytesIO()
    Image.new("RGB", (1700, 1700), "teal").save(stream, "JPEG", progressive=True)
    blob = stream.getvalue()
    at = blob.rindex(b"\xff\xda")
    recording(path, blob[:-2] + blob[at:-2] * 20_000 + blob[-2:], zlib.compress(bytes(9600)), (1700, 1700))


def text_in_a_png(path):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for number in range(60):
        info.add_text(f"key{number}", "a" * 2**20, zip=True)
    zipped(path, {"instance-filt/0.png": png(1700, 1700, pnginfo=info)})


def brackets(item: bytes, key: bytes = b""):
    many = item + (b"," + item) * (8_000_000 // len(item))
    return lambda path: path.write_bytes(b'{"%s":[%s]}' % (key, many) if key else b"[%s]" % many)


def a_key_twice_among_many(path):
    keys = [f'"{n}":0' for n in range(200_000)]
    path.write_text("{%s}" % ",".join([*keys, keys[0]]))


def many_groups(path):
    groups = [{"objectId": n, "label": "a", "segments": [1]} for n in range(60_000)]
    path.write_text(json.dumps({"segGroups": groups}))


def lines(line: bytes, first: bytes = b""):
    return lambda path: path.write_bytes(first + line * (8_000_000 // len(line)))


BOMBS = [
    ("instances", "0.zip", zeros_for_an_image),
    ("instances", "0.zip", huge_image),
    ("instances", "0.zip", images_that_overlap),
    ("instances", "0.zip", endless_contents),
    ("instances", "0.zip", text_in_a_png),
    ("proposals", "0.npz", zeros_as_boxes),
    ("proposals", "0.npz", many_short_names),
    ("proposals", "0.npz", header_of_a_petabyte),
    ("proposals", "0.npz", zeros_in_xz),
    ("proposals", "0.json", brackets(b"{}")),
    ("field", "0.npz", field_of_zeros),
    ("field", "0.npz", half_a_field_of_zeros),
    ("field", "0.npz", field_of_a_petabyte),
    ("field", "0.ply", array_beside_a_mesh("(10000000000000, 3)")),
    ("field", "0.ply", array_beside_a_mesh("(9, 9223372036854775807)")),
    ("records", "0.json", brackets(b"{}")),
    ("sens", "0.sens", depth_of_zeros),
    ("sens", "0.sens", endless_scans),
    ("segments", "0.json", brackets(b"[]", b"segIndices")),
    ("segments", "0.json", brackets(b"0", b"segIndices")),
    ("aggregation", "0.json", a_key_twice_among_many),
    ("aggregation", "0.json", many_groups),
    ("scanrefer", "0.json", brackets(b'"ab"')),
    ("scanqa", "0.json", brackets(b"[[]]")),
    ("grounding", "0.json", brackets(b"{}")),
    ("grounding", "0.jsonl", lines(b"{}\n")),
    ("captions", "0.json", a_key_twice_among_many),
    ("scene", "0.txt", lines(b"a = 1 1 1 1\n")),
    ("labels", "0.tsv", lines(b"1\ta\t1\t\n", b"id\traw_category\tnyu40id\tnyu40class\n")),
    ("split", "0.txt", lines(b"scene0000_00\n")),
    ("matrix", "0.txt", lines(b"1 ")),
]


@pytest.mark.parametrize("reader, name, make", BOMBS, ids=[f"{bomb[0]}-{n}" for n, bomb in enumerate(BOMBS)])
def test_memory_and_time_stay_small(tmp_path, reader, name, make):
    path = tmp_path / name
    make(path)
    command = [sys.executable, limited.__file__, reader, path]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    assert run.returncode == 0, run.stderr
    said, why, memory, seconds = json.loads(run.stdout.splitlines()[-1])
    print(f"{path.stat().st_size:,} bytes: {said} {why[:100]}; {memory / 2**20:.0f} MB, {seconds:.1f} s")
    assert said in ("read", "ScanNetError"), why
    assert memory <= limited.allowed(path) and seconds < 5


def test_what_a_scan_can_hold_is_read(tmp_path):
    write_label_images(tmp_path / "0.zip", {n: np.full((968, 1296), n, np.uint16) for n in range(3)}, "instance-filt")
    assert limited.READERS["instances"](tmp_path / "0.zip") == [n * 968 * 1296 for n in range(3)]
