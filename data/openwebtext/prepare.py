"""OpenWebText, or your own documents, in GPT-2's BPE: the dataset of config/train_gpt2.py.

    python data/openwebtext/prepare.py                               # from the Hugging Face hub
    python data/openwebtext/prepare.py --input='corpus/*.jsonl' --out_dir=data/corpus

OpenWebText has 8,013,769 documents, of which 4,007 are held out: train.bin has 9,035,582,198
tokens (18 GB), val.bin 4,434,897. Each document's ids are followed by the end-of-text token.

Local files are of the kinds that data/text/prepare.py reads. Documents are streamed from the source
through one process per core into the output files: there is no other copy in memory or on disk.
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from configurator import UserError, check, configure
from data import documents as sources
from data.encode import write_dataset

input: str | None = None  # a file, a folder, or a glob of them; None: the hub
out_dir: str | None = None  # folder of train.bin and val.bin; None: the folder of this file
val_fraction = 0.0005  # fraction of the documents that is held out
seed = 2357  # of the choice of these documents
num_proc: int | None = None  # worker processes; None: one per core

REPOSITORY = "Skylion007/openwebtext"
REPOSITORY_DOCUMENTS = 8_013_769
REPOSITORY_BYTES = 40 * 10**9  # about 4.4 for each of its 9.04 billion tokens


def choose_held_out(n_documents: int, val_fraction: float, seed: int) -> set[int]:
    """Numbers of the held-out documents: the test split of train_test_split of `datasets`."""
    n_val = int(np.ceil(n_documents * val_fraction))
    if n_val >= n_documents:
        raise UserError(f"holding out {n_val} of {n_documents} documents leaves none to train on: "
                        f"expected at least 2; for one long text, see data/text/prepare.py")
    return set(np.random.default_rng(seed).permutation(n_documents)[:n_val].tolist())


if __name__ == "__main__":  # worker processes import this file, too
    configure(globals())
    check(globals(), "0 < val_fraction < 1", "seed >= 0", "num_proc is None or num_proc > 0",
          "input != ''", "out_dir != ''")
    if input:
        paths = sources.find_files(input)
        sizes = [len(document.content) for document in sources.local_documents(paths)]
        n_documents, n_bytes = len(sizes), sum(sizes)
        documents = sources.local_documents(paths)
    else:
        rows = sources.hub_dataset(REPOSITORY)
        split = (rows.info.splits or {}).get("train")
        n_documents = split.num_examples if split else REPOSITORY_DOCUMENTS
        if n_documents < REPOSITORY_DOCUMENTS:
            raise UserError(f"the hub has {n_documents:,} of {REPOSITORY_DOCUMENTS:,} documents "
                            f"of {REPOSITORY}: get all files, and give them with --input=")
        n_bytes = (split and split.num_bytes) or REPOSITORY_BYTES
        documents = sources.hub_documents(rows)
    held_out = choose_held_out(n_documents, val_fraction, seed)
    print(f"encoding {n_documents:,} documents")
    numbered = enumerate(sources.counted(documents, n_documents))
    write_dataset(Path(out_dir) if out_dir else HERE,
                  ((document, i in held_out) for i, document in numbered), None, n_bytes, num_proc)
