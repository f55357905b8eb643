"""Choice of the kernel variant, and the self-test in a child process."""

import signal
import sys

import pytest
import torch

from rheoserve_sgl.ops import workers
from rheoserve_sgl.ops.extension import extension
from rheoserve_sgl.ops.workers import cpu_variant, self_test, worker_pool


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch):
    monkeypatch.delenv("RHEOSERVE_CPU_VARIANT", raising=False)
    cpu_variant.cache_clear()
    yield
    cpu_variant.cache_clear()


@pytest.mark.parametrize("variant", extension().cpu_variants())
def test_every_variant_of_this_machine_passes_its_self_test(variant):
    assert self_test(variant) == ""


def test_a_variant_that_kills_its_process_is_passed_over(monkeypatch, caplog):
    best = extension().cpu_variants()[0]
    illegal = f"import os, sys; sys.argv[1] == {best!r} and os.kill(os.getpid(), {int(signal.SIGILL)})"
    monkeypatch.setattr(workers, "SELF_TEST", illegal)
    assert worker_pool(1).variant == extension().cpu_variants()[1]
    assert f"{best} is announced by the processor, but fails: killed by signal 4" in caplog.text


def test_a_variant_with_wrong_results_is_named(monkeypatch):
    monkeypatch.setattr(workers, "SELF_TEST", "raise SystemExit('computes 1 where the scalar one has 2')")
    with pytest.raises(ValueError, match="no CPU variant passes its self-test.*computes 1"):
        worker_pool(1)


def test_a_child_that_cannot_import_is_a_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "SELF_TEST", "import only_here")
    assert "ModuleNotFoundError" in self_test("scalar")
    (tmp_path / "only_here.py").touch()
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert self_test("scalar") == ""  # it finds what this process finds


def test_one_pool_whatever_its_variant_is_called():
    assert worker_pool(2) is worker_pool(2, "") is worker_pool(2, cpu_variant())
    assert worker_pool(2) is not worker_pool(3)


def test_variant_override(monkeypatch):
    assert worker_pool(1, "scalar").variant == "scalar"
    with pytest.raises(ValueError, match="'sve' cannot run here; choices: .*scalar"):
        worker_pool(1, "sve")
    monkeypatch.setenv("RHEOSERVE_CPU_VARIANT", "scalar")
    cpu_variant.cache_clear()
    assert worker_pool(2).variant == "scalar"
    monkeypatch.setenv("RHEOSERVE_CPU_VARIANT", "sve")
    cpu_variant.cache_clear()
    with pytest.raises(ValueError, match="RHEOSERVE_CPU_VARIANT is 'sve'.*legal: .*scalar"):
        worker_pool(3)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("mebibytes", [1, 3, 40])
def test_a_streaming_read_sums_all_words(threads, mebibytes):
    """By threads that sleep between calls and by threads that poll."""
    words = torch.randint(-(2**62), 2**62, (mebibytes << 17,))
    pool = worker_pool(threads)
    for polling in (False, True):
        pool.keep_polling(polling)
        try:
            assert pool.stream_read(words.data_ptr(), words.nbytes) == words.sum().item() % 2**64
        finally:
            pool.keep_polling(False)
