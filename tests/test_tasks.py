"""Answer texts against VG-LLM's evaluator; random texts, files and scenes against codecs, readers and samplers."""

import json

import numpy as np
import pytest
import torch
from golden import golden
from scipy.spatial.transform import Rotation

from w2r2.scans.files import ScanNetError
from w2r2.scans.geometry import box_iou_oriented, euler_to_matrix, points_in_boxes
from w2r2.scans.views import coverage_views, projected_areas
from w2r2.tasks.answers import Bins, NineNumbers, parse_all
from w2r2.tasks.proposals import propose, read_proposals
from w2r2.tasks.samples import read_scanqa, read_scanrefer

VG = golden("vg_transform")


def poses_of(doc):
    return np.array(doc["axis_align_matrix"]) @ np.array(doc["cam2global"])


def sampled_iou(a, b, count=2_000_000):
    """IoU by counting random points of `a`: slow, and right to about 1e-3."""
    rng = np.random.default_rng(0)
    points = a[:3] + torch.from_numpy(rng.uniform(-0.5, 0.5, (count, 3))) * a[3:6] @ euler_to_matrix(a[6:]).T
    shared = points_in_boxes(points, b).double().mean() * a[3:6].prod()
    return float(shared / (a[3:6].prod() + b[3:6].prod() - shared))


def test_vgllm_texts():
    """The published evaluator reads angles as "zxy": its outcome for every text, its boxes, and its IoU.

    Its IoU operator is inexact for nearly parallel faces. In 4 of the 28 boxes here it is off by more than 1e-3 (by
    up to 0.25); sampling decides between the two."""
    inexact = 0
    for row in VG["text_to_iou"]:
        box, kind = NineNumbers("zxy").parse(row["text"], poses_of(row["doc"]))
        assert (box is None) == (row["pred_bbox"] is None), (row["text"], kind)
        if box is None:
            assert row["iou"] == 0
            continue
        assert np.abs(box[:6] - row["pred_bbox"][:6]).max() < 1e-6
        assert np.abs(np.angle(np.exp(1j * (box[6:] - row["pred_bbox"][6:])))).max() < 1e-6
        box, truth = torch.tensor(box), torch.tensor(row["doc"]["gt_bbox"], dtype=torch.float64)
        iou = float(box_iou_oriented(box, truth))
        if abs(iou - row["iou"]) > 1e-3:
            inexact += 1
            sampled = sampled_iou(box, truth)
            assert abs(iou - sampled) < 1e-3 and abs(iou - sampled) < abs(row["iou"] - sampled)
    assert inexact == 4


def test_vgllm_kinds():
    _, kinds = parse_all(
        NineNumbers("zxy"),
        [row["text"] for row in VG["text_to_iou"]],
        [poses_of(row["doc"]) for row in VG["text_to_iou"]],
    )
    assert kinds == {"ok": 28, "no box": 4, "bad view": 4, "wrong count": 4}


def random_poses(rng, *shape):
    poses = np.zeros((*shape, 4, 4))
    poses[..., :3, :3] = Rotation.random(int(np.prod(shape)), rng=rng).as_matrix().reshape(*shape, 3, 3)
    poses[..., :3, 3], poses[..., 3, 3] = rng.uniform(-1, 1, (*shape, 3)), 1
    return poses


@pytest.mark.parametrize("codec", [NineNumbers(), NineNumbers("zxy"), Bins()])
def test_written_answers_are_read_back(codec):
    rng = np.random.default_rng(0)
    for _ in range(100):
        poses, view = random_poses(rng, 6), int(rng.integers(6))
        box = np.r_[rng.uniform(-1.5, 1.5, 2), rng.uniform(-1, 0.3), rng.uniform(0.1, 2.3, 3)]
        box[:3] += poses[view, :3, 3]
        if isinstance(codec, Bins):  # in its range: ahead of the view
            box[:2] += 2.5 * poses[view, :2, 2] / np.linalg.norm(poses[view, :2, 2])
        read, kind = codec.parse(codec.write(view, box, poses), poses)
        assert kind == "ok" and np.abs(read[:6] - box).max() < (0.09 if isinstance(codec, Bins) else 0.011)


@pytest.mark.parametrize("codec", [NineNumbers(), Bins()])
def test_no_text_gets_through_or_raises(codec):
    """Mutations of a valid answer give a finite box with positive size, or None and a kind."""
    rng, poses, kinds = np.random.default_rng(1), random_poses(np.random.default_rng(2), 6), {}
    valid = codec.write(2, np.array([0.5, 0.4, 0.2, 0.6, 0.5, 0.9]), poses)
    pieces = (
        list(valid)
        + list('{}[]",:<>_0123456789-+eE. \n\x00\u0663')
        + ["NaN", "Infinity", "null", "true", "1e999", "9" * 40, "```", "bbox_3d", "<view_0>", "<x_79>"]
    )
    for _ in range(3000):
        text = list(valid)
        for _ in range(rng.integers(1, 6)):
            at, piece = rng.integers(len(text) + 1), pieces[rng.integers(len(pieces))]
            text[at : at + rng.integers(3)] = [piece] * int(rng.integers(3))
        box, kind = codec.parse("".join(text), poses)
        kinds[kind] = kinds.get(kind, 0) + 1
        assert (box is None) == (kind != "ok")
        assert box is None or (np.isfinite(box).all() and (box[3:6] > 0).all())
    assert len(kinds) >= 5


