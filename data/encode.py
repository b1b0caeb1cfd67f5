"""Documents to train.bin and val.bin: encoded by parallel processes and streamed into the files."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from pathlib import Path

import numpy as np

from configurator import UserError
from data.bins import write_bins
from data.documents import Document
from data.tokenizer import get_tokenizer

SMALL = 2**20  # bytes of text that do not need several processes
BATCH_BYTES = 2**20  # text per task: amortizes the overhead of a task at little memory
LabeledDocument = tuple[Document, bool]  # and whether it is held out


def write_dataset(folder: Path, documents: Iterable[LabeledDocument], meta: dict | None,
                  n_bytes: int, num_proc: int | None, one_text: bool = False) -> None:
    """Write documents as a dataset: all its files, or none. Raises UserError.

    meta: of the tokenizer. n_bytes: of text, estimated. num_proc: worker processes; None: one per
    core. one_text: the documents are the parts of a text, with nothing between them.
    """
    from tqdm import tqdm
    load_tokenizer(meta)  # downloads GPT-2's BPE files, once for all workers
    # Windows can wait for 61 processes.
    n_workers = min(num_proc or os.cpu_count(), 61 if os.name == "nt" else 1000)
    if n_bytes <= SMALL:
        pool = ThreadPoolExecutor(1)
    else:
        pool = ProcessPoolExecutor(n_workers, multiprocessing.get_context("spawn"), start_worker,
                                   (meta,))
    pending = deque()

    def encoded() -> Iterator[tuple[str, bytes, int]]:
        with tqdm(total=n_bytes, unit="B", unit_scale=True, file=sys.stdout) as progress:
            for batch in batches(documents):
                pending.append(pool.submit(encode, batch, one_text))
                progress.update(sum(len(document.content) for document, _ in batch))
                if len(pending) > 2 * n_workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()

    try:
        with closing(encoded()) as parts:
            write_bins(folder, meta, n_bytes, parts)
    except BrokenProcessPool:
        raise UserError("a worker process was killed, as happens when memory runs out: try a "
                        "smaller --num_proc") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for future in pending:  # a worker that is killed while it sends a result blocks its reader
            with suppress(CancelledError, TimeoutError):
                future.exception(timeout=10)
        for process in multiprocessing.active_children():
            process.kill()  # one may wait for a lock of a killed one, and `shutdown` for it
        pool.shutdown()


def write_text_dataset(folder: Path, text: str, meta: dict | None = None) -> None:
    """Write a text as a dataset: the first 90 % of its characters as train.bin, the rest as
    val.bin. meta: of the tokenizer; None for GPT-2's BPE. Raises UserError."""
    cut, tokenizer = int(0.9 * len(text)), get_tokenizer(meta)
    print(f"{len(text):,} characters, {len(set(text))} distinct")
    parts = [("train", text[:cut]), ("val", text[cut:])]
    write_bins(folder, meta, len(text), [
        (split, np.array(tokenizer.encode(part), dtype=np.uint16).tobytes(), len(part.encode()))
        for split, part in parts])


def batches(documents: Iterable[LabeledDocument]) -> Iterator[list[LabeledDocument]]:
    """Batches of about BATCH_BYTES of text."""
    batch, size = [], 0
    for document, held_out in documents:
        batch.append((document, held_out))
        size += len(document.content)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def start_worker(meta: dict | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    threading.Thread(target=exit_with_parent, daemon=True).start()
    load_tokenizer(meta)


def exit_with_parent() -> None:
    """Exit this worker when the main process has been killed, and so cannot stop it."""
    multiprocessing.parent_process().join()
    os._exit(1)


def load_tokenizer(meta: dict | None) -> None:
    global tokenizer
    tokenizer = get_tokenizer(meta)


def encode(batch: list[LabeledDocument], one_text: bool) -> list[tuple[str, bytes, int]]:
    """The parts of both files, as `write_bins` takes them."""
    ids, n_bytes = ([], []), [0, 0]
    for document, held_out in batch:
        text = document.text()
        n_bytes[held_out] += len(text.encode())
        document_ids = tokenizer.encode_document(text)
        ids[held_out].append(document_ids[:len(document_ids) - one_text].tobytes())
    return [(split, b"".join(ids[i]), n_bytes[i]) for i, split in enumerate(("train", "val"))]
