"""Train a GPT, or go on training one.

    python train.py config/train_shakespeare_char.py                    # a character model
    python train.py config/train_shakespeare_char.py --init_from=resume # go on after a stop
    python train.py --help                                              # all settings
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

Settings are the variables below; config files and --key=value arguments override them.
"""

import time

from configurator import RunError, UserError, announce, check, choose, configure, user_errors

# output
out_dir = "out"  # where checkpoints and metrics.jsonl go
eval_interval = 2000  # steps between evaluations; 0: one, at the end, and no ckpt.pt before it
log_interval = 1  # steps between log lines
eval_iters = 200  # batches in an evaluation; 0: the whole validation split, each token once
eval_only = False  # evaluate once, write nothing
always_save_checkpoint = True  # save ckpt.pt at every evaluation, not only at the end
keep_every = 0  # steps between checkpoints that are kept, as ckpt_00001000.pt; 0: none
init_from = "scratch"  # scratch | resume | auto (resume if there is a checkpoint) | gpt2* | a path
# logging
wandb_log = False  # to Weights & Biases
wandb_project = "owt"
wandb_run_name = "gpt2"
tensorboard_log = False  # to out_dir/tensorboard
# data
dataset = "openwebtext"  # a folder under data/, or the absolute path of one
gradient_accumulation_steps = 5 * 8  # micro-batches in a step, over all processes
batch_size = 12  # sequences in a micro-batch
block_size = 1024  # tokens in a sequence
# model
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # share of activations zeroed in training, on a CPU in 256ths; for few data
bias = False  # whether Linear and LayerNorm add one, as GPT-2's do
activation = "gelu_tanh"  # gelu_tanh | gelu | relu | relu2 (squared)
positions = "learned"  # learned | rotary
qk_norm = False  # whether queries and keys are normalised
smear = False  # whether a token's vector takes up a share of the one before it
tie_weights = True  # whether the head's weights are the token embeddings
# optimizer
optimizer = "adamw"  # adamw | muon (for the matrices of the blocks; AdamW for the rest)
learning_rate = 6e-4  # AdamW's highest; all rates follow the schedule in proportion to their own
max_iters = 600000  # steps in all
weight_decay = 1e-1  # of matrices, embeddings and the head
beta1 = 0.9  # AdamW's
beta2 = 0.95  # AdamW's
muon_lr = 0.02  # Muon's highest rate
muon_momentum = 0.95  # share of the earlier gradients in a step of Muon's
embedding_lr: float | None = None  # of token and position embeddings; None: learning_rate
embedding_decay: float | None = None  # of the same; None: weight_decay
head_lr: float | None = None  # of a head that is not tied; None: learning_rate
head_decay: float | None = None  # of the same; None: weight_decay
grad_clip = 1.0  # largest norm of the gradient; 0: any
max_bad_steps = 10  # give up when so many in a row had a loss or gradient that is not finite
# learning rate schedule
decay_lr = True  # warm up, then follow the schedule to min_lr; False: learning_rate throughout
schedule = "cosine"  # cosine | linear (flat, then straight down)
decay_fraction = 0.5  # of lr_decay_iters, at their end: where a linear schedule goes down
warmup_iters = 2000
lr_decay_iters = 600000  # step from which the rate stays at min_lr
min_lr = 6e-5  # the lowest
# machine
seed = 1337  # of initialisation, batches and dropout
backend: str | None = None  # nccl | gloo, between processes; None: choose
collective_timeout = 600  # seconds until processes give up on a silent one; longer than a save
device: str | None = None  # cpu | cuda | cuda:1 | mps; None: choose
dtype: str | None = None  # float32 | bfloat16 | float16; None: by what the machine multiplies fast
compile: bool | None = None  # torch.compile; None: on CUDA, and on a CPU for long runs

config, given = configure(globals())
start_time = time.time()
check(globals(), "out_dir != ''", "eval_interval >= 0", "log_interval >= 1", "eval_iters >= 0",
      "gradient_accumulation_steps >= 1", "batch_size >= 1", "block_size >= 1", "n_layer >= 1",
      "n_head >= 1", "n_embd >= 1", "0 <= dropout < 1", "learning_rate > 0", "max_iters >= 0",
      "muon_lr > 0", "0 <= muon_momentum < 1", "0 < decay_fraction <= 1",
      "embedding_lr is None or embedding_lr > 0", "head_lr is None or head_lr > 0",
      "embedding_decay is None or embedding_decay >= 0", "head_decay is None or head_decay >= 0",
      "keep_every >= 0", "max_bad_steps >= 1", "1 <= collective_timeout <= 10**6",
      "weight_decay >= 0", "0 <= beta1 < 1", "0 <= beta2 < 1", "grad_clip >= 0",
      "warmup_iters >= 0", "lr_decay_iters >= 1", "min_lr >= 0", "0 <= seed < 2**64")

