"""Checkpoints: whole or absent, plain data only, and readable when other trainers wrote them."""

import itertools
import pickle
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoint
from configurator import UserError
from model import GPT, GPTConfig
from weights import PRETRAINED

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
    before = path.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError)):
        checkpoint.save(path, contents | {"config": lambda: None})  # no pickle takes it
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["ckpt.pt"]


@pytest.mark.parametrize("room", [1000, 20000, 200000])  # bytes that still fit
@pytest.mark.parametrize("size", [1, 100000])
def test_a_disk_that_refuses_leaves_the_old_checkpoint_and_is_a_user_error(path, contents, room,
                                                                           size):
    contents["optimizer"] = torch.zeros(size)
    checkpoint.save(path, contents)
    room = min(room, path.stat().st_size - 1)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(UserError, match="cannot write .*ckpt.pt"):
            checkpoint.save(path, contents)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["ckpt.pt"]


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


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b"words"])
def test_a_damaged_checkpoint_is_a_user_error(path, contents, damage):
    checkpoint.save(path, contents)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="cannot read checkpoint .*ckpt.pt"):
        checkpoint.load(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, bytes]:
    """A checkpoint of 2 KB, and its bytes; load needs no whole model."""
    path = tmp_path_factory.mktemp("small") / "ckpt.pt"
    checkpoint.save(path, {"model": {"w": torch.arange(6).reshape(2, 3) / 7, "b": torch.arange(3)},
                           "model_args": SHAPE, "iter_num": 3, "history": [{"val_loss": 1.5}]})
    return path, path.read_bytes()


def equal(ours: object, reference: object) -> bool:
    """Whether two checkpoints, or parts of them, hold the same."""
    if isinstance(reference, dict):
        return (isinstance(ours, dict) and ours.keys() == reference.keys()
                and all(equal(ours[key], reference[key]) for key in reference))
    if isinstance(reference, torch.Tensor):
        return torch.equal(ours, reference)
    return type(ours) is type(reference) and ours == reference


