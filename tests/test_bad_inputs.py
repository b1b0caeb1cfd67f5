"""Wrong uses of the scripts: each ends in one line on stderr and status 2, and touches no file.

A case is a valid command with one thing wrong, run in a folder of its own: a copy of `template`,
which has the files that the valid COMMANDS need, after a change to it.
"""

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
from functools import wraps
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from conftest import ROOT, TINY, forked
from filelock import FileLock
from safetensors.torch import load_file, save_file

from data.bins import write_bin, write_text_dataset
from data.tokenizer import CharTokenizer, GPT2Tokenizer
from model import GPT, GPTConfig

# Valid commands; {folder} is the case's folder, in which they run.
COMMANDS = {
    "train": [ROOT / "train.py", *TINY, "--max_iters=1", "--dataset={folder}/data",
              "--out_dir=out"],
    "resume": [ROOT / "train.py", "--init_from=resume", "--max_iters=3", "--out_dir=out",
               "--dataset={folder}/data"],
    "finetune": [ROOT / "train.py", *TINY[5:], "--max_iters=1", "--block_size=16", "--batch_size=1",
                 "--gradient_accumulation_steps=1", "--dataset={folder}/bpe", "--out_dir=out",
                 "--init_from=gpt"],
    "sample": [ROOT / "sample.py", "--out_dir=out", "--start=to", "--max_new_tokens=2",
               "--num_samples=1", "--device=cpu", "--dtype=float32"],
    "sample-gpt": [ROOT / "sample.py", "--init_from=gpt", "--start=to", "--max_new_tokens=2",
                   "--num_samples=1", "--device=cpu", "--dtype=float32"],
    "bench": [ROOT / "bench.py", "--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=16",
              "--batch_size=2", "--rounds=1", "--new_tokens=4", "--device=cpu", "--dtype=float32",
              "--dataset={folder}/data"],
    "characters": ["repo/data/shakespeare_char/prepare.py", "--url=http://127.0.0.1:9/none"],
    "shakespeare": ["repo/data/shakespeare/prepare.py", "--url=http://127.0.0.1:9/none"],
    "documents": ["repo/data/openwebtext/prepare.py", "--input=corpus/*", "--out_dir=documents",
                  "--num_proc=1"],
}

# A change to the files in a folder; what it returns is held open while the command runs.
Change = Callable[[Path], AbstractContextManager | None]


class Case(NamedTuple):
    """A valid command and arguments added to it; words in the expected error; a change to the
    folder; environment variables; whether root drops its privileges, so that file modes apply."""

    command: str
    words: list[str]
    change: Change = lambda folder: None
    environment: dict[str, str] = {}
    unprivileged: bool = False


class Unsupported(Exception):
    """This machine or user cannot run a case; says why."""


# ------------------------------------------------------------------------------ changes to a folder

def change(function: Callable) -> Callable[..., Change]:
    """Turn function(folder, *args) into function(*args), which returns a Change."""
    return wraps(function)(lambda *args, **kwargs: lambda folder: function(folder, *args, **kwargs))


@change
def both(folder: Path, first: Change, second: Change) -> None:
    first(folder)
    second(folder)


@change
def write(folder: Path, name: str, content: bytes) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)


def write_ids(name: str, *ids: int) -> Change:
    return write(name, np.array(ids, "<u2").tobytes())


@change
def remove(folder: Path, name: str) -> None:
    (folder / name).unlink()


@change
def truncate(folder: Path, name: str, fraction: float) -> None:
    """Keep this fraction of a file's bytes, at most all but one."""
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:min(int(fraction * len(content)), len(content) - 1)])


@change
def flip_bits(folder: Path, name: str, start: float, end: float | None = None) -> None:
    """Flip a bit of each byte between two fractions of a file's length; without end, of one."""
    content = bytearray((folder / name).read_bytes())
    first = int(start * len(content))
    for i in range(first, int(end * len(content)) if end else first + 1):
        content[i] ^= 1
    (folder / name).write_bytes(content)


