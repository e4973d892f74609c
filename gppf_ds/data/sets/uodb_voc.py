"""Pascal VOC xml: VOC 2007 and 2012, Clipart1k, Watercolor2k, Comic2k and the Kitchen set as the benchmark has it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.parsers import expat

from gppf_ds.data.sets.uodb_coco import Box, Fault, Items, picture, required_lines

SUFFIXES = (".jpg", ".png")
CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read_voc(root: Path, lists: Sequence[tuple[str, str]], classes: Sequence[str]) -> Items:
    """The images of several lists.

    VOC counts pixels from 1 and a box holds its last ones, so the edges are xmin - 1, ymin - 1, xmax, ymax: the overlap
    of such boxes is what the official evaluator computes. Objects marked ``difficult`` are to be ignored, as there.

    Args:
        root: of the data set.
        lists: (folder under the root, name of the list in its ``ImageSets/Main``).
        classes: names; any other name is a fault.
    """
    for folder, name in lists:
        source = root / folder / "ImageSets" / "Main" / f"{name}.txt"
        for number, stem in required_lines(source):
            yield from _image(root, folder, stem, f"{source}:{number}", classes)


def _image(root: Path, folder: str, stem: str, origin: str, classes: Sequence[str]) -> Items:
    base = Path(folder) / "JPEGImages"
    files = [(base / f"{stem}{suffix}").as_posix() for suffix in SUFFIXES]
    file = next((file for file in files if (root / file).is_file()), files[0])
    path = root / folder / "Annotations" / f"{stem}.xml"
    try:
        objects = parse_objects(path)
    except FileNotFoundError:
        yield Fault(f"{origin}: the annotation {path} does not exist.")
        return
    except OSError as error:
        yield Fault(f"{path}: the annotation cannot be read ({error.strerror}).")
        return
    except expat.ExpatError as error:
        yield Fault(f"{path}:{error.lineno}: no readable xml ({error}).")
        return
    yield from picture(root, file, ((f"{path}:{line}", _object(values, classes)) for line, values in objects), origin)


def _object(values: dict[str, str], classes: Sequence[str]) -> list[Box] | str:
    """The object, or what is wrong with it."""
    name = values.get("name", "").lower()
    if name not in classes:
        return f"the class {values.get('name', '')!r} is unknown"
    try:
        left, top, right, bottom = (float(values[f"bndbox/{corner}"]) for corner in CORNERS)
        difficult = int(values.get("difficult") or 0)
    except KeyError as error:
        return f"the object has no {error.args[0]}"
    except ValueError as error:
        return f"the object has no readable number ({error})"
    return [Box(name, left - 1, top - 1, right, bottom, ignored=bool(difficult))]


def parse_objects(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Every ``<object>`` of an annotation: its line and its texts by path ("name", "bndbox/xmin").

    Raises:
        OSError: the file cannot be read.
        xml.parsers.expat.ExpatError: it is no xml; the message has line and column.
    """
    found: list[tuple[int, dict[str, str]]] = []
    stack: list[str] = []
    parser = expat.ParserCreate()

    def start(tag: str, _attributes: dict[str, str]) -> None:
        stack.append(tag)
        if stack[1:] == ["object"]:
            found.append((parser.CurrentLineNumber, {}))

    def text(data: str) -> None:
        if len(stack) > 2 and stack[1] == "object" and data.strip():
            key, values = "/".join(stack[2:]), found[-1][1]
            values[key] = values.get(key, "") + data.strip()

    parser.StartElementHandler = start
    parser.EndElementHandler = lambda _tag: stack.pop()
    parser.CharacterDataHandler = text
    parser.Parse(path.read_bytes(), True)
    return found
