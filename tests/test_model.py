"""The model against transformers' GPT-2, torch's own counters, and closed forms."""

import math
import re
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import MODERN
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels import Linear, RMSNorm, attention, attention_by_hand, draw, dropout
from model import ACTIVATIONS, GPT, CausalSelfAttention, GPTConfig, RotaryPositions

SHAPE = {"block_size": 32, "vocab_size": 300, "n_layer": 3, "n_head": 4, "n_embd": 64}


def hf_gpt2(**changes) -> transformers.GPT2LMHeadModel:
    """transformers' GPT-2 of SHAPE with random weights, biases and norms included."""
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        n_positions=32, vocab_size=300, n_layer=3, n_head=4, n_embd=64, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, **changes)
    hf = transformers.GPT2LMHeadModel(config)
    for name, p in hf.named_parameters():  # so that greedy tokens vary
        p.data.normal_(std=0.3 if ".h." in name else 0.1)
    return hf.eval()


@pytest.fixture(scope="module")
def hf() -> transformers.GPT2LMHeadModel:
    return hf_gpt2()


@pytest.fixture(scope="module")
def folder(hf, tmp_path_factory):
    """hf as a local folder with model.safetensors."""
    path = tmp_path_factory.mktemp("gpt2")
    hf.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def gpt(folder) -> GPT:
    return GPT.from_pretrained(str(folder)).eval()


@pytest.fixture
def idx() -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randint(0, 300, (2, 32))


# --------------------------------------------------------------------------------- it is GPT-2

def test_logits_equal_those_of_transformers(gpt, hf, idx):
    logits, _ = gpt(idx, idx)
    torch.testing.assert_close(logits, hf(idx).logits, atol=1e-4, rtol=0)


def test_loss_and_gradients_equal_those_of_transformers(folder, idx):
    ours, theirs = GPT.from_pretrained(str(folder)), hf_gpt2()
    _, loss = ours(idx[:, :-1], idx[:, 1:])
    reference = theirs(idx, labels=idx).loss
    loss.backward()
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    theirs = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        grad = theirs[name].grad
        grad = grad.t() if grad.shape != p.shape or "c_attn.w" in name or "c_proj.w" in name \
            or "c_fc.w" in name else grad
        torch.testing.assert_close(p.grad, grad, atol=1e-4, rtol=1e-3)


def test_targets_of_minus_one_are_left_out_of_the_loss(gpt, idx):
    targets = idx.clone()
    targets[:, 10:] = -1
    logits, loss = gpt(idx, targets)
    log_probs = logits[:, :10].log_softmax(-1).gather(2, idx[:, :10, None])
    torch.testing.assert_close(loss, -log_probs.mean())


def test_without_targets_only_the_last_position_is_computed(gpt, idx):
    full, _ = gpt(idx, idx)
    last, loss = gpt(idx)
    assert loss is None
    torch.testing.assert_close(last, full[:, -1:])


@pytest.mark.parametrize("theirs, ours", [("gelu_new", "gelu_tanh"), ("gelu", "gelu"),
                                          ("relu", "relu")])
def test_activations_are_those_of_transformers(theirs, ours, idx, tmp_path):
    hf = hf_gpt2(activation_function=theirs)
    hf.save_pretrained(tmp_path)
    gpt = GPT.from_pretrained(str(tmp_path)).eval()
    assert gpt.config.activation == ours
    torch.testing.assert_close(gpt(idx, idx)[0], hf(idx).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("theirs, ours", [("gelu_new", "gelu_tanh"), ("gelu", "gelu")])
def test_the_two_gelus_are_told_apart(theirs, ours):
    x = torch.linspace(-5, 5, 1001)
    reference = transformers.activations.ACT2FN[theirs](x)
    torch.testing.assert_close(ACTIVATIONS[ours](x), reference, atol=1e-6, rtol=0)


def test_initialisation_has_gpt2s_deviations():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**SHAPE | {"n_embd": 256}))
    std = {name: p.std().item() for name, p in gpt.named_parameters() if p.dim() == 2}
    for name, value in std.items():
        expected = 0.02 / math.sqrt(2 * 3) if name.endswith("c_proj.weight") else 0.02
        assert value == pytest.approx(expected, rel=0.05), name
    assert all((p == 0).all() for name, p in gpt.named_parameters() if name.endswith("bias"))


def test_a_seed_makes_the_weights_that_it_always_made():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**SHAPE))
    first = [p.flatten()[0].item() for p in (
        gpt.transformer.wte.weight, gpt.transformer.wpe.weight,
        gpt.transformer.h[2].attn.c_attn.weight, gpt.transformer.h[2].mlp.c_proj.weight)]
    # as of the first version of this file
    assert first == pytest.approx(
        [0.03091961, -0.009538543, 0.005939218, -0.002026511], rel=1e-5)