import gc
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import runtime
from data.bins import (
    all_starts,
    check_vocabulary,
    dataset_folder,
    gather,
    open_bin,
    prefetch,
    random_starts,
)
from data.tokenizer import load_meta
from metrics import Metrics, Stopwatch, import_loggers
from model import ACTIVATIONS, GPT, POSITIONS, GPTConfig
from optimizer import OPTIMIZERS

# Streams of random numbers: no two may ever be seeded alike.
TRAIN_BATCHES, TRAIN_EVALUATION, VAL_EVALUATION, DROPOUT = range(4)

# ------------------------------------------------------------------------- the run to go on with

resumed = None
if init_from in ("resume", "auto"):
    newest, _ = checkpoint.newest(out_dir)
    if newest:
        resumed = checkpoint.load(newest)
        config = checkpoint.restore_settings(config, given, resumed)
        globals().update(config)  # from here on, the settings above are the checkpoint's
    elif init_from == "resume":
        raise UserError(f"nothing to resume: {out_dir} has neither {checkpoint.NEWEST} nor "
                        f"{checkpoint.BEST}; use --init_from=auto to start in that case")
check(globals(), "warmup_iters < lr_decay_iters or not decay_lr",
      "min_lr <= learning_rate or not decay_lr", "head_lr is None or not tie_weights",
      "head_decay is None or not tie_weights")
_, world_size = runtime.process()
if gradient_accumulation_steps % world_size:
    raise UserError(f"gradient_accumulation_steps = {gradient_accumulation_steps} does not divide "
                    f"among {world_size} processes: choose a multiple of {world_size}")
runtime.check(device, dtype, compile)

# ---------------------------------------------------------------------------------- data, model

folder = dataset_folder(dataset)
train_tokens = open_bin(folder / "train.bin", block_size)
val_tokens = open_bin(folder / "val.bin", block_size)
meta = load_meta(folder)
vocab_size = meta["vocab_size"] if meta else 50304  # GPT-2's 50,257, padded to a multiple of 64
for name, choices in (("activation", ACTIVATIONS), ("positions", POSITIONS),
                      ("optimizer", OPTIMIZERS), ("schedule", ("cosine", "linear"))):
    choose(name, globals()[name], list(choices))
torch.manual_seed(seed)
with user_errors():
    if resumed:
        model = checkpoint.build_model(resumed, dropout)
        checkpoint.check_tokenizer(checkpoint.meta_of(resumed), meta, resumed["path"], dataset)
    elif init_from in ("scratch", "auto"):
        model = GPT(GPTConfig(**{f.name: globals()[f.name] for f in fields(GPTConfig)}))
    else:
        model, model_meta = checkpoint.load_pretrained(init_from, dropout)
        checkpoint.check_tokenizer(model_meta, meta, init_from, dataset)
        checkpoint.check_shape(given, model.config, init_from)
        if block_size > model.config.block_size:
            announce(f"block_size: {model.config.block_size} in {init_from}, {block_size} here")
        model.crop_block_size(block_size)
model_args = asdict(model.config)
config |= {name: model_args[name] for name in model_args if name in config}  # what it really is
vocab_size = model.config.vocab_size
check_vocabulary(train_tokens, vocab_size)
check_vocabulary(val_tokens, vocab_size)

# --------------------------------------------------------------------------------------- runtime

tokens_per_iter = gradient_accumulation_steps * batch_size * block_size
flops = 0 if eval_only else model.flops_per_token() * tokens_per_iter * max_iters
rt = runtime.start(device, dtype, compile, model.config.n_embd, flops, backend, collective_timeout)
model.to(rt.device)
steps_done = resumed["iter_num"] if resumed else -1
if rt.sum(steps_done)[0] != rt.world_size * steps_done:
    raise UserError(f"the processes do not see the same {out_dir}: share it between the machines")
micro_steps = gradient_accumulation_steps // rt.world_size  # of this process

# ------------------------------------------------------------------------------------- optimizer

