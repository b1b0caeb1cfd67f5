"""Token files: raw uint16 ids, little-endian, no header; written whole, read through a memory map.

A batch is a pure function of the seed, the iteration and the file: nothing has to be saved to
continue a run, and every process can draw the same one.
"""

import os
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np

from configurator import ROOT, UserError
from data.tokenizer import Tokenizer

Item = TypeVar("Item")
DTYPE = np.dtype("<u2")
IGNORE = -1  # a target where there is nothing to predict
SCANNED = 2**26  # tokens of a longer file that `check_vocabulary` looks at


def dataset_folder(dataset: str) -> Path:
    """data/<dataset> beside this file, or any folder given by its absolute path."""
    return ROOT / "data" / dataset


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears under its name only when the block ends without an error.

    On any error, a full disk or Ctrl-C included, what stood at `path` stays and nothing is left
    beside it. Raises UserError if the disk refuses.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; "
                        f"what was there before is unchanged") from None
    finally:
        with suppress(OSError):  # it is not there, or can not be
            temporary.unlink()


def write_bin(path: Path, ids: np.ndarray | list[int]) -> None:
    """Write token ids (each 0 <= id < 65536) as a token file."""
    with written_whole(path) as file:
        _write_ids(file, ids)


def _write_ids(file: BinaryIO, ids: np.ndarray | list[int]) -> None:
    ids = np.asarray(ids, dtype=np.int64)
    assert ((ids >= 0) & (ids < 2**16)).all(), f"{file.name}: ids from {ids.min()} to {ids.max()}"
    file.write(ids.astype(DTYPE).tobytes())
    file.flush()


def read_input(path: Path, url: str) -> str:
    """The text of `path`, downloaded from `url` first if it is not there.

    Raises UserError if it cannot be had, is empty, or is not UTF-8; then no file was written.
    """
    if not path.exists():
        import requests
        print(f"downloading {url}")
        try:
            response = requests.get(url, timeout=60)
            response.raise_for_status()
        except requests.RequestException as error:
            raise UserError(f"cannot download {url} ({type(error).__name__}): "
                            f"save it by hand as {path} and run this again") from None
        text = _text_of(response.content, f"what {url} sent", f"save a text by hand as {path}")
        with written_whole(path) as file:
            file.write(response.content)
        return text
    try:
        return _text_of(path.read_bytes(), path, "put a text to learn from there")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _text_of(content: bytes, source: object, remedy: str) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 at byte {error.start}: {remedy}") from None
    if len(text) < 10:
        raise UserError(f"{source} holds {len(text)} characters: {remedy}")
    return text


def write_text_dataset(folder: Path, text: str, tokenizer: Tokenizer, meta: dict | None = None,
                       ) -> None:
    """Write the first 90 % of a text's characters as train.bin, the rest as val.bin, and `meta`,
    a character vocabulary, as meta.pkl: all of them or, where the disk refuses one, none."""
    if tokenizer.n_vocab > 2**16:
        raise UserError(f"the text has {tokenizer.n_vocab:,} distinct characters, but token files "
                        f"hold ids below 65,536: use GPT-2's BPE, as data/shakespeare does")
    cut = int(0.9 * len(text))
    print(f"{len(text):,} characters, {len(set(text))} distinct")
    with ExitStack() as files:
        for name, part in (("train", text[:cut]), ("val", text[cut:])):
            ids = tokenizer.encode(part)
            _write_ids(files.enter_context(written_whole(folder / f"{name}.bin")), ids)
            print(f"{folder / name}.bin: {len(ids):,} tokens")
        if meta:
            file = files.enter_context(written_whole(folder / "meta.pkl"))
            pickle.dump(meta, file)
            file.flush()
    if not meta:
        (folder / "meta.pkl").unlink(missing_ok=True)  # of a character dataset that was here


def open_bin(path: Path, block_size: int) -> np.memmap:
    """Memory-map a token file, (N,) uint16.

    Raises UserError if it is missing, not whole, or too short for one block and its targets.
    """
    try:
        if not path.is_file():
            script = path.parent / "prepare.py"
            raise UserError(f"no {path}: prepare the dataset first"
                            f"{f', with python {script}' if script.exists() else ''}")
        size = path.stat().st_size
        if size % 2 or size // 2 <= block_size:
            raise UserError(f"{path} has {size:,} bytes: expected 2 for each of more than "
                            f"block_size = {block_size} tokens; prepare it again, or choose a "
                            f"smaller block_size")
        return np.memmap(path, dtype=DTYPE, mode="r")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def check_vocabulary(tokens: np.memmap, vocab_size: int) -> None:
    """Raise UserError if a token file holds ids that a model lacks.

    In a file of over 64 Mi tokens, evenly spaced pieces of that size together are looked at;
    `gather` looks at every batch.
    """
    pieces = 64 if len(tokens) > SCANNED else 1
    length = min(len(tokens), SCANNED) // pieces
    for start in np.linspace(0, len(tokens) - length, pieces, dtype=np.int64):
        check_ids(tokens[start:start + length], vocab_size, tokens.filename)


def check_ids(ids: np.ndarray, vocab_size: int, source: object) -> None:
    if ids.max() >= vocab_size:
        raise UserError(f"{source} holds the token id {ids.max()}, but the model's vocabulary has "
                        f"{vocab_size}: the data are of another tokenizer")


def random_starts(n_tokens: int, block_size: int, count: int, key: tuple[int, ...]) -> np.ndarray:
    """Where `count` blocks begin, (count,) int64: drawn at random, the same for the same key
    (whole numbers >= 0, such as (seed, iteration))."""
    return np.random.default_rng(key).integers(0, n_tokens - block_size, size=count)


def all_starts(n_tokens: int, block_size: int) -> np.ndarray:
    """Where blocks begin that cover a file: each token but the first is a target once."""
    return np.arange(0, n_tokens - 1, block_size)


def gather(tokens: np.ndarray, starts: np.ndarray, block_size: int, vocab_size: int,
           ) -> tuple[np.ndarray, np.ndarray]:
    """The blocks at `starts`, (B,): inputs and targets, each (B, T) int64.

    Beyond the end of the file inputs are 0 and targets IGNORE. Raises UserError for ids that the
    vocabulary lacks.
    """
    where = starts[:, None] + np.arange(block_size + 1)  # (B, T + 1)
    rows = tokens[np.minimum(where, len(tokens) - 1)].astype(np.int64)
    check_ids(rows, vocab_size, getattr(tokens, "filename", "the data"))
    inside = where < len(tokens)
    x = np.where(inside[:, :-1], rows[:, :-1], 0)
    y = np.where(inside[:, 1:], rows[:, 1:], IGNORE)
    return x, y


def prefetch(items: Iterator[Item]) -> Iterator[Item]:
    """The items of an endless iterator, each made in a thread while the one before is in use."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = thread.submit(next, items)
        while True:
            item = coming.result()
            coming = thread.submit(next, items)
            yield item
