"""train.py as users run it: steps, evaluations, checkpoints, resuming, fine-tuning, logging."""

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
import transformers
from conftest import ROOT, TINY, differences, forked, load, records, run, snapshot, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model import GPT

COMPILER = shutil.which("g++") or shutil.which("clang++")
STEP_KEYS = {"iter", "loss", "lr", "grad_norm", "tokens_per_s", "mfu", "data_ms", "forward_ms",
             "backward_ms", "optimizer_ms", "seconds"}
EVALUATION_KEYS = {"iter", "train_loss", "val_loss", "val_perplexity", "val_accuracy", "seconds"}


def steps(out_dir: Path) -> list[dict]:
    return records(out_dir, "loss")


def evaluations(out_dir: Path) -> list[dict]:
    return records(out_dir, "val_loss")


def losses(out_dir: Path) -> list[float]:
    return [record["loss"] for record in steps(out_dir)]


def plain_train(*args: str) -> str:
    """The output of train.py with these arguments alone."""
    done = forked([str(ROOT / "train.py"), *args], ROOT, {})
    assert done.returncode == 0, done.stderr
    return done.stdout


def loss_and_accuracy(logits_of: Callable, tokens: np.ndarray) -> tuple[float, float]:
    """Of predicting each token but the first once, in windows of 16."""
    total = correct = 0
    for start in range(0, len(tokens) - 1, 16):
        window = torch.tensor(tokens[start:start + 17].astype(np.int64))
        with torch.no_grad():
            logits = logits_of(window[None, :-1])[0]
        total += F.cross_entropy(logits, window[1:], reduction="sum").item()
        correct += (logits.argmax(-1) == window[1:]).sum().item()
    return total / (len(tokens) - 1), correct / (len(tokens) - 1)


# -------------------------------------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(out, text_dataset) -> Path:
    """An uninterrupted run of 8 steps with dropout and gradient accumulation."""
    train(f"--dataset={text_dataset}", f"--out_dir={out / 'whole'}", "--dropout=0.1")
    return out / "whole"


@pytest.fixture(scope="module")
def half(out, text_dataset) -> Path:
    """The same run, at its end after 4 steps."""
    train(f"--dataset={text_dataset}", f"--out_dir={out / 'half'}", "--dropout=0.1",
          "--max_iters=4", "--init_from=auto")
    return out / "half"


@pytest.fixture(scope="module")
def resumption(out, half) -> tuple[Path, str]:
    """`half` continued to 8 steps, no other settings given; and its output."""
    shutil.copytree(half, out / "resumed")
    return out / "resumed", plain_train(f"--out_dir={out / 'resumed'}", "--init_from=auto",
                                        "--max_iters=8")


@pytest.fixture(scope="module")
def resumed(resumption) -> Path:
    return resumption[0]


@pytest.fixture(scope="module")
def resumed_from_best(out, half, whole) -> Path:
    """`whole` without its ckpt.pt, killed in a write, after 1,000 seconds; resumed."""
    folder = out / "resumed_from_best"
    folder.mkdir()
    torch.save(load(half / "best.pt") | {"seconds": 1000.0}, folder / "best.pt")
    written = (whole / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(written + '{"iter": 8, "lo')
    plain_train(f"--out_dir={folder}", "--init_from=resume", "--max_iters=8")
    return folder


@pytest.fixture(scope="module")
def clipped(out, whole, text_dataset) -> Path:
    """A run from the weights of `whole` whose gradients are clipped to nearly nothing."""
    train(f"--dataset={text_dataset}", f"--out_dir={out / 'clipped'}", "--grad_clip=1e-16",
          f"--init_from={whole / 'ckpt.pt'}", "--lr_decay_iters=5")
    return out / "clipped"


SPLIT = ["--max_iters=6", "--grad_clip=0", "--decay_lr=False", "--always_save_checkpoint=False"]


@pytest.fixture(scope="module")
def four_by_two(out, text_dataset) -> Path:
    """A run whose batches of 8 are 2 micro-batches of 4."""
    train(f"--dataset={text_dataset}", f"--out_dir={out / 'four_by_two'}", *SPLIT)
    return out / "four_by_two"


@pytest.fixture(scope="module")
def eight_by_one(out, text_dataset) -> Path:
    """The same run with whole batches, logging every third step."""
    train(f"--dataset={text_dataset}", f"--out_dir={out / 'eight_by_one'}", *SPLIT,
          "--batch_size=8", "--gradient_accumulation_steps=1", "--log_interval=3")
    return out / "eight_by_one"


@pytest.fixture(scope="module")
def logged(out, text_dataset) -> Path:
    """A run in bfloat16 with all loggers."""
    train(f"--dataset={text_dataset}", f"--out_dir={out / 'logged'}", "--dtype=bfloat16",
          "--max_iters=2", "--tensorboard_log=True", "--wandb_log=True")
    return out / "logged"


@pytest.fixture(scope="module")
def torch_only(tmp_path_factory) -> str:
    """A PYTHONPATH on which every optional package fails to import."""
    folder = tmp_path_factory.mktemp("absent")
    for name in ("tiktoken", "datasets", "tqdm", "requests", "wandb", "tensorboard", "safetensors",
                 "huggingface_hub", "transformers"):
        (folder / f"{name}.py").write_text(f"raise ImportError({name!r})\n")
    return str(folder)


@pytest.fixture(scope="module")
def second(out, whole, text_dataset, torch_only) -> Path:
    """A new run in the folder of `whole`, with torch and numpy alone."""
    shutil.copytree(whole, out / "second")
    done = run(ROOT / "train.py", *TINY, f"--dataset={text_dataset}", f"--out_dir={out / 'second'}",
               "--max_iters=1", PYTHONPATH=torch_only)
    assert done.returncode == 0, done.stderr
    return out / "second"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    """A GPT-2 of random weights, saved by transformers."""
    torch.manual_seed(3)
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_positions=32, vocab_size=300, n_layer=2, n_head=2, n_embd=16, bos_token_id=0,
        eos_token_id=0))
    for p in hf.parameters():
        p.data.normal_(std=0.2)
    folder = tmp_path_factory.mktemp("gpt2")
    hf.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bpe_dataset(tmp_path_factory) -> Path:
    """uint16 ids below 300, the higher the rarer, without meta.pkl."""
    folder = tmp_path_factory.mktemp("bpe_dataset")
    rng = np.random.default_rng(4)
    for name, length in (("train", 5000), ("val", 500)):
        ids = (300 * rng.random(length) ** 3).astype("<u2")
        ids.tofile(folder / f"{name}.bin")
    return folder