opt = model.configure_optimizers(
    weight_decay, learning_rate, (beta1, beta2), optimizer, muon_lr=muon_lr,
    muon_momentum=muon_momentum, dtype=getattr(torch, rt.dtype), embedding_lr=embedding_lr,
    head_lr=head_lr, embedding_decay=embedding_decay, head_decay=head_decay)
scaler = torch.amp.GradScaler(rt.device.type, enabled=rt.dtype == "float16")
iter_num, best_val_loss, history, seconds_before = 0, math.inf, [], 0.0
saved_at = None  # the step that ckpt.pt holds
bad_steps, good_loss = 0, math.nan  # skipped in a row up to now; loss of the last that was not
loss_max = -math.inf  # of a micro-batch, since the last log line
most_bad_steps = 0  # in a row, since the last log line
if resumed:
    iter_num = resumed["iter_num"]
    saved_at = iter_num if resumed["path"].name == checkpoint.NEWEST else None
    best_val_loss = float(resumed.get("best_val_loss", math.inf))
    history, seconds_before = resumed.get("history", []), resumed.get("seconds", 0.0)
    bad_steps, good_loss = resumed.get("bad_steps", 0), resumed.get("good_loss", math.nan)
    loss_max = resumed.get("loss_max", -math.inf)
    most_bad_steps = resumed.get("most_bad_steps", bad_steps)
    checkpoint.load_optimizer(opt, scaler, resumed)
    del resumed["model"], resumed["optimizer"]  # their memory is needed
# These stay on the device, where they change in every step: only a log line waits for them.
bad_steps, good_loss, loss_max, most_bad_steps = torch.tensor(
    [bad_steps, good_loss, loss_max, most_bad_steps], device=rt.device).unbind()

net = rt.compiled(model)  # what runs; `model` owns the parameters
ddp = DistributedDataParallel(net) if rt.world_size > 1 else None
if ddp:
    # After its first pass DDP settles the order in which it sums gradients. This is that pass, so
    # that a resumed run sums in the same order as an uninterrupted one.
    idx = torch.zeros(batch_size, block_size, dtype=torch.long, device=rt.device)
    with rt.autocast():
        loss = ddp(idx, idx, loss_only=True)[1]
    loss.backward()
    opt.zero_grad(set_to_none=True)


def lr_at(i: int) -> float:
    """Learning rate of step i."""
    if not decay_lr:
        return learning_rate
    if i < warmup_iters:  # rise in equal steps
        return learning_rate * (i + 1) / (warmup_iters + 1)
    if i >= lr_decay_iters:
        return min_lr
    if schedule == "linear":
        way = min(decay_fraction * lr_decay_iters, lr_decay_iters - warmup_iters)  # down, in steps
        return min_lr + (learning_rate - min_lr) * min(1, (lr_decay_iters - i) / way)
    progress = (i - warmup_iters) / (lr_decay_iters - warmup_iters)  # of the decay, 0 to 1
    return min_lr + (learning_rate - min_lr) * (1 + math.cos(math.pi * progress)) / 2


# ------------------------------------------------------------------------------------ evaluation

# Where the blocks of an evaluation begin: the same every time.
val_starts = all_starts(len(val_tokens), block_size) if eval_iters == 0 else random_starts(
    len(val_tokens), block_size, eval_iters * batch_size, (VAL_EVALUATION, seed))
train_starts = random_starts(
    len(train_tokens), block_size, len(val_starts), (TRAIN_EVALUATION, seed))


def eval_batch(tokens: np.memmap, starts: np.ndarray) -> list[torch.Tensor]:
    """Inputs and targets of the blocks at `starts`, each (B, T) int64; where they are fewer than
    B, blocks without targets follow: compiled code is made for one shape."""
    starts = np.pad(starts, (0, batch_size - len(starts)), constant_values=len(tokens))
    return rt.to_device(*gather(tokens, starts, block_size, vocab_size))


@torch.no_grad()
def evaluate() -> dict | None:
    """Mean losses and next-token accuracy, shared by all processes; None if a signal stops it."""
    model.eval()
    means = []
    for tokens, starts in ((train_tokens, train_starts), (val_tokens, val_starts)):
        sums = np.zeros(3)  # of losses, right predictions, targets
        for first in range(0, len(starts), rt.world_size * batch_size):
            if stop_signals.agreed():
                model.train()
                return None
            batch = starts[first + rt.rank * batch_size:][:batch_size]
            if len(batch) == 0:
                continue  # the last round has nothing for this process
            x, y = eval_batch(tokens, batch)
            with rt.autocast():
                logits, loss = net(x, y)
            n = (y >= 0).sum().item()
            sums += loss.item() * n, (logits.argmax(dim=-1) == y).sum().item(), n
        loss_sum, correct, count = rt.sum(*sums.tolist())
        means.append((loss_sum / count, correct / count))
    model.train()
    (train_loss, _), (val_loss, val_accuracy) = means
    return {"iter": iter_num, "train_loss": train_loss, "val_loss": val_loss,
            "val_perplexity": math.exp(min(val_loss, 700)), "val_accuracy": val_accuracy,
            "seconds": seconds()}


