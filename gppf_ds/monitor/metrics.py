"""Prometheus metrics of one rank, in a registry of their own, served on localhost unless told otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, start_http_server

import gppf_ds
from gppf_ds.errors import UserError


class Metrics:
    """What the trainer tells about its steps.

    Args:
        versions: of the libraries, for ``build_info``.
    """

    def __init__(self, versions: Mapping[str, str]) -> None:
        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"namespace": "gppf_ds", "registry": self.registry}
        self.step = Gauge("step", "Optimizer steps done", **options)
        self.step_duration = Histogram("step_duration_seconds", "Time of one optimizer step", **options)
        self.data_wait = Counter("data_wait_seconds_total", "Time this rank waited for data", ["task"], **options)
        self.images = Counter("images_total", "Images this rank trained on", ["task"], **options)
        self.iterations = Counter("task_iterations_total", "Batches this rank trained on", ["task"], **options)
        self.loss = Gauge("task_loss", "Latest loss on this rank", ["task", "term"], **options)
        self.metric = Gauge("task_metric", "Latest value of an evaluation metric", ["task", "metric"], **options)
        self.temperature = Gauge("lego_temperature", "Gumbel-softmax temperature", **options)
        self.learning_rate = Gauge("learning_rate", "Learning rate of backbone and heads", **options)
        self.skipped = Counter("steps_skipped_total", "Steps that changed nothing", ["reason"], **options)
        self.dropped = Counter(
            "device_contributions_dropped_total", "Devices whose loss or gradient was not finite", ["task"], **options
        )
        self.unreadable = Counter("unreadable_samples_total", "Samples replaced by the next one", ["task"], **options)
        self.worker_restarts = Counter("worker_restarts_total", "Pools of data workers started anew", **options)
        self.last_step = Gauge("last_step_timestamp_seconds", "When the last step ended", **options)
        self.checkpoint_time = Gauge("checkpoint_last_timestamp_seconds", "When the last checkpoint ended", **options)
        Info("build", "Versions", **options).info({"version": gppf_ds.__version__, **versions})

    def serve(self, address: str, port: int) -> None:
        """Starts the exporter.

        Raises:
            UserError: the port is taken or the address is not this host's.
        """
        try:
            start_http_server(port, address, self.registry)
        except OSError as error:
            raise UserError(
                f"cannot serve metrics on {address}:{port} ({error.strerror}): change metrics_port or metrics_address."
            ) from error
