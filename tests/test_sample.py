"""sample.py as users run it: prompts, streaming, stop texts, sessions, the weights it loads."""

import fcntl
import os
import select
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import tiktoken
import torch
import transformers
from conftest import ROOT, run, script

from data.tokenizer import CharTokenizer
from engine.saving import write
from model import GPT, GPTConfig

META = CharTokenizer.meta_of("to be, or not to be: that is the question.\n")
PROMPT = "to be, or not to be: that is"  # longer than a context of 16
SEEDS = {"best.pt": 5, "ckpt.pt": 6}


def random_model(name: str) -> GPT:
    """The model that a checkpoint of `out` holds."""
    torch.manual_seed(SEEDS[name])
    gpt = GPT(GPTConfig(block_size=16, vocab_size=META["vocab_size"], n_layer=2, n_head=2,
                        n_embd=16))
    for p in gpt.parameters():
        p.data.normal_(std=0.3)
    return gpt.eval()


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """The out_dir of a run."""
    folder = tmp_path_factory.mktemp("out")
    for name in SEEDS:
        gpt = random_model(name)
        write(folder / name, {"model": gpt.state_dict(), "model_args": gpt.config.to_model_args(),
                              "meta": META, "iter_num": 1, "best_val_loss": 1.0, "config": {}})
    return folder


def sample(*args: str) -> str:
    """What sample.py prints to stdout: the text alone."""
    return script("sample.py", "--device=cpu", "--dtype=float32", *args).stdout


def expected(name: str, num_samples: int, seed: int, **options) -> list[str]:
    """Continuations of PROMPT by a random model, sampled in this process."""
    gpt, tokenizer = random_model(name), CharTokenizer(META)
    idx = torch.tensor([tokenizer.encode(PROMPT)] * num_samples)
    torch.manual_seed(seed)
    return [tokenizer.decode(row) for row in gpt.generate(idx, 40, **options).tolist()]


def test_samples_are_those_of_generate_with_the_checkpoint_the_seed_and_the_options(out):
    texts = sample(f"--out_dir={out}", "--checkpoint=ckpt.pt", f"--start={PROMPT}",
                   "--num_samples=3", "--max_new_tokens=40", "--seed=7", "--top_k=5",
                   "--temperature=1.3", "--top_p=0.9", "--repetition_penalty=1.1")
    assert texts.split("\n---------------\n") == [*expected(
        "ckpt.pt", 3, 7, top_k=5, temperature=1.3, top_p=0.9, repetition_penalty=1.1), ""]


def test_a_single_sample_of_a_prompt_from_a_file_streams_the_same_text_by_best_pt(out, tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    text = sample(f"--out_dir={out}", "--num_samples=1", "--max_new_tokens=40",
                  f"--start=FILE:{tmp_path / 'prompt.txt'}")
    row, = expected("best.pt", 1, 1337, top_k=200, temperature=0.8)
    assert text == row + "\n"


@pytest.mark.parametrize("num_samples", [1, 3])
def test_a_sample_ends_with_the_stop_text_of_any_number_of_tokens(out, num_samples):
    free = [text.removeprefix(PROMPT)
            for text in expected("best.pt", num_samples, 7, top_k=200, temperature=0.8)]
    stop = free[0][9:12]
    texts = sample(f"--out_dir={out}", f"--start={PROMPT}", f"--stop={stop}",
                   f"--num_samples={num_samples}", "--max_new_tokens=40", "--seed=7")
    rows = [text.removeprefix(PROMPT).removesuffix("\n")
            for text in texts.split("\n---------------\n")[:num_samples]]
    assert rows == [row.partition(stop)[0] + stop * (stop in row) for row in free]
    assert len(rows[0]) <= 12


def test_a_prompt_comes_through_a_pipe_and_the_speed_goes_to_stderr(out):
    done = subprocess.run([sys.executable, ROOT / "sample.py", f"--out_dir={out}", "--start=-",
                           "--num_samples=1", "--max_new_tokens=5"],
                          input=PROMPT, text=True, capture_output=True)
    assert done.stdout.startswith(PROMPT) and len(done.stdout) == len(PROMPT) + 5 + 1
    assert "running on cpu" in done.stderr and "tokens per second" in done.stderr


def test_a_session_in_a_terminal_continues_prompts_changes_settings_and_outlives_ctrl_c(out):
    def enter_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # makes it send Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it

    terminal, its_end = os.openpty()
    process = subprocess.Popen(
        [sys.executable, ROOT / "sample.py", f"--out_dir={out}", "--interactive=True",
         "--max_new_tokens=1000000"], stdin=its_end, stdout=its_end, stderr=its_end,
        start_new_session=True, preexec_fn=enter_terminal,
        env=os.environ | {"TERM": "dumb"})
    os.close(its_end)

    shown = ""

    def wait_for(text: str) -> None:
        """Read up to a text."""
        nonlocal shown
        while text not in shown:
            assert select.select([terminal], [], [], 60)[0], shown
            shown += os.read(terminal, 4096).decode()
        shown = shown.partition(text)[2]

    def answer(line: bytes, *texts: str) -> None:
        wait_for("> ")
        os.write(terminal, line)
        for text in texts:
            wait_for(text)

    try:
        answer(b"to be\n", "to be", "e")  # a text without an end
        os.write(terminal, b"\x03")  # Ctrl-C
        answer(b"/max_new_tokens 5\n", "settings: max_new_tokens=5")
        answer(b"/temperature -1\n", "expected temperature >= 0")
        answer(b"/tempature 1\n", "did you mean temperature?")
        answer(b"/help\n", "/temperature 0.8", "/stop None")
        answer(b"is it #?\n", "'#'")
        answer(b"that is\n", "tokens per second")
        answer(b"\x04")  # Ctrl-D
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(terminal)


def test_without_a_checkpoint_the_runs_that_are_here_are_named(out, tmp_path):
    (tmp_path / "out-mine").symlink_to(out)
    done = run(ROOT / "sample.py", "--out_dir=out-mien", cwd=tmp_path)
    assert done.returncode == 2
    assert "did you mean out-mine?" in done.stderr and "runs here: out-mine" in done.stderr


def test_a_local_gpt2_continues_greedily_as_in_transformers(tmp_path):
    torch.manual_seed(6)
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_positions=32, vocab_size=50257, n_layer=1, n_head=1, n_embd=8, initializer_range=0.3))
    hf.save_pretrained(tmp_path)
    bpe = tiktoken.get_encoding("gpt2")
    row, = hf.eval().generate(torch.tensor([bpe.encode("Once upon a time")]), do_sample=False,
                              max_new_tokens=10).tolist()
    texts = sample(f"--init_from={tmp_path}", "--start=Once upon a time", "--num_samples=2",
                   "--max_new_tokens=10", "--temperature=0")
    assert texts.split("\n---------------\n") == [bpe.decode(row)] * 2 + [""]
