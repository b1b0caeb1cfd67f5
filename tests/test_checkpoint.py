"""Checkpoints: whole or absent, plain data only, and readable when other trainers wrote them."""

import itertools
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import unequal
from hypothesis import given, settings
from hypothesis import strategies as st

from configurator import UserError
from engine import checkpoint
from engine.muon import configure_muon
from engine.out_dir import prepare_out_dir
from engine.saving import write
from model import GPT, GPTConfig

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
    write(path, contents)
    loaded = checkpoint.load(path)
    assert unequal({key: loaded[key] for key in contents}, contents) == []
    assert [file.name for file in path.parent.iterdir()] == ["ckpt.pt"]


# --------------------------------------------------------------------------- what is no checkpoint

@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, bytes]:
    """A checkpoint of 2 KB, and its bytes; load needs no whole model."""
    path = tmp_path_factory.mktemp("small") / "ckpt.pt"
    write(path, {"model": {"w": torch.arange(6).reshape(2, 3) / 7, "b": torch.arange(3)},
                 "model_args": SHAPE, "iter_num": 3, "history": [{"iter": 1, "val_loss": 1.5}]})
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


def test_a_flipped_bit_in_a_tensor_or_one_that_marks_it_as_a_folder_is_refused(small):
    # With the mark, in the archive's directory, torch.load would not read the tensor.
    path, content = small
    tensor = content.index((torch.arange(6) / 7).numpy().tobytes())
    entries = [place for place in range(len(content)) if content.startswith(b"PK\1\2", place)]
    assert len(entries) > 2
    flips = [(tensor, 1), (tensor + 23, 0x80)] + [(entry + 38, 0x10) for entry in entries]
    for place, bit in flips:
        changed = bytearray(content)
        changed[place] ^= bit
        path.write_bytes(changed)
        with pytest.raises(UserError, match="damaged"):
            checkpoint.load(path)


@pytest.mark.parametrize("change, words", [
    ({"model_args": 5}, "its model_args is int, not dict"), ({"meta": {"a": 1}}, "holds no vocab"),
    ({"iter_num": -5}, "iter_num = -5"), ({"iter_num": 2**63}, "iter_num = 9223372036854775808"),
    ({"bad_steps": -1}, "bad_steps = -1"), ({"seconds": math.nan}, "seconds = nan"),
    ({"best_val_loss": (2,)}, r"best_val_loss = \(2,\)"),
    ({"history": [{"iter": 1, "val_loss": 2, "lr": "x"}]}, "history has ")])
def test_parts_of_another_type_or_range_are_a_user_error(path, contents, change, words):
    write(path, contents | change)
    with pytest.raises(UserError, match=rf"ckpt\.pt .*{words}"):
        checkpoint.load(path)


@pytest.mark.parametrize("contents", [{"model": {}}, {"model_args": {}}, [1, 2]], ids=repr)
def test_the_keys_that_a_checkpoint_lacks_are_named(path, contents):
    write(path, contents)
    lacks = " and ".join(name for name in ("model", "model_args") if name not in contents)
    with pytest.raises(UserError, match=f"ckpt.pt is damaged or no checkpoint: it lacks {lacks};"):
        checkpoint.load(path)


# -------------------------------------------------------------------------------- which checkpoint

@pytest.mark.parametrize("name, other", [("ckpt.pt", "best.pt"), ("best.pt", "ckpt.pt")])
def test_latest_is_the_one_with_more_steps(tmp_path, contents, name, other):
    write(tmp_path / name, contents | {"iter_num": 100})
    write(tmp_path / other, contents | {"iter_num": 20})  # written later
    assert checkpoint.latest(str(tmp_path))[1] == 100
    (tmp_path / name).unlink()
    assert checkpoint.latest(str(tmp_path))[1] == 20
    (tmp_path / other).unlink()
    assert checkpoint.latest(str(tmp_path)) == (None, -1)


def test_each_new_run_keeps_all_earlier_ones(tmp_path, contents):
    for steps in (1, 2, 3):
        prepare_out_dir(str(tmp_path), None, GPT.from_checkpoint(contents), 0).release()
        write(tmp_path / "ckpt.pt", contents | {"iter_num": steps})
    kept = [checkpoint.load(tmp_path / name / "ckpt.pt")["iter_num"]
            for name in ("previous-1", "previous-2", ".")]
    assert kept == [1, 2, 3]


def test_a_checkpoint_without_a_vocabulary_has_that_of_its_dataset_if_it_is_found(
        path, contents, text_dataset):
    write(path, contents | {"config": {"dataset": str(text_dataset)}})
    _, meta = checkpoint.load_pretrained(str(path))
    assert len(meta["stoi"]) == 14
    write(path, contents | {"config": {"dataset": "nowhere"}})
    with pytest.raises(UserError, match="'nowhere' is not here: prepare that first"):
        checkpoint.load_pretrained(str(path))  # so few tokens are not GPT-2's


# ------------------------------------------------------------------------------ restoring settings

SETTINGS = {"block_size": 1024, "activation": "gelu_tanh", "seed": 1, "batch_size": 12,
            "cooldown_frac": 0.5, "device": "cpu"}


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


def test_settings_of_earlier_versions_have_their_present_names_or_are_left_out(path, contents):
    model_args = asdict(GPTConfig(**SHAPE, qk_norm=True))  # which were all saved
    saved = {"path": path, **contents, "model_args": model_args, "config": {
        "decay_fraction": 0.25, "head_decay": None, "embedding_decay": 0.1}}
    assert restore(saved) == {"block_size": 16, "cooldown_frac": 0.25}


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


def test_state_of_another_model_or_optimizer_or_none_is_a_user_error(path, contents):
    gpt = GPT.from_checkpoint(contents)
    ours = optimizers(gpt)
    adamw, muon = (after_a_step(gpt, ours[kind]) for kind in ("adamw", "muon"))
    first, third = adamw["state"][0], adamw["state"][2]
    nan = first | {"exp_avg": first["exp_avg"] * math.nan}
    smaller, larger = (optimizers(GPT(GPTConfig(**SHAPE | change)))["adamw"]
                       for change in ({"bias": False}, {"n_layer": 3}))
    for optimizer, saved, words in [
            (ours["adamw"], adamw | {"state": {0: third}}, "exp_avg of .*wte.weight is not"),
            (ours["adamw"], adamw | {"state": {0: nan}}, "exp_avg of .*wte.* is not .* finite"),
            (ours["muon"], adamw, "'momentum'"), (ours["adamw"], muon, "'exp_avg'"),
            (smaller, adamw, "other parameters"), (larger, adamw, "other parameters"),
            (ours["adamw"], None, "")]:
        with pytest.raises(UserError, match=f"optimizer state .*{words}.*: start a new run"):
            checkpoint.load_optimizer(optimizer, SCALER, {"path": path, "optimizer": saved})


# --------------------------------------------------------------------------------- vocabulary

@pytest.mark.parametrize("saved, meta", list(itertools.permutations([
    None, {"vocab_size": 2, "stoi": {"a": 0, "b": 1}}, {"vocab_size": 2, "stoi": {"a": 1, "b": 0}},
], 2)))
def test_another_tokenizer_is_refused(saved, meta):
    with pytest.raises(UserError, match="trained on"):
        checkpoint.check_tokenizer(saved, meta, "ckpt.pt", "text")
    checkpoint.check_tokenizer(saved, saved, "ckpt.pt", "text")
