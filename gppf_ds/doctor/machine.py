"""What this machine has, what training will use, and what would not work and why.

Every probe stands alone: one that fails becomes a row of the table, never a traceback. Only torch, torchvision and
OpenCV are imported, because for them an installed version says nothing about whether their compiled parts load.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata, util
from pathlib import Path

from packaging.specifiers import SpecifierSet

from gppf_ds.doctor.table import Row

PYTHON = ">=3.11,<3.13"
SUPPORTED = {
    "torch": ">=2.6",
    "torchvision": ">=0.21",
    "timm": ">=1.0.20",
    "deepspeed": ">=0.19.8,<0.20",
    "onedl-mmengine": ">=0.10.12",
    "onedl-mmcv": ">=2.3.6",
    "onedl-mmdetection": ">=3.5.1",
    "onedl-mmsegmentation": ">=1.4.2",
    "numpy": ">2",
    "pycocotools": ">=2.0.8",
}
"""The version ranges of pyproject.toml (a test keeps the two equal)."""

ORIGINALS = {
    "onedl-mmengine": "mmengine",
    "onedl-mmcv": "mmcv",
    "onedl-mmdetection": "mmdet",
    "onedl-mmsegmentation": "mmsegmentation",
}
"""Each maintained distribution and the original one that installs the same folder."""

VERIFIED_DEEPSPEED = "0.19.8"
GIB = 1024**3


def report() -> list[Row]:
    """Run every probe, in the order of the table."""
    probes: list[Callable[[], Iterator[Row]]] = [
        _python,
        _packages,
        _torchvision_operators,
        _deepspeed_import,
        _opencv,
        _mmcv_operators,
        _accelerators,
        _machine,
        _tools,
    ]
    rows: list[Row] = []
    for probe in probes:
        try:
            rows.extend(probe())
        except Exception as error:  # a probe that fails is a finding, whatever it met
            name = probe.__name__.strip("_").replace("_", " ")
            rows.append(Row(name, "unknown", "note", f"The probe failed: {_one_line(error)}"))
    return rows


def _python() -> Iterator[Row]:
    version = ".".join(str(part) for part in sys.version_info[:3])
    if version in SpecifierSet(PYTHON):
        yield Row("Python", version)
    else:
        yield Row("Python", version, "problem", f"Use a Python {PYTHON}.")


def _packages() -> Iterator[Row]:
    for name, supported in SUPPORTED.items():
        yield _package(name, supported)


def _package(name: str, supported: str) -> Row:
    version, original = _version(name), _version(ORIGINALS.get(name))
    if version is None and original is not None:
        why = f"Tested with {name} {supported}, the maintained continuation of {ORIGINALS[name]}; the original may lag."
        return Row(name, f"{ORIGINALS[name]} {original}", "note", why)
    if version is None:
        return Row(name, "missing", "problem", f"Install it: pip install '{name}{supported}'.")
    if original is not None:
        why = f"It shares a folder with {ORIGINALS[name]} {original}: uninstall both, then install {name} again."
        return Row(name, version, "problem", why)
    if not SpecifierSet(supported).contains(version, prereleases=True):
        return Row(name, version, "problem", f"Supported are versions {supported}: pip install '{name}{supported}'.")
    if name == "deepspeed" and version != VERIFIED_DEEPSPEED:
        why = f"The task average was verified inside DeepSpeed {VERIFIED_DEEPSPEED}: run the tests before a long run."
        return Row(name, version, "note", why)
    return Row(name, version)


def _version(distribution: str | None) -> str | None:
    try:
        return metadata.version(distribution) if distribution else None
    except metadata.PackageNotFoundError:
        return None


def _torchvision_operators() -> Iterator[Row]:
    """torchvision's compiled operators load only beside the torch that they were built for."""
    name = "torchvision operators"
    try:
        import torch
        from torchvision.ops import nms

        kept = nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)
        yield Row(name, "load" if kept.tolist() == [0] else "wrong result")
    except Exception as error:  # what a mismatch raises differs from version to version
        why = f"Install the torchvision that was built for this torch ({_one_line(error)})."
        yield Row(name, "do not load", "problem", why)


def _deepspeed_import() -> Iterator[Row]:
    """In a process of its own: the import picks an accelerator for good and writes to the screen."""
    command = [sys.executable, "-c", "import deepspeed"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode == 0:
        yield Row("deepspeed import", "works")
    else:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        yield Row("deepspeed import", "fails", "problem", f"DeepSpeed cannot be used with what is installed: {last}")


def _opencv() -> Iterator[Row]:
    try:
        import cv2

        yield Row("OpenCV", cv2.__version__)
    except ImportError as error:
        why = (
            "Install the build without a display: pip install --force-reinstall --no-deps opencv-python-headless"
            f" ({_one_line(error)})."
        )
        yield Row("OpenCV", "does not load", "problem", why)


def _mmcv_operators() -> Iterator[Row]:
    """Looks for the compiled module on disk: importing mmcv would take seconds."""
    spec = util.find_spec("mmcv")
    folders = list(spec.submodule_search_locations or []) if spec else []
    compiled = any(next(Path(folder).glob("_ext.*"), None) for folder in folders)
    yield Row("mmcv operators", "compiled" if compiled else "served by torchvision (no compiler needed)")


def _accelerators() -> Iterator[Row]:
    import torch
    from torch import distributed

    if not distributed.is_available():
        why = "This torch was built without torch.distributed: install one that has it."
        yield Row("collectives", "none", "problem", why)
        return
    wants_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    if torch.cuda.is_available() and not wants_cpu:
        yield from _gpus()
        backend, available = "nccl", distributed.is_nccl_available()
    else:
        yield _cpu_instead(wants_cpu, driver_found=shutil.which("nvidia-smi") is not None)
        backend, available = "gloo", distributed.is_gloo_available()
    if available:
        yield Row("collectives", backend)
    else:
        yield Row("collectives", "none", "problem", f"This torch was built without {backend}: install one that has it.")


def _gpus() -> Iterator[Row]:
    import torch

    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        value = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB"
        if properties.major >= 8:  # Ampere, the first generation with bfloat16 units
            yield Row(f"accelerator {index}", f"{value}, bf16")
        else:
            yield Row(f"accelerator {index}", value, "note", "It has no bf16 units: use fp16 or fp32 configurations.")


def _cpu_instead(wants_cpu: bool, driver_found: bool) -> Row:
    why = "Training runs on the CPU: good for small networks and for trying a recipe out."
    if driver_found and not wants_cpu:
        why += " An NVIDIA driver is installed, but this torch cannot use it: compare its version with torch's CUDA."
    return Row("accelerator", "none (CPU)", "note", why)


def _machine() -> Iterator[Row]:
    yield Row("CPU cores", str(len(os.sched_getaffinity(0))))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    if memory >= 3.5:
        yield Row("memory", f"{memory:.0f} GiB")
    else:
        yield Row("memory", f"{memory:.1f} GiB", "note", "Two CPU ranks of the demo want about 4 GiB together.")
    free = shutil.disk_usage(Path.cwd()).free / GIB
    if free >= 1:
        yield Row("free disk here", f"{free:.0f} GiB")
    else:
        yield Row("free disk here", f"{free:.2f} GiB", "note", "Checkpoints may not fit: free some space.")


def _tools() -> Iterator[Row]:
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), "absent")
    yield Row("C++ compiler", f"{compiler} (none is needed)")
    if shutil.which("numactl"):
        yield Row("numactl", "present")
    else:
        yield Row("numactl", "absent (only the launcher's --bind_cores_to_rank needs it)")


def _one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
