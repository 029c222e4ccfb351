"""Kill the miniature pipeline at random moments, run it again, and compare what it made with an undisturbed run:
python -m campaign.kills --kills 200 --seed 0. Half of the kills wait for the next write after their moment and come
before it or within it, see hooks/sitecustomize.py. kills.csv has a line for each kill, bytes.csv what was compared; a
campaign that was stopped goes on."""

import argparse
import contextlib
import filecmp
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil

ROOT = Path(__file__).parents[2]
HOOKS = Path(__file__).parent / "hooks"
PASSING = {"log.txt", ".gitignore"}  # names of files that tell what happened on the way
RUNNING = {"build", "cache", "tmp", "dvc.lock", "repro.log", "seconds", "__pycache__"}  # what a run makes


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
    environment = os.environ | {"PYTHONPATH": f"{HOOKS}:{folder}", "MATPLOTLIBRC": str(folder / "matplotlibrc")}
    environment |= {"W2R2_KILL": str(folder), "PYTHONUNBUFFERED": "1"}  # the log tells of a stage as it begins
    subprocess.run([sys.executable, "-m", "w2r2.cli", "unlock"], cwd=folder, check=True)  # as `make repro` does
    with open(folder / "repro.log", "w") as log:
        command = [sys.executable, "-m", "dvc", "repro"]
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)


def tree_of(process: subprocess.Popen) -> list[psutil.Process]:
    "The process and all below it."
    try:
        top = psutil.Process(process.pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def used(tree: list[psutil.Process]) -> float:
    "Seconds of processors, which pass as fast on a busy machine as on an idle one."
    total = 0.0
    for child in tree:
        with contextlib.suppress(psutil.Error):
            total += sum(child.cpu_times()[:4])
    return total


def in_cluster(tree: list[psutil.Process]) -> bool:
    "Dask has started workers."
    names = []
    for child in tree:
        with contextlib.suppress(psutil.Error):
            names.append(" ".join(child.cmdline()))
    return sum("spawn_main" in name for name in names) >= 2


def wait_for_write(folder: Path, process: subprocess.Popen, most: float = 20) -> tuple[str, str]:
    "Where a process stopped that was about to write, or wrote; empty if none did in that time [s of processors]."
    (folder / "armed").touch()
    end = used(tree_of(process)) + most
    while process.poll() is None and used(tree_of(process)) < end:
        time.sleep(0.05)
        if (folder / "caught").is_file() and "\n" in (text := (folder / "caught").read_text()):
            return tuple(text.strip().split("\t"))
    return "", ""


def kill_tree(process: subprocess.Popen):
    "Nothing of it is asked, or told."
    for child in tree_of(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
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


def finished(whole: Path, killed: Path, passes: Path, kill: int):
    "The killed pipeline has come through: compare, and keep what was found beside that of its earlier passes."
    for name in ("armed", "taken", "caught"):
        (killed / name).unlink(missing_ok=True)
    found = compare(whole, killed).assign(kill=kill)
    print(f"through after kill {kill}: {found.same.sum()} of {len(found)} files are the same", flush=True)
    found.to_csv(passes, mode="a", header=not passes.is_file(), index=False)


def campaign(kills: int, seed: int, minutes: float, most: float, work: Path, reports: Path):
    "Kill and compare; what is there already is not made again."
    reports.mkdir(parents=True, exist_ok=True)
    whole, killed, end = work / "whole", work / "killed", time.monotonic() + 60 * minutes
    if not (whole / "seconds").is_file():
        copy_project(whole)
        began = time.monotonic()
        assert start(whole).wait() == 0, f"see {whole}/repro.log"
        (whole / "seconds").write_text(str(time.monotonic() - began))
    table, passes, rows = work / "kills.csv", work / "passes.csv", []
    if killed.is_dir() and table.is_file():
        rows = pd.read_csv(table, keep_default_na=False).to_dict("records")
    else:
        shutil.rmtree(killed, ignore_errors=True)
        shutil.copytree(whole, killed, ignore=lambda _, names: RUNNING & set(names))
    while len(rows) < kills and time.monotonic() < end:
        rng = random.Random(f"{seed} {len(rows)}")
        for name in ("armed", "taken", "caught"):
            (killed / name).unlink(missing_ok=True)
        process, moment, inside = start(killed), rng.uniform(1, most), rng.random() < 0.5
        while (code := process.poll()) is None and used(tree_of(process)) < moment:
            time.sleep(0.1)
        if code is None:
            where, file = wait_for_write(killed, process) if inside else ("", "")
            cluster = in_cluster(tree_of(process))
            kill_tree(process)
            row = {
                "kill": len(rows) + 1,
                "processor [s]": round(moment, 1),
                "stage": stage_of(killed),
                "cluster": cluster,
            }
            rows.append(row | {"write": where, "file": file, "seed": seed})
            pd.DataFrame(rows).to_csv(table, index=False)
            print(rows[-1], flush=True)
        else:
            assert code == 0, f"the pipeline did not go on after kill {len(rows)}; see {killed}/repro.log"
            finished(whole, killed, passes, len(rows))
            (killed / "dvc.lock").unlink()  # done: from the beginning, so that every stage is killed
            shutil.rmtree(killed / "build")
            shutil.rmtree(killed / ".dvc" / "cache", ignore_errors=True)
    for name in ("armed", "taken", "caught"):
        (killed / name).unlink(missing_ok=True)
    assert start(killed).wait() == 0, f"the pipeline did not go on after the last kill; see {killed}/repro.log"
    finished(whole, killed, passes, len(rows))
    shutil.copy(table, reports / "kills.csv")
    found = pd.read_csv(passes)
    summary = found.groupby("part").agg(files=("same", "size"), same=("same", "sum")).reset_index()
    summary.assign(passes=found.kill.nunique(), kills=len(rows), seed=seed).to_csv(reports / "bytes.csv", index=False)
    found[~found.same].to_csv(reports / "differing.csv", index=False)
    print(summary.to_string(), found[~found.same].to_string(), sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e6, help="no kill after that time")
    parser.add_argument("--most", type=float, default=60, help="seconds of processors up to a kill")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "kills")
    parser.add_argument("--reports", type=Path, default=ROOT / "reports" / "campaign")
    options = parser.parse_args()
    campaign(
        options.kills, options.seed, options.minutes, options.most, options.work.resolve(), options.reports.resolve()
    )
