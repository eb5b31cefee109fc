"""``rsfast harma train`` and ``rsfast harma eval``."""

import argparse
import dataclasses
import os
import signal
import sys
from pathlib import Path

from rsfast._files import write_json
from rsfast.harma.config import PRECISIONS, TrainConfig

DEFAULT = {f.name: None if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(TrainConfig)}


def add_parser(subparsers) -> None:
    """Add ``harma`` to the command line."""
    commands = subparsers.add_parser("harma", help="train and evaluate image-text retrieval").add_subparsers(
        required=True, metavar="COMMAND"
    )
    _add_train(commands.add_parser("train", help="train adapters, or all weights", formatter_class=_Help))
    _add_eval(commands.add_parser("eval", help="measure a run on test data", formatter_class=_Help))


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def _add_train(parser: argparse.ArgumentParser) -> None:
    def add(flag, text, **options):
        name = flag[2:].replace("-", "_")
        if "action" not in options:
            options = {"metavar": None if "choices" in options else name.upper(), "default": DEFAULT[name]} | options
        parser.add_argument(flag, help=text, **options)

    add("--train-data", "caption file: HarMA's or Karpathy's json, CSV or TSV", metavar="FILE")
    add("--val-data", "caption file; the best epoch is chosen on it", metavar="FILE")
    add("--images", "folder or zip of the images", metavar="DIR_OR_ZIP")
    add("--model", "open_clip's name, or a config", metavar="NAME_OR_CONFIG.json")
    add("--pretrained", "open_clip's tag, a weights file, or a run folder", metavar="TAG_FILE_OR_RUN")
    add("--method", "adapters, all weights, or none", choices=("harma", "full", "frozen"))
    add("--out", "run folder", required=True, metavar="RUN")
    add("--resume", "'latest' continues the run in --out bit for bit", choices=("latest",))
    add("--epochs", "passes over the captions", type=int)
    add("--batch-size", "pairs a step and process", type=int)
    add("--lr", "peak learning rate", type=float)
    add("--wd", "weight decay", type=float)
    add("--beta1", "of AdamW", type=float)
    add("--beta2", "of AdamW", type=float)
    add("--eps", "of AdamW", type=float)
    add("--warmup", "share of the steps", type=float)
    add("--seed", "of weights, order and augmentation", type=int)
    add("--precision", "autocast; bf16 on a GPU and fp32 elsewhere if not given", choices=tuple(PRECISIONS))
    add("--device", "cuda if there is a GPU, else cpu, if not given")
    add("--workers", "processes that decode images", type=int)
    add("--grad-checkpointing", "recompute activations in backward", action="store_true")
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--temperature",
        type=float,
        default=DEFAULT["temperature"],
        metavar="T",
        help="start of the learnable temperature",
    )
    start.add_argument(
        "--keep-temperature", dest="temperature", action="store_const", const=None, default=DEFAULT["temperature"],
        help="start from the checkpoint's temperature instead",
    )  # fmt: skip
    add("--margin", "of the adaptive triplet loss", type=float)
    add("--gamma", "of the adaptive triplet loss", type=float)
    add("--uniformity-weight", "of spreading each modality's features out", type=float)
    add("--affiliation-weight", "of drawing features to the centres of their scene classes; needs labels", type=float)
    add("--drift-weight", "of staying near the frozen model's features", type=float)
    add("--bottleneck", "inner width of the adapters", type=int)
    add("--num-heads", "heads of the adapters", type=int)
    add("--share", "who owns sub-adapters: both towers together, text alone, nobody", choices=("both", "text", "none"))
    add("--skip-padding", "text adapters leave out what follows the end of the text", action="store_true")
    add("--no-augment", "resize only", dest="augment", action="store_false")
    add("--max-steps", "stop after so many steps in all; the schedule stays that of all epochs", type=int)
    add("--save-every-steps", "checkpoint inside epochs too", type=int)
    add("--log-every-n-steps", "lines of metrics.jsonl", type=int)
    add("--report-to", "tensorboard insists on it, none turns it off", choices=("tensorboard", "none"))
    add("--eval-batch-size", "images or texts at once in evaluation", type=int)
    _add_data(parser)
    parser.set_defaults(run=train_command)


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, metavar="FILE", help="caption file, as for training")
    parser.add_argument("--images", required=True, metavar="DIR_OR_ZIP", help="folder or zip of the images")
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="run folder")
    parser.add_argument("--split", default="test", help="part of a Karpathy json")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there")
    parser.add_argument("--figure", metavar="FILE.png", help="draw some queries and what was found")
    parser.add_argument("--batch-size", type=int, default=DEFAULT["eval_batch_size"], help="images or texts at once")
    parser.add_argument("--workers", type=int, default=DEFAULT["workers"], help="processes that decode images")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), help="bf16 on a GPU and fp32 elsewhere if not given")
    parser.add_argument("--device", metavar="DEVICE", help="cuda if there is a GPU, else cpu, if not given")
    _add_data(parser)
    parser.set_defaults(run=eval_command)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-words", type=int, default=DEFAULT["max_words"], help="longer captions are cut")
    parser.add_argument("--csv-img-key", default=DEFAULT["csv_img_key"], help="column of image names")
    parser.add_argument("--csv-caption-key", default=DEFAULT["csv_caption_key"], help="column of captions")
    parser.add_argument("--csv-separator", help="found by itself if not given")
    parser.add_argument("--csv-encoding", help="UTF-8, then GB18030, if not given")
    parser.add_argument("--strict", action="store_true", help="stop at the first broken image")


