"""OpenWebText, or your own documents, in GPT-2's BPE: the dataset of config/train_gpt2.py.

    python data/openwebtext/prepare.py                               # from the Hugging Face hub
    python data/openwebtext/prepare.py --input='corpus/*.jsonl' --out_dir=data/corpus

OpenWebText has 8,013,769 documents, of which 4,007 are held out: train.bin has 9,035,582,198
tokens (18 GB), val.bin 4,434,897. Each document's ids are followed by the end-of-text token.

Local files: .parquet and .jsonl with a field `text`, one document per row; .txt, one document per
file, or several with <|endoftext|> between them. Documents are streamed from the source through
one process per core into the output files: there is no other copy in memory or on disk.
"""

import glob
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from configurator import UserError, check, check_choice, configure
from data.bins import atomic_write
from data.documents import ENDINGS, Document, hub_dataset, hub_documents, local_documents, measure
from data.tokenizer import GPT2Tokenizer

input: str | None = None  # a .parquet, .jsonl or .txt file, or a glob of them; None: the hub
out_dir: str | None = None  # folder of train.bin and val.bin; None: the folder of this file
val_fraction = 0.0005  # fraction of the documents that is held out
seed = 2357  # of the choice of these documents
num_proc: int | None = None  # worker processes; None: one per core

REPOSITORY = "Skylion007/openwebtext"
REPOSITORY_DOCUMENTS = 8_013_769
REPOSITORY_TOKENS = 9_040_017_095
BATCH_BYTES = 2**20  # text per task: amortizes the overhead of a task at little memory

# ------------------------------------------------------------------------------------ the encoding

def start_worker() -> None:
    global tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    threading.Thread(target=exit_with_parent, daemon=True).start()
    tokenizer = GPT2Tokenizer()


def exit_with_parent() -> None:
    """Exit this worker when the main process has been killed, and so cannot stop it."""
    multiprocessing.parent_process().join()
    os._exit(1)


def encode(batch: list[tuple[Document, bool]]) -> tuple[bytes, bytes]:
    """Token ids of (document, is held out) pairs, as bytes for train.bin and for val.bin."""
    ids = ([], [])
    for document, held_out in batch:
        text = document
        if isinstance(document, bytes):
            # If this fails, text stays bytes, which is refused below.
            with suppress(ValueError, TypeError, KeyError, RecursionError):
                text = json.loads(document)["text"]
        if not isinstance(text, str):
            raise UserError(f"expected a document with a field `text`, got {document!r:.80}")
        ids[held_out].append(tokenizer.encode_document(text).tobytes())
    return b"".join(ids[False]), b"".join(ids[True])


def batches(documents: Iterator[Document], held_out: set[int],
            ) -> Iterator[list[tuple[Document, bool]]]:
    """Batches of about BATCH_BYTES of (document, is held out) pairs."""
    batch, size = [], 0
    for i, document in enumerate(documents):
        batch.append((document, i in held_out))
        size += len(document)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def choose_held_out(n_documents: int, val_fraction: float, seed: int) -> set[int]:
    """Numbers of the held-out documents: the test split of train_test_split of `datasets`."""
    n_val = int(np.ceil(n_documents * val_fraction))
    if n_val >= n_documents:
        raise UserError(f"holding out {n_val} of {n_documents} documents leaves none to train on: "
                        f"expected at least 2; for one long text, see data/shakespeare/prepare.py")
    return set(np.random.default_rng(seed).permutation(n_documents)[:n_val].tolist())


# --------------------------------------------------------------------------------------- the script

if __name__ == "__main__":
    configure(globals())
    check(globals(), "0 < val_fraction < 1", "seed >= 0", "num_proc is None or num_proc > 0")
    folder = Path(out_dir) if out_dir else HERE

    if input:
        paths = sorted(map(Path, [input] if os.path.exists(input)
                           else glob.glob(input, recursive=True)))
        if not paths:
            raise UserError(f"no file matches --input={input}: give a {', '.join(ENDINGS)} file, "
                            f"or a glob of such files")
        for path in paths:
            check_choice(f"the ending of {path}", path.suffix, ENDINGS)
        counts, sizes = zip(*map(measure, paths), strict=True)
        n_documents, n_bytes = sum(counts), sum(sizes)
        disk_bytes = n_bytes // 2  # English needs just under half; code, other languages more
        documents = (document for path in paths for document in local_documents(path))
    else:
        rows = hub_dataset(REPOSITORY)
        split = (rows.info.splits or {}).get("train")
        n_documents = split.num_examples if split else REPOSITORY_DOCUMENTS
        if n_documents < REPOSITORY_DOCUMENTS:
            raise UserError(f"the hub has {n_documents:,} of {REPOSITORY_DOCUMENTS:,} documents "
                            f"of {REPOSITORY}: get all files, and give them with --input=")
        n_bytes, disk_bytes = split and split.num_bytes, 2 * REPOSITORY_TOKENS
        documents = hub_documents(rows)
    held_out = choose_held_out(n_documents, val_fraction, seed)

    from tqdm import tqdm
    GPT2Tokenizer()  # downloads the BPE files, once for all workers
    try:
        for name in ("train", "val"):  # files of a killed run
            (folder / f"{name}.bin.tmp").unlink(missing_ok=True)
        disk = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free_bytes = shutil.disk_usage(disk).free
        if disk_bytes > free_bytes:
            raise UserError(f"{folder} has {free_bytes / 1e6:,.1f} MB free, but about "
                            f"{disk_bytes / 1e6:,.1f} MB are needed: choose another with "
                            f"--out_dir=")
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another with "
                        f"--out_dir=") from None

    n_workers = num_proc or os.cpu_count()
    print(f"encoding {n_documents:,} documents on {n_workers} cores")
    pool = ProcessPoolExecutor(n_workers, multiprocessing.get_context("spawn"), start_worker)
    progress = tqdm(total=n_bytes, unit="B", unit_scale=True, file=sys.stdout)
    pending, n_read = deque(), 0
    try:
        with (atomic_write(folder / "val.bin") as val_file,
              atomic_write(folder / "train.bin") as train_file):
            def write_oldest() -> None:
                for file, ids in zip((train_file, val_file), pending.popleft().result(),
                                     strict=True):
                    file.write(ids)
            for batch in batches(documents, held_out):
                pending.append(pool.submit(encode, batch))
                n_read += len(batch)
                progress.update(sum(len(document) for document, _ in batch))
                if len(pending) > 2 * n_workers:
                    write_oldest()
            while pending:
                write_oldest()
            if n_read != n_documents:
                raise UserError(f"the source has {n_read:,} documents, not {n_documents:,}: it "
                                f"changed or is incomplete; nothing was written")
            val_file.flush()  # can fail on a full disk, so before train.bin is renamed
    except BrokenProcessPool:
        raise UserError("a worker process was killed, as happens when memory runs out: try a "
                        "smaller --num_proc") from None
    finally:
        pool.shutdown(cancel_futures=True)
        progress.close()
        if is_new and not any(folder.iterdir()):
            folder.rmdir()
    (folder / "meta.pkl").unlink(missing_ok=True)  # of an earlier character dataset
    for name in ("train", "val"):
        print(f"{folder / name}.bin: {(folder / f'{name}.bin').stat().st_size // 2:,} tokens")
