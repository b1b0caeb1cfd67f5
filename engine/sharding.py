"""Sharded training: each process keeps a part of every weight, gradient and optimizer state, and
gathers the weights of a block while it computes. All of it is torch's FSDP2."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from configurator import UserError
from engine.runtime import Runtime
from model import GPT


def shard(model: GPT, rt: Runtime) -> GPT:
    """Shard a model over the processes and move it to their devices, in place; compile its blocks
    if rt.compile.

    Its parameters become DTensors: float32, split along their first dimension. Gradients are
    averaged in float32. On a GPU, the weights of the blocks are gathered in rt.dtype, which halves
    the traffic. Raises UserError for float16.
    """
    if rt.dtype == "float16":  # the scaler would have to agree on skipped steps
        raise UserError("shard = True and dtype = 'float16': use --dtype=bfloat16 or float32")
    mesh = init_device_mesh(rt.device.type, (rt.world_size,))
    gathered = getattr(torch, rt.dtype) if rt.device.type == "cuda" else None
    for block in model.transformer.h:
        if rt.compile:
            block.compile(options={"fallback_random": rt.device.type == "cpu"})
        fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(
            param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False))
    # The rest is one group: embeddings and head may be the same parameter.
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    return model


def whole(x: torch.Tensor) -> torch.Tensor:
    """The whole tensor of a sharded one, on its device; a plain one as it is. Collective."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def part_of(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor that all have, sharded as `like` is."""
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


def whole_state(state: dict) -> dict:
    """A nested dict with whole tensors on the CPU in place of sharded ones, on rank 0; on the
    others None in their place. Collective."""
    def on_rank_0(x: object) -> object:
        if not isinstance(x, DTensor):
            return x
        x = x.full_tensor()  # one at a time
        return x.cpu() if dist.get_rank() == 0 else None
    return tree_map(on_rank_0, state)
