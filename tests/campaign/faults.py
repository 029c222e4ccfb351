"""Kill a small flow of stages at its writes, fill its disk, move its clock; run it again until it is through, then
compare what it made with an undisturbed run: python -m campaign.faults --kills 200 --full 50. faults.csv has a line for
each fault. The stages write whatever the pipeline keeps: views, features, queries, candidates, proposals, checkpoints,
a model, and results of jobs."""

import argparse
import errno
import hashlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import pandas as pd
import training
from tqdm import tqdm

from w2r2.method.resuming import last_checkpoint, remove_checkpoint
from w2r2.model.checkpoint import load, save
from w2r2.model.examples import build_tokenizer, encode, prepare, sample_texts, tiny_model, tokenise
from w2r2.model.features import Features, Queries
from w2r2.model.packing import Packer
from w2r2.scans.files import ScanNetError, naming
from w2r2.scans.prepared import Prepared
from w2r2.study.jobs import Job, execute
from w2r2.study.truth import propose_all, read_proposed
from w2r2.study.watch import gather_candidates
from w2r2.tasks.candidates import Candidates

EVENTS = "open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"
STEPS = {"max_steps": 3, "per_device_train_batch_size": 1, "save_steps": 1, "logging_steps": 1, "save_total_limit": 2}
STEPS["lr_scheduler_type"] = "constant"  # a step too many is seen in the weights
SCENES = ["scene9000_00", "scene9001_00"]


def work(settings: dict, folder: Path, tell) -> list[dict]:
    "A job."
    return [{"metric": "a", "value": settings["value"]}]


def stages(folder: Path) -> dict:
    "What each stage left, opened, and how to make it; in their order."
    tokenizer = build_tokenizer(sample_texts(), training.BINS)
    packer, views = Packer.of(tokenizer, training.BINS), folder / "views"
    jobs = [Job(f"job {n}", "campaign.faults:work", {"value": n}, folder / f"job{n}") for n in range(2)]

    def train():
        settings = training.W2R2Config(str(folder / "run"), use_cpu=True, learning_rate=2e-3, **STEPS)
        trainer = training.resumable(folder, settings)
        trainer.train(resume_from_checkpoint=last_checkpoint(settings.output_dir))
        save(trainer.model, tokenizer, packer.bins, folder / "model")
        for checkpoint in (folder / "run").glob("checkpoint-*"):
            remove_checkpoint(checkpoint)
        shutil.rmtree(folder / "run")

    def trained():
        "Like the job of a run, the stage is done when its checkpoints are gone, too."
        if (folder / "run").exists():
            raise FileNotFoundError(folder / "run")
        return load(folder / "model")

    def save_tokenizer():
        with naming(folder):
            tokenizer.save_pretrained(folder)

    def made_from():
        return {"views": Prepared.open(views).digest}

    model = tiny_model(tokenizer, packer).eval()
    return {
        "tokenizer": (
            lambda: training.PreTrainedTokenizerFast.from_pretrained(folder),
            save_tokenizer,
        ),
        "views": (
            lambda: Prepared.open(views),
            lambda: prepare(training.SAMPLES, SCENES, views, 6, (112, 84), (80, 60)),
        ),
        "features": (
            lambda: Features.open(folder / "features"),
            lambda: encode(model, Prepared.open(views), folder / "features", keep=48),
        ),
        "queries": (
            lambda: Queries.open(folder / "features"),
            lambda: tokenise(training.SAMPLES, "samples", SCENES, tokenizer, Prepared.open(views)).save(
                folder / "features"
            ),
        ),
        "candidates": (
            lambda: Candidates.open(folder / "candidates_true.npz"),
            lambda: gather_candidates("true", training.SAMPLES, Prepared.open(views), folder / "candidates_true.npz"),
        ),
        "proposals": (
            lambda: read_proposed(folder / "proposals/samples.json", made_from()),
            lambda: propose_all(Prepared.open(views), folder / "proposals/samples.json"),
        ),
        "model": (trained, train),
        "jobs": (lambda: [job.result for job in jobs], lambda: execute(jobs, workers=0)),
    }


def is_there(opened) -> bool:
    try:
        opened()
    except (FileNotFoundError, ScanNetError, OSError, ValueError):  # OSError, ValueError: transformers' of a tokenizer
        return False
    return True


def flow(folder: Path):
    "Every stage that is not complete; what is, is left as it is."
    folder.mkdir(exist_ok=True)
    for opened, make in stages(folder).values():
        if not is_there(opened):
            make()


