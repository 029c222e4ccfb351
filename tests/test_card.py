"""Geometry cards of classes outside the package: one that cannot see geometry, one that sees nothing else."""

import json
import socket
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest

from w2r2.cli import main
from w2r2.scans.scan import Scan
from w2r2.shipped import DATA
from w2r2.systems.altered_scans import LENSES
from w2r2.systems.asking import RecordedAnswers, ask_system, choose_queries
from w2r2.systems.card import diagnose, make_card
from w2r2.systems.endpoint import Endpoint, EndpointError

RECORDS = json.loads((DATA / "samples/scanrefer/ScanRefer_filtered_samples.json").read_text())
MEANT = {(r["scene_id"], r["description"]): int(r["object_id"]) for r in RECORDS}
DESTROYED = "depth zero", "depth and poses permuted", "depth, poses and mesh swapped"


class GeometryBlind:
    "Remembers where everything was, and never looks."

    variants = ("2d+3d", "2d")

    def ground(self, scan, texts, inputs="2d+3d"):
        with Scan(DATA / "samples", scan.scene_id) as known:
            where = dict(zip(known.object_ids.tolist(), known.boxes))
        return [SimpleNamespace(box=where[MEANT[scan.scene_id, text]]) for text in texts]


class GeometryOnly:
    "Is told the pixels of the object, and lifts them by depth and poses."

    variants = ("2d+3d", "2d")

    def ground(self, scan, texts, inputs="2d+3d"):
        return [SimpleNamespace(box=self.lift(scan, MEANT[scan.scene_id, text], inputs)) for text in texts]

    def lift(self, scan, number, inputs):
        points = [np.zeros((0, 3))]
        for frame in scan.views() if inputs == "2d+3d" else ():
            depth, mask = frame.depth_metres, scan.instance_images[frame.index] == number + 1
            rows, columns = np.nonzero(depth)
            # the pixel of the colour camera that looks the same way
            rays = np.linalg.inv(scan.intrinsic_depth[:3, :3]) @ [columns, rows, np.ones(len(rows))]
            u, v, _ = np.rint(scan.intrinsic_color[:3, :3] @ rays).astype(int)
            seen = (u >= 0) & (v >= 0) & (u < mask.shape[1]) & (v < mask.shape[0])
            seen[seen] = mask[v[seen], u[seen]]
            points.append(
                (rays[:, seen] * depth[rows[seen], columns[seen]]).T @ frame.pose[:3, :3].T + frame.pose[:3, 3]
            )
        points = np.concatenate(points)
        if len(points) < 10:
            return np.full(6, np.nan)
        low, high = np.quantile(points, (0.02, 0.98), axis=0)
        return np.concatenate([(low + high) / 2, high - low])


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    cache = tmp_path_factory.mktemp("altered")
    scans = [Scan(DATA / "samples", scene) for scene in sorted({r["scene_id"] for r in RECORDS})]
    blind, lifts = GeometryBlind(), GeometryOnly()
    made = {
        "blind": diagnose(blind, scans, RECORDS, cache, reader=blind, queries=24),
        "lifts": diagnose(lifts, scans, RECORDS, cache, reader=lifts, queries=24),
    }
    for scan in scans:
        scan.close()
    return {k: {line.name: line for line in card.lines} for k, card in made.items()}, made


def test_a_system_that_cannot_see_geometry(cards):
    lines, card = cards[0]["blind"], cards[1]["blind"]
    assert card.system == "GeometryBlind" and card.scenes == 4 and not card.refused
    for name in DESTROYED:
        assert lines[name].figures[name].value == 1 and "No use of it is shown" in lines[name].sentence
    assert lines["moved"].figures["slope"].value == lines["scaled"].figures["slope"].value == 0
    assert "mostly stays" in lines["moved"].sentence and "mostly stays" in lines["scaled"].sentence
    assert lines["four moves"].figures["all four"].value == 0
    assert "open" in lines["2D only"].sentence  # equal with and without
    assert card.missing == {"queries that need geometry": "the other 2D-only system answers every query"}


def test_a_system_that_sees_nothing_but_geometry(cards):
    lines = cards[0]["lifts"]
    whole = lines["four moves"].figures["unmoved"].value
    assert whole > 0.6
    assert np.isclose(lines["four moves"].figures["all four"].value, whole, atol=0.05)
    assert lines["2D only"].figures["2D only"].value == 0 and "Geometry helps" in lines["2D only"].sentence
    for name in ("moved", "scaled"):
        assert np.isclose(lines[name].figures["slope"].value, 1, atol=0.02) and "mostly goes" in lines[name].sentence
    for name in DESTROYED:
        assert lines[name].figures[name].value < 0.2 and "needs what was destroyed" in lines[name].sentence
    assert lines["intrinsics"].figures["0.5"].value < whole and "told matter" in lines["intrinsics"].sentence
    assert lines["queries that need geometry"].figures["needs geometry"].value == whole


