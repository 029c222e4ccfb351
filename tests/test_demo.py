"""The demo page by HTTP: both answers, and a clear error for everything that cannot be answered."""

import asyncio
import json
import threading

import httpx
import pytest

from w2r2.demo import LONGEST_TEXT, Demo, demo_server


@pytest.fixture(scope="module")
def address():
    "Of a demo that runs in a thread of its own."
    loop, ready, found = asyncio.new_event_loop(), threading.Event(), []

    async def start():
        found.append(demo_server(Demo(kept=2), 0))
        ready.set()

    def run():
        asyncio.set_event_loop(loop)
        loop.create_task(start())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(60)
    server, url = found[0]
    yield url
    loop.call_soon_threadsafe(server.stop)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


def ask(address, **content):
    return httpx.post(address + "ask", json=content, timeout=60)


def test_a_sentence_gets_both_answers_and_a_page(address):
    assert "Describe an object of the room" in httpx.get(address).text
    said = ask(address, scene="0/scene9000_00", text="the black <b>door</b>").json()
    assert len(said["fused"]) == len(said["2d"]) == 6
    page = httpx.get(address + "page/" + said["page"]).text
    assert "scene9000_00" in page and "<b>door" not in page


@pytest.mark.parametrize(
    "content, complaint",
    [
        ({"scene": "0/scene9999_00", "text": "the door"}, "not in the list"),
        ({"scene": "../../etc", "text": "the door"}, "not in the list"),
        ({"scene": ["0/scene9000_00"], "text": "the door"}, "not in the list"),
        ({"scene": "0/scene9000_00", "text": "  "}, "type a sentence"),
        ({"scene": "0/scene9000_00", "text": 7}, "type a sentence"),
        ({"scene": "0/scene9000_00", "text": "door " * LONGEST_TEXT}, "characters"),
        ({"scene": "0/scene9000_00", "text": "zyx wvu"}, "no word"),
        ({"scene": "0/scene9000_00", "text": "the chair\udc80"}, "half a character"),
    ],
)
def test_what_cannot_be_answered_is_one_clear_error(address, content, complaint):
    body = json.dumps(content)  # a lone surrogate as \udc80
    reply = httpx.post(address + "ask", content=body, headers={"Content-Type": "application/json"}, timeout=60)
    assert reply.status_code == 400 and complaint in reply.json()["error"]


def test_strangers_and_strange_requests_are_refused(address):
    assert httpx.get(address, headers={"Host": "evil.example"}).status_code == 403
    assert httpx.post(address + "ask", content="{", headers={"Content-Type": "application/json"}).status_code == 400
    assert httpx.post(address + "ask", content="{}").status_code == 400
    assert httpx.get(address + "page/0123456789abcdef").status_code == 404


def test_two_questions_at_once_do_not_mix(address):
    said = {}

    def run(scene):
        said[scene] = ask(address, scene=f"0/{scene}", text="the door").json()

    threads = [threading.Thread(target=run, args=(scene,)) for scene in ("scene9000_00", "scene9001_00")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(said[scene]["scene"] == scene for scene in said) and len(said) == 2
    assert said["scene9000_00"]["page"] != said["scene9001_00"]["page"]
