"""A trained model and its tokenizer as a folder for Hugging Face's libraries."""

import json
import os
import tempfile
from pathlib import Path

from configurator import UserError
from data.tokenizer import END_OF_TEXT, describe_tokenizer, get_tokenizer, tokenizer_name
from model import GPT

GPT2_FILES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"  # those of tiktoken
CARD = """---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A GPT-2 of {parameters:.1f}M parameters, trained with plainGPT.

* Training data: {dataset}
* Tokenizer: {tokenizer}
* Training: {training}
* Command: `{command}`

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
idx = tokenizer({prompt!r}, return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(idx, max_new_tokens={new_tokens}, do_sample=True)[0]))
```
"""


def export_model(folder: Path, model: GPT, meta: dict | None, contents: dict) -> None:
    """Write weights, tokenizer and a model card to a new folder.

    meta: the tokenizer, None for GPT-2's BPE; contents: the model's checkpoint, or empty.
    Raises UserError if the folder has files, ValueError if a GPT-2 cannot express the model.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"export = {str(folder)!r} exists: give a new or an empty folder")
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            new = Path(temporary) / "new"
            model.save_pretrained(new, getattr(get_tokenizer(meta), "end_of_text", None))
            write_tokenizer(new, meta, model.config.block_size)
            (new / "README.md").write_text(model_card(folder, model, meta, contents), "utf-8")
            os.replace(new, folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from None


def write_tokenizer(folder: Path, meta: dict | None, block_size: int) -> None:
    """Write the files from which `AutoTokenizer` makes the tokenizer of meta."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size,
              "clean_up_tokenization_spaces": False}
    kind = tokenizer_name(meta)
    if kind != "char":
        config |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    if kind == "gpt2":
        from tiktoken.load import read_file_cached
        for name, source in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
            (folder / name).write_bytes(read_file_cached(f"{GPT2_FILES}/{source}"))
        config["tokenizer_class"] = "GPT2Tokenizer"
    elif kind == "char":
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
        tokenizer = Tokenizer(models.WordLevel(meta["stoi"], unk_token=""))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        tokenizer.save(str(folder / "tokenizer.json"))
    else:
        (folder / "tokenizer.json").write_text(meta["tokenizer_json"], encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def model_card(folder: Path, model: GPT, meta: dict | None, contents: dict) -> str:
    """README.md: data, steps, loss and command, as far as the checkpoint has them."""
    settings, history = contents.get("config", {}), contents.get("history")
    return CARD.format(
        name=folder.name, parameters=model.get_num_params() / 1e6,
        dataset=settings.get("dataset", "unknown"), tokenizer=describe_tokenizer(meta),
        training=f"{contents['iter_num']:,} steps, validation loss {history[-1]['val_loss']:.4f}"
        if history else "unknown", command=contents.get("command") or "unknown",
        prompt=get_tokenizer(meta).default_prompt,
        new_tokens=min(100, model.config.block_size // 2))
