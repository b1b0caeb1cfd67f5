"""GPT-2 in one file; rotary positions, QK-norm, squared ReLU, smear and bigram as settings.

    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65))
    optimizer = model.configure_optimizers(weight_decay=0.1, learning_rate=1e-3, betas=(0.9, 0.95))
    logits, loss = model(idx, targets)                 # idx, targets: (B, T) int64
    loss.backward()
    optimizer.step()
    tokens = model.generate(idx, max_new_tokens=100, top_k=200)
    model = GPT.from_pretrained("gpt2")                # or a run's out_dir, or its ckpt.pt

Needs torch alone (and safetensors, huggingface_hub for files of Hugging Face's libraries), so this
file can be copied into another project. The letters in the shape comments:

    B  batch size            H  attention heads (n_head)     S  keys attended to: T, or in
    T  sequence length       D  width of a head (C / H)         decoding the cache's length
    C  width (n_embd)        V  vocabulary (vocab_size)
"""

import json
import math
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # the approximation that GPT-2 uses
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),  # arXiv:2109.08668
}
POSITIONS = ("learned", "rotary")
# The arguments that all minimal GPT trainers know, and the activation of a checkpoint without one.
CLASSIC_ARGS = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
CLASSIC_ACTIVATION = "gelu"
HF_REPOSITORIES = {f"gpt2{size}": f"openai-community/gpt2{size}"  # 124M, 350M, 774M, 1558M
                   for size in ("", "-medium", "-large", "-xl")}
HF_REPOSITORIES["distilgpt2"] = "distilbert/distilgpt2"  # 82M


@dataclass
class GPTConfig:
    """Architecture of a GPT. The defaults are GPT-2 124M with its vocabulary padded to 50,304.

    Raises ValueError for values that no network can have.
    """

    block_size: int = 1024  # maximum sequence length
    vocab_size: int = 50304  # GPT-2's 50,257, padded to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in Linear and LayerNorm, as in GPT-2
    activation: str = "gelu_tanh"  # gelu_tanh | gelu | relu | relu2
    positions: str = "learned"  # learned | rotary
    qk_norm: bool = False  # RMS-normalize queries and keys
    smear: bool = False  # add a learned fraction of the previous token's embedding
    bigram: bool = False  # add a learned embedding of each pair of tokens (small vocabularies)
    tie_weights: bool = True  # lm_head shares its weight with wte

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is int and (type(value) is not int or not 1 <= value < 2**31):
                raise ValueError(f"{f.name} = {value!r:.50}: expected a whole number, at least 1 "
                                 f"and below 2**31")
            if f.type is bool and type(value) not in (bool, int):
                raise ValueError(f"{f.name} = {value!r:.50}: expected True or False")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd} is not divisible by n_head = {self.n_head}: "
                             f"choose a multiple of {self.n_head}")
        if type(self.dropout) not in (float, int) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout}: expected 0 <= dropout < 1")
        for name, choices in (("activation", ACTIVATIONS), ("positions", POSITIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} = {getattr(self, name)!r}: "
                                 f"expected one of {', '.join(choices)}")
        if self.positions == "rotary" and self.n_embd // self.n_head % 2:
            raise ValueError(f"n_embd / n_head = {self.n_embd // self.n_head}: rotary positions "
                             f"need an even head width")
        if self.bigram and self.vocab_size > 1024:
            raise ValueError(f"bigram = True needs vocab_size ** 2 embeddings, but vocab_size = "
                             f"{self.vocab_size}: expected at most 1024, or bigram = False")

    def min_num_params(self) -> int:
        """Number of parameters in matrices and embeddings: a lower bound for the network."""
        n_embeddings = self.vocab_size + (self.block_size if self.positions == "learned" else 0)
        n_embeddings += self.vocab_size**2 if self.bigram else 0
        return (12 * self.n_layer * self.n_embd + n_embeddings) * self.n_embd

    def to_model_args(self) -> dict:
        """The arguments to save in a checkpoint: CLASSIC_ARGS, and those that differ from the
        network of the trainers that know only these."""
        classic = GPTConfig(activation=CLASSIC_ACTIVATION)
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name in CLASSIC_ARGS
                or getattr(self, f.name) != getattr(classic, f.name)}

    @classmethod
    def from_model_args(cls, model_args: dict) -> "GPTConfig":
        """The inverse of `to_model_args`. Raises ValueError for missing or wrong arguments."""
        missing = [name for name in CLASSIC_ARGS[:5] if name not in model_args]
        if missing:
            raise ValueError(f"model_args lacks {', '.join(missing)}")
        try:
            return cls(**{"activation": CLASSIC_ACTIVATION} | model_args)
        except TypeError as error:
            raise ValueError(f"model_args: {error}") from None


