"""The readers of what a training of full size, the models from elsewhere and the report need: what is damaged, and what
an independent reading of it says."""

import io
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from campaign.answered import LINES, ROOT, TREE, frame_rows, sample_of, table_rows
from campaign.mutators import on_bytes, on_json
from campaign.sources import changed
from campaign.targets import (
    SAMPLES,
    Target,
    by_units,
    identified,
    json_units,
    npz_again,
    npz_touched,
    ply_header,
    ply_touched,
    safetensors_header,
    same_name,
    store_files,
    strict,
    tensor_units,
    told,
)
from peft import get_peft_model_state_dict

from w2r2.metrics.submissions import read_submissions
from w2r2.model.detector import Detector
from w2r2.model.fields import read_field
from w2r2.model.hosts import add_adapters, build_host, read_host, save_host, write_tiny_host
from w2r2.model.vggt_model import VGGT, load_vggt, save_vggt
from w2r2.report.measured_systems import read_systems
from w2r2.scans.ply import Mesh, write_ply
from w2r2.study.full_evaluation import _answered
from w2r2.tasks.messages import build_records
from w2r2.tasks.record_files import read_conversations
from w2r2.tasks.samples import read_scanrefer

ABOUT = {"longest": 128, "frames": 32}  # of an evaluation
WEIGHTS = [on_bytes, safetensors_header]
TINY_VGGT = dict(image_size=56, width=16, depth=3, heads=2, vit_depth=1, camera_depth=1, camera_heads=2, features=8)
TINY_VGGT |= dict(channels=[4, 4, 8, 8], layers=[0, 1, 1, 2])


def leaves(tree, path=()) -> dict:
    "Every value of a tree that is no list or object, and every empty one, by its path."
    if isinstance(tree, dict | list) and tree:
        parts = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {place: leaf for key, value in parts for place, leaf in leaves(value, (*path, str(key))).items()}
    return {path: repr(tree)}


# Fields of features


def npy_again(data: bytes, rng) -> bytes:
    "An array of another shape or type, a header that claims another, or another file."
    if not data.startswith(b"\x93NUMPY"):
        return (ply_header if rng.random() < 0.5 else on_bytes)(data, rng)
    array, stream = np.load(io.BytesIO(data)), io.BytesIO()
    if rng.random() < 0.5:
        shape = b"(%d, %d)" % (rng.choice([0, 1, 23, 25, 2**20, 2**40, 2**62]), rng.choice([1, 4, 2**20, 2**33]))
        return data.replace(b"(%d, %d)" % array.shape, shape, 1)
    changes = array[:-1], array[None], array.ravel(), array.T, np.asfortranarray(array), array * np.nan, array * 1e300
    changes += tuple(array.astype(kind) for kind in ("f2", ">f8", "i8", "c16", "S8")) + (np.array([{}]),)
    np.save(stream, rng.choice(changes))
    return stream.getvalue()


def mesh_field(folder: Path) -> dict:
    field = read_field(folder / "0.ply")
    found = {f"position {n}": row.tobytes() for n, row in enumerate(field.points)}
    return found | {("vector", n): row.tobytes() for n, row in enumerate(field.vectors)}


def array_units(data: bytes) -> dict:
    rows = np.load(io.BytesIO(data), allow_pickle=False).astype("f8")
    return {("vector", number): row.tobytes() for number, row in enumerate(rows)}


def mesh_field_touched(name, original, damaged):
    return (ply_touched if name.endswith(".ply") else by_units(array_units))(name, original, damaged)


# Models


def detector(folder: Path) -> dict:
    read = Detector.load(folder)
    found = read.config | {"calibration": read.calibration, "segment": read.segment}
    return {name: repr(value) for name, value in found.items()} | named(read.state_dict())


def named(tensors: dict[str, torch.Tensor]) -> dict:
    return {("tensor", same_name(name)): told(value) for name, value in tensors.items()}


