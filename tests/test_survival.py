"""Runs that are killed, stopped, out of disk or out of numbers: what is left, and how they go on.

Faults strike from outside: a sitecustomize.py on PYTHONPATH runs the code in $FAULT at every
micro-batch, of training and of evaluation, so that they strike the very step they are meant for.
"""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, run

RUN = [*TINY, "--dropout=0.1", "--max_iters=24", "--lr_decay_iters=24", "--eval_interval=8",
       "--keep_every=4", "--init_from=auto"]
LATER = ["--max_iters=1000", "--eval_interval=1000", "--keep_every=0"]  # none saves for long
TIMES = {"tokens_per_s", "data_ms", "forward_ms", "backward_ms", "optimizer_ms", "seconds"}
SITECUSTOMIZE = """
import glob, math, os, resource, shutil, signal, sys
import torch

def strike(module, args, output):
    if type(module).__name__ != "GPT":
        return None
    run = sys.modules["__main__"]
    scope = globals() | {"loss": output[1], "step": run.iter_num, "run": run,
                         "training": torch.is_grad_enabled()}
    exec(os.environ["FAULT"], scope)
    return output[0], scope["loss"]


torch.nn.modules.module.register_module_forward_hook(strike)
"""


@pytest.fixture(scope="module")
def life(text_dataset, tmp_path_factory) -> Callable[..., subprocess.CompletedProcess]:
    """A process of train.py: life(out_dir, *settings, fault=code that strikes it)."""
    modules = tmp_path_factory.mktemp("modules")
    (modules / "sitecustomize.py").write_text(SITECUSTOMIZE)

    def live(out_dir: Path, *args: str, fault: str = "", launcher: tuple[str, ...] = (),
             ) -> subprocess.CompletedProcess:
        environment = {"PYTHONPATH": str(modules), "FAULT": fault} if fault else {}
        return run(*launcher, ROOT / "train.py", *RUN, f"--dataset={text_dataset}",
                   f"--out_dir={out_dir}", *args, **environment)
    return live


@pytest.fixture(scope="module")
def whole(life, tmp_path_factory) -> Path:
    """A run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = life(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """small_disk("2m"): a disk of that size."""
    folder = tmp_path / "disk"

    def mounted(size: str) -> Path:
        folder.mkdir()
        if os.geteuid() or subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]).returncode:
            pytest.skip("no mounting here")
        return folder

    yield mounted
    if folder.is_mount():
        subprocess.run(["umount", folder], check=True)


def load(path: Path) -> dict:
    assert zipfile.ZipFile(path).testzip() is None
    return torch.load(path, weights_only=True)


def digest(value: object) -> object:
    """A checkpoint, or a part of one, as what can be compared; without the times it took."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {key: digest(part) for key, part in value.items() if key not in TIMES}
    return [digest(part) for part in value] if isinstance(value, list) else value


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def step_record(folder: Path, i: int) -> dict:
    record, = (record for record in records(folder) if record["iter"] == i and "loss" in record)
    return record


def outcome(folder: Path) -> dict:
    """All that a run left, but for the times it took and where it was."""
    found = {path.name: digest({**load(path), "config": None}) for path in folder.glob("*.pt")}
    return found | {"metrics": digest(records(folder))}


def state(path: Path) -> object:
    """Weights and optimizer state in a checkpoint."""
    return digest([load(path)["model"], load(path)["optimizer"]["state"]])


