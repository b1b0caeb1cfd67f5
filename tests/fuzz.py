"""Wrong uses of the scripts, made at random: is each refused in one sentence, with nothing touched?

    python tests/fuzz.py --cases=2000             # about 15 minutes on one core
    python tests/fuzz.py --cases=200 --seed=1
    python tests/fuzz.py --case=17                # replay one, and print all that it printed

A case is a valid command with one thing wrong: a setting, a config file, a file that is read or
written, a value inside one. It must end with status 2 and one line "error: ..." that names the
setting or the file, touch nothing, and take less than 20 s; or, where the generator cannot tell
whether the change is harmful, with status 0, or with status 1 and one line, as a run that diverges.
Prints the cases that do not; exits 1 if there are any.
"""

import argparse
import ast
import functools
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from conftest import ROOT, go_offline
from tqdm import tqdm
from wrong_use import CAN_DROP, COMMANDS, arguments, run_in_copy, write_template

SECONDS, MEMORY = 20, 8 * 2**30  # of a case; what takes longer is ended by SIGALRM
LIMITS = f"""import resource, signal
signal.alarm({SECONDS})
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
"""


class Case(NamedTuple):
    what: str  # in words
    args: list[str | Path]  # the script and its arguments
    names: list[str]  # the error must have one of these
    change: Callable[[Path], object] = lambda folder: None  # to the folder
    harmful: bool = False  # whether only status 2 is right
    unprivileged: bool = False


# -------------------------------------------------------------------------------------- settings

# Of each kind first those that are wrong for every setting: no number may be negative.
WRONG_NUMBERS = ["-1", "-0.5", "-1e305", "1e999", "nan", "-inf", "9" * 5000, "0x10", "2**3", "1,5",
                 "1e", "--1", "", "x"]
NUMBERS = ["0", "1", "0.5", "1e-320", "257", "1e9", str(10**20), "1e305", "None"]
WRONG_VALUES = ["[]", "{}", "b'x'", "1j", "...", "object()", "float('nan')", "10**5000", "-1",
                "'\\0'", "'\\udcff'", "range(3)", "__import__('numpy').int64(-1)",
                "__import__('numpy').array([1])", "__import__('decimal').Decimal(1)"]
VALUES = ["10**20", "1e305", "0", "True", "None", "'x'", "__import__('numpy').float32(0.5)"]
TEXTS = ["", " ", "~", "~/x", "é", "\U0001f600", "\udcff", "x" * 5000, "a/b/c", "prompt.txt",
         "corpus", "{}%s", "'", "a\nb", "\x1b[31m", "None", "True", "-", "[", "cuda", "cpu:7",
         "meta", "mps", "float16", "resume", "scratch", "auto", "gpt2-xl", "owner/name", "bpe:1",
         "bpe:1e9", "char:1", "FILE:", "FILE:~", "FILE:out", "corpus,none"]
LONG = ["max_iters", "max_new_tokens", "new_tokens", "rounds", "input_mb"]  # if a value is large
SKIPPED = ["compile", "wandb_log"]  # which need a compiler, or much memory


@functools.cache
def settings_of(command: str) -> dict[str, object]:
    """The settings of a command's script with their defaults, from --help."""
    script = ROOT / str(COMMANDS[command][0]).removeprefix("repo/")
    shown = subprocess.run([sys.executable, script, "--help"], text=True, capture_output=True)
    found = re.findall(r"^  --(\w+)=('.*?'|\S+)", shown.stdout, re.MULTILINE)
    return {name: ast.literal_eval(value) for name, value in found if name not in SKIPPED}


def setting(rng: random.Random, template: Path) -> Case:
    """A setting with a value."""
    command = rng.choice(list(COMMANDS))
    return setting_case(command, rng.choice(list(settings_of(command))), rng)


