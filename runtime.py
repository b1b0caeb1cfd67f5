"""Where a script runs: device, precision, compilation, processes, seeds, and the wish to stop.

Choices left to us (a setting of None) follow from what the hardware can do, the model's width and
the length of the run, never from a timing, so that two runs on one machine choose alike.
"""

import os
import re
import shutil
import signal
import sys
import time
import uuid
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType, TracebackType
from typing import NoReturn

# Huge pages for large tensors: a CPU spends a tenth of a step of GPT-2 124M on page faults without.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it when it first allocates

import numpy as np
import torch
import torch.distributed as dist

from configurator import RunError, UserError, announce, choose

# Dense peak of a device in TFLOP/s for (bfloat16, float16, float32), without sparsity; float32 is
# TF32 where the device has it, since `start` allows that. None: the device lacks the format.
# From the makers' data sheets: NVIDIA A100, H100, H200, HGX B200, L4, L40S, V100, T4; NVIDIA Ada
# and Ampere GA102 white papers (RTX 4090, 3090: with float32 accumulation); AMD MI300X, MI250X.
PEAK_TFLOPS = {
    "B200": (2250, 2250, 1125),
    "H200 NVL": (835.5, 835.5, 417.5),
    "H200": (989.5, 989.5, 494.7),
    "H100 PCIe": (756, 756, 378),
    "H100 NVL": (835.5, 835.5, 417.5),
    "H100": (989.5, 989.5, 494.7),
    "A100": (312, 312, 156),
    "L40S": (362, 362, 183),
    "L4": (121, 121, 60),
    "RTX 4090": (165.2, 165.2, 82.6),
    "RTX 3090": (71, 71, 35.6),
    "V100": (None, 125, 15.7),
    "T4": (None, 65, 8.1),
    "MI300X": (1307.4, 1307.4, 163.4),  # float32: plain
    "MI250X": (191.5, 191.5, 47.9),  # one of its two dies, each of which is a device to torch
}
DTYPES = ["bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class Runtime:
    """What was settled: one process of a script, on one device."""

    device: torch.device
    dtype: str  # bfloat16 | float16 | float32
    compile: bool
    rank: int = 0
    world_size: int = 1
    timeout: timedelta = timedelta(minutes=10)  # of what processes do together

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager:
        """The context in which forward passes run in `dtype`; weights stay float32."""
        return torch.autocast(self.device.type, getattr(torch, self.dtype),
                              enabled=self.dtype != "float32")

    def to_device(self, *arrays: np.ndarray) -> list[torch.Tensor]:
        """Copies of arrays on the device; to a GPU without waiting for the copy."""
        tensors = [torch.from_numpy(array) for array in arrays]
        if self.device.type == "cuda":
            return [t.pin_memory().to(self.device, non_blocking=True) for t in tensors]
        return [t.to(self.device) for t in tensors]

    def synchronize(self) -> None:
        """Wait until the device has done all that was asked of it."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all processes, in float64."""
        if self.world_size == 1:
            return list(values)
        return self.add_up(
            torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all processes, in place and without waiting for a GPU."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def compiled(self, model: torch.nn.Module) -> torch.nn.Module:
        """What runs `model`: compiled, if that was chosen."""
        # On a CPU, the compiler's own random numbers take longer than torch's.
        options = {"fallback_random": self.device.type == "cpu"}
        return torch.compile(model, options=options) if self.compile else model

    def peak_memory(self) -> int:
        """Most bytes held so far: of the GPU by tensors, else of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        import resource  # not on Windows
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB

    def leave(self, status: int) -> NoReturn:
        """Part from the other processes, and end this one."""
        if self.world_size == 1:
            sys.exit(status)
        dist.destroy_process_group()
        end_at_once(status)

    def peak_flops(self) -> float | None:
        """The device's peak, FLOP/s, in `dtype`; None if it is not in PEAK_TFLOPS."""
        if self.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.device)
        row = next((row for key, row in PEAK_TFLOPS.items()
                    if re.search(rf"\b{key}\b(?! Laptop| D\b| Ti\b)(?!.* MIG)", name)), None)
        tflops = row[DTYPES.index(self.dtype)] if row else None
        return tflops * 1e12 if tflops else None


def process() -> tuple[int, int]:
    """(rank, world_size) of this process, as torchrun tells them: (0, 1) where there is one.

    Raises UserError if the environment makes no sense.
    """
    rank, world_size = (os.environ.get(name, default)
                        for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
        raise UserError(f"RANK={rank} and WORLD_SIZE={world_size} in the environment: expected "
                        f"0 <= RANK < WORLD_SIZE, as torchrun sets them; unset both for one "
                        f"process")
    return int(rank), int(world_size)


def check(device: str | None, dtype: str | None, compile: bool | None) -> None:
    """Raise UserError for what this machine does not have, before anything large is read."""
    there = choose_device(device)
    choose_dtype(dtype, there, n_embd=1)
    choose_compile(compile, there, flops=0)


def start(device: str | None, dtype: str | None, compile: bool | None, n_embd: int, flops: float,
          backend: str | None = None, timeout_s: float = 600) -> Runtime:
    """Settle where to run; under torchrun, join the other processes. Prints what was chosen.

    device: cpu, cuda, cuda:N or mps; dtype: one of DTYPES; backend: nccl or gloo; None chooses.
    n_embd, flops: the model's width, and the FLOPs that the run will take, to choose by.
    timeout_s: seconds that processes wait for one another before they give up.
    Raises UserError for what this machine does not have, or if the processes do not meet.
    """
    rank, world_size = process()
    timeout = timedelta(seconds=timeout_s)
    if backend is not None:
        choose("backend", backend, ["nccl", "gloo"])
    device = choose_device(device)
    if world_size > 1 and device.type == "cuda":
        device = choose_device(f"cuda:{os.environ.get('LOCAL_RANK', rank)}")
    elif world_size > 1 and device.type == "mps":
        device = torch.device("cpu")  # gloo has no tensors on MPS
    elif device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)  # set_device wants its number
    if backend == "nccl" and world_size > 1 and device.type != "cuda":
        raise UserError("backend = 'nccl' needs GPUs: leave it out, or use --backend=gloo")
    dtype = choose_dtype(dtype, device, n_embd)
    compile = choose_compile(compile, device, flops)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    if world_size > 1:
        join(backend or ("nccl" if device.type == "cuda" else "gloo"), timeout)
    runtime = Runtime(device, dtype, compile, rank, world_size, timeout)
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    peak = runtime.peak_flops()
    announce(f"running on {device}{name}, {dtype}, {'compiled' if compile else 'not compiled'}, "
             f"{world_size} process{'es' if world_size > 1 else ''}"
             f"{f', peak {peak / 1e12:g} TFLOP/s' if peak else ''}")
    return runtime


def join(backend: str, timeout: timedelta) -> None:
    """Meet the other processes. From here on, losing one ends this one with a sentence."""
    to_meet = max(timeout, timedelta(minutes=10))  # the slowest has to read its checkpoint first
    ours = sys.excepthook  # torch puts its own around it, which swallows what ours prints
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=to_meet))
        store = own_part(store, rank, world_size, to_meet)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank,
                                world_size=world_size)
    except (ValueError, RuntimeError) as error:  # the address is missing, wrong or taken
        raise UserError(f"the processes did not meet ({str(error).splitlines()[0]}): start them "
                        f"with torchrun, on one machine with --standalone, on several with a free "
                        f"port as --rdzv-endpoint") from None

    def end(kind: type, error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, dist.DistError) or (kind is RuntimeError and "gloo" in str(error)):
            cause = re.sub(r"^\[[^]]*\] ", "", str(error).splitlines()[0]).partition(". ")[0]
            kind, error = RunError, RunError(
                f"another process is gone or silent ({cause}): see its own message; with torchrun "
                f"--max-restarts=N and --init_from=auto the run goes on by itself")
        status = 1
        try:
            ours(kind, error, trace)
        except SystemExit as ended:
            status = ended.code
        end_at_once(status)

    sys.excepthook = end


