"""train.py in many processes, started by torchrun on one machine, and on two made of namespaces.

Stories, of one start or more, go on beside one another. Signals and kills come from inside: a
sitecustomize.py on PYTHONPATH runs the code in $FAULT in every process at every step, so that they
strike the very one they are meant for.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import MODERN, ROOT, TINY, run

TIMES = {"tokens_per_s", "data_ms", "forward_ms", "backward_ms", "optimizer_ms", "seconds"}
# 125 blocks to evaluate make 25 batches, the last cut short; 6 micro-steps suit 1, 2 and 3.
RUN = [*TINY, "--batch_size=5", "--eval_iters=0", "--gradient_accumulation_steps=6",
       "--dropout=0.1", "--max_iters=24", "--lr_decay_iters=24", "--eval_interval=8",
       "--keep_every=8", "--init_from=auto", "--optimizer=muon",
       *(f"--{name}={value}" for name, value in MODERN.items())]
PLAIN = ["--dropout=0", "--gradient_accumulation_steps=4", "--max_iters=20"]
BFLOAT16 = ["--dtype=bfloat16", "--log_interval=3"]
HANG_S = 300  # no start takes that long

SITECUSTOMIZE = """
import os

if "RANK" in os.environ:  # a worker
    import ctypes, signal, sys, time
    import torch
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    rank, life = int(os.environ["RANK"]), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    run = sys.modules["__main__"]
    torchrun = os.getppid()
    init = DistributedDataParallel.__init__
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1  # no worker outlives its torchrun, whatever becomes of the test
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def note(subject, text):
        with open(f"{os.environ['NOTES']}.{subject}.{rank}", "a") as file:
            file.write(f"{text}\\n")

    def signalled(send, to, number):  # and go on only when it is here
        send(to, number)
        while not run.stop_signals.received:
            time.sleep(0.01)

    def strike(module, args, output):
        if (type(module).__name__ == "GPT" and torch.is_grad_enabled()
                and getattr(run, "micro_step", None) == rank):
            exec(os.environ["FAULT"], globals() | {"step": run.iter_num})

    def counted(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if "COUNT" in os.environ:
            self.register_comm_hook(None, count)

    def count(group, bucket):
        note("sums", f"{run.iter_num} {getattr(run, 'micro_step', None)}")
        return allreduce_hook(group, bucket)

    def audit(event, args):
        written = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        if (written or event in ("os.rename", "os.remove", "os.mkdir")) and \\
                str(args[0]).startswith(os.environ["OUT"]):
            note("writes", os.path.basename(args[0]))

    torch.nn.modules.module.register_module_forward_hook(strike)
    DistributedDataParallel.__init__ = counted
    sys.addaudithook(audit)
"""


@dataclass
class Done:
    """What became of a start."""

    status: int
    printed: str
    errors: str

    def said(self) -> list[str]:
        """The errors of our processes; torchrun has its own."""
        return re.findall(r"^error: .*$", self.errors, re.MULTILINE)


@dataclass
class Starter:
    """Starts train.py in many processes."""

    dataset: Path
    modules: Path
    folder: Path  # of all out_dirs

    def start(self, launcher: list[str], out_dir: str, *args: str, fault: str = "",
              **environment: str) -> subprocess.Popen:
        """A start under way: [launcher, python ...] train.py ..., in a process group of its own."""
        path = self.folder / out_dir
        environment |= {"PYTHONPATH": str(self.modules), "FAULT": fault, "OUT": f"{path}/",
                        "NOTES": f"{path}.notes"}
        return subprocess.Popen(
            [*launcher, ROOT / "train.py", *RUN, f"--dataset={self.dataset}", f"--out_dir={path}",
             *args], text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, start_new_session=True, env=os.environ | environment)

    def end(self, process: subprocess.Popen) -> Done:
        """See a start to its end."""
        try:
            printed, errors = process.communicate(timeout=HANG_S)
            return Done(process.returncode, printed, errors)
        finally:
            process.kill()
            process.wait()

    def torchrun(self, n: int, out_dir: str, *args: str, restarts: int = 0, status: int = 0,
                 **environment: str) -> Done:
        """What became of n processes under torchrun."""
        done = self.end(self.start(
            [sys.executable, "-m", "torch.distributed.run", "--standalone",
             f"--nproc_per_node={n}", f"--max-restarts={restarts}"], out_dir, *args,
            **environment))
        assert done.status == status, done.errors
        return done

    def alone(self, out_dir: str, *args: str) -> Done:
        """What became of one process."""
        done = self.end(self.start([sys.executable], out_dir, *args))
        assert done.status == 0, done.errors
        return done

    def notes(self, out_dir: str, subject: str, rank: int) -> list[str]:
        """What a worker took down."""
        path = self.folder / f"{out_dir}.notes.{subject}.{rank}"
        return path.read_text().splitlines() if path.exists() else []


STORIES = {}


def story(tell: Callable) -> Callable:
    """A fixture of what `tell(starter)` returns, told beside the other stories."""
    STORIES[tell.__name__] = tell

    @pytest.fixture(scope="module", name=tell.__name__)
    def told(telling: dict[str, Future]) -> object:
        return telling[tell.__name__].result()

    return told


@pytest.fixture(scope="module")
def starter(text_dataset, tmp_path_factory) -> Starter:
    modules = tmp_path_factory.mktemp("modules")
    (modules / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return Starter(text_dataset, modules, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def telling(request, starter) -> Iterator[dict[str, Future]]:
    """The stories that the chosen tests need; three at a time keep two cores busy."""
    needed = {name for item in request.session.items for name in item.fixturenames}
    with ThreadPoolExecutor(3) as pool:
        yield {name: pool.submit(tell, starter) for name, tell in STORIES.items() if name in needed}
        pool.shutdown(cancel_futures=True)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(folder: Path, *keys: str) -> dict[str, list[float]]:
    """What metrics.jsonl has under these keys, each a column."""
    return {key: [record[key] for record in records(folder) if key in record] for key in keys}


def leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Each number, word and tensor in a checkpoint or in records, but for times."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in items:
            if key not in TIMES:
                yield from leaves(part, f"{path}/{key}")
    else:
        yield path, value


def differences(ours: Path, reference: Path) -> list[str]:
    """Where the files of two runs differ, bit for bit, but for times and where they are."""
    found = []
    names = {path.name for folder in (ours, reference) for path in folder.glob("*.pt")}
    for name in sorted(names):
        pair = [torch.load(folder / name, weights_only=True) | {"config": None}
                for folder in (ours, reference)]
        found += [f"{name}{path}" for path in unlike(*pair)]
    return found + [f"metrics{path}" for path in unlike(records(ours), records(reference))]


def unlike(ours: object, reference: object) -> list[str]:
    ours, reference = dict(leaves(ours)), dict(leaves(reference))
    both = ours.keys() & reference.keys()
    return sorted(ours.keys() ^ reference.keys()) + [path for path in both if not (
        torch.equal(ours[path], reference[path]) if isinstance(ours[path], torch.Tensor)
        else ours[path] == reference[path])]


def steps_done(folder: Path) -> int:
    return torch.load(folder / "ckpt.pt", weights_only=True)["iter_num"]


# ---------------------------------------------------------------------------------------- stories

@story
def silent(starter: Starter) -> tuple[int, str, int | None]:
    """Two processes without torchrun, one of which falls silent: what the other does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [starter.start(
        [sys.executable], "silent", "--collective_timeout=15", RANK=str(rank), WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
        fault="if rank == 1 and step == 5: os.kill(os.getpid(), signal.SIGSTOP)")
        for rank in (0, 1)]
    try:
        done = starter.end(processes[0])
        return done, processes[1].poll()
    finally:
        processes[1].kill()
        processes[1].communicate()


# At the end of the run, the threads of gloo are the last to get a core.
LATE_THREADS = """
if step == 19 and sys.platform == "linux":
    core = {min(os.sched_getaffinity(0))}
    for thread in map(int, os.listdir("/proc/self/task")):
        os.sched_setaffinity(thread, core)
        if "gloo" in open(f"/proc/self/task/{thread}/comm").read():
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
"""


@story
def plain(starter: Starter) -> tuple[Path, Path, Done]:
    """A run without dropout by one process and by two."""
    starter.alone("one", *PLAIN)
    done = starter.torchrun(2, "two", *PLAIN, fault=LATE_THREADS, COUNT="1")
    return starter.folder / "one", starter.folder / "two", done


@story
def undisturbed(starter: Starter) -> tuple[Path, Path]:
    """A run by two processes; and one by one process from its step 8, by two again from step 16."""
    whole, handed_on = starter.folder / "whole", starter.folder / "handed_on"
    starter.torchrun(2, "whole")
    handed_on.mkdir()
    for name in ("ckpt_00000008.pt", "metrics.jsonl"):
        shutil.copy(whole / name, handed_on)
    starter.alone("handed_on", "--max_iters=16")
    starter.torchrun(2, "handed_on")
    return whole, handed_on


@pytest.fixture
def whole(undisturbed) -> Path:
    return undisturbed[0]


@pytest.fixture
def handed_on(undisturbed) -> Path:
    return undisturbed[1]


@story
def whole_bfloat16(starter: Starter) -> Path:
    starter.torchrun(2, "whole_bfloat16", *BFLOAT16)
    return starter.folder / "whole_bfloat16"


# Life after life of one run, stopped each time: by what, with how many restarts.
STOPS = {
    "SIGTERM": (0, """
if rank == 1 and step == 3:
    signalled(os.kill, torchrun, signal.SIGTERM)
"""),
    "Ctrl-C": (0, """
if rank == 0 and step == 7:
    signalled(os.killpg, os.getpgid(torchrun), signal.SIGINT)
"""),
    "SIGTERM of one process, a kill": (1, """
if rank == 1 and step == 11 and life == 0:
    signalled(os.kill, os.getpid(), signal.SIGTERM)
if rank == 1 and step == 18:
    note("killed", time.time())
    os.kill(os.getpid(), signal.SIGKILL)
"""),
}


@story
def stopped(starter: Starter) -> tuple[Path, dict[str, tuple[Done, int]], float]:
    """A run in bfloat16 that is stopped as often as STOPS says, and taken to its end.

    Returns where it is, what became of each start with the steps in ckpt.pt then, and for how long
    the job outlived the process that was killed.
    """
    folder, ends = starter.folder / "stopped", {}
    for name, (restarts, fault) in STOPS.items():
        done = starter.torchrun(2, "stopped", *BFLOAT16, fault=fault, restarts=restarts,
                                status=1)
        ends[name] = done, steps_done(folder)
    outlived_s = time.time() - float(starter.notes("stopped", "killed", 1)[0])
    starter.torchrun(2, "stopped", *BFLOAT16)
    return folder, ends, outlived_s


@story
def whole_by_three(starter: Starter) -> Path:
    starter.torchrun(3, "whole_by_three")
    return starter.folder / "whole_by_three"


@story
def restarted(starter: Starter) -> tuple[Path, Done]:
    """A run by three processes, of which the first is killed once."""
    done = starter.torchrun(3, "restarted", restarts=3, fault="""
if rank == 0 and step == 13 and life == 0:
    os.kill(os.getpid(), signal.SIGKILL)
""")
    return starter.folder / "restarted", done


@story
def two_hosts(starter: Starter) -> tuple[Path, list[Done]]:
    """A run by a process on each of two hosts, one of which is killed once.

    A host is a network namespace of its own, joined to the other's by a cable.
    """
    if os.name != "posix" or os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("making network namespaces takes Linux, root and the command ip")
    hosts = [f"plaingpt-{os.getpid()}-{i}" for i in (1, 2)]
    processes = []

    def ip(*words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"ip {' '.join(words)}: {done.stderr.strip()}")

    try:
        for host in hosts:
            ip("netns", "add", host)
        ip("link", "add", "cable", "netns", hosts[0], "type", "veth", "peer", "cable", "netns",
           hosts[1])
        for host, address in zip(hosts, ("10.0.0.1", "10.0.0.2"), strict=True):
            ip("-n", host, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", host, "link", "set", "cable", "up")
            ip("-n", host, "link", "set", "lo", "up")
            processes.append(starter.start(
                ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run",
                 "--nnodes=2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv-backend=c10d",
                 "--rdzv-endpoint=10.0.0.1:29500", f"--local-addr={address}",
                 f"--rdzv-conf=is_host={host == hosts[0]}"],
                "two_hosts", GLOO_SOCKET_IFNAME="cable", fault="""
if rank == 1 and step == 13 and life == 0:
    os.kill(os.getpid(), signal.SIGKILL)
"""))
        return starter.folder / "two_hosts", [starter.end(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host], capture_output=True)


# ------------------------------------------------------------------------------ like one process

def test_two_processes_train_like_one(plain):
    one, two, _ = plain
    assert len(records(one)) == len(records(two)) == 20 + 4
    for ours, reference in zip(records(two), records(one), strict=True):
        for key in reference.keys() - TIMES - {"mfu"}:
            assert ours[key] == pytest.approx(reference[key], rel=1e-4), key


def test_any_number_of_processes_trains_alike_also_when_it_changes(
        whole, whole_by_three, handed_on):
    reference = numbers(whole, "iter", "loss")
    for folder in (whole_by_three, handed_on):
        ours = numbers(folder, "iter", "loss")
        assert ours["iter"] == reference["iter"]
        assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-4)


