"""Your own text or documents, as the dataset data/NAME.

    python data/text/prepare.py --input=book.txt --name=mybook
    python data/text/prepare.py --input='notes,mail/*.jsonl.gz' --name=mine --tokenizer=bpe:8000
    cat *.txt | python data/text/prepare.py --input=- --name=mine

Reads .txt and .md (a document, or several with <|endoftext|> between them), .jsonl and .parquet (a
field `text`), and .gz of these. Held out as val.bin is a tenth of the text, but of more than 1 MB
only 100 kB, and of more than 10 MB 1 %; at least a block of 1,024 tokens, or about half of a text
too short for it. It is whole documents, drawn at random, or the end of the longest if the smaller
ones do not suffice.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from configurator import UserError, check, configure
from data.bins import open_bin
from data.documents import Document, counted, find_files, local_documents, pieces
from data.encode import LabeledDocument, write_dataset
from data.tokenizer import CharTokenizer, TrainedTokenizer, describe_tokenizer

input: str | None = None  # files, folders or globs, with commas between them; -: standard input
name: str | None = None  # of the dataset, as for train.py --dataset=
tokenizer: str | None = None  # char | gpt2 | bpe:8000 (trained on the text); None: by size
seed = 2357  # of the choice of the documents that are held out
num_proc: int | None = None  # worker processes; None: one per core

CHAR_BYTES, CHARS = 20_000_000, 500  # up to these sizes, the default is char
BLOCK = 1024 + 1  # tokens: the inputs of a block and its last target
BPE_BYTES = 12  # of text in a token of BPE, at most on average


def hold_out(documents: Iterable[Document], sizes: np.ndarray, block_bytes: int,
             ) -> Iterator[LabeledDocument]:
    """Documents, and which are held out; of a single one, pieces. sizes: in bytes, (N,)."""
    total = int(sizes.sum())
    n_val = min(max(total // 100 + 1, min(total // 10, 100_000), block_bytes), total // 2)
    order = np.random.default_rng(seed).permutation(len(sizes))
    order = order[sizes[order] <= n_val]
    n_chosen = int(np.searchsorted(sizes[order].cumsum(), n_val)) + 1
    held_out = set(order[:n_chosen].tolist()) if n_chosen <= len(order) else set()
    longest = None if held_out else sizes.argmax()
    for i, document in enumerate(documents):
        if i != longest:
            yield document, i in held_out
            continue
        text = document.text()
        end = text.encode()[-n_val:].decode(errors="ignore")  # it may begin within a character
        for part, is_val in ((text[:-len(end)], False), (end, True)):
            for piece in pieces(part) if len(sizes) == 1 else filter(None, [part]):
                yield Document(piece, document.place), is_val


if __name__ == "__main__":  # worker processes import this file, too
    configure(globals())
    check(globals(), "seed >= 0", "num_proc is None or num_proc > 0")
    if not input or not re.fullmatch(r"\w[\w.-]*", name or ""):
        raise UserError(f"input = {input!r}, name = {name!r}: expected a text and a plain name for "
                        f"the dataset, such as --input=book.txt --name=mybook")
    folder = HERE.parent / name
    if (folder / "prepare.py").exists():
        raise UserError(f"name = {name!r}: {folder} has its own prepare.py; choose another name")
    kind, _, size = (tokenizer or "").partition(":")
    if tokenizer not in (None, "char", "gpt2") and not (
            kind == "bpe" and size.isdecimal() and 257 <= int(size) <= 2**16):
        raise UserError(f"tokenizer = {tokenizer!r}: expected char, gpt2, or bpe:N with N from 257 "
                        f"to 65,536, such as bpe:8000")

    paths = find_files(input)
    sizes, n_bytes, n_chars, chars = [], 0, 0, {"\n"}  # sample.py starts with a newline
    for document in local_documents(paths):
        text = document.text()
        sizes.append(len(text.encode()))
        n_bytes += sizes[-1]
        n_chars += len(text)
        if kind == "char" or (not kind and n_bytes <= CHAR_BYTES):
            chars.update(text)
    endings = Counter(path.suffix or path.name for path in paths)
    print(f"read {', '.join(f'{n} {ending}' for ending, n in endings.items())}: {len(sizes):,} "
          f"documents, {n_bytes:,} bytes of text")
    if n_bytes < 10:
        raise UserError(f"{input} holds {n_bytes} bytes of text: expected a text to train on")
    kind = kind or ("char" if n_bytes <= CHAR_BYTES and len(chars) < CHARS else "gpt2")
    meta = None
    if kind == "char":
        meta = CharTokenizer.meta_of(chars)
    elif kind == "bpe":
        meta = TrainedTokenizer.train((piece for document in local_documents(paths)
                                       for piece in pieces(document.text())), int(size))
    print(f"tokenizer: {describe_tokenizer(meta)}")
    documents = hold_out(counted(local_documents(paths), len(sizes)), np.array(sizes),
                      BLOCK * (n_bytes // n_chars + 1 if kind == "char" else BPE_BYTES))
    write_dataset(folder, documents, meta, n_bytes, num_proc, one_text=len(sizes) == 1)

    n_train, n_val = (len(open_bin(folder / f"{split}.bin", 1)) for split in ("train", "val"))
    if n_val < BLOCK:
        print("the text is short: val.bin, at most half of it, has less than a block (1,024)")
    if kind == "char":  # a config for a text of this size, and its block_size
        config, block_size = (("fast_shakespeare_char_cpu", 64) if n_train < 2e6 else
                              ("fast_stdlib_char", 128))
    else:
        config, block_size = ("train_text_cpu", 128) if n_train < 1e7 else ("train_text", 1024)
    changes = f" --block_size={n_val - 1}" if n_val <= block_size else ""
    if kind == "char" and meta["vocab_size"] > 200:  # its table is five times the model
        changes += " --bigram=False"
    print(f"next: python train.py config/{config}.py --dataset={name} "
          f"--out_dir=out-{name}{changes}")
