"""Five minutes of mixed traffic; `python -m benchmarks.soak --minutes 10` is the longer run."""

import json

import pytest

from benchmarks.soak.__main__ import main
from benchmarks.soak.memory import MB, growth

pytestmark = pytest.mark.server


def test_mixed_traffic_loses_and_leaks_nothing(checkpoints, tmp_path, capsys):
    options = ["--model", str(checkpoints.path()), "--minutes", "5", "--clients", "4", "--compared", "12"]
    assert main([*options, "--logs", str(tmp_path)]) == 0, capsys.readouterr().out[-6000:]
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["compared"] == 12 and document["wrong_answers"] == document["failures"] == []
    assert len(document["requests"]) == 10 and min(document["requests"].values()) > 0
    assert document["memory"]["host"]["thirds_mb"][0] > 500
    assert 0 < document["host_attention_share"] < 1 and document["exchanges"] > 0 and document["retracted"] > 0


def test_growth_is_seen():
    looks = [100 * MB] * 40 + [200 * MB] * 40 + [230 * MB] * 40
    assert growth(looks) == {"thirds_mb": [100, 200, 230], "last_third_grew": 0.15}
    assert growth([1] * 5) == {}
