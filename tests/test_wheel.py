"What is installed without a clone: the wheel holds what the commands need, and scoring needs no deep learning library."

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "A folder into which the wheel alone was installed."
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "target"))
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, files.split("\0")):
        if name.startswith(("w2r2/", "data/")) or "/" not in name:  # a copy: building leaves folders behind
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, source], check=True)
    (wheel,) = wheels.glob("*.whl")
    assert wheel.stat().st_size < 25e6
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True)
    return target


@pytest.fixture
def run(installed, tmp_path):
    def run(*arguments, without=()):
        script = (
            "import sys\n"
            "class Absent:\n"
            "    def find_spec(name, path=None, target=None):\n"
            f"        if name in {list(without)}:\n"
            "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
            "sys.meta_path.insert(0, Absent)\n"
            "import w2r2\nfrom w2r2.cli import main\n"
            f"assert w2r2.__file__.startswith({str(installed)!r}), w2r2.__file__\n"
            f"sys.exit(main({[str(word) for word in arguments]}))"
        )
        return subprocess.run(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
        )

    return run


def test_scores_without_torch(run, tmp_path):
    box = {"scene_id": "scene0000_00", "object_id": "1", "ann_id": "0", "bbox": [0, 0, 0, 1, 1, 1]}
    (tmp_path / "truth.json").write_text(json.dumps([box]))
    (tmp_path / "said.json").write_text(json.dumps([box | {"bbox": [0, 0, 0.25, 1, 1, 0.5]}]))
    done = run(
        *("score", "said.json", "--benchmark", "scanrefer", "--protocol", "scanrefer"),
        *("--annotations", "truth.json", "--json"),
        without=("torch", "transformers", "sklearn", "matplotlib", "plotly"),
    )
    assert done.returncode == 0, done.stderr
    assert {row["name"]: row["value"] for row in json.loads(done.stdout)["rows"]} == {"Acc@0.25": 1, "Acc@0.5": 0}


def test_core_install_says_what_is_missing(run):
    done = run("ground", "scene9000_00", "the black couch", without=("torch",))
    assert done.returncode == 2 and "pip install 'w2r2[models]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_builds_rooms(run, tmp_path):
    done = run("rooms", "mine", "--split", "samples", "--share", "0.25")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine" / "scans" / "scene9000_00" / "scene9000_00.sens").is_file()


def test_grounds_in_a_sample_scene_with_the_model_that_comes_along(run, tmp_path):
    done = run("ground", "scene9000_00", "the black couch", "--html", "page.html", "--json")
    assert done.returncode == 0, done.stderr
    (answer,) = json.loads(done.stdout)
    assert len(answer["box"]) == 6 and (tmp_path / "page.html").stat().st_size > 1e6


def test_help_answers_at_once(installed, tmp_path):
    start = time.process_time()
    before = os.times().children_user
    done = subprocess.run(
        [installed / "bin" / "w2r2", "--help"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "ground" in done.stdout
    assert os.times().children_user - before + time.process_time() - start < 1  # seconds of a processor
