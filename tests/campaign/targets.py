"""What is damaged and read: for each reader an original, how to damage it, what was read as fields to be compared, and,
found without the reader, the fields that the damage has touched."""

import hashlib
import io
import json
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import training
from campaign.mutators import on_bytes, on_json, on_lines, on_numbers
from safetensors.torch import load_file

from w2r2.metrics.prediction_files import load_predictions
from w2r2.model.checkpoint import companions, load, read_bins, read_config, read_tokenizer, save
from w2r2.model.features import Features, Queries
from w2r2.scans.annotations import LabelImages, LabelTable, read_aggregation, read_scene_info, read_segments, read_split
from w2r2.scans.frames import FrameFolder, export_frames
from w2r2.scans.ply import read_ply
from w2r2.scans.prepared import Prepared
from w2r2.scans.sens import Sens, write_sens
from w2r2.scans.stores import check_store
from w2r2.study.jobs import Job, execute
from w2r2.study.truth import propose_all, read_proposed
from w2r2.study.watch import gather_candidates
from w2r2.tasks.candidates import Candidates
from w2r2.tasks.proposals import read_proposals
from w2r2.tasks.samples import SCANQA, SCANREFER, read_records

SCENE, SAMPLES = "scene9000_00", training.SAMPLES
ALL = "everything"


def told(value) -> str:
    "A value that was read, in few characters; equal if and only if the values are."
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape}{hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}"
    return repr(value)


@dataclass
class Target:
    "One reader."

    name: str
    folder: Path  # holds the original, and is damaged
    files: list[str]  # those that are damaged
    read: Callable[[Path], dict]  # of the folder -> what was read
    # file, original, damaged bytes -> names of fields that may differ, or ALL; None: there is no valid way to read it
    touched: Callable[[str, bytes, bytes], set | str | None] = lambda *_: set()
    mutators: list[Callable] = field(default_factory=lambda: [on_bytes])
    share: float = 1.0  # of inputs, for a reader that takes long
    proved: bool = True  # False: `touched` says ALL of any damage, so that what is harmless is not proved


# Independent readings: as simple as can be


def strict(data: bytes):
    "JSON by Python's parser, with an error for a key that is there twice."

    def once(pairs):
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("twice")
        return dict(pairs)

    def no(text):
        raise ValueError(text)

    return json.loads(data.decode("utf-8-sig"), object_pairs_hook=once, parse_constant=no)


def by_units(units: Callable) -> Callable:
    "Fields whose independent reading differs between the original and the damaged file."

    def touched(name, original, damaged):
        try:
            after = units(damaged)
        except Exception:  # whatever Python says to it
            return None
        before = units(original)
        return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}

    return touched


def json_units(pick: Callable) -> Callable:
    return by_units(lambda data: {name: repr(value) for name, value in pick(strict(data)).items()})


def numbered(values) -> dict:
    return dict(enumerate(values))


def identified(records) -> dict:
    return {("record", number): record for number, record in enumerate(records)}


def text_units(data: bytes) -> dict:
    pairs = [line.partition(" = ") for line in data.decode().replace("\r\n", "\n").split("\n") if line.strip()]
    if len({key.strip() for key, _, _ in pairs}) < len(pairs):
        raise ValueError("twice")
    return {key.strip(): value.strip() for key, _, value in pairs}


def table_units(data: bytes) -> dict:
    head, *rows = [line.split("\t") for line in data.decode().replace("\r\n", "\n").rstrip("\n").split("\n")]
    places = [head.index(name) for name in ("raw_category", "id", "nyu40id", "nyu40class")]
    return {row[places[0]]: [row[place] for place in places] for row in reversed(rows)}


def by_place(fields: Callable) -> Callable:
    """Fields (start, end, name) of a binary file that the damage overlaps: the bytes that differ, and where the length
    differs all that follow the first of them."""

    def touched(name, original, damaged):
        a, b = np.frombuffer(original, np.uint8), np.frombuffer(damaged, np.uint8)
        same = a[: len(b)] == b[: len(a)]
        differing = np.flatnonzero(~same)
        if len(a) != len(b):
            first = differing[0] if len(differing) else min(len(a), len(b))
            return {field for start, end, field in fields(original) if end > first}
        return {f for start, end, f in fields(original) if ((differing >= start) & (differing < end)).any()}

    return touched


