"""The demo page, by HTTP and in a browser: both answers, and a clear error for everything that cannot be answered."""

import asyncio
import json
import subprocess
import sys
import threading

import httpx
import numpy as np
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
    assert httpx.get(address + "scene/0/scene9999_00").status_code == 404
    assert httpx.get(address + "scene/../../etc/passwd").status_code == 404


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


DRAWN = """(() => {
  const over = document.getElementById("shown").contentDocument?.getElementById("over");
  if (!over?.style.width) return -1;
  const pixels = over.getContext("2d").getImageData(0, 0, over.width, over.height).data;
  return pixels.filter((value, i) => i % 4 === 3 && value > 0).length;
})()"""  # pixels of the boxes over the 3D scene; -1: there is none yet


@pytest.fixture(scope="module")
def started():
    "Address of `w2r2 demo`, as a user starts it."
    command = [sys.executable, "-m", "w2r2.cli", "demo", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        yield next(word for word in server.stdout.readline().split() if word.startswith("http"))
        server.terminate()


@pytest.mark.parametrize("width", [1300, 390])
def test_a_visitor_sees_the_room_and_then_both_answers(started, tab, width):
    from browser import wait

    tab.open(started, width=width)
    wait(lambda: tab.run(DRAWN) == 0, "the scene that is picked is not shown")
    tab.run("document.querySelector('#examples button').click()")
    wait(lambda: tab.run("!document.getElementById('answers').hidden"), "no answer")
    rows = tab.run("[...document.querySelectorAll('#answers tbody tr')].map(row => row.innerText)")
    assert [row.split("\t")[0] for row in rows] == ["2D and 3D", "2D only"]
    assert all(np.isfinite([float(value) for value in row.split("\t")[1:]]).all() for row in rows)
    wait(lambda: tab.run(DRAWN) > 100, "the boxes are not drawn over the scene")
    assert tab.run("document.getElementById('shown').contentDocument.querySelectorAll('#views .shows').length") > 0
    assert tab.run("document.documentElement.scrollWidth") <= width
    assert not tab.complaints and all(url.startswith((started, "data:", "blob:")) for url in tab.requests)
    tab.run("document.getElementById('text').value = 'zyx wvu'; document.getElementById('go').click()")
    wait(lambda: tab.run("document.getElementById('state').className") == "wrong", "no complaint about strange words")
