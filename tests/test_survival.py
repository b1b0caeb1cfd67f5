"""Runs that are killed, stopped, short of disk or memory, or not finite: what is left, and how they
resume.

Faults are injected from outside: a sitecustomize.py on PYTHONPATH runs the code in $FAULT after
every forward pass, of training and of evaluation, so that it acts at exactly the step it names.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, differences, forked, load, records, run, snapshot, unequal

from configurator import UserError
from data.encode import write_text_dataset
from data.tokenizer import CharTokenizer

RUN = [*TINY, "--dropout=0.1", "--max_iters=24", "--lr_decay_iters=24", "--eval_interval=8",
       "--keep_every=4", "--init_from=auto"]
LONG = ["--max_iters=1000", "--eval_interval=1000", "--keep_every=0"]  # saves nothing for long
DIVERGING = [*LONG, "--decay_lr=False", "--learning_rate=1e38"]
SITECUSTOMIZE = """
import glob, math, os, resource, shutil, signal, sys, time
import torch

def inject_fault(module, args, output):
    if not type(module).__name__.endswith("GPT"):  # also if it is sharded
        return None
    run = sys.modules["__main__"]
    started = hasattr(run, "metrics")  # else this is the first pass, before the folder is touched
    scope = globals() | {"loss": output[1], "run": run, "step": run.iter_num if started else -1,
                         "training": started and torch.is_grad_enabled()}
    exec(os.environ["FAULT"], scope)
    return output[0], scope["loss"]


torch.nn.modules.module.register_module_forward_hook(inject_fault)
"""


@pytest.fixture(scope="module")
def train(text_dataset, tmp_path_factory) -> Callable[..., subprocess.CompletedProcess]:
    """Runs train.py: train(out_dir, *settings, fault=code, status=0); with a launcher, not forked.

    Checks its exit status, and that stderr has one line at most.
    """
    modules = tmp_path_factory.mktemp("modules")
    (modules / "sitecustomize.py").write_text(SITECUSTOMIZE)

    def start(out_dir: Path, *args: str, fault: str = "", status: int = 0,
              launcher: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess:
        if fault:
            environment |= {"PYTHONPATH": str(modules), "FAULT": fault}
        args = [str(ROOT / "train.py"), *RUN, f"--dataset={text_dataset}", f"--out_dir={out_dir}",
                *args]
        done = run(*launcher, *args, **environment) if launcher else forked(args, ROOT, environment)
        assert done.returncode == status, done.stderr
        assert launcher or re.fullmatch("(\nstopping .*\n)?(error: .*\n)?", done.stderr)
        return done
    return start


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory) -> Path:
    """A run without faults."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(folder)
    return folder


def state(path: Path) -> list[dict]:
    """Weights and optimizer state of a checkpoint."""
    return [load(path)["model"], load(path)["optimizer"]["state"]]


def steps_without_effect(folder: Path, n: int) -> list[int]:
    """The steps from 1 to n - 1 after which a run with keep_every=1 had the state of before."""
    states = [state(folder / f"ckpt_{i:08d}.pt") for i in range(1, n + 1)]
    return [i for i in range(1, n) if not unequal(states[i - 1], states[i])]


def saved_steps(folder: Path) -> dict[str, int]:
    """The steps done in each checkpoint; all must be readable, with finite weights."""
    found = {path.name: load(path) for path in folder.glob("*.pt")}
    assert all(t.isfinite().all() for saved in found.values() for t in saved["model"].values())
    return {name: saved["iter_num"] for name, saved in found.items()}


def copy(folder: Path, to: Path) -> Path:
    """Copy the files of a run to another folder."""
    return shutil.copytree(folder, to, dirs_exist_ok=True)


# ------------------------------------------------------------------------------------------- stops

# Where a run is stopped, one time after the other, and by what; the steps that are done then, and
# the line of the run's script that was being executed.
STOPS = [("not training and step == 0", signal.SIGTERM, 0, "in evaluate"),
         ("training and step == 5 and run.micro_step == 0", signal.SIGINT, 5,
          "in forward_backward"),
         ("not training and step == 8", signal.SIGTERM, 8, "in evaluate"),
         ("saving and run.iter_num == 12", signal.SIGTERM, 12, "in save"),
         ("training and step == 18 and run.micro_step == 1", signal.SIGHUP, 19,
          "in forward_backward")]
