"""``gppf-ds export``, ``extract``, ``cost``, ``predict``, ``convert`` and ``advise``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gppf_ds.errors import UserError
from gppf_ds.train import recipe

if TYPE_CHECKING:
    from gppf_ds.train.restore import Trained


def export(arguments: list[str]) -> int:
    """Writes each task's path as a plain model: safetensors, a json that says what it is, and a model card."""
    parser = argparse.ArgumentParser(prog="gppf-ds export", description=export.__doc__)
    parser.add_argument("--run", type=Path, required=True, help="the run's output folder")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint folder (default: the run's last)")
    parser.add_argument("--task", nargs="+", metavar="TASK", help="only these tasks (default: all)")
    parser.add_argument("--output", type=Path, help="where to write (default: RUN/exports)")
    parser.add_argument(
        "--names", default="timm", help="parameter names of timm, torchvision, mmdet, mmseg, mmpretrain or detectron2"
    )
    parser.add_argument(
        "--reestimate-bn",
        type=_count,
        default=0,
        metavar="BATCHES",
        help="measure running statistics of batch norms anew on this many training batches of the task (200 is usual)",
    )
    parser.add_argument(
        "--head",
        action="store_true",
        help="write the head too: a full timm classifier, mmdet detector, mmseg segmentor",
    )
    parser.add_argument("--onnx", action="store_true", help="write model.onnx too")
    parser.add_argument("--torch-export", action="store_true", help="write model.pt2 (torch.export) too")
    parser.add_argument(
        "--size",
        nargs=2,
        type=_count,
        metavar=("H", "W"),
        help="image size in pixels to compare and trace with (default: that of timm's model; for mmdet, mmseg 256 320)",
    )
    options = parser.parse_args(arguments)
    run = recipe.read_run(options.run)

    from gppf_ds.train.restore import load_trained
    from gppf_ds.transfer import export as exporting
    from gppf_ds.transfer import moe_export

    size = (options.size[0], options.size[1]) if options.size else None
    how = exporting.Options(
        options.names, options.reestimate_bn, options.head, options.onnx, options.torch_export, size
    )
    trained = load_trained(options.run, options.checkpoint, run)
    folder = options.output or options.run / "exports"
    write = exporting.export if trained.model.backbone.layout is None else moe_export.export
    for task in trained.require_tasks(options.task):
        try:
            files = write(trained, task, folder, how, options.run)
        except UserError as error:
            if options.task or not options.head:
                raise
            print(f"{task}: only the backbone, because {error}")
            files = write(trained, task, folder, replace(how, head=False), options.run)
        print(*files, sep="\n")
    return 0


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def extract(arguments: list[str]) -> int:
    """Writes the sub-network that serves some tasks as a run of its own, and what it costs beside the whole network.

    Or the network without some tasks (--remove): of a grown run, all that it has kept frozen stays. Of token-level
    experts, --tasks leaves out those that no validation image's tokens choose; --threshold and --plan drop more.
    """
    parser = argparse.ArgumentParser(prog="gppf-ds extract", description=extract.__doc__)
    parser.add_argument("--run", type=Path, required=True, help="the run's output folder")
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--tasks", nargs="+", metavar="TASK", help="the tasks to serve")
    choice.add_argument("--remove", nargs="+", metavar="TASK", help="the tasks to take away, with their own units")
    choice.add_argument("--plan", type=Path, metavar="FILE", help="token-level experts: what to keep (YAML or JSON)")
    parser.add_argument("--output", type=Path, help="the new run's folder: not there yet, or empty")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint folder (default: the run's last)")
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="THETA",
        help="token-level experts: drop those with at most THETA / k percent of each task's choices",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=300,
        help="token-level experts: validation images of each task that show their use (%(default)s; 0: none, the "
        "running shares of the training decide)",
    )
    parser.add_argument("--dry-run", action="store_true", help="token-level experts: say what it costs, write nothing")
    options = parser.parse_args(arguments)
    if (options.output is None) != options.dry_run:
        raise UserError("give --output for what is extracted, or --dry-run to see its cost alone.")
    run = recipe.read_run(options.run)

    import torch

    from gppf_ds.train.restore import load_trained
    from gppf_ds.transfer import costs, subnetwork

    trained = load_trained(options.run, options.checkpoint, run)
    if trained.model.backbone.layout is not None and not options.remove:
        return _extract_experts(options, trained)
    if options.plan or options.threshold is not None or options.dry_run:
        raise UserError("--plan, --threshold and --dry-run are for --tasks of runs with token-level experts.")
    named = trained.require_tasks(list(dict.fromkeys(options.tasks or options.remove)))
    tasks = [name for name in run.tasks if name not in named] if options.remove else named
    if not tasks:
        raise UserError("--remove leaves no task: take one out.")
    subnetwork.extract(trained, options.run, tasks, options.output, keep_frozen=bool(options.remove))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parent = {"run": options.run.name, "checkpoint": trained.path.name, "tasks_served": list(run.tasks)}
    whole = costs.measure(trained, tasks, device)
    del trained  # one network at a time in memory
    own = costs.measure(load_trained(options.output, None, recipe.read_run(options.output)), tasks, device)
    print(costs.table(own, whole))
    print(costs.write(options.output, own, parent | whole, device))
    return 0


def _extract_experts(options: argparse.Namespace, trained: Trained) -> int:
    """The same for a network of token-level experts."""
    import torch

    from gppf_ds.train.restore import load_trained
    from gppf_ds.transfer import costs, moe_extract, subnetwork

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained.model.to(device)
    trained.controller.to(device)
    plan = moe_extract.plan_of(options.tasks or [], options.threshold, options.plan)
    found, smaller = moe_extract.apply(trained, plan, options.samples, device)
    print(moe_extract.table(found, trained, smaller))
    tasks = list(smaller.recipe.tasks)
    if options.dry_run:
        print(costs.table(costs.measure(smaller, tasks, device), costs.measure(trained, tasks, device)))
        return 0
    del smaller
    subnetwork.extract(trained, options.run, tasks, options.output, layout=found.layout)
    parent = {"run": options.run.name, "checkpoint": trained.path.name, "tasks_served": list(trained.recipe.tasks)}
    whole = costs.measure(trained, tasks, device)
    del trained  # one network at a time in memory
    own = costs.measure(load_trained(options.output, None, recipe.read_run(options.output)), tasks, device)
    print(costs.table(own, whole))
    print(costs.write(options.output, own | {"extraction": found.as_json()}, parent | whole, device))
    return 0


def cost(arguments: list[str]) -> int:
    """Says what a recipe's network costs before it is trained: parameters that learn, are held, are used; FLOPs.

    Above all for fine-tuning (finetune.plan). Arguments are those of gppf-ds train; nothing is written.
    """
    if {"-h", "--help"} & set(arguments):
        print(cost.__doc__)
    run = recipe.read(arguments, "gppf-ds cost")
    recipe.check(run)

    import torch

    from gppf_ds.transfer import recipe_cost

    print(recipe_cost.table(run, torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    return 0


def predict(arguments: list[str]) -> int:
    """Runs tasks on images and writes what they find, as json, png and drawings; paths that begin alike run once."""
    parser = argparse.ArgumentParser(prog="gppf-ds predict", description=predict.__doc__)
    parser.add_argument("image", type=Path, nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--run", type=Path, required=True, help="the run's output folder")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint folder (default: the run's last)")
    parser.add_argument("--task", nargs="+", metavar="TASK", help="only these tasks (default: all)")
    parser.add_argument("--output", type=Path, help="where to write (default: RUN/predictions)")
    options = parser.parse_args(arguments)
    run = recipe.read_run(options.run)

    import torch

    from gppf_ds.train.restore import load_trained
    from gppf_ds.transfer import predict as prediction
    from gppf_ds.transfer.coco_file import write_coco

    prediction.require_images(options.image)
    trained = load_trained(options.run, options.checkpoint, run)
    tasks = trained.require_tasks(options.task)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained.model.to(device)
    folder = options.output or options.run / "predictions"
    objects: dict[str, dict[Path, list[dict[str, Any]]]] = {}
    for image in options.image:
        done = prediction.predict(trained, tasks, image, device)
        file = prediction.write(done, trained, image, folder)
        print(f"{image} -> {file}")
        for task, found in done.found.items():
            print(f"  {task}: {found['summary']}")
            if "objects" in found:
                objects.setdefault(task, {})[image] = found["objects"]
        print(f"  units run: {done.units_run} ({done.units_alone} without sharing)")
    for task, by_image in objects.items():
        print(write_coco(task, by_image, folder))
    return 0


def convert(arguments: list[str]) -> int:
    """Writes the weights of a checkpoint, DeepSpeed's or ours and of any ZeRO stage, as one plain safetensors file."""
    parser = argparse.ArgumentParser(prog="gppf-ds convert", description=convert.__doc__)
    parser.add_argument("checkpoint", type=Path, help="a run or a step of ours; DeepSpeed's folder or a tag")
    parser.add_argument("output", type=Path, help="the safetensors file to write")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the values (fp32)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    options = parser.parse_args(arguments)

    from gppf_ds.transfer import convert as conversion

    done = conversion.convert(options.checkpoint, options.output, options.dtype, options.overwrite)
    counts = f"{done.tensors} tensors, {done.parameters:,} parameters, {done.bytes:,} bytes"
    print(f"{options.output}: {counts}, {options.dtype}")
    if done.rounded:
        print(f"  {done.rounded} tensors were saved in 16 bits only: their values are those")
    return 0


def advise(arguments: list[str]) -> int:
    """Ranks the paths of a run for new data sets, by a linear model on the frozen features of a few hundred images."""
    parser = argparse.ArgumentParser(prog="gppf-ds advise", description=advise.__doc__)
    parser.add_argument("--run", type=Path, required=True, help="the folder of the run whose paths are ranked")
    parser.add_argument("--config", type=Path, required=True, help="a recipe with the new data sets as its tasks")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these tasks of that recipe (default: all)")
    parser.add_argument("--samples", type=_count, default=300, help="images of each split, at most (%(default)s)")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint folder (default: the run's last)")
    parser.add_argument("--output", type=Path, help="a folder to write advise.json into")
    options = parser.parse_args(arguments)
    run = recipe.read_run(options.run)

    import torch

    from gppf_ds.train.restore import load_trained
    from gppf_ds.transfer import advise as advising

    new = advising.read_targets(options.config, options.tasks)
    trained = load_trained(options.run, options.checkpoint, run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    advices = []
    for name, task in new.tasks.items():
        target = advising.Target(name, task, options.samples, new.config.seed, new.config.loader, device)
        advices.append(advising.advise(trained, target))
        print(advising.table(advices[-1]), end="\n\n")
    if options.output:
        print(advising.write(advices, trained, options.run, new.config.seed, options.output))
    return 0
