"Damage to recordings from elsewhere that once went unnoticed or ended in a traceback."

import json
import struct

import numpy as np
import pytest
from campaign import sources

from w2r2.scans.colmap import read_colmap
from w2r2.scans.files import ScanNetError
from w2r2.scans.imports import in_metres, levelled_up
from w2r2.scans.sources import read_arkit, read_nerfstudio, read_posed_folder, read_tum

CAMERA = (50.0, 50.0, 20.0, 15.0)
FORMATS = {
    "posed": (sources.write_posed, read_posed_folder),
    "nerfstudio": (sources.write_nerfstudio, read_nerfstudio),
    "tum": (sources.write_tum, lambda folder: read_tum(folder, CAMERA)),
    "arkit": (sources.write_arkit, read_arkit),
    "colmap text": (sources.write_colmap_text, read_colmap),
    "colmap binary": (sources.write_colmap_binary, read_colmap),
}


@pytest.fixture(scope="module")
def rows_and_camera():
    return sources.sample_views()


def text(name, change):
    return lambda folder: (folder / name).write_text(change((folder / name).read_text()))


def frames(change):
    def edit(said):
        said = json.loads(said)
        change(said)
        return json.dumps(said)

    return text("transforms.json", edit)


def binary(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def line(number, change):
    def edit(said):
        lines = said.split("\n")
        lines[number] = change(lines[number])
        return "\n".join(lines)

    return edit


def word(number, new):
    def edit(said):
        words = said.split()
        words[number] = new
        return " ".join(words)

    return edit


TRACK, PINCAM = "lowres_wide.traj", "lowres_wide_intrinsics/42_1001.000.pincam"
SPARSE, LAST = "sparse/0/", struct.pack("<Qddq", 1, 1, 2, -1)
DAMAGE = [
    ("posed", text("intrinsics.txt", line(1, word(0, "0.5"))), "camera matrix"),
    ("posed", text("poses/000.txt", line(0, word(0, "1_0"))), "is no finite number"),
    ("nerfstudio", frames(lambda said: said["frames"].append("a")), "must be object"),
    ("nerfstudio", frames(lambda said: said["frames"][0].update(file_path=["a"])), "must be string"),
    ("nerfstudio", frames(lambda said: said.update(fl_x="50")), "must be number"),
    ("nerfstudio", frames(lambda said: said.update(fl_x=-50)), "cannot be"),
    ("nerfstudio", frames(lambda said: said.update(depth_unit_scale_factor=0)), "depth_unit_scale_factor"),
    ("nerfstudio", frames(lambda said: said["frames"].append(said["frames"][0])), "there twice"),
    ("nerfstudio", frames(lambda said: said["frames"][0].update(file_path="a" * 5000)), "missing"),
    ("nerfstudio", frames(lambda said: said.update(frames=said["frames"] * 50_000)), "there twice"),
    ("tum", text("rgb.txt", lambda said: said + said.split("\n")[1] + "\n"), "there twice"),
    ("tum", text("groundtruth.txt", line(1, word(7, "9"))), "unit quaternion"),
    ("tum", text("groundtruth.txt", line(1, word(1, "１"))), "is no finite number"),
    ("arkit", text(PINCAM, lambda said: said * 2), "one row"),
    ("arkit", text(PINCAM, word(0, "0")), "cannot be"),
    ("arkit", text(PINCAM, word(0, "40.5")), "one row"),
    ("arkit", text(TRACK, lambda said: said + said.split("\n")[0] + "\n"), "there twice"),
    ("colmap text", text(SPARSE + "images.txt", line(1, word(1, "9"))), "unit quaternion"),
    ("colmap text", text(SPARSE + "images.txt", line(1, word(1, "nan"))), "is no finite number"),
    ("colmap text", text(SPARSE + "images.txt", lambda said: said + said.split("\n")[1]), "there twice"),
    ("colmap text", text(SPARSE + "cameras.txt", lambda said: said + said.split("\n")[1]), "there twice"),
    ("colmap text", text(SPARSE + "points3D.txt", line(0, word(4, "300"))), "colour"),
    ("colmap text", text(SPARSE + "images.txt", line(2, word(0, ""))), "keypoints"),
    ("colmap binary", binary(SPARSE + "images.bin", lambda said: said[:-8]), "ends within"),
    ("colmap binary", binary(SPARSE + "images.bin", lambda said: said + b"a"), "after its end"),
    ("colmap binary", binary(SPARSE + "cameras.bin", lambda said: b"\0" * 8 + said[8:]), "after its end"),
    ("colmap binary", binary(SPARSE + "points3D.bin", lambda said: said[:51] + b"\xff" * 8 + said[59:]), "damaged"),
    ("colmap binary", binary(SPARSE + "images.bin", lambda said: said[:12] + b"\xff" * 8 + said[20:]), "quaternion"),
]


@pytest.mark.parametrize("kind, damage, said", DAMAGE, ids=[f"{case[0]}-{n}" for n, case in enumerate(DAMAGE)])
def test_damage_is_one_clear_error(tmp_path, rows_and_camera, kind, damage, said):
    write, read = FORMATS[kind]
    write(tmp_path, *rows_and_camera)
    assert len(read(tmp_path).images) == sources.VIEWS
    damage(tmp_path)
    with pytest.raises(ScanNetError, match=said) as told:
        read(tmp_path)
    assert str(tmp_path) in str(told.value)


def test_a_track_out_of_order_is_read_by_its_times(tmp_path, rows_and_camera):
    sources.write_arkit(tmp_path, *rows_and_camera)
    before = read_arkit(tmp_path).poses()
    text(TRACK, lambda said: "\n".join(reversed(said.strip().split("\n"))))(tmp_path)
    assert np.array_equal(read_arkit(tmp_path).poses(), before)


def test_poses_that_no_room_has_are_refused_and_a_point_far_away_changes_nothing(tmp_path, rows_and_camera):
    sources.write_posed(tmp_path, *rows_and_camera)
    assert len(in_metres(read_posed_folder(tmp_path)).images) == sources.VIEWS
    text("poses/000.txt", line(0, word(3, "1e300")))(tmp_path)
    with pytest.raises(ScanNetError, match="further apart"):
        in_metres(read_posed_folder(tmp_path))
    points = np.random.default_rng(0).normal(0, 1, (2000, 3)) * [3, 3, 0.01]
    far = np.concatenate([points, [[1e12, 1e12, 1e12]]])
    assert np.allclose(levelled_up(far, np.array([0, 0, 1.0])), levelled_up(points, np.array([0, 0, 1.0])), atol=0.02)
