"""What is saved of a run, how it survives a crash, and how it is read again.

A checkpoint is one file, a dict: model, optimizer, scaler (state dicts), model_args (GPTConfig),
config (the settings), iter_num (steps done), best_val_loss, history (all evaluations), meta (the
tokenizer's vocabulary; None for GPT-2's), seconds (of training so far). Files with only model,
model_args and config, as other minimal GPT trainers write them, are read too.
"""

from dataclasses import asdict
from pathlib import Path

import torch

from configurator import UserError, announce, choose
from data.bins import dataset_folder, written_whole
from data.tokenizer import check_meta, load_meta
from model import GPT, PRETRAINED, GPTConfig

NEWEST, BEST = "ckpt.pt", "best.pt"
GPT2_IDS = 50257  # a vocabulary of fewer is not GPT-2's
NOT_RESTORED = ("init_from", "out_dir", "eval_only")  # settings of a start, not of a run


def save(path: Path, contents: dict) -> None:
    """Write a checkpoint whole or not at all. Raises UserError if the disk refuses."""
    with written_whole(path) as file:
        try:
            torch.save(contents, file)
        except RuntimeError as error:  # torch's own, on top of the disk's
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def load(path: Path, mmap: bool = False) -> dict:
    """Read a checkpoint onto the CPU, running none of it; with mmap, tensors only when touched.

    Raises UserError if it cannot be read or is no checkpoint.
    """
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}: train first, or give another path") from None
    except Exception as error:  # torch raises nearly anything for a file that is not whole
        raise UserError(f"cannot read checkpoint {path} ({type(error).__name__}): it is damaged, "
                        f"no checkpoint, or holds more than plain data") from None
    missing = {"model", "model_args"} - (contents.keys() if isinstance(contents, dict) else set())
    if missing:
        raise UserError(f"{path} is no checkpoint: it lacks {', '.join(sorted(missing))}")
    if not all(isinstance(contents[name], dict) for name in ("model", "model_args")):
        raise UserError(f"{path} is no checkpoint: its model or model_args is no dict")
    if contents.get("meta"):
        check_meta(contents["meta"], path)
    return {"iter_num": 0, **contents, "path": path}


def newest(out_dir: str) -> dict | None:
    """The checkpoint of a run with the most steps done; None where there is none."""
    paths = [path for name in (NEWEST, BEST) if (path := Path(out_dir) / name).exists()]
    if not paths:
        return None
    return load(max(paths, key=lambda path: load(path, mmap=True)["iter_num"]))


def path_to_sample(out_dir: str) -> Path:
    """The checkpoint to sample from: of the lowest validation loss if there is one."""
    best = Path(out_dir) / BEST
    return best if best.exists() else Path(out_dir) / NEWEST


def config_of(contents: dict) -> GPTConfig:
    """The shape of a checkpoint's model. Raises UserError if it names none that can be."""
    # Checkpoints that do not name their activation come from trainers that use the exact GELU.
    try:
        return GPTConfig(**{"activation": "gelu", **contents["model_args"]})
    except (TypeError, ValueError) as error:
        raise UserError(f"{contents['path']}: {error}") from None


def build_model(contents: dict, dropout: float | None = None) -> GPT:
    """The model of a checkpoint, with its own dropout or another.

    Raises UserError if the checkpoint's parts do not fit each other.
    """
    config = config_of(contents)
    if dropout is not None:
        config.dropout = dropout
    state = {name.removeprefix("_orig_mod."): tensor for name, tensor in contents["model"].items()}
    model = GPT(config)
    try:
        model.load_weights(state, source=contents["path"])
    except ValueError as error:
        raise UserError(str(error)) from None
    return model


def meta_of(contents: dict) -> dict | None:
    """A checkpoint's vocabulary; where another trainer saved none, that of its dataset."""
    if "meta" in contents:
        return contents["meta"]
    dataset = contents.get("config", {}).get("dataset")
    meta = load_meta(dataset_folder(dataset)) if dataset else None
    if meta is None and contents["model_args"]["vocab_size"] < GPT2_IDS:
        raise UserError(f"{contents['path']} names no vocabulary, and its dataset {dataset!r} is "
                        f"not here: prepare that first")
    return meta


