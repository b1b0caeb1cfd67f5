"""Every file in config/: its header, and that train.py accepts it."""

import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import ROOT, run

from model import GPTConfig

CONFIGS = sorted((ROOT / "config").glob("*.py"))


def header(path: Path) -> str:
    """The comment that a config starts with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.lstrip("# ") for line in lines[:end])


@pytest.fixture
def settings(request, monkeypatch) -> dict:
    """The settings of train.py with a config, by the part of it before its heavy imports."""
    monkeypatch.setattr(sys, "argv", ["train.py", str(request.param)])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # configure sets another
    source, found, _ = (ROOT / "train.py").read_text(encoding="utf-8").partition("\nimport gc\n")
    assert found
    namespace = {"__name__": "__main__", "__file__": str(ROOT / "train.py")}
    exec(source, namespace)
    return namespace


each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
each_settings = pytest.mark.parametrize("settings", CONFIGS, ids=lambda p: p.stem, indirect=True)


def test_the_documented_configs_exist():
    assert {path.stem for path in CONFIGS} >= {
        "train_gpt2", "train_shakespeare_char", "train_shakespeare_char_cpu", "train_stdlib_char",
        "fast_gpt2", "fast_shakespeare_char", "fast_shakespeare_char_cpu", "fast_stdlib_char",
        "finetune_shakespeare", "eval_gpt2", "eval_gpt2_medium", "eval_gpt2_large", "eval_gpt2_xl"}


@each_config
def test_the_header_has_the_launch_command(path):
    assert re.search(rf"^(python|torchrun .*) train\.py config/{path.name}$", header(path), re.M)


@each_config
@pytest.mark.parametrize("word", ["hardware", "duration", "result"])
def test_the_header_gives_hardware_duration_and_result(path, word):
    _, found, text = header(path).lower().partition(word)
    assert found
    assert re.search(r"\d|not measured here|any cpu|one gpu", text)


@each_settings
def test_train_accepts_the_settings(settings):
    assert settings["warmup_iters"] < settings["lr_decay_iters"]
    assert settings["min_lr"] <= settings["learning_rate"] or not settings["decay_lr"]
    GPTConfig(**{f.name: settings[f.name] for f in fields(GPTConfig) if f.name in settings})


@each_settings
def test_the_dataset_can_be_prepared(settings):
    assert (ROOT / "data" / settings["dataset"] / "prepare.py").is_file()


@pytest.mark.parametrize("name, smaller", [
    ("train_stdlib_char", []), ("fast_stdlib_char", []), ("fast_shakespeare_char_cpu", []),
    ("fast_shakespeare_char", ["--n_embd=20", "--batch_size=2"]),
    ("fast_gpt2", ["--n_layer=2", "--n_embd=24", "--block_size=64", "--batch_size=2",
                   "--gradient_accumulation_steps=2"])])
def test_a_config_trains_when_cut_down(name, smaller, text_dataset, tmp_path):
    done = run(ROOT / "train.py", f"config/{name}.py", f"--dataset={text_dataset}",
               f"--out_dir={tmp_path}", "--max_iters=2", "--eval_iters=1", "--device=cpu",
               "--log_interval=1", *smaller)
    assert done.returncode == 0, done.stderr
    assert "iter 1: loss" in done.stdout
    assert (tmp_path / "ckpt.pt").exists()
