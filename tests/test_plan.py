"""The plan of a run, against published and measured figures."""

import json

import pytest
import torch
from conftest import ROOT, run

from engine.plan import bytes_per_step, memory_by_part
from model import GPT, GPTConfig


def test_the_published_run_is_predicted(tmp_path):
    path = tmp_path / "plan.json"
    done = run(ROOT / "bench.py", ROOT / "config/train_gpt2.py", "--mode=plan", "--gpu=A100",
               "--n_gpus=8", "--usd_per_gpu_hour=2", f"--json={path}")
    assert done.returncode == 0, done.stderr
    plan = json.loads(path.read_text())["plan"]
    assert plan["days"] == pytest.approx(4, rel=0.25)  # "about 4 days", 300B tokens
    assert plan["tokens"] == pytest.approx(300e9, rel=0.02)
    assert plan["usd"] == pytest.approx(2 * 8 * 24 * plan["days"])
    assert plan["parameters"] == pytest.approx(124e6, rel=0.01)
    assert plan["largest_batch_size"] >= 12  # what that run had on 40 GB


@pytest.mark.parametrize("settings", [{}, {"bias": False, "activation": "relu2"}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_what_autograd_saves(settings, dtype):
    sizes = {}
    for n_layer in (1, 3):
        model = GPT(GPTConfig(block_size=64, vocab_size=64, n_layer=n_layer, n_head=2, n_embd=64,
                              **settings))
        idx = torch.randint(64, (8, 64))
        storages = {}

        def pack(t: torch.Tensor, storages: dict = storages) -> torch.Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t

        with (torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
              torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")):
            model(idx, idx, loss_only=True)
        casts = 2 * sum(p.numel() for p in model.transformer.h.parameters() if p.dim() == 2)
        for p in model.parameters():
            storages.pop(p.data_ptr(), None)
        sizes[n_layer] = (sum(s.nbytes() for s in storages.values())
                          - (casts if dtype == "bfloat16" else 0),
                          memory_by_part(model, 8, dtype, "adamw", 1)["activations"])
    measured, predicted = (sizes[3][i] - sizes[1][i] for i in (0, 1))
    assert predicted == pytest.approx(measured, rel=0.03)


def test_recomputing_blocks_leaves_the_activations_of_one_and_the_inputs_of_all():
    model = GPT(GPTConfig(block_size=64, vocab_size=64, n_layer=3, n_head=2, n_embd=64))
    per_layer = []
    for model.recompute in (False, True):
        sizes = []
        for layers in (3, 5):
            model.config.n_layer = layers
            sizes.append(memory_by_part(model, 8, "bfloat16", "adamw", 1)["activations"])
        per_layer.append((sizes[1] - sizes[0]) / 2)
    assert per_layer[1] == 8 * 64 * 64 * 4 < per_layer[0] / 5


@pytest.mark.parametrize("args, words", [
    (["--gpu=H1000"], ["gpu = 'H1000'", "did you mean H100"]),
    (["--gpu=T4", "--dtype=bfloat16"], ["'bfloat16'", "T4"]), (["--mfu=0"], ["mfu"]),
    (["--dtype=fp16"], ["dtype = 'fp16'", "float16"]), (["--n_gpus=7"], ["divisible by 7"])])
def test_a_wrong_plan_is_one_sentence(args, words):
    done = run(ROOT / "bench.py", "--mode=plan", *args)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words)


def test_a_gpu_holds_its_share_of_a_sharded_model_and_a_block_at_a_time():
    model = GPT(GPTConfig(block_size=64, vocab_size=64, n_layer=10, n_head=2, n_embd=64))
    n_params = sum(p.numel() for p in model.parameters())
    n_block = sum(p.numel() for p in model.transformer.h[0].parameters())
    n_rest = n_params - 10 * n_block
    parts = memory_by_part(model, 1, "float32", "adamw", 4, shard=True)
    assert parts["weights"] == n_params + 8 * n_block + 4 * n_rest
    assert parts["optimizer"] == 2 * n_params and parts["ddp_buckets"] == 0
    assert parts["gradients"] == n_params + 4 * (n_block + n_rest)
    assert memory_by_part(model, 1, "float32", "adamw", 4, True, True)["gradients"] == 4 * n_params


def test_bytes_sent_are_those_of_ring_collectives():
    model = GPT(GPTConfig(block_size=64, vocab_size=64, n_layer=10, n_head=2, n_embd=64))
    n_params = sum(p.numel() for p in model.parameters())
    n_blocks = sum(p.numel() for p in model.transformer.h.parameters())
    assert bytes_per_step(model, "float32", 1, False, 3) == 0
    assert bytes_per_step(model, "bfloat16", 4, False, 3) == 2 * 4 * n_params * 3 / 4
    assert bytes_per_step(model, "bfloat16", 4, True, 3) == pytest.approx(
        (4 * n_params + 3 * (2 * 2 * n_blocks + 4 * (n_params - n_blocks))) * 3 / 4)
