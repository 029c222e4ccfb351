"""Folders for the hub: cards that its library reads, tables that its viewer's library reads where it is installed."""

import json

import pytest
from huggingface_hub import DatasetCard, ModelCard

from w2r2.cli import main
from w2r2.metrics.scoring import score
from w2r2.metrics.submissions import submission, write_submission
from w2r2.model.checkpoint import load
from w2r2.shipped import DATA


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Answers of the shipped model to the sample scenes, their submission, and the packed folders."""
    place = tmp_path_factory.mktemp("hub")
    said = place / "rooms-tiny-finetuned"
    assert main(["predict", str(said)]) == 0
    scored = score([said / "scanrefer.jsonl"], "scanrefer", "scanrefer", said / "scanrefer_truth.jsonl", resamples=200)
    made = submission("rooms-tiny-finetuned", scored, [said / "scanrefer.jsonl"], said / "scanrefer_truth.jsonl")
    write_submission(made, place / "rows")
    options = ["--owner", "ME", "--predictions", str(said), "--leaderboard", str(place / "rows")]
    assert main(["pack", str(place / "out"), *options]) == 0
    return place, {row.name: row for row in scored.rows}


def test_cards_are_what_the_hub_reads(world):
    place, rows = world
    card = ModelCard.load(place / "out/models/rooms-tiny-finetuned/README.md")
    assert card.data.pipeline_tag == "image-text-to-text" and card.data.base_model == "ME/rooms-tiny"
    results = {result.metric_name: result for result in card.data.eval_results}
    found = results["Acc@0.25, protocol scanrefer"]
    assert found.metric_value == pytest.approx(rows["Acc@0.25"].value, abs=1e-6)
    assert found.dataset_type == "ME/rooms" and "scanrefer_truth.jsonl" in found.dataset_name
    assert not ModelCard.load(place / "out/models/rooms-vggt/README.md").data.eval_results
    data = DatasetCard.load(place / "out/datasets/rooms/README.md")
    files = [file["path"] for config in data.data.to_dict()["configs"] for file in config["data_files"]]
    assert len(files) == 6 and all((place / "out/datasets/rooms" / name).is_file() for name in files)
    assert data.data.size_categories == ["n<1K"] and data.text.count("| `") == 6


def test_packed_models_are_whole(world):
    for name in ("rooms-tiny", "rooms-tiny-finetuned"):
        folder = world[0] / "out/models" / name
        model, tokenizer, _ = load(folder)
        ours, _, _ = load(DATA / name)
        assert all((a == b).all() for a, b in zip(model.parameters(), ours.parameters(), strict=True))
        assert {path.name for path in folder.iterdir()} == {path.name for path in (DATA / name).iterdir()}


def test_tables_load_as_on_the_hub(world, tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = world[0] / "out/datasets/rooms"
    said = {
        row["question_id"]: row for row in datasets.load_dataset(str(folder), "answers", cache_dir=tmp_path)["samples"]
    }
    asked = json.loads((DATA / "samples/scanqa/ScanQA_v1.0_samples.json").read_text())
    assert {row["question_id"]: row["answers"] for row in asked} == {key: row["true"] for key, row in said.items()}
    boxes = datasets.load_dataset(str(folder), "boxes", cache_dir=tmp_path)["samples"]
    assert sum(row["iou"] >= 0.25 for row in boxes) / len(boxes) == pytest.approx(world[1]["Acc@0.25"].value, abs=5e-3)
    assert len(datasets.load_dataset(str(folder), cache_dir=tmp_path)["samples"]) == 253  # the default: descriptions


@pytest.mark.parametrize(
    "options",
    [["--owner", "a/b"], ["--owner", "ME", "--split", "none"], ["--owner", "ME", "--predictions", "nowhere"]],
)
def test_bad_input_to_pack_is_one_line(options, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["pack", "out", *options]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
