"""Wrong uses of the scripts: each ends in one line on stderr and status 2, and touches no file.

Here are those whose error has words that a user needs; tests/fuzz.py makes others at random:
values of the wrong type or range, files that are missing, damaged, unreadable or of another kind.
"""

import io
import pickle
import re
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT, Malicious, snapshot
from wrong_use import CAN_DROP, COMMANDS, arguments, run_in_copy, write_template

from data.tokenizer import CharTokenizer

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


MALICIOUS = Malicious(open, "pwned", "w")


# --------------------------------------------------------------------------------------- the cases

C_FC = "transformer.h.1.mlp.c_fc.weight"

CASES = {
    # settings
    "n_embd that is not divisible by n_head": Case(
        "train --n_embd=15", ["n_embd = 15", "n_head = 2", "a multiple of 2"]),
    # the data
    "ids outside the vocabulary in val.bin": Case(
        "train", ["val.bin", "id 200", "14", "another tokenizer"],
        {"data/val.bin": lambda content: b"\xc8\0" + content[2:]}),
    # checkpoints
    "nothing to resume": Case(
        "resume --out_dir=none", ["nothing to resume", "none", "--init_from=auto"]),
    "another n_layer when resuming": Case(
        "resume --n_layer=3", ["n_layer = 3", "2", "ckpt.pt", "--init_from=scratch"]),
    "another block_size when resuming": Case(
        "resume --block_size=8", ["block_size = 8", "16", "ckpt.pt", "leave it out"]),
    "a block_size above the checkpoint's": Case(
        "train --init_from=out/ckpt.pt --block_size=32",
        ["block_size = 32", "16 positions", "at most"]),
    "a checkpoint of another tokenizer": Case(
        "resume", ["ckpt.pt", "14 characters", "the dataset", "same tokenizer"],
        {"data/meta.pkl": pickle.dumps(CharTokenizer.meta_of("quick brown"))}),
    "a checkpoint without a tensor": Case(
        "resume", ["ckpt.pt", "Missing key(s)", C_FC],
        edited(lambda c: c["model"].pop(C_FC))),
    "a malicious checkpoint": Case(
        "resume", ["ckpt.pt", "than plain data"],
        {"out/ckpt.pt": saved({"model": {}, "model_args": {}, "config": MALICIOUS})}),
    "a malicious checkpoint of the old format": Case(
        "sample --checkpoint=ckpt.pt", ["ckpt.pt", "than plain data"],
        {"out/ckpt.pt": pickle.dumps(MALICIOUS, protocol=2)}),
    # pretrained weights
    "a model that cannot be downloaded": Case(
        "sample --init_from=owner/name", ["owner/name", "neither a local file or folder", "hub"]),
    "malicious pretrained weights": Case(
        "sample --init_from=gpt", ["pytorch_model.bin", "cannot read"],
        {"gpt/model.safetensors": None, "gpt/pytorch_model.bin": saved({C_FC: MALICIOUS})}),
    "pretrained weights of another tokenizer": Case(
        "finetune --dataset={folder}/data", ["gpt", "GPT-2's BPE", "14 characters"]),
    # out_dir and loggers
    "an out_dir without write permission": Case(
        "train", ["out/lock: Permission denied", "permissions"], {"out/lock": 0o444, "out": 0o555}),
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
    "more characters than ids": Case(
        "characters", ["70,000 distinct characters", "GPT-2's BPE"],
        {"repo/data/shakespeare_char/input.txt":
            "".join(map(chr, range(0x10000, 0x10000 + 70_000))).encode()}),
    "an unknown kind of documents": Case(
        "documents --input=corpus/a.json",
        ["corpus/a.json", ".parquet, .jsonl, .txt", "did you mean .jsonl?"],
        {"corpus/a.json": b'{"text": "one"}\n'}),
    "one document": Case(
        "documents", ["1 of 1 documents", "at least 2"], {"corpus/a.jsonl": b'{"text": "one"}\n'}),
    "a parquet file without text": Case(
        "documents --input=body.parquet", ["body.parquet", "no column `text`", "body"]),
}


# ------------------------------------------------------------------------------- running the cases

@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    return write_template(tmp_path_factory.mktemp("template"))


def change(folder: Path, changes: dict[str, Change]) -> None:
    for name, new in changes.items():
        path = folder / name
        if new is None:
            path.unlink()
        elif isinstance(new, int):
            path.chmod(new)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(new(path.read_bytes()) if callable(new) else new)


def run_case(case: Case, template: Path, folder: Path, port: int = 0,
             ) -> tuple[subprocess.CompletedProcess, set[Path]]:
    environment = {key: text.format(port=port) for key, text in case.environment.items()}
    return run_in_copy(template, folder, lambda copy: change(copy, case.changes),
                       arguments(case.command), environment, case.unprivileged)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_are_valid(command, template, tmp_path):
    done, _ = run_case(Case(command, []), template, tmp_path / "copy")
    assert done.returncode == 0, done.stderr


# What a script might write to by mistake: datasets, configs, and folders of results.
REPOSITORY = [ROOT / name for name in ("data", "config", "out", "bench_trace", "wandb")]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_wrong_use_ends_in_one_line_and_touches_no_file(case, template, tmp_path):
    if case.unprivileged and not CAN_DROP:
        pytest.skip("root cannot drop its privileges without setpriv")
    before = snapshot(*REPOSITORY)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done, touched = run_case(case, template, tmp_path / "copy", taken.getsockname()[1])
    assert done.returncode == 2, done.stderr
    # sample.py prints its settings and its device to stderr, as the text alone goes to stdout.
    error = re.sub(r"^(settings|running on).*\n", "", done.stderr, flags=re.MULTILINE)
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    for word in case.words:
        assert word in error
    assert touched == before.items() ^ snapshot(*REPOSITORY).items() == set()