def steps_held(folder: Path) -> dict[str, int]:
    """The steps that each checkpoint holds; all must be whole, with finite weights."""
    found = {path.name: load(path) for path in folder.glob("*.pt")}
    assert all(t.isfinite().all() for saved in found.values() for t in saved["model"].values())
    return {name: saved["iter_num"] for name, saved in found.items()}


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """Every file under a folder: what it holds, and when it was written."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns)
            for path in folder.rglob("*") if path.is_file()}


def error_of(done: subprocess.CompletedProcess, status: int) -> str:
    """The one line that a run ended in."""
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def copy(folder: Path, to: Path, *names: str) -> Path:
    """Files of a run, or all, in another folder."""
    to.mkdir(parents=True, exist_ok=True)
    for name in names or [path.name for path in folder.iterdir()]:
        shutil.copy(folder / name, to)
    return to


# ------------------------------------------------------------------------------ the longest stories

# Where a run is stopped, again and again, and by what; the steps that are done then.
STOPS = {
    "float32": [("not training and step == 0", signal.SIGTERM, 0),
                ("training and step == 5 and run.micro_step == 0", signal.SIGINT, 6),
                ("not training and step == 8", signal.SIGINT, 8)],
    "bfloat16": [("training and step == 18 and run.micro_step == 1", signal.SIGTERM, 19)],
}


@pytest.fixture(scope="module", autouse=True)
def beside(request, life, whole, tmp_path_factory) -> Iterator[dict[str, Future]]:
    """What takes longest, one after the other while the tests go on: it has a core to itself."""
    asked_for = {item.originalname for item in request.session.items}
    pool, stories = ThreadPoolExecutor(1), {}
    if test_kills_at_random_instants_lose_nothing.__name__ in asked_for:
        stories["torture"] = pool.submit(
            subprocess.run, [sys.executable, ROOT / "tests/torture.py", "--kills=6"], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=400)
    if test_a_run_stopped_anywhere_ends_bit_for_bit_like_one_that_was_not.__name__ in asked_for:
        for dtype in STOPS:
            folder = tmp_path_factory.mktemp(dtype)
            stories[dtype] = pool.submit(stop_and_go_on, dtype, folder, life, whole)
    yield stories
    pool.shutdown(cancel_futures=True)


def stop_and_go_on(dtype: str, folder: Path, life: Callable, whole: Path) -> tuple[Path, Path]:
    """Stop a run wherever STOPS says and take it to its end; where it is, and one to compare."""
    ours, reference = folder / "stopped", whole
    if dtype != "float32":
        reference = folder / "whole"
        assert life(reference, f"--dtype={dtype}").returncode == 0
        assert state(reference / "ckpt.pt") != state(whole / "ckpt.pt")
    for where, number, n_steps in STOPS[dtype]:
        done = life(ours, f"--dtype={dtype}",
                    fault=f"if {where} and not run.stop_signals.received: "
                          f"os.kill(os.getpid(), {number:d})")
        assert done.returncode == 128 + number, done.stderr
        assert done.stderr == ""
        assert f"stopped by signal {number:d} after {n_steps} steps" in done.stdout
        assert steps_held(ours)["ckpt.pt"] == n_steps
        evaluated = [record["iter"] for record in records(ours) if "val_loss" in record]
        assert evaluated == list(range(0, n_steps, 8))  # one that was interrupted is not recorded
    assert life(ours, f"--dtype={dtype}").returncode == 0
    return ours, reference


# -------------------------------------------------------------------------------------------- kills

HALF_A_WRITE = """
if step == 9:
    saved = torch.save

    def save_half(contents, file):
        saved(contents, file)
        file.flush()
        os.ftruncate(file.fileno(), 40000)
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save_half
"""


def test_a_kill_inside_a_write_leaves_the_last_good_checkpoints_and_the_next_start_goes_on(
        life, whole, tmp_path):
    assert life(tmp_path, fault=HALF_A_WRITE).returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.glob("*.tmp")] == ["ckpt_00000012.pt.tmp"]
    assert steps_held(tmp_path) == {"ckpt.pt": 8, "best.pt": 8, "ckpt_00000004.pt": 4,
                                    "ckpt_00000008.pt": 8}
    done = life(tmp_path, fault="if step == 8: print('litter', glob.glob(run.out_dir + '/*.tmp'))")
    assert done.returncode == 0, done.stderr
    assert "litter []" in done.stdout  # before anything could be written over it
    assert outcome(tmp_path) == outcome(whole)


# -------------------------------------------------------------------------------------- full disks

FILL = """
if step == 9 and not os.path.exists("{disk}/ballast"):
    free = shutil.disk_usage("{disk}").free
    os.posix_fallocate(os.open("{disk}/ballast", os.O_CREAT | os.O_WRONLY), 0, free - 40960)
