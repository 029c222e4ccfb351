"""Boxes in coordinate bins at full size: a host whose tokenizer gets the bins, trained and asked by the documented
commands."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_full_size import ROOT, changes
from torch.nn import functional
from transformers import AutoModelForImageTextToText

import w2r2.tasks.messages as messages
from w2r2.cli import main
from w2r2.method.conversation_trainer import ConversationTrainer, answer_boxes, answer_similarity
from w2r2.method.trainer import W2R2Config
from w2r2.model.answer_tokens import bin_ids
from w2r2.model.conversations import ConversationCollator, Conversations, tokenise_chat
from w2r2.model.hosts import TINY_HOSTS, add_adapters, build_host, read_host, save_host, write_tiny_host
from w2r2.model.vgllm import VGLLM
from w2r2.scans.geometry import box_iou_soft
from w2r2.scans.scan import Scan
from w2r2.study.full_settings import read_full_settings
from w2r2.study.full_training import finetune_host, finished_run, host_arguments
from w2r2.study.host_answers import aligned_box, said_box
from w2r2.systems.fused_systems import FusedSystem
from w2r2.tasks.answers import SCAN_BINS, Bins, bins_from
from w2r2.tasks.messages import answer_format, build_records
from w2r2.tasks.samples import read_scanrefer

RELEASE = ROOT / "data/samples"
BINS = {"views": 2, **SCAN_BINS}
DESCRIBED = read_scanrefer(RELEASE / "scanrefer/ScanRefer_filtered_samples.json", ["scene9000_00"])[0]


def untie(folder: Path):
    "Make a tiny VLM one with two matrices of embeddings, as Qwen2.5-VL-7B has."
    vlm = AutoModelForImageTextToText.from_pretrained(folder)
    vlm.config.tie_word_embeddings = False
    torch.manual_seed(0)
    type(vlm)(vlm.config).save_pretrained(folder)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bins")
    for kind in TINY_HOSTS:
        write_tiny_host(folder / kind, kind)
    write_tiny_host(folder / "untied", "qwen2_5_vl")
    untie(folder / "untied")
    return folder


def made_from(folder: Path) -> dict:
    sizes = dict(views=2, frame_width=112, merger_hidden=24)
    return dict(backbone=str(folder), weights3d=str(folder / "vggt"), bins=BINS, **sizes)


@pytest.mark.parametrize("kind", TINY_HOSTS)
def test_a_box_comes_back_from_the_tokenizer_of_a_host(hosts, kind):
    model, tokenizer = build_host(**made_from(hosts / kind))
    assert bins_from(model.config.bins) == Bins(**BINS)
    taught, _ = build_records("scanrefer", DESCRIBED, RELEASE, frames=2, answers="bins")
    asked, _ = build_records("scanrefer", DESCRIBED, RELEASE, frames=2, answers="bins", train=False)
    asked = {record["id"]: record for record in asked}
    for record in taught[:5]:
        _, said, _ = tokenise_chat(record, tokenizer, [2, 2])
        assert len(said) == 8  # seven tokens and the end
        box = aligned_box(said_box(tokenizer.decode(said, skip_special_tokens=True), asked[record["id"]]))
        assert np.abs(box - record["gt_bbox"][:6]).max() < 0.036


@pytest.mark.parametrize("reading", ["direct", "reward"])
def test_s_and_the_reward_are_the_overlap_of_the_expected_box(hosts, reading, tmp_path):
    model, tokenizer = build_host(**made_from(hosts / "qwen3_vl"))
    record = build_records("scanrefer", DESCRIBED, RELEASE, frames=2, answers="bins")[0][0]
    data, collate = Conversations([record], RELEASE, tokenizer, model.config.vlm_config, 112), ConversationCollator(0)
    batch = collate([data[0]])
    said = batch["labels"][batch["labels"] >= 0]
    sure = (100 * functional.one_hot(said, model.config.text_config.vocab_size).float()).requires_grad_()
    with Scan(RELEASE, record["metadata"]["scene_id"]) as scan:
        poses = scan.axis_alignment @ scan.frames.poses[record["metadata"]["positions"]]
    by_hand = answer_format(record).parse(record["conversations"][1]["value"], poses)[0]
    truth = torch.tensor([record["gt_bbox"][:6]])
    overlap = box_iou_soft(torch.tensor(by_hand)[None].float(), truth)
    assert torch.allclose(answer_similarity(sure, batch), overlap, atol=1e-4) and 0.5 < overlap < 1

    args = W2R2Config(str(tmp_path), reading=reading, mu=0.0, use_cpu=True, report_to=[])
    trainer = ConversationTrainer(model, args, data, collate)
    unsure = (sure.detach() / 20).requires_grad_()
    value, _ = trainer._beside(unsure, unsure if reading == "direct" else None, batch)
    expected = box_iou_soft(answer_boxes(unsure, batch), truth)
    assert torch.allclose(value, expected if reading == "direct" else 1 - expected)
    (gradient,) = torch.autograd.grad(value.sum(), unsure)
    moved = gradient.abs().sum(1) > 0
    assert moved[1:7].all() and not moved[[0, 7]].any()  # every coordinate, not the view and not the end
    assert set(gradient.nonzero()[:, 1].tolist()) <= set(bin_ids(model, tokenizer)[2:])


def test_numbers_out_of_range_are_counted_and_told(hosts, monkeypatch, capsys):
    short = SCAN_BINS | {"low": (-0.5, -0.5, -0.5, 0.0, 0.0, 0.0), "width": 6 * (1 / 256,)}
    monkeypatch.setattr(messages, "SCAN_BINS", short)
    given = changes(hosts, "any", f"records.folder={hosts / 'short'}", "records.answers=bins", "records.limit=8")
    assert main(["records", *given]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "out of range" in line]
    records = json.loads((hosts / "short/vgllm/scanrefer_train.json").read_text())
    outside = sum(record["target"]["out_of_range"] for record in records)
    assert len(told) == 1 and f"{outside} numbers out of range" in told[0] and outside > 8
    for record in records:  # they are at the ends of the range
        assert sum(bin in (0, 255) for bin in record["target"]["bins"]) >= record["target"]["out_of_range"]


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "untied"])
def test_adapters_train_the_rows_of_the_bins(hosts, kind):
    model, tokenizer = build_host(**made_from(hosts / kind))
    before, rows = {name: value.clone() for name, value in model.state_dict().items()}, bin_ids(model, tokenizer)
    adapted = add_adapters(model, rank=2, rows=rows)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, std=0.05)
    folder = hosts / f"{kind} adapters"
    save_host(adapted, tokenizer, folder, made_from(hosts / kind))
    read, _ = read_host(folder)
    data = Conversations(
        build_records("scanrefer", DESCRIBED[:1], RELEASE, frames=2, answers="bins")[0],
        RELEASE,
        tokenizer,
        model.config.vlm_config,
        112,
    )
    batch = ConversationCollator(0)([data[0]])
    given = {name: batch[name] for name in ("input_ids", "pixel_values", "image_grid_thw", "images_3d")}
    adapted.eval()
    with torch.no_grad():
        assert torch.allclose(adapted(**given).logits, read(**given).logits, atol=1e-4)
    for name in ("vlm.model.language_model.embed_tokens.weight", "vlm.lm_head.weight"):
        moved = (read.state_dict()[name] != before[name]).any(1).nonzero()[:, 0].tolist()
        assert moved == rows  # and no other word
    adapted(**given).logits[0, -8, rows[2]].backward()
    deltas = {name: value.grad for name, value in adapted.named_parameters() if "trainable_tokens" in name}
    assert len(deltas) == (1 if kind == "qwen2_5_vl" else 2) and all(grad.abs().sum() > 0 for grad in deltas.values())


def dials(hosts: Path, host: str, name: str, *more: str) -> list[str]:
    own = [f"model.backbone={hosts / host}", f"model.weights3d={hosts / host / 'vggt'}", "records.answers=bins"]
    own += [f"records.folder={hosts / 'records'}", "records.tasks=[scanrefer]", "records.sampling=uniform"]
    own += ["train.max_steps=10", "train.gradient_accumulation_steps=1", "train.gradient_checkpointing=false"]
    return changes(hosts, name, *own, "train.learning_rate=0.02", *more)


def test_a_host_learns_a_box_in_bins_and_says_it_by_the_documented_commands(hosts, capsys):
    given = dials(hosts, "qwen2_5_vl", "run", "train.reading=none", "train.max_steps=30")
    assert main(["records", *given]) == 0 and main(["finetune", *given]) == 0
    model, tokenizer = read_host(hosts / "run/model")
    assert isinstance(model, VGLLM) and bins_from(model.config.bins) == Bins(**BINS)
    assert tokenizer.decode(tokenizer("<view_1><x_255>")["input_ids"]) == "<view_1><x_255>"
    capsys.readouterr()
    assert main(["evaluate", *given, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["scanrefer"]["rows"]
    assert {row["name"]: row["value"] for row in rows}["Acc@0.5"] == 1  # learned by heart
    record = json.loads((hosts / "records/vgllm/scanrefer_val.json").read_text())[0]
    scene, text, model = record["metadata"]["scene_id"], record["prompt"], str(hosts / "run/model")
    assert main(["ground", scene, text, "--root", str(RELEASE), "--model", model, "--json"]) == 0
    box = json.loads(capsys.readouterr().out)[0]["box"]
    assert np.abs(np.array(box) - record["gt_bbox"][:6]).max() < 0.036
    with Scan(RELEASE, scene) as scan:
        assert np.allclose(FusedSystem(model).ground(scan, [text])[0].box, box, atol=1e-3)
    # records in JSON for a model that says bins, and the other way round
    json_records = [f"records.folder={hosts / 'json'}", "records.answers=json"]
    assert main(["records", *dials(hosts, "qwen2_5_vl", "run", *json_records)]) == 0
    assert main(["evaluate", *dials(hosts, "qwen2_5_vl", "run", *json_records)]) == 2
    assert "the model says coordinate bins" in capsys.readouterr().err
    assert main(["finetune", *dials(hosts, "qwen2_5_vl", "other", json_records[0])]) == 2
    assert "asks for nine numbers in JSON" in capsys.readouterr().err


def test_ten_steps_with_adapters_and_a_stopped_run_that_goes_on(hosts):
    class PowerCut(Exception):
        pass

    def cut(done, steps):
        if done == 6:
            raise PowerCut

    ends = []
    for name in ("whole", "stopped"):
        given = dials(hosts, "qwen3_vl", name, "model.lora={rank: 4, alpha: 8, dropout: 0}", "train.save_steps=4")
        settings = read_full_settings(given[1], given[3::2])
        assert main(["records", *given]) == 0
        if name == "stopped":
            with pytest.raises(PowerCut):
                finetune_host(settings, cut)
        log = finetune_host(settings)
        assert len(log) == 10 and log[-1]["align"] < log[0]["align"] and 0 <= log[0]["shortcut_similarity"] <= 1
        assert finetune_host(settings) == finished_run(hosts / name) == log
        ends.append((log, read_host(hosts / name / "model")[0]))
    assert ends[0][0] == ends[1][0]
    other = ends[1][1].state_dict()
    assert all(torch.equal(value, other[name]) for name, value in ends[0][1].state_dict().items())
    before, tokenizer = build_host(**host_arguments(settings))
    moved = ends[0][1].get_input_embeddings().weight != before.get_input_embeddings().weight
    assert set(moved.any(1).nonzero()[:, 0].tolist()) == set(bin_ids(before, tokenizer))


def test_adapters_with_bins_are_not_shared_by_fsdp(hosts, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    given = dials(hosts, "qwen3_vl", "shared", "model.lora={rank: 4, alpha: 8, dropout: 0}")
    assert main(["finetune", *given]) == 2
    assert "FSDP cannot share" in capsys.readouterr().err and not (hosts / "shared").exists()


def test_a_wrong_setting_is_one_line(hosts, capsys):
    assert main(["records", *dials(hosts, "qwen3_vl", "wrong", "records.answers=yaml")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "records.answers" in error and "json" in error
