"""What only a GPU can show: precision, compilation, resuming, CUDA graphs, NCCL.

Skipped where there is no GPU. Run it first of all where there is one: pytest tests/test_cuda.py -s
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import MODERN, ROOT, TINY, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")

GPU = [*TINY, "--device=cuda", "--dropout=0.1", "--n_embd=64"]
RECIPE = [*(f"--{name}={value}" for name, value in MODERN.items()), "--optimizer=muon"]


def train(out_dir: Path, dataset: Path, *args: str, launcher: tuple[str, ...] = ()) -> list[float]:
    """Run train.py, and return its training losses."""
    done = run(*launcher, ROOT / "train.py", *GPU, f"--out_dir={out_dir}", f"--dataset={dataset}",
               *args)
    assert done.returncode == 0, done.stderr
    records = map(json.loads, (out_dir / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


@pytest.fixture(scope="module")
def float32(text_dataset, tmp_path_factory) -> list[float]:
    """Losses in float32, without dropout, to compare with."""
    return train(tmp_path_factory.mktemp("float32") / "run", text_dataset, "--dropout=0",
                 "--dtype=float32", "--compile=False")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("compile", ["False", "True"])
def test_losses_are_those_of_float32(dtype, compile, float32, text_dataset, tmp_path):
    losses = train(tmp_path / "run", text_dataset, "--dropout=0", f"--dtype={dtype}",
                   f"--compile={compile}")
    assert losses == pytest.approx(float32, rel=2e-2)


def test_losses_are_those_of_a_cpu(float32, text_dataset, tmp_path):
    losses = train(tmp_path / "run", text_dataset, "--dropout=0", "--dtype=float32",
                   "--device=cpu")
    assert losses == pytest.approx(float32, rel=1e-3)  # a GPU multiplies in TF32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("recipe", [[], RECIPE], ids=["gpt2", "modern"])
@pytest.mark.parametrize("compile", ["False", "True"])
def test_a_resumed_run_is_the_uninterrupted_one(dtype, recipe, compile, text_dataset, tmp_path):
    settings = [*recipe, f"--dtype={dtype}", f"--compile={compile}"]
    whole = train(tmp_path / "whole", text_dataset, *settings, "--keep_every=4")
    (tmp_path / "parts").mkdir()
    shutil.copy(tmp_path / "whole/ckpt_00000004.pt", tmp_path / "parts/ckpt.pt")
    shutil.copy(tmp_path / "whole/metrics.jsonl", tmp_path / "parts")
    parts = train(tmp_path / "parts", text_dataset, *settings, "--init_from=resume")
    differences = [abs(a - b) for a, b in zip(whole, parts, strict=True)]
    print("largest difference of a loss:", max(differences))
    assert parts == pytest.approx(whole, rel=1e-3)  # some GPU kernels sum in any order


@pytest.mark.parametrize("recipe", [[], RECIPE], ids=["gpt2", "modern"])
def test_cuda_graphs_sample_the_same_text(recipe, text_dataset, tmp_path):
    train(tmp_path / "run", text_dataset, *recipe)
    texts = []
    for compile in ("False", "True"):
        done = run(ROOT / "sample.py", f"--out_dir={tmp_path / 'run'}", "--start=to be",
                   "--num_samples=2", "--max_new_tokens=40", "--temperature=0", "--device=cuda",
                   "--dtype=float32", f"--compile={compile}")
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    assert texts[0] == texts[1]


def test_bench_prints_mfu_where_the_peak_is_known(tmp_path):
    done = run(ROOT / "bench.py", "--n_layer=2", "--batch_size=4", "--rounds=3", "--new_tokens=8",
               "--device=cuda", "--json=figures.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["train"]["tokens_per_s"] > 0 and figures["sample"]["tokens_per_s"] > 0
    assert (figures["train"]["mfu"] is not None) == ("TFLOP/s" in done.stdout)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_two_gpus_train_like_one(float32, text_dataset, tmp_path):
    losses = train(tmp_path / "run", text_dataset, "--dropout=0", "--dtype=float32",
                   "--compile=False", launcher=(
                       "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"))
    assert losses == pytest.approx(float32, rel=1e-3)