class KVCache:
    """Keys and values of the tokens read so far, so that each token is computed once.

    `GPT.forward` appends to it. All tensors keep their shapes and addresses, as CUDA graphs need.
    max_len: number of positions S, at most block_size; length + T must not exceed it.
    """

    def __init__(self, config: GPTConfig, batch_size: int, max_len: int,
                 device: torch.device | None = None, dtype: torch.dtype | None = None):
        shape = (batch_size, config.n_head, max_len, config.n_embd // config.n_head)  # (B, H, S, D)
        new = partial(torch.zeros, device=device)
        self.layers = [(new(shape, dtype=dtype), new(shape, dtype=dtype))  # keys, values
                       for _ in range(config.n_layer)]
        self.length = new((), dtype=torch.long)  # number of tokens read
        self.prev_idx = new((batch_size, 1), dtype=torch.long)  # the last token read


# ----------------------------------------------------------------------------------------- layers

class TokenEmbedding(nn.Embedding):
    """Token embeddings; with `smear`, plus a learned fraction of the previous token's; with
    `bigram`, plus a learned embedding of the pair of both. The first token has no previous one."""

    def __init__(self, config: GPTConfig):
        V, C = config.vocab_size, config.n_embd
        super().__init__(V, C)
        self.smear = nn.Parameter(torch.full((C,), 0.5)) if config.smear else None
        self.bigram = nn.Embedding(V * V, C) if config.bigram else None

    def forward(self, idx: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """idx: (B, T) int64, the tokens after those in the cache. Returns (B, T, C)."""
        x = super().forward(idx)
        if self.smear is None and self.bigram is None:
            return x
        first, n_before = (idx[:, :1], 0) if cache is None else (cache.prev_idx, cache.length)
        prev_idx = torch.cat([first, idx[:, :-1]], dim=1)  # (B, T)
        has_prev = torch.arange(idx.size(1), device=idx.device) + n_before > 0  # (T,)
        if self.smear is not None:
            x = x + self.smear * super().forward(prev_idx) * has_prev[:, None]
        if self.bigram is not None:
            pairs = prev_idx * self.num_embeddings + idx
            x = x + self.bigram(pairs) * has_prev[:, None]
        return x


def rotary_emb(positions: torch.Tensor, D: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and signed sines, each (T, D) float32, of rotary positions (arXiv:2104.09864).

    positions: (T,) int64.
    """
    inv_freq = 10000.0 ** (-2 * torch.arange(D // 2, device=positions.device) / D)
    angles = positions[:, None] * inv_freq  # (T, D / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1)


def apply_rotary_emb(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (a, b) = (x[i], x[i + D / 2]) of a head by the angle of its position, to
    (a cos - b sin, b cos + a sin); x: (B, H, T, D)."""
    return (x * cos + x.roll(x.size(3) // 2, dims=3) * sin).type_as(x)


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    """x divided by its root mean square over the last dimension; no parameters."""
    # In float32, as the default eps is that of the dtype: 0.008 in bfloat16.
    return F.rms_norm(x.float(), (x.size(-1),)).type_as(x)


class CausalSelfAttention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout, self.qk_norm = config.n_head, config.dropout, config.qk_norm
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, positions: torch.Tensor,
                rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
                attn_mask: torch.Tensor | None = None,
                kv_cache: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """x: (B, T, C); positions: (T,); rotary: their cosines and sines; attn_mask: (T, S), added
        to the scores, None: causal; kv_cache: keys, values, (B, H, S, D), written at positions."""
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head
        qkv = self.c_attn(x).view(B, T, 3 * H, D).transpose(1, 2)  # (B, 3H, T, D)
        q, k, v = qkv.chunk(3, dim=1)  # (B, H, T, D) each
        if self.qk_norm:
            q, k = rms_norm(q), rms_norm(k)
        if rotary is not None:
            q, k = apply_rotary_emb(q, *rotary), apply_rotary_emb(k, *rotary)
        if kv_cache is not None:
            k = kv_cache[0].index_copy_(2, positions, k)  # (B, H, S, D)
            v = kv_cache[1].index_copy_(2, positions, v)  # (B, H, S, D)
        y = self.attend(q, k, v, attn_mask)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
               attn_mask: torch.Tensor | None) -> torch.Tensor:
        """Scaled dot-product attention; q: (B, H, T, D), k and v: (B, H, S, D). A method, so that
        another implementation can replace it."""
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, dropout_p=self.dropout if self.training else 0.0,
            is_causal=attn_mask is None)


class MLP(nn.Module):
    """Position-wise feed-forward layer, four times as wide inside."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.act = ACTIVATIONS[config.activation]
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP, each added to the residual stream."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, *args: object) -> torch.Tensor:
        """x: (B, T, C); args: as CausalSelfAttention.forward takes them after x."""
        x = x + self.attn(self.ln_1(x), *args)
        return x + self.mlp(self.ln_2(x))


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of the logits x @ weight.T, computed a chunk of rows at a time.

    Over 50,304 columns the logits are the largest tensor of a training step. Here the gradients of
    a chunk are computed right after its loss, and its logits are freed before the next chunk.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                dtype: torch.dtype) -> torch.Tensor:
        """x: (N, C); weight: (V, C); targets: (N,) int64, -1 is ignored; dtype: of the products,
        float32 or bfloat16 (float16 gradients would underflow). Returns a float32 scalar."""
        # An eighth of the rows, but at least 64 MB of float32 logits.
        chunk_size = max(len(x) // 8, 2**24 // len(weight))
        loss = torch.zeros((), device=x.device)
        x_grad, weight_grad = torch.empty_like(x), torch.zeros_like(weight)
        w = weight.to(dtype)
        for x_chunk, x_grad_chunk, target in zip(
                x.split(chunk_size), x_grad.split(chunk_size), targets.split(chunk_size),
                strict=True):
            x_chunk, target = x_chunk.to(dtype), target.unsqueeze(1)  # (n, C), (n, 1)
            ignored, target = target < 0, target.clamp(min=0)  # (n, 1)
            log_probs = (x_chunk @ w.t()).float().log_softmax(dim=-1)  # (n, V)
            loss -= log_probs.gather(1, target).masked_fill(ignored, 0.0).sum()
            # The gradient of the logits, softmax - one_hot(target), in the memory of log_probs.
            grad = log_probs.exp_()
            grad.scatter_add_(1, target, grad.new_full(target.shape, -1.0))
            grad = grad.to(dtype)
            x_grad_chunk.copy_((grad @ w).masked_fill_(ignored, 0.0))
            weight_grad += grad.t() @ x_chunk.masked_fill(ignored, 0.0)
        n_targets = (targets >= 0).sum()
        ctx.save_for_backward(x_grad, weight_grad, n_targets)
        return loss / n_targets

    @staticmethod
    def backward(ctx, loss_grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_grad, weight_grad, n_targets = ctx.saved_tensors
        scale = loss_grad / n_targets
        return x_grad.mul_(scale), weight_grad.mul_(scale), None, None


# ------------------------------------------------------------------------------------------ model

class GPT(nn.Module):
    """A decoder-only transformer language model."""

    compiled_forward: Callable | None = None  # set by compile_decode
    recompute = False  # compute blocks again in the backward pass: less memory, more time

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        layers = {"wte": TokenEmbedding(config)}
        if config.positions == "learned":
            layers["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        self.transformer = nn.ModuleDict(layers | {
            "drop": nn.Dropout(config.dropout),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
        })
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                # Each block adds to the residual stream twice; smaller weights in these
                # projections keep its variance independent of the depth (GPT-2 report, 2.3).
                scale = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=0.02 / scale)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None,
                cache: KVCache | None = None, loss_only: bool = False,
                ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Next-token logits and, with targets, their mean cross entropy.

        idx: (B, T) int64 token ids.
        targets: (B, T) int64, the token after each of idx; -1 is ignored in the loss.
        cache: idx continues the tokens in it, and is appended to it.
        loss_only: return no logits, which saves most of the memory in training.
        Returns (logits, loss): with targets (B, T, V), or None if loss_only, and a scalar; without
            targets (B, 1, V), the logits of the last position, and None.
        Raises ValueError if idx is longer than block_size.
        """
        config, T, device = self.config, idx.size(1), idx.device
        if config.block_size < T:
            raise ValueError(f"a sequence of {T} tokens is longer than block_size = "
                             f"{config.block_size}: crop it")
        x = self.transformer.wte(idx, cache)  # (B, T, C)
        positions, rotary, attn_mask = torch.arange(T, device=device), None, None  # (T,)
        if cache is not None:
            positions = positions + cache.length
            S = cache.layers[0][0].size(2)
            attn_mask = torch.zeros(T, S, dtype=autocast_dtype(x), device=device).masked_fill(
                torch.arange(S, device=device) > positions[:, None], -torch.inf)
        if config.positions == "learned":
            x = x + self.transformer.wpe(positions)
        else:
            rotary = rotary_emb(positions, config.n_embd // config.n_head)
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            args = x, positions, rotary, attn_mask, None if cache is None else cache.layers[i]
            if self.recompute and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False)
            else:
                x = block(*args)
        x = self.transformer.ln_f(x)
        if cache is not None:
            cache.length += T
            cache.prev_idx.copy_(idx[:, -1:])
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        dtype = autocast_dtype(x)
        if loss_only and dtype != torch.float16:
            return None, LinearCrossEntropy.apply(
                x.flatten(0, 1), self.lm_head.weight, targets.flatten(), dtype)
        logits = self.lm_head(x)  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        return None if loss_only else logits, loss

    # --------------------------------------------------------------------------------- generation

    def generate(self, idx: torch.Tensor, max_new_tokens: int, *args: object, **kwargs: object,
                 ) -> torch.Tensor:
        """The prompts with their continuations, (B, T + max_new_tokens) int64.

        Takes the arguments of `stream`. Rows that stopped are filled up with the stop token.
        """
        steps = list(self.stream(idx, max_new_tokens, *args, **kwargs))
        steps += steps[-1:] * (max_new_tokens - len(steps))
        return torch.stack([*idx.t(), *steps], dim=1)

    @torch.no_grad()
    def stream(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0,
               top_k: int | None = None, top_p: float | None = None,
               repetition_penalty: float = 1.0, stop: int | None = None,
               n_vocab: int | None = None) -> Iterator[torch.Tensor]:
        """Sample continuations of idx, yielding one token per row, (B,) int64, at a time.

        idx: (B, T) int64 prompts of any length T >= 1. When block_size tokens have been read,
            the last half of them becomes the new context.
        temperature: divides the logits; 0 is greedy decoding.
        top_k: sample from the k most likely tokens; None: from all.
        top_p: sample from the fewest most likely tokens with a total probability of at least p
            (nucleus sampling, arXiv:1904.09751); None: from all.
        repetition_penalty: above 1, lowers the logits of tokens that occurred (arXiv:1909.05858).
        stop: a token id that ends a row, which then repeats it; iteration ends with the last row.
        n_vocab: sample only ids below this, those that the tokenizer has.
        Call `eval()` first. Raises ValueError for arguments out of range.
        """
        V, block_size = self.config.vocab_size, self.config.block_size
        n_vocab = n_vocab or V
        for ok, message in (
            (idx.dim() == 2 and idx.size(1) > 0, "the prompt is empty: expected at least 1 token"),
            (max_new_tokens >= 0, f"max_new_tokens = {max_new_tokens}: expected 0 or more"),
            (temperature >= 0, f"temperature = {temperature}: expected 0 or more"),
            (top_k is None or top_k > 0, f"top_k = {top_k}: expected at least 1, or None"),
            (top_p is None or 0 < top_p <= 1, f"top_p = {top_p}: expected 0 < top_p <= 1, or None"),
            (repetition_penalty > 0, f"repetition_penalty = {repetition_penalty}: expected > 0"),
            (n_vocab <= V, f"the tokenizer has {n_vocab} ids, but the model's vocabulary {V}"),
            (stop is None or 0 <= stop < n_vocab, f"stop = {stop}: expected an id below {n_vocab}"),
        ):
            if not ok:
                raise ValueError(message)

        B, T = idx.shape
        max_len = block_size if self.compiled_forward else min(T + max_new_tokens, block_size)
        cache = KVCache(self.config, B, max_len, idx.device,
                        autocast_dtype(self.transformer.wte.weight))
        if self.compiled_forward:  # CUDA graphs read and write fixed addresses
            for tensor in (cache.length, cache.prev_idx, *sum(cache.layers, ())):
                torch._dynamo.mark_static_address(tensor)
        cache_len = 0  # cache.length, which it would take a synchronization to read
        start = max(0, T - block_size)  # position of the first token that is not in the cache
        tokens = F.pad(idx, (0, max_new_tokens))  # (B, T + max_new_tokens), filled in below
        stopped = torch.zeros(B, dtype=torch.bool, device=idx.device)
        for end in range(T, T + max_new_tokens):
            if cache_len == block_size:  # full: start again from the last half of the context
                cache.length.zero_()
                cache_len, start = 0, end - max(1, block_size // 2)
            # Contiguous, as compiled code is specialized on strides.
            new_idx = tokens[:, start:end].clone(memory_format=torch.contiguous_format)
            forward = self.compiled_forward if end - start == 1 else None
            logits, _ = (forward or self)(new_idx, cache=cache)  # (B, 1, V)
            cache_len += end - start
            start = end
            logits = logits[:, -1].float()  # (B, V)
            if end == T and not logits.isfinite().all():
                raise ValueError("the logits are not finite: the weights are too large, or damaged")
            if repetition_penalty != 1:
                logits = apply_repetition_penalty(logits, tokens[:, :end], repetition_penalty)
            token = sample_token(logits[:, :n_vocab], temperature, top_k, top_p)  # (B,)
            if stop is not None:
                token = token.masked_fill(stopped, stop)
                stopped |= token == stop
            tokens[:, end] = token
            yield token
            if stop is not None and stopped.all():
                return

    def compile_decode(self) -> None:
        """Compile the forward pass of a single token, on a GPU into a CUDA graph, for `stream`."""
        self.compiled_forward = torch.compile(self.forward, mode="reduce-overhead", dynamic=False)

    # ---------------------------------------------------------------------------- optimizer, size

    def configure_optimizers(
            self, weight_decay: float, learning_rate: float, betas: tuple[float, float],
            device_type: str | None = None, embedding_lr: float | None = None,
            head_lr: float | None = None) -> torch.optim.AdamW:
        """Fused AdamW over `param_groups`. device_type is unused; code for nanoGPT passes it."""
        groups = self.param_groups(weight_decay, learning_rate, embedding_lr, head_lr)
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)

    def param_groups(self, weight_decay: float, learning_rate: float,
                     embedding_lr: float | None = None, head_lr: float | None = None) -> list[dict]:
        """Two parameter groups: matrices and embeddings with weight decay, vectors without.

        embedding_lr, head_lr: learning rates of their own, and so groups of their own, for the
            embeddings (wte, wpe) and an untied lm_head; None: learning_rate.
        Each group has `lr_ratio`, its rate over learning_rate, for a schedule to multiply with.
        """
        groups: dict[str, dict] = {}
        for name, p in self.named_parameters():  # a tied weight is listed once, as wte
            if not p.requires_grad:
                continue
            kind, lr, decay = "matrices", learning_rate, weight_decay
            if p.dim() < 2:
                kind, decay = "vectors", 0.0
            elif name.startswith("lm_head.") and head_lr is not None:
                kind, lr = "head", head_lr
            elif name.startswith("transformer.w") and embedding_lr is not None:
                kind, lr = "embeddings", embedding_lr
            ratio = lr / learning_rate if learning_rate else 1.0
            group = groups.setdefault(kind, {"params": [], "lr": lr, "weight_decay": decay,
                                             "lr_ratio": ratio})
            group["params"].append((name, p))
        return list(groups.values())

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters; by default without embeddings that are only looked up: wpe, those
        of pairs, and wte where lm_head has a weight of its own."""
        n = sum(p.numel() for p in self.parameters())
        if non_embedding:
            n -= sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Embedding)
                     and m.weight is not self.lm_head.weight)
        return n

    def crop_block_size(self, block_size: int) -> None:
        """Change block_size; ValueError if learned positions would have to grow."""
        is_learned = self.config.positions == "learned"
        if block_size < 1 or (is_learned and block_size > self.config.block_size):
            raise ValueError(f"block_size = {block_size}: the model has {self.config.block_size} "
                             f"positions, so choose at least 1 and at most as many")
        if is_learned:
            weight = self.transformer.wpe.weight[:block_size].detach().clone()
            self.transformer.wpe = nn.Embedding.from_pretrained(weight, freeze=False)
        self.config.block_size = block_size

    def flops_per_token(self) -> int:
        """FLOPs of training on one token of a full block, a multiply-add counted as two.

        Each matrix takes one product in the forward and two in the backward pass; so do scores and
        values in attention, over the whole block as is customary (arXiv:2204.02311, appendix B).
        """
        c = self.config
        matrices = sum(p.numel() for p in self.transformer.h.parameters() if p.dim() == 2)
        matrices += self.lm_head.weight.numel()
        return 6 * matrices + 12 * c.n_layer * c.n_embd * c.block_size

    def estimate_mfu(self, fwdbwd_per_iter: int, dt: float, peak_flops: float | None = 312e12,
                     ) -> float | None:
        """Model FLOPs utilization: the fraction of peak_flops (FLOP/s, by default an A100's in
        bfloat16) that `fwdbwd_per_iter` blocks in `dt` seconds reach; None if it is None."""
        tokens = fwdbwd_per_iter * self.config.block_size
        return self.flops_per_token() * tokens / dt / peak_flops if peak_flops else None

    # ------------------------------------------------------------------------------------ weights

    def load_weights(self, state: dict[str, torch.Tensor], source: object) -> None:
        """load_state_dict with one sentence for an error: ValueError names the tensors of `source`
        that are missing, unexpected, of another shape, not plain floating point or not finite."""
        state = {str(name).removeprefix("_orig_mod."): t for name, t in state.items()
                 if not str(name).endswith((".attn.bias", ".attn.masked_bias"))}  # causal masks
        odd = [name for name, t in state.items()
               if not (is_plain_float(t) and t.isfinite().all())]
        if odd:
            raise ValueError(f"{source}: expected finite numbers in plain floating-point tensors, "
                             f"but not so in {', '.join(odd[:3])} ({len(odd)} in all)")
        wte = state.get("transformer.wte.weight")
        if self.config.tie_weights and wte is not None:
            head = state.setdefault("lm_head.weight", wte)
            if not torch.equal(head, wte):
                raise ValueError(f"{source}: lm_head.weight differs from transformer.wte.weight, "
                                 f"but this model ties them")
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            mismatches = " ".join(str(error).split()).partition(": ")[2]
            raise ValueError(f"{source} does not fit the model: {mismatches:.400}") from None

    @classmethod
    def from_checkpoint(cls, checkpoint: dict, override_args: dict | None = None,
                        source: object = "the checkpoint") -> "GPT":
        """The model in a checkpoint of train.py, or of another minimal GPT trainer.

        checkpoint: a dict with `model_args` and `model`. override_args: {"dropout": ...}.
        Raises ValueError, naming the source, if it holds no model.
        """
        try:
            args, state = checkpoint["model_args"] | (override_args or {}), checkpoint["model"]
            config = GPTConfig.from_model_args(args)
            n_weights = sum(t.numel() for t in state.values())
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{source} holds no model: {error}") from None
        if config.min_num_params() > 2 * n_weights + 10**6:  # it may not even fit into memory
            raise ValueError(f"{source} holds {n_weights:,} weights, but its settings are those of "
                             f"a model of at least {config.min_num_params():,}")
        model = cls(config)
        model.load_weights(state, source)
        return model

    @classmethod
    def from_pretrained(cls, name_or_path: str, override_args: dict | None = None) -> "GPT":
        """A trained model: a run of train.py, or a GPT-2 in Hugging Face's format.

        name_or_path: a checkpoint file; a run's out_dir (best.pt, or else ckpt.pt); a folder with
            config.json and model.safetensors or pytorch_model.bin, whole or in shards; gpt2,
            gpt2-medium, gpt2-large, gpt2-xl, distilgpt2; or owner/name of a GPT-2 on the hub.
        override_args: {"dropout": ...}.
        Raises ValueError if it cannot be loaded, or is not a GPT-2.
        """
        if set(override_args or {}) - {"dropout"}:
            raise ValueError(f"override_args = {override_args}: expected dropout alone")
        path = Path(name_or_path)
        for file in (path / "best.pt", path / "ckpt.pt", path):
            if file.is_file():
                return cls.from_checkpoint(read_file(file), override_args, file)
        return cls.from_checkpoint(read_hugging_face(name_or_path), override_args, name_or_path)

    def save_pretrained(self, folder: str | Path, eos_token_id: int | None = None) -> None:
        """Write the model in Hugging Face's format of a GPT-2: config.json, model.safetensors and
        generation_config.json. Biases that it lacks are written as zeros.

        eos_token_id: the id that ends a text. Raises ValueError for what GPT-2 does not have.
        """
        from safetensors.torch import save_file
        c = self.config
        departures = [f"{name} = {getattr(c, name)!r}"
                      for name in ("positions", "qk_norm", "smear", "bigram")
                      if getattr(c, name) != getattr(GPTConfig, name)]
        if departures:
            raise ValueError(f"{' and '.join(departures)}: a GPT-2 cannot have this, so it cannot "
                             f"be written for Hugging Face's libraries")
        activation = next(key for key, value in HF_ACTIVATIONS.items() if value == c.activation)
        token_ids = {"bos_token_id": eos_token_id, "eos_token_id": eos_token_id}
        hf = HF_FIXED | token_ids | {key: getattr(c, name) for key, name in HF_SIZES.items()} | {
            "architectures": ["GPT2LMHeadModel"], "activation_function": activation,
            "tie_word_embeddings": c.tie_weights, "torch_dtype": "float32",
            **{f"{part}_pdrop": c.dropout for part in ("attn", "embd", "resid")}}
        with torch.device("meta"):
            shapes = GPT(replace(c, bias=True)).state_dict()
        state = {name: torch.zeros(t.shape, device="cpu") for name, t in shapes.items()}
        state |= {name: t.float().cpu() for name, t in self.state_dict().items()}
        state = {name: (t.t() if name.endswith(HF_TRANSPOSED) else t).contiguous()
                 for name, t in state.items() if not (c.tie_weights and name == "lm_head.weight")}
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, contents in (("config", hf), ("generation_config", token_ids)):
            file = Path(folder) / f"{name}.json"
            file.write_text(json.dumps(contents, indent=2), encoding="utf-8")
        save_file(state, Path(folder) / "model.safetensors", {"format": "pt"})


def is_plain_float(x: object) -> bool:
    """Whether x is a dense tensor of real floating-point numbers, with data."""
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return (isinstance(x, torch.Tensor) and x.layout == torch.strided and x.dtype in floats
            and not x.is_meta and not x.is_nested)


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of matrix products with x: autocast's where that is enabled, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


# --------------------------------------------------------------------------------------- sampling

def apply_repetition_penalty(logits: torch.Tensor, idx: torch.Tensor, penalty: float,
                             ) -> torch.Tensor:
    """Lower the logits, (B, V), of the ids that occur in idx, (B, T) (arXiv:1909.05858)."""
    score = logits.gather(1, idx)  # (B, T)
    return logits.scatter(1, idx, torch.where(score > 0, score / penalty, score * penalty))


def sample_token(logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None) -> torch.Tensor:
    """Sample one id per row, (B,) int64, from logits (B, V); arguments as in `GPT.stream`."""
    if temperature < 1e-6:
        return logits.argmax(dim=-1)
    ids, V = None, logits.size(1)
    if top_p == 1:
        top_p = None
    if top_k is not None or top_p is not None:
        logits, ids = logits.topk(min(top_k or V, V))  # (B, K), in descending order
    probs = (logits / temperature).softmax(dim=-1)
    if top_p is not None:
        # Keep a token while the mass before it is < p, so the mass from it on is > 1 - p, which is
        # summed from the small end for accuracy. The most likely token is always kept.
        mass_from = probs.flip(1).cumsum(dim=1).flip(1)
        mass_from[:, 0] = 2.0  # 1 - p rounds to 1 if p is tiny
        probs = probs.masked_fill(mass_from <= 1 - top_p, 0)
    sampled = torch.multinomial(probs, 1)  # (B, 1)
    return (sampled if ids is None else ids.gather(1, sampled)).squeeze(1)


# ------------------------------------------------------------------------------ reading files

def read_file(file: Path, mmap: bool = False) -> dict:
    """Read a .json, .safetensors, .bin or .pt file onto the CPU, without running code from it.

    mmap: read the tensors of a .bin or .pt file when they are used, without checking their bytes.
    Raises ValueError if it cannot be read or is damaged.
    """
    if not file.is_file():
        raise ValueError(f"cannot read {file}: it is no regular file, or not there")
    try:
        if file.suffix == ".json":
            return dict(json.loads(file.read_text(encoding="utf-8")))
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(file)
        with open(file, "rb") as opened:
            is_zip = opened.read(2) == b"PK"  # else the format before torch 1.6
        if is_zip:  # torch does not compare the checksums
            with zipfile.ZipFile(file) as archive:
                for record in archive.infolist():
                    if record.external_attr & 0x10:  # torch skips the data of a directory
                        raise ValueError(f"{record.filename} is marked as a directory")
                    if not (mmap and "/data/" in record.filename):
                        archive.read(record)  # raises an error if its checksum differs
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files that are refused below
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap and is_zip)
    except (ModuleNotFoundError, MemoryError):
        raise
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror or error}") from None
    except Exception as error:  # the libraries raise exceptions of many classes
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"cannot read {file}: it is damaged, of another format, or holds more "
                         f"than plain data ({reason:.100})") from None


# GPT-2 in Hugging Face's format: its names for our settings, and what model.py always computes.
HF_SIZES = {"n_positions": "block_size", "vocab_size": "vocab_size", "n_layer": "n_layer",
            "n_head": "n_head", "n_embd": "n_embd"}
HF_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu",
                  "relu": "relu", "relu2": "relu2"}
HF_FIXED = {"model_type": "gpt2", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False}
# GPT-2's Conv1D stores (in, out), nn.Linear (out, in).
HF_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def read_hugging_face(name_or_path: str) -> dict:
    """A GPT-2 in Hugging Face's format as a checkpoint: a dict with `model_args` and `model`.

    Raises ValueError if it cannot be read, or is another architecture.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        folder = download_from_hub(HF_REPOSITORIES.get(name_or_path, name_or_path))
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files or not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no pretrained model: expected config.json, and "
                         f"model.safetensors or pytorch_model.bin, whole or in shards")
    # config.json may leave these out.
    defaults = HF_FIXED | {"activation_function": "gelu_new", "tie_word_embeddings": True}
    hf = defaults | read_file(folder / "config.json")
    activation = HF_ACTIVATIONS.get(str(hf["activation_function"]))
    wrong = [key for key in HF_FIXED if hf[key] != HF_FIXED[key]]
    wrong += [key for key in HF_SIZES if type(hf.get(key)) is not int]
    wrong += [] if activation else ["activation_function"]
    if wrong:
        raise ValueError(f"{name_or_path} is not a GPT-2 of this form: its config.json has "
                         + ", ".join(f"{key} = {hf.get(key)!r}" for key in wrong))
    model_args = {HF_SIZES[key]: hf[key] for key in HF_SIZES}
    model_args |= {"activation": activation, "tie_weights": bool(hf["tie_word_embeddings"])}
    state = {}
    for file in files:
        for name, tensor in read_file(file, mmap=True).items():
            if name.endswith(HF_TRANSPOSED):
                tensor = tensor.t()
            prefixed = name.startswith(("transformer.", "lm_head."))
            state[name if prefixed else f"transformer.{name}"] = tensor
    return {"model_args": model_args, "model": state}


def download_from_hub(repository: str) -> Path:
    """The folder of a model on the Hugging Face hub, downloaded unless it is in the cache."""
    from huggingface_hub import snapshot_download
    for weights in ("model*.safetensors", "pytorch_model*.bin"):  # the second if there is no first
        try:
            folder = Path(snapshot_download(repository, allow_patterns=["config.json", weights]))
        except Exception as error:  # of many classes: an unknown name, no network
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"{repository!r} is neither a local file or folder, nor could it be "
                             f"downloaded from the Hugging Face hub ({reason})") from None
        if any(folder.glob(weights)):
            break
    return folder
