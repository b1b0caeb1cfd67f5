"""train.py in many processes, started by torchrun on one machine, and on two made of namespaces.

The scenarios, each of one start or more, run in parallel. Faults are injected from inside: a
sitecustomize.py on PYTHONPATH runs the code in $FAULT in every process at every step, so that it
acts at exactly the step it names.
"""

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
from conftest import MODERN, ROOT, TIMES, TINY, differences, forked, load, records

# 125 blocks to evaluate make 25 batches, the last one smaller; 6 micro-steps suit 1, 2 and 3.
RUN = [*TINY, "--batch_size=5", "--eval_iters=0", "--gradient_accumulation_steps=6",
       "--dropout=0.1", "--max_iters=24", "--lr_decay_iters=24", "--eval_interval=8",
       "--keep_every=8", "--init_from=auto", "--optimizer=muon",
       *(f"--{name}={value}" for name, value in MODERN.items())]
NO_DROPOUT = ["--dropout=0", "--gradient_accumulation_steps=4", "--max_iters=20"]
TIMEOUT_S = 300  # no start takes that long

SITECUSTOMIZE = """
import os

if "RANK" in os.environ:  # a worker
    import ctypes, signal, sys, time
    import torch
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    rank = int(os.environ["RANK"])
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    run = sys.modules["__main__"]
    torchrun = os.getppid()
    init = DistributedDataParallel.__init__
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1  # no worker outlives its torchrun, even if the test is killed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def log(name, text):
        with open(f"{os.environ['LOG']}.{name}.{rank}", "a") as file:
            file.write(f"{text}\\n")

    def send_and_wait(send, to, number):
        send(to, number)
        while not run.stop_signals.received:
            time.sleep(0.01)

    def inject_fault(module, args, output):
        if (type(module).__name__ == "GPT" and torch.is_grad_enabled()
                and hasattr(run, "metrics") and run.micro_step == rank):
            exec(os.environ["FAULT"], globals() | {"step": run.iter_num})

    def init_and_count(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if "COUNT" in os.environ:
            self.register_comm_hook(None, count)

    def count(group, bucket):
        log("all_reduces", f"{run.iter_num} {getattr(run, 'micro_step', None)}")
        return allreduce_hook(group, bucket)

    def audit(event, args):
        written = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        if (written or event in ("os.rename", "os.remove", "os.mkdir")) and \\
                str(args[0]).startswith(os.environ["OUT"]):
            log("writes", os.path.basename(args[0]))

    torch.nn.modules.module.register_module_forward_hook(inject_fault)
    DistributedDataParallel.__init__ = init_and_count
    sys.addaudithook(audit)
"""


@dataclass
class Done:
    """The status and output of a start."""

    status: int
    stdout: str
    stderr: str

    def errors(self) -> list[str]:
        """The error lines of train.py; torchrun has its own."""
        return re.findall(r"^error: .*$", self.stderr, re.MULTILINE)


@dataclass
class Launcher:
    """Starts train.py in many processes."""

    dataset: Path
    modules: Path
    folder: Path  # of all out_dirs

    def start(self, command: list[str], out_dir: str, *args: str, fault: str = "",
              **environment: str) -> subprocess.Popen:
        """Start [command, python ...] train.py ... in a process group of its own."""
        path = self.folder / out_dir
        environment |= {"PYTHONPATH": str(self.modules), "FAULT": fault, "OUT": f"{path}/",
                        "LOG": f"{path}.log"}
        return subprocess.Popen(
            [*command, ROOT / "train.py", *RUN, f"--dataset={self.dataset}", f"--out_dir={path}",
             *args], text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, start_new_session=True, env=os.environ | environment)

    def wait(self, process: subprocess.Popen) -> Done:
        try:
            stdout, stderr = process.communicate(timeout=TIMEOUT_S)
            return Done(process.returncode, stdout, stderr)
        finally:
            process.kill()
            process.wait()

    def torchrun(self, n: int, out_dir: str, *args: str, restarts: int = 0, status: int = 0,
                 **environment: str) -> Done:
        """Run n processes under torchrun."""
        done = self.wait(self.start(
            [sys.executable, "-m", "torch.distributed.run", "--standalone",
             f"--nproc_per_node={n}", f"--max-restarts={restarts}"], out_dir, *args,
            **environment))
        assert done.status == status, done.stderr
        return done

    def single(self, out_dir: str, *args: str) -> None:
        """Run one process."""
        done = self.wait(self.start([sys.executable], out_dir, *args))
        assert done.status == 0, done.stderr

    def log(self, out_dir: str, name: str, rank: int) -> list[str]:
        """What a worker has logged."""
        path = self.folder / f"{out_dir}.log.{name}.{rank}"
        return path.read_text().splitlines() if path.exists() else []


