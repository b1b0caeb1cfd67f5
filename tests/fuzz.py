"""Wrong uses of the scripts, made at random: is each refused in one sentence, with nothing touched?

    python tests/fuzz.py --cases=2000             # about 15 minutes on one core
    python tests/fuzz.py --cases=200 --seed=1
    python tests/fuzz.py --case=17                # replay one, and print all that it printed

A case is a valid command with one thing wrong: a setting, a config file, a file that is read or
written, a value inside one. It must end with status 2 and one line "error: ..." that names the
setting or the file, touch nothing, and take less than 20 s; or with status 0, where the generator
cannot tell whether the change is harmful; or, for a number that makes a run diverge, with status 1
and one line. Prints the cases that do not; exits 1 if there are any.
"""

import argparse
import ast
import functools
import io
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
from contextlib import suppress
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
    harmful: bool = False  # whether status 0 is wrong
    unprivileged: bool = False
    may_diverge: bool = False  # whether status 1 is right, too


# -------------------------------------------------------------------------------------- settings

NUMBERS = ["-1", "0", "1", "0.5", "-0.5", "1e-320", "257", "1e9", str(10**20), "1e305", "-1e305",
           "1e999", "nan", "-inf", "9" * 5000, "0x10", "2**3", "1,5", "1e", "--1", "", "x", "None"]
TEXTS = ["", " ", "\n", "~", "~/x", "é", "\U0001f600", "\udcff", "x" * 5000, "a/b/c", "prompt.txt",
         "corpus", "{}%s", "'", "a\nb", "\x1b[31m", "None", "True", "[1]", "-", "*", "[", "cuda",
         "cpu:7", "meta", "mps", "int8", "float16", "resume", "scratch", "auto", "gpt2-xl", "bpe:1",
         "owner/name", "bpe:1e9", "char:1", "FILE:", "FILE:~", "FILE:out", "corpus,none"]
VALUES = ["[]", "{}", "b'x'", "1j", "...", "object()", "float('nan')", "10**5000", "-1", "10**20",
          "1e305", "0", "True", "None", "'x'", "'\\0'", "'\\udcff'", "range(3)",
          "__import__('numpy').int64(-1)", "__import__('numpy').float32(0.5)",
          "__import__('numpy').array([1])", "__import__('decimal').Decimal(1)"]
# Valid, but too long to wait for; what needs a compiler; and what needs much memory of its own.
LONG = ["max_iters", "max_new_tokens", "new_tokens", "rounds", "input_mb"]
SKIPPED = ["compile", "wandb_log"]


def source(command: str) -> Path:
    return ROOT / str(COMMANDS[command][0]).removeprefix("repo/")


def parsed(text: str) -> object:
    for convert in (int, float, ast.literal_eval):
        with suppress(ValueError, SyntaxError):
            return convert(text)
    return text


@functools.cache
def settings_of(command: str) -> tuple[dict, dict[str, str]]:
    """The settings of a command's script: their values, from --help and the command's arguments,
    and the comments of --help."""
    shown = subprocess.run([sys.executable, source(command), "--help"], text=True,
                           capture_output=True).stdout
    found = re.findall(r"^  --(\w+)=('.*?'|\S+) *(.*)", shown, re.MULTILINE)
    settings = {name: ast.literal_eval(value) for name, value, _ in found}
    for name, text in (arg[2:].split("=", 1) for arg in COMMANDS[command][1:]):
        settings[name] = text if isinstance(settings[name], str) else parsed(text)
    return settings, {name: comment for name, _, comment in found}


def is_refused(command: str, name: str, value: object) -> bool:
    """Whether a setting's type, its choices in --help or a rule of the script exclude a value."""
    settings, comments = settings_of(command)
    default = settings[name]
    if isinstance(default, int | float) and not (
            isinstance(value, int | float) and abs(value) <= sys.float_info.max
            and (isinstance(default, float) or value == int(value))
            and (not isinstance(default, bool) or value in (0, 1))):
        return True
    choices = re.findall(r"\w+", comments[name]) if " | " in comments[name] else None
    if choices and value is not None and not (
            isinstance(value, str) and value.partition(":")[0] in choices):
        return True
    for rule in re.findall(r'"([^"]*[<>=][^"]*)"', source(command).read_text(encoding="utf-8")):
        with suppress(SyntaxError, TypeError, NameError):
            code = compile(rule, "rule", "eval")
            if name in code.co_names and not eval(code, {}, settings | {name: value}):
                return True
    return False


