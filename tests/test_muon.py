"""Muon against torch.optim.Muon and torch.optim.AdamW."""

import re

import pytest
import torch
from conftest import MODERN

from engine.muon import Muon, configure_muon
from model import GPT, GPTConfig

GROUP = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "n_splits": 1, "dtype": torch.float32}


def take_steps(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter],
               scale: float = 1.0) -> None:
    """3 steps with random gradients of this size, the same in every call."""
    torch.manual_seed(0)
    for _ in range(3):
        for p in params:
            p.grad = scale * torch.randn_like(p)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape, scale", [
    ((32, 32), 1.0), ((64, 16), 1.0), ((16, 64), 1.0), ((24, 40), 1e-4)])
def test_a_matrix_is_updated_as_by_torchs_muon(shape, scale, dtype):
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    take_steps(Muon([GROUP | {"params": [ours], "dtype": dtype}], fused=True), [ours], scale)
    take_steps(torch.optim.Muon([theirs], lr=0.02, momentum=0.9, weight_decay=0.1), [theirs], scale)
    assert (ours - theirs).norm() < 0.03 * (theirs - 1).norm()  # theirs is in bfloat16


def test_stacked_matrices_are_updated_separately():
    torch.manual_seed(1)
    whole = torch.nn.Parameter(torch.randn(48, 16))
    parts = [torch.nn.Parameter(part.clone()) for part in whole.detach().chunk(3)]
    whole.grad = torch.randn(48, 16)
    for p, grad in zip(parts, whole.grad.clone().chunk(3), strict=True):
        p.grad = grad
    Muon([GROUP | {"params": [whole], "n_splits": 3}], fused=True).step()
    Muon([GROUP | {"params": parts}], fused=True).step()
    torch.testing.assert_close(whole, torch.cat(parts))


def test_the_other_groups_are_updated_by_adamw():
    ours, theirs = (torch.nn.Parameter(torch.ones(8, 4)) for _ in range(2))
    matrix = torch.nn.Parameter(torch.ones(4, 4))
    take_steps(Muon([{"params": [ours], "weight_decay": 0.2}, GROUP | {"params": [matrix]}],
                    lr=1e-2, betas=(0.8, 0.9), fused=True), [ours])
    take_steps(torch.optim.AdamW([theirs], lr=1e-2, betas=(0.8, 0.9), weight_decay=0.2), [theirs])
    torch.testing.assert_close(ours, theirs)
    assert (matrix == 1).all()  # it had no gradient


@pytest.mark.parametrize("changes", [{}, MODERN], ids=["gpt2", "modern"])
def test_muon_has_the_matrices_of_the_blocks_and_no_frozen_parameter(changes):
    gpt = GPT(GPTConfig(32, 300, 2, 4, 64, **changes))
    gpt.transformer.h[1].mlp.c_fc.weight.requires_grad = False
    optimizer = configure_muon(gpt, 0.1, 1e-2, (0.9, 0.95), 0.03, 0.95, torch.float32,
                               embedding_lr=0.02, head_lr=0.005 if changes else None,
                               muon_weight_decay=0.3 if changes else None)
    listed = [(name, p, group) for group in optimizer.param_groups
              for name, p in zip(group["param_names"], group["params"], strict=True)]
    expected = {name: p for name, p in gpt.named_parameters() if p.requires_grad}
    assert len(listed) == len(expected) == len({name for name, _, _ in listed})
    for name, p, group in listed:
        assert expected[name] is p
        lr, decay, n_splits = ((1e-2, 0.0, None) if re.search("ln_|bias|smear", name) else
                               (0.02, 0.1, None) if re.search("wte|wpe", name) else
                               (0.005, 0.1, None) if name == "lm_head.weight" else
                               (0.03, 0.3 if changes else 0.1, 3 if "c_attn" in name else 1))
        assert (group["lr"], group["weight_decay"], group.get("n_splits"), group["lr_ratio"]) == (
            lr, decay, n_splits, pytest.approx(lr / 1e-2)), name
