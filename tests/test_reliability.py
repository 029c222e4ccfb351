"Damage that once went unnoticed, stopped a run for good or ended in a traceback: one test for each class."

import json
import shutil
from pathlib import Path

import pytest
import torch
import training
from safetensors.torch import load_file, save_file

from w2r2.cli import main
from w2r2.method.resuming import last_checkpoint
from w2r2.rooms import release as rooms
from w2r2.study.jobs import Job, execute

DATA = Path(__file__).parents[1] / "data"
QUERY = "vlm.model.layers.0.self_attn.q_proj.weight"


def tensors(change):
    def write(path):
        weights = load_file(path)
        change(weights)
        save_file(weights, path, {"format": "pt"})

    return write


def one_number_for_two(path):
    "The vocabulary gives `<answer>` the number of `<image>`, which only the list of added tokens still has."
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    words["<answer>"] = words.pop("<image>")
    path.write_text(json.dumps(content))


def values(**new):
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | new))


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("model.safetensors", tensors(lambda weights: weights.pop(QUERY)), "q_proj.weight: is missing"),
        ("model.safetensors", tensors(lambda weights: weights.update(other=torch.zeros(3))), "other: is no tensor"),
        ("model.safetensors", tensors(lambda weights: weights.update({QUERY: torch.zeros(3, 3)})), "another shape"),
        ("model.safetensors", tensors(lambda weights: weights[QUERY][0].fill_(torch.inf)), "not finite"),
        ("model.safetensors", lambda path: path.rename(path.with_name("pytorch_model.bin")), "no model.safetensors"),
        ("bins.json", lambda path: path.write_text("{}"), "must contain"),
        ("bins.json", values(kind="boxes"), "kind"),
        ("bins.json", values(count=10**7), "count"),
        ("bins.json", values(count=100), "ends before"),
        ("bins.json", values(low=[float("nan")] * 6), "nan is no number"),
        ("config.json", values(first_bin=7), "first_bin"),
        ("config.json", lambda path: path.write_text("[]"), "must be object"),
        ("tokenizer.json", lambda path: path.write_text("{"), "not JSON"),
        ("tokenizer_config.json", values(unk_token=""), "unk_token: '' is no token"),
        ("tokenizer.json", one_number_for_two, "without gaps"),
        ("tokenizer.json", values(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}), "tokenizer"),
    ],
)
def test_a_model_that_is_not_as_it_was_saved_is_refused(tmp_path, capsys, name, change, said):
    folder = Path(shutil.copytree(DATA / "rooms-tiny-finetuned", tmp_path / "model"))
    change(folder / name)
    assert main(["ground", "scene9000_00", "the black couch", "--model", str(folder)]) == 2
    complaint = capsys.readouterr().err
    assert said.lower() in complaint.lower() and str(folder) in complaint and len(complaint.splitlines()) == 1


RUN = dict(max_steps=3, per_device_train_batch_size=2, save_steps=1, logging_steps=1)


def test_a_kill_while_checkpoints_are_deleted_blocks_nothing(encoded, monkeypatch):
    def killed(path, *_, **__):
        if path.exists():
            next(Path(path).iterdir()).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "rmtree", killed)
        training.train(encoded, "killed", RUN | {"save_total_limit": 1})
    assert Path(last_checkpoint(encoded / "killed")).name == "checkpoint-2"
    resumed = training.train(encoded, "killed", RUN | {"save_total_limit": 1})
    whole = training.train(encoded, "whole", RUN)
    expected = training.result(whole)
    assert resumed._initial_global_step == 2
    assert all(torch.equal(value, expected[name]) for name, value in training.result(resumed).items())
    assert [path.name for path in (encoded / "killed").glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_checkpoint_with_a_file_missing_or_cut_is_not_resumed_from(encoded, tmp_path, name, damage):
    if not (encoded / "steps").exists():
        training.train(encoded, "steps", RUN)
    runs = Path(shutil.copytree(encoded / "steps", tmp_path / "steps"))
    damage(runs / "checkpoint-3" / name)
    with pytest.warns(UserWarning, match=f"checkpoint not used.*checkpoint-3.*{name}"):
        assert Path(last_checkpoint(runs)).name == "checkpoint-2"
    settings = training.W2R2Config(str(runs), use_cpu=True, **RUN)
    trainer = training.resumable(encoded, settings)
    with pytest.raises(ValueError, match=name):
        trainer.train(resume_from_checkpoint=str(runs / "checkpoint-3"))


def test_a_run_that_was_killed_after_its_last_step_makes_no_other(encoded):
    settings = RUN | {"lr_scheduler_type": "constant"}
    whole = training.result(training.train(encoded, "last", settings))
    resumed = training.train(encoded, "last", settings)
    assert resumed.state.global_step == 3 and not (encoded / "last" / "checkpoint-4").exists()
    assert all(torch.equal(value, whole[name]) for name, value in training.result(resumed).items())
    assert [row["step"] for row in resumed.state.log_history if "loss" in row] == [1, 2, 3]


@pytest.mark.parametrize("content", ["", '{"settings": {', "[]", '{"settings": {}}'])
def test_a_result_that_is_not_whole_is_set_aside_and_done_again(tmp_path, monkeypatch, content):
    (tmp_path / "counted_whole.py").write_text("def work(settings, folder, tell):\n    return 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    job = Job("job", "counted_whole:work", {}, tmp_path / "job")
    job.folder.mkdir()
    (job.folder / "result.json").write_text(content)
    (job.folder / ".result.json.77.part").touch()
    with pytest.raises(FileNotFoundError, match="run it again"):
        job.result
    with pytest.warns(UserWarning, match="set aside"):
        assert execute([job], workers=0) == 1
    assert job.result == 7 and (job.folder / "result.damaged").read_text() == content
    assert not list(job.folder.glob("*.part"))


def test_what_a_killed_build_of_rooms_left_is_removed(tmp_path):
    "Views are told from others by a digest of the scans' files, so a file too many would be another release."
    whole, again = tmp_path / "whole", tmp_path / "again"
    for root in (whole, again):
        rooms.build(root, "val", share=1 / 130)
    (scene,) = (again / "scans").iterdir()
    (record,) = (again / "records").iterdir()
    record.rename(record.with_name(f".{record.name}.123.part"))  # killed as it was written, and others before
    (scene / f".{scene.name}.sens.12.part").write_bytes(b"half")
    (again / "scanqa" / ".ScanQA_v1.0_val.json.7.part").write_bytes(b"half")
    (again / ".scannetv2-labels.combined.tsv.7.part").write_bytes(b"half")
    rooms.build(again, "val", share=1 / 130)
    files = [
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*.*") if path.is_file()}
        for root in (whole, again)
    ]
    assert files[0] == files[1]
