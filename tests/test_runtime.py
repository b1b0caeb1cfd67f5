"""Device, precision and compilation, chosen on simulated machines; peaks; seeds."""

import itertools

import pytest
import torch

from configurator import UserError
from engine import runtime
from engine.runtime import (
    Runtime,
    check_memory,
    choose_compile,
    choose_device,
    choose_dtype,
)
from model import GPTConfig

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


@pytest.fixture
def machine(monkeypatch):
    """Makes torch report the hardware of another machine."""
    def simulate(cuda: int = 0, mps: bool = False, bf16: bool = False, **cpu: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation=True: bf16 or including_emulation)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    return simulate


# ------------------------------------------------------------------------------------- device

@pytest.mark.parametrize("has, asked, expected", [
    ({}, None, "cpu"), ({"mps": True}, None, "mps"), ({"cuda": 1}, None, "cuda"),
    ({"cuda": 1, "mps": True}, None, "cuda"), ({"cuda": 2}, "cuda:1", "cuda:1"),
    ({"cuda": 2}, "cuda", "cuda"), ({"cuda": 2}, "cpu", "cpu")])
def test_the_device_is_the_one_asked_for_or_the_fastest(machine, has, asked, expected):
    machine(**has)
    assert choose_device(asked) == torch.device(expected)


@pytest.mark.parametrize("device, words", [
    ("cuda:2", ["cuda:2", "cuda:0 to cuda:1"]), ("cuda:01", ["cuda:0 to cuda:1"]),
    ("cuda:x", ["cuda:0 to cuda:1"]), ("mps", ["mps", "--device=cuda"])])
def test_a_device_that_is_not_there_is_refused(machine, device, words):
    machine(cuda=2)
    with pytest.raises(UserError) as refused:
        choose_device(device)
    for word in words:
        assert word in str(refused.value)


# ------------------------------------------------------------------------------------- memory

@pytest.mark.parametrize("shape, n_tokens, words", [
    ({"n_layer": 10**4}, 1, ["n_layer = 10000", "take at least 1,133 GB", "cpu has 1,000"]),
    ({"n_embd": 12 * 10**5}, 1, ["n_embd = 1200000"]), ({"block_size": 10**9}, 1, ["block_size"]),
    ({}, 10**8, ["a batch of 100,000,000 tokens take at least 3,688 GB"])])