def test_any_number_of_processes_evaluates_alike(whole, whole_by_three, handed_on):
    keys = ["train_loss", "val_loss", "val_accuracy"]
    reference = numbers(whole, *keys)
    for folder in (whole_by_three, handed_on):
        ours = numbers(folder, *keys)
        for key in keys:
            assert ours[key] == pytest.approx(reference[key], rel=1e-5), key


def test_gradients_are_sent_once_a_step_at_the_last_micro_step(plain, starter):
    for rank, last in ((0, 2), (1, 3)):
        before, *sums = starter.notes("two", "sums", rank)
        assert before == "0 None"  # the pass before the first step
        assert sums == [f"{i} {last}" for i in range(20)]


def test_rank_0_alone_prints_and_writes(plain, starter):
    *_, done = plain
    printed = done.printed.splitlines()
    assert [line.split(":")[0] for line in printed if line.startswith("iter")] == [
        f"iter {i}" for i in range(20)]
    assert len(set(printed)) == len(printed)
    assert {"lock", "metrics.jsonl", "ckpt.pt.tmp", "best.pt.tmp"} <= set(
        starter.notes("two", "writes", 0))
    assert starter.notes("two", "writes", 1) == []


def test_micro_steps_that_do_not_divide_are_refused_before_the_processes_meet(tmp_path):
    done = run(ROOT / "train.py", *TINY, f"--out_dir={tmp_path}", RANK="1", WORLD_SIZE="3")
    assert done.returncode == 2
    assert done.stderr == ("error: gradient_accumulation_steps = 2 does not divide among 3 "
                           "processes: choose a multiple of 3\n")


