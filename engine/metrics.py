"""Where a run's numbers go: the terminal, out_dir/metrics.jsonl, TensorBoard, Weights & Biases.

Records are plain dicts, one per logged iteration or evaluation, as they stand in metrics.jsonl.
"""

import html
import json
import math
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import torch

from configurator import UserError, regular_file
from data.bins import atomic_write
from engine.progress import Progress
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


# The names of what is logged, in TensorBoard and Weights & Biases. In TensorBoard, the curves of
# one group `loss` are drawn in one chart.
NAMES = {"loss": "loss/train", "train_loss": "loss/train_eval", "val_loss": "loss/val",
         "val_perplexity": "perplexity", "val_accuracy": "accuracy",
         "val_bits_per_byte": "bits_per_byte", "lr": "optimizer/lr",
         "grad_norm": "optimizer/grad_norm", "tokens_per_s": "speed/tokens_per_s",
         "mfu": "speed/mfu", "data_ms": "time_ms/data", "forward_ms": "time_ms/forward",
         "backward_ms": "time_ms/backward", "optimizer_ms": "time_ms/optimizer"}


class Metrics:
    """Sends records to all places that the settings name; does nothing in other processes."""

    def __init__(self, progress: Progress, out_dir: str | None, config: dict, start_iter: int,
                 history: list[dict]):
        """out_dir: None to write no files; config: settings; start_iter: steps done before;
        history: records of the evaluations among them."""
        self.progress, self.file, self.writers, self.wandb = progress, None, {}, None
        if out_dir is None or not progress.is_main:
            return
        folder = Path(out_dir)
        keep_records_before(folder / "metrics.jsonl", start_iter, history)
        self.file = open(folder / "metrics.jsonl", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        if config["tensorboard_log"]:
            from torch.utils.tensorboard import SummaryWriter
            from torch.utils.tensorboard.summary import hparams
            with disk_errors(self.file):
                for name in ("", "train", "train_eval", "val"):
                    self.writers[name] = SummaryWriter(
                        str(folder / "tensorboard" / name), purge_step=start_iter)
            for summary in hparams({key: str(value) for key, value in config.items()}, {}):
                self.writers[""].file_writer.add_summary(summary)
            for record in history:
                if record["iter"] == start_iter:  # purged, but not evaluated again
                    self._to_tensorboard(record)
        if config["wandb_log"]:
            import wandb
            run_id = folder / "wandb_run_id"
            if not run_id.exists():
                run_id.write_text(uuid.uuid4().hex[:8])
            with wandb_errors():
                self.wandb = wandb.init(
                    project=config["wandb_project"], config=config, name=config["wandb_run_name"],
                    dir=out_dir, id=run_id.read_text(), resume="allow")

    def step(self, record: dict) -> None:
        """Log a step."""
        done, times = self.progress.describe(record["iter"], record["seconds"])
        speed = record["tokens_per_s"]
        speed = f"{speed:,.0f}" if speed < 1e5 else f"{speed / 1e3:,.0f}k"
        mfu = "" if record["mfu"] is None else f", MFU {record['mfu']:.0%}"
        self.progress.print(f"{done} iter {record['iter']}: loss {record['loss']:.4f}, norm "
                            f"{record['grad_norm']:.3g}, {speed} tok/s{mfu}, {times}")
        self._send(record)

    def evaluation(self, record: dict) -> None:
        """Log an evaluation."""
        self.progress.print(f"step {record['iter']}: train loss {record['train_loss']:.4f}, "
                            f"val loss {record['val_loss']:.4f}, "
                            f"perplexity {record['val_perplexity']:.3g}, "
                            f"accuracy {record['val_accuracy']:.0%}")
        self._send(record)

    def sample(self, iter_num: int, text: str) -> None:
        """Log a text that the model wrote after iter_num steps."""
        self.progress.print(f"--- written after {iter_num} steps ---\n{text}\n---")
        if self.writers:
            indented = "".join(f"    {line}\n" for line in text.splitlines())  # as code in Markdown
            self.writers[""].add_text("sample", indented, iter_num)
        if self.wandb:
            import wandb
            self._to_wandb({"sample": wandb.Html(f"<pre>{html.escape(text)}</pre>")}, iter_num)

    def sync(self) -> None:
        """Flush all records to the disk, so that no checkpoint is ahead of them."""
        if self.file:
            with disk_errors(self.file):
                for writer in self.writers.values():
                    writer.flush()
                os.fsync(self.file.fileno())

    def close(self) -> None:
        self.progress.close()
        for resource in (self.file, *self.writers.values()):
            if resource:
                resource.close()
        if self.wandb:
            self.wandb.finish()

    def _send(self, record: dict) -> None:
        record = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in record.items()}  # JSON has no NaN
        if self.file:
            with disk_errors(self.file):
                self.file.write(json.dumps(record) + "\n")
                if self.writers:
                    self._to_tensorboard(record)
        if self.wandb:
            self._to_wandb({NAMES[key]: value for key, value in record.items()
                            if key in NAMES and value is not None}, record["iter"])

    def _to_tensorboard(self, record: dict) -> None:
        for key, value in record.items():
            if key in NAMES and value is not None:
                group, _, curve = NAMES[key].partition("/")
                # Charts show one tag of several folders: the losses have a folder for each curve.
                writer, tag = (self.writers[curve], group) if group == "loss" else (
                    self.writers[""], NAMES[key])
                writer.add_scalar(tag, value, record["iter"])

    def _to_wandb(self, values: dict, iter_num: int) -> None:
        try:
            self.wandb.log(values, step=iter_num)
        except Exception as error:  # training continues without its server
            self.progress.print(f"Weights & Biases is not logged to any more: {error}")
            self.wandb = None


def check_loggers(config: dict) -> None:
    """Import the loggers that the settings name, and log in to Weights & Biases: whatever can
    fail does so before anything is written. Raises UserError."""
    if config["tensorboard_log"]:
        import torch.utils.tensorboard  # noqa: F401
    if config["wandb_log"]:
        import wandb
        with wandb_errors():
            wandb.Settings(project=config["wandb_project"], run_name=config["wandb_run_name"])
            wandb.login()


@contextmanager
def wandb_errors() -> Iterator[None]:
    """Turn what Weights & Biases raises at its start, of many classes, into a UserError."""
    try:
        yield
    except Exception as error:
        reason = " ".join((str(error) or type(error).__name__).split())
        raise UserError(f"Weights & Biases did not start ({reason:.200}): run `wandb login`, set "
                        f"WANDB_MODE=offline, or correct the setting or variable that is "
                        f"named") from None


@contextmanager
def disk_errors(log: TextIO) -> Iterator[None]:
    """Turn an OSError into a UserError, and close metrics.jsonl, which would fail again at exit."""
    try:
        yield
    except OSError as error:
        with suppress(OSError):  # close tries to write once more
            log.close()
        raise UserError(f"cannot write {error.filename or log.name}: {error.strerror}; the last "
                        f"checkpoint is whole: make room or repair this, and resume") from None


def keep_records_before(path: Path, start_iter: int, history: list[dict]) -> None:
    """Drop from metrics.jsonl what a run that resumes at `start_iter` will do again."""
    if not path.exists():
        return
    evaluated = {record["iter"] for record in history}
    kept = []
    for line in regular_file(path).read_bytes().splitlines():
        # An error: the line was cut short by a crash, or is not a record of ours.
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            record = json.loads(line)
            if record["iter"] < start_iter or (
                    "val_loss" in record and record["iter"] in evaluated):
                kept.append(line + b"\n")
    with atomic_write(path) as (file,):
        file.write(b"".join(kept))
