"""The model against transformers, torch's own counters, and closed forms."""

import ast
import json
import math
import sys
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import MODERN, ROOT, run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen3 import modeling_qwen3

from engine import cpu
from model import GPT, CausalSelfAttention, GPTConfig, KVCache, rotary_emb, sample_token

SHAPE = {"block_size": 32, "vocab_size": 300, "n_layer": 3, "n_head": 4, "n_embd": 64}
CLASSIC = {f.name: f.default for f in fields(GPTConfig) if f.name in MODERN}
VARIANTS = {"gpt2": {}, "modern": MODERN} | {
    name: CLASSIC | {name: value} for name, value in MODERN.items()}


def hf_gpt2(**changes) -> transformers.GPT2LMHeadModel:
    """transformers' GPT-2 of SHAPE with random weights, biases and norms included."""
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        n_positions=32, vocab_size=300, n_layer=3, n_head=4, n_embd=64, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, **changes)
    hf = transformers.GPT2LMHeadModel(config)
    for name, p in hf.named_parameters():  # large enough for greedy tokens to vary
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


def random_gpt(variant: str, **changes) -> GPT:
    """A model of SHAPE, with random weights that make greedy tokens vary."""
    torch.manual_seed(4)
    gpt = GPT(GPTConfig(**SHAPE | VARIANTS[variant] | changes))
    for name, p in gpt.named_parameters():
        p.data.normal_(std=0.05 if ".h." in name else 0.5)
    return gpt.eval()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance of two tensors over the length of the second, in float64."""
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm()).item()


# --------------------------------------------------------------------------------- one file

ALONE = """
import sys
import torch
from model import GPT, GPTConfig

torch.manual_seed(0)
gpt = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16))
optimizer = gpt.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
idx = torch.arange(8)[None]
losses = []
for _ in range(2):
    losses.append(gpt(idx, idx, loss_only=True)[1])
    losses[-1].backward()
    optimizer.step()
assert losses[1] < losses[0]
assert gpt.eval().generate(idx, 4, 0.8, 5).shape == (1, 12)
torch.save({"model": gpt.state_dict(), "model_args": gpt.config.to_model_args()}, "ckpt.pt")
for path in ("ckpt.pt", "."):
    loaded = GPT.from_pretrained(path, dict(dropout=0.1)).eval()
    assert torch.equal(loaded(idx)[0], gpt(idx)[0])
