"""The page of all systems, in miniature: a few steps of training, a few queries."""

import os
import subprocess
from pathlib import Path

import pandas as pd

from w2r2.report.measured_systems import audit_systems, read_systems
from w2r2.rooms import release as rooms

ROOT = Path(__file__).parents[1]
VLMS = "rooms,oracle,random"


def test_every_system_answers_on_one_page(tmp_path):
    rooms.build(tmp_path / "rooms", "train", share=6 / 1400)
    rooms.build(tmp_path / "rooms", "test", share=2 / 150)
    command = [
        "papermill",
        "--engine",
        "w2r2",
        "--no-progress-bar",
        "nbs/bench/systems.ipynb",
        str(tmp_path / "page.ipynb"),
    ]
    given = {"params": "params.ci.yaml", "root": tmp_path / "rooms", "folder": tmp_path / "build"}
    given |= {"reports": tmp_path / "reports", "vlms": VLMS}
    for name, value in given.items():
        command += ["-r", name, str(value)]
    for name, value in {"queries": 8, "scenes": 2, "others": 2, "workers": 1}.items():
        command += ["-p", name, str(value)]
    environment = os.environ | {"MATPLOTLIBRC": str(ROOT / "matplotlibrc"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    systems = read_systems(tmp_path / "reports")
    rows = {"VG-LLM", "W2R2 LLM", "Video-3D LLM", "SPAR"} | ({"SeqVLM", "VLM-Grounder", "SeeGround"} if VLMS else set())
    assert set(systems.answers.row) == set(systems.figures.row) == rows
    each = systems.answers.fillna({"vlm": ""}).groupby(["row", "about", "vlm", "inputs"]).size()
    assert each.nunique() == 1 and 1 <= each.iloc[0] <= 8
    assert systems.figures.value.isna().equals(systems.figures.why != "")
    assert len(audit_systems(systems)) == 8 and len(list((tmp_path / "build/traces").glob("*.html"))) == len(rows)
    assert pd.read_csv(tmp_path / "reports/figures.csv").metric.nunique() == 7