STOP_WHERE = """
import torch, traceback

def stop(saving):
    if {where} and not run.stop_signals.received:
        print("signal sent", *(f"in {{f.name}}" for f in traceback.extract_stack()), flush=True)
        os.kill(os.getpid(), {number:d})

def save_and_stop(contents, file, save=torch.save):
    save(contents, file)
    assert os.path.exists(file.name) and file.name.endswith(".tmp")
    stop(saving=True)

if torch.save.__name__ == "save":
    torch.save = save_and_stop
stop(saving=False)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_stopped_anywhere_ends_bit_for_bit_like_an_uninterrupted_one(
        dtype, train, tmp_path):
    stopped, expected = tmp_path / "stopped", tmp_path / "whole"
    train(expected, f"--dtype={dtype}")
    for where, number, n_steps, place in STOPS:
        done = train(stopped, f"--dtype={dtype}", status=128 + number,
                     fault=STOP_WHERE.format(where=where, number=number))
        assert "error" not in done.stderr
        assert f" {place} " in re.search("signal sent.*", done.stdout)[0]
        assert f"stopped by signal {number:d} after {n_steps} steps" in done.stdout
        assert saved_steps(stopped)["ckpt.pt"] == n_steps
        evaluated = [record["iter"] for record in records(stopped, "val_loss")]
        assert evaluated == list(range(0, n_steps, 8))  # one that was interrupted is not recorded
    train(stopped, f"--dtype={dtype}")
    assert differences(stopped, expected) == []


def test_a_second_ctrl_c_ends_a_run_in_the_middle_of_a_step(train, tmp_path):
    done = train(tmp_path, status=130, fault="""