@pytest.fixture(scope="module")
def fine_tuned(out, gpt2, bpe_dataset) -> Path:
    """`gpt2` fine-tuned with a rate that grows until the loss does."""
    train(f"--dataset={bpe_dataset}", f"--out_dir={out / 'fine_tuned'}", f"--init_from={gpt2}",
          "--eval_iters=0", "--eval_interval=1", "--max_iters=3", "--learning_rate=3",
          "--warmup_iters=30", "--lr_decay_iters=31")
    return out / "fine_tuned"


# ------------------------------------------------------------------------------- steps, evaluations

def test_exactly_max_iters_steps_are_made(whole):
    assert [record["iter"] for record in steps(whole)] == list(range(8))
    saved = load(whole / "ckpt.pt")
    assert saved["iter_num"] == 8
    assert {s["step"].item() for s in saved["optimizer"]["state"].values()} == {8}


def test_evaluations_are_at_multiples_of_eval_interval_and_at_the_end(four_by_two):
    assert [record["iter"] for record in evaluations(four_by_two)] == [0, 4, 6]


def test_log_interval_thins_out_the_steps_logged(eight_by_one):
    assert [record["iter"] for record in steps(eight_by_one)] == [0, 3]


def test_metrics_have_the_documented_keys(whole):
    assert all(record.keys() == STEP_KEYS for record in steps(whole))
    assert all(record.keys() == EVALUATION_KEYS for record in evaluations(whole))
    assert len(records(whole)) == len(steps(whole)) + len(evaluations(whole))


def test_mfu_is_null_where_the_peak_is_unknown(whole):
    assert {record["mfu"] for record in steps(whole)} == {None}


def test_tokens_per_second_are_those_of_the_timed_phases(whole):
    for record in steps(whole):
        ms = sum(record[key] for key in record if key.endswith("_ms"))
        assert record["tokens_per_s"] == pytest.approx(2 * 4 * 16 / (ms / 1e3))


def test_perplexity_is_the_exponential_of_the_loss(whole):
    for record in evaluations(whole):
        assert record["val_perplexity"] == pytest.approx(math.exp(record["val_loss"]))


def test_the_model_learns(whole):
    first, *_, last = evaluations(whole)
    assert first["val_loss"] == pytest.approx(math.log(14), abs=0.1)  # of 14 characters
    assert last["val_loss"] < first["val_loss"] - 0.2
    assert last["train_loss"] < first["train_loss"] - 0.2


def test_an_evaluation_depends_on_the_weights_alone(whole, clipped):
    after, before = evaluations(whole)[-1], evaluations(clipped)[0]
    assert (after["iter"], before["iter"]) == (8, 0)
    for key in ("train_loss", "val_loss", "val_accuracy"):  # with dropout on and off in training
        assert before[key] == after[key]


