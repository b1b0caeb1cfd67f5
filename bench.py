"""How fast does this machine train, sample and prepare data, and how fast are our peers on it?

    python bench.py                                            # GPT-2 124M: training and sampling
    python bench.py --mode=train --batch_size=2 --peer=transformers
    python bench.py config/train_shakespeare_char.py --mode=train --peer=plain
    python bench.py --mode=sample --num_samples=10 --json=bench.json
    python bench.py --mode=data                                # data/openwebtext/prepare.py
    python bench.py --mode=train --profile=True                # and a trace of where the time goes

Needs neither data nor a GPU. A peer does the like in turn with us, and so do a plain matrix product
and a read of memory, so that all meet the same moods of the machine. Settings are the variables
below; config files (what they say of training alone is passed over) and --key=value arguments
override them.
"""

import os
from importlib.util import find_spec

from configurator import ROOT, UserError, check, choose, configure, user_errors

mode: str | None = None  # train | sample | data | all; None: train and sample
peer: str | None = None  # plain (PyTorch's layers, float32, no cache) | transformers (with biases)
rounds: int | None = None  # that are timed, after a warm-up; None: 20 on a GPU, 5 elsewhere
json: str | None = None  # a file for every figure, and a description of the machine
profile = False  # write a torch.profiler trace of two training steps to bench_trace/
# model
batch_size: int | None = None  # sequences in a step; None: 12 on a GPU, 1 elsewhere
block_size = 1024  # tokens in a sequence
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0
bias = False  # in Linear and LayerNorm
activation = "gelu_tanh"  # gelu_tanh | gelu | relu | relu2
positions = "learned"  # learned | rotary
qk_norm = False
smear = False
tie_weights = True
optimizer = "adamw"  # adamw | muon
# data
real_data = True  # read the dataset's train.bin if it is there, else make up random tokens
dataset = "openwebtext"  # a folder under data/, or the absolute path of one
input_mb = 60.0  # JSON lines to prepare in mode data, made of Python's own sources
# sampling
num_samples = 1  # drawn together
new_tokens = 256  # in each
top_k = 200
# machine
seed = 1337
device: str | None = None  # cpu | cuda | cuda:1 | mps; None: choose
dtype: str | None = None  # float32 | bfloat16 | float16; None: choose
compile: bool | None = None  # torch.compile; None: as a training of this length would choose:
max_iters = 600000
gradient_accumulation_steps = 40

config, _ = configure(globals(), others=ROOT / "train.py")
check(globals(), "batch_size is None or batch_size >= 1", "block_size >= 1", "n_layer >= 1",
      "n_head >= 1", "n_embd >= 1", "0 <= dropout < 1", "rounds is None or rounds >= 1",
      "1 <= input_mb <= 10**5", "num_samples >= 1", "new_tokens >= 1", "top_k >= 1",
      "max_iters >= 1", "gradient_accumulation_steps >= 1", "0 <= seed < 2**64", "json != ''")
modes = {"train": ["train"], "sample": ["sample"], "data": ["data"],
         "all": ["train", "sample", "data"], "None": ["train", "sample"]}
modes = modes[choose("mode", str(mode), list(modes))]
choose("peer", str(peer), ["plain", "transformers", "None"])
if profile and "train" not in modes:
    raise UserError(f"profile = True traces training, but mode = {mode!r}: use --mode=train")
if profile and os.path.isfile("bench_trace"):
    raise UserError("profile = True writes into bench_trace/, but a file is there: move it away")
if json and (os.path.isdir(json) or not os.path.isdir(os.path.dirname(os.path.abspath(json)))):
    raise UserError(f"json = {json!r}: expected a file in a folder that exists")
if peer == "transformers" and not find_spec("transformers"):
    raise UserError("peer = 'transformers' needs it: pip install -r requirements-dev.txt")
