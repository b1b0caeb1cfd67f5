"""sample.py as users run it: prompts, streaming, stop tokens, and which weights it loads."""

from pathlib import Path

import pytest
import tiktoken
import torch
import transformers
from conftest import ROOT, run

from data.tokenizer import CharTokenizer
from engine.checkpoint import save
from model import GPT, GPTConfig

TEXT = "to be, or not to be: that is the question.\n"
META = CharTokenizer.meta_of(TEXT)
PROMPT = "to be, or not to be: that is"  # longer than a context of 16


def random_model() -> GPT:
    torch.manual_seed(5)
    gpt = GPT(GPTConfig(block_size=16, vocab_size=META["vocab_size"], n_layer=2, n_head=2,
                        n_embd=16))
    for p in gpt.parameters():
        p.data.normal_(std=0.3)
    return gpt.eval()


def model_that_repeats(char: str) -> GPT:
    """A model whose most likely next character is always `char`."""
    gpt = GPT(GPTConfig(block_size=16, vocab_size=META["vocab_size"], n_layer=1, n_head=1,
                        n_embd=4))
    for p in gpt.parameters():
        p.data.zero_()
    gpt.transformer.ln_f.bias.data[0] = 1
    gpt.lm_head.weight.data[META["stoi"][char], 0] = 100
    return gpt


def save_run(path: Path, gpt: GPT) -> None:
    save(path, {"model": gpt.state_dict(), "model_args": gpt.config.to_model_args(), "meta": META,
                "iter_num": 1, "best_val_loss": 1.0, "config": {}})


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """A run whose ckpt.pt is the random model, and whose best.pt repeats "q"."""
    folder = tmp_path_factory.mktemp("out")
    save_run(folder / "ckpt.pt", random_model())
    save_run(folder / "best.pt", model_that_repeats("q"))
    return folder


def sample(*args: str | Path) -> str:
    """What sample.py prints after its line about the device."""
    done = run(ROOT / "sample.py", "--device=cpu", "--dtype=float32", *args)
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("process\n")[2]


def expected(num_samples: int, seed: int, **options) -> list[str]:
    """Continuations of PROMPT by the random model, sampled in this process."""
    gpt, tokenizer = random_model(), CharTokenizer(META)
    idx = torch.tensor([tokenizer.encode(PROMPT)] * num_samples)
    torch.manual_seed(seed)
    rows = gpt.generate(idx, 40, **options).tolist()
    return [tokenizer.decode(row) for row in rows]


def test_samples_are_those_of_generate_with_the_seed_and_the_options(out):
    texts = sample(f"--out_dir={out}", "--checkpoint=ckpt.pt", f"--start={PROMPT}",
                   "--num_samples=3", "--max_new_tokens=40", "--seed=7", "--top_k=5",
                   "--temperature=1.3", "--top_p=0.9", "--repetition_penalty=1.1")
    assert texts.split("\n---------------\n") == [
        *expected(3, 7, top_k=5, temperature=1.3, top_p=0.9, repetition_penalty=1.1), ""]


def test_a_single_sample_of_a_prompt_from_a_file_streams_the_same_text_as_a_batch(out, tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    text = sample(f"--out_dir={out}", "--checkpoint=ckpt.pt", "--num_samples=1",
                  f"--start=FILE:{tmp_path / 'prompt.txt'}", "--max_new_tokens=40")
    row, = expected(1, 1337, top_k=200, temperature=0.8)
    assert text == row + "\n"


def test_a_sample_ends_with_the_stop_token(out):
    texts = sample(f"--out_dir={out}", "--checkpoint=ckpt.pt", f"--start={PROMPT}", "--stop=o",
                   "--num_samples=3", "--max_new_tokens=40", "--seed=7")
    rows = [text.removeprefix(PROMPT) for text in texts.split("\n---------------\n")[:3]]
    free = [text.removeprefix(PROMPT) for text in expected(3, 7, top_k=200, temperature=0.8)]
    assert rows == [row[:row.find("o") + 1] or row for row in free]  # without an o: all of it
    assert any(len(row) < 40 for row in rows)


def test_best_pt_is_preferred(out):
    text = sample(f"--out_dir={out}", "--start=t", "--num_samples=1", "--max_new_tokens=6")
    assert text == "t" + 6 * "q" + "\n"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    """A GPT-2 of 50,257 tokens and random weights, saved by transformers."""
    torch.manual_seed(6)
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_positions=32, vocab_size=50257, n_layer=1, n_head=1, n_embd=8))
    for p in hf.parameters():
        p.data.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("gpt2")
    hf.save_pretrained(folder)
    return folder


def test_a_local_gpt2_continues_greedily_as_in_transformers(gpt2):
    texts = sample(f"--init_from={gpt2}", "--start=Once upon a time", "--num_samples=2",
                   "--max_new_tokens=10", "--temperature=0")
    bpe = tiktoken.get_encoding("gpt2")
    hf = transformers.GPT2LMHeadModel.from_pretrained(gpt2).eval()
    ids = bpe.encode("Once upon a time")
    for _ in range(10):
        with torch.no_grad():
            ids.append(hf(torch.tensor([ids])).logits[0, -1].argmax().item())
    assert texts.split("\n---------------\n") == [bpe.decode(ids)] * 2 + [""]