def test_input_and_output_embeddings_are_one_tensor(gpt):
    assert gpt.lm_head.weight is gpt.transformer.wte.weight


def test_parameter_count_is_gpt2s_with_and_without_positions():
    with torch.device("meta"):
        gpt = GPT(GPTConfig(vocab_size=50257))
    assert gpt.get_num_params(non_embedding=False) == 124_439_808  # OpenAI's 124M
    assert gpt.get_num_params() == 124_439_808 - 1024 * 768


CLASSIC = {f.name: f.default for f in fields(GPTConfig) if f.name in MODERN}


def modern(**changes) -> GPT:
    """A model of SHAPE with every departure from GPT-2, and random weights, its head's included."""
    torch.manual_seed(4)
    gpt = GPT(GPTConfig(**SHAPE | MODERN | changes))
    for name, p in gpt.named_parameters():  # so that greedy tokens vary
        p.data.normal_(std=0.05 if ".h." in name else 0.5)
    return gpt.eval()


def test_rotary_positions_are_those_of_transformers():
    llama = transformers.models.llama.modeling_llama
    config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=4, rope_theta=10000.0)
    x = torch.randn(2, 4, 32, 16)
    positions = torch.arange(7, 39)
    cos, sin = llama.LlamaRotaryEmbedding(config)(x, positions[None])
    reference, _ = llama.apply_rotary_pos_emb(x, x, cos, sin)
    rotary = RotaryPositions(GPTConfig(**SHAPE))
    torch.testing.assert_close(rotary.turn(x, rotary(x, positions)[1]), reference)


def test_rotary_products_depend_on_distances_alone():
    rotary = RotaryPositions(GPTConfig(**SHAPE))
    q, k = torch.randn(2, 1, 1, 32, 16)

    def products(first: int) -> torch.Tensor:
        _, rotation = rotary(q, torch.arange(first, first + 32))
        return rotary.turn(q, rotation) @ rotary.turn(k, rotation).mT  # (1, 1, 32, 32)

    torch.testing.assert_close(products(1000), products(0), atol=1e-3, rtol=0)
    assert (products(0) - q @ k.mT).abs().max() > 1


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("size", [3.0, 1e-4])  # the second next to what is added for stability
def test_rmsnorm_on_a_cpu_is_torchs_with_its_gradient(dtype, tolerance, size):
    torch.manual_seed(0)
    x = (size * torch.randn(5, 7, 48)).to(dtype).requires_grad_()
    y_grad = torch.randn(5, 7, 48).to(dtype)
    ours, plain = RMSNorm()(x), F.rms_norm(x.float(), (48,))
    assert ours.dtype == dtype
    assert relative(ours, plain) < tolerance
    with torch.no_grad():
        assert relative(RMSNorm()(x), plain) < tolerance
    grad, = torch.autograd.grad(ours, x, y_grad)
    reference, = torch.autograd.grad(plain, x, y_grad.float())
    assert relative(grad, reference) < tolerance
    assert RMSNorm()(torch.zeros(1, 4, requires_grad=True)).tolist() == [[0, 0, 0, 0]]


def test_an_untied_head_has_weights_of_its_own(idx):
    gpt = GPT(GPTConfig(**SHAPE | {"tie_weights": False}))
    gpt(idx, idx, loss_only=True)[1].backward()
    head, wte = gpt.lm_head.weight, gpt.transformer.wte.weight
    assert head is not wte and not torch.equal(head.grad, wte.grad)
    assert (gpt.get_num_params(non_embedding=False) - gpt.get_num_params()
            == 300 * 64 + 32 * 64)  # of tokens, of positions
    state = gpt.state_dict()
    GPT(gpt.config).load_weights(state, "itself")
    del state["lm_head.weight"]
    with pytest.raises(ValueError, match="lm_head.weight is missing"):
        gpt.load_weights(state, "a tied model")


def test_a_smear_adds_a_share_of_the_token_before(idx):
    gpt = modern(tie_weights=True)
    wte = gpt.transformer.wte
    x = wte(idx, None)
    plain = F.embedding(idx, wte.weight)
    torch.testing.assert_close(x[:, 1:], plain[:, 1:] + wte.smear * plain[:, :-1])
    assert torch.equal(x[:, 0], plain[:, 0])
    torch.testing.assert_close(wte(idx[:, 9:], idx[:, 8:9]), x[:, 9:])
    assert (GPT(gpt.config).transformer.wte.smear == 0.5).all()