RECORD = {
    "scene_id": "scene0000_00",
    "object_id": "3",
    "object_name": "chair",
    "ann_id": "0",
    "description": "the red chair.",
    "token": ["the", "red", "chair", "."],
}
QUESTION = {
    "scene_id": "scene0000_00",
    "question_id": "val-scene0000-0",
    "question": "What is red?",
    "object_ids": [3],
    "object_names": ["chair"],
    "answers": ["chair"],
}
PROPOSAL = {"bbox_id": 0, "target": "chair", "bbox_3d": [1.0, 1.0, 0.4, 0.5, 0.5, 0.8], "score": 0.5}


@pytest.mark.parametrize(
    "read, record", [(read_scanrefer, RECORD), (read_scanqa, QUESTION), (read_proposals, PROPOSAL)]
)
def test_corrupt_files(tmp_path, read, record):
    """Damaged bytes and damaged fields: the records as they are, or one error that names the file."""
    rng, path, refused = np.random.default_rng(3), tmp_path / "list.json", 0
    values = [None, True, -1, 3.5, "", "../x", [], [None], {}, "scene0000_00\n", float("nan"), 10**400]
    for trial in range(400):
        if trial % 2:
            data = bytearray(json.dumps([record, record]).encode())
            for _ in range(rng.integers(1, 4)):
                data[rng.integers(len(data))] = rng.integers(256)
            data = data[: rng.integers(len(data))] if trial % 3 == 0 else data
        else:
            field = list(record)[rng.integers(len(record))]
            data = json.dumps([record, record | {field: values[rng.integers(len(values))]}]).encode()
        path.write_bytes(data)
        try:
            read(path)
        except ScanNetError as error:
            refused += 1
            assert "list.json" in str(error)
    assert refused > 150


def test_corrupt_archives(tmp_path):
    rng, path, refused = np.random.default_rng(4), tmp_path / "scene.npz", 0
    np.savez(path, ins_boxes=np.ones((3, 6)), ins_labels=np.array(["a", "b", "c"]), ins_scores=np.ones(3))
    valid = path.read_bytes()
    for _ in range(300):
        data = bytearray(valid)
        for _ in range(rng.integers(1, 20)):
            data[rng.integers(len(data))] = rng.integers(256)
        path.write_bytes(data[: rng.integers(1, len(data) + 1)])
        try:
            assert len(read_proposals(path).boxes) == 3
        except ScanNetError as error:
            refused += 1
            assert "scene.npz" in str(error)
    assert refused > 100


@pytest.mark.parametrize("seed", range(10))
def test_coverage_is_the_greedy_choice(seed):
    """Every chosen frame adds as many voxels as the best frame would, counted with Python sets."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, 1, (12, 60, 3)) * rng.uniform(0.2, 1, (12, 1, 3)) + rng.uniform(-1, 1, (12, 1, 3))
    points[rng.random((12, 60)) < 0.2] = np.nan
    sets = [
        {tuple(np.floor(point / 0.25).astype(int)) for point in frame if np.isfinite(point).all()} for frame in points
    ]
    chosen, share = coverage_views(points, 8, size=0.25, rng=seed)
    seen = set()
    for step, view in enumerate(chosen):
        assert len(sets[view] - seen) == max(len(voxels - seen) for voxels in sets) > 0
        seen |= sets[view]
        assert share[step] == pytest.approx(len(seen) / len(set.union(*sets)))


@pytest.mark.parametrize("seed", range(20))
def test_projected_area_against_points(seed):
    """The bounding rectangle of a box's visible part, against that of dense points on its surface."""
    rng = np.random.default_rng(seed)
    box, pose, intrinsic = (
        np.r_[rng.uniform(-2, 2, 3), rng.uniform(0.3, 2, 3)],
        random_poses(rng, 1),
        np.array([[60.0, 0, 55], [0, 62, 41], [0, 0, 1]]),
    )
    grid = np.stack(np.meshgrid(*[np.linspace(-0.5, 0.5, 61)] * 3, indexing="ij"), -1).reshape(-1, 3)
    camera = (box[:3] + grid * box[3:] - pose[0, :3, 3]) @ pose[0, :3, :3]
    camera = camera[camera[:, 2] > 0.05]
    pixels = camera[:, :2] / camera[:, 2:] * [60, 62] + [55, 41]
    expected = (
        np.prod(np.maximum(pixels.max(0).clip(-0.5, [111.5, 83.5]) - pixels.min(0).clip(-0.5, [111.5, 83.5]), 0))
        if len(camera)
        else 0
    )
    area = projected_areas(box[None], pose, intrinsic, (112, 84))[0, 0]
    assert area == pytest.approx(expected, rel=0.1, abs=30)


def test_proposals_of_odd_clouds():
    """One point, one plane, a line, a huge or a tiny extent: boxes or none, never an error."""
    rng = np.random.default_rng(5)
    clouds = [
        np.zeros((1, 3)),
        rng.uniform(0, 4, (2000, 3)) * [1, 1, 0],
        rng.uniform(0, 4, (2000, 3)) * [1, 0, 0],
        rng.uniform(-50, 50, (2000, 3)),
        rng.normal(0, 1e-6, (500, 3)),
        rng.uniform(0, 3, (20000, 3)),
    ]
    for cloud in clouds:
        for colors in None, rng.uniform(0, 1, cloud.shape):
            boxes = propose(cloud, colors)
            assert boxes.shape[1] == 6 and np.isfinite(boxes).all() and (boxes[:, 3:] > 0).all()