def seconds() -> float:
    """Wall-clock seconds of this run, the parts before a resume included."""
    return seconds_before + time.time() - start_time


@torch.no_grad()
def sound() -> bool:
    """Whether the weights are finite, and their loss on a batch is: the same in all processes."""
    model.eval()
    x, y = eval_batch(val_tokens, val_starts[:batch_size])
    with rt.autocast():
        loss = net(x, y)[1]
    model.train()
    return bool(loss.isfinite()) and all(p.isfinite().all() for p in model.parameters())


def save(name: str) -> None:
    """Write all that the run needs to go on from here, if the model still works."""
    give_up_after(most_bad_steps.item())
    if not sound():
        raise diverged(f"the weights after {iter_num} steps are not finite, or their loss is not")
    if rt.is_main:
        metrics.sync()
        checkpoint.save(Path(out_dir) / name, {
            "model": model.state_dict(), "optimizer": opt.state_dict(),
            "scaler": scaler.state_dict(), "model_args": model_args, "config": config,
            "iter_num": iter_num, "best_val_loss": best_val_loss, "history": history,
            "meta": meta, "seconds": seconds(), "bad_steps": int(bad_steps),
            "most_bad_steps": int(most_bad_steps), "good_loss": good_loss.item(),
            "loss_max": loss_max.item()})


def give_up_after(n: float) -> None:
    """End the run if n bad steps in a row are too many."""
    if n >= max_bad_steps:
        raise diverged(f"{int(n)} steps in a row, by step {iter_num}, had a loss or a gradient "
                       f"that is not finite")


def diverged(what: str) -> RunError:
    """The error that ends a run whose numbers went wrong: what, and how to go on."""
    if rt.dtype == "float16":
        advice = "--dtype=float32, or bfloat16 where the GPU has it"
    elif not grad_clip:
        advice = "--grad_clip=1.0"
    else:
        rates = f"a smaller --learning_rate than {learning_rate:g}"
        rates += f" and --muon_lr than {muon_lr:g}" if optimizer == "muon" else ""
        advice = f"{rates}, or longer --warmup_iters"
    path, steps = checkpoint.newest(out_dir)
    return RunError(f"{what} (last good loss: {good_loss:.4f}); nothing of it was saved: " + (
        f"go on from {path}, which holds step {steps}, by --init_from=resume" if path else
        "start again") + f" with {advice}")


# ------------------------------------------------------------------------------------------ loop

def micro_batches(i: int) -> Iterator[list[torch.Tensor]]:
    """Inputs and targets for this process, each (B, T) int64, from step i on: all processes draw
    the same batch, and each takes every world_size-th part of it."""
    while True:
        starts = random_starts(
            len(train_tokens), block_size, gradient_accumulation_steps * batch_size,
            (TRAIN_BATCHES, seed, i)).reshape(-1, batch_size)
        for micro_step in range(rt.rank, gradient_accumulation_steps, rt.world_size):
            yield rt.to_device(*gather(train_tokens, starts[micro_step], block_size, vocab_size))
        i += 1


announce(f"{model.get_num_params() / 1e6:.2f}M parameters, {tokens_per_iter:,} tokens per step, "
         f"{len(train_tokens):,} tokens to train on, {len(val_tokens):,} to validate")
