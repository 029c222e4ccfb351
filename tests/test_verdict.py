"""The verdict: both modes, errors planted, roundings let pass, runs and numbers that are missing."""

import json

import numpy as np
import pandas as pd
import pytest

from w2r2.cli import main
from w2r2.report.results import invented
from w2r2.report.verdict import report_verdict, write_verdict
from w2r2.report.verdict_cells import DIFFERENT, IDENTICAL, MISSING
from w2r2.report.verdict_statements import CHANGED

MACHINE = {"probes": {"sum": "1"}, "versions": {"torch": "2"}}
OTHER = {"probes": {"sum": "2"}, "versions": {"torch": "2"}}
REFERENCE = invented()
PLAIN = (REFERENCE.arm == "plain") & (REFERENCE["pass"] == "fused")


@pytest.fixture
def judge(tmp_path):
    "Judge results against REFERENCE, as made on the same machine or another one."

    def judged(results, same=False, reference=REFERENCE, claims=("consistent in print",) * 2, training=None):
        for name, frame, machine, claim in zip(
            ("committed", "here"), (reference, results), (MACHINE, MACHINE if same else OTHER), claims
        ):
            folder = tmp_path / name
            (folder / "tables" / "paper").mkdir(parents=True, exist_ok=True)
            frame.to_csv(folder / "results.csv", index=False)
            (folder / "machine.json").write_text(json.dumps(machine))
            pd.DataFrame({"id": ["seqvlm-overall"], "status": [claim]}).to_csv(
                folder / "tables/paper/claims.csv", index=False
            )
            pd.DataFrame({"arm": ["plain"], "seeds": [frame.seed.nunique()], "view": [frame.value.mean()]}).to_csv(
                folder / "tables/training.csv", index=False
            )
        return report_verdict(tmp_path / "here", tmp_path / "committed")

    judged.folder = tmp_path
    return judged


def shifted(rows, by):
    return REFERENCE.assign(value=REFERENCE.value + by * rows)


def other_seeds(number):
    "The numbers of seeds 0, 1, 2 under other names, every arm by itself: a correct machine."
    rng, moved = np.random.default_rng(number), REFERENCE.copy()
    for _, rows in REFERENCE[REFERENCE["pass"] != "floor"].groupby(["arm", "lam", "mu"], dropna=False):
        moved.loc[rows.index, "seed"] = (rows.seed + rng.integers(1, 3)) % 3
    return moved[moved.seed < 2]


def test_the_same_numbers_on_the_same_machine(judge):
    found = judge(REFERENCE.sample(frac=1, random_state=0), same=True)
    assert found.passed and found.mode == "identical" and not found.not_run
    assert set(found.cells.verdict) == {IDENTICAL}


def test_on_the_same_machine_a_rounding_is_an_error(judge):
    assert not judge(shifted(PLAIN, 1e-9), same=True).passed
    assert judge(shifted(PLAIN, 1e-9)).passed


def test_fewer_seeds_on_the_same_machine(judge):
    found = judge(REFERENCE[REFERENCE.seed == 0], same=True)
    assert found.passed and set(found.cells.verdict) == {IDENTICAL}
    assert found.not_run == (REFERENCE.seed > 0).sum()


@pytest.mark.parametrize("number", range(5))
def test_a_correct_machine_passes(judge, number):
    found = judge(other_seeds(number))
    assert found.passed and found.mode == "statements" and "sum of probes" in found.why
    assert not found.cells[found.cells.arm == "random box"].verdict.isin([DIFFERENT]).any()


@pytest.mark.parametrize(
    "rows, by",
    [
        (PLAIN & (REFERENCE.metric == "Acc@0.25"), -0.15),
        (REFERENCE.metric == "following slope", -0.8),  # the other sign
        (REFERENCE.arm == "random box", 0.05),
        (PLAIN & (REFERENCE.task == "training"), 0.03),
    ],
    ids=["accuracy", "swapped sign", "floor", "loss"],
)
def test_a_planted_error_fails(judge, rows, by):
    assert rows.any()
    found = judge(shifted(rows, by))
    assert not found.passed and DIFFERENT in set(found.cells.verdict)


def test_one_cell_of_a_trained_model_may_differ(judge):
    "A run can end in two ways; a floor cannot, and two cells are no accident."
    words = PLAIN & (REFERENCE.split == "test") & (REFERENCE.task == "scanqa")
    boxes = PLAIN & (REFERENCE.split == "test") & (REFERENCE.metric == "Acc@0.25")
    found = judge(shifted(words, -0.2))
    assert found.passed and (found.cells.verdict == DIFFERENT).sum() == 1
    assert not judge(shifted(words, -0.2), same=True).passed
    assert not judge(shifted(words | boxes, -0.2)).passed
    floor = judge(shifted((REFERENCE.arm == "random box") & (REFERENCE.metric == "Acc@0.25"), 0.05))
    assert not floor.passed and (floor.cells.verdict == DIFFERENT).sum() == 1


def test_a_small_error_on_every_split_is_seen_on_average(judge):
    found = judge(shifted(PLAIN & (REFERENCE.task == "scanrefer"), 0.03)).cells
    wrong = found[found.verdict == DIFFERENT]
    assert "every split" in set(wrong.split)


def test_one_answer_may_turn_where_all_seeds_agree(judge):
    alike = REFERENCE.assign(value=REFERENCE.value.where(REFERENCE["pass"] != "3d", 0.02))
    turned = (alike["pass"] == "3d") & (alike.task == "scanrefer") & (alike.arm == "plain")
    assert turned.any()
    assert judge(alike.assign(value=alike.value + turned / alike.n), reference=alike).passed
    assert not judge(alike.assign(value=alike.value + 20 * turned / alike.n), reference=alike).passed


def test_a_statement_that_turns_fails(judge):
    better = shifted((REFERENCE.arm == "intervention") & (REFERENCE["pass"] == "fused"), 0.2)
    found = judge(shifted((REFERENCE.arm == "intervention") & (REFERENCE["pass"] == "fused"), -0.2), reference=better)
    assert CHANGED in set(found.statements.verdict) and not found.passed
    claim = judge(REFERENCE, claims=("consistent in print", "contradicted by its own source"))
    assert not claim.passed
    assert claim.statements[claim.statements.verdict == CHANGED].statement.tolist() == ["claim seqvlm-overall"]


@pytest.mark.parametrize("same", [True, False])
def test_runs_that_were_not_made_and_numbers_that_are_lost(judge, same):
    assert judge(REFERENCE[REFERENCE.arm != "intervention"], same).passed
    lost = judge(REFERENCE.drop(REFERENCE.index[3]), same)
    assert not lost.passed and (lost.cells.verdict == MISSING).sum() >= 1
    nothing = judge(REFERENCE.assign(seed=REFERENCE.seed + 10), same)
    assert not nothing.passed and nothing.cells.empty


def test_the_page_and_the_exit_code(judge, capsys):
    found = judge(other_seeds(0))
    write_verdict(found, judge.folder / "here")
    page = (judge.folder / "here/verdict.md").read_text()
    assert "in mode `statements`" in page and "What moved most" in page and "0.025/" in page
    folders = ["verdict", str(judge.folder / "committed"), "--reports", str(judge.folder / "here")]
    assert main(folders) == 0
    judge(shifted(PLAIN, 0.5))
    assert main(folders) == 1
    assert "Failed" in capsys.readouterr().out
