"""Checkpoints: what they hold, and how a run resumes from them (saving.py writes them).

A checkpoint is a file of torch.save with a dict: model, optimizer, scaler (state dicts), model_args
(of GPTConfig), config (settings), iter_num (steps done), best_val_loss, history (the records of all
evaluations), meta (the tokenizer, None for GPT-2's BPE), seconds (of training so far), bad_steps
(consecutive steps skipped up to now) and command (of its first start). Files with only model,
optimizer, model_args, iter_num, best_val_loss and config, as other minimal GPT trainers write them,
are read too.
"""

import copy
import fnmatch
import math
import os
from dataclasses import asdict
from pathlib import Path

import torch

from configurator import RENAMED, UserError, check_choice, fit_types, nearest, print0, user_errors
from data.bins import dataset_folder
from data.tokenizer import check_meta, describe_tokenizer, load_meta, same_tokenizer
from engine.distributed import dist_info, part_of
from engine.runtime import choose_device, choose_dtype
from model import GPT, HF_REPOSITORIES, GPTConfig, is_plain_float, read_file

LATEST, BEST, NUMBERED = "ckpt.pt", "best.pt", "ckpt_[0-9]*.pt"
GPT2_VOCAB_SIZE = 50257
TYPES = {"model": dict, "model_args": dict, "config": dict, "iter_num": int, "history": list,
         "bad_steps": int, "command": str}
NEW_RUN = {"iter_num": 0, "best_val_loss": math.inf, "history": [], "seconds": 0.0, "bad_steps": 0,
           "command": ""}
START_SETTINGS = {"init_from", "out_dir", "eval_only"}  # these two kinds are not restored
MACHINE_SETTINGS = {"device", "backend", "compile"}


# ------------------------------------------------------------------------------------ one file

def numbered_name(iter_num: int) -> str:
    """File name of a checkpoint that is kept."""
    return f"ckpt_{iter_num:08d}.pt"


def load(path: Path, mmap: bool = False) -> dict:
    """Read a checkpoint onto the CPU without running code from it; with mmap, tensors lazily.

    Returns its contents with NEW_RUN for what it lacks, and its `path`.
    Raises UserError if it cannot be read, is damaged, or is not a checkpoint.
    """
    if not path.is_file():
        runs = sorted({str(file.parent) for file in Path().glob("out*/*.pt")})
        similar = "" if str(path.parent) in runs else nearest(str(path.parent), runs)
        raise UserError(f"no checkpoint {path}{similar}: train first, or give another path "
                        f"(runs here: {', '.join(runs) or 'none'})")
    with user_errors():
        contents = read_file(path, mmap)
    missing = {"model", "model_args"} - (contents.keys() if isinstance(contents, dict) else set())
    wrong = [f"it lacks {' and '.join(sorted(missing))}"] if missing else [
        f"its {name} is {type(contents[name]).__name__}, not {kind.__name__}"
        for name, kind in TYPES.items() if not isinstance(contents.get(name, kind()), kind)]
    if not wrong:
        contents = copy.deepcopy(NEW_RUN) | contents | {"path": path}
        best = contents["best_val_loss"]
        if is_plain_float(best) and best.numel() == 1:  # as other trainers save it
            contents["best_val_loss"] = best.item()
        wrong = [f"{name} = {contents[name]!r:.100}" for name in NEW_RUN
                 if name not in ("history", "command") and not is_in_range(contents[name])]
        wrong += [f"history has {record!r:.100}" for record in contents["history"]
                  if not is_evaluation(record)]
    if wrong:
        raise UserError(f"{path} is damaged or no checkpoint: {', '.join(wrong)}; give another")
    if contents.get("meta") is not None:
        check_meta(contents["meta"], path)
    return contents


def is_in_range(value: object) -> bool:
    """Whether a value is a number from 0 on, not nan; an int also of less than 64 bits."""
    return type(value) is float and value >= 0 or type(value) is int and 0 <= value < 2**63


def is_evaluation(record: object) -> bool:
    """Whether a value can be the record of an evaluation."""
    return (isinstance(record, dict) and type(record.get("iter")) is int
            and is_in_range(record["iter"]) and is_in_range(record.get("val_loss"))
            and all(v is None or type(v) in (int, float) for v in record.values()))


