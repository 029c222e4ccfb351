"""Damage, read, compare: python -m campaign.run --inputs 200000 --seed 0. Every input follows from the seed, its reader
and its number. inputs.csv has a line for each reader, failures.jsonl one for each input that failed; with --only, both
keep what they have of the readers that are not run."""

import argparse
import gc
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

import limited
import pandas as pd
from campaign.answered import make_answered
from campaign.full import make_full
from campaign.sources import make_sources
from campaign.targets import ALL, Target, make

from w2r2.scans.files import ScanNetError

SECONDS, BATCH = 10.0, 200  # of a processor: a reader that takes longer hangs; inputs of one process
PATIENCE = 6  # times as long by the clock, on a machine that has other things to do
OUTCOMES = ["refused", "harmless", "silent", "crashed", "hung", "memory"]
CLEAN = ScanNetError, FileNotFoundError
MAKERS = make, make_sources, make_answered, make_full  # of the targets


class Hung(BaseException):
    "Raised in the reader by the clock."


def damage(target: Target, seed: int, number: int) -> tuple[str, bytes, bytes]:
    "The file that an input damages, its original, and what it becomes."
    rng = random.Random(f"{seed} {target.name} {number}")
    name = rng.choice(target.files)
    original = (target.folder / name).read_bytes()
    return name, original, rng.choice(target.mutators)(original, rng)


def set_clock(seconds: float):
    "To ring after so many seconds of the processor, or several times as many by the clock; 0: not."
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE * seconds)


def judge(target: Target, before: dict, name: str, original: bytes, damaged: bytes) -> tuple[str, str]:
    "The outcome of reading, and what there is to say about it."
    started = time.process_time()
    try:
        after = target.read(target.folder)
        set_clock(0)
    except Hung:
        return "hung", f"{time.process_time() - started:.1f} s"
    except MemoryError as error:
        return "memory", str(error)
    except Exception as error:
        if isinstance(limited.root_of(error), MemoryError):
            return "memory", str(error)
        files = {Path(name).name, target.folder.name, Path(name).parent.name}
        if isinstance(error, CLEAN) and any(part and part in str(error) for part in files):
            return "refused", ""
        return "crashed", f"{type(error).__name__}: {error}"[:300]
    differing = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    if not differing:
        return "harmless", ""
    touched = target.touched(name, original, damaged)
    if touched is None:
        return "silent", f"read, though no other parser does; {sorted(map(str, differing))[:3]}"
    others = set() if touched == ALL else differing - touched
    return ("silent", f"{sorted(map(str, others))[:5]}") if others else ("harmless", "")


def work(target: Target, seed: int, numbers: list[int], queue):
    "A batch of inputs, in a process of its own with little memory; tells the outcome of each."
    warnings.simplefilter("ignore")

    def ring(*_):
        raise Hung

    signal.signal(signal.SIGALRM, ring)
    signal.signal(signal.SIGPROF, ring)
    before, hard = target.read(target.folder), resource.getrlimit(resource.RLIMIT_AS)[1]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for number in numbers:
        name, original, damaged = damage(target, seed, number)
        path = target.folder / name
        path.write_bytes(damaged)
        queue.send((number, None))
        room = 10 * max(len(damaged), len(original)) + 2**26
        limited.forget_peak()
        used, start = limited.resident(), time.process_time()
        resource.setrlimit(resource.RLIMIT_AS, (limited.address_space() + room, hard))
        set_clock(SECONDS)
        try:
            outcome, why = judge(target, before, name, original, damaged)
        finally:
            set_clock(0)
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        seconds, peak = time.process_time() - start, limited.resident("VmHWM") - used
        path.write_bytes(original)
        for left in target.folder.glob("result.damaged*"):
            left.unlink()
        queue.send((number, (name, outcome, why, seconds, max(peak, 0), room)))
    queue.send((None, None))


def batch(target: Target, seed: int, numbers: list[int]):
    "The outcomes of a batch; an input that ends the process, or stops its clock, is told too, and the rest goes on."
    context, waiting = multiprocessing.get_context("fork"), list(numbers)
    while waiting:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(target, seed, waiting, sender))
        originals = {name: (target.folder / name).read_bytes() for name in target.files}
        process.start()
        sender.close()
        current = None
        while True:
            try:
                told = receiver.recv() if receiver.poll(2 * PATIENCE * SECONDS + 60 * (current is None)) else "silence"
            except EOFError:
                told = "death"
            if isinstance(told, str):
                process.kill()
                if current is None:
                    raise RuntimeError(f"{target.name}: the original cannot be read")
                outcome = "hung" if told == "silence" else "crashed"
                yield current, ("", outcome, f"{told} of the process", PATIENCE * SECONDS, 0, 0)
                waiting.remove(current)
                break
            number, result = told
            if number is None:
                waiting = []
                break
            current = number
            if result is not None:
                yield number, result
                waiting.remove(number)
        process.join()
        for name, content in originals.items():
            if (target.folder / name).read_bytes() != content:
                (target.folder / name).write_bytes(content)


