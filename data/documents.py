"""Streams of documents from local files or the Hugging Face hub, without a copy of the source."""

import functools
import glob
import gzip
import io
import itertools
import json
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from configurator import UserError, check_choice, regular_file
from data.bins import atomic_write
from data.tokenizer import END_OF_TEXT

ENDINGS = [".parquet", ".jsonl", ".txt", ".md"]  # and each of them with .gz
STANDARD_INPUT = Path("standard input")
PIECE = 2**20  # characters
LINE_START = re.compile(r"(?<=\S\n)(?=\S)")  # where no token crosses the line's start


class Document(NamedTuple):
    """A document as it is read, and where, for errors."""

    content: str | bytes  # its text, or a line of JSON with a field `text`
    place: str  # such as "corpus/a.jsonl line 17"

    def text(self) -> str:
        """Its text. Raises UserError naming the place if there is none."""
        text = self.content
        if isinstance(text, bytes):
            # If this fails, text stays bytes, which is refused below.
            with suppress(ValueError, TypeError, KeyError, RecursionError):
                text = json.loads(text)["text"]
        if not isinstance(text, str):
            raise UserError(f"{self.place}: expected a document with a field `text`, got "
                            f"{self.content!r:.80}")
        # UTF-8 cannot hold half a surrogate pair: it becomes U+FFFD.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def find_files(names: str) -> list[Path]:
    """The files that names stand for: files, folders (all below) or globs, with commas between, or
    "-", standard input. Raises UserError for a file of another kind, except in a folder."""
    if names == "-":
        return [STANDARD_INPUT]
    found = set()
    for name in [names] if os.path.exists(names) else names.split(","):
        paths = [name] if os.path.exists(name) else glob.glob(name, recursive=True)
        files = {path for path in map(Path, paths) if not path.is_dir()}
        for path in files:
            check_choice(f"the ending of {path}", kind(path), ENDINGS)
        files |= {Path(file) for folder in paths if os.path.isdir(folder)
                  for file in glob.glob(f"{glob.escape(folder)}/**/*", recursive=True)
                  if kind(Path(file)) in ENDINGS and os.path.isfile(file)}
        if not files:
            raise UserError(f"no file matches --input={name}: give {', '.join(ENDINGS)} files (or "
                            f"these as .gz), a folder of them, or a glob")
        found |= files
    return sorted(found)


def kind(path: Path) -> str:
    """The ending of a file's name, such as .txt for a.txt and a.txt.gz."""
    return Path(path.name.removesuffix(".gz")).suffix


@functools.cache
def standard_input() -> bytes:
    return sys.stdin.buffer.read()


def open_file(path: Path) -> BinaryIO:
    if path == STANDARD_INPUT:
        return io.BytesIO(standard_input())
    return (gzip.open if path.suffix == ".gz" else open)(regular_file(path), "rb")


def local_documents(paths: Iterable[Path]) -> Iterator[Document]:
    """The documents in files: rows of .parquet or .jsonl, else parts between <|endoftext|>.

    Raises UserError if one cannot be read.
    """
    read = {".parquet": parquet_documents, ".jsonl": jsonl_documents}
    for path in paths:
        try:
            with open_file(path) as file:
                yield from read.get(kind(path), text_documents)(path, file)
        except (OSError, ValueError, EOFError, zlib.error) as error:
            raise UserError(f"cannot read {path}: {error!s:.200}") from None


def jsonl_documents(path: Path, file: BinaryIO) -> Iterator[Document]:
    for number, line in enumerate(file, start=1):
        if not line.isspace():
            yield Document(line, f"{path} line {number}")


