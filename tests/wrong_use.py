"""What a wrong use of the scripts starts from: the valid commands, the folder that they run in, and
how one of them is run there."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import transformers
from conftest import ROOT, TINY, forked, snapshot, write_bin

from data.encode import write_text_dataset
from data.tokenizer import CharTokenizer, GPT2Tokenizer, TrainedTokenizer

# Valid commands; {folder} is the case's folder, in which they run.
COMMANDS = {
    "train": [ROOT / "train.py", *TINY, "--max_iters=1", "--dataset={folder}/data",
              "--out_dir=out", "--compile=False"],
    "resume": [ROOT / "train.py", "--init_from=resume", "--max_iters=3", "--out_dir=out",
               "--dataset={folder}/data", "--compile=False"],
    "finetune": [ROOT / "train.py", *TINY[5:], "--max_iters=1", "--block_size=16", "--batch_size=1",
                 "--gradient_accumulation_steps=1", "--dataset={folder}/bpe", "--out_dir=out",
                 "--init_from=gpt", "--compile=False"],
    "sample": [ROOT / "sample.py", "--out_dir=out", "--start=to", "--max_new_tokens=2",
               "--num_samples=1", "--device=cpu", "--dtype=float32"],
    "bench": [ROOT / "bench.py", "--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=16",
              "--batch_size=2", "--rounds=1", "--new_tokens=4", "--device=cpu", "--dtype=float32",
              "--dataset={folder}/data", "--compile=False"],
    "plan": [ROOT / "bench.py", "--mode=plan", "--gpu=H100", "--json=plan.json"],
    "characters": ["repo/data/shakespeare_char/prepare.py", "--url=http://127.0.0.1:9/none"],
    "documents": ["repo/data/openwebtext/prepare.py", "--input=corpus/*", "--out_dir=documents",
                  "--num_proc=1"],
    "text": ["repo/data/text/prepare.py", "--input=more/*", "--name=mine", "--num_proc=1",
             "--tokenizer=bpe:300"],
}


def write_template(folder: Path) -> Path:
    """A folder with all files that the valid commands need. Returns it."""
    text = "to be or not to be that is the question whether " * 20
    write_text_dataset(folder / "data", text, CharTokenizer.meta_of(text))
    write_text_dataset(folder / "trained", text, TrainedTokenizer.train([text], 280))
    write_bin(folder / "bpe/train.bin", GPT2Tokenizer().encode(text))
    write_bin(folder / "bpe/val.bin", GPT2Tokenizer().encode(text))
    (folder / "prompt.txt").write_text("to be")
    (folder / "conf.py").write_text("seed = 1\n")
    shutil.copytree(ROOT / "data", folder / "repo/data", ignore=shutil.ignore_patterns(
        "*.bin", "*.pkl", "*.txt", "__pycache__"))
    shutil.copy(ROOT / "configurator.py", folder / "repo")
    (folder / "repo/data/shakespeare_char/input.txt").write_text(text)
    for name in ("corpus", "more", "tmp"):
        (folder / name).mkdir()
    documents = '{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n'
    (folder / "corpus/a.jsonl").write_text(documents)
    (folder / "more/b.jsonl").write_text(documents)
    (folder / "more/c.txt").write_text(f"four{text}<|endoftext|>five")
    for name, column in (("more/d.parquet", "text"), ("body.parquet", "body")):
        pa.parquet.write_table(pa.table({column: ["six", "seven"]}), folder / name)
    subprocess.run(["gzip", "-k", folder / "more/b.jsonl"], check=True)
    config = transformers.GPT2Config(n_positions=16, n_layer=1, n_head=1, n_embd=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "gpt")
    for command in ("train", "resume --max_iters=2"):  # writes ckpt.pt and best.pt
        done = run(arguments(command), folder)
        assert done.returncode == 0, done.stderr
    return folder


# To be refused the files that others may not read, root drops its privileges.
DROP_PRIVILEGES = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"] * (os.geteuid() == 0)
CAN_DROP = not DROP_PRIVILEGES or bool(
    shutil.which("setpriv") and subprocess.run([*DROP_PRIVILEGES, "true"]).returncode == 0)


def arguments(command: str) -> list[str | Path]:
    """The script and the arguments of a command: a name of COMMANDS, and more arguments."""
    name, *more = shlex.split(command)
    return [*COMMANDS[name], *more]


def run(args: list[str | Path], folder: Path, environment: dict[str, str] | None = None,
        unprivileged: bool = False) -> subprocess.CompletedProcess:
    """Run a script with arguments in a case's folder."""
    script = args[0]
    args = [str(arg).replace("{folder}", str(folder)) for arg in args]
    environment = {"HOME": f"{folder}/tmp", "TMPDIR": f"{folder}/tmp",
                   "TORCHINDUCTOR_CACHE_DIR": f"{folder}-inductor",  # torch creates it at once
                   "PYTHONDONTWRITEBYTECODE": "1"} | (environment or {})
    if (folder / "modules").exists():
        environment["PYTHONPATH"] = f"{folder}/modules"
    if isinstance(script, Path) and not (unprivileged or (folder / "modules").exists()):
        return forked(args, folder, environment)
    args = [*(DROP_PRIVILEGES if unprivileged else []), sys.executable, *args]
    return subprocess.run(args, cwd=folder, env=os.environ | environment, text=True,
                          errors="surrogateescape", capture_output=True, timeout=120,
                          stdin=subprocess.DEVNULL)


def run_in_copy(template: Path, folder: Path, change: Callable[[Path], object],
                args: list[str | Path], *more: object,
                ) -> tuple[subprocess.CompletedProcess, set[Path]]:
    """Run a script in a copy of the template, after a change to it; `more`: further arguments of
    `run`. Returns how it ended, and which files it touched."""
    shutil.copytree(template, folder)
    change(folder)
    before = snapshot(folder)
    done = run(args, folder, *more)
    touched = {path for path, _ in before.items() ^ snapshot(folder).items()}
    (folder / "out").chmod(0o755) if (folder / "out").is_dir() else None
    shutil.rmtree(folder)
    return done, touched
