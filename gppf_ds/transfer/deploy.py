"""A path as a graph for other runtimes: ONNX and ``torch.export``, compared with the path before it is kept."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from gppf_ds.errors import UserError
from gppf_ds.transfer.extract import ChosenPath, Size, probe, relative_difference

ONNX_FILE, PROGRAM_FILE = "model.onnx", "model.pt2"

LARGEST_DIFFERENCE = 1e-5
"""Of the maps of a graph from those of the path, relative to their largest value."""


@dataclass(frozen=True)
class Graph:
    """What :func:`write` wrote."""

    files: tuple[str, ...]
    inputs: str
    """The images that the graphs take, in words."""
    outputs: tuple[str, ...]
    """Names of the maps in ONNX; ``torch.export`` returns them as a tuple in this order."""
    difference: float
    """Largest relative difference to the path, over all files and sizes compared."""


def require_onnx() -> None:
    """Raises :class:`UserError` if what writes and checks ONNX is not installed."""
    missing = [package for package in ("onnx", "onnxscript", "onnxruntime") if find_spec(package) is None]
    if missing:
        raise UserError(f"--onnx needs {', '.join(missing)}: pip install 'gppf-ds[onnx]'.")


def write(path: ChosenPath, size: Size, folder: Path, onnx: bool, program: bool) -> Graph:
    """Writes ``model.onnx`` and ``model.pt2`` (what is asked for), in fp32.

    The number of images is free. Height and width are too, in steps of the coarsest stride, except for windowed
    attention: its padding and shifts depend on them, and tracing all cases at once does not end. It gets ``size``, as
    does any model for which ``size`` is no multiple of the stride.

    Args:
        path: a task's.
        size: of the images to trace with.
        folder: exists.
        onnx: whether to write ``model.onnx``.
        program: whether to write ``model.pt2``.

    Raises:
        UserError: torch cannot trace the path, cannot express it in ONNX, or the graph gives other numbers.
    """
    stride = max(path.strides)
    free = not path.windowed and all(side % stride == 0 and side > stride for side in size)
    names = tuple(f"map_{stride}" for stride in path.strides)
    traced = _trace(path, size, stride if free else None)
    runs: dict[str, Callable[[Tensor], Sequence[Tensor]]] = {}
    if program:
        with _quiet():
            torch.export.save(traced, folder / PROGRAM_FILE)
            runs[PROGRAM_FILE] = torch.export.load(folder / PROGRAM_FILE).module()
    if onnx:
        _write_onnx(traced, names, folder / ONNX_FILE)
        runs[ONNX_FILE] = _onnx_session(folder / ONNX_FILE)
    sizes = [size, (size[0] + stride, 2 * stride)] if free else [size]
    worst = max(_difference(path, run, sizes, file) for file, run in runs.items())
    inputs = (
        f"(B, 3, H, W), any B; H and W multiples of {stride} from {2 * stride} on"
        if free
        else f"(B, 3, {size[0]}, {size[1]}), any B"
    )
    return Graph(tuple(runs), inputs, names, worst)


def _trace(path: ChosenPath, size: Size, stride: int | None) -> ExportedProgram:
    shape = {0: Dim("batch")}
    if stride is not None:
        # At a single row or column of the last map torch specialises the graph.
        shape |= {2: stride * Dim("rows", min=2), 3: stride * Dim("columns", min=2)}
    try:
        with _quiet():
            return torch.export.export(path, (probe(size),), dynamic_shapes=(shape,))
    except Exception as error:  # the tracer fails in many ways, all with the model's
        raise UserError(
            f"torch.export cannot trace {path.timm_model} at {size[0]} x {size[1]} ({_first_line(error)}): leave out "
            "--onnx and --torch-export, or give another --size."
        ) from error


def _write_onnx(traced: ExportedProgram, names: Sequence[str], file: Path) -> None:
    try:
        with _quiet():
            made = torch.onnx.export(traced, dynamo=True, input_names=["images"], output_names=names, verbose=False)
            assert made is not None
            made.save(file)
    except Exception as error:
        raise UserError(f"torch cannot express this path in ONNX ({_first_line(error)}): leave out --onnx.") from error


def _onnx_session(file: Path) -> Callable[[Tensor], list[Tensor]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(found) for found in session.run(None, {"images": images.numpy()})]


@torch.no_grad()
def _difference(path: ChosenPath, run: Callable[[Tensor], Sequence[Tensor]], sizes: Sequence[Size], file: str) -> float:
    worst = 0.0
    for count, size in enumerate(sizes, start=2):
        images = probe(size, count)
        pairs = zip(path(images), run(images), strict=True)
        worst = max(worst, *(relative_difference(ours, theirs) for ours, theirs in pairs))
    if not worst <= LARGEST_DIFFERENCE:
        raise UserError(
            f"{file} differs from the path by {worst:.1e} of the largest value, more than {LARGEST_DIFFERENCE:.0e}: "
            "leave it out, or give another --size."
        )
    return worst


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """The tracer and the ONNX exporter report what they do by prints, warnings and logs."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
