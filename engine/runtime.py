"""Where a script runs: device, precision, compilation, seeds, stop signals.

Defaults of None are chosen from the hardware, the width of the model and the length of the run,
never from a timing, so that two runs on one machine choose alike.
"""

import math
import os
import re
import shutil
import signal
import socket
import sys
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from configurator import UserError, check_choice, print0
from engine.distributed import dist_info, hard_exit, init_distributed
from model import GPTConfig

# Dense peak of a device in TFLOP/s for bfloat16, float16 and float32, without sparsity, and its GB
# of memory; float32 is TF32 where it has it, which `start` enables. None: it lacks the format.
# From the makers' data sheets: NVIDIA A100, H100, H200, HGX B200, L4, L40S, V100, T4; NVIDIA Ada
# and Ampere GA102 white papers (RTX 4090, 3090: with float32 accumulation); AMD MI300X, MI250X.
PEAK_TFLOPS = {
    "B200": (2250, 2250, 1125, 180),
    "H200 NVL": (835.5, 835.5, 417.5, 141),
    "H200": (989.5, 989.5, 494.7, 141),
    "H100 PCIe": (756, 756, 378, 80),
    "H100 NVL": (835.5, 835.5, 417.5, 94),
    "H100": (989.5, 989.5, 494.7, 80),
    "A100": (312, 312, 156, 40),  # it also exists with 80 GB
    "L40S": (362, 362, 183, 48),
    "L4": (121, 121, 60, 24),
    "RTX 4090": (165.2, 165.2, 82.6, 24),
    "RTX 3090": (71, 71, 35.6, 24),
    "V100": (None, 125, 15.7, 16),
    "T4": (None, 65, 8.1, 16),
    "MI300X": (1307.4, 1307.4, 163.4, 192),  # float32: plain
    "MI250X": (191.5, 191.5, 47.9, 64),  # one of its two dies: torch sees each as a device
}
DTYPES = ["bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class Runtime:
    """The device, precision and process group of a script."""

    device: torch.device
    dtype: str  # bfloat16 | float16 | float32
    compile: bool
    rank: int = 0  # the process of rank 0 prints and writes
    world_size: int = 1
    timeout: timedelta = timedelta(minutes=10)  # of collectives

    def autocast(self) -> AbstractContextManager:
        """Context in which forward passes run in `dtype`; weights stay float32."""
        return torch.autocast(self.device.type, getattr(torch, self.dtype),
                              enabled=self.dtype != "float32")

    def to_device(self, *arrays: np.ndarray) -> list[torch.Tensor]:
        """Arrays as tensors on the device; copies to a GPU are asynchronous."""
        tensors = [torch.from_numpy(array) for array in arrays]
        if self.device.type == "cuda":
            return [t.pin_memory().to(self.device, non_blocking=True) for t in tensors]
        return [t.to(self.device) for t in tensors]

    def synchronize(self) -> None:
        """Wait for all work queued on the device."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes, on the tensor's own device."""
        if self.world_size == 1:
            return tensor
        total = tensor.to(self.device)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def compiled(self, model: torch.nn.Module) -> torch.nn.Module:
        """torch.compile(model), if compilation is on; else the model."""
        # On a CPU, the compiler's own random number generator is slower than torch's.
        options = {"fallback_random": self.device.type == "cpu"}
        return torch.compile(model, options=options) if self.compile else model

    def parallel(self, model: torch.nn.Module, shard: bool) -> torch.nn.Module:
        """The same parameters on the device, in a module that averages gradients over the processes
        (but not in its no_sync()), compiled if compilation is on; with shard, they are sharded."""
        if self.world_size == 1:
            return self.compiled(model.to(self.device))
        if shard:
            from engine import sharding  # which takes a second to import
            return sharding.shard(model, self)
        return DistributedDataParallel(self.compiled(model.to(self.device)))

    def peak_flops(self) -> float | None:
        """Peak FLOP/s of the device in `dtype`; None if it is not in PEAK_TFLOPS."""
        if self.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.device)
        row = next((row for key, row in PEAK_TFLOPS.items()
                    if re.search(rf"\b{key}\b(?! Laptop| D\b| Ti\b)(?!.* MIG)", name)), None)
        tflops = row[DTYPES.index(self.dtype)] if row else None
        return tflops * 1e12 if tflops else None

    def cleanup(self, status: int) -> NoReturn:
        """Leave the process group and exit with a status."""
        if self.world_size == 1:
            sys.exit(status)
        dist.destroy_process_group()
        hard_exit(status)


