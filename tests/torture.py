"""Is anything lost when training is killed again and again? Prints figures; exits 1 if so.

    python tests/torture.py                      # 100 kills: some minutes on two cores
    python tests/torture.py --kills=8 --seed=1

Kills train.py with SIGKILL and starts it again with --init_from=auto, over and over: a third of
the kills fall into the write of a checkpoint, the others after a random number of steps or into
the start-up. After each kill, every checkpoint must be readable and hold no fewer steps than
before. In the end the run is resumed to its last step, and its files are compared with those of
an uninterrupted run of the same settings.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import ROOT, differences
from tqdm import tqdm

from configurator import UserError
from data.bins import write_text_dataset
from data.tokenizer import CharTokenizer
from engine import checkpoint

parser = argparse.ArgumentParser()
parser.add_argument("--kills", type=int, default=100)
parser.add_argument("--seed", type=int, default=0, help="of the instants")
kills, seed = vars(parser.parse_args()).values()

MAX_STEPS = 25  # of a process that is killed after some steps
KEEP_EVERY = 50  # steps between numbered checkpoints
# A model of 0.8M parameters, whose checkpoint of 10 MB takes as long to write as a few steps.
SETTINGS = {
    "n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 16, "batch_size": 2,
    "gradient_accumulation_steps": 2, "dropout": 0.1, "learning_rate": 1e-4, "warmup_iters": 10,
    "lr_decay_iters": 20 + 20 * kills, "min_lr": 1e-5, "eval_interval": 10, "eval_iters": 2,
    "keep_every": KEEP_EVERY, "device": "cpu", "dtype": "float32", "init_from": "auto",
    "max_iters": 100 + 40 * kills}  # more than the processes that are killed can do

rng = random.Random(seed)
temporary = tempfile.TemporaryDirectory(prefix="torture-")
dataset, killed, whole = (Path(temporary.name) / name for name in ("dataset", "killed", "whole"))
text = (ROOT / "model.py").read_text(encoding="utf-8")
meta = CharTokenizer.meta_of(text)
write_text_dataset(dataset, text, CharTokenizer(meta), meta)


def start(out_dir: Path, **settings: object) -> subprocess.Popen:
    """Start train.py, which starts or resumes the run in a folder."""
    values = SETTINGS | {"dataset": dataset, "out_dir": out_dir} | settings
    return subprocess.Popen(
        [sys.executable, ROOT / "train.py", *(f"--{name}={v}" for name, v in values.items())],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"})


def wait(process: subprocess.Popen, status: int) -> None:
    """Wait for a process to end, with the status that is expected."""
    _, error = process.communicate()
    if process.returncode != status:
        sys.exit(f"train.py ended with status {process.returncode}, not {status}: {error}")


def wait_for_steps(process: subprocess.Popen, n_steps: int) -> None:
    """Wait until a process has made this many steps."""
    for line in process.stdout:
        n_steps -= line.startswith("iter ")
        if n_steps == 0:
            return


def is_writing() -> bool:
    return any(killed.glob("*.pt.tmp"))


def wait_for_write(process: subprocess.Popen, under_way: bool) -> float:
    """Wait until a checkpoint is being written, or no longer; returns the time."""
    while is_writing() != under_way and process.poll() is None:
        time.sleep(0.0005)
    return time.perf_counter()


def kill(process: subprocess.Popen, kind: str) -> None:
    """Kill a process at a random instant: in a write, after some steps, or in its start-up."""
    if kind == "start-up":
        time.sleep(rng.uniform(0, startup_s))
    elif kind == "steps":
        wait_for_steps(process, rng.randint(1, MAX_STEPS))
        time.sleep(rng.uniform(0, 0.03))  # about a step
    else:
        wait_for_steps(process, 1)  # by then, the temporary file of an earlier kill is deleted
        for _ in range(rng.randint(1, 3)):
            began = wait_for_write(process, under_way=True)
            write_s = wait_for_write(process, under_way=False) - began
        wait_for_write(process, under_way=True)
        time.sleep(rng.uniform(0, write_s))
    process.kill()
    wait(process, status=-signal.SIGKILL)


def saved_steps(folder: Path) -> dict[str, int]:
    """The steps done in each checkpoint of a folder; -1 in one that cannot be read."""
    steps = {}
    for path in folder.glob("*.pt"):
        try:
            steps[path.name] = checkpoint.load(path)["iter_num"]
        except UserError as error:
            steps[path.name] = -1
            tqdm.write(str(error))
    return steps


# ------------------------------------------------------------------------------------------- kills

began = time.perf_counter()
process = start(Path(temporary.name) / "first")
wait_for_steps(process, 1)
startup_s = time.perf_counter() - began
process.kill()
wait(process, status=-signal.SIGKILL)

inside, lost, saved = 0, 0, {}
for i in tqdm(range(kills), unit="kill"):
    kind = "write" if inside <= i / 3 else rng.choice(["steps", "start-up"])  # some miss the write
    kill(start(killed), kind)
    inside += kind != "start-up" and is_writing()  # else an earlier kill may have left it
    before, saved = saved, saved_steps(killed)
    lost += sum(saved.get(name, -1) < before.get(name, 0) for name in before | saved)

# ------------------------------------------------------------------------------------- comparison

max_iters = (max(saved.values(), default=0) // KEEP_EVERY + 1) * KEEP_EVERY
for folder in (killed, whole):
    wait(start(folder, max_iters=max_iters), status=0)
differing = differences(killed, whole) + [path.name for path in killed.glob("*.tmp")]

for place in differing[:20]:
    print("differs:", place)
print(f"{max_iters:,} steps; {len(saved_steps(whole))} checkpoints and metrics.jsonl compared")
print(f"kills: {kills}")
print(f"kills inside a write: {inside}")
print(f"checkpoints lost: {lost}")
print(f"differences: {len(differing)}")
sys.exit(bool(lost or differing))