def test_what_cannot_fit_into_memory_is_refused_by_arithmetic(monkeypatch, shape, n_tokens, words):
    sizes = {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": 10**9}
    monkeypatch.setattr(runtime.os, "sysconf", sizes.get)
    check_memory(GPTConfig(), 10**6, "cpu", bytes_per_weight=16)
    with pytest.raises(UserError) as refused:
        check_memory(GPTConfig(**shape), n_tokens, "cpu", bytes_per_weight=16)
    for word in words:
        assert word in str(refused.value)


# ---------------------------------------------------------------------------------- precision

AMX = {"amx_bf16": True}


@pytest.mark.parametrize("device, has, n_embd, expected", [
    (CPU, {}, 256, "float32"), (CPU, AMX, 256, "bfloat16"),
    (CPU, {"avx512_bf16": True}, 128, "bfloat16"), (CPU, {"avx512_bf16": True}, 127, "float32"),
    (CPU, AMX | {"avx512_bf16": True}, 255, "float32"),  # all CPUs with AMX
    (CPU, {"avx512": True, "avx2": True, "amx_bf16": False}, 256, "float32"),
    (CPU, AMX, 255, "float32"),  # narrow
    (CUDA, {"cuda": 1, "bf16": True}, 255, "bfloat16"),
    (CUDA, {"cuda": 1} | AMX, 768, "float16")])  # in emulation only; whatever the CPU has
def test_bfloat16_is_chosen_where_the_hardware_multiplies_it_but_for_narrow_models_on_a_cpu(
        machine, device, has, n_embd, expected):
    machine(**has)
    assert choose_dtype(None, device, n_embd) == expected
    assert choose_dtype("float32", device, n_embd) == "float32"  # asked for


def test_a_gpu_is_set_by_its_number(machine, monkeypatch):
    # torch.cuda.set_device refuses a device without one, before it asks the driver.
    machine(cuda=1, bf16=True)
    chosen = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    assert runtime.start(None, None, None, n_embd=768, flops=0).device == torch.device("cuda", 0)
    assert chosen == [0]


# ------------------------------------------------------------------------------- compilation

@pytest.fixture
def compilers(monkeypatch, tmp_path):
    """Makes these programs the only ones on the PATH."""
    def simulate(*names: str) -> None:
        for name in names:
            (tmp_path / name).touch(mode=0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        for variable in ("CC", "CXX"):
            monkeypatch.delenv(variable, raising=False)
    return simulate


@pytest.mark.parametrize("there, device, flops, expected, printed", [
    (["gcc"], CUDA, 1, True, ""), (["clang"], CUDA, 1, True, ""),
    ([], CUDA, 1, False, "not compiled, as neither gcc nor clang is installed"),
    (["g++"], CUDA, 1, False, "not compiled, as neither gcc nor clang is installed"),
    ([], CPU, 1e15, False, "not compiled, as neither g++ nor clang++ is installed"),
    (["g++"], CPU, 1e15, True, ""),
    (["g++"], CPU, 9e14, False, ""), (["g++"], MPS, 1e15, False, "")])
def test_gpus_and_long_runs_on_a_cpu_compile_where_there_is_a_compiler(
        compilers, capsys, there, device, flops, expected, printed):
    compilers(*there)
    assert choose_compile(None, device, flops) is expected
    assert capsys.readouterr().out.partition(":")[0] == printed
    assert choose_compile(False, device, flops) is False
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("device, variable, programs", [
    (CPU, "CXX", ["g++", "clang++"]), (CUDA, "CC", ["gcc", "clang"])])
def test_compiling_is_done_where_it_is_asked_for_and_possible_or_else_refused(
        compilers, monkeypatch, tmp_path, device, variable, programs):
    compilers(*programs)
    for name in programs:
        assert choose_compile(True, device, flops=0) is True
        (tmp_path / name).unlink()
    compilers("my-cc")
    with pytest.raises(UserError) as refused:
        choose_compile(True, device, flops=0)
    for word in [*programs, variable, "--compile=False"]:
        assert word in str(refused.value)
    monkeypatch.setenv(variable, "my-cc")
    assert choose_compile(True, device, flops=0) is True


# --------------------------------------------------------------------------------------- peaks

@pytest.mark.parametrize("name, dtype, tflops", [  # dense, from the makers' data sheets
    ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
    ("NVIDIA A100-SXM4-80GB", "float32", 156),
    ("NVIDIA H100 80GB HBM3", "bfloat16", 989.5),
    ("NVIDIA H100 PCIe", "bfloat16", 756),
    ("NVIDIA L40S", "bfloat16", 362),
    ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
    ("Tesla V100-SXM2-16GB", "float16", 125),
    ("Tesla V100-SXM2-16GB", "bfloat16", None),
    ("AMD Instinct MI250X", "bfloat16", 191.5),  # a die, of two
    ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "bfloat16", None),
    ("NVIDIA L40", "bfloat16", None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
])
def test_a_peak_is_that_of_the_very_device_or_unknown(monkeypatch, name, dtype, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = Runtime(CUDA, dtype, False).peak_flops()
    assert peak == (tflops and pytest.approx(tflops * 1e12, rel=1e-3))
    assert Runtime(CPU, dtype, False).peak_flops() is None


# ------------------------------------------------------------------------------ seeds

def test_torch_is_seeded_by_every_part_of_the_key():
    def drawn(*key: int) -> float:
        runtime.seed_torch(*key)
        return torch.rand(()).item()

    keys = list(itertools.product(range(2), [0, 1337], [0, 1, 2**33], range(3)))
    assert len({drawn(*key) for key in keys}) == len(keys)
    assert [drawn(*key) for key in keys] == [drawn(*key) for key in keys]