"""
LIMIT = "if step == 9: resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"


@pytest.mark.parametrize("kind", ["full", "limited"])
def test_a_disk_that_refuses_a_checkpoint_costs_no_other_and_with_room_the_run_goes_on(
        kind, life, whole, tmp_path, small_disk):
    disk = small_disk("16m") if kind == "full" else tmp_path
    fault = FILL.format(disk=disk) if kind == "full" else LIMIT.format(limit=40000)
    error = error_of(life(disk / "run", fault=fault), status=2)
    assert "ckpt_00000012.pt" in error
    assert ("No space left" if kind == "full" else "File too large") in error
    assert steps_held(disk / "run") == {"ckpt.pt": 8, "best.pt": 8, "ckpt_00000004.pt": 4,
                                        "ckpt_00000008.pt": 8}
    (disk / "ballast").unlink(missing_ok=True)
    done = life(disk / "run", "--init_from=resume")
    assert done.returncode == 0, done.stderr
    assert not list((disk / "run").glob("*.tmp"))
    assert outcome(disk / "run") == outcome(whole)


def test_a_disk_that_refuses_the_log_ends_the_run_in_a_sentence(life, whole, tmp_path):
    size = len((copy(whole, tmp_path) / "metrics.jsonl").read_bytes())
    done = life(tmp_path, *LATER, fault=LIMIT.replace("step == 9", "True").format(limit=size + 999))
    assert "metrics.jsonl" in error_of(done, status=2)
    assert steps_held(tmp_path) == steps_held(whole)


def test_a_full_disk_under_stdout_ends_the_run_in_a_sentence(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, ROOT / "train.py", *RUN, f"--out_dir={tmp_path}"],
                              stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert "full" in error_of(done, status=2)


def test_a_disk_too_small_for_the_checkpoints_to_come_is_refused_before_the_first_step(
        life, small_disk):
    disk = small_disk("20m")
    error = error_of(life(disk / "run", "--n_embd=128"), status=2)
    n_params = 2 * 12 * 128**2 + (14 + 16) * 128 + 5 * 128  # of the layers, embeddings and norms
    found = re.search(r"needs ([\d.]+) MB for (\d+) checkpoints .* has ([\d.]+) MB free", error)
    assert str(disk / "run") in error
    assert int(found[2]) == 6 + 3  # numbered ones, ckpt.pt, best.pt and one that is being written
    assert float(found[1]) == pytest.approx(9 * (12 * n_params + 2**20) / 1e6, abs=0.5)
    assert float(found[3]) == pytest.approx(20 * 2**20 / 1e6, abs=0.5)
    assert not list(disk.iterdir())


@pytest.mark.parametrize("room", [450_000, 530_000])  # for a part of train.bin, and of val.bin
def test_a_disk_that_fills_up_leaves_the_earlier_text_dataset_whole(room, tmp_path, small_disk):
    disk = small_disk("2m")
    for path in ("configurator.py", "data/bins.py", "data/tokenizer.py",
                 "data/shakespeare_char/prepare.py"):
        (disk / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, disk / path)
    folder = disk / "data/shakespeare_char"
    (folder / "input.txt").write_text("some words " * 100)
    assert run(folder / "prepare.py", PYTHONDONTWRITEBYTECODE="1").returncode == 0
    (folder / "input.txt").write_text("other letters " * 20_000)  # 504 kB of ids, and 56 kB
    before = contents(folder)
    with open(disk / "ballast", "wb") as ballast:
        os.posix_fallocate(ballast.fileno(), 0, shutil.disk_usage(disk).free - room)
    done = run(folder / "prepare.py", PYTHONDONTWRITEBYTECODE="1")
    assert "No space left" in error_of(done, status=2)
    assert contents(folder) == before


# -------------------------------------------------------------------------------------- keep_every

def test_numbered_checkpoints_are_kept_at_exactly_the_multiples_of_keep_every(whole):
    kept = {f"ckpt_{i:08d}.pt": i for i in (4, 8, 12, 16, 20, 24)}
    assert steps_held(whole).items() - kept.items() == {("ckpt.pt", 24), ("best.pt", 24)}


def test_a_run_goes_on_from_a_numbered_checkpoint_where_no_other_is_left(life, whole, tmp_path):
    copy(whole, tmp_path, "metrics.jsonl", *(f"ckpt_{i:08d}.pt" for i in (4, 8, 12)))
    done = life(tmp_path, "--init_from=resume")
    assert done.returncode == 0, done.stderr
    assert "iter 12:" in done.stdout and "iter 11:" not in done.stdout
    assert outcome(tmp_path) == outcome(whole)


def test_a_numbered_checkpoint_can_be_sampled_from(whole, tmp_path):
    name = "ckpt_00000004.pt"
    copy(whole, tmp_path, name)
    done = run(ROOT / "sample.py", f"--out_dir={tmp_path}", f"--checkpoint={name}", "--start=to be",
               "--num_samples=1", "--max_new_tokens=5", "--device=cpu")
    assert done.returncode == 0, done.stderr
    assert "to be" in done.stdout


def test_a_fresh_run_moves_numbered_checkpoints_out_of_the_way(skipped, whole):
    folder, _ = skipped
    for i in (4, 24):
        name = f"ckpt_{i:08d}.pt"
        assert (folder / "previous-1" / name).read_bytes() == (whole / name).read_bytes()
    assert not (folder / "ckpt_00000024.pt").exists()


# -------------------------------------------------------------------------------------------- lock

@pytest.fixture(scope="module")
def in_use(life, whole, text_dataset, tmp_path_factory) -> Iterator[Path]:
    """The folder of a run that is under way, and stands still to be looked at."""
    folder = copy(whole, tmp_path_factory.mktemp("lock") / "run")
    with subprocess.Popen([sys.executable, ROOT / "train.py", *RUN, f"--dataset={text_dataset}",
                           f"--out_dir={folder}", *LATER], stdout=subprocess.PIPE,
                          text=True) as process:
        for line in process.stdout:
            if line.startswith("iter 25:"):
                break
        process.send_signal(signal.SIGSTOP)
        yield folder
        process.kill()


def test_a_second_run_in_one_out_dir_is_refused_and_touches_nothing(in_use, life):
    before = contents(in_use)
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(lambda start: life(in_use, f"--init_from={start}"),
                             ["scratch", "resume", "auto"]):
            assert "in use by another run" in error_of(done, status=2)
            assert str(in_use) in done.stderr
    assert contents(in_use) == before


def test_a_run_under_way_can_be_evaluated(in_use, life):
    before = contents(in_use)
    done = life(in_use, "--eval_only=True")
    assert done.returncode == 0, done.stderr
    assert "step 24: " in done.stdout
    assert contents(in_use) == before


# ---------------------------------------------------------------------- numbers that are not finite

BAD_STEPS = """
if training and step == 5 and run.micro_step == 1:
    loss = loss + math.nan  # the loss alone: its gradient stays finite