# The binary formats, by their published layout


def sens_places(data: bytes) -> list[tuple[int, int, str]]:
    (name,) = struct.unpack_from("<Q", data, 4)
    at = 12 + name
    places = [(12, at, "name")]
    for part in ("intrinsic_color", "extrinsic_color", "intrinsic_depth", "extrinsic_depth"):
        places.append((at, at + 64, part))
        at += 64
    at += 24
    places.append((at, at + 4, "depth_shift"))
    (count,) = struct.unpack_from("<Q", data, at + 4)
    at += 12
    for number in range(count):
        color, depth = struct.unpack_from("<QQ", data, at + 80)
        places += [(at, at + 64, f"pose {number}"), (at + 64, at + 80, f"time {number}")]
        at += 96
        places += [(at, at + color, f"color {number}"), (at + color, at + color + depth, f"depth {number}")]
        at += color + depth
    return places


def sens_numbers(data: bytes, rng) -> bytes:
    structure, at = [(0, 4), (4, 8)], 12 + struct.unpack_from("<Q", data, 4)[0] + 256
    structure += [(at + 4 * number, 4) for number in range(7)] + [(at + 28, 8)]
    structure += [(start + 16, 8) for start, _, name in sens_places(data) if name.startswith("time")]
    structure += [(start + 24, 8) for start, _, name in sens_places(data) if name.startswith("time")]
    return on_numbers(data, rng, structure)


def read_frames(frames) -> dict:
    with frames:
        header = frames.header
        read = {name: told(getattr(header, name)) for name in ("intrinsic_color", "intrinsic_depth", "depth_shift")}
        read |= {name: told(getattr(header, name)) for name in ("extrinsic_color", "extrinsic_depth")}
        read |= {"name": told(header.sensor_name), "sizes": told((header.color_size, header.depth_size))}
        for frame in frames:
            for part, value in (("pose", frame.pose), ("time", frame.timestamps)):
                read[f"{part} {frame.index}"] = told(value)
            read[f"color {frame.index}"], read[f"depth {frame.index}"] = told(frame.color), told(frame.depth)
        return read


def ply_places(data: bytes) -> list[tuple[int, int, str]]:
    head = data.index(b"end_header\n") + 11
    counts = [int(line.split()[2]) for line in data[:head].decode().split("\n") if line.startswith("element")]
    places = []
    for number in range(counts[0]):
        at = head + 16 * number
        places += [(at, at + 12, f"position {number}"), (at + 12, at + 15, f"color {number}")]
    at = head + 16 * counts[0]
    return places + [(at + 13 * number + 1, at + 13 * number + 13, f"face {number}") for number in range(counts[1])]


def ply_touched(name, original, damaged):
    "As `by_place`; another order of the properties says other colours or positions, of all vertices."
    found = by_place(ply_places)(name, original, damaged)
    before, after = (
        [line.split()[-1] for line in data.partition(b"end_header")[0].split(b"\n") if line.startswith(b"property")]
        for data in (original, damaged)
    )
    groups = dict.fromkeys([b"x", b"y", b"z"], "position") | dict.fromkeys([b"red", b"green", b"blue"], "color")
    moved = {groups.get(a) for pair in zip(before, after) if pair[0] != pair[1] for a in pair}
    return found | {place for _, _, place in ply_places(original) if place.split()[0] in moved}


def read_mesh(folder: Path) -> dict:
    mesh = read_ply(folder / "0.ply")
    parts = {"position": mesh.vertices, "color": mesh.colors, "face": mesh.faces}
    return {f"{name} {n}": row.tobytes() for name, rows in parts.items() for n, row in enumerate(rows)}


def ply_header(data: bytes, rng) -> bytes:
    head = data.index(b"end_header\n") + 11
    return on_lines(data[:head], rng) + data[head:]