def setting_case(command: str, name: str, rng: random.Random) -> Case:
    """A setting with a value, given by an argument or by a config file."""
    default, by_file = settings_of(command)[name], rng.random() < 0.3
    if by_file:
        wrong, others = WRONG_VALUES, VALUES
    elif isinstance(default, int | float) or name in LONG:
        wrong, others = WRONG_NUMBERS, NUMBERS
    else:
        wrong, others = [], TEXTS + NUMBERS * (default is None)
    text = rng.choice(wrong + others * (name not in LONG))
    args = [arg for arg in COMMANDS[command]  # an argument would override the config file
            if not str(arg).startswith(f"--{name}=")]
    return Case(f"{command}: {name} = {text:.30}{' in a config file' * by_file}",
                [*args, "conf.py" if by_file else f"--{name}={text}"],
                [name, text.strip().removeprefix("~") or name, "File name", "the text", "documents",
                 "the prompt", *["train.bin"] * (name == "init_from")],
                lambda folder: by_file and (folder / "conf.py").write_text(f"{name} = {text}\n"),
                text in wrong)


NAMES = ["--", "--=", "-x", "--é=1", "--\udcff=1", "--seed", "--Seed=1", "--seed =1", "seed=1", "",
         "--dropuot=0", "config/none.py", "\udcff.py", "corpus", "~", "a\nb", "--__doc__=x",
         "--configure=1", f"--{'x' * 5000}=1", "x" * 5000]
CONFIGS = ["raise GeneratorExit", "raise KeyboardInterrupt", "exit(0)", "1/0", "import train",
           "class E(BaseException): pass\nraise E", "from bench import *", "def f(): f()\nf()",
           "x = (", "del seed", "unknown = 1", "import nosuchmodule", "raise OSError(28, 'a\\nb')",
           "raise MemoryError", "raise BrokenPipeError", "raise ValueError('\\udcff')", "x" * 5000,
           "raise RuntimeError('allocate')", "seed = 1\0", "\udcff", "[" * 5000,
           "import configurator; configurator.configure({})"]


def config_file(rng: random.Random, template: Path) -> Case:
    """An argument that is no setting, or a config file that fails."""
    command, text = rng.choice(list(COMMANDS)), rng.choice(CONFIGS + NAMES)
    is_name = text in NAMES
    return Case(f"{command}: {'argument' if is_name else 'config file'} {text:.50}",
                [*COMMANDS[command], text if is_name else "conf.py"],
                ["setting", "config file", "no value"] if is_name else ["conf.py"],
                lambda folder: is_name or (folder / "conf.py").write_bytes(os.fsencode(text)), True)


# ----------------------------------------------------------------------------------------- files

# Commands and their files; those with a ? may be missing, are only written, or are ignored.
TRAINED = "train --dataset={folder}/trained --sample_every=1"
EXPORT = "sample --checkpoint=ckpt.pt --export=exported"
FILES = {
    "train": "data/train.bin data/val.bin ?data/meta.pkl ?data/dataset.json ?out ?out/lock "
             "?out/metrics.jsonl ?out/previous-1",
    "train --out_dir=new": "?new",
    "train --init_from=out/ckpt.pt": "out/ckpt.pt",
    "train --tensorboard_log=True": "?out/tensorboard",
    "train conf.py": "conf.py",
    "resume": "?out/ckpt.pt data/val.bin ?out/metrics.jsonl ?out/best.pt ?out/lock",
    TRAINED: "trained/tokenizer.json",
    "finetune": "gpt/config.json gpt/model.safetensors bpe/train.bin",
    "sample --start=FILE:prompt.txt": "?out/best.pt prompt.txt",
    EXPORT: "out/ckpt.pt ?exported ?exported/config.json ?exported/model.safetensors",
    "bench --mode=train --profile=True": "?data/train.bin ?data/meta.pkl ?bench_trace",
    "plan": "?plan.json",
    "characters": "repo/data/shakespeare_char/input.txt ?repo/data/shakespeare_char/val.bin "
                  "?repo/data/shakespeare_char/meta.pkl ?repo/data/shakespeare_char/dataset.json",
    "documents --input=corpus/a.jsonl": "corpus/a.jsonl ?documents ?documents/train.bin",
    "text": "?more/b.jsonl ?more/c.txt ?repo/data/mine ?repo/data/mine/tokenizer.json",
    **{f"text --input=more/{name}": f"more/{name}"
       for name in ("b.jsonl", "b.jsonl.gz", "c.txt", "d.parquet")}}
