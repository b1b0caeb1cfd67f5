"""Token files: raw uint16 ids, little-endian, no header; written atomically, memory-mapped to read.

A batch is a pure function of the seed, the iteration and the file, so that resuming needs no
state of a random number generator, and all processes can draw the same batch.
"""

import errno
import json
import os
import pickle
import shutil
import signal
import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from configurator import ROOT, UserError, nearest, regular_file
from data.tokenizer import dataset_record, tokenizer_name

DTYPE = np.dtype("<u2")
IGNORE = -1  # a target that the loss ignores
MAX_CHECKED = 2**26  # number of tokens that `check_vocabulary` reads


def dataset_folder(dataset: str) -> Path:
    """The folder data/<dataset>, or any folder given by its absolute path."""
    return ROOT / "data" / dataset.removeprefix("data/")


@contextmanager
def atomic_write(*paths: Path) -> Iterator[list[BinaryIO]]:
    """Binary files to write, renamed to `paths` in this order when the block ends without an error.

    The temporary files have names of this process alone. On any error, a full disk or Ctrl-C
    included, they are removed, and before the first is renamed the earlier files at `paths` are
    unchanged. Raises UserError if one cannot be written.
    """
    suffix = f".{socket.gethostname()}.{os.getpid()}.tmp"
    temporary = [path.with_name(path.name + suffix) for path in paths]
    try:
        for path in paths:
            regular_file(path).parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            files = [stack.enter_context(open(path, "wb")) for path in temporary]
            yield files
            for file in files:  # raises OSError now for what the disk would refuse later
                file.flush()
                os.fsync(file.fileno())
        for source, path in zip(temporary, paths, strict=True):
            os.replace(source, path)
    except OSError as error:
        names = " or ".join(path.name for path in paths)
        raise UserError(f"cannot write {paths[0].parent}/{names}: {error.strerror or error}; "
                        f"what was there before is unchanged") from None
    finally:
        for path in temporary:
            with suppress(OSError):  # already renamed, or never created
                path.unlink()


def lock_folder(folder: Path, names: Iterable[str], n_bytes: int, what: str) -> FileLock:
    """Create a folder and lock it until the lock is released or this process ends. Removes the
    temporary files of `names` (or globs) that killed processes left there.

    Raises UserError if another process has locked it, or if the disk lacks n_bytes for `what`.
    """
    temporary = [path for name in names for path in folder.glob(f"{name}.*tmp")]
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free + sum(
        path.stat().st_size for path in temporary if path.exists())
    if n_bytes > free:
        raise UserError(f"{what} take about {n_bytes / 1e6:,.1f} MB, but the disk of {folder} has "
                        f"{free / 1e6:,.1f} MB free: make room, or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f"{folder} is in use by another process: wait for its end, or choose "
                        f"another folder") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # some network file systems
            raise
        print(f"{folder} cannot be locked ({error.strerror}): let no two processes write to it")
    else:
        for path in temporary:
            path.unlink(missing_ok=True)
    return lock


def write_bins(folder: Path, meta: dict | None, n_bytes: int,
               parts: Iterable[tuple[str, bytes, int]]) -> None:
    """Write a dataset: all its files, or none if there is an error.

    meta: of the tokenizer, as `get_tokenizer` takes it; it is written as meta.pkl or
        tokenizer.json. n_bytes: of text in all, estimated.
    parts: train or val, ids (uint16) to add to that file, and the number of bytes of their text.
    The counts are written as dataset.json, which is renamed first, so that `open_bin` notices if
    the process is killed before the last file is.
    Raises UserError, also if another process writes a dataset in the folder.
    """
    counts = {"train_tokens": 0, "train_bytes": 0, "val_tokens": 0, "val_bytes": 0}
    kind = tokenizer_name(meta)
    extra = {"char": ["meta.pkl"], "bpe": ["tokenizer.json"]}.get(kind, [])
    names = ["dataset.json", *extra, "val.bin", "train.bin"]
    # Of another tokenizer, to be removed, which a folder cannot be.
    earlier = [regular_file(folder / name) for name in {"meta.pkl", "tokenizer.json"} - {*extra}]
    is_new = not folder.exists()
    # In BPE, English takes just under half its size; code and other languages take more.
    size = 2 * n_bytes if kind == "char" else n_bytes // 2
    lock = lock_folder(folder, {*names, "meta.pkl", "tokenizer.json"}, size, "the files")
    try:
        with (deferred_signals() as check_signals,
              atomic_write(*(folder / name for name in names)) as opened):
            files = dict(zip(names, opened, strict=True))
            for split, ids, text_size in parts:
                check_signals()
                files[f"{split}.bin"].write(ids)
                counts[f"{split}_tokens"] += len(ids) // 2
                counts[f"{split}_bytes"] += text_size
            files["dataset.json"].write(json.dumps({"tokenizer": kind} | counts).encode())
            if kind == "char":
                pickle.dump(meta, files["meta.pkl"])
            elif kind == "bpe":
                files["tokenizer.json"].write(meta["tokenizer_json"].encode())
        for path in earlier:
            path.unlink(missing_ok=True)
    finally:
        with suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()
        if is_new and not any(folder.iterdir()):
            folder.rmdir()
    for split in ("train", "val"):
        print(f"{folder / split}.bin: {counts[f'{split}_tokens']:,} tokens")


