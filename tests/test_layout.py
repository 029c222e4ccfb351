"Scenes do not depend on the process that makes them, and every split's knobs leave room for their objects."

import os
import subprocess
import sys
from pathlib import Path

import pytest

from w2r2.rooms.layout import generate
from w2r2.rooms.shapes import load_catalogue

CATALOGUE = Path(__file__).parents[1] / "data" / "recipes" / "catalogue.yaml"
SCRIPT = """
import hashlib, sys
from w2r2.rooms.layout import generate
from w2r2.rooms.shapes import load_catalogue
catalogue, state = load_catalogue(sys.argv[1]), hashlib.sha256()
for number in range(10):
    scene = generate(number, {}, catalogue)
    state.update(scene.vertices.tobytes() + scene.faces.tobytes() + scene.free.tobytes())
    state.update(repr((scene.materials, scene.items)).encode())
print(state.hexdigest())
"""


def test_same_bytes_in_every_process():
    digests = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT, str(CATALOGUE)],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


@pytest.fixture(scope="module")
def catalogue():
    return load_catalogue(CATALOGUE)


@pytest.mark.parametrize(
    "knobs",
    [
        {"object_scale": [0.6, 0.8]},
        {"object_scale": [1.3, 1.4]},
        {"objects": [22, 30], "clutter": 0.6},
        {"kinds": {"bathroom": 1}, "objects": [22, 30], "clutter": 1.0},
        {"kinds": {"yard": 1, "street": 1}, "objects": [16, 24], "clutter": 0.4},
        {"objects": [6, 10]},
        {"room_scale": [1.3, 1.5]},
    ],
)
def test_knobs_leave_room(knobs, catalogue):
    low, high = knobs.get("objects", catalogue["defaults"]["objects"])
    for number in range(40):
        scene = generate(number, knobs, catalogue)
        furniture = [i for i in scene.items if i.category not in ("floor", "ground", "wall", "ceiling", "fence")]
        assert low <= len(furniture) <= high or len(furniture) == sum(
            entry["count"][0] for entry in catalogue["kinds"][scene.kind]["furniture"].values()
        ), scene.scene_id
        assert len(scene.free) >= 12
