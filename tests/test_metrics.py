"""The protocols of ScanRefer, Scan2Cap and ScanQA against recorded figures of the published evaluators."""

import numpy as np
import pytest
from golden import golden

from w2r2.metrics import measures, scan2cap, scanqa, scanrefer
from w2r2.metrics.accuracy import unique_multiple
from w2r2.metrics.captions import NO_JAVA, has_java, ptb_tokenize
from w2r2.metrics.dense_captions import CAPTION_PROTOCOLS, benchmark_corpus, caption_corpus, object_key
from w2r2.metrics.exact_match import clean_answer, leo_match

needs_java = pytest.mark.skipif(not has_java(), reason=NO_JAVA)
CAPTION_NAMES = {"cider": "CIDEr", "rouge": "ROUGE-L", "meteor": "METEOR"}


def captions(scores):
    """Recorded caption scores under the project's names; METEOR only where Java can be asked."""
    figures = (
        {f"BLEU-{n + 1}": value for n, value in enumerate(scores["bleu"])}
        if isinstance(scores.get("bleu"), list)
        else {"BLEU-4": scores["bleu"]}
    )
    return figures | {
        name: scores[key] for key, name in CAPTION_NAMES.items() if key in scores and (key != "meteor" or has_java())
    }


def same(figures, expected, tolerance=1e-9):
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=0, abs=tolerance)


def test_scanrefer_accuracy():
    data = golden("scanrefer_acc")
    figures = scanrefer(data["pred"], data["gt"], "scanrefer")
    first, second = (
        {"unique": "unique", "multiple": "multiple", "overall": ""},
        {"in_others": "others", "not_in_others": "not others", "overall": ""},
    )
    for key, value in data["report"]["scores"].items():
        subset, others, accuracy = key.split("|")
        name = ", ".join(filter(None, (first[subset], second[others])))
        assert figures[f"{accuracy.capitalize().removesuffix('iou')} {name}".strip()] == value
    counts = {m.name: m.n for m in measures("scanrefer", data["pred"], data["gt"], "scanrefer")}
    assert counts["Acc@0.25"] == 600 and counts["Acc@0.25 unique"] == data["report"]["counts"]["unique|overall"]


def test_unique_multiple():
    data = golden("unique_multiple")
    labels = data["nyu40_map"]
    assert [row["unique_multiple"] for row in unique_multiple(data["annotations"], labels, "scanrefer")] == data[
        "scanrefer_0unique_1multiple"
    ]
    ours = [
        ("unique", "multiple")[row["unique_multiple"]]
        for row in unique_multiple(data["annotations"], labels, "video3dllm")
    ]
    assert ours == data["video3dllm_eval_type"]
    names = list(data["raw2label18"])
    one_each = [{"scene_id": name, "object_id": "0", "object_name": name.replace(" ", "_")} for name in names]
    assert [row["others"] for row in unique_multiple(one_each, labels)] == [
        int(data["raw2label18"][name] == 17) for name in names
    ]


@pytest.mark.parametrize("k", ["0.25", "0.5"])
def test_scan2cap_original(k):
    data = golden("scan2cap_orig")
    same(
        scan2cap(data["predictions"], data["annotations"], float(k), "scan2cap", with_meteor=has_java()),
        captions(data["scores"][k]),
    )
    references, _ = caption_corpus(data["predictions"], data["annotations"], float(k), "scan2cap")
    assert references == data["corpus"]


@pytest.mark.parametrize("k", ["0", "0.25", "0.5"])
def test_scan2cap_benchmark(k):
    data = golden("scan2cap_bench")
    references, candidates, iou = benchmark_corpus(data["pred"], data["gt"])
    assert {key: candidate[0] for key, candidate in candidates.items()} == {
        key: row["caption"] for key, row in data["assigned"].items()
    }
    np.testing.assert_allclose(iou, [data["assigned"][key]["iou"] for key in references], rtol=0, atol=1e-6)
    figures = scan2cap(data["pred"], data["gt"], float(k), "scan2cap_benchmark", with_meteor=has_java())
    for kind, short in (("precision", "precision"), ("recall", "recall"), ("f1-score", "F1")):
        same(figures, {f"{short} {name}": value for name, value in captions(data["results"][k][kind]).items()}, 1e-6)