if training and step == 5:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)
    print("the micro-batch continues", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
    print("not reached", flush=True)
""")
    assert done.stderr == ("\nstopping after this micro-batch, then saving; again to stop at once\n"
                           "error: stopped by Ctrl-C\n")
    assert done.stdout.endswith("\nthe micro-batch continues\n")
    assert saved_steps(tmp_path) == {"ckpt_00000004.pt": 4}
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("signaled", [True, False])
def test_a_run_whose_terminal_is_closed_saves_and_ends_with_status_129(
        signaled, text_dataset, tmp_path):
    terminal, its_end = os.openpty()
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *RUN, *LONG, f"--dataset={text_dataset}",
         f"--out_dir={tmp_path}"], stdin=its_end, stdout=its_end, stderr=its_end,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
    os.close(its_end)
    shown = ""
    while "iter 2:" not in shown:
        shown += os.read(terminal, 65536).decode()
    os.close(terminal)
    if not signaled:
        time.sleep(1)  # the run prints to a terminal that is gone
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 129
    assert saved_steps(tmp_path)["ckpt.pt"] >= 2


def test_a_hangup_does_not_stop_a_run_under_nohup(train, tmp_path):
    done = train(tmp_path, fault="if training and step == 5: os.kill(os.getpid(), signal.SIGHUP)",
                 launcher=("-c", "import runpy, signal, sys; sys.argv = sys.argv[1:]; "
                           "signal.signal(signal.SIGHUP, signal.SIG_IGN); "
                           "runpy.run_path(sys.argv[0], run_name='__main__')"))
    assert "24 steps done" in done.stdout


# -------------------------------------------------------------------------------- kills, full disks

KILL_IN_A_WRITE = """
if step == 9:
    save = torch.save

    def save_half(contents, file):
        save(contents, file)
        file.flush()
        os.ftruncate(file.fileno(), 40000)
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save_half
"""
LIMIT = "if step {when}: resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"


@pytest.mark.parametrize("fault, status, error, left", [
    (KILL_IN_A_WRITE, -signal.SIGKILL, "", ["ckpt_00000012"]),
    (LIMIT.format(when="== 9", limit=40000), 2, "ckpt_00000012.pt: File too large", [])],
    ids=["killed", "refused"])
def test_a_write_killed_or_refused_spoils_no_checkpoint_and_the_next_start_resumes(
        fault, status, error, left, train, whole, tmp_path):
    assert error in train(tmp_path, fault=fault, status=status).stderr
    assert [path.name.split(".pt.")[0] for path in tmp_path.glob("*.tmp")] == left
    assert saved_steps(tmp_path) == {"ckpt.pt": 8, "best.pt": 8, "ckpt_00000004.pt": 4,
                                     "ckpt_00000008.pt": 8}
    done = train(tmp_path, fault="if step == 8: print('left', glob.glob(run.out_dir + '/*.tmp'))")
    assert "left []" in done.stdout  # before anything could be written over it
    assert differences(tmp_path, whole) == []


# Writing the three checkpoints of step 8 takes long. So that of step 12 is written in the
# background, until step 15.
SLOW_WRITES = """
if training and step == 5 and torch.save.__name__ == "save":
    save = torch.save

    def save_slowly(contents, file):
        save(contents, file)
        time.sleep(0.5)
        while run.iter_num in range(12, 15):
            time.sleep(0.01)

    torch.save = save_slowly
    run.saver.write_s = 0.0  # so that training waits for the checkpoints of step 8
"""
DURING_A_WRITE = """
if training and step == 14:
    assert not run.saver.pending.done()
"""


def test_a_slow_write_continues_in_the_background_and_changes_nothing(train, whole, tmp_path):
    train(tmp_path, fault=SLOW_WRITES + DURING_A_WRITE)
    assert differences(tmp_path, whole) == []


def test_a_run_killed_during_a_background_write_loses_only_that_checkpoint(
        train, whole, tmp_path):
    fault = SLOW_WRITES + DURING_A_WRITE + "    os.kill(os.getpid(), signal.SIGKILL)"
    train(tmp_path, fault=fault, status=-signal.SIGKILL)
    assert saved_steps(tmp_path) == {"ckpt.pt": 8, "best.pt": 8, "ckpt_00000004.pt": 4,
                                     "ckpt_00000008.pt": 8}
    train(tmp_path)
    assert differences(tmp_path, whole) == []


def test_a_disk_that_refuses_a_background_write_ends_the_run_in_a_sentence(
        train, whole, tmp_path):
    fault = SLOW_WRITES + LIMIT.format(when="== 11", limit=40000)
    fault += "\nif training and step == 12: print('training continues')"
    done = train(tmp_path, fault=fault, status=2)
    assert "training continues" in done.stdout
    assert re.fullmatch("error: .*ckpt_00000012.pt: File too large.*\n", done.stderr)
    assert "ckpt_00000012.pt" not in saved_steps(tmp_path)
    train(tmp_path)
    assert differences(tmp_path, whole) == []


def test_kills_at_random_instants_lose_nothing():
    done = subprocess.run(
        [sys.executable, ROOT / "tests/torture.py", "--kills=4"], text=True, timeout=400,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    figures = dict(re.findall(r"^(.*): (\d+)$", done.stdout, re.MULTILINE))
    assert int(figures.pop("kills inside a write")) >= 1
    assert figures == {"kills": "4", "lost": "0", "differences": "0"}


def test_a_disk_that_refuses_the_log_ends_the_run_in_a_sentence(train, whole, tmp_path):
    size = (copy(whole, tmp_path) / "metrics.jsonl").stat().st_size
    fault = LIMIT.format(when=">= 24", limit=size + 999)
    assert "metrics.jsonl" in train(tmp_path, *LONG, fault=fault, status=2).stderr
    assert saved_steps(tmp_path) == saved_steps(whole)


def test_a_full_disk_under_stdout_ends_the_run_in_a_sentence(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, ROOT / "train.py", *RUN, f"--out_dir={tmp_path}"],
                              stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert re.fullmatch("error: cannot read or write the output: No space .*\n", done.stderr)


def test_a_disk_too_small_for_the_checkpoints_to_come_is_refused_before_the_first_step(
        train, tmp_path):
    free = "lambda path: shutil._ntuple_diskusage(10**9, 0, 20 * 10**6)"
    error = train(tmp_path / "run", "--n_embd=128", status=2,
                  fault=f"if step == -1: shutil.disk_usage = {free}").stderr
    n_params = 2 * 12 * 128**2 + (14 + 16) * 128 + 5 * 128  # of the layers, embeddings and norms
    found = re.search(r"(\d+) checkpoints.* take about ([\d.]+) MB, .* has 20.0 MB free", error)
    assert str(tmp_path / "run") in error
    assert int(found[1]) == 6 + 3  # numbered ones, ckpt.pt, best.pt and one that is being written
    assert float(found[2]) == pytest.approx(9 * (12 * n_params + 2**20) / 1e6, abs=0.5)
    assert not list(tmp_path.iterdir())


# From the n-th time on, fsync of a file fails.
FAILING_FSYNC = """
import os

def fsync(number, calls=[], fsync=os.fsync):
    calls += ["{name}"] * ("{name}" in os.readlink(f"/proc/self/fd/{{number}}"))
    if len(calls) >= {n}:
        raise OSError(5, "Input/output error")
    fsync(number)

os.fsync = fsync
"""
NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")


@NEEDS_PROC
@pytest.mark.parametrize("name, n", [
    ("ckpt.pt.", 2), ("metrics.jsonl", 4)], ids=["checkpoint", "log"])
def test_a_disk_that_fails_at_the_last_moment_leaves_the_checkpoints_that_were_written(
        name, n, train, whole, tmp_path):
    fault = "if step == -1: exec(" + repr(FAILING_FSYNC.format(name=name, n=n)) + ", {})"
    done = train(tmp_path, fault=fault, status=2)
    assert re.fullmatch(r"error: .*Input/output error.*\n", done.stderr), done.stderr
    assert saved_steps(tmp_path) == {"ckpt.pt": 8, "best.pt": 16 if name == "ckpt.pt." else 8,
                                     **{f"ckpt_{i:08d}.pt": i for i in (4, 8, 12)}}
    assert not list(tmp_path.glob("*.tmp"))
    train(tmp_path)
    assert differences(tmp_path, whole) == []


@NEEDS_PROC
@pytest.mark.parametrize("name", ["train.bin", "val.bin", "dataset.json", "meta.pkl"])
def test_a_dataset_stays_as_it_was_if_the_disk_fails_at_the_last_moment(
        name, text_dataset, monkeypatch, tmp_path):
    before = snapshot(copy(text_dataset, tmp_path))
    monkeypatch.setattr(os, "fsync", os.fsync)  # undoes the following
    exec(FAILING_FSYNC.format(name=f"/{name}.", n=1), {})
    with pytest.raises(UserError, match="cannot write .*: Input/output error"):
        write_text_dataset(tmp_path, "other letters", CharTokenizer.meta_of("other letters"))
    assert snapshot(tmp_path) == before


# What torch raised for a batch of 10 GB.
OUT_OF_MEMORY = """
if step == -1:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't "
                       "allocate memory: you tried to allocate 10737418240 bytes.")
