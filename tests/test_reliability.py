"Damage that once went unnoticed, stopped a run for good or ended in a traceback: one test for each class."

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from w2r2.cli import main

DATA = Path(__file__).parents[1] / "data"
QUERY = "vlm.model.layers.0.self_attn.q_proj.weight"


def tensors(change):
    def write(path):
        weights = load_file(path)
        change(weights)
        save_file(weights, path, {"format": "pt"})

    return write


def values(**new):
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | new))


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("model.safetensors", tensors(lambda weights: weights.pop(QUERY)), "q_proj.weight: is missing"),
        ("model.safetensors", tensors(lambda weights: weights.update(other=torch.zeros(3))), "other: is no tensor"),
        ("model.safetensors", tensors(lambda weights: weights.update({QUERY: torch.zeros(3, 3)})), "another shape"),
        ("model.safetensors", tensors(lambda weights: weights[QUERY][0].fill_(torch.inf)), "not finite"),
        ("model.safetensors", lambda path: path.rename(path.with_name("pytorch_model.bin")), "no model.safetensors"),
        ("bins.json", lambda path: path.write_text("{}"), "must contain"),
        ("bins.json", values(kind="boxes"), "kind"),
        ("bins.json", values(count=10**7), "count"),
        ("bins.json", values(count=100), "ends before"),
        ("bins.json", values(low=[float("nan")] * 6), "nan is no number"),
        ("config.json", values(first_bin=7), "first_bin"),
        ("config.json", lambda path: path.write_text("[]"), "must be object"),
        ("tokenizer.json", lambda path: path.write_text("{"), "not JSON"),
        ("tokenizer.json", values(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}), "tokenizer"),
    ],
)
def test_a_model_that_is_not_as_it_was_saved_is_refused(tmp_path, capsys, name, change, said):
    folder = Path(shutil.copytree(DATA / "rooms-tiny-finetuned", tmp_path / "model"))
    change(folder / name)
    assert main(["ground", "scene9000_00", "the black couch", "--model", str(folder)]) == 2
    complaint = capsys.readouterr().err
    assert said.lower() in complaint.lower() and str(folder) in complaint and len(complaint.splitlines()) == 1
