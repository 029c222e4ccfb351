"Damage to tables, recorded answers, settings and the replies of servers that once went unnoticed or was a traceback."

import io
import json
import os
import shutil
from pathlib import Path

import httpx
import numpy as np
import pytest
from campaign import answered

from w2r2.report.headline import headline
from w2r2.report.results import BY_SCENE, invented, read_results, write_results
from w2r2.report.verdict_statements import judge_recomputed
from w2r2.scans.files import ScanNetError
from w2r2.scans.stores import MANIFEST, seal, write_store
from w2r2.study.full_settings import read_full_settings
from w2r2.study.push_trial import read_trial
from w2r2.systems.asking import RecordedAnswers, read_recorded
from w2r2.systems.endpoint import Endpoint, EndpointError

ROOT = Path(__file__).parents[1]
RESULTS = answered.sample_of(ROOT / "reports/results.csv", 20).decode()


def cell(row, column, new):
    "One cell of a table is another."

    def edit(table):
        rows = [line.split(",") for line in table.splitlines()]
        rows[row][rows[0].index(column)] = new
        return "\n".join(map(",".join, rows)) + "\n"

    return edit


TABLE_DAMAGE = [
    (cell(2, "value", "0.5,1"), "row 2: has 15 cells"),
    (lambda table: table.replace("\n", ",1\n").replace("value,1", "value"), "row 1: has 15 cells"),
    (lambda table: table.rsplit(",", 2)[0] + "\n", "cells"),
    (lambda table: table[:-4], "ends within a row"),
    (cell(3, "seed", "x"), "row 3, seed: 'x' is no finite number"),
    (cell(3, "n", "1_0"), "row 3, n: '1_0' is no finite number"),
    (cell(0, "n", "value"), "'value' is there twice"),
    (lambda table: "\ufffe" + table, "lacks arm"),
    (lambda table: table.replace("scanrefer", "\x00", 1), "zero bytes"),
]


@pytest.mark.parametrize("damage, said", TABLE_DAMAGE, ids=range(len(TABLE_DAMAGE)))
def test_a_damaged_table_is_refused_by_row_and_column(tmp_path, damage, said):
    path = tmp_path / "results.csv"
    path.write_text(RESULTS)
    assert len(read_results(path)) == 20
    path.write_text(damage(RESULTS))
    with pytest.raises(ScanNetError, match=said):
        read_results(path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "results.csv").write_bytes(RESULTS.encode().replace(b"plain", b"pl\xffin", 1))
    with pytest.raises(ScanNetError, match="no CSV in UTF-8"):
        read_results(tmp_path / "results.csv")
    (tmp_path / "claims.csv").write_text("id,status\na,b,c\n")
    with pytest.raises(ScanNetError, match="row 1: has 3 cells"):
        judge_recomputed(tmp_path / "claims.csv", tmp_path / "claims.csv")


def test_the_tables_of_trials_are_checked(tmp_path):
    shutil.copytree(ROOT / "reports/trial/push", tmp_path / "push")
    before = read_trial(tmp_path, ("push",))["results"]
    path = tmp_path / "push/results.csv"
    table = path.read_text()
    path.write_text(table.replace(",0,,,400,", ",vggt,,,400,", 1))  # the name of a geometry leaves the others numbers
    after = read_trial(tmp_path, ("push",))["results"]
    assert after.noise[0] == "vggt" and after.noise[1:].tolist() == before.noise[1:].tolist()
    for damaged, said in ((table.replace("regime", "x", 1), "lacks regime"), (table + "1,2\n", "has 2 cells")):
        path.write_text(damaged)
        with pytest.raises(ScanNetError, match=said):
            read_trial(tmp_path, ("push",))


def test_a_headline_without_its_rows_names_the_reports(tmp_path):
    for name in ("results.csv", "trial/report", "trial/push"):
        copy = shutil.copytree if "." not in name else shutil.copy
        (tmp_path / name).parent.mkdir(exist_ok=True)
        copy(ROOT / "reports" / name, tmp_path / name)
    (tmp_path / "tables").mkdir()
    head = (ROOT / "reports/tables/differences.csv").read_text().splitlines()[0]
    (tmp_path / "tables/differences.csv").write_text(head + "\n")
    with pytest.raises(ScanNetError, match="there is none of direct against plain") as told:
        headline(tmp_path)
    assert str(tmp_path) in str(told.value)


def without(content):
    "The arrays without one of them, as an archive."
    arrays = dict(np.load(io.BytesIO(content)))
    del arrays["sums"]
    np.savez(again := io.BytesIO(), **arrays)
    return again.getvalue()


@pytest.mark.parametrize(
    "name, damage, said",
    [
        ("results.npz", lambda content: b"", "no readable zip file"),
        ("results.npz", lambda content: content[:-40], "no readable zip file"),
        ("results.npz", without, "sums is missing"),
        ("results.npz", lambda content: content[:200] + b"\0\0\0\0" + content[204:], "is damaged"),
        ("results.csv", lambda content: content.replace(b"plain", b"plane", 1), "with another results.csv"),
        ("results.csv", lambda content: content[: content.rstrip().rindex(b"\n") + 1], "with another results.csv"),
    ],
)
def test_what_scenes_contributed_is_refused_where_it_does_not_belong(tmp_path, name, damage, said):
    write_results(invented(scenes=4), tmp_path / "results.csv")
    assert read_results(tmp_path / "results.csv")[BY_SCENE].notna().any()
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(ScanNetError, match=said):
        read_results(tmp_path / "results.csv")


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("refused", ["2d"], "refused: it must be object"),
        ("scenes", [7, 8], "must be string"),
        ("texts", ["the chair", {}], "must be string"),
        ("truth", [["1"] * 6] * 2, "must be number"),
        ("truth", [None] * 2, "must be array"),
        ("boxes", {"2d+3d": [[True] * 6] * 2}, "2d"),
        ("objects", ["1"], "list of 2 entries"),
    ],
)
def test_damaged_recorded_answers_are_refused(tmp_path, key, value, said):
    boxes = np.ones((2, 6))
    path = RecordedAnswers("a", ["s", "s"], ["1", "2"], ["t", "t"], boxes, {"2d+3d": boxes}).write(tmp_path / "a.json")
    assert read_recorded(path).texts == ["t", "t"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ScanNetError, match=said):
        read_recorded(path)


