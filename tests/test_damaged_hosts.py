"What a training of full size reads, damaged: records, fields, hosts with adapters. One clear error each."

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from w2r2.model.fields import read_field
from w2r2.model.hosts import add_adapters, build_host, read_host, save_host, write_tiny_host
from w2r2.scans.files import ScanNetError
from w2r2.scans.ply import Mesh, write_ply
from w2r2.study.full_evaluation import _answered
from w2r2.tasks.messages import build_records
from w2r2.tasks.record_files import read_conversations
from w2r2.tasks.samples import read_scanqa, read_scanrefer

RELEASE = "data/samples"
DESCRIBED = read_scanrefer(f"{RELEASE}/scanrefer/ScanRefer_filtered_samples.json", ["scene9000_00"])[0][:4]


@pytest.fixture(scope="module")
def records():
    return json.dumps(build_records("scanrefer", DESCRIBED, RELEASE, frames=2)[0][:2])


@pytest.mark.parametrize(
    "old, new, said",
    [
        ('"prompt":', '"prompt": "", "prompt":', "'prompt' is there twice"),
        (r'"gt_bbox": \[[^,]*', '"gt_bbox": [NaN', "NaN is no number"),
        (r'"gt_bbox": \[[^,]*', '"gt_bbox": [1e300', "0.gt_bbox.0: it must be smaller"),
        (r'"gt_bbox": \[', '"gt_bbox": [0.1, ', "0.gt_bbox: it must contain less"),
        ('"target": {"frame": ', '"target": {"frame": 7', "0.target.frame"),
        ('"target":', '"targets":', "0.target: is missing"),
        ('"from": "gpt"', '"from": "human"', "0.conversations"),
        (r'"positions": \[', '"positions": [0.0, ', "0.metadata.positions"),
        ('"prompt": "', '"prompt": "\\ud800', "surrogates not allowed"),
        (r"\[{", "{", "not JSON"),
    ],
)
def test_records_are_read_strictly(tmp_path, records, old, new, said):
    path = tmp_path / "scanrefer_train.json"
    assert re.search(old, records)
    path.write_text(re.sub(old, new.replace("\\", r"\\"), records, count=1))
    with pytest.raises(ScanNetError) as caught:
        read_conversations(path)
    assert str(path) in str(caught.value) and "w2r2 records" in str(caught.value)
    assert said in str(caught.value)


def test_every_record_is_read_once(tmp_path, records):
    path = tmp_path / "scanrefer_train.json"
    path.write_text(records)
    found = read_conversations(path)
    assert found == json.loads(records)
    path.write_text(json.dumps([*found, found[0]]))
    with pytest.raises(ScanNetError, match=r"scanrefer\|.* is there twice"):
        read_conversations(path)


def test_what_is_drawn_or_answered_twice_has_an_id_of_its_own(tmp_path):
    asked = read_scanqa(f"{RELEASE}/scanqa/ScanQA_v1.0_samples.json", ["scene9000_00"])[0][:20]
    for task, rows in (("scanrefer", DESCRIBED), ("scan2cap", DESCRIBED), ("scanqa", asked)):
        made = build_records(task, rows, RELEASE, frames=2, draws=2)[0]
        (tmp_path / "records.json").write_text(json.dumps(made))
        assert read_conversations(tmp_path / "records.json") == made
        assert any(record["id"].endswith("#2") for record in made)


