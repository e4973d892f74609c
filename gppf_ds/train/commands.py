"""``gppf-ds train``, ``evaluate``, ``verify``, ``check-data`` and ``reproduce``."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from gppf_ds.errors import UserError
from gppf_ds.train import faults, recipe
from gppf_ds.train.inherit import resolve


def train(arguments: list[str]) -> int:
    """Trains a recipe, or resumes it from the last checkpoint in its output folder."""
    return _start("train", arguments)


def finetune(arguments: list[str]) -> int:
    """Trains new tasks from a finished run: dynamic, fixed path, retrain, or grow.

    As gppf-ds train with a section finetune, in the recipe or on the line:
    --finetune.source RUN --finetune.mode dynamic.
    """
    return _start("finetune", arguments)


def _start(command: str, arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--restarts", type=int)
    parser.add_argument("--launch", default=f"{shlex.quote(sys.executable)} -m gppf_ds")
    options, rest = parser.parse_known_args(arguments)
    run = recipe.read(rest, f"gppf-ds {command}")
    if command == "finetune" and run.config.finetune.source is None:
        raise UserError("finetune.source is missing: name the folder of a finished run.")
    if options.restarts is None:
        return _train(run, "--smoke" in rest)
    if "--smoke" in rest:
        raise UserError("--restarts is of no use to a smoke run of two steps: leave one of the two out.")
    recipe.check(run)

    from gppf_ds.train.restarts import supervise

    return supervise([command, *rest], options.restarts, options.launch, Path(run.config.output))


def _train(run: recipe.Recipe, smoke: bool) -> int:
    if smoke:
        from gppf_ds.train.smoke import prepare, reduced, use

        run = reduced(run)
    else:
        recipe.check(run)
    # torch and DeepSpeed are imported only for a recipe that can run.
    import torch.distributed as dist

    from gppf_ds.simt.agreement import agree
    from gppf_ds.simt.job import start_distributed
    from gppf_ds.train import certificate
    from gppf_ds.train.record import fingerprint, write_record, write_state
    from gppf_ds.train.trainer import Trainer

    config = run.config
    folder = Path(config.output)
    try:
        device = start_distributed(config.engine.timeout)
        agree(fingerprint(run.text))
        if smoke:
            if dist.get_rank() == 0:
                prepare(run)
            dist.barrier()
            use(run)
        if dist.get_rank() == 0:
            faults.forget(folder)
            if config.finetune.mode == "grow" and not (folder / certificate.FILE).is_file():
                certificate.write(folder, Path(str(config.finetune.source)))
        trainer = Trainer(config, run.tasks, device)
        # Not before the trainer has accepted the folder: another recipe's run must keep its record.
        if dist.get_rank() == 0:
            write_record(folder, run.text, config.seed, trainer.state.step, dist.get_world_size())
            write_state(folder, "running")
        trainer.fit()
        if dist.get_rank() == 0:
            write_state(folder, "finished" if trainer.state.step == config.steps else "stopped")
    except BaseException as error:
        faults.fail(error, folder)
    dist.destroy_process_group()
    return 0


def check_data(arguments: list[str]) -> int:
    """Says of every task's data what is there, what is missing or broken, and where to get it; 2 if not all is well.

    What is not there is looked for under the task's data (or data_root), where a run would look.
    """
    parser = argparse.ArgumentParser(prog="gppf-ds check-data", description=check_data.__doc__)
    parser.add_argument("recipes", type=Path, nargs="+", metavar="RECIPE")
    parser.add_argument("--faults", type=int, default=5, help="broken annotations to show per data set (default: 5)")
    options = parser.parse_args(arguments)

    from gppf_ds.train.data_report import report

    # As they stand: data can be checked before the run is there that a recipe starts from.
    recipes = [recipe.from_content(resolve([path]).content) for path in options.recipes]
    reports = [report(read, options.faults) for read in recipes]
    print("\n".join(text for text, _ in reports))
    return 0 if all(well for _, well in reports) else 2


def reproduce(arguments: list[str]) -> int:
    """Prints our results beside the rows that GPPF (arXiv 2208.02148) published."""
    from gppf_ds.train import reproduce as tables

    parser = argparse.ArgumentParser(prog="gppf-ds reproduce", description=reproduce.__doc__)
    parser.add_argument("table", choices=sorted(tables.load()), help="of the paper")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the runs' folders are (default: runs)")
    options = parser.parse_args(arguments)
    print(tables.render(tables.load()[options.table], options.runs))
    return 0


def verify(arguments: list[str]) -> int:
    """Compares a recipe's first steps with the single-process reference and prints a table; 1 where they differ.

    Nothing is written. Rank 0 also computes the devices of all ranks at once: where its memory is too small for that,
    lower the tasks' batch_size on the command line. With --certificate it checks instead that a grown run's old tasks
    are what they were, bit by bit.
    """
    parser = argparse.ArgumentParser(
        prog="gppf-ds verify", description=verify.__doc__, add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS
    )
    parser.add_argument("--verify_steps", type=int, default=3, help="steps to compare (default: 3)")
    parser.add_argument("--tolerance", type=float, help="of the relative errors (default: 1e-5; bf16: 0.1)")
    parser.add_argument("--certificate", type=Path, metavar="RUN", help="check the certificate of a grown run")
    options, rest = parser.parse_known_args(arguments)
    if options.certificate is not None:
        return _verify_certificate(options.certificate)
    if {"-h", "--help"} & set(rest):
        parser.print_help()
    run = recipe.read(rest, "gppf-ds verify")
    recipe.check(run)

    import torch.distributed as dist

    from gppf_ds.simt.agreement import agree
    from gppf_ds.simt.job import start_distributed
    from gppf_ds.train.record import fingerprint
    from gppf_ds.train.verify import verify as compare

    try:
        device = start_distributed(run.config.engine.timeout)
        agree(fingerprint(run.text) | {key: str(value) for key, value in vars(options).items()})
        same = compare(run, device, options.verify_steps, options.tolerance)
    except BaseException as error:
        faults.fail(error)
    dist.destroy_process_group()
    return 0 if same else 1


def _verify_certificate(folder: Path) -> int:
    from gppf_ds.train import certificate

    findings = certificate.verify(folder)
    for finding in findings:
        verdict = f"MISMATCH in {len(finding.differing)} of {finding.compared}: {', '.join(finding.differing[:3])}"
        print(f"{finding.rule}: {verdict if finding.differing else f'{finding.compared} equal'}")
        if finding.differing and finding.remark:
            print(f"  {finding.remark}")
    return int(any(finding.differing for finding in findings))


def evaluate(arguments: list[str]) -> int:
    """Evaluates the last (or a named) checkpoint of a run; under a launcher the ranks share the images."""
    parser = argparse.ArgumentParser(prog="gppf-ds evaluate", description=evaluate.__doc__)
    parser.add_argument("--run", type=Path, required=True, help="the run's output folder")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint folder (default: the run's last)")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these tasks")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the json there too")
    options = parser.parse_args(arguments)
    run = recipe.read_run(options.run)
    recipe.check(run)

    import torch.distributed as dist

    from gppf_ds.simt.job import start_distributed
    from gppf_ds.train import evaluate as evaluation
    from gppf_ds.train.restore import load_trained

    trained = load_trained(options.run, options.checkpoint, run)
    chosen = {name: run.tasks[name] for name in trained.require_tasks(options.tasks)}
    try:
        device = start_distributed(run.config.engine.timeout)
        trained.model.to(device)
        trained.controller.to(device)
        results = evaluation.evaluate(trained.model, trained.controller, chosen, device, run.config.loader)
        if dist.get_rank() == 0:
            text = json.dumps({"checkpoint": str(trained.path), "step": trained.step, "metrics": results}, indent=1)
            print(text)
            if options.output is not None:
                options.output.write_text(f"{text}\n")
    except BaseException as error:
        faults.fail(error, options.run)
    dist.destroy_process_group()
    return 0
