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
from conftest import MODERN, ROOT, relative, run, unequal
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen3 import modeling_qwen3

from engine import cpu
from model import GPT, CausalSelfAttention, GPTConfig, KVCache, rotary_emb, sample_token

SHAPE = {"block_size": 32, "vocab_size": 300, "n_layer": 3, "n_head": 4, "n_embd": 64}
CLASSIC = {f.name: f.default for f in fields(GPTConfig) if f.name in MODERN}
VARIANTS = {"gpt2": {}, "modern": MODERN} | {
    name: CLASSIC | {name: value} for name, value in MODERN.items()}


def hf_gpt2() -> transformers.GPT2LMHeadModel:
    """transformers' GPT-2 of SHAPE with random weights, biases and norms included."""
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        n_positions=32, vocab_size=300, n_layer=3, n_head=4, n_embd=64, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
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


# --------------------------------------------------------------------------------- one file

# The calls are those of code written for nanoGPT, positional arguments included.
ALONE = """
import sys
import torch
from model import GPT, GPTConfig

torch.manual_seed(0)
gpt = GPT(GPTConfig(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=16))
optimizer = gpt.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
idx = torch.arange(8)[None]
losses = []
for _ in range(2):
    logits, loss = gpt(idx, idx)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[1] < losses[0]
assert gpt.estimate_mfu(10, 2.0) == gpt.estimate_mfu(5, 1.0, 312e12)  # of an A100
gpt.crop_block_size(8)
assert gpt.get_num_params() == gpt.get_num_params(non_embedding=False) - 8 * 16
assert gpt.eval().generate(idx, 4, 0.8, 5).shape == (1, 12)
torch.save({"model": gpt.state_dict(), "model_args": gpt.config.to_model_args()}, "ckpt.pt")
for path in ("ckpt.pt", "."):
    loaded = GPT.from_pretrained(path, {"dropout": 0.1}).eval()
    assert loaded.config.dropout == loaded.transformer.drop.p == 0.1
    assert torch.equal(loaded(idx)[0], gpt(idx)[0])
logits, loss = GPT.from_pretrained(sys.argv[1]).eval()(torch.arange(32)[None])
assert loss is None
torch.save(logits, "logits.pt")
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


# --------------------------------------------------------------------------------- it is GPT-2

def test_loss_and_gradients_equal_those_of_transformers_with_ignored_targets(folder, idx):
    ours, theirs = GPT.from_pretrained(str(folder)), hf_gpt2()
    is_ignored = torch.rand(2, 32) < 0.2
    _, loss = ours(idx[:, :-1], idx.masked_fill(is_ignored, -1)[:, 1:])
    expected = theirs(idx, labels=idx.masked_fill(is_ignored, -100)).loss
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        is_transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        grad = grads[name].t() if is_transposed else grads[name]
        torch.testing.assert_close(p.grad, grad, atol=1e-4, rtol=1e-3)


def test_initialization_has_the_standard_deviations_of_gpt2():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**SHAPE | {"n_embd": 256}))
    for name, p in gpt.named_parameters():
        if p.dim() == 2:
            expected = 0.02 / math.sqrt(2 * 3) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.05), name
        else:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name


def test_a_seed_gives_the_weights_that_it_gave_in_the_first_version():
    torch.manual_seed(0)
    state = GPT(GPTConfig(**SHAPE)).state_dict()
    names = ("wte", "wpe", "h.2.attn.c_attn", "h.2.mlp.c_proj")
    first = [state[f"transformer.{name}.weight"].flatten()[0].item() for name in names]
    assert first == pytest.approx([0.03091961, -0.009538543, 0.005939218, -0.002026511], rel=1e-5)


def test_parameter_count_is_gpt2s_with_and_without_positions_and_biases():
    with torch.device("meta"):
        gpt, unbiased = (GPT(GPTConfig(vocab_size=50257, bias=bias)) for bias in (True, False))
    assert gpt.lm_head.weight is gpt.transformer.wte.weight
    assert gpt.get_num_params(non_embedding=False) == 124_439_808  # OpenAI's 124M
    assert gpt.get_num_params() == 124_439_808 - 1024 * 768
    n_biases = (12 * (2 + 3 + 1 + 4 + 1) + 1) * 768  # of norms and matrices
    assert unbiased.get_num_params(non_embedding=False) == 124_439_808 - n_biases


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
    gpt = GPT(GPTConfig(**SHAPE, tie_weights=False))
    gpt(idx, idx, loss_only=True)[1].backward()
    head, wte = gpt.lm_head.weight, gpt.transformer.wte.weight
    assert head is not wte and not torch.equal(head.grad, wte.grad)
    assert (gpt.get_num_params(non_embedding=False) - gpt.get_num_params()
            == 300 * 64 + 32 * 64)  # of tokens, of positions
    state = gpt.state_dict()
    del state["lm_head.weight"]
    with pytest.raises(ValueError, match=r'Missing key.*"lm_head.weight"'):
        gpt.load_weights(state, "a tied model")


def test_smear_adds_a_fraction_of_the_previous_tokens_embedding(idx):
    wte = random_gpt("smear").transformer.wte
    x, plain = wte(idx), F.embedding(idx, wte.weight)
    torch.testing.assert_close(x[:, 1:], plain[:, 1:] + wte.smear * plain[:, :-1])
    assert torch.equal(x[:, 0], plain[:, 0])
    assert (GPT(GPTConfig(**SHAPE, smear=True)).transformer.wte.smear == 0.5).all()


def test_bigram_adds_an_embedding_of_the_pair_of_the_previous_token_and_this_one(idx):
    wte = random_gpt("bigram").transformer.wte
    x, plain = wte(idx), F.embedding(idx, wte.weight)
    table = wte.bigram.weight.view(300, 300, 64)
    torch.testing.assert_close(x[:, 1:], plain[:, 1:] + table[idx[:, :-1], idx[:, 1:]])
    assert torch.equal(x[:, 0], plain[:, 0])
    with pytest.raises(ValueError, match="bigram = True needs .* at most 1024"):
        GPTConfig(bigram=True)


def test_learned_positions_may_be_cropped_only(folder, idx):
    gpt = GPT.from_pretrained(str(folder)).eval()
    before, _ = gpt(idx[:, :16], idx[:, :16])
    gpt.crop_block_size(16)
    GPT(gpt.config).load_weights(gpt.state_dict(), "the cropped model")
    torch.testing.assert_close(gpt(idx[:, :16], idx[:, :16])[0], before)
    with pytest.raises(ValueError, match="32 tokens is longer than block_size = 16"):
        gpt(idx)
    for block_size in (0, 32):
        with pytest.raises(ValueError, match=f"block_size = {block_size}"):
            gpt.crop_block_size(block_size)


def test_rotary_positions_may_be_extended(idx):
    gpt = random_gpt("modern")
    before, _ = gpt(idx, idx)
    gpt.crop_block_size(64)
    torch.testing.assert_close(gpt(idx, idx)[0], before)
    assert gpt(torch.cat([idx, idx], dim=1))[0].isfinite().all()


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


@pytest.mark.parametrize("changes", [{"dropout": 0.2}, MODERN])
def test_recomputed_blocks_give_the_same_gradients_and_save_only_their_inputs(changes):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**SHAPE | changes))
    idx = torch.randint(300, (2, 32))
    results, n_saved = [], []
    for gpt.recompute in (False, True):
        gpt.zero_grad()
        saved = {}
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t, saved=saved: saved.setdefault(t.data_ptr(), t), lambda t: t):
            loss = gpt(idx, idx, loss_only=True)[1]
        n_saved.append(sum(t.numel() for t in saved.values()))
        loss.backward()
        results.append([loss, *(p.grad for p in gpt.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert n_saved[1] < n_saved[0] / 2


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

def without_cache(gpt: GPT, idx: torch.Tensor, n: int) -> torch.Tensor:
    """Greedy decoding that computes the whole context again for every token."""
    block_size = gpt.config.block_size
    start = max(0, idx.size(1) - block_size)
    for end in range(idx.size(1), idx.size(1) + n):
        if end - start > block_size:
            start = end - max(1, block_size // 2)
        token = gpt(idx[:, start:end])[0][:, -1].argmax(-1, keepdim=True)
        idx = torch.cat([idx, token], dim=1)
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


@pytest.mark.parametrize("block_size, T", [(32, 1), (32, 31), (32, 64), (1, 5), (2, 5), (3, 5)])
@pytest.mark.parametrize("variant", ["gpt2", "modern"])
def test_greedy_tokens_equal_those_without_a_cache(variant, block_size, T, idx):
    gpt = random_gpt(variant, block_size=block_size)
    prompt = torch.cat([idx, idx.flip(1)], dim=1)[:, :T]
    tokens = gpt.generate(prompt, 60, temperature=0)
    assert torch.equal(tokens, without_cache(gpt, prompt, 60))


def test_greedy_tokens_equal_those_of_transformers(gpt, hf, idx):
    for penalty in (1.0, 1.5):
        theirs = hf.generate(
            idx[:, :5], max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0,
            repetition_penalty=penalty, attention_mask=torch.ones(2, 5))
        ours = gpt.generate(idx[:, :5], 20, temperature=0, repetition_penalty=penalty)
        assert torch.equal(ours, theirs)


def test_each_token_is_computed_once_until_the_last_half_becomes_the_context(gpt, idx):
    lengths = []
    hook = gpt.register_forward_pre_hook(lambda _, args: lengths.append(args[0].size(1)))
    gpt.generate(idx[:, :5], 32 - 5 + 20, temperature=0)
    hook.remove()
    # 5 to begin with, then one at a time until 32 are in the cache; then the last 16, and so on
    assert lengths == [5] + 27 * [1] + [16] + 16 * [1] + [16] + [1]


def test_generation_under_autocast_has_a_cache_in_bfloat16(gpt, idx, monkeypatch):
    dtypes = []
    monkeypatch.setattr("model.KVCache", lambda *args: dtypes.append(args[-1]) or KVCache(*args))
    with torch.autocast("cpu", torch.bfloat16):
        tokens = gpt.generate(idx[:, :4], 6, temperature=0)
        assert torch.equal(tokens, without_cache(gpt, idx[:, :4], 6))
    assert dtypes == [torch.bfloat16]


# ------------------------------------------------------------------------------------ sampling

def test_generate_returns_prompts_and_continuations_and_stream_yields_them(gpt, idx):
    torch.manual_seed(3)
    whole = gpt.generate(idx[:, :4], 6)
    torch.manual_seed(3)
    steps = list(gpt.stream(idx[:, :4], 6, top_p=1.0))  # the same as None
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


def test_top_k_keeps_exactly_k_even_among_ties():
    torch.manual_seed(0)
    assert len(sample_token(torch.zeros(3000, 20), top_k=3).unique()) == 3


def test_only_ids_of_the_tokenizer_are_sampled_whatever_the_prompt_holds(gpt, idx):
    assert idx.max() >= 7
    for options in ({"temperature": 0}, {"temperature": 5.0}, {"top_k": 299}, {"top_p": 0.999},
                    {"repetition_penalty": 1.5}):
        tokens = gpt.generate(idx[:, :20], 60, n_vocab=7, **options)
        assert tokens[:, 20:].max() < 7


def test_a_stopped_row_repeats_the_stop_token_and_a_stream_ends_with_its_last_row(gpt, idx):
    prompts, options = idx[:, :4], {"temperature": 0, "repetition_penalty": 2.0}  # no loops
    first, second = gpt.generate(prompts, 20, **options)[:, 4:].tolist()
    stop = next(i for i in first[5:] if i not in second)
    end = first.index(stop) + 1
    assert len(set(first[end:])) > 1
    first[end:] = [stop] * (20 - end)
    assert gpt.generate(prompts, 20, stop=stop, **options)[:, 4:].tolist() == [first, second]
    assert gpt.generate(prompts[:1], 20, stop=stop, **options)[0, 4:].tolist() == first
    assert len(list(gpt.stream(prompts[:1], 20, stop=stop, **options))) == end


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
        assert optimizer.defaults["betas"] == (0.9, 0.95)
        for group in optimizer.param_groups:
            assert group["params"] == [gpt.get_parameter(name) for name in group["param_names"]]
            assert group["lr_ratio"] == pytest.approx(group["lr"] / 1e-2)
        return [(group["lr"], group["weight_decay"], group["param_names"])
                for group in optimizer.param_groups]

    vectors = [name for name, dim in dims.items() if dim < 2]
    embeddings = [f"transformer.{name}.weight" for name in ("wte", "wte.bigram", "wpe")]
    blocks = [name for name, dim in dims.items() if dim >= 2 and ".h." in name]
    head = ["lm_head.weight"]
    assert groups() == [(1e-2, 0.1, embeddings + blocks + head), (1e-2, 0.0, vectors)]
    assert sorted(groups(embedding_lr=0.02)) == [
        (1e-2, 0.0, vectors), (1e-2, 0.1, blocks + head), (0.02, 0.1, embeddings)]
    assert sorted(groups(embedding_lr=0.02, head_lr=0.005)) == [
        (0.005, 0.1, head), (1e-2, 0.0, vectors), (1e-2, 0.1, blocks), (0.02, 0.1, embeddings)]


@pytest.mark.parametrize("changes", [{}, {"n_layer": 1, "n_embd": 32, "vocab_size": 77}, MODERN])
def test_flops_and_mfu_are_those_that_torch_counts(changes):
    gpt = GPT(GPTConfig(**SHAPE | changes))
    idx = torch.zeros(2, 32, dtype=torch.long)
    # torch does not count the fused attention of a CPU
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        gpt(idx, idx)[1].backward()
    flops = counter.get_total_flops()
    assert gpt.flops_per_token() * idx.numel() == flops
    assert gpt.estimate_mfu(2, 0.5, 1e9) == pytest.approx(flops / 0.5 / 1e9)
    assert gpt.estimate_mfu(2, 0.5, None) is None


# --------------------------------------------------------------------------- pretrained weights

def test_shards_a_base_model_and_pytorch_model_bin_load(gpt, hf, tmp_path):
    hf.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    hf.transformer.save_pretrained(tmp_path / "base")  # its names start with wte, h, ln_f
    hf.config.save_pretrained(tmp_path / "bin")
    masks = {"attn.bias": torch.ones(1, 1, 32, 32).tril(), "attn.masked_bias": torch.tensor(-1e4)}
    items = list(hf.state_dict().items())
    items += [(f"transformer.h.{i}.{name}", mask) for i in range(3) for name, mask in masks.items()]
    torch.save(dict(items[:20]), tmp_path / "bin/pytorch_model-00001-of-00002.bin")
    torch.save(dict(items[20:]), tmp_path / "bin/pytorch_model-00002-of-00002.bin")
    for name in ("shards", "base", "bin"):
        loaded = GPT.from_pretrained(str(tmp_path / name))
        assert unequal(loaded.state_dict(), gpt.state_dict()) == []


def test_a_run_loads_from_its_best_checkpoint_or_else_its_latest(gpt, idx, tmp_path):
    for name, model in (("ckpt.pt", gpt), ("best.pt", random_gpt("modern"))):
        state = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save({"model": state, "model_args": model.config.to_model_args()}, tmp_path / name)
        loaded = GPT.from_pretrained(str(tmp_path)).eval()
        assert loaded.config == model.config
        assert torch.equal(loaded(idx)[0], model(idx)[0])
    with pytest.raises(ValueError, match="n_layer.*expected dropout alone"):
        GPT.from_pretrained(str(tmp_path), {"n_layer": 2})


def test_a_file_that_is_damaged_or_no_checkpoint_is_named(gpt, tmp_path):
    path = tmp_path / "ckpt.pt"
    torch.save({"model_args": {}}, path)
    with pytest.raises(ValueError, match=f"{path} holds no model"):
        GPT.from_pretrained(str(path))
    torch.save({"model": gpt.state_dict(), "model_args": gpt.config.to_model_args()}, path)
    for damaged in (path.read_bytes()[:-1000], b"not a checkpoint"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path}.* damaged"):
            GPT.from_pretrained(str(path))


@pytest.mark.parametrize("name, convert, words", [
    ("transformer.h.1.ln_2.weight", None, 'a file .*Missing.*"transformer.h.1.ln_2.weight"'),
    ("transformer.h.3.ln_1.weight", torch.clone, 'a file .*Unexpected.*"transformer.h.3.ln_1.'),
    ("transformer.wpe.weight", lambda t: t[1:], "a file .*mismatch.*wpe.weight: .*31, 64.*32, 64"),
    ("lm_head.weight", lambda t: t + 1, "a file: .* differs .* but this model ties them"),
    ("transformer.h.1.ln_2.weight", lambda t: t.to(torch.int64), "finite .* plain .*ln_2.weight"),
    ("transformer.h.1.ln_2.weight", lambda t: t * torch.nan, "finite .* plain .*ln_2.weight ")])
def test_tensors_that_do_not_fit_or_are_not_plain_and_finite_are_named(gpt, name, convert, words):
    state = gpt.state_dict()
    tensor = state.pop(name, torch.ones(64))
    if convert:
        state[name] = convert(tensor)
    with pytest.raises(ValueError, match=words) as error:
        GPT(gpt.config).load_weights(state, "a file")
    assert "\n" not in str(error.value)


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
