"""bench.py, run as users run it at the smallest size, with and without data."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, run

SMALL = ["--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=16", "--batch_size=2",
         "--steps=2", "--new_tokens=4", "--device=cpu", "--dtype=float32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def profiled(folder) -> str:
    """The output of a run without data that writes a trace into `folder`."""
    done = run(ROOT / "bench.py", *SMALL, f"--dataset={folder / 'none'}", "--profile=True",
               cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("figure", [
    r"training: [\d,]+ tok/s, [\d,.]+ ms a step",
    r"\d GFLOP/s, \d+% of the [\d,]+ GFLOP/s of a 2048\^3 matrix product in float32",
    r"\d\.\d\d GB peak memory",
    r"sampling: [\d,.]+ tok/s, one sequence of 4 tokens",
])
def test_every_figure_is_printed(profiled, figure):
    assert re.search(figure, profiled)


def test_mfu_is_left_out_where_the_peak_is_unknown(profiled):
    assert "MFU" not in profiled


def test_throughput_is_that_of_the_printed_step(profiled):
    tokens, ms = re.search(r"training: ([\d,]+) tok/s, ([\d,.]+) ms", profiled).groups()
    tokens_per_s, ms = int(tokens.replace(",", "")), float(ms.replace(",", ""))
    assert 32 / (ms + 0.051) * 1e3 - 1 <= tokens_per_s <= 32 / (ms - 0.051) * 1e3 + 1


def test_random_tokens_are_said_to_be_random(profiled, folder):
    assert f"random tokens, as there is no {folder / 'none' / 'train.bin'}" in profiled


def test_the_profile_is_a_trace_of_the_training_step(profiled, folder):
    trace, = (folder / "bench_trace").iterdir()
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"aten::addmm", "aten::mm"} & names
    assert "trace" in profiled


def test_real_data_are_read_when_they_are_there(text_dataset, tmp_path):
    done = run(ROOT / "bench.py", *SMALL, f"--dataset={text_dataset}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"tokens of {text_dataset / 'train.bin'}" in done.stdout
    assert "random" not in done.stdout
    assert list(tmp_path.iterdir()) == []  # no trace unless asked for
