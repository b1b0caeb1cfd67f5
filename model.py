"""GPT-2 in one file: layers, forward, sampling, pretrained weights, optimizer groups, FLOPs.

    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65))
    logits, loss = model(idx, targets)              # idx, targets: (B, T) int64
    tokens = model.generate(idx, max_new_tokens=100, top_k=200)
    model = GPT.from_pretrained("gpt2")

Shapes are written with these letters:

    B  sequences in a batch          H  attention heads (n_head)
    T  tokens in a sequence          D  width of one head (C / H)
    C  width of the model (n_embd)   V  vocabulary (vocab_size)
    S  tokens attended to: T, plus those already in the cache
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),  # GPT-2's own
    "gelu": nn.GELU,  # the exact form: checkpoints whose model_args name no activation
    "relu": nn.ReLU,
}

PRETRAINED = {  # short names, and where the Hugging Face hub keeps them
    "gpt2": "openai-community/gpt2",  # 124M parameters
    "gpt2-medium": "openai-community/gpt2-medium",  # 350M
    "gpt2-large": "openai-community/gpt2-large",  # 774M
    "gpt2-xl": "openai-community/gpt2-xl",  # 1558M
    "distilgpt2": "distilbert/distilgpt2",  # 82M
}


@dataclass
class GPTConfig:
    """Shape of a GPT; the defaults are GPT-2 124M with its vocabulary padded to 64s.

    Raises ValueError when no such network can be built.
    """

    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # 50,257 ids of GPT-2, padded for fast matrix products
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in Linear and LayerNorm, as in GPT-2
    activation: str = "gelu_tanh"  # gelu_tanh | gelu | relu

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} = {value!r}: expected a whole number, at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd} does not divide into n_head = {self.n_head} "
                             f"heads: choose a multiple of {self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout}: expected 0 <= dropout < 1")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation = {self.activation!r}: "
                             f"expected one of {', '.join(ACTIVATIONS)}")


# ----------------------------------------------------------------------------------------- layers

class Linear(nn.Linear):
    """nn.Linear, faster where a CPU decodes: for a few rows, reading the weights is the work."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // self.in_features
        if (x.device.type != "cpu" or rows > 16 or torch.is_grad_enabled()
                or torch.is_autocast_enabled("cpu")):
            return super().forward(x)
        if rows == 1:  # in bfloat16 at up to twice the speed of F.linear (Xeons with AMX)
            y = torch.mv(self.weight, x.flatten())
        elif rows > 2 and x.dtype == torch.float32 and self.weight.numel() >= 2**18:
            # MKL takes half the time this way round; less than a megabyte of weights gains nothing
            y = (self.weight @ x.reshape(rows, -1).t().contiguous()).t().contiguous()
        else:
            return super().forward(x)
        y = y.reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """Zero each element with probability p, and scale the others so that the mean stays.

    On a CPU, where random numbers are dear, 64 random bits serve eight elements: p is then the
    nearest of 1/256 to 255/256, and the scale is that of this p.
    """
    if x.device.type != "cpu":
        return F.dropout(x, p)
    zeroed = min(max(round(256 * p), 1), 255)  # of the 256 values of a byte
    bits = torch.randint(-2**63, 2**63 - 1, (-(-x.numel() // 8),), device=x.device)  # int64
    kept = bits.view(torch.uint8)[:x.numel()].view(x.shape) >= zeroed
    return x * kept.to(x.dtype).mul_(256 / (256 - zeroed))


class Dropout(nn.Dropout):
    """`dropout`, in training only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dropout(x, self.p) if self.training and self.p else x


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: float = 0.0,
              seen: torch.Tensor | None = None) -> torch.Tensor:
    """Causal attention, by the fastest kernels there are for it.

    q: (B, H, T, D), the last T of the S positions of k and v: (B, H, S, D); T is S or 1.
    p: dropout of the attention weights.
    seen: (1, S) bool, the positions that a single q may read; None: all.
    Returns (B, H, T, D).
    """
    T = q.size(2)
    # A CPU's fused kernel knows no dropout, and in bfloat16 its backward is slow on short blocks.
    if q.device.type == "cpu" and (p or (q.dtype == torch.bfloat16 and 1 < T <= 128)):
        return attention_by_hand(q, k, v, p, seen)
    # A single new token may read all S; is_causal would leave it the first alone.
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=p, is_causal=T > 1)


def attention_by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: float = 0.0,
                      seen: torch.Tensor | None = None) -> torch.Tensor:
    """The same as `attention`, written out, for any T <= S."""
    (B, H, T, D), S = q.shape, k.size(2)
    if seen is None:
        seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(diagonal=S - T)
    mask = torch.zeros(T, S, dtype=q.dtype, device=q.device).masked_fill(~seen, -torch.inf)
    scores = torch.baddbmm(mask, q.reshape(B * H, T, D), k.reshape(B * H, S, D).transpose(1, 2),
                           alpha=1 / math.sqrt(D))  # (B * H, T, S)
    weights = scores.softmax(dim=-1)
    weights = dropout(weights, p) if p else weights
    return (weights @ v.reshape(B * H, S, D)).view(B, H, T, D)


class CausalSelfAttention(nn.Module):
    """Every position reads from itself and those before it, in n_head ways at once."""

    attend = staticmethod(attention)  # tests put attention_by_hand in its place

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)

    def forward(self, x: torch.Tensor, past: torch.Tensor | None = None,
                positions: torch.Tensor | None = None, seen: torch.Tensor | None = None,
                ) -> torch.Tensor:
        """x: (B, T, C); past: (2, B, H, S, D) keys and values, to which those of x are added at
        positions, (T,); seen: which of the S a single x may read, as in `attention`."""
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head
        q, k, v = self.c_attn(x).split(C, dim=2)  # each (B, T, C)
        q = q.view(B, T, H, D).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, H, D).transpose(1, 2)  # (B, H, T, D)
        v = v.view(B, T, H, D).transpose(1, 2)  # (B, H, T, D)
        if past is not None:
            k = past[0].index_copy_(2, positions, k)  # (B, H, S, D)
            v = past[1].index_copy_(2, positions, v)  # (B, H, S, D)
        y = self.attend(q, k, v, self.dropout if self.training else 0.0, seen)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Each position by itself, through a hidden layer four times as wide."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.act = ACTIVATIONS[config.activation]()
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(nn.Module):
    """Attention, then MLP, each reading a normalised copy of the stream and adding to it."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, past: torch.Tensor | None = None,
                positions: torch.Tensor | None = None, seen: torch.Tensor | None = None,
                ) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), past, positions, seen)
        return x + self.mlp(self.ln_2(x))


