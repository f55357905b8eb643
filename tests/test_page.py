"""The live page: who may see what, and that a browser shows a request as it decodes."""

import os
import threading
from pathlib import Path

import pytest
import requests
from serving import random_prompts, rheo_server
from webdriver import Browser, available

from rheoserve_sgl.observe import question

pytestmark = pytest.mark.server
KEY = "one two three"
BEARER = {"Authorization": "Bearer " + KEY}


@pytest.fixture(scope="module")
def guarded(checkpoints, tmp_path_factory):
    """A server with an API key, frames for a part of a prompt, and a selection."""
    args = ["--api-key", KEY, "--rheoserve-device-tokens", "1024", "--rheoserve-token-budget", "704"]
    with rheo_server(checkpoints.path(), args, tmp_path_factory.mktemp("guarded")) as server:
        yield server


class Decoding:
    """A request that goes on until the block is left."""

    def __init__(self, server, prompt: list[int]):
        sampling = {"temperature": 0, "max_new_tokens": 4000, "ignore_eos": True}
        self.url, self.body = server.url, {"input_ids": prompt, "sampling_params": sampling, "rid": "watched"}

    def __enter__(self):
        self.thread = threading.Thread(
            target=lambda: requests.post(self.url + "/generate", json=self.body, headers=BEARER, timeout=600)
        )
        self.thread.start()

    def __exit__(self, *_):
        requests.post(self.url + "/abort_request", json={"rid": "watched"}, headers=BEARER, timeout=60)
        self.thread.join(60)
        assert not self.thread.is_alive()


def data(server, headers=BEARER, **query) -> requests.Response:
    return requests.get(server.url + "/rheoserve/data", params=query, headers=headers, timeout=60)


def test_a_question_is_told_from_sglangs():
    assert question.read(question.write('a "b"', 3, 1)) == ('a "b"', 3, 1)
    assert question.read(None) is None and question.read("some-request") is None


def test_files_are_public_and_figures_need_the_key(guarded):
    for path, kind in (("", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")):
        reply = requests.get(f"{guarded.url}/rheoserve{path}", timeout=60)
        assert reply.status_code == 200 and reply.headers["content-type"].startswith(kind)
        assert "http" + "://" not in reply.text and "https://" not in reply.text  # works offline
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        assert data(guarded, headers).status_code == 401
        for path in ("/rheoserve/", "/rheoserve/../server_info", "/rheoserve/page.js/../data"):
            assert requests.get(guarded.url + path, headers=headers, timeout=60).status_code == 401
    assert requests.post(guarded.url + "/rheoserve", timeout=60).status_code == 401
    assert data(guarded).status_code == 200


@pytest.mark.parametrize(
    ("query", "status"),
    [({"layer": -1}, 400), ({"head": 1 << 40}, 400), ({"layer": "x"}, 400), ({"rid": "r" * 1000}, 400)],
)
def test_bad_questions_are_refused(guarded, query, status):
    reply = data(guarded, **query)
    assert reply.status_code == status and next(iter(query)) in reply.text


def test_a_request_that_nobody_has_has_no_map(guarded):
    [rank] = data(guarded, rid="nobody").json()["ranks"]
    assert rank["look"]["map"] is None and (rank["look"]["layers"], rank["look"]["heads"]) == (4, 2)


def test_a_map_shows_what_is_resident(guarded):
    with Decoding(guarded, random_prompts(60, [3000])[0]):
        while not (seen := data(guarded, rid="watched", layer=2, head=1).json()["ranks"][0]["look"])["map"]:
            pass
        while seen["requests"][0]["output_tokens"] < 3:
            seen = data(guarded, rid="watched", layer=2, head=1).json()["ranks"][0]["look"]
        assert 0 < seen["requests"][0]["working_set_pages"] <= 48
        assert seen["requests"][0] | {"output_tokens": 0, "working_set_pages": 0} == {
            "rid": "watched",
            "state": "decoding",
            "prompt_tokens": 3000,
            "output_tokens": 0,
            "working_set_pages": 0,
        }
        found = seen["map"]
        assert (found["layer"], found["head"], found["blocks_a_column"]) == (2, 1, 1)
        assert found["pages"] == len(found["weight"]) == len(found["resident"]) >= 47
        assert found["resident_blocks"] == found["resident"].count(255) == 1024 // 64
        assert found["resident"][0] == found["resident"][-1] == 255  # sink and newest page
        assert max(found["weight"]) > 0
    [rank] = data(guarded, rid="watched").json()["ranks"]
    assert rank["look"]["map"] is None


@pytest.mark.skipif(not available(), reason="needs chromium and chromedriver")
def test_a_browser_shows_a_request_as_it_decodes(guarded, tmp_path):
    with Browser(tmp_path / "profile") as browser, Decoding(guarded, random_prompts(61, [6000])[0]):
        browser.open(guarded.url + "/rheoserve")
        browser.wait("return document.getElementById('status').textContent == 'needs the API key'")
        browser.type("#key", KEY + "\ue007")
        browser.wait("return document.getElementById('status').textContent == 'live'")
        row = browser.wait("return document.querySelector('#requests tbody tr.chosen')?.innerText")
        assert row.split()[:3] == ["watched", "decoding", "6000"]
        browser.wait("return document.getElementById('where').textContent.includes('blocks on the device')")
        tokens = int(browser.run("return document.querySelector('#requests tbody tr').cells[3].innerText"))
        browser.wait(f"return document.querySelector('#requests tbody tr').cells[3].innerText > {tokens}")
        browser.run("document.getElementById('layer').value = 3; document.getElementById('head').value = 1")
        browser.wait("return shown.startsWith('watched,3,1,') && lines.length > 3")
        colours = browser.run(
            "const map = document.getElementById('map');"
            "const line = map.getContext('2d').getImageData(0, 0, map.width, 1).data;"
            "return [...Array(map.width).keys()].map((at) => line[4 * at] > line[4 * at + 2])"
        )
        assert 0 < sum(colours) < len(colours)  # some blocks in host memory only, some on the device
        tiles = browser.run("return document.getElementById('tiles').innerText")
        assert "%" in tiles and "wait, prefilled" in tiles and "a step, predicted" in tiles
        step = browser.wait("return document.getElementById('step').innerText")
        assert [name in step for name in ("selection", "attention", "rest of the step")] == [True] * 3, step
        if os.environ.get("RHEOSERVE_TEST_PICTURES"):
            browser.picture(Path(os.environ["RHEOSERVE_TEST_PICTURES"]) / "page.png")
