"""One training run on the sample scenes as a process of its own: training.py FOLDER NAME SETTINGS, where `prepare` made
FOLDER and SETTINGS are fields of W2R2Config as JSON."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast, TrainerCallback

from w2r2.method.resuming import last_checkpoint
from w2r2.method.trainer import W2R2Config, W2R2Trainer
from w2r2.model.examples import example, tiny_model
from w2r2.model.features import Features, Queries
from w2r2.model.packing import Packer
from w2r2.model.scenes import Collator, Scenes
from w2r2.study.jobs import check_one_thread
from w2r2.tasks.answers import Bins

SAMPLES = Path(__file__).parents[1] / "data/samples"
BINS = Bins(count=120, low=(-6.6, -1.1, -3.3, 0.0, 0.0, 0.0), width=(0.11, 0.11, 0.055, 0.04, 0.04, 0.04))


def prepare(folder: Path):
    "Features and queries of the sample scenes."
    made = example(folder, bins=BINS, keep=48)
    made.tokenizer.save_pretrained(folder)
    made.queries.save(folder / "features")


class Kill(TrainerCallback):
    "Ends the process at once, as the system would, after a step."

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def resumable(folder: Path, args: W2R2Config, callbacks: list | None = None) -> W2R2Trainer:
    "A trainer of a model that has learned nothing, on the scenes that `prepare` encoded."
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    collator = Collator(Packer.of(tokenizer, BINS))
    scenes = Scenes(Features.open(folder / "features"), Queries.open(folder / "features"), per_task=(4, 1, 1))
    return W2R2Trainer(tiny_model(tokenizer, collator.packer), args, scenes, collator, callbacks=callbacks)


def train(folder: Path, name: str, settings: dict, kill: int = 0) -> W2R2Trainer:
    "Train, from the last checkpoint if there is one."
    args = W2R2Config(str(folder / name), use_cpu=True, learning_rate=2e-3, **settings)
    trainer = resumable(folder, args, [Kill(kill)] if kill else None)
    trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))
    return trainer


def result(trainer: W2R2Trainer) -> dict[str, torch.Tensor]:
    "Weights of the model and of the train-only heads."
    heads = trainer.accelerator.unwrap_model(trainer.heads).state_dict() if trainer.heads else {}
    return {
        name: value.clone()
        for name, value in {
            **trainer.model.state_dict(),
            **{f"heads.{name}": value for name, value in heads.items()},
        }.items()
    }


if __name__ == "__main__":
    check_one_thread()
    folder, name, settings = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    trainer = train(folder, name, settings, settings.pop("kill", 0))
    if trainer.is_world_process_zero():
        save_file(result(trainer), folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(
            json.dumps({"processes": trainer.accelerator.num_processes, "log": trainer.state.log_history[:-1]})
        )