def test_qk_norm_makes_the_size_of_queries_and_keys_irrelevant(idx):
    gpt = modern(bias=False)
    before, _ = gpt(idx, idx)
    for block in gpt.transformer.h:
        block.attn.c_attn.weight.data[:2 * 64] *= 7  # queries and keys
    torch.testing.assert_close(gpt(idx, idx)[0], before, atol=1e-3, rtol=1e-3)
    for block in gpt.transformer.h:
        block.attn.c_attn.weight.data[2 * 64:] *= 7  # values
    assert (gpt(idx, idx)[0] - before).abs().max() > 1e-3


def test_a_rotary_model_may_be_cropped_and_extended(idx):
    gpt = modern()
    before, _ = gpt(idx, idx)
    gpt.crop_block_size(64)
    torch.testing.assert_close(gpt(idx, idx)[0], before)
    assert gpt(torch.cat([idx, idx], dim=1))[0].isfinite().all()
    gpt.crop_block_size(8)
    with pytest.raises(ValueError, match="block_size = 8"):
        gpt(idx)
    with pytest.raises(ValueError, match="block_size = 0"):
        gpt.crop_block_size(0)


def test_bias_false_leaves_no_bias():
    gpt = GPT(GPTConfig(**SHAPE, bias=False))
    assert not [name for name, _ in gpt.named_parameters() if name.endswith("bias")]


# ----------------------------------------------------------------------------------- attention

@pytest.mark.parametrize("T, S", [(7, 7), (1, 7), (1, 1)])
def test_fused_and_written_out_attention_agree(T, S):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, T, 8), torch.randn(2, 3, S, 8), torch.randn(2, 3, S, 8)
    torch.testing.assert_close(attention(q, k, v), attention_by_hand(q, k, v))


def test_whole_model_agrees_with_written_out_attention(gpt, idx, monkeypatch):
    fused, _ = gpt(idx, idx)
    monkeypatch.setattr(CausalSelfAttention, "attend", staticmethod(attention_by_hand))
    torch.testing.assert_close(gpt(idx, idx)[0], fused, atol=1e-5, rtol=1e-4)


def test_no_position_sees_the_future(gpt, idx):
    changed = idx.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 300
    before, after = gpt(idx, idx)[0], gpt(changed, idx)[0]
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


@pytest.mark.parametrize("attend", [attention, attention_by_hand])
def test_attention_dropout_keeps_the_mean(attend):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 50, 8), torch.ones(1, 1, 50, 8)
    outputs = torch.stack([attend(q, k, v, 0.3) for _ in range(2000)])
    assert outputs.std() > 0.01
    assert outputs.mean().item() == pytest.approx(1, abs=0.03)


def test_dropout_acts_where_it_does_in_transformers(folder, idx, monkeypatch):
    # Written out, both draw their masks in the same order, so one seed makes them equal.
    monkeypatch.setattr(CausalSelfAttention, "attend", staticmethod(attention_by_hand))
    monkeypatch.setattr(kernels, "dropout", F.dropout)
    ours = GPT.from_pretrained(str(folder), dropout=0.3).train()
    theirs = transformers.GPT2LMHeadModel.from_pretrained(
        folder, embd_pdrop=0.3, attn_pdrop=0.3, resid_pdrop=0.3,
        attn_implementation="eager").train()
    torch.manual_seed(8)
    logits, _ = ours(idx, idx)
    torch.manual_seed(8)
    torch.testing.assert_close(logits, theirs(idx).logits, atol=1e-4, rtol=0)


def test_dropout_acts_in_training_only(folder, idx):
    gpt = GPT.from_pretrained(str(folder), dropout=0.5)
    assert not torch.equal(gpt(idx)[0], gpt(idx)[0])
    gpt.eval()
    assert torch.equal(gpt(idx)[0], gpt(idx)[0])


# ------------------------------------------------------- fast paths, each against the plain one

