"""The prepare scripts as users run them, and OpenWebText's against tiktoken and `datasets`."""

import contextlib
import glob
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tiktoken
from conftest import ROOT, run

from configurator import UserError
from data.tokenizer import GPT2Tokenizer, load_meta

SHAKESPEARE = ROOT.parent / "shared/data/tinyshakespeare/input.txt"
OPENWEBTEXT = "data/openwebtext/prepare.py"


@pytest.fixture
def repo(tmp_path):
    """A copy of the files that the prepare scripts need, since they write to their own folders."""
    folder = tmp_path / "repo"
    for path in ("configurator.py", *glob.glob("data/*.py", root_dir=ROOT),
                 *glob.glob("data/*/prepare.py", root_dir=ROOT)):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    return folder


@pytest.fixture(scope="module")
def prepare():
    """OpenWebText's script as a module."""
    spec = importlib.util.spec_from_file_location("openwebtext_prepare", ROOT / OPENWEBTEXT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.tokenizer = GPT2Tokenizer()  # as start_worker does
    return module


def read(path: Path) -> list[int]:
    return np.fromfile(path, dtype="<u2").tolist()


def texts(n: int, seed: int = 0) -> list[str]:
    """Different documents, with characters of one to four bytes."""
    rng = random.Random(seed)
    words = ["the", "of", "Straße", "日本", "👩‍👩‍👧", "12,345", "\n\n", "it's", "naïve", "x = 1"]
    return [f"{i}: " + " ".join(rng.choices(words, k=rng.randint(1, 60))) for i in range(n)]


def tokens_of(documents: list[str]) -> list[int]:
    """The ids in a token file of these documents, by tiktoken alone."""
    gpt2 = tiktoken.get_encoding("gpt2")
    return [i for text in documents for i in (*gpt2.encode_ordinary(text), gpt2.eot_token)]


def held_out_by_datasets(n: int, fraction: float, seed: int) -> set[int]:
    """The documents that nanoGPT's script, which uses `datasets`, holds out."""
    import datasets
    rows = datasets.Dataset.from_dict({"i": range(n)})
    return set(rows.train_test_split(test_size=fraction, seed=seed, shuffle=True)["test"]["i"])


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def write_parquet(path: Path, documents: list, field: str = "text") -> Path:
    pyarrow.parquet.write_table(pa.table({"id": range(len(documents)), field: documents}), path,
                                row_group_size=7)
    return path


def refused(done: subprocess.CompletedProcess, out: Path) -> str:
    """The error of a run, which is one line; it has written no token files."""
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not list(out.glob("*.bin*"))
    return done.stderr


# ------------------------------------------------------------------------------------- Shakespeare

@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="no tinyshakespeare in ../shared/data")
@pytest.mark.parametrize("name, counts", [
    ("shakespeare_char", (1_003_854, 111_540)), ("shakespeare", (301_966, 36_059))])
def test_shakespeare_has_the_published_counts_and_decodes_to_its_text(repo, name, counts):
    folder = repo / "data" / name
    shutil.copy(SHAKESPEARE, folder)
    done = run(folder / "prepare.py", cwd=repo.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1,115,394 characters, 65 distinct" in done.stdout
    train, val = read(folder / "train.bin"), read(folder / "val.bin")
    assert (len(train), len(val)) == counts
    meta = load_meta(folder)
    assert (meta is None) == (name == "shakespeare")
    text = ("".join(map(meta["itos"].get, train + val)) if meta else
            tiktoken.get_encoding("gpt2").decode(train + val))
    assert text == SHAKESPEARE.read_text(encoding="utf-8")


def test_input_txt_may_be_any_text(repo):
    folder = repo / "data/shakespeare_char"
    (folder / "input.txt").write_text("naïve 日本 " * 10, encoding="utf-8")
    done = run(folder / "prepare.py", PYTHONIOENCODING="utf-8")
    assert (done.returncode, done.stderr) == (0, "")
    assert load_meta(folder)["vocab_size"] == len(set("naïve 日本 "))


# ------------------------------------------------------------------------------- Python's library

def test_the_standard_library_has_10_million_characters_96_distinct_and_decodes_to_its_text(repo):
    folder = repo / "data/stdlib_char"
    done = run(folder / "prepare.py", cwd=repo.parent)
    assert (done.returncode, done.stderr) == (0, "")
    meta = load_meta(folder)
    assert meta["vocab_size"] == 96
    train, val = (np.fromfile(folder / name, "<u2") for name in ("train.bin", "val.bin"))
    assert 8e6 < len(train) + len(val) < 13e6
    assert len(train) == int(0.9 * (len(train) + len(val)))
    codes = np.array([ord(meta["itos"][i]) for i in range(96)], dtype=np.uint8)
    text = codes[np.concatenate([train, val])].tobytes().decode("ascii")
    for module in (random, glob, json):
        assert Path(module.__file__).read_text() in text
    assert Path(pytest.__file__).read_text() not in text  # of site-packages
    assert "".join(map(meta["itos"].get, val[:1000].tolist())) == text[len(train):][:1000]


# ---------------------------------------------------------------------- OpenWebText: the functions

def test_documents_of_each_format_are_those_of_the_file(prepare, tmp_path):
    documents = texts(25)
    encode, local = prepare.encode, prepare.local_documents
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(documents), encoding="utf-8")
    for path in (write_jsonl(tmp_path / "a.jsonl", documents),
                 write_parquet(tmp_path / "a.parquet", documents), tmp_path / "a.txt"):
        train, val = encode([(document, False) for document in local(path)])
        assert np.frombuffer(train, "<u2").tolist() == tokens_of(documents), path
        assert val == b""
        assert prepare.measure(path)[0] == 25