class Hook:
    "Hears of every write below a folder that Python begins, and does something at one of them."

    def __init__(self, folder: Path, kind: str = "", at: int = 0, seed: int = 0):
        self.folder, self.kind, self.at, self.count = str(folder) + os.sep, kind, at, 0
        self.rng, self.where = random.Random(seed), ""

    def __call__(self, event, arguments):
        if event not in EVENTS or not arguments or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        path = os.path.abspath(os.fsdecode(arguments[0]))
        if not path.startswith(self.folder) or event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        self.count += 1
        if self.kind == "full" and self.count >= self.at and event in ("open", "os.mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        if self.count == self.at and self.kind in ("before", "within"):
            Path(self.folder[:-1] + ".where").write_text(f"{event}\t{path.removeprefix(self.folder)}")
            if self.kind == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            threading.Thread(target=self.kill, daemon=True).start()

    def kill(self):
        time.sleep(self.rng.uniform(0, 0.005))
        os.kill(os.getpid(), signal.SIGKILL)


def child(folder: Path, kind: str, at: int, seed: int, said):
    "The flow with a fault; tells how many writes there were, or the error."
    tqdm.set_lock(threading.RLock())  # the usual one is shared: the next process would wait for one that was killed
    hook = Hook(folder, kind, at, seed)
    if kind == "room":
        resource.setrlimit(resource.RLIMIT_FSIZE, (at, resource.RLIM_INFINITY))
    if kind:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)
    sys.addaudithook(hook)
    try:
        flow(folder)
    except BaseException as error:
        hook.kind = ""
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        said.send(("error", f"{type(error).__name__}: {error}", traceback.format_exc()))
    else:
        said.send(("done", str(hook.count), ""))


def run(folder: Path, kind: str = "", at: int = 0, seed: int = 0) -> tuple[str, str, str]:
    "What became of the flow in a process of its own: killed, error or done; what it said; the traceback."
    context = multiprocessing.get_context("fork")
    hears, said = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(folder, kind, at, seed, said))
    process.start()
    said.close()
    try:
        return hears.recv()
    except EOFError:
        return "killed", "", ""
    finally:
        process.join()


def digests(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in ("log.txt", ".lock"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def move_clock(folder: Path, rng: random.Random):
    "As if files were written in another year, or in another order."
    for path in folder.rglob("*"):
        when = rng.choice([0, 1e9, 4e9, time.time() + rng.uniform(-1e6, 1e6)])
        os.utime(path, (when, when))


def campaign(
    kills: int, full: int, seed: int, home: Path, tell=lambda table, differing: None
) -> tuple[pd.DataFrame, list[str]]:
    """A line for each fault; and the files that differ from an undisturbed run, of every flow that came through. `tell`
    hears of both each time that one did. A fault that the flow was through before is not counted: another is drawn."""
    whole, folder, rows, differing = home / "whole", home / "flow", [], []
    outcome, said, trace = run(whole)
    assert outcome == "done", trace
    writes, expected = int(said), digests(whole)
    plan = ["kill"] * kills + ["full"] * full
    random.Random(seed).shuffle(plan)
    for number, fault in enumerate(plan):
        rng = random.Random(f"{seed} {number}")
        if fault == "kill":
            kind, at = rng.choice(["before", "within"]), rng.randint(1, max(5, writes // 3))
        elif rng.random() < 0.5:
            kind, at = "full", rng.randint(1, max(5, writes // 3))
        else:
            kind, at = "room", int(10 ** rng.uniform(0, 6.5))
        moved = rng.random() < 0.3
        if moved and folder.is_dir():
            move_clock(folder, rng)
        before = [name for name, (opened, _) in stages(folder).items() if is_there(opened)]
        where = folder.with_name("flow.where")
        where.unlink(missing_ok=True)
        outcome, said, trace = run(folder, kind, at, number)
        place = where.read_text() if where.is_file() else ""
        lost = [name for name, (opened, _) in stages(folder).items() if name in before and not is_there(opened)]
        told = outcome != "error" or str(home) in said and said.startswith("OSError")
        row = {"fault": number + 1, "kind": kind, "at": at, "clock moved": moved, "outcome": outcome, "write": place}
        rows.append(
            row | {"said": said.replace(str(home), "…")[:120], "told": told, "lost": " ".join(lost), "seed": seed}
        )
        if outcome == "done":
            plan.append(fault)
        if outcome == "done" or number == len(plan) - 1:
            if outcome != "done":
                outcome, said, trace = run(folder)
                assert outcome == "done", trace
            found = digests(folder)
            differing += sorted(name for name in expected | found if expected.get(name) != found.get(name))
            shutil.rmtree(folder)
            tell(pd.DataFrame(rows), differing)
    return pd.DataFrame(rows), differing


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--full", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reports", type=Path, default=Path("reports/campaign"))
    options = parser.parse_args()
    options.reports.mkdir(parents=True, exist_ok=True)

    def write(table, differing):
        print(f"{len(table)} faults, files that differ: {differing}", flush=True)
        table.assign(differing=len(differing)).to_csv(options.reports / "faults.csv", index=False)

    with tempfile.TemporaryDirectory() as home:
        write(*campaign(options.kills, options.full, options.seed, Path(home), write))
