"""The commands that check what is there: `validate`, `verify-checkpoint`."""

from __future__ import annotations

import argparse

from stream_engine.api import open_state
from stream_engine.cli import notes
from stream_engine.cli.command import Command
from stream_engine.cli.flags import field_docs, read_settings
from stream_engine.config import InputConfig, ModelConfig, RunConfig
from stream_engine.inputs.validate import InputCheck
from stream_engine.models.hub import with_folders
from stream_engine.outputs.validate import MAX_PROBLEMS, is_dataset, is_run
from stream_engine.outputs.validate import validate as find_problems
from stream_engine.run_dir.verify import damaged_parts
from stream_engine.store.files import location
from stream_engine.text import printable


def _validate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", metavar="PATH", help="an input, a dataset folder, or a work_dir with all its parts"
    )


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="PATH", help="a model's folder")
    parser.add_argument(
        "--reference",
        metavar="DUMP",
        help="what the original code computed, written by launch/dump_reference.py",
    )
    docs = field_docs(ModelConfig)
    parser.add_argument("--device", default="auto", metavar="TEXT", help=docs["device"])
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help=docs["dtype"],
    )
    parser.add_argument("--vision_tower_path", metavar="TEXT", help=docs["vision_tower_path"])


def validate(args: argparse.Namespace) -> int:
    config = RunConfig.create(read_settings(args)).part(InputConfig)
    path = args.path
    is_meant_as_input = args.given_answers is not None or args.columns is not None
    if not is_dataset(path) or (is_meant_as_input and not is_run(location(path))):
        check = InputCheck(path, config)
        num_found = 0
        for problem in check.problems():
            num_found += 1
            if num_found <= MAX_PROBLEMS:
                print(problem)
        if num_found > MAX_PROBLEMS:
            print(f"and {num_found - MAX_PROBLEMS} more")
        for line in check.lines():
            print(f"{printable(path)}: {line}")
    else:
        found = find_problems(path)
        if is_run(location(path)):
            found = [*damaged_parts(open_state(path)), *found]
        for problem in found:
            print(printable(problem))
        num_found = len(found)
        if found and not is_run(location(path)):
            print("checked as a dataset that was written; as an input by --given_answers pairs")
    print(f"{printable(path)}: {num_found} problems" if num_found else f"{printable(path)}: ok")
    return 2 if num_found else 0


def verify(args: argparse.Namespace) -> int:
    from stream_engine.engine.verify_checkpoint import verify_checkpoint

    models = ModelConfig(
        device=args.device, dtype=args.dtype, vision_tower_path=args.vision_tower_path
    )
    marks = {True: "ok", False: "FAILED", None: "-"}
    num_failed = 0
    checkpoint = with_folders("checkpoint", args.checkpoint)
    for check in verify_checkpoint(checkpoint, models, reference=args.reference):
        print(f"{marks[check.ok]:6}  {check.name}: {check.shown}", flush=True)
        num_failed += check.ok is False
    print(f"{num_failed} checks failed" if num_failed else "all checks passed")
    return 2 if num_failed else 0


COMMANDS = {
    "validate": Command(
        validate,
        _validate_arguments,
        takes_settings=True,
        notes=notes.VALIDATED + "\n" + notes.INPUT,
    ),
    "verify-checkpoint": Command(verify, _verify_arguments),
}
