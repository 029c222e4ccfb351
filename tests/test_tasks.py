"""Answer texts against VG-LLM's evaluator, and what malformed answers, files and geometry do."""
import json

import numpy as np
import torch
from golden import golden

from w2r2.answers import NineNumbers, parse_all
from w2r2.geometry import box_iou_oriented, euler_to_matrix, points_in_boxes

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

    Its IoU operator is inexact for nearly parallel faces. In 4 of the 28 boxes here it is off by more than 1e-3 (by up to 0.25);
    sampling decides between the two."""
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
    _, kinds = parse_all(NineNumbers("zxy"), [row["text"] for row in VG["text_to_iou"]], [poses_of(row["doc"]) for row in VG["text_to_iou"]])
    assert kinds == {"ok": 28, "no box": 4, "bad view": 4, "wrong count": 4}
