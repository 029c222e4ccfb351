"The page of geometry from images alone, in miniature: a few steps of training, a few queries."

import os
import subprocess
from pathlib import Path

from w2r2.report.results import read_results
from w2r2.rooms import release as rooms
from w2r2.scans.annotations import read_split
from w2r2.scans.prepared import prepare

ROOT = Path(__file__).parents[1]


def page(folder: Path) -> subprocess.CompletedProcess:
    command = [
        "papermill",
        "--engine",
        "w2r2",
        "--no-progress-bar",
        "nbs/bench/images.ipynb",
        str(folder / "page.ipynb"),
    ]
    given = {"params": "params.ci.yaml", "root": folder / "rooms", "views_folder": folder / "views"}
    given |= {"folder": folder / "build", "reports": folder / "reports"}
    for name, value in given.items():
        command += ["-r", name, str(value)]
    command += ["-p", "workers", "1"]
    environment = os.environ | {"MATPLOTLIBRC": str(ROOT / "matplotlibrc"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment)


def test_geometry_from_images_is_trained_and_asked_on_one_page(tmp_path):
    for split, share in (("train", 8 / 1400), ("test", 4 / 150)):
        rooms.build(tmp_path / "rooms", split, share=share)
        scenes = read_split(tmp_path / f"rooms/splits/scannetv2_{split}.txt")
        prepare(tmp_path / "rooms", scenes, tmp_path / "views" / split, 6, (112, 84), (80, 60), 1)
    done = page(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_results(tmp_path / "reports/results.csv")
    said = rows[(rows["metric"] == "Acc@0.25") & (rows["proposals"] == "no") & (rows["task"] == "scanrefer")]
    assert {*zip(said["arm"], said["noise"].astype(str))} == {
        ("plain", "0.15"),
        ("direct", "0.15"),
        ("plain", "vggt"),
        ("direct", "vggt"),
        ("volume", "0.0"),
    }
    assert set(said["pass"]) == {"fused", "2d"} and said["by_scene"].notna().all()
