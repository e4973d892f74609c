"""Training one vision backbone on many data sets and many kinds of task at once."""

from pathlib import Path

__version__ = "0.1.0"


def shipped_configs() -> Path:
    """The folder ``ds_configs``: inside an installed package, beside that of a checkout."""
    package = Path(__file__).parent
    inside = package / "ds_configs"
    return inside if inside.is_dir() else package.parent / "ds_configs"