def test_recorded_answers_are_not_written_where_they_could_not_be_read(tmp_path):
    boxes = np.full((1, 6), np.nan)
    with pytest.raises(ValueError, match="JSON"):
        RecordedAnswers("a", ["s"], ["1"], ["t"], boxes, {"2d+3d": boxes}).write(tmp_path / "a.json")
    assert not list(tmp_path.iterdir())


TEXT = (ROOT / "params.scannet.yaml").read_text()


@pytest.mark.parametrize(
    "damaged, said",
    [
        (TEXT.replace("  frames: 32", "  frames: 32\n  frames: 16"), "frames is there twice"),
        (TEXT + "\ntrain: {}\n", "train is there twice"),
        (TEXT.replace("frames: 32", "frames: 2026-99-99"), "not YAML"),
        (TEXT.replace("frames: 32", "frames: !!timestamp x"), "not YAML"),
        (TEXT + "# more\n" * 10_000, "too many"),
    ],
)
def test_damaged_settings_are_refused(tmp_path, damaged, said):
    (tmp_path / "params.yaml").write_text(damaged)
    with pytest.raises(ScanNetError, match=said):
        read_full_settings(tmp_path / "params.yaml")


def reply(body: bytes, *fields: str) -> bytes:
    head = "\r\n".join(["HTTP/1.1 200 OK", f"content-length: {len(body)}", *fields])
    return head.encode() + b"\r\n\r\n" + body


GOOD = answered.endpoint_reply().partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize(
    "answer, said",
    [
        (reply(b"\x1f\x8b" + GOOD, "content-encoding: gzip"), "compressed"),
        (reply(b'{"choices": []}' + b" " * 2**23), "more than"),
        (reply(GOOD[:-1] + b', "choices": []}'), "not as an OpenAI-compatible server"),
        (reply(b"[" * 100_000), "not as an OpenAI-compatible server"),
        (reply(GOOD).replace(b"content-length: ", b"content-length: 9"), "no answer to 1 requests"),
    ],
)
def test_a_server_that_answers_badly_is_one_clear_error(tmp_path, answer, said):
    def ask(address):
        return Endpoint(f"{address}/v1", "m", tmp_path, patience=1, tries=1, timeout=20).parse(
            "a", "b", {"target": str}
        )

    assert answered.served(reply(GOOD), ask) == {"target": "chair"}
    shutil.rmtree(tmp_path)
    with pytest.raises(EndpointError, match=said):
        answered.served(answer, ask)


def test_a_server_that_goes_on_and_on_is_left(tmp_path, monkeypatch):
    class Trickle(httpx.SyncByteStream):
        def __iter__(self):
            while True:
                yield b" "

    def stream(*_, **__):
        return httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(200, stream=Trickle()))).stream(
            "POST", "http://server/v1"
        )

    monkeypatch.setattr(httpx, "stream", stream)
    with pytest.raises(EndpointError, match="ReadTimeout"):
        Endpoint("http://server/v1", "m", tmp_path, patience=1, timeout=0.3).parse("a", "b", {"target": str})


def test_lists_of_a_server_hold_text(tmp_path):
    vlm = Endpoint("http://server/v1", "m", tmp_path, tries=1)
    vlm._send = lambda messages: '{"related": ["a", {"b": 1}]}'
    assert vlm.parse("a", "b", {"related": list}) == {"related": []}


@pytest.mark.parametrize("content", ["{", "7", '{"said": 7}', "{}"])
def test_a_stored_answer_that_was_damaged_is_named(tmp_path, content):
    vlm = Endpoint("http://server/v1", "m", tmp_path, tries=1)
    vlm._send = lambda messages: '{"target": "chair"}'
    vlm.parse("a", "b", {"target": str})
    (stored,) = tmp_path.iterdir()
    stored.write_text(content)
    with pytest.raises(ScanNetError, match="Remove it") as told:
        vlm.parse("a", "b", {"target": str})
    assert stored.name in str(told.value)


def test_the_page_takes_a_key_once(tmp_path):
    (tmp_path / "asked.json").write_text('{"scene": "0/scene9000_00", "text": "the door", "text": "the lamp"}')
    with pytest.raises(ScanNetError, match="a key is there twice"):
        answered.ask_demo(tmp_path)


def test_a_store_has_one_writer(tmp_path):
    with write_store(tmp_path / "store") as part:
        (part / "a.txt").write_text("a")
        with pytest.raises(RuntimeError, match="another process is writing here"):
            with write_store(tmp_path / "store"):
                raise AssertionError("two at once")
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["a.txt", MANIFEST]


def test_files_are_on_the_disk_before_the_manifest_says_so(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(("manifest", str(b))), replace(a, b)))
    (tmp_path / "a.txt").write_text("a")
    seal(tmp_path, ["a.txt"])
    at = done.index(("manifest", str(tmp_path / MANIFEST)))
    assert str(tmp_path / "a.txt") in done[:at] and any(MANIFEST in str(path) for path in done[:at])