if training and step == 8 and run.micro_step == 0:
    loss.register_hook(lambda gradient: gradient * 1e30)  # whose norm is beyond float32
"""


@pytest.fixture(scope="module")
def skipped(life, whole, tmp_path_factory) -> tuple[Path, str]:
    """A fresh run in a used folder with two bad steps, which saves each step; what it printed."""
    folder = copy(whole, tmp_path_factory.mktemp("skipped") / "run")
    done = life(folder, "--init_from=scratch", "--keep_every=1", "--max_iters=12", fault=BAD_STEPS)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.parametrize("i", [5, 8])
def test_a_bad_step_leaves_weights_and_optimizer_as_they_were_and_the_run_goes_on(skipped, i):
    states = [state(skipped[0] / f"ckpt_{n:08d}.pt") for n in (i, i + 1, i + 2)]
    assert states[0] == states[1] != states[2]
    assert steps_held(skipped[0])["ckpt.pt"] == 12


def test_a_bad_step_is_printed_and_counted(skipped):
    folder, printed = skipped
    counts = [step_record(folder, i)["bad_steps"] for i in range(12)]
    assert counts == [0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0]
    assert step_record(folder, 5)["loss"] is None
    assert math.isfinite(step_record(folder, 5)["grad_norm"])
    assert math.isfinite(step_record(folder, 8)["loss"])
    assert step_record(folder, 8)["grad_norm"] is None
    lines = [line for line in printed.splitlines() if "SKIPPED" in line]
    assert [line.partition(":")[0] for line in lines] == ["iter 5", "iter 8"]


def test_bad_steps_between_log_lines_are_counted_also_when_the_run_was_stopped_between(
        life, tmp_path):
    fault = "if training and step in (3, 4, 8): loss = loss * math.nan"
    counts = []
    for out, stop in (("one", ""), ("two", "if step == 5: os.kill(os.getpid(), 15)")):
        folder = tmp_path / out
        args = ["--log_interval=7", "--max_iters=15", "--eval_interval=100", "--keep_every=0"]
        life(folder, *args, fault=f"{fault}\n{stop}")
        if stop:
            assert load(folder / "ckpt.pt")["iter_num"] == 6
            life(folder, *args, fault=fault)
        counts.append([step_record(folder, i)["bad_steps"] for i in (0, 7, 14)])
    assert counts == [[0, 2, 1], [0, 2, 1]]


def test_a_stop_right_after_a_bad_step_saves_like_any_other(life, tmp_path):
    fault = "if training and step == 5: loss = loss * math.nan; os.kill(os.getpid(), 15)"
    done = life(tmp_path, fault=fault)
    assert done.returncode == 143, done.stderr
    assert steps_held(tmp_path)["ckpt.pt"] == 6
    assert load(tmp_path / "ckpt.pt")["bad_steps"] == 1
    assert state(tmp_path / "ckpt.pt") != state(tmp_path / "ckpt_00000004.pt")


def test_weights_without_a_finite_loss_reach_no_numbered_checkpoint(life, whole, tmp_path):
    before = steps_held(copy(whole, tmp_path))
    error = error_of(life(tmp_path, *DIVERGING, "--keep_every=2"), status=1)
    assert "weights after 26 steps" in error and f"go on from {tmp_path}/ckpt.pt" in error
    assert steps_held(tmp_path) == before


def test_after_a_bad_step_the_run_is_the_one_that_leaves_this_update_out(skipped, life, tmp_path):
    torch.save(load(skipped[0] / "ckpt_00000005.pt") | {"iter_num": 6}, tmp_path / "ckpt.pt")
    done = life(tmp_path, "--keep_every=1", "--max_iters=8")
    assert done.returncode == 0, done.stderr
    for i in (7, 8):
        name = f"ckpt_{i:08d}.pt"
        assert state(tmp_path / name) == state(skipped[0] / name)


STREAK = """
if training and step >= 6:
    loss = loss * math.nan