# -------------------------------------------------------------------------------- stop and go on

@pytest.mark.parametrize("name, number, n_steps", [("SIGTERM", 15, 4), ("Ctrl-C", 2, 8)])
def test_a_signal_to_torchrun_ends_all_processes_after_one_and_the_same_step(
        name, number, n_steps, stopped):
    _, ends, _ = stopped
    done, saved = ends[name]
    assert saved == n_steps
    assert f"stopped by signal {number} after {n_steps} steps" in done.printed
    assert done.said() == []


def test_a_signal_to_one_process_ends_all_with_its_status_and_a_restart_goes_on(stopped):
    _, ends, _ = stopped
    done, _ = ends["SIGTERM of one process, a kill"]
    assert "stopped by signal 15 after 12 steps" in done.printed
    assert re.search(r"failed \(exitcode: 143\)", done.errors)
    assert [line.split(":")[0] for line in done.printed.splitlines() if "iter 12" in line] == [
        "iter 12"]


def test_a_dead_process_ends_the_job_within_60_s_and_the_others_say_so_in_a_sentence(stopped):
    _, ends, outlived_s = stopped
    done, saved = ends["SIGTERM of one process, a kill"]
    assert outlived_s < 60
    said, = done.said()
    assert said.startswith("error: another process is gone or silent")
    assert done.errors.count("Traceback") == 1  # torchrun's own
    assert saved == 16