def parquet_documents(path: Path, file: BinaryIO) -> Iterator[Document]:
    import pyarrow.parquet
    parquet = pyarrow.parquet.ParquetFile(
        pyarrow.BufferReader(file.read()) if path.suffix == ".gz" else file)
    names = parquet.schema_arrow.names
    if "text" not in names:
        raise UserError(f"{path} has no column `text`, only {', '.join(names)}")
    rows = (text for batch in parquet.iter_batches(1000, columns=["text"])
            for text in batch.column("text").to_pylist())
    for number, text in enumerate(rows, start=1):
        # A row without text is passed on as bytes that are not JSON, which `text` refuses.
        yield Document(text if isinstance(text, str) else repr(text).encode(),
                       f"{path} row {number}")


def text_documents(path: Path, file: BinaryIO) -> Iterator[Document]:
    lines = []  # of the document so far
    for number, line in enumerate(itertools.chain(file, [END_OF_TEXT.encode()]), start=1):
        try:
            *ends, rest = line.decode().split(END_OF_TEXT)
        except UnicodeDecodeError:
            raise UserError(f"{path} line {number} is not UTF-8: convert the file, or leave it "
                            f"out") from None
        for end in ends:
            text = "".join([*lines, end])
            if text.strip():
                yield Document(text, str(path))
            lines = []
        lines.append(rest)


def pieces(text: str) -> Iterator[str]:
    """Parts of about a million characters, which are encoded to the same ids as the whole."""
    start = 0
    while start < len(text):
        line = LINE_START.search(text, start + PIECE)
        end = line.start() if line else len(text)
        yield text[start:end]
        start = end


def counted(documents: Iterable[Document], n_documents: int) -> Iterator[Document]:
    """The same documents. Raises UserError at their end if they are not as many as expected."""
    n_read = 0
    for n_read, document in enumerate(documents, start=1):  # noqa: B007
        yield document
    if n_read != n_documents:
        raise UserError(f"the source has {n_read:,} documents, not {n_documents:,}: it changed or "
                        f"is incomplete; nothing was written")


def hub_dataset(repository: str) -> Iterable[dict]:
    """A dataset's train split, streamed from the first revision that loads without a script.

    Raises UserError naming all revisions that were tried.
    """
    from datasets import load_dataset
    tried = []
    for revision in ("main", "refs/convert/parquet"):
        try:
            return load_dataset(repository, revision=revision, split="train", streaming=True)
        except Exception as error:  # whatever it is, the other revision may load
            tried.append(f"{revision} ({type(error).__name__}: {error!s:.200})")
    raise UserError(f"{repository} could not be loaded from the Hugging Face hub; tried "
                    f"{' and '.join(tried)}; if you have the files, give them with --input=")


def hub_documents(rows: Iterable[dict]) -> Iterator[Document]:
    """The documents of a streamed dataset, which retries by itself after network errors."""
    try:
        for number, row in enumerate(rows, start=1):
            yield Document(row["text"], f"the hub's row {number}")
    except Exception as error:  # OSError, or the HTTP client's own classes
        raise UserError(f"the Hugging Face hub stopped answering ({error!s:.200}): "
                        f"nothing was written, run this again") from None


def read_text(path: Path, url: str | None) -> str:
    """The text in a file, which is downloaded from `url` if it does not exist.

    Raises UserError if that fails, or if it is too short or not UTF-8.
    """
    if not path.exists():
        if url is None:
            raise UserError(f"no {path}, and only the script in its own folder downloads it: for "
                            f"another text, use python data/text/prepare.py --input=... --name=...")
        import requests
        print(f"downloading {url}")
        try:
            response = requests.get(url, timeout=60)
            response.raise_for_status()
            response.content.decode()
        except (requests.RequestException, UnicodeDecodeError) as error:
            raise UserError(f"cannot download {url} ({type(error).__name__}): download it yourself "
                            f"to {path} and run this again") from None
        with atomic_write(path) as (file,):
            file.write(response.content)
    text = END_OF_TEXT.join(document.text() for document in local_documents([path]))
    if len(text) < 10:
        raise UserError(f"{path} holds {len(text)} characters: put a text to train on there")
    return text