def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance of two tensors over the length of the second, in float64."""
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("p, of_256", [(0.2, 51), (0.5, 128), (0.001, 1), (0.999, 255)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_on_a_cpu_zeroes_its_share_and_scales_the_rest_by_just_that(p, of_256, dtype):
    torch.manual_seed(0)
    dropped = dropout(torch.ones(1001, 999, dtype=dtype), p)
    assert (dropped == 0).double().mean().item() == pytest.approx(of_256 / 256, abs=0.002)
    scale = torch.tensor(256 / (256 - of_256), dtype=dtype)
    assert set(dropped.unique().tolist()) == {0.0, scale.item()}


def test_dropout_on_a_cpu_has_no_pattern():
    torch.manual_seed(0)
    kept = (dropout(torch.ones(8 * 40_000), 0.5) > 0).double().view(-1, 8)
    correlation = torch.corrcoef(torch.cat([kept, kept.roll(1, 0)], dim=1).t())  # and with the last
    assert (correlation - torch.eye(16)).abs().max() < 0.03


def test_dropout_is_the_seeds_and_its_gradient_is_its_mask():
    x = torch.randn(7, 11, requires_grad=True)
    torch.manual_seed(3)
    first = dropout(x, 0.4)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.4), first)
    grad, = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(grad * x, first)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("V, B", [(300, 4), (50304, 22)])  # in one chunk, and in three
def test_the_loss_alone_is_the_loss_beside_the_logits(V, B, dtype, tolerance):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(block_size=32, vocab_size=V, n_layer=1, n_head=2, n_embd=32))
    idx = torch.randint(V, (B, 32))
    targets = torch.randint(V, (B, 32))
    targets[0, 3:9] = -1
    found = []
    for loss_only in (False, True):
        gpt.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits, loss = gpt(idx, targets, loss_only=loss_only)
        assert (logits is None) is loss_only
        (loss / 4).backward()
        found.append((loss.detach(), [p.grad for p in gpt.parameters()]))
    (plain_loss, plain), (loss, chunked) = found
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain_loss.item(), rel=tolerance / 10)
    for grad, expected in zip(chunked, plain, strict=True):
        assert relative(grad, expected) < tolerance


def test_the_loss_alone_cannot_be_differentiated_twice_by_mistake(idx):
    loss = GPT(GPTConfig(**SHAPE))(idx, idx, loss_only=True)[1]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_the_loss_alone_takes_less_memory_than_the_logits():
    # The largest tensor that is ever made, in elements: never all rows of all columns.
    gpt = GPT(GPTConfig(block_size=64, vocab_size=50304, n_layer=1, n_head=2, n_embd=16))
    idx = torch.zeros(12, 64, dtype=torch.long)
    with torch.profiler.profile(profile_memory=True) as profile:
        gpt(idx, idx, loss_only=True)[1].backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 4 * 333 * 50304 <= largest < 4 * 12 * 64 * 50304


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 3, 10, 16, 17])
def test_few_rows_are_multiplied_like_many(rows, bias, dtype, tolerance):
    torch.manual_seed(0)
    layer = Linear(256, 1024, bias=bias).to(dtype)
    x = torch.randn(rows, 1, 256, dtype=dtype)
    expected = F.linear(x, layer.weight, layer.bias)
    with torch.no_grad():
        y = layer(x)
    assert y.shape == (rows, 1, 1024) and y.dtype == dtype and y.is_contiguous()
    assert relative(y, expected) < tolerance


@pytest.mark.parametrize("T", [16, 128, 129])
def test_attention_in_bfloat16_has_the_gradients_of_float32(T):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 2, T, 8, requires_grad=True) for _ in range(3)]
    plain = F.scaled_dot_product_attention(*inputs, is_causal=True)
    ours = attention(*(x.bfloat16() for x in inputs))
    assert relative(ours, plain) < 1e-2
    weights = torch.randn_like(plain)
    for found, expected in zip(torch.autograd.grad((ours * weights).sum(), inputs),
                               torch.autograd.grad((plain * weights).sum(), inputs), strict=True):
        assert relative(found, expected) < 2e-2


def test_200_steps_in_bfloat16_follow_the_losses_of_float32():
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        gpt = GPT(GPTConfig(block_size=32, vocab_size=64, n_layer=2, n_head=2, n_embd=64))
        optimizer = gpt.configure_optimizers(0.1, 1e-3, (0.9, 0.99))
        following = torch.randint(64, (64, 4))  # each token is followed by one of four
        text = [0]
        for choice in torch.randint(4, (4000,)).tolist():
            text.append(following[text[-1], choice].item())
        text = torch.tensor(text)
        curve = []
        for _ in range(200):
            starts = torch.randint(len(text) - 33, (8,))
            x = torch.stack([text[start:start + 33] for start in starts])
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = gpt(x[:, :-1], x[:, 1:], loss_only=True)[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        losses.append(torch.tensor(curve))
    plain, bfloat16 = losses
    assert plain[-1] < 0.7 * plain[0]
    smooth = [curve.view(10, 20).mean(dim=1) for curve in (plain, bfloat16)]
    torch.testing.assert_close(smooth[1], smooth[0], rtol=0.01, atol=0)


@pytest.fixture
def graphs(monkeypatch):
    """torch.compile that stops at the graphs, without the minute that code takes; and their
    counters, from zero."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile",
                        lambda f, mode=None, **options: compile(f, backend="eager", **options))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    return counters


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.2}, MODERN])
def test_training_and_evaluation_are_a_graph_each_without_breaks(graphs, changes):
    gpt = GPT(GPTConfig(**SHAPE | changes))
    net = torch.compile(gpt)
    for _ in range(3):
        idx = torch.randint(300, (2, 32))
        gpt.train()
        net(idx, idx, loss_only=True)[1].backward()
        gpt.eval()
        with torch.no_grad():
            net(idx, idx)
    assert graphs["stats"]["unique_graphs"] == 2
    assert not graphs["graph_break"]


