"""Train a GPT, or resume a run.

    python train.py config/train_shakespeare_char.py                     # a character-level model
    python train.py config/train_shakespeare_char.py --init_from=resume  # continue after a stop
    python train.py --help                                               # all settings
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

Settings are the variables below; config files and --key=value arguments override them.
"""

import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # for python -I

from configurator import RunError, UserError, check, check_choice, configure, print0, user_errors

# output
out_dir = "out"  # folder of the checkpoints and metrics.jsonl
eval_interval = 2000  # steps between evaluations; 0: only at the end
log_interval = 1  # steps between log lines
eval_iters = 200  # batches per evaluation; 0: the whole validation split, each token once
eval_only = False  # evaluate once and write nothing
always_save_checkpoint = True  # save ckpt.pt after each evaluation; False: only at the end
keep_every = 0  # steps between checkpoints that are kept, such as ckpt_00001000.pt; 0: none
sample_every = 0  # steps between samples of text, printed and logged; 0: none
init_from = "scratch"  # scratch | resume | auto (resume if possible) | gpt2* | a path | owner/name
# logging
wandb_log = False  # log to Weights & Biases
wandb_project = "owt"
wandb_run_name = "gpt2"
tensorboard_log = False  # log to out_dir/tensorboard
# data
dataset = "openwebtext"  # folder under data/, or an absolute path
sampling = "random"  # random (blocks from anywhere) | epoch (each block once in a pass)
gradient_accumulation_steps = 5 * 8  # micro-batches per step, over all processes
batch_size = 12  # sequences per micro-batch
block_size = 1024  # tokens per sequence
# model
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # 0 for pretraining; 0.1 or more for small datasets
bias = False  # biases in Linear and LayerNorm; GPT-2 has them
activation = "gelu_tanh"  # gelu_tanh | gelu | relu | relu2 (squared ReLU)
positions = "learned"  # learned | rotary
qk_norm = False  # RMS-normalize queries and keys
smear = False  # add a learned fraction of the previous token's embedding
bigram = False  # add a learned embedding of each pair of tokens (small vocabularies)
tie_weights = True  # the output layer shares the token embeddings
# optimizer
optimizer = "adamw"  # adamw | muon (for matrices of the blocks, with AdamW for the rest)
learning_rate = 6e-4  # peak learning rate (AdamW)
max_iters = 600000  # total number of steps
weight_decay = 1e-1  # of matrices and embeddings
beta1 = 0.9  # AdamW
beta2 = 0.95  # AdamW
muon_lr = 0.02  # peak learning rate (Muon)
muon_momentum = 0.95
muon_weight_decay: float | None = None  # of Muon's matrices; None: weight_decay
embedding_lr: float | None = None  # peak learning rate of embeddings; None: learning_rate
head_lr: float | None = None  # peak learning rate of an untied lm_head; None: learning_rate
grad_clip = 1.0  # clip gradients to this norm; 0 disables
max_bad_steps = 10  # end the run after this many consecutive steps that are not finite
# learning rate schedule
decay_lr = True  # warm up and decay; False: constant learning rate
schedule = "cosine"  # cosine | linear (constant, then a linear cooldown)
cooldown_frac = 0.5  # length of the linear cooldown, as a fraction of lr_decay_iters
warmup_iters = 2000  # steps of linear warm-up
lr_decay_iters = 600000  # step at which the rate reaches min_lr
min_lr = 6e-5  # final learning rate (AdamW; the other rates decay in proportion)
# machine
seed = 1337  # of initialization, batches and dropout
backend: str | None = None  # nccl | gloo; None: choose
collective_timeout = 600  # seconds to wait for a process that does not answer
device: str | None = None  # cpu | cuda | cuda:1 | mps; None: choose
dtype: str | None = None  # float32 | bfloat16 | float16; None: choose by hardware and model width
shard = False  # under torchrun: each process keeps a part of weights and optimizer (FSDP2)
recompute = False  # compute the blocks again in the backward pass: less memory, more time
compile: bool | None = None  # torch.compile; None: on a GPU, and on a CPU for long runs

