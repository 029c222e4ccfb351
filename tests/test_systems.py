"""The zero-shot systems, answered by a script that knows the truth, by one that never decides, and by one that errs."""

import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from w2r2.cli import main
from w2r2.scans.files import ScanNetError
from w2r2.scans.overlap import aligned_iou
from w2r2.scans.recording import Frame
from w2r2.scans.scan import Scan
from w2r2.scans.sens import write_sens
from w2r2.shipped import DATA
from w2r2.systems.detectors import Detections, detector_named, link_detections
from w2r2.systems.grounder import FUSED, GROUNDERS
from w2r2.systems.lifting import learning_release, usual_sizes
from w2r2.systems.local_vlm import TransformersVLM, write_tiny_vlm
from w2r2.systems.projection import read_shots
from w2r2.systems.seeground import SeeGround
from w2r2.systems.segmenters import segmenter_named
from w2r2.systems.seqvlm import SeqVLM
from w2r2.systems.vlm import Choice
from w2r2.systems.vlm_grounder import VLMGrounder


class Script:
    "A VLM that names the given class and chooses by a function of the options; -1: none."

    name = "script"

    def __init__(self, target, choose=lambda options: 0, anchors=()):
        self.said, self.choose, self.asked = {"target": target, "anchors": list(anchors)}, choose, []

    def parse(self, text, instruction, fields):
        return self.said

    def select(self, pictures, text, instruction, options, allow_none=False):
        assert len(pictures) and all(picture.dtype == np.uint8 and picture.ndim == 3 for picture in pictures)
        self.asked.append(options)
        return Choice(self.choose(options))


@pytest.fixture
def scan():
    with Scan(DATA / "samples", "scene9000_00") as opened:
        yield opened


def calls(answer):
    return sum(step.calls for step in answer.trace)


def one(options):
    return 0


def test_right_answers_give_the_right_box(scan):
    truth = scan.boxes[scan.labels.index("sofa")]
    for system in (SeqVLM, SeeGround, VLMGrounder):
        answer = system(Script("couch")).ground(scan, ["the couch"])[0]
        assert aligned_iou(answer.box, truth) > 0.25, system


def test_every_true_box_can_be_picked_by_its_number(scan):
    from w2r2.tasks.candidates import true_proposals

    boxes = true_proposals(scan).boxes
    for row in range(len(boxes)):
        vlm = Script("thing", lambda options, name=str(row): [option.name for option in options].index(name))
        assert np.array_equal(SeeGround(vlm, proposals="true").ground(scan, [""])[0].box, boxes[row])


def test_seqvlm_never_asks_more_than_the_original(scan, monkeypatch):
    system = SeqVLM(Script("chair"))
    view = {0: np.array([10.0, 10, 50, 50])}
    for count, most in ((0, 0), (1, 0), (4, 1), (5, 3), (40, 14)):
        monkeypatch.setattr(system, "_of_class", lambda *_, n=count: (list([0] * n), [view] * n))
        answer = system.ground(scan, ["a chair"])[0]
        assert sum(step.kind == "select" for step in answer.trace) == most, count
        assert np.isnan(answer.box).all() == (count == 0)
    assert system.most_calls == 1 + 14  # with the question what the description names
    system.vlm = Script("chair", lambda options: -1)  # none of any group
    answer = system.ground(scan, ["a chair"])[0]
    assert sum(step.kind == "select" for step in answer.trace) == 10 and np.isnan(answer.box).all()


def test_vlm_grounder_asks_again_without_the_frame_that_shows_nothing(scan):
    class Blind:
        def find(self, scan, name, skip=1):
            return [Detections(np.zeros((0, 4)), [], np.zeros(0)) for _ in range(12)]

    vlm = Script("sofa")
    answer = VLMGrounder(vlm, detector=Blind()).ground(scan, ["the sofa"])[0]
    assert [len(options) for options in vlm.asked] == [12, 11, 10] and calls(answer) == 4
    assert np.isnan(answer.box).all() and answer.frame == -1


@pytest.mark.parametrize("name", ["seqvlm", "vlm_grounder", "seeground"])
def test_every_variant_answers_or_says_that_it_does_not(scan, name):
    for choose in (one, lambda options: -1, lambda options: 99):
        system = GROUNDERS[name](Script("chair", choose, ["table"]))
        for inputs in system.variants:
            (answer,) = system.ground(scan, ["the chair by the table"], inputs)
            assert answer.box.shape == (6,) and calls(answer) >= 1
            # a hull needs rectangles of several frames that meet: without them there is no answer
            assert choose is not one or inputs == "2d: visual hull" or np.isfinite(answer.box).all(), inputs
    assert system.variants[0] == FUSED
    with pytest.raises(ValueError, match="knows '2d"):
        system.ground(scan, ["a chair"], "3d")


