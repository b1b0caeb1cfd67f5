"""Wrong uses of the scripts: each ends in one line on stderr and status 2, and touches no file.

A case is a valid command with one thing wrong, run in a folder of its own: a copy of `template`,
which has the files that the valid COMMANDS need, after some changes.
"""

import io
import os
import pickle
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import transformers
from conftest import ROOT, TINY, forked, write_bin

from data.encode import write_text_dataset
from data.tokenizer import CharTokenizer, GPT2Tokenizer

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
    "bench": [ROOT / "bench.py", "--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=16",
              "--batch_size=2", "--rounds=1", "--new_tokens=4", "--device=cpu", "--dtype=float32",
              "--dataset={folder}/data"],
    "characters": ["repo/data/shakespeare_char/prepare.py", "--url=http://127.0.0.1:9/none"],
    "documents": ["repo/data/openwebtext/prepare.py", "--input=corpus/*", "--out_dir=documents",
                  "--num_proc=1"],
}

# What becomes of a file: its new content, a function that makes that of the old one, its new mode
# (for which root drops its privileges), or None if it is deleted.
Change = bytes | Callable[[bytes], bytes] | int | None


class Case(NamedTuple):
    """A valid command and arguments added to it; words in the expected error; changes to files of
    the folder; environment variables."""

    command: str
    words: list[str]
    changes: dict[str, Change] = {}
    environment: dict[str, str] = {}

    @property
    def unprivileged(self) -> bool:
        return any(isinstance(new, int) for new in self.changes.values())


# ------------------------------------------------------------------------------- contents of files

def ids(*values: int) -> bytes:
    return np.array(values, "<u2").tobytes()


def flip_bits(content: bytes, start: float, end: float) -> bytes:
    """A bit of each byte is flipped between two fractions of the length."""
    first, last = int(start * len(content)), int(end * len(content))
    return content[:first] + bytes(byte ^ 1 for byte in content[first:last]) + content[last:]


def parquet(**columns: list) -> bytes:
    file = io.BytesIO()
    pa.parquet.write_table(pa.table(columns), file)
    return file.getvalue()


def saved(contents: object) -> bytes:
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(contents, file)
    return file.getvalue()


def edited(edit: Callable[[dict], object]) -> dict[str, Change]:
    """Edit the contents of ckpt.pt, and remove best.pt."""
    def change(content: bytes) -> bytes:
        contents = torch.load(io.BytesIO(content), weights_only=True)
        edit(contents)
        return saved(contents)
    return {"out/ckpt.pt": change, "out/best.pt": None}


def absent(name: str) -> dict[str, Change]:
    """The package is not installed."""
    return {f"modules/{name}.py": f"raise ModuleNotFoundError({name!r}, name={name!r})".encode()}


class Malicious:
    """Pickles as a call that creates a file, `pwned` in the current folder."""

    def __reduce__(self) -> tuple:
        return open, ("pwned", "w")


# --------------------------------------------------------------------------------------- the cases

C_FC = "transformer.h.1.mlp.c_fc.weight"

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
    "sample": "init_from=gpt2-larg init_from=none.pt",
    "bench": "optimizer=sgd mode=fast peer=nanogpt device=cpu:7",
}

