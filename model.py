"""The GPT: layers, forward and sampling. GPT-2 by default, what is newer as settings.

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

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
import weights
from kernels import Dropout, Linear, LinearCrossEntropy, RMSNorm
from optimizer import make_optimizer

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # GPT-2's own
    "gelu": F.gelu,  # the exact form: checkpoints whose model_args name no activation
    "relu": F.relu,
    "relu2": kernels.relu2,  # arXiv:2109.08668
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
    activation: str = "gelu_tanh"  # gelu_tanh | gelu | relu | relu2
    positions: str = "learned"  # learned | rotary
    qk_norm: bool = False  # whether queries and keys are normalised, head by head
    smear: bool = False  # whether a token's vector takes up a share of the one before it
    tie_weights: bool = True  # whether the head's weights are the token embeddings

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
        for name, choices in (("activation", ACTIVATIONS), ("positions", POSITIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} = {getattr(self, name)!r}: "
                                 f"expected one of {', '.join(choices)}")
        if self.positions == "rotary" and self.n_embd // self.n_head % 2:
            raise ValueError(f"n_embd / n_head = {self.n_embd // self.n_head}: expected an even "
                             f"number, as rotary positions turn pairs")


# ----------------------------------------------------------------------------------------- layers

class TokenEmbedding(nn.Embedding):
    """A vector for each token; with a smear, also a learned share of that of the token before, so
    that the first block already sees pairs."""

    def __init__(self, config: GPTConfig):
        super().__init__(config.vocab_size, config.n_embd)
        self.smear = nn.Parameter(torch.empty(config.n_embd)) if config.smear else None

    def forward(self, idx: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
        """idx: (B, T); before: (B, 1), the tokens before them, None at the start of a text.
        Returns (B, T, C)."""
        x = super().forward(idx)
        if self.smear is None:
            return x
        left = torch.zeros_like(x[:, :1]) if before is None else super().forward(before)
        return x + self.smear * torch.cat([left, x[:, :-1]], dim=1)


class LearnedPositions(nn.Embedding):
    """A vector for each position, added to that of its token: GPT-2's way."""

    def __init__(self, config: GPTConfig):
        super().__init__(config.block_size, config.n_embd)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, None]:
        """x: (B, T, C) token vectors; positions: (T,). Returns their sum, and what `turn` takes."""
        return x + super().forward(positions), None

    def crop(self, block_size: int) -> None:
        """Keep the first block_size positions. Raises ValueError if there are fewer."""
        if not 1 <= block_size <= self.num_embeddings:
            raise ValueError(f"block_size = {block_size}: the model has {self.num_embeddings} "
                             f"positions, so choose at most as many")
        self.weight = nn.Parameter(self.weight[:block_size].clone())
        self.num_embeddings = block_size

    @staticmethod
    def turn(x: torch.Tensor, rotation: None) -> torch.Tensor:
        """Queries and keys as they are."""
        return x