KINDS: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None, "a folder": Path.mkdir, "a FIFO": os.mkfifo,
    "unreadable": lambda path: path.touch(mode=0),
    "a symlink to itself": lambda path: path.symlink_to(path.name),
    "a symlink to nothing": lambda path: path.symlink_to("none/none"),
    "a device": lambda path: path.symlink_to("/dev/full")}
OTHER = [b"{}", b"PK\3\4", b"[[1]]", b"text", b"\x80\4N.", b"null", b"\xff\xfe"]


def file(rng: random.Random, template: Path) -> Case:
    """A file that is read or written is damaged, or no plain file."""
    command = rng.choice(list(FILES))
    name = rng.choice(FILES[command].split())
    optional, path = name.startswith("?"), Path(name.removeprefix("?"))
    content = (template / path).is_file() and (template / path).read_bytes() or b"x" * 100
    i = rng.randrange(len(content))
    contents = {"empty": b"", "cut": content[:i], "random bytes": rng.randbytes(300),
                "with a flipped bit": content[:i] + bytes([content[i] ^ 1]) + content[i + 1:],
                "of another kind": rng.choice(OTHER)}
    what = rng.choice([*KINDS, *contents])

    def change(folder: Path) -> None:
        target = folder / path
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        target.parent.mkdir(exist_ok=True)
        KINDS[what](target) if what in KINDS else target.write_bytes(contents[what])

    return Case(f"{command}: {path} is {what}", arguments(command),
                [*path.parts[-2:], "documents", "the prompt", "the text", "of the text"], change,
                what in KINDS and not optional, what == "unreadable")


# ------------------------------------------------------------------------------ values in a file

PLAIN = ["None", "True", "-1", "0", "0.5", "2**70", "10**4000", "1e305", "math.nan", "-math.inf",
         "''", "'x'", "[]", "{}", "[[]]", "{'a': 1}", "b'x'", "(1,)", "1j", "10**5000",
         "torch.ones(())", "torch.ones(2, 2)"]
N_JSON = PLAIN.index("b'x'")  # of them JSON has
WRONG_TENSORS: dict[str, Callable[[torch.Tensor], object]] = {
    "complex": lambda t: t + 0j, "sparse": lambda t: t.to_sparse(), "meta": lambda t: t.to("meta"),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "float8": lambda t: t.to(torch.float8_e4m3fn), "of one row": lambda t: t[None],
    "nested": lambda t: torch.nested.nested_tensor([t]), "nan": lambda t: t * math.nan,
    "infinite": lambda t: t + math.inf, "empty": lambda t: t.flatten()[:0],
    "of 10**9 rows": lambda t: torch.zeros(1, 1).expand(10**9, 1), "a list": lambda t: t.tolist()}
TENSORS = WRONG_TENSORS | {  # these may fit, or be as good as others
    "float64": lambda t: t.double(), "negative": lambda t: -t.abs() - 1,
    "1e38": lambda t: t * 0 + 1e38, "bool": lambda t: t > 0, "int8": lambda t: t.to(torch.int8)}
EDITED = [*[("resume", "out/ckpt.pt")] * 6, (TRAINED, "trained/tokenizer.json"),
          *[("sample", "out/best.pt"), (EXPORT, "out/ckpt.pt")] * 2, ("train", "data/meta.pkl"),
          ("train", "data/dataset.json"), ("finetune", "gpt/config.json")]


