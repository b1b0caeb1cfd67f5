"""Token files, the batches drawn from them, atomic writing, and datasets made from a text."""

import itertools
import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import ROOT, snapshot, write_bin
from hypothesis import given, settings
from hypothesis import strategies as st

from configurator import UserError
from data import bins
from data.bins import (
    IGNORE,
    atomic_write,
    check_vocabulary,
    dataset_folder,
    get_batch,
    open_bin,
    prefetch,
    random_offsets,
    sequential_offsets,
)
from data.documents import read_text
from data.encode import write_text_dataset
from data.tokenizer import CharTokenizer, dataset_record

TEXT = "To be, or not to be: that is the question. Naïve café, 日本.\n"


# ------------------------------------------------------------------------------------- token files

@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 65535), min_size=2))  # a block and its target
def test_a_token_file_is_raw_little_endian_uint16(tmp_path_factory, ids):
    path = tmp_path_factory.getbasetemp() / "ids.bin"
    path.write_bytes(struct.pack(f"<{len(ids)}H", *ids))
    tokens = open_bin(path, block_size=len(ids) - 1)
    assert tokens.tolist() == ids
    assert isinstance(tokens, np.memmap) and not tokens.flags.writeable


def test_a_missing_token_file_says_how_to_prepare_it(tmp_path):
    with pytest.raises(UserError) as caught:
        open_bin(tmp_path / "train.bin", 8)
    assert f"no {tmp_path}/train.bin" in str(caught.value)
    assert "prepare.py" not in str(caught.value)  # there is none to run
    (tmp_path / "prepare.py").touch()
    with pytest.raises(UserError, match=f"python {tmp_path}/prepare.py"):
        open_bin(tmp_path / "train.bin", 8)


@pytest.mark.parametrize("size", [0, 1, 2, 16, 17, 19])
def test_a_token_file_that_is_empty_odd_or_short_is_refused_with_its_size(tmp_path, size):
    (tmp_path / "val.bin").write_bytes(bytes(size))
    with pytest.raises(UserError) as caught:
        open_bin(tmp_path / "val.bin", block_size=8)
    assert f"val.bin has {size} bytes" in str(caught.value)
    assert "block_size = 8" in str(caught.value)


@pytest.mark.parametrize("place", [0, 50, 99])
def test_an_id_outside_the_vocabulary_is_named_with_its_file(tmp_path, place):
    ids = [1] * 100
    ids[place] = 65
    write_bin(tmp_path / "train.bin", ids)
    with pytest.raises(UserError) as caught:
        check_vocabulary(open_bin(tmp_path / "train.bin", 8), 65)
    assert f"{tmp_path}/train.bin holds the token id 65" in str(caught.value)
    assert "vocabulary has 65" in str(caught.value)
    check_vocabulary(open_bin(tmp_path / "train.bin", 8), 66)


def test_of_a_long_file_evenly_spaced_pieces_are_checked(tmp_path, monkeypatch):
    write_bin(tmp_path / "train.bin", np.arange(65_000))
    tokens, checked = open_bin(tmp_path / "train.bin", 8), []
    monkeypatch.setattr(bins, "MAX_CHECKED", 6400)
    monkeypatch.setattr(bins, "check_ids", lambda ids, *_: checked.extend(ids.tolist()))
    check_vocabulary(tokens, 65)
    assert len(checked) == 6400
    assert (checked[0], checked[-1]) == (0, 64_999)
    assert np.diff(checked).max() < 1000  # at most this far apart


def test_a_dataset_is_a_name_under_data_or_an_absolute_path(tmp_path):
    assert dataset_folder("openwebtext") == ROOT / "data/openwebtext"
    assert dataset_folder(str(tmp_path)) == tmp_path


# ----------------------------------------------------------------------------------------- batches

