"""Joining the other processes of a run under torchrun, and leaving them."""

import os
import re
import sys
import time
import uuid
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import NoReturn

import torch
import torch.distributed as dist

from configurator import RunError, UserError


def dist_info() -> tuple[int, int]:
    """(rank, world_size) as set by torchrun; (0, 1) for a single process.

    Raises UserError if they are inconsistent.
    """
    rank, world_size = (os.environ.get(name, default)
                        for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
        raise UserError(f"RANK={rank} and WORLD_SIZE={world_size} in the environment: expected "
                        f"0 <= RANK < WORLD_SIZE, as torchrun sets them; unset both for one "
                        f"process")
    return int(rank), int(world_size)


def init_distributed(backend: str, timeout: timedelta) -> None:
    """Join the process group; from here on, losing a process ends this one with a sentence."""
    # The slowest process may still be reading its checkpoint.
    rendezvous_timeout = max(timeout, timedelta(minutes=10))
    report = sys.excepthook  # torch wraps it, which would swallow its output
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=rendezvous_timeout))
        store = restart_safe_store(store, rank, world_size, rendezvous_timeout)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank,
                                world_size=world_size)
    except (ValueError, RuntimeError) as error:  # an address that is missing, wrong or in use
        raise UserError(f"rendezvous failed ({str(error).splitlines()[0]}): start the processes "
                        f"with torchrun, on one machine with --standalone, on several with a free "
                        f"port as --rdzv-endpoint") from None

    def report_and_exit(kind: type, error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, dist.DistError) or (kind is RuntimeError and "gloo" in str(error)):
            cause = re.sub(r"^\[[^]]*\] ", "", str(error).splitlines()[0]).partition(". ")[0]
            kind, error = RunError, RunError(
                f"another process is gone or silent ({cause}): see its own message; with torchrun "
                f"--max-restarts=N and --init_from=auto the run resumes by itself")
        status = 1
        try:
            report(kind, error, trace)
        except SystemExit as end:
            status = end.code
        hard_exit(status)

    sys.excepthook = report_and_exit


def restart_safe_store(store: "dist.Store", rank: int, world_size: int, timeout: timedelta,
                       ) -> "dist.Store":
    """A view of the store with a prefix of this start, the same in all processes.

    torchrun keeps one store across restarts, in which the addresses of dead processes remain. So
    rank 0 publishes a random prefix, and each other rank writes a random token under it until it
    finds that token in the list that rank 0 has read.
    Raises RuntimeError after the timeout.
    """
    token = uuid.uuid4().hex
    if rank == 0:
        store.set("start", token)
        tokens = [store.get(f"{token}/{other}") for other in range(1, world_size)]
        store.set(f"{token}/joined", b" ".join(tokens))
        return dist.PrefixStore(token, store)
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        prefix = store.get("start").decode()
        store.set(f"{prefix}/{rank}", token)
        if store.check([f"{prefix}/joined"]) and token in store.get(f"{prefix}/joined").decode():
            return dist.PrefixStore(prefix, store)
        time.sleep(0.05)
    raise RuntimeError(f"rank 0 did not answer within {timeout.total_seconds():g} s")


def is_sharded(x: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor, without importing torch.distributed.tensor for a second."""
    return hasattr(x, "full_tensor")


def whole(x: torch.Tensor) -> torch.Tensor:
    """The whole tensor of a sharded one, on its device; a plain one as it is. Collective."""
    return x.full_tensor() if is_sharded(x) else x


def part_of(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that all have whole, if `like` is sharded; else x."""
    if not is_sharded(like):
        return x
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


def hard_exit(status: int) -> NoReturn:
    """Exit without Python's finalization, during which a gloo thread that frees the tensor of a
    collective may need the GIL, and abort the process."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)
