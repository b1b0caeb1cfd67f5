"""Faster parts for a CPU, each equal to the part of model.py that it replaces (dropout rounds p and
draws other random numbers).

A part stays here while it gains 10 % on a row of the benchmark; docs/benchmarks.md has the gains.
"""

import math

import torch
import torch.nn as nn

from model import GPT, CausalSelfAttention


def accelerate(model: GPT) -> None:
    """Replace the parts of a model, in place, by those of this module. Parameters stay."""
    for module in model.modules():
        for part in (Linear, Dropout, Attention):
            if type(module) is part.__base__:
                module.__class__ = part


class Linear(nn.Linear):
    """nn.Linear, faster for the few rows of decoding, where reading the weight is the work."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // self.in_features
        if rows > 16 or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        if rows == 1:  # in bfloat16 with AMX twice as fast as F.linear
            y = torch.mv(self.weight, x.flatten())
        elif rows > 2 and x.dtype == torch.float32 and self.weight.numel() >= 2**18:
            # MKL takes half the time for the transposed product of large matrices
            y = (self.weight @ x.reshape(rows, -1).t().contiguous()).t().contiguous()
        else:
            return super().forward(x)
        y = y.reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """F.dropout in training, from few random bits per element, as random number generation is
    expensive on a CPU. p is rounded to 8 bits if that changes it by less than 2 %, else to 16; the
    scale is exact for the rounded p."""
    error = abs(round(256 * p) / 256 - p)
    n_bits, dtype = (8, torch.int8) if error < 0.02 * min(p, 1 - p) else (16, torch.int16)
    n_values = 2**n_bits
    n_dropped = min(round(n_values * p), n_values - 1)
    words = torch.randint(-2**63, 2**63 - 1, (-(-x.numel() * n_bits // 64),), device=x.device)
    mask = words.view(dtype)[:x.numel()].view(x.shape) >= n_dropped - n_values // 2
    return x * mask.to(x.dtype).mul_(n_values / (n_values - n_dropped))


class Dropout(nn.Dropout):
    """nn.Dropout by `dropout`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dropout(x, self.p) if self.training and self.p else x


class Attention(CausalSelfAttention):
    """Causal self-attention without the fused kernel where that is slow on a CPU: with dropout,
    which it does not have, and in bfloat16 on short sequences, for its backward pass."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
               attn_mask: torch.Tensor | None) -> torch.Tensor:
        p = self.dropout if self.training else 0.0
        if p or (q.dtype == torch.bfloat16 and 1 < q.size(2) <= 128):
            return naive_attention(q, k, v, attn_mask, p)
        return super().attend(q, k, v, attn_mask)


def naive_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                    attn_mask: torch.Tensor | None = None, p: float = 0.0) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v with dropout p, by matrix products.

    q: (B, H, T, D); k, v: (B, H, S, D); attn_mask: (T, S), added to the scores; None: causal, for
    T = S. Returns (B, H, T, D).
    """
    (B, H, T, D), S = q.shape, k.size(2)
    if attn_mask is None:
        attn_mask = torch.full((T, S), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    scores = torch.baddbmm(attn_mask, q.reshape(B * H, T, D),
                           k.reshape(B * H, S, D).transpose(1, 2), alpha=1 / math.sqrt(D))
    probs = scores.softmax(dim=-1)  # (B * H, T, S)
    probs = dropout(probs, p) if p else probs
    return (probs @ v.reshape(B * H, S, D)).view(B, H, T, D)
