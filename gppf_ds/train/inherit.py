"""Recipes that build on other recipes: ``inherit: base.yaml`` in a file, several ``--config`` files on the line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gppf_ds.errors import UserError

Content = dict[str, Any]


@dataclass
class Resolved:
    """A recipe as plain data, with nothing left to inherit."""

    content: Content
    places: dict[str, Path]
    """The file that had the last word on each dotted key."""

    def place(self, sentence: str) -> str:
        """``" (set in FILE)"`` for the innermost key of the recipe that a sentence names, if it names one."""
        named = [key for key in self.places if re.search(rf"(?<![\w.]){re.escape(key)}(?!\w|\.\w)", sentence)]
        return f" (set in {self.places[max(named, key=len)]})" if named else ""


def resolve(files: Sequence[Path]) -> Resolved:
    """What the files say together; each is laid over those before it, and over what it inherits.

    ``inherit`` is a path relative to the file. Mappings merge key by key, also inside ``tasks``; everything else, lists
    too, is replaced. A task set to null is removed. Where ``class_path`` changes, the old ``init_args`` go; where the
    backbone's ``name`` changes, its old ``options``.

    Raises:
        UserError: a file cannot be read, inherits itself or removes a task that is not there.
    """
    resolved = Resolved({}, {})
    for file in files:
        for path, own in _lineage(file):
            resolved.content = laid_over(resolved.content, own, str(path))
            resolved.places |= dict.fromkeys(_dotted(own), path)
    return resolved


def laid_over(base: Content, own: Content, place: str) -> Content:
    """What a recipe says that inherits another one; see :func:`resolve`.

    Args:
        base: what is inherited.
        own: laid over it.
        place: where ``own`` comes from, for messages.

    Raises:
        UserError: ``own`` removes a task that is not there.
    """
    tasks = own.get("tasks")
    removed = [name for name, task in tasks.items() if task is None] if isinstance(tasks, dict) else []
    inherited = base.get("tasks") or {}
    for name in removed:
        if name not in inherited:
            there = ", ".join(inherited) or "no tasks"
            raise UserError(f"{place}: tasks.{name} is null, which removes it, but there are only {there}.")
    content: Content = _merge(base, own)
    for name in removed:
        del content["tasks"][name]
    return content


def _lineage(file: Path) -> list[tuple[Path, Content]]:
    """The file behind those that it inherits, the oldest first, each without its ``inherit``."""
    found: list[tuple[Path, Content]] = []
    while True:
        content = _read(file)
        base = content.pop("inherit", None)
        found.insert(0, (file, content))
        if base is None:
            return found
        if not isinstance(base, str):
            raise UserError(f"{file}: inherit must be the path of one recipe, not {base!r}.")
        heir, file = file, file.parent / base
        if not file.is_file():
            raise UserError(f"{heir}: inherit names {base}, but there is no file {file}.")
        if file.resolve() in [path.resolve() for path, _ in found]:
            chain = " -> ".join(path.name for path, _ in reversed(found))
            raise UserError(f"{heir}: inherit goes in a circle ({chain} -> {file.name}): break it.")


def _read(file: Path) -> Content:
    try:
        content = yaml.safe_load(file.read_text())
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): name a recipe.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is no YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} has to be a mapping of keys such as steps and tasks, not {type(content).__name__}.")
    return content


def _merge(base: Any, own: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(own, dict):
        return own
    if "class_path" in own and own["class_path"] != base.get("class_path"):
        return own
    if own.get("name", base.get("name")) != base.get("name"):  # another backbone: options are of one
        base = {key: value for key, value in base.items() if key != "options"}
    return base | {key: _merge(base.get(key), value) for key, value in own.items()}


def _dotted(content: Content, prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