config, overrides = configure(globals())
start_time = time.time()
rules = [
    "out_dir != ''", "init_from != ''", "eval_interval >= 0", "log_interval >= 1",
    "eval_iters >= 0", "keep_every >= 0", "sample_every >= 0", "batch_size >= 1",
    "gradient_accumulation_steps >= 1", "n_layer <= 1000", "0 <= dropout < 1",
    "gradient_accumulation_steps * batch_size <= 10**8", "eval_iters * batch_size <= 10**8",
    "learning_rate > 0", "max_iters >= 0", "weight_decay >= 0", "0 <= beta1 < 1",
    "0 <= beta2 < 1", "muon_lr > 0", "0 <= muon_momentum < 1",
    "muon_weight_decay is None or muon_weight_decay >= 0",
    "embedding_lr is None or embedding_lr > 0", "head_lr is None or head_lr > 0",
    "grad_clip >= 0", "max_bad_steps >= 1", "0 < cooldown_frac <= 1", "warmup_iters >= 0",
    "lr_decay_iters >= 1", "min_lr >= 0", "0 <= seed < 2**64", "1 <= collective_timeout <= 10**6"]
check(globals(), *rules)

import gc
import math
import shlex
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch

from data import bins
from data.tokenizer import dataset_record, get_tokenizer, load_meta
from engine import checkpoint, cpu, runtime
from engine.distributed import whole
from engine.metrics import Metrics, Stopwatch, check_loggers
from engine.muon import configure_muon
from engine.out_dir import prepare_out_dir
from engine.progress import Progress, duration
from engine.saving import Saver
from model import ACTIVATIONS, GPT, POSITIONS, GPTConfig

resumed = checkpoint.load_to_resume(out_dir, init_from)  # None for a new run
if resumed:
    config = checkpoint.restore_settings(globals(), config, overrides, resumed)
    globals().update(config)  # from here on, the settings above are those of the resumed run
check(globals(), *rules, "warmup_iters < lr_decay_iters or not decay_lr",
      "min_lr <= learning_rate or not decay_lr", "head_lr is None or not tie_weights")
for name, choices in (("activation", ACTIVATIONS), ("positions", POSITIONS),
                      ("optimizer", ("adamw", "muon")), ("schedule", ("cosine", "linear")),
                      ("sampling", ("random", "epoch"))):
    check_choice(name, globals()[name], list(choices))
_, world_size = runtime.dist_info()
if gradient_accumulation_steps % world_size:
    raise UserError(f"gradient_accumulation_steps = {gradient_accumulation_steps} is not divisible "
                    f"by {world_size} processes: choose a multiple of {world_size}")
runtime.check_machine(device, dtype, compile)

# ------------------------------------------------------------------------------------------- data

# The first element of every seed, which keeps the streams of random numbers independent.
TRAIN_BATCHES, TRAIN_EVALUATION, VAL_EVALUATION, DROPOUT, SAMPLE = range(5)

folder = bins.dataset_folder(dataset)
train_tokens = bins.open_bin(folder / "train.bin", block_size)
val_tokens = bins.open_bin(folder / "val.bin", block_size)
meta = load_meta(folder)  # None for GPT-2 BPE
val_bytes = dataset_record(folder).get("val_bytes")
is_known = type(val_bytes) is int and 0 < val_bytes < 2**63
bytes_per_token = val_bytes / len(val_tokens) if is_known else None
vocab_size = meta["vocab_size"] if meta else 50304  # 50,257, padded to a multiple of 64
tokenizer = get_tokenizer(meta) if sample_every else None

# ------------------------------------------------------------------------------------------ model

torch.manual_seed(seed)
with user_errors():
    model_config = GPTConfig(**{f.name: globals()[f.name] for f in fields(GPTConfig)})
    # In training, a gradient and a moment or more for each weight, in float32; sharded, at first
    # the weights alone.
    runtime.check_memory(model_config, 0 if eval_only else batch_size * block_size, device,
                         bytes_per_weight=4 if eval_only or shard else 12)
    if resumed:
        model = GPT.from_checkpoint(resumed, {"dropout": dropout}, resumed["path"])
        checkpoint.check_tokenizer(checkpoint.meta_of(resumed), meta, resumed["path"], dataset)
    elif init_from in ("scratch", "auto"):
        model = GPT(model_config)
    else:
        model, model_meta = checkpoint.load_pretrained(init_from, dropout)
        checkpoint.check_tokenizer(model_meta, meta, init_from, dataset)
        checkpoint.check_shape(overrides, model.config, init_from)
        trained_block_size = model.config.block_size
        model.crop_block_size(block_size)
        if block_size > trained_block_size:  # possible with rotary positions
            print0(f"block_size: {trained_block_size} in {init_from}, {block_size} here")
