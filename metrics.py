"""Where numbers go: the terminal, out_dir/metrics.jsonl, TensorBoard, Weights & Biases.

Records are plain dicts, one for a logged iteration or an evaluation, with the names that
metrics.jsonl has.
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
from data.bins import written_whole
from runtime import Runtime


class Stopwatch:
    """Time spent in the phases of a step, averaged over the steps since it was last read.

    Only what lies between `start` and the last `lap` of a step counts: evaluation, saving and
    logging do not. A GPU's time is taken by events in its own queue, without waiting for it.
    """

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self.marks = []  # (phase that ended, or None at a start; time)

    def _now(self) -> float | torch.cuda.Event:
        if self.runtime.device.type != "cuda":
            self.runtime.synchronize()  # MPS; on a CPU there is nothing to wait for
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        """A step begins."""
        self.marks.append((None, self._now()))

    def lap(self, phase: str) -> None:
        """What ran since the last call was `phase`."""
        self.marks.append((phase, self._now()))

    def read(self) -> dict[str, float]:
        """Milliseconds per step by phase. Waits for the device, and starts over."""
        self.runtime.synchronize()
        steps = sum(phase is None for phase, _ in self.marks)
        total_ms = {}
        for (_, before), (phase, after) in zip(self.marks, self.marks[1:], strict=False):
            if phase is not None:
                ms = (before.elapsed_time(after) if self.runtime.device.type == "cuda"
                      else (after - before) * 1e3)
                total_ms[phase] = total_ms.get(phase, 0.0) + ms
        self.marks = []
        return {phase: ms / steps for phase, ms in total_ms.items()}


class Metrics:
    """Sends records to every place that was asked for; in a process that is not main, nowhere."""

    def __init__(self, runtime: Runtime, out_dir: str | None, config: dict, start_iter: int,
                 history: list[dict]):
        """out_dir: None writes nothing; config: the run's settings; start_iter: steps done
        before; history: the evaluations among them."""
        self.bar = self.file = self.tensorboard = self.wandb = None
        self.is_main = runtime.is_main
        if not self.is_main:
            return
        if sys.stderr.isatty() and find_spec("tqdm") and not config["eval_only"]:
            from tqdm import tqdm
            columns, lines = shutil.get_terminal_size()  # 80 x 24 where the terminal won't tell
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
                raise UserError(f"Weights & Biases did not start ({str(error).splitlines()[0]}): "
                                f"run `wandb login`, or set WANDB_MODE=offline") from None

    def step(self, record: dict) -> None:
        """Log an iteration."""
        speed = f"{record['tokens_per_s']:,.0f} tok/s"
        ms = sum(record[key] for key in record if key.endswith("_ms"))
        mfu = "" if record["mfu"] is None else f", MFU {record['mfu']:.1%}"
        skipped = f", STEP SKIPPED ({record['bad_steps']} in a row)" if record["bad_steps"] else ""
        self._say(f"iter {record['iter']}: loss {record['loss']:.4f} (max "
                  f"{record['loss_max']:.4f}), lr {record['lr']:.2e}, "
                  f"norm {record['grad_norm']:.2f}, {ms:.1f} ms, {speed}{mfu}{skipped}")
        self._send(record)
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {record['loss']:.4f}, {speed}", refresh=False)

    def evaluation(self, record: dict) -> None:
        """Log an evaluation."""
        self._say(f"step {record['iter']}: train loss {record['train_loss']:.4f}, "
                  f"val loss {record['val_loss']:.4f}, "
                  f"perplexity {record['val_perplexity']:.4g}, "
                  f"accuracy {record['val_accuracy']:.1%}")
        self._send(record)

    def advance(self) -> None:
        """One more step is done."""
        if self.bar is not None:
            self.bar.update()

    def sync(self) -> None:
        """See all records on the disk, so that no checkpoint is ahead of them."""
        if self.tensorboard:
            self.tensorboard.flush()
        if self.file:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        for end in (self.bar and self.bar.close, self.file and self.file.close,
                    self.tensorboard and self.tensorboard.close, self.wandb and self.wandb.finish):
            if end:
                end()

    def _say(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line)
        elif self.is_main:
            print(line, flush=True)

    def _send(self, record: dict) -> None:
        record = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in record.items()}  # JSON has no NaN
        if self.file:
            try:
                self.file.write(json.dumps(record) + "\n")
            except OSError as error:
                with suppress(OSError):  # it tries once more to write
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


def import_loggers(config: dict) -> None:
    """Import what the settings ask for, to learn what is missing before anything is written."""
    if config["tensorboard_log"]:
        import torch.utils.tensorboard  # noqa: F401
    if config["wandb_log"]:
        import wandb  # noqa: F401


def keep_records_before(path: Path, start_iter: int, history: list[dict]) -> None:
    """Drop from metrics.jsonl what a run will do again when it goes on from `start_iter`."""
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
            continue  # cut short by a crash, or no record of ours
    with written_whole(path) as file:
        file.write(b"".join(kept))
