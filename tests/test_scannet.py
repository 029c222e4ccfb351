"""Boxes against the published rule done the slow way, and damaged scans."""

import shutil
import time
import tracemalloc
import warnings

import numpy as np
import pytest
from corruption import corrupt, guarded

from w2r2.scans.annotations import Group, LabelTable, read_split, write_aggregation, write_segments, write_split
from w2r2.scans.frames import FrameFolder, export_frames
from w2r2.scans.ply import Mesh, write_ply
from w2r2.scans.scan import Scan, objects_of_vertices, vertex_objects, write_scan

TURN = np.array([[0.8, -0.6, 0, 1.5], [0.6, 0.8, 0, -0.25], [0, 0, 1, 0.1], [0, 0, 0, 1]])


def make_scene(rng, objects, boxes_each=1, views=2, color_size=(32, 24), depth_size=(20, 15)):
    """Cuboids scattered in a room, with images of noise."""
    count = objects * boxes_each
    corner = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)])
    side = np.array(
        [
            [0, 1, 3],
            [0, 3, 2],
            [4, 6, 7],
            [4, 7, 5],
            [0, 4, 5],
            [0, 5, 1],
            [2, 3, 7],
            [2, 7, 6],
            [0, 2, 6],
            [0, 6, 4],
            [1, 5, 7],
            [1, 7, 3],
        ]
    )
    vertices = (rng.uniform(0, 4, (count, 1, 3)) + corner * rng.uniform(0.1, 1, (count, 1, 3))).reshape(-1, 3)
    faces = (side + 8 * np.arange(count)[:, None, None]).reshape(-1, 3)
    poses = np.tile(np.eye(4), (views, 1, 1))
    poses[:, :3, 3] = rng.uniform(0, 4, (views, 3))
    camera = np.diag([30.0, 30.0, 1, 1])
    return dict(
        vertices=vertices,
        faces=faces,
        colors=rng.integers(0, 255, vertices.shape, np.uint8),
        objects=objects_of_vertices(faces, np.repeat(np.arange(objects), 12 * boxes_each), len(vertices)),
        labels=["chair", "table"] * (objects // 2),
        color=rng.integers(0, 255, (views, *color_size[::-1], 3), np.uint8),
        depth=rng.integers(0, 5000, (views, *depth_size[::-1]), np.uint16),
        poses=poses,
        intrinsic_color=camera,
        intrinsic_depth=camera,
        instance=rng.integers(0, objects, (views, *color_size[::-1]), np.uint8),
        axis_alignment=TURN,
    )


def write_table(root):
    LabelTable(
        [
            {"id": "2", "raw_category": "chair", "nyu40id": "5", "nyu40class": "chair"},
            {"id": "4", "raw_category": "table", "nyu40id": "7", "nyu40class": "table"},
        ]
    ).write(root / "scannetv2-labels.combined.tsv")


def test_boxes_follow_the_published_rule(tmp_path):
    """Random overlapping groups, against plain loops: last-listed object wins, all vertices count, alignment in
    float64."""
    rng = np.random.default_rng(3)
    vertices = rng.uniform(-3, 3, (300, 3)).astype(np.float32)
    segments = rng.choice([0, 7, 9, 30, 31, 120, 250, 280], 300)
    for trial in range(20):
        scene_id = f"scene{trial:04d}_00"
        groups = [
            Group(
                i, f"thing {i % 3}", tuple(rng.choice(np.unique(segments), rng.integers(1, 5), replace=False).tolist())
            )
            for i in range(6)
        ]
        rng.shuffle(groups)
        folder = tmp_path / "scans" / scene_id
        folder.mkdir(parents=True)
        write_ply(
            folder / f"{scene_id}_vh_clean_2.ply", Mesh(vertices, np.zeros((0, 3), int), np.zeros((300, 3), np.uint8))
        )
        write_segments(folder / f"{scene_id}_vh_clean_2.0.010000.segs.json", scene_id, segments)
        write_aggregation(folder / f"{scene_id}.aggregation.json", scene_id, groups)
        (folder / f"{scene_id}.txt").write_text("axisAlignment = " + " ".join(map(str, TURN.ravel())) + "\n")
        owner = {}
        for group in groups:
            for i in range(300):
                if segments[i] in group.segments:
                    owner[i] = group.object_id
        scan = Scan(tmp_path, scene_id)
        assert scan.instances.tolist() == [owner.get(i, -1) for i in range(300)]
        assert scan.object_ids.tolist() == sorted(set(owner.values()))
        for object_id, box in zip(scan.object_ids, scan.boxes):
            points = np.array(
                [TURN @ [*map(float, vertices[i]), 1.0] for i in range(300) if owner.get(i) == object_id]
            )[:, :3]
            np.testing.assert_allclose(
                box, [*(points.min(0) + points.max(0)) / 2, *(points.max(0) - points.min(0))], atol=1e-12
            )


def test_written_scan_reads_back(tmp_path):
    rng = np.random.default_rng(4)
    scene = make_scene(rng, 20, boxes_each=25, views=6, color_size=(112, 84), depth_size=(80, 60))
    scene["poses"][4] = -np.inf
    write_table(tmp_path)
    write_scan(tmp_path, "scene0707_00", **scene)
    with Scan(tmp_path, "scene0707_00") as scan:
        for object_id, box in zip(scan.object_ids, scan.boxes):
            points = scene["vertices"][scene["objects"] == object_id]
            np.testing.assert_allclose(box, [*(points.min(0) + points.max(0)) / 2, *np.ptp(points, axis=0)], atol=2e-6)
        assert scan.labels == scene["labels"] and scan.nyu40.tolist() == [5, 7] * 10
        assert (vertex_objects(scan.segments, scan.groups) == scene["objects"]).all()
        with pytest.warns(UserWarning, match="1 of 6 frames"):
            views = scan.views()
        assert [view.index for view in views] == [0, 1, 2, 3, 5]
        for view in views:
            np.testing.assert_array_equal(view.depth, scene["depth"][view.index])
            np.testing.assert_allclose(view.pose, scene["poses"][view.index], atol=1e-6)
            np.testing.assert_array_equal(scan.instance_images[view.index], scene["instance"][view.index])


def touch(root, scene_id):
    """Reads every part of a scan and of its export."""
    with Scan(root, scene_id) as scan, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        scan.boxes, scan.labels, scan.nyu40, scan.keep("scanrefer"), scan.mesh.labels, scan.info
        for frame in scan.views():
            frame.color, frame.depth_metres
        for number in scan.instance_images:
            scan.instance_images[number]
        read_split(root / "val.txt")
        for frame in FrameFolder(root / "posed_images" / scene_id):
            frame.color, frame.depth


def test_500_corruptions_give_one_error_or_succeed(tmp_path):
    rng, scene_id = np.random.default_rng(21), "scene0000_00"
    folder = write_scan(
        tmp_path, scene_id, **make_scene(rng, 4, boxes_each=10, color_size=(64, 48), depth_size=(40, 30))
    )
    write_table(tmp_path)
    write_split(tmp_path / "val.txt", [scene_id, "scene0001_00"])
    with Scan(tmp_path, scene_id) as scan:
        export_frames(scan.frames, tmp_path / "posed_images" / scene_id, "posed_images")
    files = sorted(path for path in tmp_path.rglob("*.*") if path.is_file())
    budget = 10 * sum(path.stat().st_size for path in folder.iterdir())
    assert len(files) == 16
    touch(tmp_path, scene_id)
    tracemalloc.start()
    outcomes = {}
    try:
        for path in files:
            data = path.read_bytes()
            for _ in range(40):
                path.write_bytes(corrupt(data, rng))
                outcomes.setdefault(path.name, []).append(guarded(lambda: touch(tmp_path, scene_id), budget))
            path.write_bytes(data)
    finally:
        tracemalloc.stop()
    assert sum(map(len, outcomes.values())) >= 500
    assert all(sum(good) < 40 for good in outcomes.values()), outcomes  # every file is looked at
    touch(tmp_path, scene_id)


def test_names_do_not_leave_the_folder(tmp_path):
    rng = np.random.default_rng(5)
    write_scan(tmp_path / "elsewhere", "scene0000_00", **make_scene(rng, 2))
    (tmp_path / "release" / "scans").mkdir(parents=True)
    (tmp_path / "release" / "scans" / "scene0000_00").symlink_to(tmp_path / "elsewhere" / "scans" / "scene0000_00")
    for scene_id in (
        "scene0000_00",
        "../elsewhere/scans/scene0000_00",
        "..",
        "",
        "scene0000_00\0",
        "scene٠٠٠٠_٠٠",
        None,
    ):
        with pytest.raises(ValueError, match="leaves the folder|no scene id"):
            Scan(tmp_path / "release", scene_id)
    (tmp_path / "linked").symlink_to(tmp_path / "elsewhere")  # the root itself may be a link
    assert len(Scan(tmp_path / "linked", "scene0000_00").boxes) == 2
    target = tmp_path / "elsewhere" / "scans" / "scene0000_00" / "scene0000_00.txt"
    shutil.move(target, tmp_path / "outside.txt")
    target.symlink_to(tmp_path / "outside.txt")
    with pytest.raises(ValueError, match="leaves the folder"):
        Scan(tmp_path / "elsewhere", "scene0000_00").info


def test_writing_is_quick_and_repeatable(tmp_path):
    """Without the jpegs at most about 15 ms for 4,000 vertices and 6 frames; the bound here leaves room for a busy
    machine."""
    scene = make_scene(np.random.default_rng(6), 20, boxes_each=25, views=6, color_size=(112, 84), depth_size=(80, 60))
    assert len(scene["vertices"]) == 4000
    first = {path.name: path.read_bytes() for path in write_scan(tmp_path / "a", "scene0000_00", **scene).iterdir()}
    start = time.process_time()
    for _ in range(5):
        folder = write_scan(tmp_path / "b", "scene0000_00", **scene)
    assert (time.process_time() - start) / 5 < 0.08
    assert first == {path.name: path.read_bytes() for path in folder.iterdir()}