@dataclass
class Tally:
    "What became of some inputs of one reader."

    reader: str
    inputs: int = 0
    kinds: dict = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    proved: bool = True  # of what was harmless; False: a changed result of a changed file counts, whatever it is
    seconds: float = 0.0  # the slowest
    peak: float = 0.0  # bytes
    failures: list[dict] = field(default_factory=list)

    def add(self, other: "Tally"):
        self.inputs += other.inputs
        self.kinds = {kind: count + other.kinds[kind] for kind, count in self.kinds.items()}
        self.seconds, self.peak = max(self.seconds, other.seconds), max(self.peak, other.peak)
        self.failures += other.failures

    def row(self) -> dict:
        measured = {"slowest [s]": self.seconds, "peak memory [MB]": self.peak / 2**20}
        return {"reader": self.reader, "inputs": self.inputs, **self.kinds, "proved": self.proved, **measured}


def tally(target: Target, seed: int, numbers: list[int]) -> Tally:
    "A batch of inputs, counted."
    found = Tally(target.name, len(numbers), proved=target.proved)
    for number, (name, outcome, why, seconds, peak, _) in batch(target, seed, numbers):
        found.kinds[outcome] += 1
        found.seconds, found.peak = max(found.seconds, seconds), max(found.peak, peak)
        if outcome not in ("refused", "harmless"):
            label = {"reader": target.name, "seed": seed, "number": number, "file": name}
            found.failures.append(label | {"outcome": outcome, "why": why})
    return found


def campaign(
    inputs: int, seed: int, folder: Path, only: list[str] = [""], state: Path | None = None, tell=lambda *found: None
) -> tuple[pd.DataFrame, list[dict]]:
    """A line for each reader whose name has one of the words, and the inputs that failed. Batches of all readers take
    turns; those that `state` has are not done again, and `tell` hears of the others now and then."""
    targets = [target for part in MAKERS for target in part(folder) if any(word in target.name for word in only)]
    total, plan = sum(target.share for target in targets), []
    for target in targets:
        count = math.ceil(inputs * target.share / total)
        for first in range(0, count, BATCH):
            plan.append((first / count, target, list(range(first, min(first + BATCH, count)))))
    done = {}
    if state is not None and state.is_file():
        lines = [line for line in state.read_text().splitlines() if line.endswith("}")]  # the last may be cut
        done = {(entry["reader"], *entry["numbers"]): Tally(**entry["tally"]) for entry in map(json.loads, lines)}
    tallies = {target.name: Tally(target.name, proved=target.proved) for target in targets}

    def told() -> tuple[pd.DataFrame, list[dict]]:
        failures = [failure for found in tallies.values() for failure in found.failures]
        return pd.DataFrame([found.row() for found in tallies.values()]), failures

    gc.freeze()  # a collection in a child need not go through all that was there before it
    last = time.monotonic()
    for _, target, numbers in sorted(plan, key=lambda part: part[0]):
        key = target.name, numbers[0], numbers[-1]
        if (found := done.get(key)) is None:
            found = tally(target, seed, numbers)
            if state is not None:
                with open(state, "a") as file:
                    file.write(json.dumps({"reader": key[0], "numbers": key[1:], "tally": asdict(found)}) + "\n")
        tallies[target.name].add(found)
        if time.monotonic() - last > 30:
            last = time.monotonic()
            tell(*told())
    return told()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="WORD", help="readers whose name has one of these; other rows stay"
    )
    parser.add_argument("--state", type=Path, help="file of what is done, from which a campaign goes on")
    parser.add_argument("--reports", type=Path, default=Path("reports/campaign"))
    options = parser.parse_args()
    options.reports.mkdir(parents=True, exist_ok=True)

    table_file, failures_file = options.reports / "inputs.csv", options.reports / "failures.jsonl"
    known = pd.read_csv(table_file) if options.only != [""] and table_file.is_file() else pd.DataFrame({"reader": []})
    failed = [json.loads(line) for line in failures_file.read_text().splitlines()] if len(known) else []

    def write(table, failures):
        print(f"{table.inputs.sum():,} inputs, {len(failures)} failed", flush=True)
        run = set(table.reader)
        whole = pd.concat([known[~known.reader.isin(run)], table.assign(seed=options.seed)])
        whole.to_csv(table_file, index=False, float_format="%.3g")
        both = [failure for failure in failed if failure["reader"] not in run] + failures
        failures_file.write_text("".join(json.dumps(failure) + "\n" for failure in both))

    with tempfile.TemporaryDirectory() as folder:
        write(*campaign(options.inputs, options.seed, Path(folder), options.only, options.state, write))
