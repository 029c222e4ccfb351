"""Several queries behind one copy of their frames, in a real VLM at tiny size: a training step is that of the same
records one by one, and answers are those of each question alone."""

from pathlib import Path

import pytest
import torch

from w2r2.method.conversation_trainer import ConversationTrainer
from w2r2.method.trainer import W2R2Config
from w2r2.model.conversations import ConversationCollator, Conversations
from w2r2.model.hosts import TINY_HOSTS, add_adapters, build_host, write_tiny_host
from w2r2.model.shared_frames import SHARED, SharedCollator, SharedConversations
from w2r2.study.host_answers import answer_records
from w2r2.tasks.messages import build_records
from w2r2.tasks.samples import read_scanqa, read_scanrefer

ROOT = Path(__file__).parents[1] / "data/samples"
SCENES = ["scene9000_00", "scene9001_00"]


@pytest.fixture(scope="module")
def rows():
    return {
        "scanrefer": read_scanrefer(ROOT / "scanrefer/ScanRefer_filtered_samples.json", SCENES)[0],
        "scanqa": read_scanqa(ROOT / "scanqa/ScanQA_v1.0_samples.json", SCENES)[0],
    }


@pytest.fixture(scope="module")
def records(rows):
    "Descriptions of two scenes, and questions about one: three kinds of prefix, of several lengths."
    some = [next(row for row in rows["scanrefer"] if row["scene_id"] == SCENES[1]), *rows["scanrefer"][:3]]
    return [
        record
        for task, own in {"scanrefer": some, "scanqa": rows["scanqa"][:2]}.items()
        for record in build_records(task, own, ROOT, frames=2)[0]
    ]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    "Folders of a tiny Qwen2.5-VL and a tiny Qwen3-VL with random weights."
    folder = tmp_path_factory.mktemp("hosts")
    for kind in TINY_HOSTS:
        write_tiny_host(folder / kind, kind)
    return folder


def made(host: Path):
    model, tokenizer = build_host(host, host / "vggt", views=2, frame_width=112, merger_hidden=24)
    return model, tokenizer


def step_of(model, tokenizer, records, folder, queries: int, per_batch: int, **options):
    "Loss, log and gradients of a step with all records."
    data = Conversations(records, ROOT, tokenizer, model.config.vlm_config, width=112)
    collate = ConversationCollator(tokenizer.pad_token_id)
    if queries > 1:
        data = SharedConversations(data, queries)
        collate = SharedCollator(tokenizer.pad_token_id, image=model.config.vlm_config.image_token_id)
    args = W2R2Config(str(folder), use_cpu=True, report_to=[], **dict(reading="direct", mu=0.0) | options)
    trainer = ConversationTrainer(model, args, data, collate)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    batches = [
        collate([data[n] for n in range(i, min(i + per_batch, len(data)))]) for i in range(0, len(data), per_batch)
    ]
    trainer.current_gradient_accumulation_steps = len(batches)
    count = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    assert count == len(records)
    model.train().zero_grad()
    loss = 0.0
    for batch in batches:
        part = trainer.compute_loss(model, batch, num_items_in_batch=count)
        part.backward()
        loss += part.item()
    log = {name: float(total) for name, (total, _) in trainer._terms.items() if " " not in name}
    return loss, log, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, len(batches)


