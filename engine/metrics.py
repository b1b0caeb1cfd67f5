"""Where a run's numbers go: the terminal, out_dir/metrics.jsonl, TensorBoard, Weights & Biases.

Records are plain dicts, one per logged iteration or evaluation, as they stand in metrics.jsonl.
"""

import json
import math
import os
import shutil
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch

from configurator import UserError
from data.bins import atomic_write
from engine.runtime import Runtime


class Stopwatch:
    """Time spent in each phase of a step, averaged over the steps since the last `read`.

    Only the time from `start` to the last `lap` of a step counts, so not evaluating, saving and
    logging. On a GPU it is measured by CUDA events, without synchronizing.
    """

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self.marks = []  # (name of the phase that ended, None for a start; time)

    def _now(self) -> float | torch.cuda.Event:
        if self.runtime.device.type != "cuda":
            self.runtime.synchronize()  # MPS
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        """Begin a step."""
        self.marks.append((None, self._now()))

    def lap(self, phase: str) -> None:
        """End a phase, which began at the last call."""
        self.marks.append((phase, self._now()))

    def read(self) -> dict[str, float]:
        """Milliseconds per step by phase. Synchronizes, and resets the measurement."""
        self.runtime.synchronize()
        n_steps = sum(phase is None for phase, _ in self.marks)
        total_ms = {}
        for (_, before), (phase, after) in zip(self.marks, self.marks[1:], strict=False):
            if phase is not None:
                ms = (before.elapsed_time(after) if self.runtime.device.type == "cuda"
                      else (after - before) * 1e3)
                total_ms[phase] = total_ms.get(phase, 0.0) + ms
        self.marks = []
        return {phase: ms / n_steps for phase, ms in total_ms.items()}


class Metrics:
    """Sends records to all places that the settings name; does nothing in other processes."""

    def __init__(self, runtime: Runtime, out_dir: str | None, config: dict, start_iter: int,
                 history: list[dict]):
        """out_dir: None to write no files; config: settings; start_iter: steps done before;
        history: records of the evaluations among them."""
        self.bar = self.file = self.tensorboard = self.wandb = None
        self.is_main = runtime.is_main
        if not self.is_main:
            return
        if sys.stderr.isatty() and find_spec("tqdm") and not config["eval_only"]:
            from tqdm import tqdm
            columns, lines = shutil.get_terminal_size()  # 80 x 24 if the terminal does not say
            self.bar = tqdm(total=config["max_iters"], initial=start_iter, unit="it",
                            ncols=columns, nrows=lines, smoothing=0.1)
        if out_dir is None:
            return
        path = Path(out_dir) / "metrics.jsonl"
        keep_records_before(path, start_iter, history)
        self.file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        if config["tensorboard_log"]:
            from torch.utils.tensorboard import SummaryWriter
            self.tensorboard = SummaryWriter(str(Path(out_dir) / "tensorboard"),
                                             purge_step=start_iter)
            for record in history:
                if record["iter"] == start_iter:  # purged, but not evaluated again
                    self._to_tensorboard(record)
        if config["wandb_log"]:
            import wandb
            try:
                self.wandb = wandb.init(project=config["wandb_project"], config=config,
                                        name=config["wandb_run_name"], dir=out_dir)
            except wandb.Error as error:
                raise wandb_error(error) from None

    def step(self, record: dict) -> None:
        """Log an iteration."""
        speed = f"{record['tokens_per_s']:,.0f} tok/s"
        ms = sum(record[key] for key in record if key.endswith("_ms"))
        mfu = "" if record["mfu"] is None else f", MFU {record['mfu']:.1%}"
        self.print(f"iter {record['iter']}: loss {record['loss']:.4f}, lr {record['lr']:.2e}, "
                   f"norm {record['grad_norm']:.2f}, {ms:.1f} ms, {speed}{mfu}")
        self._send(record)
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {record['loss']:.4f}, {speed}", refresh=False)

    def evaluation(self, record: dict) -> None:
        """Log an evaluation."""
        self.print(f"step {record['iter']}: train loss {record['train_loss']:.4f}, "
                   f"val loss {record['val_loss']:.4f}, "
                   f"perplexity {record['val_perplexity']:.4g}, "
                   f"accuracy {record['val_accuracy']:.1%}")
        self._send(record)

    def print(self, line: str) -> None:
        """Print a line above the progress bar, in the main process only."""
        if self.bar is not None:
            self.bar.write(line)
        elif self.is_main:
            print(line, flush=True)

    def advance(self) -> None:
        """Advance the progress bar by a step."""
        if self.bar is not None:
            self.bar.update()

    def sync(self) -> None:
        """Flush all records to the disk, so that no checkpoint is ahead of them."""
        if self.tensorboard:
            self.tensorboard.flush()
        if self.file:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        for close in (self.bar and self.bar.close, self.file and self.file.close,
                      self.tensorboard and self.tensorboard.close,
                      self.wandb and self.wandb.finish):
            if close:
                close()

    def _send(self, record: dict) -> None:
        record = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in record.items()}  # JSON has no NaN
        if self.file:
            try:
                self.file.write(json.dumps(record) + "\n")
            except OSError as error:
                with suppress(OSError):  # close tries to write once more
                    self.file.close()
                raise UserError(f"cannot write {self.file.name}: {error.strerror}; the last "
                                f"checkpoint is whole: make room and resume") from None
        numbers = {key: value for key, value in record.items() if value is not None}
        if self.tensorboard:
            self._to_tensorboard(numbers)
        if self.wandb:
            self.wandb.log(numbers, step=record["iter"])

    def _to_tensorboard(self, record: dict) -> None:
        for key, value in record.items():
            self.tensorboard.add_scalar(key, value, record["iter"])


def check_loggers(config: dict) -> None:
    """Import the loggers that the settings name, and log in to Weights & Biases: whatever can
    fail does so before anything is written. Raises UserError."""
    if config["tensorboard_log"]:
        import torch.utils.tensorboard  # noqa: F401
    if config["wandb_log"]:
        import wandb
        try:
            wandb.login()
        except wandb.Error as error:
            raise wandb_error(error) from None


def wandb_error(error: Exception) -> UserError:
    return UserError(f"Weights & Biases did not start ({str(error).splitlines()[0]}): run "
                     f"`wandb login`, or set WANDB_MODE=offline")


def keep_records_before(path: Path, start_iter: int, history: list[dict]) -> None:
    """Drop from metrics.jsonl what a run that resumes at `start_iter` will do again."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; move it away to resume") from None
    evaluated = {record["iter"] for record in history}
    kept = []
    for line in lines:
        try:
            record = json.loads(line)
            if record["iter"] < start_iter or (
                    "val_loss" in record and record["iter"] in evaluated):
                kept.append(line + b"\n")
        except (ValueError, TypeError, KeyError, RecursionError):
            continue  # cut short by a crash, or not a record of ours
    with atomic_write(path) as file:
        file.write(b"".join(kept))