@pytest.mark.parametrize("recipe", ["gpt2", "modern"])
def test_compiled_decoding_is_one_graph_for_all_lengths_and_says_the_same(
        graphs, gpt, idx, recipe):
    gpt = modern() if recipe == "modern" else gpt
    compiled = GPT(gpt.config).eval()
    compiled.load_state_dict(gpt.state_dict())
    compiled.compile_decode()
    for n in range(3, 13):  # more lengths than graphs that torch would keep
        for T in (1, 5):
            assert torch.equal(compiled.generate(idx[:, :T], n, temperature=0),
                               gpt.generate(idx[:, :T], n, temperature=0))
    assert torch.equal(compiled.generate(idx, 20, temperature=0),  # beyond block_size
                       gpt.generate(idx, 20, temperature=0))
    assert graphs["stats"]["unique_graphs"] == 1
    assert not graphs["graph_break"]


def test_the_loss_alone_is_whole_in_float16_whose_gradients_want_a_scaled_loss(gpt, idx):
    with torch.autocast("cpu", torch.float16):
        plain, (logits, loss) = gpt(idx, idx)[1], gpt(idx, idx, loss_only=True)
    assert logits is None and loss.grad_fn.name() == "NllLossBackward0"
    assert torch.equal(loss, plain)


# ------------------------------------------------------------------------------------ sampling

def uncached(gpt: GPT, idx: torch.Tensor, n: int) -> torch.Tensor:
    """Greedy decoding that reads everything again for every token."""
    for _ in range(n):
        idx = torch.cat([idx, gpt(idx)[0][:, -1].argmax(-1, keepdim=True)], dim=1)
    return idx


@pytest.mark.parametrize("T", [1, 5, 31])
def test_greedy_tokens_equal_those_without_a_cache_up_to_block_size(gpt, idx, T):
    tokens = gpt.generate(idx[:, :T], 32 - T + 1, temperature=0)
    assert torch.equal(tokens, uncached(gpt, idx[:, :T], 32 - T + 1))


