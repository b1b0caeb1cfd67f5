"""What a training run on GPUs will take, by arithmetic: memory, time, money. Needs no GPU."""

from bisect import bisect_right
from functools import partial

from configurator import UserError, check_choice
from engine.runtime import DTYPES, PEAK_TFLOPS
from model import GPT

USABLE = 0.92  # fraction of a GPU's memory; the rest is the CUDA context and fragmentation


def memory_by_part(model: GPT, batch_size: int, dtype: str, optimizer: str, n_gpus: int,
                   shard: bool = False, accumulates: bool = False) -> dict[str, float]:
    """Bytes per GPU of what a training step holds, by part: activations and logits at the end of a
    forward pass, gradients at the end of a backward pass.

    batch_size: sequences per micro-batch. accumulates: over several micro-batches per GPU. The
    model may be on the meta device.
    """
    c, N = model.config, batch_size * model.config.block_size  # N: tokens per micro-batch
    C, V, size = c.n_embd, c.vocab_size, 4 if dtype == "float32" else 2  # bytes per element
    n_params, n_block, n_rest = param_counts(model)
    n_matrices = sum(p.numel() for p in model.transformer.h.parameters() if p.dim() == 2)
    muon = n_matrices if optimizer == "muon" else 0  # one moment, not two
    # Saved for the backward pass of a block: the residual stream before both norms, in float32;
    # both norms' outputs, q, k, v, the attention's output, and 4 C before and 4 C after the MLP's
    # activation. Then the statistics of both norms and of the softmax, and dropout masks.
    block = 8 * C + 14 * C * size + 16 + 4 * c.n_head + (2 * C if c.dropout else 0)
    block += 2 * C * size * ((c.positions == "rotary") + c.qk_norm)  # new queries and keys
    blocks = c.n_layer * 4 * C + block if model.recompute else c.n_layer * block
    chunk = max(N // 8, 2**24 // V)  # rows of logits at a time, in LinearCrossEntropy
    weights, gradients = 4 * n_params, 4 * n_params
    copies = 2 * n_params if size == 2 else 0  # in dtype
    if shard:  # gathered at a time: this block and the next, and all that is not a block
        copies = 2 * n_block * size + 4 * n_rest
        # Gradients of several micro-batches are added up before processes share them.
        gradients = gradients if accumulates else gradients / n_gpus + 4 * (n_block + n_rest)
    return {
        "weights": weights / (n_gpus if shard else 1) + copies,
        "optimizer": (8 * n_params - 4 * muon) / (n_gpus if shard else 1),
        # where DDP averages gradients
        "ddp_buckets": 4 * n_params if n_gpus > 1 and not shard else 0,
        "gradients": gradients,
        "activations": N * (blocks + 8 * C),
        "logits": 8 * min(chunk, N) * V + (4 + size) * V * C}


def param_counts(model: GPT) -> tuple[int, int, int]:
    """Number of parameters in the model, in one block, and in all that is not a block."""
    n_params = model.get_num_params(non_embedding=False)
    n_block = sum(p.numel() for p in model.transformer.h[0].parameters())
    return n_params, n_block, n_params - n_block * model.config.n_layer


def bytes_per_step(model: GPT, dtype: str, n_gpus: int, shard: bool, micro_steps: int) -> float:
    """Bytes that a GPU sends in a step: gradients once, and sharded weights for each forward and
    backward pass of micro_steps micro-batches. Muon's updates are not counted."""
    n_params, _, n_rest = param_counts(model)
    gradients = 4 * n_params
    weights = (n_params - n_rest) * (4 if dtype == "float32" else 2)  # of the blocks
    sent = 2 * gradients  # an all-reduce
    if shard:  # a reduce-scatter, and two all-gathers of the blocks and one of the rest
        sent = gradients + micro_steps * (2 * weights + 4 * n_rest)
    return sent * (n_gpus - 1) / n_gpus


def peak(parts: dict[str, float], accumulates: bool) -> float:
    """The largest sum of parts that is held at a time. accumulates: whether gradients of earlier
    micro-batches are held during a forward pass."""
    both = parts["activations"] + parts["logits"]
    rest = parts["weights"] + parts["optimizer"] + parts["ddp_buckets"]
    return rest + (parts["gradients"] + both if accumulates else max(parts["gradients"], both))


def plan(model: GPT, gpu: str, n_gpus: int, memory_gb: float | None, dtype: str | None,
         optimizer: str, batch_size: int, gradient_accumulation_steps: int, max_iters: int,
         mfu: float, usd_per_gpu_hour: float | None, shard: bool = False,
         link_gb_per_s: float = 50) -> dict[str, float | None]:
    """Figures of a run on n_gpus GPUs that reaches the given MFU; time is that of the steps alone.

    gpu: a name in PEAK_TFLOPS. link_gb_per_s: what it sends per second, which is not part of the
    time of a step, as most of it happens meanwhile. Raises UserError if it does not have the dtype.
    """
    check_choice("gpu", gpu, list(PEAK_TFLOPS))
    *peaks, gpu_memory_gb = PEAK_TFLOPS[gpu]
    peaks = dict(zip(DTYPES, peaks, strict=True))
    dtype = dtype or next(name for name in DTYPES if peaks[name])
    if not peaks[check_choice("dtype", dtype, DTYPES)]:
        raise UserError(f"dtype = {dtype!r}: a {gpu} does not have it, choose another dtype")
    shard = shard and n_gpus > 1
    if shard and dtype == "float16":
        raise UserError("shard = True and dtype = 'float16': use --dtype=bfloat16 or float32")
    if gradient_accumulation_steps % n_gpus:
        raise UserError(f"gradient_accumulation_steps = {gradient_accumulation_steps} is not "
                        f"divisible by {n_gpus} GPUs: choose a multiple of {n_gpus}")
    memory_gb = memory_gb or gpu_memory_gb

    accumulates = gradient_accumulation_steps > n_gpus
    parts_of = partial(memory_by_part, model, dtype=dtype, optimizer=optimizer, n_gpus=n_gpus,
                       shard=shard, accumulates=accumulates)
    largest = bisect_right(range(1, 4097), USABLE * memory_gb * 1e9,
                           key=lambda size: peak(parts_of(size), accumulates))
    parts = parts_of(batch_size)
    tokens_per_step = gradient_accumulation_steps * batch_size * model.config.block_size
    step_s = model.flops_per_token() * tokens_per_step / (n_gpus * peaks[dtype] * 1e12 * mfu)
    gpu_hours = n_gpus * step_s * max_iters / 3600
    n_params = model.get_num_params(non_embedding=False)
    sent = bytes_per_step(model, dtype, n_gpus, shard, gradient_accumulation_steps // n_gpus)
    return {
        "parameters": n_params, "peak_tflops": peaks[dtype],
        **{f"{part}_gb": n_bytes / 1e9 for part, n_bytes in parts.items()},
        "peak_memory_gb": peak(parts, accumulates) / 1e9, "memory_of_gpu_gb": memory_gb,
        "largest_batch_size": largest, "tokens_per_step": tokens_per_step,
        "step_ms": step_s * 1e3, "sent_gb": sent / 1e9, "sending_ms": sent / link_gb_per_s / 1e6,
        "tokens": tokens_per_step * max_iters,
        "days": step_s * max_iters / 86400, "gpu_hours": gpu_hours,
        "usd": usd_per_gpu_hour and usd_per_gpu_hour * gpu_hours,
        "checkpoint_gb": (4 * n_params + parts["optimizer"] * (n_gpus if shard else 1)) / 1e9,
        "data_gb": 2 * tokens_per_step * max_iters / 1e9}
