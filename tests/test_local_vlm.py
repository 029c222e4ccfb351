"""Local VLMs, and the client of an endpoint against servers that are slow, refuse, talk nonsense or die."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from transformers.utils.import_utils import is_serve_available

from w2r2.cli import main
from w2r2.model.backbone import image_processor
from w2r2.model.conversations import byte_tokenizer
from w2r2.model.hosts import tiny_host_config, write_tiny_host
from w2r2.scans.scan import Scan
from w2r2.shipped import DATA
from w2r2.systems.endpoint import Endpoint, EndpointError
from w2r2.systems.grounder import GROUNDERS
from w2r2.systems.local_vlm import RoomsVLM, TransformersVLM, Words, write_tiny_vlm
from w2r2.systems.reference_vlms import OracleVLM, RandomVLM, vlm_named
from w2r2.systems.vlm import Option

OPTIONS = [Option("0"), Option("1")]
PICTURE = np.full((40, 60, 3), 90, np.uint8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "The folder of a VLM with random weights."
    folder = tmp_path_factory.mktemp("tiny") / "vlm"
    write_tiny_vlm(folder)
    return folder


class Scripted(BaseHTTPRequestHandler):
    "Waits, then answers with a status and a body."

    wait, status, body = 0.0, 200, b""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(self.wait)
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    ("wait", "status", "body", "said"),
    [
        (1.0, 200, b"", "no answer to 2 requests, at last ReadTimeout"),
        (0.0, 429, b"", "no answer to 2 requests, at last status 429"),
        (0.0, 503, b"", "no answer to 2 requests, at last status 503"),
        (0.0, 401, b"", "refused with status 401; check the address, the model's name 'tiny' and the key"),
        (0.0, 200, b"<html>", "not as an OpenAI-compatible server does"),
        (0.0, 200, b'{"choices": []}', "not as an OpenAI-compatible server does"),
    ],
)
def test_what_a_server_cannot_answer_is_one_error(wait, status, body, said, tmp_path):
    handler = type("Handler", (Scripted,), {"wait": wait, "status": status, "body": body})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    with pytest.raises(EndpointError, match=said):
        timeout = wait / 5 or 30  # a server that answers may be slow on a busy machine
        Endpoint(url, "tiny", tmp_path, patience=2, pause=0.01, timeout=timeout).select([PICTURE], "a", "b", OPTIONS)
    server.shutdown()
    server.server_close()
    assert not list(tmp_path.iterdir())  # nothing that would be taken for an answer


@pytest.mark.skipif(
    not is_serve_available(),
    reason="`transformers serve` needs fastapi, uvicorn and openai: pip install 'transformers[serving]'",
)
def test_a_real_server_is_asked_and_may_die(tiny, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = "from transformers.cli.transformers import main; main()"
    arguments = ["serve", str(tiny), "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    log = tmp_path / "server.log"
    with log.open("wb") as said:
        server = subprocess.Popen(
            [sys.executable, "-c", command, *arguments], env=environment, stdout=said, stderr=subprocess.STDOUT
        )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", server, log)
        url, store = f"http://127.0.0.1:{port}/v1", tmp_path / "store"
        vlm = Endpoint(url, str(tiny), store, longest=8)
        assert vlm.select([PICTURE], "the chair", "Which?", OPTIONS, True).index == -1  # random weights say nonsense
        assert vlm.parse("the chair", "Name it.", {"target": str}) == {"target": ""}
        assert vlm.budget == 1000 - 2 * 3 and len(list(store.iterdir())) == 2  # with the corrective turns
        again = Endpoint(url, str(tiny), store, longest=8)
        again.select([PICTURE], "the chair", "Which?", OPTIONS, True)
        assert again.budget == 1000  # out of the store
        for broken in ({"model": str(tmp_path / "none")}, {"model": str(tiny), "timeout": 0.001}):
            with pytest.raises(EndpointError):
                Endpoint(url, store=store, patience=1, **broken).parse("the table", "Name it.", {"target": str})
        server.kill()
        server.wait()
        with pytest.raises(EndpointError, match="at last (ConnectError|RemoteProtocolError); start the server"):
            Endpoint(url, str(tiny), store, patience=2, pause=0.01).parse("the lamp", "Name it.", {"target": str})
    finally:
        server.kill()
        server.wait()


def _wait_for(address: str, server: subprocess.Popen, log: Path, most: float = 180.0):
    end = time.monotonic() + most
    while time.monotonic() < end and server.poll() is None:
        try:
            if httpx.get(address, timeout=2.0).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-2000:])


def test_a_local_model_is_asked_like_an_endpoint(tiny, tmp_path):
    vlm = TransformersVLM.load(tiny, tmp_path, longest=4, budget=7)
    choice = vlm.select([PICTURE, PICTURE], "the chair", "Which?", OPTIONS)
    assert (choice.index, choice.why, choice.calls) == (-1, "no answer could be read", 3)
    assert vlm.parse("the chair", "Name it.", {"target": str, "anchors": list}) == {"target": "", "anchors": []}
    assert vlm.select([PICTURE, PICTURE], "the chair", "Which?", OPTIONS).calls == 0
    with pytest.raises(EndpointError, match="the budget of requests is used up"):
        vlm.select([PICTURE], "the table", "Which?", OPTIONS)
    said = iter(["Let me see.", '{"reason": "red", "choice": "1"}'])
    spoken = []
    vlm._send = lambda messages: spoken.append(len(messages)) or next(said)
    assert vlm.select([PICTURE], "the lamp", "Which?", OPTIONS).index == 1 and spoken == [1, 3]


@pytest.mark.parametrize(("kind", "side"), [("qwen2_5_vl", 28), ("qwen3_vl", 32)])
def test_a_qwen_is_asked_without_torchvision(kind, side, tmp_path):
    write_tiny_host(tmp_path / "vlm", kind)
    vision = tiny_host_config(kind, byte_tokenizer()).vision_config
    image_processor(vision).save_pretrained(tmp_path / "vlm")
    vlm = TransformersVLM.load(tmp_path / "vlm", tmp_path / "store", longest=4)
    picture = np.full((2 * side, 3 * side, 3), 90, np.uint8)
    asked = vlm.processor.apply_chat_template(
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": Image.fromarray(picture)},
                    {"type": "text", "text": "Which?"},
                ],
            }
        ],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert int((asked["input_ids"] == vlm.model.config.image_token_id).sum()) == 2 * 3
    choice = vlm.select([picture, picture], "the chair", "Which?", OPTIONS)
    assert (choice.index, choice.calls) == (-1, 3) and vlm.parse("a chair", "", {"target": str}) == {"target": ""}


def test_a_folder_without_a_vlm_is_one_line(tmp_path, tiny, capsys):
    (tmp_path / "config.json").write_text("{}")
    template = tiny / "chat_template.jinja"
    for folder in (tmp_path / "none", tmp_path):
        command = ["ground", "scene9000_00", "the couch", "--system", "seqvlm", "--vlm", str(folder)]
        assert main(command) == 2 and str(folder) in capsys.readouterr().err
    kept = template.read_text()
    template.unlink()
    try:
        with pytest.raises(ValueError, match="has no chat template"):
            TransformersVLM.load(tiny, tmp_path)
    finally:
        template.write_text(kept)


@pytest.mark.parametrize("system", ["seqvlm", "vlm_grounder", "seeground"])
def test_systems_answer_without_a_server(system, capsys):
    command = ["ground", "scene9000_00", "the black couch", "--system", system, "--json"]
    for more in ([], ["--inputs", "2d"], ["--vlm", "random"]):
        if system == "vlm_grounder" and more == ["--inputs", "2d"]:
            more = ["--inputs", "2d: constant depth"]
        assert main([*command, *more]) == 0
        said = capsys.readouterr()
        assert json.loads(said.out)[0]["text"] == "the black couch" and "calls of" in said.err


@pytest.mark.parametrize("system", ["seqvlm", "vlm_grounder", "seeground"])
def test_the_oracle_never_picks_another_object(system):
    from w2r2.systems import seeground, seqvlm, vlm_grounder  # noqa: F401  each registers its system

    with Scan(DATA / "samples", "scene9000_00") as scan:
        for row in (scan.labels.index("sofa"), scan.labels.index("picture")):
            grounder = GROUNDERS[system](OracleVLM(scan, scan.boxes[row], scan.labels[row]))
            for inputs in grounder.variants[:1]:
                answer = grounder.ground(scan, ["it"], inputs)[0]
                distance = np.linalg.norm(scan.boxes[:, :3] - answer.box[:3], axis=1)
                same = [place for place, label in enumerate(scan.labels) if label == scan.labels[row]]
                assert min(same, key=lambda place: distance[place]) == row


def test_the_oracle_says_none_only_where_it_may():
    with Scan(DATA / "samples", "scene9000_00") as scan:
        oracle = OracleVLM(scan, scan.boxes[scan.labels.index("sofa")], "sofa")
    far = [Option(name, marked={frame: np.array([[0.0, 0, 1, 1]]) for frame in oracle.places}) for name in "01"]
    assert oracle.select([], "", "", far, allow_none=True).index == -1
    assert oracle.select([], "", "", far).index == 0 and oracle.select([], "", "", []).index == -1
    assert oracle.parse("it", "", {"target": str, "anchors": list}) == {"target": "sofa", "anchors": []}


def test_draws_depend_on_the_seed_and_the_question_alone():
    options = [Option(str(number)) for number in range(50)]
    draws = [RandomVLM(seed).select([], text, "", options).index for seed in range(4) for text in ("a", "b")]
    assert len(set(draws)) > 4
    assert draws == [RandomVLM(seed).select([], text, "", options).index for seed in range(4) for text in ("a", "b")]


@pytest.mark.parametrize(
    ("text", "target", "looks", "anchors"),
    [
        ("a round brown table next to the bookcase.", "table", ["brown", "round"], ["bookcase"]),
        ("of all the chairs in the room, this is the red chair closest to the door.", "chair", ["red"], ["door"]),
        ("find the street light. the street light is curved.", "street light", ["curved"], []),
        ("the l-shaped sofa. it is made of leather. there is a red pillow on it.", "sofa", ["l-shaped", "leather"],
         ["pillow"]),
        ("it is the office chair by the chair.", "office chair", [], ["chair"]),
        ("something else", "", [], []),
        ("", "", [], []),
    ],
)  # fmt: skip
def test_words_are_spotted(text, target, looks, anchors):
    said = Words().parse(text, {"target": str, "attributes": list, "anchors": list, "conditions": list})
    assert (said["target"], said["attributes"], said["anchors"]) == (target, looks, anchors)
    assert said["conditions"] == []


def test_the_tiny_model_tells_colours_apart_whatever_the_size():
    vlm = RoomsVLM()
    shown = [Option(name, (np.full((size, 30, 3), color, np.uint8),)) for name, size, color in
             (("0", 8, (200, 30, 30)), ("1", 90, (40, 60, 190)))]  # fmt: skip
    for word, place in (("red", 0), ("blue", 1)):
        choice = vlm.select([], f"the {word} chair", "", shown)
        assert choice.index == place and np.isfinite(choice.scores).all() and choice.why == word
    assert vlm.select([], "the red chair", "", [*shown, Option("2")]).scores[2] == -np.inf
    assert vlm.select([], "the red chair", "", [Option("2")]).index == 0


def test_vlms_have_names(tiny, tmp_path):
    assert vlm_named("rooms").name == "rooms" and vlm_named("random").name == "random"
    assert vlm_named(str(tiny), store=tmp_path).name == f"transformers:{tiny}"
    assert vlm_named("rooms", "http://127.0.0.1:1/v1", tmp_path).name == "endpoint:rooms"