"""


@pytest.mark.parametrize("args, fault, environment, words", [
    ([], OUT_OF_MEMORY, {}, "choose smaller sizes, such as batch_size"),
    (["--wandb_log=True"], "", {"WANDB_MODE": "online"}, "run `wandb login`")])
def test_a_start_that_fails_late_moves_nothing_and_makes_no_folder(
        args, fault, environment, words, train, whole, tmp_path):
    earlier, before = copy(whole, tmp_path / "earlier"), snapshot(tmp_path)
    for folder in (earlier, tmp_path / "new"):
        done = train(folder, "--init_from=scratch", *args, fault=fault, status=2,
                     HOME=str(tmp_path), WANDB_API_KEY="", **environment)
        assert words in done.stderr
        assert snapshot(tmp_path) == before
        assert [path.name for path in tmp_path.iterdir()] == ["earlier"]


# ------------------------------------------------------------------------------------ one out_dir

def test_a_new_run_moves_the_earlier_one_to_previous(skipped, whole):
    folder, _ = skipped
    for path in [*whole.glob("*.pt"), whole / "metrics.jsonl"]:
        assert (folder / "previous-1" / path.name).read_bytes() == path.read_bytes()
    assert not (folder / "ckpt_00000024.pt").exists()
    assert [record["iter"] for record in records(folder, "val_loss")] == [0, 8, 12]


def test_a_second_run_in_one_out_dir_is_refused_but_for_an_evaluation_and_touches_nothing(
        train, whole, text_dataset, tmp_path):
    copy(whole, tmp_path)
    with subprocess.Popen([sys.executable, ROOT / "train.py", *RUN, f"--dataset={text_dataset}",
                           f"--out_dir={tmp_path}", *LONG], stdout=subprocess.PIPE,
                          text=True) as process:
        try:
            next(line for line in process.stdout if "iter 25:" in line)
            process.send_signal(signal.SIGSTOP)
            before = snapshot(tmp_path)
            for start in ("scratch", "resume", "auto"):
                error = train(tmp_path, f"--init_from={start}", status=2).stderr
                assert f"{tmp_path} is in use by another process" in error
            assert "step 24: " in train(tmp_path, "--eval_only=True").stdout
            assert snapshot(tmp_path) == before
        finally:
            process.kill()


# ---------------------------------------------------------------------- numbers that are not finite

BAD_STEPS = """
if training and step == 5 and run.micro_step == 1:
    loss = loss + math.nan  # the loss alone: its gradient stays finite
if training and step == 8 and run.micro_step == 0:
    loss.register_hook(lambda gradient: gradient * 1e30)  # whose norm is beyond float32
