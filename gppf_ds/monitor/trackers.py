"""TensorBoard, Weights & Biases, Comet and csv files, through the monitor that DeepSpeed makes from its json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Trackers:
    """Those that ``engine.deepspeed`` turns on; the main rank's alone.

    DeepSpeed would write events of its own at every step, numbered by samples since the launch, among which trackers
    that want rising numbers (W&B) drop ours: it is told not to.

    Args:
        monitor: of a DeepSpeed engine.
    """

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor if monitor.enabled else None
        monitor.enabled = False

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Values by name after ``step`` optimizer steps; nothing where no tracker is on."""
        if self._monitor is not None:
            self._monitor.write_events([(name, value, step) for name, value in values.items()])