if peer == "transformers" and "sample" in modes and new_tokens >= block_size:
    raise UserError(f"new_tokens = {new_tokens}: transformers goes no further than block_size = "
                    f"{block_size}; choose fewer, or --peer=plain")

import itertools
import platform
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from json import dumps
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F

import runtime
from data.bins import (
    check_vocabulary,
    dataset_folder,
    gather,
    open_bin,
    prefetch,
    random_starts,
    written_whole,
)
from data.tokenizer import GPT2Tokenizer, load_meta
from metrics import Stopwatch
from model import ACTIVATIONS, GPT, GPTConfig
from optimizer import OPTIMIZERS

# ---------------------------------------------------------------------------- model and machine

if runtime.process()[1] > 1:
    raise UserError("bench.py measures one process: start it without torchrun")
runtime.check(device, dtype, compile)
choose("optimizer", optimizer, list(OPTIMIZERS))
path = dataset_folder(dataset) / "train.bin"
found = real_data and path.exists() and modes != ["data"]
meta = load_meta(path.parent) if found else None
vocab_size = meta["vocab_size"] if meta else 50304
gpu = runtime.choose_device(device).type == "cuda"
batch_size = batch_size or (12 if gpu else 1)
rounds = rounds or (20 if gpu else 5)
torch.manual_seed(seed)
with user_errors():
    model = GPT(GPTConfig(**{f.name: globals()[f.name] for f in fields(GPTConfig)}))
flops = (model.flops_per_token() * batch_size * block_size * gradient_accumulation_steps * max_iters
         if "train" in modes else 0)
rt = runtime.start(device, dtype, compile, n_embd, flops)
capabilities = torch.cpu.get_capabilities()
results = {
    "settings": config | {"batch_size": batch_size, "rounds": rounds},
    "machine": {
        "processor": torch.cuda.get_device_name(rt.device) if gpu else
        capabilities.get("cpu_name", platform.machine()),
        "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "flags": [name for name, there in capabilities.items() if there is True],
        "system": platform.platform(), "python": platform.python_version(),
        "torch": torch.__version__, "device": str(rt.device), "dtype": rt.dtype}}
departures = [f.name for f in fields(GPTConfig) if f.name in (
    "positions", "qk_norm", "smear", "tie_weights")
    and getattr(model.config, f.name) != f.default]
if peer and departures:
    print(f"{peer} is GPT-2 all the same: it knows no {', '.join(departures)}")
if modes == ["data"]:
    del model
else:
    model.to(rt.device)
    print(f"{model.get_num_params() / 1e6:.1f}M parameters, {batch_size} x {block_size} tokens a "
          f"step")


def take_turns(works: dict[str, Callable[[], object]], warmups: int) -> dict[str, list[float]]:
    """Seconds of each work, by name, in `rounds` rounds after the warm-ups."""
    seconds = {name: [] for name in works}
    for i in range(warmups + rounds):
        for name, work in works.items():
            rt.synchronize()
            before = time.perf_counter()
            work()
            rt.synchronize()
            if i >= warmups:
                seconds[name].append(time.perf_counter() - before)
    return seconds


def compare(seconds: dict[str, list[float]], peers: list[str]) -> dict[str, float]:
    """Print and return how many times as long as ours each peer took."""
    ratios = {}
    for name in peers:
        by_round = sorted(their / our for their, our
                          in zip(seconds[name], seconds["ours"], strict=True))
        ratios[name] = median(by_round)
        print(f"          {name}: {median(seconds[name]) * 1e3:,.1f} ms, {ratios[name]:.2f} times "
              f"as long ({by_round[0]:.2f} to {by_round[-1]:.2f} in {rounds} rounds)")
    return ratios


n_matrix = 8192 if gpu else 2048  # long enough to hide the cost of its start


