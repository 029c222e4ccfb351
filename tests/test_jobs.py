"""What happens to workers when the program that started them ends, to the jobs when a worker does, and to a pipeline
when another is started in its folder."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import dask
import pytest
import zc.lockfile
from distributed import Client
from joblib import Parallel, delayed

from w2r2.scans.files import exclusive
from w2r2.study.jobs import ENVIRONMENT, Job, execute, spread

ROOT = Path(__file__).parents[1]
WORK = """
import os, time

def count(settings, folder, tell):
    start = len((folder / "seen").read_text().splitlines()) if (folder / "seen").exists() else 0
    for number in range(start, settings["to"]):
        with open(folder / "seen", "a") as seen: print(os.getpid(), file=seen)
        time.sleep(0.05)
        tell(number + 1)
    return start

def die_once(settings, folder, tell):
    if not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), 9)
    return "lived"
"""


@pytest.fixture
def counted(tmp_path, monkeypatch):
    (tmp_path / "counted.py").write_text(WORK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    return tmp_path


def wait(condition, seconds=90):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.05)


def seen(folder):
    return (folder / "seen").read_text().split() if (folder / "seen").exists() else []


def ended(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


def long_program(folder, log):
    program = folder.parent / "program.py"
    program.write_text(
        "from pathlib import Path\nfrom w2r2.study.jobs import Job, execute\nif __name__ == '__main__':\n"
        f"    execute([Job('long', 'counted:count', {{'to': 60}}, Path({str(folder)!r}), 60)])\n"
    )
    with open(log, "w") as errors:
        process = subprocess.Popen([sys.executable, str(program)], stderr=errors, cwd=ROOT)
    wait(lambda: len(seen(folder)) > 3)
    return process


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_program_and_the_job_goes_on(counted, sent):
    folder = counted / "long"
    process = long_program(folder, counted / "log")
    process.send_signal(sent)
    process.wait()
    if Path("/proc").is_dir():
        wait(lambda: ended(seen(folder)[0]))
    done = len(seen(folder))
    assert done < 60
    job = Job("long", "counted:count", {"to": 60}, folder, 60)
    assert not job.finished and execute([job]) == 1
    assert job.result == done and len(set(seen(folder))) == 2


def test_a_second_program_is_refused(counted):
    folder = counted / "long"
    process = long_program(folder, counted / "log")
    with pytest.raises(RuntimeError, match="another process is writing here"):
        execute([Job("long", "counted:count", {"to": 60}, folder, 60)], workers=0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with exclusive(counted):  # of the folder above, which nobody holds
        pass


def test_the_job_of_a_killed_worker_goes_on(counted):
    jobs = [
        Job(f"job {n}", f"counted:{'die_once' if n == 1 else 'count'}", {"to": 2}, counted / str(n)) for n in range(4)
    ]
    assert execute(jobs, workers=2) == 4
    assert [job.result for job in jobs] == [0, "lived", 0, 0]


@contextmanager
def cluster(folder, workers):
    "A scheduler and workers that were started by hand; yields its address and the processes of the workers."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    environment, started = os.environ | ENVIRONMENT, []

    def start(*command):
        command = [sys.executable, "-m", "dask", *command]
        with open(folder / "dask.log", "a") as log:
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder))

    try:
        start("scheduler", "--host", "127.0.0.1", "--port", address.rpartition(":")[2], "--no-dashboard")
        for _ in range(workers):
            start(
                "worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", str(folder)
            )
        yield address, started[1:]
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_workers_that_were_started_separately(counted):
    "Two of them, one killed halfway: every job is done, and the one that was lost goes on where it was."
    jobs = [Job(f"job {n}", "counted:count", {"to": 40}, counted / str(n), 40) for n in range(4)]
    with cluster(counted, 2) as (address, workers):
        killer = subprocess.Popen(
            [sys.executable, "-c", KILLER, str(counted), str(workers[0].pid)],
        )
        assert execute(jobs, scheduler=address) == 4
        killer.wait()
    assert all(job.finished for job in jobs)
    lost = [job for job in jobs if len(set(seen(job.folder))) == 2]
    assert len(lost) == 1 and lost[0].result > 0 and len(seen(lost[0].folder)) == 40


def test_joblib_goes_to_the_scheduler_too(counted):
    with cluster(counted, 2) as (address, workers):  # what one worker could do, joblib does itself
        with Client(address) as client:
            client.wait_for_workers(2)
        with dask.config.set({"scheduler-address": address}), spread():
            assert set(Parallel(2)(delayed(os.getpid)() for _ in range(20))) <= {worker.pid for worker in workers}
    with spread():
        assert set(Parallel(1)(delayed(os.getpid)() for _ in range(4))) == {os.getpid()}


KILLER = """
import os, sys, time
from pathlib import Path
folder, worker = Path(sys.argv[1]), sys.argv[2]
while not any(worker in path.read_text().split()[9:] for path in folder.glob("[0-9]/seen")): time.sleep(0.05)
os.kill(int(worker), 9)
"""


def test_the_environment_of_this_process_stays(counted):
    before = dict(os.environ)
    execute([Job("one", "counted:count", {"to": 1}, counted / "one")])
    assert dict(os.environ) == before


STEP = """
import sys, time
from pathlib import Path

