"""Faster parts for a CPU, each equal to the part of model.py that it replaces (dropout rounds p and
draws other random numbers; in sampling, weights may be rounded to bfloat16).

A part stays here while it gains 10 % on a row of the benchmark; docs/speed.md has the gains.
"""

import ctypes
import math
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from engine.runtime import find_compiler
from model import GPT, CausalSelfAttention

HAS_BF16 = any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))


def accelerate(model: GPT) -> None:
    """Replace the parts of a model, in place, by those that train faster. Parameters stay. Also
    makes torch.optim start faster, in the whole process."""
    for module in model.modules():
        for part in (Dropout, Attention):
            if type(module) is part.__base__:
                module.__class__ = part
    skip_dynamo_import()


def skip_dynamo_import() -> None:
    """Let torch.optim do without torch._dynamo, which it imports to be compiled itself: that takes
    two seconds at each start. Without this version of torch's names, it imports it as before."""
    for method in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        function = getattr(getattr(torch.optim.Optimizer, method), "__wrapped__", None)
        if function:  # torch._disable_dynamo looks here for the function to call
            function.__dynamo_disable = function
    step = getattr(torch.optim.Adam.step, "__wrapped__", None)  # without `differentiable`
    if step:
        torch.optim.Adam.step = torch.no_grad()(step)


def sampling_dtype(model: GPT, device: torch.device) -> str | None:
    """The faster dtype for the weights in sampling on a CPU (None elsewhere): bfloat16 for models
    that no cache holds, as reading them is the work, where the kernel or the hardware multiplies
    it; else float32."""
    if device.type != "cpu":
        return None
    return "bfloat16" if is_large(model) and (load_kernel() or HAS_BF16) else "float32"


def prepare_sampling(model: GPT, device: torch.device, dtype: str, compile: bool) -> None:
    """Make a float32 model ready to sample on a device, in place: with weights in dtype, as
    decoding is limited by reading them, and autocast would read float32.

    On a CPU, if not compiled, a large model has only the weights of its linear layers in dtype, and
    multiplies few rows with them by the kernel of few_rows.cpp if there is a C++ compiler.
    """
    torch_dtype = getattr(torch, dtype)
    model.eval()
    if compile:
        model.compile_decode()
    if compile or device.type != "cpu" or not is_large(model) or not load_kernel():
        model.to(device, torch_dtype)
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
            module.weight = nn.Parameter(module.weight.to(torch_dtype), requires_grad=False)


def is_large(model: GPT) -> bool:
    return sum(p.numel() for p in model.parameters()) >= 5e6


@cache
def load_kernel() -> ctypes.CDLL | None:
    """The compiled few_rows.cpp, or None, after a line of notice, if this machine cannot compile
    it. That takes about half a second, so the result is not stored."""
    compiler = find_compiler("CXX", "g++", "clang++") or "g++"  # which fails below
    # Sums in any order, for vectors; -ffast-math would also change the arithmetic of torch.
    options = ["-O3", "-march=native", "-fassociative-math", "-fno-signed-zeros",
               "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC"]
    with tempfile.TemporaryDirectory() as folder:
        library = os.path.join(folder, "few_rows.so")
        try:
            subprocess.run([compiler, *options, Path(__file__).with_name("few_rows.cpp"), "-o",
                            library], check=True, capture_output=True, timeout=60)
            return ctypes.CDLL(library)
        except (OSError, subprocess.SubprocessError):
            print("sampling is slower without a C++ compiler that knows OpenMP: install g++",
                  file=sys.stderr)
            return None


class Linear(nn.Linear):
    """nn.Linear for sampling, with a float32 or bfloat16 weight and float32 input and output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // self.in_features
        if rows > 16:
            dtype = self.weight.dtype if HAS_BF16 else torch.float32
            y = F.linear(x.to(dtype), self.weight.to(dtype)).float()
        else:
            x = x.contiguous()
            y = x.new_empty(*x.shape[:-1], self.out_features)
            kernel = load_kernel()["linear_" + str(self.weight.dtype).removeprefix("torch.")]
            kernel(*(ctypes.c_void_p(t.data_ptr()) for t in (self.weight, x, y)),
                   *map(ctypes.c_long, (rows, self.in_features, self.out_features)))
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
