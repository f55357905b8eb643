"""Pictures of results: what is drawn is what the rows say."""

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import draw_prediction
import draw_thrash

ROWS = [
    {"context": 2048, "requests": 1, "predicted_ms": 5.0, "windows_ms": 5.0},
    {"context": 2048, "requests": 8, "predicted_ms": 9.0, "windows_ms": 10.0},
    {"context": 65536, "requests": 4, "predicted_ms": 20.4, "windows_ms": 20.0},
    {"context": 65536, "requests": 4, "predicted_ms": None, "windows_ms": 20.0},
    {"context": 65536, "requests": 2},
]


def test_predictions_lie_where_they_were_measured(tmp_path, monkeypatch):
    (tmp_path / "result").write_text(json.dumps({"rows": ROWS}))
    monkeypatch.setattr(sys, "argv", ["draw", str(tmp_path / "result"), str(tmp_path / "picture.svg")])
    draw_prediction.main()
    text = (tmp_path / "picture.svg").read_text()
    assert "within 2.0% of measured (median of 3)" in text
    dots = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', text)]
    assert len(dots) == 3 + 2  # and the two contexts of the legend
    side = draw_prediction.SIDE
    for (x, y), row in zip(dots, ROWS[:3], strict=False):
        assert (x - draw_prediction.LEFT) / side * 25 == pytest.approx(row["windows_ms"], abs=0.01)
        assert (draw_prediction.TOP + side - y) / side * 25 == pytest.approx(row["predicted_ms"], abs=0.01)


def test_rows_without_a_prediction_are_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "result").write_text(json.dumps({"rows": ROWS[3:]}))
    monkeypatch.setattr(sys, "argv", ["draw", str(tmp_path / "result"), str(tmp_path / "picture.svg")])
    with pytest.raises(SystemExit):
        draw_prediction.main()
    assert "no row has a prediction" in capsys.readouterr().err


LOG = """\
[2026-11-26 06:00:00] Decode batch, #running-req: 1, #token: 64, host share: 0.000, gen throughput (token/s): 9.00, #q
[2026-11-26 06:00:02] Decode batch, #running-req: 24, #token: 64, host share: 0.{share}, gen throughput (token/s): 200.0
[2026-11-26 06:00:10] Decode batch, #running-req: 24, #token: 64, host share: 0.500, gen throughput (token/s): 100.0, x
"""


def test_logs_of_two_servers_are_drawn_beside_each_other(tmp_path, monkeypatch, capsys):
    for name, share in (("off", "800"), ("on", "250")):
        (tmp_path / name).write_text(LOG.replace("{share}", share))
    files = [str(tmp_path / name) for name in ("off", "on", "picture.svg")]
    monkeypatch.setattr(sys, "argv", ["draw", *files])
    draw_thrash.main()
    text = (tmp_path / "picture.svg").read_text()
    width, high = draw_thrash.WIDTH - draw_thrash.LEFT - draw_thrash.RIGHT, draw_thrash.HIGH
    x = draw_thrash.LEFT + width * 0.2
    for share, (_, colour) in zip((0.8, 0.25), draw_thrash.COLOURS, strict=True):
        y = draw_thrash.TOP + high * (1 - share)
        assert (
            f'<path d="M{x:.1f} {y:.1f}L740.0 {draw_thrash.TOP + high / 2:.1f}" fill="none" stroke="{colour}"' in text
        )
    assert text.count('stroke="#c0392b"') == text.count('stroke="#2471a3"') == 2
    (tmp_path / "on").write_text("nothing of it")
    with pytest.raises(SystemExit):
        draw_thrash.main()
    assert "on: no decode line" in capsys.readouterr().err