@pytest.mark.parametrize("name", [*MODERN, "all"])
def test_token_by_token_every_recipe_says_what_it_says_of_the_whole(name, idx):
    gpt = modern() if name == "all" else modern(**CLASSIC | {name: MODERN[name]})
    whole, _ = gpt(idx, idx)
    past = torch.zeros(3, 2, 2, 4, 32, 16)
    with torch.no_grad():
        for t in range(32):
            logits, _ = gpt(idx[:, t:t + 1], past=past, start=t,
                            before=idx[:, t - 1:t] if t else None)
            torch.testing.assert_close(logits[:, 0], whole[:, t], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("T", [1, 5])
def test_greedy_tokens_of_the_modern_recipe_equal_those_without_a_cache(idx, T):
    gpt = modern()
    tokens = gpt.generate(idx[:, :T], 33 - T, temperature=0)
    assert torch.equal(tokens, uncached(gpt, idx[:, :T], 33 - T))
    assert tokens[:, T:].unique().numel() > 5


def test_greedy_tokens_equal_those_of_transformers(gpt, hf, idx):
    theirs = hf.generate(idx[:, :5], max_new_tokens=20, do_sample=False, eos_token_id=None,
                         pad_token_id=0, attention_mask=torch.ones(2, 5))
    assert torch.equal(gpt.generate(idx[:, :5], 20, temperature=0), theirs)


@pytest.mark.parametrize("recipe", ["gpt2", "modern"])
def test_beyond_block_size_the_last_half_is_read_again(gpt, idx, recipe):
    gpt = modern() if recipe == "modern" else gpt
    read = []
    hook = gpt.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    tokens = gpt.generate(idx[:, :5], 32 - 5 + 20, temperature=0)
    hook.remove()
    # 5 to begin with, then one at a time until 32 are held; then the last 16, and so on.
    assert [x.size(1) for x in read] == [5] + 27 * [1] + [16] + 16 * [1] + [16] + [1]
    assert torch.equal(read[28], tokens[:, 17:33])
    assert torch.equal(tokens[:, 33], gpt(tokens[:, 17:33])[0][:, -1].argmax(-1))
    assert torch.equal(tokens[:, 34], gpt(tokens[:, 17:34])[0][:, -1].argmax(-1))


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_sampling_goes_on_beyond_the_smallest_contexts(block_size):
    gpt = GPT(GPTConfig(**SHAPE | {"block_size": block_size})).eval()
    assert gpt.generate(torch.zeros(2, 5, dtype=torch.long), 9).shape == (2, 14)


def test_prompts_longer_than_block_size_use_their_end(gpt, idx):
    long = torch.cat([idx, idx.flip(1)], dim=1)
    token = gpt.generate(long, 1, temperature=0)[:, -1]
    assert torch.equal(token, gpt(long[:, -32:])[0][:, -1].argmax(-1))


def test_generate_returns_prompts_and_continuations_and_stream_yields_them(gpt, idx):
    torch.manual_seed(3)
    whole = gpt.generate(idx[:, :4], 6, top_k=10)
    torch.manual_seed(3)
    steps = list(gpt.stream(idx[:, :4], 6, top_k=10))
    assert whole.shape == (2, 10)
    assert torch.equal(whole[:, :4], idx[:, :4])
    assert torch.equal(whole[:, 4:], torch.stack(steps, dim=1))


def test_top_k_keeps_exactly_k_even_among_ties():
    torch.manual_seed(0)
    logits = torch.zeros(1, 20).expand(3000, 20)
    assert len(draw(logits, 1.0, 3, None).unique()) == 3


def frequencies(logits: torch.Tensor, **options) -> torch.Tensor:
    torch.manual_seed(0)
    options = {"temperature": 1.0, "top_k": None, "top_p": None} | options
    ids = draw(logits.expand(100_000, -1), **options)
    return torch.bincount(ids, minlength=logits.size(1)) / 100_000


@pytest.mark.parametrize("options, warper", [
    ({}, None),
    ({"temperature": 0.5}, transformers.TemperatureLogitsWarper(0.5)),
    ({"top_k": 5}, transformers.TopKLogitsWarper(5)),
    ({"top_p": 0.6}, transformers.TopPLogitsWarper(0.6)),
    ({"top_p": 1e-9}, transformers.TopPLogitsWarper(1e-9)),
])
def test_tokens_are_drawn_as_often_as_transformers_would(options, warper):
    torch.manual_seed(4)
    logits = torch.randn(1, 12) * 2
    expected = (warper(None, logits) if warper else logits).softmax(-1)[0]
    torch.testing.assert_close(frequencies(logits, **options), expected, atol=0.006, rtol=0)
    assert (frequencies(logits, **options)[expected == 0] == 0).all()


def test_repetition_penalty_equals_that_of_transformers(idx):
    torch.manual_seed(5)
    logits = torch.randn(2, 300)
    reference = transformers.RepetitionPenaltyLogitsProcessor(1.7)(idx, logits.clone())
    torch.testing.assert_close(kernels.penalize_repeats(logits, idx, 1.7), reference)


def test_repetition_penalty_reaches_generation(gpt, idx):
    theirs = hf_gpt2().generate(idx[:, :5], max_new_tokens=20, do_sample=False, eos_token_id=None,
                                pad_token_id=0, repetition_penalty=1.5,
                                attention_mask=torch.ones(2, 5))
    ours = gpt.generate(idx[:, :5], 20, temperature=0, repetition_penalty=1.5)
    assert torch.equal(ours, theirs)


def test_ids_beyond_the_tokenizers_are_never_drawn(gpt, idx):
    for options in ({"temperature": 0}, {"temperature": 5.0}, {"top_k": 299}, {"top_p": 0.999}):
        tokens = gpt.generate(idx[:, :1] % 7, 60, n_vocab=7, **options)
        assert tokens[:, 1:].max() < 7


def test_prompts_may_hold_ids_that_are_never_drawn(gpt, idx):
    tokens = gpt.generate(idx, 5, n_vocab=7, repetition_penalty=1.5)
    assert idx.max() >= 7 > tokens[:, 32:].max()


def test_a_temperature_next_to_0_takes_the_likeliest_token(gpt, idx):
    assert torch.equal(gpt.generate(idx, 5, temperature=1e-50),
                       gpt.generate(idx, 5, temperature=0))


def test_a_stopped_row_repeats_the_stop_token_while_others_go_on(gpt, idx):
    def sample(stop: int | None) -> list[list[int]]:
        torch.manual_seed(6)
        return gpt.generate(idx[:, :4], 20, top_k=50, stop=stop)[:, 4:].tolist()

    first, second = sample(None)
    stop = next(i for i in first[5:] if i not in second)
    end = first.index(stop) + 1
    assert end < 20
    assert len(set(first[end:])) > 1
    assert sample(stop) == [first[:end] + [stop] * (20 - end), second]


def test_stream_ends_when_all_rows_have_stopped(gpt, idx):
    row = idx[:1, :4]
    free = gpt.generate(row, 20, temperature=0)[0, 4:].tolist()
    stop = free[5]
    assert len(list(gpt.stream(row, 20, temperature=0, stop=stop))) == free.index(stop) + 1
    filled = gpt.generate(row, 20, temperature=0, stop=stop)
    assert filled[0, 4 + free.index(stop):].tolist() == [stop] * (20 - free.index(stop))


@pytest.mark.parametrize("options, word", [
    ({"temperature": -1}, "temperature"), ({"top_k": 0}, "top_k"), ({"top_p": 0}, "top_p"),
    ({"top_p": 2}, "top_p"), ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"stop": 300}, "stop"), ({"n_vocab": 301}, "301"), ({"max_new_tokens": -1}, "max_new")])
