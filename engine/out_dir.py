"""The folder of a run: its lock, the space on its disk, and the files of an earlier run."""

import os
from pathlib import Path

from filelock import FileLock

from configurator import UserError, regular_file
from data.bins import lock_folder
from engine.checkpoint import BEST, LATEST, NUMBERED, latest
from model import GPT


def prepare_out_dir(out_dir: str, iter_num: int | None, model: GPT, n_numbered: int) -> FileLock:
    """Create the folder of a run and lock it until this process ends.

    A new run (iter_num None) moves an earlier one in the folder to previous-N/; a resumed one
    continues after iter_num steps. n_numbered: how many numbered checkpoints it will write.
    Raises UserError or OSError if it cannot be written, has too little space, or is in use.
    """
    folder, is_new = Path(out_dir), iter_num is None
    log = regular_file(folder / "metrics.jsonl")
    if not is_new and log.exists():
        open(log, "r+b").close()  # raises OSError if the run could not continue it
    # The weights and at most two optimizer moments, and 1 MiB for the rest.
    size = 3 * sum(p.numel() * p.element_size() for p in model.parameters()) + 2**20
    replaced = 0 if is_new else sum((folder / name).exists() for name in (LATEST, BEST))
    count = n_numbered + 3 - replaced  # the third is the one being written
    lock = lock_folder(folder, (LATEST, BEST, NUMBERED, "metrics.jsonl"), count * size,
                       f"{count} checkpoints (see keep_every)")
    if is_new:
        _move_earlier_run(folder)
    elif latest(out_dir)[1] != iter_num:
        raise UserError(f"another run continued in {folder} at the same time: start again")
    return lock


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
