"""Settings: bad values are refused with their flag, value and legal choices."""

import math

import pytest

from rheoserve_sgl.config import RheoConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "fast"}, "--rheoserve-mode is 'fast'; legal: balanced, retrieval, window, full"),
        ({"selector": "best"}, "--rheoserve-selector is 'best'; legal: auto, seer, quest, mean, oracle"),
        ({"selector": "seer"}, "--rheoserve-selector is 'seer'; legal: seer with --rheoserve-gate-path"),
        ({"gate_rope": "middle"}, "--rheoserve-gate-rope is 'middle'; legal: first, last"),
        ({"dense_layers": -1}, "--rheoserve-dense-layers is -1; legal: an integer of at least 0"),
        ({"device_attention": "all"}, "--rheoserve-device-attention is 'all'; legal: resident, selected"),
        ({"token_budget": 1000}, "--rheoserve-token-budget is 1000; legal: a multiple of 64, at least 64"),
        ({"token_budget": 512}, "--rheoserve-token-budget is 512; legal: at least 640 .sink 64 . window 512"),
        ({"device_tokens": 0}, "--rheoserve-device-tokens is 0; legal: a multiple of 64"),
        ({"sink_tokens": 0}, "--rheoserve-sink-tokens is 0"),
        ({"window_tokens": 100}, "--rheoserve-window-tokens is 100"),
        ({"threshold": 1.5}, "--rheoserve-threshold is 1.5; legal: a number above 0 and below 1"),
        ({"most_token_budget": 4000}, "--rheoserve-most-token-budget is 4000; legal: a multiple of 64"),
        (
            {"most_token_budget": 2048},
            "--rheoserve-most-token-budget is 2048; legal: at least --rheoserve-token-budget .4096",
        ),
        (
            {"most_token_budget": 8192, "mode": "full"},
            "--rheoserve-most-token-budget is 8192; legal: none where requests have no token budget",
        ),
        ({"threshold": 0.1, "token_budget": 4096}, "only one of it and --rheoserve-token-budget"),
        ({"host_size": -1.0}, "--rheoserve-host-size is -1.0; legal: a finite number above 0"),
        ({"host_size": math.inf}, "--rheoserve-host-size is inf; legal: a finite number above 0"),
        ({"tpot_slo_ms": math.nan}, "--rheoserve-tpot-slo-ms is nan; legal: a finite number above 0"),
        ({"host_ratio": "4"}, "--rheoserve-host-ratio is '4'; legal: a finite number above 0"),
        ({"most_missed": None}, "--rheoserve-most-missed is None; legal: a number above 0, at most 1"),
        ({"threshold": 1.0}, "--rheoserve-threshold is 1.0; legal: a number above 0 and below 1"),
        ({"token_budget": "4096"}, "--rheoserve-token-budget is '4096'; legal: a multiple of 64"),
        ({"sink_tokens": None}, "--rheoserve-sink-tokens is None; legal: a multiple of 64"),
        ({"decode_interleave": 1.5}, "--rheoserve-decode-interleave is 1.5; legal: an integer of at least 0"),
        ({"host_threads": True}, "--rheoserve-host-threads is True; legal: an integer of at least 1"),
        ({"gate_rope": "last"}, "--rheoserve-gate-rope is 'last'; legal: first, without a learned gate"),
        (
            {"admission": "on", "mode": "full"},
            "--rheoserve-admission is 'on'; legal: auto or off with --rheoserve-mode full",
        ),
        ({"host_size": 1.0, "host_ratio": 2.0}, "only one of it and --rheoserve-host-ratio"),
        ({"exchange_interval": 0}, "--rheoserve-exchange-interval is 0; legal: an integer of at least 1"),
        ({"host_threads": 0}, "--rheoserve-host-threads is 0"),
    ],
)
def test_bad_values_are_refused_by_flag(settings, message):
    with pytest.raises(ValueError, match=message):
        RheoConfig(**settings)


def test_defaults():
    config = RheoConfig()
    assert (config.mode, config.selector, config.budget, config.budget_pages) == (
        "balanced",
        "quest",
        4096,
        64,
    )
    assert config.as_dict()["token_budget"] == 4096


def test_a_small_budget_is_legal_where_nothing_is_selected():
    assert RheoConfig(mode="window", token_budget=64).as_dict()["token_budget"] is None  # nor is it one


def test_a_threshold_replaces_the_budget():
    assert RheoConfig(threshold=0.01).as_dict()["token_budget"] is None


def test_auto_takes_the_learned_gate_where_there_are_weights():
    assert RheoConfig(gate_path="gates").selector == "seer"
    assert RheoConfig(gate_path="gates", selector="quest").selector == "quest"
