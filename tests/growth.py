"""Does a run scale to more hosts as the plan says? Prints a table; exits 1 if losses differ.

    python tests/growth.py                  # 1, 2, 4 and 8 hosts: some minutes on two cores
    python tests/growth.py --hosts=2 --steps=4
    python tests/growth.py --kill_every=20 --steps=200   # seconds between kills
    MALLOC_MMAP_THRESHOLD_=200000 torchrun --standalone --nproc_per_node=2 tests/growth.py --memory

Each host is a network namespace with one process, on a virtual switch of this machine: that needs
Linux, root and the command `ip`. With --kill_every, a process of each sharded run is killed now
and then, and torchrun restarts it; exits 1 if the run ends with other bits than an undisturbed one.
The last prints the peak memory of a process in sharded training and what the plan predicts; the
variable makes the C library return freed memory at once.
docs/growing.md has the results.
"""

import argparse
import gc
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

import torch
from conftest import MODERN, ROOT, TINY, differences, records

from configurator import print0
from data.encode import write_text_dataset
from data.tokenizer import CharTokenizer
from engine import runtime, sharding
from engine.plan import bytes_per_step, memory_by_part, peak
from model import GPT, GPTConfig

parser = argparse.ArgumentParser()
parser.add_argument("--hosts", default="1,2,4,8")
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--kill_every", type=float, default=0)
parser.add_argument("--memory", action="store_true")
arguments = parser.parse_args()
text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("model.py", "train.py"))
meta = CharTokenizer.meta_of(text)
SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 32}
SETTINGS = [*TINY, "--gradient_accumulation_steps=8", "--eval_interval=0", "--log_interval=1",
            *(f"--{name}={value}" for name, value in (SHAPE | MODERN | {"bigram": False}).items())]


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True)


@contextmanager
def network(n: int) -> Iterator[list[str]]:
    """The names of n namespaces with the addresses 10.0.0.1 to 10.0.0.n on one switch."""
    names = [f"plaingpt-{os.getpid()}-{i}" for i in range(n)]
    switch = f"plain{os.getpid()}"[:15]
    try:
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "switch", "type", "bridge")
        ip("-n", switch, "link", "set", "switch", "up")
        for i, name in enumerate(names):
            ip("netns", "add", name)
            ip("link", "add", "cable", "netns", name, "type", "veth", "peer", f"port{i}", "netns",
               switch)
            ip("-n", switch, "link", "set", f"port{i}", "master", "switch", "up")
            ip("-n", name, "addr", "add", f"10.0.0.{i + 1}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in [*names, switch]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def sent_bytes(name: str) -> int:
    """What a namespace has sent over its cable."""
    lines = subprocess.run(["ip", "netns", "exec", name, "cat", "/proc/net/dev"], check=True,
                           capture_output=True, text=True).stdout
    return int(re.search(r"cable: *(?:\d+ +){8}(\d+)", lines)[1])


def train(n: int, shard: bool, steps: int, folder: Path) -> tuple[list[float], float, float]:
    """Losses, milliseconds of a step, and bytes that the busiest host sent in all."""
    out_dir = folder / f"{n}-{shard}-{steps}"
    with network(n) as names:
        processes = [subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, ROOT / "train.py", *SETTINGS,
             f"--shard={shard}", f"--max_iters={steps}", f"--dataset={folder / 'dataset'}",
             f"--out_dir={out_dir}"], stdout=subprocess.DEVNULL,
            env=os.environ | {"RANK": str(i), "WORLD_SIZE": str(n), "LOCAL_RANK": "0",
                              "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500",
                              "GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"})
                     for i, name in enumerate(names)]
        statuses = [process.wait() for process in processes]
        if any(statuses):
            sys.exit(f"{n} hosts, shard={shard}: a process failed")
        sent = max(sent_bytes(name) for name in names)
    logged = records(out_dir, "loss")
    ms = median(sum(v for k, v in r.items() if k.endswith("_ms")) for r in logged[1:])
    return [r["loss"] for r in logged], ms, sent