@given(st.integers(2, 200), st.data())
def test_targets_are_the_inputs_shifted_by_one(n_tokens, data):
    block_size = data.draw(st.integers(1, n_tokens - 1))
    offsets = np.array(data.draw(st.lists(st.integers(0, n_tokens - block_size - 1), min_size=1)))
    tokens = np.random.default_rng(0).integers(0, 65, n_tokens).astype("<u2")
    x, y = get_batch(tokens, offsets, block_size, 65)
    assert x.dtype == y.dtype == np.int64
    assert x.shape == y.shape == (len(offsets), block_size)
    for row, start in enumerate(offsets):
        assert x[row].tolist() == tokens[start:start + block_size].tolist()
        assert y[row].tolist() == tokens[start + 1:start + block_size + 1].tolist()


@settings(deadline=None)
@given(st.integers(2, 100), st.integers(1, 120))
def test_sequential_offsets_make_each_token_but_the_first_a_target_once(n_tokens, block_size):
    tokens = np.arange(n_tokens, dtype="<u2")
    x, y = get_batch(tokens, sequential_offsets(n_tokens, block_size), block_size, n_tokens)
    is_target = y != IGNORE
    assert y[is_target].tolist() == list(range(1, n_tokens))
    assert x[is_target].tolist() == list(range(n_tokens - 1))
    assert is_target[:-1].all()


def test_past_the_end_of_a_file_inputs_are_0_and_targets_ignored():
    x, y = get_batch(np.array([5, 6, 7], dtype="<u2"), np.array([1]), 4, 8)
    assert x.tolist() == [[6, 7, 0, 0]]
    assert y.tolist() == [[7, -1, -1, -1]]


def test_a_batch_with_an_id_outside_the_vocabulary_names_the_file(tmp_path):
    write_bin(tmp_path / "train.bin", [1, 2, 3, 90, 5])
    tokens = np.memmap(tmp_path / "train.bin", dtype="<u2", mode="r")
    with pytest.raises(UserError, match=r"train\.bin holds the token id 90"):
        get_batch(tokens, np.array([0, 1]), 2, 65)
    get_batch(tokens, np.array([0]), 2, 65)


@settings(deadline=None)
@given(st.integers(2, 10**10), st.data())
def test_random_offsets_leave_room_for_a_block_and_its_last_target(n_tokens, data):
    block_size = data.draw(st.integers(1, min(n_tokens - 1, 2048)))
    key = data.draw(st.tuples(st.integers(0, 2**40), st.integers(0, 2**40)))
    offsets = random_offsets(n_tokens, block_size, 20, key)
    assert offsets.dtype == np.int64
    assert offsets.shape == (20,)
    assert 0 <= offsets.min() <= offsets.max() <= n_tokens - block_size - 1
    assert set(random_offsets(12, 4, 1000, key).tolist()) == set(range(8))


def test_random_offsets_depend_on_the_key_alone():
    np.random.seed(1)
    first = random_offsets(10_000, 8, 16, (1337, 5)).tolist()
    np.random.seed(2)
    assert random_offsets(10_000, 8, 16, (1337, 5)).tolist() == first
    for key in ((1337, 6), (1338, 5), (5, 1337), (1337, 5, 1)):
        assert random_offsets(10_000, 8, 16, key).tolist() != first


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(1, 50), st.integers(0, 2**63))
def test_each_pass_of_epoch_offsets_visits_each_whole_block_once(n_blocks, block_size, seed):
    n_tokens = n_blocks * block_size + 1 + seed % block_size
    passes = [bins.epoch_offsets(n_tokens, block_size, i * n_blocks, n_blocks, (0, seed))
              for i in (0, 1, 7)]
    for offsets in passes:
        assert sorted(offsets) == list(range(0, n_blocks * block_size, block_size))
    if n_blocks > 100:  # then equal orders, or the file's own, are as good as impossible
        assert len({tuple(offsets) for offsets in passes} | {tuple(sorted(passes[0]))}) == 4


@settings(deadline=None)
@given(st.integers(0, 500), st.integers(1, 100))
def test_epoch_offsets_are_one_endless_sequence_whatever_part_is_asked_for(first, count):
    whole = bins.epoch_offsets(1000, 7, 0, 600, (0, 1))
    part = bins.epoch_offsets(1000, 7, first, count, (0, 1))
    assert (part == whole[first:first + count]).all()


