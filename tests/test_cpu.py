"""The parts of engine/cpu.py against the parts of model.py and torch that they replace."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import MODERN, ROOT, TINY, relative, run

from engine import cpu
from engine.runtime import find_compiler
from model import GPT, GPTConfig, KVCache

SHAPE = {"block_size": 32, "vocab_size": 300, "n_layer": 2, "n_head": 4, "n_embd": 64}
CPU = torch.device("cpu")
PRECISIONS = pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])


@PRECISIONS
@pytest.mark.parametrize("changes", [{}, MODERN], ids=["gpt2", "modern"])
def test_an_accelerated_model_has_the_same_parameters_logits_and_gradients(
        changes, dtype, tolerance):
    torch.manual_seed(0)
    plain, accelerated = (GPT(GPTConfig(**SHAPE | changes)) for _ in range(2))
    accelerated.load_state_dict(plain.state_dict())
    before = dict(accelerated.named_parameters())
    cpu.accelerate(accelerated)
    after = dict(accelerated.named_parameters())
    assert list(after) == list(before) and all(after[name] is p for name, p in before.items())
    assert (accelerated.lm_head.weight is accelerated.transformer.wte.weight) is not changes
    names = [type(module).__module__ for module in accelerated.modules()]
    assert names.count("engine.cpu") == 2 * (1 + 2) + 1  # attention, Dropout

    idx = torch.randint(300, (2, 32))
    results = []
    for gpt in (plain, accelerated):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits, loss = gpt(idx, idx)
        loss.backward()
        results.append((logits, [p.grad for p in gpt.parameters()]))
    (expected_logits, expected_grads), (logits, grads) = results
    assert relative(logits, expected_logits) < tolerance
    for (name, _), grad, expected in zip(
            plain.named_parameters(), grads, expected_grads, strict=True):
        assert relative(grad, expected) < tolerance, name


# ------------------------------------------------------------------------------------- few rows

@pytest.fixture
def large(monkeypatch):
    """Treats all models as large."""
    monkeypatch.setattr(cpu, "is_large", lambda model: True)


@pytest.mark.skipif(not find_compiler("CXX", "g++", "clang++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("has_bf16", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [*range(1, 18), 40])
def test_linear_layers_of_few_rows_equal_torchs_with_the_weight_in_dtype(
        large, monkeypatch, rows, bias, dtype, has_bf16):
    monkeypatch.setattr(cpu, "HAS_BF16", has_bf16)
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**SHAPE, bias=bias)).eval()
    layer = gpt.transformer.h[0].mlp.c_fc
    weight, b = layer.weight.detach().to(getattr(torch, dtype)).double(), layer.bias
    cpu.prepare_sampling(gpt, CPU, dtype, compile=False)
    assert type(layer) is cpu.Linear and layer.weight.dtype == getattr(torch, dtype)
    x = torch.randn(64, rows).t()[:, None]  # (rows, 1, C), not contiguous
    y = layer(x)
    assert y.shape == (rows, 1, 256) and y.dtype == torch.float32 and y.is_contiguous()
    expected = F.linear(x.double(), weight, b if b is None else b.double())
    rounded = has_bf16 and dtype == "bfloat16" and rows > 16  # the input and the output, too
    assert relative(y.double(), expected) < (1e-2 if rounded else 1e-6)


@pytest.mark.parametrize("changes", [{}, MODERN], ids=["gpt2", "modern"])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_a_large_model_samples_with_the_logits_of_the_plain_one(large, changes, dtype, tolerance):
    torch.manual_seed(0)
    plain, ours = (GPT(GPTConfig(**SHAPE | changes)).eval() for _ in range(2))
    ours.load_state_dict(plain.state_dict())
    cpu.prepare_sampling(ours, CPU, dtype, compile=False)
    prompt = torch.randint(300, (2, 20))
    for model in (plain, ours):
        model.caches = KVCache(model.config, 2, 32)
    for idx in (prompt, *torch.randint(300, (3, 2, 1))):
        with torch.no_grad():
            expected, logits = (model(idx, cache=model.caches)[0] for model in (plain, ours))
        assert relative(logits, expected) < tolerance
    if dtype == "float32":
        expected, ids = (m.generate(prompt, 12, temperature=0) for m in (plain, ours))
        assert torch.equal(ids, expected)


def test_without_a_compiler_or_for_small_models_sampling_takes_torchs_layers(
        large, monkeypatch, capsys):
    gpt = GPT(GPTConfig(**SHAPE))
    for name in ("PATH", "CXX"):
        monkeypatch.setenv(name, "")
    cpu.load_kernel.cache_clear()
    for HAS_BF16, dtype in ((False, "float32"), (True, "bfloat16")):
        monkeypatch.setattr(cpu, "HAS_BF16", HAS_BF16)
        assert cpu.sampling_dtype(gpt, CPU) == dtype
    cpu.prepare_sampling(gpt, CPU, "bfloat16", compile=False)
    assert capsys.readouterr().err.count("\n") == 1  # one notice
    assert {p.dtype for p in gpt.parameters()} == {torch.bfloat16}
    assert not any(type(module) is cpu.Linear for module in gpt.modules())
    cpu.load_kernel.cache_clear()

    monkeypatch.undo()
    small = GPT(GPTConfig(**SHAPE))
    cpu.prepare_sampling(small, CPU, cpu.sampling_dtype(small, CPU), compile=False)
    assert {p.dtype for p in small.parameters()} == {torch.float32}
    assert not any(type(module) is cpu.Linear for module in small.modules())


# --------------------------------------------------------------------------------------- dropout

@pytest.mark.parametrize("p", [0.001, 0.2, 0.5, 0.999])
def test_dropout_zeroes_a_fraction_p_and_scales_the_rest_by_exactly_that(p):
    ones, dropped = torch.ones(2001, 3999), {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        dropped[dtype] = cpu.dropout(ones.to(dtype), p)
    is_zero, scale = dropped[torch.float32] == 0, dropped[torch.float32].max().item()
    assert (dropped[torch.float32][~is_zero] == scale).all()
    kept = 1 / scale  # the probability, which is rounded to a few bits
    assert (kept, 1 - kept) == (pytest.approx(1 - p, rel=0.02), pytest.approx(p, rel=0.02))
    error = 4 * (p * (1 - p) / ones.numel()) ** 0.5
    assert is_zero.double().mean().item() == pytest.approx(1 - kept, abs=error)
    assert torch.equal(dropped[torch.bfloat16], dropped[torch.float32].bfloat16())


@pytest.mark.parametrize("p", [0.5, 0.01])
def test_dropout_masks_have_no_pattern(p):
    torch.manual_seed(0)
    # 4 or 8 elements are made from one random number
    kept = (cpu.dropout(torch.ones(8 * 40_000), p) > 0).double().view(-1, 8)
    correlation = torch.corrcoef(torch.cat([kept, kept.roll(1, 0)], dim=1).t())
    assert (correlation - torch.eye(16)).abs().max() < 0.03


def test_a_seed_gives_one_dropout_mask_which_is_that_of_the_gradient():
    x = torch.randn(7, 11, requires_grad=True)
    torch.manual_seed(3)
    first = cpu.dropout(x, 0.4)
    assert not torch.equal(cpu.dropout(x, 0.4), first)
    torch.manual_seed(3)
    assert torch.equal(cpu.dropout(x, 0.4), first)
    grad, = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(grad * x, first)


def test_dropout_acts_where_it_does_in_transformers(monkeypatch, tmp_path):
    # With torch's dropout in both, masks are drawn in the same order: one seed makes them equal.
    transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_positions=32, vocab_size=300, n_layer=2, n_head=4, n_embd=64, bos_token_id=0,
        eos_token_id=0)).save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path), {"dropout": 0.3}).train()
    theirs = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path, embd_pdrop=0.3, attn_pdrop=0.3, resid_pdrop=0.3,
        attn_implementation="eager").train()
    monkeypatch.setattr(cpu, "dropout", F.dropout)
    cpu.accelerate(ours)
    idx = torch.randint(300, (2, 32))
    torch.manual_seed(8)
    logits, _ = ours(idx, idx)
    torch.manual_seed(8)
    torch.testing.assert_close(logits, theirs(idx).logits, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------- attention

@PRECISIONS
@pytest.mark.parametrize("T, S", [(16, None), (129, None), (1, 7), (3, 7), (1, 1)])
def test_naive_attention_equals_fused_attention_with_its_gradients(T, S, dtype, tolerance):
    torch.manual_seed(0)
    mask = None if S is None else torch.full((T, S), -torch.inf).triu(S - T + 1)
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (T, S or T, S or T))
    expected = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
    y = cpu.naive_attention(q.to(dtype), k.to(dtype), v.to(dtype),
                            mask if mask is None else mask.to(dtype))
    assert y.dtype == dtype and relative(y, expected) < tolerance
    weights = torch.randn_like(expected)
    for grad, expected_grad in zip(torch.autograd.grad((y * weights).sum(), (q, k, v)),
                                   torch.autograd.grad((expected * weights).sum(), (q, k, v)),
                                   strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=0,
                                   atol=2 * tolerance * max(1.0, expected_grad.abs().max()))


def test_training_on_a_cpu_does_not_import_the_compiler(text_dataset, tmp_path):
    run_train = [ROOT / "train.py", *TINY, f"--dataset={text_dataset}", f"--out_dir={tmp_path}/a"]
    for command in (run_train, [*run_train, "--init_from=resume", "--max_iters=10"],
                    [*run_train, "--out_dir=" + str(tmp_path / "b"), "--optimizer=muon"]):
        done = run("-X", "importtime", *command)
        assert done.returncode == 0 and "numpy" in done.stderr
        assert "torch._dynamo" not in done.stderr