# ------------------------------------------------------------------------------------------- loss

class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of the logits x @ weight.T, of which a chunk of rows is held at a time.

    Each chunk's part of the gradients is computed beside its part of the loss, so that no logits
    are kept for the backward pass: over 50,304 columns they are a large part of all memory.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                dtype: torch.dtype) -> torch.Tensor:
        """x: (N, C); weight: (V, C); targets: (N,) int64, -1 where there is nothing to predict;
        dtype: of the matrix products, float32 or bfloat16: float16 would need a scaled loss.
        Returns the loss, a float32 scalar."""
        rows = max(len(x) // 8, 2**24 // len(weight))  # 64 MB of logits, or an eighth of them
        counted = targets >= 0
        loss = torch.zeros((), device=x.device)
        x_grad, weight_grad = torch.empty_like(x), torch.zeros_like(weight)
        matrix = weight.to(dtype)
        for x_part, x_grad_part, target, counts in zip(
                x.split(rows), x_grad.split(rows), targets.split(rows), counted.split(rows),
                strict=True):
            x_part, target = x_part.to(dtype), target.clamp(min=0).unsqueeze(1)  # (n, C), (n, 1)
            log_probs = (x_part @ matrix.t()).float().log_softmax(dim=-1)  # (n, V)
            loss -= log_probs.gather(1, target).squeeze(1).masked_fill(~counts, 0.0).sum()
            grad = log_probs.exp_()  # of the logits: the probabilities, less 1 at the target
            grad.scatter_add_(1, target, grad.new_full(target.shape, -1.0))
            grad = grad.masked_fill_(~counts.unsqueeze(1), 0.0).to(dtype)
            x_grad_part.copy_(grad @ matrix)
            weight_grad += grad.t() @ x_part
        n = counted.sum()
        ctx.save_for_backward(x_grad, weight_grad, n)
        return loss / n

    @staticmethod
    def backward(ctx, loss_grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_grad, weight_grad, n = ctx.saved_tensors
        scale = loss_grad / n
        return x_grad.mul_(scale), weight_grad.mul_(scale), None, None


# ------------------------------------------------------------------------------------------ model

class GPT(nn.Module):
    """A decoder-only transformer: GPT-2, to the letter, under the default settings."""

    compiled_decode: Callable | None = None  # set by `compile_decode`

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "drop": Dropout(config.dropout),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
        })
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied: one matrix reads and writes ids
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                # Each of the 2 * n_layer residual additions widens the stream's variance, so
                # those that feed it start smaller (GPT-2 report, section 2.3).
                shrink = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=0.02 / shrink)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None,
                past: torch.Tensor | None = None, start: int | torch.Tensor = 0,
                loss_only: bool = False,
                ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Logits of the next token, and the mean cross entropy when targets are given.

        idx: (B, T) int64 token ids, at positions start .. start + T.
        targets: (B, T) int64, the token after each of idx; -1 where there is nothing to predict.
        past: (n_layer, 2, B, H, S_max, D), the keys and values of the positions before start;
            those of idx are written into it. A start that is a tensor, (), with T = 1, leaves all
            shapes alike from token to token, as compiled code wants it.
        loss_only: leave the logits out, which takes far less memory in training.
        Returns (logits, loss): (B, T, V), or None if loss_only, and a scalar with targets; without
            them, the logits of the last position alone, (B, 1, V), and None.
        Raises ValueError if the sequence is longer than block_size.
        """
        T, seen = idx.size(1), None
        positions = torch.arange(T, device=idx.device) + start  # (T,)
        if isinstance(start, torch.Tensor):
            seen = torch.arange(past.size(-2), device=idx.device)[None] <= positions  # (1, S)
        elif start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit block_size = "
                             f"{self.config.block_size}: crop the input")
        elif past is not None:
            past = past[..., :start + T, :]
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            x = block(x, None if past is None else past[i], positions, seen)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, -1:]), None  # (B, 1, V)
        device = idx.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if loss_only and dtype != torch.float16:
            return None, LinearCrossEntropy.apply(
                x.flatten(0, 1), self.lm_head.weight, targets.flatten(), dtype)
        logits = self.lm_head(x)  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        return None if loss_only else logits, loss

    # ---------------------------------------------------------------------------------- sampling

    def decode(self, token: torch.Tensor, past: torch.Tensor, position: torch.Tensor,
               ) -> torch.Tensor:
        """Logits, (B, 1, V), after one more token, (B, 1), at position, (); past as in forward."""
        return self(token, past=past, start=position)[0]

    def compile_decode(self) -> None:
        """Have `stream` compile what it does for each token, once for each number of sequences;
        on a GPU, into a CUDA graph."""
        self.compiled_decode = torch.compile(self.decode, mode="reduce-overhead", dynamic=False)

    @torch.no_grad()
    def stream(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0,
               top_k: int | None = None, top_p: float | None = None,
               repetition_penalty: float = 1.0, stop: int | None = None,
               n_vocab: int | None = None) -> Iterator[torch.Tensor]:
        """Continue the sequences of idx, yielding each step's tokens, (B,) int64, as they come.

        idx: (B, T) int64, T >= 1, of any length: past block_size, the model goes on from the
            last half of its context.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw from exactly the k likeliest tokens.
        top_p: draw from the fewest tokens whose probabilities sum to p (arXiv:1904.09751).
        repetition_penalty: weakens tokens that have occurred; 1 is none (arXiv:1909.05858).
        stop: a row that draws this id repeats it; ends when all rows have.
        n_vocab: ids from here on are never drawn (the padding of the vocabulary).
        Call `eval()` first. Raises ValueError for settings out of range.
        """
        c, V, block_size = self.config, self.config.vocab_size, self.config.block_size
        n_vocab = n_vocab or V
        for ok, what in (
            (idx.dim() == 2 and idx.size(1) > 0, "the prompt is empty: expected at least 1 token"),
            (max_new_tokens >= 0, f"max_new_tokens = {max_new_tokens}: expected 0 or more"),
            (temperature >= 0, f"temperature = {temperature}: expected 0 or more"),
            (top_k is None or top_k > 0, f"top_k = {top_k}: expected at least 1, or None"),
            (top_p is None or 0 < top_p <= 1, f"top_p = {top_p}: expected 0 < top_p <= 1, or None"),
            (repetition_penalty > 0, f"repetition_penalty = {repetition_penalty}: expected > 0"),
            (n_vocab <= V, f"the tokenizer's {n_vocab} ids do not fit the model's {V}"),
            (stop is None or 0 <= stop < n_vocab, f"stop = {stop}: expected an id below {n_vocab}"),
        ):
            if not ok:
                raise ValueError(what)

        B, T = idx.shape
        device = idx.device
        dtype = (torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type)
                 else self.lm_head.weight.dtype)
        S = block_size if self.compiled_decode else min(T + max_new_tokens, block_size)
        past = torch.zeros(c.n_layer, 2, B, c.n_head, S, c.n_embd // c.n_head, dtype=dtype,
                           device=device)
        if self.compiled_decode:
            torch._dynamo.mark_static_address(past)  # a CUDA graph writes to fixed places only
        held = 0  # positions in past
        tokens = F.pad(idx, (0, max_new_tokens))  # (B, T + n), filled in as tokens come
        stopped = torch.zeros(B, dtype=torch.bool, device=device)
        unread = max(0, T - block_size)  # the first token that is not in past
        for end in range(T, T + max_new_tokens):
            if held == block_size:
                held, unread = 0, end - max(1, block_size // 2)
            if self.compiled_decode and unread == end - 1:
                token = tokens[:, unread:end].clone(memory_format=torch.contiguous_format)
                logits = self.compiled_decode(token, past, torch.full((), held, device=device))
            else:
                logits, _ = self(tokens[:, unread:end], past=past, start=held)
            held, unread = held + end - unread, end
            logits = logits[:, -1].float()  # (B, V)
            if repetition_penalty != 1:
                logits = penalize_repeats(logits, tokens[:, :end], repetition_penalty)
            token = draw(logits[:, :n_vocab], temperature, top_k, top_p)  # (B,)
            if stop is not None:
                token = token.masked_fill(stopped, stop)
                stopped |= token == stop
            tokens[:, end] = token
            yield token
            if stop is not None and stopped.all():
                return

    def generate(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0,
                 top_k: int | None = None, top_p: float | None = None,
                 repetition_penalty: float = 1.0, stop: int | None = None,
                 n_vocab: int | None = None) -> torch.Tensor:
        """The prompts with their continuations, (B, T + max_new_tokens) int64; see `stream`.

        Rows that end early are filled up with `stop`.
        """
        steps = list(self.stream(idx, max_new_tokens, temperature, top_k, top_p,
                                 repetition_penalty, stop, n_vocab))
        tokens = torch.cat([idx, *(step[:, None] for step in steps)], dim=1)  # (B, T + steps)
        return F.pad(tokens, (0, max_new_tokens - len(steps)), value=stop or 0)

    # ----------------------------------------------------------------------- size, optimizer, FLOPs

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters; by default without the position embeddings, which no matrix
        product reads. The token embeddings count: they are the head's weights too."""
        n = sum(p.numel() for p in self.parameters())
        return n - self.transformer.wpe.weight.numel() if non_embedding else n

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context. Raises ValueError if it is longer than the present one."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"block_size = {block_size}: the model has {self.config.block_size} "
                             f"positions, so choose at most as many")
        self.config.block_size = block_size
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].clone())
        self.transformer.wpe.num_embeddings = block_size

    def configure_optimizers(self, weight_decay: float, learning_rate: float,
                             betas: tuple[float, float]) -> torch.optim.AdamW:
        """Fused AdamW; weight decay on matrices and embeddings, none on biases and norms."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)

    def flops_per_token(self) -> int:
        """Model FLOPs of training on one token of a full block, a multiply-add counted as two.

        Every matrix weight is used once forward and twice backward; so are the attention scores
        and their use, counted over the whole block as is customary (arXiv:2204.02311, app. B).
        """
        c = self.config
        weights = sum(p.numel() for p in self.transformer.h.parameters() if p.dim() == 2)
        weights += self.lm_head.weight.numel()
        return 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size

    def estimate_mfu(self, fwdbwd_per_iter: int, dt: float, peak_flops: float | None,
                     ) -> float | None:
        """Fraction of `peak_flops` (per second) reached by `fwdbwd_per_iter` full blocks in `dt`
        seconds of training on one device; None where the peak is not known."""
        tokens = fwdbwd_per_iter * self.config.block_size
        return self.flops_per_token() * tokens / dt / peak_flops if peak_flops else None

    # --------------------------------------------------------------------------------- weights

    def load_weights(self, state: dict[str, torch.Tensor], source: str) -> None:
        """Copy parameters by name. Raises ValueError naming the missing, unknown, misshapen and
        broken tensors of `source`; then nothing was copied."""
        state = {name: tensor for name, tensor in state.items()  # without stored causal masks
                 if not name.endswith((".attn.bias", ".attn.masked_bias"))}
        own = self.state_dict()
        if "lm_head.weight" not in state and "transformer.wte.weight" in state:
            state = state | {"lm_head.weight": state["transformer.wte.weight"]}
        wrong = [f"{name} is missing" for name in own.keys() - state.keys()]
        wrong += [f"{name} is unknown" for name in state.keys() - own.keys()]
        shapes = {name: tuple(tensor.shape) if isinstance(tensor, torch.Tensor)
                  else type(tensor).__name__ for name, tensor in state.items()}
        wrong += [f"{name} is {shapes[name]}, not {tuple(own[name].shape)}"
                  for name in own.keys() & state.keys() if shapes[name] != tuple(own[name].shape)]
        if not wrong:
            wrong = [f"{name} holds numbers that are not finite"
                     for name, tensor in state.items() if not tensor.isfinite().all()]
        if not wrong and not torch.equal(state["lm_head.weight"], state["transformer.wte.weight"]):
            wrong = ["lm_head.weight differs from transformer.wte.weight (this model ties them)"]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ValueError(f"{source} does not fit the model: {'; '.join(sorted(wrong)[:3])}"
                             f"{more}; give a file of such a model")
        self.load_state_dict(state)

    @classmethod
    def from_pretrained(cls, name_or_path: str, dropout: float = 0.0) -> "GPT":
        """GPT-2 weights in Hugging Face's format; the shape is read from their config.json.

        name_or_path: gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2, any hub repository of
            a GPT-2, or a local folder with config.json and model.safetensors or
            pytorch_model.bin, whole or in shards.
        Raises ValueError if they cannot be had, or are not a GPT-2 of this form.
        """
        hf, tensors = read_pretrained(name_or_path)
        sizes = {"block_size": "n_positions", "vocab_size": "vocab_size", "n_layer": "n_layer",
                 "n_head": "n_head", "n_embd": "n_embd"}
        activations = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
                       "gelu": "gelu", "relu": "relu"}
        unsupported = {key: hf.get(key) for key in sizes.values() if type(hf.get(key)) is not int}
        unsupported |= {key: hf[key] for key, usual in (
            ("model_type", ["gpt2"]), ("n_inner", [None, 4 * (hf.get("n_embd") or 0)]),
            ("layer_norm_epsilon", [1e-5]), ("scale_attn_weights", [True]),
            ("scale_attn_by_inverse_layer_idx", [False]), ("tie_word_embeddings", [True]),
            ("activation_function", list(activations))) if key in hf and hf[key] not in usual}
        if unsupported:
            raise ValueError(f"{name_or_path} is not a GPT-2 of this form: its config.json has "
                             + ", ".join(f"{k} = {v!r}" for k, v in unsupported.items()))
        activation = activations[hf.get("activation_function", "gelu_new")]
        model = cls(GPTConfig(**{ours: hf[theirs] for ours, theirs in sizes.items()},
                              dropout=dropout, bias=True, activation=activation))
        state = {}
        for name, tensor in tensors.items():
            if name.endswith(("attn.c_attn.weight", "c_proj.weight", "mlp.c_fc.weight")):
                tensor = tensor.t()  # Conv1D keeps (in, out), Linear (out, in)
            if not name.startswith(("transformer.", "lm_head.")):
                name = f"transformer.{name}"
            state[name] = tensor
        model.load_weights(state, source=name_or_path)
        return model


# --------------------------------------------------------------------------- from logits to tokens

def penalize_repeats(logits: torch.Tensor, tokens: torch.Tensor, penalty: float) -> torch.Tensor:
    """Weaken the logits, (B, V), of the ids that occur in tokens, (B, T) (arXiv:1909.05858)."""
    seen = logits.gather(1, tokens)  # (B, T)
    return logits.scatter(1, tokens, torch.where(seen > 0, seen / penalty, seen * penalty))


def draw(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None,
         ) -> torch.Tensor:
    """Draw one id per row, (B,) int64, from logits (B, V); settings as in `GPT.stream`."""
    if temperature < 1e-6:  # 0, or so close to it that float32 would not hold the quotients
        return logits.argmax(dim=-1)
    ids = None
    if top_k is not None or top_p is not None:
        V = logits.size(1)
        logits, ids = logits.topk(min(top_k or V, V))  # (B, K), likeliest first
    # The largest becomes 0, so that no quotient overflows.
    probs = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1)
    if top_p is not None:
        likelier = probs.cumsum(dim=-1) - probs  # mass of the tokens before each
        probs = probs.masked_fill(likelier >= max(top_p, 1e-9), 0)  # float32 would make less 0
    drawn = torch.multinomial(probs, 1)  # (B, 1)
    return (drawn if ids is None else ids.gather(1, drawn)).squeeze(1)


# --------------------------------------------------------------------- files of pretrained weights

def pretrained_folder(name_or_path: str) -> Path:
    """The local folder itself, or one downloaded from the Hugging Face hub (and kept there)."""
    if os.path.isdir(name_or_path):
        return Path(name_or_path)
    from huggingface_hub import snapshot_download
    repo = PRETRAINED.get(name_or_path, name_or_path)
    for weights in ("model*.safetensors", "pytorch_model*.bin"):
        try:
            folder = Path(snapshot_download(repo, allow_patterns=["config.json", weights]))
        except Exception as error:  # no such name or repository, no network: each has its class
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"{name_or_path!r} is not a folder here, and {repo} did not come from "
                             f"the Hugging Face hub ({reason})") from None
        if any(folder.glob(weights)):
            break
    return folder


def read_pretrained(name_or_path: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """config.json as a dict, and every tensor of the weights, whole or in shards, by its name."""
    folder = pretrained_folder(name_or_path)
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    path = folder / "config.json"
    if not files or not path.is_file():
        raise ValueError(f"{folder} is no pretrained model: expected config.json, and "
                         f"model.safetensors or pytorch_model.bin, whole or in shards")
    state = {}
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
        for path in files:
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file
                state |= load_file(path)
            else:
                state |= torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # each reader has its own; all mean a file that is not whole
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"cannot read {path}: {reason}") from None
    return config, state
