"""Every setting of the modern recipe, alone and together: train, resume, sample."""

import shutil
from pathlib import Path

import pytest
from conftest import MODERN, TINY, differences, load, records, script

SETTINGS = MODERN | {"optimizer": "muon", "schedule": "linear", "embedding_lr": 0.02}
RECIPES = {name: {name: value} for name, value in SETTINGS.items()} | {
    "head_lr": {"tie_weights": False, "head_lr": 0.005},
    "all": SETTINGS | {"head_lr": 0.005, "dropout": 0.1, "muon_lr": 0.05, "muon_momentum": 0.8,
                       "cooldown_frac": 0.25, "dtype": "bfloat16"}}


@pytest.fixture(scope="module", params=RECIPES)
def runs(request, tmp_path_factory, text_dataset) -> tuple[Path, dict]:
    """A run of 8 steps in whole/, and one resumed from the latest of two numbered checkpoints,
    after 4 steps, in parts/."""
    folder = tmp_path_factory.mktemp("recipe")
    recipe = RECIPES[request.param]
    script("train.py", *TINY, f"--dataset={text_dataset}", "--keep_every=2", "--out_dir=whole",
           *(f"--{name}={value}" for name, value in recipe.items()), cwd=folder)
    (folder / "parts").mkdir()
    for name in ("ckpt_00000002.pt", "ckpt_00000004.pt", "metrics.jsonl"):
        shutil.copy(folder / "whole" / name, folder / "parts")
    done = script("train.py", "--out_dir=parts", "--init_from=resume", cwd=folder)
    assert "iter 4:" in done.stdout and "iter 3:" not in done.stdout
    return folder, recipe


def test_the_model_learns_samples_and_resumes_bit_for_bit(runs):
    folder, recipe = runs
    config = load(folder / "whole/ckpt.pt")["config"]
    assert config | recipe == config
    losses = [record["loss"] for record in records(folder / "whole", "loss")]
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.1
    assert differences(folder / "whole", folder / "parts") == []
    done = script("sample.py", "--out_dir=parts", "--start=to", "--num_samples=1",
                  "--max_new_tokens=40", "--device=cpu", cwd=folder)  # beyond block_size = 16
    assert len(done.stdout) > 40


@pytest.mark.parametrize("runs, rates", [
    ("schedule", [1e-2, 1e-2, 1e-2, 7.75e-3, 5.5e-3, 3.25e-3]),
    ("all", [1e-2] * 5 + [5.5e-3])], indirect=["runs"])  # cooldown_frac = 0.25
def test_a_linear_schedule_is_constant_until_its_cooldown(runs, rates):
    logged = [record["lr"] for record in records(runs[0] / "whole", "loss")]
    assert logged == pytest.approx([1e-2 / 3, 2e-2 / 3, *rates])


def test_all_learning_rates_follow_the_schedule_in_proportion(runs):
    folder, recipe = runs
    groups = load(folder / "whole/ckpt.pt")["optimizer"]["param_groups"]
    rates = sorted({round(group["lr"] / 1e-3, 9) for group in groups})  # min_lr = 1e-3
    peaks = {1e-2, *(recipe[name] for name in ("embedding_lr", "head_lr") if name in recipe)}
    if recipe.get("optimizer") == "muon":
        peaks.add(recipe.get("muon_lr", 0.02))
    assert rates == pytest.approx(sorted(peak / 1e-2 for peak in peaks))


@pytest.mark.parametrize("runs", ["positions"], indirect=True)
def test_rotary_positions_can_be_finetuned_on_longer_blocks(runs, text_dataset):
    folder, _ = runs
    script("train.py", *TINY, "--init_from=whole/ckpt.pt", "--out_dir=longer", "--block_size=32",
           "--max_iters=1", f"--dataset={text_dataset}", cwd=folder)
    assert load(folder / "longer/ckpt.pt")["model_args"]["block_size"] == 32