def test_eval_only_covers_the_whole_validation_split_and_writes_nothing(whole, text_dataset):
    before = snapshot(whole)
    printed = plain_train(f"--out_dir={whole}", "--init_from=resume", "--eval_only=True",
                          "--eval_iters=0")
    assert snapshot(whole) == before
    gpt = GPT.from_checkpoint(load(whole / "ckpt.pt")).eval()
    tokens = np.fromfile(text_dataset / "val.bin", "<u2")
    loss, accuracy = loss_and_accuracy(lambda idx: gpt(idx, idx)[0], tokens)
    found = re.search(r"step 8: .*val loss ([\d.]+), .*accuracy ([\d.]+)%", printed)
    assert float(found[1]) == pytest.approx(loss, abs=6e-5)  # four digits are printed
    assert float(found[2]) == pytest.approx(100 * accuracy, abs=0.051)


# ---------------------------------------------------------------------------------------- optimizer

def test_the_learning_rate_warms_up_and_follows_a_cosine(whole, clipped, four_by_two):
    def rates(out_dir: Path) -> list[float]:
        return [record["lr"] for record in steps(out_dir)]

    warm_up = [1e-2 / 3, 2e-2 / 3]
    assert rates(whole) == pytest.approx([
        *warm_up, *(5.5e-3 + 4.5e-3 * math.cos(math.pi * k / 6) for k in range(6))])
    assert rates(clipped) == pytest.approx([*warm_up, 1e-2, 7.75e-3, 3.25e-3, 1e-3, 1e-3, 1e-3])
    assert rates(four_by_two) == [1e-2] * 6  # decay_lr = False


def test_without_gradients_weights_decay_by_lr_times_weight_decay(whole, clipped):
    before, after = load(whole / "ckpt.pt")["model"], load(clipped / "ckpt.pt")["model"]
    shrink = math.prod(1 - record["lr"] * 0.1 for record in steps(clipped))
    for name, tensor in before.items():
        expected = tensor * shrink if tensor.dim() >= 2 else tensor
        torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-8)


def test_the_norm_logged_is_the_one_before_clipping(clipped):
    assert all(record["grad_norm"] > 0.01 for record in steps(clipped))


def test_a_grad_clip_of_0_clips_nothing(four_by_two):
    assert losses(four_by_two)[-1] < losses(four_by_two)[0] - 0.1


def test_a_batch_does_not_depend_on_how_it_is_split(four_by_two, eight_by_one):
    assert losses(eight_by_one) == pytest.approx(losses(four_by_two)[::3], rel=1e-5)
    for key in ("lr", "grad_norm"):
        assert [record[key] for record in steps(eight_by_one)] == pytest.approx(
            [record[key] for record in steps(four_by_two)[::3]], rel=1e-4)


# -------------------------------------------------------------------------------------- checkpoints

def test_checkpoints_have_the_documented_keys(whole):
    for name in ("ckpt.pt", "best.pt"):
        assert load(whole / name).keys() == {
            "model", "optimizer", "scaler", "model_args", "config", "iter_num", "best_val_loss",
            "history", "meta", "seconds", "bad_steps"}


def test_the_vocabulary_is_the_datasets(whole):
    saved = load(whole / "ckpt.pt")
    assert saved["model_args"]["vocab_size"] == saved["meta"]["vocab_size"] == 14


def test_the_last_step_is_saved_without_always_save_checkpoint(four_by_two):
    assert load(four_by_two / "ckpt.pt")["iter_num"] == 6


def test_best_holds_the_lowest_validation_loss(fine_tuned):
    lowest = min(evaluations(fine_tuned), key=lambda record: record["val_loss"])
    assert 0 < lowest["iter"] < 3
    best = load(fine_tuned / "best.pt")
    assert (best["iter_num"], best["best_val_loss"]) == (lowest["iter"], lowest["val_loss"])
    assert load(fine_tuned / "ckpt.pt")["best_val_loss"] == lowest["val_loss"]


def test_a_new_run_moves_the_earlier_one_to_previous(second, whole):
    for name in ("ckpt.pt", "best.pt", "metrics.jsonl"):
        assert (second / "previous-1" / name).read_bytes() == (whole / name).read_bytes()
    assert [record["iter"] for record in records(second)] == [0, 0, 1]
    assert load(second / "ckpt.pt")["iter_num"] == 1


# ----------------------------------------------------------------------------------------- resuming

