"""Measure how fast this machine trains, samples and prepares data, and compare with peers.

    python bench.py                                            # GPT-2 124M: training and sampling
    python bench.py config/train_shakespeare_char.py --mode=train --peer=plain
    python bench.py --mode=sample --num_samples=10 --json=bench.json
    python bench.py --mode=data                                # data/openwebtext/prepare.py
    python bench.py --mode=train --profile=True                # and a trace of two steps
    python bench.py config/train_gpt2.py --mode=plan --gpu=H100 --n_gpus=8   # needs no GPU

Needs neither a dataset nor a GPU. What is compared is timed in turn, round by round, and with it a
matrix product and a memory read, so that a change in the machine's load affects all alike. Figures
are medians over the rounds (means for the phases of a training step), printed by their names in
--json. A training step is one micro-batch. `of_matmul` is a fraction of the matrix product's
FLOP/s, `of_memory_bound` of the rate at which memory delivers the weights; `times_as_long` is the
time of the peer divided by ours.

Settings are the variables below; config files and --key=value arguments override them. Other
settings of train.py in config files are ignored.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # for python -I

from configurator import (ROOT, UserError, check, check_choice, configure, regular_file,
                          user_errors)

mode: str | None = None  # train | sample | data | plan | all (three); None: train and sample
peer: str | None = None  # plain (PyTorch's layers, float32, no cache) | transformers
rounds: int | None = None  # timed calls of each function; None: 20 on a GPU, 5 elsewhere
json: str | None = None  # write the figures, and a description of the machine, to this file
profile = False  # write a torch.profiler trace to bench_trace/
# data
real_data = True  # train on the dataset if it is prepared; False: on random tokens
dataset = "openwebtext"  # folder under data/, or an absolute path
batch_size: int | None = None  # sequences per micro-batch; None: 12 on a GPU, 1 elsewhere
block_size = 1024  # tokens per sequence
input_mb = 60.0  # megabytes of JSON lines to prepare with mode = data
# model
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # 0 for pretraining; 0.1 or more for small datasets
bias = False  # use bias in Linear and LayerNorm, as GPT-2 does
activation = "gelu_tanh"  # gelu_tanh | gelu | relu | relu2 (squared ReLU)
positions = "learned"  # learned | rotary
qk_norm = False  # RMS-normalize queries and keys
smear = False  # add a learned fraction of the previous token's embedding
bigram = False  # add a learned embedding of each pair of tokens (small vocabularies)
tie_weights = True  # the output layer shares the token embeddings
optimizer = "adamw"  # adamw | muon (for matrices of the blocks, with AdamW for the rest)
# sampling
num_samples = 1  # drawn as one batch
new_tokens = 256  # per sample
top_k = 200  # sample from the k most likely tokens
# planning a run: mode = plan
gpu = "A100"  # a name in PEAK_TFLOPS, engine/runtime.py
n_gpus = 1
gpu_memory_gb: float | None = None  # None: what such a GPU has
mfu = 0.3  # fraction of the GPU's peak that the run will reach
usd_per_gpu_hour: float | None = None
link_gb_per_s = 50.0  # gigabytes that a GPU sends per second; 50: InfiniBand at 400 Gbit/s
shard = False  # divide weights, gradients and optimizer state, as train.py --shard=True does
# machine
seed = 1337
device: str | None = None  # cpu | cuda | cuda:1 | mps; None: choose
dtype: str | None = None  # float32 | bfloat16 | float16; None: choose by hardware and model width
recompute = False  # compute the blocks again in the backward pass: less memory, more time
compile: bool | None = None  # torch.compile; None: on a GPU, and on a CPU for long runs
max_iters = 600000  # total number of steps, for mode = plan and compile = None
gradient_accumulation_steps = 5 * 8  # micro-batches per step, likewise

config, _ = configure(globals(), also_accept=ROOT / "train.py")
check(globals(), "rounds is None or rounds >= 1", "json != ''", "1 <= input_mb <= 10**5",
      "batch_size is None or batch_size >= 1", "block_size <= 10**9", "n_layer <= 1000",
      "n_embd <= 10**6", "num_samples >= 1", "new_tokens >= 1", "top_k >= 1",
      "num_samples * new_tokens <= 10**8", "0 <= seed < 2**64", "max_iters >= 1", "n_gpus >= 1",
      "gradient_accumulation_steps >= 1", "0 < mfu <= 1",
      "gpu_memory_gb is None or gpu_memory_gb > 0",
      "usd_per_gpu_hour is None or usd_per_gpu_hour >= 0", "link_gb_per_s > 0",
      "not profile or mode in (None, 'train', 'all')",
      "peer != 'transformers' or mode in ('train', 'data') or new_tokens < block_size")
check_choice("mode", str(mode), ["train", "sample", "data", "plan", "all", "None"])
check_choice("peer", str(peer), ["plain", "transformers", "None"])
check_choice("optimizer", optimizer, ["adamw", "muon"])
modes = {None: ["train", "sample"], "all": ["train", "sample", "data"]}.get(mode, [mode])
if profile and os.path.lexists("bench_trace") and not os.path.isdir("bench_trace"):
    raise UserError("profile = True writes into bench_trace/, but a file is there: move it away")
if json:
    regular_file(Path(json))  # raises OSError before anything is measured
if peer == "transformers" and not find_spec("transformers"):
    raise UserError("peer = 'transformers' needs it: pip install -r requirements-dev.txt")

import itertools
import platform
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from json import dumps
from statistics import median

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import bins
from data.tokenizer import GPT2Tokenizer, load_meta
from engine import cpu, runtime
from engine.metrics import Stopwatch
from engine.muon import configure_muon
from engine.plan import plan
from model import ACTIVATIONS, GPT, GPTConfig

# ----------------------------------------------------------------------------------------- results

results = {"settings": config}


def record(section: str, **figures: float | None) -> None:
    """Add figures to results, and print those that are known on this machine."""
    results.setdefault(section, {}).update(figures)
    for name, value in figures.items():
        if value is not None:
            digits = 3 if value < 10 else 1 if value < 1000 else 0
            print(f"{section:9}{name:25}{value:,.{digits}f}", flush=True)


def write_results() -> None:
    """Write results to the file `json`, if there is one."""
    if json:
        with bins.atomic_write(Path(json)) as (file,):
            file.write(dumps(results, indent=1).encode())


# ------------------------------------------------------------------------------ model and machine

if runtime.dist_info()[1] > 1:
    raise UserError("bench.py measures one process: start it without torchrun")
path = bins.dataset_folder(dataset) / "train.bin"
has_data = real_data and os.path.lexists(path)
meta = load_meta(path.parent) if has_data else None  # None for GPT-2 BPE
vocab_size = meta["vocab_size"] if meta else 50304  # 50,257, padded to a multiple of 64
torch.manual_seed(seed)
with user_errors(), torch.device("meta" if mode == "plan" else "cpu"):
    model_config = GPTConfig(**{f.name: globals()[f.name] for f in fields(GPTConfig)})
    if mode != "plan":
        runtime.check_memory(model_config, (batch_size or 1) * block_size * ("train" in modes),
                             device, bytes_per_weight=4)
    model = GPT(model_config)
model.recompute = recompute
if mode == "plan":
    record("plan", **plan(model, gpu, n_gpus, gpu_memory_gb, dtype, optimizer, batch_size or 12,
                          gradient_accumulation_steps, max_iters, mfu, usd_per_gpu_hour, shard,
                          link_gb_per_s))
    write_results()
    sys.exit()

runtime.check_machine(device, dtype, compile)
on_gpu = runtime.choose_device(device).type == "cuda"
batch_size = batch_size or (12 if on_gpu else 1)
rounds = rounds or (20 if on_gpu else 5)
tokens_per_iter = gradient_accumulation_steps * batch_size * block_size
run_flops = model.flops_per_token() * tokens_per_iter * max_iters if "train" in modes else 0
rt = runtime.start(device, dtype, compile, n_embd, run_flops)
torch_dtype = getattr(torch, rt.dtype)
model.to(rt.device)
if rt.device.type == "cpu":
    cpu.accelerate(model)
capabilities = torch.cpu.get_capabilities()
config |= {"batch_size": batch_size, "rounds": rounds}
results["machine"] = {
    "processor": torch.cuda.get_device_name(rt.device) if on_gpu else
    capabilities.get("cpu_name", platform.machine()),
    "cores": os.cpu_count(), "threads": torch.get_num_threads(),
    "flags": [name for name, value in capabilities.items() if value is True],
    "system": platform.platform(), "python": platform.python_version(),
    "torch": torch.__version__, "device": str(rt.device), "dtype": rt.dtype}

# ----------------------------------------------------------------------------------------- timing

def time_interleaved(**fns: Callable) -> tuple[float, dict[str, float]]:
    """Seconds per call of the function `ours`; figures of the function `peer`, if there is one.

    A round calls all functions; the first, a warm-up, does not count. Records the FLOP/s of a
    matrix product and the bytes/s of a memory read.
    """
    n = 8192 if on_gpu else 2048
    matrix = torch.randn(n, n, device=rt.device, dtype=torch_dtype)
    array = torch.ones(2**26, device=rt.device)  # 256 MB, more than a cache holds
    fns = fns | {"matmul": lambda: matrix @ matrix, "read": array.sum}
    seconds = {name: [] for name in fns}
    for _ in range(1 + rounds):
        for name, fn in fns.items():
            rt.synchronize()
            start = time.perf_counter()
            fn()
            rt.synchronize()
            seconds[name].append(time.perf_counter() - start)
    seconds = {name: times[1:] for name, times in seconds.items()}
    dt = {name: median(times) for name, times in seconds.items()}
    record("machine", matmul_gflops_per_s=2 * n**3 / dt["matmul"] / 1e9,
           memory_gb_per_s=array.nbytes / dt["read"] / 1e9)
    if "peer" not in fns:
        return dt["ours"], {}
    ratios = [peer / ours for peer, ours in zip(seconds["peer"], seconds["ours"], strict=True)]
    return dt["ours"], {"peer_ms": dt["peer"] * 1e3, "times_as_long": median(ratios),
                        "times_as_long_min": min(ratios), "times_as_long_max": max(ratios)}


def peak_memory() -> int | None:
    """Peak memory in bytes: of tensors on a GPU, else of this process; None on Windows."""
    if on_gpu:
        return torch.cuda.max_memory_allocated(rt.device)
    if not find_spec("resource"):
        return None
    import resource
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ------------------------------------------------------------------------------------------ peers

class Plain(nn.Module):
    """GPT-2 made of PyTorch's own layers, without any optimization."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(block_size, n_embd)
        layer = nn.TransformerEncoderLayer(
            n_embd, n_head, 4 * n_embd, dropout, ACTIVATIONS[activation],
            batch_first=True, norm_first=True, bias=bias)
        layer.dropout.p = 0.0  # inside the MLP, where GPT-2 has none
        self.h = nn.TransformerEncoder(
            layer, n_layer, nn.LayerNorm(n_embd, bias=bias), enable_nested_tensor=False)
        for p in self.parameters():
            if p.dim() >= 2:  # PyTorch's default leads to denormals, slow on a CPU
                nn.init.normal_(p, std=0.02)

    def forward(self, idx: torch.Tensor) -> tuple[torch.Tensor]:
        """idx: (B, T) int64. Returns the logits, (B, T, V), first, as transformers does."""
        T = idx.size(1)
        x = F.dropout(self.wte(idx) + self.wpe.weight[:T], dropout, self.training)  # (B, T, C)
        mask = nn.Transformer.generate_square_subsequent_mask(T, device=idx.device)
        return (self.h(x, mask, is_causal=True) @ self.wte.weight.t(),)

    @torch.no_grad()
    def generate(self, idx: torch.Tensor) -> None:
        """Sample one row after another, computing the whole context for each token."""
        for row in idx.split(1):  # (1, T)
            for _ in range(new_tokens):
                logits, ids = self(row[:, -block_size:])[0][:, -1].topk(min(top_k, vocab_size))
                sampled = torch.multinomial(logits.softmax(dim=-1), 1)  # (1, 1)
                row = torch.cat([row, ids.gather(1, sampled)], dim=1)


