"""Descriptions judged by a second, plain checker: scalar geometry, no tables, no shared code with
w2r2.rooms.relations."""

import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from w2r2.rooms.grammar import Grammar, parse, to_tokens
from w2r2.rooms.language import ask_scene, describe_scene
from w2r2.rooms.layout import generate
from w2r2.rooms.shapes import load_catalogue

RECIPES = Path(__file__).parents[1] / "data" / "recipes"
CATALOGUE = load_catalogue(RECIPES / "catalogue.yaml")
GRAMMAR = yaml.safe_load((RECIPES / "grammar.yaml").read_text())
SPLITS = yaml.safe_load((RECIPES / "splits.yaml").read_text())
INVERSE = {"has on it": "on", "has in front of it": "in front of", "has next to it": "next to", "has above it": "above"}


def grade(value, yes, no):
    if math.isnan(value):
        return 1
    if no < yes:
        value, yes, no = -value, -yes, -no
    return 2 if value <= yes else 0 if value >= no else 1


class Plain:
    "Three-valued truth of forms, item by item."

    def __init__(self, scene):
        self.scene, self.items = scene, scene.items
        self.things = [i.id for i in scene.items if i.category not in GRAMMAR["structure"]]

    def word(self, slot, word, i):
        item, entry = self.items[i], GRAMMAR["words"][slot][word]
        labels = {item.category, item.category + "/" + item.shape, item.color, item.material}
        return 2 if labels & set(entry["names"]) else 1 if labels & set(entry.get("perhaps", [])) else 0

    def gaps(self, i, a):
        p, q = self.items[i].box, self.items[a].box
        return [abs(p[k] - q[k]) - (p[k + 3] + q[k + 3]) / 2 for k in range(3)]

    def related(self, rel, i, a):
        if i == a:
            return 0
        if rel in INVERSE:
            return self.related(INVERSE[rel], a, i)
        p, q, (gx, gy, gz) = self.items[i].box, self.items[a].box, self.gaps(i, a)
        gap = math.hypot(max(gx, 0), max(gy, 0))
        top, bottom = p[2] + p[5] / 2, p[2] - p[5] / 2
        anchor_top = q[2] + q[5] / 2
        if rel == "next to":
            near = min(grade(gap, 0.3, 0.6), grade(-gz, 0.05, 0.02))
            return min(near, 1) if max(gx, gy) < -0.02 else near
        if rel == "by":
            return 1 if max(gx, gy) < -0.02 else grade(gap, 0.4, 0.9)
        chain = [self.items[i].support]
        while chain[-1] >= 0 and len(chain) < 3:
            chain.append(self.items[chain[-1]].support)
        if rel == "on":
            return 2 if chain[0] == a else 1 if a in chain else 0
        linked = self.related("on", i, a) or (a in chain) or self.related("on", a, i)
        if rel == "below":
            return self.related("above", a, i)
        if rel == "above":
            off = max(abs(p[k] - q[k]) - max(p[k + 3], q[k + 3]) / 2 for k in (0, 1))
            truth = min(grade(off, 0.15, 0.4), grade(bottom - anchor_top, -0.02, -0.2))
            return min(truth, 1) if linked or bottom - anchor_top > 1.3 else truth
        if rel == "under":
            share = max(-gx, 0) * max(-gy, 0) / (p[3] * p[4])
            return 0 if linked else min(grade(min(share, 1), 0.8, 0.1), grade(top - anchor_top, -0.05, 0.05))
        yaw = self.items[a].yaw  # a viewer faces the anchor's front
        if math.isnan(yaw):
            return 1
        c, s, dx, dy = math.cos(yaw), math.sin(yaw), p[0] - q[0], p[1] - q[1]
        ahead, right = dx * c + dy * s, -dx * s + dy * c
        deep, wide = (abs(c) * p[3] + abs(s) * p[4]) / 2, (abs(s) * p[3] + abs(c) * p[4]) / 2
        anchor_deep, anchor_wide = (abs(c) * q[3] + abs(s) * q[4]) / 2, (abs(s) * q[3] + abs(c) * q[4]) / 2
        level = 2 if gz < -0.05 else 1
        if rel in ("in front of", "behind"):
            along = ahead if rel == "in front of" else -ahead
            return min(
                grade(along - deep - anchor_deep, 1.2, 1.8),
                grade(along - anchor_deep, 0, -0.3),
                grade(abs(right) - anchor_wide, 0, 0.5),
                level,
            )
        across = right if rel == "right of" else -right
        return min(
            grade(across - wide - anchor_wide, 1, 1.8),
            grade(across - anchor_wide, 0.1, -0.3),
            grade(abs(ahead) - anchor_deep, 0.1, 0.8),
            level,
        )

    def nearer(self, i, j, a):
        def far(k):
            return math.dist(self.items[k].box[:2], self.items[a].box[:2])

        def gap(k):
            return math.hypot(*(max(g, 0) for g in self.gaps(k, a)[:2]))

        return far(j) - far(i) >= 0.3 and gap(j) - gap(i) >= 0.2

    def beats(self, rel, i, j):
        if rel in ("smallest", "shortest", "lowest"):
            return self.beats({"smallest": "largest", "shortest": "tallest", "lowest": "highest"}[rel], j, i)
        p, q = self.items[i].box, self.items[j].box
        if rel == "largest":
            oblique = any(abs(math.sin(2 * self.items[k].yaw)) > 0.2 for k in (i, j))
            return not oblique and p[3] * p[4] * p[5] >= 1.35 * q[3] * q[4] * q[5]
        return p[5] >= 1.15 * q[5] and p[5] - q[5] >= 0.08 if rel == "tallest" else p[2] - q[2] >= 0.25

    def place(self, rel, i):
        box, (sx, sy, _) = self.items[i].box, self.scene.size
        if rel == "in the middle":
            return grade(max(abs(box[0] / sx - 0.5), abs(box[1] / sy - 0.5)), 0.15, 0.25)
        x, y = (min(box[k] - box[k + 3] / 2, size - box[k] - box[k + 3] / 2) for k, size in ((0, sx), (1, sy)))
        hung = self.items[i].support >= 0 and self.items[self.items[i].support].category == "wall"
        if rel == "on the wall":
            return 2 if hung else 0
        if rel == "against the wall":
            return 1 if hung else min(grade(min(x, y), 0.15, 0.5), 2 if self.items[i].near_wall else 1)
        if rel == "in the corner":
            return grade(max(x, y), 0.35, 0.8)
        (door,) = (k.box for k in self.items if k.category == "door")
        walls = {
            "west": door[0] - door[3] / 2,
            "south": door[1] - door[4] / 2,
            "east": sx - door[0] - door[3] / 2,
            "north": sy - door[1] - door[4] / 2,
        }
        side = min(walls, key=walls.get)  # someone who comes in through the south wall has the west on the left
        left = {
            "south": door[0] - box[0],
            "north": box[0] - door[0],
            "west": box[1] - door[1],
            "east": door[1] - box[1],
        }[side]
        half = box[3] / 2 if side in ("south", "north") else box[4] / 2
        if rel == "right of the entrance":
            left = -left
        return 0 if left <= 0 else 2 if left - half - 0.1 >= 0 and left >= 0.6 else 1

    def between(self, i, a, b):
        if i in (a, b):
            return 0
        p, q, box = self.items[a].box, self.items[b].box, self.items[i].box
        dx, dy = q[0] - p[0], q[1] - p[1]
        length = math.hypot(dx, dy)
        along = ((box[0] - p[0]) * dx + (box[1] - p[1]) * dy) / length**2
        beyond = (
            abs((box[1] - p[1]) * dx - (box[0] - p[0]) * dy) / length
            - (box[3] * abs(dy) + box[4] * abs(dx)) / 2 / length
        )
        free = min(max(self.gaps(i, k)) for k in (a, b))
        truth = min(
            grade(abs(along - 0.5), 0.25, 0.4),
            grade(beyond, 0, 0.4),
            grade(free, -0.02, -0.1),
            2 if length < 3.5 else 1,
        )
        shared = min(box[2] + box[5] / 2, max(k[2] + k[5] / 2 for k in (p, q))) - max(
            box[2] - box[5] / 2, min(k[2] - k[5] / 2 for k in (p, q))
        )
        return truth if shared > 0.05 else min(truth, 1)

    def truth(self, form):
        scope = {i: self.word("noun", form["noun"], i) if "noun" in form else 2 for i in self.things}
        out = dict(scope)
        for slot in ("color", "material", "shape"):
            if slot in form:
                out = {i: min(t, self.word(slot, form[slot], i)) for i, t in out.items()}
        for c in form.get("where", []):
            out = {i: min(t, self.condition(c, i, scope)) for i, t in out.items()}
        return out

    def condition(self, c, i, scope):
        rel, anchors = c["rel"], c.get("anchors", [])
        if rel in ("largest", "smallest", "tallest", "shortest", "highest", "lowest"):
            return self.superlative(scope, i, lambda x, y: self.beats(rel, x, y))
        if not anchors:
            return self.place(rel, i)
        if anchors[0].get("some"):
            return max(min(t, self.related(rel, i, a)) for a, t in self.truth(anchors[0]).items())
        found = [[a for a, t in self.truth(form).items() if t] for form in anchors]
        assert all(len(f) == 1 for f in found), "an anchor is ambiguous"
        ids = [f[0] for f in found]
        if rel == "between":
            return self.between(i, *ids)
        if rel in ("closest to", "farthest from"):
            others = {k: t for k, t in scope.items() if k != ids[0]}
            return self.superlative(
                others, i, lambda x, y: self.nearer(x, y, ids[0]) if rel == "closest to" else self.nearer(y, x, ids[0])
            )
        return self.related(rel, i, ids[0])

    def superlative(self, scope, i, beats):
        if not scope.get(i):
            return 0
        if any(t == 2 and j != i and beats(j, i) for j, t in scope.items()):
            return 0
        return 2 if scope[i] == 2 and all(beats(i, j) for j, t in scope.items() if t and j != i) else 1


