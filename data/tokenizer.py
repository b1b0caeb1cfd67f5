"""Tokenizers: one id per character, as listed in a dataset's meta.pkl, or GPT-2's BPE."""

import codecs
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from configurator import UserError

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
    n_vocab: int  # ids are below this

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Raises UserError naming characters that are not in the vocabulary."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids."""

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids in pieces, each as soon as its characters are complete."""


class CharTokenizer:
    """One id per character. meta: {vocab_size: int, stoi: {char: id}, itos: {id: char}}."""

    def __init__(self, meta: dict):
        self.stoi, self.itos, self.n_vocab = meta["stoi"], meta["itos"], meta["vocab_size"]

    @staticmethod
    def meta_of(text: str) -> dict:
        """The vocabulary of a text: its distinct characters, sorted."""
        chars = sorted(set(text))
        return {"vocab_size": len(chars), "itos": dict(enumerate(chars)),
                "stoi": {char: i for i, char in enumerate(chars)}}

    def encode(self, text: str) -> list[int]:
        unknown = sorted(set(text) - self.stoi.keys())
        if unknown:
            known = "".join(sorted(self.stoi))
            raise UserError(f"the vocabulary lacks {', '.join(map(repr, unknown[:10]))}: "
                            f"it has only the {len(self.stoi)} characters {known!r}")
        return [self.stoi[char] for char in text]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.itos[int(i)] for i in ids)

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        return (self.itos[int(i)] for i in ids)


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding by tiktoken: 50,257 ids, with <|endoftext|> as one token."""

    def __init__(self):
        import tiktoken
        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:  # no network, or a proxy's page instead of the file
            raise UserError(
                f"cannot download GPT-2's BPE files ({type(error).__name__}): once, on a machine "
                f"with a network, run python -c \"import tiktoken; tiktoken.get_encoding('gpt2')\" "
                f"with TIKTOKEN_CACHE_DIR=some-folder, copy the folder here and set the variable"
            ) from None
        self.n_vocab = self.bpe.n_vocab

    def encode(self, text: str) -> list[int]:
        return self.bpe.encode(text, allowed_special={END_OF_TEXT})

    def encode_document(self, text: str) -> np.ndarray:
        """Ids of a document, (N,) uint16, with the end-of-text token at the end, and only there."""
        return np.array([*self.bpe.encode_ordinary(text), self.bpe.eot_token], dtype=np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        return self.bpe.decode([int(i) for i in ids])

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            yield utf8.decode(self.bpe.decode_single_token_bytes(int(i)))
        yield utf8.decode(b"", final=True)


def get_tokenizer(meta: dict | None) -> Tokenizer:
    """The tokenizer of a dataset: characters if it has a meta, else GPT-2's."""
    return CharTokenizer(meta) if meta else GPT2Tokenizer()


class PlainUnpickler(pickle.Unpickler):
    """Unpickles containers, text and numbers only: any class or function is refused."""

    def find_class(self, module: str, name: str) -> None:
        raise pickle.UnpicklingError(f"it names {module}.{name}, which plain data never do")


def load_meta(folder: Path) -> dict | None:
    """The vocabulary in `folder`/meta.pkl, or None if there is no such file.

    Runs no code from it. Raises UserError if it is not a vocabulary of plain containers.
    """
    path = folder / "meta.pkl"
    try:
        with open(path, "rb") as file:
            meta = PlainUnpickler(file).load()
    except FileNotFoundError:
        return None
    except Exception as error:  # a broken pickle can raise nearly anything
        raise UserError(f"cannot read {path} ({error}): prepare the dataset again") from None
    return check_meta(meta, path)


def check_meta(meta: object, source: object) -> dict:
    """Return `meta` if it is a character vocabulary; else raise UserError naming its source."""
    try:
        itos, stoi, size = meta["itos"], meta["stoi"], meta["vocab_size"]
        valid = (all(type(i) is int and 0 <= i < size and stoi[char] == i and type(char) is str
                     for i, char in itos.items())
                 and type(size) is int and len(itos) == len(stoi) == size > 0)
    except (TypeError, KeyError, IndexError, AttributeError):
        valid = False
    if not valid:
        raise UserError(f"{source} holds no vocabulary: expected vocab_size, itos, and stoi, "
                        f"its inverse; prepare the dataset again")
    return meta