vocab_size = model.config.vocab_size  # of a loaded model it may be another
config |= {name: value for name, value in asdict(model.config).items() if name in config}
bins.check_vocabulary(train_tokens, vocab_size)
bins.check_vocabulary(val_tokens, vocab_size)

tokens_per_iter = gradient_accumulation_steps * batch_size * block_size
run_flops = 0 if eval_only else model.flops_per_token() * tokens_per_iter * max_iters
rt = runtime.start(device, dtype, compile, model.config.n_embd, run_flops, backend,
                   collective_timeout)
micro_steps = range(rt.rank, gradient_accumulation_steps, rt.world_size)  # of this process
model.recompute = recompute
if rt.device.type == "cpu":
    cpu.accelerate(model)
net = rt.parallel(model, shard)  # the same parameters; compiled, and for many processes

# -------------------------------------------------------------------------------------- optimizer

if optimizer == "muon":
    opt = configure_muon(model, weight_decay, learning_rate, (beta1, beta2), muon_lr,
                         muon_momentum, getattr(torch, rt.dtype), embedding_lr, head_lr,
                         muon_weight_decay)
else:
    opt = model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), rt.device.type,
                                     embedding_lr, head_lr)
scaler = torch.amp.GradScaler(rt.device.type, enabled=rt.dtype == "float16")

state = resumed or checkpoint.NEW_RUN
iter_num, best_val_loss = state["iter_num"], float(state["best_val_loss"])
history, seconds_before, bad_steps = list(state["history"]), state["seconds"], state["bad_steps"]
command = state["command"] or shlex.join(["python", *sys.argv])
saved_iter = None  # the step that ckpt.pt holds
if resumed:
    checkpoint.load_optimizer(opt, scaler, resumed)
    saved_iter = iter_num if resumed["path"].name == checkpoint.LATEST else None
    del resumed["model"], resumed["optimizer"]  # free their memory
if rt.all_reduce(torch.tensor(iter_num)) != rt.world_size * iter_num:
    raise UserError(f"the processes loaded different steps: share {out_dir} between the machines")


def lr_at(i: int) -> float:
    """Learning rate of step i: linear warm-up, then cosine decay or linear cooldown to min_lr."""
    if not decay_lr:
        return learning_rate
    if i < warmup_iters:
        return learning_rate * (i + 1) / (warmup_iters + 1)
    if i >= lr_decay_iters:
        return min_lr
    if schedule == "linear":
        cooldown = min(cooldown_frac * lr_decay_iters, lr_decay_iters - warmup_iters)
        fraction = min(1, (lr_decay_iters - i) / cooldown)
    else:
        decayed = (i - warmup_iters) / (lr_decay_iters - warmup_iters)
        fraction = (1 + math.cos(math.pi * decayed)) / 2
    return min_lr + (learning_rate - min_lr) * fraction


def load_batch(tokens: np.memmap, offsets: np.ndarray) -> list[torch.Tensor]:
    """Inputs and targets at the offsets, (B,), each (B, T) int64."""
    return rt.to_device(*bins.get_batch(tokens, offsets, block_size, vocab_size))


def train_batches(i: int) -> Iterator[list[torch.Tensor]]:
    """The micro-batches of this process from step i on. The batch of a step is the same for any
    number of processes: each takes every world_size-th micro-batch of it."""
    n = gradient_accumulation_steps * batch_size
    while True:
        if sampling == "random":
            offsets = bins.random_offsets(
                len(train_tokens), block_size, n, (TRAIN_BATCHES, seed, i))
        else:
            offsets = bins.epoch_offsets(
                len(train_tokens), block_size, i * n, n, (TRAIN_BATCHES, seed))
        for micro_step in micro_steps:
            yield load_batch(train_tokens, offsets.reshape(-1, batch_size)[micro_step])
        i += 1


