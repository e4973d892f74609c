"""A few validation images of every task with what the network finds in them, as pictures for a page."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import torch

from gppf_ds.errors import UserError
from gppf_ds.train.restore import Trained
from gppf_ds.transfer.drawing import draw, read_pixels
from gppf_ds.transfer.predict import predict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 160
_SIDE = 2.1
"""Inches of a panel: letters stay legible where a phone shows two side by side."""


def sample_pictures(trained: Trained, task: str, count: int, device: torch.device) -> list[tuple[str, str]]:
    """Predictions on validation images, drawn beside them.

    Args:
        trained: the network, on ``device``.
        task: its name.
        count: pictures, at most; they are spread evenly over the validation set.
        device: of the network.

    Returns:
        Names of the images (with their folders', which may be their classes) and ``data:`` addresses of jpeg images.

    Raises:
        UserError: the images are no files of their own, or cannot be read.
    """
    files = trained.recipe.tasks[task].image_files("val", count)
    if not files:
        raise UserError("its validation images are no files of their own.")
    pictures = []
    for file in files:
        found, name = predict(trained, [task], file, device).found, f"{file.parent.name}/{file.name}"
        pictures.append((name, _jpeg(draw(read_pixels(file), found, name, _SIDE))))
    return pictures


def _jpeg(figure: Figure) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="jpeg", dpi=_DPI, bbox_inches="tight", pil_kwargs={"quality": 88})
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
