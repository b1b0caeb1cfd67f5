"""Sharded training against unsharded training, which other tests hold to torch's own optimizers."""

import json
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import MODERN, ROOT, forked, relative

MUON = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
SHAPE = {"block_size": 16, "vocab_size": 50, "n_layer": 2, "n_head": 2, "n_embd": 24}

# Gradients of 6 micro-batches, and the weights after two steps of Muon, by n processes.
WORKER = """
import json, os, sys
sys.path.insert(0, os.environ["ROOT"])
import configurator, torch
from datetime import timedelta
from engine import runtime, sharding
from engine.muon import configure_muon
from model import GPT, GPTConfig

settings, out, is_sharded = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
torch.manual_seed(0)
model = GPT(GPTConfig(**settings))
rt = runtime.start("cpu", "float32", False, 24, 0.0)
if is_sharded:
    sharding.shard(model, rt)
opt = configure_muon(model, 0.1, 1e-2, (0.9, 0.95), 0.02, 0.95, torch.float32)
torch.manual_seed(1)
idx = torch.randint(settings["vocab_size"], (2, 6, 4, settings["block_size"]))
for step in range(2):
    mine = range(rt.rank, 6, rt.world_size)
    for n, i in enumerate(mine, start=1):
        if is_sharded:
            model.set_requires_gradient_sync(n == len(mine))
        (model(idx[step, i], idx[step, i], loss_only=True)[1] / len(mine)).backward()
    if not is_sharded:
        for p in model.parameters():
            p.grad = rt.all_reduce(p.grad) / rt.world_size
    if step == 0:
        grads = {name: p.grad.full_tensor() if is_sharded else p.grad.clone()
                 for name, p in model.named_parameters()}
    opt.step()
    opt.zero_grad()
weights = {name: p.full_tensor() if is_sharded else p for name, p in model.named_parameters()}
n_local = sum((p.to_local() if is_sharded else p).numel() for p in model.parameters())
if rt.rank == 0:
    torch.save({"grads": grads, "weights": weights, "n_local": n_local}, out)
rt.cleanup(0)
"""


def by_processes(folder: Path, n: int, is_sharded: bool, settings: dict) -> dict:
    (folder / "worker.py").write_text(WORKER)
    out = folder / f"{n}{is_sharded}.pt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(rank: int) -> subprocess.CompletedProcess:
        return forked([str(folder / "worker.py"), json.dumps(settings), str(out), str(is_sharded)],
                      folder, {"ROOT": str(ROOT), "RANK": str(rank), "LOCAL_RANK": str(rank),
                               "WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1",
                               "MASTER_PORT": str(port)})

    with ThreadPoolExecutor(n) as pool:
        for done in pool.map(start, range(n)):
            assert done.returncode == 0, done.stderr
    return torch.load(out)


@pytest.mark.parametrize("settings", [SHAPE, SHAPE | MODERN], ids=["gpt2", "modern"])
def test_gradients_and_steps_of_muon_are_those_of_one_process(settings, tmp_path):
    expected = by_processes(tmp_path, 1, False, settings)
    for n, is_sharded in ((2, False), (2, True), (3, True)):
        found = by_processes(tmp_path, n, is_sharded, settings)
        for name, grad in expected["grads"].items():
            assert relative(found["grads"][name], grad) < 1e-5, (n, is_sharded, name)
        for name in (name for name in expected["weights"] if name.endswith(MUON)):
            weight = expected["weights"][name]
            assert relative(found["weights"][name], weight) < 1e-5, (n, is_sharded, name)
        share = found["n_local"] / expected["n_local"]
        assert share < 1.2 / n if is_sharded else share == 1
