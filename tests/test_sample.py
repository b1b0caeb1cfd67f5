"""sample.py as users run it: prompts, streaming, stop tokens, and which weights it loads."""

from pathlib import Path

import pytest
import tiktoken
import torch
import transformers
from conftest import script

from data.tokenizer import CharTokenizer
from engine.checkpoint import save
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
        save(folder / name, {"model": gpt.state_dict(), "model_args": gpt.config.to_model_args(),
                             "meta": META, "iter_num": 1, "best_val_loss": 1.0, "config": {}})
    return folder


def sample(*args: str) -> str:
    """What sample.py prints after its line about the device."""
    done = script("sample.py", "--device=cpu", "--dtype=float32", *args)
    return done.stdout.partition("process\n")[2]


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


def test_a_sample_ends_with_the_stop_token(out):
    texts = sample(f"--out_dir={out}", f"--start={PROMPT}", "--stop=o", "--num_samples=3",
                   "--max_new_tokens=40", "--seed=7")
    rows = [text.removeprefix(PROMPT) for text in texts.split("\n---------------\n")[:3]]
    free = [text.removeprefix(PROMPT)
            for text in expected("best.pt", 3, 7, top_k=200, temperature=0.8)]
    assert rows == [row[:row.find("o") + 1] or row for row in free]  # without an o: all of it
    assert any(len(row) < 40 for row in rows)


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