def train_command(args: argparse.Namespace) -> int:
    from rsfast.harma.training import train

    settings = {name: value for name, value in vars(args).items() if name in DEFAULT}
    settings["share"] = None if args.share == "none" else args.share
    main_process = os.environ.get("RANK", "0") == "0"
    result = train(TrainConfig(**settings), progress=main_process)
    if not main_process:
        return 0
    print(f"{result.trainable_parameters:,} trainable parameters, {result.steps} steps, run in {result.out}")
    if result.best is not None and "val_r_mean" in result.best:
        print(f"best on val: epoch {result.best['epoch']}")
        _print_table({name.removeprefix("val_"): value for name, value in result.best.items()})
    _print_broken(result.broken)
    if result.stopped is not None:
        print(f"stopped by {result.stopped} after step {result.steps}; the same command with --resume latest continues")
        return 128 + signal.Signals[result.stopped] if result.stopped in signal.Signals.__members__ else 0
    return 0


def eval_command(args: argparse.Namespace) -> int:
    from rsfast.harma import checkpoint
    from rsfast.harma.data import load_captions
    from rsfast.harma.evaluation import evaluate
    from rsfast.harma.figure import draw

    for flag, path in (("json", args.json), ("figure", args.figure)):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise FileNotFoundError(f"{flag}: there is no folder {Path(path).absolute().parent}")
    if args.figure is not None and not args.figure.lower().endswith(".png"):
        raise ValueError(f"figure must end in .png, got {args.figure}")
    config = TrainConfig(
        out=args.checkpoint, device=args.device, precision=args.precision, workers=args.workers,
        eval_batch_size=args.batch_size, max_words=args.max_words,
    ).resolved()  # fmt: skip
    run = checkpoint.load_run(args.checkpoint)
    data = load_captions(
        args.data, args.images, split=args.split, max_words=args.max_words, csv_img_key=args.csv_img_key,
        csv_caption_key=args.csv_caption_key, csv_separator=args.csv_separator, csv_encoding=args.csv_encoding,
    )  # fmt: skip
    found = evaluate(
        run.model.to(config.device), run.tokenizer, data, device=config.device, precision=config.precision,
        batch_size=config.eval_batch_size, workers=config.workers, strict=args.strict,
    )  # fmt: skip
    print(f"{len(found.images)} images and {len(found.texts)} captions of {args.data}, {args.checkpoint}")
    _print_table(found.metrics)
    _print_broken(found.broken)
    if args.json is not None:
        counts = {"images": len(found.images), "texts": len(found.texts), "broken": found.broken}
        write_json(Path(args.json), found.metrics | counts)
    if args.figure is not None:
        draw(args.figure, found, data)
    return 0


def _print_table(metrics: dict[str, float]) -> None:
    """The row of the remote-sensing retrieval tables, and the one that counts word-identical captions."""
    names = ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10", "r_mean")
    print(f"{'':>22}{'image to text':>21}   {'text to image':>21}")
    print(f"{'':>22}{'R@1':>7}{'R@5':>7}{'R@10':>7}   {'R@1':>7}{'R@5':>7}{'R@10':>7}   {'mR':>7}")
    for label, suffix in (("", ""), ("same words count too", "_same_words")):
        cells = [f"{metrics[name + suffix]:7.2f}" for name in names]
        print(f"{label:<22}{''.join(cells[:3])}   {''.join(cells[3:6])}   {cells[6]}")


def _print_broken(broken: dict[str, str]) -> None:
    if broken:
        print(f"{len(broken)} images or captions could not be used:", file=sys.stderr)
        for name, reason in broken.items():
            print(f"  {name}: {reason}", file=sys.stderr)