@pytest.fixture(scope="module")
def peers():
    data = golden("peers")
    annotations = []
    for item in data["items"]:
        scene, number, name = item["key"].split("|")
        annotations += [
            {
                "scene_id": scene,
                "object_id": number,
                "object_name": name,
                "description": text,
                "token": tokens.split()[1:-1],
            }
            for text, tokens in zip(item["annotations"], data["leo_corpus"][item["key"]])
        ]
    return data, annotations, {item["key"]: {"caption": item["pred"], "iou": item["iou"]} for item in data["items"]}


def test_peers_captions(peers):
    data, annotations, predictions = peers
    assert [object_key(record) for record in annotations[:1]] == list(predictions)[:1]
    same(scan2cap(predictions, annotations, 0.5, "video3dllm", has_java()), captions(data["video3dllm_percent"]))
    same(scan2cap(predictions, annotations, 0.5, "leo", has_java()), captions(data["leo"]))
    vgllm = scan2cap(predictions, annotations, 0.5, "vgllm", has_java())
    assert vgllm["CIDEr"] == pytest.approx(data["vgllm"]["cider"], abs=1e-9)
    table = data["vgllm"]["table_2dp"]
    same(
        {name: round(value, 2) for name, value in vgllm.items() if value is not None},
        captions({**table, "bleu": table["bleu-4"]}),
    )
    references, candidates = caption_corpus(predictions, annotations, 0.5, "leo")
    assert references == data["leo_corpus"] and candidates == data["leo_pred_strings"]


def test_leo_scores_only_what_was_predicted(peers):
    _, annotations, predictions = peers
    some = dict(list(predictions.items())[:20])
    assert len(caption_corpus(some, annotations, 0.5, "leo")[0]) == 20
    assert len(caption_corpus(some, annotations, 0.5, "ll3da")[0]) == 60


def test_ll3da_is_the_original_with_single_blanks(peers):
    _, annotations, predictions = peers
    references, candidates = caption_corpus(predictions, annotations, 0.5, "ll3da")
    assert references == caption_corpus(predictions, annotations, 0.5, "scan2cap")[0]
    assert all("  " not in candidate for (candidate,) in candidates.values()) and CAPTION_PROTOCOLS["ll3da"].strict


@needs_java
def test_scanqa_official():
    data = golden("scanqa_official")
    figures = scanqa(data["pred"], data["gold"], "scanqa", with_meteor=True)
    assert [figures["EM@1"], figures["EM@10"]] == [data["percent"]["Top1 (EM)"], data["percent"]["Top10 (EM)"]]
    names = {f"Bleu_{n}": f"BLEU-{n}" for n in "1234"} | {"METEOR": "METEOR", "ROUGE_L": "ROUGE-L", "CIDEr": "CIDEr"}
    same(figures, {names[key]: value for key, value in data["ptb_percent"].items()})


def test_scanqa_without_java(monkeypatch):
    monkeypatch.setenv("PATH", "")
    data = golden("scanqa_official")
    rows = {m.name: m for m in measures("scanqa", data["pred"], data["gold"], "scanqa", with_meteor=True)}
    assert rows["EM@1"].figure == data["percent"]["Top1 (EM)"] and rows["EM@10"].figure == data["percent"]["Top10 (EM)"]
    assert ptb_tokenize({}) is None
    assert all(
        rows[name].figure is None and rows[name].note == NO_JAVA for name in ("BLEU-4", "CIDEr", "ROUGE-L", "METEOR")
    )


def test_scanqa_peers():
    data = golden("scanqa_peers")
    predictions = [
        {"question_id": record["question_id"], "answer": text} for record, text in zip(data["gold"], data["text"])
    ]
    video3dllm = scanqa(predictions, data["gold"], "video3dllm", with_meteor=has_java())
    same(video3dllm, captions(data["video3dllm"]))
    assert video3dllm["EM"] == data["video3dllm"]["em"]
    leo = scanqa(predictions, data["gold"], "leo")
    same(leo, captions(data["leo"]))
    assert (leo["EM"], leo["refined EM"]) == (data["leo"]["em"], data["leo"]["em_refined"])
    exact, refined = (m.values for m in measures("scanqa", predictions, data["gold"], "leo")[:2])
    assert np.column_stack([exact, refined]).tolist() == data["leo"]["per_item_em_refined"]
    for case in data["leo_edge_cases"]:
        assert (
            list(leo_match(clean_answer(case["pred"]), [clean_answer(answer) for answer in case["answers"]]))
            == case["em_refined"]
        )


def test_clean_answer():
    for row in golden("normalise")["table"]:
        assert clean_answer(row["in"]) == row["leo_clean_answer"] == row["video3dllm_sqa_clean_answer"]
