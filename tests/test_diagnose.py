"""The diagnoses on recorded scenes, with what the small worlds of the notebook do not have: several views, missing
views, scenes asked in parts, other tasks."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from w2r2.model.backbone import build_tokenizer
from w2r2.model.encoders import Pointmap
from w2r2.model.examples import tiny_model
from w2r2.model.packing import Packer
from w2r2.model.scenes import Collator
from w2r2.rooms.release import RECIPES
from w2r2.scans.prepared import prepare_scan
from w2r2.scans.scan import Scan
from w2r2.study.diagnose import (
    attention_figure,
    attention_maps,
    displacements,
    following_slope,
    mirror_test,
    mirrored,
    passes,
)
from w2r2.study.latent import latent_geometry, token_states, tsne
from w2r2.tasks.answers import Bins

SAMPLES = RECIPES.parent / "samples"
NAMES = "scene9000_00", "scene9001_00", "scene9002_00"
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def world():
    """An untrained model, its packer and tokenizer, three recorded scenes with five queries of the first and third
    task, and their views."""
    tokenizer = build_tokenizer(["the chair", "the table"])
    packer = Packer.of(tokenizer, Bins())
    model = tiny_model(tokenizer, packer).eval()
    scenes, pictures = [], []
    for index, name in enumerate(NAMES):
        views = prepare_scan(SAMPLES, name, 6, (112, 84), (80, 60))
        with Scan(SAMPLES, name) as scan:
            boxes = scan.boxes[-4:]
        queries = [
            {
                "task": 0,
                "prompt": tokenizer("the chair")["input_ids"],
                "answer": None,
                "view": number,
                "box": torch.tensor(box),
                "number": 10 * index + number,
            }
            for number, box in enumerate(boxes)
        ]
        queries.insert(
            2,
            {
                "task": 2,
                "prompt": tokenizer("the table")["input_ids"],
                "answer": None,
                "view": -1,
                "box": torch.full((6,), torch.nan).double(),
                "number": 10 * index + 9,
            },
        )
        scenes.append(
            {
                "f2d": model.encode_images(views["color"]),
                "geometry": Pointmap()(views),
                "poses": torch.as_tensor(views["poses"]),
                "visual_index": torch.arange(index, 288, 3),
                "queries": queries,
                "index": index,
            }
        )
        pictures.append(views)
    return model, scenes, (packer, tokenizer), pictures


def test_only_boxes_are_diagnosed(world):
    model, scenes, given, _ = world
    moved = displacements(model, scenes, *given)
    assert (
        len(moved) == 3 * 4 * 4 * 3 and 9 not in set(moved["number"] % 10) and np.isfinite(moved["displacement"]).all()
    )
    table = passes(model, scenes, *given)
    assert (table["n"] == 12).all() and table["value"].between(0, 1).all()


def test_a_scene_asked_in_parts_is_one_scene(world):
    "Batches may hold a scene several times; the interval is over scenes all the same."
    model, scenes, given, _ = world
    parts = [scene | {"queries": scene["queries"][part]} for scene in scenes for part in (slice(0, 2), slice(2, 5))]
    assert np.allclose(following_slope(model, parts, *given), following_slope(model, scenes, *given))
    whole, split = (mirror_test(model, list_, *given) for list_ in (scenes, parts))
    assert all(np.allclose(whole[name], split[name]) for name in whole)


def test_another_order_changes_nothing(world):
    model, scenes, given, _ = world
    assert np.allclose(following_slope(model, scenes[::-1], *given)[0], following_slope(model, scenes, *given)[0])
    assert np.allclose(
        following_slope(model, scenes, *given, batch_size=1), following_slope(model, scenes, *given, batch_size=3)
    )


def test_missing_view(world):
    "A recording of five frames: its sixth view has no pose, no geometry and no visual token."
    model, scenes, given, _ = world
    scene = scenes[0] | {
        "poses": scenes[0]["poses"].clone(),
        "geometry": scenes[0]["geometry"].clone(),
        "visual_index": torch.arange(0, 240, 2),
    }
    scene["poses"][5], scene["geometry"][240:, :15] = torch.nan, torch.nan
    assert np.isfinite(displacements(model, [scene, scenes[1]], *given)["displacement"]).all()
    assert all(np.isfinite(interval).all() for interval in mirror_test(model, [scene, scenes[1]], *given).values())


def test_a_model_blind_for_geometry_neither_follows_nor_moves(world):
    model, scenes, given, _ = world
    assert (displacements(model, scenes, *given, blind="3d")["displacement"] == 0).all()


def test_mirror_moves_features_within_their_row(world):
    _, scenes, (packer, _), _ = world
    rows, columns = packer.grid
    mirror = mirrored(scenes[1], columns)
    assert torch.equal(mirror["f2d"], scenes[1]["f2d"].reshape(6, rows, columns, -1).flip(2).reshape(288, -1))
    kept = torch.zeros(288, dtype=torch.bool)
    kept[scenes[1]["visual_index"]] = True
    assert torch.equal(kept.reshape(-1, columns).flip(1).flatten().nonzero()[:, 0], mirror["visual_index"])


def test_attention_over_recorded_views(world):
    model, scenes, (packer, _), pictures = world
    maps = attention_maps(model, scenes[2], packer)
    assert all(
        values.shape == (4, 6, 6, 8) and np.allclose(np.nanmean(values, (1, 2, 3)), 1, atol=1e-5)
        for values in maps.values()
    )
    assert torch.equal(
        torch.as_tensor(np.isfinite(maps["fused"][0])).flatten().nonzero()[:, 0], scenes[2]["visual_index"]
    )
    views = pictures[2]
    figure = attention_figure(
        {name: values[1] for name, values in maps.items()},
        views["color"],
        views["poses"],
        views["intrinsic_color"],
        scenes[2]["queries"][1]["box"].numpy(),
        "chair",
    )
    assert len(figure.axes) == 12 and figure.axes[0].get_title().startswith("fused, view 0")


def test_latent_states_do_not_depend_on_batches_or_queries(world):
    model, scenes, (packer, _), _ = world
    collate = Collator(packer)
    seen = token_states(model, [collate(scenes)])
    alone = token_states(model, (packer([scene | {"queries": []}]) for scene in scenes))
    assert seen.layers == ["Phi", "1", "2", "3"] and torch.equal(seen.scene, alone.scene)
    assert all(torch.allclose(seen.states[name], alone.states[name], atol=1e-5) for name in seen.states)
    table = latent_geometry(seen, tokens=100)
    assert np.isfinite(table.drop(columns=["layer", "pair"])).all(axis=None) and len(table) == 12
    assert tsne(seen, tokens=50).equals(tsne(seen, tokens=50)) and not tsne(seen, tokens=50, seed=1).equals(
        tsne(seen, tokens=50)
    )


def test_text_around_the_visual_tokens(world):
    "The cut between prefix and queries is not a count of visual tokens."
    model, scenes, (packer, tokenizer), _ = world
    wrapped = replace(
        packer,
        before=tokenizer.convert_tokens_to_ids(["<vision_start>"]),
        after=tokenizer.convert_tokens_to_ids(["<vision_end>"]),
    )
    seen = token_states(model, [Collator(wrapped)(scenes)])
    assert (
        seen.states["fused"].shape == (4, 288, 64)
        and np.isfinite(attention_maps(model, scenes[0], wrapped)["fused"]).sum() == 4 * 96
    )