def settings() -> list[tuple[str, str]]:
    """All settings of all scripts, with a command of each."""
    return [(command, name) for command in COMMANDS for name in settings_of(command)[0]
            if name not in SKIPPED and (command, name) != ("plan", "device")]


def setting(rng: random.Random, template: Path) -> Case:
    """A setting with a value, given by an argument or by a config file."""
    return setting_case(*rng.choice(settings()), rng)


def setting_case(command: str, name: str, rng: random.Random) -> Case:
    default, by_file = settings_of(command)[0][name], rng.random() < 0.3
    texts = VALUES if by_file else TEXTS if isinstance(default, str) else (
        NUMBERS + TEXTS * (default is None))
    text = rng.choice(texts)
    value = eval(text) if by_file else text if isinstance(default, str) else parsed(text)
    if name in LONG and isinstance(value, int | float) and 10 < value < 1e15:
        return setting_case(command, name, rng)
    args = [arg for arg in COMMANDS[command]  # an argument would override the config file
            if not str(arg).startswith(f"--{name}=")]
    return Case(f"{command}: {name} = {text:.30}{' in a config file' * by_file}",
                [*args, "conf.py" if by_file else f"--{name}={text}"],
                [name, text.strip() or name, "file name", *(["the text"] * (name == "start"))],
                lambda folder: by_file and (folder / "conf.py").write_text(f"{name} = {text}\n"),
                is_refused(command, name, value), may_diverge=True)


NAMES = ["--", "--=", "-x", "--x=1", "--é=1", "--\udcff=1", "--seed", "--Seed=1", "--seed =1",
         "--dropuot=0", "seed=1", "", "config/none.py", "\udcff.py", "corpus", "~", "a\nb", "[",
         "--__doc__=x", "--configure=1", "--rules=1", f"--{'x' * 5000}=1", "x" * 5000]
CONFIGS = ["raise GeneratorExit", "raise KeyboardInterrupt", "raise SystemExit", "exit(0)", "1/0",
           "raise BaseException('x')", "class E(BaseException): pass\nraise E", "import train",
           "import sample", "from bench import *", "def f(): f()\nf()", "x = (", "seed = ",
           "del seed", "unknown = 1", "import nosuchmodule", "raise OSError(28, 'a\\nb')",
           "raise StopIteration", "raise MemoryError", "raise BrokenPipeError", "open('none')",
           "raise ModuleNotFoundError('x')", "raise RuntimeError('allocate')", "x" * 5000,
           "raise ValueError('\\udcff')", "seed = 1\0", "\udcff", "seed = seed +", "[" * 5000,
           "import asyncio; raise asyncio.CancelledError",
           "import configurator; configurator.configure({})"]


def config_file(rng: random.Random, template: Path) -> Case:
    """An argument that is no setting, or a config file that fails."""
    command, text = rng.choice(list(COMMANDS)), rng.choice(CONFIGS * 2 + NAMES)
    if text in NAMES:
        return Case(f"{command} {text:.30}", [*COMMANDS[command], text], ["setting", "config file"],
                    harmful=True)
    return Case(f"{command}: config file {text:.50}", [*COMMANDS[command], "conf.py"], ["conf.py"],
                lambda folder: (folder / "conf.py").write_bytes(os.fsencode(text)), True)


# ----------------------------------------------------------------------------------------- files

# Commands, and the files that they read, that they may read, and that they write.
DATA = ["data/train.bin", "data/val.bin", "data/meta.pkl"]
TRAINED = "train --dataset={folder}/trained --sample_every=1"
EXPORT = "sample --checkpoint=ckpt.pt --export=exported"
READ = {"train": DATA, "resume": ["out/ckpt.pt", *DATA], "bench": DATA[::2],
        TRAINED: ["trained/tokenizer.json"], EXPORT: ["out/ckpt.pt"], "sample": ["out/best.pt"],
        "train --init_from=out/ckpt.pt": ["out/ckpt.pt"],
        "finetune": ["gpt/config.json", "gpt/model.safetensors", "bpe/train.bin"],
        "sample --start=FILE:prompt.txt": ["prompt.txt"],
        "characters": ["repo/data/shakespeare_char/input.txt"], "train conf.py": ["conf.py"],
        "documents --input=corpus/a.jsonl": ["corpus/a.jsonl"],
        **{f"text --input=more/{name}": [f"more/{name}"]
           for name in ("b.jsonl", "b.jsonl.gz", "c.txt", "d.parquet")}}
