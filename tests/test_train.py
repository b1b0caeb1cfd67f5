"""train.py as users run it: steps, evaluations, checkpoints, resuming, logging."""

import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, differences, load, records, run, script, snapshot, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.metrics import NAMES
from model import GPT

COMPILER = shutil.which("g++") or shutil.which("clang++")
STEP_KEYS = {"iter", "loss", "lr", "grad_norm", "tokens_per_s", "mfu", "data_ms", "forward_ms",
             "backward_ms", "optimizer_ms", "seconds"}
EVALUATION_KEYS = {"iter", "train_loss", "val_loss", "val_perplexity", "val_accuracy",
                   "val_bits_per_byte", "seconds"}


def steps(out_dir: Path) -> list[dict]:
    return records(out_dir, "loss")


def evaluations(out_dir: Path) -> list[dict]:
    return records(out_dir, "val_loss")


def losses(out_dir: Path) -> list[float]:
    return [record["loss"] for record in steps(out_dir)]


# -------------------------------------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def start(text_dataset, tmp_path_factory) -> Callable[..., Path]:
    """start(*settings): the folder of a new run."""
    def start(*args: str, **environment: str) -> Path:
        folder = tmp_path_factory.mktemp("run")
        train(f"--dataset={text_dataset}", f"--out_dir={folder}", *args, **environment)
        return folder
    return start


@pytest.fixture(scope="module")
def whole(start) -> Path:
    """An uninterrupted run of 8 steps with dropout and gradient accumulation."""
    return start("--dropout=0.1")


@pytest.fixture(scope="module")
def resumption(start, whole, tmp_path_factory) -> tuple[Path, str]:
    """The same run by way of a best.pt after 4 steps and 1,000 seconds, with the metrics.jsonl of
    a run that was killed later, in a write; no other setting given. And its output."""
    half = start("--dropout=0.1", "--max_iters=4")
    folder = tmp_path_factory.mktemp("resumed")
    torch.save(load(half / "best.pt") | {"seconds": 1000.0}, folder / "best.pt")
    written = (whole / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(written + '{"iter": 8, "lo')
    return folder, script("train.py", f"--out_dir={folder}", "--init_from=auto",
                          "--max_iters=8").stdout


@pytest.fixture(scope="module")
def clipped(start, whole) -> Path:
    """A run from the weights of `whole` whose gradients are clipped to nearly nothing."""
    return start("--grad_clip=1e-16", f"--init_from={whole / 'ckpt.pt'}", "--lr_decay_iters=5")


SPLIT = ["--max_iters=6", "--grad_clip=0", "--decay_lr=False", "--always_save_checkpoint=False"]


@pytest.fixture(scope="module")
def four_by_two(start) -> Path:
    """A run whose batches of 8 are 2 micro-batches of 4."""
    return start(*SPLIT)


@pytest.fixture(scope="module")
def logged(start) -> Path:
    """A run in bfloat16 with all loggers."""
    return start("--dtype=bfloat16", "--max_iters=2", "--sample_every=2", "--tensorboard_log=True",
                 "--wandb_log=True")


# ------------------------------------------------------------------------------- steps, evaluations

def test_exactly_max_iters_steps_are_made_and_saved(whole, four_by_two):
    for folder, n_steps in ((whole, 8), (four_by_two, 6)):
        assert [record["iter"] for record in steps(folder)] == list(range(n_steps))
        assert [record["iter"] for record in evaluations(folder)] == [0, 4, n_steps]
        saved = load(folder / "ckpt.pt")
        assert saved["iter_num"] == n_steps
        assert {s["step"].item() for s in saved["optimizer"]["state"].values()} == {n_steps}


def test_metrics_have_the_documented_keys_and_agree_with_each_other(whole):
    assert len(records(whole)) == len(steps(whole)) + len(evaluations(whole))
    for record in steps(whole):
        assert record.keys() == STEP_KEYS
        ms = sum(record[key] for key in record if key.endswith("_ms"))
        assert record["tokens_per_s"] == pytest.approx(2 * 4 * 16 / (ms / 1e3))
        assert record["mfu"] is None  # the peak of a CPU is unknown
    for record in evaluations(whole):
        assert record.keys() == EVALUATION_KEYS
        assert record["val_perplexity"] == pytest.approx(math.exp(record["val_loss"]))
        assert record["val_bits_per_byte"] == pytest.approx(math.log2(math.e) * record["val_loss"])


def test_an_evaluation_depends_on_the_weights_alone(whole, clipped):
    after, before = evaluations(whole)[-1], evaluations(clipped)[0]
    assert (after["iter"], before["iter"]) == (8, 0)
    for key in ("train_loss", "val_loss", "val_accuracy"):  # with dropout on and off in training
        assert before[key] == after[key]


def test_eval_only_covers_the_whole_validation_split_and_writes_nothing(whole, text_dataset):
    before = snapshot(whole)
    printed = script("train.py", f"--out_dir={whole}", "--init_from=resume", "--eval_only=True",
                     "--eval_iters=0", "--tensorboard_log=True").stdout
    assert snapshot(whole) == before
    gpt = GPT.from_checkpoint(load(whole / "ckpt.pt")).eval()
    tokens = torch.from_numpy(np.fromfile(text_dataset / "val.bin", "<u2").astype(np.int64))
    with torch.no_grad():
        logits = torch.cat([gpt(idx[None], idx[None])[0][0] for idx in tokens[:-1].split(16)])
    loss = F.cross_entropy(logits, tokens[1:]).item()
    accuracy = (logits.argmax(-1) == tokens[1:]).float().mean().item()
    found = re.search(r"step 8: .*val loss ([\d.]+), .*accuracy ([\d.]+)%", printed)
    assert float(found[1]) == pytest.approx(loss, abs=6e-5)  # four digits are printed
    assert float(found[2]) == pytest.approx(100 * accuracy, abs=0.51)


# ---------------------------------------------------------------------------------------- optimizer

def test_the_learning_rate_warms_up_and_follows_a_cosine(whole, clipped, four_by_two):
    def rates(out_dir: Path) -> list[float]:
        return [record["lr"] for record in steps(out_dir)]

    warm_up = [1e-2 / 3, 2e-2 / 3]
    assert rates(whole) == pytest.approx([
        *warm_up, *(5.5e-3 + 4.5e-3 * math.cos(math.pi * k / 6) for k in range(6))])
    assert rates(clipped) == pytest.approx([*warm_up, 1e-2, 7.75e-3, 3.25e-3, 1e-3, 1e-3, 1e-3])
    assert rates(four_by_two) == [1e-2] * 6  # decay_lr = False


def test_gradients_clipped_to_nothing_leave_weight_decay_and_the_norm_that_is_logged(
        whole, clipped, four_by_two):
    before, after = load(whole / "ckpt.pt")["model"], load(clipped / "ckpt.pt")["model"]
    shrink = math.prod(1 - record["lr"] * 0.1 for record in steps(clipped))
    for name, tensor in before.items():
        expected = tensor * shrink if tensor.dim() >= 2 else tensor
        torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-8)
    assert all(record["grad_norm"] > 0.01 for record in steps(clipped))
    assert losses(four_by_two)[-1] < losses(four_by_two)[0] - 0.1  # grad_clip = 0: not clipped


