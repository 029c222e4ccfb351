"""Tasks for lmms-eval: what its functions get and give, and, where it is installed, lmms-eval itself on them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from w2r2.cli import main
from w2r2.metrics.scoring import score
from w2r2.systems import lmms_tasks
from w2r2.tasks.answers import NineNumbers

SAMPLES = Path(__file__).parents[1] / "data" / "samples"
installed = pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="no lmms-eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("tasks")
    assert (
        main(["lmms", str(place), "--root", str(SAMPLES), "--split", "samples", "--name", "rooms", "--frames", "3"])
        == 0
    )
    return place


def docs_of(folder, task):
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]


def saved_answer(doc, number):
    """Right, wrong and malformed answers in turn."""
    truth = json.loads(doc["truth"])
    if number % 3 == 2:
        return '{"frame": 99, "bbox_3d": "__import__(\'os\')"}'
    if doc["task"] == "scanrefer":
        box = np.array(truth[0]["bbox"]) + (number % 3) * np.array([5, 0, 0, 0, 0, 0])
        return NineNumbers(decimals=4).write(1, box, np.array(doc["poses"]))
    text = truth[0]["description"] if doc["task"] == "scan2cap" else truth[0]["answers"][0]
    return text[(number % 3) * 5 :].strip()  # lmms-eval strips what a model says


def figures_by_hand(folder, task):
    """The same answers through `w2r2 score`'s files."""
    said, truth = ({} if task == "scan2cap" else []), []
    for number, doc in enumerate(docs_of(folder, task)):
        item = next(iter(lmms_tasks.judge_doc(doc, [saved_answer(doc, number)]).values()))
        if task == "scan2cap":
            said |= item["said"]
        elif task == "scanqa":
            said.append({"question_id": item["said"]["question_id"], "pred_response": item["said"]["answer"]})
        else:
            said.append(item["said"])
        truth += item["truth"]
    (folder / "said.json").write_text(json.dumps(said))
    (folder / "truth.json").write_text(json.dumps(truth))
    found = {}
    for name, (protocol, figure) in lmms_tasks.LMMS_FIGURES[task].items():
        rows = score([folder / "said.json"], task, protocol, folder / "truth.json", resamples=10).rows
        found[name] = next(row.value for row in rows if row.name == figure)
    return found


@pytest.mark.parametrize("task", list(lmms_tasks.LMMS_FIGURES))
def test_functions_give_what_the_scorer_gives(folder, task):
    """As lmms-eval calls them: pictures and text of each doc, its results, then one aggregation for each figure."""
    options = {"folder": str(folder)}
    docs, items = docs_of(folder, task), {}
    for number, doc in enumerate(docs):
        pictures, text = lmms_tasks.show_frames(doc, options), lmms_tasks.ask_doc(doc, options)
        assert len(pictures) == 3 and "<image>" not in text and text.count("frames 0 to 2") == 1
        for name, item in lmms_tasks.judge_doc(doc, [saved_answer(doc, number)]).items():
            items.setdefault(name, []).append(json.loads(json.dumps(item)))  # it logs them as JSON
    found = {name: lmms_tasks.score_docs(several) for name, several in items.items()}
    assert found == pytest.approx(figures_by_hand(folder, task), abs=1e-12)
    assert found[next(iter(found))] > 0
    if task == "scanrefer":
        assert found["acc_25"] == pytest.approx(np.mean([n % 3 == 0 for n in range(len(docs))]))


def test_descriptions_of_tasks_name_what_is_there(folder):
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    group = yaml.safe_load((folder / "rooms.yaml").read_text())
    assert group["group"] == "rooms" and group["task"] == ["rooms_scanrefer", "rooms_scan2cap", "rooms_scanqa"]
    for name in group["task"]:
        task = yaml.load((folder / f"{name}.yaml").read_text(), Loader)
        assert task["task"] == name and (folder / task["dataset_kwargs"]["data_files"]["test"]).is_file()
        named = [task["doc_to_visual"], task["doc_to_text"], task["process_results"]]
        named += [metric["aggregation"] for metric in task["metric_list"]]
        for module, _, function in (path.rpartition(".") for path in named):
            assert module == "w2r2.systems.lmms_tasks" and callable(getattr(lmms_tasks, function))
        kind = name.rpartition("_")[2]
        assert [metric["metric"] for metric in task["metric_list"]] == list(lmms_tasks.LMMS_FIGURES[kind])
        assert task["lmms_eval_specific_kwargs"]["default"]["folder"] == str(folder.resolve())


def test_a_release_that_is_not_there_is_one_line(tmp_path, capsys):
    assert main(["lmms", str(tmp_path / "out"), "--root", str(tmp_path), "--split", "val"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def evaluate(folder, out, *options):
    """lmms-eval's own results by task and figure."""
    home = {"HF_HOME": str(out / "home"), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        "-m",
        "lmms_eval",
        "--include_path",
        str(folder),
        "--tasks",
        "rooms",
        "--batch_size",
        "1",
    ]
    done = subprocess.run(
        [*command, "--output_path", str(out), *options], cwd=out, env=os.environ | home, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = out.rglob("*results.json")
    return json.loads(path.read_text())["results"]


@installed
def test_lmms_eval_with_its_dummy_model(folder, tmp_path):
    found = evaluate(folder, tmp_path, "--model", "dummy", "--model_args", "response=a chair")
    assert found["rooms_scanrefer"]["acc_25,none"] == found["rooms_scanrefer"]["acc_25_per_object,none"] == 0
    assert found["rooms_scan2cap"]["cider,none"] > 0


@installed
def test_lmms_eval_with_saved_answers(folder, tmp_path):
    """Answers in the form of its logs give the figures of our scorer."""
    logs = tmp_path / "logs"
    logs.mkdir()
    for task in lmms_tasks.LMMS_FIGURES:
        answers = [
            {"doc_id": number, "resps": [[saved_answer(doc, number)]]}
            for number, doc in enumerate(docs_of(folder, task))
        ]
        about = {"args": {"model": "mine", "model_args": "", "limit": None}, "model_configs": {"task": f"rooms_{task}"}}
        (logs / f"{task}.json").write_text(json.dumps(about | {"logs": answers}))
    out = tmp_path / "out"
    out.mkdir()
    found = evaluate(folder, out, "--model", "from_log", "--model_args", f"logs={logs}")
    for task in lmms_tasks.LMMS_FIGURES:
        wanted = {f"{name},none": value for name, value in figures_by_hand(folder, task).items()}
        assert {name: found[f"rooms_{task}"][name] for name in wanted} == pytest.approx(wanted)