# ----------------------------------------------------------------------------------- which file

def latest(out_dir: str) -> tuple[Path | None, int]:
    """The checkpoint of a run with the most steps done, and their number; (None, -1) without one.

    Raises UserError if one is damaged, since it may have been the latest.
    """
    folder = Path(out_dir)
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        names = []
    numbered = sorted(fnmatch.filter(names, NUMBERED))
    steps = {}
    for path in (folder / name for name in (LATEST, BEST, *numbered[-1:]) if name in names):
        try:
            steps[path] = load(path, mmap=True)["iter_num"]
        except UserError as error:
            raise UserError(f"{error}; to resume from another in {folder}, move it away") from None
    path = max(steps, key=steps.get, default=None)
    return path, steps.get(path, -1)


def load_to_resume(out_dir: str, init_from: str) -> dict | None:
    """The checkpoint that init_from = resume or auto asks for, or None for a new run."""
    if init_from not in ("resume", "auto"):
        return None
    path, _ = latest(out_dir)
    if path is None and init_from == "resume":
        raise UserError(f"nothing to resume: {out_dir} has neither {LATEST} nor {BEST}; use "
                        f"--init_from=auto to start in that case")
    # One process reads and checks the file; of the others, each maps it and reads what it keeps.
    return load(path, mmap=dist_info()[0] > 0) if path else None


def path_to_sample(out_dir: str) -> Path:
    """The checkpoint with the lowest validation loss, or else the latest."""
    best = Path(out_dir) / BEST
    return best if os.path.lexists(best) else Path(out_dir) / LATEST


# ------------------------------------------------------------------------- model and vocabulary

def load_pretrained(name_or_path: str, dropout: float = 0.0) -> tuple[GPT, dict | None]:
    """A trained model, and the meta of its tokenizer (None for GPT-2 BPE).

    name_or_path: a checkpoint, a run's out_dir, or what `GPT.from_pretrained` takes.
    Raises UserError or ValueError if there is no such model.
    """
    path = Path(name_or_path)
    if os.path.exists(path_to_sample(name_or_path)):
        path = path_to_sample(name_or_path)
    if os.path.isfile(path):
        contents = load(path)
        return GPT.from_checkpoint(contents, {"dropout": dropout}, path), meta_of(contents)
    if path.suffix == ".pt" or (not os.path.isdir(path) and name_or_path not in HF_REPOSITORIES
                                and "/" not in name_or_path):
        check_choice("init_from", name_or_path, [
            "scratch", "resume", "auto", *HF_REPOSITORIES, "a checkpoint", "a folder",
            "owner/name on the Hugging Face hub"])
    return GPT.from_pretrained(name_or_path, {"dropout": dropout}), None


def meta_of(contents: dict) -> dict | None:
    """The vocabulary of a checkpoint; if another trainer saved none, that of its dataset."""
    if "meta" in contents:
        return contents["meta"]
    dataset = contents.get("config", {}).get("dataset")
    meta = load_meta(dataset_folder(dataset)) if isinstance(dataset, str) else None
    if meta is None and contents["model_args"]["vocab_size"] < GPT2_VOCAB_SIZE:
        raise UserError(f"{contents['path']} names no vocabulary, and its dataset {dataset!r} is "
                        f"not here: prepare that first")
    return meta


def check_tokenizer(saved: dict | None, meta: dict | None, source: object, dataset: str) -> None:
    """Raise UserError unless a model and a dataset have the same tokenizer (None: GPT-2 BPE)."""
    if not same_tokenizer(saved, meta):
        ours, theirs = describe_tokenizer(saved), describe_tokenizer(meta)
        raise UserError(f"{source} was trained on {ours}, but the dataset {dataset} is in "
                        f"{theirs if theirs != ours else f'other {ours}'}: "
                        f"choose a dataset of the same tokenizer")