OPTIONAL = {"train": ["data/dataset.json"], "text": ["more/b.jsonl", "more/c.txt"],
            "resume": ["out/metrics.jsonl", "out/best.pt", "out/lock", "out/lock.owner"]}
WRITTEN = {"train": ["out", "out/lock", "out/metrics.jsonl", "out/previous-1"],
           "train --out_dir=new": ["new"], "train --tensorboard_log=True": ["out/tensorboard"],
           "resume --tensorboard_log=True": ["out/tensorboard"],
           EXPORT: ["exported", "exported/config.json", "exported/model.safetensors"],
           "plan": ["plan.json"], "bench --mode=train --profile=True": ["bench_trace"],
           "characters": [f"repo/data/shakespeare_char/{name}" for name in (
               "train.bin", "val.bin", "meta.pkl", "dataset.json", "tokenizer.json")],
           "documents": ["documents", "documents/train.bin", "documents/meta.pkl"],
           "text": ["repo/data/mine", "repo/data/mine/val.bin", "repo/data/mine/tokenizer.json"]}
CONTENTS = ["empty", "cut", "random bytes", "of another kind", "with a flipped bit"]
KINDS = ["missing", "a folder", "unreadable", "a symlink to itself", "a symlink to nothing",
         "a FIFO", "a device"]


def damage(path: Path, kind: str, rng: random.Random) -> None:
    """Make a file, which may not exist, what `kind` says."""
    content = path.is_file() and path.read_bytes() or b"x" * 100
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    position = rng.randrange(len(content))
    flipped = bytearray(content)
    flipped[position] ^= 1 << rng.randrange(8)
    other = rng.choice([b"{}", b"PK\3\4", b"[[1]]", b"text", b"\x80\4N.", b"null", b"\xff\xfe"])
    target = {"a symlink to itself": path.name, "a symlink to nothing": "none/none",
              "a device": "/dev/full"}.get(kind)
    if target:
        path.symlink_to(target)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a FIFO":
        os.mkfifo(path)
    elif kind != "missing":
        path.write_bytes({"empty": b"", "cut": content[:position], "random bytes":
                          rng.randbytes(300), "of another kind": other,
                          "with a flipped bit": flipped}.get(kind, content))
        path.chmod(0 if kind == "unreadable" else 0o644)


def file(rng: random.Random, template: Path) -> Case:
    """A file that is read or written is damaged, or no plain file."""
    table = rng.choice([READ, READ, OPTIONAL, WRITTEN])
    command = rng.choice(list(table))
    name, kind = rng.choice(table[command]), rng.choice(KINDS + CONTENTS * (table != WRITTEN))
    seed = rng.random()
    path = Path(name)
    harmful = table == READ and (kind in KINDS if kind != "missing" else path.name != "meta.pkl")
    return Case(f"{command}: {name} is {kind}", arguments(command),
                [path.name, *([str(path.parent)] if table == WRITTEN else [])],
                lambda folder: damage(folder / name, kind, random.Random(seed)), harmful,
                kind == "unreadable")


# ------------------------------------------------------------------------------ values in a file

PLAIN = ["None", "True", "-1", "0", "0.5", "2**70", "10**4000", "1e305", "math.nan", "-math.inf",
         "''", "'x'", "[]", "{}", "[[]]", "{'a': 1}", "b'x'", "(1,)", "1j", "10**5000",
         "torch.ones(())", "torch.ones(2, 2)"]
N_JSON = PLAIN.index("b'x'")  # of them JSON has
HARMLESS = {  # these may fit, or be as good as others
    "float64": lambda t: t.double(), "negative": lambda t: -t.abs() - 1,
    "1e38": lambda t: t * 0 + 1e38, "bool": lambda t: t > 0, "int8": lambda t: t.to(torch.int8)}
TENSORS: dict[str, Callable[[torch.Tensor], object]] = HARMLESS | {
    "complex": lambda t: t + 0j, "sparse": lambda t: t.to_sparse(), "meta": lambda t: t.to("meta"),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "float8": lambda t: t.to(torch.float8_e4m3fn), "of one row": lambda t: t[None],
    "nested": lambda t: torch.nested.nested_tensor([t]), "nan": lambda t: t * math.nan,
    "infinite": lambda t: t + math.inf, "empty": lambda t: t.flatten()[:0],
    "of 10**9 rows": lambda t: torch.zeros(1, 1).expand(10**9, 1), "a list": lambda t: t.tolist()}