@contextmanager
def deferred_signals() -> Iterator[Callable[[], None]]:
    """Yields a function that raises an exception if SIGINT, SIGTERM or SIGHUP has come. Raised at
    any place, it might leave a lock of a process pool locked. A second signal raises at once."""
    received = []

    def stop() -> None:
        if received:
            raise KeyboardInterrupt if received[0] == signal.SIGINT else SystemExit(
                128 + received[0])

    def record(number: int, frame: FrameType | None) -> None:
        stop()
        received.append(number)

    numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}
    earlier = {number: signal.signal(number, record) for number in numbers
               if signal.getsignal(number) != signal.SIG_IGN}  # nohup
    try:
        yield stop
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def open_bin(path: Path, block_size: int) -> np.memmap:
    """Memory-map a token file, (N,) uint16.

    Raises UserError if it is missing, too short for a block, or of another size than was recorded.
    """
    if not path.is_file():
        script = path.parent / "prepare.py"
        prepared = [folder.parent.name for folder in (ROOT / "data").glob("*/train.bin")]
        raise UserError(f"no {path}{nearest(path.parent.name, prepared)}: prepare the dataset "
                        f"first{f', with python {script}' if script.exists() else ''}")
    size = path.stat().st_size
    if size % 2 or size // 2 <= block_size:
        raise UserError(f"{path} has {size:,} bytes: expected 2 for each of more than "
                        f"block_size = {block_size} tokens; prepare it again, or choose a "
                        f"smaller block_size")
    recorded = dataset_record(path.parent).get(f"{path.stem}_tokens", size // 2)
    if recorded != size // 2:
        raise UserError(f"{path} has {size // 2} tokens, but {recorded!r:.30} were recorded in "
                        f"dataset.json: it was cut short or replaced; prepare the dataset "
                        f"again, or remove dataset.json if this file is right")
    try:
        return np.memmap(path, dtype=DTYPE, mode="r")
    except OSError as error:  # of mmap, which names no file
        raise UserError(f"cannot map {path} into memory: {error.strerror}") from None


def check_vocabulary(tokens: np.memmap, vocab_size: int) -> None:
    """Raise UserError if a token file contains ids outside a model's vocabulary.

    Of a longer file, MAX_CHECKED tokens in evenly spaced pieces are read; `get_batch` checks all.
    """
    n_pieces = 64 if len(tokens) > MAX_CHECKED else 1
    length = min(len(tokens), MAX_CHECKED) // n_pieces
    for start in np.linspace(0, len(tokens) - length, n_pieces, dtype=np.int64):
        check_ids(tokens[start:start + length], vocab_size, tokens.filename)


def check_ids(ids: np.ndarray, vocab_size: int, source: object) -> None:
    if ids.max() >= vocab_size:
        raise UserError(f"{source} holds the token id {ids.max()}, but the model's vocabulary has "
                        f"{vocab_size}: the data are of another tokenizer")


def random_offsets(n_tokens: int, block_size: int, count: int, key: tuple[int, ...]) -> np.ndarray:
    """Random offsets of `count` blocks in a token file, (count,) int64, the same for the same key
    of integers >= 0, such as (seed, iteration)."""
    return np.random.default_rng(key).integers(0, n_tokens - block_size, size=count)


def epoch_offsets(n_tokens: int, block_size: int, first: int, count: int, key: tuple[int, ...],
                  ) -> np.ndarray:
    """Offsets of `count` blocks, (count,) int64, from number `first` on in endless passes over a
    token file, each of which visits each of its whole blocks once, in an order of its own."""
    n_blocks = (n_tokens - 1) // block_size
    epochs, blocks = np.divmod(np.arange(first, first + count), n_blocks)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        blocks[chosen] = permute(blocks[chosen], n_blocks, (*key, int(epoch)))
    return blocks * block_size


def permute(x: np.ndarray, n: int, key: tuple[int, ...]) -> np.ndarray:
    """The images of x, (N,) int64, under a random permutation of range(n) that the key determines.

    Without a table: a Feistel network permutes the numbers of 2 * half bits, and numbers that it
    maps to n or above are mapped again.
    """
    half = (n.bit_length() + 1) // 2
    round_keys = np.random.default_rng(key).integers(2**63, size=4, dtype=np.uint64)
    y, outside = x.astype(np.uint64), np.full(len(x), True)
    while outside.any():
        left, right = y[outside] >> half, y[outside] & (2**half - 1)
        for round_key in round_keys:
            mixed = (right ^ round_key) * 0x9E3779B97F4A7C15  # modulo 2**64
            mixed = (mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9
            left, right = right, left ^ (mixed >> (64 - half))
        y[outside] = left << half | right
        outside = y >= n
    return y.astype(np.int64)


def sequential_offsets(n_tokens: int, block_size: int) -> np.ndarray:
    """Offsets of blocks that cover a file, so that each token but the first is a target once."""
    return np.arange(0, n_tokens - 1, block_size)


def get_batch(tokens: np.ndarray, offsets: np.ndarray, block_size: int, vocab_size: int,
              ) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, each (B, T) int64, of the blocks at offsets, (B,).

    Past the end of the file, inputs are 0, targets IGNORE. Raises UserError for ids >= vocab_size.
    """
    positions = offsets[:, None] + np.arange(block_size + 1)  # (B, T + 1)
    ids = tokens[np.minimum(positions, len(tokens) - 1)].astype(np.int64)  # (B, T + 1)
    check_ids(ids, vocab_size, getattr(tokens, "filename", "the data"))
    in_file = positions < len(tokens)
    x = np.where(in_file[:, :-1], ids[:, :-1], 0)
    y = np.where(in_file[:, 1:], ids[:, 1:], IGNORE)
    return x, y


def prefetch(items: Iterator) -> Iterator:
    """Iterate over an endless iterator, computing each next item ahead in a thread."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        future = thread.submit(next, items)
        while True:
            item = future.result()
            future = thread.submit(next, items)
            yield item
