"The readers of answers, results, settings and servers: what is damaged, and what an independent reading of it says."

import asyncio
import csv
import functools
import io
import json
import os
import re
import shutil
import socket
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import numpy as np
import yaml
from campaign.mutators import on_bytes, on_json, on_lines
from campaign.sources import changed, once, plain
from campaign.targets import (
    ALL,
    SAMPLES,
    Target,
    by_units,
    identified,
    json_units,
    store_files,
    strict,
    told,
)

from w2r2.demo import Demo, demo_server
from w2r2.metrics.prediction_files import load_predictions, read_annotations
from w2r2.metrics.scoring import score
from w2r2.model.geometry_cache import GeometryStore, write_geometry
from w2r2.model.hosts import build_host, write_tiny_host
from w2r2.report.headline import headline
from w2r2.report.results import BY_SCENE, COLUMNS, invented, read_results, write_results
from w2r2.scans.files import ScanNetError
from w2r2.study.full_settings import read_full_settings
from w2r2.study.push_trial import TABLES, read_trial
from w2r2.systems.asking import RecordedAnswers, read_recorded
from w2r2.systems.endpoint import Endpoint
from w2r2.tasks.messages import build_records
from w2r2.tasks.samples import read_scanrefer

ROOT = Path(__file__).parents[2]
TREE = [on_json, on_json, on_json, on_bytes]
LINES = [on_lines, on_lines, on_bytes]


# Tables


def on_cells(data: bytes, rng) -> bytes:
    "A cell, a row or a column of a table is another."
    rows = [line.split(",") for line in data.decode().splitlines()]
    at, kind = rng.randrange(len(rows)), rng.randrange(6)
    place = rng.randrange(len(rows[at]))
    if kind == 0:
        words = [
            "",
            "nan",
            "inf",
            "-1",
            "0",
            "1e400",
            "x",
            '"',
            '"a\nb"',
            "1;2",
            "1_0",
            "True",
            "0x1",
            " 1",
            "１",
            "NA",
        ]
        rows[at][place] = rng.choice(words)
    elif kind == 1:
        rows[at][place] = rows[rng.randrange(len(rows))][min(place, len(rows[0]) - 1)]
    elif kind == 2:
        rows[at].insert(place, rng.choice(["", "1"]))
    elif kind == 3:
        del rows[at][place]
    elif kind == 4:
        for row in rows:
            row.insert(min(place, len(row)), "1") if rng.random() < 0.5 else row.append("")
    else:
        rows[at], rows[0] = rows[0], rows[at]
    return "\n".join(map(",".join, rows)).encode() + b"\n"


def table_rows(data: bytes, of_words: tuple[str, ...]) -> dict:
    "Rows of a table of which every column but those holds numbers, or nothing."
    head, *rows = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
    once((name, None) for name in head)
    for row in rows:
        if len(row) != len(head):
            raise ValueError("columns")
        for name, word in zip(head, row):
            if name not in of_words and word:
                plain(word)
    if not data.endswith(b"\n"):
        raise ValueError("cut")
    return {number: sorted(zip(head, row)) for number, row in enumerate(rows)}


WORDS = ("arm", "noise", "split", "task", "metric", "protocol", "proposals", "pass", "regime", "kind", "difference")
WORDS += "interval", "candidates", "where", "against", "set"


def frame_rows(frame) -> dict:
    "Numbers as floats: one empty cell makes floats of a column of integers."

    def cell(value):
        return value if isinstance(value, str) else float(value)

    return {n: repr(sorted(zip(frame, map(cell, row)))) for n, row in enumerate(frame.itertuples(index=False))}


