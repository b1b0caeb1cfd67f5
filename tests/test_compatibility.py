"""Checkpoints and losses against the classic minimal GPT trainers: transformers' GPT-2, with the
names, groups and files of these trainers, in a plain loop of torch."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import TINY, load, records, script, write_bin

from data import bins
from model import GPTConfig

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "bias": True}
script = partial(script, CUDA_VISIBLE_DEVICES="")


def classic_model(vocab_size: int, activation: str = "gelu", n_positions: int = 16,
                  ) -> transformers.GPT2LMHeadModel:
    """GPT-2 of SHAPE by transformers, with nn.Linear in place of its transposed Conv1D, so that
    names and shapes of the parameters are those of the classic trainers."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, n_positions=n_positions, vocab_size=vocab_size,
        activation_function=activation, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0))
    for block in model.transformer.h:
        for part, name in ((block.attn, "c_attn"), (block.attn, "c_proj"), (block.mlp, "c_fc"),
                           (block.mlp, "c_proj")):
            weight = getattr(part, name).weight.data.t().contiguous()
            setattr(part, name, torch.nn.Linear(*weight.shape[::-1]))
            getattr(part, name).weight.data = weight
            getattr(part, name).bias.data.normal_(std=0.1)
    return model


def classic_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW with the two groups of the classic trainers."""
    params = [p for _, p in model.named_parameters()]
    return torch.optim.AdamW(
        [{"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1},
         {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.95))


def classic_steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, dataset: Path,
                  iters: range) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of a plain loop: settings TINY with grad_clip = 0.2."""
    tokens = np.fromfile(dataset / "train.bin", "<u2")
    results = []
    for i in iters:
        lr = 1e-2 * (i + 1) / 3 if i < 2 else (
            1e-3 + 9e-3 * (1 + math.cos(math.pi * min(1, (i - 2) / 6))) / 2)
        for group in optimizer.param_groups:
            group["lr"] = lr
        offsets = bins.random_offsets(len(tokens), 16, 8, (0, 1337, i))  # as train.py draws them
        total = 0.0
        for micro_batch in np.split(offsets, 2):
            rows = torch.from_numpy(tokens[micro_batch[:, None] + np.arange(17)].astype(np.int64))
            logits = model(rows[:, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()) / 2
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        optimizer.step()
        optimizer.zero_grad()
        results.append((total, norm.item()))
    return results


def our_steps(folder: Path, iters: range) -> list:
    """What train.py logged for these steps, to compare with classic_steps."""
    return [pytest.approx((record["loss"], record["grad_norm"]), abs=1e-4, rel=1e-4)
            for record in records(folder, "loss") if record["iter"] in iters]


def test_ten_steps_of_train_py_are_those_of_transformers_and_torch(tmp_path):
    rng = np.random.default_rng(0)
    ids = rng.integers(300, size=60)[np.cumsum(rng.integers(1, 4, size=5000)) % 60]
    for name in ("train", "val"):  # without a vocabulary: ids of GPT-2's BPE
        write_bin(tmp_path / f"{name}.bin", ids)
    model = classic_model(300, "gelu_new", n_positions=32)  # of which block_size = 16 remain
    state = {name: tensor.t() if "c_" in name and tensor.dim() == 2 else tensor
             for name, tensor in model.state_dict().items()}  # as GPT-2's files have them
    torch.save(state, tmp_path / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path)
    script("train.py", *TINY, f"--init_from={tmp_path}", f"--dataset={tmp_path}", "--max_iters=10",
           "--activation=gelu_tanh", "--grad_clip=0.2", "--out_dir=out", cwd=tmp_path)
    expected = classic_steps(model, classic_optimizer(model), tmp_path, range(10))
    assert expected == our_steps(tmp_path / "out", range(10))
    assert expected[-1][0] < expected[0][0] - 0.1
    saved = load(tmp_path / "out/ckpt.pt")
    shape = SHAPE | {"activation": "gelu_tanh", "dropout": 0.0}
    assert saved["model_args"] == shape | {"vocab_size": 300}
    assert saved["config"] | shape == saved["config"]
    assert saved["meta"] is None


def test_a_classic_checkpoint_resumes_without_flags(text_dataset, tmp_path):
    vocab_size = len(set(np.fromfile(text_dataset / "train.bin", "<u2").tolist()))
    model = classic_model(vocab_size)
    optimizer = classic_optimizer(model)
    classic_steps(model, optimizer, text_dataset, range(4))
    model_args = SHAPE | {"vocab_size": vocab_size, "dropout": 0.0}
    (tmp_path / "out").mkdir()
    torch.save({
        "model": {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()},
        "optimizer": optimizer.state_dict(), "model_args": model_args, "iter_num": 4,
        "best_val_loss": torch.tensor(2.5),
        "config": SHAPE | {
            "out_dir": "out", "eval_interval": 4, "log_interval": 1, "eval_iters": 2,
            "eval_only": False, "always_save_checkpoint": True, "init_from": "scratch",
            "wandb_log": False, "wandb_project": "owt", "wandb_run_name": "gpt2",
            "dataset": str(text_dataset), "gradient_accumulation_steps": 2, "batch_size": 4,
            "dropout": 0.0, "learning_rate": 1e-2, "max_iters": 8, "weight_decay": 0.1,
            "beta1": 0.9, "beta2": 0.95, "grad_clip": 0.2, "decay_lr": True, "warmup_iters": 2,
            "lr_decay_iters": 8, "min_lr": 1e-3, "backend": "nccl", "device": "cuda",
            "dtype": "float16", "compile": True}}, tmp_path / "out/ckpt.pt")
    printed = script("train.py", "--init_from=resume", cwd=tmp_path).stdout
    assert ("in the checkpoint, but not restored: backend='nccl' compile=True device='cuda' "
            "dtype='float16'") in printed
    assert classic_steps(model, optimizer, text_dataset, range(4, 8)) == our_steps(
        tmp_path / "out", range(8))
    saved = load(tmp_path / "out/ckpt.pt")
    assert (saved["iter_num"], saved["model_args"]) == (8, model_args)
    assert saved["config"]["activation"] == "gelu"
    assert "to be" in script("sample.py", "--start=to be", "--num_samples=1", "--max_new_tokens=8",
                             cwd=tmp_path).stdout


def test_a_classic_run_of_ours_resumes_in_classic_trainers(text_dataset, tmp_path):
    script("train.py", *TINY, f"--dataset={text_dataset}", "--activation=gelu", "--bias=True",
           "--grad_clip=0.2", "--keep_every=4", "--out_dir=out", cwd=tmp_path)
    checkpoint = load(tmp_path / "out/ckpt_00000004.pt")
    model_args = checkpoint["model_args"]
    assert model_args == SHAPE | {"vocab_size": model_args["vocab_size"], "dropout": 0.0}
    assert checkpoint["config"]["dataset"] == str(text_dataset)
    assert (checkpoint["iter_num"], checkpoint["best_val_loss"] > 0) == (4, True)
    model = classic_model(model_args["vocab_size"])
    model.load_state_dict(checkpoint["model"], strict=True)
    optimizer = classic_optimizer(model)
    optimizer.load_state_dict(checkpoint["optimizer"])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert classic_steps(model, optimizer, text_dataset, range(4, 8)) == our_steps(
        tmp_path / "out", range(4, 8))


@pytest.mark.parametrize("setting", [
    {"activation": "gelu_tanh"}, {"activation": "relu2"}, {"positions": "rotary"},
    {"qk_norm": True}, {"smear": True}, {"tie_weights": False}, {"bigram": True}])
def test_model_args_name_departures_from_the_classic_network_alone(setting):
    config = GPTConfig(**SHAPE | {"vocab_size": 100, "activation": "gelu"} | setting)
    model_args = config.to_model_args()
    assert model_args == SHAPE | {"vocab_size": 100, "dropout": 0.0} | setting
    assert GPTConfig.from_model_args(model_args) == config