torch.save(GPT.from_pretrained(sys.argv[1]).eval()(torch.arange(32)[None])[0], "logits.pt")
"""


def test_model_py_alone_in_a_folder_trains_generates_and_loads(folder, hf, tmp_path):
    (tmp_path / "model.py").write_text((ROOT / "model.py").read_text())
    done = run("-c", ALONE, folder, cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    logits = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(logits, hf(torch.arange(32)[None]).logits[:, -1:],
                               atol=1e-4, rtol=0)


def test_model_py_imports_torch_and_the_standard_library_alone():
    def imported(nodes) -> set[str]:
        return {name.split(".")[0] for node in nodes for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import) else
            [node.module] if isinstance(node, ast.ImportFrom) else [])}

    tree = ast.parse((ROOT / "model.py").read_text())
    assert imported(tree.body) - sys.stdlib_module_names == {"torch"}
    assert imported(ast.walk(tree)) - sys.stdlib_module_names == {
        "torch", "safetensors", "huggingface_hub"}


def test_code_written_for_nanogpt_runs(folder, idx):
    gpt = GPT.from_pretrained(str(folder), {"dropout": 0.1})
    assert gpt.config.dropout == gpt.transformer.drop.p == 0.1
    optimizer = gpt.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    logits, loss = gpt(idx, idx)
    loss.backward()
    optimizer.step()
    assert gpt.estimate_mfu(10, 2.0) == pytest.approx(
        gpt.flops_per_token() * 32 * 10 / 2.0 / 312e12)  # of an A100
    assert gpt.estimate_mfu(10, 2.0, None) is None
    gpt.crop_block_size(16)
    assert gpt.generate(idx, 5, 0.8, 10).shape == (2, 37)
    assert gpt.get_num_params() == gpt.get_num_params(non_embedding=False) - 16 * 64


# --------------------------------------------------------------------------------- it is GPT-2

@pytest.mark.parametrize("theirs, ours", [("gelu_new", "gelu_tanh"), ("gelu", "gelu"),
                                          ("relu", "relu")])
def test_logits_equal_those_of_transformers_with_each_activation(theirs, ours, idx, tmp_path):
    hf = hf_gpt2(activation_function=theirs)
    hf.save_pretrained(tmp_path)
    gpt = GPT.from_pretrained(str(tmp_path)).eval()
    assert gpt.config.activation == ours
    torch.testing.assert_close(gpt(idx, idx)[0], hf(idx).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("theirs, ours", [("gelu_new", "gelu_tanh"), ("gelu", "gelu")])
def test_exact_and_approximate_gelu_are_distinguished(theirs, ours):
    x = torch.linspace(-5, 5, 1001)
    expected = transformers.activations.ACT2FN[theirs](x)
    mlp = GPT(GPTConfig(**SHAPE, activation=ours)).transformer.h[0].mlp
    torch.testing.assert_close(mlp.act(x), expected, atol=1e-6, rtol=0)


def test_loss_and_gradients_equal_those_of_transformers(folder, idx):
    ours, theirs = GPT.from_pretrained(str(folder)), hf_gpt2()
    _, loss = ours(idx[:, :-1], idx[:, 1:])
    expected = theirs(idx, labels=idx).loss
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        is_transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        grad = grads[name].t() if is_transposed else grads[name]
        torch.testing.assert_close(p.grad, grad, atol=1e-4, rtol=1e-3)


def test_targets_of_minus_one_are_ignored_in_the_loss(gpt, idx):
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


def test_no_position_depends_on_later_ones(gpt, idx):
    changed = idx.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 300
    before, after = gpt(idx, idx)[0], gpt(changed, idx)[0]
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


def test_dropout_acts_in_training_only(folder, idx):
    gpt = GPT.from_pretrained(str(folder), {"dropout": 0.5})
    assert not torch.equal(gpt(idx)[0], gpt(idx)[0])
    gpt.eval()
    assert torch.equal(gpt(idx)[0], gpt(idx)[0])


def test_initialization_has_the_standard_deviations_of_gpt2():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**SHAPE | {"n_embd": 256}))
    for name, p in gpt.named_parameters():
        if p.dim() == 2:
            expected = 0.02 / math.sqrt(2 * 3) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.05), name
        else:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name


def test_a_seed_gives_the_weights_that_it_always_gave():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**SHAPE))
    first = [p.flatten()[0].item() for p in (
        gpt.transformer.wte.weight, gpt.transformer.wpe.weight,
        gpt.transformer.h[2].attn.c_attn.weight, gpt.transformer.h[2].mlp.c_proj.weight)]
    # as of the first version of this file
    assert first == pytest.approx(
        [0.03091961, -0.009538543, 0.005939218, -0.002026511], rel=1e-5)


def test_parameter_count_is_gpt2s_with_and_without_positions():
    with torch.device("meta"):
        gpt = GPT(GPTConfig(vocab_size=50257))
    assert gpt.lm_head.weight is gpt.transformer.wte.weight
    assert gpt.get_num_params(non_embedding=False) == 124_439_808  # OpenAI's 124M
    assert gpt.get_num_params() == 124_439_808 - 1024 * 768


@pytest.mark.parametrize("wrong, words", [
    ({"n_head": 5}, "n_embd = 64.*n_head = 5"), ({"n_layer": 0}, "n_layer = 0"),
    ({"dropout": 1.5}, "dropout = 1.5"), ({"activation": "swish"}, "gelu_tanh, gelu, relu"),
    ({"positions": "alibi"}, "learned, rotary"),
    ({"positions": "rotary", "n_embd": 60}, "15: .* even head width"),
    ({"block_size": -1}, "block_size = -1"), ({"vocab_size": 1e3}, "vocab_size = 1000.0")])
def test_a_configuration_that_makes_no_network_is_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**SHAPE | wrong)


# ----------------------------------------------------------------- departures from GPT-2

def test_rotary_attention_with_qk_norm_is_that_of_qwen3_in_transformers():
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=4, head_dim=16,
        attention_bias=True, rms_norm_eps=torch.finfo(torch.float32).eps, rope_theta=10000.0,
        attn_implementation="eager")
    theirs = modeling_qwen3.Qwen3Attention(config, layer_idx=0)
    ours = CausalSelfAttention(GPTConfig(**SHAPE, qk_norm=True, positions="rotary"))
    q, k, v, o = theirs.q_proj, theirs.k_proj, theirs.v_proj, theirs.o_proj
    ours.load_state_dict({
        "c_attn.weight": torch.cat([q.weight, k.weight, v.weight]), "c_proj.weight": o.weight,
        "c_attn.bias": torch.cat([q.bias, k.bias, v.bias]), "c_proj.bias": o.bias})
    x, positions = torch.randn(2, 32, 64), torch.arange(7, 39)
    cos_sin = modeling_qwen3.Qwen3RotaryEmbedding(config)(x, positions[None])
    mask = torch.full((1, 1, 32, 32), -torch.inf).triu(1)
    torch.testing.assert_close(ours(x, positions, rotary_emb(positions, 16)),
                               theirs(x, cos_sin, mask)[0])


def test_an_untied_head_has_a_weight_of_its_own(idx):
    gpt = GPT(GPTConfig(**SHAPE | {"tie_weights": False}))
    gpt(idx, idx, loss_only=True)[1].backward()
    head, wte = gpt.lm_head.weight, gpt.transformer.wte.weight
    assert head is not wte and not torch.equal(head.grad, wte.grad)
    assert (gpt.get_num_params(non_embedding=False) - gpt.get_num_params()
            == 300 * 64 + 32 * 64)  # of tokens, of positions
    state = gpt.state_dict()
    GPT(gpt.config).load_weights(state, "itself")
    del state["lm_head.weight"]
    with pytest.raises(ValueError, match=r'Missing key.*"lm_head.weight"'):
        gpt.load_weights(state, "a tied model")


def test_smear_adds_a_fraction_of_the_previous_tokens_embedding(idx):
    wte = random_gpt("smear").transformer.wte
    x, plain = wte(idx), F.embedding(idx, wte.weight)
    torch.testing.assert_close(x[:, 1:], plain[:, 1:] + wte.smear * plain[:, :-1])
    assert torch.equal(x[:, 0], plain[:, 0])
    assert (GPT(GPTConfig(**SHAPE, smear=True)).transformer.wte.smear == 0.5).all()


def test_learned_positions_may_be_cropped_only(folder, idx):
    gpt = GPT.from_pretrained(str(folder)).eval()
    before, _ = gpt(idx[:, :16], idx[:, :16])
    gpt.crop_block_size(16)
    assert gpt.transformer.wpe.num_embeddings == 16
    GPT(gpt.config).load_weights(gpt.state_dict(), "the cropped model")
    torch.testing.assert_close(gpt(idx[:, :16], idx[:, :16])[0], before)
    with pytest.raises(ValueError, match="32 tokens is longer than block_size = 16"):
        gpt(idx)
    with pytest.raises(ValueError, match="block_size = 32"):
        gpt.crop_block_size(32)


def test_rotary_positions_may_be_cropped_and_extended(idx):
    gpt = random_gpt("modern")
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


# ------------------------------------------------------------------- the loss without logits

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("V, B", [(300, 4), (50304, 11)])  # in one chunk, and in two
def test_loss_only_has_the_loss_and_gradients_of_the_logits(V, B, dtype, tolerance):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(block_size=32, vocab_size=V, n_layer=1, n_head=2, n_embd=32))
    idx = torch.randint(V, (B, 32))
    targets = torch.randint(V, (B, 32))
    targets[0, 3:9] = -1
    results = []
    for loss_only in (False, True):
        gpt.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits, loss = gpt(idx, targets, loss_only=loss_only)
        assert (logits is None) is loss_only
        (loss / 4).backward()
        results.append((loss.detach(), [p.grad for p in gpt.parameters()]))
    (expected_loss, expected), (loss, chunked) = results
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected_loss.item(), rel=tolerance / 10)
    for grad, expected_grad in zip(chunked, expected, strict=True):
        assert relative(grad, expected_grad) < tolerance


def test_a_second_backward_of_loss_only_is_an_error(idx):
    loss = GPT(GPTConfig(**SHAPE))(idx, idx, loss_only=True)[1]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_loss_only_allocates_less_than_the_logits():
    gpt = GPT(GPTConfig(block_size=64, vocab_size=50304, n_layer=1, n_head=2, n_embd=16))
    idx = torch.zeros(12, 64, dtype=torch.long)
    with torch.profiler.profile(profile_memory=True) as profile:
        gpt(idx, idx, loss_only=True)[1].backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 4 * 333 * 50304 <= largest < 4 * 12 * 64 * 50304  # a chunk, but not all rows


def test_in_float16_loss_only_has_gradients_that_a_scaled_loss_keeps_from_underflow(gpt, idx):
    with torch.autocast("cpu", torch.float16):
        expected, (logits, loss) = gpt(idx, idx)[1], gpt(idx, idx, loss_only=True)
    assert logits is None and loss.grad_fn.name() == "NllLossBackward0"
    assert torch.equal(loss, expected)


# ------------------------------------------------------------------------------- torch.compile

@pytest.fixture
def counters(monkeypatch):
    """Counters of torch.compile, which here captures graphs, but generates no code."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile",
                        lambda f, mode=None, **options: compile(f, backend="eager", **options))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch._dynamo.utils.counters


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("changes", [{}, {"dropout": 0.2}, MODERN])
def test_training_and_evaluation_are_one_graph_each(counters, changes, accelerated):
    gpt = GPT(GPTConfig(**SHAPE | changes))
    if accelerated:
        cpu.accelerate(gpt)
    net = torch.compile(gpt)
    for _ in range(3):
        idx = torch.randint(300, (2, 32))
        gpt.train()
        net(idx, idx, loss_only=True)[1].backward()
        gpt.eval()
        with torch.no_grad():
            net(idx, idx)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.parametrize("variant, accelerated", [
    ("gpt2", False), ("modern", False), ("modern", True)])
