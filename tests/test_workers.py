"""What happens to worker processes when the program that started them dies, and to the jobs when a worker does."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from w2r2.study.jobs import Job, execute

WORK = """
import os, time
from pathlib import Path

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


def setup(tmp_path, monkeypatch):
    (tmp_path / "counted.py").write_text(WORK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def wait(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.05)


def test_worker_ends_with_its_program_and_the_job_goes_on(tmp_path, monkeypatch):
    setup(tmp_path, monkeypatch)
    folder = tmp_path / "long"
    program = f"from pathlib import Path; from w2r2.study.jobs import *; execute([Job('long', 'counted:count', {{'to': 60}}, Path({str(folder)!r}), 60)])"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[1]
    )
    seen = folder / "seen"
    wait(lambda: seen.exists() and len(seen.read_text().splitlines()) > 3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    worker = int(seen.read_text().split()[0])

    def ended():
        try:
            return Path(f"/proc/{worker}/stat").read_text().split()[2] == "Z"
        except FileNotFoundError:
            return True

    if Path("/proc").is_dir():
        wait(ended)
    done = len(seen.read_text().splitlines())
    assert done < 60
    job = Job("long", "counted:count", {"to": 60}, folder, 60)
    assert not job.finished and execute([job]) == 1
    assert job.result == done and len(set(seen.read_text().split())) == 2


def test_a_killed_worker_costs_one_job_and_one_attempt(tmp_path, monkeypatch):
    setup(tmp_path, monkeypatch)
    jobs = [
        Job(f"job {n}", "counted:die_once" if n == 1 else "counted:count", {"to": 2}, tmp_path / str(n), 2)
        for n in range(4)
    ]
    try:
        execute(jobs, workers=2)
    except RuntimeError as error:
        assert str(error).startswith("1 of 4 jobs failed") and "exit code -9" in str(error)
    else:
        assert False
    assert [job.finished for job in jobs] == [True, False, True, True]
    assert execute(jobs, workers=2) == 1 and jobs[1].result == "lived"