def loads_equal_or_is_refused(path: Path, content: bytes, reference: dict) -> bool:
    path.write_bytes(content)
    try:
        return equal(checkpoint.load(path), reference)
    except UserError as error:
        return "ckpt.pt" in str(error)


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_one_changed_byte_anywhere_is_harmless_or_refused(small, data):
    path, content = small
    path.write_bytes(content)
    reference = checkpoint.load(path)
    place = data.draw(st.integers(0, len(content) - 1))
    byte = data.draw(st.integers(0, 255))
    assert loads_equal_or_is_refused(
        path, content[:place] + bytes([byte]) + content[place + 1:], reference)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_checkpoint_cut_anywhere_is_refused(small, data):
    path, content = small
    path.write_bytes(content[:data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(UserError, match=r"cannot read checkpoint .*ckpt\.pt"):
        checkpoint.load(path)


def test_a_flipped_bit_in_a_tensor_is_refused(small):
    path, content = small
    place = content.index((torch.arange(6) / 7).numpy().tobytes())
    for bit in range(8 * 24):
        changed = bytearray(content)
        changed[place + bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(UserError, match="damaged"):
            checkpoint.load(path)


def test_a_tensor_marked_as_a_folder_is_refused(small):
    # One bit in the archive's directory, and torch.load leaves the tensor as it finds the memory.
    path, content = small
    entries = [place for place in range(len(content)) if content.startswith(b"PK\1\2", place)]
    for place in entries:
        changed = bytearray(content)
        changed[place + 38] |= 0x10
        path.write_bytes(changed)
        with pytest.raises(UserError, match="damaged"):
            checkpoint.load(path)
    assert len(entries) > 2


def test_a_missing_checkpoint_is_a_user_error(path):
    with pytest.raises(UserError, match="no checkpoint .*ckpt.pt"):
        checkpoint.load(path)


def test_the_keys_that_a_checkpoint_lacks_are_named(path, contents):
    for missing in ("model", "model_args"):
        torch.save({key: contents[key] for key in contents.keys() - {missing}},
                   path.parent.parent / "other.pt")
        with pytest.raises(UserError, match=f"lacks {missing};"):
            checkpoint.load(path.parent.parent / "other.pt")


def test_a_list_is_no_checkpoint(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.load(tmp_path / "list.pt")


@pytest.mark.parametrize("change, words", [
    (lambda state: state.pop("transformer.h.1.mlp.c_fc.bias"),
     ["transformer.h.1.mlp.c_fc.bias", "missing"]),
    (lambda state: state.update({"transformer.h.2.ln_1.weight": torch.ones(16)}),
     ["transformer.h.2.ln_1.weight", "unknown"]),
    (lambda state: state.update({"transformer.wpe.weight": torch.ones(8, 16)}),
     ["transformer.wpe.weight", "(8, 16)", "(16, 16)"]),
    (lambda state: state.update({"transformer.wpe.weight": "text"}),
     ["transformer.wpe.weight", "str", "(16, 16)"]),
    (lambda state: state.update({5: torch.ones(16)}), ["5", "unknown"]),
    (lambda state: state["transformer.h.0.ln_1.weight"].fill_(float("nan")),
     ["transformer.h.0.ln_1.weight", "not finite"]),
    (lambda state: state["transformer.h.1.ln_2.bias"][:1].fill_(float("inf")),
     ["transformer.h.1.ln_2.bias", "not finite"]),
])
def test_tensors_that_do_not_fit_are_named(path, contents, change, words):
    change(contents["model"])
    checkpoint.save(path, contents)
    with pytest.raises(UserError) as refused:
        checkpoint.build_model(checkpoint.load(path))
    for word in [*words, "ckpt.pt"]:
        assert word in str(refused.value)


@pytest.mark.parametrize("args", [
    {"n_head": 3}, {"windows": 3}, {"n_layer": "two"}, {"n_embd": 16.0}, {"vocab_size": None}])
def test_model_args_that_make_no_model_are_a_user_error(path, contents, args):
    checkpoint.save(path, contents | {"model_args": contents["model_args"] | args})
    with pytest.raises(UserError, match=next(iter(args))):
        checkpoint.build_model(checkpoint.load(path))


# -------------------------------------------------------------------------------- which checkpoint

@pytest.mark.parametrize("name, other", [("ckpt.pt", "best.pt"), ("best.pt", "ckpt.pt")])
def test_newest_is_the_one_with_more_steps(tmp_path, contents, name, other):
    checkpoint.save(tmp_path / name, contents | {"iter_num": 100})
    checkpoint.save(tmp_path / other, contents | {"iter_num": 20})  # written later
    assert checkpoint.newest(str(tmp_path))[1] == 100
    (tmp_path / name).unlink()
    assert checkpoint.newest(str(tmp_path))[1] == 20
    (tmp_path / other).unlink()
    assert checkpoint.newest(str(tmp_path)) == (None, -1)


def test_the_causal_masks_of_older_files_are_ignored(path, contents):
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
    checkpoint.save(path, contents | {"model": contents["model"] | masks})
    gpt = checkpoint.build_model(checkpoint.load(path))
    for name, tensor in gpt.state_dict().items():
        assert torch.equal(tensor, contents["model"][name])


def test_weights_come_with_their_own_dropout_or_another(path, contents):
    checkpoint.save(path, contents | {"model_args": contents["model_args"] | {"dropout": 0.3}})
    assert checkpoint.build_model(checkpoint.load(path)).config.dropout == 0.3
    assert checkpoint.build_model(checkpoint.load(path), 0.1).config.dropout == 0.1


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
    for word in (name, "scratch", "resume", "auto", *PRETRAINED):
        assert word in str(refused.value)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises((UserError, ValueError), match=f"{tmp_path.name}.*config.json"):
        checkpoint.load_pretrained(str(tmp_path))


# ----------------------------------------------------------------------- of another minimal trainer

@pytest.fixture(scope="module")
def foreign(tmp_path_factory, text_dataset) -> Path:
    """The folder of a run whose checkpoint has six keys, and names as torch.compile makes them."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**SHAPE, activation="gelu"))
    for p in gpt.parameters():
        p.data.normal_(std=0.3)
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in gpt.parameters() if p.dim() >= 2], "weight_decay": 0.1},
         {"params": [p for p in gpt.parameters() if p.dim() < 2], "weight_decay": 0.0}],
        lr=1e-3, betas=(0.9, 0.95))
    idx = torch.from_numpy(np.fromfile(text_dataset / "train.bin", "<u2").astype(np.int64)[:17])
    for _ in range(3):
        optimizer.zero_grad()
        gpt(idx[None, :-1], idx[None, 1:])[1].backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("foreign")
    torch.save({
        "model": {f"_orig_mod.{name}": tensor for name, tensor in gpt.state_dict().items()},
        "optimizer": optimizer.state_dict(), "model_args": SHAPE | {"dropout": 0.0},
        "iter_num": 3, "best_val_loss": torch.tensor(2.5),
        "config": SHAPE | {
            "out_dir": "out", "dataset": str(text_dataset), "eval_interval": 5, "eval_iters": 2,
            "batch_size": 4, "gradient_accumulation_steps": 1, "max_iters": 5, "dropout": 0.0,
            "learning_rate": 1e-3, "warmup_iters": 1, "lr_decay_iters": 5, "min_lr": 1e-4,
            "device": "cpu", "dtype": "float32", "compile": False, "init_from": "scratch"}},
        folder / "ckpt.pt")
    return folder


def test_a_checkpoint_without_activation_is_an_exact_gelu_model(foreign):
    gpt = checkpoint.build_model(checkpoint.load(foreign / "ckpt.pt")).eval()
    state = torch.load(foreign / "ckpt.pt", weights_only=True)["model"]
    reference = GPT(GPTConfig(**SHAPE, activation="gelu")).eval()
    reference.load_state_dict({name[len("_orig_mod."):]: t for name, t in state.items()})
    tanh = GPT(GPTConfig(**SHAPE, activation="gelu_tanh")).eval()
    tanh.load_state_dict(reference.state_dict())
    idx = torch.arange(14)[None]
    assert torch.equal(gpt(idx, idx)[0], reference(idx, idx)[0])
    assert not torch.equal(gpt(idx, idx)[0], tanh(idx, idx)[0])


def test_resuming_compares_settings_with_the_model_that_was_loaded(foreign):
    saved = checkpoint.load(foreign / "ckpt.pt")
    checkpoint.restore_settings({"activation": "gelu"}, {"activation": "gelu"}, saved)
    with pytest.raises(UserError, match="activation = 'gelu_tanh'.* 'gelu'"):
        checkpoint.restore_settings({"activation": "gelu_tanh"}, {"activation": "gelu_tanh"}, saved)


def test_resuming_takes_the_shape_from_the_model_where_the_settings_lack_it(foreign):
    saved = checkpoint.load(foreign / "ckpt.pt") | {"config": {}}
    restored = checkpoint.restore_settings({"block_size": 1024, "seed": 1}, {}, saved)
    assert restored == {"block_size": 16, "seed": 1}


def test_a_minimal_checkpoint_samples_with_the_vocabulary_of_its_dataset(foreign):
    done = run(ROOT / "sample.py", f"--out_dir={foreign}", "--start=to be", "--num_samples=2",
               "--max_new_tokens=8", "--device=cpu")
    assert done.returncode == 0, done.stderr
    texts = done.stdout.split("process\n")[1].split("\n---------------\n")
    assert [len(text) for text in texts] == [13, 13, 0]
    assert all(text.startswith("to be") for text in texts[:2])


def test_a_minimal_checkpoint_given_by_its_path_has_the_vocabulary_of_its_dataset(foreign):
    _, meta = checkpoint.load_pretrained(str(foreign / "ckpt.pt"))
    assert len(meta["stoi"]) == 14


def test_a_small_vocabulary_that_nobody_names_is_not_taken_for_gpt2s(path, contents):
    checkpoint.save(path, contents | {"config": {"dataset": "nowhere"}})
    with pytest.raises(UserError, match="'nowhere' is not here: prepare that first"):
        checkpoint.load_pretrained(str(path))


def test_an_optimizer_state_in_another_order_is_a_user_error(path, contents):
    gpt = checkpoint.build_model({"path": path, **contents})
    optimizer = gpt.configure_optimizers(0.1, 1e-3, (0.9, 0.95))
    for p in gpt.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    first, second = saved["state"][0], saved["state"][1]
    assert first["exp_avg"].shape != second["exp_avg"].shape
    saved["state"] |= {0: second, 1: first}
    with pytest.raises(UserError, match="another order"):
        checkpoint.load_optimizer(optimizer, None, {"path": path, "optimizer": saved})


def test_rates_and_decays_may_be_others_when_a_run_goes_on(path, contents):
    gpt = checkpoint.build_model({"path": path, **contents})
    before = gpt.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "muon", embedding_lr=0.01)
    for i, p in enumerate(gpt.parameters()):
        p.grad = torch.full_like(p, i)
    before.step()
    after = gpt.configure_optimizers(0.2, 1e-3, (0.9, 0.95), "muon", embedding_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    checkpoint.load_optimizer(after, scaler, {"path": path, "optimizer": before.state_dict()})
    for p in gpt.parameters():
        for key, tensor in before.state[p].items():
            assert torch.equal(after.state[p][key], tensor)
    assert {group["lr"] for group in after.param_groups} == {1e-3, 0.02}
    assert {group["weight_decay"] for group in after.param_groups} == {0.0, 0.2}


def test_the_state_of_another_optimizer_is_a_user_error(path, contents):
    gpt = checkpoint.build_model({"path": path, **contents})
    adamw, muon = (gpt.configure_optimizers(0.1, 1e-3, (0.9, 0.95), kind)
                   for kind in ("adamw", "muon"))
    for optimizer in (adamw, muon):
        for p in gpt.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    for ours, theirs, word in ((muon, adamw, "momentum"), (adamw, muon, "exp_avg")):
        with pytest.raises(UserError, match=f"not {word}"):
            checkpoint.load_optimizer(ours, None,
                                      {"path": path, "optimizer": theirs.state_dict()})


@pytest.mark.parametrize("name, value", [
    ("model", 5), ("model_args", None), ("config", "n_layer=2"), ("iter_num", "many"),
    ("history", {"iter": 0}), ("meta", {"a": 1})])
def test_parts_of_another_type_are_a_user_error(path, contents, name, value):
    checkpoint.save(path, contents | {name: value})
    with pytest.raises(UserError, match=rf"ckpt\.pt .*(its {name} is|holds no vocab)"):
        checkpoint.load(path)


def test_a_restored_setting_of_another_type_is_a_user_error_unless_it_is_given(path, contents):
    saved = {"path": path, **contents, "config": {"batch_size": "four", "dataset": "text"}}
    settings = {"batch_size": 12, "dataset": "openwebtext"}
    with pytest.raises(UserError, match=r"ckpt\.pt holds batch_size = 'four'.*--batch_size="):
        checkpoint.restore_settings(settings, {}, saved)
    restored = checkpoint.restore_settings(settings, {"batch_size": 8}, saved)
    assert restored == {"batch_size": 8, "dataset": "text"}


@pytest.mark.parametrize("value", [[1, 2], "text", {}, {"state": {}, "param_groups": [{}]},
                                   {"state": {0: 5}, "param_groups": [{"params": [0]}]}], ids=repr)
def test_what_is_no_optimizer_state_is_a_user_error(path, contents, value):
    gpt = checkpoint.build_model({"path": path, **contents})
    optimizer = gpt.configure_optimizers(0.1, 1e-3, (0.9, 0.95))
    with pytest.raises(UserError, match="optimizer does not fit"):
        checkpoint.load_optimizer(optimizer, None, {"path": path, "optimizer": value})


def test_each_fresh_start_keeps_all_that_was_before(tmp_path, contents):
    for steps in (1, 2, 3):
        checkpoint.prepare_out_dir(str(tmp_path), None, 0, 0).close()
        checkpoint.save(tmp_path / "ckpt.pt", contents | {"iter_num": steps})
    kept = [checkpoint.load(tmp_path / name / "ckpt.pt")["iter_num"]
            for name in ("previous-1", "previous-2", ".")]
    assert kept == [1, 2, 3]


def test_a_minimal_checkpoint_resumes_with_its_optimizer(foreign, tmp_path):
    shutil.copy(foreign / "ckpt.pt", tmp_path)
    done = run(ROOT / "train.py", f"--out_dir={tmp_path}", "--init_from=resume")
    assert done.returncode == 0, done.stderr
    after = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert after["iter_num"] == 5
    assert {state["step"].item() for state in after["optimizer"]["state"].values()} == {5}
    assert after["model_args"]["activation"] == "gelu"
    assert not any(name.startswith("_orig_mod.") for name in after["model"])
    before = torch.load(foreign / "ckpt.pt", weights_only=True)["optimizer"]["state"]
    tensors = {name: p for name, p in after["model"].items() if name != "lm_head.weight"}
    theirs = sorted(tensors, key=lambda name: tensors[name].dim() < 2)  # their two groups
    ours = [name for group in after["optimizer"]["param_groups"] for name in group["param_names"]]
    for i, state in before.items():  # 2 steps: a second moment keeps 0.95 squared of itself
        assert (after["optimizer"]["state"][ours.index(theirs[i])]["exp_avg_sq"]
                >= 0.95**2 * state["exp_avg_sq"] * (1 - 1e-5)).all()


def test_an_optimizer_of_another_model_is_a_user_error(foreign):
    saved = checkpoint.load(foreign / "ckpt.pt")
    gpt = GPT(GPTConfig(**SHAPE | {"bias": False}))  # fewer parameters
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with pytest.raises(UserError, match="optimizer does not fit"):
        checkpoint.load_optimizer(gpt.configure_optimizers(0.1, 1e-3, (0.9, 0.95)), scaler, saved)


@pytest.mark.parametrize("saved, meta", list(itertools.permutations([
    None, {"vocab_size": 2, "stoi": {"a": 0, "b": 1}}, {"vocab_size": 2, "stoi": {"a": 1, "b": 0}},
], 2)))
def test_another_tokenizer_is_refused(saved, meta):
    with pytest.raises(UserError, match="trained on"):
        checkpoint.check_tokenizer(saved, meta, "ckpt.pt", "text")
    checkpoint.check_tokenizer(saved, saved, "ckpt.pt", "text")
