"""Every setting of the modern recipe, alone and together: train, resume, sample."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import MODERN, ROOT, TINY, forked

SETTINGS = MODERN | {"optimizer": "muon", "schedule": "linear", "embedding_lr": 0.02,
                     "embedding_decay": 0.0}
RECIPES = {name: {name: value} for name, value in SETTINGS.items()} | {
    "head_lr": {"tie_weights": False, "head_lr": 0.005, "head_decay": 0.0},
    "muon in bfloat16": {"optimizer": "muon", "dtype": "bfloat16", "muon_momentum": 0.8},
    "all": SETTINGS | {"head_lr": 0.005, "head_decay": 0.0, "dropout": 0.1, "muon_lr": 0.05}}
TIMES = {"tokens_per_s", "data_ms", "forward_ms", "backward_ms", "optimizer_ms", "seconds"}


def script(name: str, here: Path, *args: str) -> str:
    done = forked([str(ROOT / name), *args], here, {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def steps(path: Path) -> list[dict]:
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMES}
            for record in records if "loss" in record]


@pytest.fixture(scope="module", params=RECIPES)
def runs(request, tmp_path_factory, text_dataset) -> tuple[Path, dict]:
    """A run of 8 steps in whole/, and one that was resumed after 4, in parts/."""
    here = tmp_path_factory.mktemp("recipe")
    recipe = RECIPES[request.param]
    script("train.py", here, *TINY, f"--dataset={text_dataset}", "--keep_every=4",
           "--out_dir=whole", *(f"--{name}={value}" for name, value in recipe.items()))
    (here / "parts").mkdir()
    shutil.copy(here / "whole/ckpt_00000004.pt", here / "parts/ckpt.pt")
    shutil.copy(here / "whole/metrics.jsonl", here / "parts")
    script("train.py", here, "--out_dir=parts", "--init_from=resume")
    return here, recipe


def load(path: Path) -> dict:
    return torch.load(path / "ckpt.pt", weights_only=True)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(runs):
    here, recipe = runs
    whole, parts = load(here / "whole"), load(here / "parts")
    assert whole["config"] | recipe == whole["config"]
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, parts["model"][name]), name
    for i, state in whole["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, parts["optimizer"]["state"][i][name]), (i, name)
    assert steps(here / "parts") == steps(here / "whole")


def test_the_model_learns_and_samples(runs):
    here, _ = runs
    losses = [record["loss"] for record in steps(here / "whole")]
    assert losses[-1] < losses[0] - 0.1
    assert len(script("sample.py", here, "--out_dir=parts", "--start=to", "--num_samples=1",
                      "--max_new_tokens=40", "--device=cpu")) > 40  # past block_size = 16


def test_the_rate_follows_its_schedule(runs):
    here, recipe = runs
    decay = ([1e-2, 1e-2, 1e-2, 7.75e-3, 5.5e-3, 3.25e-3] if "schedule" in recipe else
             [5.5e-3 + 4.5e-3 * math.cos(math.pi * k / 6) for k in range(6)])
    assert [record["lr"] for record in steps(here / "whole")] == pytest.approx(
        [1e-2 / 3, 2e-2 / 3, *decay])


def test_all_rates_follow_the_schedule_in_proportion(runs):
    here, recipe = runs
    groups = load(here / "whole")["optimizer"]["param_groups"]
    assert {round(group["lr"] / group["lr_ratio"], 9) for group in groups} == {1e-3}  # min_lr
    assert [group["lr_ratio"] for group in groups if "momentum" in group] == pytest.approx(
        [recipe.get("muon_lr", 0.02) / 1e-2] * (2 if recipe.get("optimizer") == "muon" else 0))


def test_a_rotary_checkpoint_goes_on_with_longer_blocks_and_a_learned_one_does_not(runs):
    here, recipe = runs
    args = [str(ROOT / "train.py"), "--init_from=whole/ckpt.pt", "--out_dir=longer",
            "--block_size=32", "--max_iters=1", "--eval_iters=1", "--batch_size=2", "--device=cpu",
            f"--dataset={load(here / 'whole')['config']['dataset']}"]
    done = forked(args, here, {"OMP_NUM_THREADS": "1"})
    if recipe.get("positions") == "rotary":
        assert done.returncode == 0, done.stderr
        assert load(here / "longer")["model_args"]["block_size"] == 32
    else:
        assert done.returncode == 2
        assert "block_size = 32: the model has 16 positions" in done.stderr
