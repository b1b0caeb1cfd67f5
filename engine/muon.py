"""Muon: momentum SGD whose updates are orthogonalized, for the matrices of the blocks.

The method is Keller Jordan's (https://kellerjordan.github.io/posts/muon), as in torch.optim.Muon.
Here matrices of one shape are processed as a batch, processes share the work, and AdamW for the
other parameters is part of the same optimizer, so that a run has one optimizer state.
"""

import torch
import torch.distributed as dist

from engine.distributed import is_sharded, part_of, whole
from model import GPT

NS_STEPS = 5


class Muon(torch.optim.AdamW):
    """Muon for parameter groups that have a `momentum`, fused AdamW for the others.

    A Muon group has lr, momentum, weight_decay (decoupled, as in AdamW), n_splits (the number of
    matrices stacked in a parameter: 3 for queries, keys, values) and dtype (of Newton-Schulz).
    """

    @torch.no_grad()
    def step(self) -> None:
        """One step. The gradients of Muon's parameters are freed."""
        params = [(p, group) for group in self.param_groups if "momentum" in group
                  for p in group["params"] if p.grad is not None]
        # Of sharded parameters, only a few updates are whole at a time.
        sharded = any(is_sharded(p) for p, _ in params)
        n = min(dist.get_world_size(), 8) if sharded else max(1, len(params))
        for i in range(0, len(params), n):
            self._muon_step(params[i:i + n])
        super().step()

    def _muon_step(self, params: list[tuple[torch.nn.Parameter, dict]]) -> None:
        """Muon's step for parameters, each with its group."""
        updates, batches = [], {}  # matrices of the updates by shape and dtype
        for p, group in params:
            state = self.state[p]
            if not state:  # AdamW expects a "step" in all states that it loads
                state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
            state["step"] += 1
            state["momentum"].lerp_(p.grad, 1 - group["momentum"])
            update = whole(p.grad.lerp(state["momentum"], group["momentum"]))  # Nesterov momentum
            updates.append(update)
            p.grad = None  # so that AdamW skips p
            for matrix in update.chunk(group["n_splits"]):
                matrix = matrix if matrix.size(0) <= matrix.size(1) else matrix.t()  # fewer FLOPs
                batches.setdefault((matrix.shape, group["dtype"]), []).append(matrix)
        for (_, dtype), matrices in batches.items():
            for matrix, result in zip(matrices, newton_schulz_sharded(torch.stack(matrices), dtype),
                                      strict=True):
                matrix.copy_(result)
        for (p, group), update in zip(params, updates, strict=True):
            rows, columns = p.shape
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(part_of(update, p),
                   alpha=group["lr"] * max(1, rows / group["n_splits"] / columns) ** 0.5)


def newton_schulz_sharded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`newton_schulz` with the batch split among the processes; all get the whole result."""
    if not (dist.is_available() and dist.is_initialized()):
        return newton_schulz(x, dtype)
    n, world_size = len(x), dist.get_world_size()
    shard_size = -(-n // world_size)
    x = torch.cat([x, x.new_zeros(shard_size * world_size - n, *x.shape[1:])])
    shard = newton_schulz(x[shard_size * dist.get_rank():][:shard_size], dtype)
    gathered = shard.new_empty(x.shape)
    dist.all_gather_single(gathered, shard)
    return gathered[:n]


def newton_schulz(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Approximately the nearest matrices with orthonormal rows: singular values in 0.7 to 1.2.

    x: (N, rows, columns), rows <= columns. Computed and returned in `dtype`.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # of the quintic polynomial: steep at 0
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)  # singular values at most 1
    for _ in range(NS_STEPS):
        s = x @ x.mT  # (N, rows, rows)
        s = torch.baddbmm(s, s, s, beta=b, alpha=c)
        x = torch.baddbmm(x, s, x, beta=a)
    return x


def configure_muon(
        model: GPT, weight_decay: float, learning_rate: float, betas: tuple[float, float],
        muon_lr: float, muon_momentum: float, dtype: torch.dtype,
        embedding_lr: float | None = None, head_lr: float | None = None,
        muon_weight_decay: float | None = None) -> Muon:
    """Muon for the matrices of the blocks; the other groups are those of `GPT.param_groups`.

    dtype: of the Newton-Schulz iteration, float32, bfloat16 or float16.
    muon_weight_decay: of Muon's matrices; None: weight_decay.
    """
    muon = {n_splits: {
        "params": [], "lr": muon_lr, "lr_ratio": muon_lr / learning_rate,
        "weight_decay": weight_decay if muon_weight_decay is None else muon_weight_decay,
        "momentum": muon_momentum, "n_splits": n_splits, "dtype": dtype} for n_splits in (1, 3)}
    groups = model.param_groups(weight_decay, learning_rate, embedding_lr, head_lr)
    for group in groups:
        params, group["params"] = group["params"], []
        for name, p in params:
            is_matrix = name.startswith("transformer.h.") and p.dim() == 2
            n_splits = 3 if name.endswith("c_attn.weight") else 1
            (muon[n_splits] if is_matrix else group)["params"].append((name, p))
    groups += muon.values()
    return Muon([group for group in groups if group["params"]], lr=learning_rate, betas=betas,
                fused=True)