def forward_backward(x: torch.Tensor, y: torch.Tensor, sync: bool) -> torch.Tensor:
    """Add the gradients of a micro-batch; with sync, average them over the processes. Returns its
    loss."""
    with nullcontext() if sync or rt.world_size == 1 else net.no_sync():
        with rt.autocast():
            loss = net(x, y, loss_only=True)[1]
        stopwatch.lap("forward_ms")
        scaler.scale(loss / len(micro_steps)).backward()
        stopwatch.lap("backward_ms")
    return loss.detach()


# ------------------------------------------------------------------------------------- evaluation

if eval_iters == 0:
    val_offsets = bins.sequential_offsets(len(val_tokens), block_size)
    n_train_blocks = math.ceil(len(val_offsets) / 4)  # enough to see whether the model overfits
else:
    n_train_blocks = eval_iters * batch_size
    val_offsets = bins.random_offsets(
        len(val_tokens), block_size, n_train_blocks, (VAL_EVALUATION, seed))
train_offsets = bins.random_offsets(
    len(train_tokens), block_size, n_train_blocks, (TRAIN_EVALUATION, seed))
# Rows that begin at the end of a file have no targets, so they do not count. With them, all
# processes have as many batches, of the shape for which the code is compiled.
val_offsets, train_offsets = (
    np.pad(offsets, (0, -len(offsets) % (world_size * batch_size)), constant_values=len(tokens))
    for offsets, tokens in ((val_offsets, val_tokens), (train_offsets, train_tokens)))


@torch.no_grad()
def evaluate() -> dict | None:
    """Mean losses and accuracy, computed by all processes; None if a signal interrupts it."""
    model.eval()
    means = []
    for tokens, offsets in ((train_tokens, train_offsets), (val_tokens, val_offsets)):
        totals = torch.zeros(3, dtype=torch.float64)  # loss, correct predictions, targets
        for first in range(0, len(offsets), rt.world_size * batch_size):
            if stop_signals.any_rank_signaled():
                model.train()
                return None
            progress.status("evaluating", first, len(offsets))
            x, y = load_batch(tokens, offsets[first + rt.rank * batch_size:][:batch_size])
            with rt.autocast():
                logits, loss = net(x, y)
            n_targets, n_correct = (y >= 0).sum(), (logits.argmax(dim=-1) == y).sum()
            if n_targets > 0:  # else the loss is nan
                totals += torch.stack([loss * n_targets, n_correct, n_targets]).cpu()
        loss_sum, n_correct, n_targets = rt.all_reduce(totals).tolist()
        means.append((loss_sum / n_targets, n_correct / n_targets))
    model.train()
    (train_loss, _), (val_loss, val_accuracy) = means
    return {"iter": iter_num, "train_loss": train_loss, "val_loss": val_loss,
            "val_perplexity": math.exp(min(val_loss, 700)), "val_accuracy": val_accuracy,
            "val_bits_per_byte": bytes_per_token and val_loss / math.log(2) / bytes_per_token,
            "seconds": seconds()}


def write_sample() -> str:
    """A text that the model writes, to see what it has learned."""
    if not weights_are_finite():
        raise diverged(f"the weights after {iter_num} steps, or their loss, are not finite")
    runtime.seed_torch(SAMPLE, seed, iter_num)
    idx = torch.tensor([tokenizer.encode(tokenizer.default_prompt)], device=rt.device)  # (1, T)
    model.eval()
    with rt.autocast():
        idx = model.generate(idx, 200, temperature=0.8, top_k=200, n_vocab=tokenizer.n_vocab)
    model.train()
    return tokenizer.decode(idx[0].tolist()).strip()


@torch.no_grad()
def weights_are_finite() -> bool:
    """Whether all weights, and the loss on one batch, are finite."""
    model.eval()
    with rt.autocast():
        loss = net(*load_batch(val_tokens, val_offsets[:batch_size]))[1]
    model.train()
    finite = [whole(t.isfinite().all()) for t in (loss, *model.parameters())]
    return bool(torch.stack(finite).all())


def seconds() -> float:
    """Wall-clock seconds of this run, including the parts before it was resumed."""
    return seconds_before + time.time() - start_time