def test_sampling_settings_out_of_range_are_named(gpt, idx, options, word):
    with pytest.raises(ValueError, match=word):
        gpt.generate(idx, **({"max_new_tokens": 2} | options))


def test_a_top_p_too_small_for_float32_takes_the_likeliest(gpt, idx):
    assert torch.equal(gpt.generate(idx[:, :4], 6, top_p=1e-300),
                       gpt.generate(idx[:, :4], 6, temperature=0))


def test_an_empty_prompt_is_refused(gpt):
    with pytest.raises(ValueError, match="empty"):
        gpt.generate(torch.zeros(1, 0, dtype=torch.long), 2)


def test_generation_under_autocast_keeps_its_cache_in_bfloat16(gpt, idx):
    with torch.autocast("cpu", torch.bfloat16):
        tokens = gpt.generate(idx[:, :4], 6, temperature=0)
        cached = uncached(gpt, idx[:, :4], 6)
    assert torch.equal(tokens, cached)


# ------------------------------------------------------------------------ size, optimizer, FLOPs

def test_cropping_keeps_the_remaining_positions(folder, idx):
    gpt = GPT.from_pretrained(str(folder)).eval()
    before, _ = gpt(idx[:, :16], idx[:, :16])
    gpt.crop_block_size(16)
    assert gpt.transformer.wpe.num_embeddings == 16
    GPT(gpt.config).load_weights(gpt.state_dict(), "the cropped model")
    torch.testing.assert_close(gpt(idx[:, :16], idx[:, :16])[0], before)
    with pytest.raises(ValueError, match="block_size"):
        gpt(idx)
    with pytest.raises(ValueError, match="32"):
        gpt.crop_block_size(32)


@pytest.mark.parametrize("changes", [{}, {"tie_weights": False}, MODERN])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_in_one_group_of_its_kind(changes, optimizer):
    gpt = GPT(GPTConfig(**SHAPE | changes))
    names = {p: name for name, p in gpt.named_parameters()}
    opt = gpt.configure_optimizers(
        0.1, 1e-2, (0.9, 0.95), optimizer, muon_lr=0.03, embedding_lr=0.02, embedding_decay=0.0,
        head_lr=0.005, head_decay=0.2)
    names_of_vectors = re.compile("ln_|bias|smear")
    owners = {}
    for group in opt.param_groups:
        assert group["lr_ratio"] == pytest.approx(group["lr"] / 1e-2)
        for p in group["params"]:
            assert owners.setdefault(names[p], group) is group
    assert owners.keys() == set(names.values())
    for name, group in owners.items():
        lr, decay, muon = ((1e-2, 0.0, False) if names_of_vectors.search(name) else
                           (0.02, 0.0, False) if "wte" in name or "wpe" in name else
                           (0.005, 0.2, False) if name == "lm_head.weight" else
                           (0.03, 0.1, True) if optimizer == "muon" else (1e-2, 0.1, False))
        assert (group["lr"], group["weight_decay"], "momentum" in group) == (lr, decay, muon), name
        if muon:
            assert group["parts"] == (3 if "c_attn" in name else 1)