def test_compiled_decoding_is_one_graph_for_all_lengths(counters, variant, accelerated, idx):
    gpt = random_gpt(variant)
    compiled = random_gpt(variant)
    compiled.compile_decode()
    if accelerated:
        cpu.accelerate(compiled)
    for n in range(3, 13):  # more lengths than graphs that torch would keep
        assert torch.equal(compiled.generate(idx[:, :n // 2], n, temperature=0),
                           gpt.generate(idx[:, :n // 2], n, temperature=0))
    assert torch.equal(compiled.generate(idx, 20, temperature=0),  # beyond block_size
                       gpt.generate(idx, 20, temperature=0))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


# ------------------------------------------------------------------------------------- the cache

def uncached(gpt: GPT, idx: torch.Tensor, n: int) -> torch.Tensor:
    """Greedy decoding that reads everything again for every token."""
    for _ in range(n):
        idx = torch.cat([idx, gpt(idx)[0][:, -1].argmax(-1, keepdim=True)], dim=1)
    return idx


@pytest.mark.parametrize("lengths", [32 * [1], [5, 1, 9, 17]])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cached_forward_in_pieces_equals_the_whole(variant, lengths, idx):
    gpt = random_gpt(variant)
    whole, _ = gpt(idx, idx)
    cache = KVCache(gpt.config, batch_size=2, max_len=32)
    with torch.no_grad():
        pieces = [gpt(piece, piece, cache=cache)[0] for piece in idx.split(lengths, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("T", [1, 5, 31])
@pytest.mark.parametrize("variant", ["gpt2", "modern"])
def test_greedy_tokens_equal_those_without_a_cache_up_to_block_size(variant, T, idx):
    gpt = random_gpt(variant)
    tokens = gpt.generate(idx[:, :T], 32 - T + 1, temperature=0)
    assert torch.equal(tokens, uncached(gpt, idx[:, :T], 32 - T + 1))


def test_greedy_tokens_equal_those_of_transformers(gpt, hf, idx):
    for penalty in (1.0, 1.5):
        theirs = hf.generate(
            idx[:, :5], max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0,
            repetition_penalty=penalty, attention_mask=torch.ones(2, 5))
        ours = gpt.generate(idx[:, :5], 20, temperature=0, repetition_penalty=penalty)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("variant", ["gpt2", "modern"])
def test_beyond_block_size_the_last_half_becomes_the_context(variant, idx):
    gpt = random_gpt(variant)
    inputs = []
    hook = gpt.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    tokens = gpt.generate(idx[:, :5], 32 - 5 + 20, temperature=0)
    hook.remove()
    # 5 to begin with, then one at a time until 32 are in the cache; then the last 16, and so on
    assert [x.size(1) for x in inputs] == [5] + 27 * [1] + [16] + 16 * [1] + [16] + [1]
    assert torch.equal(inputs[28], tokens[:, 17:33])
    assert torch.equal(tokens[:, 33], gpt(tokens[:, 17:33])[0][:, -1].argmax(-1))
    assert torch.equal(tokens[:, 34], gpt(tokens[:, 17:34])[0][:, -1].argmax(-1))


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_generation_continues_beyond_the_smallest_block_sizes(block_size):
    gpt = GPT(GPTConfig(**SHAPE | {"block_size": block_size})).eval()
    assert gpt.generate(torch.zeros(2, 5, dtype=torch.long), 9).shape == (2, 14)


def test_prompts_longer_than_block_size_use_their_end(gpt, idx):
    long = torch.cat([idx, idx.flip(1)], dim=1)
    token = gpt.generate(long, 1, temperature=0)[:, -1]
    assert torch.equal(token, gpt(long[:, -32:])[0][:, -1].argmax(-1))


def test_generation_under_autocast_has_a_cache_in_bfloat16(gpt, idx, monkeypatch):
    dtypes = []
    monkeypatch.setattr("model.KVCache", lambda *args: dtypes.append(args[-1]) or KVCache(*args))
    with torch.autocast("cpu", torch.bfloat16):
        tokens = gpt.generate(idx[:, :4], 6, temperature=0)
        assert torch.equal(tokens, uncached(gpt, idx[:, :4], 6))
    assert dtypes == [torch.bfloat16]


# ------------------------------------------------------------------------------------ sampling

def test_generate_returns_prompts_and_continuations_and_stream_yields_them(gpt, idx):
    torch.manual_seed(3)
    whole = gpt.generate(idx[:, :4], 6, top_k=10)
    torch.manual_seed(3)
    steps = list(gpt.stream(idx[:, :4], 6, top_k=10))
    assert torch.equal(whole[:, :4], idx[:, :4])
    assert torch.equal(whole[:, 4:], torch.stack(steps, dim=1))


@pytest.mark.parametrize("options, warper", [
    ({}, None),
    ({"temperature": 0.5}, transformers.TemperatureLogitsWarper(0.5)),
    ({"temperature": 1e-50}, transformers.TopKLogitsWarper(1)),
    ({"top_k": 5}, transformers.TopKLogitsWarper(5)),
    ({"top_p": 0.6}, transformers.TopPLogitsWarper(0.6)),
    ({"top_p": 1e-300}, transformers.TopPLogitsWarper(1e-9)),
])
def test_tokens_have_the_probabilities_of_transformers(options, warper):
    torch.manual_seed(4)
    logits = torch.randn(1, 12) * 2
    expected = (warper(None, logits) if warper else logits).softmax(-1)[0]
    ids = sample_token(logits.expand(100_000, -1), **options)
    found = torch.bincount(ids, minlength=12) / 100_000
    torch.testing.assert_close(found, expected, atol=0.006, rtol=0)
    assert (found[expected == 0] == 0).all()


def test_top_p_keeps_exactly_the_ids_that_float64_keeps(monkeypatch):
    # A stub in place of sampling returns all ids, with their probabilities in `probs`.
    monkeypatch.setattr(torch, "multinomial", lambda x, n: (
        probs.append(x), torch.arange(5003).expand(2000, -1))[1])
    torch.manual_seed(0)
    logits = torch.randn(2000, 5003)
    sorted_probs, order = logits.double().softmax(-1).sort(descending=True)
    mass_before = sorted_probs.cumsum(1) - sorted_probs
    for p in (0.1, 0.5, 0.9, 0.999):
        probs = []
        ids = sample_token(logits, top_p=p)
        kept = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, probs[0] > 0)
        expected = torch.zeros_like(kept).scatter(1, order, mass_before < p)
        # float32 probabilities do not tell on which side of p some masses are
        near = (mass_before - p).abs().amin(1) < 1e-6 * (1 - p)
        assert near.sum() < 20
        assert torch.equal(kept[~near], expected[~near])


def test_top_p_1_gives_the_same_tokens_as_none(gpt, idx):
    samples = []
    for top_p in (None, 1.0):
        torch.manual_seed(0)
        samples.append(gpt.generate(idx, 20, top_p=top_p))
    assert torch.equal(*samples)


def test_top_k_keeps_exactly_k_even_among_ties():
    torch.manual_seed(0)
    assert len(sample_token(torch.zeros(3000, 20), top_k=3).unique()) == 3


def test_only_ids_of_the_tokenizer_are_sampled_whatever_the_prompt_holds(gpt, idx):
    assert idx.max() >= 7
    for options in ({"temperature": 0}, {"temperature": 5.0}, {"top_k": 299}, {"top_p": 0.999},
                    {"repetition_penalty": 1.5}):
        tokens = gpt.generate(idx[:, :20], 60, n_vocab=7, **options)
        assert tokens[:, 20:].max() < 7


def test_a_stopped_row_repeats_the_stop_token_while_others_continue(gpt, idx):
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
    tokens = gpt.generate(row, 20, temperature=0)[0, 4:].tolist()
    stop = tokens[5]
    assert len(list(gpt.stream(row, 20, temperature=0, stop=stop))) == tokens.index(stop) + 1
    filled = gpt.generate(row, 20, temperature=0, stop=stop)
    assert filled[0, 4 + tokens.index(stop):].tolist() == [stop] * (20 - tokens.index(stop))


@pytest.mark.parametrize("options, word", [
    ({"temperature": -1}, "temperature"), ({"top_k": 0}, "top_k"), ({"top_p": 0}, "top_p"),
    ({"top_p": 2}, "top_p"), ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"stop": 300}, "stop"), ({"n_vocab": 301}, "301"), ({"max_new_tokens": -1}, "max_new"),
    ({"idx": torch.zeros(1, 0, dtype=torch.long)}, "empty")])
def test_arguments_of_generate_out_of_range_are_named(gpt, idx, options, word):
    with pytest.raises(ValueError, match=word):
        gpt.generate(**{"idx": idx, "max_new_tokens": 2} | options)


# ------------------------------------------------------------------------------ optimizer, FLOPs

def test_adamw_has_two_groups_and_more_only_for_rates_of_their_own():
    gpt = GPT(GPTConfig(**SHAPE | MODERN | {"positions": "learned"}))
    dims = {name: p.dim() for name, p in gpt.named_parameters()}

    def groups(**rates) -> list[tuple]:
        optimizer = gpt.configure_optimizers(0.1, 1e-2, (0.9, 0.95), **rates)
        assert [name for group in optimizer.param_groups for name, p in zip(
            group["param_names"], group["params"], strict=True)
            if p is not gpt.get_parameter(name)] == []
        for group in optimizer.param_groups:
            assert group["lr_ratio"] == pytest.approx(group["lr"] / 1e-2)
        return [(group["lr"], group["weight_decay"], group["param_names"])
                for group in optimizer.param_groups]

    matrices = [name for name, dim in dims.items() if dim >= 2]
    vectors = [name for name, dim in dims.items() if dim < 2]
    embeddings = ["transformer.wte.weight", "transformer.wpe.weight"]
    assert groups() == [(1e-2, 0.1, matrices), (1e-2, 0.0, vectors)]
    assert sorted(groups(embedding_lr=0.02)) == [
        (1e-2, 0.0, vectors), (1e-2, 0.1, [name for name in matrices if name not in embeddings]),
        (0.02, 0.1, embeddings)]
    assert sorted(groups(embedding_lr=0.02, head_lr=0.005)) == [
        (0.005, 0.1, ["lm_head.weight"]), (1e-2, 0.0, vectors),
        (1e-2, 0.1, [name for name in matrices if ".h." in name]), (0.02, 0.1, embeddings)]


def test_the_optimizer_is_torchs_adamw_with_decay_of_matrices_only(folder):
    ours, reference = (GPT.from_pretrained(str(folder)) for _ in range(2))
    optimizer = ours.configure_optimizers(0.1, 1e-2, (0.9, 0.95))
    expected = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.1 if p.dim() >= 2 else 0.0}
         for p in reference.parameters()], lr=1e-2, betas=(0.9, 0.95), foreach=False)
    for gpt, opt in ((ours, optimizer), (reference, expected)):
        torch.manual_seed(7)
        for _ in range(3):
            for p in gpt.parameters():
                p.grad = torch.randn_like(p)
            opt.step()
    for (name, a), b in zip(ours.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("changes", [{}, {"n_layer": 1, "n_embd": 32, "vocab_size": 77}, MODERN])
def test_flops_are_those_that_torch_counts(changes):
    gpt = GPT(GPTConfig(**SHAPE | changes))
    idx = torch.zeros(2, 32, dtype=torch.long)
    # torch does not count the fused attention of a CPU
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        gpt(idx, idx)[1].backward()
    assert gpt.flops_per_token() * idx.numel() == counter.get_total_flops()


# --------------------------------------------------------------------------- pretrained weights

@pytest.mark.parametrize("part, max_shard_size", [("lm", "100KB"), ("base", "1GB")])
def test_sharded_safetensors_and_a_base_model_without_prefix_load(
        hf, idx, tmp_path, part, max_shard_size):
    model = hf if part == "lm" else hf.transformer  # whose names start with wte, h, ln_f
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("model-*.safetensors"))) > 1) is (part == "lm")
    gpt = GPT.from_pretrained(str(tmp_path)).eval()
    torch.testing.assert_close(gpt(idx, idx)[0], hf(idx).logits, atol=1e-4, rtol=0)


