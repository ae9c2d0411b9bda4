"""`stream-engine demo`: the embedded world's data, its truth, and the loop closed on it."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

from stream_engine import api
from stream_engine.cli.command import Command, LineParser
from stream_engine.demo import DEMO_COUNT, DEMO_SEED
from stream_engine.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of each kind."""
    kinds = parser.add_subparsers(
        dest="kind", required=True, parser_class=LineParser, help="one of these"
    )
    data = kinds.add_parser("data", help="write a dataset of drawn pictures with known truth")
    data.add_argument("out", metavar="OUT", help="the parquet file to write")
    data.add_argument(
        "--count", type=int, default=DEMO_COUNT, metavar="N", help="how many (default 300)"
    )
    data.add_argument(
        "--seed", type=int, default=DEMO_SEED, metavar="S", help="another seed, others (default 7)"
    )
    score = kinds.add_parser("score", help="measure the pairs of a demo run against the truth")
    score.add_argument("work_dir", metavar="WORK_DIR", help="a run, or a dataset of any format")
    add_loop_arguments(
        kinds.add_parser(
            "loop",
            help="train the demo's instruct model on the pairs of a run, by DPO, and count its "
            "wrong facts before and after",
        )
    )


def add_loop_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `demo loop`."""
    parser.add_argument("work_dir", metavar="WORK_DIR", help="a run, or a dataset of any format")
    parser.add_argument(
        "--steps", type=int, default=150, metavar="N", help="steps of 16 pairs (default 150)"
    )
    parser.add_argument(
        "--learning_rate", type=float, default=1e-4, metavar="X", help="(default 1e-4)"
    )
    parser.add_argument(
        "--loss",
        default="sigmoid",
        metavar="NAME",
        help="a loss of TRL's by its name there: sigmoid, which is DPO's (default), ipo, apo_zero, "
        "robust, hinge, sft ...",
    )
    parser.add_argument(
        "--beta", type=float, default=0.1, metavar="X", help="0.5 did better (default 0.1, TRL's)"
    )
    parser.add_argument(
        "--label_smoothing",
        type=float,
        default=0.0,
        metavar="X",
        help="share of pairs presumed wrong, for the losses robust and exo_pair (default 0)",
    )
    parser.add_argument(
        "--rpo_alpha",
        type=float,
        default=1.0,
        metavar="X",
        help="weight of the likelihood of the chosen answer; 0 is the loss alone (default 1.0)",
    )
    parser.add_argument(
        "--stop_drop",
        type=float,
        metavar="X",
        help="stop when the chosen answers have lost X of log-prob a token (default: never)",
    )
    parser.add_argument(
        "--pictures", type=int, default=100, metavar="N", help="held out (default 100)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="(default 0)")
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        help="the model to train, as --out keeps one (default: the demo's instruct model)",
    )
    parser.add_argument(
        "--out", metavar="FOLDER", help="keep the trained model, as --instruct_model_path takes it"
    )


def demo(args: argparse.Namespace) -> int:
    if args.kind == "data":
        from stream_engine.demo.data import write_dataset

        print(write_dataset(Path(args.out), args.count, args.seed))
        return 0
    if args.kind == "score":
        from stream_engine.demo.score import score_pairs

        pairs = api.pairs(args.work_dir)
        print(msgspec.json.encode(score_pairs(pairs)).decode())
        return 0
    return loop(args)


def loop(args: argparse.Namespace) -> int:
    if args.steps < 1 or args.pictures < 1:
        raise ConfigError("--steps and --pictures must be at least 1")
    from stream_engine.demo.loop import LoopSettings, close_loop

    settings = LoopSettings(
        steps=args.steps,
        learning_rate=args.learning_rate,
        loss=args.loss,
        beta=args.beta,
        label_smoothing=args.label_smoothing,
        rpo_alpha=args.rpo_alpha,
        stop_drop=args.stop_drop,
        pictures=args.pictures,
        seed=args.seed,
    )
    out = Path(args.out) if args.out else None
    if out is not None and out.exists():
        raise ConfigError(f"--out {out} is there already; give a new folder")
    start = Path(args.model) if args.model else None
    if start is not None and not (start / "config.json").is_file():
        raise ConfigError(f"--model {start} is no checkpoint folder")
    pairs = api.pairs(args.work_dir)
    report = close_loop(
        pairs, settings, start=start, out=out, say=lambda line: print(line, flush=True)
    )
    print(msgspec.json.encode(report).decode())
    if out is not None:
        print(f"model: {out}")
    return 0


COMMANDS = {"demo": Command(demo, add_arguments)}
