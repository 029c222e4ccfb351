"""The .sens reader and writer against the official reader's output, on a large sparse file, and on damaged files."""

import hashlib
import io
import json
import re
import resource
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from corruption import corrupt, guarded
from PIL import Image

import w2r2.scans.recording
import w2r2.scans.sens
from w2r2.scans.frames import FrameFolder, export_frames
from w2r2.scans.recording import SensHeader, encode_frame
from w2r2.scans.sens import Sens, index_frames, pack_header, unpack_header, write_sens

FIXTURES = Path(__file__).parent / "fixtures" / "sens"  # made with the official reader, ScanNet 3830fce7


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def test_reads_what_the_official_reader_reads():
    official = json.loads((FIXTURES / "official.json").read_text())
    expected = official["header"]
    with Sens(FIXTURES / "tiny.sens") as sens:
        header = sens.header
        assert len(sens) == expected["num_frames"] == len(official["frames"])
        assert (header.sensor_name, header.color_compression, header.depth_compression, header.depth_shift) == (
            expected["sensor_name"],
            expected["color_compression"],
            expected["depth_compression"],
            expected["depth_shift"],
        )
        assert [list(header.color_size), list(header.depth_size)] == [expected["color_wh"], expected["depth_wh"]]
        for name in ("intrinsic_color", "extrinsic_color", "intrinsic_depth", "extrinsic_depth"):
            np.testing.assert_array_equal(getattr(header, name), expected[name])
        for frame, record in zip(sens, official["frames"]):
            np.testing.assert_array_equal(frame.pose, np.array(record["pose"], float))
            assert frame.lost != record["pose_valid"]
            assert frame.timestamps == (record["timestamp_color"], record["timestamp_depth"])
            assert (len(frame.color_bytes), len(frame.depth_bytes)) == (record["color_bytes"], record["depth_bytes"])
            assert sha256(frame.color_bytes) == record["jpeg_sha256"]
            assert (
                frame.color.shape == tuple(record["rgb_shape"])
                and sha256(frame.color.tobytes()) == record["rgb_sha256"]
            )
            assert sha256(frame.depth.astype("<u2").tobytes()) == record["depth_sha256_le_u16"]
        assert sens.lost == 1 and sens.valid.tolist() == [0, 1, 3, 4]


def test_writes_identical_bytes(tmp_path):
    with Sens(FIXTURES / "tiny.sens") as sens:
        write_sens(tmp_path / "copy.sens", sens.header, sens, sens.imu)
    assert (tmp_path / "copy.sens").read_bytes() == (FIXTURES / "tiny.sens").read_bytes()


def test_exports_what_the_official_reader_exports(tmp_path):
    digests = json.loads((FIXTURES / "export_digests.json").read_text())
    with Sens(FIXTURES / "tiny.sens") as sens:
        export_frames(sens, tmp_path)
        assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")} == set(digests)
        for name, expected in digests.items():
            path = tmp_path / name
            if "text" in expected:
                assert path.read_text() == expected["text"] and sha256(path.read_bytes()) == expected["sha256"]
            elif name.startswith("depth"):
                assert sha256(np.array(Image.open(path)).astype("<u2").tobytes()) == expected["pixels_sha256_le_u16"]
            else:  # the official reader encodes the jpeg again; we keep the recorded one
                assert path.read_bytes() == sens[int(path.stem)].color_bytes
        folder = FrameFolder(tmp_path)
        assert folder.lost == sens.lost and folder.valid.tolist() == sens.valid.tolist()
        for ours, theirs in zip(folder, sens):
            np.testing.assert_array_equal(ours.depth, theirs.depth)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """2,000 frames of a megabyte each, of which only 32 have content; the rest are holes in the file."""
    path, chosen = tmp_path_factory.mktemp("sparse") / "big.sens", np.linspace(0, 1999, 32).astype(int)
    camera = np.diag([50.0, 50.0, 1, 1])
    header = SensHeader(camera, camera, (64, 48), (40, 30))
    full = encode_frame(header, np.full((48, 64, 3), 90, np.uint8), np.full((30, 40), 1500, np.uint16), np.eye(4))
    record = np.zeros((), w2r2.scans.sens._RECORD)
    record["pose"] = np.eye(4)
    with open(path, "wb") as file:
        file.write(pack_header(header, 2000))
        for i in range(2000):
            if i in chosen:
                record["sizes"] = len(full.color_bytes), len(full.depth_bytes)
                file.write(record.tobytes() + full.color_bytes + full.depth_bytes)
            else:
                record["sizes"] = 700_000, 300_000
                file.write(record.tobytes())
                file.seek(1_000_000, io.SEEK_CUR)
        file.write(struct.pack("<Q", 0))
    return path, chosen


def resident(path):
    """Bytes of a mapped file that are in memory."""
    blocks = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    return sum(1024 * int(re.search(r"Rss: +(\d+) kB", block)[1]) for block in blocks if str(path) in block)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")
def test_32_of_2000_frames_do_not_load_the_rest(sparse, monkeypatch):
    path, chosen = sparse
    decoded = []
    for name in ("decode_image", "decode_depth"):
        monkeypatch.setattr(
            w2r2.scans.recording,
            name,
            lambda *args, original=getattr(w2r2.scans.recording, name): decoded.append(args[-1]) or original(*args),
        )
    start = time.process_time()
    with Sens(path) as sens:
        opening = time.process_time() - start
        walked = resident(path)
        for i in chosen.tolist():
            frame = sens[i]
            assert frame.color.shape == (48, 64, 3) and (frame.depth == 1500).all()
        touched = resident(path)
    assert len(sens) == 2000 and path.stat().st_size > 1.9e9
    assert decoded == [f"{kind} of frame {i}" for i in chosen for kind in ("colour", "depth")]
    assert (
        walked <= 2 * 2000 * 4096 and touched <= walked + 64 * 65_536
    )  # a page or two for each record; 32 small images
    assert opening < 0.25


def touch(path):
    with Sens(path) as sens:
        assert len(sens.valid) + sens.lost == len(sens)
        for frame in sens:
            frame.color, frame.depth, frame.depth_metres
        sens.imu.sum


def test_500_corruptions_give_one_error_or_succeed(tmp_path):
    data, path, rng = (FIXTURES / "tiny.sens").read_bytes(), tmp_path / "damaged.sens", np.random.default_rng(20)
    _, count, first = unpack_header(data, path)
    records, offsets, end = index_frames(data, first, count, path)
    fields = [(0, 4), (4, 8), (first - 8, 8), (end, 8)] + [(first - 12 - 4 * k, 4) for k in range(7)]
    fields += [(offset - back, 8) for offset in offsets.tolist() for back in (32, 24, 16, 8)] + [
        (offset - 96, 4) for offset in offsets.tolist()
    ]
    path.write_bytes(data)
    touch(path)  # loads Pillow's plugins
    tracemalloc.start()
    try:
        outcomes, memory = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(600):
            path.write_bytes(corrupt(data, rng, fields))
            outcomes.append(guarded(lambda: touch(path), 10 * len(data)))
    finally:
        tracemalloc.stop()
    assert 60 < sum(outcomes) < 540  # the damage is neither always harmless nor always fatal
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 32 * 1024
    )  # kilobytes; includes what the image library allocates
