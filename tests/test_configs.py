"""Every file in config/: its header, and that train.py accepts it."""

import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import ROOT, script

from model import GPTConfig

CONFIGS = sorted((ROOT / "config").glob("*.py"))


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


def test_the_documented_configs_exist():
    assert {path.stem for path in CONFIGS} >= {
        "train_gpt2", "train_shakespeare_char", "train_shakespeare_char_cpu", "train_stdlib_char",
        "fast_gpt2", "fast_shakespeare_char", "fast_shakespeare_char_cpu", "fast_stdlib_char",
        "finetune_shakespeare", "eval_gpt2", "eval_gpt2_medium", "eval_gpt2_large", "eval_gpt2_xl"}


def test_the_header_has_the_launch_command_and_gives_hardware_duration_and_result(path):
    header = re.match("(#.*\n)+", path.read_text(encoding="utf-8"))[0]
    assert re.search(rf"^# +(python|torchrun .*) train\.py config/{path.name}$", header, re.M)
    for word in ("hardware", "duration", "result"):
        _, found, text = header.lower().partition(word)
        assert found
        assert re.search(r"\d|not measured here|any cpu|one gpu", text)


def test_train_accepts_the_settings_and_the_dataset_can_be_prepared(path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", str(path)])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # configure sets another
    # train.py before its heavy imports
    source, found, _ = (ROOT / "train.py").read_text(encoding="utf-8").partition("\nimport gc\n")
    assert found
    settings = {"__name__": "__main__", "__file__": str(ROOT / "train.py")}
    exec(source, settings)
    assert settings["warmup_iters"] < settings["lr_decay_iters"]
    assert settings["min_lr"] <= settings["learning_rate"] or not settings["decay_lr"]
    GPTConfig(**{f.name: settings[f.name] for f in fields(GPTConfig) if f.name in settings},
              vocab_size=65)
    dataset = {"mine": "text"}.get(settings["dataset"], settings["dataset"])  # a text of one's own
    assert (ROOT / "data" / dataset / "prepare.py").is_file()


@pytest.mark.parametrize("name, smaller", [
    ("train_stdlib_char", []), ("fast_stdlib_char", []), ("fast_shakespeare_char_cpu", []),
    ("fast_shakespeare_char", ["--n_embd=20", "--batch_size=2"]),
    ("fast_gpt2", ["--n_layer=2", "--n_embd=24", "--block_size=64", "--batch_size=2",
                   "--gradient_accumulation_steps=2"])])
def test_a_config_trains_when_cut_down(name, smaller, text_dataset, tmp_path):
    done = script("train.py", ROOT / f"config/{name}.py", f"--dataset={text_dataset}",
                  f"--out_dir={tmp_path}", "--max_iters=2", "--eval_iters=1", "--device=cpu",
                  "--log_interval=1", *smaller)
    assert "iter 1: loss" in done.stdout
    assert (tmp_path / "ckpt.pt").exists()