def test_a_batch_does_not_depend_on_how_it_is_split(start, four_by_two):
    eight_by_one = start(*SPLIT, "--batch_size=8", "--gradient_accumulation_steps=1",
                         "--log_interval=3")
    assert [record["iter"] for record in steps(eight_by_one)] == [0, 3]
    for ours, expected in zip(steps(eight_by_one), steps(four_by_two)[::3], strict=True):
        for key, tolerance in (("loss", 1e-5), ("lr", 1e-9), ("grad_norm", 1e-4)):
            assert ours[key] == pytest.approx(expected[key], rel=tolerance)


# ---------------------------------------------------------------------------- checkpoints, resuming

def test_checkpoints_have_the_documented_keys_and_the_vocabulary_of_the_dataset(whole):
    for name in ("ckpt.pt", "best.pt"):
        saved = load(whole / name)
        assert saved.keys() == {
            "model", "optimizer", "scaler", "model_args", "config", "iter_num", "best_val_loss",
            "history", "meta", "seconds", "bad_steps", "command"}
        assert saved["model_args"]["vocab_size"] == saved["meta"]["vocab_size"] == 14


def test_best_holds_the_lowest_validation_loss(start):
    folder = start("--eval_interval=1", "--max_iters=4", "--learning_rate=2", "--warmup_iters=99",
                   "--lr_decay_iters=100")  # the rate grows until the loss does
    lowest = min(evaluations(folder), key=lambda record: record["val_loss"])
    assert 0 < lowest["iter"] < 4
    best = load(folder / "best.pt")
    assert (best["iter_num"], best["best_val_loss"]) == (lowest["iter"], lowest["val_loss"])
    assert load(folder / "ckpt.pt")["best_val_loss"] == lowest["val_loss"]


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(resumption, whole, four_by_two):
    assert differences(resumption[0], whole) == []
    assert losses(whole)[0] != pytest.approx(losses(four_by_two)[0], rel=1e-6)  # by dropout
    assert all(record["seconds"] > 1000 for record in steps(resumption[0])[4:])


def test_resuming_restores_and_prints_the_settings_but_those_of_the_machine(resumption, whole):
    folder, printed = resumption
    ours, expected = load(folder / "ckpt.pt")["config"], load(whole / "ckpt.pt")["config"]
    assert ours.keys() == expected.keys()
    differing = {key for key in ours if ours[key] != expected[key]}
    assert differing == {"out_dir", "init_from", "device"}
    restored, = re.findall(r"^from the checkpoint: (.*)", printed, re.MULTILINE)
    assert {"n_layer=2", "dropout=0.1", "learning_rate=0.01"} < set(restored.split())
    assert "max_iters" not in restored and "device" not in restored
    other, = re.findall(r"^in the checkpoint, but not restored: (.*)", printed, re.MULTILINE)
    assert other == "device='cpu' max_iters=4"


