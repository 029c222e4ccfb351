"""The pages of all systems, in miniature: a few steps of training, a few queries."""

import os
import subprocess
from pathlib import Path

import pandas as pd

from w2r2.report.measured_systems import audit_systems, read_systems
from w2r2.rooms import release as rooms
from w2r2.systems.cards import CARD_MEASURES

ROOT = Path(__file__).parents[1]
# without an answer before and after there is no slope, and a reader that answers all leaves nothing that is hard
MAY_LACK = {"slope, moved", "slope, scaled", "needs geometry", "all of an object"}
ROWS = {"VG-LLM", "W2R2 LLM", "Video-3D LLM", "SPAR", "SeqVLM", "VLM-Grounder", "SeeGround"}
ZERO_SHOT = "SeqVLM", "VLM-Grounder", "SeeGround"


def execute_page(name, tmp_path, words, numbers):
    command = ["papermill", "--engine", "w2r2", "--no-progress-bar", f"nbs/bench/{name}.ipynb"]
    command.append(str(tmp_path / f"{name}.ipynb"))
    given = {"root": tmp_path / "rooms", "folder": tmp_path / "build", "reports": tmp_path / "reports"} | words
    for flag, values in (("-r", given), ("-p", numbers | {"workers": 1})):
        for key, value in values.items():
            command += [flag, key, str(value)]
    environment = os.environ | {"MATPLOTLIBRC": str(ROOT / "matplotlibrc"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]


def test_every_system_answers_on_one_page_and_has_a_card_on_the_next(tmp_path):
    rooms.build(tmp_path / "rooms", "train", share=6 / 1400)
    rooms.build(tmp_path / "rooms", "test", share=2 / 150)
    execute_page(
        "systems", tmp_path, {"params": "params.ci.yaml"}, {"queries": 4, "scenes": 2, "others": 2, "repeats": 2}
    )
    systems = read_systems(tmp_path / "reports")
    assert set(systems.answers.row) == set(systems.figures.row) == ROWS
    each = systems.answers.groupby(["row", "about", "vlm", "inputs", "seed"], dropna=False).size()
    assert each.nunique() == 1 and 1 <= each.iloc[0] <= 4
    assert systems.figures.value.isna().equals(systems.figures.why != "")
    seeds = systems.figures.groupby(["row", "vlm"]).seeds.max()
    assert seeds["VG-LLM", ""] == 2 and seeds["SPAR", ""] == 1
    drawn = {(row, vlm) for (row, vlm), count in seeds.items() if vlm and count == 2}  # the others draw nothing
    assert drawn == {(row, "random") for row in ZERO_SHOT} | {("SeqVLM", "rooms"), ("SeqVLM", "oracle")}
    assert seeds.isna().sum() == len(ZERO_SHOT) * 3 - len(drawn)
    assert len(audit_systems(systems)) == 8 and len(list((tmp_path / "build/traces").glob("*.html"))) == len(ROWS)
    assert pd.read_csv(tmp_path / "reports/figures.csv").metric.nunique() == 9
    assert set(systems.answers.row[systems.answers.mask_iou.notna()]) <= {"VLM-Grounder"}
    flat = systems.answers[systems.answers.row == "VG-LLM"].groupby("about").inputs.agg(set)
    assert flat["geometry from images, refined"] == {"2d+3d", "2d: refined with sensor depth"}
    assert flat["geometry from images, as said"] == {"2d+3d", "2d", "2d: zeros before the projector"}
    pages = list((tmp_path / "reports/traces").glob("*.html"))
    assert len(pages) == len(ROWS) and max(page.stat().st_size for page in pages) <= 300_000

    execute_page("cards", tmp_path, {}, {"queries": 6, "scenes": 2})
    cards = pd.read_csv(tmp_path / "reports/cards.csv")
    assert {name.partition(":")[0] for name in cards.system} == ROWS and cards.system.nunique() == 8
    made = cards.groupby("system").measure.agg(set)
    assert all(set(CARD_MEASURES) - measures <= MAY_LACK for measures in made), made
    assert len(list((tmp_path / "build/cards").glob("*/card.html"))) == 8
