"""Muon: momentum whose steps are orthogonalised, for the hidden matrices of a network.

Keller Jordan's method (https://kellerjordan.github.io/posts/muon), as in torch.optim.Muon; but
matrices of one shape go through it together, and processes share the work.
"""

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
        """One step with the gradients at hand. Those of Muon's parameters are dropped."""
        groups = [group for group in self.param_groups if "momentum" in group]
        keep = 1.0 - getattr(self, "found_inf", torch.zeros(()))  # 1, or 0 to skip the step
        jobs: dict[tuple, list] = {}  # by shape: a matrix, its direction, lr, decay
        for group in groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:  # "step", as AdamW looks for it in what it loads
                    self.state[p] |= {"step": torch.zeros((), device=p.device),
                                      "momentum": torch.zeros_like(p)}
                m = self.state[p]["momentum"]
                self.state[p]["step"] += keep
                grad = torch.where(keep > 0, p.grad, m)  # m moves to itself, if the step is bad
                m.lerp_(grad, 1 - group["momentum"])
                direction = grad.lerp_(m, group["momentum"])  # Nesterov's, one step ahead
                p.grad = None  # so that AdamW leaves it alone
                for matrix, d in zip(p.chunk(group["parts"]), direction.chunk(group["parts"]),
                                     strict=True):
                    wide = d if d.size(0) <= d.size(1) else d.t()
                    jobs.setdefault((wide.shape, group["dtype"]), []).append((matrix, wide, group))
        for (_, dtype), of_shape in jobs.items():
            turned = orthogonalise_shared(torch.stack([d for _, d, _ in of_shape]).to(dtype))
            for (matrix, wide, group), d in zip(of_shape, turned, strict=True):
                rows, columns = matrix.shape
                d = d if matrix.shape == wide.shape else d.t()
                lr = group["lr"] * keep
                matrix.mul_(1 - lr * group["weight_decay"])
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
