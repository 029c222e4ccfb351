"""Training runs for test_sharded.py, alone or under torchrun: sharded.py FOLDER, which `training.prepare` made."""

import json
import os
import sys
from pathlib import Path

import torch
import training
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from w2r2.method.conversation_trainer import ConversationTrainer
from w2r2.method.trainer import W2R2Config
from w2r2.model.conversations import ConversationCollator, Conversations
from w2r2.model.hosts import build_host, write_tiny_host
from w2r2.study.jobs import check_one_thread
from w2r2.tasks.messages import build_records
from w2r2.tasks.samples import read_scanqa, read_scanrefer

CASES = {
    "VG-LLM, direct": dict(reading="direct", mu=0.0),
    "VG-LLM, every second step": dict(reading="direct", mu=0.0, push_every=2),
    "tiny, direct": dict(reading="direct", mu=0.0, push_every=4),
    "tiny, whatwhere": dict(reading="whatwhere"),
    "tiny, product of experts": dict(reading="poe"),
}
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))


def settings(folder: Path, batch: int, **options) -> W2R2Config:
    "A global batch of `batch`, sharded where there are several processes."
    several = dict(fsdp=True, fsdp_config={"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"})
    return W2R2Config(
        str(folder / "run"),
        use_cpu=True,
        max_steps=3,
        per_device_train_batch_size=batch // PROCESSES,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        adam_epsilon=1e-4,  # a bias of keys has no gradient: AdamW would make steps of rounding errors
        **(several if PROCESSES > 1 else {}),
        **options,
    )


def conversations(folder: Path, options: dict) -> ConversationTrainer:
    "A tiny VG-LLM on a description and a question."
    host = folder / f"host{os.environ.get('RANK', 0)}of{PROCESSES}"
    write_tiny_host(host, "qwen2_5_vl")
    model, tokenizer = build_host(host, host / "vggt", merger_hidden=24)
    names, root = ["scene9000_00"], training.SAMPLES
    described = read_scanrefer(root / "scanrefer/ScanRefer_filtered_samples.json", names)[0]
    asked = read_scanqa(root / "scanqa/ScanQA_v1.0_samples.json", names)[0]
    records = [
        build_records(task, rows[:1], root, frames=2)[0][0]
        for task, rows in {"scanrefer": described, "scanqa": asked}.items()
    ]
    data = Conversations(records, root, tokenizer, model.config.vlm_config, width=112)
    # one conversation at a time in one process too: a batch that is padded is another question
    args = settings(folder, PROCESSES, gradient_accumulation_steps=2 // PROCESSES, **options)
    return ConversationTrainer(model, args, data, ConversationCollator(tokenizer.pad_token_id))


def main(folder: Path):
    logs = {}
    for name, options in CASES.items():
        trainer = (
            conversations(folder, options)
            if name.startswith("VG-LLM")
            else training.resumable(folder, settings(folder, 2, **options))
        )
        trainer.train()
        parts = [isinstance(parameter, DTensor) for parameter in trainer.model.parameters()]
        assert all(parts) if PROCESSES > 1 else not any(parts)
        weights = {key: value.clone() for key, value in trainer.accelerator.get_state_dict(trainer.model).items()}
        logs[name] = trainer.state.log_history[:-1]
        if trainer.is_world_process_zero():
            save_file(weights, folder / f"{name}, {PROCESSES}.safetensors")
    if trainer.is_world_process_zero():
        (folder / f"{PROCESSES}.json").write_text(json.dumps(logs))


if __name__ == "__main__":
    check_one_thread()
    torch.manual_seed(0)
    main(Path(sys.argv[1]))
