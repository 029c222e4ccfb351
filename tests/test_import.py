"What a newcomer does with a recording: `w2r2 import`, then a look at it."

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from w2r2.cli import main
from w2r2.scans.posed import PosedImage, rectified
from w2r2.scans.scan import Scan
from w2r2.shipped import DATA


def run(*command):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main([*map(str, command)])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def app_export(tmp_path):
    "A sample room as an app for phones exports it: transforms.json, images, depth."
    folder = tmp_path / "export"
    with Scan(DATA / "samples", "scene9000_00") as scan:
        K, size = scan.intrinsic_color, scan.frames.header.color_size
        camera = PosedImage(Path(), np.eye(4), scan.intrinsic_depth, scan.frames.header.depth_size)
        said = {"fl_x": K[0, 0], "fl_y": K[1, 1], "cx": K[0, 2] + 0.5, "cy": K[1, 2] + 0.5, "frames": []}
        for part in ("images", "depths"):
            (folder / part).mkdir(parents=True)
        for view in scan.views():
            image, depth = f"images/{view.index}.jpg", f"depths/{view.index}.png"
            Image.fromarray(view.color).save(folder / image, quality=95)
            Image.fromarray(rectified(view.depth, camera, K, size, nearest=True)).save(folder / depth)
            pose = view.pose * np.array([1, -1, -1, 1])
            said["frames"].append({"file_path": image, "depth_file_path": depth, "transform_matrix": pose.tolist()})
    (folder / "transforms.json").write_text(json.dumps(said))
    return folder


def edit(folder, change):
    file = folder / "transforms.json"
    said = json.loads(file.read_text())
    change(said)
    file.write_text(json.dumps(said))


def test_an_export_is_imported_listed_and_grounded(app_export, tmp_path):
    code, out, err = run("import", app_export, tmp_path / "mine", "--cameras", tmp_path / "cameras.png")
    assert code == 0 and "12 images with depth" in out and not err, err
    assert Image.open(tmp_path / "cameras.png").width > 800
    code, out, err = run("show", "scene0000_00", "--root", tmp_path / "mine", "--html", tmp_path / "scene.html")
    assert code == 0 and "0 objects" in out and (tmp_path / "scene.html").stat().st_size > 1e6
    code, out, err = run("ground", "scene0000_00", "the black couch", "--root", tmp_path / "mine", "--json")
    assert code == 0 and len(json.loads(out)[0]["box"]) == 6, err
    code, out, err = run("import", app_export, tmp_path / "mine")
    assert code == 2 and "already" in err and err.count("\n") == 1


def times(said, factor):
    for frame in said["frames"]:
        frame["transform_matrix"] = (np.array(frame["transform_matrix"]) * factor).tolist()


WRONG = {
    "a depth image is missing": (lambda said: said["frames"][3].update(depth_file_path="depths/99.png"), (), "99.png"),
    "poses of another convention": (lambda said: times(said, [1, -1, -1, 1]), (), "opengl-c2w"),
    "poses of another unit": (lambda said: times(said, np.c_[np.ones((4, 3)), [9, 9, 9, 1]]), (), "--scale"),
    "no scale": (lambda said: [frame.pop("depth_file_path") for frame in said["frames"]], (), "--scale"),
    "no such camera": (lambda said: None, ("--camera", "1,2"), "FX,FY,CX,CY"),
    "depth in other units": (lambda said: None, ("--depth-unit", "100"), "--depth-unit"),
    "a scaled rotation": (
        lambda said: said["frames"][0].update(transform_matrix=(2 * np.eye(4)).tolist()),
        (),
        "rotation",
    ),
    "an escape": (lambda said: said["frames"][0].update(file_path="../../x.jpg"), (), "leaves the folder"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(app_export, tmp_path, case):
    change, options, word = WRONG[case]
    edit(app_export, change)
    code, out, err = run("import", app_export, tmp_path / "mine", *options)
    assert code == 2 and not out and err.count("\n") == 1 and word in err, err
    assert not (tmp_path / "mine").exists()


def test_a_wrong_convention_is_mended_by_naming_it(app_export, tmp_path):
    edit(app_export, WRONG["poses of another convention"][0])
    assert run("import", app_export, tmp_path / "mine", "--convention", "opengl-c2w")[0] == 0