def start(device: str | None, dtype: str | None, compile: bool | None, n_embd: int, flops: float,
          backend: str | None = None, timeout_s: float = 600) -> Runtime:
    """Choose and print device, precision and compilation; under torchrun, join the process group.

    device: cpu, cuda, cuda:N or mps; dtype: one of DTYPES; backend: nccl or gloo; None: choose.
    n_embd, flops: width of the model, and FLOPs of the whole run, for the choices.
    timeout_s: seconds after which a collective fails.
    Raises UserError for what this machine does not have, or if the rendezvous fails.
    """
    rank, world_size = dist_info()
    if backend is not None:
        check_choice("backend", backend, ["nccl", "gloo"])
    device = choose_device(device)
    if world_size > 1 and device.type == "cuda":
        device = choose_device(f"cuda:{os.environ.get('LOCAL_RANK', rank)}")
    elif world_size > 1 and device.type == "mps":
        device = torch.device("cpu")  # gloo does not support MPS tensors
    elif device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)  # set_device needs an index
    if backend == "nccl" and world_size > 1 and device.type != "cuda":
        raise UserError("backend = 'nccl' needs GPUs: leave it out, or use --backend=gloo")
    runtime = Runtime(device, choose_dtype(dtype, device, n_embd),
                      choose_compile(compile, device, flops), rank, world_size,
                      timedelta(seconds=timeout_s))
    name = ""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
        name = f" ({torch.cuda.get_device_name(device)})"
    if world_size > 1:
        init_distributed(backend or ("nccl" if device.type == "cuda" else "gloo"), runtime.timeout)
    peak = runtime.peak_flops()
    print0(f"running on {device}{name}, {runtime.dtype}, "
           f"{'compiled' if runtime.compile else 'not compiled'}, "
           f"{world_size} process{'es' if world_size > 1 else ''}"
           f"{f', peak {peak / 1e12:g} TFLOP/s' if peak else ''}")
    return runtime


# --------------------------------------------------------------------------------------- choices

def check_machine(device: str | None, dtype: str | None, compile: bool | None) -> None:
    """Raise UserError for what this machine does not have, before anything large is read."""
    chosen = choose_device(device)
    choose_dtype(dtype, chosen, n_embd=1)
    choose_compile(compile, chosen, flops=0)


def check_memory(config: GPTConfig, n_tokens: int, device: str | None, bytes_per_weight: int,
                 ) -> None:
    """Raise UserError if the weights, and the activations of n_tokens, are larger than the device's
    memory, by arithmetic: the system would take minutes to end the process."""
    chosen = choose_device(device)
    if chosen.type == "cuda":
        memory = torch.cuda.get_device_properties(chosen).total_memory
    elif os.name == "posix":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return
    # At least the residual stream in training, and keys and values in sampling.
    needed = (bytes_per_weight * config.min_num_params()
              + 4 * n_tokens * config.n_layer * config.n_embd)
    if needed > memory:
        raise UserError(f"n_layer = {config.n_layer}, n_embd = {config.n_embd}, block_size = "
                        f"{config.block_size} and a batch of {n_tokens:,} tokens take at least "
                        f"{needed / 1e9:,.0f} GB, but {chosen} has {memory / 1e9:,.0f}: choose "
                        f"smaller sizes")


