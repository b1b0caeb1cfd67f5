"""Weights from files: GPT-2's, in Hugging Face's format, and whether any fit a model."""

import json
import os
from pathlib import Path

import torch

PRETRAINED = {  # short names, and where the Hugging Face hub keeps them
    "gpt2": "openai-community/gpt2",  # 124M parameters
    "gpt2-medium": "openai-community/gpt2-medium",  # 350M
    "gpt2-large": "openai-community/gpt2-large",  # 774M
    "gpt2-xl": "openai-community/gpt2-xl",  # 1558M
    "distilgpt2": "distilbert/distilgpt2",  # 82M
}


def _folder(name_or_path: str) -> Path:
    """The local folder itself, or one downloaded from the Hugging Face hub (and kept there)."""
    if os.path.isdir(name_or_path):
        return Path(name_or_path)
    from huggingface_hub import snapshot_download
    repo = PRETRAINED.get(name_or_path, name_or_path)
    for weights in ("model*.safetensors", "pytorch_model*.bin"):
        try:
            folder = Path(snapshot_download(repo, allow_patterns=["config.json", weights]))
        except Exception as error:  # no such name or repository, no network: each has its class
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"{name_or_path!r} is not a folder here, and {repo} did not come from "
                             f"the Hugging Face hub ({reason})") from None
        if any(folder.glob(weights)):
            break
    return folder


def checked_weights(state: dict[str, torch.Tensor], own: dict[str, torch.Tensor], tied: bool,
                    source: object) -> dict[str, torch.Tensor]:
    """The tensors of `state` for a model whose own are `own`.

    tied: whether the head's weights are the token embeddings; they may then be left out.
    Raises ValueError naming the missing, unknown, misshapen and broken tensors of `source`.
    """
    state = {name: tensor for name, tensor in state.items()  # without stored causal masks
             if not name.endswith((".attn.bias", ".attn.masked_bias"))}
    if tied and "lm_head.weight" not in state and "transformer.wte.weight" in state:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    wrong = [f"{name} is missing" for name in own.keys() - state.keys()]
    wrong += [f"{name} is unknown" for name in state.keys() - own.keys()]
    shapes = {name: tuple(tensor.shape) if isinstance(tensor, torch.Tensor)
              else type(tensor).__name__ for name, tensor in state.items()}
    wrong += [f"{name} is {shapes[name]}, not {tuple(own[name].shape)}"
              for name in own.keys() & state.keys() if shapes[name] != tuple(own[name].shape)]
    if not wrong:
        wrong = [f"{name} holds numbers that are not finite"
                 for name, tensor in state.items() if not tensor.isfinite().all()]
    if not wrong and tied and not torch.equal(state["lm_head.weight"],
                                              state["transformer.wte.weight"]):
        wrong = ["lm_head.weight differs from transformer.wte.weight (this model ties them)"]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{source} does not fit the model: {'; '.join(sorted(wrong)[:3])}"
                         f"{more}; give a file of such a model")
    return state


def read_pretrained(name_or_path: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """The shape of a pretrained GPT-2, as arguments of GPTConfig, and its weights by our names.

    name_or_path: as in `GPT.from_pretrained`, whose errors these are.
    """
    hf, tensors = _read_files(_folder(name_or_path))
    sizes = {"block_size": "n_positions", "vocab_size": "vocab_size", "n_layer": "n_layer",
             "n_head": "n_head", "n_embd": "n_embd"}
    activations = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
                   "gelu": "gelu", "relu": "relu"}
    unsupported = {key: hf.get(key) for key in sizes.values() if type(hf.get(key)) is not int}
    unsupported |= {key: hf[key] for key, usual in (
        ("model_type", ["gpt2"]), ("n_inner", [None, 4 * (hf.get("n_embd") or 0)]),
        ("layer_norm_epsilon", [1e-5]), ("scale_attn_weights", [True]),
        ("scale_attn_by_inverse_layer_idx", [False]), ("tie_word_embeddings", [True]),
        ("activation_function", list(activations))) if key in hf and hf[key] not in usual}
    if unsupported:
        raise ValueError(f"{name_or_path} is not a GPT-2 of this form: its config.json has "
                         + ", ".join(f"{k} = {v!r}" for k, v in unsupported.items()))
    shape = {ours: hf[theirs] for ours, theirs in sizes.items()}
    shape |= {"activation": activations[hf.get("activation_function", "gelu_new")]}
    state = {}
    for name, tensor in tensors.items():
        if name.endswith(("attn.c_attn.weight", "c_proj.weight", "mlp.c_fc.weight")):
            tensor = tensor.t()  # Conv1D keeps (in, out), Linear (out, in)
        if not name.startswith(("transformer.", "lm_head.")):
            name = f"transformer.{name}"
        state[name] = tensor
    return shape, state


def _read_files(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """config.json as a dict, and every tensor of the weights, whole or in shards, by its name."""
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    path = folder / "config.json"
    if not files or not path.is_file():
        raise ValueError(f"{folder} is no pretrained model: expected config.json, and "
                         f"model.safetensors or pytorch_model.bin, whole or in shards")
    state = {}
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
        for path in files:
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file
                state |= load_file(path)
            else:
                state |= torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except ModuleNotFoundError:
        raise
    except MemoryError:
        raise
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # each reader has its own
        raise ValueError(f"cannot read {path} ({type(error).__name__}): it is damaged, or holds "
                         f"more than plain data") from None
    return config, state
