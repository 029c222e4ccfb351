"""Kill the miniature pipeline at random moments, run it again, and compare what it made with an undisturbed run:
python -m campaign.kills --kills 200 --seed 0. kills.csv has a line for each kill, bytes.csv what was compared."""

import argparse
import filecmp
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil

ROOT = Path(__file__).parents[2]
PASSING = {"log.txt", ".gitignore"}  # names of files that tell what happened on the way


def copy_project(folder: Path):
    "The project with the parameters of the miniature, as `make miniature` does."
    shutil.rmtree(folder, ignore_errors=True)
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, names.stdout.split("\0")):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    (folder / "params.ci.yaml").rename(folder / "params.yaml")
    (folder / "dvc.lock").unlink(missing_ok=True)
    subprocess.run([sys.executable, "-m", "dvc", "config", "core.no_scm", "true"], cwd=folder, check=True)


def start(folder: Path) -> subprocess.Popen:
    "The pipeline, from where it is."
    environment = os.environ | {"PYTHONPATH": str(folder), "MATPLOTLIBRC": str(folder / "matplotlibrc")}
    with open(folder / "repro.log", "a") as log:
        command = [sys.executable, "-m", "dvc", "repro"]
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)


def kill_tree(process: subprocess.Popen):
    "Nothing of it is asked, or told."
    tree = [process.pid]
    try:
        tree += [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        pass
    for pid in tree:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def stage_of(folder: Path) -> str:
    "What the pipeline said last that it was doing."
    lines = (folder / "repro.log").read_text(errors="replace").splitlines()
    return next((line.split("'")[1] for line in reversed(lines) if line.startswith("Running stage")), "")


def compare(whole: Path, killed: Path) -> pd.DataFrame:
    "Every file that an undisturbed run made, and whether it is the same."

    def made(folder):
        paths = (path.relative_to(folder) for path in (folder / "build").rglob("*") if path.is_file())
        return {path for path in paths if path.name not in PASSING}

    rows, (a, b) = [], (made(whole), made(killed))
    for path in sorted(a | b):
        there = path in a and path in b
        same = there and filecmp.cmp(whole / path, killed / path, shallow=False)
        rows.append(
            {
                "part": path.parts[1],
                "file": str(path),
                "same": same,
                "why": "" if same else "differs" if there else "only one has it",
            }
        )
    return pd.DataFrame(rows)


def campaign(kills: int, seed: int, work: Path, reports: Path):
    "Kill and compare; a run that is there already is not made again."
    reports.mkdir(parents=True, exist_ok=True)
    whole, killed, rng = work / "whole", work / "killed", random.Random(seed)
    if not (whole / "seconds").is_file():
        copy_project(whole)
        began = time.monotonic()
        assert start(whole).wait() == 0, f"see {whole}/repro.log"
        (whole / "seconds").write_text(str(time.monotonic() - began))
    seconds, rows = float((whole / "seconds").read_text()), []
    copy_project(killed)
    while len(rows) < kills:
        process, moment = start(killed), rng.uniform(1, max(30, 3 * seconds / kills))
        try:
            code = process.wait(moment)
        except subprocess.TimeoutExpired:
            kill_tree(process)
            rows.append({"kill": len(rows) + 1, "seconds": round(moment, 1), "stage": stage_of(killed), "seed": seed})
            pd.DataFrame(rows).to_csv(reports / "kills.csv", index=False)
            print(rows[-1], flush=True)
        else:
            assert code == 0, f"the pipeline did not go on after kill {len(rows)}; see {killed}/repro.log"
            (killed / "dvc.lock").unlink()  # done: from the beginning, so that every stage is killed
            shutil.rmtree(killed / "build")
    assert start(killed).wait() == 0, f"the pipeline did not go on after the last kill; see {killed}/repro.log"
    table = compare(whole, killed)
    summary = table.groupby("part").agg(files=("same", "size"), same=("same", "sum")).reset_index()
    summary.assign(kills=kills, seed=seed).to_csv(reports / "bytes.csv", index=False)
    print(summary.to_string(), table[~table.same].to_string(), sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "kills")
    parser.add_argument("--reports", type=Path, default=ROOT / "reports" / "campaign")
    options = parser.parse_args()
    campaign(options.kills, options.seed, options.work.resolve(), options.reports.resolve())