def choose_device(device: str | None) -> torch.device:
    """The device of that name, or the best one. Raises UserError if there is no such device."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device is None:
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    kind, _, index = device.partition(":")
    check_choice("device", kind, ["cpu", "cuda", "mps"])
    if (kind == "cuda" and not cuda) or (kind == "mps" and not mps):
        raise UserError(f"device = {device!r}, but this machine or this torch has no {kind}: "
                        f"use --device={choose_device(None)}")
    count = {"cpu": 1, "mps": 1}.get(kind) or torch.cuda.device_count()
    if ":" in device and index not in map(str, range(count)):
        raise UserError(f"device = {device!r}: expected {kind}:0 to {kind}:{count - 1}")
    return torch.device(device)


def choose_dtype(dtype: str | None, device: torch.device, n_embd: int) -> str:
    """The given precision, or bfloat16 where the hardware multiplies it; on a CPU only for models
    so wide that they gain more than they lose to casts (docs/speed.md has the widths)."""
    cuda = device.type == "cuda"
    cpu = torch.cpu.get_capabilities()
    min_width = 256 if cpu.get("amx_bf16") else 128 if cpu.get("avx512_bf16") else math.inf
    bf16 = (torch.cuda.is_bf16_supported(including_emulation=False) if cuda else
            device.type == "cpu" and n_embd >= min_width)
    if dtype is None:
        return "bfloat16" if bf16 else "float16" if cuda else "float32"
    check_choice("dtype", dtype, DTYPES)
    if dtype == "float16" and device.type == "cpu":
        raise UserError("dtype = 'float16' needs a GPU: use bfloat16 or float32 on a CPU")
    return dtype


def choose_compile(compile: bool | None, device: torch.device, flops: float) -> bool:
    """Whether to compile. By default on a GPU, and on a CPU for runs of at least 1e15 FLOPs (a
    quarter of an hour at 1 TFLOP/s, which repays the minute it takes), if there is a compiler."""
    variable, *names = (("CC", "gcc", "clang") if device.type == "cuda"
                        else ("CXX", "g++", "clang++"))
    found = find_compiler(variable, *names) is not None
    missing = f"neither {' nor '.join(names)} is installed"
    if compile and not found:
        raise UserError(f"compile = True needs a compiler, but {missing}: install one, name yours "
                        f"in {variable}, or use --compile=False")
    if compile is None:
        compile = device.type == "cuda" or (device.type == "cpu" and flops >= 1e15)
        if compile and not found and flops:
            print0(f"not compiled, as {missing}: install one to train faster")
    return compile and found


def find_compiler(variable: str, *names: str) -> str | None:
    """The path of the program that an environment variable names, or else of the first of names."""
    return next(filter(None, map(shutil.which, (os.environ.get(variable) or "", *names))), None)


# --------------------------------------------------------------------------------- seeds, signals

def seed_torch(*key: int) -> None:
    """Seed torch's generators on all devices from integers such as (seed, iteration)."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


class StopSignals:
    """Records SIGINT (Ctrl-C), SIGTERM and SIGHUP, so that a loop can stop and save.

    A second Ctrl-C ends the process at once. A thread answers, since Python handles signals in the
    main thread only between calls, and a backward pass is a single call.
    """

    def __init__(self, runtime: Runtime):
        self.received = 0  # number of the signal
        # A gloo group, as a collective over NCCL would wait for all work queued on the GPU.
        self.group = (dist.new_group(backend="gloo", timeout=runtime.timeout)
                      if runtime.world_size > 1 else None)
        self.reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._answer, daemon=True).start()
        hangup = getattr(signal, "SIGHUP", None)  # the terminal is gone; Windows has none
        for number in (signal.SIGINT, signal.SIGTERM, hangup):
            if number and (number != hangup or signal.getsignal(number) != signal.SIG_IGN):  # nohup
                signal.signal(number, self._record)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def _answer(self) -> None:
        """Read the numbers of received signals, which the system writes to the socket."""
        for message in ("\nstopping after this micro-batch, then saving; again to stop at once",
                        "error: stopped by Ctrl-C"):
            while self.reader.recv(1)[0] != signal.SIGINT:
                pass
            print0(message, file=sys.stderr)
        hard_exit(130)

    def any_rank_signaled(self) -> int:
        """The signal that any process has received, the same number on all; 0 for none."""
        if self.group is None:
            return self.received
        number = torch.tensor(self.received)
        dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self.group)
        return int(number)