"""


def test_ten_bad_steps_in_a_row_end_the_run_though_it_was_killed_between(life, whole, tmp_path):
    killed = life(tmp_path, fault=STREAK + "if step == 13: os.kill(os.getpid(), signal.SIGKILL)")
    assert killed.returncode == -signal.SIGKILL
    assert load(tmp_path / "ckpt_00000012.pt")["bad_steps"] == 6
    error = error_of(life(tmp_path, fault=STREAK), status=1)
    assert "10 steps in a row, by step 15," in error
    assert f"last good loss: {step_record(whole, 5)['loss']:.4f}" in error
    assert "learning_rate" in error
    assert steps_held(tmp_path) == {"ckpt.pt": 8, "best.pt": 8, "ckpt_00000004.pt": 4,
                                    "ckpt_00000008.pt": 8, "ckpt_00000012.pt": 12}
    assert state(tmp_path / "ckpt_00000012.pt") == state(tmp_path / "ckpt_00000008.pt")


DIVERGING = [*LATER, "--decay_lr=False", "--learning_rate=1e38"]


def test_a_run_that_diverges_ends_after_max_bad_steps_and_keeps_the_last_good_checkpoint(
        life, whole, tmp_path):
    before = steps_held(copy(whole, tmp_path))
    error = error_of(life(tmp_path, *DIVERGING, "--max_bad_steps=3"), status=1)
    assert "3 steps in a row, by step 27," in error
    assert f"last good loss: {step_record(tmp_path, 24)['loss']:.4f}" in error
    assert f"{tmp_path}/ckpt.pt, which holds step 24" in error
    assert "a smaller --learning_rate than 1e+38" in error
    assert steps_held(tmp_path) == before
    assert state(tmp_path / "ckpt.pt") == state(whole / "ckpt.pt")


@pytest.mark.parametrize("learning_rate, step, words", [
    ("1e38", 26, "weights after 27 steps"), ("1e39", 24, "weights after 25 steps")])
def test_stopping_a_run_that_has_diverged_keeps_the_last_good_checkpoint(
        learning_rate, step, words, life, whole, tmp_path):
    copy(whole, tmp_path)
    done = life(tmp_path, *DIVERGING, f"--learning_rate={learning_rate}",
                fault=f"if step == {step}: os.kill(os.getpid(), signal.SIGTERM)")
    assert words in error_of(done, status=1)
    assert f"go on from {tmp_path}/ckpt.pt" in done.stderr
    assert (tmp_path / "ckpt.pt").read_bytes() == (whole / "ckpt.pt").read_bytes()


def test_a_validation_loss_that_is_not_finite_ends_the_run_and_nothing_is_saved(life, tmp_path):
    done = life(tmp_path, "--learning_rate=1e30", "--grad_clip=0", "--decay_lr=False",
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


def test_a_loss_that_is_not_finite_in_one_process_is_skipped_by_all(life, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = life(tmp_path, "--keep_every=1", "--max_bad_steps=2", fault=ONE_RANK, launcher=launcher)
    assert done.returncode == 1, done.stderr
    assert "error: 2 steps in a row, by step 7," in done.stderr
    assert [step_record(tmp_path, i)["bad_steps"] for i in range(8)] == [0, 0, 0, 1, 0, 0, 1, 2]
    states = [state(tmp_path / f"ckpt_{n:08d}.pt") for n in range(1, 8)]
    assert states[2] == states[3]  # step 3 is skipped
    assert states[5] == states[6]
    assert len({str(s) for s in states}) == 5
    ranks = [digest(torch.load(tmp_path / f"rank{rank}.weights")) for rank in (0, 1)]
    assert ranks[0] == ranks[1] == digest(load(tmp_path / "ckpt_00000005.pt")["model"])


# ----------------------------------------------------------------------------------------- signals

@pytest.mark.parametrize("dtype", STOPS)
def test_a_run_stopped_anywhere_ends_bit_for_bit_like_one_that_was_not(dtype, beside):
    ours, reference = beside[dtype].result()
    assert outcome(ours) == outcome(reference)


def test_a_second_ctrl_c_ends_a_run_in_the_middle_of_a_step(life, tmp_path):
    done = life(tmp_path, fault="""
if training and step == 5:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    print("went on", flush=True)
""")
    assert error_of(done, status=130) == "error: stopped by Ctrl-C\n"
    assert "went on" not in done.stdout
    assert steps_held(tmp_path) == {"ckpt_00000004.pt": 4}
    assert not list(tmp_path.glob("*.tmp"))


# ----------------------------------------------------------------------------------------- torture

def test_kills_at_random_instants_lose_nothing(beside):
    done = beside["torture"].result()
    assert done.returncode == 0, done.stdout
    figures = dict(re.findall(r"^(.*): (\d+)$", done.stdout, re.MULTILINE))
    assert int(figures.pop("kills inside a write")) >= 1
    assert figures == {"kills": "6", "checkpoints lost": "0", "differing bits": "0",
                       "differing records": "0", "differing files": "0"}