@pytest.mark.parametrize("name", ["resumed", "resumed_from_best"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(name, whole, request):
    assert differences(request.getfixturevalue(name), whole) == []


def test_dropout_changes_the_loss_of_the_first_step(whole, four_by_two):
    assert losses(whole)[0] != pytest.approx(losses(four_by_two)[0], rel=1e-6)


def test_seconds_include_the_parts_before(resumed_from_best):
    assert all(record["seconds"] > 1000 for record in steps(resumed_from_best)[4:])


def test_resuming_restores_the_settings_but_those_of_the_machine(resumed, whole):
    ours, expected = load(resumed / "ckpt.pt")["config"], load(whole / "ckpt.pt")["config"]
    assert ours.keys() == expected.keys()
    differing = {key for key in ours if ours[key] != expected[key]}
    assert differing == {"out_dir", "init_from", "device"}


def test_the_settings_that_are_restored_and_those_that_are_not_are_printed(resumption):
    _, printed = resumption
    restored, = re.findall(r"^from the checkpoint: (.*)", printed, re.MULTILINE)
    assert {"n_layer=2", "dropout=0.1", "learning_rate=0.01"} < set(restored.split())
    assert "max_iters" not in restored and "device" not in restored
    other, = re.findall(r"^in the checkpoint, but not restored: (.*)", printed, re.MULTILINE)
    assert other == "device='cpu' max_iters=4"


def test_init_from_auto_starts_a_new_run_without_a_checkpoint(half):
    assert [record["iter"] for record in steps(half)] == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------- pretrained

def test_fine_tuning_starts_from_the_loss_that_transformers_has(fine_tuned, gpt2, bpe_dataset):
    hf = transformers.GPT2LMHeadModel.from_pretrained(gpt2).eval()
    tokens = np.fromfile(bpe_dataset / "val.bin", "<u2")
    loss, accuracy = loss_and_accuracy(lambda idx: hf(idx).logits, tokens)
    first = evaluations(fine_tuned)[0]
    assert first["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert first["val_accuracy"] == pytest.approx(accuracy, abs=0.003)  # one token may be a tie


def test_the_shape_of_a_fine_tuned_model_is_the_files_but_for_the_block_size(fine_tuned):
    saved = load(fine_tuned / "ckpt.pt")
    expected = {"block_size": 16, "vocab_size": 300, "n_layer": 2, "n_head": 2, "n_embd": 16,
                "bias": True, "activation": "gelu_tanh", "dropout": 0.0}
    assert saved["model_args"] == expected
    del expected["vocab_size"]
    assert {key: saved["config"][key] for key in expected} == expected
    assert saved["meta"] is None


# --------------------------------------------------------------------------- machine, logging

def test_bfloat16_on_a_cpu_is_close_to_float32_and_keeps_float32_weights(logged, four_by_two):
    assert losses(logged)[0] == pytest.approx(losses(four_by_two)[0], rel=1e-2)
    assert losses(logged)[0] != losses(four_by_two)[0]
    assert {t.dtype for t in load(logged / "ckpt.pt")["model"].values()} == {torch.float32}


def test_tensorboard_has_the_numbers_of_metrics_jsonl(logged):
    events = EventAccumulator(str(logged / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == (STEP_KEYS | EVALUATION_KEYS) - {"mfu"}
    assert [e.step for e in events.Scalars("loss")] == [0, 1]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(losses(logged))
    assert [e.value for e in events.Scalars("val_loss")] == pytest.approx(
        [record["val_loss"] for record in evaluations(logged)])


def test_wandb_logs_offline(logged):
    file, = (logged / "wandb").glob("offline-run-*/*.wandb")
    assert file.stat().st_size > 0


def test_a_character_model_trains_and_samples_with_torch_and_numpy_alone(second, torch_only):
    done = run(ROOT / "sample.py", f"--out_dir={second}", "--num_samples=1", "--start=to be",
               "--max_new_tokens=5", "--device=cpu", PYTHONPATH=torch_only)
    assert done.returncode == 0, done.stderr
    assert "to be" in done.stdout


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
def test_a_compiled_run_computes_the_same_and_saves_plain_names(
        four_by_two, text_dataset, tmp_path):
    train(f"--dataset={text_dataset}", f"--out_dir={tmp_path}", "--compile=True", "--max_iters=1",
          TORCHINDUCTOR_COMPILE_THREADS="1")
    assert losses(tmp_path)[0] == pytest.approx(losses(four_by_two)[0], rel=1e-5)
    names = load(four_by_two / "ckpt.pt")["model"].keys()
    assert load(tmp_path / "ckpt.pt")["model"].keys() == names


def test_on_a_terminal_a_bar_shows_loss_speed_and_time_left(text_dataset, tmp_path):
    terminal, its_end = os.openpty()
    subprocess.run([sys.executable, ROOT / "train.py", *TINY, f"--dataset={text_dataset}",
                    f"--out_dir={tmp_path}"], stderr=its_end, stdout=subprocess.PIPE, check=True)
    os.close(its_end)
    shown = os.read(terminal, 65536).decode()
    os.close(terminal)
    assert re.search(r"8/8 \[\d\d:\d\d<\d\d:\d\d, .*it/s, loss \d\.\d+, [\d,]+ tok/s\]", shown)
