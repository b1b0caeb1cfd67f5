"""bench.py, run as users run it at the smallest size, alone and beside peers."""

import json
import re
import runpy
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run

SMALL = ["--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=16", "--batch_size=2",
         "--rounds=2", "--new_tokens=4", "--max_iters=9", "--device=cpu", "--dtype=float32"]


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
    r"machine:  [\d,]+ GFLOP/s in a 2048\^3 matrix product in float32, \d+\.\d GB/s read",
    r"training: [\d,]+ tok/s, [\d,.]+ ms a step",
    r"\d GFLOP/s, \d+% of the matrix product",
    r"\d\.\d\d GB peak memory",
    r"sampling: [\d,.]+ tok/s, 1 x 4 tokens",
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


@pytest.mark.parametrize("peer", ["plain", "transformers"])
def test_peers_take_turns_with_us_and_every_figure_is_in_the_file(tmp_path, peer):
    done = run(ROOT / "bench.py", *SMALL, f"--dataset={tmp_path / 'none'}", f"--peer={peer}",
               "--num_samples=2", "--json=figures.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ratios = re.findall(rf"{peer}: [\d,.]+ ms, (\S+) times as long \((\S+) to (\S+) in 2",
                        done.stdout)
    assert len(ratios) == 2  # in training, in sampling
    for middle, low, high in ratios:
        assert float(low) <= float(middle) <= float(high)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["settings"]["n_embd"] == 16
    assert figures["machine"]["torch"] == torch.__version__
    for part in ("train", "sample"):
        assert f"{figures[part]['times_as_long'][peer]:.2f}" in [middle for middle, *_ in ratios]
        assert figures[part]["parameters"] == 50304 * 16 + 12 * 16**2 + 3 * 16  # wte, block, norms
    assert len(figures["sample"]["ms_per_token_by_eighth"]) == 4  # of four tokens


def test_the_modern_recipe_is_measured_beside_a_peer_that_stays_gpt2(tmp_path):
    done = run(ROOT / "bench.py", *SMALL, f"--dataset={tmp_path / 'none'}", "--mode=train",
               "--peer=plain", "--positions=rotary", "--activation=relu2", "--smear=True",
               "--optimizer=muon")
    assert done.returncode == 0, done.stderr
    assert "plain is GPT-2 all the same: it knows no positions, smear\n" in done.stdout


def test_peers_are_models_of_the_same_size(monkeypatch):
    # Their parameters, counted by the script itself: read from its namespace after a run.
    monkeypatch.setattr(sys, "argv", ["bench.py", *SMALL, "--mode=train", "--peer=plain",
                                      "--real_data=False", "--bias=True"])
    hook, handlers = sys.excepthook, signal.getsignal(signal.SIGINT)
    try:
        names = runpy.run_path(str(ROOT / "bench.py"))
    finally:
        sys.excepthook = hook
        signal.signal(signal.SIGINT, handlers)
    ours = sum(p.numel() for p in names["model"].parameters())
    assert sum(p.numel() for p in names["Plain"]().parameters()) == ours
    names["make_peer"].__globals__["peer"] = "transformers"
    assert sum(p.numel() for p in names["make_peer"]().parameters()) == ours


def test_preparing_data_is_measured_beside_tiktoken(tmp_path):
    done = run(ROOT / "bench.py", "--mode=data", "--input_mb=1", "--rounds=1",
               "--json=figures.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"data: +\d+\.\d MB/s, 1 MB of JSON lines in \d+\.\d\d s", done.stdout)
    assert "training" not in done.stdout and "sampling" not in done.stdout
    data = json.loads((tmp_path / "figures.json").read_text())["data"]
    assert data["mb_per_s"] == pytest.approx(data["input_mb"] / data["seconds"])
    assert f"ours takes {data['of_tiktoken_threads']:.2f} times as long as tikt" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_a_config_file_of_train_gives_the_shape(text_dataset, tmp_path):
    done = run(ROOT / "bench.py", "config/train_shakespeare_char_cpu.py", *SMALL[5:],
               "--mode=train", f"--dataset={text_dataset}", "--n_layer=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "0.2M parameters, 12 x 64 tokens a step" in done.stdout


def test_transformers_is_not_asked_for_more_than_its_context():
    done = run(ROOT / "bench.py", *SMALL, "--peer=transformers", "--new_tokens=16")
    assert done.returncode == 2
    assert "new_tokens = 16" in done.stderr and "block_size = 16" in done.stderr
