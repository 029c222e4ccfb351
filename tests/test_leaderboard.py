"""Rows of the leaderboard: written by the command, read with checks, scored again from the answers that are there."""

import hashlib
import json
from pathlib import Path

import pytest

from w2r2.cli import main
from w2r2.metrics.scoring import score
from w2r2.metrics.submissions import read_submissions

REPORTS = Path(__file__).parents[1] / "reports"
ROWS = read_submissions(REPORTS / "leaderboard")


def known_files():
    """Everything that may be named by a row, by digest."""
    return {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in (REPORTS / "predictions").rglob("*.json*")}


@pytest.mark.parametrize("row", ROWS, ids=[f"{row['name']}-{row['score']['protocol']}" for row in ROWS])
def test_rows_come_out_again(row):
    """Answers that are there are those that were scored; where the truth is there as well, so are the figures."""
    known, about = known_files(), row["score"]
    answers = [known.get(file["sha256"]) for file in row["predictions"]]
    if (REPORTS / "predictions" / row["name"]).is_dir():
        assert None not in answers, "the answers in reports/predictions are not those that this row was made from"
    truth = known.get((row["annotations"] or {}).get("sha256"))
    if None in answers or (truth is None and row["annotations"]):
        pytest.skip("answers or truth are not in the repository")
    found = score(answers, about["benchmark"], about["protocol"], truth, about["k"] or 0.5, subset=row["subset"])
    again = json.loads(found.json())
    assert [(line["name"], line["n"], line["note"]) for line in again["rows"]] == [
        (line["name"], line["n"], line["note"]) for line in about["rows"]
    ]
    for line, kept in zip(again["rows"], about["rows"]):
        for part in ("value", "low", "high"):
            assert line[part] == pytest.approx(kept[part], abs=1e-9)


def test_first_rows_are_there():
    names = {(row["name"], row["score"]["protocol"]) for row in ROWS}
    assert {("rooms-tiny-finetuned", "beacon3d"), ("rooms-tiny-finetuned-2d", "beacon3d")} <= names


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = {"scene_id": "scene0000_00", "ann_id": 0, "bbox": [0, 0, 0, 1, 1, 1]}
    truth = [row | {"object_id": number} for number in range(4)]
    Path("truth.json").write_text(json.dumps(truth))
    Path("said.json").write_text(json.dumps([*truth[:3], truth[3] | {"bbox": None}]))
    return ["score", "said.json", "--benchmark", "scanrefer", "--protocol", "scanrefer", "--annotations", "truth.json"]


def test_submit_writes_the_same_bytes_twice(files, capsys):
    texts = []
    for _ in range(2):
        assert main([*files, "--submit", "mine-1.0", "--json"]) == 0
        said = capsys.readouterr()
        (path,) = Path("reports/leaderboard").iterdir()
        texts.append(path.read_text())
    assert path.name == "mine-1.0-scanrefer-scanrefer.json" and texts[0] == texts[1] and path.as_posix() in said.err
    (row,) = read_submissions("reports/leaderboard")
    assert row["score"] == json.loads(said.out) and row["score"]["rows"][0]["value"] == 0.75
    assert row["predictions"] == [
        {"file": "said.json", "sha256": hashlib.sha256(Path("said.json").read_bytes()).hexdigest()}
    ]


@pytest.mark.parametrize("name", ["../mine", "", "a b", "x" * 80, ".hidden"])
def test_a_bad_name_is_one_line_and_no_file(files, name, capsys):
    assert main([*files, "--submit", name, "--json"]) == 2
    said = capsys.readouterr()
    assert not Path("reports").exists() and said.out == "" and len(said.err.strip().splitlines()) == 1


def test_a_row_that_was_edited_is_refused(files, capsys):
    main([*files, "--submit", "mine", "--json"])
    path = Path("reports/leaderboard/mine-scanrefer-scanrefer.json")
    whole = path.read_text()
    for old, new in (
        ('"n": 4', '"n": "4"'),
        ('"name": "mine"', '"name": "other"'),
        ("{", "["),
        ('"runs": 1', '"runs": 0'),
    ):
        path.write_text(whole.replace(old, new, 1))
        with pytest.raises(ValueError, match="mine-scanrefer-scanrefer.json"):
            read_submissions(path.parent)
