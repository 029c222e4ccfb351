"What the page `nbs/extend.ipynb` promises: own parts from outside the package, found by name."

import numpy as np
import pytest
import torch

from w2r2.method.objectives import READINGS, Reading, deter
from w2r2.method.trainer import W2R2Config
from w2r2.model.encoders import ENCODERS, encoder3d
from w2r2.model.features import tokenise
from w2r2.model.fusion import METHODS, Fusion
from w2r2.shipped import DATA
from w2r2.tasks.samples import DATASETS, read_samples


def test_a_reading(monkeypatch):
    with pytest.raises(ValueError, match="mine"):
        W2R2Config("out", reading="mine")
    monkeypatch.setitem(READINGS, "mine", Reading("s_S", "a test", lambda s, f, c, t, mu: (s, s > mu, {})))
    assert W2R2Config("out", reading="mine").reading == "mine" and callable(deter)


def test_a_fusion(monkeypatch):
    class Doubled(torch.nn.Module):
        def __init__(self, hidden):
            super().__init__()

        def forward(self, f2d, f3d, place, valid):
            return f2d + 2 * f3d

    with pytest.raises(ValueError, match="doubled"):
        Fusion(8, method="doubled")
    monkeypatch.setitem(METHODS, "doubled", Doubled)
    torch.manual_seed(0)
    fusion = Fusion(8, method="doubled")
    f2d, geometry = torch.randn(1, 5, 8), torch.randn(1, 5, 16)
    place, valid = torch.zeros(1, 5, 3), torch.ones(1, 5, dtype=bool)
    with torch.no_grad():
        alone, fused = (fusion(f2d, geometry, place, valid, torch.tensor([shortcut])) for shortcut in (True, False))
        lifted = fusion.project(geometry, torch.tensor([False]))
    assert torch.equal(alone, f2d) and torch.allclose(fused, f2d + 2 * lifted)


def test_an_encoder(monkeypatch):
    class Ones:
        dim = 1

        def __init__(self, grid, noise):
            self.count = grid[0] * grid[1]

        def __call__(self, views, seed=0):
            return torch.ones(len(views["poses"]) * self.count, 1)

    with pytest.raises(ValueError, match="ones"):
        encoder3d("ones")
    monkeypatch.setitem(ENCODERS, "ones", Ones)
    assert encoder3d("ones", grid=(2, 3), noise=0.0)({"poses": np.zeros((4, 4, 4))}).shape == (24, 1)


def test_a_dataset(monkeypatch):
    class Words:
        def __call__(self, texts, add_special_tokens):
            return {"input_ids": [[len(text)] for text in texts]}

    scenes = ["scene9000_00"]
    with pytest.raises(ValueError, match="shorter"):
        tokenise(DATA / "samples", "samples", scenes, Words(), dataset="shorter")
    monkeypatch.setitem(DATASETS, "shorter", lambda *given: read_samples(*given)[:5])
    assert len(tokenise(DATA / "samples", "samples", scenes, Words(), dataset="shorter")) == 5
