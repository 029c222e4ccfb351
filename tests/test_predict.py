"""Decoding at size: 1,400 queries in few passes, and the same answers in batches as one scene at a time."""

import json

import numpy as np
import pytest
import torch

from w2r2.cli import main
from w2r2.model.backbone import build_tokenizer
from w2r2.model.examples import tiny_model
from w2r2.model.packing import Packer
from w2r2.rooms import release as rooms
from w2r2.study.predict import answer
from w2r2.tasks.answers import Bins

SCENES = 120


@pytest.fixture(scope="module")
def setting():
    """An untrained model of full size, and scenes with random features and as many descriptions as the validation split
    has."""
    records = json.loads(
        (rooms.RECIPES.parent / "samples" / "scanrefer" / "ScanRefer_filtered_samples.json").read_text()
    )
    bins = Bins(count=160, width=(0.055, 0.055, 0.0225, 0.015, 0.015, 0.015))
    tokenizer = build_tokenizer((record["description"] for record in records), bins)
    packer = Packer.of(tokenizer, bins)
    model = tiny_model(tokenizer, packer).eval()
    rng = np.random.default_rng(0)
    prompts = [tokenizer(record["description"])["input_ids"] for record in records]
    missing = torch.full((6,), torch.nan, dtype=torch.float64)
    scenes = []
    for _ in range(SCENES):
        chosen = rng.choice(len(prompts), rng.integers(10, 15), replace=False)
        queries = [
            {"task": 0, "prompt": prompts[i], "answer": None, "view": -1, "box": missing, "number": int(i)}
            for i in chosen
        ]
        scenes.append(
            {
                "f2d": torch.as_tensor(rng.standard_normal((288, 64)), dtype=torch.float32),
                "geometry": torch.as_tensor(rng.standard_normal((288, 16)), dtype=torch.float32),
                "poses": torch.eye(4, dtype=torch.float64).repeat(6, 1, 1),
                "visual_index": torch.as_tensor(np.sort(rng.permutation(288)[:96])),
                "queries": queries,
                "index": 0,
            }
        )
    return model, scenes, packer, tokenizer


def test_many_queries_share_a_pass(setting):
    "How long they take is measured in nbs/bench/decoding; here, that they are not asked one by one."
    model, scenes, packer, tokenizer = setting
    passes = []
    counted = model.vlm.model.language_model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    try:
        found = answer(model, scenes, packer, tokenizer)
    finally:
        counted.remove()
    assert len(found.texts) >= 1400 and np.isfinite(found.boxes).all()
    assert 20 * len(passes) <= len(found.texts)


def test_batches_and_order_change_nothing(setting):
    model, scenes, packer, tokenizer = setting
    together = answer(model, scenes[:24], packer, tokenizer)
    alone = [answer(model, [scene], packer, tokenizer) for scene in scenes[:24]]
    assert together.texts == [text for one in alone for text in one.texts]
    assert np.array_equal(together.boxes, np.concatenate([one.boxes for one in alone]))
    assert together.numbers.tolist() == [query["number"] for scene in scenes[:24] for query in scene["queries"]]
    assert len(set(together.texts)) > 20, "an untrained model should still not say the same to everything"


@pytest.mark.parametrize(
    "command",
    [
        ("ground", "scene9000_00", "the black couch", "a red armchair", "--refined"),
        ("ask", "scene9001_00", "how many chairs are there?", "what color is the door?"),
        ("describe", "scene9002_00", "--object", "8", "--object", "9"),
    ],
)
def test_the_model_that_comes_along_answers_in_json(command, capsys):
    assert main([*command, "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)
    assert len(answers) == 2
    for *_, said in map(dict.values, answers):
        assert len(said) == 6 and min(said[3:]) > 0 if command[0] == "ground" else said.strip()
