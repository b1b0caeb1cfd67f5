"""Every wrong use that we could think of: one line on stderr, exit status 2, no file touched.

A case is one row of CASES: a good command with one thing wrong, in a folder of its own where
nothing else is. `world` has the good commands' files, COMMANDS the commands.
"""

import fcntl
import io
import json
import os
import pickle
import shlex
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from conftest import ROOT, TINY, forked
from safetensors.torch import load_file, save_file

from data.bins import write_bin, write_text_dataset
from data.tokenizer import CharTokenizer, GPT2Tokenizer
from model import GPT, GPTConfig

# What goes well, run in the case's folder.
COMMANDS = {
    "train": [ROOT / "train.py", *TINY, "--max_iters=1", "--dataset={here}/data", "--out_dir=out"],
    "resume": [ROOT / "train.py", "--init_from=resume", "--max_iters=3", "--out_dir=out",
               "--dataset={here}/data"],
    "finetune": [ROOT / "train.py", *TINY[5:], "--max_iters=1", "--block_size=16", "--batch_size=1",
                 "--gradient_accumulation_steps=1", "--dataset={here}/bpe", "--out_dir=out",
                 "--init_from=gpt"],
    "sample": [ROOT / "sample.py", "--out_dir=out", "--start=to", "--max_new_tokens=2",
               "--num_samples=1", "--device=cpu", "--dtype=float32"],
    "sample-gpt": [ROOT / "sample.py", "--init_from=gpt", "--start=to", "--max_new_tokens=2",
                   "--num_samples=1", "--device=cpu", "--dtype=float32"],
    "bench": [ROOT / "bench.py", "--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=16",
              "--batch_size=2", "--rounds=1", "--new_tokens=4", "--device=cpu", "--dtype=float32",
              "--dataset={here}/data"],
    "characters": ["repo/data/shakespeare_char/prepare.py", "--url=http://127.0.0.1:9/none"],
    "shakespeare": ["repo/data/shakespeare/prepare.py", "--url=http://127.0.0.1:9/none"],
    "documents": ["repo/data/openwebtext/prepare.py", "--input=corpus/*", "--out_dir=documents",
                  "--num_proc=1"],
}

Break = Callable[[Path], AbstractContextManager | None]


class Case(NamedTuple):
    """A good command and what is added to it; words that the error must hold; what is broken in
    the folder beforehand; what is set in the environment; whether root gives up its privileges,
    to be refused what the files' rights forbid."""

    command: str
    words: list[str]
    broken: Break | None = None
    environment: dict[str, str] = {}
    unprivileged: bool = False


# -------------------------------------------------------------------------- ways to break a folder

def all_of(*breaks: Break) -> Break:
    def broken(here: Path) -> None:
        for each in breaks:
            each(here)
    return broken


def write(name: str, content: bytes) -> Break:
    def broken(here: Path) -> None:
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_bytes(content)
    return broken


def ids(name: str, *tokens: int) -> Break:
    return write(name, np.array(tokens, "<u2").tobytes())


def remove(*names: str) -> Break:
    def broken(here: Path) -> None:
        for name in names:
            (here / name).unlink()
    return broken


def folder_instead(name: str) -> Break:
    def broken(here: Path) -> None:
        (here / name).unlink(missing_ok=True)
        (here / name).mkdir()
    return broken


def truncate(name: str, share: float) -> Break:
    """Keep this share of a file's bytes, never all."""
    def broken(here: Path) -> None:
        content = (here / name).read_bytes()
        (here / name).write_bytes(content[:min(int(share * len(content)), len(content) - 1)])
    return broken


def blank(name: str, start: float, end: float) -> Break:
    """Put zeros between two shares of a file's length."""
    def broken(here: Path) -> None:
        content = (here / name).read_bytes()
        first, last = int(start * len(content)), int(end * len(content))
        (here / name).write_bytes(content[:first] + bytes(last - first) + content[last:])
    return broken


def flip_a_bit(name: str, share: float) -> Break:
    """Change one bit at this share of a file's length."""
    def broken(here: Path) -> None:
        content = bytearray((here / name).read_bytes())
        content[int(share * len(content))] ^= 1
        (here / name).write_bytes(content)
    return broken


def checkpoint(change: Callable[[dict], object]) -> Break:
    """Write out/ckpt.pt again, whole, after a change to the dict that it holds."""
    def broken(here: Path) -> None:
        contents = torch.load(here / "out/ckpt.pt", weights_only=True)
        change(contents)
        torch.save(contents, here / "out/ckpt.pt")
        (here / "out/best.pt").unlink()
    return broken


def pretrained(change: Callable[[dict], object]) -> Break:
    """Write gpt/model.safetensors again after a change to its tensors."""
    def broken(here: Path) -> None:
        tensors = load_file(here / "gpt/model.safetensors")
        change(tensors)
        save_file(tensors, here / "gpt/model.safetensors")
    return broken