def basics() -> dict[str, Callable[[], object]]:
    """What the machine's own speed is measured by."""
    matrix = torch.randn(n_matrix, n_matrix, device=rt.device, dtype=getattr(torch, rt.dtype))
    numbers = torch.ones(2**26, device=rt.device)  # 256 MB
    return {"product": partial(torch.mm, matrix, matrix), "read": numbers.sum}


def speed_of_machine(seconds: dict[str, list[float]]) -> tuple[float, float]:
    """(FLOP/s, bytes/s) of the basics; printed, and kept with the results."""
    flops_per_s = 2 * n_matrix**3 / median(seconds["product"])
    bytes_per_s = 2**28 / median(seconds["read"])
    results["machine"] |= {"matmul_gflops_per_s": flops_per_s / 1e9,
                           "memory_gb_per_s": bytes_per_s / 1e9}
    print(f"machine:  {flops_per_s / 1e9:,.0f} GFLOP/s in a {n_matrix}^3 matrix product in "
          f"{rt.dtype}, {bytes_per_s / 1e9:.1f} GB/s read from memory, {os.cpu_count()} cores")
    return flops_per_s, bytes_per_s


class Plain(torch.nn.Module):
    """A network of the same shape, of PyTorch's own layers, as one writes it first."""

    def __init__(self):
        super().__init__()
        self.wte = torch.nn.Embedding(vocab_size, n_embd)
        self.wpe = torch.nn.Embedding(block_size, n_embd)
        layer = torch.nn.TransformerEncoderLayer(
            n_embd, n_head, 4 * n_embd, dropout, ACTIVATIONS[activation],
            batch_first=True, norm_first=True, bias=bias)
        layer.dropout.p = 0.0  # inside the MLP, where GPT-2 has none
        self.h = torch.nn.TransformerEncoder(
            layer, n_layer, torch.nn.LayerNorm(n_embd, bias=bias), enable_nested_tensor=False)
        for p in self.parameters():
            if p.dim() >= 2:  # PyTorch's own would make numbers so small that a CPU crawls
                torch.nn.init.normal_(p, std=0.02)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        """idx: (B, T) int64; returns the logits, (B, T, V)."""
        T = idx.size(1)
        x = F.dropout(self.wte(idx) + self.wpe.weight[:T], dropout, self.training)
        mask = torch.nn.Transformer.generate_square_subsequent_mask(T, device=idx.device)
        return self.h(x, mask, is_causal=True) @ self.wte.weight.t()


def make_peer() -> torch.nn.Module:
    if peer == "plain":
        return Plain().to(rt.device)
    import transformers
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=block_size, n_embd=n_embd, n_layer=n_layer,
        n_head=n_head, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
        activation_function={"gelu_tanh": "gelu_new"}.get(activation, activation),
        bos_token_id=None, eos_token_id=None)).to(rt.device)


# -------------------------------------------------------------------------------------- training