def make_peer() -> nn.Module:
    """A peer of the same size, with float32 weights."""
    if peer == "plain":
        return Plain().to(rt.device)
    import transformers
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=block_size, n_embd=n_embd, n_layer=n_layer,
        n_head=n_head, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
        activation_function={"gelu_tanh": "gelu_new"}.get(activation, activation),
        bos_token_id=None, eos_token_id=None)).to(rt.device)


if peer == "plain":
    print("peer: GPT-2 of PyTorch's layers in float32, AdamW, no KV cache, not compiled")
elif peer == "transformers":
    print(f"peer: GPT-2 of transformers in {rt.dtype}, with biases, fused AdamW, not compiled")

# --------------------------------------------------------------------------------------- training

if "train" in modes:
    tokens = bins.open_bin(path, block_size) if has_data else np.random.default_rng(seed).integers(
        0, vocab_size, max(2**20, 2 * block_size))
    print(f"{batch_size} x {block_size} tokens per step, "
          + (f"of {path}" if has_data else f"random, not of {path}"))
    batches = bins.prefetch(rt.to_device(*bins.get_batch(
        tokens, bins.random_offsets(len(tokens), block_size, batch_size, (seed, i)), block_size,
        vocab_size)) for i in itertools.count())

    def train_step(loss_fn: Callable, opt: torch.optim.Optimizer, stopwatch: Stopwatch) -> None:
        stopwatch.start()
        x, y = next(batches)
        stopwatch.lap("data_ms")
        loss = loss_fn(x, y)
        stopwatch.lap("forward_ms")
        loss.backward()
        stopwatch.lap("backward_ms")
        opt.step()
        opt.zero_grad(set_to_none=True)
        stopwatch.lap("optimizer_ms")

    def our_loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with rt.autocast():
            return net(x, y, loss_only=True)[1]

    def peer_loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with rt.autocast() if peer == "transformers" else nullcontext():
            logits = peer_model(x)[0]  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())

    net, stopwatch = rt.compiled(model), Stopwatch(rt)
    opt = (configure_muon(model, 0.1, 1e-4, (0.9, 0.95), 0.02, 0.95, torch_dtype)
           if optimizer == "muon" else model.configure_optimizers(0.1, 1e-4, (0.9, 0.95)))
    fns = {"ours": partial(train_step, our_loss, opt, stopwatch)}
    for _ in range(3 if rt.compile else 2):
        fns["ours"]()  # allocates and compiles
    memory = peak_memory()  # before the peer adds to it
    if peer:
        peer_model = make_peer()
        peer_opt = torch.optim.AdamW(peer_model.parameters(), 1e-4,
                                     fused=True if peer == "transformers" else None)
        fns["peer"] = partial(train_step, peer_loss, peer_opt, Stopwatch(rt))
    stopwatch.read()  # discard the first steps
    dt, comparison = time_interleaved(**fns)
    gflops_per_s = model.flops_per_token() * batch_size * block_size / dt / 1e9
    record("train", parameters=model.get_num_params(), tokens_per_s=batch_size * block_size / dt,
           step_ms=dt * 1e3, **stopwatch.read(), gflops_per_s=gflops_per_s,
           of_matmul=gflops_per_s / results["machine"]["matmul_gflops_per_s"],
           mfu=model.estimate_mfu(batch_size, dt, rt.peak_flops()),
           peak_memory_gb=memory and memory / 1e9, **comparison)
    if profile:
        with torch.profiler.profile(record_shapes=True) as profiler:
            fns["ours"]()
            fns["ours"]()
            rt.synchronize()
        with bins.atomic_write(Path("bench_trace", f"{time.time():.0f}.pt.trace.json")) as (file,):
            profiler.export_chrome_trace(file.name)
            if not Path(file.name).read_bytes().rstrip().endswith(b"}"):
                raise UserError("the profiler did not write all of bench_trace/: make room")
        print("trace in bench_trace/: open it at https://ui.perfetto.dev")
    net = opt = fns = peer_model = peer_opt = None  # free their memory