def parquet(**columns: list) -> Break:
    return lambda here: pa.parquet.write_table(pa.table(columns), here / "corpus/a.parquet")


def another_alphabet(name: str) -> Break:
    def broken(here: Path) -> None:
        text = "quick brown foxes " * 20
        meta = CharTokenizer.meta_of(text)
        write_text_dataset(here / name, text, CharTokenizer(meta), meta)
    return broken


def forbid(name: str, mode: int = 0) -> Break:
    return lambda here: (here / name).chmod(mode)


def in_use(name: str) -> Break:
    """Hold the lock that a run holds."""
    def broken(here: Path) -> AbstractContextManager:
        lock = open(here / name / "lock", "w")  # noqa: SIM115
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        print("process 77 on far", end="", file=lock, flush=True)
        return lock
    return broken


def small_disk(name: str, pages: int = 0) -> Break:
    """Mount a disk with room for so many files of up to 4096 bytes."""
    @contextmanager
    def broken(here: Path) -> Iterator[None]:
        (here / name).mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={4 * (pages + 1)}k", "tmpfs", here / name]
        if subprocess.run(mount, capture_output=True).returncode:
            raise CannotHappenHere("only root can mount a small disk")
        try:
            (here / name / "file").write_bytes(bytes(4096))
            yield
        finally:
            subprocess.run(["umount", here / name], check=True)
    return broken


def module(name: str, text: str) -> Break:
    """A module that goes before the real one; for cases with PYTHONPATH=modules."""
    return write(f"modules/{name}.py", text.encode())


def absent(name: str) -> Break:
    """The package is not installed."""
    return module(name, f"raise ModuleNotFoundError({name!r}, name={name!r})")


MODULES = {"PYTHONPATH": "{here}/modules"}


class Malicious:
    """Pickles as a call that creates a file, `pwned` in the current folder."""

    def __reduce__(self) -> tuple:
        return open, ("pwned", "w")


def zipped(contents: object) -> bytes:
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(contents, file)
    return file.getvalue()


class CannotHappenHere(Exception):
    """This machine or user cannot bring the case about; says why."""


# --------------------------------------------------------------------------------------- the cases

WTE, C_FC = "transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight"