if "train" in modes:
    if found:
        tokens = open_bin(path, block_size)
        check_vocabulary(tokens, vocab_size)
        print(f"tokens of {path}")
    else:
        tokens = np.random.default_rng(seed).integers(
            0, vocab_size, max(2**20, 2 * block_size)).astype(np.uint16)
        print(f"random tokens{f', as there is no {path}' if real_data else ''}")
    opt = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), optimizer,
                                     dtype=getattr(torch, rt.dtype))
    net = rt.compiled(model)
    stopwatch = Stopwatch(rt)
    batches = prefetch(rt.to_device(*gather(
        tokens, random_starts(len(tokens), block_size, batch_size, (seed, i)), block_size,
        vocab_size)) for i in itertools.count())

    def train_step() -> None:
        stopwatch.start()
        x, y = next(batches)
        stopwatch.lap("data")
        with rt.autocast():
            loss = net(x, y, loss_only=True)[1]
        stopwatch.lap("forward")
        loss.backward()
        stopwatch.lap("backward")
        opt.step()
        opt.zero_grad(set_to_none=True)
        stopwatch.lap("optimizer")

    for _ in range(3 if rt.compile else 2):
        train_step()  # allocates, and compiles
    memory = rt.peak_memory()  # before anything else adds to it
    works = {"ours": train_step} | basics()

    if peer:
        their_model = make_peer()
        their_optimizer = torch.optim.AdamW(their_model.parameters(), 1e-4,
                                            fused=peer == "transformers")

        def their_step() -> None:
            x, y = next(batches)
            if peer == "plain":
                logits = their_model(x)
            else:
                with rt.autocast():
                    logits = their_model(x).logits
            F.cross_entropy(logits.flatten(0, 1).float(), y.flatten()).backward()
            their_optimizer.step()
            their_optimizer.zero_grad(set_to_none=True)

        their_step()
        works[peer] = their_step

    for name in ("product", "read"):
        works[name]()
    stopwatch.read()
    seconds = take_turns(works, warmups=0)
    phases_ms = stopwatch.read()
    dt = median(seconds["ours"])
    matmul_flops_per_s, _ = speed_of_machine(seconds)
    flops_per_s = model.flops_per_token() * batch_size * block_size / dt
    mfu = model.estimate_mfu(batch_size, dt, rt.peak_flops())
    print(f"training: {batch_size * block_size / dt:,.0f} tok/s, {dt * 1e3:,.1f} ms a step ("
          + ", ".join(f"{phase} {ms:.1f}" for phase, ms in phases_ms.items())
          + f" on average), median of {rounds}")
    print(f"          {flops_per_s / 1e9:,.0f} GFLOP/s, {flops_per_s / matmul_flops_per_s:.0%} of "
          f"the matrix product{f', MFU {mfu:.1%}' if mfu else ''}")
    print(f"          {memory / 1e9:.2f} GB peak memory")
    results["train"] = {
        "parameters": model.get_num_params(), "compiled": rt.compile,
        "tokens_per_s": batch_size * block_size / dt, "step_ms": dt * 1e3, "phases_ms": phases_ms,
        "gflops_per_s": flops_per_s / 1e9, "of_matmul": flops_per_s / matmul_flops_per_s,
        "mfu": mfu, "peak_memory_gb": memory / 1e9,
        "times_as_long": compare(seconds, [peer] if peer else [])}
    if profile:
        handler = torch.profiler.tensorboard_trace_handler("bench_trace")
        with torch.profiler.profile(on_trace_ready=handler, record_shapes=True):
            train_step()
            train_step()
            rt.synchronize()
        print("          trace in bench_trace/: open it at https://ui.perfetto.dev")
    del net, opt, works
    if peer:
        del their_model, their_optimizer

# -------------------------------------------------------------------------------------- sampling

