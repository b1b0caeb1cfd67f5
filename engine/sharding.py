"""Sharded training: each process keeps a part of every weight, gradient and optimizer state, and
gathers the weights of a block while it computes. All of it is torch's FSDP2."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from configurator import UserError
from engine.runtime import Runtime
from model import GPT


def shard(model: GPT, rt: Runtime) -> GPT:
    """Shard a model over the processes and move it to their devices, in place; compile its blocks
    if rt.compile.

    Its parameters become DTensors: float32, split along their first dimension. Gradients are
    averaged in float32, except in model.no_sync(), as DistributedDataParallel has it. On a GPU, the
    weights of the blocks are gathered in rt.dtype, which halves the traffic. Raises UserError for
    float16.
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
    model.no_sync = partial(no_sync, model)
    return model


@contextmanager
def no_sync(model: GPT) -> Iterator[None]:
    """Within it, gradients are added up in each process, whole."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)