def test_command_with_a_class_of_the_present_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outsider.py").write_text(
        textwrap.dedent("""
        from types import SimpleNamespace
        import numpy as np
        class Middle:
            def ground(self, scan, texts, inputs="2d+3d"):
                if not scan.frames[0].depth.any():
                    raise ValueError("needs <depth>")
                pose = np.mean([frame.pose[:3, 3] for frame in scan.views()], 0)
                return [SimpleNamespace(box=[*pose, 1, 1, 1]) for _ in texts]
        """)
    )
    assert main(["diagnose", "out", "--system", "outsider:Middle", "--queries", "12"]) == 0
    assert "2D only: not made" in capsys.readouterr().out
    kept = json.loads((tmp_path / "out/card.json").read_text())
    assert kept["refused"] == {"depth zero": "needs <depth>"} and kept["system"] == "outsider:Middle"
    assert "needs &lt;depth&gt;" in (tmp_path / "out/card.html").read_text()
    (zero,) = (line for line in kept["lines"] if line["name"] == "depth zero")
    assert zero["verdict"] == "refused" and "refused: needs <depth>. Whether" in zero["sentence"]
    assert "needs what was destroyed" not in zero["sentence"] and zero["figures"]["depth zero"]["value"] == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["answers.json", "card.html", "card.json"]
    assert main(["diagnose", "again", "--answers", "out/answers.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == kept
    assert main(["diagnose", "again", "--system", "outsider:Nobody"]) == 2
    assert "MODULE:CLASS" in capsys.readouterr().err
    (tmp_path / "cut.json").write_text("{}")
    assert main(["diagnose", "again", "--answers", "cut.json"]) == 2
    assert "cut.json: file: it must contain" in capsys.readouterr().err


class Away(GeometryBlind):
    "Has a VLM that goes away after so many scans."

    variants = ("2d+3d",)

    def __init__(self, answered, server):
        self.left, self.vlm = answered, server

    def ground(self, scan, texts, inputs="2d+3d"):
        self.left -= 1
        if self.left < 0:
            self.vlm.parse(texts[0], "Name the kind of object.", {"target": str})
        return super().ground(scan, texts, inputs)


def test_a_server_that_goes_away_refuses_nothing(tmp_path):
    with socket.socket() as nobody:  # an address at which nothing listens
        nobody.bind(("127.0.0.1", 0))
        dead = Endpoint(f"http://127.0.0.1:{nobody.getsockname()[1]}/v1", "m", tmp_path, patience=1, timeout=2)
    chosen = choose_queries(RECORDS, 4, scenes=1)
    with Scan(DATA / "samples", chosen[0]["scene_id"]) as scan:
        for server, told in ((dead, "no answer"), (Endpoint("http://127.0.0.1/v1", "m", tmp_path, budget=0), "budget")):
            with pytest.raises(EndpointError, match=told):  # it fails in the first altered scan
                ask_system(Away(1, server), [scan], chosen, tmp_path / "altered")


def test_lenses_that_are_refused_are_not_a_worst_case():
    truth, texts = np.tile([1.0, 1, 1, 1, 1, 1], (4, 1)), ["a", "b", "c", "d"]
    nothing = np.full((4, 6), np.nan)
    boxes = {"2d+3d": truth} | {change.name: truth for change in LENSES} | {"intrinsics 0.5": nothing}
    said = RecordedAnswers("s", ["x", "x", "y", "y"], texts, texts, truth, boxes, {"intrinsics 0.5": "too short"})
    (line,) = (line for line in make_card(said).lines if line.name == "intrinsics")
    assert list(line.figures) == ["0.75", "1", "1.25", "1.5"] and "are not shown to matter" in line.sentence


def test_whole_objects_are_drawn_from_every_scene():
    chosen = choose_queries(RECORDS, 40)
    drawn = {(r["scene_id"], r["object_id"]) for r in chosen}
    assert len(chosen) == sum((r["scene_id"], r["object_id"]) in drawn for r in RECORDS) <= 40
    assert len({scene for scene, _ in drawn}) == 4