def test_a_permutation_puts_each_number_anywhere_with_equal_probability():
    n, n_keys = 12, 4000
    images = np.stack([bins.permute(np.arange(n), n, (5, key)) for key in range(n_keys)])
    counts = np.stack([(images == image).sum(axis=0) for image in range(n)])
    expected = n_keys / n
    chi_squared = ((counts - expected)**2 / expected).sum()  # of (n - 1)^2 degrees of freedom
    assert chi_squared < (n - 1)**2 + 6 * (2 * (n - 1)**2)**0.5


# ----------------------------------------------------------------------------------- atomic writing

def test_two_processes_that_write_the_same_file_each_write_a_whole_one(tmp_path):
    with atomic_write(tmp_path / "file") as (file,):
        file.write(b"ours, ")
        file.flush()
        assert not (tmp_path / "file").exists()
        code = ("import sys; from data.bins import *\n"
                "with atomic_write(Path(sys.argv[1])) as (file,): file.write(b'theirs')")
        subprocess.run([sys.executable, "-c", code, tmp_path / "file"], cwd=ROOT, check=True,
                       timeout=60)
        assert (tmp_path / "file").read_bytes() == b"theirs"
        file.write(b"all of it")
    assert (tmp_path / "file").read_bytes() == b"ours, all of it"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_temporary_files_of_killed_processes_are_removed_before_a_dataset_is_written(tmp_path):
    names = ["train.bin.host.7.tmp", "tokenizer.json.host.7.tmp", "notes.host.7.tmp"]
    for name in names:
        (tmp_path / name).touch()
    write_text_dataset(tmp_path, TEXT, CharTokenizer.meta_of(TEXT))
    assert {path.name for path in tmp_path.iterdir()} == {
        "train.bin", "val.bin", "meta.pkl", "dataset.json", names[2]}


# -------------------------------------------------------------------------------- text and datasets

@pytest.fixture
def serve(monkeypatch):
    """Serve one answer over HTTP from this machine and return its address."""
    monkeypatch.setenv("NO_PROXY", "*")

    def serve(status: str, n_bytes: int, body: bytes) -> str:
        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                head = f"HTTP/1.0 {status}\r\nContent-Length: {n_bytes}\r\n\r\n"
                connection.sendall(head.encode() + body)

        server = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=answer, daemon=True).start()
        return f"http://127.0.0.1:{server.getsockname()[1]}/input.txt"
    return serve


def test_a_missing_text_is_downloaded_once_and_kept_as_it_is(tmp_path, serve):
    text = f"{TEXT}one\r\ntwo\rthree\n"
    content = text.encode()
    for url in (serve("200 OK", len(content), content), "http://127.0.0.1:9/never"):
        assert read_text(tmp_path / "input.txt", url) == text
    assert (tmp_path / "input.txt").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["input.txt"]


@pytest.mark.parametrize("answer", [
    None, ("404 Not Found", 9, b"not found"), ("200 OK", 10_000, TEXT.encode()),
], ids=["unreachable", "404", "cut off"])
def test_a_failed_download_leaves_no_file_and_says_where_to_put_one(tmp_path, serve, answer):
    url = serve(*answer) if answer else "http://127.0.0.1:9/x"
    with pytest.raises(UserError, match=f"^cannot download .* to {tmp_path}/input.txt"):
        read_text(tmp_path / "input.txt", url)
    assert list(tmp_path.iterdir()) == []


