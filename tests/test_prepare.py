"""The prepare scripts as users run them, and OpenWebText's against tiktoken and `datasets`."""

import contextlib
import glob
import gzip
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tiktoken
from conftest import ROOT, run

from configurator import UserError
from data.documents import (
    find_files,
    hub_dataset,
    hub_documents,
    local_documents,
    pieces,
)
from data.tokenizer import (
    GPT2Tokenizer,
    TrainedTokenizer,
    dataset_record,
    get_tokenizer,
    load_meta,
)

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


def choose_held_out() -> Callable:
    """OpenWebText's choice, from its script."""
    spec = importlib.util.spec_from_file_location("openwebtext_prepare", ROOT / OPENWEBTEXT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.choose_held_out


def write_documents(path: Path, documents: list) -> Path:
    """Write documents in the format of the path's ending."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    elif path.suffix == ".parquet":
        table = pa.table({"id": range(len(documents)), "text": documents})
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    else:
        path.write_text("<|endoftext|>".join(documents), encoding="utf-8")
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


@pytest.mark.parametrize("name", ["shakespeare_char", "shakespeare"])
def test_a_copy_of_a_shakespeare_script_downloads_nothing(repo, name):
    folder = repo / "data/mine"
    shutil.copytree(repo / "data" / name, folder)
    done = run(folder / "prepare.py", "--url=http://127.0.0.1:9/none", NO_PROXY="*")
    assert "data/text/prepare.py" in refused(done, folder)
    assert [path.name for path in folder.iterdir()] == ["prepare.py"]


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


# ------------------------------------------------------------------------------ files to documents

@pytest.mark.parametrize("ending", [".txt", ".md", ".jsonl", ".parquet"])
def test_documents_of_each_format_are_those_of_the_file_compressed_or_not(tmp_path, ending):
    documents = texts(25)
    path = write_documents(tmp_path / f"a{ending}", documents)
    packed = tmp_path / f"a{ending}.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert [document.text() for document in local_documents([path])] == documents
    assert [document.text() for document in local_documents([path, packed])] == 2 * documents


@pytest.mark.parametrize("content", [
    "one", "one<|endoftext|>two", "one<|endoftext|>two<|endoftext|>", "\n<|endoftext|>\none\n",
    "one<|endoftext|> \n<|endoftext|>two\n", "<|endo<|endoftext|>ftext|>", "one\r\ntwo\rthree\n"])
def test_documents_of_a_text_file_are_between_its_separators(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content.encode())
    expected = [part for part in content.split("<|endoftext|>") if part.strip()]
    assert [document.text() for document in local_documents([tmp_path / "a.txt"])] == expected


def test_blank_lines_of_a_jsonl_file_are_no_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"text": "one"}\n  \n{"id": 5, "text": ""}')
    assert [document.text() for document in local_documents([tmp_path / "a.jsonl"])] == ["one", ""]


@pytest.mark.parametrize("line", [
    b"{", b"[]", b"[" * 100_000, b'{"txt": "a"}', b'{"text": null}', b'{"text": "caf\xe9"}'])
def test_a_line_without_a_document_is_shown_with_its_file_and_number(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n\n' + line + b"\n")
    _, document = local_documents([tmp_path / "a.jsonl"])
    with pytest.raises(UserError, match=r"a\.jsonl line 3: expected .* a field `text`") as caught:
        document.text()
    assert f"{line + bytes([10])!r:.80}" in str(caught.value)


def test_a_parquet_row_without_text_is_named(tmp_path):
    path = write_documents(tmp_path / "a.parquet", [*texts(1500), None])
    with pytest.raises(UserError, match=r"a\.parquet row 1501: expected"):
        [document.text() for document in local_documents([path])]


@pytest.mark.parametrize("ending, pack", [(".txt", bytes), (".md.gz", gzip.compress)])
def test_a_text_that_is_not_utf8_is_named_with_the_line(tmp_path, ending, pack):
    (tmp_path / f"a{ending}").write_bytes(pack("naïve\n".encode() * 1000 + b"caf\xe9"))
    with pytest.raises(UserError, match=rf"a{ending} line 1001 is not UTF-8"):
        list(local_documents([tmp_path / f"a{ending}"]))


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "a\ud83dz \ud83d\ude00"}')
    assert next(local_documents([tmp_path / "a.jsonl"])).text() == "a\ufffdz 😀"


def test_files_are_found_by_name_folder_glob_and_commas(tmp_path, monkeypatch):
    for name in ("a.txt", "b.png", "sub/c.md", "sub/deep/d.jsonl.gz", "sub/e[1].txt", ".git/f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    for names, expected in {
            "a.txt": "a.txt", ".": "a.txt sub/c.md sub/deep/d.jsonl.gz sub/e[1].txt",
            "*.txt": "a.txt", "**/*.txt": "a.txt sub/e[1].txt", "sub/e[1].txt": "sub/e[1].txt",
            "sub/deep,a.txt,*.txt": "a.txt sub/deep/d.jsonl.gz"}.items():
        assert [str(path) for path in find_files(names)] == expected.split(), names


@pytest.mark.parametrize("chars, n_min", [("a\n", 99), ("a1 .,\n", 99), ("\n", 1), ("ab ", 1)])
def test_pieces_of_a_text_have_the_ids_of_the_whole(monkeypatch, chars, n_min):
    monkeypatch.setattr("data.documents.PIECE", 10)
    gpt2, text = GPT2Tokenizer(), "".join(random.Random(0).choices(chars, k=9999))
    parts = list(pieces(text))
    assert len(parts) >= n_min
    assert sum(map(gpt2.encode, parts), []) == gpt2.encode(text)


# ------------------------------------------------------------------------------ documents to tokens

@pytest.mark.parametrize("n, fraction", [
    (2, 0.0005), (3, 0.5), (1999, 0.0005), (2001, 0.0005), (20_000, 0.3)])
def test_the_held_out_documents_are_those_that_datasets_would_hold_out(n, fraction):
    assert choose_held_out()(n, fraction, 2357) == held_out_by_datasets(n, fraction, 2357)
    assert len(choose_held_out()(8_013_769, 0.0005, 2357)) == 4007  # OpenWebText


# ----------------------------------------------------------------------- OpenWebText: the script

def openwebtext(out: Path, *args: str, **environment: str) -> subprocess.CompletedProcess:
    return run(ROOT / OPENWEBTEXT, f"--out_dir={out}", "--num_proc=1", *args, **environment)


def test_documents_are_written_in_order_to_one_of_the_two_files_in_the_folder_of_the_script(repo):
    documents = texts(9600)  # 2 MB: more than one batch
    for i in (0, 1):
        write_documents(repo / f"{i}.jsonl", documents[i * 4800:(i + 1) * 4800])
    done = run(repo / OPENWEBTEXT, "--input=*.jsonl", "--num_proc=2", cwd=repo)
    assert done.returncode == 0, done.stderr
    held_out = held_out_by_datasets(9600, 0.0005, 2357)
    assert len(held_out) == 5
    train, val = ([text for i, text in enumerate(documents) if (i in held_out) == is_val]
                  for is_val in (False, True))
    folder = repo / "data/openwebtext"
    assert read(folder / "train.bin") == tokens_of(train)
    assert read(folder / "val.bin") == tokens_of(val)
    assert f"train.bin: {len(tokens_of(train)):,} tokens" in done.stdout
    assert "B/s" in done.stdout
    assert sorted(path.name for path in folder.iterdir()) == [
        "dataset.json", "prepare.py", "train.bin", "val.bin"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on a file's size")
@pytest.mark.parametrize("patch, error", [
    ("import shutil; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(100, 0, 100)",
     "the files take about"),
    ("import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))",
     "cannot write"),
    (f"import sys; sys.path.insert(0, {str(ROOT)!r}); from data import documents as d\n"
     "first, d.local_documents = d.local_documents, lambda paths: ("
     "globals().update(d=d), setattr(d, 'local_documents', first), [*first(paths)] * 2)[2]",
     "9,600 documents, not 19,200"),
], ids=["too small a disk", "a disk that fills up", "a source that changes"])
def test_a_run_that_fails_says_why_and_leaves_no_file(tmp_path, patch, error):
    (tmp_path / "sitecustomize.py").write_text(patch)
    path = write_documents(tmp_path / "a.jsonl", texts(9600))
    done = openwebtext(tmp_path / "out", f"--input={path}", PYTHONPATH=str(tmp_path))
    assert error in refused(done, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------- OpenWebText: interrupted runs

@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """120 MB of JSON lines, which take many seconds."""
    documents = texts(20_000)
    path = write_documents(tmp_path_factory.mktemp("large") / "large.jsonl", documents)
    path.write_bytes(path.read_bytes() * (120_000_000 // path.stat().st_size + 1))
    return path


@contextlib.contextmanager
def running(large: Path, out: Path, **environment: str) -> Iterator[subprocess.Popen]:
    """A run that has started to write, in a process group of its own; killed at the end."""
    process = subprocess.Popen(
        [sys.executable, ROOT / OPENWEBTEXT, f"--input={large}", f"--out_dir={out}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | environment,  # a shell's background jobs inherit an ignored SIGINT
        preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL)
                            for number in (signal.SIGINT, signal.SIGHUP)])
    try:
        while not any(path.stat().st_size > 100_000 for path in out.glob("train.bin.*.tmp")):
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_the_earlier_files_and_no_temporary_ones(large, tmp_path, number):
    for name in ("train.bin", "val.bin"):
        (tmp_path / name).write_bytes(b"old")
    with running(large, tmp_path) as process:
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does: to the workers too
        else:
            process.send_signal(number)
        _, error = process.communicate(timeout=60)
        assert process.returncode in (128 + number, 2)
        assert "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.bin", "val.bin"]
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"old"}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to find processes")
def test_of_a_killed_run_no_worker_and_no_cache_is_left_and_it_can_be_started_again(
        large, tmp_path):
    out = tmp_path / "out"
    caches = {name: tmp_path / name for name in ("TMPDIR", "HF_HOME", "XDG_CACHE_HOME")}
    for path in (out, *caches.values()):
        path.mkdir()
    with running(large, out, **{k: str(v) for k, v in caches.items()}) as process:
        process.kill()
        process.wait()
        until = time.monotonic() + 5
        while live_processes(process.pid):
            assert time.monotonic() < until
            time.sleep(0.02)
    assert {path.name.split(".")[0] for path in out.glob("*.bin.*.tmp")} == {"train", "val"}
    assert len(list(out.iterdir())) == 4  # and dataset.json and the lock
    assert sum(path.stat().st_size for c in caches.values() for path in c.rglob("*")) < 2**20
    path = write_documents(tmp_path / "a.jsonl", ["one", "two"])
    assert openwebtext(out, f"--input={path}").returncode == 0
    assert {path.name for path in out.glob("*.bin*")} == {"train.bin", "val.bin"}
    ids = [read(out / name) for name in ("train.bin", "val.bin")]
    assert sorted(ids) == sorted([tokens_of(["one"]), tokens_of(["two"])])


# ----------------------------------------------------------------------------- OpenWebText: the hub

def test_without_a_network_the_error_names_all_revisions_that_were_tried(tmp_path):
    error = refused(openwebtext(tmp_path, HF_HUB_OFFLINE="1"), tmp_path)
    for word in ("Skylion007/openwebtext", "main (", "refs/convert/parquet (", "--input="):
        assert word in error


def test_if_main_does_not_load_the_converted_parquet_is_used(tmp_path, monkeypatch):
    import datasets
    documents = texts(20)
    path = write_documents(tmp_path / "a.parquet", documents)
    load, tried = datasets.load_dataset, []

    def load_dataset(repository: str, **arguments) -> object:
        tried.append((repository, arguments.pop("revision")))
        if len(tried) == 1:
            raise RuntimeError("Dataset scripts are no longer supported, but found openwebtext.py")
        assert arguments == {"split": "train", "streaming": True}
        return load("parquet", data_files=str(path), cache_dir=tmp_path / "cache", **arguments)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = hub_dataset("Skylion007/openwebtext")
    assert [document.text() for document in hub_documents(rows)] == documents
    assert tried == [("Skylion007/openwebtext", "main"),
                     ("Skylion007/openwebtext", "refs/convert/parquet")]


def test_a_hub_that_stops_answering_is_reported_in_a_sentence():
    def rows() -> Iterator[dict]:
        yield {"text": "one"}
        raise ConnectionError("Disconnected")

    documents = hub_documents(rows())
    assert next(documents).text() == "one"
    with pytest.raises(UserError, match="stopped answering"):
        next(documents)


# ------------------------------------------------------------------------------------- data/text

def prepared(repo: Path, *args: str, stdin: str = "") -> tuple[list[int], list[int], str]:
    """The ids in data/mine/train.bin and val.bin, and what the script printed."""
    done = subprocess.run([sys.executable, "data/text/prepare.py", "--name=mine", *args], cwd=repo,
                          input=stdin.encode(), capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    train, val = (read(repo / f"data/mine/{split}.bin") for split in ("train", "val"))
    return train, val, done.stdout.decode()


EACH_TOKENIZER = pytest.mark.parametrize("tokenizer", ["char", "gpt2", "bpe:300"])


@EACH_TOKENIZER
def test_a_mixed_folder_is_split_by_document(repo, tokenizer):
    documents, parts = texts(60), {}  # a tenth would be less than a block
    (repo / "corpus/sub").mkdir(parents=True)
    for i, name in enumerate(["a.txt", "sub/b.md", "sub/c.jsonl", "sub/d.parquet"]):
        path = write_documents(repo / "corpus" / name, documents[i::4])
        parts[path] = documents[i::4]
    (repo / "corpus/image.png").write_bytes(b"\xff")
    train, val, printed = prepared(repo, "--input=corpus", f"--tokenizer={tokenizer}")
    meta = load_meta(repo / "data/mine")
    encoder = get_tokenizer(meta)
    in_order = [text for path in sorted(parts) for text in parts[path]]
    held_out = [text for text in in_order if text in encoder.decode(val)]
    for ids, expected in ((val, held_out), (train, [t for t in in_order if t not in held_out])):
        assert ids == [i for text in expected for i in encoder.encode_document(text).tolist()]
    assert len(val) >= max(1025, 0.01 * (len(train) + len(val)))
    n_bytes = sum(len(text.encode()) for text in documents)
    assert f"60 documents, {n_bytes:,} bytes of text" in printed
    assert f"train.bin: {len(train):,} tokens" in printed
    config = "fast_shakespeare_char_cpu" if tokenizer == "char" else "train_text_cpu"
    assert printed.endswith(
        f"python train.py config/{config}.py --dataset=mine --out_dir=out-mine\n")
    counts = dataset_record(repo / "data/mine")
    assert counts["val_bytes"] == sum(len(text.encode()) for text in held_out)
    assert json.loads((repo / "data/mine/dataset.json").read_text()) == {
        "tokenizer": tokenizer.partition(":")[0], "train_tokens": len(train),
        "val_tokens": len(val), "val_bytes": counts["val_bytes"],
        "train_bytes": n_bytes - counts["val_bytes"]}


@EACH_TOKENIZER
def test_one_text_is_split_by_position_and_decodes_to_itself(repo, tokenizer):
    text = "".join(f"{line}\n" for line in texts(12_000))  # encoded by processes, in pieces
    (repo / "book.md").write_text(text)
    train, val, _ = prepared(repo, "--input=book.md", f"--tokenizer={tokenizer}")
    encoder = get_tokenizer(load_meta(repo / "data/mine"))
    assert encoder.decode(train) + encoder.decode(val) == text
    assert dataset_record(repo / "data/mine")["val_bytes"] == pytest.approx(100_000, abs=4)
    before = [train, val]
    for args in (["--input=-"], ["--input=bo*.md"]):
        found = prepared(repo, f"--tokenizer={tokenizer}", *args, stdin=text)
        assert list(found[:2]) == before


def test_of_few_long_documents_the_end_of_the_longest_a_tenth_of_all_is_held_out(repo):
    documents = ["one " * 20_000, "two " * 30_000, "three"]
    write_documents(repo / "a.jsonl", documents)
    train, val, _ = prepared(repo, "--input=a.jsonl")
    encoder = get_tokenizer(load_meta(repo / "data/mine"))
    assert encoder.decode(val) == documents[1][-20_000:] + "\n"
    assert encoder.decode(train) == f"{documents[0]}\n{documents[1][:-20_000]}\nthree\n"


def test_of_a_short_text_half_is_held_out_and_the_next_command_has_a_shorter_block(repo):
    train, val, printed = prepared(repo, "--input=-", stdin="word " * 20)
    assert (len(train), len(val)) == (50, 50)
    assert "the text is short: val.bin, at most half of it, has less than a block" in printed
    assert printed.endswith("--out_dir=out-mine --block_size=49\n")


@pytest.mark.parametrize("text, name", [
    ("".join(map(chr, range(0x4e00, 0x4e00 + 498))), "char"),  # with the newline, 499 characters
    ("".join(map(chr, range(0x4e00, 0x4e00 + 499))), "gpt2"),
    ("x " * 1000, "char"), ("x " * 1000 + ".", "gpt2")])
def test_characters_are_the_default_up_to_a_size_and_a_number_of_them(repo, text, name):
    script = repo / "data/text/prepare.py"
    source = script.read_text()
    assert "CHAR_BYTES, CHARS = 20_000_000, 500" in source
    script.write_text(source.replace("20_000_000", "2_000"))
    prepared(repo, "--input=-", stdin=text)
    assert json.loads((repo / "data/mine/dataset.json").read_text())["tokenizer"] == name


def test_the_files_of_an_earlier_tokenizer_are_removed(repo):
    for tokenizer, expected in (("char", {"meta.pkl"}), ("bpe:260", {"tokenizer.json"}),
                                ("gpt2", set()), ("bpe:260", {"tokenizer.json"})):
        prepared(repo, "--input=-", f"--tokenizer={tokenizer}", stdin="some words " * 99)
        assert {path.name for path in (repo / "data/mine").iterdir()} == {
            "train.bin", "val.bin", "dataset.json", *expected}
    assert isinstance(get_tokenizer(load_meta(repo / "data/mine")), TrainedTokenizer)


@pytest.mark.parametrize("args, words", [
    (["--input=none"], ["--input=none", ".jsonl", "a folder"]),
    (["--input=cut.jsonl.gz"], ["cannot read cut.jsonl.gz"]),
    (["--input=-"], ["holds 0 bytes of text"]),
    (["--input=a.txt", "--name=.."], ["'..'", "a plain name", "--name=mybook"]),
    (["--input=a.txt", "--name=shakespeare"], ["'shakespeare'", "another name"]),
    (["--input=a.txt", "--name=bins.py"], ["bins.py", "File exists", "check the path"]),
    *((["--input=a.txt", f"--tokenizer={name}"], [f"'{name}'", "char, gpt2, or bpe:N"])
      for name in ("bpe:256", "bpe:70000", "bpe", "char:5")),
], ids=lambda value: " ".join(value) if value[0].startswith("--") else "")
def test_a_wrong_use_ends_in_one_sentence_and_writes_nothing(repo, args, words):
    (repo / "a.txt").write_text("some words " * 99)
    (repo / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n' * 99)[:-9])
    before = set(repo.rglob("*"))
    done = run("data/text/prepare.py", "--name=mine", *args, cwd=repo, PYTHONDONTWRITEBYTECODE="1")
    error = refused(done, repo)
    for word in words:
        assert word in error
    assert set(repo.rglob("*")) == before
