"""Writing checkpoints, while training waits or in the background."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils._pytree import tree_map

from data.bins import atomic_write
from engine.distributed import dist_info, is_sharded, whole
from model import GPT


def write(path: Path, contents: dict) -> None:
    """Write a checkpoint atomically. Raises UserError if the disk refuses."""
    with atomic_write(path) as (file,):
        try:
            torch.save(contents, file)
        except RuntimeError as error:  # torch raises it on top of the disk's error
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


class Saver:
    """Writes the checkpoints of a run: in the background, from a copy in host memory, if the last
    write took more than a second and more than 5 % of the time between two saves."""

    def __init__(self):
        self.pool = ThreadPoolExecutor(1)
        self.pending: Future | None = None
        self.last_save = time.monotonic()
        self.write_s = 0.0  # that the last save took to write its files

    def save(self, paths: list[Path], model: GPT,
             optimizer: torch.optim.Optimizer, others: dict) -> None:
        """Write a checkpoint of the model, the optimizer and `others` to each path. Collective.

        Sharded tensors are gathered on rank 0, which writes. Raises UserError if the disk refuses.
        """
        self.wait()
        in_thread = self.write_s > max(1, 0.05 * (time.monotonic() - self.last_save))
        self.last_save = time.monotonic()
        rank, _ = dist_info()

        def as_written(x: object) -> object:
            if not isinstance(x, torch.Tensor):
                return x
            tensor = whole(x)  # one at a time
            if rank != 0:
                return None
            return tensor.to("cpu", copy=in_thread) if in_thread or is_sharded(x) else tensor

        contents = tree_map(as_written, {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), **others})
        if rank == 0:
            if model.config.tie_weights:  # one tensor for both, which is written once
                contents["model"]["lm_head.weight"] = contents["model"]["transformer.wte.weight"]
            if in_thread:
                self.pending = self.pool.submit(self._write, paths, contents)
            else:
                self._write(paths, contents)

    def _write(self, paths: list[Path], contents: dict) -> None:
        before = time.monotonic()
        for path in paths:
            write(path, contents)
        self.write_s = time.monotonic() - before

    def check(self) -> None:
        """Raise the UserError of a write in the background that the disk has refused."""
        if self.pending and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written. Raises UserError if the disk has refused it."""
        if self.pending:
            self.pending.result()
            self.pending = None