def test_weight_decay_reaches_matrices_only_and_adamw_is_torchs(folder):
    ours, reference = (GPT.from_pretrained(str(folder)) for _ in range(2))
    optimizer = ours.configure_optimizers(0.1, 1e-2, (0.9, 0.95))
    plain = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.1 if p.dim() >= 2 else 0.0}
         for p in reference.parameters()], lr=1e-2, betas=(0.9, 0.95), foreach=False)
    for gpt, opt in ((ours, optimizer), (reference, plain)):
        torch.manual_seed(7)
        for _ in range(3):
            for p in gpt.parameters():
                p.grad = torch.randn_like(p)
            opt.step()
    for (name, a), b in zip(ours.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("shape", [SHAPE, SHAPE | {"n_layer": 1, "n_embd": 32, "vocab_size": 77},
                                   SHAPE | MODERN])
def test_flops_are_those_that_torch_counts(shape, monkeypatch):
    # Written out, since torch does not count the fused attention of a CPU.
    monkeypatch.setattr(CausalSelfAttention, "attend", staticmethod(attention_by_hand))
    gpt = GPT(GPTConfig(**shape))
    idx = torch.zeros(2, 32, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        gpt(idx, idx)[1].backward()
    assert gpt.flops_per_token() * idx.numel() == counter.get_total_flops()


def test_mfu_is_flops_over_time_over_peak(gpt):
    flops = gpt.flops_per_token() * 32 * 10
    assert gpt.estimate_mfu(10, 2.0, peak_flops=flops) == pytest.approx(0.5)
    assert gpt.estimate_mfu(10, 2.0, peak_flops=None) is None


@pytest.mark.parametrize("wrong, words", [
    ({"n_head": 5}, "n_embd = 64.*n_head = 5"), ({"n_layer": 0}, "n_layer = 0"),
    ({"dropout": 1.5}, "dropout = 1.5"), ({"activation": "swish"}, "gelu_tanh, gelu, relu"),
    ({"positions": "alibi"}, "learned, rotary"),
    ({"positions": "rotary", "n_embd": 60}, "15: expected an even"),
    ({"block_size": -1}, "block_size = -1")])
def test_a_shape_that_cannot_be_is_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**SHAPE | wrong)


# --------------------------------------------------------------------------- pretrained weights

def test_a_base_model_without_prefix_and_head_loads(hf, idx, tmp_path):
    hf.transformer.save_pretrained(tmp_path)  # GPT2Model: names start with wte, h, ln_f
    gpt = GPT.from_pretrained(str(tmp_path)).eval()
    torch.testing.assert_close(gpt(idx, idx)[0], hf(idx).logits, atol=1e-4, rtol=0)


def test_sharded_safetensors_load(hf, idx, tmp_path):
    hf.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    gpt = GPT.from_pretrained(str(tmp_path)).eval()
    torch.testing.assert_close(gpt(idx, idx)[0], hf(idx).logits, atol=1e-4, rtol=0)


def test_pytorch_model_bin_with_causal_masks_loads(hf, idx, tmp_path):
    hf.config.save_pretrained(tmp_path)
    state = dict(hf.state_dict())
    half = len(state) // 2
    for i in range(3):
        state[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
        state[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    items = list(state.items())
    torch.save(dict(items[:half]), tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save(dict(items[half:]), tmp_path / "pytorch_model-00002-of-00002.bin")
    gpt = GPT.from_pretrained(str(tmp_path), dropout=0.1)
    assert gpt.config.dropout == 0.1
    torch.testing.assert_close(gpt.eval()(idx, idx)[0], hf(idx).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("change, words", [
    ({"drop": "transformer.h.1.mlp.c_fc.weight"}, "h.1.mlp.c_fc.weight is missing"),
    ({"add": "transformer.h.3.ln_1.weight"}, "h.3.ln_1.weight is unknown"),
    ({"shape": "transformer.wpe.weight"}, "wpe.weight is .*31.* not .*32"),
    ({"head": "lm_head.weight"}, "ties")])
def test_every_tensor_is_accounted_for(hf, tmp_path, change, words):
    hf.config.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    (kind, name), = change.items()
    if kind == "drop":
        del state[name]
    else:
        state[name] = {"add": torch.ones(64), "shape": torch.ones(31, 64),
                       "head": torch.ones(300, 64)}[kind]
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=words):
        GPT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("config, words", [
    ({"model_type": "llama"}, "model_type = 'llama'"), ({"n_inner": 100}, "n_inner = 100"),
    ({"n_head": None}, "n_head = None"), ({"activation_function": "silu"}, "silu"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse")])
def test_models_of_another_form_are_refused(hf, folder, tmp_path, config, words):
    import json
    usual = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(usual | config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(ValueError, match=words):
        GPT.from_pretrained(str(tmp_path))


def test_files_that_are_not_whole_are_named(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match="no pretrained model"):
        GPT.from_pretrained(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        GPT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("name", ["gpt2", "somebody/some-gpt2", "not a name"])
def test_without_a_network_the_hub_is_named(name):
    with pytest.raises(ValueError, match="Hugging Face hub"):
        GPT.from_pretrained(name)
