"""Times that add up, and records that a resumed run neither repeats nor misses."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import records

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


def step_record(i: int) -> dict:
    return {"iter": i, "loss": 2.0, "lr": 0.1, "grad_norm": 1.0, "tokens_per_s": 5.0,
            "mfu": None, "data_ms": 1.0, "seconds": float(i)}


def evaluation_record(i: int) -> dict:
    return {"iter": i, "train_loss": 2.0, "val_loss": 2.5, "val_perplexity": 12.2,
            "val_accuracy": 0.25, "seconds": float(i)}


def write(folder: Path, *written: dict) -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in written))
    return path


def test_phases_are_milliseconds_per_step_and_add_up_within_a_step(clock):
    stopwatch = Stopwatch(CPU)
    for data, forward in ((0.5, 2.0), (1.5, 4.0)):
        stopwatch.start()
        clock.now += data
        stopwatch.lap("data_ms")
        for _ in range(3):
            for phase in ("forward_ms", "backward_ms"):
                clock.now += forward
                stopwatch.lap(phase)
    assert stopwatch.read() == {"data_ms": 1000.0, "forward_ms": 9000.0, "backward_ms": 9000.0}


def test_time_between_steps_and_before_the_last_reading_does_not_count(clock):
    stopwatch = Stopwatch(CPU)
    for duration in (1.0, 5.0):
        for _ in range(2):
            stopwatch.start()
            clock.now += duration
            stopwatch.lap("forward_ms")
            clock.now += 100  # an evaluation
        assert stopwatch.read() == {"forward_ms": duration * 1e3}


def test_on_mps_every_phase_ends_when_its_work_is_done(clock):
    def synchronize() -> None:
        clock.now += 2  # the work that was queued

    stopwatch = Stopwatch(SimpleNamespace(device=torch.device("mps"), synchronize=synchronize))
    stopwatch.start()
    stopwatch.lap("forward_ms")
    assert stopwatch.read() == {"forward_ms": 2000.0}


def test_records_go_to_the_file_as_they_come(tmp_path):
    log = Metrics(CPU, str(tmp_path), CONFIG, 0, [])
    log.evaluation(evaluation_record(0))
    log.step(step_record(0))
    assert records(tmp_path) == [evaluation_record(0), step_record(0)]
    log.close()


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    log = Metrics(CPU, None, CONFIG | {"tensorboard_log": True}, 0, [])
    log.evaluation(evaluation_record(0))
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert "val loss 2.5000" in capsys.readouterr().out


def test_a_process_that_is_not_main_writes_and_prints_nothing(tmp_path, capsys):
    log = Metrics(Runtime(torch.device("cpu"), "float32", False, 1, 2), str(tmp_path), CONFIG, 0,
                  [])
    log.evaluation(evaluation_record(0))
    log.step(step_record(0))
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_the_terminal_gets_the_loss_the_speed_and_mfu_when_known(tmp_path, capsys):
    log = Metrics(CPU, str(tmp_path), CONFIG, 0, [])
    log.step(step_record(0))
    log.step(step_record(1) | {"mfu": 0.425})
    log.close()
    without, with_mfu = capsys.readouterr().out.splitlines()
    assert "iter 0" in without
    assert "2.0000" in without
    assert "5 tok/s" in without
    assert "MFU" not in without
    assert "42.5%" in with_mfu


def test_steps_to_be_repeated_and_a_cut_line_are_dropped(tmp_path):
    written = [evaluation_record(0), *map(step_record, range(4)), evaluation_record(4),
               *map(step_record, range(4, 8)), evaluation_record(8)]
    path = write(tmp_path, *written)
    with open(path, "a") as file:
        file.write('{"iter": 8, "lo')
    keep_records_before(path, 4, [evaluation_record(0), evaluation_record(4)])
    assert records(tmp_path) == written[:6]
    assert path.read_text().endswith("}\n")


def test_an_evaluation_to_be_repeated_is_dropped(tmp_path):
    written = [evaluation_record(0), *map(step_record, range(4)), evaluation_record(4)]
    keep_records_before(write(tmp_path, *written), 4, [evaluation_record(0)])
    assert records(tmp_path) == written[:5]


@pytest.mark.parametrize("garbage", [
    b"5", b"null", b"[0]", b"{}", b'{"iter": "3"}', b'{"iter": null}', b'{"iter": 0', b"caf\xe9",
    b"\0\0\0", b"[" * 100_000])
def test_lines_that_are_no_records_are_dropped(tmp_path, garbage):
    path = tmp_path / "metrics.jsonl"
    record = json.dumps(step_record(0)).encode()
    path.write_bytes(record + b"\n" + garbage + b"\n" + record + b"\n")
    keep_records_before(path, 4, [])
    assert records(tmp_path) == [step_record(0)] * 2


def test_a_folder_in_place_of_the_records_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=f"cannot read {tmp_path}.*move it away"):
        keep_records_before(tmp_path, 4, [])


def test_a_resumed_run_appends(tmp_path):
    for start in (0, 3):
        log = Metrics(CPU, str(tmp_path), CONFIG, start, [])
        for i in range(start, start + 5):
            log.step(step_record(i))
        log.close()
    assert [record["iter"] for record in records(tmp_path)] == list(range(8))
