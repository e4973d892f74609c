"""engine.audit on real ranks: silent on honest runs, and it names a collective that only one rank calls."""

from __future__ import annotations

import json

from distributed.ranks import end_ranks, run_ranks


def test_honest_runs_pass_at_every_stage() -> None:
    cases = [{"stage": 0, "accumulation": 2}, {"stage": 1}, {"stage": 2, "checkpoint": True}, {"stage": 3}]
    for output in run_ranks("distributed.audit_case", 2, json.dumps(cases)):
        assert output.count("PASSED") == len(cases), output


def test_a_collective_of_one_rank_is_named_without_a_hang() -> None:
    command = ["-m", "distributed.audit_case", json.dumps([{"stage": 0}]), "plant"]
    _, outputs = end_ranks([command, command], timeout=60)
    found = [line for output in outputs for line in output.splitlines() if line.startswith("FOUND")]
    assert found, outputs
    assert "audit of step 0" in found[0]
    assert "allreduce of 7 float32" in found[0]
    assert "on rank 1" in found[0]
    assert "PASSED" not in "".join(outputs)