def test_a_run_by_two_processes_stopped_by_all_means_ends_bit_for_bit_like_one_that_was_not(
        stopped, whole_bfloat16):
    folder, *_ = stopped
    assert differences(folder, whole_bfloat16) == []


def test_a_job_whose_first_process_is_killed_restarts_and_ends_bit_for_bit_like_one_undisturbed(
        restarted, whole_by_three):
    folder, done = restarted
    assert differences(folder, whole_by_three) == []
    assert len(re.findall(r"^settings:", done.printed, re.MULTILINE)) == 2  # not more than once


def test_a_job_on_two_hosts_restarts_and_ends_bit_for_bit_like_one_undisturbed(two_hosts, whole):
    folder, ends = two_hosts
    assert [done.status for done in ends] == [0, 0], ends
    assert differences(folder, whole) == []
    assert sum(len(done.said()) for done in ends) == 1  # the process left over lost the other
    assert sum(done.printed.count("settings:") for done in ends) == 2


def test_a_silent_process_ends_the_others_after_collective_timeout(silent):
    done, others_status = silent
    assert others_status is None  # it is there still, and says nothing
    assert done.status == 1
    assert done.errors.startswith("error: another process is gone or silent")
    assert done.errors.count("\n") == 1


def test_threads_of_gloo_that_are_late_do_not_abort_a_process_at_its_end(plain):
    *_, done = plain
    assert "terminate called" not in done.errors
    assert done.errors == ""