def value(rng: random.Random, template: Path) -> Case:
    """A value in a checkpoint, or in another file of nested values, is missing or another."""
    command, name = rng.choice(EDITED)
    is_json, is_checkpoint = name.endswith(".json"), name.endswith(".pt")
    contents = (torch.load(template / name, weights_only=True) if is_checkpoint else
                (json if is_json else pickle).loads((template / name).read_bytes()))
    old, keys = contents, []
    while not keys or (isinstance(old, dict | list) and old and rng.random() < 0.85):
        parent = old
        keys.append(rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent))))
        old = parent[keys[-1]]
    if isinstance(old, torch.Tensor) and old.dim() and rng.random() < 0.8:
        what = rng.choice(list(TENSORS))
        with warnings.catch_warnings(action="ignore"):
            parent[keys[-1]] = TENSORS[what](old)
    elif rng.random() < 0.2:
        what = "missing"
        del parent[keys[-1]]
    else:
        what = rng.choice(PLAIN[:N_JSON] if is_json else PLAIN)
        parent[keys[-1]] = eval(what)

    def change(folder: Path) -> None:
        if is_json:
            (folder / name).write_text(json.dumps(contents))
        else:
            with open(folder / name, "wb") as file:
                (torch.save if is_checkpoint else pickle.dump)(contents, file)
        if name == "out/ckpt.pt":
            (folder / "out/best.pt").unlink()

    harmful = what in WRONG_TENSORS and (keys[0] == "model" or command == "resume")
    return Case(f"{command}: in {name}, {'/'.join(map(str, keys))} is {what}", arguments(command),
                [Path(name).name, "gpt ", *(keys[1:2] if keys[0] == "config" else [])], change,
                harmful)


# ------------------------------------------------------------------------------ running the cases

def make_case(seed: int, number: int, template: Path) -> Case:
    rng = random.Random(f"{seed} {number}")
    return rng.choice([setting, setting, config_file, file, file, value, value])(rng, template)


def fault(case: Case, status: int, error: str, touched: set[Path]) -> str | None:
    """What is wrong with how a case ended; None if nothing is."""
    # sample.py prints its settings and its device to stderr, as the text alone goes to stdout.
    error = re.sub(r"^(settings|running on|restored|USDT).*\n", "", error, flags=re.MULTILINE)
    if status == -14:
        return f"more than {SECONDS} s"
    if "Traceback" in error:
        return "a traceback"
    if status == 0:
        return "accepted" if case.harmful else None
    if status != 2 and (status != 1 or case.harmful):
        return f"status {status}"
    if not error.startswith("error: ") or error.count("\n") != 1:
        return "not one line"
    if error.startswith("error: out of memory"):
        return "out of memory"
    if status == 2 and not any(name in error for name in case.names):
        return "does not name the cause"
    if status == 2 and touched:
        return f"touched {', '.join(sorted(path.name for path in touched))}"
    return None


def run_case(case: Case, template: Path, folder: Path,
             ) -> tuple[str | None, subprocess.CompletedProcess]:
    """Run a case in a new folder. Returns its fault, if any, and how it ended."""
    limits = template.with_name("limits")
    limits.mkdir(exist_ok=True)
    (limits / "sitecustomize.py").write_text(LIMITS)
    done, touched = run_in_copy(template, folder, case.change, case.args,
                                {"PYTHONPATH": str(limits)}, case.unprivileged)
    return fault(case, done.returncode, done.stderr, touched), done


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="the number of a case to replay")
    n_cases, seed, replayed = vars(parser.parse_args()).values()
    del __file__  # or each process that is forked imports this script
    temporary = tempfile.TemporaryDirectory(prefix="fuzz-")
    base = Path(temporary.name)
    (base / "cache").mkdir()
    go_offline(base / "cache")
    template = write_template(base / "template")
    numbers = range(n_cases) if replayed is None else [replayed]
    found = Counter()
    for number in tqdm(numbers):
        case = make_case(seed, number, template)
        if case.unprivileged and not CAN_DROP:
            continue
        what, done = run_case(case, template, base / "case")
        if what:
            found[what] += 1
            tqdm.write(f"{what}: python tests/fuzz.py --seed={seed} --case={number}\n"
                       f"    {case.what!r:.200}\n    {done.stderr.strip()[-300:]!r}")
        if replayed is not None:
            print(case.what, shlex.join(map(str, case.args)), f"status {done.returncode}",
                  done.stdout, done.stderr, sep="\n")
    print(f"{len(numbers)} cases, {found.total()} faults {dict(found)}")
    sys.exit(bool(found))