def plain_attributes(model: torch.nn.Module) -> str:
    "Whatever modules hold besides tensors and modules."
    kinds = int | float | str | tuple | list
    found = {
        f"{name}.{key}": repr(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, kinds) and not key.startswith("_")
    }
    return repr(sorted(found.items()))


def vggt(folder: Path) -> dict:
    read = load_vggt(folder)
    return named(read.state_dict()) | {"made": plain_attributes(read)}


def weights_touched(data_of: dict):
    "By file: keys of JSON as they are called when they are read, or tensors."

    def touched(name, original, damaged):
        units = tensor_units if name.endswith(".safetensors") else json_units(lambda tree: tree)
        try:
            if name.endswith(".safetensors"):
                return {("tensor", key) for key in changed(units(original), units(damaged))}
        except Exception:  # whatever Python says to it
            return None
        keys = units(name, original, damaged)
        return keys if keys is None else set().union(*(data_of.get(key, {key}) for key in keys))

    return touched


def adapted(folder: Path) -> dict:
    "Settings and tensors of a host with adapters, and all other tensors as one."
    model, _ = read_host(folder, merge=False)
    config, own = model.get_base_model().config, get_peft_model_state_dict(model)
    names = "views", "frame_width", "reference_frame", "fusion", "bins"
    layers = [module for module in model.modules() if hasattr(module, "scaling")]
    others = {
        name: value for name, value in model.state_dict().items() if "lora_" not in name and ".default" not in name
    }
    return named(own) | {
        **{name: repr(getattr(config, name)) for name in names},
        "lora_alpha": repr([layer.scaling for layer in layers]),
        "attention": config.vlm_config._attn_implementation,
        "others": told({name: told(value) for name, value in others.items() if "merger" not in name}),
    }


# Evaluations and the report


def answered_touched(name, original, damaged):
    "Records of the lines that are not in both."

    def lines(data):
        return {line for line in data.split(b"\n") if line.strip()}

    found = set()
    for line in lines(original) ^ lines(damaged):
        try:
            found.add(strict(line)["id"])
        except Exception:  # no whole line: asked again
            continue
    return found