@change
def edit_checkpoint(folder: Path, edit: Callable[[dict], object]) -> None:
    """Edit the contents of out/ckpt.pt, and remove best.pt."""
    contents = torch.load(folder / "out/ckpt.pt", weights_only=True)
    edit(contents)
    torch.save(contents, folder / "out/ckpt.pt")
    (folder / "out/best.pt").unlink()


@change
def edit_safetensors(folder: Path, edit: Callable[[dict], object]) -> None:
    """Edit the tensors in gpt/model.safetensors."""
    tensors = load_file(folder / "gpt/model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "gpt/model.safetensors")


@change
def write_parquet(folder: Path, **columns: list) -> None:
    pa.parquet.write_table(pa.table(columns), folder / "corpus/a.parquet")


@change
def write_dataset(folder: Path, name: str, text: str) -> None:
    meta = CharTokenizer.meta_of(text)
    write_text_dataset(folder / name, text, CharTokenizer(meta), meta)


@change
def set_mode(folder: Path, name: str, mode: int = 0) -> None:
    (folder / name).chmod(mode)


@change
def lock(folder: Path, name: str) -> FileLock:
    """Hold the lock of a run."""
    (folder / name / "lock.owner").write_text("process 77 on far")
    return FileLock(folder / name / "lock")


@change
@contextmanager
def small_disk(folder: Path, name: str, pages: int = 0) -> Iterator[None]:
    """Mount a disk with space for this many files of up to 4096 bytes."""
    (folder / name).mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={4 * (pages + 1)}k", "tmpfs", folder / name]
    if subprocess.run(mount, capture_output=True).returncode:
        raise Unsupported("only root can mount a small disk")
    try:
        (folder / name / "file").write_bytes(bytes(4096))
        yield
    finally:
        subprocess.run(["umount", folder / name], check=True)


def module(name: str, text: str) -> Change:
    """A module that is imported before the real one, with PYTHONPATH as in MODULES."""
    return write(f"modules/{name}.py", text.encode())


def absent(name: str) -> Change:
    """The package is not installed."""
    return module(name, f"raise ModuleNotFoundError({name!r}, name={name!r})")


MODULES = {"PYTHONPATH": "{folder}/modules"}


class Malicious:
    """Pickles as a call that creates a file, `pwned` in the current folder."""

    def __reduce__(self) -> tuple:
        return open, ("pwned", "w")


def zipped(contents: object) -> bytes:
    """The bytes that torch.save writes."""
    file = io.BytesIO()
    torch.save(contents, file)
    return file.getvalue()


# --------------------------------------------------------------------------------------- the cases

WTE, C_FC = "transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight"

# Values that a rule of a script refuses, and names that are not among the choices.
OUT_OF_RANGE = {
    "train": "batch_size=-4 n_layer=0 n_head=0 block_size=-16 gradient_accumulation_steps=0 "
             "dropout=1.5 beta1=1.0 beta2=1.0 grad_clip=-1.0 learning_rate=0.0 weight_decay=-1.0 "
             "muon_lr=0.0 muon_momentum=1.0 embedding_lr=0.0 head_lr=0.1 cooldown_frac=0.0 "
             "max_iters=-1 eval_interval=-1 eval_iters=-1 keep_every=-5 log_interval=0 "
             "max_bad_steps=0 seed=-1 warmup_iters=8 min_lr=0.1 collective_timeout=0",
    "sample": "temperature=-1.0 top_k=0 top_p=2.0 repetition_penalty=0.0 num_samples=0 "
              "max_new_tokens=-1 start=",
    "bench": "n_embd=-16 rounds=0 new_tokens=0",
    "documents": "val_fraction=1.0 num_proc=0 seed=-1",
}
NOT_A_CHOICE = {
    "train": "optimizer=moun schedule=linaer positions=rotari activation=gelu_than device=cudas "
             "dtype=float61 backend=glo",
    "sample": "init_from=gpt2-larg",
    "bench": "optimizer=sgd mode=fast peer=nanogpt",
}

CASES = {
    # settings
    "an unknown setting": Case("train --batchsize=4", ["'batchsize'", "did you mean batch_size?"]),
    "a setting of an earlier version": Case("train --head_decay=0.1", ["'head_decay' does not"]),
    "a fraction for a whole number": Case(
        "train --batch_size=2.5", ["batch_size = 2.5", "a whole number"]),
    "a missing config file": Case("train config/none.py", ["'config/none.py'", "config files"]),
    "an unreadable config file": Case(
        "train mine.py", ["cannot read config file mine.py", "Permission denied"],
        both(write("mine.py", b"n_layer = 2\n"), set_mode("mine.py")), unprivileged=True),
    "a config file that is not UTF-8": Case(
        "train mine.py", ["config file mine.py failed", "utf-8"],
        write("mine.py", b"wandb_project = 'caf\xe9'\n")),
    "n_embd that is not divisible by n_head": Case(
        "train --n_embd=15", ["n_embd = 15", "n_head = 2", "a multiple of 2"]),
    # the data
    "no such dataset": Case(
        "train --dataset={folder}/none", ["none/train.bin", "prepare the dataset"]),
    "a file as dataset": Case(
        "train --dataset={folder}/data/train.bin", ["data/train.bin", "prepare the dataset"]),
    "no val.bin": Case("train", ["no ", "data/val.bin", "prepare"], remove("data/val.bin")),
    "an empty train.bin": Case(
        "train", ["train.bin has 0 bytes", "prepare it again"], write("data/train.bin", b"")),
    "a train.bin of one block": Case(
        "train", ["train.bin has 32 bytes", "block_size = 16", "a smaller block_size"],
        write("data/train.bin", bytes(32))),
    "ids outside the vocabulary": Case(
        "train", ["train.bin", "id 200", "14", "another tokenizer"],
        write_ids("data/train.bin", *range(14), 200, *range(14))),
    "ids outside the vocabulary in val.bin": Case(
        "train", ["val.bin", "id 200", "14", "another tokenizer"],
        write_ids("data/val.bin", *range(14), 200, *range(14))),
    "an unreadable train.bin": Case(
        "train --out_dir=tmp/out", ["train.bin", "Permission denied"],
        set_mode("data/train.bin"), unprivileged=True),
    "a meta.pkl of another dataset": Case(
        "train", ["train.bin", "id 13", "3", "another tokenizer"],
        write("data/meta.pkl", pickle.dumps(CharTokenizer.meta_of("abc")))),
    "a malicious meta.pkl": Case(
        "train", ["meta.pkl", "open", "plain data"],
        write("data/meta.pkl", pickle.dumps(Malicious()))),
    # checkpoints
    "nothing to resume": Case(
        "resume --out_dir=none", ["nothing to resume", "none", "--init_from=auto"]),
    "another n_layer when resuming": Case(
        "resume --n_layer=3", ["n_layer = 3", "2", "ckpt.pt", "--init_from=scratch"]),
    "another block_size when resuming": Case(
        "resume --block_size=8", ["block_size = 8", "16", "ckpt.pt", "leave it out"]),
    "another activation than that of the weights": Case(
        "train --init_from=out/ckpt.pt --activation=relu",
        ["activation = 'relu'", "gelu_tanh", "ckpt.pt", "leave it out"]),
    "a block_size above the checkpoint's": Case(
        "train --init_from=out/ckpt.pt --block_size=32",
        ["block_size = 32", "16 positions", "at most"]),
    "a checkpoint of another tokenizer": Case(
        "resume --dataset={folder}/other", ["ckpt.pt", "14 characters", "other", "same tokenizer"],
        write_dataset("other", "quick brown foxes " * 20)),
    "weights of another tokenizer": Case(
        "train --init_from=out/ckpt.pt --dataset={folder}/bpe",
        ["ckpt.pt", "14 characters", "GPT-2's BPE", "same tokenizer"]),
    "a truncated checkpoint": Case(
        "resume", ["ckpt.pt", "damaged", "move it away"], truncate("out/ckpt.pt", 0.5)),
    "a checkpoint without its last byte": Case(
        "resume", ["ckpt.pt", "damaged", "move it away"], truncate("out/ckpt.pt", 1)),
    "a checkpoint with a flipped bit": Case(
        "resume", ["ckpt.pt", "damaged"], flip_bits("out/ckpt.pt", 0.5)),
    "a text file as checkpoint": Case(
        "resume", ["ckpt.pt", "no checkpoint"], write("out/ckpt.pt", b"not a checkpoint\n")),
    "a checkpoint without a model": Case(
        "sample", ["ckpt.pt", "lacks model"], edit_checkpoint(lambda c: c.pop("model"))),
    "a checkpoint without a tensor": Case(
        "resume", ["ckpt.pt", "Missing key(s)", C_FC],
        edit_checkpoint(lambda c: c["model"].pop(C_FC))),
    "a checkpoint with an extra tensor": Case(
        "resume", ["ckpt.pt", "Unexpected key(s)", "transformer.h.9.x"],
        edit_checkpoint(lambda c: c["model"].update({"transformer.h.9.x": torch.zeros(1)}))),
    "a checkpoint with a tensor of another shape": Case(
        "sample", ["ckpt.pt", "size mismatch", C_FC, "[3, 16]", "[64, 16]"],
        edit_checkpoint(lambda c: c["model"].update({C_FC: torch.zeros(3, 16)}))),
    "a checkpoint with a weight that is nan": Case(
        "sample", ["ckpt.pt", C_FC, "finite"],
        edit_checkpoint(lambda c: c["model"][C_FC].fill_(float("nan")))),
    "a checkpoint without an optimizer": Case(
        "resume", ["ckpt.pt", "optimizer", "--init_from="],
        edit_checkpoint(lambda c: c.pop("optimizer"))),
    "a malicious checkpoint": Case(
        "resume", ["ckpt.pt", "more than plain data"],
        write("out/ckpt.pt", zipped({"model": {}, "model_args": {}, "config": Malicious()}))),
    "a malicious checkpoint of the old format": Case(
        "sample --checkpoint=ckpt.pt", ["ckpt.pt", "more than plain data"],
        write("out/ckpt.pt", pickle.dumps(Malicious(), protocol=2))),
    "an unreadable checkpoint": Case(
        "sample", ["best.pt", "Permission denied"], set_mode("out/best.pt"), unprivileged=True),
    "no checkpoint in the folder to sample from": Case(
        "sample --out_dir=data", ["no checkpoint data/ckpt.pt", "train first"]),
    "a missing checkpoint": Case(
        "sample --checkpoint=last.pt", ["no checkpoint out/last.pt", "another path"]),
    "a folder as checkpoint": Case(
        "sample --checkpoint=../data", ["out/../data", "Is a directory"]),
    # pretrained weights
    "a model that cannot be downloaded": Case(
        "sample --init_from=owner/name", ["owner/name", "neither a local file or folder", "hub"]),
    "a folder without config.json": Case(
        "finetune", ["gpt", "expected config.json"], remove("gpt/config.json")),
    "a config.json that is not JSON": Case(
        "finetune", ["gpt/config.json", "cannot read"], write("gpt/config.json", b"{")),
    "truncated pretrained weights": Case(
        "finetune", ["model.safetensors", "cannot read"], truncate("gpt/model.safetensors", 0.5)),
    "pretrained weights without a tensor": Case(
        "sample-gpt", ["gpt", "Missing key(s)", "transformer.ln_f.bias"],
        edit_safetensors(lambda t: t.pop("transformer.ln_f.bias"))),
    "pretrained weights with a tensor of another shape": Case(
        "sample-gpt", ["gpt", "size mismatch", WTE, "[300, 2]", "[50257, 2]"],
        edit_safetensors(lambda t: t.update({WTE: torch.zeros(300, 2)}))),
    "malicious pretrained weights": Case(
        "sample-gpt", ["pytorch_model.bin", "cannot read"],
        both(remove("gpt/model.safetensors"),
             write("gpt/pytorch_model.bin", zipped({WTE: Malicious()})))),
    "pretrained weights of another tokenizer": Case(
        "finetune --dataset={folder}/data", ["gpt", "GPT-2's BPE", "14 characters"]),
    # the prompt
    "a prompt with unknown characters": Case(
        "sample --start=tZ#", ["'#', 'Z'", "vocabulary", "14 characters"]),
    "a missing prompt file": Case("sample --start=FILE:none.txt", ["none.txt", "No such file"]),
    "an empty prompt file": Case(
        "sample --start=FILE:prompt.txt", ["prompt", "empty"], write("prompt.txt", b"")),
    "a prompt file that is not UTF-8": Case(
        "sample --start=FILE:prompt.txt", ["prompt.txt", "utf-8"],
        write("prompt.txt", b"caf\xe9")),
    "a stop text of several tokens": Case("sample --stop=be", ["stop = 'be'", "2 tokens", "one"]),
    # out_dir and loggers
    "a file as out_dir": Case("train --out_dir=prompt.txt", ["out_dir = 'prompt.txt'", "exists"]),
    "an out_dir without write permission": Case(
        "train", ["out_dir = 'out'", "Permission denied"],
        both(set_mode("out/lock", 0o444), set_mode("out", 0o555)), unprivileged=True),
    "an out_dir in a folder without write permission": Case(
        "train --out_dir=new", ["out_dir = 'new'", "Permission denied"], set_mode(".", 0o555),
        unprivileged=True),
    "an out_dir without read permission": Case(
        "resume", ["out_dir = 'out'", "Permission denied"], set_mode("out"), unprivileged=True),
    "an out_dir on a full disk": Case(
        "train --out_dir=disk/out", ["out_dir = 'disk/out'", "MB free", "make room"],
        small_disk("disk")),
    "an out_dir in use": Case(
        "train", ["out_dir = 'out'", "process 77 on far", "another out_dir"], lock("out")),
    "no TensorBoard": Case(
        "train --tensorboard_log=True", ["tensorboard", "pip install"], absent("tensorboard"),
        MODULES),
    "no Weights & Biases": Case(
        "train --wandb_log=True", ["wandb", "pip install"], absent("wandb"), MODULES),
    "no tiktoken": Case("sample-gpt", ["tiktoken", "pip install"], absent("tiktoken"), MODULES),
    # the machine
    "CUDA where there is none": Case(
        "train --device=cuda", ["device = 'cuda'", "no cuda", "--device=cpu"]),
    "a GPU that does not exist": Case(
        "train --device=cuda:2", ["device = 'cuda:2'", "cuda:0 to cuda:1"],
        module("sitecustomize", "import torch\ntorch.cuda.is_available = lambda: True\n"
                                "torch.cuda.device_count = lambda: 2\n"), MODULES),
    "a CPU that does not exist": Case("bench --device=cpu:7", ["'cpu:7'", "cpu:0 to cpu:0"]),
    "float16 on a CPU": Case(
        "train --dtype=float16", ["float16", "use bfloat16 or float32"]),
    "NCCL on a CPU": Case(
        "train --backend=nccl", ["backend = 'nccl'", "GPUs", "--backend=gloo"],
        environment={"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}),
    "compilation without a compiler": Case(
        "train --compile=True", ["compile = True", "g++", "--compile=False"],
        environment={"PATH": "/none", "CXX": ""}),
    "micro-batches not divisible by the processes": Case(
        "train", ["gradient_accumulation_steps = 2", "3 processes", "a multiple of 3"],
        environment={"RANK": "0", "WORLD_SIZE": "3"}),
    "RANK without WORLD_SIZE": Case(
        "train", ["RANK=1", "WORLD_SIZE=1", "torchrun"], environment={"RANK": "1"}),
    "processes without MASTER_ADDR": Case(
        "train", ["MASTER_ADDR", "torchrun"], environment={"RANK": "0", "WORLD_SIZE": "2"}),
    "a port in use": Case(
        "train", ["rendezvous failed", "port", "--standalone"], environment={
            "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "{port}"}),
    # preparing data
    "no input.txt and no network": Case(
        "characters", ["127.0.0.1", "download it yourself to", "shakespeare_char/input.txt"],
        remove("repo/data/shakespeare_char/input.txt"), {"NO_PROXY": "*"}),
    "an input.txt that is too short": Case(
        "shakespeare", ["input.txt", "9 characters", "put a text"],
        write("repo/data/shakespeare/input.txt", b"too short")),
    "more characters than ids": Case(
        "characters", ["70,000 distinct characters", "GPT-2's BPE"],
        write("repo/data/shakespeare_char/input.txt",
              "".join(map(chr, range(0x10000, 0x10000 + 70_000))).encode())),
    "a dataset folder without write permission": Case(
        "characters", ["train.bin", "Permission denied"],
        set_mode("repo/data/shakespeare_char", 0o555), unprivileged=True),
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
    "a line that is not JSON": Case(
        "documents", ["{cut", "expected a document with a field `text`"],
        write("corpus/a.jsonl", b'{"text": "one"}\n{"text": "two"}\n{cut\n')),
    "documents that are not UTF-8": Case(
        "documents --input=corpus/a.txt", ["corpus/a.txt", "utf-8"],
        write("corpus/a.txt", b"caf\xe9")),
    "a parquet file without text": Case(
        "documents --input=corpus/a.parquet", ["corpus/a.parquet", "no column `text`", "body"],
        write_parquet(body=["one", "two", "three"])),
    "a parquet row without text": Case(
        "documents --input=corpus/a.parquet", ["None", "a field `text`"],
        write_parquet(text=["one", None, "three"])),
    "a damaged parquet file": Case(
        "documents --input=corpus/a.parquet", ["cannot read corpus/a.parquet"],
        both(write_parquet(text=[f"document {i}" for i in range(2000)]),
             flip_bits("corpus/a.parquet", 0.1, 0.5))),
    "unreadable documents": Case(
        "documents --out_dir=tmp/documents", ["corpus/a.jsonl", "Permission denied"],
        set_mode("corpus/a.jsonl"), unprivileged=True),
    "a file as folder of a dataset": Case(
        "documents --out_dir=prompt.txt", ["prompt.txt", "--out_dir="]),
    "a dataset in a folder without write permission": Case(
        "documents", ["documents", "Permission denied"], set_mode(".", 0o555), unprivileged=True),
}


for table in (OUT_OF_RANGE, NOT_A_CHOICE):
    for command, values in table.items():
        for name, value in (text.split("=") for text in values.split()):
            text = f"{command} --{name}={value}"
            CASES[text] = Case(text, [f"{name} = ", value, "expected"])


# ------------------------------------------------------------------------------- running the cases

@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A folder with all files that the valid commands need."""
    folder = tmp_path_factory.mktemp("template")
    text = "to be or not to be that is the question whether " * 20
    write_dataset("data", text)(folder)
    write_bin(folder / "bpe/train.bin", GPT2Tokenizer().encode(text))
    write_bin(folder / "bpe/val.bin", GPT2Tokenizer().encode(text))
    (folder / "prompt.txt").write_text("to be")
    for path in (ROOT / "configurator.py", *ROOT.glob("data/*.py"),
                 *ROOT.glob("data/*/prepare.py")):
        copy = folder / "repo" / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    for name in ("shakespeare", "shakespeare_char"):
        (folder / "repo/data" / name / "input.txt").write_text(text)
    (folder / "corpus").mkdir()
    (folder / "corpus/a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    save_pretrained(folder / "gpt")
    (folder / "tmp").mkdir()
    for command in ("train", "resume --max_iters=2"):  # writes ckpt.pt and best.pt
        done = run(Case(command, []), folder)
        assert done.returncode == 0, done.stderr
    return folder


def save_pretrained(folder: Path) -> None:
    """A small model of zeros in Hugging Face's format, with GPT-2's vocabulary."""
    config = {"n_positions": 16, "vocab_size": 50257, "n_layer": 1, "n_head": 1, "n_embd": 2}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **config}))
    gpt = GPT(GPTConfig(block_size=16, vocab_size=50257, n_layer=1, n_head=1, n_embd=2))
    tensors = {name: torch.zeros_like(tensor.t() if "c_" in name and tensor.dim() == 2 else tensor,
                                      memory_format=torch.contiguous_format)
               for name, tensor in gpt.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors")


DROP_PRIVILEGES = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"]


def run(case: Case, folder: Path, port: int = 0) -> subprocess.CompletedProcess:
    """Run a case's command in its folder."""
    name, *more = shlex.split(case.command)
    args = [sys.executable, *(str(arg).format(folder=folder) for arg in [*COMMANDS[name], *more])]
    if case.unprivileged and os.geteuid() == 0:
        if not shutil.which("setpriv") or subprocess.run([*DROP_PRIVILEGES, "true"]).returncode:
            raise Unsupported("root cannot drop its privileges without setpriv")
        args = [*DROP_PRIVILEGES, *args]
    environment = {"HOME": f"{folder}/tmp", "TMPDIR": f"{folder}/tmp",
                   "TORCHINDUCTOR_CACHE_DIR": f"{folder}-inductor",  # torch creates it at once
                   "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {key: text.format(folder=folder, port=port)
                    for key, text in case.environment.items()}
    if COMMANDS[name][0] in (ROOT / "train.py", ROOT / "sample.py", ROOT / "bench.py") and not (
            case.unprivileged or "PYTHONPATH" in environment):
        return forked(args[1:], folder, environment)
    return subprocess.run(args, cwd=folder, env=os.environ | environment, text=True,
                          capture_output=True, timeout=120, stdin=subprocess.DEVNULL)


def snapshot(*folders: Path) -> dict[Path, tuple]:
    """Every file and folder below: its mode, and of a file its bytes and modification time."""
    found = {}
    for path in (path for folder in folders for path in folder.rglob("*")):
        status = path.stat()
        content = path.read_bytes() if path.is_file() and os.access(path, os.R_OK) else None
        written = status.st_mtime_ns if path.is_file() else None
        found[path] = stat.filemode(status.st_mode), written, content
    return found


def differing(before: dict[Path, tuple], after: dict[Path, tuple]) -> set[Path]:
    return {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}


class Result(NamedTuple):
    """How a case ended, and the files that are new, gone or changed."""

    done: subprocess.CompletedProcess
    touched: set[Path]


def run_in_copy(case: Case, template: Path, folder: Path, port: int) -> Result | str:
    """Run a case in a copy of the template; a string says why it cannot be run."""
    shutil.copytree(template, folder)
    try:
        with ExitStack() as stack:
            held_open = case.change(folder)
            if held_open:
                stack.enter_context(held_open)
            before = snapshot(folder)
            done = run(case, folder, port)
            return Result(done, differing(before, snapshot(folder)))
    except Unsupported as reason:
        return str(reason)
    finally:
        for path in [folder, *folder.rglob("*")]:
            if path.is_dir():
                path.chmod(0o755)
        shutil.rmtree(folder)


def snapshot_repository() -> dict[Path, tuple]:
    """What a script might write to by mistake: datasets, configs, and folders of results."""
    found = snapshot(*(ROOT / name for name in ("data", "config", "out", "bench_trace", "wandb")))
    return {path: value for path, value in found.items() if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def repository_before() -> dict[Path, tuple]:
    return snapshot_repository()


@pytest.fixture(scope="module")
def results(template, repository_before, tmp_path_factory) -> dict[str, Result | str]:
    """Results of all cases, which run two at a time."""
    folder = tmp_path_factory.mktemp("cases")
    with socket.create_server(("127.0.0.1", 0)) as taken, ThreadPoolExecutor(2) as pool:
        port = taken.getsockname()[1]
        futures = [pool.submit(run_in_copy, case, template, folder / str(i), port)
                   for i, case in enumerate(CASES.values())]
    return {name: future.result() for name, future in zip(CASES, futures, strict=True)}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_are_valid(command, template, tmp_path):
    shutil.copytree(template, tmp_path / "copy")
    done = run(Case(command, []), tmp_path / "copy")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_use_ends_in_one_line_and_touches_no_file(name, results):
    if name == "CUDA where there is none" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if isinstance(results[name], str):
        pytest.skip(results[name])
    done, touched = results[name]
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for word in CASES[name].words:
        assert word in done.stderr
    assert touched == set()


def test_no_wrong_use_touches_the_repository(repository_before, results):
    assert differing(repository_before, snapshot_repository()) == set()
