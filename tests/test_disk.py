"A full disk, and folders that cannot be written to: an error that names them, nothing lost, and on it goes afterwards."

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import training
from safetensors.torch import load_file

from w2r2.cli import main
from w2r2.scans.prepared import Prepared, prepare
from w2r2.study.jobs import Job, execute

SAMPLES = training.SAMPLES
RUN = {"max_steps": 3, "per_device_train_batch_size": 2, "save_steps": 1, "logging_steps": 1}


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    path = tmp_path_factory.mktemp("training")
    training.prepare(path)
    return path


def with_little_room(size: int, *command: str):
    "Run Python where no file may become larger, which it tells as a full disk would."
    return subprocess.run(
        [sys.executable, *command],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )


@contextmanager
def as_nobody():
    "The rights of a user who owns nothing, also where root runs the tests."
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    "command, room",
    [
        (["rooms", "release", "--split", "val", "--share", "0.002"], 10_000),
        (["show", "scene9000_00", "--html", "release/page.html"], 100_000),
    ],
)
def test_a_command_that_finds_a_full_disk_says_where_and_leaves_nothing(tmp_path, command, room):
    (tmp_path / "release").mkdir()
    command = [str(tmp_path / part) if part.startswith("release") else part for part in command]
    run = with_little_room(room, "-c", "import sys; from w2r2.cli import main; sys.exit(main())", *command)
    assert run.returncode == 2 and "Traceback" not in run.stderr, run.stderr
    assert "File too large" in run.stderr and str(tmp_path / "release") in run.stderr
    left = [path for path in (tmp_path / "release").rglob("*") if path.is_file()]
    assert not [path for path in left if path.name.endswith((".part", ".html", ".lock"))]
    assert main(command) == 0


@pytest.mark.parametrize("room", [0, 1000, 200_000])
def test_a_full_disk_leaves_the_views_of_before(tmp_path, room):
    folder, names = tmp_path / "views", ["scene9000_00", "scene9001_00"]
    prepare(SAMPLES, names[:1], folder, 2, (112, 84), (80, 60))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    code = "import sys, training as t; from w2r2.scans.prepared import prepare as p; "
    code += "p(t.SAMPLES, sys.argv[2:], sys.argv[1], 6, (112, 84), (80, 60))"
    run = with_little_room(
        room, "-c", f"import sys; sys.path[:0] = [{os.path.dirname(__file__)!r}]; {code}", folder, *names
    )
    assert run.returncode == 1 and f"File too large: '{folder}" in run.stderr, run.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert prepare(SAMPLES, names, folder, 6, (112, 84), (80, 60)).scenes == names


def test_training_goes_on_after_a_full_disk(encoded):
    def train(name, room):
        return with_little_room(room, training.__file__, str(encoded), name, json.dumps(RUN))

    whole = train("whole", 2**40)
    assert whole.returncode == 0, whole.stderr
    sizes = sorted(path.stat().st_size for path in (encoded / "whole" / "checkpoint-3").iterdir())
    for room in (sizes[-1] - 1, sizes[len(sizes) // 2]):  # no room for the largest file of a checkpoint, for half
        failed = train("full", room)
        assert failed.returncode and not (encoded / "full.safetensors").exists()
        assert str(encoded / "full/checkpoint-1") in failed.stderr.strip().splitlines()[-1]
    again = train("full", 2**40)
    assert again.returncode == 0, again.stderr
    expected, found = (load_file(encoded / f"{name}.safetensors") for name in ("whole", "full"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("room", [2000, 100_000])
def test_a_model_that_finds_a_full_disk_says_where(tmp_path, room):
    code = "import sys; from w2r2.model.checkpoint import load, save; from w2r2.shipped import DATA; "
    code += "model, tokenizer, packer = load(DATA / 'rooms-tiny'); save(model, tokenizer, packer.bins, sys.argv[1])"
    run = with_little_room(room, "-c", code, str(tmp_path / "model"))
    last = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 1 and "File too large" in last and str(tmp_path / "model") in last, last


@pytest.fixture
def open_path():
    "A temporary folder that everybody may read."
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def test_folders_that_cannot_be_written_to(open_path, monkeypatch, capsys):
    tmp_path, locked = open_path, open_path / "locked"
    prepare(SAMPLES, ["scene9000_00"], locked / "views", 2, (112, 84), (80, 60))
    (tmp_path / "counted_disk.py").write_text("def work(settings, folder, tell):\n    return 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = {path: path.read_bytes() for path in locked.rglob("*") if path.is_file()}
    for path in (locked, *locked.rglob("*")):
        os.chmod(path, 0o555 if path.is_dir() else 0o444)
    release = shutil.copytree(SAMPLES, tmp_path / "release")
    with as_nobody():
        assert Prepared.open(locked / "views").scenes == ["scene9000_00"]  # to be read, nothing is written
        assert main(["rooms", str(locked / "release"), "--share", "0.002"]) == 2
        assert main(["show", "scene9000_00", "--root", str(release), "--html", str(locked / "page.html")]) == 2
        with pytest.raises(PermissionError, match="locked/views"):
            prepare(SAMPLES, ["scene9001_00"], locked / "views", 2, (112, 84), (80, 60))
        with pytest.raises(PermissionError, match="locked/job"):
            execute([Job("job", "counted_disk:work", {}, locked / "job")], workers=0)
    complaints = [line for line in capsys.readouterr().err.splitlines() if line.startswith("w2r2")]
    assert len(complaints) == 2 and all("Permission denied" in line and str(locked) in line for line in complaints)
    assert {path: path.read_bytes() for path in locked.rglob("*") if path.is_file()} == before
    for path in (locked, *locked.rglob("*")):
        os.chmod(path, 0o755 if path.is_dir() else 0o644)
    job = Job("job", "counted_disk:work", {}, locked / "job")
    assert execute([job], workers=0) == 1 and job.result == 7


@pytest.mark.parametrize("room", [1_990_000, 2_000_500, 2_002_000])
def test_torch_says_which_file_had_no_room(tmp_path, room):
    "Its own error is another one at the end of a file than within, and names none."
    script = (
        "import sys, torch; from w2r2.scans.files import naming\n"
        "with naming(sys.argv[1]): torch.save({'a': torch.zeros(500_000), 'b': torch.zeros(400)}, sys.argv[1])"
    )
    told = with_little_room(room, "-c", script, str(tmp_path / "optimizer.pt")).stderr.splitlines()[-1]
    assert told.startswith("OSError") and str(tmp_path / "optimizer.pt") in told
