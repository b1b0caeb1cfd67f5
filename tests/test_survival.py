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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, differences, forked, load, records, run, snapshot, unequal

RUN = [*TINY, "--dropout=0.1", "--max_iters=24", "--lr_decay_iters=24", "--eval_interval=8",
       "--keep_every=4", "--init_from=auto"]
LONG = ["--max_iters=1000", "--eval_interval=1000", "--keep_every=0"]  # saves nothing for long
DIVERGING = [*LONG, "--decay_lr=False", "--learning_rate=1e38"]
SITECUSTOMIZE = """
import glob, math, os, resource, shutil, signal, sys
import torch

def inject_fault(module, args, output):
    if type(module).__name__ != "GPT":
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
    """Runs train.py: train(out_dir, *settings, fault=code); with a launcher, not forked."""
    modules = tmp_path_factory.mktemp("modules")
    (modules / "sitecustomize.py").write_text(SITECUSTOMIZE)

    def start(out_dir: Path, *args: str, fault: str = "", launcher: tuple[str, ...] = (),
              **environment: str) -> subprocess.CompletedProcess:
        if fault:
            environment |= {"PYTHONPATH": str(modules), "FAULT": fault}
        args = [str(ROOT / "train.py"), *RUN, f"--dataset={text_dataset}", f"--out_dir={out_dir}",
                *args]
        return run(*launcher, *args, **environment) if launcher else forked(args, ROOT, environment)
    return start


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory) -> Path:
    """A run without faults."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = train(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """small_disk("2m"): a disk of that size."""
    folder = tmp_path / "disk"

    def mount(size: str) -> Path:
        folder.mkdir()
        if os.geteuid() or subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]).returncode:
            pytest.skip("cannot mount a disk: needs root")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", folder], check=True)


def step_record(folder: Path, i: int) -> dict:
    record, = (record for record in records(folder, "loss") if record["iter"] == i)
    return record


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


def error_of(done: subprocess.CompletedProcess, status: int) -> str:
    """The one line on stderr of a run that failed."""
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def copy(folder: Path, to: Path, *names: str) -> Path:
    """Copy some files of a run, or all, to another folder."""
    to.mkdir(parents=True, exist_ok=True)
    for name in names or [path.name for path in folder.iterdir()]:
        shutil.copy(folder / name, to)
    return to


# ------------------------------------------------------------------------------------------- stops

# Where a run is stopped, one time after the other, and by what; the steps that are done then.
STOPS = {
    "float32": [("not training and step == 0", signal.SIGTERM, 0),
                ("training and step == 5 and run.micro_step == 0", signal.SIGINT, 6),
                ("not training and step == 8", signal.SIGINT, 8)],
    "bfloat16": [("training and step == 18 and run.micro_step == 1", signal.SIGTERM, 19)],
}


@pytest.mark.parametrize("dtype", STOPS)
def test_a_run_stopped_anywhere_ends_bit_for_bit_like_an_uninterrupted_one(
        dtype, train, whole, tmp_path):
    stopped, expected = tmp_path / "stopped", whole
    if dtype != "float32":
        expected = tmp_path / "whole"
        assert train(expected, f"--dtype={dtype}").returncode == 0
        assert unequal(state(expected / "ckpt.pt"), state(whole / "ckpt.pt"))
    for where, number, n_steps in STOPS[dtype]:
        done = train(stopped, f"--dtype={dtype}",
                     fault=f"if {where} and not run.stop_signals.received: "
                           f"os.kill(os.getpid(), {number:d})")
        assert done.returncode == 128 + number, done.stderr
        assert done.stderr == ""
        assert f"stopped by signal {number:d} after {n_steps} steps" in done.stdout
        assert saved_steps(stopped)["ckpt.pt"] == n_steps
        evaluated = [record["iter"] for record in records(stopped, "val_loss")]
        assert evaluated == list(range(0, n_steps, 8))  # one that was interrupted is not recorded
    assert train(stopped, f"--dtype={dtype}").returncode == 0
    assert differences(stopped, expected) == []


def test_a_second_ctrl_c_ends_a_run_in_the_middle_of_a_step(train, tmp_path):
    done = train(tmp_path, fault="""