def zip_places(data: bytes) -> list[tuple[int, int, str]]:
    "The contents of the members, which are not compressed, and every place where a member's name stands."
    places = []
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist():
            start = info.header_offset + 30 + len(info.filename)
            name = Path(info.filename).stem
            places += [(start, start + info.file_size, name), (info.header_offset, start, name)]
    return places


def zip_again(data: bytes, rng) -> bytes:
    "The same archive with other names, contents, methods or claims."
    stream, kind = io.BytesIO(), rng.randrange(6)
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w") as new:
        names = old.namelist()
        victim = rng.choice(names)
        for name in names:
            content, told_name = old.read(name), name
            if name == victim:
                if kind == 0:
                    content = on_bytes(content, rng)
                elif kind == 1:
                    told_name = rng.choice([rng.choice(names), "../" + name, "/" + name, "a/" + name, name.upper()])
                elif kind == 2:
                    continue
                elif kind == 3:
                    content = rng.choice([b"", bytes(rng.choice([10, 2**20, 2**26])), old.read(rng.choice(names))])
            method = rng.choice([0, 8, 12, 14]) if kind == 4 else 8 if kind == 3 else 0
            new.writestr(told_name, content, method)
    blob = stream.getvalue()
    if kind == 5:  # a claim about a size, in the table of contents or before the member
        marks = [at for sign in (b"PK\1\2", b"PK\3\4") for at in _finds(blob, sign)]
        offset = {b"\1": 20, b"\3": 18}
        places = [(at + offset[blob[at + 2 : at + 3]] + shift, 4) for at in marks for shift in (-4, 0, 4)]
        return on_numbers(blob, rng, places)
    return blob


def _finds(data: bytes, sign: bytes) -> list[int]:
    return [at for at in range(len(data)) if data.startswith(sign, at)]


def zip_touched(name, original, damaged):
    "Members whose content, by Python's own reader, is another; bytes of a damaged archive by their places."
    try:
        with zipfile.ZipFile(io.BytesIO(original)) as a, zipfile.ZipFile(io.BytesIO(damaged)) as b:
            if len(set(b.namelist())) < len(b.namelist()):
                return None
            before, after = ({Path(n).stem: z.read(n) for n in z.namelist()} for z in (a, b))
            return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    except Exception:  # an archive that Python does not read: what is read of it has to be as it was
        return by_place(zip_places)(name, original, damaged)


def npz_again(data: bytes, rng) -> bytes:
    "Arrays of other shapes and types."
    with np.load(io.BytesIO(data)) as file:
        arrays = dict(file)
    name = rng.choice(list(arrays))
    array = arrays[name]
    change = rng.choice(
        [
            lambda a: a[:-1],
            lambda a: a[None],
            lambda a: a.ravel(),
            lambda a: np.repeat(a, rng.choice([2, 50, 20_000]), axis=0),
            lambda a: a.astype(rng.choice(["f4", "i8", "u1", "c16", "S8", "U4", "f2", ">f8", "M8[s]", "V8"])),
            lambda a: np.asfortranarray(a),
            lambda a: -a,
            lambda a: a * np.nan,
            lambda a: a.T,
            lambda a: np.array([{}]),
            lambda a: np.zeros(rng.choice([(), (0,), (0, 6), (6, 20), (2, 3, 6)])),
        ]
    )
    try:
        arrays[name] = change(array)
    except (TypeError, ValueError):
        arrays.pop(name)
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays) if rng.random() < 0.3 else np.savez(stream, **arrays)
    return stream.getvalue()