def make_full(folder: Path) -> list[Target]:
    "Targets with their originals below the folder."
    targets = []

    def place(name: str) -> Path:
        (folder / name).mkdir()
        return folder / name

    at = place("records of a training")
    described = read_scanrefer(SAMPLES / "scanrefer/ScanRefer_filtered_samples.json", ["scene9000_00"])[0]
    made = [
        *build_records("scanrefer", described[:3], SAMPLES, frames=2)[0],
        *build_records("scanrefer", described[:2], SAMPLES, frames=2, answers="bins", train=False)[0],
        *build_records("scan2cap", described[:2], SAMPLES, frames=2)[0],
    ]
    for number, record in enumerate(made):
        record["id"] += f" {number}"
    (at / "0.json").write_text(json.dumps(made))
    units, records = json_units(identified), lambda at: identified(map(told, read_conversations(at / "0.json")))
    targets.append(Target(at.name, at, ["0.json"], records, units, TREE))

    rng = np.random.default_rng(0)
    points, vectors = rng.uniform(-2, 2, (24, 3)), rng.normal(size=(24, 4)).astype(np.float32)
    at = place("field, npz")
    np.savez(at / "0.npz", points=points, vectors=vectors)

    def field(at):
        return {name: told(value.astype(float)) for name, value in asdict(read_field(at / "0.npz")).items()}

    targets.append(Target(at.name, at, ["0.npz"], field, npz_touched, [on_bytes, npz_again, npz_again]))
    at = place("field, mesh")
    write_ply(at / "0.ply", Mesh(points.astype("f4"), np.zeros((1, 3), np.int32), np.zeros((24, 3), np.uint8)))
    np.save(at / "0.npy", vectors)
    targets.append(Target(at.name, at, store_files(at), mesh_field, mesh_field_touched, [on_bytes, npy_again]))

    at = folder / "detector"
    Detector(["chair", "table"], 24, 1, 2, 8, (1.5, 0.25), 0.125).save(at)
    config, weights = "config.json", "model.safetensors"
    targets.append(
        Target(at.name, at, [config, weights], detector, weights_touched({}), [by_suffix(TREE, WEIGHTS)], 0.2)
    )
    at = folder / "VGGT"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_vggt(VGGT(**TINY_VGGT), TINY_VGGT, at)
    touched = weights_touched(dict.fromkeys(TINY_VGGT, {"made"}))
    targets.append(Target(at.name, at, [config, weights], vggt, touched, [by_suffix(TREE, WEIGHTS)], 0.1))

    os.environ["HF_HUB_OFFLINE"] = "1"
    at, host = folder / "host with adapters", folder / "host of adapters"
    write_tiny_host(host)
    about = dict(backbone=str(host), weights3d=str(host / "vggt"), views=2, frame_width=112, merger_hidden=24)
    about |= dict(reference_frame="first", dtype="float32", attention="sdpa", seed=0, fusion="add")
    model, tokenizer = build_host(**about)
    model = add_adapters(model, rank=2)
    save_host(model, tokenizer, at, about)
    tensors = {("tensor", same_name(name)) for name in get_peft_model_state_dict(model)}
    renamed = {"dtype": tensors | {"others"}, "lora_alpha": {"lora_alpha"}, "seed": set()}
    files = ["host.json", "adapter_config.json", "adapter_model.safetensors"]
    touched = weights_touched(renamed)
    targets.append(Target(at.name, at, files, adapted, touched, [by_suffix(TREE, WEIGHTS)], 0.02))

    at = place("leaderboard")
    (source,) = (ROOT / "reports/leaderboard").glob("*finetuned-scanrefer-scanrefer.json")
    shutil.copy(source, at / source.name)
    submitted = json_units(leaves)
    targets.append(Target(at.name, at, [source.name], lambda at: leaves(*read_submissions(at)), submitted, TREE, 0.5))

    at = place("comparison of systems")
    for name in ("answers", "figures"):
        (at / f"{name}.csv").write_bytes(sample_of(ROOT / f"reports/systems/{name}.csv", 40))
    of_words = (
        "row",
        "system",
        "about",
        "vlm",
        "inputs",
        "scene",
        "task",
        "metric",
        "protocol",
        "why",
        "object",
        "ann_id",
    )
    rows = by_units(lambda data: {n: repr(row) for n, row in table_rows(data, of_words).items()})

    def systems(at):
        tables = read_systems(at)._asdict()
        return {(name, n): row for name, table in tables.items() for n, row in frame_rows(table).items()}

    def systems_touched(name, original, damaged):
        found = rows(name, original, damaged)
        return None if found is None else {(Path(name).stem, number) for number in found}

    targets.append(Target(at.name, at, store_files(at), systems, systems_touched, LINES, 0.3))

    at = place("evaluation that goes on")
    lines = [json.dumps({"id": f"scanqa|{n}", "text": f"a chair {n}", "asked": ABOUT}) for n in range(6)]
    (at / "answers.jsonl").write_text("".join(line + "\n" for line in lines))

    def kept(at):
        return {key: told(value) for key, value in _answered(at / "answers.jsonl", ABOUT).items()}

    targets.append(Target(at.name, at, ["answers.jsonl"], kept, answered_touched, [on_line, *LINES]))
    return targets


def by_suffix(texts: list, binaries: list):
    "One of these for JSON, one of those for anything else."

    def damage(data: bytes, rng) -> bytes:
        return rng.choice(texts if data[:1] == b"{" else binaries)(data, rng)

    return damage


def on_line(data: bytes, rng) -> bytes:
    "One of several lines of JSON."
    lines = data.decode().splitlines()
    at = rng.randrange(len(lines))
    lines[at] = on_json(lines[at].encode(), rng).decode()
    return "".join(line + "\n" for line in lines).encode()
