"Stores that are not what was written: views, features, queries, candidates, proposals. One error, naming the stage."

import shutil
from pathlib import Path

import numpy as np
import pytest
import training

from w2r2.model.features import Features, Queries
from w2r2.scans.files import ScanNetError
from w2r2.scans.prepared import Prepared, prepare
from w2r2.study.truth import propose_all, read_proposed
from w2r2.study.watch import gather_candidates
from w2r2.tasks.candidates import Candidates


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A folder of each store, as the pipeline makes them."
    path = tmp_path_factory.mktemp("stores")
    training.prepare(path)
    views = Prepared.open(path / "views")
    gather_candidates("true", training.SAMPLES, views, path / "candidates_true.npz")
    propose_all(views, path / "proposals" / "samples.json")
    return path


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def one_row_fewer(path):
    np.save(path, np.load(path)[:-1])


def other_numbers(path):
    array = np.load(path)
    np.save(path, array + 1)


OPENED = {
    "views": (lambda folder: Prepared.open(folder / "views"), "dvc repro prepare"),
    "features": (lambda folder: Features.open(folder / "features"), "dvc repro encode"),
    "queries": (lambda folder: Queries.open(folder / "features"), "dvc repro encode"),
    "candidates": (lambda folder: Candidates.open(folder / "candidates_true.npz"), "gather_candidates"),
    "proposals": (
        lambda folder: read_proposed(folder / "proposals/samples.json", Features.open(folder / "features").made_from),
        "dvc repro evaluate",
    ),
}


@pytest.mark.parametrize(
    "store, name, damage",
    [
        *(("views", f"views/{name}.npy", cut) for name in ("color", "depth", "poses", "frames")),
        *(("views", f"views/{name}.npy", one_row_fewer) for name in ("boxes", "objects", "poses")),
        *(("views", f"views/{name}.npy", other_numbers) for name in ("color", "depth", "intrinsic_depth")),
        *(("features", f"features/{name}.npy", cut) for name in ("f2d", "geometry_0", "visual_index", "poses")),
        *(
            ("features", f"features/{name}.npy", one_row_fewer)
            for name in ("f2d", "geometry_0", "visual_index", "poses")
        ),
        *(
            ("features", f"features/{name}.npy", other_numbers)
            for name in ("f2d", "geometry_0", "visual_index", "poses")
        ),
        ("features", "features/scenes.json", lambda path: path.write_text('["scene9000_00"]')),
        ("features", "features/manifest.json", cut),
        ("queries", "features/queries.npz", cut),
        ("queries", "features/queries.npz", Path.unlink),
        (
            "queries",
            "features/queries.json",
            lambda path: path.write_text(path.read_text().replace("scene9000", "scene9009")),
        ),
        ("candidates", "candidates_true.npz", cut),
        ("candidates", "candidates_true.npz", lambda path: np.savez(path, boxes=np.zeros((4, 6)))),
        ("proposals", "proposals/samples.json", cut),
        ("proposals", "proposals/samples.json", lambda path: path.write_text("{}")),
    ],
)
def test_a_store_that_is_not_as_it_was_written_is_refused(made, tmp_path, store, name, damage):
    folder = Path(shutil.copytree(made, tmp_path / "made"))
    read, remedy = OPENED[store]
    read(folder)
    damage(folder / name)
    with pytest.raises((ScanNetError, FileNotFoundError), match=remedy):
        read(folder)


def test_what_is_left_over_from_other_dials_is_refused(made, tmp_path):
    folder = Path(shutil.copytree(made, tmp_path / "made"))
    shutil.copy(
        folder / "features/geometry_0.npy", folder / "features/geometry_0.15.npy"
    )  # an earlier run had this level
    with pytest.raises(FileNotFoundError, match="dvc repro encode"):
        Features.open(folder / "features", 0.15)
    names = Prepared.open(folder / "views").scenes
    views = prepare(training.SAMPLES, names, folder / "views", 4, (112, 84), (80, 60))
    with pytest.raises(ScanNetError, match="other views.*dvc repro encode"):
        Features.open(folder / "features", prepared=views)
    propose_all(views, folder / "proposals" / "samples.json")
    with pytest.raises(ScanNetError, match="other views.*dvc repro evaluate"):
        OPENED["proposals"][0](folder)


def test_a_store_that_cannot_be_finished_leaves_the_one_before(made, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(made / "views", tmp_path / "views"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        prepare(training.SAMPLES, ["scene9000_00"], folder, 6, (112, 84), (80, 60))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