def npz_touched(name, original, damaged):
    try:
        with np.load(io.BytesIO(original)) as a, np.load(io.BytesIO(damaged)) as b:
            before, after = (
                {n: told(z[n].astype(float) if z[n].dtype.kind in "fiu" else z[n]) for n in z} for z in (a, b)
            )
    except Exception:  # as above
        return set()
    names = {"ins_boxes": "boxes", "ins_labels": "labels", "ins_scores": "scores"}
    return {names.get(key, key) for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


def same_name(name: str) -> str:
    "The name of a tensor without the parts that are called otherwise in files."
    return ".".join(part for part in name.split(".") if part not in ("model", "language_model"))


def tensor_units(data: bytes) -> dict:
    "Type, shape and bytes of every tensor, by the published layout."
    (size,) = struct.unpack_from("<Q", data)
    head, body = strict(data[8 : 8 + size]), data[8 + size :]
    head.pop("__metadata__", None)
    places = {name: slice(*entry["data_offsets"]) for name, entry in head.items()}
    return {same_name(n): (e["dtype"], e["shape"], hash(body[places[n]])) for n, e in head.items()}


def safetensors_header(data: bytes, rng) -> bytes:
    (size,) = struct.unpack_from("<Q", data)
    if rng.random() < 0.2:
        return on_numbers(data, rng, [(0, 8)])
    head = (on_json if rng.random() < 0.7 else on_bytes)(data[8 : 8 + size], rng)
    return struct.pack("<Q", len(head)) + head + data[8 + size :]


def read_model(folder: Path) -> dict:
    model, tokenizer, packer = load(folder)
    tensors = {same_name(name): told(value) for name, value in model.state_dict().items()}
    tensors.pop("vlm.lm_head.weight")  # tied to the embeddings
    return tensors | {"bins": told(packer.bins)}


def read_parts(folder: Path) -> dict:
    "What the small files of a model say, if they belong together."
    companions(folder)
    config = read_config(folder).to_dict()
    backend = json.loads(read_tokenizer(folder).backend_tokenizer.to_str())
    read = {f"config.json {key}": told(value) for key, value in config.items()}
    read |= {f"bins.json {key}": told(value) for key, value in vars(read_bins(folder)).items()}
    return read | {f"tokenizer.json {key}": told(value) for key, value in backend.items()}


def model_touched(name, original, damaged):
    units = json_units(lambda tree: {f"{name} {key}": value for key, value in tree.items()})
    found = units(name, original, damaged)
    if found and name == "tokenizer_config.json":  # its keys are options of the tokenizer
        return {f"tokenizer.json {key}" for key in ("added_tokens", "post_processor", "padding", "truncation")}
    return found


def store_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def records(folder: Path) -> dict[str, tuple[list | dict, tuple]]:
    "Prediction files of the benchmarks."
    box = [0.5, 1, 0.25, 1, 1, 0.5]
    key = [{"scene_id": f"scene000{n}_00", "object_id": str(n), "ann_id": "0"} for n in range(6)]
    with_truth = [{"pred_response": box, "gt_response": box, "question_type": "unique", "scene_id": "a"}] * 3
    return {
        "grounding": ([k | {"bbox": box, "unique_multiple": 0, "others": 0} for k in key], ("scanrefer", "scanrefer")),
        "grounding with truth": (with_truth, ("scanrefer", "scanrefer")),
        "captions": (
            {f"scene000{n}_00|{n}|chair": {"caption": "a chair", "iou": 0.7} for n in range(6)},
            ("scan2cap", "scan2cap"),
        ),
        "answers": ([{"question_id": str(n), "answer_top10": ["a", "b"]} for n in range(6)], ("scanqa", "scanqa")),
    }


def make(folder: Path) -> list[Target]:
    "All targets, with their originals below the folder."
    targets, scan = [], SAMPLES / "scans" / SCENE

    def one(name, source, file, read, touched, mutators, **more):
        place = folder / name
        place.mkdir()
        if isinstance(source, Path):
            shutil.copy(source, place / file)
        else:
            (place / file).write_bytes(source)
        targets.append(Target(name, place, [file], lambda at: read(at / file), touched, mutators, **more))

    text, tree = [on_lines, on_lines, on_bytes], [on_json, on_json, on_json, on_bytes]
    one(
        "scene text",
        scan / f"{SCENE}.txt",
        "0.txt",
        lambda p: {k: told(v) for k, v in read_scene_info(p).items()},
        by_units(text_units),
        text,
    )
    one(
        "aggregation",
        scan / f"{SCENE}.aggregation.json",
        "0.json",
        lambda p: numbered(map(told, read_aggregation(p))),
        json_units(lambda tree: numbered(tree["segGroups"])),
        tree,
    )
    one(
        "segments",
        scan / f"{SCENE}_vh_clean_2.0.010000.segs.json",
        "0.json",
        lambda p: numbered(map(told, read_segments(p).tolist())),
        json_units(lambda tree: numbered(tree["segIndices"])),
        tree,
    )

    def labels(path):
        table = LabelTable.read(path)
        return {key: told([table.id[key], table.nyu40id[key], table.nyu40class[key]]) for key in table.id}

    one("label table", SAMPLES / "scannetv2-labels.combined.tsv", "0.tsv", labels, by_units(table_units), text)
    split = SAMPLES / "splits/scannetv2_samples.txt"
    one(
        "split",
        split,
        "0.txt",
        lambda p: numbered(read_split(p)),
        by_units(lambda data: numbered(data.decode().split())),
        text,
    )

    place = folder / "recording"
    place.mkdir()
    with Sens(scan / f"{SCENE}.sens") as sens:
        size = sens.header.color_size
        write_sens(place / "0.sens", sens.header, [sens[number] for number in range(3)])
        export_frames([sens[number] for number in range(3)], folder / "exported frames")
    sens_mutators = [on_bytes, sens_numbers]
    targets.append(
        Target(
            "recording",
            place,
            ["0.sens"],
            lambda at: read_frames(Sens(at / "0.sens")),
            by_place(sens_places),
            sens_mutators,
        )
    )

    def of_file(name, original, damaged):
        part, stem = name.split("/")[0], Path(name).stem
        return {f"{part} {stem}"} if part != "intrinsic" else {stem}

    files = store_files(folder / "exported frames")
    targets.append(
        Target("exported frames", folder / "exported frames", files, lambda at: read_frames(FrameFolder(at)), of_file)
    )
    one(
        "mesh",
        scan / f"{SCENE}_vh_clean_2.ply",
        "0.ply",
        lambda p: read_mesh(p.parent),
        ply_touched,
        [on_bytes, ply_header],
    )
    one(
        "instance images",
        scan / f"{SCENE}_2d-instance-filt.zip",
        "0.zip",
        lambda p: {str(n): told(image) for n, image in LabelImages(p, size).items()},
        zip_touched,
        [on_bytes, zip_again],
    )
    one(
        "ScanRefer",
        SAMPLES / "scanrefer/ScanRefer_filtered_samples.json",
        "0.json",
        lambda p: identified(map(told, read_records(p, SCANREFER))),
        json_units(identified),
        tree,
    )
    one(
        "ScanQA",
        SAMPLES / "scanqa/ScanQA_v1.0_samples.json",
        "0.json",
        lambda p: identified(map(told, read_records(p, SCANQA))),
        json_units(identified),
        tree,
    )
    boxes = [{"target": "chair", "bbox_3d": [n, 1, 0.4, 0.5, 0.5, 0.8], "score": 0.5} for n in range(6)]

    def proposals(path):
        found = read_proposals(path)
        if path.suffix == ".json":
            return numbered(map(told, zip(found.boxes.tolist(), found.labels, found.scores.tolist())))
        return {"boxes": told(found.boxes), "labels": told(found.labels), "scores": told(found.scores)}

    one("proposals, JSON", json.dumps(boxes).encode(), "0.json", proposals, json_units(numbered), tree)
    stream = io.BytesIO()
    np.savez(stream, ins_boxes=[b["bbox_3d"] for b in boxes], ins_labels=["chair"] * 6, ins_scores=np.ones(6))
    one("proposals, npz", stream.getvalue(), "0.npz", proposals, npz_touched, [on_bytes, npz_again, npz_again])
    for name, (content, how) in records(folder).items():
        units = identified if isinstance(content, list) else lambda tree: tree

        def predictions(path, how=how, units=units):
            loaded = load_predictions(path, *how)
            both = {"predictions": loaded.predictions, "annotations": loaded.annotations or []}
            read = {key: [told(value)] for key, value in units(both["predictions"]).items()}
            for key, value in identified(both["annotations"]).items():
                read[key].append(told(value))
            return read

        one(f"predictions: {name}", json.dumps(content).encode(), "0.json", predictions, json_units(units), tree)

    told_result = [{"metric": "Acc", "value": 0.5, "n": 3}] * 3
    (folder / "counted.py").write_text(f"def work(settings, folder, tell):\n    return {told_result}\n")
    sys.path.insert(0, str(folder))
    job = Job("result of a job", "counted:work", {"a": 1}, folder / "result of a job")
    execute([job], workers=0)
    sys.path.remove(str(folder))

    targets.append(
        Target(job.name, job.folder, ["result.json"], lambda at: {"result": told(job.result)}, mutators=tree)
    )

    made = folder / "made"
    made.mkdir()
    training.prepare(made)
    views = Prepared.open(made / "views")
    gather_candidates("true", SAMPLES, views, made / "candidates_true.npz")
    propose_all(views, made / "proposals" / "samples.json")

    def store(name, files, read, share=0.5):
        place = Path(shutil.copytree(made, folder / name))
        depth = files[0].count("/")
        found = [file for file in store_files(place) if file.count("/") == depth]
        files = [file for file in found if any(Path(file).match(pattern) for pattern in files)]
        targets.append(Target(name, place, files, read, lambda *_: set(), [on_bytes, others(place, files)], share))

    def others(place, files):
        originals = [(place / file).read_bytes() for file in files]

        def swap(data, rng):
            "Another file of the store, or the same with other numbers."
            if rng.random() < 0.5 or not data.startswith(b"\x93NUMPY"):
                return rng.choice(originals)
            array, stream = np.load(io.BytesIO(data)), io.BytesIO()
            np.save(
                stream, rng.choice([array[:-1], array + 1, array[::-1], array.astype("f4"), np.asfortranarray(array)])
            )
            return stream.getvalue()

        return swap

    def arrays(opened):
        return {name: told(value) for name, value in vars(opened).items() if isinstance(value, np.ndarray | list)}

    store("prepared views", ["views/*"], lambda at: arrays(Prepared.open(at / "views")))
    names = ["f2d.npy", "geometry_0.npy", "visual_index.npy", "poses.npy", "scenes.json", "manifest.json"]
    store("features", [f"features/{name}" for name in names], lambda at: arrays(Features.open(at / "features")))
    store(
        "queries",
        ["features/queries.*"],
        lambda at: (
            arrays(queries := Queries.open(at / "features"))
            | arrays(queries.prompts)
            | {"answers": told(queries.answers.values)}
        ),
    )
    store("candidates", ["candidates_true.*"], lambda at: arrays(Candidates.open(at / "candidates_true.npz")))

    def proposed(at):
        return {
            scene: told(found) for scene, found in read_proposed(at / "proposals/samples.json", views_of(at)).items()
        }

    def views_of(at):
        return Features.open(at / "features").made_from

    store("proposals of a split", ["proposals/*"], proposed)

    place = folder / "checkpoint"
    place.mkdir()
    settings = {"max_steps": 1, "per_device_train_batch_size": 1, "save_steps": 1, "logging_steps": 1}
    trainer = training.train(made, "run", settings)
    shutil.copytree(made / "run" / "checkpoint-1", place, dirs_exist_ok=True)

    def checkpoint(at):
        return {name: "" for name in check_store(at, "Train again")["files"]}

    targets.append(Target("checkpoint", place, store_files(place), checkpoint, share=0.2))

    place = folder / "model"
    packer = trainer.data_collator.packer
    save(trainer.model, training.PreTrainedTokenizerFast.from_pretrained(made), packer.bins, place)
    small = [name for name in ("config.json", "bins.json", "tokenizer.json", "tokenizer_config.json")]
    shutil.copytree(place, folder / "model files")
    targets.append(Target("model files", folder / "model files", small, read_parts, model_touched, tree, 0.3))

    weights = [on_bytes, safetensors_header, safetensors_header]
    targets.append(
        Target("model weights", place, ["model.safetensors"], read_model, by_units(tensor_units), weights, 0.03)
    )
    assert load_file(place / "model.safetensors")
    return targets