@pytest.mark.parametrize("value", [1e300, np.inf, np.nan])
@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_vectors_of_a_field_are_finite_as_they_are_used(tmp_path, value, suffix):
    points, vectors = np.zeros((9, 3), np.float32), np.full((9, 2), value)
    if suffix == ".npz":
        np.savez(tmp_path / "0.npz", points=points, vectors=vectors)
    else:
        write_ply(tmp_path / "0.ply", Mesh(points, np.zeros((1, 3), np.int32), np.zeros((9, 3), np.uint8)))
        np.save(tmp_path / "0.npy", vectors)
    with pytest.raises(ScanNetError, match=rf"0{suffix}: vectors: .* too large for float32"):
        read_field(tmp_path / ("0.npz" if suffix == ".npz" else "0.ply"))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    home = tmp_path_factory.mktemp("hosts")
    write_tiny_host(home / "host")
    made_from = dict(backbone=f"{home}/host", weights3d=f"{home}/host/vggt", views=2, frame_width=112, merger_hidden=24)
    model, tokenizer = build_host(**made_from)
    save_host(add_adapters(model, rank=2), tokenizer, home / "adapters", made_from)
    return home / "adapters"


def first_of(state):
    return next(name for name in state if "lora_A" in name)


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda state: state[first_of(state)].fill_(torch.nan), "1 not finite: base_model"),
        (lambda state: state.pop(first_of(state)), "1 missing: base_model"),
        (lambda state: state.update({first_of(state): torch.ones(3, 3)}), "1 of another shape: base_model"),
        (lambda state: state.update(more=torch.ones(2)), "1 unexpected: more"),
    ],
)
def test_adapters_are_those_of_the_model(adapters, tmp_path, damage, said):
    folder = shutil.copytree(adapters, tmp_path / "adapters")
    state = load_file(folder / "adapter_model.safetensors")
    damage(state)
    save_file(state, folder / "adapter_model.safetensors")
    with pytest.raises(ScanNetError, match=f"adapter_model.safetensors: tensors: {said}"):
        read_host(folder)


@pytest.mark.parametrize(
    "name, old, new, said",
    [
        ("host.json", r"(?s).*", "{}", "it must contain"),
        ("host.json", r"(?s).*", "[]", "it must be object"),
        ("host.json", r"(?s).*", "{", "not JSON"),
        ("host.json", '"views"', '"frames"', "must not contain"),
        ("host.json", '"backbone": "', '"backbone": "/nowhere', "describe no model"),
        ("adapter_config.json", r"(?s).*", "{}", "it must contain"),
        ("adapter_config.json", r"(?s).*", "[]", "it must be object"),
        ("adapter_config.json", r"(?s).*", "{", "not JSON"),
        ("adapter_config.json", '"r": 2', '"r": 0', "r: it must be bigger"),
        ("adapter_config.json", '"use_rslora": false', '"use_rslora": true', "use_rslora: is 'True'"),
        ("adapter_model.safetensors", None, b"", "no readable safetensors file"),
    ],
)
def test_files_beside_adapters_are_read_strictly(adapters, tmp_path, name, old, new, said):
    folder = shutil.copytree(adapters, tmp_path / "adapters")
    if old is None:
        (folder / name).write_bytes(new)
    else:
        text = (folder / name).read_text()
        assert re.search(old, text)
        (folder / name).write_text(re.sub(old, new, text, count=1))
    with pytest.raises(ScanNetError, match=f"{folder}/{name}: .*{said}"):
        read_host(folder)


def test_adapters_that_are_whole_are_read(adapters, tmp_path):
    folder = shutil.copytree(adapters, tmp_path / "adapters")
    assert not read_host(folder)[0].training
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ScanNetError, match="adapter_model.safetensors: file: missing"):
        read_host(folder)


def test_an_evaluation_goes_on_with_the_lines_that_are_whole(tmp_path):
    about, path = {"longest": 128, "frames": 2}, tmp_path / "answers.jsonl"
    row = {"id": "a", "text": "a chair", "asked": about}
    whole = json.dumps(row)
    wrong = "[]", "7", "{}", whole[:-1] + ', "id": "b"}', json.dumps(row | {"id": 7}), json.dumps(row | {"text": None})
    path.write_text("\n".join([whole.replace('"a"', '"c"'), *wrong, json.dumps(row | {"asked": {}}), whole[:20]]))
    assert _answered(path, about) == {"c": "a chair"}