def load_pretrained(name_or_path: str, dropout: float = 0.0) -> tuple[GPT, dict | None]:
    """A trained model to start from, and its tokenizer's meta (None for GPT-2's).

    name_or_path: a checkpoint file, the out_dir of a run, or what `GPT.from_pretrained` takes.
    Raises UserError or ValueError if there is no such model.
    """
    path = Path(name_or_path)
    if path.is_dir() and path_to_sample(name_or_path).exists():
        path = path_to_sample(name_or_path)
    if path.is_file():
        contents = load(path)
        return build_model(contents, dropout), meta_of(contents)
    if path.suffix == ".pt" or (not path.is_dir() and name_or_path not in PRETRAINED
                                and "/" not in name_or_path):
        choose("init_from", name_or_path, ["scratch", "resume", "auto", *PRETRAINED, "a checkpoint",
                                           "a folder", "owner/name on the Hugging Face hub"])
    return GPT.from_pretrained(name_or_path, dropout), None


def restore_settings(config: dict, given: dict, contents: dict) -> dict:
    """The settings of a run that goes on: a checkpoint's, except those `given` again.

    Prints what is restored and what changes. Raises UserError if the model's shape would change.
    """
    saved = {name: value for name, value in contents.get("config", {}).items()
             if name in config and name not in NOT_RESTORED}
    shape = asdict(config_of(contents))
    saved |= {name: shape[name] for name in shape if name in config and name != "dropout"}
    check_shape(given, config_of(contents), contents["path"])
    if "block_size" in given and given["block_size"] != shape["block_size"]:
        raise UserError(f"block_size = {given['block_size']}, but the run in {contents['path']} "
                        f"has {shape['block_size']}: leave it out to resume, or start anew from "
                        f"its weights with --init_from={contents['path']}")
    restored = [f"{name}={value!r}" for name, value in saved.items()
                if name not in given and value != config[name]]
    if restored:
        announce("from the checkpoint:", *restored)
    changes = [f"{name} {saved[name]!r} -> {value!r}" for name, value in given.items()
               if name in saved and value != saved[name]]
    if changes:
        announce("changed since the checkpoint:", ", ".join(changes))
    return config | saved | given


def check_shape(given: dict, config: GPTConfig, source: object) -> None:
    """Raise UserError if settings that were given ask for another model than the loaded one."""
    for name in ("n_layer", "n_head", "n_embd", "bias", "activation"):
        if name in given and given[name] != getattr(config, name):
            raise UserError(f"{name} = {given[name]!r}, but the model of {source} has "
                            f"{getattr(config, name)!r}: leave it out, or use "
                            f"--init_from=scratch")


def load_optimizer(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
                   contents: dict) -> None:
    """Restore the optimizer's and the gradient scaler's state; today's hyperparameters stay.

    Raises UserError if the state is of another model.
    """
    saved = contents.get("optimizer")
    if saved is None:
        raise UserError(f"{contents['path']} has no optimizer to resume with: start anew from its "
                        f"weights with --init_from={contents['path']}")
    try:
        ids = [i for group in saved["param_groups"] for i in group["params"]]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=True):  # the fused step does not look at shapes
            if any(saved["state"][i][name].shape != p.shape for name in ("exp_avg", "exp_avg_sq")
                   if i in saved["state"]):
                raise ValueError("its tensors are in another order or of other shapes")
        groups = zip(saved["param_groups"], optimizer.param_groups, strict=True)
        options = [old | {k: v for k, v in new.items() if k != "params"} for old, new in groups]
        optimizer.load_state_dict({**saved, "param_groups": options})
    except (ValueError, KeyError) as error:
        raise UserError(f"{contents['path']}: its optimizer does not fit ({error})") from None
    if contents.get("scaler"):
        scaler.load_state_dict(contents["scaler"])


def prepare_out_dir(out_dir: str, fresh: bool) -> None:
    """Make the folder of a run; a fresh run moves what an earlier one left into previous-N/.

    Raises UserError if it cannot be written.
    """
    folder = Path(out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = (NEWEST, BEST, "metrics.jsonl", "tensorboard")
        old = [path for name in names if (path := folder / name).exists()]
        if fresh and old:
            n = 1
            while (previous := folder / f"previous-{n}").exists():
                n += 1
            previous.mkdir()
            for path in old:
                path.replace(previous / path.name)
            print(f"moved the earlier run in {folder} to {previous}")
    except OSError as error:
        raise UserError(f"cannot write to out_dir = {out_dir!r}: {error.strerror}") from None


def check_tokenizer(saved: dict | None, meta: dict | None, source: object, dataset: str) -> None:
    """Raise UserError unless a model's tokenizer is the dataset's (None is GPT-2's)."""
    if (saved and saved["stoi"]) == (meta and meta["stoi"]):
        return
    words = [f"{m['vocab_size']} characters" if m else "GPT-2's BPE" for m in (saved, meta)]
    raise UserError(f"{source} was trained on {words[0]}, but the dataset {dataset} is in "
                    f"{words[1] if words[0] != words[1] else 'other characters'}: "
                    f"choose a dataset of the same tokenizer")