def sample_of(path: Path, rows: int) -> bytes:
    head, *lines = path.read_bytes().splitlines(keepends=True)
    return head + b"".join(lines[:: max(1, len(lines) // rows)][:rows])


# Recorded answers


def recorded_units(data: bytes) -> dict:
    said = strict(data)
    found = {"system": repr(said["system"])}
    count = len(said["scenes"])
    for name in ("scenes", "objects", "texts", "truth"):
        if len(said[name]) != count:
            raise ValueError(name)
    for name, rows in {**said["boxes"], **{key: said[key] for key in ("scenes", "objects", "texts", "truth")}}.items():
        found |= {(name, number): repr(row) for number, row in enumerate(rows)}
    if any(len(rows) != count for rows in said["boxes"].values()):
        raise ValueError("boxes")
    return found | {("refused", name): repr(why) for name, why in said.get("refused", {}).items()}


def recorded(path: Path) -> dict:
    said = read_recorded(path)
    found = {"system": repr(said.system)}
    for name in ("scenes", "objects", "texts", "truth"):
        found |= {(name, number): told(row) for number, row in enumerate(getattr(said, name))}
    for name, rows in said.boxes.items():
        found |= {(name, number): told(row) for number, row in enumerate(rows)}
    return found | {("refused", name): repr(why) for name, why in said.refused.items()}


# A server


def served(reply: bytes, ask, timeout: float = 5):
    "What `ask` makes of an address whose answer to every request is these bytes."
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            while True:
                try:
                    asked, _ = listening.accept()
                except OSError:
                    return
                with asked:
                    asked.settimeout(timeout)
                    try:
                        got = b""
                        while b"\r\n\r\n" not in got:
                            got += asked.recv(2**16)
                        size = int(re.search(rb"content-length: ([0-9]+)", got.lower())[1])
                        while len(got) < got.index(b"\r\n\r\n") + 4 + size:
                            got += asked.recv(2**16)
                        asked.sendall(reply)
                    except OSError:
                        continue

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        try:
            return ask(f"http://127.0.0.1:{listening.getsockname()[1]}")
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


SAID = {"target": "chair", "related": ["table", "door"]}


def endpoint_reply() -> bytes:
    body = json.dumps({"choices": [{"message": {"role": "assistant", "content": json.dumps(SAID)}}]}).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def is_list_of_text(value) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def ask_endpoint(folder: Path) -> dict:
    with TemporaryDirectory() as store:

        def ask(address):
            vlm = Endpoint(f"{address}/{folder.name.replace(' ', '-')}/v1", "m", store, patience=1, tries=1, timeout=5)
            return vlm.parse("the chair", "Name.", {"target": str, "related": list})

        try:
            return {name: repr(value) for name, value in served((folder / "reply").read_bytes(), ask).items()}
        except ValueError as error:
            if folder.name.replace(" ", "-") in str(error):
                raise ScanNetError(folder, "answer", str(error)) from error
            raise


def reply_units(data: bytes) -> dict:
    "What a well-formed reply says; an answer that cannot be read gives empty fields."
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("ascii").split("\r\n")
    fields = once((line.split(":")[0].lower(), line.split(":", 1)[1].strip()) for line in lines)
    size = int(fields.get("content-length", len(body)))  # without it, up to the end of the connection
    if first.split(" ")[:2] != ["HTTP/1.1", "200"] or size > len(body):
        raise ValueError("reply")
    said = strict(body[:size])["choices"][0]["message"]["content"]
    try:
        said = strict(said[said.index("{") : said.rindex("}") + 1].encode())
        if not isinstance(said["target"], str) or not is_list_of_text(said["related"]):
            raise ValueError("fields")
    except Exception:
        said = {"target": "", "related": []}
    return {name: repr(said[name]) for name in SAID}


def reply_touched(name, original, damaged):
    "As `by_units`; a reply with other framing may be read by those who can, if they read what it said."
    try:
        return changed(reply_units(original), reply_units(damaged))
    except Exception:
        return set(SAID) if b"content-encoding" in damaged.lower() else set()


def on_reply(data: bytes, rng) -> bytes:
    "The body, with a head that fits it; or the head."
    head, _, body = data.partition(b"\r\n\r\n")
    kind = rng.randrange(4)
    if kind == 0:
        extra = rng.choice(
            [
                b"content-encoding: gzip",
                b"content-encoding: br, deflate",
                b"transfer-encoding: chunked",
                b"content-length: 99999999999999",
                b"content-length: -1",
                b"location: http://127.0.0.1:1/",
                b"content-type: application/json; charset=utf-7",
                b"content-type: text/html; charset=\xff",
                b"set-cookie: " + b"a" * 70_000,
                b"x" * 200_000,
            ]
        )
        return head + b"\r\n" + extra + b"\r\n\r\n" + body
    if kind == 1:
        status = rng.choice([b"204", b"301", b"400", b"404", b"429", b"500", b"999", b"abc", b"100", b"200 "])
        return data.replace(b"200", status, 1)
    if kind == 2:
        body = on_json(body, rng)
    else:
        tree = json.loads(body)
        content = tree["choices"][0]["message"]["content"].encode()
        tree["choices"][0]["message"]["content"] = rng.choice([on_json, on_bytes])(content, rng).decode("latin-1")
        body = json.dumps(tree).encode()
    return re.sub(rb"content-length: [0-9]+", b"content-length: %d" % len(body), head) + b"\r\n\r\n" + body


def stored_answer(folder: Path) -> dict:
    "A question whose answer is in the store; the file under the name that the question has."
    endpoint = Endpoint("http://127.0.0.1:9/v1", "m", folder, patience=1, tries=1, timeout=0.2)
    said = endpoint.parse("the chair", "Name.", {"target": str, "related": list})
    return {name: repr(value) for name, value in said.items()}


def stored_units(data: bytes) -> dict:
    said = strict(data)["said"]
    if not isinstance(said, str):
        raise ValueError("said")
    try:
        said = strict(said[said.index("{") : said.rindex("}") + 1].encode())
        if not isinstance(said["target"], str) or not is_list_of_text(said["related"]):
            raise ValueError("fields")
    except (ValueError, LookupError, TypeError, AttributeError):
        said = {"target": "", "related": []}
    return {name: repr(said[name]) for name in SAID}


# The demo page


@functools.cache
def demo_address(process: int) -> str:
    "Of a demo in a thread of this process."
    ready, found = threading.Event(), []

    def run():
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)

        async def start():
            found.append(demo_server(Demo(kept=1), 0))
            ready.set()

        loop.create_task(start())
        loop.run_forever()

    threading.Thread(target=run, daemon=True).start()
    assert ready.wait(60)
    return found[0][1]


def ask_demo(folder: Path) -> dict:
    body = (folder / "asked.json").read_bytes()
    reply = httpx.post(
        demo_address(os.getpid()) + "ask", content=body, headers={"Content-Type": "application/json"}, timeout=60
    )
    said = reply.json()
    if reply.status_code == 400 and set(said) == {"error"} and "\n" not in said["error"]:
        raise ScanNetError(folder, "page", said["error"])
    assert reply.status_code == 200, reply.status_code
    return {name: repr(value) for name, value in said.items() if name != "page"}


def asked_touched(name, original, damaged):
    try:
        asked = strict(damaged)
        asked, before = (
            tuple(" ".join(said[key].split()) for key in ("scene", "text")) for said in (asked, strict(original))
        )
    except Exception:
        return None
    return ALL if asked != before else set()


# Settings


def settings_units(data: bytes) -> dict:
    "Dials by section; a dial that is there twice has no valid reading."

    def check(node):
        if isinstance(node, yaml.MappingNode):
            once((key.value, None) for key, _ in node.value)
            [check(value) for _, value in node.value]
        if isinstance(node, yaml.SequenceNode):
            [check(value) for value in node.value]

    check(yaml.compose(data.decode("utf-8-sig"), yaml.SafeLoader))
    return flat(yaml.safe_load(data))


def flat(tree: dict) -> dict:
    return {f"{section}.{dial}": repr(value) for section, dials in tree.items() for dial, value in dials.items()}


# Predictions and what they are scored by


def prediction_files(folder: Path) -> dict[str, tuple]:
    "Content, and benchmark and protocol."
    box = [0.5, 1, 0.25, 1, 1, 0.5]
    key = [{"scene_id": f"scene000{n}_00", "object_id": n, "ann_id": 0} for n in range(6)]
    truth = [row | {"bbox": box, "unique_multiple": 0, "others": 0} for row in key]
    corners = [[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)]
    detected = {
        f"scene000{n}_00": [{"caption": "a chair", "box": corners, "sem_prob": [0.5, 0.5], "obj_prob": [0, 1]}]
        for n in range(3)
    }
    leo = [{"scene_id": f"scene000{n}_00", "response_gt": ["a", "b"], "response_pred": "a"} for n in range(4)]
    asked = [{"question_id": str(n), "pred_response": "two", "scene_id": "a"} for n in range(4)]
    return {
        "boxes of six numbers": ([row | {"bbox": box} for row in key], truth, "scanrefer", "scanrefer"),
        "boxes of nine numbers": ([row | {"bbox": [*box, 0, 0, 0]} for row in key], truth, "scanrefer", "scanrefer"),
        "boxes of corners": ([row | {"bbox": corners} for row in key], truth, "scanrefer", "scanrefer"),
        "answers with truth": (leo, None, "scanqa", "leo"),
        "plain answers": (asked, None, "scanqa", "video3dllm"),
        "detected captions": (detected, None, "scan2cap", "scan2cap_benchmark"),
    }


def overlap(box: list[float], other: list[float]) -> float:
    "IoU of two boxes: centre, then size."
    both = volume = 1.0
    for axis in range(3):
        low = max(b[axis] - b[axis + 3] / 2 for b in (box, other))
        both *= max(0.0, min(b[axis] + b[axis + 3] / 2 for b in (box, other)) - low)
        volume *= box[axis + 3]
    return both / (volume + np.prod(other[3:]) - both)


def score_units(data: bytes, truth: list[dict]) -> dict:
    """Every figure, worked out by hand: which overlaps are below, at or above its threshold. A description that is not
    answered has none."""
    names = "scene_id", "object_id", "ann_id"
    boxes = once((tuple(str(row[name]) for name in names), row["bbox"]) for row in strict(data))
    overlaps = {}
    for row in truth:
        box = boxes.pop(tuple(str(row[name]) for name in names), None)
        overlaps[row["object_id"]] = (0.0 if box is None else overlap(box, row["bbox"]), row["unique_multiple"])
    found = {}
    for group, of in (("", (0, 1)), (" unique", (0,)), (" multiple", (1,))):
        for least in (0.25, 0.5):
            right = repr([float(np.sign(round(value - least, 9))) for value, kind in overlaps.values() if kind in of])
            name = f"Acc@{least}{group}"
            found |= {name: right, f"{name}{',' * bool(group)} not others": right}
            if not group:  # an answer to no description is a wrong one among all, and in no subset
                found[name] += repr(len(boxes))
    return found


def make_answered(folder: Path) -> list[Target]:
    "Targets with their originals below the folder."
    targets = []

    def one(name, content: bytes, file, read, touched, mutators, **more):
        place = folder / name.replace("/", " ")
        place.mkdir()
        (place / file).write_bytes(content)
        targets.append(Target(name, place, [file], lambda at: read(at / file), touched, mutators, **more))

    rows = functools.partial(table_rows, of_words=WORDS)
    units = by_units(lambda data: {number: repr(row) for number, row in rows(data).items()})
    cells = [on_cells, on_cells, on_lines, on_bytes]
    results = sample_of(ROOT / "reports/results.csv", 60)
    one("results", results, "results.csv", lambda path: frame_rows(read_results(path)[COLUMNS]), units, cells)

    trial = folder / "trial tables"
    for name in TABLES:
        path = trial / "push" / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample_of(ROOT / f"reports/trial/push/{name}.csv", 40))

    def trial_rows(at):
        return {
            (name, n): row for name, table in read_trial(at, ("push",)).items() for n, row in frame_rows(table).items()
        }

    def trial_touched(name, original, damaged):
        found = units(name, original, damaged)
        return None if found is None else {(Path(name).stem, number) for number in found}

    targets.append(Target("trial tables", trial, store_files(trial), trial_rows, trial_touched, cells))

    reports = folder / "headline"
    for name in ("results.csv", "tables/differences.csv"):
        (reports / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "reports" / name, reports / name)
    for part in ("report", "push"):
        shutil.copytree(ROOT / "reports/trial" / part, reports / "trial" / part)
    files = [name for name in store_files(reports) if name != "results.csv"]

    def headlines(at):
        return {n: told(frame.to_numpy().tolist()) for n, frame in enumerate(headline(at))}

    targets.append(Target("headline", reports, files, headlines, lambda *_: ALL, cells, 0.003, False))

    scenes = folder / "results by scene"
    scenes.mkdir()
    write_results(invented(scenes=3).iloc[::20], scenes / "results.csv")

    def by_scene(at):
        parts = read_results(at / "results.csv")[BY_SCENE]
        return {
            row: None if part is None else told([part.scenes.tolist(), part.sum.tolist(), part.count.tolist()])
            for row, part in enumerate(parts)
        }

    targets.append(Target("results by scene", scenes, store_files(scenes), by_scene, mutators=[on_bytes]))

    rng = np.random.default_rng(0)
    boxes = rng.uniform(0.5, 2, (4, 6))
    names = [f"scene000{n}_00" for n in range(4)]
    answers = RecordedAnswers(
        "a", names, list("0123"), ["the chair"] * 4, boxes, {"2d+3d": boxes + 1, "2d": boxes.copy()}
    )
    answers.boxes["2d"][1], answers.refused = np.nan, {"2d": "no"}
    path = answers.write(folder / "recorded.json")
    one("recorded answers", path.read_bytes(), "0.json", recorded, by_units(recorded_units), TREE)

    one(
        "answers of a server",
        endpoint_reply(),
        "reply",
        lambda path: ask_endpoint(path.parent),
        reply_touched,
        [on_reply, on_reply, on_reply, on_bytes],
        share=0.1,
    )

    place = folder / "stored answers of a server"
    place.mkdir()
    vlm = Endpoint("http://127.0.0.1:9/v1", "m", place, tries=1)
    vlm._send = lambda messages: json.dumps(SAID)
    vlm.parse("the chair", "Name.", {"target": str, "related": list})
    (stored,) = place.glob("*.json")
    targets.append(Target(place.name, place, [stored.name], stored_answer, by_units(stored_units), TREE))

    asked = json.dumps({"scene": "0/scene9000_00", "text": "the black couch next to the door"}).encode()
    one(
        "question to the page", asked, "asked.json", lambda path: ask_demo(path.parent), asked_touched, TREE, share=0.01
    )

    settings = (ROOT / "params.scannet.yaml").read_bytes()
    one(
        "settings of the full size",
        settings,
        "params.scannet.yaml",
        lambda path: flat(read_full_settings(path)),
        by_units(settings_units),
        LINES,
        share=0.3,
    )

    for name, (content, truth, benchmark, protocol) in prediction_files(folder).items():
        pick = identified if isinstance(content, list) else lambda tree: tree

        def predictions(path, benchmark=benchmark, protocol=protocol, pick=pick):
            loaded = load_predictions(path, benchmark, protocol)
            read = {key: [told(value)] for key, value in pick(loaded.predictions).items()}
            for key, value in identified(loaded.annotations or []).items():
                read[key].append(told(value))
            return read

        one(f"predictions: {name}", json.dumps(content).encode(), "0.json", predictions, json_units(pick), TREE)

    content, truth, benchmark, protocol = prediction_files(folder)["boxes of six numbers"]
    lines = "".join(json.dumps(row) + "\n" for row in content).encode()
    line_units = by_units(
        lambda data: {
            ("record", n): repr(strict(line))
            for n, line in enumerate(line for line in data.split(b"\n") if line.strip())
        }
    )

    def of_lines(path):
        return {key: told(value) for key, value in identified(load_predictions(path, benchmark, protocol)[0]).items()}

    one("predictions: JSON lines", lines, "0.jsonl", of_lines, line_units, LINES)

    def annotations(path):
        return {
            key: told(value)
            for key, value in identified(read_annotations(path, "scan2cap", "scan2cap_benchmark")[0]).items()
        }

    one(
        "annotations of a benchmark",
        json.dumps(
            [
                row
                | {
                    "description": "a chair",
                    "object_name": "chair",
                    "token": ["a", "chair"],
                    "ann_id": str(row["ann_id"]),
                    "object_id": str(row["object_id"]),
                }
                for row in truth
            ]
        ).encode(),
        "0.json",
        annotations,
        json_units(identified),
        TREE,
    )

    truth = [row | {"unique_multiple": number % 2} for number, row in enumerate(truth)]
    marks = {"description": "a chair", "object_name": "chair", "token": ["a"], "ann_id": "0"}
    key = json.dumps([row | marks | {"object_id": str(row["object_id"])} for row in truth])
    content = [row | {"bbox": [0.5 + n / 10, *row["bbox"][1:]]} for n, row in enumerate(content)]  # at several overlaps

    def figures(path):
        path.with_name("truth.json").write_text(key)
        told_by = score([path], benchmark, protocol, path.with_name("truth.json"), resamples=50)
        return {row.name: told((row.value, row.n, row.note)) for row in told_by.rows}

    scored = by_units(functools.partial(score_units, truth=truth))
    one("score", json.dumps(content).encode(), "0.json", figures, scored, TREE, share=0.2)

    place = folder / "geometry cache"
    write_tiny_host(folder / "host", "qwen2_5_vl")
    described = read_scanrefer(SAMPLES / "scanrefer/ScanRefer_filtered_samples.json", ["scene9000_00"])[0]
    records = build_records("scanrefer", described[:1], SAMPLES, frames=2)[0]
    model, _ = build_host(folder / "host", folder / "host/vggt", views=2, frame_width=112, merger_hidden=24)
    write_geometry(model, records, SAMPLES, place)

    def kept(at):
        store = GeometryStore.open(at, model)
        return {key: told(store[record].float()) for key, record in identified(records).items()}

    def swapped(data, rng):
        "Another file of the cache."
        return rng.choice([path.read_bytes() for path in sorted((folder / "geometry cache").iterdir())])

    targets.append(Target("geometry cache", place, store_files(place), kept, mutators=[on_bytes, swapped], share=0.3))
    return targets
