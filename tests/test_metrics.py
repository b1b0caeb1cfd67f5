"""Times that add up, and what becomes of the records of a run that is resumed."""

import time
from types import SimpleNamespace

import pytest
import torch
from conftest import run

from engine import metrics
from engine.metrics import Metrics, Stopwatch, keep_records_before
from engine.progress import Progress
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


def test_lines_have_less_than_80_columns_with_the_fraction_done_and_the_time_left(
        tmp_path, capsys):
    record = {"iter": 345678, "loss": 2.85123, "lr": 6e-4, "grad_norm": 0.31234,
              "tokens_per_s": 1234567.0, "mfu": None, "data_ms": 1.0, "seconds": 63 * 3600.0}
    progress = Progress(CPU, 345600, 600000)
    progress.n_steps, progress.first_end = 79, time.monotonic() - 79 * 10  # seconds, 10 a step
    log = Metrics(progress, str(tmp_path), CONFIG, 345600, [])
    log.step(record)
    log.step(record | {"mfu": 0.425, "tokens_per_s": 1234.5})
    log.evaluation({"iter": 599999, "train_loss": 2.85123, "val_loss": 2.9123,
                    "val_perplexity": 18.2345, "val_accuracy": 0.4234})
    log.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (" 58% iter 345678: loss 2.8512, norm 0.312, 1,235k tok/s, 63h, 29d left")
    assert "1,234 tok/s, MFU 42%, 63h" in lines[1]
    assert len(lines) == 3 and all(len(line) < 80 for line in lines)


def test_without_a_terminal_a_long_evaluation_prints_a_line_every_30_s(monkeypatch, capsys):
    progress = Progress(CPU, 0, 8)
    now = progress.last_print
    for second in range(0, 100, 2):
        monkeypatch.setattr(time, "monotonic", lambda second=second: now + second)
        progress.status("evaluating", second, 100)
    assert capsys.readouterr().out.splitlines() == [
        f"evaluating {second}/100" for second in (32, 64, 96)]


def test_training_goes_on_when_weights_and_biases_is_lost(capsys):
    def lose(values: dict, step: int) -> None:
        raise ConnectionError("no server")

    log = Metrics(Progress(CPU, 0, 8), None, CONFIG, 0, [])
    log.wandb = SimpleNamespace(log=lose)
    for i in range(2):
        log._send({"iter": i, "loss": 1.0})
    assert capsys.readouterr().out.count("no server") == 1


@pytest.mark.parametrize("variable, value", [
    ("WANDB_MODE", "junk"), ("WANDB_BASE_URL", "no address"), ("WANDB_INIT_TIMEOUT", "soon"),
    ("wandb_project", "a/b")])
def test_settings_that_weights_and_biases_refuses_are_one_sentence(variable, value):
    project = value if variable == "wandb_project" else "p"
    code = ("from engine.metrics import check_loggers; import configurator\n"
            "configurator.configure({'__file__': ''}, [])\n"
            "check_loggers({'tensorboard_log': False, 'wandb_log': True, 'wandb_run_name': 'r', "
            f"'wandb_project': {project!r}}})")
    done = run("-c", code, **{variable: value})
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: Weights & Biases did not start")
    assert done.stderr.count("\n") == 1


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
