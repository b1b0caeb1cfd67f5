"""How fast does this machine train and sample? Needs neither data nor a GPU.

    python bench.py                                          # GPT-2 124M
    python bench.py --n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --batch_size=12
    python bench.py --profile=True                           # and a trace of where the time goes

Settings are the variables below; config files and --key=value arguments override them.
"""

from configurator import check, choose, configure, user_errors

batch_size: int | None = None  # sequences in a step; None: 12 on a GPU, 1 elsewhere
block_size = 1024  # tokens in a sequence
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0
bias = False  # in Linear and LayerNorm
activation = "gelu_tanh"  # gelu_tanh | gelu | relu
real_data = True  # read the dataset's train.bin if it is there, else make up random tokens
dataset = "openwebtext"  # a folder under data/, or the absolute path of one
steps: int | None = None  # training steps to time, after a warm-up; None: 20 on a GPU, 3 elsewhere
new_tokens = 64  # tokens to sample
seed = 1337
device: str | None = None  # cpu | cuda | cuda:1 | mps; None: choose
dtype: str | None = None  # float32 | bfloat16 | float16; None: choose
compile: bool | None = None  # torch.compile; None: on CUDA
profile = False  # write a torch.profiler trace of two steps to bench_trace/

configure(globals())
check(globals(), "batch_size is None or batch_size >= 1", "block_size >= 1", "n_layer >= 1",
      "n_head >= 1", "n_embd >= 1", "0 <= dropout < 1", "steps is None or steps >= 1",
      "new_tokens >= 1", "0 <= seed < 2**64")

import os
import time
from dataclasses import fields
from statistics import median

import numpy as np
import torch

import runtime
from data.bins import check_vocabulary, dataset_folder, gather, open_bin, random_starts
from data.tokenizer import load_meta
from metrics import Stopwatch
from model import ACTIVATIONS, GPT, GPTConfig

rt = runtime.start(device, dtype, compile)
gpu = rt.device.type == "cuda"
batch_size = batch_size or (12 if gpu else 1)
steps = steps or (20 if gpu else 3)

# --------------------------------------------------------------------------------- data and model

path = dataset_folder(dataset) / "train.bin"
found = real_data and os.path.exists(path)
meta = load_meta(path.parent) if found else None
vocab_size = meta["vocab_size"] if meta else 50304
if found:
    tokens = open_bin(path, block_size)
    check_vocabulary(tokens, vocab_size)
    print(f"tokens of {path}")
else:
    tokens = np.random.default_rng(seed).integers(0, vocab_size, 2**20).astype(np.uint16)
    print(f"random tokens{f', as there is no {path}' if real_data else ''}")

choose("activation", activation, list(ACTIVATIONS))
torch.manual_seed(seed)
with user_errors():
    model = GPT(GPTConfig(**{f.name: globals()[f.name] for f in fields(GPTConfig)})).to(rt.device)
optimizer = model.configure_optimizers(weight_decay=0.1, learning_rate=1e-4, betas=(0.9, 0.95))
net = torch.compile(model) if rt.compile else model
stopwatch = Stopwatch(rt)
print(f"{model.get_num_params() / 1e6:.1f}M parameters, {batch_size} x {block_size} tokens a step")

# -------------------------------------------------------------------------------------- matmul


def matmul_flops_per_s(n: int) -> float:
    """What a plain n x n x n matrix product reaches in the same precision, to compare with."""
    a, b = (torch.randn(n, n, device=rt.device, dtype=getattr(torch, rt.dtype)) for _ in range(2))
    times = []
    for _ in range(6):
        rt.synchronize()
        before = time.perf_counter()
        a @ b
        rt.synchronize()
        times.append(time.perf_counter() - before)
    return 2 * n**3 / median(times[1:])


# -------------------------------------------------------------------------------------- training


def train_step(i: int) -> None:
    stopwatch.start()
    starts = random_starts(len(tokens), block_size, batch_size, (seed, i))
    x, y = rt.to_device(*gather(tokens, starts, block_size, vocab_size))
    stopwatch.lap("data")
    with rt.autocast():
        loss = net(x, y)[1]  # a name for the logits would keep them in memory
    stopwatch.lap("forward")
    loss.backward()
    stopwatch.lap("backward")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    stopwatch.lap("optimizer")


n = 8192 if gpu else 2048  # long enough to hide the cost of its start
bound = matmul_flops_per_s(n)
for i in range(3 if rt.compile else 1):
    train_step(i)  # allocates, and compiles
stopwatch.read()
timings = []
for i in range(steps):
    train_step(i)
    timings.append(stopwatch.read())
phases_ms = {phase: median(t[phase] for t in timings) for phase in timings[0]}
dt = median(sum(t.values()) for t in timings) / 1e3
flops_per_s = model.flops_per_token() * batch_size * block_size / dt
mfu = model.estimate_mfu(batch_size, dt, rt.peak_flops())
print(f"training: {batch_size * block_size / dt:,.0f} tok/s, {dt * 1e3:,.1f} ms a step ("
      + ", ".join(f"{phase} {ms:.1f}" for phase, ms in phases_ms.items())
      + f"), median of {steps}")
print(f"          {flops_per_s / 1e9:,.0f} GFLOP/s, {flops_per_s / bound:.0%} of the "
      f"{bound / 1e9:,.0f} GFLOP/s of a {n}^3 matrix product in {rt.dtype}"
      + (f", MFU {mfu:.1%}" if mfu else ""))
print(f"          {rt.peak_memory() / 1e9:.2f} GB peak memory")

if profile:
    handler = torch.profiler.tensorboard_trace_handler("bench_trace")
    with torch.profiler.profile(on_trace_ready=handler, record_shapes=True):
        train_step(0)
        train_step(1)
        rt.synchronize()
    print("          trace in bench_trace/: open it at https://ui.perfetto.dev")

# -------------------------------------------------------------------------------------- sampling

model.eval()
idx = torch.zeros(1, 1, dtype=torch.long, device=rt.device)
n_new = min(new_tokens, block_size)
times = []
with rt.autocast():
    for _ in range(4):
        rt.synchronize()
        before = time.perf_counter()
        model.generate(idx, n_new, top_k=200)
        rt.synchronize()
        times.append(time.perf_counter() - before)
print(f"sampling: {n_new / median(times[1:]):,.1f} tok/s, one sequence of {n_new} tokens, "
      f"top_k 200")
