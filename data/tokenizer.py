"""Tokenizers: one id per character, GPT-2's BPE, or a BPE trained on a dataset.

Datasets and checkpoints describe theirs by a meta, a plain dict:
    {vocab_size: int, stoi: {char: id}, itos: {id: char}}   characters, in meta.pkl
    {vocab_size: int, tokenizer_json: str}                  a BPE, in Hugging Face's tokenizer.json
    None                                                    GPT-2's BPE
"""

import json
import pickle
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from configurator import UserError, regular_file

END_OF_TEXT = "<|endoftext|>"
# What GPT-2 splits a text into before it merges bytes: words, numbers and signs with their space.
GPT2_WORDS = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


class CharTokenizer:
    """One id per character; a newline ends a document.

    Ids are below n_vocab. default_prompt: a text to start from.
    """

    def __init__(self, meta: dict):
        self.stoi, self.itos, self.n_vocab = meta["stoi"], meta["itos"], meta["vocab_size"]
        self.default_prompt = "\n" if "\n" in self.stoi else self.itos[0]

    @staticmethod
    def meta_of(text: Iterable[str]) -> dict:
        """The meta of a text's distinct characters. Raises UserError for more than 65,536."""
        chars = sorted(set(text))
        if len(chars) > 2**16:
            raise UserError(f"the text has {len(chars):,} distinct characters, but token files "
                            f"hold ids below 65,536: use GPT-2's BPE (data/text/prepare.py with "
                            f"--tokenizer=gpt2)")
        return {"vocab_size": len(chars), "itos": dict(enumerate(chars)),
                "stoi": {char: i for i, char in enumerate(chars)}}

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Raises UserError naming a character that is not in the vocabulary."""
        unknown = next((i for i, char in enumerate(text) if char not in self.stoi), None)
        if unknown is not None:
            raise UserError(f"character {unknown + 1} of the text, {text[unknown]!r}, is not among "
                            f"the {self.n_vocab} of the vocabulary: leave it out")
        return [self.stoi[char] for char in text]

    def encode_document(self, text: str) -> np.ndarray:
        """Ids of a document's plain characters and, last, one that ends it, (N,) uint16."""
        return np.array(self.encode(f"{text}\n"), dtype=np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.itos[int(i)] for i in ids)


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding by tiktoken: 50,257 ids, with <|endoftext|> as one token.

    Has the attributes and methods of CharTokenizer, and end_of_text, the id of that token.
    """

    default_prompt = "\n"

    def __init__(self):
        import tiktoken
        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:  # no network, or a proxy's page instead of the file
            raise UserError(f"GPT-2's BPE files are not whole in tiktoken's cache, and cannot be "
                            f"downloaded ({type(error).__name__}): run this once with a network "
                            f"and TIKTOKEN_CACHE_DIR=folder, copy the folder here, and set the "
                            f"variable") from None
        self.n_vocab, self.end_of_text = self.bpe.n_vocab, self.bpe.eot_token

    def encode(self, text: str) -> list[int]:
        return self.bpe.encode(text, allowed_special={END_OF_TEXT})

    def encode_document(self, text: str) -> np.ndarray:
        return np.array([*self.bpe.encode_ordinary(text), self.bpe.eot_token], dtype=np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        return self.bpe.decode([int(i) for i in ids])


class TrainedTokenizer(GPT2Tokenizer):
    """A BPE like GPT-2's, trained on a dataset. Raises an exception if its meta is damaged."""

    def __init__(self, meta: dict):
        import tiktoken
        vocab = json.loads(meta["tokenizer_json"])["model"]["vocab"]
        self.n_vocab, self.end_of_text = meta["vocab_size"], vocab.pop(END_OF_TEXT)
        # In a vocabulary, a byte is the character of Latin-1, or one from 256 on if it prints none.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
        ranks = {bytes(map(byte_of.__getitem__, token)): i for token, i in vocab.items()}
        if ({*ranks.values(), self.end_of_text} != set(range(self.n_vocab)) or self.n_vocab > 2**16
                or not ranks.keys() >= {bytes([i]) for i in range(256)}):
            raise ValueError(f"it lacks {END_OF_TEXT}, bytes or ids")
        self.bpe = tiktoken.Encoding("trained", pat_str=GPT2_WORDS, mergeable_ranks=ranks,
                                     special_tokens={END_OF_TEXT: self.end_of_text})

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int) -> dict:
        """The meta of a BPE of at most vocab_size ids: <|endoftext|>, 256 bytes, and merges."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        bpe.train_from_iterator(texts, trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        return {"vocab_size": bpe.get_vocab_size(), "tokenizer_json": bpe.to_str()}


def tokenizer_name(meta: dict | None) -> str:
    """char, gpt2 or bpe."""
    return "gpt2" if meta is None else "bpe" if "tokenizer_json" in meta else "char"


def describe_tokenizer(meta: dict | None) -> str:
    """The tokenizer in words, for messages."""
    return {"gpt2": "GPT-2's BPE", "bpe": "a BPE of {vocab_size} tokens",
            "char": "{vocab_size} characters"}[tokenizer_name(meta)].format(**meta or {})


def same_tokenizer(a: dict | None, b: dict | None) -> bool:
    """Whether two metas give the same ids; what else a meta.pkl holds does not matter."""
    return all((a or {}).get(key) == (b or {}).get(key) for key in ("stoi", "tokenizer_json"))


def get_tokenizer(meta: dict | None) -> CharTokenizer | GPT2Tokenizer:
    """The tokenizer that a dataset or a checkpoint names."""
    if meta is None:
        return GPT2Tokenizer()
    return TrainedTokenizer(meta) if "tokenizer_json" in meta else CharTokenizer(meta)


class PlainUnpickler(pickle.Unpickler):
    """Unpickles containers, text and numbers only: any class or function is refused."""

    def find_class(self, module: str, name: str) -> None:
        raise pickle.UnpicklingError(f"it names {module}.{name}, which plain data never do")


def load_meta(folder: Path) -> dict | None:
    """The meta of a dataset: of `folder`/meta.pkl or tokenizer.json, or None if it has neither.

    Runs no code from them. Raises UserError if it is not a vocabulary of plain containers.
    """
    path, trained = folder / "meta.pkl", folder / "tokenizer.json"
    try:
        if trained.exists():
            if path.exists():
                raise ValueError(f"{trained.name} is there, too")
            path = trained
            text = regular_file(path).read_text(encoding="utf-8")
            meta = {"vocab_size": len(json.loads(text)["model"]["vocab"]), "tokenizer_json": text}
        else:
            with open(regular_file(path), "rb") as file:
                meta = PlainUnpickler(file).load()
    except FileNotFoundError:
        meta = None
    except Exception as error:  # a broken pickle can raise nearly anything
        raise UserError(f"cannot read {path} ({type(error).__name__}: {error}): prepare the "
                        f"dataset again") from None
    else:
        check_meta(meta, path)
    recorded = dataset_record(folder).get("tokenizer", tokenizer_name(meta))
    if recorded != tokenizer_name(meta):
        raise UserError(f"{folder}/dataset.json names the tokenizer {recorded!r:.20}, but meta.pkl "
                        f"and tokenizer.json, or their absence, {tokenizer_name(meta)!r}: prepare "
                        f"the dataset again, or remove dataset.json if they are right")
    return meta


def dataset_record(folder: Path) -> dict:
    """What was recorded in dataset.json when a dataset was prepared: its tokenizer, and the numbers
    of tokens and bytes; empty if it was not, or cannot be read."""
    try:
        path = regular_file(folder / "dataset.json")
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def check_meta(meta: object, source: object) -> None:
    """Raise UserError, naming its source, unless a meta is of characters or a trained BPE."""
    try:
        size = meta["vocab_size"]
        if "tokenizer_json" in meta:
            valid = bool(TrainedTokenizer(meta))
        else:
            itos, stoi = meta["itos"], meta["stoi"]
            valid = (type(size) is int and len(itos) == len(stoi) == size > 0
                     and all(type(char) is str and type(i) is type(stoi[char]) is int
                             and 0 <= i == stoi[char] < size for i, char in itos.items()))
    except (TypeError, ValueError, LookupError, AttributeError):
        valid = False
    if not valid:
        raise UserError(f"{source} holds no vocabulary: expected vocab_size, with itos and stoi or "
                        f"the tokenizer_json of a byte-level BPE; prepare the dataset again")
