"Input that once went through, took the memory or the time of the machine, or ended in a traceback."

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from w2r2.cli import main
from w2r2.report.grids import write_table
from w2r2.scans.annotations import LabelTable
from w2r2.scans.files import ScanNetError
from w2r2.scans.pictures import contact_sheet
from w2r2.scans.scan import Scan
from w2r2.tasks.proposals import read_proposals
from w2r2.tasks.samples import read_scanrefer

DATA = Path(__file__).parents[1] / "data"
SCENE = "scene9000_00"


@pytest.fixture
def release(tmp_path):
    "A copy of the sample scenes."
    return Path(shutil.copytree(DATA / "samples", tmp_path / "release"))


def complaint(capsys, *command) -> str:
    "What a command that refuses its input says: one line that names it."
    assert main([str(word) for word in command]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and said.startswith(f"w2r2 {command[0]}: ")
    return said


def twice(path: Path, old: str, new: str):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, f"{old}{new}", 1))


@pytest.mark.parametrize(
    "suffix, change, said",
    [
        (".txt", lambda path: path.write_text(""), "is empty"),
        (".txt", lambda path: path.write_text("sceneType = Office\n"), "axisAlignment: is missing"),
        (".txt", lambda path: path.write_text(path.read_text() * 2), "is there twice"),
        (".aggregation.json", lambda path: twice(path, "{", '"segGroups":[],'), "'segGroups' is there twice"),
        (".aggregation.json", lambda path: twice(path, '"objectId":1', ',"objectId":7'), "'objectId' is there twice"),
        ("_vh_clean_2.0.010000.segs.json", lambda path: twice(path, "{", '"segIndices":[0],'), "is there twice"),
    ],
)
def test_frames_of_reference_and_keys_are_given_once(release, capsys, suffix, change, said):
    path = release / "scans" / SCENE / f"{SCENE}{suffix}"
    change(path)
    assert said in complaint(capsys, "show", SCENE, "--root", release)


def test_a_label_is_in_the_table_once(release):
    path = release / "scannetv2-labels.combined.tsv"
    lines = path.read_text().splitlines()
    cells = lines[1].split("\t")
    cells[4] = "39"
    path.write_text("\n".join([*lines, "\t".join(cells)]) + "\n")
    with pytest.raises(ScanNetError, match="there twice, and differs"):
        LabelTable.read(path)


def test_a_prediction_has_a_key_once(tmp_path, capsys):
    row = '{"scene_id": "a", "object_id": 0, "ann_id": 0, "bbox": [0, 0, 0, 1, 1, 1]'
    path, truth = tmp_path / "predictions.json", tmp_path / "truth.json"
    path.write_text(f'[{row}, "bbox": [9, 9, 9, 1, 1, 1]}}]')
    truth.write_text(f"[{row}}}]")
    score = "score", path, "--benchmark", "scanrefer", "--protocol", "scanrefer", "--annotations", truth
    assert "'bbox' is there twice" in complaint(capsys, *score)
    assert json.loads(truth.read_text())


STRANGE = "[/red]x \x1b[2J<b onclick=a()>|\n</script><script>b()</script> $\\frac"


def test_text_from_predictions_reaches_the_terminal_as_text(tmp_path, capsys):
    row = {"scene_id": "a", "object_id": 0, "ann_id": 0, "bbox": [0, 0, 0, 1, 1, 1]}
    path, truth = tmp_path / "predictions.json", tmp_path / "truth.json"
    path.write_text(json.dumps([row, row | {"scene_id": STRANGE}]))
    truth.write_text(json.dumps([row]))
    score = "score", str(path), "--benchmark", "scanrefer", "--protocol", "scanrefer", "--annotations", str(truth)
    assert main(score) == 0
    said = capsys.readouterr().out
    assert "[/red]x" in said and "\x1b" not in said


