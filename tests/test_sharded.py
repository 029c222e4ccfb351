"A model that is sharded over two processes by FSDP learns what the model of one process learns."

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import sharded
import training
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Folder of the runs of one process and of two."
    folder = tmp_path_factory.mktemp("sharded")
    training.prepare(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node", "2", "--master_port", port]
    for command in ([sys.executable], torchrun):
        done = subprocess.run(
            [*command, sharded.__file__, str(folder)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("case", sharded.CASES)
def test_two_sharded_processes_equal_one(runs, case):
    alone, together = (load_file(runs / f"{case}, {count}.safetensors") for count in (1, 2))
    assert alone.keys() == together.keys()
    assert max((value - together[name]).abs().max().item() for name, value in alone.items()) < 1e-4
    ours, theirs = (json.loads((runs / f"{count}.json").read_text())[case] for count in (1, 2))
    for one, two in zip(ours, theirs, strict=True):
        for name in {"loss", "align", "deterrence", "activation", "shortcut_similarity"} & set(one):
            assert one[name] == pytest.approx(two[name], abs=1e-4)
    assert any(row.get("deterrence", 0) for row in ours)
