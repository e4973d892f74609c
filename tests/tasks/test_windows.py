"""Sliding windows; that they are mmseg's is tested with the segmentation task."""

from __future__ import annotations

import pytest
import torch

from gppf_ds.errors import UserError
from gppf_ds.tasks.windows import Windows


def test_windows_are_averaged_where_they_overlap() -> None:
    windows = Windows((2, 3), (1, 2))
    assert windows.places((3, 6)) == [(top, left) for top in (0, 1) for left in (0, 2, 3)]
    assert windows.places((2, 3)) == [(0, 0)]
    image = torch.arange(36.0).reshape(2, 3, 6)
    torch.testing.assert_close(windows.join(windows.cut(image), (3, 6)), image)
    parts = torch.stack([torch.full((1, 2, 3), float(index)) for index in range(6)])
    joined = windows.join(parts, (3, 6))[0]
    assert joined[0].tolist() == [0, 0, 0.5, 1.5, 1.5, 2]
    assert joined[1].tolist() == [1.5, 1.5, 2, 3, 3, 3.5]


def test_windows_with_gaps_are_refused() -> None:
    with pytest.raises(UserError, match="stride"):
        Windows((2, 3), (1, 4))
    with pytest.raises(UserError, match="stride"):
        Windows((2, 3), (0, 1))
