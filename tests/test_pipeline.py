"""dvc.yaml, params.yaml and the notebooks of the pipeline belong together."""

import re
from dataclasses import fields
from pathlib import Path

import nbformat
import pytest
import yaml

from w2r2.code import stage_lines
from w2r2.method.objectives import READINGS
from w2r2.method.trainer import W2R2Config
from w2r2.study.experiments import plan

ROOT = Path(__file__).parents[1]
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8").replace("${nbs}", "nbs/pipeline"))
STAGES = PIPELINE["stages"]
PARAMS = {name: yaml.safe_load((ROOT / name).read_text(encoding="utf-8")) for name in ("params.yaml", "params.ci.yaml")}
NOTEBOOKS = {
    name: found[0] for name, stage in STAGES.items() if (found := re.findall(r"nbs/pipeline/\w+\.ipynb", stage["cmd"]))
}


def notebook(stage):
    return nbformat.read(ROOT / NOTEBOOKS[stage], 4)


def value(params, name):
    for key in name.split("."):
        params = params[key]
    return params


@pytest.mark.parametrize("stage", NOTEBOOKS)
def test_stage_depends_on_its_code(stage):
    code = f"build/code/{Path(NOTEBOOKS[stage]).stem}.txt"
    assert code in STAGES["code"]["outs"] and (STAGES[stage].get("frozen") or code in STAGES[stage]["deps"])
    assert stage_lines(ROOT / NOTEBOOKS[stage])


def test_dvc_yaml_fits_on_two_screens():
    assert len((ROOT / "dvc.yaml").read_text(encoding="utf-8").splitlines()) < 165


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("file", PARAMS)
def test_stage_names_parameters_that_exist(stage, file):
    used = re.findall(r"\$\{(\w+\.\w+)\}", STAGES[stage]["cmd"])
    for name in [*used, *STAGES[stage].get("params", [])]:
        value(PARAMS[file], name)
    tracked = set(STAGES[stage].get("params", []))
    assert {name for name in used if not name.endswith(".workers")} <= tracked | {
        name for name in used if name.split(".")[0] in tracked
    }


@pytest.mark.parametrize("stage", NOTEBOOKS)
def test_stage_passes_parameters_that_the_notebook_declares(stage):
    cells = [cell for cell in notebook(stage).cells if "parameters" in cell.metadata.get("tags", [])]
    declared = re.findall(r"^(\w+) =", cells[0].source, re.M)
    assert len(cells) == 1 and set(re.findall(r" -[pr] (\w+) ", STAGES[stage]["cmd"])) <= set(declared)


@pytest.mark.parametrize("file", PARAMS)
def test_every_set_can_be_planned(file):
    params, known = (
        PARAMS[file],
        {field.name for field in fields(W2R2Config)}
        | {"steps", "times", "per_task", "fusion", "zero", "volume", "privileged", "picker"},
    )
    for name in params["train"]["sets"]:
        runs = plan(params | {"train": params["train"] | {"set": name}})
        assert {"plain", "direct"} <= {run.arm for run in runs}
    for arm in (params["w2r2"], *params["train"]["arms"].values()):
        assert set(arm) <= known and arm.get("reading", "none") in READINGS


def test_miniature_is_the_same_pipeline():
    full, small = PARAMS.values()
    assert {name: set(section) for name, section in full.items()} == {
        name: set(section) for name, section in small.items()
    }


def test_plain_fine_tuning_depends_on_every_dial_but_those_of_eq_6():
    named = {name.split(".")[1] for name in STAGES["diagnose"]["params"] if name.startswith("w2r2.")}
    assert named == set(PARAMS["params.yaml"]["w2r2"]) - {"lam", "mu", "push_every", "logging_steps", "save_steps"}
