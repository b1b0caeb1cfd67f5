"""Token files: raw uint16 ids, little-endian, no header; written atomically, memory-mapped to read.

A batch is a pure function of the seed, the iteration and the file, so that resuming needs no
state of a random number generator, and all processes can draw the same batch.
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
IGNORE = -1  # a target that the loss ignores
MAX_CHECKED = 2**26  # number of tokens that `check_vocabulary` reads


def dataset_folder(dataset: str) -> Path:
    """The folder data/<dataset>, or any folder given by its absolute path."""
    return ROOT / "data" / dataset


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write, renamed to `path` when the block ends without an error.

    On any error, a full disk or Ctrl-C included, the earlier file at `path` is unchanged and the
    temporary file is removed. Raises UserError if it cannot be written.
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
        with suppress(OSError):  # already renamed, or never created
            temporary.unlink()


def write_bin(path: Path, ids: np.ndarray | list[int]) -> None:
    """Write token ids (each 0 <= id < 65536) as a token file."""
    with atomic_write(path) as file:
        _write_ids(file, ids)


def _write_ids(file: BinaryIO, ids: np.ndarray | list[int]) -> None:
    ids = np.asarray(ids, dtype=np.int64)
    assert ((ids >= 0) & (ids < 2**16)).all(), f"{file.name}: ids from {ids.min()} to {ids.max()}"
    file.write(ids.astype(DTYPE).tobytes())
    file.flush()


def read_input(path: Path, url: str) -> str:
    """The text in the file `path`, which is downloaded from `url` if it does not exist.

    Raises UserError if that fails, or the text is too short or not UTF-8; no file is written then.
    """
    if not path.exists():
        import requests
        print(f"downloading {url}")
        try:
            response = requests.get(url, timeout=60)
            response.raise_for_status()
        except requests.RequestException as error:
            raise UserError(f"cannot download {url} ({type(error).__name__}): "
                            f"download it yourself to {path} and run this again") from None
        text = _decode_text(response.content, f"the file at {url}", f"put a text in {path}")
        with atomic_write(path) as file:
            file.write(response.content)
        return text
    try:
        return _decode_text(path.read_bytes(), path, "put a text to train on there")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _decode_text(content: bytes, source: object, remedy: str) -> str:
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
    a character vocabulary, as meta.pkl: all or, if one cannot be written, none."""
    if tokenizer.n_vocab > 2**16:
        raise UserError(f"the text has {tokenizer.n_vocab:,} distinct characters, but token files "
                        f"hold ids below 65,536: use GPT-2's BPE, as data/shakespeare does")
    cut = int(0.9 * len(text))
    print(f"{len(text):,} characters, {len(set(text))} distinct")
    with ExitStack() as files:
        for name, part in (("train", text[:cut]), ("val", text[cut:])):
            ids = tokenizer.encode(part)
            _write_ids(files.enter_context(atomic_write(folder / f"{name}.bin")), ids)
            print(f"{folder / name}.bin: {len(ids):,} tokens")
        if meta:
            file = files.enter_context(atomic_write(folder / "meta.pkl"))
            pickle.dump(meta, file)
            file.flush()
    if not meta:
        (folder / "meta.pkl").unlink(missing_ok=True)  # of an earlier character dataset


def open_bin(path: Path, block_size: int) -> np.memmap:
    """Memory-map a token file, (N,) uint16.

    Raises UserError if it is missing, of odd size, or too short for one block and its targets.
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
    """Raise UserError if a token file contains ids outside a model's vocabulary.

    Of a file with more than MAX_CHECKED tokens, only as many are read, in evenly spaced pieces;
    `get_batch` checks every batch.
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


def sequential_offsets(n_tokens: int, block_size: int) -> np.ndarray:
    """Offsets of blocks that cover a file, so that each token but the first is a target once."""
    return np.arange(0, n_tokens - 1, block_size)


def get_batch(tokens: np.ndarray, offsets: np.ndarray, block_size: int, vocab_size: int,
              ) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, each (B, T) int64, of the blocks at offsets, (B,).

    Past the end of the file, inputs are 0 and targets IGNORE. Raises UserError for ids outside
    the vocabulary.
    """
    positions = offsets[:, None] + np.arange(block_size + 1)  # (B, T + 1)
    ids = tokens[np.minimum(positions, len(tokens) - 1)].astype(np.int64)  # (B, T + 1)
    check_ids(ids, vocab_size, getattr(tokens, "filename", "the data"))
    in_file = positions < len(tokens)
    x = np.where(in_file[:, :-1], ids[:, :-1], 0)
    y = np.where(in_file[:, 1:], ids[:, 1:], IGNORE)
    return x, y


def prefetch(items: Iterator[Item]) -> Iterator[Item]:
    """Iterate over an endless iterator, computing each next item ahead in a thread."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        future = thread.submit(next, items)
        while True:
            item = future.result()
            future = thread.submit(next, items)
            yield item
