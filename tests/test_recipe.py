"""Every setting of the modern recipe, alone and together: train, resume, sample."""

import math
import shutil
from pathlib import Path

import pytest
from conftest import MODERN, ROOT, TINY, differences, forked, load, records

SETTINGS = MODERN | {"optimizer": "muon", "schedule": "linear", "embedding_lr": 0.02}
RECIPES = {name: {name: value} for name, value in SETTINGS.items()} | {
    "head_lr": {"tie_weights": False, "head_lr": 0.005},
    "all": SETTINGS | {"head_lr": 0.005, "dropout": 0.1, "muon_lr": 0.05, "muon_momentum": 0.8,
                       "cooldown_frac": 0.25, "dtype": "bfloat16"}}


def script(name: str, cwd: Path, *args: str) -> str:
    done = forked([str(ROOT / name), *args], cwd, {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=RECIPES)
def runs(request, tmp_path_factory, text_dataset) -> tuple[Path, dict]:
    """A run of 8 steps in whole/, and one that was resumed after 4, in parts/."""
    folder = tmp_path_factory.mktemp("recipe")
    recipe = RECIPES[request.param]
    script("train.py", folder, *TINY, f"--dataset={text_dataset}", "--keep_every=4",
           "--out_dir=whole", *(f"--{name}={value}" for name, value in recipe.items()))
    (folder / "parts").mkdir()
    for name in ("ckpt_00000004.pt", "metrics.jsonl"):
        shutil.copy(folder / "whole" / name, folder / "parts")
    script("train.py", folder, "--out_dir=parts", "--init_from=resume")
    return folder, recipe


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(runs):
    folder, recipe = runs
    config = load(folder / "whole/ckpt.pt")["config"]
    assert config | recipe == config
    assert len(records(folder / "whole", "loss")) == 8
    assert differences(folder / "whole", folder / "parts") == []


def test_the_model_learns_and_samples(runs):
    folder, _ = runs
    losses = [record["loss"] for record in records(folder / "whole", "loss")]
    assert losses[-1] < losses[0] - 0.1
    assert len(script("sample.py", folder, "--out_dir=parts", "--start=to", "--num_samples=1",
                      "--max_new_tokens=40", "--device=cpu")) > 40  # beyond block_size = 16


def test_the_learning_rate_follows_its_schedule(runs):
    folder, recipe = runs
    decay = ([1e-2] * 5 + [5.5e-3] if "cooldown_frac" in recipe else
             [1e-2, 1e-2, 1e-2, 7.75e-3, 5.5e-3, 3.25e-3] if "schedule" in recipe else
             [5.5e-3 + 4.5e-3 * math.cos(math.pi * k / 6) for k in range(6)])
    assert [record["lr"] for record in records(folder / "whole", "loss")] == pytest.approx(
        [1e-2 / 3, 2e-2 / 3, *decay])


def test_all_learning_rates_follow_the_schedule_in_proportion(runs):
    folder, recipe = runs
    groups = load(folder / "whole/ckpt.pt")["optimizer"]["param_groups"]
    rates = sorted({round(group["lr"] / 1e-3, 9) for group in groups})  # min_lr = 1e-3
    peaks = {1e-2, *(recipe[name] for name in ("embedding_lr", "head_lr") if name in recipe)}
    if recipe.get("optimizer") == "muon":
        peaks.add(recipe.get("muon_lr", 0.02))
    assert rates == pytest.approx(sorted(peak / 1e-2 for peak in peaks))


@pytest.mark.parametrize("runs", ["positions", "activation"], indirect=True)
def test_rotary_positions_can_be_finetuned_on_longer_blocks_and_learned_ones_cannot(
        runs, text_dataset):
    folder, recipe = runs
    done = forked([str(ROOT / "train.py"), *TINY, "--init_from=whole/ckpt.pt", "--out_dir=longer",
                   "--block_size=32", "--max_iters=1", f"--dataset={text_dataset}"], folder, {})
    if "positions" in recipe:
        assert done.returncode == 0, done.stderr
        assert load(folder / "longer/ckpt.pt")["model_args"]["block_size"] == 32
    else:
        assert done.returncode == 2
        assert "block_size = 32: the model has 16 positions" in done.stderr
