"""The scoring front end: recorded files through the command's path, and files that are broken in every way."""

import copy
import json
import time

import numpy as np
import pytest
from golden import golden

from w2r2.metrics.prediction_files import load_predictions
from w2r2.metrics.scoring import score
from w2r2.scans.files import ScanNetError


def write(path, content):
    path.write_text("\n".join(map(json.dumps, content)) if path.suffix == ".jsonl" else json.dumps(content))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One file for every format, and the annotations that go with it."""
    folder, data, qa, peers = (
        tmp_path_factory.mktemp("files"),
        golden("scanrefer_acc"),
        golden("scanqa_official"),
        golden("scanqa_peers"),
    )
    bench = golden("scan2cap_bench")
    box = [[0.0, 0, 0, 1, 1, 1], [0.5, 0, 0, 1, 1, 1]]
    captions = {
        key: {"caption": row["caption"], "iou": row["iou"]}
        for key, row in golden("scan2cap_orig")["predictions"].items()
    }
    return {
        name: (
            benchmark,
            protocol,
            write(folder / name, content),
            truth and write(folder / f"truth_{name[:4]}.json", truth),
        )
        for name, benchmark, protocol, content, truth in (
            ("boxes.json", "scanrefer", "scanrefer", data["pred"], data["gt"]),
            (
                "rows.jsonl",
                "scanrefer",
                "video3dllm",
                [{"pred_response": box[i % 2], "gt_response": box[0], "question_type": "unique"} for i in range(20)],
                None,
            ),
            ("captions.json", "scan2cap", "scan2cap", captions, golden("scan2cap_orig")["annotations"]),
            ("listed.json", "scan2cap", "scan2cap_benchmark", bench["pred"], bench["gt"]),
            ("ten.json", "scanqa", "scanqa", qa["pred"], qa["gold"]),
            (
                "answers.jsonl",
                "scanqa",
                "video3dllm",
                [
                    {"question_id": record["question_id"], "pred_response": text}
                    for record, text in zip(peers["gold"], peers["text"])
                ],
                peers["gold"],
            ),
            (
                "leo.json",
                "scanqa",
                "leo",
                [
                    {"scene_id": record["scene_id"], "response_pred": text, "response_gt": record["answers"]}
                    for record, text in zip(peers["gold"], peers["text"])
                ],
                None,
            ),
        )
    }


def figures(files, name, **options):
    benchmark, protocol, path, truth = files[name]
    result = score([path], benchmark, protocol, truth, resamples=200, **options)
    for row in result.rows:
        assert row.low is None or row.low <= row.value <= row.high or row.value == pytest.approx(row.low)
    return {row.name: row.value for row in result.rows}


def test_recorded_figures(files):
    report = golden("scanrefer_acc")["report"]["scores"]
    assert figures(files, "boxes.json")["Acc@0.25 unique"] == report["unique|overall|acc@0.25iou"]
    assert figures(files, "rows.jsonl")["Acc@0.5 unique"] == 0.5
    assert figures(files, "captions.json")["CIDEr"] == pytest.approx(
        golden("scan2cap_orig")["scores"]["0.5"]["cider"], abs=1e-9
    )
    assert figures(files, "listed.json", k=0.25)["F1 CIDEr"] == pytest.approx(
        golden("scan2cap_bench")["results"]["0.25"]["f1-score"]["cider"], abs=1e-6
    )
    assert figures(files, "ten.json")["EM@10"] == golden("scanqa_official")["percent"]["Top10 (EM)"]
    assert figures(files, "answers.jsonl")["EM"] == golden("scanqa_peers")["video3dllm"]["em"]
    assert figures(files, "leo.json")["refined EM"] == golden("scanqa_peers")["leo"]["em_refined"]


@pytest.mark.parametrize("kind", [int, float])
def test_ids_may_be_numbers(files, kind, tmp_path):
    """On either side; the figures do not depend on it."""
    benchmark, protocol, path, truth = files["boxes.json"]
    wanted = score([path], benchmark, protocol, truth, resamples=10)
    numbered = []
    for source in (path, truth):
        rows = json.loads(source.read_text())
        rows = [row | {key: kind(row[key]) for key in ("object_id", "ann_id")} for row in rows]
        numbered.append(write(tmp_path / source.name, rows))
    for pair in ((numbered[0], truth), (path, numbered[1]), tuple(numbered)):
        assert score([pair[0]], benchmark, protocol, pair[1], resamples=10) == wanted


@pytest.mark.parametrize(
    "change, words",
    [
        ({"object_id": None}, "record 1: object_id must be string or integer"),
        ({"ann_id": 0.5}, "record 1: ann_id must be string or integer"),
        ({"ann_id": True}, "record 1: ann_id must be string or integer"),
        ({"object_id": [3]}, "record 1: object_id must be string or integer"),
        ({"bbox": [1, 2, 3]}, "record 1: bbox must be 6 or 9 numbers"),
        ("same", "two predictions for scene, object, description"),
        ([1, 2], "record 1: record must be object"),
    ],
)
def test_a_bad_numbered_list_is_one_line(change, words, tmp_path, capsys):
    from w2r2.cli import main

    rows = [{"scene_id": "scene0000_00", "object_id": i, "ann_id": 0, "bbox": [i, 0, 0, 1, 1, 1]} for i in range(3)]
    truth = write(tmp_path / "truth.json", rows)
    bad = [rows[0], {**rows[0], "object_id": "0"} if change == "same" else change, rows[2]]
    if isinstance(change, dict):
        bad[1] = rows[1] | change
    said = write(tmp_path / "said.json", bad)
    options = ["--benchmark", "scanrefer", "--protocol", "scanrefer", "--annotations", str(truth)]
    assert main(["score", str(said), *options]) == 2
    error = capsys.readouterr().err
    assert words in error and "said.json" in error and len(error.strip().splitlines()) == 1


def test_all_descriptions_of_an_object_have_to_be_right(tmp_path):
    """Beacon3D's rule against a direct count."""
    rng = np.random.default_rng(0)
    truth = [
        {"scene_id": f"scene{s:04}_00", "object_id": o, "ann_id": a, "bbox": [0, 0, 0, 1, 1, 1]}
        for s in range(10)
        for o in range(6)
        for a in range(int(rng.integers(1, 5)))
    ]
    said = [row | {"bbox": [float(rng.uniform(0, 0.8)), 0, 0, 1, 1, 1]} for row in truth if rng.random() < 0.95]
    found = score([write(tmp_path / "p.json", said)], "scanrefer", "beacon3d", write(tmp_path / "t.json", truth))
    moved = {(row["scene_id"], row["object_id"], row["ann_id"]): row["bbox"][0] for row in said}
    objects = {}
    for row in truth:
        x = moved.get((row["scene_id"], row["object_id"], row["ann_id"]), 1)
        objects.setdefault((row["scene_id"], row["object_id"]), []).append((1 - x) / (1 + x))
    rows = {row.name: row for row in found.rows}
    for k in (0.25, 0.5):
        whole = rows[f"Acc@{k} per object"]
        assert whole.value == np.mean([min(iou) >= k for iou in objects.values()]) and whole.n == len(objects)
        assert whole.value < rows[f"Acc@{k}"].value and rows[f"Acc@{k}"].n == len(truth)
    assert "have one description only" in found.remarks[-1]


