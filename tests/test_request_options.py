"""What one request may choose, and what it is told when it may not."""

from types import SimpleNamespace

import pytest
import torch

from rheoserve_sgl.config import RheoConfig
from rheoserve_sgl.runtime.request_options import ALL_PAGES, SelectionLimits, selected_pages

SERVER = RheoConfig(token_budget=1024)


@pytest.mark.parametrize(
    ("custom_params", "pages"),
    [
        (None, 16),
        ({}, 16),
        ({"thinking_budget": 7}, 16),
        ({"rheoserve": {}}, 16),
        ({"rheoserve": {"report": True}}, 16),
        ({"rheoserve": {"token_budget": 4096}}, 64),
        ({"rheoserve": {"token_budget": 640}}, 10),
        ({"rheoserve": {"token_budget": 640, "mode": "balanced"}}, 10),
        ({"rheoserve": {"token_budget": 640.0}}, 10),
        ({"rheoserve": {"mode": "full"}}, ALL_PAGES),
        ({"rheoserve": {"mode": "window"}}, 0),
        ({"rheoserve": {"token_budget": 1 << 60}}, ALL_PAGES),
    ],
)
def test_legal_options(custom_params, pages):
    assert selected_pages(custom_params, SERVER) == pages


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (5, "custom_params.rheoserve is 5; legal: an object"),
        ({"budget": 64}, "custom_params.rheoserve.budget is 64; legal: token_budget, mode, report are the options"),
        ({"report": 1}, "report is 1; legal: true, false"),
        ({"token_budget": 576}, "token_budget is 576; legal: a multiple of 64, at least 640"),
        ({"token_budget": 700}, "token_budget is 700"),
        ({"token_budget": "700"}, "token_budget is '700'"),
        ({"token_budget": True}, "token_budget is True"),
        ({"token_budget": 1024.5}, "token_budget is 1024.5"),
        ({"mode": "retrieval"}, "mode is 'retrieval'; legal: full, window, balanced"),
        ({"mode": "full", "token_budget": 1024}, "mode is 'full'; legal: balanced with a token_budget"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        selected_pages({"rheoserve": options}, SERVER)


def test_a_refusal_repeats_only_so_much_of_what_was_asked():
    for options in ({"a" * 10**6: 1}, {"mode": "b" * 10**6}, {"token_budget": 10**1000 + 1}):
        with pytest.raises(ValueError, match="; legal: ") as refused:
            selected_pages({"rheoserve": options}, SERVER)
        assert len(str(refused.value)) < 400


def test_limits_are_known_before_a_request_has_a_slot():
    limits = SelectionLimits(4, SERVER, "cpu")
    params = SimpleNamespace(custom_params={"rheoserve": {"mode": "full"}})
    request = SimpleNamespace(req_pool_idx=None, sampling_params=params)
    assert limits.of_request(request) == ALL_PAGES
    params.custom_params = {"rheoserve": {"token_budget": 700}}  # refused over HTTP
    assert limits.of_request(request) == 16
    limits.admit(2, {"rheoserve": {"token_budget": 640}})
    request.req_pool_idx = 2
    assert limits.of_request(request) == limits.of(2) == 10


@pytest.mark.parametrize(
    ("config", "pages"),
    [
        (RheoConfig(mode="full"), ALL_PAGES),
        (RheoConfig(mode="window"), 0),
        (RheoConfig(mode="retrieval"), 64),
        (SERVER, 16),
    ],
)
def test_without_options_a_request_selects_what_the_mode_does(config, pages):
    assert selected_pages(None, config) == config.budget_pages == pages


def test_a_server_may_bound_what_requests_choose():
    bounded = RheoConfig(token_budget=1024, most_token_budget=2048)
    for options, pages in ((None, 16), ({"token_budget": 2048}, 32), ({"mode": "window"}, 0)):
        assert selected_pages({"rheoserve": options}, bounded) == pages
    for options, message in (
        ({"token_budget": 2112}, "token_budget is 2112; legal: at most 2048, as the server has it"),
        ({"token_budget": 1 << 60}, "legal: at most 2048"),
        ({"mode": "full"}, "mode is 'full'; legal: window, balanced"),
    ):
        with pytest.raises(ValueError, match=message):
            selected_pages({"rheoserve": options}, bounded)


@pytest.mark.parametrize("server", [RheoConfig(mode="full"), RheoConfig(threshold=0.01)])
def test_a_server_without_a_budget_takes_none(server):
    assert selected_pages({"rheoserve": {"mode": server.mode}}, server) == server.budget_pages
    for options in ({"token_budget": 1024}, {"mode": "window"}):
        with pytest.raises(ValueError, match="the server does not select by a token budget"):
            selected_pages({"rheoserve": options}, server)


def test_a_slot_forgets_the_request_before():
    limits = SelectionLimits(4, SERVER, "cpu")
    limits.admit(2, {"rheoserve": {"token_budget": 640}})
    assert limits.pages[torch.tensor([1, 2])].tolist() == [16, 10]
    limits.admit(2, {"rheoserve": {"token_budget": 1}})  # never raises: the scheduler calls it
    assert limits.pages.tolist() == [16] * 4
    limits.admit(2, {"rheoserve": {"mode": "full"}})
    limits.admit(2, None)
    assert limits.pages.tolist() == [16] * 4
