"Runs that a notebook cannot show: killed processes, and several at once."

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training
from safetensors.torch import load_file

EVERYTHING = dict(reading="direct", mu=0.0, push_every=2, intervene=0.5, drop3d=0.3, reform=0.1, anchors=1.0)
SCRIPT = str(Path(training.__file__))


@pytest.fixture(scope="module")
def folder(encoded):
    return encoded


def start(command: list[str], folder: Path, name: str, settings: dict) -> subprocess.CompletedProcess:
    "Run the script in other processes."
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*command, SCRIPT, str(folder), name, json.dumps(settings)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_resumes_after_a_kill_to_the_same_weights(folder):
    settings = EVERYTHING | dict(
        max_steps=8, per_device_train_batch_size=2, save_steps=3, logging_steps=1, muon_learning_rate=0.02, curriculum=6
    )
    killed = start([sys.executable], folder, "killed", settings | {"kill": 5})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in (folder / "killed").glob("checkpoint-*")] == [
        "checkpoint-3"
    ]  # in the middle of the second epoch
    torn = folder / "killed/checkpoint-6"  # as if killed again, while writing the next one
    shutil.copytree(folder / "killed/checkpoint-3", torn)
    state = torn / "trainer_state.json"
    state.write_text(state.read_text()[:-40])
    resumed = training.train(folder, "killed", settings)
    whole = training.train(folder, "whole", settings)
    assert resumed.state.global_step == 8 and resumed._initial_global_step == 3
    expected = training.result(whole)
    assert all(torch.equal(value, expected[name]) for name, value in training.result(resumed).items())
    assert resumed.state.log_history[:8] == whole.state.log_history[:8]


@pytest.fixture(scope="module")
def alone(folder):
    "The run of one process on the global batch."
    trainer = training.train(folder, "alone", PARALLEL | {"per_device_train_batch_size": 4})
    return training.result(trainer), trainer.state.log_history[:-1]


# AdamW divides by the size of the gradient: where that is nearly zero, its usual epsilon of 1e-8 turns the last bit of
# a sum into a step
PARALLEL = EVERYTHING | dict(max_steps=4, logging_steps=1, save_strategy="no", adam_epsilon=1e-6)


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_processes_equal_one(folder, alone, launcher):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    bin = Path(sys.executable).parent
    command = {
        "torchrun": [str(bin / "torchrun"), "--nproc_per_node", "2", "--master_port", port],
        "accelerate": [
            str(bin / "accelerate"),
            "launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--num_cpu_threads_per_process",
            "1",
            "--main_process_port",
            port,
        ],
    }[launcher]  # "multi_gpu" starts the processes; `use_cpu` keeps them on the CPU
    done = start(command, folder, launcher, PARALLEL | {"per_device_train_batch_size": 2})
    assert done.returncode == 0, done.stderr
    weights, log = alone
    report = json.loads((folder / f"{launcher}.json").read_text())
    assert report["processes"] == 2
    together = load_file(folder / f"{launcher}.safetensors")
    assert together.keys() == weights.keys() and "heads.where.weight" in weights
    assert max((value - together[name]).abs().max().item() for name, value in weights.items()) < 1e-5
    for ours, theirs in zip(log, report["log"], strict=True):
        for name in ("loss", "align", "deterrence", "activation", "shortcut_similarity", "reform_where"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5)
