"""bench.py, run as users run it at the smallest size, alone and against peers."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run

from configurator import UserError

SMALL = ["--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=16", "--batch_size=2",
         "--rounds=2", "--new_tokens=4", "--max_iters=9", "--device=cpu", "--dtype=float32"]
PARAMETERS = 50304 * 16 + 12 * 16**2 + 3 * 16  # wte, the matrices of a block, norms


def bench(folder: Path, *args: str) -> tuple[str, dict]:
    """Output and figures of a run in `folder`."""
    done = run(ROOT / "bench.py", *args, "--json=figures.json", cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "figures.json").read_text())


@pytest.fixture
def run_here(monkeypatch):
    """A function that runs bench.py in this process and returns its globals."""
    def run_here(*args: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["bench.py", *SMALL, "--real_data=False", *args])
        return runpy.run_path(str(ROOT / "bench.py"), run_name="__main__")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    return run_here


@pytest.fixture(scope="module")
def profiled(tmp_path_factory) -> tuple[str, dict, Path]:
    """Output, figures and folder of a run without a dataset that writes a trace."""
    folder = tmp_path_factory.mktemp("bench")
    return *bench(folder, *SMALL, f"--dataset={folder / 'none'}", "--profile=True"), folder


def test_figures_are_printed_as_they_are_written_and_agree_with_each_other(profiled):
    output, figures, _ = profiled
    for section, names in (
            ("machine", "matmul_gflops_per_s memory_gb_per_s"),
            ("train", "parameters tokens_per_s step_ms data_ms forward_ms backward_ms optimizer_ms "
                      "gflops_per_s of_matmul peak_memory_gb"),
            ("sample", "parameters tokens_per_s of_memory_bound")):
        for name in names.split():
            text = re.findall(rf"^{section} +{name} +([\d.,]+)$", output, re.MULTILINE)[-1]
            assert float(text.replace(",", "")) == pytest.approx(
                figures[section][name], rel=0.01, abs=6e-4)
    train = figures["train"]
    seconds = train["step_ms"] / 1e3
    assert train["tokens_per_s"] == pytest.approx(2 * 16 / seconds)
    flops_per_token = 6 * (PARAMETERS - 3 * 16) + 12 * 16 * 16  # matrices and attention
    assert train["gflops_per_s"] == pytest.approx(2 * 16 * flops_per_token / seconds / 1e9)


def test_without_a_dataset_random_tokens_are_trained_on_and_a_step_is_traced(profiled):
    output, _, folder = profiled
    assert f"2 x 16 tokens per step, random, not of {folder / 'none' / 'train.bin'}" in output
    trace, = (folder / "bench_trace").iterdir()
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"aten::addmm", "aten::mm"} & names


def test_a_profile_that_the_profiler_did_not_write_is_not_reported(run_here, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", lambda self, path: None)
    with pytest.raises(UserError, match="did not write all of bench_trace"):
        run_here("--mode=train", "--profile=True")
    assert list((tmp_path / "bench_trace").iterdir()) == []


def test_unknown_figures_are_null_and_not_printed(run_here, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "resource", None)  # not there, as on Windows
    train = run_here("--mode=train")["results"]["train"]
    output = capsys.readouterr().out
    assert train["mfu"] is train["peak_memory_gb"] is None
    assert "step_ms" in output and "mfu" not in output and "peak_memory" not in output


def test_a_dataset_and_a_config_of_train_are_used_and_the_modern_recipe_has_a_peer(
        text_dataset, tmp_path):
    output, figures = bench(tmp_path, "config/fast_shakespeare_char_cpu.py", "--mode=train",
                            "--rounds=2", f"--dataset={text_dataset}", "--n_layer=1",
                            "--peer=plain")
    assert f"24 x 64 tokens per step, of {text_dataset / 'train.bin'}" in output
    low, middle, high = (figures["train"][f"times_as_long{s}"] for s in ("_min", "", "_max"))
    assert 0 < low <= middle <= high
    vocab_size = len(set("to be or not to be that is the question whether"))
    n = 12 * 176**2 + (vocab_size + 3) * 176  # of a block, embeddings, norms
    assert figures["train"]["parameters"] == n
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]  # no trace


@pytest.mark.parametrize("peer, name, dtype, fused", [
    ("plain", "Plain", torch.float32, None),
    ("transformers", "GPT2LMHeadModel", torch.bfloat16, True)])
def test_a_peer_has_our_size_and_the_precision_that_is_documented(
        run_here, monkeypatch, peer, name, dtype, fused):
    models, optimizers, init = set(), [], torch.optim.AdamW.__init__

    def record(model: torch.nn.Module, *_: object) -> None:
        if type(model).__name__ in ("GPT", name):
            n = sum(p.numel() for p in model.parameters())
            models.add((type(model).__name__, n, "train" if model.training else "sample",
                        next(model.parameters()).dtype, torch.is_autocast_enabled("cpu")))

    monkeypatch.setattr(torch.optim.AdamW, "__init__", lambda *args, **options: (
        optimizers.append(options.get("fused")), init(*args, **options))[1])
    matrix = torch.ones(2, 2)  # a large product in bfloat16 takes minutes on an older CPU
    monkeypatch.setattr(torch, "randn", lambda *_, **__: matrix)
    with torch.nn.modules.module.register_module_forward_hook(record):
        run_here(f"--peer={peer}", "--dtype=bfloat16", "--bias=True")
    n = PARAMETERS + (3 + 1 + 4 + 1 + 3 + 16) * 16  # biases and positions
    assert optimizers == [True, fused]
    assert models == {("GPT", n, "train", torch.float32, True),
                      ("GPT", n, "sample", torch.bfloat16, False),
                      (name, n, "train", torch.float32, peer == "transformers"),
                      (name, n, "sample", dtype, False)}


def test_preparing_data_is_compared_with_tiktoken(tmp_path):
    output, figures = bench(tmp_path, "--mode=data", "--input_mb=1", "--rounds=1")
    data = figures["data"]
    assert "train " not in output and "sample " not in output
    assert data["input_mb"] == pytest.approx(1, rel=0.1)
    assert data["mb_per_s"] == pytest.approx(data["input_mb"] / data["seconds"])
    assert data["of_tiktoken"] > 0


@pytest.mark.parametrize("args, words", [
    (["--peer=transformers", "--new_tokens=16"], ["new_tokens = 16", "block_size = 16"]),
    (["--profile=True", "--mode=sample"], ["profile = True", "mode = 'sample'"]),
    (["--mode=plan", "--json=/dev/null"], ["/dev/null: not a regular file"])])
def test_settings_that_exclude_each_other_or_replace_a_device_are_refused(args, words):
    done = run(ROOT / "bench.py", *SMALL, *args)
    assert done.returncode == 2 and all(word in done.stderr for word in words)
