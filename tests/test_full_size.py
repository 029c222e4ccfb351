"""The documented commands of the full size, at tiny size: records, fine-tuning on one process and, by `accelerate
launch`, on two that share the model by FSDP or DeepSpeed, and evaluation."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from w2r2.cli import main
from w2r2.method.sharding import LAUNCH_CONFIGS
from w2r2.model.hosts import write_tiny_host
from w2r2.study import full_evaluation
from w2r2.study.full_evaluation import evaluate_host
from w2r2.study.full_settings import read_full_settings

ROOT = Path(__file__).parents[1]


def changes(folder: Path, name: str, *more: str) -> list[str]:
    "What makes params.scannet.yaml a run of twelve steps on two recorded samples."
    dials = [
        f"release.root={ROOT / 'data/samples'}",
        "release.train=samples",
        "release.val=samples",
        f"records.folder={folder / 'records'}",
        "records.forms=[vgllm]",
        "records.tasks=[scanrefer, scanqa]",
        "records.frames=2",
        "records.limit=1",
        f"model.backbone={folder / 'host'}",
        f"model.weights3d={folder / 'host/vggt'}",
        "model.frame_width=112",
        "model.merger_hidden=24",
        "model.dtype=float32",
        f"train.folder={folder / name}",
        "train.mu=0.0",
        "train.bf16=false",
        "train.use_cpu=true",
        "train.max_steps=12",
        "train.num_train_epochs=",
        "train.per_device_train_batch_size=1",
        "train.learning_rate=2.0e-3",
        "train.lr_scheduler_type=constant",
        "train.warmup_steps=0",
        "train.logging_steps=1",
        "evaluate.longest=8",
        *more,
    ]
    return ["--config", str(ROOT / "params.scannet.yaml"), *(part for dial in dials for part in ("--set", dial))]


def launched(processes: int, *command: str, config: str = "fsdp") -> subprocess.Popen:
    "The documented launch; processes on the processor talk by gloo, and compute in single precision."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    accelerate = str(Path(sys.executable).parent / "accelerate")
    options = ["--num_processes", str(processes), "--mixed_precision", "no", "--main_process_port", port]
    return subprocess.Popen(
        [accelerate, "launch", "--config_file", LAUNCH_CONFIGS[config], *options, "-m", "w2r2.cli", *command],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(run: subprocess.Popen):
    said, _ = run.communicate(timeout=300)
    assert run.returncode == 0, said[-3000:]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A folder with a tiny Qwen2.5-VL, a tiny VGGT, records, and a run of one process."
    folder = tmp_path_factory.mktemp("full")
    write_tiny_host(folder / "host", "qwen2_5_vl")
    assert main(["records", *changes(folder, "none")]) == 0
    assert main(["finetune", *changes(folder, "one", "train.gradient_accumulation_steps=2")]) == 0
    return folder


@pytest.fixture(scope="module")
def two(home):
    "The same run by two processes."
    finished(launched(2, "finetune", *changes(home, "two", "train.gradient_accumulation_steps=1")))
    return home / "two"


def log_of(run: Path) -> list[dict]:
    return json.loads((run / "log.json").read_text())


def weights_of(run: Path, file: str = "model.safetensors") -> dict:
    return load_file(run / "model" / file)


def assert_alike(one: Path, two: Path, file: str = "model.safetensors"):
    "Two runs have the same weights and logs within 1e-4, and have learned."
    ours, theirs = weights_of(one, file), weights_of(two, file)
    assert ours.keys() == theirs.keys()
    # a bias of keys has no gradient: AdamW makes steps of rounding errors
    moved = {
        name: (value - theirs[name]).abs().max().item() for name, value in ours.items() if "k_proj.bias" not in name
    }
    assert max(moved.values()) < 1e-4, max(moved.items(), key=lambda item: item[1])
    for alone, shared in zip(log_of(one), log_of(two), strict=True):
        for term in ("loss", "align", "deterrence", "shortcut_similarity"):
            assert alone[term] == pytest.approx(shared[term], abs=1e-4)
    assert log_of(two)[-1]["align"] < log_of(two)[0]["align"]


def test_two_launched_processes_train_what_one_trains(home, two):
    assert_alike(home / "one", two)


def test_two_launched_processes_train_the_qwen3_vl_that_one_trains(home):
    write_tiny_host(home / "qwen3", "qwen3_vl")
    own = f"model.backbone={home / 'qwen3'}", f"model.weights3d={home / 'qwen3/vggt'}", "train.max_steps=10"
    assert main(["finetune", *changes(home, "qwen3 one", *own, "train.gradient_accumulation_steps=2")]) == 0
    finished(launched(2, "finetune", *changes(home, "qwen3 two", *own, "train.gradient_accumulation_steps=1")))
    assert_alike(home / "qwen3 one", home / "qwen3 two")


def test_two_launched_processes_train_the_adapters_that_one_trains(home):
    lora, steps = "model.lora={rank: 4, alpha: 8, dropout: 0.0}", "train.max_steps=4"
    given = changes(home, "lora one", lora, steps, "train.gradient_accumulation_steps=2")
    assert main(["finetune", *given]) == 0
    finished(launched(2, "finetune", *changes(home, "lora two", lora, steps, "train.gradient_accumulation_steps=1")))
    assert_alike(home / "lora one", home / "lora two", "adapter_model.safetensors")


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed, which is not in the lock")
@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_two_processes_of_deepspeed_train_what_one_trains(home, config):
    given = changes(home, config, "train.gradient_accumulation_steps=1")
    finished(launched(2, "finetune", *given, config=config))
    assert_alike(home / "one", home / config)


def test_a_launched_run_that_is_stopped_goes_on(home, two):
    command = "finetune", *changes(home, "stopped", "train.gradient_accumulation_steps=1", "train.save_steps=1")
    run, until = launched(2, *command), time.monotonic() + 200
    while not (home / "stopped/checkpoints/checkpoint-2/manifest.json").is_file():
        assert run.poll() is None and time.monotonic() < until
        time.sleep(0.002)
    run.terminate()  # as a cluster takes a machine back: the launcher ends its processes
    run.communicate()
    assert not (home / "stopped/log.json").is_file()
    finished(launched(2, *command))
    assert log_of(home / "stopped") == log_of(two)
    ours, theirs = weights_of(home / "stopped"), weights_of(two)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_run_of_two_processes_answers(home, two, capsys):
    given = changes(home, "two", "train.gradient_accumulation_steps=1")
    assert main(["evaluate", *given, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores.keys() == {"scanrefer", "scanqa"} and scores["scanrefer"]["rows"][0]["n"] == 1
    assert (two / "answers/scanrefer.json").is_file()
    scene = json.loads((two / "answers/scanrefer.json").read_text())[0]["scene_id"]
    assert main(["ground", scene, "the chair", "--model", str(two / "model"), "--json"]) == 0
    box = json.loads(capsys.readouterr().out)[0]["box"]
    assert box is None or len(box) == 6


def test_a_run_is_asked_in_the_dtype_and_attention_of_the_parameter_file(home, monkeypatch):
    made_from, asked = json.loads((home / "one/model/host.json").read_text()), []
    assert (made_from["dtype"], made_from["attention"]) == ("float32", "sdpa")

    def say(model, tokenizer, records, root, longest, shortcut):
        asked.append((model.dtype, model.vlm.config._attn_implementation))
        yield from ("nothing" for _ in records)

    monkeypatch.setattr(full_evaluation, "answer_records", say)
    settings = read_full_settings(ROOT / "params.scannet.yaml", changes(home, "one")[3::2])
    evaluate_host(settings | {"model": settings["model"] | {"dtype": "bfloat16", "attention": "eager"}})
    assert asked == [(torch.bfloat16, "eager")]


@pytest.mark.parametrize(
    ("command", "dial", "part"),
    [
        ("finetune", "train.lam=3", "other settings"),
        ("finetune", "train.step=3", "train"),
        ("finetune", "model.backbone=no/such/folder", "no such folder"),
        ("evaluate", "train.folder=nowhere", "w2r2 finetune"),
        ("records", "release.root=nowhere", "nowhere"),
    ],
)
def test_bad_settings_are_one_line(home, capsys, command, dial, part):
    name = "one" if "lam" in dial else "bad"
    assert main([command, *changes(home, name, "train.gradient_accumulation_steps=2", dial)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert part in error and error.startswith(f"w2r2 {command}: ")
