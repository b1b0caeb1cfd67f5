"""Streams of documents from local files or the Hugging Face hub, without a copy of the source."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from configurator import UserError
from data.tokenizer import END_OF_TEXT

ENDINGS = [".parquet", ".jsonl", ".txt"]

Document = str | bytes  # its text, or a line of JSON with a field `text`


def local_documents(path: Path) -> Iterator[Document]:
    """The documents in a file: rows of .parquet or .jsonl, parts of .txt between <|endoftext|>.

    Raises UserError if it cannot be read.
    """
    try:
        if path.suffix == ".parquet":
            yield from parquet_documents(path)
        elif path.suffix == ".jsonl":
            with open(path, "rb") as file:
                yield from (line for line in file if not line.isspace())
        else:
            with open(path, encoding="utf-8", newline="") as file:
                yield from filter(str.strip, split_at_end_of_text(file))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from None


def parquet_documents(path: Path) -> Iterator[Document]:
    import pyarrow.parquet
    file = pyarrow.parquet.ParquetFile(path)
    if "text" not in file.schema_arrow.names:
        raise UserError(f"{path} has no column `text`, only {', '.join(file.schema_arrow.names)}")
    for batch in file.iter_batches(1000, columns=["text"]):
        for text in batch.column("text").to_pylist():
            # A row without text is passed on as bytes that are not JSON, which `encode` refuses.
            yield text if isinstance(text, str) else repr(text).encode()


def split_at_end_of_text(lines: Iterable[str]) -> Iterator[str]:
    pieces = []
    for line in lines:
        *ends, rest = line.split(END_OF_TEXT)
        for end in ends:
            yield "".join([*pieces, end])
            pieces = []
        pieces.append(rest)
    yield "".join(pieces)


def measure(path: Path) -> tuple[int, int]:
    """Number of documents in a file, and approximate bytes of text. Raises UserError."""
    if path.suffix != ".parquet":
        return sum(1 for _ in local_documents(path)), path.stat().st_size
    import pyarrow.parquet
    try:
        meta = pyarrow.parquet.ParquetFile(path).metadata
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from None
    groups = (meta.row_group(i) for i in range(meta.num_row_groups))
    columns = (group.column(j) for group in groups for j in range(group.num_columns))
    return meta.num_rows, sum(column.total_uncompressed_size for column in columns
                              if column.path_in_schema == "text")


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
            tried.append(f"{revision} ({type(error).__name__}: {first_line(error)})")
    raise UserError(f"{repository} could not be loaded from the Hugging Face hub; tried "
                    f"{' and '.join(tried)}; if you have the files, give them with --input=")


def hub_documents(rows: Iterable[dict]) -> Iterator[Document]:
    """The documents of a streamed dataset, which retries by itself after network errors."""
    try:
        for row in rows:
            yield row["text"]
    except Exception as error:  # OSError, or the HTTP client's own classes
        raise UserError(f"the Hugging Face hub stopped answering ({first_line(error)}): "
                        f"nothing was written, run this again") from None


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
