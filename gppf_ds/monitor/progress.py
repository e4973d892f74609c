"""One progress bar for the run on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping

from tqdm import tqdm


class Progress:
    """Shows step, tasks of the step, loss per task, temperature, images/s and the time left.

    Args:
        steps: of the whole run.
        start: steps already done.
        every: steps between lines when the output is no terminal.
        enabled: False on all ranks but one.
    """

    def __init__(self, steps: int, start: int, every: int, enabled: bool) -> None:
        self.every = every
        self.enabled = enabled
        # A script that pipes our output onto a terminal says so.
        self.terminal = sys.stderr.isatty() or os.environ.get("GPPF_DS_TERMINAL") == "1"
        self.losses: dict[str, float] = {}
        self._started = time.monotonic()
        self._start, self._steps = start, steps
        self._images = 0
        self.bar = tqdm(
            total=steps,
            initial=start,
            disable=not (enabled and self.terminal),
            dynamic_ncols=True,
            bar_format="{n}/{total} |{bar:12}| {elapsed}<{remaining} {postfix}",
        )

    def step(self, step: int, tasks: Mapping[str, int], losses: Mapping[str, float], tau: float, images: int) -> None:
        """After a step: how many devices ran each task, the tasks' losses, images of all ranks."""
        if not self.enabled:
            return
        self.losses.update(losses)
        self._images += images
        ran = " ".join(f"{task}x{count}" for task, count in tasks.items() if count)
        terms = " ".join(f"{task}={loss:.3g}" for task, loss in self.losses.items())
        rate = self._images / (time.monotonic() - self._started)
        text = f"[{ran}] loss {terms} tau {tau:.2f} {rate:.1f} img/s"
        self.bar.update()
        if self.terminal:
            self.bar.set_postfix_str(text, refresh=False)
        elif (step + 1) % self.every == 0 or step + 1 == self._steps:
            done = step + 1 - self._start
            left = (time.monotonic() - self._started) / done * (self._steps - step - 1)
            print(f"step {step + 1}/{self._steps} {text} left {left:.0f} s", flush=True)

    def close(self) -> None:
        self.bar.close()