# ------------------------------------------------------------------------------------- checkpoints

def save(*names: str) -> None:
    """Write a checkpoint under these names, unless the run has diverged."""
    if not weights_are_finite():
        raise diverged(f"the weights after {iter_num} steps, or their loss, are not finite")
    before = time.time()
    if rt.rank == 0:
        metrics.sync()
    saver.save([Path(out_dir) / name for name in names], model, opt, {
        "scaler": scaler.state_dict(), "model_args": model.config.to_model_args(),
        "config": config, "iter_num": iter_num, "best_val_loss": best_val_loss,
        "history": history, "meta": meta, "seconds": seconds(), "bad_steps": bad_steps,
        "command": command})
    if time.time() - before > 1:
        progress.print(f"training paused for {time.time() - before:.1f} s to save")


def diverged(what: str) -> RunError:
    """The error that ends a run with losses, gradients or weights that are not finite."""
    saver.wait()
    path, steps = checkpoint.latest(out_dir)
    start = f"resume from {path} (step {steps}) by --init_from=resume" if path else "start again"
    advice = ("--dtype=bfloat16 or float32" if rt.dtype == "float16" else
              "--grad_clip=1.0" if not grad_clip else "longer --warmup_iters or a lower "
              + (f"--muon_lr than {muon_lr:g} and " if optimizer == "muon" else "")
              + f"--learning_rate than {learning_rate:g}")
    return RunError(f"{what}; they were not saved: {start} with {advice}")


# ----------------------------------------------------------------------------------------- set-up

def announce_duration(batch: torch.Tensor) -> None:
    """Print how long a step and the run will take without compilation, by the time that a
    micro-batch takes, or as many rows of it as take some seconds."""
    rows = max(1, min(batch_size, int(1e12 / model.flops_per_token() / block_size)))
    before = time.time()
    with rt.autocast():
        model(batch[:rows], batch[:rows], loss_only=True)[1].backward()
    model.zero_grad()
    step_s = (time.time() - before) * batch_size / rows * len(micro_steps)
    run_s = step_s * max(0, max_iters - iter_num)
    progress.print(f"a step takes about {step_s:.2g} s, all steps {duration(run_s)}")
    if run_s > 86400:
        progress.print("this is a run for a GPU; a smaller one: config/train_text_cpu.py")


print0(f"{model.get_num_params() / 1e6:.2f}M parameters, {tokens_per_iter:,} tokens per step, "
       f"{len(train_tokens):,} training tokens, {len(val_tokens):,} validation tokens")