CASES = {
    # settings
    "n_embd that is not divisible by n_head": Case(
        "train --n_embd=15", ["n_embd = 15", "n_head = 2", "a multiple of 2"]),
    # the data
    "no such dataset": Case(
        "train --dataset={folder}/none", ["none/train.bin", "prepare the dataset"]),
    "no val.bin": Case("train", ["no ", "data/val.bin", "prepare"], {"data/val.bin": None}),
    "ids outside the vocabulary": Case(
        "train", ["train.bin", "id 200", "14", "another tokenizer"],
        {"data/train.bin": ids(*range(14), 200, *range(14))}),
    "ids outside the vocabulary in val.bin": Case(
        "train", ["val.bin", "id 200", "14", "another tokenizer"],
        {"data/val.bin": ids(*range(14), 200, *range(14))}),
    "an unreadable train.bin": Case(
        "train --out_dir=tmp/out", ["train.bin", "Permission denied"], {"data/train.bin": 0}),
    "a malicious meta.pkl": Case(
        "train", ["meta.pkl", "open", "plain data"], {"data/meta.pkl": pickle.dumps(Malicious())}),
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
        "resume", ["ckpt.pt", "14 characters", "the dataset", "same tokenizer"],
        {"data/meta.pkl": pickle.dumps(CharTokenizer.meta_of("quick brown"))}),
    "a checkpoint with a flipped bit": Case(
        "resume", ["ckpt.pt", "damaged"],
        {"out/ckpt.pt": lambda content: flip_bits(content, 0.5, 0.51)}),
    "a text file as checkpoint": Case(
        "resume", ["ckpt.pt", "of another format", "move it away"], {"out/ckpt.pt": b"text"}),
    "a checkpoint without a tensor": Case(
        "resume", ["ckpt.pt", "Missing key(s)", C_FC], edited(lambda c: c["model"].pop(C_FC))),
    "a checkpoint with a weight that is nan": Case(
        "sample", ["ckpt.pt", C_FC, "finite"],
        edited(lambda c: c["model"][C_FC].fill_(float("nan")))),
    "a checkpoint without an optimizer": Case(
        "resume", ["ckpt.pt", "optimizer", "--init_from="], edited(lambda c: c.pop("optimizer"))),
    "a malicious checkpoint": Case(
        "resume", ["ckpt.pt", "than plain data"],
        {"out/ckpt.pt": saved({"model": {}, "model_args": {}, "config": Malicious()})}),
    "a malicious checkpoint of the old format": Case(
        "sample --checkpoint=ckpt.pt", ["ckpt.pt", "than plain data"],
        {"out/ckpt.pt": pickle.dumps(Malicious(), protocol=2)}),
    "no checkpoint in the folder to sample from": Case(
        "sample --out_dir=data", ["no checkpoint data/ckpt.pt", "train first"]),
    "a folder as checkpoint": Case(
        "sample --checkpoint=../data", ["out/../data", "no checkpoint"]),
    # pretrained weights
    "a model that cannot be downloaded": Case(
        "sample --init_from=owner/name", ["owner/name", "neither a local file or folder", "hub"]),
    "a GPT-2 that cannot be downloaded": Case(
        "sample --init_from=gpt2", ["openai-community/gpt2", "hub"]),
    "a folder without config.json": Case(
        "finetune", ["gpt", "expected config.json"], {"gpt/config.json": None}),
    "a folder without weights": Case(
        "finetune", ["gpt", "expected config.json"], {"gpt/model.safetensors": None}),
    "damaged pretrained weights": Case(
        "finetune", ["model.safetensors", "cannot read"], {"gpt/model.safetensors": b"{"}),
    "malicious pretrained weights": Case(
        "sample --init_from=gpt", ["pytorch_model.bin", "cannot read"],
        {"gpt/model.safetensors": None, "gpt/pytorch_model.bin": saved({C_FC: Malicious()})}),
    "pretrained weights of another tokenizer": Case(
        "finetune --dataset={folder}/data", ["gpt", "GPT-2's BPE", "14 characters"]),
    # the prompt
    "a prompt with unknown characters": Case(
        "sample --start=tZ#", ["character 2", "'Z'", "the 14 of the vocabulary"]),
    "a missing prompt file": Case("sample --start=FILE:none.txt", ["none.txt", "No such file"]),
    "an empty prompt file": Case(
        "sample --start=FILE:prompt.txt", ["prompt", "empty"], {"prompt.txt": b""}),
    "a prompt file that is not UTF-8": Case(
        "sample --start=FILE:prompt.txt", ["prompt.txt", "utf-8"], {"prompt.txt": b"caf\xe9"}),
    "an empty stop text": Case("sample --stop=", ["stop = ''", "expected"]),
    # out_dir and loggers
    "a file as out_dir": Case("train --out_dir=prompt.txt", ["out_dir = 'prompt.txt'", "exists"]),
    "an out_dir without write permission": Case(
        "train", ["out_dir = 'out'", "Permission denied"], {"out/lock": 0o444, "out": 0o555}),
    "an out_dir without read permission": Case(
        "resume", ["out_dir = 'out'", "Permission denied"], {"out": 0}),
    "no TensorBoard": Case(
        "train --tensorboard_log=True", ["tensorboard", "pip install"], absent("tensorboard")),
    "no Weights & Biases": Case(
        "train --wandb_log=True", ["wandb", "pip install"], absent("wandb")),
    # the machine
    "float16 on a CPU": Case("train --dtype=float16", ["float16", "use bfloat16 or float32"]),
    "NCCL on a CPU": Case(
        "train --backend=nccl", ["backend = 'nccl'", "GPUs", "--backend=gloo"],
        environment={"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}),
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
        {"repo/data/shakespeare_char/input.txt": None}, {"NO_PROXY": "*"}),
    "more characters than ids": Case(
        "characters", ["70,000 distinct characters", "GPT-2's BPE"],
        {"repo/data/shakespeare_char/input.txt":
            "".join(map(chr, range(0x10000, 0x10000 + 70_000))).encode()}),
    "no documents": Case("documents --input=corpus/*.none", ["--input=corpus/*.none", ".jsonl"]),
    "an unknown kind of documents": Case(
        "documents --input=corpus/a.json",
        ["corpus/a.json", ".parquet, .jsonl, .txt", "did you mean .jsonl?"],
        {"corpus/a.json": b'{"text": "one"}\n'}),
    "one document": Case(
        "documents", ["1 of 1 documents", "at least 2"], {"corpus/a.jsonl": b'{"text": "one"}\n'}),
    "documents that are not UTF-8": Case(
        "documents --input=corpus/a.txt", ["corpus/a.txt", "not UTF-8 at byte 3"],
        {"corpus/a.txt": b"caf\xe9"}),
    "a parquet file without text": Case(
        "documents --input=corpus/a.parquet", ["corpus/a.parquet", "no column `text`", "body"],
        {"corpus/a.parquet": parquet(body=["one", "two", "three"])}),
    "a parquet row without text": Case(
        "documents --input=corpus/a.parquet", ["None", "a field `text`"],
        {"corpus/a.parquet": parquet(text=["one", None, "three"])}),
    "a damaged parquet file": Case(
        "documents --input=corpus/a.parquet", ["cannot read corpus/a.parquet"],
        {"corpus/a.parquet": flip_bits(parquet(text=[*map(str, range(2000))]), 0.1, 0.5)}),
    "unreadable documents": Case(
        "documents --out_dir=tmp/documents", ["corpus/a.jsonl", "Permission denied"],
        {"corpus/a.jsonl": 0}),
    "a file as folder of a dataset": Case(
        "documents --out_dir=prompt.txt", ["prompt.txt", "another folder"]),
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
    write_text_dataset(folder / "data", text, CharTokenizer.meta_of(text))
    write_bin(folder / "bpe/train.bin", GPT2Tokenizer().encode(text))
    write_bin(folder / "bpe/val.bin", GPT2Tokenizer().encode(text))
    (folder / "prompt.txt").write_text("to be")
    shutil.copytree(ROOT / "data", folder / "repo/data", ignore=shutil.ignore_patterns(
        "*.bin", "*.pkl", "*.txt", "__pycache__"))
    shutil.copy(ROOT / "configurator.py", folder / "repo")
    (folder / "repo/data/shakespeare_char/input.txt").write_text(text)
    (folder / "corpus").mkdir()
    (folder / "corpus/a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    config = transformers.GPT2Config(n_positions=16, n_layer=1, n_head=1, n_embd=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "gpt")
    (folder / "tmp").mkdir()
    for command in ("train", "resume --max_iters=2"):  # writes ckpt.pt and best.pt
        done = run(Case(command, []), folder)
        assert done.returncode == 0, done.stderr
    return folder


DROP_PRIVILEGES = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"] * (os.geteuid() == 0)
CAN_DROP = not DROP_PRIVILEGES or bool(
    shutil.which("setpriv") and subprocess.run([*DROP_PRIVILEGES, "true"]).returncode == 0)


def run(case: Case, folder: Path, port: int = 0) -> subprocess.CompletedProcess:
    """Run a case's command in its folder."""
    name, *more = shlex.split(case.command)
    args = [sys.executable, *(str(arg).format(folder=folder) for arg in [*COMMANDS[name], *more])]
    if case.unprivileged:
        args = [*DROP_PRIVILEGES, *args]
    environment = {"HOME": f"{folder}/tmp", "TMPDIR": f"{folder}/tmp",
                   "TORCHINDUCTOR_CACHE_DIR": f"{folder}-inductor",  # torch creates it at once
                   "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {key: text.format(port=port) for key, text in case.environment.items()}
    if (folder / "modules").exists():
        environment["PYTHONPATH"] = f"{folder}/modules"
    if COMMANDS[name][0] in (ROOT / "train.py", ROOT / "sample.py", ROOT / "bench.py") and not (
            case.unprivileged or "PYTHONPATH" in environment):
        return forked(args[1:], folder, environment)
    return subprocess.run(args, cwd=folder, env=os.environ | environment, text=True,
                          capture_output=True, timeout=120, stdin=subprocess.DEVNULL)


def snapshot(*folders: Path) -> dict[Path, tuple]:
    """The mode of every file and folder below, and what of a file a write would change."""
    found = {path: path.stat() for folder in folders for path in folder.rglob("*")}
    return {path: (s.st_mode, *((s.st_ino, s.st_size, s.st_mtime_ns) if path.is_file() else ()))
            for path, s in found.items() if "__pycache__" not in path.parts}


def change(path: Path, new: Change) -> None:
    if new is None:
        path.unlink()
    elif isinstance(new, int):
        path.chmod(new)
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(new(path.read_bytes()) if callable(new) else new)


def run_in_copy(case: Case, template: Path, folder: Path, port: int,
                ) -> tuple[subprocess.CompletedProcess, set[Path]]:
    """Run a case in a copy of the template. Returns how it ended, and which files it touched."""
    shutil.copytree(template, folder)
    for name, new in case.changes.items():
        change(folder / name, new)
    before = snapshot(folder)
    done = run(case, folder, port)
    touched = {path for path, _ in before.items() ^ snapshot(folder).items()}
    (folder / "out").chmod(0o755)
    shutil.rmtree(folder)
    return done, touched


# What a script might write to by mistake: datasets, configs, and folders of results.
REPOSITORY = [ROOT / name for name in ("data", "config", "out", "bench_trace", "wandb")]


@pytest.fixture(scope="module")
def repository_before() -> dict[Path, tuple]:
    return snapshot(*REPOSITORY)


@pytest.fixture(scope="module")
def results(template, repository_before, tmp_path_factory) -> dict[str, tuple]:
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
    if CASES[name].unprivileged and not CAN_DROP:
        pytest.skip("root cannot drop its privileges without setpriv")
    done, touched = results[name]
    assert done.returncode == 2, done.stderr
    # sample.py prints its settings and its device to stderr, as the text alone goes to stdout.
    error = re.sub(r"^(settings|running on).*\n", "", done.stderr, flags=re.MULTILINE)
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    for word in CASES[name].words:
        assert word in error
    assert touched == set()


def test_no_wrong_use_touches_the_repository(repository_before, results):
    assert repository_before.items() ^ snapshot(*REPOSITORY).items() == set()
