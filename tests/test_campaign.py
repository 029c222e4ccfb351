"A tenth of the campaign of `make campaign`, and that the campaign sees what it looks for."

import json
import os
import signal
import time
from pathlib import Path

import pytest
from campaign import faults, run
from campaign.targets import Target, json_units

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")


def test_a_tenth_of_the_campaign(tmp_path):
    table, failures = run.campaign(20_000, 0, tmp_path)
    assert not failures
    assert table.inputs.sum() >= 19_980 and table.harmless.sum() > 2000
    assert (table.refused[table.inputs >= 20] > 0).all()
    assert (table["slowest [s]"] < run.SECONDS).all()


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
    table, differing = faults.campaign(5, 4, 1, tmp_path)
    assert not differing and table.told.all() and not table.lost.any()
    assert {"killed", "error"} <= set(table.outcome)


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