def test_labels_of_a_scan_are_shown_as_text(release, tmp_path, capsys):
    path = release / "scans" / SCENE / f"{SCENE}.aggregation.json"
    content = json.loads(path.read_text())
    content["segGroups"][5]["label"] = STRANGE
    path.write_text(json.dumps(content))
    page = tmp_path / "<img src=x>.html"
    assert main(["show", SCENE, "--root", str(release), "--html", str(page)]) == 0
    assert "\x1b" not in capsys.readouterr().out
    text = page.read_text()
    assert "<img src=x>" not in text and "<b onclick" not in text and "script>b()" not in text
    with Scan(release, SCENE) as scan:
        frames = scan.views([0])
        color, pose = np.stack([frame.color for frame in frames]), np.stack([frame.pose for frame in frames])
        contact_sheet(color, pose, scan.intrinsic_color, scan.boxes, scan.labels).canvas.draw()


def test_a_table_keeps_its_rows(tmp_path):
    frame = pd.DataFrame({"arm": [STRANGE, "a\\|b", "[a](javascript:b)"], "value": ["1", "2", "3"]})
    write_table(frame, frame, tmp_path, "strange", "A caption.")
    lines = (tmp_path / "strange.md").read_text().split("\n")
    assert len(lines) == 8 and all(len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 3 for line in lines[2:7])
    assert not re.search(r"<\w|\]\(", "\n".join(lines))


@pytest.mark.parametrize("k", ["nan", "-3", "0", "1.5", "inf"])
def test_an_overlap_that_is_none_is_refused(tmp_path, capsys, k):
    path = tmp_path / "predictions.json"
    path.write_text('{"a": {"caption": "a", "iou": 1}}')
    score = "score", path, "--benchmark", "scan2cap", "--protocol", "scan2cap", "--annotations", path, "--k", k
    assert "at most 1" in complaint(capsys, *score)


@pytest.mark.parametrize("field", [3, 4, 5])
def test_a_predicted_box_has_no_negative_size(tmp_path, capsys, field):
    row = {"scene_id": "a", "object_id": 0, "ann_id": 0, "bbox": [0, 0, 0, 1, 1, 1]}
    path, truth = tmp_path / "predictions.json", tmp_path / "truth.json"
    truth.write_text(json.dumps([row]))
    row["bbox"][field] = -1
    path.write_text(json.dumps([row]))
    score = "score", path, "--benchmark", "scanrefer", "--protocol", "scanrefer", "--annotations", truth
    assert "record 0: bbox must be" in complaint(capsys, *score)


def proposals(**changes) -> dict:
    return {"ins_boxes": np.ones((6, 6)), "ins_labels": np.array(["a"] * 6), "ins_scores": np.ones(6)} | changes


@pytest.mark.parametrize(
    "content, said",
    [
        (proposals(ins_boxes=np.ones((6, 20))), r"shape \(6, 20\)"),  # the numbers of twenty boxes
        (proposals(ins_boxes=np.ones((3, 12))), "shape|labels"),
        (proposals(ins_boxes=np.ones((6, 6)) + 1j), "complex"),
        (proposals(ins_scores=np.ones(6) + 1j), "complex"),
        (proposals(ins_scores=np.ones((2, 3))), "2 dimensions where 1"),
        (proposals(ins_boxes=-np.ones((6, 6))), "negative size"),
        (proposals(ins_boxes=np.full((6, 6), 1e30)), "beyond a million"),
        (proposals(ins_boxes=np.array([["1"] * 6] * 6)), "kind fiu"),
        (proposals(ins_labels=np.array([b"a"] * 6)), "S1"),
    ],
)
def test_proposals_are_boxes(tmp_path, content, said):
    np.savez(tmp_path / "proposals.npz", **content)
    with pytest.raises(ScanNetError, match=said):
        read_proposals(tmp_path / "proposals.npz")


def test_half_characters_are_refused(release, tmp_path, capsys):
    assert "half a character" in complaint(capsys, "ground", SCENE, "the red chair \udc80", "--root", release)
    path = release / "scanrefer/ScanRefer_filtered_samples.json"
    records = json.loads(path.read_text())
    records[0]["description"] += "\ud800"
    path.write_text(json.dumps(records))
    with pytest.raises(ScanNetError, match="surrogates not allowed"):
        read_scanrefer(path)
