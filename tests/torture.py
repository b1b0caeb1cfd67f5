"""Is anything lost when training is killed, again and again? Prints figures; exits 1 if so.

    python tests/torture.py                      # 100 kills: some minutes on two cores
    python tests/torture.py --kills=8 --seed=1

Kills a process of train.py with SIGKILL and starts it again with --init_from=auto, over and over:
a third of the kills strike inside the write of a checkpoint, the others after a random number of
steps or during start-up. After each of them every checkpoint has to be whole and to hold no fewer
steps than before. At last the run goes on to its end, and what it left is compared with what
a run of the same settings left that nobody disturbed.
"""

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import checkpoint  # noqa: E402
from configurator import UserError  # noqa: E402
from data.bins import write_text_dataset  # noqa: E402
from data.tokenizer import CharTokenizer  # noqa: E402

parser = argparse.ArgumentParser()
parser.add_argument("--kills", type=int, default=100)
parser.add_argument("--seed", type=int, default=0, help="of the instants")
kills, seed = vars(parser.parse_args()).values()

MOST_STEPS = 25  # of a life that is killed after some steps
KEEP_EVERY = 50  # steps between numbered checkpoints
# A model of 0.8M parameters, whose checkpoint of 10 MB takes as long to write as a few steps.
SETTINGS = {
    "n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 16, "batch_size": 2,
    "gradient_accumulation_steps": 2, "dropout": 0.1, "learning_rate": 1e-4, "warmup_iters": 10,
    "lr_decay_iters": 20 + 20 * kills, "min_lr": 1e-5, "eval_interval": 10, "eval_iters": 2,
    "keep_every": KEEP_EVERY, "device": "cpu", "dtype": "float32", "init_from": "auto",
    "max_iters": 100 + 40 * kills}  # more than the lives that are killed can do
TIMES = {"tokens_per_s", "data_ms", "forward_ms", "backward_ms", "optimizer_ms", "seconds"}

rng = random.Random(seed)
temporary = tempfile.TemporaryDirectory(prefix="torture-")
dataset, tortured, undisturbed = (Path(temporary.name) / name
                                  for name in ("dataset", "tortured", "undisturbed"))
text = (ROOT / "model.py").read_text(encoding="utf-8")
meta = CharTokenizer.meta_of(text)
write_text_dataset(dataset, text, CharTokenizer(meta), meta)


def start(out_dir: Path, **settings: object) -> subprocess.Popen:
    """A process of train.py that starts the run in a folder, or goes on with it."""
    values = SETTINGS | {"dataset": dataset, "out_dir": out_dir} | settings
    return subprocess.Popen(
        [sys.executable, ROOT / "train.py", *(f"--{name}={v}" for name, v in values.items())],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"})


def end(process: subprocess.Popen, status: int) -> None:
    """See a process to its end, which must be the one expected."""
    _, error = process.communicate()
    if process.returncode != status:
        sys.exit(f"train.py ended with status {process.returncode}, not {status}: {error}")


def wait_for_steps(process: subprocess.Popen, n_steps: int) -> None:
    """Until a life has done so many steps."""
    for line in process.stdout:
        n_steps -= line.startswith("iter ")
        if n_steps == 0:
            return


def half_written() -> bool:
    return any(tortured.glob("*.pt.tmp"))


def wait_for_write(process: subprocess.Popen, under_way: bool) -> float:
    """Until a checkpoint is being written, or no longer; when that was."""
    while half_written() != under_way and process.poll() is None:
        time.sleep(0.0005)
    return time.perf_counter()


def strike(process: subprocess.Popen, kind: str) -> None:
    """Let a life go on to a random instant of a kind, and kill it there."""
    if kind == "start-up":
        time.sleep(rng.uniform(0, startup_s))
    elif kind == "steps":
        wait_for_steps(process, rng.randint(1, MOST_STEPS))
        time.sleep(rng.uniform(0, 0.03))  # about a step
    else:
        wait_for_steps(process, 1)  # by then, what an earlier kill left half-written is gone
        for _ in range(rng.randint(1, 3)):
            began = wait_for_write(process, under_way=True)
            write_s = wait_for_write(process, under_way=False) - began
        wait_for_write(process, under_way=True)
        time.sleep(rng.uniform(0, write_s))
    process.kill()
    end(process, status=-signal.SIGKILL)


def steps_held(folder: Path) -> dict[str, int]:
    """The steps done in each checkpoint of a folder; -1 in one that does not load."""
    held = {}
    for path in folder.glob("*.pt"):
        try:
            held[path.name] = checkpoint.load(path)["iter_num"]
        except UserError as error:
            held[path.name] = -1
            tqdm.write(str(error))
    return held


def state(path: Path) -> np.ndarray:
    """The weights and the optimizer's state in a checkpoint, as bytes in a row."""
    contents = checkpoint.load(path)
    moments = (value for s in contents["optimizer"]["state"].values() for value in s.values())
    return torch.cat([tensor.contiguous().view(-1).view(torch.uint8)
                      for tensor in (*contents["model"].values(), *moments)]).numpy()


def story(folder: Path) -> list[dict]:
    """All that a run recorded in metrics.jsonl and ckpt.pt, but for the times it took."""
    contents = checkpoint.load(folder / checkpoint.NEWEST)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [*map(json.loads, lines), *contents["history"],
               *contents["optimizer"]["param_groups"],
               {name: contents[name] for name in ("iter_num", "best_val_loss")}]
    return [{key: r[key] for key in r.keys() - TIMES} for r in records]


# ------------------------------------------------------------------------------------------- kills

began = time.perf_counter()
process = start(Path(temporary.name) / "first")
wait_for_steps(process, 1)
startup_s = time.perf_counter() - began
process.kill()
end(process, status=-signal.SIGKILL)

inside, lost, held = 0, 0, {}
for i in tqdm(range(kills), unit="kill"):
    kind = "write" if inside <= i / 3 else rng.choice(["steps", "start-up"])  # some miss the write
    strike(start(tortured), kind)
    inside += kind != "start-up" and half_written()  # else an earlier kill may have left it
    before, held = held, steps_held(tortured)
    lost += sum(held.get(name, -1) < before.get(name, 0) for name in before | held)

# ---------------------------------------------------------------------------------- the runs' ends

max_iters = (max(held.values(), default=0) // KEEP_EVERY + 1) * KEEP_EVERY
for folder in (tortured, undisturbed):
    end(start(folder, max_iters=max_iters), status=0)

files = [{path.name for path in folder.glob("*.pt*")} for folder in (tortured, undisturbed)]
ours, reference = ([state(folder / name) for name in sorted(files[0] & files[1])]
                   for folder in (tortured, undisturbed))
differing_bits = sum(int(np.unpackbits(a ^ b).sum()) for a, b in zip(ours, reference, strict=True))
differing_records = sum(a != b for a, b in itertools.zip_longest(
    story(tortured), story(undisturbed)))

# ----------------------------------------------------------------------------------------- figures

print(f"{max_iters:,} steps; {len(ours)} checkpoints of {len(ours[0]) / 1e6:.1f} MB compared")
print(f"kills: {kills}")
print(f"kills inside a write: {inside}")
print(f"checkpoints lost: {lost}")
print(f"differing bits: {differing_bits}")
print(f"differing records: {differing_records}")
print(f"differing files: {len(files[0] ^ files[1])}")
sys.exit(bool(lost or differing_bits or differing_records or files[0] ^ files[1]))
