"""Models and tokenizers as folders for Hugging Face's libraries, read there and here."""

from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, run, train

from configurator import UserError
from data.tokenizer import CharTokenizer, TrainedTokenizer, get_tokenizer
from engine.export import export_model
from model import GPT, GPTConfig

TEXT = "To be, or don't  be:\n\nthat is é 😀 日本\n"
METAS = {"char": CharTokenizer.meta_of(TEXT), "bpe": TrainedTokenizer.train([TEXT * 9], 300),
         "gpt2": None}


def make_model(vocab_size: int, **settings: object) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=vocab_size, n_layer=2, n_head=2, n_embd=32,
                          **settings)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)  # far from zero, biases too
    return model


@pytest.mark.parametrize("kind", METAS)
def test_the_tokenizer_of_an_exported_folder_gives_the_same_ids_and_text(tmp_path, kind):
    ours = get_tokenizer(METAS[kind])
    export_model(tmp_path / "hf", make_model(ours.n_vocab), METAS[kind], {})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = theirs(TEXT).input_ids
    assert ids == ours.encode(TEXT)
    assert theirs.decode(ids) == TEXT
    if kind != "char":
        assert theirs.eos_token_id == ours.encode("<|endoftext|>")[0]


@pytest.mark.parametrize("settings", [
    {}, {"bias": False}, {"activation": "gelu"}, {"activation": "relu"},
    {"bias": False, "activation": "relu2", "tie_weights": False}])
def test_transformers_and_our_reader_compute_what_was_exported(tmp_path, settings):
    model = make_model(97, **settings)
    model.save_pretrained(tmp_path)
    idx = torch.randint(97, (2, 10))
    logits, _ = model(idx, idx)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(theirs(idx).logits, logits, rtol=1e-4, atol=1e-4)
    greedy = theirs.generate(idx, max_new_tokens=20, do_sample=False,
                             attention_mask=torch.ones_like(idx), pad_token_id=0)
    assert torch.equal(model.generate(idx, 20, temperature=0), greedy)
    assert torch.equal(GPT.from_pretrained(str(tmp_path)).eval()(idx, idx)[0], logits)


@pytest.mark.parametrize("settings", [
    {"positions": "rotary"}, {"qk_norm": True}, {"smear": True}, {"bigram": True}])
def test_what_a_gpt2_does_not_have_is_refused_by_name_and_nothing_is_written(tmp_path, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        export_model(tmp_path / "hf", make_model(97, **settings), None, {})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_files_is_not_overwritten(tmp_path):
    (tmp_path / "precious").write_text("")
    with pytest.raises(UserError, match="new or an empty folder"):
        export_model(tmp_path, make_model(97), None, {})
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_trained_run_is_exported_with_a_card_of_its_data_loss_and_command(text_dataset, tmp_path):
    train(f"--dataset={text_dataset}", f"--out_dir={tmp_path / 'run'}", "--max_iters=3")
    folder = tmp_path / "hf"
    done = run(ROOT / "sample.py", f"--out_dir={tmp_path / 'run'}", f"--export={folder}")
    assert done.returncode == 0, done.stderr
    card = Path(folder / "README.md").read_text(encoding="utf-8")
    assert "3 steps, validation loss" in card and "train.py" in card and "--max_iters=3" in card
    code = card.partition("```python\n")[2].partition("```")[0].replace('"hf"', f'"{folder}"')
    exec(code, {})  # the lines in the card
