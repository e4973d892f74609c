"""Looking through files: in order, up to a limit, and no further than needed."""

from __future__ import annotations

import time
from itertools import count

from gppf_ds.data.scan import first_faults


def check(number: int) -> str | None:
    time.sleep(0.002 if number % 2 else 0)  # so that threads finish in another order
    return f"fault {number}" if number % 3 == 0 else None


def test_the_first_faults_in_order() -> None:
    assert first_faults(check, range(30), 4) == ["fault 0", "fault 3", "fault 6", "fault 9"]
    assert first_faults(check, range(30), 100) == [f"fault {number}" for number in range(0, 30, 3)]
    assert first_faults(check, [], 5) == []


def test_it_stops_at_the_limit() -> None:
    assert len(first_faults(check, count(), 90)) == 90
    assert first_faults(check, count(), 0) == []