def assert_same_step(one, other):
    assert one[0] == pytest.approx(other[0], abs=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, value in one[1].items():
        assert value / one[3] == pytest.approx(other[1][name] / other[3], abs=1e-5)
    assert one[2].keys() == other[2].keys()
    for name, value in one[2].items():
        torch.testing.assert_close(value, other[2][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", TINY_HOSTS)
def test_a_step_of_packs_is_that_of_their_records(hosts, kind, records, tmp_path):
    model, tokenizer = made(hosts / kind)
    alone = step_of(model, tokenizer, records, tmp_path, 1, 1)
    packed = step_of(model, tokenizer, records, tmp_path, 3, 2)  # two scenes in a sequence
    assert packed[3] < alone[3] == len(records) and alone[1]["deterrence"] > 0
    assert max(value.abs().max() for value in alone[2].values()) > 1e-2
    assert_same_step(alone, packed)
    checked = step_of(model, tokenizer, records, tmp_path, 3, 1, gradient_checkpointing=True)
    assert_same_step(alone, checked)


def test_a_reward_of_packs_is_that_of_their_records(hosts, records, tmp_path):
    model, tokenizer = made(hosts / "qwen2_5_vl")
    options = dict(reading="weighted reward", mu=0.1)
    assert_same_step(
        step_of(model, tokenizer, records, tmp_path, 1, 6, **options),
        step_of(model, tokenizer, records, tmp_path, 6, 1, **options),
    )


def test_adapters_learn_the_same_from_packs(hosts, records, tmp_path):
    whole, tokenizer = made(hosts / "qwen3_vl")
    model = add_adapters(whole, 4, 8)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # a fresh one is zero, and nothing would reach its partner
            torch.nn.init.normal_(parameter, std=0.1)
    alone, packed = (step_of(model, tokenizer, records, tmp_path, n, 1) for n in (1, 4))
    assert any("lora_A" in name for name in alone[2])
    assert_same_step(alone, packed)


def test_packs_are_read_in_bfloat16(hosts, records, tmp_path):
    "As on a GPU: what is trained in single precision, products in bfloat16."
    model, tokenizer = made(hosts / "qwen3_vl")
    exact = step_of(model, tokenizer, records[1:3], tmp_path, 2, 1)
    with torch.autocast("cpu", torch.bfloat16):
        rough = step_of(model, tokenizer, records[1:3], tmp_path, 2, 1)
    assert rough[0] == pytest.approx(exact[0], rel=0.02)


def test_no_mask_is_as_wide_as_it_is_high(hosts, records, tmp_path, monkeypatch):
    "One query per sequence has no mask at all, padded or not; of packs only the queries have one."
    shapes, attend = [], torch.nn.functional.scaled_dot_product_attention

    def seen(query, key, value, attn_mask=None, **kwargs):
        shapes.append((query.shape[2], key.shape[2], attn_mask))
        return attend(query, key, value, attn_mask=attn_mask, **kwargs)

    model, tokenizer = made(hosts / "qwen2_5_vl")
    data = Conversations(records, ROOT, tokenizer, model.config.vlm_config, width=112)
    longest = max(len(data[number]["input_ids"]) for number in range(len(records)))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    step_of(model, tokenizer, records, tmp_path, 1, len(records))
    decoder = [mask for rows, _, mask in shapes if rows == longest]
    assert len(decoder) == 2 and decoder == [None, None]  # two layers
    shapes.clear()
    step_of(model, tokenizer, records, tmp_path, 6, 1)
    masks = [mask.shape[-2:] for _, _, mask in shapes if mask is not None and mask.shape[-1] > mask.shape[-2]]
    assert masks and all(wide - high > 24 for high, wide in masks)  # a prefix has two frames of 12 tokens
    assert not [mask for rows, columns, mask in shapes if mask is not None and rows == columns and rows > 100]


@pytest.mark.parametrize("kind", TINY_HOSTS)
def test_a_model_that_has_shared_frames_reads_as_before(hosts, kind, records):
    model, tokenizer = made(hosts / kind)
    data = Conversations(records, ROOT, tokenizer, model.config.vlm_config, width=112)
    batch = ConversationCollator(tokenizer.pad_token_id)([data[0], data[len(data) - 1]])
    names = "input_ids", "attention_mask", "pixel_values", "image_grid_thw", "images_3d"
    given = {name: batch[name] for name in names}
    with torch.no_grad():
        before = model(**given).logits
        packs = SharedConversations(data, 2)
        packed = SharedCollator(tokenizer.pad_token_id, image=model.config.vlm_config.image_token_id)([packs[0]])
        model(**{name: packed[name] for name in (*names, "pieces") if name in packed})
        assert model.vlm.model.language_model.config._attn_implementation == SHARED
        assert torch.equal(model(**given).logits, before)
        with pytest.raises(ValueError, match="do not make up one sequence"):
            model(**given, pieces=[[5, 5]])


@pytest.mark.parametrize("kind", TINY_HOSTS)
def test_answers_are_those_of_each_question_alone(hosts, kind, rows):
    model, tokenizer = made(hosts / kind)
    asked = [
        record
        for task in ("scanqa", "scanrefer", "scanqa")  # back to a prefix that was left
        for record in build_records(task, [*rows[task][:2], rows[task][-1]], ROOT, frames=2, train=False)[0]
    ]
    read, logits, write = [], [], model.vlm.generate
    model.vlm.model.language_model.register_forward_pre_hook(
        lambda module, args, given: read.append(given["inputs_embeds"].shape[1]), with_kwargs=True
    )

    def generate(**given):
        told = write(**given, return_dict_in_generate=True, output_logits=True)
        logits.append(torch.stack(told.logits))
        return told.sequences

    model.vlm.generate = generate
    for shortcut in (False, True):
        read.clear(), logits.clear()
        together, shared = list(answer_records(model, tokenizer, asked, ROOT, 4, shortcut)), sum(read)
        read.clear()
        data = Conversations(asked, ROOT, tokenizer, model.config.vlm_config, width=112)
        for text, item in zip(together, (data[number] for number in range(len(asked))), strict=True):
            given = {name: item[name] for name in ("pixel_values", "image_grid_thw", "images_3d")}
            ids = model.generate(
                item["input_ids"][None], **given, shortcut=shortcut, max_new_tokens=4, do_sample=False, pad_token_id=0
            )
            assert tokenizer.decode(ids[0, len(item["input_ids"]) :], skip_special_tokens=True) == text
        assert shared < sum(read)
        ours, theirs = logits[: len(asked)], logits[len(asked) :]
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
        assert (ours[0] - ours[1]).abs().max() > 1e-3  # what was asked matters