def train_under_torchrun(n: int, steps: int, folder: Path, kill_every: float) -> tuple[Path, int]:
    """A sharded run of which a random process is killed every kill_every seconds (0: never).

    Returns its folder, and the number of kills.
    """
    out_dir, n_kills = folder / f"{n}-{kill_every}", 0
    with network(n) as names:
        jobs = [subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run",
             f"--nnodes={n}", "--nproc_per_node=1", "--max-restarts=1000", "--rdzv-backend=c10d",
             "--rdzv-endpoint=10.0.0.1:29500", f"--local-addr=10.0.0.{i + 1}",
             f"--rdzv-conf=is_host={i == 0}", ROOT / "train.py", *SETTINGS, "--shard=True",
             "--eval_iters=1", "--eval_interval=5", "--init_from=auto", f"--max_iters={steps}",
             f"--dataset={folder / 'dataset'}", f"--out_dir={out_dir}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=os.environ | {"GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"})
                for i, name in enumerate(names)]
        while any(job.poll() is None for job in jobs):
            time.sleep(kill_every or 1)
            pids = subprocess.run(["ip", "netns", "pids", random.choice(names)],
                                  capture_output=True, text=True).stdout.split()
            for pid in pids if kill_every else []:
                with suppress(OSError):  # it has ended
                    if "distributed.run" not in Path(f"/proc/{pid}/cmdline").read_text():
                        os.kill(int(pid), signal.SIGKILL)
                        n_kills += 1
        if any(job.returncode for job in jobs):
            sys.exit(f"{n} hosts, kill_every={kill_every}: torchrun gave up")
    return out_dir, n_kills


def memory() -> None:
    """Print the peak memory of rank 0 in three steps of a model of 85M parameters."""
    def read(name: str) -> float:
        return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e6

    rt = runtime.start("cpu", "float32", False, 768, 0.0)
    model = GPT(GPTConfig(block_size=256, vocab_size=65, bias=False))
    sharding.shard(model, rt)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95))
    gc.collect()
    n_held = sum(p.to_local().numel() for p in model.parameters())
    without = read("VmRSS") - 4 * n_held / 1e9  # Python, torch and its libraries
    idx = torch.zeros(1, 256, dtype=torch.long)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    for _ in range(3):
        model(idx, idx, loss_only=True)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    predicted = peak(memory_by_part(model, 1, "float32", "adamw", rt.world_size, shard=True), False)
    print0(f"{rt.world_size} processes: peak {read('VmHWM') - without:.2f} GB, predicted "
           f"{predicted / 1e9:.2f}")
    rt.cleanup(0)


if __name__ == "__main__" and arguments.memory:
    memory()
elif __name__ == "__main__":
    model = GPT(GPTConfig(vocab_size=meta["vocab_size"], **SHAPE | MODERN | {"bigram": False}))
    worst = 0.0
    with tempfile.TemporaryDirectory(prefix="growth-") as temporary:
        folder = Path(temporary)
        write_text_dataset(folder / "dataset", text, meta)
        for n in map(int, arguments.hosts.split(",") if arguments.kill_every else []):
            expected, _ = train_under_torchrun(n, arguments.steps, folder, 0)
            killed, kills = train_under_torchrun(n, arguments.steps, folder, arguments.kill_every)
            found = differences(killed, expected)
            print(f"{n} hosts: {kills} kills in {arguments.steps} steps, {len(found)} differences")
            worst += len(found)
        if arguments.kill_every:
            sys.exit(worst > 0)
        print("| hosts | shard | ms a step | MB sent a step | predicted | losses differ by |")
        print("|---|---|---|---|---|---|")
        expected, few = None, max(2, arguments.steps // 3)
        for n in map(int, arguments.hosts.split(",")):
            for shard in (False, True)[:1 if n == 1 else 2]:
                _, _, sent_before = train(n, shard, few, folder)
                losses, ms, sent = train(n, shard, arguments.steps, folder)
                expected = losses if expected is None else expected
                difference = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
                measured = (sent - sent_before) / (arguments.steps - few)
                predicted = bytes_per_step(model, "float32", n, shard, 8 // n)
                print(f"| {n} | {shard} | {ms:.0f} | {measured / 1e6:.2f} | {predicted / 1e6:.2f} "
                      f"| {difference:.1e} |", flush=True)
                worst = max(worst, difference)
    sys.exit(worst > 1e-4)