def test_links_follow_rectangles_that_overlap(scan):
    rectangles = [np.array([[0.0, 0, 40, 40], [100, 60, 150, 110]]), np.array([[102.0, 62, 152, 112], [1, 1, 41, 41]])]
    found = [Detections(own, ["chair"] * 2, np.ones(2)) for own in rectangles]
    assert link_detections(found, read_shots(scan), 0.9) == [{0: 0, 1: 1}, {0: 1, 1: 0}]


@pytest.fixture
def long(tmp_path, scan):
    "The recording of the scan fifty times over."
    shutil.copytree(scan.folder, tmp_path / "scans" / scan.scene_id)
    shutil.copy(scan.root / "scannetv2-labels.combined.tsv", tmp_path)
    sens = tmp_path / "scans" / scan.scene_id / f"{scan.scene_id}.sens"
    sens.unlink()
    write_sens(sens, scan.frames.header, (frame for _ in range(50) for frame in scan.frames))
    return tmp_path


@pytest.mark.parametrize(("skip", "count"), [(None, 100), (12, 50)])
def test_a_long_recording_is_read_in_part(long, scan, skip, count, monkeypatch, capsys):
    read = []
    decode = Frame.color.func
    monkeypatch.setattr(Frame, "color", property(lambda self: read.append(self.index) or decode(self)))
    command = ["ground", scan.scene_id, "the couch", "--root", str(long), "--system", "vlm_grounder", "--vlm", "random"]
    assert main([*command, *([] if skip is None else ["--skip", str(skip)])]) == 0
    said = capsys.readouterr()
    assert f"{count} of 600 frames are read" in said.err and said.out.startswith("the couch")
    assert len(set(read)) <= count + 12 and len(read) <= 2 * count  # the detector looks at frames of its own


def random_detector(kind: str):
    "A tiny detector of transformers with random weights, and its processor."
    import transformers as hf

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "owlv2":
        config = hf.Owlv2Config(
            text_config=small | {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2},
            vision_config=small | {"image_size": 64, "patch_size": 16},
            projection_dim=16,
        )
        words = ["!", "<|startoftext|>", "<|endoftext|>", "chair</w>", *"chair"]
        tokenizer = hf.CLIPTokenizerFast({word: n for n, word in enumerate(words)}, merges=[], model_max_length=16)
        pictures = hf.Owlv2ImageProcessorPil(size={"height": 64, "width": 64})
        return hf.Owlv2ForObjectDetection(config), hf.Owlv2Processor(pictures, tokenizer)
    layers = {"layers": 2, "ffn_dim": 16, "attention_heads": 2, "n_points": 2}
    config = hf.GroundingDinoConfig(
        backbone_config=hf.SwinConfig(
            image_size=128, window_size=4, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, out_indices=[2, 3, 4]
        ),
        text_config=hf.BertConfig(vocab_size=10, **small),
        d_model=32,
        num_queries=16,
        **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in layers.items()},
    )
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "chair", ".", "?"]
    tokenizer = hf.BertTokenizer({word: n for n, word in enumerate(words)})
    pictures = hf.GroundingDinoImageProcessorPil(size={"height": 128, "width": 128})
    return hf.GroundingDinoForObjectDetection(config), hf.GroundingDinoProcessor(pictures, tokenizer)


@pytest.mark.parametrize("kind", ["owlv2", "grounding_dino"])
def test_detectors_of_transformers_run(scan, kind, tmp_path):
    for part in random_detector(kind):
        part.save_pretrained(tmp_path)
    detector = detector_named(tmp_path)
    detector.threshold = 0.0
    found = detector.look(read_shots(scan).color[0], "chair")
    assert found.rectangles.shape == (16, 4) and found.labels == ["chair"] * 16 and np.isfinite(found.scores).all()


