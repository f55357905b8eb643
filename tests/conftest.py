"""Fixtures: checkpoints made here, and real server processes."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["RHEOSERVE_CACHE"] = "off"  # no test depends on what ran before it

import pytest
from serving import Checkpoints, Server, rheo_server


def pytest_configure(config):
    """Where GPU tests are left out, servers are CPU ones: their answers are compared in fp32, which SGLang has no
    kernels for on a GPU."""
    if "not gpu" in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Checkpoints:
    """Small checkpoints by shape and dtype, made once."""
    return Checkpoints(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def dense(checkpoints, tmp_path_factory):
    """SGLang's own torch_native backend in fp32: the dense oracle."""
    args = ["--attention-backend", "torch_native", "--page-size", "64", "--max-total-tokens", "65536"]
    with Server(checkpoints.path(), args, tmp_path_factory.mktemp("dense") / "log") as server:
        yield server


@pytest.fixture(scope="session")
def full(checkpoints, tmp_path_factory):
    """RheoServe in `full` mode in fp32, with frames for 512 tokens: most blocks are in the host store only."""
    args = ["--rheoserve-mode", "full", "--rheoserve-device-tokens", "512", "--chunked-prefill-size", "512"]
    args += ["--enable-custom-logit-processor", "--enable-metrics", "--decode-log-interval", "4"]
    with rheo_server(checkpoints.path(), args, tmp_path_factory.mktemp("full")) as server:
        yield server
