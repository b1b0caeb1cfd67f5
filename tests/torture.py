"""Is anything lost when a process is killed again and again? Prints figures; exits 1 if so.

    python tests/torture.py                     # 100 kills of a run: some minutes on two cores
    python tests/torture.py --what=modern       # a run with Muon and all departures from GPT-2
    python tests/torture.py --what=torchrun     # the same by two processes: all killed, or one
    python tests/torture.py --what=sharded      # the same with --shard=True
    python tests/torture.py --what=prepare      # data/text/prepare.py: all processes, or a worker
    python tests/torture.py --kills=8 --seed=1

docs/what_survives.md says what it does.
"""

import argparse
import glob
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from conftest import MODERN, ROOT, TINY, differences
from tqdm import tqdm

from configurator import UserError
from data.encode import write_text_dataset
from data.tokenizer import CharTokenizer
from engine import checkpoint

parser = argparse.ArgumentParser()
parser.add_argument("--what", choices=["classic", "modern", "torchrun", "sharded", "prepare"],
                    default="classic")
parser.add_argument("--kills", type=int, default=100)
parser.add_argument("--seed", type=int, default=0, help="of the instants")
what, kills, seed = vars(parser.parse_args()).values()

KEEP_EVERY = 50  # steps between numbered checkpoints
# A model whose checkpoint of 10 MB takes as long to write as a few steps; more steps than are done.
SETTINGS = [*TINY, "--n_layer=4", "--n_embd=128", "--batch_size=2", "--dropout=0.1",
            "--learning_rate=1e-4", "--min_lr=1e-5", f"--lr_decay_iters={20 + 20 * kills}",
            f"--max_iters={100 + 200 * kills}", "--eval_interval=10", f"--keep_every={KEEP_EVERY}",
            "--init_from=auto"]
if what != "classic":
    SETTINGS += ["--optimizer=muon", "--muon_lr=1e-3", "--embedding_lr=3e-4", "--head_lr=1e-4",
                 "--schedule=linear", *(f"--{name}={value}" for name, value in MODERN.items())]
SETTINGS += ["--shard=True"] if what == "sharded" else []
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            "--max-restarts=1000000"] if what in ("torchrun", "sharded") else []

rng = random.Random(seed)
temporary = tempfile.TemporaryDirectory(prefix="torture-")
base = Path(temporary.name)
text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("model.py", "train.py"))


# ------------------------------------------------------------------------------------- processes