class RotaryPositions(nn.Module):
    """Queries and keys turned by angles that grow with the position, so that their products
    depend on distances alone (arXiv:2104.09864). Nothing is learned, and no length is the last."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.width = config.n_embd // config.n_head  # D

    def forward(self, x: torch.Tensor, positions: torch.Tensor,
                ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """x: (B, T, C) token vectors; positions: (T,). Returns x, and what `turn` takes."""
        pair = torch.arange(self.width // 2, device=x.device)
        angles = positions[:, None] * 10000.0 ** (-2 * pair / self.width)  # (T, D / 2) float32
        cos, sin = angles.cos(), angles.sin()
        return x, (torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1))  # (T, D) each

    def crop(self, block_size: int) -> None:
        """Any block_size will do."""
        if block_size < 1:
            raise ValueError(f"block_size = {block_size}: expected at least 1")

    @staticmethod
    def turn(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """x: (B, H, T, D), of which the components i and i + D / 2 are a point of a plane."""
        cos, sin = rotation
        return (x * cos + x.roll(x.size(3) // 2, dims=3) * sin).type_as(x)


POSITIONS = {"learned": LearnedPositions, "rotary": RotaryPositions}


class Place(NamedTuple):
    """Where the tokens of one forward pass stand, the same for every block."""

    positions: torch.Tensor  # (T,) int64
    rotation: tuple[torch.Tensor, torch.Tensor] | None  # what their positions' `turn` takes
    seen: torch.Tensor | None  # (1, S) bool, what a single token may read; None: all before it


class CausalSelfAttention(nn.Module):
    """Every position reads from itself and those before it, in n_head ways at once."""

    attend = staticmethod(kernels.attention)  # tests put attention_by_hand in its place

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.qk_norm = RMSNorm() if config.qk_norm else nn.Identity()
        self.turn = POSITIONS[config.positions].turn
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)

    def forward(self, x: torch.Tensor, place: Place, past: torch.Tensor | None = None,
                ) -> torch.Tensor:
        """x: (B, T, C); past: (2, B, H, S, D), keys and values, into which those of x go."""
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head
        qkv = self.c_attn(x).view(B, T, 3 * H, D).transpose(1, 2)  # (B, 3H, T, D)
        qk, v = qkv.split([2 * H, H], dim=1)  # (B, 2H, T, D), (B, H, T, D)
        q, k = self.turn(self.qk_norm(qk), place.rotation).chunk(2, dim=1)  # each (B, H, T, D)
        if past is not None:
            k = past[0].index_copy_(2, place.positions, k)  # (B, H, S, D)
            v = past[1].index_copy_(2, place.positions, v)  # (B, H, S, D)
        y = self.attend(q, k, v, self.dropout if self.training else 0.0, place.seen)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Each position by itself, through a hidden layer four times as wide."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.act = ACTIVATIONS[config.activation]
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

    def forward(self, x: torch.Tensor, place: Place, past: torch.Tensor | None = None,
                ) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), place, past)
        return x + self.mlp(self.ln_2(x))


# ------------------------------------------------------------------------------------------ model

class GPT(nn.Module):
    """A decoder-only transformer: GPT-2, to the letter, under the default settings."""

    compiled_decode: Callable | None = None  # set by `compile_decode`

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({
            "wte": TokenEmbedding(config),
            "wpe": POSITIONS[config.positions](config),
            "drop": Dropout(config.dropout),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
        })
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:  # one matrix reads and writes ids
            self.lm_head.weight = self.transformer.wte.weight
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                # Each of the 2 * n_layer residual additions widens the stream's variance, so
                # those that feed it start smaller (GPT-2 report, section 2.3).
                shrink = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=0.02 / shrink)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
            elif name.endswith("smear"):
                nn.init.constant_(p, 0.5)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None,
                past: torch.Tensor | None = None, start: int | torch.Tensor = 0,
                before: torch.Tensor | None = None, loss_only: bool = False,
                ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Logits of the next token, and the mean cross entropy when targets are given.

        idx: (B, T) int64 token ids, at positions start .. start + T.
        targets: (B, T) int64, the token after each of idx; -1 where there is nothing to predict.
        past: (n_layer, 2, B, H, S_max, D), the keys and values of the positions before start;
            those of idx are written into it. A start that is a tensor, (), with T = 1, leaves all
            shapes alike from token to token, as compiled code wants it.
        before: (B, 1) int64, the tokens at start - 1; None at start 0.
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
        x, rotation = self.transformer.wpe(self.transformer.wte(idx, before), positions)
        x = self.transformer.drop(x)
        place = Place(positions, rotation, seen)
        for i, block in enumerate(self.transformer.h):
            x = block(x, place, None if past is None else past[i])
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

    def decode(self, pair: torch.Tensor, past: torch.Tensor, position: torch.Tensor,
               ) -> torch.Tensor:
        """Logits, (B, 1, V), after one more token, the second of a pair, (B, 2), at position, ();
        past as in forward."""
        return self(pair[:, 1:], past=past, start=position, before=pair[:, :1])[0]

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
            if self.compiled_decode and held and unread == end - 1:
                pair = tokens[:, end - 2:end].clone(memory_format=torch.contiguous_format)
                logits = self.compiled_decode(pair, past, torch.full((), held, device=device))
            else:
                before = tokens[:, unread - 1:unread] if held else None
                logits, _ = self(tokens[:, unread:end], past=past, start=held, before=before)
            held, unread = held + end - unread, end
            logits = logits[:, -1].float()  # (B, V)
            if repetition_penalty != 1:
                logits = kernels.penalize_repeats(logits, tokens[:, :end], repetition_penalty)
            token = kernels.draw(logits[:, :n_vocab], temperature, top_k, top_p)  # (B,)
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
        """Number of parameters; by default without the embeddings that no matrix product reads:
        those of positions, and of tokens where the head has weights of its own."""
        n = sum(p.numel() for p in self.parameters())
        if non_embedding:
            n -= sum(p.numel() for p in self.transformer.wpe.parameters())
            if not self.config.tie_weights:
                n -= self.transformer.wte.weight.numel()
        return n

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context; with rotary positions it may also grow.

        Raises ValueError if learned positions would have to.
        """
        self.transformer.wpe.crop(block_size)
        self.config.block_size = block_size

    def configure_optimizers(
            self, weight_decay: float, learning_rate: float, betas: tuple[float, float],
            optimizer: str = "adamw", **options: float | torch.dtype | None) -> torch.optim.AdamW:
        """Fused AdamW, or Muon for the matrices of the blocks and AdamW for the rest; weight decay
        on matrices and embeddings, none on biases and norms. options: `make_optimizer`'s."""
        return make_optimizer(self.named_parameters(), weight_decay, learning_rate, betas,
                              optimizer, **options)

    def flops_per_token(self) -> int:
        """Model FLOPs of training on one token of a full block, a multiply-add counted as two.

        Every matrix weight is used once forward and twice backward; so are the attention scores
        and their use, counted over the whole block as is customary (arXiv:2204.02311, app. B).
        """
        c = self.config
        matrices = sum(p.numel() for p in self.transformer.h.parameters() if p.dim() == 2)
        matrices += self.lm_head.weight.numel()
        return 6 * matrices + 12 * c.n_layer * c.n_embd * c.block_size

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
        self.load_state_dict(weights.checked_weights(
            state, self.state_dict(), self.config.tie_weights, source))

    @classmethod
    def from_pretrained(cls, name_or_path: str, dropout: float = 0.0) -> "GPT":
        """GPT-2 weights in Hugging Face's format; the shape is read from their config.json.

        name_or_path: gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2, any hub repository of
            a GPT-2, or a local folder with config.json and model.safetensors or
            pytorch_model.bin, whole or in shards.
        Raises ValueError if they cannot be had, or are not a GPT-2 of this form.
        """
        shape, state = weights.read_pretrained(name_or_path)
        model = cls(GPTConfig(**shape, dropout=dropout, bias=True))
        model.load_weights(state, source=name_or_path)
        return model
