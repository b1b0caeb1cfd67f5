"""What the terminal shows of a run while it trains."""

import shutil
import sys
import threading
import time
from contextlib import nullcontext
from importlib.util import find_spec

from configurator import print0
from engine.runtime import Runtime


class Progress:
    """Log lines and, if stderr is a terminal, a progress bar below them.

    The clock of the bar is drawn every second, so that one sees that a long step is running.
    """

    def __init__(self, runtime: Runtime, initial: int, total: int):
        """initial: steps done before; total: steps of the whole run."""
        self.is_main, self.total, self.bar = runtime.rank == 0, total, None
        self.n_steps, self.first_end = 0, 0.0  # of this process
        self.step_start = self.last_print = time.monotonic()
        if self.is_main and sys.stderr.isatty() and find_spec("tqdm"):
            from tqdm import tqdm
            columns, lines = shutil.get_terminal_size()  # 80 x 24 if the terminal does not say
            self.bar = tqdm(total=total, initial=initial, ncols=columns, nrows=lines, smoothing=0.1)
            threading.Thread(target=self._draw_clock, daemon=True).start()

    def _draw_clock(self) -> None:
        while not self.bar.disable:  # until it is closed
            self.bar.refresh()
            time.sleep(1)

    def print(self, line: str) -> None:
        """Print a line above the bar, in the main process only."""
        with self.bar.external_write_mode() if self.bar is not None else nullcontext():
            print0(line)
        self.last_print = time.monotonic()

    def status(self, what: str, done: int, total: int) -> None:
        """Show how much of a step or an evaluation is done, if it takes more than 5 s."""
        if time.monotonic() - self.step_start < 5:
            return
        if self.bar is not None:
            self.bar.set_description_str(f"{what} {done}/{total}", refresh=False)
        elif time.monotonic() - self.last_print > 30:
            self.print(f"{what} {done}/{total}")

    def advance(self, postfix: str) -> None:
        """Advance the bar by a step; it ends with the postfix."""
        self.step_start = time.monotonic()
        if self.n_steps == 0:
            self.first_end = self.step_start
        self.n_steps += 1
        if self.bar is not None:
            self.bar.set_description_str("", refresh=False)
            self.bar.set_postfix_str(postfix, refresh=False)
            self.bar.update()

    def describe(self, iter_num: int, seconds: float) -> tuple[str, str]:
        """Fraction of the run that is done after step iter_num; the time that it took, and will
        take by the mean of the steps after the first."""
        done, times = iter_num + 1, duration(seconds)
        if self.n_steps > 0:
            per_step = (time.monotonic() - self.first_end) / self.n_steps
            times += f", {duration(per_step * (self.total - done))} left"
        return f"{done / self.total:4.0%}", times

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def duration(seconds: float) -> str:
    """A time as a whole number of days, hours, minutes or seconds: 87s, 63m, 26h, 12d."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size and (unit != "d" or seconds >= 4 * size):
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"
