"""What is saved of a run, how it survives a crash, and how it is read again.

A checkpoint is one file, a dict: model, optimizer, scaler (state dicts), model_args (GPTConfig),
config (the settings), iter_num (steps done), best_val_loss, history (all evaluations), meta (the
tokenizer's vocabulary; None for GPT-2's), seconds (of training so far), bad_steps (skipped in a
row at the end), good_loss (of the last step before them), loss_max and most_bad_steps (since the
last log line). Files with only model, model_args and config, as other minimal GPT trainers write
them, are read too.
"""

import fcntl
import fnmatch
import os
import shutil
import socket
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import torch

from configurator import UserError, announce, choose
from data.bins import dataset_folder, written_whole
from data.tokenizer import check_meta, load_meta
from model import GPT, GPTConfig
from weights import PRETRAINED

NEWEST, BEST, KEPT = "ckpt.pt", "best.pt", "ckpt_[0-9]*.pt"
GPT2_IDS = 50257  # a vocabulary of fewer is not GPT-2's
PARTS = {"model": dict, "model_args": dict, "config": dict, "iter_num": int, "history": list}
NOT_RESTORED = ("init_from", "out_dir", "eval_only")  # settings of a start, not of a run


def save(path: Path, contents: dict) -> None:
    """Write a checkpoint whole or not at all. Raises UserError if the disk refuses."""
    with written_whole(path) as file:
        try:
            torch.save(contents, file)
        except RuntimeError as error:  # torch's own, on top of the disk's
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def numbered(iter_num: int) -> str:
    """The name of a checkpoint that is kept."""
    return f"ckpt_{iter_num:08d}.pt"


def load(path: Path, mmap: bool = False) -> dict:
    """Read a checkpoint onto the CPU, running none of it; with mmap, tensors only when touched.

    Raises UserError if it cannot be read, is damaged or is no checkpoint.
    """
    try:
        _verify(path, skip_tensors=mmap)
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no checkpoint {path}: train first, or give another path") from None
    except OSError as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror or error}") from None
    except MemoryError:
        raise
    except Exception as error:  # torch raises nearly anything for a file that is not whole
        raise UserError(f"cannot read checkpoint {path} ({type(error).__name__}): it is damaged, "
                        f"no checkpoint, or holds more than plain data") from None
    missing = {"model", "model_args"} - (contents.keys() if isinstance(contents, dict) else set())
    if missing:
        raise UserError(f"{path} is no checkpoint: it lacks {' and '.join(sorted(missing))}; give "
                        f"one that train.py wrote")
    wrong = [f"its {name} is {type(contents[name]).__name__}, not {kind.__name__}"
             for name, kind in PARTS.items() if not isinstance(contents.get(name, kind()), kind)]
    if wrong:
        raise UserError(f"{path} is no checkpoint: {', '.join(wrong)}; give one that train.py "
                        f"wrote")
    if contents.get("meta"):
        check_meta(contents["meta"], path)
    return {"iter_num": 0, **contents, "path": path}


def _verify(path: Path, skip_tensors: bool) -> None:
    """Raise an error if a checkpoint's bytes are not those that were written.

    A checkpoint is a zip archive that holds the CRC-32 of each part; torch does not look at them.
    """
    with open(path, "rb") as file:
        if file.read(2) != b"PK":  # the format before torch 1.6, without checksums
            return
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if info.external_attr & 0x10:  # torch reads nothing of what it takes for a folder
                    raise zipfile.BadZipFile(f"{info.filename} is marked as a folder")
                if not (skip_tensors and "/data/" in info.filename):
                    with archive.open(info) as part:
                        while part.read(2**20):  # raises BadZipFile at the end if the sum differs
                            pass


def newest(out_dir: str) -> tuple[Path | None, int]:
    """The checkpoint of a run with the most steps done, and their number; (None, -1) without one.

    Raises UserError if one is damaged, as it may have been the newest, or none can be looked for.
    """
    folder = Path(out_dir)
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        names = []
    except OSError as error:
        raise UserError(f"cannot read out_dir = {out_dir!r}: {error.strerror}") from None
    kept = sorted(fnmatch.filter(names, KEPT))
    paths = [folder / name for name in (NEWEST, BEST, *kept[-1:]) if name in names]
    steps = {}
    for path in paths:
        try:
            steps[path] = load(path, mmap=True)["iter_num"]
        except UserError as error:
            raise UserError(f"{error}; to go on from another in {folder}, move it away") from None
    path = max(steps, key=steps.get, default=None)
    return path, steps.get(path, -1)