if rt.is_main and not eval_only:
    import_loggers(config)
    n_kept = max(0, max_iters // keep_every - iter_num // keep_every) if keep_every else 0
    lock = checkpoint.prepare_out_dir(  # held until the process ends
        out_dir, iter_num if resumed else None, checkpoint.size_of(model), n_kept)
metrics = Metrics(rt, None if eval_only else out_dir, config, iter_num, history)
stopwatch = Stopwatch(rt)
stop_signals = runtime.StopSignals(rt)
batches = prefetch(micro_batches(iter_num))
model.train()
gc.collect()
gc.freeze()  # what is here stays: no need to look through it again and again

while True:
    lr = lr_at(iter_num)
    for group in opt.param_groups:
        group["lr"] = lr * group["lr_ratio"]

    # evaluate and save; a run that resumes after an evaluation does not repeat it
    stop = stop_signals.agreed()
    due = iter_num == max_iters or (eval_interval and iter_num % eval_interval == 0)
    if not stop and (eval_only or due and iter_num not in [r["iter"] for r in history]):
        record = evaluate()
        if record is None:
            continue
        metrics.evaluation(record)
        if eval_only:
            break
        val_loss = record["val_loss"]
        if not math.isfinite(val_loss):
            raise diverged(f"the validation loss after {iter_num} steps is {val_loss}")
        history.append(record)
        if val_loss < best_val_loss:
            best_val_loss = val_loss
            if iter_num > 0:
                save(checkpoint.BEST)
        if always_save_checkpoint and iter_num > 0:
            save(checkpoint.NEWEST)
            saved_at = iter_num
    if keep_every and iter_num > 0 and iter_num % keep_every == 0 and not eval_only:
        save(checkpoint.numbered(iter_num))
    if iter_num >= max_iters or stop:
        break

    # gradients, one micro-batch after the other
    stopwatch.start()
    losses = torch.zeros(gradient_accumulation_steps, device=rt.device)  # those of this process
    for micro_step in range(rt.rank, gradient_accumulation_steps, rt.world_size):
        x, y = next(batches)
        stopwatch.lap("data_ms")
        runtime.seed_torch(DROPOUT, seed, iter_num, micro_step)
        last = micro_step + rt.world_size >= gradient_accumulation_steps
        with ddp.no_sync() if ddp and not last else nullcontext():
            with rt.autocast():
                loss = (ddp or net)(x, y, loss_only=True)[1]
            stopwatch.lap("forward_ms")
            scaler.scale(loss / micro_steps).backward()
            stopwatch.lap("backward_ms")
        losses[micro_step] = loss.detach()

    # update, unless a number went wrong: the same in all processes, and known to the device alone
    scaler.unscale_(opt)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    rt.add_up(losses)  # now those of all processes
    loss = losses.mean()
    is_bad = 1.0 - torch.stack([loss, grad_norm]).isfinite().all().float()  # 1 or 0
    # A fused optimizer leaves out a step with this: on a GPU's word, without the host's. MPS is not
    # known to. (scaler.step would put what the scaler found in its place, which is less.)
    opt.found_inf = is_bad
    if rt.device.type != "mps" or not is_bad:
        opt.step()
    scaler.update()
    opt.zero_grad(set_to_none=True)
    bad_steps = (bad_steps + 1) * is_bad
    most_bad_steps = torch.maximum(most_bad_steps, bad_steps)
    loss_max = torch.maximum(loss_max, losses.max())
    good_loss = torch.where(is_bad > 0, good_loss, loss)
    stopwatch.lap("optimizer_ms")

    # log: here alone a step waits for the device
    if iter_num % log_interval == 0:
        loss, loss_most, norm, bad_most = torch.stack(
            [loss, loss_max, grad_norm, most_bad_steps]).tolist()
        phases_ms = stopwatch.read()
        dt = sum(phases_ms.values()) / 1e3
        metrics.step({"iter": iter_num, "loss": loss, "loss_max": loss_most, "lr": lr,
                      "grad_norm": norm, "bad_steps": int(bad_most),
                      "tokens_per_s": tokens_per_iter / dt,
                      "mfu": model.estimate_mfu(micro_steps * batch_size, dt, rt.peak_flops()),
                      **phases_ms, "seconds": seconds()})
        give_up_after(bad_most)
        loss_max = torch.full_like(loss_max, -math.inf)
        most_bad_steps = torch.zeros_like(bad_steps)
    iter_num += 1
    metrics.advance()

# -------------------------------------------------------------------------------------------- end

if not eval_only and saved_at != iter_num:
    save(checkpoint.NEWEST)
stop_signals.agreed()  # none leaves before rank 0 has saved: torchrun would end it in the middle
metrics.close()
if stop:
    announce(f"stopped by signal {stop} after {iter_num} steps: go on with --init_from=resume")
elif not eval_only:
    announce(f"{iter_num} steps done, best validation loss {best_val_loss:.4f}: "
             f"python sample.py --out_dir={out_dir}")
rt.leave(128 + stop if stop else 0)