@pytest.mark.parametrize("content", [
    "one", "one<|endoftext|>two", "one<|endoftext|>two<|endoftext|>", "\n<|endoftext|>\none\n",
    "one<|endoftext|> \n<|endoftext|>two\n", "<|endo<|endoftext|>ftext|>"])
def test_documents_of_a_text_file_are_between_its_separators(prepare, tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    expected = [part for part in content.split("<|endoftext|>") if part.strip()]
    assert list(prepare.local_documents(tmp_path / "a.txt")) == expected


def test_a_text_file_keeps_its_line_endings(prepare, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n")
    assert list(prepare.local_documents(tmp_path / "a.txt")) == ["one\r\ntwo\rthree\n"]


def test_blank_lines_of_a_jsonl_file_are_no_documents(prepare, tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"text": "one"}\n  \n{"id": 5, "text": ""}')
    train, _ = prepare.encode(
        [(document, False) for document in prepare.local_documents(tmp_path / "a.jsonl")])
    assert np.frombuffer(train, "<u2").tolist() == tokens_of(["one", ""])
    assert prepare.measure(tmp_path / "a.jsonl")[0] == 2


def test_held_out_documents_go_to_val(prepare):
    train, val = prepare.encode([("one", False), ("two", True), ("three", False)])
    assert np.frombuffer(train, "<u2").tolist() == tokens_of(["one", "three"])
    assert np.frombuffer(val, "<u2").tolist() == tokens_of(["two"])


@pytest.mark.parametrize("line", [
    b"{", b"", b"[]", b"[" * 100_000, b"5", b"null", b'"text"', b'{"txt": "a"}', b'{"text": 5}',
    b'{"text": null}', b'{"text": "caf\xe9"}'])
def test_a_line_without_a_document_is_refused_and_shown(prepare, line):
    with pytest.raises(UserError, match="expected a document with a field `text`") as caught:
        prepare.encode([(line, False)])
    assert f"{line!r:.80}" in str(caught.value)


def test_batches_keep_all_documents_in_order_and_mark_the_held_out(prepare, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH_BYTES", 100)
    documents = texts(50)
    found = list(prepare.batches(iter(documents), {3, 40}))
    assert len(found) > 10
    assert sum(found, []) == [(text, i in (3, 40)) for i, text in enumerate(documents)]
    assert all(sum(len(text) for text, _ in batch[:-1]) < 100 for batch in found)


@pytest.mark.parametrize("fraction", [0.0005, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("n", [2, 3, 10, 1999, 2000, 2001, 20_000])
def test_the_held_out_documents_are_those_that_datasets_would_hold_out(prepare, n, fraction):
    if n == 2 and fraction == 0.5 or n * fraction < n - 1:
        assert prepare.choose_held_out(n, fraction, 2357) == held_out_by_datasets(n, fraction, 2357)


def test_of_openwebtext_4007_documents_are_held_out(prepare):
    assert len(prepare.choose_held_out(8_013_769, 0.0005, 2357)) == 4007


# ----------------------------------------------------------------------- OpenWebText: the script

def openwebtext(out: Path, *args: str, **environment: str) -> subprocess.CompletedProcess:
    return run(ROOT / OPENWEBTEXT, f"--out_dir={out}", "--num_proc=1", *args, **environment)


def test_documents_of_all_formats_are_written_in_order_to_one_of_the_two_files(tmp_path):
    documents = texts(9600)  # 2 MB: more than one batch
    (tmp_path / "corpus").mkdir()
    write_jsonl(tmp_path / "corpus/a.jsonl", documents[:4000])
    write_parquet(tmp_path / "corpus/b.parquet", documents[4000:9590])
    (tmp_path / "corpus/c.txt").write_text("<|endoftext|>".join(documents[9590:]), "utf-8")
    done = openwebtext(tmp_path / "out", f"--input={tmp_path}/corpus/*", "--num_proc=2")
    assert done.returncode == 0, done.stderr
    held_out = held_out_by_datasets(9600, 0.0005, 2357)
    assert len(held_out) == 5
    train, val = ([text for i, text in enumerate(documents) if (i in held_out) == is_val]
                  for is_val in (False, True))
    assert read(tmp_path / "out/train.bin") == tokens_of(train)
    assert read(tmp_path / "out/val.bin") == tokens_of(val)
    assert f"train.bin: {len(tokens_of(train)):,} tokens" in done.stdout
    assert "B/s" in done.stdout


def test_without_out_dir_the_files_are_written_to_the_folder_of_the_script(repo):
    write_jsonl(repo / "a.jsonl", ["one", "two", "three"])
    done = run(repo / OPENWEBTEXT, "--input=a.jsonl", "--num_proc=1", cwd=repo)
    assert done.returncode == 0, done.stderr
    folder = repo / "data/openwebtext"
    assert sorted(path.name for path in folder.iterdir()) == ["prepare.py", "train.bin", "val.bin"]
    assert len(read(folder / "train.bin")) == 4


def test_a_name_with_brackets_is_a_file_before_it_is_a_glob(tmp_path):
    path = write_jsonl(tmp_path / "part[1].jsonl", ["one", "two"])
    done = openwebtext(tmp_path / "out", f"--input={path}")
    assert done.returncode == 0, done.stderr


def test_the_vocabulary_of_an_earlier_character_dataset_is_removed(tmp_path):
    (tmp_path / "meta.pkl").write_bytes(b"")
    done = openwebtext(tmp_path, f"--input={write_jsonl(tmp_path / 'a.jsonl', ['one', 'two'])}")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "meta.pkl").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on a file's size")
@pytest.mark.parametrize("patch, error", [
    ("import shutil; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(100, 0, 100)",
     "MB free"),
    ("import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))",
     "cannot write"),
    (f"import sys; sys.path.insert(0, {str(ROOT)!r}); from data import documents as d\n"
     "d.measure = lambda path: (9601, 10**6)", "9,600 documents, not 9,601"),
], ids=["too small a disk", "a disk that fills up", "a source that changes"])
def test_a_run_that_fails_says_why_and_leaves_no_file(tmp_path, patch, error):
    (tmp_path / "sitecustomize.py").write_text(patch)
    path = write_jsonl(tmp_path / "a.jsonl", texts(9600))
    done = openwebtext(tmp_path / "out", f"--input={path}", PYTHONPATH=str(tmp_path))
    assert error in refused(done, tmp_path / "out")
    assert ("encoding" in done.stdout) == (error != "MB free")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------- OpenWebText: interrupted runs

@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """120 MB of JSON lines, which take many seconds."""
    documents = texts(20_000)
    path = write_jsonl(tmp_path_factory.mktemp("large") / "large.jsonl", documents)
    path.write_bytes(path.read_bytes() * (120_000_000 // path.stat().st_size + 1))
    return path


@contextlib.contextmanager
def running(large: Path, out: Path, **environment: str) -> Iterator[subprocess.Popen]:
    """A run that has started to write, in a process group of its own; killed at the end."""
    process = subprocess.Popen(
        [sys.executable, ROOT / OPENWEBTEXT, f"--input={large}", f"--out_dir={out}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | environment,  # a shell's background jobs inherit an ignored SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        written = out / "train.bin.tmp"
        while not written.exists() or written.stat().st_size < 100_000:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def live_processes(group: int) -> list[str]:
    """The commands of the processes of a group that are still running."""
    found = []
    for stat in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, pgrp = Path(stat).read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state != "Z":
                found.append(Path(stat).with_name("cmdline").read_text().replace("\0", " "))
    return found


def test_ctrl_c_leaves_the_earlier_files_and_no_temporary_ones(large, tmp_path):
    for name in ("train.bin", "val.bin"):
        (tmp_path / name).write_bytes(b"old")
    with running(large, tmp_path) as process:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
        process.communicate(timeout=60)
        assert process.returncode != 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.bin", "val.bin"]
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"old"}


@pytest.fixture(scope="module")
def killed(large, tmp_path_factory):
    """The out_dir of a killed run, the bytes in its cache folders, and the surviving workers."""
    folder = tmp_path_factory.mktemp("killed")
    caches = {name: folder / name for name in ("TMPDIR", "HF_HOME", "XDG_CACHE_HOME")}
    for path in (folder / "out", *caches.values()):
        path.mkdir()
    with running(large, folder / "out", **{k: str(v) for k, v in caches.items()}) as process:
        process.kill()
        process.wait()
        until = time.monotonic() + 5
        while (workers := live_processes(process.pid)) and time.monotonic() < until:
            time.sleep(0.02)
    cached = sum(path.stat().st_size for cache in caches.values() for path in cache.rglob("*"))
    return folder / "out", cached, workers


def test_a_run_keeps_nothing_on_disk_but_its_output(killed):
    out, cached, _ = killed
    assert {path.name for path in out.iterdir()} == {"train.bin.tmp", "val.bin.tmp"}
    assert cached < 2**20


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to find processes")
def test_no_worker_survives_a_killed_run(killed):
    assert killed[2] == []


def test_a_run_that_was_killed_can_be_started_again(killed, tmp_path):
    shutil.copytree(killed[0], tmp_path, dirs_exist_ok=True)
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    assert openwebtext(tmp_path, f"--input={path}").returncode == 0
    assert {path.name for path in tmp_path.glob("*.bin*")} == {"train.bin", "val.bin"}
    ids = [read(tmp_path / name) for name in ("train.bin", "val.bin")]
    assert sorted(ids) == sorted([tokens_of(["one"]), tokens_of(["two"])])


# ----------------------------------------------------------------------------- OpenWebText: the hub

def test_without_a_network_the_error_names_all_revisions_that_were_tried(tmp_path):
    error = refused(openwebtext(tmp_path, HF_HUB_OFFLINE="1"), tmp_path)
    for word in ("Skylion007/openwebtext", "main (", "refs/convert/parquet (", "--input="):
        assert word in error


def test_if_main_does_not_load_the_converted_parquet_is_used(prepare, tmp_path, monkeypatch):
    import datasets
    documents = texts(20)
    path = write_parquet(tmp_path / "a.parquet", documents)
    load, tried = datasets.load_dataset, []

    def load_dataset(repository: str, **arguments) -> object:
        tried.append((repository, arguments.pop("revision")))
        if len(tried) == 1:
            raise RuntimeError("Dataset scripts are no longer supported, but found openwebtext.py")
        assert arguments == {"split": "train", "streaming": True}
        return load("parquet", data_files=str(path), cache_dir=tmp_path / "cache", **arguments)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = prepare.hub_dataset("Skylion007/openwebtext")
    assert list(prepare.hub_documents(rows)) == documents
    assert tried == [("Skylion007/openwebtext", "main"),
                     ("Skylion007/openwebtext", "refs/convert/parquet")]


@pytest.mark.parametrize("error", [RuntimeError("no scripts\nmore"), TimeoutError()], ids=repr)
def test_any_error_of_the_hub_is_reported_in_one_line(prepare, monkeypatch, error):
    import datasets

    def load_dataset(*args, **arguments) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError) as caught:
        prepare.hub_dataset("Skylion007/openwebtext")
    name = type(error).__name__
    assert re.search(rf"main \({name}.*refs/convert/parquet \({name}", str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_hub_that_stops_answering_is_reported_in_a_sentence(prepare):
    def rows() -> Iterator[dict]:
        yield {"text": "one"}
        raise ConnectionError("Disconnected")

    documents = prepare.hub_documents(rows())
    assert next(documents) == "one"
    with pytest.raises(UserError, match="stopped answering"):
        next(documents)


def test_the_size_of_parquet_is_that_of_its_text(prepare, tmp_path):
    table = pa.table({"text": ["one two"] * 100, "other": [str(i) * 1000 for i in range(100)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    n_documents, n_bytes = prepare.measure(tmp_path / "a.parquet")
    assert n_documents == 100
    assert n_bytes < 2000