SCENARIOS = {}


def scenario(function: Callable) -> Callable:
    """A fixture of what `function(launcher)` returns, run in parallel to the other scenarios."""
    SCENARIOS[function.__name__] = function

    @pytest.fixture(scope="module", name=function.__name__)
    def result(parallel: dict[str, Future]) -> object:
        return parallel[function.__name__].result()

    return result


@pytest.fixture(scope="module")
def launcher(text_dataset, tmp_path_factory) -> Launcher:
    modules = tmp_path_factory.mktemp("modules")
    (modules / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return Launcher(text_dataset, modules, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def parallel(request, launcher) -> Iterator[dict[str, Future]]:
    """The scenarios of the selected tests; three at a time keep two cores busy."""
    needed = {name for item in request.session.items for name in item.fixturenames}
    with ThreadPoolExecutor(3) as pool:
        yield {name: pool.submit(function, launcher) for name, function in SCENARIOS.items()
               if name in needed}
        pool.shutdown(cancel_futures=True)


def columns(folder: Path, *keys: str) -> dict[str, list[float]]:
    """The values in metrics.jsonl by key."""
    return {key: [record[key] for record in records(folder, key)] for key in keys}


# -------------------------------------------------------------------------------------- scenarios

@scenario
def silent(launcher: Launcher) -> tuple[Done, int | None]:
    """Two processes without torchrun, one of which is suspended: what the other does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [launcher.start(
        [sys.executable], "silent", "--collective_timeout=15", RANK=str(rank), WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
        fault="if rank == 1 and step == 5: os.kill(os.getpid(), signal.SIGSTOP)")
        for rank in (0, 1)]
    try:
        done = launcher.wait(processes[0])
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


@scenario
def no_dropout(launcher: Launcher) -> tuple[Path, Path, Done]:
    """A run without dropout by one process and by two."""
    launcher.single("one", *NO_DROPOUT)
    done = launcher.torchrun(2, "two", *NO_DROPOUT, fault=LATE_THREADS, COUNT="1")
    return launcher.folder / "one", launcher.folder / "two", done


@scenario
def by_two(launcher: Launcher) -> tuple[Path, Path]:
    """A run by two processes; and from its step 8 on by one process, from step 16 by two again."""
    whole, changing = launcher.folder / "by_two", launcher.folder / "changing"
    launcher.torchrun(2, "by_two")
    changing.mkdir()
    for name in ("ckpt_00000008.pt", "metrics.jsonl"):
        shutil.copy(whole / name, changing)
    launcher.single("changing", "--max_iters=16")
    launcher.torchrun(2, "changing")
    return whole, changing


@scenario
def by_three(launcher: Launcher) -> Path:
    launcher.torchrun(3, "by_three")
    return launcher.folder / "by_three"


# How one run is stopped, one time after the other, and how often torchrun may restart it.
STOPS = {
    "SIGTERM": (0, """
if rank == 1 and step == 3:
    send_and_wait(os.kill, torchrun, signal.SIGTERM)
"""),
    "Ctrl-C": (0, """
if rank == 0 and step == 7:
    send_and_wait(os.killpg, os.getpgid(torchrun), signal.SIGINT)
"""),
    "SIGTERM of one process, a kill": (1, """
if rank == 1 and step == 11 and restarts == 0:
    send_and_wait(os.kill, os.getpid(), signal.SIGTERM)
if rank == 1 and step == 18:
    log("killed", time.time())
    os.kill(os.getpid(), signal.SIGKILL)
"""),
}


@scenario
def stopped(launcher: Launcher) -> tuple[Path, dict[str, tuple[Done, int]], float]:
    """A run by two processes that is stopped as STOPS says, and resumed to its end.

    Returns its folder, each start with the steps in ckpt.pt after it, and the seconds from the
    kill of a process to the end of the job.
    """
    folder, starts = launcher.folder / "stopped", {}
    for name, (restarts, fault) in STOPS.items():
        done = launcher.torchrun(2, "stopped", fault=fault, restarts=restarts, status=1)
        starts[name] = done, load(folder / "ckpt.pt")["iter_num"]
    outlived_s = time.time() - float(launcher.log("stopped", "killed", 1)[0])
    launcher.torchrun(2, "stopped")
    return folder, starts, outlived_s


@scenario
def restarted(launcher: Launcher) -> tuple[Path, Done]:
    """A run by three processes, of which the first is killed once."""
    done = launcher.torchrun(3, "restarted", restarts=3, fault="""
if rank == 0 and step == 13 and restarts == 0:
    os.kill(os.getpid(), signal.SIGKILL)
""")
    return launcher.folder / "restarted", done


@scenario
def two_hosts(launcher: Launcher) -> tuple[Path, list[Done]]:
    """A run by one process on each of two hosts, one of which is killed once.

    A host is a network namespace, connected to the other's by a virtual cable.
    """
    if os.name != "posix" or os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need Linux, root and the command ip")
    hosts = [f"plaingpt-{os.getpid()}-{i}" for i in (1, 2)]
    processes = []

    def ip(*args: str) -> None:
        done = subprocess.run(["ip", *args], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"ip {' '.join(args)}: {done.stderr.strip()}")

    try:
        for host in hosts:
            ip("netns", "add", host)
        ip("link", "add", "cable", "netns", hosts[0], "type", "veth", "peer", "cable", "netns",
           hosts[1])
        for host, address in zip(hosts, ("10.0.0.1", "10.0.0.2"), strict=True):
            ip("-n", host, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", host, "link", "set", "cable", "up")
            ip("-n", host, "link", "set", "lo", "up")
            processes.append(launcher.start(
                ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run",
                 "--nnodes=2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv-backend=c10d",
                 "--rdzv-endpoint=10.0.0.1:29500", f"--local-addr={address}",
                 f"--rdzv-conf=is_host={host == hosts[0]}"],
                "two_hosts", GLOO_SOCKET_IFNAME="cable", fault="""
if rank == 1 and step == 13 and restarts == 0:
    os.kill(os.getpid(), signal.SIGKILL)
"""))
        return launcher.folder / "two_hosts", [launcher.wait(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host], capture_output=True)


# ------------------------------------------------------------------------------ like one process

def test_two_processes_train_like_one(no_dropout):
    one, two, _ = no_dropout
    assert len(records(one)) == len(records(two)) == 20 + 4
    for ours, expected in zip(records(two), records(one), strict=True):
        for key in expected.keys() - TIMES - {"mfu"}:
            assert ours[key] == pytest.approx(expected[key], rel=1e-4), key


def test_any_number_of_processes_trains_and_evaluates_alike_also_when_it_changes(
        by_two, by_three):
    tolerances = {"loss": 1e-4, "train_loss": 1e-5, "val_loss": 1e-5, "val_accuracy": 1e-5}
    expected = columns(by_two[0], "iter", *tolerances)
    for folder in (by_three, by_two[1]):
        ours = columns(folder, "iter", *tolerances)
        assert ours["iter"] == expected["iter"]
        for key, tolerance in tolerances.items():
            assert ours[key] == pytest.approx(expected[key], rel=tolerance), key


def test_gradients_are_sent_once_a_step_at_the_last_micro_step(no_dropout, launcher):
    for rank, last in ((0, 2), (1, 3)):
        warm_up, *sent = launcher.log("two", "all_reduces", rank)
        assert warm_up == "0 None"
        assert sent == [f"{i} {last}" for i in range(20)]


def test_rank_0_alone_prints_and_writes(no_dropout, launcher):
    *_, done = no_dropout
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("iter")] == [
        f"iter {i}" for i in range(20)]
    assert len(set(lines)) == len(lines)
    assert {"lock.owner", "metrics.jsonl", "ckpt.pt.tmp", "best.pt.tmp"} <= set(
        launcher.log("two", "writes", 0))
    assert launcher.log("two", "writes", 1) == []


def test_micro_steps_that_do_not_divide_are_refused_before_the_rendezvous(tmp_path):
    done = forked([str(ROOT / "train.py"), *TINY, f"--out_dir={tmp_path}"], ROOT,
                  {"RANK": "1", "WORLD_SIZE": "3"})
    assert done.returncode == 2
    assert done.stderr == ("error: gradient_accumulation_steps = 2 is not divisible by 3 "
                           "processes: choose a multiple of 3\n")


# ---------------------------------------------------------------------------------- stop, resume

@pytest.mark.parametrize("name, number, n_steps", [("SIGTERM", 15, 4), ("Ctrl-C", 2, 8)])
def test_a_signal_to_torchrun_ends_all_processes_after_the_same_step(
        name, number, n_steps, stopped):
    _, starts, _ = stopped
    done, saved = starts[name]
    assert saved == n_steps
    assert f"stopped by signal {number} after {n_steps} steps" in done.stdout
    assert done.errors() == []


def test_a_signal_to_one_process_ends_all_with_its_status_and_a_restart_resumes(stopped):
    _, starts, _ = stopped
    done, _ = starts["SIGTERM of one process, a kill"]
    assert "stopped by signal 15 after 12 steps" in done.stdout
    assert re.search(r"failed \(exitcode: 143\)", done.stderr)
    assert [line.split(":")[0] for line in done.stdout.splitlines() if "iter 12" in line] == [
        "iter 12"]


def test_a_dead_process_ends_the_job_within_60_s_and_the_others_report_it_in_a_sentence(stopped):
    _, starts, outlived_s = stopped
    done, saved = starts["SIGTERM of one process, a kill"]
    assert outlived_s < 60
    error, = done.errors()
    assert error.startswith("error: another process is gone or silent")
    assert done.stderr.count("Traceback") == 1  # torchrun's own
    assert saved == 16


def test_a_run_by_two_processes_stopped_in_any_way_ends_bit_for_bit_like_an_uninterrupted_one(
        stopped, by_two):
    assert differences(stopped[0], by_two[0]) == []


def test_a_job_whose_rank_0_is_killed_restarts_and_ends_bit_for_bit_like_an_uninterrupted_one(
        restarted, by_three):
    folder, done = restarted
    assert differences(folder, by_three) == []
    assert len(re.findall(r"^settings:", done.stdout, re.MULTILINE)) == 2  # restarted once only


def test_a_job_on_two_hosts_restarts_and_ends_bit_for_bit_like_an_uninterrupted_one(
        two_hosts, by_two):
    folder, ends = two_hosts
    assert [done.status for done in ends] == [0, 0], ends
    assert differences(folder, by_two[0]) == []
    assert sum(len(done.errors()) for done in ends) == 1  # of the process that was left
    assert sum(done.stdout.count("settings:") for done in ends) == 2


def test_a_silent_process_ends_the_others_after_collective_timeout(silent):
    done, other_status = silent
    assert other_status is None  # still running
    assert done.status == 1
    assert re.fullmatch(
        r"error: another process is gone or silent \(.*\): see its own message; with torchrun "
        r"--max-restarts=N and --init_from=auto the run resumes by itself\n", done.stderr)


def test_late_threads_of_gloo_do_not_abort_a_process_at_its_end(no_dropout):
    *_, done = no_dropout
    assert done.stderr == ""