# --------------------------------------------------------------------------- machine, logging

def test_bfloat16_on_a_cpu_is_close_to_float32_and_keeps_float32_weights(logged, four_by_two):
    assert losses(logged)[0] == pytest.approx(losses(four_by_two)[0], rel=1e-2)
    assert losses(logged)[0] != losses(four_by_two)[0]
    assert {t.dtype for t in load(logged / "ckpt.pt")["model"].values()} == {torch.float32}


def test_tensorboard_has_the_numbers_of_metrics_jsonl_and_wandb_logs_offline(logged):
    curves = {}
    for name in ("", "train", "train_eval", "val"):  # the folders of a chart's curves
        events = EventAccumulator(str(logged / "tensorboard" / name))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            curves[f"{tag}/{name}".rstrip("/")] = {e.step: e.value for e in events.Scalars(tag)}
    assert curves.keys() == set(NAMES.values()) - {"speed/mfu"}
    for key, name in NAMES.items():
        expected = {r["iter"]: r[key] for r in records(logged, key) if r[key] is not None}
        assert curves.get(name, {}) == pytest.approx(expected)
    events = EventAccumulator(str(logged / "tensorboard"))
    events.Reload()
    assert events.Tensors("sample/text_summary")[0].step == 2
    assert events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    file, = (logged / "wandb").glob("offline-run-*/*.wandb")
    assert file.stat().st_size > 0


def test_samples_are_printed_and_change_nothing(whole, text_dataset, tmp_path):
    done = train("--dropout=0.1", "--sample_every=3", f"--dataset={text_dataset}",
                 f"--out_dir={tmp_path}")
    assert re.findall(r"--- written after (\d) steps ---\n[a-z ]+\n---", done.stdout) == ["3", "6"]
    assert differences(tmp_path, whole) == []


def test_a_run_of_more_than_a_day_on_a_cpu_names_a_smaller_config(text_dataset, tmp_path):
    with subprocess.Popen([sys.executable, ROOT / "train.py", *TINY, f"--dataset={text_dataset}",
                           f"--out_dir={tmp_path}", "--max_iters=1000000000"],
                          stdout=subprocess.PIPE, text=True) as process:
        printed = "".join(next(process.stdout) for _ in range(6))
        process.kill()
    assert re.search(r"a step takes about [\d.e-]+ s, all steps \d+d\n.*train_text_cpu", printed)


def test_a_character_model_trains_and_samples_with_torch_and_numpy_alone(text_dataset, tmp_path):
    for name in ("tiktoken", "datasets", "tqdm", "requests", "wandb", "tensorboard", "safetensors",
                 "huggingface_hub", "transformers"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError({name!r})\n")
    for name, *args in (["train.py", *TINY, f"--dataset={text_dataset}", "--max_iters=1"],
                        ["sample.py", "--start=to be", "--num_samples=1", "--device=cpu"]):
        done = run(ROOT / name, *args, f"--out_dir={tmp_path}/run", PYTHONPATH=str(tmp_path))
        assert done.returncode == 0, done.stderr
    assert "to be" in done.stdout


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
def test_a_compiled_run_computes_the_same_and_saves_plain_names(start, four_by_two):
    compiled = start("--compile=True", "--max_iters=1", TORCHINDUCTOR_COMPILE_THREADS="1")
    assert losses(compiled)[0] == pytest.approx(losses(four_by_two)[0], rel=1e-5)
    names = load(four_by_two / "ckpt.pt")["model"].keys()
    assert load(compiled / "ckpt.pt")["model"].keys() == names


def test_a_run_with_recompute_takes_the_same_steps(start, whole):
    recomputed = start("--dropout=0.1", "--recompute=True")
    assert losses(recomputed) == losses(whole)
    ours, plain = (load(run / "ckpt.pt")["model"] for run in (recomputed, whole))
    assert all(torch.equal(ours[name], p) for name, p in plain.items())


def test_on_a_terminal_a_bar_shows_the_loss_and_the_time_left(text_dataset, tmp_path):
    terminal, its_end = os.openpty()
    subprocess.run([sys.executable, ROOT / "train.py", *TINY, f"--dataset={text_dataset}",
                    f"--out_dir={tmp_path}"], stderr=its_end, stdout=subprocess.PIPE, check=True)
    os.close(its_end)
    shown = os.read(terminal, 65536).decode()
    os.close(terminal)
    assert re.search(r"8/8 \[\d\d:\d\d<\d\d:\d\d, .*it/s, loss \d\.\d+\]", shown)
