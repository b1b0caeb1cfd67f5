"""Is anything lost when training is killed again and again? Prints figures; exits 1 if so.

    python tests/torture.py                      # 100 kills: some minutes on two cores
    python tests/torture.py --kills=8 --seed=1

docs/what_survives.md says what it does.
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

from conftest import ROOT, TINY, differences
from tqdm import tqdm

from configurator import UserError
from data.encode import write_text_dataset
from data.tokenizer import CharTokenizer
from engine import checkpoint

parser = argparse.ArgumentParser()
parser.add_argument("--kills", type=int, default=100)
parser.add_argument("--seed", type=int, default=0, help="of the instants")
kills, seed = vars(parser.parse_args()).values()

KEEP_EVERY = 50  # steps between numbered checkpoints
# A model of 0.8M parameters, whose checkpoint of 10 MB takes as long to write as a few steps; and
# more steps than the processes that are killed can do.
SETTINGS = [*TINY, "--n_layer=4", "--n_embd=128", "--batch_size=2", "--dropout=0.1",
            "--learning_rate=1e-4", "--min_lr=1e-5", f"--lr_decay_iters={20 + 20 * kills}",
            f"--max_iters={100 + 40 * kills}", "--eval_interval=10", f"--keep_every={KEEP_EVERY}",
            "--init_from=auto"]

rng = random.Random(seed)
temporary = tempfile.TemporaryDirectory(prefix="torture-")
dataset, killed, whole = (Path(temporary.name) / name for name in ("dataset", "killed", "whole"))
text = (ROOT / "model.py").read_text(encoding="utf-8")
write_text_dataset(dataset, text, CharTokenizer.meta_of(text))


def start(out_dir: Path, *args: str) -> subprocess.Popen:
    """Start train.py, which starts or resumes the run in a folder."""
    return subprocess.Popen(
        [sys.executable, ROOT / "train.py", *SETTINGS, f"--dataset={dataset}",
         f"--out_dir={out_dir}", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"})


def wait(process: subprocess.Popen, status: int) -> None:
    """Wait for a process to end, with the status that is expected."""
    _, error = process.communicate()
    if process.returncode != status:
        sys.exit(f"train.py ended with status {process.returncode}, not {status}: {error}")


def wait_for_steps(process: subprocess.Popen, n_steps: int) -> None:
    """Wait until a process has made this many steps."""
    for line in process.stdout:
        n_steps -= "% iter " in line
        if n_steps == 0:
            return


def is_writing() -> bool:
    return any(killed.glob("*.pt.*.tmp"))


def kill(process: subprocess.Popen, kind: str) -> None:
    """Kill a process at a random instant: in a write, after some steps, or in its start-up."""
    if kind == "start-up":
        time.sleep(rng.uniform(0, startup_s))
    else:
        wait_for_steps(process, rng.randint(1, 25))
        while kind == "write" and not is_writing() and process.poll() is None:
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.03))  # about a step, and about a write
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
with start(Path(temporary.name) / "first") as process:
    wait_for_steps(process, 1)
    startup_s = time.perf_counter() - began
    process.kill()

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
    wait(start(folder, f"--max_iters={max_iters}"), status=0)
differing = differences(killed, whole) + [path.name for path in killed.glob("*.tmp")]

for place in differing[:20]:
    print("differs:", place)
print(f"{max_iters:,} steps; {len(saved_steps(whole))} checkpoints and metrics.jsonl compared")
print(f"kills: {kills}")
print(f"kills inside a write: {inside}")
print(f"checkpoints lost: {lost}")
print(f"differences: {len(differing)}")
sys.exit(bool(lost or differing))
