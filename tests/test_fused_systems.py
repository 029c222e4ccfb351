"""Fine-tuned systems by the command, and around a VLM of full size that has learned nothing."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from w2r2 import machine
from w2r2.app import load_quietly
from w2r2.cli import main
from w2r2.model.checkpoint import load, save
from w2r2.model.hosts import add_adapters, build_host, read_host, save_host, write_tiny_host
from w2r2.model.vgllm import VGLLM
from w2r2.scans.files import ScanNetError
from w2r2.scans.scan import Scan
from w2r2.shipped import DATA
from w2r2.systems import fused_systems
from w2r2.systems import spar as spar_module
from w2r2.systems.asking import known_systems, system_named
from w2r2.systems.detectors import ZeroShotDetector
from w2r2.systems.fused_systems import VGLLMSystem
from w2r2.systems.grounder import REFINED_FLAT, Kept
from w2r2.systems.reference_vlms import vlm_named
from w2r2.systems.spar import Spar

SCENE, TEXT = "scene9000_00", "the black couch"


def test_all_systems_of_the_tables_have_a_name():
    known = known_systems()
    assert {"fused", "vg-llm", "video-3d-llm", "spar", "seqvlm", "vlm_grounder", "seeground"} <= set(known)
    assert all(kind.variants[0] == "2d+3d" and len(kind.variants) > 1 for kind in known.values())


def test_what_each_variant_keeps_of_3d():
    vlm = vlm_named("random")
    made = [system_named(name, vlm) for name in ("seqvlm", "vlm_grounder", "seeground")]
    made += [system_named(name, DATA / "rooms-tiny-finetuned") for name in ("fused", "spar")]
    made += [system_named("fused", DATA / "rooms-tiny-finetuned", refined=True)]
    kept = {(type(one).__name__, inputs): one.keeps(inputs) for one in made for inputs in one.variants}
    lifts = {name for name, own in kept.items() if own.lifting == "depth"}
    assert lifts == {
        ("VLMGrounder", "2d+3d"),
        ("Spar", "2d+3d"),
        ("FusedSystem", "2d+3d"),
        ("FusedSystem", REFINED_FLAT),
    }
    assert kept["FusedSystem", "2d"] == kept["Spar", "2d"] == Kept("images")
    assert kept["SeeGround", "2d"].proposals == kept["SeqVLM", "2d"].proposals == "depth"
    assert all(kept[name].detection == "depth" for name in kept if name[0] == "VLMGrounder")
    seeing = system_named("vlm_grounder", vlm, detector=ZeroShotDetector(torch.nn.Identity(), None))
    assert seeing.keeps("2d: visual hull") == Kept("images", "images")


def test_zeros_of_vg_llm_stand_in_two_places(tmp_path):
    model, tokenizer, packer = load(DATA / "rooms-tiny-finetuned")
    model.config.encoder3d = "vggt"  # whose features are as wide
    save(model, tokenizer, packer.bins, tmp_path / "model")
    system = VGLLMSystem(tmp_path / "model")
    seen = []
    project = system.model.fusion.project
    system.model.fusion.project = lambda *given: seen.append(system.model.fusion.zero) or project(*given)
    with Scan(DATA / "samples", SCENE) as scan:
        for inputs in system.variants:
            system.ground(scan, [TEXT], inputs)
    assert system.variants == ("2d+3d", "2d", "2d: zeros before the projector")
    assert list(dict.fromkeys(seen)) == ["projected", "input"] and seen[-1] == "input"
    assert system.model.fusion.zero == "projected"
    assert VGLLMSystem(tmp_path / "model", refined=True).variants == ("2d+3d", REFINED_FLAT)


@pytest.mark.parametrize("system", ["fused", "spar", "seqvlm"])
def test_a_page_shows_the_way_to_an_answer(system, tmp_path, capsys):
    page = tmp_path / "trace.html"
    assert main(["ground", SCENE, TEXT, "--system", system, "--page", str(page), "--json"]) == 0
    said = capsys.readouterr()
    box, written = json.loads(said.out)[0]["box"], page.read_text(encoding="utf-8")
    assert " calls of the model" in said.err and f"<h1>{system}" in written and TEXT in written
    assert written.count("<img") >= (6 if system != "seqvlm" else 0)
    shown = written.split("Answer: <b>")[1].split("<")[0].split(";")[0]
    assert shown == "no box" if box is None else np.allclose(np.array(shown.split(), float), box, atol=0.01)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([TEXT, "--system", "vg-llm"], "geometry from images"),
        ([TEXT, "--system", "video-3d-llm"], "picks among candidates"),
        ([TEXT, "--page", "trace.html"], "--html"),
        ([TEXT, "a chair", "--system", "fused", "--page", "trace.html"], "one description"),
        ([TEXT, "--system", "fused", "--inputs", "3d"], "knows '2d+3d', '2d'"),
        ([TEXT, "--system", "fused", "--html", "page.html"], "--inputs"),
        ([TEXT, "--proposals", "true"], "are of a --system"),
        ([TEXT, "--system", "spar", "--proposals", "true"], "no place for --proposals"),
        ([TEXT, "--system", "seeground", "--segmenter", "depth"], "no place for --segmenter"),
        ([TEXT, "--system", "seqvlm", "--detector", "."], "Unrecognized model"),
    ],
)
def test_what_a_system_cannot_do_is_said_in_one_line(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["ground", SCENE, *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and len(error.splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_a_card_of_a_system_by_its_name(tmp_path, capsys):
    assert main(["diagnose", str(tmp_path / "card"), "--system", "spar", "--queries", "4", "--scenes", "2"]) == 0
    kept = json.loads((tmp_path / "card/card.json").read_text())
    assert kept["system"] == "spar" and "2D only" in capsys.readouterr().out
    assert main(["diagnose", str(tmp_path / "card"), "--system", "sparr"]) == 2
    assert "video-3d-llm" in capsys.readouterr().err
    assert main(["diagnose", str(tmp_path / "card"), "--system", "my_module:Mine", "--proposals", "true"]) == 2
    assert "is made without arguments" in capsys.readouterr().err


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    "A folder with a tiny VLM of full size's kind with VGGT."
    folder = tmp_path_factory.mktemp("host")
    write_tiny_host(folder / "published")
    model, tokenizer = build_host(folder / "published", folder / "published/vggt", 2, FRAME, merger_hidden=32)
    save_host(model, tokenizer, folder / "model", {})
    return folder / "model"


FRAME = 56  # pixels across


def test_a_vlm_of_full_size_is_a_system(host, monkeypatch):
    with Scan(DATA / "samples", SCENE) as scan:
        system = system_named("vg-llm", host)
        assert isinstance(system, VGLLMSystem) and system.host
        for inputs in system.variants:
            (answer,) = system.ground(scan, [TEXT], inputs)
            assert np.isnan(answer.box).all() and answer.trace[-1].kind == "say"  # it has learned nothing
        asked = []

        def say(model, tokenizer, records, root, longest=128, shortcut=False):
            asked.append((records[0]["conversations"][0]["value"], shortcut))
            yield '{"frame": 1, "center": [80, 60], "depth": 2.0, "size": [1, 0.5, 0.8]}'

        monkeypatch.setattr(spar_module, "answer_records", say)
        (answer,) = Spar(host).ground(scan, [TEXT], "2d")
        assert answer.box[3:].tolist() == [1, 0.5, 0.8] and np.isfinite(answer.box).all()
        assert asked[0][1] and TEXT in asked[0][0] and "Frame-1: <image>" in asked[0][0] and '"center"' in asked[0][0]
    with pytest.raises(ValueError, match="picks among candidates"):
        system_named("video-3d-llm", host)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda state: state.pop("merger.mlp.0.weight"), "1 missing: merger.mlp.0.weight"),
        (lambda state: state["merger.mlp.0.weight"].fill_(torch.nan), "1 not finite: merger.mlp.0.weight"),
        (lambda state: state.update({"merger.mlp.9.weight": torch.ones(2)}), "1 unexpected: merger.mlp.9.weight"),
        (lambda state: state.update({"merger.mlp.0.bias": torch.ones(2)}), "1 mismatched: ('merger.mlp.0.bias'"),
    ],
)
def test_a_damaged_model_of_full_size_is_refused(host, damage, said, tmp_path):
    shutil.copytree(host, tmp_path / "model")
    state = load_file(host / "model.safetensors")
    damage(state)
    save_file(state, tmp_path / "model/model.safetensors", {"format": "pt"})
    with pytest.raises(ScanNetError, match=re.escape(said)):
        read_host(tmp_path / "model")


def test_a_vlm_of_full_size_is_asked_on_the_best_device(host, monkeypatch):
    monkeypatch.setattr(fused_systems, "best_device", lambda: "meta")
    monkeypatch.setattr(machine, "best_device", lambda: "meta")
    assert VGLLMSystem(host).model.device.type == "meta"
    assert load_quietly(host, None)[0].device.type == "meta"


def test_a_model_is_read_in_the_dtype_that_it_was_saved_in(host, tmp_path):
    model, tokenizer = read_host(host)
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    save_host(model.bfloat16(), tokenizer, tmp_path / "half", {})
    again, _ = read_host(tmp_path / "half")
    assert {value.dtype for value in again.parameters()} == {torch.bfloat16}
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    with Scan(DATA / "samples", SCENE) as scan:  # it answers, too
        (answer,) = VGLLMSystem(tmp_path / "half").ground(scan, [TEXT])
    assert answer.trace[-1].kind == "say"
    made_from = {"dtype": "bfloat16", "attention": "eager"}  # of a run: the trained parts are saved in single precision
    save_host(read_host(host)[0], tokenizer, tmp_path / "run", made_from)
    again, _ = read_host(tmp_path / "run")
    assert {value.dtype for value in again.parameters()} == {torch.bfloat16}
    assert again.vlm.config._attn_implementation == "eager"
    assert read_host(tmp_path / "run", dtype="float32")[0].dtype == torch.float32


def test_adapters_with_a_number_that_is_not_finite_are_refused(host, tmp_path):
    made_from = {"backbone": str(host.parent / "published"), "weights3d": str(host.parent / "published/vggt")}
    model, tokenizer = build_host(**made_from)
    save_host(add_adapters(model, 2), tokenizer, tmp_path, made_from)
    assert isinstance(read_host(tmp_path)[0], VGLLM)
    state = load_file(tmp_path / "adapter_model.safetensors")
    damaged = next(name for name in state if "lora_A" in name)
    save_file(state | {damaged: state[damaged] * torch.nan}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="1 not finite: " + re.escape(damaged)):
        read_host(tmp_path)
