"""train.py in many processes, started by torchrun on one machine, and on two made of namespaces.

The scenarios, each of one start or more, run in parallel. Faults are injected from inside: a
sitecustomize.py on PYTHONPATH runs the code in $FAULT in every process at every step, so that it
acts at exactly the step it names.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import MODERN, ROOT, TIMES, TINY, differences, load, records, snapshot

# 125 blocks to evaluate make 25 batches, the last one smaller; 6 micro-steps suit 1, 2 and 3.
RUN = [*TINY, "--batch_size=5", "--eval_iters=0", "--gradient_accumulation_steps=6",
       "--dropout=0.1", "--max_iters=24", "--lr_decay_iters=24", "--eval_interval=8",
       "--keep_every=8", "--init_from=auto", "--optimizer=muon",
       *(f"--{name}={value}" for name, value in MODERN.items())]

SITECUSTOMIZE = """
import os

if "RANK" in os.environ:  # a worker
    import ctypes, resource, signal, sys, time
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
        if (type(module).__name__.endswith("GPT") and torch.is_grad_enabled()
                and hasattr(run, "metrics") and run.micro_step == rank):
            exec(os.environ["FAULT"], globals() | {"step": run.iter_num})

    def init_and_count(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if "COUNT" in os.environ:
            self.register_comm_hook(None, count)

    def count(group, bucket):
        log("all_reduces", f"{run.iter_num} {getattr(run, 'micro_step', None)}")
        return allreduce_hook(group, bucket)

    torch.nn.modules.module.register_module_forward_hook(inject_fault)
    DistributedDataParallel.__init__ = init_and_count
"""


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
        environment |= {"PYTHONPATH": str(self.modules), "FAULT": fault, "LOG": f"{path}.log"}
        return subprocess.Popen(
            [*command, ROOT / "train.py", *RUN, f"--dataset={self.dataset}", f"--out_dir={path}",
             *args], text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, start_new_session=True, env=os.environ | environment)

    def wait(self, process: subprocess.Popen) -> subprocess.CompletedProcess:
        try:
            output = process.communicate(timeout=300)  # no start takes that long
            return subprocess.CompletedProcess(process.args, process.returncode, *output)
        finally:
            process.kill()
            process.wait()

    def torchrun(self, n: int, out_dir: str, *args: str, restarts: int = 0, status: int = 0,
                 **environment: str) -> subprocess.CompletedProcess:
        """Run n processes under torchrun."""
        done = self.wait(self.start(
            [sys.executable, "-m", "torch.distributed.run", "--standalone",
             f"--nproc_per_node={n}", f"--max-restarts={restarts}"], out_dir, *args,
            **environment))
        assert done.returncode == status, done.stderr
        return done

    def log(self, out_dir: str, name: str, rank: int) -> list[str]:
        """What a worker has logged."""
        path = self.folder / f"{out_dir}.log.{name}.{rank}"
        return path.read_text().splitlines() if path.exists() else []


def errors(done: subprocess.CompletedProcess) -> list[str]:
    """The error lines of train.py; torchrun has its own."""
    return re.findall(r"^error: .*$", done.stderr, re.MULTILINE)


def logged_steps(done: subprocess.CompletedProcess) -> list[int]:
    return [int(i) for i in re.findall(r"^ *\d+% iter (\d+): loss", done.stdout, re.MULTILINE)]


# -------------------------------------------------------------------------------------- scenarios

def silent(launcher: Launcher) -> subprocess.CompletedProcess:
    """A run by two processes, one of which hangs."""
    return launcher.torchrun(2, "silent", "--collective_timeout=15", status=1, fault="""
if rank == 1 and step == 5:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # lets torchrun end it
    time.sleep(600)
""")


# Where a write of rank 1 would fail; and at the end of the run, the threads of gloo are the last to
# get a core.
NO_FILES_AND_LATE_THREADS = """
if rank == 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
if step == 23 and sys.platform == "linux":
    core = {min(os.sched_getaffinity(0))}
    for thread in map(int, os.listdir("/proc/self/task")):
        os.sched_setaffinity(thread, core)
        if "gloo" in open(f"/proc/self/task/{thread}/comm").read():
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
"""


def by_two(launcher: Launcher) -> subprocess.CompletedProcess:
    """A run by two processes."""
    return launcher.torchrun(2, "by_two", fault=NO_FILES_AND_LATE_THREADS)


def changing(launcher: Launcher) -> None:
    """The same run by one process, from step 8 on by three, and from step 16 on by two."""
    launcher.torchrun(1, "changing", "--max_iters=8")
    launcher.torchrun(3, "changing", "--max_iters=16", COUNT="1")
    launcher.torchrun(2, "changing")


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
    "SIGHUP of one process, a kill": (1, """
if rank == 1 and step == 11 and restarts == 0:
    send_and_wait(os.kill, os.getpid(), signal.SIGHUP)
if rank == 1 and step == 18:
    log("killed", time.time())
    os.kill(os.getpid(), signal.SIGKILL)
"""),
}


def stopped(launcher: Launcher, run: str = "stopped", *args: str,
            ) -> tuple[dict[str, subprocess.CompletedProcess], float]:
    """A run by two processes that is stopped as STOPS says, and resumed to its end.

    Returns each start with the steps in ckpt.pt after it, and the seconds from the kill of a
    process to the end of the job.
    """
    starts = {}
    for name, (restarts, fault) in STOPS.items():
        done = launcher.torchrun(2, run, *args, fault=fault, restarts=restarts, status=1)
        starts[name] = done, load(launcher.folder / run / "ckpt.pt")["iter_num"]
    outlived_s = time.time() - float(launcher.log(run, "killed", 1)[0])
    launcher.torchrun(2, run)
    return starts, outlived_s


def sharded(launcher: Launcher) -> subprocess.CompletedProcess:
    """A run by two processes that share its weights, with blocks computed again, and checkpoints
    written in the background."""
    return launcher.torchrun(2, "sharded", "--shard=True", "--recompute=True", "--sample_every=12",
                             fault="if rank == 0: run.saver.write_s = 1e9  # a write took long")


def sharded_stopped(launcher: Launcher) -> tuple[dict[str, subprocess.CompletedProcess], float]:
    return stopped(launcher, "sharded_stopped", "--shard=True")


def sharded_changing(launcher: Launcher) -> None:
    """A run by three processes that share its weights, from step 8 on by one, and from step 16 on
    by two that share them again."""
    launcher.torchrun(3, "sharded_changing", "--max_iters=8", "--shard=True")
    launcher.torchrun(1, "sharded_changing", "--max_iters=16", "--shard=False")
    launcher.torchrun(2, "sharded_changing", "--shard=True")


def restarted(launcher: Launcher) -> subprocess.CompletedProcess:
    """A run by two processes, of which the first is killed once."""
    return launcher.torchrun(2, "restarted", restarts=3, fault="""
if rank == 0 and step == 13 and restarts == 0:
    os.kill(os.getpid(), signal.SIGKILL)
""")


@contextmanager
def hosts(name: str) -> Iterator[tuple[Callable, Callable]]:
    """Two hosts, network namespaces connected by a virtual cable.

    Yields ip(host, *arguments), and torchrun(host, launcher, fault), which starts a job's part.
    """
    if os.name != "posix" or os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need Linux, root and the command ip")
    namespaces = [f"plaingpt-{os.getpid()}-{name}-{i}" for i in (1, 2)]
    processes = []

    def ip(*args: str) -> None:
        done = subprocess.run(["ip", *args], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"ip {' '.join(args)}: {done.stderr.strip()}")

    def torchrun(host: int, launcher: Launcher, *args: str, fault: str = "") -> subprocess.Popen:
        process = launcher.start(
            ["ip", "netns", "exec", namespaces[host], sys.executable, "-m",
             "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max-restarts=3",
             "--rdzv-backend=c10d", "--rdzv-endpoint=10.0.0.1:29500",
             f"--local-addr=10.0.0.{host + 1}", f"--rdzv-conf=is_host={host == 0}"],
            name, *args, GLOO_SOCKET_IFNAME="cable", fault=fault)
        processes.append(process)
        return process

    try:
        for namespace in namespaces:
            ip("netns", "add", namespace)
        ip("link", "add", "cable", "netns", namespaces[0], "type", "veth", "peer", "cable", "netns",
           namespaces[1])
        for host, namespace in enumerate(namespaces, start=1):
            ip("-n", namespace, "addr", "add", f"10.0.0.{host}/24", "dev", "cable")
            ip("-n", namespace, "link", "set", "cable", "up")
            ip("-n", namespace, "link", "set", "lo", "up")
        yield lambda host, *args: ip("-n", namespaces[host], *args), torchrun
    finally:
        for process in processes:
            process.kill()
        for namespace in namespaces:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)


def two_hosts(launcher: Launcher) -> list[subprocess.CompletedProcess]:
    """A run by one process on each of two hosts, one of which is killed once."""
    with hosts("two_hosts") as (_, torchrun):
        processes = [torchrun(host, launcher, fault="""
if rank == 1 and step == 13 and restarts == 0:
    os.kill(os.getpid(), signal.SIGKILL)
""") for host in (0, 1)]
        return [launcher.wait(process) for process in processes]


LINK_DOWN_S = float(os.environ.get("LINK_DOWN_S", 7))  # longer than the timeout of a collective


def lost_link(launcher: Launcher) -> list[subprocess.CompletedProcess]:
    """A run by one process on each of two hosts, between which the link fails for LINK_DOWN_S."""
    with hosts("lost_link") as (ip, torchrun):
        processes = [torchrun(host, launcher, "--collective_timeout=5", fault="""
if rank == 1 and step == 5 and restarts == 0:
    log("reached", step)
    time.sleep(1)  # in which the link fails
""") for host in (0, 1)]
        until = time.monotonic() + 120
        while not launcher.log("lost_link", "reached", 1):
            assert time.monotonic() < until, "the job does not reach step 5"
            time.sleep(0.05)
        ip(1, "link", "set", "cable", "down")
        time.sleep(LINK_DOWN_S)
        ip(1, "link", "set", "cable", "up")
        return [launcher.wait(process) for process in processes]


@pytest.fixture(scope="module")
def launcher(text_dataset, tmp_path_factory) -> Launcher:
    modules = tmp_path_factory.mktemp("modules")
    (modules / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return Launcher(text_dataset, modules, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def scenarios(launcher) -> Iterator[dict[str, Future]]:
    """What the scenarios return; three at a time keep two cores busy."""
    with ThreadPoolExecutor(3) as pool:
        yield {scenario.__name__: pool.submit(scenario, launcher)
               for scenario in (stopped, sharded_stopped, silent, changing, sharded_changing,
                                by_two, sharded, restarted, two_hosts, lost_link)}


# ------------------------------------------------------------------------------ like one process

@pytest.mark.parametrize("name", ["changing", "sharded", "sharded_changing"])
def test_any_number_of_processes_trains_and_evaluates_alike_also_when_it_changes(
        name, scenarios, launcher):
    scenarios["by_two"].result(), scenarios[name].result()
    ours, expected = (records(launcher.folder / name) for name in (name, "by_two"))
    assert len(ours) == 24 + 4
    for record, other in zip(ours, expected, strict=True):
        for key in other.keys() - TIMES - {"mfu"}:
            tolerance = 1e-4 if "loss" in other else 1e-5
            assert record[key] == pytest.approx(other[key], rel=tolerance), (record["iter"], key)


def test_a_sharded_evaluation_prints_what_the_run_has_logged_and_writes_nothing(
        scenarios, launcher):
    scenarios["sharded"].result()
    folder = launcher.folder / "sharded"
    before, expected = snapshot(folder), records(folder, "val_loss")[-1]["val_loss"]
    done = launcher.torchrun(2, "sharded", "--shard=True", "--eval_only=True")
    assert "step 24: train loss" in done.stdout and f"val loss {expected:.4f}" in done.stdout
    assert snapshot(folder) == before


def test_a_sharded_checkpoint_of_tied_weights_holds_them_once(launcher):
    launcher.torchrun(2, "tied", "--shard=True", "--tie_weights=True", "--max_iters=1")
    state = load(launcher.folder / "tied" / "ckpt.pt")["model"]
    assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()


def test_gradients_are_sent_once_a_step_at_the_last_micro_step(scenarios, launcher):
    scenarios["changing"].result()
    for rank, last in ((0, 3), (1, 4), (2, 5)):
        warm_up, *sent = launcher.log("changing", "all_reduces", rank)
        assert warm_up == "8 None"
        assert sent == [f"{i} {last}" for i in range(8, 16)]


def test_a_mistake_is_printed_by_one_of_the_processes(launcher):
    error, = errors(launcher.torchrun(2, "mistake", "--n_embd=15", status=1))
    assert "n_embd = 15" in error
    assert not (launcher.folder / "mistake").exists()


def test_rank_0_alone_prints_and_writes(scenarios):
    done = scenarios["by_two"].result()  # which succeeded, although rank 1 could not write
    lines = done.stdout.splitlines()
    assert logged_steps(done) == list(range(24))
    assert len(set(lines)) == len(lines)


# ---------------------------------------------------------------------------------- stop, resume

@pytest.mark.parametrize("name", ["stopped", "sharded_stopped"])
def test_a_signal_to_torchrun_ends_all_processes_after_the_same_step(name, scenarios):
    starts, _ = scenarios[name].result()
    for name, number, n_steps in (("SIGTERM", 15, 3), ("Ctrl-C", 2, 7)):
        done, saved = starts[name]
        assert saved == n_steps
        assert f"stopped by signal {number} after {n_steps} steps" in done.stdout
        assert errors(done) == []


@pytest.mark.parametrize("name", ["stopped", "sharded_stopped"])
def test_a_signal_to_one_process_ends_all_with_its_status_and_a_restart_resumes(name, scenarios):
    done, _ = scenarios[name].result()[0]["SIGHUP of one process, a kill"]
    assert "stopped by signal 1 after 11 steps" in done.stdout
    assert re.search(r"failed \(exitcode: 129\)", done.stderr)
    assert logged_steps(done).count(11) == 1


def test_a_dead_process_ends_the_job_within_60_s_and_the_others_report_it_in_a_sentence(scenarios):
    starts, outlived_s = scenarios["stopped"].result()
    done, n_steps = starts["SIGHUP of one process, a kill"]
    assert outlived_s < 60 and n_steps == 16
    error, = errors(done)
    assert error.startswith("error: another process is gone or silent")
    assert done.stderr.count("Traceback") == 1  # torchrun's own


@pytest.mark.parametrize("name", ["stopped", "sharded_stopped", "restarted", "two_hosts",
                                  "lost_link"])
def test_a_job_that_is_stopped_or_restarted_ends_bit_for_bit_like_an_uninterrupted_one(
        name, scenarios, launcher):
    uninterrupted = "sharded" if "sharded" in name else "by_two"
    scenarios[uninterrupted].result(), scenarios[name].result()
    assert differences(launcher.folder / name, launcher.folder / uninterrupted) == []


def test_a_job_whose_rank_0_is_killed_restarts_once(scenarios):
    assert scenarios["restarted"].result().stdout.count("settings:") == 2


def test_a_job_on_two_hosts_restarts_once_when_a_process_dies_on_one(scenarios):
    ends = scenarios["two_hosts"].result()
    assert [done.returncode for done in ends] == [0, 0], ends
    assert sum(len(errors(done)) for done in ends) == 1  # of the process that was left
    assert sum(done.stdout.count("settings:") for done in ends) == 2


def test_a_job_on_two_hosts_whose_link_fails_for_a_while_says_so_and_resumes(scenarios):
    ends = scenarios["lost_link"].result()
    assert [done.returncode for done in ends] == [0, 0], ends
    said = [line for done in ends for line in errors(done)]
    assert said and all("another process is gone or silent" in line for line in said)


def test_a_silent_process_ends_the_others_after_collective_timeout(scenarios):
    error, = errors(scenarios["silent"].result())
    assert re.fullmatch(
        r"error: another process is gone or silent \(.*\): see its own message; with torchrun "
        r"--max-restarts=N and --init_from=auto the run resumes by itself", error)


def test_late_threads_of_gloo_do_not_abort_a_process_at_its_end(scenarios):
    assert scenarios["by_two"].result().stderr == ""