if training and step == 5:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    print("not reached", flush=True)
""")
    assert error_of(done, status=130) == "error: stopped by Ctrl-C\n"
    assert "not reached" not in done.stdout
    assert saved_steps(tmp_path) == {"ckpt_00000004.pt": 4}
    assert not list(tmp_path.glob("*.tmp"))


# ------------------------------------------------------------------------------------------- kills

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


def test_a_kill_inside_a_write_leaves_the_last_checkpoints_and_the_next_start_resumes(
        train, whole, tmp_path):
    assert train(tmp_path, fault=KILL_IN_A_WRITE).returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.glob("*.tmp")] == ["ckpt_00000012.pt.tmp"]
    assert saved_steps(tmp_path) == {"ckpt.pt": 8, "best.pt": 8, "ckpt_00000004.pt": 4,
                                     "ckpt_00000008.pt": 8}
    done = train(tmp_path, fault="if step == 8: print('left', glob.glob(run.out_dir + '/*.tmp'))")
    assert done.returncode == 0, done.stderr
    assert "left []" in done.stdout  # before anything could be written over it
    assert differences(tmp_path, whole) == []


def test_kills_at_random_instants_lose_nothing():
    done = subprocess.run(
        [sys.executable, ROOT / "tests/torture.py", "--kills=4"], text=True, timeout=400,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    figures = dict(re.findall(r"^(.*): (\d+)$", done.stdout, re.MULTILINE))
    assert int(figures.pop("kills inside a write")) >= 1
    assert figures == {"kills": "4", "checkpoints lost": "0", "differences": "0"}


# -------------------------------------------------------------------------------------- full disks

FILL = """
if step == 9 and not os.path.exists("{disk}/ballast"):
    free = shutil.disk_usage("{disk}").free
    os.posix_fallocate(os.open("{disk}/ballast", os.O_CREAT | os.O_WRONLY), 0, free - 40960)
