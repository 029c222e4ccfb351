"A tenth of the campaign of `make campaign`, and that the campaign sees what it looks for."

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from campaign import faults, run
from campaign.targets import Target, json_units

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")


def test_a_tenth_of_the_campaign(tmp_path):
    table, failures = run.campaign(20_000, 0, tmp_path)
    assert not failures
    assert table.inputs.sum() >= 20_000 and table.harmless.sum() > 2000
    strict = table[(table.inputs >= 20) & (table.reader != "evaluation that goes on")]  # it asks again instead
    assert (strict.refused > 0).all()
    assert (table["slowest [s]"] < run.SECONDS).all()


def test_rows_of_readers_that_are_not_run_stay(tmp_path):
    header = "reader,inputs,refused,harmless,silent,crashed,hung,memory,proved,slowest [s],peak memory [MB],seed\n"
    (tmp_path / "inputs.csv").write_text(header + "split,7,3,2,0,2,0,0,True,0.1,1,5\nold,9,4,5,0,0,0,0,False,0.1,1,5\n")
    failures = [{"reader": "old", "number": 1}, {"reader": "split", "number": 2}]
    (tmp_path / "failures.jsonl").write_text("".join(json.dumps(failure) + "\n" for failure in failures))
    command = [sys.executable, run.__file__, "--inputs", "21", "--only", "split", "leaderb", "--reports", tmp_path]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    table = pd.read_csv(tmp_path / "inputs.csv", index_col="reader")
    assert table.index.tolist() == ["old", "split", "proposals of a split", "leaderboard"]
    assert table.inputs.tolist()[0] == 9 and table.inputs.iloc[1:].sum() >= 21 and table.seed.tolist() == [5, 0, 0, 0]
    assert table.proved.tolist() == [False, True, True, True]
    assert json.loads((tmp_path / "failures.jsonl").read_text()) == failures[0]


def test_a_campaign_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    (tmp_path / "0.json").write_bytes(ORIGINAL)
    target = Target("example", tmp_path, ["0.json"], careless, json_units(dict), [lambda data, rng: OTHER])
    monkeypatch.setattr(run, "MAKERS", [lambda folder: [target]])
    state = tmp_path / "state.jsonl"
    whole, _ = run.campaign(500, 0, tmp_path, state=state)
    lines = state.read_text().splitlines()
    assert whole.inputs.tolist() == [500] and len(lines) == 3
    state.write_text("\n".join(lines[:2]) + "\n" + lines[2][:20])  # stopped while it wrote
    monkeypatch.setattr(run, "tally", lambda *args: run.Tally("example", len(args[2])))
    again, _ = run.campaign(500, 0, tmp_path, state=state)
    assert again.inputs.tolist() == [500] and again.harmless.tolist() == [400]


def test_kills_full_disks_and_a_moved_clock_change_nothing(tmp_path):
    table, differing = faults.campaign(20, 5, 1, tmp_path)
    assert not differing and table.told.all() and not table.lost.any()
    assert (table.outcome == "killed").sum() == 20 and (table.outcome == "error").sum() == 5


def careless(folder):
    "Takes the last of two keys, like Python's parser."
    return json.loads((folder / "0.json").read_bytes())


def forgetful(folder):
    "Has a value where the file has none."
    found = json.loads((folder / "0.json").read_bytes())
    return {"a": 1, "b": 2, **found} if isinstance(found, dict) else found


def slow(folder):
    if (folder / "0.json").read_bytes() != ORIGINAL:
        time.sleep(1)
    return {}


def greedy(folder):
    if (folder / "0.json").read_bytes() != ORIGINAL:
        bytearray(2**28)
    return {}


def deadly(folder):
    if (folder / "0.json").read_bytes() != ORIGINAL:
        os.kill(os.getpid(), signal.SIGKILL)
    return {}


ORIGINAL = b'{"a": 1, "b": 2}'
TWICE, OTHER, LESS = b'{"a": 1, "b": 2, "a": 1.5}', b'{"a": 1, "b": 3}', b'{"a": 1, "c": 2}'


@pytest.mark.parametrize(
    "read, damaged, outcome",
    [
        (careless, TWICE, "silent"),
        (careless, OTHER, "harmless"),
        (careless, b"{", "crashed"),
        (lambda folder: {"a": careless(folder)["b"]}, OTHER, "silent"),  # b was damaged, and a read
        (forgetful, LESS, "harmless"),
        (slow, OTHER, "hung"),
        (greedy, OTHER, "memory"),
        (deadly, OTHER, "crashed"),
    ],
)
def test_the_campaign_sees(tmp_path, monkeypatch, read, damaged, outcome):
    monkeypatch.setattr(run, "SECONDS", 0.3)
    monkeypatch.setattr(run, "PATIENCE", 2)
    (tmp_path / "0.json").write_bytes(ORIGINAL)
    target = Target("example", tmp_path, ["0.json"], read, json_units(dict), [lambda data, rng: damaged])
    ((number, result),) = run.batch(target, 0, [0])
    assert (number, result[1]) == (0, outcome), result
    assert (tmp_path / "0.json").read_bytes() == ORIGINAL
