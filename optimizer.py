"""What takes a step: AdamW, or Muon for the hidden matrices with AdamW for the rest.

Muon is momentum whose steps are orthogonalised: Keller Jordan's method
(https://kellerjordan.github.io/posts/muon), as in torch.optim.Muon; but matrices of one shape go
through it together, and processes share the work.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic: steep at 0, so that few rounds will do
ROUNDS = 5


def configure(
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]], weight_decay: float,
        learning_rate: float, betas: tuple[float, float], optimizer: str = "adamw", *,
        muon_lr: float = 0.02, muon_momentum: float = 0.95, dtype: torch.dtype = torch.float32,
        embedding_lr: float | None = None, head_lr: float | None = None,
        embedding_decay: float | None = None, head_decay: float | None = None,
        ) -> torch.optim.AdamW:
    """The optimizer of a GPT, with each parameter in one group.

    weight_decay: of matrices and embeddings; biases and norms have none.
    optimizer: adamw (fused) or muon; muon_lr, muon_momentum, dtype: of Muon's groups.
    embedding_lr, ..., head_decay: of embeddings, and of a head of its own; None: as the others.
    Each group has an lr_ratio, its lr over learning_rate, for schedules to keep.
    """
    lrs = {"embeddings": embedding_lr, "head": head_lr}
    decays = {"embeddings": embedding_decay, "head": head_decay, "vectors": 0.0}
    groups: dict[tuple, dict] = {}
    for name, p in named_parameters:  # a tied head is there once, as embeddings
        kind = ("vectors" if p.dim() < 2 else "head" if name.startswith("lm_head.") else
                "matrices" if name.startswith("transformer.h.") else "embeddings")
        own = {"lr": lrs.get(kind) or learning_rate, "weight_decay": decays.get(kind)}
        if own["weight_decay"] is None:
            own["weight_decay"] = weight_decay
        if optimizer == "muon" and kind == "matrices":
            parts = 3 if name.endswith("c_attn.weight") else 1  # q, k and v
            own |= {"lr": muon_lr, "momentum": muon_momentum, "dtype": dtype, "parts": parts}
        own["lr_ratio"] = own["lr"] / learning_rate
        group = groups.setdefault((kind == "vectors", *own.items()), {"params": [], **own})
        if p.requires_grad:
            group["params"].append(p)
    cls = {"adamw": torch.optim.AdamW, "muon": Muon}[optimizer]
    return cls(list(groups.values()), lr=learning_rate, betas=betas, fused=True)


class Muon(torch.optim.AdamW):
    """Muon for the parameter groups that have a `momentum`, fused AdamW for the others.

    Such a group holds lr, momentum, weight_decay (decoupled, as in AdamW), parts (how many
    matrices a parameter holds, one below the other) and dtype (of the orthogonalisation).
    With `found_inf` set to 1, as for torch's fused optimizers, a step changes nothing.
    """

    @torch.no_grad()
    def step(self) -> None:
        """One step with the gradients at hand; Muon's parameters are left without theirs."""
        params = [(p, group) for group in self.param_groups if "momentum" in group
                  for p in group["params"] if p.grad is not None]
        zero = torch.zeros((), device=self.param_groups[0]["params"][0].device)
        keep = 1 - getattr(self, "found_inf", zero)  # 1, or 0 to change nothing
        same_shape: dict[tuple, list] = {}  # a matrix, the way it is to go, its group
        for p, group in params:
            state = self.state[p]
            if not state:  # "step" is what AdamW looks for in all that it loads
                state |= {"step": torch.zeros_like(zero), "momentum": torch.zeros_like(p)}
            state["step"] += keep
            momentum = state["momentum"]
            grad = torch.where(keep > 0, p.grad, momentum)  # momentum moves to itself: not at all
            momentum.lerp_(grad, 1 - group["momentum"])
            way = grad.lerp_(momentum, group["momentum"])  # Nesterov's: one step ahead
            p.grad = None  # so that AdamW leaves p alone
            for matrix, d in zip(p.chunk(group["parts"]), way.chunk(group["parts"]), strict=True):
                d = d if d.size(0) <= d.size(1) else d.t()  # wide, which takes fewer FLOPs
                same_shape.setdefault((d.shape, group["dtype"]), []).append((matrix, d, group))
        for (_, dtype), jobs in same_shape.items():
            ways = orthogonalise_shared(torch.stack([d for _, d, _ in jobs]).to(dtype))
            for (matrix, _, group), d in zip(jobs, ways, strict=True):
                lr = group["lr"] * keep
                matrix.mul_(1 - lr * group["weight_decay"])
                rows, columns = matrix.shape
                d = d if rows <= columns else d.t()
                matrix.sub_(d * (lr * max(1, rows / columns) ** 0.5))
        super().step()


def orthogonalise_shared(x: torch.Tensor) -> torch.Tensor:
    """`orthogonalise`, of which each process does its part: the result is the same in all."""
    if not dist.is_initialized():
        return orthogonalise(x)
    n, world_size = len(x), dist.get_world_size()
    share = -(-n // world_size)
    x = torch.cat([x, x.new_zeros(share * world_size - n, *x.shape[1:])])
    part = orthogonalise(x[share * dist.get_rank():][:share])
    dist.all_gather_into_tensor(x, part)
    return x[:n]


def orthogonalise(x: torch.Tensor) -> torch.Tensor:
    """The nearest matrices whose rows are orthonormal, or nearly: singular values of 0.7 to 1.2.

    x: (N, rows, columns), rows <= columns. By a Newton-Schulz iteration: only matrix products.
    """
    a, b, c = COEFFICIENTS
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # no singular value is above 1
    for _ in range(ROUNDS):
        s = x @ x.mT  # (N, rows, rows)
        s = torch.baddbmm(s, s, s, beta=b, alpha=c)
        x = torch.baddbmm(x, s, x, beta=a)
    return x
