"""Caption scores against the published scorers: recorded figures, and the COCO code itself on random corpora."""

import numpy as np
import pytest
from golden import golden
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from w2r2.metrics.captions import (
    NO_JAVA,
    NGrams,
    bleu_score,
    bleu_sums,
    caption_scores,
    cider,
    has_java,
    meteor,
    ptb_tokenize,
    rouge_l,
)

CASES = golden("raw_scorers")["cases"]
needs_java = pytest.mark.skipif(not has_java(), reason=NO_JAVA)


@pytest.mark.parametrize("case", CASES)
def test_raw_scorers(case):
    references, candidates, expected = (CASES[case][key] for key in ("gts", "res", "scores"))
    figures = caption_scores(references, candidates)
    assert [figures[f"BLEU-{n}"] for n in "1234"] == pytest.approx(expected["bleu"], abs=1e-9)
    assert figures["CIDEr"] == pytest.approx(expected["cider"], abs=1e-9)
    assert figures["ROUGE-L"] == pytest.approx(expected["rouge"], abs=1e-9)
    grams = NGrams.count(references, candidates)
    np.testing.assert_allclose(bleu_score(bleu_sums(grams)).T, expected["per_item"]["bleu"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(cider(grams), expected["per_item"]["cider"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(rouge_l(references, candidates), expected["per_item"]["rouge"], rtol=0, atol=1e-9)


@needs_java
@pytest.mark.parametrize("case", CASES)
def test_meteor(case):
    references, candidates, expected = (CASES[case][key] for key in ("gts", "res", "scores"))
    corpus, items = meteor(references, candidates)
    assert corpus == expected["meteor"]
    assert items.tolist() == expected["per_item"]["meteor"]


@pytest.mark.parametrize("seed", range(30))
def test_random_corpora(seed):
    """Empty texts, single tokens, repeated n-grams, white space of all kinds, any size of vocabulary."""
    rng = np.random.default_rng(seed)
    words = [f"w{i}" for i in range(rng.integers(1, 40))] + ["é", "\u00a0x", "a\tb", "{}"]

    def text():
        return rng.choice([" ", "  ", " \n "], p=[0.8, 0.15, 0.05]).join(rng.choice(words, rng.integers(0, 25)))

    references = {i: [text() for _ in range(rng.integers(1, 6))] for i in range(rng.integers(1, 40))}
    candidates = {i: [text() if rng.random() < 0.5 else references[i][-1][:-3]] for i in reversed(references)}
    grams = NGrams.count(references, candidates)
    corpus, items = Bleu(4).compute_score(references, candidates, verbose=0)
    np.testing.assert_allclose(bleu_score(bleu_sums(grams).sum(0)), corpus, rtol=0, atol=1e-9)
    np.testing.assert_allclose(bleu_score(bleu_sums(grams)).T, items, rtol=0, atol=1e-9)
    np.testing.assert_allclose(cider(grams), Cider().compute_score(references, candidates)[1], rtol=0, atol=1e-9)
    np.testing.assert_allclose(
        rouge_l(references, candidates), Rouge().compute_score(references, candidates)[1], rtol=0, atol=1e-9
    )


@needs_java
def test_ptb_tokens():
    pairs = golden("scanqa_official")["ptb_tokens"]
    assert ptb_tokenize({"x": [text for text, _ in pairs]})["x"] == [tokens for _, tokens in pairs]


def test_without_java(monkeypatch):
    monkeypatch.setenv("PATH", "")
    case = CASES["random60"]
    assert ptb_tokenize({"x": ["a"]}) is None
    figures = caption_scores(case["gts"], case["res"], with_meteor=True)
    assert figures["METEOR"] is None and figures["CIDEr"] > 0
