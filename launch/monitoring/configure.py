"""Prints the configuration of a Prometheus that watches the runs of a hostfile.

    python launch/monitoring/configure.py HOSTFILE --port 9400 >prometheus.yml
    prometheus --config.file=prometheus.yml

The port is the recipe's metrics_port. Prometheus must reach it: set metrics_address to an address of the machines'
own network, or run one Prometheus on each machine.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

from gppf_ds import hostfile
from gppf_ds.errors import UserError

ALERTS = Path(__file__).resolve().with_name("alerts.yml")


def configuration(hosts: list[hostfile.Host], port: int, interval: str) -> dict[str, object]:
    """One target for every rank, with the machine and the local rank as labels."""
    targets = []
    for host in hosts:
        name = host.name.rpartition("@")[2]
        for rank in range(host.slots):
            labels = {"host": name, "local_rank": str(rank)}
            targets.append({"targets": [f"{name}:{port + rank}"], "labels": labels})
    return {
        "global": {"scrape_interval": interval, "evaluation_interval": interval},
        "rule_files": [str(ALERTS)],
        "scrape_configs": [{"job_name": "gppf_ds", "static_configs": targets}],
    }


def main() -> int:
    """Prints it; 2 for a hostfile that is not well-formed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hostfile", type=Path, help="the machines of the runs")
    parser.add_argument("--port", type=int, required=True, help="metrics_port of the recipe")
    parser.add_argument("--interval", default="15s", help="between two looks at a rank (default: %(default)s)")
    options = parser.parse_args()
    try:
        hosts = hostfile.read(options.hostfile)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(yaml.safe_dump(configuration(hosts, options.port, options.interval), sort_keys=False), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