def test_sharded_pytorch_model_bin_with_causal_masks_loads(hf, idx, tmp_path):
    hf.config.save_pretrained(tmp_path)
    state = dict(hf.state_dict())
    for i in range(3):
        state[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
        state[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    items = list(state.items())
    torch.save(dict(items[:20]), tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save(dict(items[20:]), tmp_path / "pytorch_model-00002-of-00002.bin")
    gpt = GPT.from_pretrained(str(tmp_path)).eval()
    torch.testing.assert_close(gpt(idx, idx)[0], hf(idx).logits, atol=1e-4, rtol=0)


def test_a_run_loads_from_its_best_checkpoint_or_else_its_latest(gpt, idx, tmp_path):
    for name, model in (("ckpt.pt", gpt), ("best.pt", random_gpt("modern"))):
        state = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save({"model": state, "model_args": model.config.to_model_args()}, tmp_path / name)
        loaded = GPT.from_pretrained(str(tmp_path)).eval()
        assert loaded.config == model.config
        assert torch.equal(loaded(idx)[0], model(idx)[0])
    with pytest.raises(ValueError, match="n_layer.*expected dropout alone"):
        GPT.from_pretrained(str(tmp_path), {"n_layer": 2})


@pytest.mark.parametrize("damage, words", [
    ("flipped byte", "damaged"), ("cut", "damaged"), ("text", "damaged"), ("no model", "no model")])
def test_a_file_that_is_damaged_or_no_checkpoint_is_named(gpt, tmp_path, damage, words):
    path = tmp_path / "ckpt.pt"
    contents = {"model_args": gpt.config.to_model_args()}
    torch.save(contents | ({} if damage == "no model" else {"model": gpt.state_dict()}), path)
    content = bytearray(path.read_bytes())
    if damage == "flipped byte":
        content[content.index(gpt.lm_head.weight.detach().numpy().tobytes()) + 1000] ^= 1
    path.write_bytes(content[:-1000] if damage == "cut" else
                     b"not a checkpoint" if damage == "text" else content)
    with pytest.raises(ValueError, match=f"{path}.* {words}"):
        GPT.from_pretrained(str(path))


@pytest.mark.parametrize("change, words", [
    ({"transformer.h.1.mlp.c_fc.weight": None}, 'Missing.*"transformer.h.1.mlp.c_fc.weight"'),
    ({"transformer.h.3.ln_1.weight": torch.ones(64)},
     'Unexpected.*"transformer.h.3.ln_1.weight"'),
    ({"transformer.wpe.weight": torch.ones(31, 64)}, "mismatch.*wpe.weight: .*31, 64.*32, 64"),
    ({"lm_head.weight": torch.ones(300, 64)}, "differs .* but this model ties them")])
def test_missing_unexpected_and_misshapen_tensors_are_named(hf, tmp_path, change, words):
    hf.config.save_pretrained(tmp_path)
    state = {name: tensor for name, tensor in (hf.state_dict() | change).items()
             if tensor is not None}
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=words) as error:
        GPT.from_pretrained(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:.*quantize_per")
@pytest.mark.parametrize("convert", [
    lambda t: t.to(torch.complex64), lambda t: t.to_sparse(), lambda t: t.to("meta"),
    lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), lambda t: t.to(torch.int64),
    lambda t: t.to(torch.float8_e4m3fn), lambda t: t * torch.inf, lambda t: t * torch.nan,
    lambda t: t.tolist()], ids=["complex", "sparse", "meta", "quantized", "integer", "float8",
                                "infinite", "nan", "list"])
def test_tensors_that_are_not_plain_finite_floating_point_are_named(gpt, convert):
    name = "transformer.h.1.ln_2.weight"
    with pytest.raises(ValueError, match=f"a file: .* {name} "):
        GPT(gpt.config).load_weights(
            gpt.state_dict() | {name: convert(gpt.get_parameter(name).detach())}, "a file")


@pytest.mark.parametrize("config, words", [
    ({"model_type": "llama"}, "model_type = 'llama'"), ({"n_head": None}, "n_head = None"),
    ({"activation_function": "silu"}, "silu"), ({"layer_norm_epsilon": 1e-6}, "epsilon = 1e-06"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse")])
def test_models_of_another_form_are_refused(folder, tmp_path, config, words):
    usual = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(usual | config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(ValueError, match=words):
        GPT.from_pretrained(str(tmp_path))


def test_pretrained_files_that_are_missing_or_cut_are_named(folder, tmp_path):
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