def start(*args: str | Path) -> subprocess.Popen:
    """Start `python args`; its stderr goes to a file."""
    with open(base / "stderr", "w") as stderr:
        return subprocess.Popen([sys.executable, *map(str, args)], stdout=subprocess.PIPE,
                                stderr=stderr, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def wait(process: subprocess.Popen, *statuses: int) -> None:
    """Wait for a process to end, with a status that is expected."""
    process.communicate(timeout=300)  # else it hangs
    if process.returncode not in statuses:
        sys.exit(f"{process.args} ended with status {process.returncode}, not {statuses}: "
                 + (base / "stderr").read_text())


def workers(process: subprocess.Popen) -> list[int]:
    """The worker processes of a process, by their ids."""
    found = []
    with suppress(OSError):  # one has ended
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            command = Path(f"/proc/{pid}/cmdline").read_text()
            if "spawn_main" in command or "train.py" in command:
                found.append(int(pid))
    return found


def kill(process: subprocess.Popen, victims: list[int]) -> None:
    """Kill one of a process's workers, or if there is none the process with all of them."""
    if not victims:
        process.send_signal(signal.SIGSTOP)  # it must not start others
    for pid in [rng.choice(victims)] if victims else [*workers(process), process.pid]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if what == "prepare":
        wait(process, -signal.SIGKILL, 0, 2)  # 0: it was done before; 2: by the error of a worker
    elif not victims:  # else torchrun restarts the other process with a new one
        wait(process, -signal.SIGKILL)


# ----------------------------------------------------------------------------------------- tasks

class Training:
    """train.py, started again and again in one folder."""

    startup_s = 4.0
    write_s = 0.03  # about as long as a step or a write takes

    def __init__(self):
        write_text_dataset(base / "dataset", text, CharTokenizer.meta_of(text))
        self.saved = {}

    def start(self, out_dir: str = "killed", *args: str) -> subprocess.Popen:
        return start(*LAUNCHER, ROOT / "train.py", *SETTINGS, f"--dataset={base / 'dataset'}",
                     f"--out_dir={base / out_dir}", *args)

    def wait_for_work(self, process: subprocess.Popen) -> None:
        n_steps = rng.randint(1, 25)
        for line in process.stdout:
            n_steps -= "% iter " in line
            if n_steps == 0:
                return

    def is_writing(self) -> bool:
        return any((base / "killed").glob("*.pt.*.tmp"))

    def count_lost(self) -> int:
        """The checkpoints that cannot be read, or have fewer steps than after the last kill."""
        before, self.saved = self.saved, {}
        for path in (base / "killed").glob("*.pt"):
            try:
                self.saved[path.name] = checkpoint.load(path)["iter_num"]
            except UserError as error:
                tqdm.write(str(error))
        return sum(self.saved.get(name, -1) < before.get(name, 0) for name in before | self.saved)

    def compare(self) -> list[str]:
        """Where the run differs from an uninterrupted one, when both have ended."""
        max_iters = (max(self.saved.values(), default=0) // KEEP_EVERY + 1) * KEEP_EVERY
        for out_dir in ("killed", "whole"):
            wait(self.start(out_dir, f"--max_iters={max_iters}"), 0)
        print(f"{max_iters:,} steps; {len(self.saved)} checkpoints and metrics.jsonl compared")
        return (differences(base / "killed", base / "whole")
                + [path.name for path in (base / "killed").glob("*.tmp")])


class Preparing:
    """data/text/prepare.py, started again and again by turns with two texts and tokenizers."""

    startup_s = 1.0
    write_s = 0.0005  # about as long as it takes to rename the files

    def __init__(self):
        for path in ("configurator.py", *glob.glob("data/*.py", root_dir=ROOT),
                     "data/text/prepare.py"):  # which writes to the folder beside its own
            (base / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, base / path)
        self.folder, self.n_starts, self.refused = base / "data/mine", 0, 0
        self.expected = {}
        for name, part in (("char", text), ("bpe:300", text[::-1])):
            (base / f"{name}.txt").write_text(part * (1 + 1_200_000 // len(part)))
            wait(self.start(name), 0)
            self.expected[name] = self.contents()

    def start(self, name: str = "") -> subprocess.Popen:
        """Start a preparation; every fifth time, there is no earlier dataset."""
        self.n_starts += 1
        if self.n_starts % 5 == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.name = name or ("char", "bpe:300")[self.n_starts % 2]
        self.before, self.most = self.contents(), 0
        return start(base / "data/text/prepare.py", f"--input={base / self.name}.txt",
                     "--name=mine", f"--tokenizer={self.name}", "--num_proc=2")

    def contents(self) -> dict[str, bytes]:
        """The files of the dataset, without temporary ones and the lock."""
        return {path.name: path.read_bytes() for path in self.folder.glob("*")
                if path.suffix != ".tmp" and path.name != "lock"}

    def temporary_files(self) -> list[str]:
        names = os.listdir(self.folder) if self.folder.exists() else []
        return [name for name in names if name.endswith(".tmp")]

    def wait_for_work(self, process: subprocess.Popen) -> None:
        while not self.temporary_files() and process.poll() is None:
            time.sleep(0.001)

    def is_writing(self) -> bool:
        """Whether some files, but not all, have got their names."""
        n_files = len(self.temporary_files())
        self.most = max(self.most, n_files)
        return n_files < self.most

    def count_lost(self) -> int:
        """1 unless the dataset is the earlier one, the new one, or refused by train.py."""
        if self.contents() in (self.before, self.expected[self.name]):
            return 0
        refused = start(ROOT / "train.py", *TINY, "--eval_only=True",
                        f"--dataset={self.folder}").wait() == 2
        self.refused += refused
        return not refused

    def compare(self) -> list[str]:
        """The files that are not those of a preparation that ends."""
        wait(self.start(), 0)
        print(f"datasets of which only some files were new, refused by train.py: {self.refused}")
        found, expected = self.contents(), self.expected[self.name]
        return self.temporary_files() + [name for name in found.keys() | expected.keys()
                                         if found.get(name) != expected.get(name)]


# ------------------------------------------------------------------------------------------ kills

task = Preparing() if what == "prepare" else Training()
inside, lost, process = 0, 0, None
for i in tqdm(range(kills), unit="kill"):
    if process is None or process.poll() is not None:
        process = task.start()
    kind = "write" if inside <= i / 3 else rng.choice(["work", "start-up"])  # some miss the write
    if kind == "start-up":
        time.sleep(rng.uniform(0, task.startup_s))
    else:
        task.wait_for_work(process)
        while kind == "write" and not task.is_writing() and process.poll() is None:
            time.sleep(task.write_s / 50)
        time.sleep(rng.uniform(0, task.write_s))
    kill(process, workers(process) if rng.random() < 0.5 else [])
    inside += kind != "start-up" and task.is_writing()  # else an earlier kill may have left it
    lost += task.count_lost()
if process.poll() is None:  # torchrun has restarted its workers
    kill(process, [])
    lost += task.count_lost()
differing = task.compare()

for place in differing[:20]:
    print("differs:", place)
print(f"kills: {kills}")
print(f"kills inside a write: {inside}")
print(f"lost: {lost}")
print(f"differences: {len(differing)}")
sys.exit(bool(lost or differing))