def check_shape(overrides: dict, config: GPTConfig, source: object,
                except_for: tuple[str, ...] = ("block_size", "dropout")) -> None:
    """Raise UserError if settings ask for another architecture than that of a loaded model."""
    for name, value in asdict(config).items():
        if name not in except_for and overrides.get(name, value) != value:
            raise UserError(f"{name} = {overrides[name]!r}, but the model of {source} has "
                            f"{value!r}: leave it out, or start a new run with --init_from="
                            f"{source if name == 'block_size' else 'scratch'}")


# ---------------------------------------------------------------------------------- resuming

def restore_settings(settings: dict, config: dict, overrides: dict, contents: dict) -> dict:
    """The settings of a resumed run: the checkpoint's, except those given again (overrides) and
    those that describe a machine. Prints what is restored and what is not.

    settings: the script's globals(). Raises UserError if the architecture would change.
    """
    path = contents["path"]
    in_file = {RENAMED.get(name, name): value for name, value in contents.get("config", {}).items()}
    in_file = {name: in_file[name] for name in in_file.keys() & config.keys() - START_SETTINGS}
    restored = fit_types(settings, {
        name: value for name, value in in_file.items()
        if name not in overrides and name not in MACHINE_SETTINGS}, path)
    with user_errors(f"{path}: "):
        model_config = GPTConfig.from_model_args(contents["model_args"])
    check_shape(overrides, model_config, path, except_for=("dropout",))
    shape = asdict(model_config)
    restored |= {name: shape[name] for name in shape if name in config and name != "dropout"}
    try:
        choose_dtype(restored.get("dtype"), choose_device(config["device"]), shape["n_embd"])
    except UserError:  # this machine does not have that precision
        restored.pop("dtype", None)
    result = config | restored
    same = [f"{name}={value!r}" for name, value in restored.items() if value != config[name]]
    other = [f"{name}={value!r}" for name, value in in_file.items()
             if value is not None and value != result[name]]
    for words, settings in (("from the checkpoint:", same), ("in the checkpoint, but not restored:",
                                                             other)):
        if settings:
            print0(words, *sorted(settings))
    return result


def load_optimizer(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
                   contents: dict) -> None:
    """Restore the state of the optimizer and the gradient scaler; hyperparameters stay current.

    Parameters are matched by name; a file without names has them in the order of our groups.
    Raises UserError if the state is of another model or optimizer.
    """
    saved, path = contents.get("optimizer"), contents["path"]
    rank, _ = dist_info()
    new_run = f"start a new run from its weights with --init_from={path}"
    if saved is None:
        raise UserError(f"{path} has no optimizer state to resume with: {new_run}")
    try:
        params = [(name, p, ["momentum"] if "momentum" in group else ["exp_avg", "exp_avg_sq"])
                  for group in optimizer.param_groups
                  for name, p in zip(group["param_names"], group["params"], strict=True)]
        saved_ids = [i for group in saved["param_groups"] for i in group["params"]]
        names = [name for group in saved["param_groups"] for name in group.get("param_names", [])]
        saved_id = dict(zip(names or [name for name, _, _ in params], saved_ids, strict=True))
        if saved_id.keys() != {name for name, _, _ in params}:
            raise ValueError("it has other parameters")
        state = {}
        for i, (name, p, keys) in enumerate(params):
            if saved_id[name] in saved["state"]:
                state[i] = saved["state"].pop(saved_id[name])
                for key in keys:
                    t = state[i][key]
                    if not is_plain_float(t) or t.shape != p.shape or (
                            rank == 0 and not t.isfinite().all()):
                        raise ValueError(f"{key} of {name} is not a tensor of finite numbers of "
                                         f"shape {tuple(p.shape)}")
                    state[i][key] = part_of(t, p).clone()  # not a view of the file
                # A number before torch 1.12; in torch 2.0, of shape (1,).
                step = torch.tensor(float(state[i]["step"]))
                if not 0 <= step < math.inf:
                    raise ValueError(f"step of {name} is {step}")
                state[i]["step"] = step
        optimizer.load_state_dict(
            {"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        if contents.get("scaler"):
            scaler.load_state_dict(contents["scaler"])
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path}: its optimizer state does not fit ({type(error).__name__}: "
                        f"{error}): {new_run}") from None
