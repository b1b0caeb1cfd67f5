"""Muon against torch.optim.Muon, singular values, and a step that is skipped."""

import pytest
import torch

from optimizer import Muon, make_optimizer, orthogonalise

GROUP = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "parts": 1, "dtype": torch.float32}


def steps(optimizers: list[torch.optim.Optimizer], params: list[torch.nn.Parameter], n: int = 3,
          ) -> None:
    """n steps with random gradients, the same for every call."""
    torch.manual_seed(0)
    for _ in range(n):
        for p in params:
            p.grad = torch.randn_like(p)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(32, 32), (64, 16), (16, 64)])
def test_a_matrix_takes_the_steps_of_torchs_muon(shape, dtype):
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    steps([Muon([GROUP | {"params": [ours], "dtype": dtype}], fused=True)], [ours])
    steps([torch.optim.Muon([theirs], lr=0.02, momentum=0.9, weight_decay=0.1)], [theirs])
    assert (ours - theirs).norm() < 0.03 * (theirs - 1).norm()  # theirs is in bfloat16


def test_parts_of_a_parameter_are_matrices_of_their_own():
    torch.manual_seed(1)
    whole = torch.nn.Parameter(torch.randn(48, 16))
    parts = [torch.nn.Parameter(part.clone()) for part in whole.detach().chunk(3)]
    grad = torch.randn(48, 16)
    whole.grad = grad.clone()
    for p, g in zip(parts, grad.chunk(3), strict=True):
        p.grad = g.clone()
    Muon([GROUP | {"params": [whole], "parts": 3}], fused=True).step()
    Muon([GROUP | {"params": parts}], fused=True).step()
    torch.testing.assert_close(whole, torch.cat(parts))


def test_orthogonalised_matrices_keep_their_directions_with_even_strength():
    torch.manual_seed(0)
    x = torch.randn(4, 24, 40)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    mixed = u.mT @ orthogonalise(x, torch.float32) @ v.mT  # diagonal if the directions stay
    strength = mixed.diagonal(dim1=1, dim2=2)
    assert strength.min() > 0.6 and strength.max() < 1.3
    assert (mixed - torch.diag_embed(strength)).abs().max() < 1e-4
    assert s.max() / s.min() > 5


def test_the_other_groups_are_adamws():
    ours, theirs = (torch.nn.Parameter(torch.ones(8, 4)) for _ in range(2))
    hidden = torch.nn.Parameter(torch.ones(4, 4))
    muon = Muon([GROUP | {"params": [hidden]}, {"params": [ours], "weight_decay": 0.2}], lr=1e-2,
                betas=(0.8, 0.9), fused=True)
    adamw = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.8, 0.9), weight_decay=0.2)
    torch.manual_seed(0)
    for _ in range(3):
        ours.grad = torch.randn(8, 4)
        theirs.grad, hidden.grad = ours.grad.clone(), torch.randn(4, 4)
        muon.step()
        adamw.step()
    torch.testing.assert_close(ours, theirs)
    assert muon.state[hidden].keys() == {"step", "momentum"} and muon.state[hidden]["step"] == 3


def test_a_step_with_found_inf_changes_nothing_and_the_next_goes_on():
    params = [torch.nn.Parameter(torch.ones(8, 8)), torch.nn.Parameter(torch.ones(8))]
    optimizer = Muon([GROUP | {"params": params[:1]}, {"params": params[1:]}], fused=True)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    twin = Muon([GROUP | {"params": twins[:1]}, {"params": twins[1:]}], fused=True)
    torch.manual_seed(0)
    for bad in (0.0, 1.0, 0.0):
        grads = [torch.randn_like(p) for p in params]
        for p, t, grad in zip(params, twins, grads, strict=True):
            p.grad = grad / (1 - bad)  # infinite, if bad
            t.grad = grad
        optimizer.found_inf = torch.tensor(bad)
        optimizer.step()
        if not bad:
            twin.step()
    for p, t in zip(params, twins, strict=True):
        assert torch.equal(p, t)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_the_precision_of_half_a_float_is_enough_for_gradients_of_any_size(dtype, size):
    torch.manual_seed(0)
    x = torch.randn(2, 24, 40) * size
    exact = orthogonalise(x, torch.float32)
    assert (orthogonalise(x, dtype) - exact).norm() < 0.03 * exact.norm()


def test_an_unknown_optimizer_is_answered_with_the_choices():
    with pytest.raises(ValueError, match="'sgd': expected one of adamw, muon"):
        make_optimizer([], 0.1, 1e-3, (0.9, 0.95), "sgd")


def test_frozen_parameters_are_left_out():
    params = {name: torch.nn.Parameter(torch.ones(4, 4)) for name in (
        "transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight", "lm_head.weight")}
    for name, p in params.items():
        p.requires_grad = name == "transformer.h.0.mlp.c_fc.weight"
        p.grad = torch.ones(4, 4)
    make_optimizer(params.items(), 0.1, 1e-3, (0.9, 0.95), "muon").step()
    changed = [name for name, p in params.items() if (p != 1).any()]
    assert changed == ["transformer.h.0.mlp.c_fc.weight"]