def random_sam(kind: str):
    "A tiny SAM of transformers with random weights, and what prepares its pictures."
    import transformers as hf

    small, side = {"hidden_size": 16}, 56 if kind == "sam3" else 64
    prompt = small | {"image_size": side, "patch_size": 14 if kind == "sam3" else 16}
    parts = {
        "prompt_encoder_config": prompt,
        "mask_decoder_config": small | {"mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
    }
    tower = prompt | {"num_hidden_layers": 1, "num_attention_heads": 2, "window_size": 2, "global_attn_indexes": [0]}
    levels = {"fpn_hidden_size": 16, "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}
    if kind == "sam":
        config = hf.SamConfig(vision_config=tower | {"output_channels": 16, "mlp_dim": 16, "num_pos_feats": 8}, **parts)
        pictures = hf.SamImageProcessorPil(size={"longest_edge": side}, pad_size={"height": side, "width": side})
        return hf.SamModel(config), hf.SamProcessor(pictures)
    if kind == "sam2":
        tower = {
            "model_type": "sam2_hiera_det_model",
            "image_size": [side, side],
            "blocks_per_stage": [1, 1, 2, 1],
            "embed_dim_per_stage": [4, 8, 16, 32],
            "num_attention_heads_per_stage": [1, 1, 2, 2],
            "window_size_per_stage": [8, 4, 4, 4],
            "global_attention_blocks": [3],
            "hidden_size": 4,
        }
        levels["backbone_channel_list"] = [32, 16, 8, 4]
        model = hf.Sam2Model(hf.Sam2Config(vision_config={"backbone_config": tower} | levels, **parts))
    else:
        tower |= {"model_type": "sam3_vit_model", "intermediate_size": 16, "pretrain_image_size": side}
        model = hf.Sam3TrackerModel(hf.Sam3TrackerConfig(vision_config={"backbone_config": tower} | levels, **parts))
    return model, hf.ViTImageProcessorPil(size={"height": side, "width": side})


@pytest.mark.parametrize("kind", ["sam", "sam2", "sam3"])
def test_sams_of_transformers_run(scan, kind, tmp_path, monkeypatch):
    for part in random_sam(kind):
        part.save_pretrained(tmp_path)
    segmenter, shots, told = segmenter_named(tmp_path), read_shots(scan), {}
    ask, side = segmenter.model.forward, 56 if kind == "sam3" else 64
    monkeypatch.setattr(segmenter.model, "forward", lambda **inputs: told.update(inputs) or ask(**inputs))
    mask = segmenter.segment(shots, 0, np.array([20.0, 30, 80, 120]))
    assert mask.shape == (120, 160) and mask.dtype == bool
    stretch = np.array([side / 160, side / (160 if kind == "sam" else 120)] * 2)  # SAM 1 pads, the others stretch
    np.testing.assert_allclose(told["input_boxes"][0, 0].numpy(), stretch * [20, 30, 80, 120], rtol=1e-5)


def test_another_model_is_no_segmenter(tmp_path):
    model, processor = random_detector("owlv2")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Unrecognized|no SAM"):
        segmenter_named(tmp_path)


def test_parts_of_a_system_are_chosen_by_name(scan, tmp_path, capsys):
    "Boxes to choose from, detector and segmenter, as somebody with ScanNet and published models would."
    for kind, model in {"detector": random_detector("grounding_dino"), "segmenter": random_sam("sam2")}.items():
        for part in model:
            part.save_pretrained(tmp_path / kind)
    parts = [f"--{kind}={tmp_path / kind}" for kind in ("detector", "segmenter")]
    ground = ["ground", scan.scene_id, "the couch", "--json", "--system"]
    assert main([*ground, "vlm_grounder", *parts]) == 0
    assert main([*ground, "seqvlm", "--proposals", "true"]) == 0
    (said,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert any(np.allclose(said["box"], box, atol=1e-3) for box in scan.boxes)


@pytest.fixture
def server():
    "The address of a server whose model knows what a couch is and takes the first option; and what it was asked."
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            text = asked[-1]["messages"][0]["content"][-1]["text"]
            if "choices: " in text:
                said = {"choice": text.split("choices: ")[1].rstrip(".").split(", ")[0]}
            else:
                said = {"target": "couch", "attributes": [], "conditions": [], "anchors": []}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": json.dumps(said)}}]}).encode())

        def log_message(self, *_):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/v1", asked
    running.shutdown()
    running.server_close()


@pytest.mark.parametrize("system", ["seqvlm", "vlm_grounder", "seeground"])
def test_a_system_asks_a_server_by_the_command(scan, server, system, tmp_path, capsys, monkeypatch):
    url, asked = server
    monkeypatch.setenv("OPENAI_API_KEY", "secret-of-mine")
    command = [
        "ground",
        "scene9000_00",
        "the couch",
        "--system",
        system,
        "--url",
        url,
        "--store",
        str(tmp_path / "kept"),
    ]
    assert main([*command, "--json"]) == 0
    said, calls = capsys.readouterr(), len(asked)
    assert calls <= int(re.search(r"at most (\d+) questions to endpoint:", said.err)[1])
    box = json.loads(said.out)[0]["box"]
    assert aligned_iou(np.array(box), scan.boxes[scan.labels.index("sofa")]) > 0.25 and calls >= 1
    assert main([*command, "--json"]) == 0 and len(asked) == calls  # out of the store
    assert json.loads(capsys.readouterr().out)[0]["box"] == box
    assert "secret-of-mine" not in "".join(path.read_text() for path in (tmp_path / "kept").iterdir())
    assert main([*command, "--html", "page.html"]) == 2 and "--inputs" in capsys.readouterr().err


def test_a_split_goes_on_after_its_budget_and_is_scored(scan, server, tmp_path, capsys):
    "As somebody with an endpoint would ask a system all of a split: stopped, resumed, scored."
    url, asked = server
    records = json.loads((DATA / "samples/scanrefer/ScanRefer_filtered_samples.json").read_text())
    sofa = str(scan.object_ids[scan.labels.index("sofa")])
    some = [row for row in records if row["scene_id"] == scan.scene_id and row["object_id"] == sofa][:2]
    some += [row for row in records if row["scene_id"] == "scene9001_00"][:1]
    subset, out = tmp_path / "some.json", tmp_path / "said"
    subset.write_text(json.dumps([{key: row[key] for key in ("scene_id", "object_id", "ann_id")} for row in some]))
    command = ["predict", str(out), "--system", "seeground", "--url", url, "--vlm", "x", "--subset", str(subset)]
    command += ["--store", str(tmp_path / "kept"), "--budget", "4"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "3 descriptions of 2 scenes; at most 6 questions to endpoint:x, with at most 3 pictures" in said
    (line,) = [line for line in said.splitlines() if "budget of requests is used up" in line]
    assert line.startswith("w2r2 predict: ") and "1 of 2 scenes are complete" in line
    assert len(asked) == 4 and not (out / "scanrefer.jsonl").exists()
    assert main(command) == 0 and len(asked) <= 6
    calls = len(asked)
    assert main(command) == 0 and len(asked) == calls  # nothing is left to ask
    capsys.readouterr()
    truth = ["--annotations", str(out / "scanrefer_truth.jsonl"), "--benchmark", "scanrefer", "--protocol", "scanrefer"]
    assert main(["score", str(out / "scanrefer.jsonl"), *truth, "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["Acc@0.25"]["n"] == 3 and rows["Acc@0.25"]["value"] > 0.6


def test_models_go_where_pytorch_has_a_gpu(tmp_path, monkeypatch):
    for kind, model in {"detector": random_detector("owlv2"), "sam": random_sam("sam")}.items():
        for part in model:
            part.save_pretrained(tmp_path / kind)
    write_tiny_vlm(tmp_path / "vlm")
    moved = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: moved.append(device) or self)
    detector_named(tmp_path / "detector"), segmenter_named(tmp_path / "sam")
    TransformersVLM.load(tmp_path / "vlm", tmp_path / "kept")
    assert moved == ["cuda"] * 3


def test_usual_sizes_are_of_the_training_split(scan, tmp_path):
    "A release with another label table is none of the embedded benchmark: its own annotated scans are read."
    shutil.copytree(scan.folder, tmp_path / "scans" / scan.scene_id)
    table = (scan.root / "scannetv2-labels.combined.tsv").read_text()
    (tmp_path / "scannetv2-labels.combined.tsv").write_text(table.rstrip("\n") + "\n" * 2)
    system = VLMGrounder(Script("couch"))
    with Scan(tmp_path, scan.scene_id) as other:
        with pytest.raises(ScanNetError, match="scannetv2_train.txt: file: is missing"):
            system.ground(other, ["the couch"], "2d: constant depth")
        (tmp_path / "splits").mkdir()
        (tmp_path / "splits" / "scannetv2_train.txt").write_text(f"scene0700_00\n{scan.scene_id}\n")
        assert learning_release(other) == (tmp_path, "train")
    sizes, _ = usual_sizes(tmp_path, "train")
    np.testing.assert_allclose(sizes["sofa"], scan.boxes[scan.labels.index("sofa"), 3:])
