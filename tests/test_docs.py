"""README and docs say what is there: links, commands, settings, recipes, metrics, imports, and the export snippet."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gppf_ds.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gppf_ds"
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {document.relative_to(ROOT).as_posix(): document.read_text() for document in DOCUMENTS}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CALL = re.compile(r"(?:gppf-ds|-m gppf_ds|--module gppf_ds|(launch/train\.sh)) (\S+)([^\n`#]*)")


def blocks(text: str, marker: str) -> list[str]:
    """The fenced blocks that follow the comment ``<!-- marker -->``."""
    return [match[2] for part in text.split(f"<!-- {marker} -->\n")[1:] if (match := FENCE.match(part))]


def inline_code(text: str) -> Iterator[str]:
    return (span for span in re.findall(r"`([^`\n]+)`", FENCE.sub("", text)))


def code(text: str) -> str:
    """All code of a document, fenced or inline, line by line."""
    return "\n".join([match[2] for match in FENCE.finditer(text)] + list(inline_code(text)))


def table(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its head."""
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip()[1:-1].split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


@pytest.mark.parametrize("name", TEXTS)
def test_relative_links_resolve(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", TEXTS[name])):
        if not re.match(r"\w+:", target):
            path = ROOT / Path(name).parent / target.partition("#")[0]
            assert path.exists(), f"{name} links to {target}"


@pytest.mark.parametrize("name", TEXTS)
def test_scripts_that_are_named_exist(name: str) -> None:
    for script in re.findall(r"launch/\w+\.\w+", TEXTS[name]):
        assert (ROOT / script).is_file(), f"{name} names {script}"


@pytest.mark.parametrize("name", TEXTS)
def test_commands_and_their_options_exist(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for script, command, rest in CALL.findall(code(TEXTS[name])):
        words = ["train"] if script else [command]
        if command.startswith("-") or command == "COMMAND":
            continue
        assert words[0] in COMMANDS, f"{name} shows gppf-ds {command}"
        words += [kind for kind in ("routes", "cka", "experts") if kind in rest.split()]
        for option in re.findall(r"(--[\w.]+)", rest):
            with pytest.raises(SystemExit):
                main([*words, "--help"])
            assert option in capsys.readouterr().out, f"{name} shows gppf-ds {' '.join(words)} {option}"


@pytest.mark.parametrize("name", TEXTS)
def test_settings_that_are_named_exist(name: str) -> None:
    import typing

    from gppf_ds.config import RunConfig

    groups = {key: hint for key, hint in typing.get_type_hints(RunConfig).items() if hasattr(hint, "__post_init__")}
    pattern = re.compile(rf"(?<![\w./])({'|'.join(groups)})\.(\w+)")
    for group, key in (found for span in inline_code(TEXTS[name]) for found in pattern.findall(span)):
        assert key in {field.name for field in fields(groups[group])}, f"{name} names {group}.{key}"


RECIPES = [(name, text) for name in TEXTS for text in blocks(TEXTS[name], "recipe")]


@pytest.mark.parametrize(("name", "text"), RECIPES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(RECIPES)])
def test_recipes_parse(name: str, text: str, tmp_path: Path) -> None:
    from gppf_ds.train.recipe import read

    content: dict[str, Any] = yaml.safe_load(text)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"output": "run", "steps": 10, **content}))
    assert set(read(["--config", str(file)]).tasks) == set(content["tasks"])


def test_there_are_recipes_for_every_kind_of_task() -> None:
    kinds = {task["class_path"] for _, text in RECIPES for task in yaml.safe_load(text)["tasks"].values()}
    assert {kind.rpartition(".")[2] for kind in kinds} == {"Classification", "Detection", "Segmentation", "Depth"}


def test_the_readme_loads_an_export_into_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gppf_ds.config import BackboneConfig, RunConfig
    from gppf_ds.tasks.classification import Classification
    from gppf_ds.train.recipe import Recipe
    from gppf_ds.train.restore import Trained, build_model
    from gppf_ds.transfer.export import export
    from gppf_ds.transfer.extract import ChosenPath, largest_difference

    torch.set_num_threads(1)
    backbone = BackboneConfig(options={"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]})
    tasks = {"digits": Classification("nowhere", batch_size=2, classes=3)}
    model, controller = build_model(backbone, tasks, seed=0)
    with torch.no_grad():
        controller.logits["digits"][::2, 1] = 1.0
    recipe = Recipe(RunConfig(output="run", steps=1, backbone=backbone), dict(tasks), "")
    export(Trained(tmp_path, 1, model, controller, recipe), "digits", tmp_path / "runs/demo/exports")

    monkeypatch.chdir(tmp_path)
    [snippet] = blocks(TEXTS["README.md"], "export-snippet")
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert names["about"]["path"] == {"Stem": 1, "Res2.0": 0, "Res3.0": 1, "Res4.0": 0, "Res5.0": 1}
    path = controller.path("digits")
    assert largest_difference(ChosenPath(model.backbone, path), names["model"].eval()) < 1e-5
    other = tuple(1 - unit for unit in path)
    assert largest_difference(ChosenPath(model.backbone, other), names["model"]) > 1e-2


def test_the_metrics_table_is_complete() -> None:
    from gppf_ds.monitor.metrics import Metrics

    endings = {"counter": "_total", "info": "_info"}
    exported = {f"{m.name}{endings.get(m.type, '')}" for m in Metrics({}).registry.collect()}
    documented = [row[0].strip("`") for row in table(TEXTS["docs/operations.md"], "Metrics")]
    assert sorted(documented) == sorted(exported)


def test_every_refused_deepspeed_key_is_documented() -> None:
    from gppf_ds.simt import deepspeed_config

    cells = " ".join(row[0] for row in table(TEXTS["docs/operations.md"], "DeepSpeed json"))
    for keys in (deepspeed_config._OWNED, deepspeed_config._IMPOSSIBLE, deepspeed_config._IMPOSSIBLE_ZERO):
        assert set(keys) <= set(re.findall(r"\w+", cells))


def test_the_rooms_import_what_the_architecture_says() -> None:
    rooms = {row[0].strip("`"): row[2] for row in table(TEXTS["docs/architecture.md"], "Rooms")}
    imports: dict[str, set[str]] = {room: set() for room in rooms}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        for node in ast.walk(ast.parse(file.read_text())):
            if parts[0] in imports and isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gppf_ds"):
                for alias in node.names:
                    imports[parts[0]] |= {f"{node.module}.{alias.name}".split(".")[1]} & rooms.keys() - {parts[0]}
    for room, stated in rooms.items():
        assert imports[room] == set(re.findall(r"\w+", stated)), room