# --------------------------------------------------------------------------------------- sampling

if "sample" in modes:
    sampling_dtype = dtype or cpu.sampling_dtype(model, rt.device) or rt.dtype
    n_params = model.get_num_params()
    print(f"weights in {sampling_dtype}")
    compiled = compile or (on_gpu and rt.compile)  # on a CPU only if asked for
    cpu.prepare_sampling(model, rt.device, sampling_dtype, compiled)
    idx = torch.zeros(num_samples, 1, dtype=torch.long, device=rt.device)  # (B, T)
    fns = {"ours": partial(model.generate, idx, new_tokens, top_k=top_k)}
    if peer == "plain":
        fns["peer"] = partial(make_peer().eval().generate, idx)
    elif peer == "transformers":
        fns["peer"] = partial(
            make_peer().to(torch_dtype).eval().generate, idx, do_sample=True, top_k=top_k,
            attention_mask=torch.ones_like(idx), min_new_tokens=new_tokens,
            max_new_tokens=new_tokens, pad_token_id=0)
    dt, comparison = time_interleaved(**fns)
    steps_per_s = new_tokens / dt  # each reads all weights
    weight_gb = sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear)) / 1e9
    record("sample", parameters=n_params, tokens_per_s=num_samples * steps_per_s,
           of_memory_bound=steps_per_s * weight_gb / results["machine"]["memory_gb_per_s"],
           **comparison)

# ------------------------------------------------------------------------------------------- data

if "data" in modes:
    source = "".join(p.read_text("ascii", "ignore")  # Python's own library
                     for p in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    starts = np.random.default_rng(seed).integers(0, len(source) - 5000, int(input_mb * 200))
    texts = [source[i:i + 5000] for i in starts]
    bpe = GPT2Tokenizer().bpe
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "input.jsonl"
        file.write_text("".join(dumps({"text": text}) + "\n" for text in texts))
        input_mb = file.stat().st_size / 1e6
        command = [sys.executable, ROOT / "data" / "openwebtext" / "prepare.py", f"--input={file}",
                   f"--out_dir={folder}/out"]
        dt, tiktoken = time_interleaved(
            ours=lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL),
            peer=lambda: bpe.encode_ordinary_batch(texts, num_threads=os.cpu_count()))
    record("data", input_mb=input_mb, seconds=dt, mb_per_s=input_mb / dt,
           of_tiktoken=dt * 1e3 / tiktoken["peer_ms"])

write_results()
