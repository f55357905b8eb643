"""What the latency model learnt is there at the next start, and a file that is not as it should be harms nothing."""

import json
import logging

import numpy as np
import pytest
from serving import rheo_server

from rheoserve_sgl import environ
from rheoserve_sgl.runtime.latency_cache import LatencyCache
from rheoserve_sgl.runtime.latency_model import KEPT_EVERY, PRIOR, TERMS, LatencyModel, Rates, StepLoad

FACTS = {"cpu": "some", "threads": 2}


def test_a_model_that_resumes_predicts_as_the_one_before(tmp_path):
    cache, rates = LatencyCache(FACTS, tmp_path), Rates(4e12, 2e11, beside=True)
    model, load = LatencyModel(rates, 16 * 10**9, cache), StepLoad(4, 2e10, 2e8, 1e9)
    assert cache.read(len(TERMS)) is None
    model.keep()
    assert cache.read(len(TERMS)) == (4e12, 2e11, None)  # measured; nothing was learnt
    for _ in range(KEPT_EVERY):
        model.observe(load, 0.02)
    device, host, factors = LatencyCache(FACTS, tmp_path).read(len(TERMS))
    assert (device, host) == (4e12, 2e11) and not np.allclose(factors, PRIOR)
    again = LatencyModel(rates, 16 * 10**9)
    again.resume(factors)
    assert again.predict(load) == pytest.approx(model.predict(load)) == pytest.approx(0.02, rel=0.02)
    for _ in range(30):  # the machine has become another: it is not held to what it was
        again.observe(load, 0.03)
    assert again.predict(load) == pytest.approx(0.03, rel=0.02)


def test_other_machines_models_and_settings_have_other_files(tmp_path):
    LatencyCache(FACTS, tmp_path).write(1.0, 2.0, [1.0] * len(TERMS))
    assert LatencyCache(FACTS | {"threads": 4}, tmp_path).read(len(TERMS)) is None
    assert LatencyCache(dict(reversed(FACTS.items())), tmp_path).read(len(TERMS)) == (1.0, 2.0, [1.0] * len(TERMS))


GOOD = {"device": 1.0, "host": 2.0, "factors": [1.0] * len(TERMS)}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        json.dumps({"device": 1.0, "host": 2.0}),
        json.dumps(GOOD | {"host": 0.0}),
        json.dumps(GOOD | {"device": float("nan")}),
        json.dumps(GOOD | {"device": 10**400}),
        json.dumps(GOOD | {"factors": []}),
        json.dumps(GOOD | {"factors": ""}),
        json.dumps(GOOD | {"factors": [1.0]}),
        json.dumps(GOOD | {"factors": [-1.0] * len(TERMS)}),
        json.dumps(GOOD | {"factors": "fast"}),
    ],
)
def test_a_bad_file_is_measured_anew(text, tmp_path, caplog):
    cache = LatencyCache(FACTS, tmp_path)
    cache.path.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert cache.read(len(TERMS)) is None
    assert str(cache.path) in caplog.text and "measured anew" in caplog.text
    cache.write(**GOOD)
    assert cache.read(len(TERMS)) == (1.0, 2.0, GOOD["factors"])
    assert [path.name for path in tmp_path.iterdir()] == [cache.path.name]


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache = LatencyCache(FACTS, tmp_path / "file" / "folder")
    with caplog.at_level(logging.WARNING):
        cache.write(**GOOD)
        cache.write(**GOOD)
    assert caplog.text.count("cannot be written") == 1 and cache.read(len(TERMS)) is None
    nowhere = LatencyCache(FACTS, None)
    nowhere.write(**GOOD)
    assert nowhere.read(len(TERMS)) is None
    (tmp_path / "full").mkdir()
    cache = LatencyCache(FACTS, tmp_path / "full")
    in_the_way = cache.path
    in_the_way.mkdir()  # cannot be replaced by a file
    cache.write(**GOOD)
    assert list((tmp_path / "full").iterdir()) == [in_the_way]


@pytest.mark.parametrize(("value", "folder"), [("off", None), ("/some/where", "/some/where"), ("", ".cache/rheoserve")])
def test_the_folder_is_the_environments(value, folder, monkeypatch):
    monkeypatch.setenv("RHEOSERVE_CACHE", value)
    found = environ.cache_folder()
    assert found is None if folder is None else str(found).endswith(folder)


@pytest.mark.slow
@pytest.mark.server
def test_a_server_measures_once(checkpoints, tmp_path):
    env = {"RHEOSERVE_CACHE": str(tmp_path / "cache")}
    told = []
    for _ in range(2):
        with rheo_server(checkpoints.path(), [], tmp_path, env) as server:
            server.tokens([[1, 2, 3]], 2)
            told.append([line for line in server.log.read_text().splitlines() if "CPU's attention" in line])
    [path] = (tmp_path / "cache").iterdir()
    assert any("measuring" in line for line in told[0]) and any("(measured)" in line for line in told[0])
    assert len(told[1]) == 1 and f"(from {path})" in told[1][0]


def test_where_nobody_is_at_home_nothing_is_kept(monkeypatch):
    def fails(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("RHEOSERVE_CACHE")
    monkeypatch.setattr("pathlib.Path.expanduser", fails)
    assert environ.cache_folder() is None