"""


@pytest.fixture(scope="module")
def skipped(train, whole, tmp_path_factory) -> tuple[Path, str]:
    """A new run in a used folder with two bad steps, which saves each step; and its output."""
    folder = copy(whole, tmp_path_factory.mktemp("skipped") / "run")
    done = train(folder, "--init_from=scratch", "--keep_every=1", "--max_iters=12",
                 "--log_interval=5", fault=BAD_STEPS)
    return folder, done.stdout


def test_a_bad_step_changes_no_weights_and_no_optimizer_state_and_is_printed(skipped):
    folder, printed = skipped
    assert steps_without_effect(folder, 12) == [5, 8]
    saved = {i: load(folder / f"ckpt_{i:08d}.pt")["bad_steps"] for i in (5, 6, 7, 9)}
    assert saved == {5: 0, 6: 1, 7: 0, 9: 1}
    lines = re.findall(r"iter (\d+): STEP SKIPPED \(1 in a row\): loss (.*), gradient norm (.*)",
                       printed)
    (five, loss, norm), (eight, finite_loss, infinite_norm) = lines
    assert (five, loss, eight, infinite_norm) == ("5", "nan", "8", "inf")
    assert float(norm) < 10 and float(finite_loss) < 10
    logged = {record["iter"]: record["loss"] for record in records(folder, "loss")}
    assert logged[5] is None  # JSON has no nan


def test_bad_steps_in_a_row_are_counted_on_after_a_stop(train, tmp_path):
    fault = "if training and step >= 5: loss = loss * math.nan"
    train(tmp_path, fault=f"{fault}\nif training and step == 6: os.kill(os.getpid(), 15)",
          status=143)
    assert saved_steps(tmp_path) == {"ckpt.pt": 6, "ckpt_00000004.pt": 4}
    error = train(tmp_path, "--max_bad_steps=3", fault=fault, status=1).stderr
    assert "3 consecutive steps, up to step 7, had a loss or gradient" in error
    assert saved_steps(tmp_path)["ckpt.pt"] == 6


STOP = "if step == {}: os.kill(os.getpid(), signal.SIGTERM)"


@pytest.mark.parametrize("args, fault, words", [
    (["--max_bad_steps=3"], "", "3 consecutive steps, up to step 27,"),
    (["--keep_every=2"], "", "weights after 26 steps"),  # finite, but not the loss
    ([], STOP.format(26), "weights after 26 steps"),
    (["--learning_rate=1e39"], STOP.format(25), "weights after 25 steps")])
def test_a_run_that_diverges_ends_with_advice_and_saves_nothing(
        args, fault, words, train, whole, tmp_path):
    copy(whole, tmp_path)
    error = train(tmp_path, *DIVERGING, *args, fault=fault, status=1).stderr
    assert words in error
    assert f"resume from {tmp_path}/ckpt.pt (step 24) by --init_from=resume" in error
    assert "a lower --learning_rate than 1e+3" in error
    assert saved_steps(tmp_path) == saved_steps(whole)
    assert (tmp_path / "ckpt.pt").read_bytes() == (whole / "ckpt.pt").read_bytes()


def test_a_validation_loss_that_is_not_finite_ends_the_run_and_nothing_is_saved(train, tmp_path):
    error = train(tmp_path, "--learning_rate=1e30", "--grad_clip=0", "--decay_lr=False",
                  "--keep_every=0", "--eval_interval=4", status=1).stderr
    assert "validation loss after 4 steps is nan" in error
    assert "start again with --grad_clip=1.0" in error
    assert not list(tmp_path.glob("*.pt"))
    assert records(tmp_path)[-1]["val_loss"] is None


ONE_RANK = """
if training and run.rt.rank == 1 and step in (3, 6, 7):
    loss = loss + math.nan
if training and step == 5 and not run.shard:
    torch.save(run.model.state_dict(), f"{run.out_dir}/rank{run.rt.rank}.weights")
"""


@pytest.mark.parametrize("shard", [False, True])
def test_a_loss_that_is_not_finite_in_one_process_is_skipped_by_all(train, tmp_path, shard):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = train(tmp_path, "--keep_every=1", "--max_bad_steps=2", f"--shard={shard}",
                 fault=ONE_RANK, status=1, launcher=launcher)
    assert "error: 2 consecutive steps, up to step 7," in done.stderr
    assert steps_without_effect(tmp_path, 7) == [3, 6]
    if not shard:
        ranks = [torch.load(tmp_path / f"rank{rank}.weights") for rank in (0, 1)]
        assert unequal(*ranks) == []
        assert unequal(ranks[0], load(tmp_path / "ckpt_00000005.pt")["model"]) == []