def own_part(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The part of a store that is of this start alone, the same for all processes.

    torchrun keeps one store when it restarts the processes, and what the dead ones wrote still
    stands there: their addresses too. So rank 0 names the start, and each of the others answers
    with a name of its own, until it finds that among the answers that rank 0 has read.
    Raises RuntimeError if they do not meet in time.
    """
    name = uuid.uuid4().hex
    if rank == 0:
        store.set("start", name)
        answers = [store.get(f"{name}/{other}") for other in range(1, world_size)]
        store.set(f"{name}/met", b" ".join(answers))
        return dist.PrefixStore(name, store)
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        start = store.get("start").decode()
        store.set(f"{start}/{rank}", name)
        if store.check([f"{start}/met"]) and name in store.get(f"{start}/met").decode():
            return dist.PrefixStore(start, store)
        time.sleep(0.05)
    raise RuntimeError(f"rank 0 did not answer within {timeout.total_seconds():g} s")


def end_at_once(status: int) -> NoReturn:
    """End this process without Python's own end, in which a thread of gloo's may abort it.

    Such a thread frees the tensor of a collective a little after it is done, and needs Python's
    lock for that, which kills a thread that asks for it once Python is at its end.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)


def choose_device(device: str | None) -> torch.device:
    """The device asked for, or the best there is. Raises UserError if there is no such device."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device is None:
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    kind, _, index = device.partition(":")
    choose("device", kind, ["cpu", "cuda", "mps"])
    if (kind == "cuda" and not cuda) or (kind == "mps" and not mps):
        raise UserError(f"device = {device!r}, but this machine or this torch has no {kind}: "
                        f"use --device={choose_device(None)}")
    count = {"cpu": 1, "mps": 1}.get(kind) or torch.cuda.device_count()
    if ":" in device and index not in map(str, range(count)):
        raise UserError(f"device = {device!r}: expected {kind}:0 to {kind}:{count - 1}")
    return torch.device(device)


def choose_dtype(dtype: str | None, device: torch.device, n_embd: int) -> str:
    """The precision asked for, or bfloat16 where the hardware multiplies it; on a CPU, only for
    models from 256 wide, as the casts cost narrower ones more than their products save."""
    cuda = device.type == "cuda"
    native = torch.cpu.get_capabilities()
    bf16 = (torch.cuda.is_bf16_supported(including_emulation=False) if cuda else
            device.type == "cpu" and n_embd >= 256
            and (native.get("amx_bf16") or native.get("avx512_bf16")))
    if dtype is None:
        return "bfloat16" if bf16 else "float16" if cuda else "float32"
    choose("dtype", dtype, DTYPES)
    if dtype == "float16" and device.type == "cpu":
        raise UserError("dtype = 'float16' needs a GPU: use bfloat16 or float32 on a CPU")
    return dtype


def choose_compile(compile: bool | None, device: torch.device, flops: float) -> bool:
    """Whether to compile. None chooses to on a GPU, and on a CPU for runs of 1e15 FLOPs (a quarter
    of an hour at 1 TFLOP/s, of which it saves more than the minute it takes), with the compiler
    that torch needs for it."""
    variable, *names = (("CC", "gcc", "clang") if device.type == "cuda"
                        else ("CXX", "g++", "clang++"))
    there = any(shutil.which(name) for name in (os.environ.get(variable) or "", *names))
    missing = f"neither {' nor '.join(names)} is here"
    if compile and not there:
        raise UserError(f"compile = True needs a compiler, but {missing}: install one, name yours "
                        f"in {variable}, or use --compile=False")
    if compile is None:
        compile = device.type == "cuda" or (device.type == "cpu" and flops >= 1e15)
        if compile and not there and flops:
            announce(f"not compiled, as {missing}: install one to train faster")
    return compile and there


def seed_torch(*key: int) -> None:
    """Seed torch's generators, of all devices, from whole numbers such as (seed, iteration)."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


class StopSignals:
    """Notes SIGINT (Ctrl-C) and SIGTERM, so that a loop can finish its step and save.

    A second Ctrl-C stops at once.
    """

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self.received = 0  # the signal's number
        # Asking over a GPU's own links would wait for the GPU, so the processes ask on the side.
        self.group = (dist.new_group(backend="gloo", timeout=runtime.timeout)
                      if runtime.world_size > 1 else None)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def agreed(self) -> int:
        """The signal that any process has received, the same on all; 0 for none."""
        if self.group is None:
            return self.received
        number = torch.tensor(self.received)
        dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self.group)
        return int(number)