def test_remarks_name_what_does_not_meet(files):
    benchmark, protocol, path, truth = files["boxes.json"]
    assert (
        score([path], benchmark, protocol, truth, resamples=10)
        .remarks[0]
        .startswith("7 predictions have no annotation")
    )


@pytest.mark.parametrize(
    "name", ["boxes.json", "rows.jsonl", "captions.json", "listed.json", "ten.json", "answers.jsonl", "leo.json"]
)
def test_broken_files_give_one_clear_error(files, name, tmp_path):
    """A record changed anywhere is either still valid or refused with the file named; nothing else is raised."""
    benchmark, protocol, path, _ = files[name]
    text = path.read_text().splitlines()
    content = [json.loads(line) for line in text] if path.suffix == ".jsonl" else json.loads(text[0])
    if isinstance(content, list):
        content = content[:3]
    else:
        content = {key: content[key][:2] if name == "listed.json" else content[key] for key in list(content)[:3]}
    rng, refused = np.random.default_rng(0), 0
    junk = [None, True, -1, 10**400, "x", [], {}, [[]], ["a"], 1e300, {"a": 1}, [1, 2, 3, 4, 5, 6, 7], "", "\ud800"]
    for _ in range(150):
        broken = copy.deepcopy(content)
        node, key = broken, None
        for _ in range(rng.integers(1, 5)):
            inner = node if key is None else node[key]
            if not isinstance(inner, (list, dict)) or not inner:
                break
            node, key = (
                inner,
                list(inner)[rng.integers(len(inner))] if isinstance(inner, dict) else int(rng.integers(len(inner))),
            )
        if isinstance(node, dict) and rng.random() < 0.4:
            del node[key]
        else:
            node[key] = junk[rng.integers(len(junk))]
        file = write(tmp_path / name, broken)
        try:
            load_predictions(file, benchmark, protocol)
        except ScanNetError as error:
            refused += 1
            assert str(error).startswith(f"{file}: ") and len(str(error)) < 2000
    assert refused > 40


@pytest.mark.parametrize("name", ["boxes.json", "answers.jsonl"])
def test_cut_files(files, name, tmp_path):
    benchmark, protocol, path, _ = files[name]
    whole = path.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 5):
        (tmp_path / name).write_bytes(whole[:length])
        with pytest.raises(ScanNetError, match=name):
            load_predictions(tmp_path / name, benchmark, protocol)


def test_ten_thousand_records_in_seconds(files, tmp_path):
    rng = np.random.default_rng(0)
    truth = [
        {
            "scene_id": f"scene{i % 141:04}_00",
            "object_id": str(i),
            "ann_id": "0",
            "bbox": [0, 0, 0, 1, 1, 1],
            "unique_multiple": i % 2,
            "others": 0,
        }
        for i in range(9508)
    ]
    boxes = [record | {"bbox": [*rng.normal(0, 0.3, 3), 1, 1, 1]} for record in truth]
    paths = write(tmp_path / "boxes.json", boxes), write(tmp_path / "truth.json", truth)
    start = time.process_time()
    result = score([paths[0]], "scanrefer", "scanrefer", paths[1])
    assert time.process_time() - start < 10 and result.rows[0].n == 9508