def value(rng: random.Random, template: Path) -> Case:
    """A value in a checkpoint, or in another file of nested values, is missing or another."""
    command, name = rng.choice([
        *[("resume", "out/ckpt.pt")] * 6, *[("sample", "out/best.pt"), (EXPORT, "out/ckpt.pt")] * 2,
        ("train --init_from=out/ckpt.pt", "out/ckpt.pt"), ("train", "data/meta.pkl"),
        ("finetune", "gpt/config.json"), (TRAINED, "trained/tokenizer.json"),
        ("train", "data/dataset.json")])
    content, keys, what = edited(template / name, rng)
    tensor_harms = what in TENSORS.keys() - HARMLESS.keys()
    harmful = (keys[0] == "model" and tensor_harms) or (command == "resume" and (
        keys[0] == "optimizer" and tensor_harms or keys[0] in ("iter_num", "history")
        and what not in ("0", "missing") and len(keys) == 1))

    def change(folder: Path) -> None:
        (folder / name).write_bytes(content)
        if name == "out/ckpt.pt":
            (folder / "out/best.pt").unlink()

    return Case(f"{command}: in {name}, {'/'.join(map(str, keys))} is {what}", arguments(command),
                [Path(name).name, "gpt holds", *(keys[1:2] if keys[0] == "config" else [])], change,
                harmful, may_diverge=True)


def edited(path: Path, rng: random.Random) -> tuple[bytes, list, str]:
    """Change one value in a file. Returns the new content, the keys of the value, and what it is
    now, in words."""
    if path.suffix == ".pt":
        contents = torch.load(path, weights_only=True)
    else:
        contents = (pickle if path.suffix == ".pkl" else json).loads(path.read_bytes())
    parent, keys = contents, []
    while True:
        keys.append(rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent))))
        old = parent[keys[-1]]
        if not isinstance(old, dict | list) or not old or rng.random() < 0.15:
            break
        parent = old
    if isinstance(old, torch.Tensor) and old.dim() and rng.random() < 0.8:
        what = rng.choice(list(TENSORS))
        with warnings.catch_warnings(action="ignore"):
            parent[keys[-1]] = TENSORS[what](old)
    elif rng.random() < 0.2:
        what = "missing"
        del parent[keys[-1]]
    else:
        what = rng.choice(PLAIN[:N_JSON] if path.suffix == ".json" else PLAIN)
        parent[keys[-1]] = eval(what)
    file = io.BytesIO()
    if path.suffix == ".json":
        file.write(json.dumps(contents).encode())
    else:
        (torch.save if path.suffix == ".pt" else pickle.dump)(contents, file)
    return file.getvalue(), keys, what


# ------------------------------------------------------------------------------ running the cases

def make_case(seed: int, number: int, template: Path) -> Case:
    rng = random.Random(f"{seed} {number}")
    return rng.choice([setting] * 4 + [config_file] * 2 + [file] * 4 + [value] * 4)(rng, template)


def fault(case: Case, status: int, error: str, touched: set[Path]) -> str | None:
    """What is wrong with how a case ended; None if nothing is."""
    # sample.py prints its settings and its device to stderr, as the text alone goes to stdout.
    error = re.sub(r"^(settings|running on|restored).*\n", "", error, flags=re.MULTILINE)
    if status == -14:
        return f"more than {SECONDS} s"
    if "Traceback" in error:
        return "a traceback"
    if status == 0:
        return "accepted" if case.harmful else None
    if status != 2 and not (status == 1 and case.may_diverge):
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
    cache, template, folder = (Path(temporary.name) / name for name in ("cache", "template", "1"))
    cache.mkdir()
    go_offline(cache)
    write_template(template)
    numbers = range(n_cases) if replayed is None else [replayed]
    faults = []
    for number in tqdm(numbers):
        case = make_case(seed, number, template)
        if case.unprivileged and not CAN_DROP:
            continue
        found, done = run_case(case, template, folder)
        if replayed is not None:
            print(case.what, shlex.join(map(str, case.args)), f"status {done.returncode}",
                  done.stdout, done.stderr, sep="\n")
        if found:
            faults.append((found, f"python tests/fuzz.py --seed={seed} --case={number}\n"
                           f"    {case.what!r:.200}\n"
                           f"    {done.stderr.strip().rpartition(chr(10))[2]!r:.300}"))
    for found, text in sorted(faults):
        print(f"{found}: {text}")
    print(f"{len(numbers)} cases, {len(faults)} faults {dict(Counter(f for f, _ in faults))}")
    sys.exit(bool(faults))