stopwatch, progress = Stopwatch(rt), Progress(rt, iter_num, max_iters)
stop_signals = runtime.StopSignals(rt)
saver = Saver()
batches = bins.prefetch(train_batches(iter_num))
model.train()
if not eval_only:
    # Train and evaluate on one batch, which compiles the code, and shows whether the batch fits
    # into memory before an earlier run is moved. DDP rebuilds its gradient buckets after its first
    # backward pass, which changes the order of sums; as it is done here, a resumed run sums in the
    # order of an uninterrupted one.
    zeros = torch.zeros(batch_size, block_size, dtype=torch.long, device=rt.device)
    if rt.device.type == "cpu" and rt.world_size == 1:
        announce_duration(zeros)
    if rt.compile:
        progress.print("compiling, which takes about a minute")
    stopwatch.start()
    forward_backward(zeros, zeros, sync=True)
    stopwatch.read()
    opt.zero_grad(set_to_none=True)
    weights_are_finite()
    if rt.rank == 0:
        check_loggers(config)
        n_numbered = max(0, max_iters // keep_every - iter_num // keep_every) if keep_every else 0
        lock = prepare_out_dir(  # held until the process ends
            out_dir, iter_num if resumed else None, model, n_numbered)
metrics = Metrics(progress, None if eval_only else out_dir, config, iter_num, history)
gc.collect()
gc.freeze()  # the garbage collector need not traverse these objects again

# ------------------------------------------------------------------------------------------- loop

while True:
    lr = lr_at(iter_num)
    for group in opt.param_groups:
        group["lr"] = lr * group["lr_ratio"]

    # evaluate and save; a resumed run does not repeat the evaluation that it was saved after
    saver.check()
    stop = stop_signals.any_rank_signaled()  # the signal's number, or 0
    due = iter_num == max_iters or (eval_interval and iter_num % eval_interval == 0)
    evaluated = any(record["iter"] == iter_num for record in history)
    names = []  # of the checkpoints to write
    if not stop and (eval_only or (due and not evaluated)):
        record = evaluate()
        if record is None:  # interrupted: stop in the next pass
            continue
        metrics.evaluation(record)
        if eval_only:
            break
        if not math.isfinite(record["val_loss"]):
            raise diverged(f"the validation loss after {iter_num} steps is {record['val_loss']}")
        history.append(record)
        if record["val_loss"] < best_val_loss:
            best_val_loss = record["val_loss"]
            names.append(checkpoint.BEST)
        if always_save_checkpoint:
            names.append(checkpoint.LATEST)
    if keep_every and iter_num % keep_every == 0 and not stop:
        names.append(checkpoint.numbered_name(iter_num))
    if names and iter_num > 0:
        save(*names)
        saved_iter = iter_num if checkpoint.LATEST in names else saved_iter
    if sample_every and iter_num > 0 and iter_num % sample_every == 0 and not stop:
        metrics.sample(iter_num, write_sample())
    if iter_num >= max_iters or stop:
        break

    # forward and backward
    stopwatch.start()
    loss_sum = torch.zeros((), device=rt.device)
    for n, micro_step in enumerate(micro_steps, start=1):
        x, y = next(batches)
        stopwatch.lap("data_ms")
        runtime.seed_torch(DROPOUT, seed, iter_num, micro_step)
        loss_sum += forward_backward(x, y, sync=n == len(micro_steps))
        progress.status("micro-batch", n, len(micro_steps))
        if n < len(micro_steps):
            stop = stop_signals.any_rank_signaled()
            if stop:
                break
    if stop:  # save in the next pass; a resumed run does this step again
        continue

    # clip and step; a step whose loss or gradient is not finite is skipped, in all processes alike
    scaler.unscale_(opt)
    grad_norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf))
    loss = rt.all_reduce(loss_sum) / gradient_accumulation_steps
    loss, grad_norm = torch.stack([loss, grad_norm]).tolist()  # waits for the device
    if math.isfinite(loss) and math.isfinite(grad_norm):
        scaler.step(opt)
        bad_steps = 0
    else:
        bad_steps += 1
        progress.print(f"iter {iter_num}: STEP SKIPPED ({bad_steps} in a row): loss {loss:.4f}, "
                       f"gradient norm {grad_norm:.4f}")
        if bad_steps >= max_bad_steps:
            raise diverged(f"{bad_steps} consecutive steps, up to step {iter_num}, had a loss or "
                           f"gradient that is not finite")
    scaler.update()
    opt.zero_grad(set_to_none=True)
    stopwatch.lap("optimizer_ms")

    # log
    if iter_num % log_interval == 0:
        phases_ms = stopwatch.read()
        dt = sum(phases_ms.values()) / 1e3
        mfu = model.estimate_mfu(len(micro_steps) * batch_size, dt, rt.peak_flops())
        metrics.step({"iter": iter_num, "loss": loss, "lr": lr, "grad_norm": grad_norm,
                      "tokens_per_s": tokens_per_iter / dt, "mfu": mfu, **phases_ms,
                      "seconds": seconds()})
    iter_num += 1
    progress.advance(f"loss {loss:.4f}")

# -------------------------------------------------------------------------------------------- end

if not eval_only and saved_iter != iter_num:
    save(checkpoint.LATEST)
saver.wait()
stop_signals.any_rank_signaled()  # as a barrier: torchrun ends rank 0 if another leaves early
metrics.close()
folder_arg = shlex.quote(f"--out_dir={out_dir}")
if stop and not eval_only:
    print0(f"stopped by signal {stop} after {iter_num} steps; to continue:\n"
           f"  python train.py --init_from=resume {folder_arg}")
elif not eval_only:
    print0(f"{iter_num} steps done, best validation loss {best_val_loss:.4f}; to sample:\n"
           f"  python sample.py {folder_arg}")
rt.cleanup(128 + stop if stop else 0)