def path_to_sample(out_dir: str) -> Path:
    """The checkpoint to sample from: of the lowest validation loss if there is one."""
    best = Path(out_dir) / BEST
    return best if os.path.exists(best) else Path(out_dir) / NEWEST


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
    state = {str(name).removeprefix("_orig_mod."): tensor
             for name, tensor in contents["model"].items()}
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
    if os.path.exists(path_to_sample(name_or_path)):
        path = path_to_sample(name_or_path)
    if os.path.isfile(path):
        contents = load(path)
        return build_model(contents, dropout), meta_of(contents)
    if path.suffix == ".pt" or (not os.path.isdir(path) and name_or_path not in PRETRAINED
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
    for name, value in saved.items():
        kinds = str if isinstance(config[name], str) else (int, float)
        if config[name] is not None and name not in given and not isinstance(value, kinds):
            raise UserError(f"{contents['path']} holds {name} = {value!r}, which is "
                            f"{type(value).__name__}: resume with --{name}= and a value")
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
    for name, value in asdict(config).items():
        if name not in ("block_size", "dropout") and given.get(name, value) != value:
            raise UserError(f"{name} = {given[name]!r}, but the model of {source} has {value!r}: "
                            f"leave it out, or use --init_from=scratch")


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
        today = optimizer.state_dict()["param_groups"]
        own = {}  # by a parameter's name: its number in `today`, itself, what its steps remember
        for group, numbered_group in zip(optimizer.param_groups, today, strict=True):
            memory = ["momentum"] if "momentum" in group else ["exp_avg", "exp_avg_sq"]
            own |= {name: (i, p, memory) for name, i, p in zip(
                group["param_names"], numbered_group["params"], group["params"], strict=True)}
        old = [i for group in saved["param_groups"] for i in group["params"]]
        names = [name for group in saved["param_groups"] for name in group.get("param_names", [])]
        if old and not names:  # other trainers', and ours before they had names
            names = [str(name).removeprefix("_orig_mod.") for name in contents["model"]]
            names = sorted((name for name in names if name in own),
                           key=lambda name: own[name][1].dim() < 2)  # matrices, then vectors
        if set(names) != own.keys():
            raise ValueError("its parameters are others")
        state = {}
        for name, number in zip(names, old, strict=True):
            i, p, memory = own[name]
            if number in saved["state"]:
                state[i] = part = saved["state"][number]
                if not part.keys() >= {"step", *memory}:
                    raise ValueError(f"{name} has {', '.join(part)}, not {', '.join(memory)}")
                if any(part[moment].shape != p.shape for moment in memory):
                    raise ValueError("its tensors are in another order or of other shapes")
        optimizer.load_state_dict({"state": state, "param_groups": today})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{contents['path']}: its optimizer does not fit ({error}): start anew "
                        f"from its weights with --init_from={contents['path']}") from None
    if contents.get("scaler"):
        scaler.load_state_dict(contents["scaler"])


def size_of(model: GPT) -> int:
    """Bytes of a checkpoint: the weights, at most two moments of each, and 1 MiB for the rest."""
    return 3 * sum(p.numel() * p.element_size() for p in model.parameters()) + 2**20


def prepare_out_dir(out_dir: str, iter_num: int | None, size: int, n_kept: int) -> TextIO:
    """Make the folder of a run, and lock it until the file returned is closed or its process dies.

    A run that starts anew (iter_num None) moves what an earlier one left into previous-N/; one
    that goes on does so after iter_num steps. size: of a checkpoint, bytes; n_kept: how many
    numbered ones are to come.
    Raises UserError if the folder cannot be written, has too little room, or is in use.
    """
    folder = Path(out_dir)
    try:
        _check_room(folder, iter_num is None, size, n_kept)
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "a+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(f"out_dir = {out_dir!r} is in use by another run ({lock.read()}): "
                            f"wait for its end, or choose another out_dir") from None
        except OSError as error:  # some network file systems have no locks
            print(f"{folder} cannot be locked ({error.strerror}): see that no two runs share it")
        lock.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", end="", file=lock, flush=True)
        if iter_num is not None and newest(out_dir)[1] != iter_num:
            raise UserError(f"another run went on in {folder} at the same moment: start again")
        for path in _half_written(folder):
            path.unlink()
        if iter_num is None:
            _move_earlier_run(folder)
        return lock
    except OSError as error:
        raise UserError(f"cannot write to out_dir = {out_dir!r}: {error.strerror}") from None


def _half_written(folder: Path) -> list[Path]:
    """Files of a process that was killed while it wrote them."""
    return [path for name in (NEWEST, BEST, KEPT, "metrics.jsonl")
            for path in folder.glob(f"{name}.tmp")]


def _check_room(folder: Path, fresh: bool, size: int, n_kept: int) -> None:
    """Raise UserError if the disk lacks the room for all checkpoints to come."""
    there = sum((folder / name).exists() for name in (NEWEST, BEST))  # will be replaced
    count = n_kept + 3 - (0 if fresh else there)  # the third is the one being written
    disk = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(disk).free + sum(p.stat().st_size for p in _half_written(folder))
    if free < count * size:
        raise UserError(f"out_dir = {str(folder)!r} needs {count * size / 1e6:,.0f} MB for {count} "
                        f"checkpoints of {size / 1e6:,.1f} MB, but its disk has "
                        f"{free / 1e6:,.0f} MB free: make room, choose another out_dir, or a "
                        f"larger keep_every")


def _move_earlier_run(folder: Path) -> None:
    """Move what a run left in its folder into previous-N/."""
    old = [path for name in (NEWEST, BEST, "metrics.jsonl", "tensorboard")
           if (path := folder / name).exists()] + sorted(folder.glob(KEPT))
    if not old:
        return
    n = 1
    while (previous := folder / f"previous-{n}").exists():
        n += 1
    previous.mkdir()
    for path in old:
        path.replace(previous / path.name)
    print(f"moved the earlier run in {folder} to {previous}")


def check_tokenizer(saved: dict | None, meta: dict | None, source: object, dataset: str) -> None:
    """Raise UserError unless a model's tokenizer is the dataset's (None is GPT-2's)."""
    if (saved and saved["stoi"]) == (meta and meta["stoi"]):
        return
    words = [f"{m['vocab_size']} characters" if m else "GPT-2's BPE" for m in (saved, meta)]
    raise UserError(f"{source} was trained on {words[0]}, but the dataset {dataset} is in "
                    f"{words[1] if words[0] != words[1] else 'other characters'}: "
                    f"choose a dataset of the same tokenizer")