def seen(scene, number):
    "Most items in one of two views."
    return np.random.default_rng(number).choice([0, 29, 30, 200], size=(2, len(scene.items)))


@pytest.mark.parametrize("split", ["train", "test_clutter", "test_outdoor", "test_small", "test_large"])
def test_words_point_to_one_object(split):
    knobs, grammar = SPLITS["base"] | SPLITS["splits"][split], Grammar(GRAMMAR)
    described = 0
    for number in range(knobs["first"], knobs["first"] + 8):
        scene = generate(number, knobs, CATALOGUE)
        visible = seen(scene, number)
        records, programs = describe_scene(scene, visible, np.random.default_rng(number), GRAMMAR)
        judge = Plain(scene)
        for record, program in zip(records, programs):
            target = int(record["object_id"])
            assert (
                visible[:, target].max() >= GRAMMAR["pixels"]
                and scene.items[target].category not in GRAMMAR["structure"]
            )
            readings = parse(to_tokens(record["description"]), grammar)
            assert readings, record
            for form in (program["form"], *readings):
                truth = judge.truth(form)
                assert [i for i, t in truth.items() if t] == [target] and truth[target] == 2, (
                    record["description"],
                    form,
                )
            described += 1
    assert described > 100


def test_answers_are_true():
    knobs, grammar = SPLITS["base"] | SPLITS["splits"]["train"], Grammar(GRAMMAR)
    checked = set()
    for number in range(8):
        scene = generate(number, knobs, CATALOGUE)
        records, programs = ask_scene(scene, seen(scene, number), np.random.default_rng(number), GRAMMAR, "train")
        judge = Plain(scene)
        for record, program in zip(records, programs):
            truth = judge.truth(program["about"])
            assert (
                [i for i, t in truth.items() if t] == [i for i, t in truth.items() if t == 2] == record["object_ids"]
            ), record
            item, kind = scene.items[record["object_ids"][0]], program["kind"]
            checked.add(kind)
            if kind == "count":
                assert record["answers"][0] == str(len(record["object_ids"]))
            if kind == "color":
                assert record["answers"] == [item.color]
            if kind == "what":
                assert all(judge.word("noun", answer, item.id) == 2 for answer in record["answers"])
            if kind == "material":
                assert record["answers"] == [item.material]
            if kind == "where":
                for text in record["answers"]:  # a place is a description of its own: "this is a desk <place> ."
                    (form,) = parse(to_tokens(f"this is a {program['about']['noun']} {text} ."), grammar)
                    assert judge.truth(form)[item.id] == 2, (record["question"], text)
    assert checked >= {"count", "color", "where", "what"}