if "sample" in modes:
    model.to(getattr(torch, rt.dtype)).eval()
    if compile or (gpu and rt.compile):
        model.compile_decode()
    idx = torch.zeros(num_samples, 1, dtype=torch.long, device=rt.device)
    works = {"ours": partial(model.generate, idx, new_tokens, top_k=top_k)} | basics()

    if peer == "transformers":
        their_model = make_peer().to(getattr(torch, rt.dtype)).eval()
        works[peer] = partial(their_model.generate, idx, attention_mask=torch.ones_like(idx),
                              min_new_tokens=new_tokens, max_new_tokens=new_tokens,
                              do_sample=True, top_k=top_k, pad_token_id=0)
    elif peer == "plain":
        their_model = make_peer().eval()

        @torch.no_grad()
        def one_after_the_other() -> None:
            for row in idx.split(1):
                for _ in range(new_tokens):
                    logits = their_model(row[:, -block_size:])[:, -1]  # (1, V)
                    likeliest, ids = logits.topk(min(top_k, vocab_size))
                    drawn = torch.multinomial(likeliest.softmax(-1), 1)
                    row = torch.cat([row, ids.gather(1, drawn)], dim=1)

        works[peer] = one_after_the_other

    seconds = take_turns(works, warmups=1)
    _, bytes_per_s = speed_of_machine(seconds)
    rate = num_samples * new_tokens / median(seconds["ours"])
    bound = bytes_per_s / sum(p.nbytes for p in model.parameters())  # times that weights are read
    print(f"sampling: {rate:,.1f} tok/s, {num_samples} x {new_tokens} tokens, top_k {top_k}, "
          f"median of {rounds}")
    print(f"          {rate / num_samples / bound:.0%} of the {bound:,.1f} times a second that "
          f"memory delivers the weights in {rt.dtype}")
    marks = [time.perf_counter()]
    for _ in model.stream(idx, new_tokens, top_k=top_k):
        rt.synchronize()
        marks.append(time.perf_counter())
    ms_by_eighth = [median(part) * 1e3 for part in np.array_split(np.diff(marks), 8) if len(part)]
    print("          ms per token, in each eighth of the text: "
          + " ".join(f"{ms:.2f}" for ms in ms_by_eighth))
    results["sample"] = {
        "parameters": model.get_num_params(), "tokens_per_s": rate, "of_memory_bound":
        rate / num_samples / bound, "ms_per_token_by_eighth": ms_by_eighth,
        "times_as_long": compare(seconds, [peer] if peer else [])}

# ------------------------------------------------------------------------------------------ data

if "data" in modes:
    encoding = GPT2Tokenizer().bpe
    with tempfile.TemporaryDirectory() as folder:
        sources = [p.read_bytes() for p in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
        source = b"\n".join(text for text in sources if text.isascii()).decode("ascii")
        rng, texts, written = random.Random(seed), [], 0
        with open(Path(folder) / "input.jsonl", "w", encoding="utf-8") as file:
            while written < input_mb * 1e6:
                start, length = rng.randrange(len(source) - 9500), rng.randint(500, 9500)
                texts.append(source[start:start + length])
                written += file.write(dumps({"text": texts[-1]}) + "\n")
        # A small process starts prepare.py: its children's peak would begin at that of this one.
        starter = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, "
                   "stdout=subprocess.DEVNULL); "
                   "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
        command = [sys.executable, "-c", starter, sys.executable,
                   str(ROOT / "data" / "openwebtext" / "prepare.py"),
                   f"--input={folder}/input.jsonl", f"--out_dir={folder}/out"]
        peaks = []
        threads, thread = f"tiktoken, {os.cpu_count()} threads", "tiktoken, 1 thread"
        seconds = take_turns({
            "ours": lambda: peaks.append(int(subprocess.check_output(command))),
            threads: lambda: encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count()),
            thread: lambda: [encoding.encode_ordinary(text) for text in texts],
        }, warmups=0)
    dt = median(seconds["ours"])
    memory = max(peaks) * (1 if sys.platform == "darwin" else 1024)  # macOS counts bytes, Linux KiB
    print(f"data:     {written / dt / 1e6:.1f} MB/s, {written / 1e6:.0f} MB of JSON lines in "
          f"{dt:.2f} s, the whole process, median of {rounds}")
    ratios = compare(seconds, [threads, thread])
    of_threads, of_ideal = 1 / ratios[threads], os.cpu_count() / ratios[thread]
    print(f"          ours takes {of_threads:.2f} times as long as tiktoken with threads, "
          f"{of_ideal:.2f} times as long as one thread's time divided by the cores")
    print(f"          {memory / 1e6:.0f} MB peak memory of the largest process")
    results["data"] = {"input_mb": written / 1e6, "seconds": dt, "mb_per_s": written / dt / 1e6,
                       "peak_memory_mb": memory / 1e6, "of_tiktoken_threads": of_threads,
                       "of_tiktoken_ideal": of_ideal}

if json:
    with written_whole(Path(json)) as file:
        file.write(dumps(results, indent=1).encode())
    print(f"every figure: {json}")