name = sys.argv[1]
with open("began", "a") as began: print(name, file=began)
while name == "one" and not Path("go").exists(): time.sleep(0.05)
Path(f"{name}.txt").write_text(name + (Path("one.txt").read_text() if name == "two" else ""))
"""
STAGES = """
stages:
  one: {cmd: "%(python)s step.py one", deps: [step.py], outs: [one.txt]}
  two: {cmd: "%(python)s step.py two", deps: [one.txt], outs: [two.txt]}
"""


@pytest.fixture
def pipeline(tmp_path):
    "Two stages, of which the first waits for a file; run with the settings and the command of `make repro`."
    (tmp_path / ".dvc").mkdir()
    settings = (ROOT / ".dvc/config").read_text()
    (tmp_path / ".dvc/config").write_text(settings.replace("[core]", "[core]\n    no_scm = true"))
    (tmp_path / "step.py").write_text(STEP)
    (tmp_path / "dvc.yaml").write_text(STAGES % {"python": sys.executable})
    return tmp_path


REPRO = re.search("^REPRO := w2r2 unlock && dvc (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
REPRO[:0] = [sys.executable, "-m", "dvc"]


def repro(folder):
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(REPRO, cwd=folder, stdout=log, stderr=log)
    wait(lambda: (folder / "began").exists() or process.poll() is not None)
    return process


def test_a_second_pipeline_in_one_folder_is_refused_and_the_first_goes_on(pipeline):
    first = repro(pipeline)
    second = subprocess.run(REPRO, cwd=pipeline, capture_output=True, text=True)
    assert second.returncode == 255, second.stderr
    assert "is busy, it is being blocked by" in second.stderr and f"PID {first.pid}" in second.stderr
    (pipeline / "go").touch()
    assert first.wait() == 0, (pipeline / "log").read_text()
    assert (pipeline / "began").read_text().split() == ["one", "two"]
    assert (pipeline / "two.txt").read_text() == "twoone"


def test_a_pipeline_waits_for_one_that_looks_at_its_folder(pipeline):
    "Another holds DVC's lock while it compares files, which may take longer than DVC is willing to wait by itself."
    first = repro(pipeline)
    looking = zc.lockfile.LockFile(str(pipeline / ".dvc/tmp/lock"))
    (pipeline / "go").touch()
    wait((pipeline / "one.txt").exists)
    time.sleep(5)
    looking.close()
    assert first.wait() == 0, (pipeline / "log").read_text()
    assert (pipeline / "two.txt").read_text() == "twoone"