CASES = {
    # settings
    "an unknown setting": Case("train --batchsize=4", ["'batchsize'", "did you mean batch_size?"]),
    "dashes in a name": Case("sample --top-k=5", ["'top-k'", "did you mean top_k?"]),
    "an unknown setting of a prepare script": Case(
        "documents --outdir=x", ["'outdir'", "did you mean out_dir?"]),
    "words for a number": Case("train --max_iters=many", ["max_iters = 'many'", "a whole number"]),
    "a fraction for a whole number": Case(
        "train --batch_size=2.5", ["batch_size = 2.5", "a whole number"]),
    "yes for True": Case("train --compile=yes", ["compile = 'yes'", "True or False"]),
    "a learning rate of nan": Case(
        "train --learning_rate=nan", ["learning_rate = nan", "a finite number"]),
    "an infinite weight decay": Case("train --weight_decay=inf", ["weight_decay = inf", "finite"]),
    "a seed of another type when resuming": Case(
        "resume --seed=1.5", ["seed = 1.5", "a whole number"]),
    "a setting without a value": Case(
        "train --batch_size", ["--batch_size has no value", "write --batch_size="]),
    "a setting with an empty value": Case("train --n_layer=", ["n_layer", "a whole number"]),
    "one dash": Case("train -batch_size=4", ["'-batch_size=4'", "--key=value"]),
    "a missing config file": Case("train config/none.py", ["'config/none.py'", "config files"]),
    "a folder as config file": Case("train data", ["config file", "data", "directory"]),
    "an unreadable config file": Case(
        "train mine.py", ["cannot read config file mine.py", "Permission denied"],
        all_of(write("mine.py", b"n_layer = 2\n"), forbid("mine.py")), unprivileged=True),
    "a config file that is not UTF-8": Case(
        "train mine.py", ["config file mine.py failed", "utf-8"],
        write("mine.py", b"wandb_project = 'caf\xe9'\n")),
    "a config file with a syntax error": Case(
        "train mine.py", ["config file mine.py failed", "SyntaxError", "line 2"],
        write("mine.py", b"n_layer = 2\nn_head = = 2\n")),
    "a config file that fails": Case(
        "train mine.py", ["config file mine.py failed", "ZeroDivisionError"],
        write("mine.py", b"n_layer = 1 // 0\n")),
    "a config file that ends the process": Case(
        "train mine.py", ["config file mine.py failed", "SystemExit"],
        write("mine.py", b"import sys\nsys.exit()\n")),
    "a config file that sets an unknown name": Case(
        "train mine.py", ["mine.py", "'n_layers'", "did you mean n_layer?"],
        write("mine.py", b"n_layers = 2\n")),
    "a config file that sets a wrong type": Case(
        "train mine.py", ["n_layer = '2'", "a whole number"], write("mine.py", b"n_layer = '2'\n")),
    # ranges
    "a negative batch": Case("train --batch_size=-4", ["batch_size = -4", ">= 1"]),
    "no layers": Case("train --n_layer=0", ["n_layer = 0", ">= 1"]),
    "a negative block": Case("train --block_size=-16", ["block_size = -16", ">= 1"]),
    "a negative width": Case("bench --n_embd=-16", ["n_embd = -16", ">= 1"]),
    "no accumulation": Case(
        "train --gradient_accumulation_steps=0", ["gradient_accumulation_steps = 0", ">= 1"]),
    "dropout of 1.5": Case("train --dropout=1.5", ["dropout = 1.5", "< 1"]),
    "beta1 of 1": Case("train --beta1=1", ["beta1 = 1.0", "< 1"]),
    "a negative clip": Case("train --grad_clip=-1", ["grad_clip = -1.0", ">= 0"]),
    "a learning rate of 0": Case("train --learning_rate=0", ["learning_rate = 0.0", "> 0"]),
    "a Muon rate of 0": Case("train --muon_lr=0", ["muon_lr = 0.0", "> 0"]),
    "an embeddings' rate of 0": Case(
        "train --embedding_lr=0", ["embedding_lr = 0.0", "None or embedding_lr > 0"]),
    "a rate for the head where there is none": Case(
        "train --head_lr=0.1", ["head_lr = 0.1", "tie_weights = True", "not tie_weights"]),
    "another optimizer when resuming": Case(
        "resume --optimizer=muon", ["ckpt.pt", "not momentum", "--init_from="]),
    "no part to decay in": Case("train --decay_fraction=0", ["decay_fraction = 0.0", "0 <"]),
    "an unknown optimizer": Case("train --optimizer=moun", ["'moun'", "did you mean muon?"]),
    "an unknown optimizer to measure": Case("bench --optimizer=sgd", ["'sgd'", "adamw", "muon"]),
    "unknown positions": Case("train --positions=rotari", ["'rotari'", "did you mean rotary?"]),
    "negative steps": Case("train --max_iters=-1", ["max_iters = -1", ">= 0"]),
    "evaluations at a negative interval": Case(
        "train --eval_interval=-1", ["eval_interval = -1", ">= 0"]),
    "negative evaluation batches": Case("train --eval_iters=-1", ["eval_iters = -1", ">= 0"]),
    "negative keep_every": Case("train --keep_every=-5", ["keep_every = -5", ">= 0"]),
    "no bad steps allowed": Case("train --max_bad_steps=0", ["max_bad_steps = 0", ">= 1"]),
    "a negative seed": Case("train --seed=-1", ["seed = -1", "0 <= seed"]),
    "warm-up beyond the decay": Case(
        "train --warmup_iters=8", ["warmup_iters = 8", "lr_decay_iters = 8", "<"]),
    "a lowest rate above the highest": Case(
        "train --min_lr=0.1", ["min_lr = 0.1", "learning_rate = 0.01", "<="]),
    "a negative temperature": Case("sample --temperature=-1", ["temperature = -1.0", ">= 0"]),
    "top_k of 0": Case("sample --top_k=0", ["top_k = 0", "None or top_k >= 1"]),
    "top_p of 2": Case("sample --top_p=2", ["top_p = 2.0", "<= 1"]),
    "a repetition penalty of 0": Case(
        "sample --repetition_penalty=0", ["repetition_penalty = 0.0", "0.01 <="]),
    "no samples": Case("sample --num_samples=0", ["num_samples = 0", ">= 1"]),
    "negative new tokens": Case("sample --max_new_tokens=-1", ["max_new_tokens = -1", ">= 0"]),
    "no steps to time": Case("bench --rounds=0", ["rounds = 0", ">= 1"]),
    "all documents held out": Case("documents --val_fraction=1", ["val_fraction = 1.0", "< 1"]),
    "no processes to encode": Case("documents --num_proc=0", ["num_proc = 0", "> 0"]),
    # the model
    "n_embd that n_head does not divide": Case(
        "train --n_embd=15", ["n_embd = 15", "n_head = 2", "a multiple of 2"]),
    "an unknown activation": Case(
        "train --activation=gelu_than", ["'gelu_than'", "gelu, relu", "did you mean gelu_tanh?"]),
    # the data
    "no such dataset": Case(
        "train --dataset={here}/none", ["none/train.bin", "prepare the dataset"]),
    "a file as dataset": Case(
        "train --dataset={here}/data/train.bin", ["data/train.bin", "prepare the dataset"]),
    "no val.bin": Case("train", ["no ", "data/val.bin", "prepare"], remove("data/val.bin")),
    "an empty train.bin": Case(
        "train", ["train.bin has 0 bytes", "prepare it again"], write("data/train.bin", b"")),
    "an odd-sized train.bin": Case(
        "train", ["train.bin has 101 bytes", "prepare it again"],
        write("data/train.bin", bytes(101))),
    "a train.bin of one block": Case(
        "train", ["train.bin has 32 bytes", "block_size = 16", "a smaller block_size"],
        write("data/train.bin", bytes(32))),
    "ids beyond the vocabulary": Case(
        "train", ["train.bin", "id 200", "14", "another tokenizer"],
        ids("data/train.bin", *range(14), 200, *range(14))),
    "ids beyond the vocabulary in val.bin": Case(
        "train", ["val.bin", "id 200", "14", "another tokenizer"],
        ids("data/val.bin", *range(14), 200, *range(14))),
    "an unreadable train.bin": Case(
        "train --out_dir=tmp/out", ["train.bin", "Permission denied"],
        forbid("data/train.bin"), unprivileged=True),
    "an unreadable dataset": Case(
        "train --out_dir=tmp/out", ["data", "Permission denied"],
        forbid("data"), unprivileged=True),
    "a truncated meta.pkl": Case(
        "train", ["meta.pkl", "prepare the dataset again"], truncate("data/meta.pkl", 0.5)),
    "a meta.pkl of another dataset": Case(
        "train", ["train.bin", "id 13", "3", "another tokenizer"],
        write("data/meta.pkl", pickle.dumps(CharTokenizer.meta_of("abc")))),
    "a malicious meta.pkl": Case(
        "train", ["meta.pkl", "open", "plain data"],
        write("data/meta.pkl", pickle.dumps(Malicious()))),
    "a malicious meta.pkl in the benchmark": Case(
        "bench", ["meta.pkl", "open", "plain data"],
        write("data/meta.pkl", pickle.dumps([Malicious()], protocol=0))),
    # a checkpoint to go on with
    "nothing to resume": Case(
        "resume --out_dir=none", ["nothing to resume", "none", "--init_from=auto"]),
    "another depth when resuming": Case(
        "resume --n_layer=3", ["n_layer = 3", "2", "ckpt.pt", "--init_from=scratch"]),
    "another block when resuming": Case(
        "resume --block_size=8", ["block_size = 8", "16", "ckpt.pt", "leave it out"]),
    "another activation than the weights": Case(
        "train --init_from=out/ckpt.pt --activation=relu",
        ["activation = 'relu'", "gelu_tanh", "ckpt.pt", "leave it out"]),
    "a block beyond the checkpoint's": Case(
        "train --init_from=out/ckpt.pt --block_size=32",
        ["block_size = 32", "16 positions", "at most"]),
    "a checkpoint of another tokenizer": Case(
        "resume --dataset={here}/other", ["ckpt.pt", "14 characters", "other", "same tokenizer"],
        another_alphabet("other")),
    "weights of another tokenizer": Case(
        "train --init_from=out/ckpt.pt --dataset={here}/bpe",
        ["ckpt.pt", "14 characters", "GPT-2's BPE", "same tokenizer"]),
    "an empty checkpoint": Case(
        "resume", ["ckpt.pt", "damaged", "move it away"], write("out/ckpt.pt", b"")),
    "a checkpoint of 100 bytes": Case(
        "resume", ["ckpt.pt", "damaged", "move it away"], truncate("out/ckpt.pt", 0.001)),
    "half a checkpoint": Case(
        "resume", ["ckpt.pt", "damaged", "move it away"], truncate("out/ckpt.pt", 0.5)),
    "a checkpoint without its last byte": Case(
        "resume", ["ckpt.pt", "damaged", "move it away"], truncate("out/ckpt.pt", 1)),
    "a flipped bit in a weight": Case(
        "resume", ["ckpt.pt", "damaged"], flip_a_bit("out/ckpt.pt", 0.5)),
    "a flipped bit when sampling": Case(
        "sample", ["best.pt", "damaged"], flip_a_bit("out/best.pt", 0.3)),
    "a text as checkpoint": Case(
        "resume", ["ckpt.pt", "no checkpoint"], write("out/ckpt.pt", b"not a checkpoint\n")),
    "a checkpoint without a model": Case(
        "sample", ["ckpt.pt", "lacks model"], checkpoint(lambda c: c.pop("model"))),
    "a checkpoint without a tensor": Case(
        "resume", ["ckpt.pt", C_FC, "missing"], checkpoint(lambda c: c["model"].pop(C_FC))),
    "a checkpoint with an extra tensor": Case(
        "resume", ["ckpt.pt", "transformer.h.9.x", "unknown"],
        checkpoint(lambda c: c["model"].update({"transformer.h.9.x": torch.zeros(1)}))),
    "a checkpoint with a misshapen tensor": Case(
        "sample", ["ckpt.pt", C_FC, "(3, 16)", "(64, 16)"],
        checkpoint(lambda c: c["model"].update({C_FC: torch.zeros(3, 16)}))),
    "a checkpoint with weights of nan": Case(
        "sample", ["ckpt.pt", C_FC, "finite"],
        checkpoint(lambda c: c["model"][C_FC].fill_(float("nan")))),
    "a checkpoint without an optimizer": Case(
        "resume", ["ckpt.pt", "optimizer", "--init_from="],
        checkpoint(lambda c: c.pop("optimizer"))),
    "a malicious checkpoint": Case(
        "resume", ["ckpt.pt", "more than plain data"],
        write("out/ckpt.pt", zipped({"model": {}, "model_args": {}, "config": Malicious()}))),
    "a malicious checkpoint of the old format": Case(
        "sample --checkpoint=ckpt.pt", ["ckpt.pt", "more than plain data"],
        write("out/ckpt.pt", pickle.dumps(Malicious(), protocol=2))),
    "an unreadable checkpoint": Case(
        "sample", ["best.pt", "Permission denied"], forbid("out/best.pt"), unprivileged=True),
    "no run in the folder to sample from": Case(
        "sample --out_dir=data", ["no checkpoint data/ckpt.pt", "train first"]),
    "a checkpoint that is not there": Case(
        "sample --checkpoint=last.pt", ["no checkpoint out/last.pt", "another path"]),
    "a folder as checkpoint": Case(
        "sample --checkpoint=../data", ["out/../data", "Is a directory"]),
    # pretrained weights
    "an unknown model": Case(
        "sample --init_from=gpt2-larg", ["'gpt2-larg'", "did you mean gpt2-large?"]),
    "a model that does not come from the hub": Case(
        "sample --init_from=owner/name", ["owner/name", "not a folder here", "hub"]),
    "a folder without config.json": Case(
        "finetune", ["gpt", "expected config.json"], remove("gpt/config.json")),
    "a config.json that is no JSON": Case(
        "finetune", ["gpt/config.json", "cannot read"], write("gpt/config.json", b"{")),
    "truncated pretrained weights": Case(
        "finetune", ["model.safetensors", "cannot read"], truncate("gpt/model.safetensors", 0.5)),
    "pretrained weights without a tensor": Case(
        "sample-gpt", ["gpt", "transformer.ln_f.bias", "missing"],
        pretrained(lambda t: t.pop("transformer.ln_f.bias"))),
    "pretrained weights with a misshapen tensor": Case(
        "sample-gpt", ["gpt", WTE, "(300, 2)", "(50257, 2)"],
        pretrained(lambda t: t.update({WTE: torch.zeros(300, 2)}))),
    "malicious pretrained weights": Case(
        "sample-gpt", ["pytorch_model.bin", "cannot read"],
        all_of(remove("gpt/model.safetensors"),
               write("gpt/pytorch_model.bin", zipped({WTE: Malicious()})))),
    "pretrained weights of another tokenizer": Case(
        "finetune --dataset={here}/data", ["gpt", "GPT-2's BPE", "14 characters"]),
    # the prompt
    "unknown characters": Case("sample --start=tZ#", ["'#', 'Z'", "vocabulary", "14 characters"]),
    "an empty prompt": Case("sample --start=", ["start = ''", "start != ''"]),
    "no prompt file": Case("sample --start=FILE:none.txt", ["none.txt", "No such file"]),
    "an empty prompt file": Case(
        "sample --start=FILE:prompt.txt", ["prompt", "empty"], write("prompt.txt", b"")),
    "a prompt file that is not UTF-8": Case(
        "sample --start=FILE:prompt.txt", ["prompt.txt", "utf-8"],
        write("prompt.txt", b"caf\xe9")),
    "an unreadable prompt file": Case(
        "sample --start=FILE:prompt.txt", ["prompt.txt", "Permission denied"],
        forbid("prompt.txt"), unprivileged=True),
    "a stop of several tokens": Case("sample --stop=be", ["stop = 'be'", "2 tokens", "one"]),
    # where results go
    "a file as out_dir": Case("train --out_dir=prompt.txt", ["out_dir = 'prompt.txt'", "exists"]),
    "an out_dir that may not be written": Case(
        "train", ["out_dir = 'out'", "Permission denied"],
        all_of(forbid("out/lock", 0o444), forbid("out", 0o555)), unprivileged=True),
    "an out_dir that may not be made": Case(
        "train --out_dir=new", ["out_dir = 'new'", "Permission denied"], forbid(".", 0o555),
        unprivileged=True),
    "an out_dir that may not be read": Case(
        "resume", ["out_dir = 'out'", "Permission denied"], forbid("out"), unprivileged=True),
    "an out_dir on a full disk": Case(
        "train --out_dir=disk/out", ["out_dir = 'disk/out'", "MB free", "make room"],
        small_disk("disk")),
    "an out_dir in use": Case(
        "train", ["out_dir = 'out'", "process 77 on far", "another out_dir"], in_use("out")),
    "no TensorBoard": Case(
        "train --tensorboard_log=True", ["tensorboard", "pip install"], absent("tensorboard"),
        MODULES),
    "no Weights & Biases": Case(
        "train --wandb_log=True", ["wandb", "pip install"], absent("wandb"), MODULES),
    "no tiktoken": Case("sample-gpt", ["tiktoken", "pip install"], absent("tiktoken"), MODULES),
    # the machine
    "an unknown device": Case(
        "train --device=cudas", ["'cudas'", "cpu, cuda, mps", "did you mean cuda?"]),
    "CUDA where there is none": Case(
        "train --device=cuda", ["device = 'cuda'", "no cuda", "--device=cpu"]),
    "a GPU that does not exist": Case(
        "train --device=cuda:2", ["device = 'cuda:2'", "cuda:0 to cuda:1"],
        module("sitecustomize", "import torch\ntorch.cuda.is_available = lambda: True\n"
                                "torch.cuda.device_count = lambda: 2\n"), MODULES),
    "a CPU that does not exist": Case("bench --device=cpu:7", ["'cpu:7'", "cpu:0 to cpu:0"]),
    "an unknown dtype": Case(
        "train --dtype=float61", ["'float61'", "bfloat16, float16, float32", "did you mean"]),
    "float16 on a CPU": Case(
        "train --dtype=float16", ["float16", "use bfloat16 or float32"]),
    "an unknown backend": Case("train --backend=glo", ["'glo'", "nccl, gloo", "did you mean gloo"]),
    "NCCL on a CPU": Case(
        "train --backend=nccl", ["backend = 'nccl'", "GPUs", "--backend=gloo"],
        environment={"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}),
    "compilation without a compiler": Case(
        "train --compile=True", ["compile = True", "g++", "--compile=False"],
        environment={"PATH": "/none", "CXX": ""}),
    "processes that do not divide the micro-batches": Case(
        "train", ["gradient_accumulation_steps = 2", "3 processes", "a multiple of 3"],
        environment={"RANK": "0", "WORLD_SIZE": "3"}),
    "a rank without a number of processes": Case(
        "train", ["RANK=1", "WORLD_SIZE=1", "torchrun"], environment={"RANK": "1"}),
    "processes without a meeting point": Case(
        "train", ["MASTER_ADDR", "torchrun"], environment={"RANK": "0", "WORLD_SIZE": "2"}),
    "a port that is taken": Case(
        "train", ["did not meet", "port", "--standalone"], environment={
            "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "{port}"}),
    # preparing data
    "no input and no network": Case(
        "characters", ["127.0.0.1", "by hand", "shakespeare_char/input.txt"],
        remove("repo/data/shakespeare_char/input.txt"), {"NO_PROXY": "*"}),
    "an empty input": Case(
        "characters", ["input.txt", "0 characters", "put a text"],
        write("repo/data/shakespeare_char/input.txt", b"")),
    "an input too short to learn from": Case(
        "shakespeare", ["input.txt", "9 characters", "put a text"],
        write("repo/data/shakespeare/input.txt", b"too short")),
    "an input that is not UTF-8": Case(
        "characters", ["input.txt", "not UTF-8 at byte 14", "put a text"],
        write("repo/data/shakespeare_char/input.txt", b"0123456789 caf\xe9 au lait")),
    "a folder as input": Case(
        "characters", ["input.txt", "directory"],
        folder_instead("repo/data/shakespeare_char/input.txt")),
    "more characters than ids": Case(
        "characters", ["70,000 distinct characters", "GPT-2's BPE"],
        write("repo/data/shakespeare_char/input.txt",
              "".join(map(chr, range(0x10000, 0x10000 + 70_000))).encode())),
    "a dataset that may not be written": Case(
        "characters", ["train.bin", "Permission denied"],
        forbid("repo/data/shakespeare_char", 0o555), unprivileged=True),
    "a dataset on a full disk": Case(
        "documents --out_dir=disk/new", ["disk/new has", "MB free", "--out_dir="],
        small_disk("disk")),
    "a dataset whose disk fills up": Case(
        "documents --out_dir=disk", ["cannot write disk/", "No space left", "unchanged"],
        small_disk("disk", pages=1)),
    "no documents": Case("documents --input=corpus/*.none", ["--input=corpus/*.none", ".jsonl"]),
    "an unknown kind of documents": Case(
        "documents --input=corpus/a.json",
        ["corpus/a.json", ".parquet, .jsonl, .txt", "did you mean .jsonl?"],
        write("corpus/a.json", b'{"text": "one"}\n')),
    "a folder of documents": Case(
        "documents --input=corpus", ["corpus", ".parquet, .jsonl, .txt"]),
    "one document": Case(
        "documents", ["1 of 1 documents", "at least 2"],
        write("corpus/a.jsonl", b'{"text": "one"}\n')),
    "no document in a file": Case(
        "documents", ["0 documents", "at least 2"], write("corpus/a.jsonl", b"\n")),
    "a line that is no JSON": Case(
        "documents", ["{cut", "expected a document with a field `text`"],
        write("corpus/a.jsonl", b'{"text": "one"}\n{"text": "two"}\n{cut\n')),
    "a line without text": Case(
        "documents", ["txt", "expected a document with a field `text`"],
        write("corpus/a.jsonl", b'{"text": "one"}\n{"text": "two"}\n{"txt": "three"}\n')),
    "documents that are not UTF-8": Case(
        "documents --input=corpus/a.txt", ["corpus/a.txt", "utf-8"],
        write("corpus/a.txt", b"caf\xe9")),
    "a parquet file that is none": Case(
        "documents --input=corpus/a.parquet", ["corpus/a.parquet", "cannot read"],
        write("corpus/a.parquet", b"no such thing")),
    "a parquet file without text": Case(
        "documents --input=corpus/a.parquet", ["corpus/a.parquet", "no column `text`", "body"],
        parquet(body=["one", "two", "three"])),
    "a parquet row without text": Case(
        "documents --input=corpus/a.parquet", ["None", "a field `text`"],
        parquet(text=["one", None, "three"])),
    "a parquet file of numbers": Case(
        "documents --input=corpus/a.parquet", ["b'1'", "a field `text`"],
        parquet(text=[1, 2, 3])),
    "a damaged parquet file": Case(
        "documents --input=corpus/a.parquet", ["cannot read corpus/a.parquet"],
        all_of(parquet(text=[f"document {i}" for i in range(2000)]),
               blank("corpus/a.parquet", 0.1, 0.5))),
    "unreadable documents": Case(
        "documents --out_dir=tmp/documents", ["corpus/a.jsonl", "Permission denied"],
        forbid("corpus/a.jsonl"), unprivileged=True),
    "a file as folder of the dataset": Case(
        "documents --out_dir=prompt.txt", ["prompt.txt", "--out_dir="]),
    "a folder of the dataset that may not be made": Case(
        "documents", ["documents", "Permission denied"], forbid(".", 0o555), unprivileged=True),
}


# ------------------------------------------------------------------------------------ how they run

@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with all that the good commands need."""
    here = tmp_path_factory.mktemp("world")
    text = "to be or not to be that is the question whether " * 20
    meta = CharTokenizer.meta_of(text)
    write_text_dataset(here / "data", text, CharTokenizer(meta), meta)
    write_bin(here / "bpe/train.bin", GPT2Tokenizer().encode(text))
    write_bin(here / "bpe/val.bin", GPT2Tokenizer().encode(text))
    (here / "prompt.txt").write_text("to be")
    for path in ("configurator.py", "data/__init__.py", "data/bins.py", "data/documents.py",
                 "data/tokenizer.py", *(f"data/{name}/prepare.py" for name in (
                     "openwebtext", "shakespeare", "shakespeare_char"))):
        (here / "repo" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, here / "repo" / path)
    for name in ("shakespeare", "shakespeare_char"):
        (here / "repo/data" / name / "input.txt").write_text(text)
    (here / "corpus").mkdir()
    (here / "corpus/a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    save_pretrained(here / "gpt")
    (here / "tmp").mkdir()
    for command in ("train", "resume --max_iters=2"):  # what the cases resume and sample from
        done = run(Case(command, []), here)
        assert done.returncode == 0, done.stderr
    return here


def save_pretrained(folder: Path) -> None:
    """The smallest model of GPT-2's form and vocabulary, of zeros."""
    config = {"n_positions": 16, "vocab_size": 50257, "n_layer": 1, "n_head": 1, "n_embd": 2}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **config}))
    gpt = GPT(GPTConfig(block_size=16, vocab_size=50257, n_layer=1, n_head=1, n_embd=2))
    tensors = {name: torch.zeros_like(tensor.t() if "c_" in name and tensor.dim() == 2 else tensor,
                                      memory_format=torch.contiguous_format)
               for name, tensor in gpt.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors")


# Root, whom no right stops, becomes a user like any other.
WITHOUT_PRIVILEGES = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"]


def run(case: Case, here: Path, port: int = 0) -> subprocess.CompletedProcess:
    """Run a case's command in its folder."""
    name, *more = shlex.split(case.command)
    args = [sys.executable, *(str(arg).format(here=here) for arg in [*COMMANDS[name], *more])]
    if case.unprivileged and os.geteuid() == 0:
        if not shutil.which("setpriv") or subprocess.run([*WITHOUT_PRIVILEGES, "true"]).returncode:
            raise CannotHappenHere("root cannot give up its privileges without setpriv")
        args = [*WITHOUT_PRIVILEGES, *args]
    own = {"HOME": str(here / "tmp"), "TMPDIR": str(here / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}
    own |= {key: text.format(here=here, port=port) for key, text in case.environment.items()}
    if not (case.unprivileged or "PYTHONPATH" in own or name.startswith(("char", "shake", "doc"))):
        return forked(args[1:], here, own)
    return subprocess.run(args, cwd=here, env=os.environ | own, text=True, capture_output=True,
                          timeout=120, stdin=subprocess.DEVNULL)


def snapshot(*folders: Path) -> dict[str, tuple]:
    """Every file and folder below: its rights, and of a file its bytes and when it was written."""
    found = {}
    for path in (path for folder in folders for path in folder.rglob("*")):
        status = path.stat()
        content = path.read_bytes() if path.is_file() and os.access(path, os.R_OK) else None
        written = status.st_mtime_ns if path.is_file() else None
        found[str(path)] = stat.filemode(status.st_mode), written, content
    return found


class Finding(NamedTuple):
    """What became of a case: how it ended, and the files that are new, gone or changed."""

    done: subprocess.CompletedProcess
    touched: set[str]


def changed(before: dict[str, tuple], after: dict[str, tuple]) -> set[str]:
    return {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}


def attempt(case: Case, world: Path, here: Path, port: int) -> Finding | str:
    """Run a case in `here`, a folder that is there for it alone; text says why it cannot be."""
    shutil.copytree(world, here)
    try:
        with ExitStack() as held:
            held_open = case.broken(here) if case.broken else None
            if held_open:
                held.enter_context(held_open)
            before = snapshot(here)
            done = run(case, here, port)
            return Finding(done, changed(before, snapshot(here)))
    except CannotHappenHere as reason:
        return str(reason)
    finally:
        for path in [here, *here.rglob("*")]:
            if path.is_dir():
                path.chmod(0o755)
        shutil.rmtree(here)


def repository() -> dict[str, tuple]:
    """What a script might write to by mistake: datasets, configs, and folders of results."""
    found = snapshot(*(ROOT / name for name in ("data", "config", "out", "bench_trace", "wandb")))
    return {path: value for path, value in found.items() if "__pycache__" not in path}


@pytest.fixture(scope="module")
def repository_before() -> dict[str, tuple]:
    return repository()


@pytest.fixture(scope="module")
def findings(world, repository_before, tmp_path_factory) -> dict[str, Finding | str]:
    """All cases, two at a time."""
    folder = tmp_path_factory.mktemp("cases")
    with socket.create_server(("127.0.0.1", 0)) as taken, ThreadPoolExecutor(2) as pool:
        port = taken.getsockname()[1]
        found = [pool.submit(attempt, case, world, folder / str(i), port)
                 for i, case in enumerate(CASES.values())]
    return {name: future.result() for name, future in zip(CASES, found, strict=True)}


@pytest.mark.parametrize("command", COMMANDS)
def test_without_anything_wrong_the_commands_of_the_cases_succeed(command, world, tmp_path):
    shutil.copytree(world, tmp_path / "here")
    done = run(Case(command, []), tmp_path / "here")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_use_is_answered_in_one_line_and_touches_nothing(name, findings):
    if name == "CUDA where there is none" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if isinstance(findings[name], str):
        pytest.skip(findings[name])
    done, touched = findings[name]
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for word in CASES[name].words:
        assert word in done.stderr
    assert touched == set()


def test_no_wrong_use_touches_the_repository(repository_before, findings):
    assert changed(repository_before, repository()) == set()


@pytest.mark.parametrize("content", [
    pickle.dumps(Malicious()), pickle.dumps([Malicious()], protocol=0), zipped(Malicious())],
    ids=["pickle", "pickle of a list", "checkpoint"])
def test_the_malicious_files_would_create_a_file_if_they_were_trusted(
        content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content.startswith(b"PK"):
        torch.load(io.BytesIO(content), weights_only=False)
    else:
        pickle.loads(content)
    assert (tmp_path / "pwned").exists()
