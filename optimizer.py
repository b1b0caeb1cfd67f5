"""What takes a step: AdamW, or Muon for the matrices of the blocks with AdamW for the rest.

Muon is momentum whose steps are orthogonalised: Keller Jordan's method
(https://kellerjordan.github.io/posts/muon), as in torch.optim.Muon; but matrices of one shape go
through it together, and processes share the work.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic: steep at 0, so that few rounds will do
ROUNDS = 5


class Muon(torch.optim.AdamW):
    """Muon for the parameter groups that have a `momentum`, fused AdamW for the others.

    Such a group holds lr, momentum, weight_decay (decoupled, as in AdamW), parts (how many
    matrices a parameter holds, one below the other) and dtype (of the orthogonalisation).
    With `found_inf` set to 1, as for torch's fused optimizers, a step changes nothing.
    """

    @torch.no_grad()
    def step(self) -> None:
        """One step with the gradients at hand; Muon's parameters are left without theirs."""
        same_shape: dict[tuple, list] = {}  # a matrix, the way it is to go, its rate and decay
        for group in self.param_groups:
            for p in group["params"] if "momentum" in group else []:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:  # "step" is what AdamW looks for in all that it loads
                    state |= {"step": torch.zeros((), device=p.device),
                              "momentum": torch.zeros_like(p)}
                keep = 1 - getattr(self, "found_inf", torch.zeros_like(state["step"]))  # or 0
                state["step"] += keep
                momentum = state["momentum"]
                grad = torch.where(keep > 0, p.grad, momentum)  # it moves to itself: not at all
                momentum.lerp_(grad, 1 - group["momentum"])
                way = grad.lerp_(momentum, group["momentum"])  # Nesterov's: one step ahead
                p.grad = None  # so that AdamW leaves p alone
                for matrix, d in zip(p.chunk(group["parts"]), way.chunk(group["parts"]),
                                     strict=True):
                    d = d if d.size(0) <= d.size(1) else d.t()  # wide, which takes fewer FLOPs
                    same_shape.setdefault((d.shape, group["dtype"]), []).append(
                        (matrix, d, group["lr"] * keep, group["weight_decay"]))
        for (_, dtype), jobs in same_shape.items():
            ways = orthogonalise_shared(torch.stack([d for _, d, _, _ in jobs]), dtype)
            for (matrix, _, lr, weight_decay), d in zip(jobs, ways, strict=True):
                matrix.mul_(1 - lr * weight_decay)
                rows, columns = matrix.shape
                d = d if rows <= columns else d.t()
                matrix.sub_(d * (lr * max(1, rows / columns) ** 0.5))
        super().step()


def orthogonalise_shared(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`orthogonalise`, of which each process does its part: the result is the same in all."""
    if not dist.is_initialized():
        return orthogonalise(x, dtype)
    n, world_size = len(x), dist.get_world_size()
    share = -(-n // world_size)
    x = torch.cat([x, x.new_zeros(share * world_size - n, *x.shape[1:])])
    part = orthogonalise(x[share * dist.get_rank():][:share], dtype)
    whole = part.new_empty(x.shape)
    dist.all_gather_single(whole, part)
    return whole[:n]


def orthogonalise(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest matrices whose rows are orthonormal, or nearly: singular values of 0.7 to 1.2.

    x: (N, rows, columns), rows <= columns. By a Newton-Schulz iteration in `dtype`, in which the
    result is too: only matrix products.
    """
    a, b, c = COEFFICIENTS
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)  # no singular value is above 1
    for _ in range(ROUNDS):
        s = x @ x.mT  # (N, rows, rows)
        s = torch.baddbmm(s, s, s, beta=b, alpha=c)
        x = torch.baddbmm(x, s, x, beta=a)
    return x


OPTIMIZERS = {"adamw": torch.optim.AdamW, "muon": Muon}


def make_optimizer(
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]], weight_decay: float,
        learning_rate: float, betas: tuple[float, float], kind: str = "adamw", *,
        muon_lr: float = 0.02, muon_momentum: float = 0.95, dtype: torch.dtype = torch.float32,
        embedding_lr: float | None = None, head_lr: float | None = None,
        embedding_decay: float | None = None, head_decay: float | None = None,
        ) -> torch.optim.AdamW:
    """The optimizer of a GPT, with each parameter in one group: that of its kind.

    weight_decay: of matrices, embeddings and the head; biases and norms have none.
    kind: adamw (fused) or muon. muon_lr, muon_momentum: of Muon's groups; dtype: in which it
        orthogonalises.
    embedding_lr, ..., head_decay: of embeddings, and of a head of its own; None: as the others.
    Each group has an lr_ratio, its lr over learning_rate, for schedules to keep.
    """
    if kind not in OPTIMIZERS:
        raise ValueError(f"optimizer = {kind!r}: expected one of {', '.join(OPTIMIZERS)}")
    options = {
        "embeddings": {"lr": embedding_lr, "weight_decay": embedding_decay},
        "head": {"lr": head_lr, "weight_decay": head_decay},
        "vectors": {"lr": None, "weight_decay": 0.0}}
    if kind == "muon":
        muon = {"lr": muon_lr, "weight_decay": None, "momentum": muon_momentum, "dtype": dtype}
        options |= {"matrices": muon | {"parts": 1}, "c_attn": muon | {"parts": 3}}  # q, k, v
    groups: dict[str, list] = {}
    for name, p in named_parameters:  # a tied head is there once, as embeddings
        of = ("vectors" if p.dim() < 2 else "head" if name.startswith("lm_head.") else
              "embeddings" if not name.startswith("transformer.h.") else
              "c_attn" if name.endswith("c_attn.weight") else "matrices")
        if p.requires_grad:
            groups.setdefault(of, []).append((name, p))
    usual = {"lr": learning_rate, "weight_decay": weight_decay}
    param_groups = [{"params": params} | usual | {
        name: value for name, value in options.get(of, {}).items() if value is not None}
        for of, params in groups.items()]
    for group in param_groups:
        group["lr_ratio"] = group["lr"] / learning_rate if learning_rate else 1.0
    return OPTIMIZERS[kind](param_groups, lr=learning_rate, betas=betas, fused=True)