"""
LIMIT = "if step {when}: resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"


@pytest.mark.parametrize("kind", ["full", "limited"])
def test_a_disk_that_refuses_a_checkpoint_spoils_no_other_and_with_space_the_run_resumes(
        kind, train, whole, tmp_path, small_disk):
    disk = small_disk("16m") if kind == "full" else tmp_path
    fault = (FILL.format(disk=disk) if kind == "full" else
             LIMIT.format(when="== 9", limit=40000))
    error = error_of(train(disk / "run", fault=fault), status=2)
    assert "ckpt_00000012.pt" in error
    assert ("No space left" if kind == "full" else "File too large") in error
    assert saved_steps(disk / "run") == {"ckpt.pt": 8, "best.pt": 8, "ckpt_00000004.pt": 4,
                                         "ckpt_00000008.pt": 8}
    (disk / "ballast").unlink(missing_ok=True)
    done = train(disk / "run", "--init_from=resume")
    assert done.returncode == 0, done.stderr
    assert not list((disk / "run").glob("*.tmp"))
    assert differences(disk / "run", whole) == []


def test_a_disk_that_refuses_the_log_ends_the_run_in_a_sentence(train, whole, tmp_path):
    size = len((copy(whole, tmp_path) / "metrics.jsonl").read_bytes())
    fault = LIMIT.format(when=">= 24", limit=size + 999)
    done = train(tmp_path, *LONG, fault=fault, launcher=("-u",))  # stdout is no file
    assert "metrics.jsonl" in error_of(done, status=2)
    assert saved_steps(tmp_path) == saved_steps(whole)


def test_a_full_disk_under_stdout_ends_the_run_in_a_sentence(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, ROOT / "train.py", *RUN, f"--out_dir={tmp_path}"],
                              stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert "full" in error_of(done, status=2)


def test_a_disk_too_small_for_the_checkpoints_to_come_is_refused_before_the_first_step(
        train, small_disk):
    disk = small_disk("20m")
    error = error_of(train(disk / "run", "--n_embd=128"), status=2)
    n_params = 2 * 12 * 128**2 + (14 + 16) * 128 + 5 * 128  # of the layers, embeddings and norms
    found = re.search(r"needs ([\d.]+) MB for (\d+) checkpoints .* has ([\d.]+) MB free", error)
    assert str(disk / "run") in error
    assert int(found[2]) == 6 + 3  # numbered ones, ckpt.pt, best.pt and one that is being written
    assert float(found[1]) == pytest.approx(9 * (12 * n_params + 2**20) / 1e6, abs=0.5)
    assert float(found[3]) == pytest.approx(20 * 2**20 / 1e6, abs=0.5)
    assert not list(disk.iterdir())


@pytest.mark.parametrize("space", [450_000, 530_000])  # for a part of train.bin, and of val.bin
def test_a_disk_that_fills_up_leaves_the_earlier_text_dataset_whole(space, tmp_path, small_disk):
    disk = small_disk("2m")
    for path in ("configurator.py", "data/bins.py", "data/tokenizer.py",
                 "data/shakespeare_char/prepare.py"):
        (disk / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, disk / path)
    folder = disk / "data/shakespeare_char"
    (folder / "input.txt").write_text("some words " * 100)
    assert run(folder / "prepare.py", PYTHONDONTWRITEBYTECODE="1").returncode == 0
    (folder / "input.txt").write_text("other letters " * 20_000)  # 504 kB of ids, and 56 kB
    before = snapshot(folder)
    with open(disk / "ballast", "wb") as ballast:
        os.posix_fallocate(ballast.fileno(), 0, shutil.disk_usage(disk).free - space)
    done = run(folder / "prepare.py", PYTHONDONTWRITEBYTECODE="1")
    assert "No space left" in error_of(done, status=2)
    assert snapshot(folder) == before


# ---------------------------------------------------------------------- starts that fail at the end

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
        done = train(folder, "--init_from=scratch", *args, fault=fault, HOME=str(tmp_path),
                     WANDB_API_KEY="", **environment)
        assert words in error_of(done, status=2)
        assert snapshot(tmp_path) == before
        assert [path.name for path in tmp_path.iterdir()] == ["earlier"]


# -------------------------------------------------------------------------------------- keep_every

def test_numbered_checkpoints_are_saved_at_exactly_the_multiples_of_keep_every(whole):
    numbered = {f"ckpt_{i:08d}.pt": i for i in (4, 8, 12, 16, 20, 24)}
    assert saved_steps(whole).items() - numbered.items() == {("ckpt.pt", 24), ("best.pt", 24)}


def test_a_run_resumes_from_a_numbered_checkpoint_where_there_is_no_other(train, whole, tmp_path):
    copy(whole, tmp_path, "metrics.jsonl", *(f"ckpt_{i:08d}.pt" for i in (4, 8, 12)))
    done = train(tmp_path, "--init_from=resume")
    assert done.returncode == 0, done.stderr
    assert "iter 12:" in done.stdout and "iter 11:" not in done.stdout
    assert differences(tmp_path, whole) == []


def test_a_numbered_checkpoint_can_be_sampled_from(whole, tmp_path):
    name = "ckpt_00000004.pt"
    copy(whole, tmp_path, name)
    done = run(ROOT / "sample.py", f"--out_dir={tmp_path}", f"--checkpoint={name}", "--start=to be",
               "--num_samples=1", "--max_new_tokens=5", "--device=cpu")
    assert done.returncode == 0, done.stderr
    assert "to be" in done.stdout


def test_a_new_run_moves_numbered_checkpoints_to_previous(skipped, whole):
    folder, _ = skipped
    for i in (4, 24):
        name = f"ckpt_{i:08d}.pt"
        assert (folder / "previous-1" / name).read_bytes() == (whole / name).read_bytes()
    assert not (folder / "ckpt_00000024.pt").exists()


# -------------------------------------------------------------------------------------------- lock

@pytest.fixture(scope="module")
def in_use(whole, text_dataset, tmp_path_factory) -> Iterator[Path]:
    """The folder of a running process, which is suspended."""
    folder = copy(whole, tmp_path_factory.mktemp("lock") / "run")
    with subprocess.Popen([sys.executable, ROOT / "train.py", *RUN, f"--dataset={text_dataset}",
                           f"--out_dir={folder}", *LONG], stdout=subprocess.PIPE,
                          text=True) as process:
        for line in process.stdout:
            if line.startswith("iter 25:"):
                break
        process.send_signal(signal.SIGSTOP)
        yield folder
        process.kill()


def test_a_second_run_in_one_out_dir_is_refused_and_touches_nothing(in_use, train):
    before = snapshot(in_use)
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(lambda start: train(in_use, f"--init_from={start}"),
                             ["scratch", "resume", "auto"]):
            assert re.search(r"in use by another run \(process \d+ on .*\)", error_of(done, 2))
            assert str(in_use) in done.stderr
    assert snapshot(in_use) == before


def test_a_run_under_way_can_be_evaluated(in_use, train):
    before = snapshot(in_use)
    done = train(in_use, "--eval_only=True")
    assert done.returncode == 0, done.stderr
    assert "step 24: " in done.stdout
    assert snapshot(in_use) == before


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
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_bad_step_leaves_weights_and_optimizer_as_they_were_and_the_run_continues(skipped):
    assert steps_without_effect(skipped[0], 12) == [5, 8]
    saved = {i: load(skipped[0] / f"ckpt_{i:08d}.pt")["bad_steps"] for i in (5, 6, 7, 9)}
    assert saved == {5: 0, 6: 1, 7: 0, 9: 1}


def test_every_bad_step_is_printed_and_its_record_is_json(skipped):
    folder, printed = skipped
    lines = re.findall(r"iter (\d+): STEP SKIPPED \(1 in a row\): loss (.*), gradient norm (.*)",
                       printed)
    (five, loss, norm), (eight, finite_loss, infinite_norm) = lines
    assert (five, loss, eight, infinite_norm) == ("5", "nan", "8", "inf")
    assert float(norm) < 10 and float(finite_loss) < 10
    assert step_record(folder, 5)["loss"] is None


def test_after_a_bad_step_the_run_is_the_one_without_its_update(skipped, train, tmp_path):
    torch.save(load(skipped[0] / "ckpt_00000005.pt") | {"iter_num": 6}, tmp_path / "ckpt.pt")
    done = train(tmp_path, "--keep_every=1", "--max_iters=8")
    assert done.returncode == 0, done.stderr
    for i in (7, 8):
        name = f"ckpt_{i:08d}.pt"
        assert unequal(state(tmp_path / name), state(skipped[0] / name)) == []


def test_bad_steps_in_a_row_are_counted_on_after_a_stop(train, tmp_path):
    fault = "if training and step >= 5: loss = loss * math.nan"
    done = train(tmp_path, fault=f"{fault}\nif training and step == 6: os.kill(os.getpid(), 15)")
    assert done.returncode == 143, done.stderr
    assert saved_steps(tmp_path) == {"ckpt.pt": 7, "ckpt_00000004.pt": 4}
    error = error_of(train(tmp_path, "--max_bad_steps=3", fault=fault), status=1)
    assert "3 consecutive steps, up to step 7, had a loss or gradient" in error
    assert saved_steps(tmp_path)["ckpt.pt"] == 7


def test_a_run_that_diverges_ends_after_max_bad_steps_and_keeps_the_last_finite_checkpoint(
        train, whole, tmp_path):
    before = saved_steps(copy(whole, tmp_path))
    error = error_of(train(tmp_path, *DIVERGING, "--max_bad_steps=3"), status=1)
    assert "3 consecutive steps, up to step 27," in error
    assert f"resume from {tmp_path}/ckpt.pt (step 24) by --init_from=resume" in error
    assert "a lower --learning_rate than 1e+38" in error
    assert saved_steps(tmp_path) == before
    assert unequal(state(tmp_path / "ckpt.pt"), state(whole / "ckpt.pt")) == []


def test_weights_without_a_finite_loss_reach_no_numbered_checkpoint(train, whole, tmp_path):
    before = saved_steps(copy(whole, tmp_path))
    error = error_of(train(tmp_path, *DIVERGING, "--keep_every=2"), status=1)
    assert "weights after 26 steps" in error and f"resume from {tmp_path}/ckpt.pt" in error
    assert saved_steps(tmp_path) == before


@pytest.mark.parametrize("learning_rate, step, words", [
    ("1e38", 26, "weights after 27 steps"), ("1e39", 24, "weights after 25 steps")])
def test_stopping_a_run_that_has_diverged_keeps_the_last_finite_checkpoint(
        learning_rate, step, words, train, whole, tmp_path):
    copy(whole, tmp_path)
    done = train(tmp_path, *DIVERGING, f"--learning_rate={learning_rate}",
                 fault=f"if step == {step}: os.kill(os.getpid(), signal.SIGTERM)")
    assert words in error_of(done, status=1)
    assert f"resume from {tmp_path}/ckpt.pt" in done.stderr
    assert (tmp_path / "ckpt.pt").read_bytes() == (whole / "ckpt.pt").read_bytes()


def test_a_validation_loss_that_is_not_finite_ends_the_run_and_nothing_is_saved(train, tmp_path):
    done = train(tmp_path, "--learning_rate=1e30", "--grad_clip=0", "--decay_lr=False",
                 "--keep_every=0", "--eval_interval=4")
    assert "validation loss after 4 steps is nan" in error_of(done, status=1)
    assert "start again with --grad_clip=1.0" in done.stderr
    assert not list(tmp_path.glob("*.pt"))
    assert records(tmp_path)[-1]["val_loss"] is None  # metrics.jsonl is JSON, without NaN


ONE_RANK = """
if training and run.rt.rank == 1 and step in (3, 6, 7):
    loss = loss + math.nan
if training and step == 5:
    torch.save(run.model.state_dict(), f"{run.out_dir}/rank{run.rt.rank}.weights")
"""


def test_a_loss_that_is_not_finite_in_one_process_is_skipped_by_all(train, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = train(tmp_path, "--keep_every=1", "--max_bad_steps=2", fault=ONE_RANK, launcher=launcher)
    assert done.returncode == 1, done.stderr
    assert "error: 2 consecutive steps, up to step 7," in done.stderr
    assert steps_without_effect(tmp_path, 7) == [3, 6]
    ranks = [torch.load(tmp_path / f"rank{rank}.weights") for rank in (0, 1)]
    assert unequal(*ranks) == []
    assert unequal(ranks[0], load(tmp_path / "ckpt_00000005.pt")["model"]) == []
