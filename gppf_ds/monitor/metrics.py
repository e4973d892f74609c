"""Prometheus metrics of one rank, in a registry of their own, served on localhost unless told otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    start_http_server,
)

import gppf_ds
from gppf_ds.errors import UserError

STEP_BUCKETS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 30.0, 60.0)
SAVE_BUCKETS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
REASONS = ("non_finite_loss", "non_finite_gradient", "loss_scale_overflow")
"""Why a step changes nothing."""
DEAD = 0.01
"""An expert with less than this part of its fair share is dead; running shares never get to 0."""
DETAILED = 500
"""The most series of experts that a layer may have; with more, its experts are told about together only."""


class Metrics:
    """What the trainer tells about its steps.

    Args:
        versions: of the libraries, for ``build_info``.
        tasks: whose counters stand at 0 from the start: Prometheus sees no rise of one that begins at 1.
    """

    def __init__(self, versions: Mapping[str, str], tasks: Iterable[str] = ()) -> None:
        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"namespace": "gppf_ds", "registry": self.registry}
        self._time(options)
        self._tasks(options)
        self._routes(options)
        self._faults(options)
        self._memory(options)
        Info("build", "Versions", **options).info({"version": gppf_ds.__version__, **versions})
        for task in tasks:
            for counter in (self.data_wait, self.images, self.iterations, self.dropped, self.unreadable):
                counter.labels(task)
        for reason in REASONS:
            self.skipped.labels(reason)

    def _time(self, options: dict[str, Any]) -> None:
        self.step = Gauge("step", "Optimizer steps done", **options)
        self.step_duration = Histogram(
            "step_duration_seconds", "Time of one optimizer step", buckets=STEP_BUCKETS, **options
        )
        self.step_time = Counter("step_time_seconds", "Time of all steps by what it was spent on", ["part"], **options)
        self.compute = Histogram(
            "task_compute_duration_seconds", "Compute part of one step", ["task"], buckets=STEP_BUCKETS, **options
        )
        self.data_wait = Counter("data_wait_seconds_total", "Time this rank waited for data", ["task"], **options)
        self.straggler_wait = Counter(
            "straggler_wait_seconds_total", "Time this rank waited for slower ranks", ["task"], **options
        )
        self.last_step = Gauge("last_step_timestamp_seconds", "When the last step ended", **options)
        self.checkpoint_duration = Histogram(
            "checkpoint_duration_seconds", "Time of saving a checkpoint", ["phase"], buckets=SAVE_BUCKETS, **options
        )
        self.checkpoint_time = Gauge("checkpoint_last_timestamp_seconds", "When the last checkpoint ended", **options)

    def _tasks(self, options: dict[str, Any]) -> None:
        self.images = Counter("images_total", "Images this rank trained on", ["task"], **options)
        self.iterations = Counter("task_iterations_total", "Batches this rank trained on", ["task"], **options)
        self.loss = Gauge("task_loss", "Latest loss on this rank", ["task", "term"], **options)
        self.metric = Gauge("task_metric", "Latest value of an evaluation metric", ["task", "metric"], **options)
        self.learning_rate = Gauge("learning_rate", "Of the network, and of the controllers", ["group"], **options)
        self.gradient_norm = Gauge("grad_norm", "Of the fused gradient, before clipping", ["group"], **options)

    def _routes(self, options: dict[str, Any]) -> None:
        self.temperature = Gauge("lego_temperature", "Gumbel-softmax temperature", **options)
        self.selection_ratio = Gauge(
            "lego_selection_ratio", "Probability that a task takes a unit", ["layer", "unit", "task"], **options
        )
        self.entropy_ratio = Gauge(
            "lego_entropy_ratio", "Entropy of a task's choice, 1 is undecided", ["layer", "task"], **options
        )
        self.users = Gauge("parameter_users", "Devices that used these parameters in the step", ["group"], **options)
        self.expert_utilization = Gauge(
            "expert_utilization_ratio", "Load of an expert by its fair share", ["layer", "expert", "task"], **options
        )
        self.dead_experts = Gauge("dead_expert_ratio", "Share of experts with next to no load", ["layer"], **options)
        self.expert_diversity = Gauge(
            "expert_diversity_ratio", "exp(entropy of the load) / experts, 1 is even", ["layer"], **options
        )

    def _faults(self, options: dict[str, Any]) -> None:
        self.skipped = Counter("steps_skipped_total", "Steps that changed nothing", ["reason"], **options)
        self.dropped = Counter(
            "device_contributions_dropped_total", "Devices whose loss or gradient was not finite", ["task"], **options
        )
        self.unreadable = Counter("unreadable_samples_total", "Samples replaced by the next one", ["task"], **options)
        self.worker_restarts = Counter("worker_restarts_total", "Pools of data workers started anew", **options)

    def _memory(self, options: dict[str, Any]) -> None:
        """Read when Prometheus asks, so that they cost a step nothing."""
        ProcessCollector(namespace="gppf_ds", registry=self.registry)
        peak = Gauge("accelerator_memory_peak_bytes", "Most memory that torch held on the GPU at once", **options)
        peak.set_function(lambda: torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0)

    def split(self, task: str, parts: Mapping[str, float]) -> None:
        """What a step's seconds were spent on: compute, data_wait, straggler_wait and communication.

        Args:
            task: of this rank's devices.
            parts: which sum to the step's time; waiting for data is counted by task as it happens.
        """
        for part, seconds in parts.items():
            self.step_time.labels(part).inc(seconds)
        self.compute.labels(task).observe(parts["compute"])
        self.straggler_wait.labels(task).inc(parts["straggler_wait"])

    def selection(self, task: str, layers: Sequence[str], probabilities: Sequence[Sequence[float]]) -> None:
        """A task's controller: how likely it takes each unit of each layer, and how decided it is.

        Args:
            task: its name.
            layers: their names.
            probabilities: of the units by layer, each row summing to 1; 0 beyond the units that a layer has.
        """
        for layer, row in zip(layers, probabilities, strict=True):
            for unit, value in enumerate(row):
                self.selection_ratio.labels(layer, str(unit), task).set(value)
            self.entropy_ratio.labels(layer, task).set(_entropy(row) / math.log(len(row)) if len(row) > 1 else 0.0)

    def parameter_users(self, counts: Mapping[tuple[str, ...], int], norms: Mapping[tuple[str, ...], float]) -> None:
        """Each group of parameters in the step: how many devices used it (N_p by owner), and its gradient's norm."""
        for owner, users in counts.items():
            self.users.labels("/".join(owner)).set(users)
        for owner, norm in norms.items():
            self.gradient_norm.labels("/".join(owner)).set(norm)

    def experts(self, layer: str, load: Mapping[str, Sequence[float]]) -> None:
        """The experts of a layer: how much each task gives to each of them.

        A load of all zeros tells nothing, and changes nothing.

        Args:
            layer: its name.
            load: by task, one number for each expert: tokens, or shares of the task's.
        """
        total = [sum(given) for given in zip(*load.values(), strict=True)]
        if not sum(total):
            return
        shares = [given / sum(total) for given in total]
        self.dead_experts.labels(layer).set(sum(share < DEAD / len(shares) for share in shares) / len(shares))
        self.expert_diversity.labels(layer).set(math.exp(_entropy(shares)) / len(total))
        for task, given in load.items() if len(load) * len(total) <= DETAILED else ():
            ideal = sum(given) / len(given)
            for expert, value in enumerate(given):
                self.expert_utilization.labels(layer, str(expert), task).set(value / ideal if ideal else 0.0)

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


def _entropy(shares: Sequence[float]) -> float:
    return -sum(share * math.log(share) for share in shares if share > 0)