def test_a_character_dataset_is_the_first_90_percent_the_rest_and_the_vocabulary(tmp_path):
    text = 10 * TEXT + "?"
    meta = CharTokenizer.meta_of(text)
    write_text_dataset(tmp_path, text, meta)
    train, val = (np.fromfile(tmp_path / f"{name}.bin", "<u2") for name in ("train", "val"))
    assert len(train) == len(text) * 9 // 10
    tokenizer = CharTokenizer(meta)
    assert tokenizer.decode(train) + tokenizer.decode(val) == text
    assert pickle.loads((tmp_path / "meta.pkl").read_bytes()) == meta
    parts = [text[:len(train)], text[len(train):]]
    assert dataset_record(tmp_path) == {
        "tokenizer": "char", "train_tokens": len(parts[0]), "train_bytes": len(parts[0].encode()),
        "val_tokens": len(parts[1]), "val_bytes": len(parts[1].encode())}


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"{}", b"[" * 10**5, b"5", b"\xff"])
def test_a_dataset_without_a_readable_record_has_none(tmp_path, content):
    if content is not None:
        (tmp_path / "dataset.json").write_bytes(content)
    assert dataset_record(tmp_path) == {}


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
@pytest.mark.parametrize("change", [-2, 2])
def test_a_token_file_that_was_cut_or_replaced_is_refused(tmp_path, name, change):
    write_text_dataset(tmp_path, 10 * TEXT, CharTokenizer.meta_of(TEXT))
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes((content + bytes(2))[:len(content) + change])
    expected = rf"{name} has .* tokens, but {len(content) // 2} were recorded in dataset\.json"
    with pytest.raises(UserError, match=expected):
        open_bin(tmp_path / name, block_size=8)
    (tmp_path / "dataset.json").unlink()
    assert len(open_bin(tmp_path / name, block_size=8)) == (len(content) + change) // 2


def test_a_second_process_that_writes_the_same_dataset_is_refused(tmp_path):
    write_text_dataset(tmp_path, 10 * TEXT, CharTokenizer.meta_of(TEXT))
    code = ("import sys; from data.bins import *\n"
            "write_bins(Path(sys.argv[1]), None, 0, iter(input, ''))")
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        while not list(tmp_path.glob("train.bin.*.tmp")):
            time.sleep(0.01)
        before = snapshot(tmp_path)
        with pytest.raises(UserError, match=f"{tmp_path} is in use by another process: wait"):
            write_text_dataset(tmp_path, 5 * TEXT, CharTokenizer.meta_of(TEXT))
        assert snapshot(tmp_path) == before
        other.communicate(b"\n", timeout=60)
    assert {path.name for path in tmp_path.iterdir()} == {"train.bin", "val.bin", "dataset.json"}


@pytest.mark.parametrize("fails_at", range(1, 4))
def test_a_dataset_that_a_killed_process_left_half_renamed_is_refused(
        tmp_path, monkeypatch, fails_at):
    write_text_dataset(tmp_path, 10 * TEXT, CharTokenizer.meta_of(TEXT))
    calls, replace = [], os.replace

    def kill(*args: object) -> None:
        calls.append(args)
        if len(calls) > fails_at:
            raise KeyboardInterrupt
        replace(*args)

    monkeypatch.setattr(os, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        write_text_dataset(tmp_path, 5 * TEXT, CharTokenizer.meta_of(TEXT))
    with pytest.raises(UserError, match="were recorded in dataset.json"):
        for name in ("train.bin", "val.bin"):
            open_bin(tmp_path / name, block_size=8)


# -------------------------------------------------------------------------------------- prefetching

def test_items_are_computed_once_in_order_and_one_ahead_in_a_thread():
    made, used = [], threading.Event()

    def items():
        for i in itertools.count():
            made.append((i, threading.current_thread() is threading.main_thread()))
            if i == 3:
                used.set()
            yield i

    ahead = prefetch(items())
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    assert used.wait(timeout=10)  # 3 was computed before it was requested
    assert made == [(i, False) for i in range(4)]
    assert next(ahead) == 3


def test_an_error_in_the_thread_is_raised_where_its_item_is_requested():
    def items():
        yield 0
        raise UserError("the token id 300")

    ahead = prefetch(items())
    assert next(ahead) == 0
    with pytest.raises(UserError, match="300"):
        next(ahead)
