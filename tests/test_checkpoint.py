"""Checkpoints: whole or absent, plain data only, and readable when other trainers wrote them."""

import itertools
import pickle
import resource
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import MODERN, ROOT, forked, load, snapshot, train, unequal
from hypothesis import given, settings
from hypothesis import strategies as st

from configurator import UserError
from engine import checkpoint
from engine.muon import configure_muon
from engine.out_dir import prepare_out_dir
from model import GPT, HF_REPOSITORIES, GPTConfig

SHAPE = {"block_size": 16, "vocab_size": 14, "n_layer": 2, "n_head": 2, "n_embd": 16, "bias": True}


@pytest.fixture
def contents() -> dict:
    """What a checkpoint of a small model holds, at the least."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**SHAPE))
    return {"model": gpt.state_dict(), "model_args": SHAPE | {"dropout": 0.0}}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "run" / "ckpt.pt"


# ---------------------------------------------------------------------------------- whole or absent

def test_what_is_saved_is_what_is_loaded(path, contents):
    contents |= {"iter_num": 7, "best_val_loss": 1.25, "history": [{"iter": 0, "val_loss": 1.25}],
                 "config": {"seed": 1, "device": None}, "meta": None}
    checkpoint.save(path, contents)
    loaded = checkpoint.load(path)
    for name, tensor in contents.pop("model").items():
        assert torch.equal(loaded["model"][name], tensor)
    assert {key: loaded[key] for key in contents} == contents
    assert [file.name for file in path.parent.iterdir()] == ["ckpt.pt"]


def test_an_error_while_saving_leaves_the_old_checkpoint_and_nothing_else(path, contents):
    checkpoint.save(path, contents)
    before = snapshot(path.parent)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        checkpoint.save(path, contents | {"config": lambda: None})  # cannot be pickled
    assert snapshot(path.parent) == before


@pytest.mark.parametrize("space", [1000, 20000, 200000])  # bytes that still fit
@pytest.mark.parametrize("size", [1, 100000])
def test_a_disk_that_refuses_leaves_the_old_checkpoint_and_is_a_user_error(
        path, contents, space, size):
    contents["optimizer"] = torch.zeros(size)
    checkpoint.save(path, contents)
    before = snapshot(path.parent)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (min(space, path.stat().st_size - 1), hard))
    try:
        with pytest.raises(UserError, match="cannot write .*ckpt.pt"):
            checkpoint.save(path, contents)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert snapshot(path.parent) == before


# --------------------------------------------------------------------------- what is no checkpoint

class Malicious:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(tmp_path, contents):
    target = tmp_path / "created"
    torch.save(contents | {"config": Malicious(target)}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malicious(target), protocol=2))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(UserError, match=name):
            checkpoint.load(tmp_path / name)
    assert not target.exists()


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, bytes]:
    """A checkpoint of 2 KB, and its bytes; load needs no whole model."""
    path = tmp_path_factory.mktemp("small") / "ckpt.pt"
    checkpoint.save(path, {"model": {"w": torch.arange(6).reshape(2, 3) / 7, "b": torch.arange(3)},
                           "model_args": SHAPE, "iter_num": 3, "history": [{"val_loss": 1.5}]})
    return path, path.read_bytes()


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_one_changed_byte_anywhere_is_harmless_or_refused(small, data):
    path, content = small
    path.write_bytes(content)
    expected = checkpoint.load(path)
    changed = bytearray(content)
    changed[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(changed)
    try:
        assert unequal(checkpoint.load(path), expected) == []
    except UserError as error:
        assert "ckpt.pt" in str(error)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_checkpoint_cut_anywhere_is_refused(small, data):
    path, content = small
    path.write_bytes(content[:data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(UserError, match=r"cannot read .*ckpt\.pt"):
        checkpoint.load(path)


def test_a_flipped_bit_in_a_tensor_is_refused(small):
    path, content = small
    place = content.index((torch.arange(6) / 7).numpy().tobytes())
    for bit in range(8 * 24):
        refused_with(path, content, place + bit // 8, 1 << bit % 8)


def test_a_tensor_marked_as_a_folder_is_refused(small):
    # One bit in the archive's directory, with which torch.load would not read the tensor.
    path, content = small
    entries = [place for place in range(len(content)) if content.startswith(b"PK\1\2", place)]
    for place in entries:
        refused_with(path, content, place + 38, 0x10)
    assert len(entries) > 2


def refused_with(path: Path, content: bytes, place: int, bit: int) -> None:
    changed = bytearray(content)
    changed[place] ^= bit
    path.write_bytes(changed)
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(path)


def test_a_missing_checkpoint_is_a_user_error(path):
    with pytest.raises(UserError, match="no checkpoint .*ckpt.pt"):
        checkpoint.load(path)


@pytest.mark.parametrize("name", ["model", "model_args"])
def test_a_key_that_a_checkpoint_lacks_is_named(tmp_path, contents, name):
    del contents[name]
    torch.save(contents, tmp_path / "other.pt")
    with pytest.raises(UserError, match=f"other.pt is no checkpoint: it lacks {name};"):
        checkpoint.load(tmp_path / "other.pt")


def test_a_list_is_no_checkpoint(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.load(tmp_path / "list.pt")


@pytest.mark.parametrize("args", [
    {"n_head": 3}, {"windows": 3}, {"n_layer": "two"}, {"n_embd": 16.0}, {"vocab_size": None}])
def test_model_args_of_no_model_are_named(path, contents, args):
    with pytest.raises(ValueError, match=f"ckpt.pt.*{next(iter(args))}"):
        GPT.from_checkpoint(contents | {"model_args": SHAPE | args}, source=path)


@pytest.mark.parametrize("name, value", [
    ("model", 5), ("model_args", None), ("config", "n_layer=2"), ("iter_num", "many"),
    ("history", {"iter": 0}), ("meta", {"a": 1})])
def test_parts_of_another_type_are_a_user_error(path, contents, name, value):
    checkpoint.save(path, contents | {name: value})
    with pytest.raises(UserError, match=rf"ckpt\.pt .*(its {name} is|holds no vocab)"):
        checkpoint.load(path)


# -------------------------------------------------------------------------------- which checkpoint

@pytest.mark.parametrize("name, other", [("ckpt.pt", "best.pt"), ("best.pt", "ckpt.pt")])
def test_latest_is_the_one_with_more_steps(tmp_path, contents, name, other):
    checkpoint.save(tmp_path / name, contents | {"iter_num": 100})
    checkpoint.save(tmp_path / other, contents | {"iter_num": 20})  # written later
    assert checkpoint.latest(str(tmp_path))[1] == 100
    (tmp_path / name).unlink()
    assert checkpoint.latest(str(tmp_path))[1] == 20
    (tmp_path / other).unlink()
    assert checkpoint.latest(str(tmp_path)) == (None, -1)


def test_each_new_run_keeps_all_earlier_ones(tmp_path, contents):
    for steps in (1, 2, 3):
        prepare_out_dir(str(tmp_path), None, GPT.from_checkpoint(contents), 0).release()
        checkpoint.save(tmp_path / "ckpt.pt", contents | {"iter_num": steps})
    kept = [checkpoint.load(tmp_path / name / "ckpt.pt")["iter_num"]
            for name in ("previous-1", "previous-2", ".")]
    assert kept == [1, 2, 3]


def test_a_folder_gives_its_best_checkpoint(tmp_path, contents):
    contents["meta"] = None
    checkpoint.save(tmp_path / "ckpt.pt", contents)
    best = {name: tensor + 1 for name, tensor in contents["model"].items()}
    checkpoint.save(tmp_path / "best.pt", contents | {"model": best})
    gpt, meta = checkpoint.load_pretrained(str(tmp_path))
    assert torch.equal(gpt.lm_head.weight, best["lm_head.weight"])
    assert meta is None


@pytest.mark.parametrize("name", ["gpt2-larg", "out/ckpt.pt"])
def test_what_names_no_model_is_answered_with_the_choices(name):
    with pytest.raises(UserError) as refused:
        checkpoint.load_pretrained(name)
    for word in (name, "scratch", "resume", "auto", *HF_REPOSITORIES):
        assert word in str(refused.value)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises((UserError, ValueError), match=f"{tmp_path.name}.*config.json"):
        checkpoint.load_pretrained(str(tmp_path))


def test_a_checkpoint_without_a_vocabulary_has_that_of_its_dataset(path, contents, text_dataset):
    checkpoint.save(path, contents | {"config": {"dataset": str(text_dataset)}})
    _, meta = checkpoint.load_pretrained(str(path))
    assert len(meta["stoi"]) == 14


def test_a_small_vocabulary_that_is_not_found_is_not_taken_for_gpt2s(path, contents):
    checkpoint.save(path, contents | {"config": {"dataset": "nowhere"}})
    with pytest.raises(UserError, match="'nowhere' is not here: prepare that first"):
        checkpoint.load_pretrained(str(path))


# ------------------------------------------------------------------------------ restoring settings

SETTINGS = {"block_size": 1024, "activation": "gelu_tanh", "seed": 1, "batch_size": 12,
            "device": "cpu"}


def restore(saved: dict, **overrides: object) -> dict:
    """The settings that restore_settings changes."""
    restored = checkpoint.restore_settings(SETTINGS, SETTINGS | overrides, overrides, saved)
    return {name: value for name, value in restored.items() if value != SETTINGS[name]}


def test_the_shape_is_the_models_and_without_an_activation_the_exact_gelus(path, contents):
    saved = {"path": path, **contents, "config": {"activation": "relu"}}
    assert restore(saved) == {"block_size": 16, "activation": "gelu"}
    assert restore(saved, activation="gelu") == {"block_size": 16, "activation": "gelu"}
    with pytest.raises(UserError, match="activation = 'gelu_tanh'.* 'gelu'"):
        restore(saved, activation="gelu_tanh")


def test_a_setting_of_another_type_is_a_user_error_unless_it_is_given_again(path, contents):
    saved = {"path": path, **contents, "config": {"seed": 5, "batch_size": "four"}}
    assert restore(saved, batch_size=8)["batch_size"] == 8
    with pytest.raises(UserError, match=r"ckpt\.pt: batch_size = 'four' is str"):
        restore(saved)


# -------------------------------------------------------------------------- restoring an optimizer

SCALER = torch.amp.GradScaler("cpu", enabled=False)


def optimizers(gpt: GPT, **rates: float) -> dict[str, torch.optim.Optimizer]:
    adamw = gpt.configure_optimizers(0.1, 1e-3, (0.9, 0.95), **rates)
    return {"adamw": adamw, "muon": configure_muon(gpt, 0.1, 1e-3, (0.9, 0.95), 0.02, 0.95,
                                                   torch.float32, **rates)}


def after_a_step(gpt: GPT, optimizer: torch.optim.Optimizer) -> dict:
    """The state of an optimizer after a step with a gradient of its own for each parameter."""
    for i, p in enumerate(gpt.parameters()):
        p.grad = torch.full_like(p, i)
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_is_matched_by_name_and_hyperparameters_stay_current(path, contents, kind):
    gpt = GPT.from_checkpoint(contents)
    before, after = optimizers(gpt, embedding_lr=0.01)[kind], optimizers(gpt)[kind]
    saved = after_a_step(gpt, before)
    checkpoint.load_optimizer(after, SCALER, {"path": path, "optimizer": saved})
    for p in gpt.parameters():
        for key, tensor in before.state[p].items():
            assert torch.equal(after.state[p][key], tensor)
    assert {group["lr"] for group in after.param_groups} == (
        {1e-3} if kind == "adamw" else {1e-3, 0.02})


def test_tensors_in_another_order_are_a_user_error(path, contents):
    gpt = GPT.from_checkpoint(contents)
    optimizer = optimizers(gpt)["adamw"]
    saved = after_a_step(gpt, optimizer)
    saved["state"] |= {0: saved["state"][2], 2: saved["state"][0]}
    with pytest.raises(UserError, match=r"exp_avg of transformer.wte.weight is \(48, 16\), not"):
        checkpoint.load_optimizer(optimizer, SCALER, {"path": path, "optimizer": saved})


@pytest.mark.parametrize("ours, theirs, word", [
    ("muon", "adamw", "momentum"), ("adamw", "muon", "exp_avg")])
def test_the_state_of_another_optimizer_is_a_user_error(path, contents, ours, theirs, word):
    gpt = GPT.from_checkpoint(contents)
    both = optimizers(gpt)
    saved = after_a_step(gpt, both[theirs])
    with pytest.raises(UserError, match=f"does not fit .*{word}"):
        checkpoint.load_optimizer(both[ours], SCALER, {"path": path, "optimizer": saved})


@pytest.mark.parametrize("value", [
    None, [1, 2], "text", {}, {"state": {}, "param_groups": [{}]},
    {"state": {0: 5}, "param_groups": [{"params": [0]}]}], ids=repr)
def test_what_is_no_optimizer_state_is_a_user_error(path, contents, value):
    optimizer = optimizers(GPT.from_checkpoint(contents))["adamw"]
    with pytest.raises(UserError, match="optimizer state.*start a new run"):
        checkpoint.load_optimizer(optimizer, SCALER, {"path": path, "optimizer": value})


def test_the_optimizer_of_another_model_is_a_user_error(path, contents):
    gpt = GPT.from_checkpoint(contents)
    saved = after_a_step(gpt, optimizers(gpt)["adamw"])
    smaller = optimizers(GPT(GPTConfig(**SHAPE | {"bias": False})))["adamw"]
    larger = optimizers(GPT(GPTConfig(**SHAPE | {"n_layer": 3})))["adamw"]
    for other in (smaller, larger):
        with pytest.raises(UserError, match="optimizer state does not fit"):
            checkpoint.load_optimizer(other, SCALER, {"path": path, "optimizer": saved})


# ------------------------------------------------------------------- of earlier versions of ours

def in_old_layout(contents: dict) -> dict:
    """A checkpoint as earlier versions wrote it: with the optimizer's groups by kinds of tensors,
    all of model_args, and settings and counters that were since renamed or deleted."""
    optimizer = contents["optimizer"]
    ids = {name: i for group in optimizer["param_groups"]
           for name, i in zip(group["param_names"], group["params"], strict=True)}
    kinds = {}
    for name in ids:
        dim = contents["model"][name].dim()
        kind = ("vectors" if dim < 2 else "head" if name.startswith("lm_head") else
                "embeddings" if ".h." not in name else
                "c_attn" if name.endswith("c_attn.weight") else "matrices")
        kinds.setdefault(kind, []).append(name)
    order = sum(kinds.values(), [])
    config = contents["config"] | {"embedding_decay": 0.1, "head_decay": None}
    config["decay_fraction"] = config.pop("cooldown_frac")
    return contents | {
        "optimizer": {
            "state": {i: optimizer["state"][ids[name]] for i, name in enumerate(order)},
            "param_groups": [{"params": [order.index(name) for name in names], "lr": 0.5,
                              "weight_decay": 0.5, "lr_ratio": 1.0, "parts": 1,
                              "param_names": names} for names in kinds.values()]},
        "model_args": asdict(GPTConfig.from_model_args(contents["model_args"])),
        "config": config, "most_bad_steps": 0, "good_loss": 2.5}


@pytest.mark.parametrize("args", [
    {"optimizer": "adamw"}, MODERN | {"optimizer": "muon", "embedding_lr": 0.02}], ids=str)
def test_a_checkpoint_of_an_earlier_version_resumes_bit_for_bit(args, text_dataset, tmp_path):
    train(f"--dataset={text_dataset}", f"--out_dir={tmp_path}", "--keep_every=4",
          "--schedule=linear", "--cooldown_frac=0.25",
          *(f"--{name}={value}" for name, value in args.items()))
    (tmp_path / "old").mkdir()
    torch.save(in_old_layout(load(tmp_path / "ckpt_00000004.pt")), tmp_path / "old/ckpt.pt")
    done = forked([str(ROOT / "train.py"), f"--out_dir={tmp_path}/old", "--init_from=resume"],
                  ROOT, {})
    assert done.returncode == 0, done.stderr
    ours, expected = (load(folder / "ckpt.pt") for folder in (tmp_path / "old", tmp_path))
    assert ours["config"]["cooldown_frac"] == 0.25
    assert unequal(ours | {"config": None}, expected | {"config": None}) == []


# --------------------------------------------------------------------------------- vocabulary

@pytest.mark.parametrize("saved, meta", list(itertools.permutations([
    None, {"vocab_size": 2, "stoi": {"a": 0, "b": 1}}, {"vocab_size": 2, "stoi": {"a": 1, "b": 0}},
], 2)))
def test_another_tokenizer_is_refused(saved, meta):
    with pytest.raises(UserError, match="trained on"):
        checkpoint.check_tokenizer(saved, meta, "ckpt.pt", "text")
    checkpoint.check_tokenizer(saved, saved, "ckpt.pt", "text")
