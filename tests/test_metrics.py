"""Times that add up, and what becomes of the records of a run that is resumed."""

from types import SimpleNamespace

import pytest
import torch

from configurator import UserError
from engine import metrics
from engine.metrics import Metrics, Stopwatch, keep_records_before
from engine.runtime import Runtime

CPU = Runtime(torch.device("cpu"), "float32", False)
CONFIG = {"eval_only": False, "tensorboard_log": False, "wandb_log": False, "max_iters": 8}


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The time that a stopwatch sees, in seconds."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_phases_are_milliseconds_per_step_without_the_time_between_steps_and_readings(clock):
    stopwatch = Stopwatch(CPU)
    for scale in (1, 5):
        for data, forward in ((0.5, 2.0), (1.5, 4.0)):
            stopwatch.start()
            clock.now += scale * data
            stopwatch.lap("data_ms")
            for _ in range(3):  # micro-steps
                for phase in ("forward_ms", "backward_ms"):
                    clock.now += scale * forward
                    stopwatch.lap(phase)
            clock.now += 100  # an evaluation
        assert stopwatch.read() == {"data_ms": scale * 1e3, "forward_ms": scale * 9e3,
                                    "backward_ms": scale * 9e3}


def test_on_mps_every_phase_ends_when_its_work_is_done(clock):
    def synchronize() -> None:
        clock.now += 2  # the work that was queued

    stopwatch = Stopwatch(SimpleNamespace(device=torch.device("mps"), synchronize=synchronize))
    stopwatch.start()
    stopwatch.lap("forward_ms")
    assert stopwatch.read() == {"forward_ms": 2000.0}


def test_the_terminal_gets_the_loss_the_speed_and_mfu_when_known(tmp_path, capsys):
    record = {"iter": 0, "loss": 2.0, "lr": 0.1, "grad_norm": 1.0, "tokens_per_s": 5.0,
              "mfu": None, "data_ms": 1.0, "seconds": 0.0}
    log = Metrics(CPU, str(tmp_path), CONFIG, 0, [])
    log.step(record)
    log.step(record | {"mfu": 0.425})
    log.close()
    without, with_mfu = capsys.readouterr().out.splitlines()
    for word in ("iter 0", "2.0000", "5 tok/s"):
        assert word in without
    assert "MFU" not in without
    assert "42.5%" in with_mfu


def test_what_a_resumed_run_repeats_and_lines_that_are_no_records_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first, *dropped, last = [
        b'{"iter": 0, "val_loss": 2.5}', b'{"iter": 4, "loss": 2.0}',
        b'{"iter": 4, "val_loss": 2.4}', b"5", b"null", b"[0]", b"{}", b'{"iter": "3"}',
        b'{"iter": null}', b'{"iter": 0', b"caf\xe9", b"\0\0\0", b"[" * 100_000,
        b'{"iter": 3, "loss": 2.0}']
    path.write_bytes(b"\n".join([first, *dropped, last]))
    keep_records_before(path, 4, [{"iter": 0}])
    assert path.read_bytes().splitlines() == [first, last]


def test_a_folder_in_place_of_the_records_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=f"cannot read {tmp_path}.*move it away"):
        keep_records_before(tmp_path, 4, [])
