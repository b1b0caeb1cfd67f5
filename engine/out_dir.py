"""The folder of a run: its lock, the space on its disk, and the files of an earlier run."""

import errno
import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from configurator import UserError, regular_file
from data.bins import free_disk_bytes
from engine.checkpoint import BEST, LATEST, NUMBERED, latest
from model import GPT


def prepare_out_dir(out_dir: str, iter_num: int | None, model: GPT, n_numbered: int) -> FileLock:
    """Create the folder of a run and lock it until this process ends.

    A new run (iter_num None) moves an earlier one in the folder to previous-N/; a resumed one
    continues after iter_num steps. n_numbered: how many numbered checkpoints it will write.
    Raises UserError if the folder cannot be written, has too little space, or is in use.
    """
    folder = Path(out_dir)
    try:
        _check_disk_space(folder, iter_num is None, model, n_numbered)
        log = regular_file(folder / "metrics.jsonl")
        if iter_num is not None and log.exists():
            open(log, "r+b").close()  # raises OSError if the run could not continue it
        folder.mkdir(parents=True, exist_ok=True)
        lock, owner = FileLock(folder / "lock"), folder / "lock.owner"
        try:
            lock.acquire(blocking=False)
        except Timeout:
            name = owner.read_text() if owner.exists() else "just started"
            raise UserError(f"out_dir = {out_dir!r} is in use by another run ({name}): wait for "
                            f"its end, or choose another out_dir") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # some network file systems
                raise
            print(f"{folder} cannot be locked ({error.strerror}): let no two runs share it")
        if iter_num is not None and latest(out_dir)[1] != iter_num:
            raise UserError(f"another run continued in {folder} at the same time: start again")
        regular_file(owner).write_text(f"process {os.getpid()} on {socket.gethostname()}")
        for path in _temporary_files(folder):
            path.unlink()
        if iter_num is None:
            _move_earlier_run(folder)
        return lock
    except OSError as error:
        raise UserError(f"cannot write to out_dir = {out_dir!r}: {error.strerror} "
                        f"({error.filename or folder})") from None


def _temporary_files(folder: Path) -> list[Path]:
    """Files that a killed process had not finished writing."""
    return [path for name in (LATEST, BEST, NUMBERED, "metrics.jsonl")
            for path in folder.glob(f"{name}.*tmp")]


def _check_disk_space(folder: Path, is_new: bool, model: GPT, n_numbered: int) -> None:
    """Raise UserError if the disk lacks the space for all checkpoints to come."""
    # The weights and at most two optimizer moments, and 1 MiB for the rest.
    size = 3 * sum(p.numel() * p.element_size() for p in model.parameters()) + 2**20
    replaced = 0 if is_new else sum((folder / name).exists() for name in (LATEST, BEST))
    count = n_numbered + 3 - replaced  # the third is the one being written
    free = free_disk_bytes(folder) + sum(p.stat().st_size for p in _temporary_files(folder))
    if free < count * size:
        raise UserError(f"out_dir = {str(folder)!r} needs {count * size / 1e6:,.0f} MB for {count} "
                        f"checkpoints of {size / 1e6:,.1f} MB, but its disk has "
                        f"{free / 1e6:,.0f} MB free: make room, choose another out_dir, or a "
                        f"larger keep_every")


def _move_earlier_run(folder: Path) -> None:
    """Move the files of an earlier run into previous-N/."""
    old = [path for name in (LATEST, BEST, "metrics.jsonl", "tensorboard", "wandb", "wandb_run_id")
           if os.path.lexists(path := folder / name)] + sorted(folder.glob(NUMBERED))
    if not old:
        return
    n = 1
    while os.path.lexists(previous := folder / f"previous-{n}"):
        n += 1
    previous.mkdir()
    for path in old:
        path.replace(previous / path.name)
    print(f"moved the earlier run in {folder} to {previous}")
