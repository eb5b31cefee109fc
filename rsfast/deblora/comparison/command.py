"""``rsfast deblora run`` and ``rsfast deblora ablate``."""

import argparse
import contextlib
import dataclasses
import sys

from rsfast.deblora.comparison.config import CHOICES, RunConfig, SettingError
from rsfast.deblora.comparison.methods import ADAPTATIONS

DEFAULT = {f.name: None if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(RunConfig)}


def add_parser(subparsers) -> None:
    """Add ``deblora`` to the command line."""
    commands = subparsers.add_parser("deblora", help="de-bias features of long-tailed classes").add_subparsers(
        required=True, metavar="COMMAND"
    )
    run = commands.add_parser(
        "run", help="compare methods", formatter_class=_Help,
        description="Compare methods on long-tailed classes: macro F1 of head, middle and tail. Without --features and "
        "--images on scikit-learn's digits, made long-tailed. The same command continues a run that was killed.",
    )  # fmt: skip
    _add_settings(run)
    run.set_defaults(run=run_command)
    ablate = commands.add_parser(
        "ablate", help="vary one setting at a time", formatter_class=_Help,
        description="Vary K, rho, the rank, alpha, the clusterer and the target set, one at a time. The same command "
        "continues one that was killed.",
    )  # fmt: skip
    _add_settings(ablate, method="deblora,calibrate")
    ablate.add_argument("--sweep", metavar="NAMES", help="settings to vary, with commas; all of them if not given")
    ablate.set_defaults(run=ablate_command)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def _add_settings(parser: argparse.ArgumentParser, **defaults) -> None:
    def add(flag, text, **options):
        name = flag[2:].replace("-", "_")
        shown = {"choices": CHOICES[name]} if name in CHOICES else {"metavar": name.upper()}
        parser.add_argument(flag, help=text, **shown | {"default": defaults.get(name, DEFAULT[name])} | options)

    add("--features", "features, label, is_test and classes in an npz, or a FeatureStore", metavar="F.npz")
    add("--images", "folder of classes, DOTA or FUSRS, list file, CSV or json of labelled images", metavar="DIR")
    add("--image-root", "folder or zip of the images, if not --images or the folder of the file", metavar="DIR")
    add("--image-format", "of --images, if it cannot be told")
    add("--model", "open_clip's or timm's name, 'satmae' or 'stable-diffusion', for images", metavar="NAME")
    add("--pretrained", "open_clip's tag, 'timm' for timm's own weights, or a file", metavar="TAG_OR_FILE")
    add("--out", "folder of the results", required=True, metavar="DIR")
    add(
        "--method",
        f"names with commas: {', '.join(ADAPTATIONS)}; any of them, and '+deblora' or '+calibrate' after it; "
        "'deblora' and 'calibrate' alone; or 'all'",
        metavar="NAMES",
    )
    add("--seeds", "each a run of every method", type=_whole, nargs="+", metavar="SEED")
    add("--clusters", "K", type=_whole)
    add("--rho", "balance: a cluster has at least N / (K rho) rows; 'none': no constraint", type=_number_or_none)
    add("--clusterer", "what finds the clusters")
    add("--alpha", "'auto', min(1, 10 / imbalance of the class), or a number", type=_number_or_auto)
    add("--center", "what tail features are moved to; the means are controls")
    add("--target-set", "rows that the LoRA is learned on")
    add("--imbalance", "training rows are drawn with so many times more of the largest class; 100 for the digits",
        type=_number)  # fmt: skip
    add("--groups", "head, middle and tail: thirds by size, or DOTA's list")
    add("--f1-style", "of groups: classes' means, or as debLoRA's code")
    add("--rank", "of LoRA", type=_whole)
    add("--lora-alpha", "LoRA is scaled by this over the rank", type=_number)
    add("--epochs", "of training with labels; 30 on features and 10 on images if not given", type=_whole)
    add("--lr", "its peak learning rate; 1e-3 and 1e-4 if not given, a tenth for fine-tuning", type=_number)
    add("--deblora-epochs", "of learning towards calibrated features; 60 and 10 if not given", type=_whole)
    add("--deblora-lr", "its peak learning rate; 3e-3 and 1e-4 if not given", type=_number)
    add("--weight-decay", "of training", type=_number)
    add("--batch-size", "rows a step; 128 features or 64 images if not given", type=_whole)
    add("--probe", "classifier of the features")
    add("--val-share", "of training rows, to choose the probe's settings on", type=_number)
    add("--test-share", "of all rows, where the data name no test rows", type=_number)
    add("--device", "cuda if there is a GPU, else cpu, if not given")
    add("--precision", "of a backbone; bf16 on a GPU and fp32 elsewhere if not given")
    add("--workers", "processes that decode images", type=_whole)
    parser.add_argument("--embedding", choices=("pca", "tsne"), default="pca", help="of the picture of calibration")


def _whole(text: str) -> int | str:
    return _read(int, text)


def _number(text: str) -> float | str:
    return _read(float, text)


def _number_or_none(text: str) -> float | str | None:
    return None if text.lower() == "none" else _number(text)


def _number_or_auto(text: str) -> float | str:
    return "auto" if text.lower() == "auto" else _number(text)


def _read(kind: type, text: str):
    """What is no number stays a text, for RunConfig to say what it should have been: the parser does not know."""
    try:
        return kind(text)
    except ValueError:
        return text


def _config(args: argparse.Namespace) -> RunConfig:
    settings = {name: value for name, value in vars(args).items() if name in DEFAULT}
    return RunConfig(**settings | {"seeds": tuple(args.seeds)})


@contextlib.contextmanager
def _flags():
    """Errors name the flag, where they would name a setting."""
    try:
        yield
    except SettingError as error:
        raise ValueError(error.text.replace("{}", "--" + error.setting.replace("_", "-"))) from error


def run_command(args: argparse.Namespace) -> int:
    from rsfast.deblora.comparison.running import run
    from rsfast.deblora.comparison.table import table

    bars = sys.stderr.isatty()
    with _flags():
        result = run(_config(args), progress=bars, report=_report("method"), embedding=args.embedding)
    print(table(result.rows))
    _print_noise(result.clusters)
    _print_files(result.files)
    return 0


def ablate_command(args: argparse.Namespace) -> int:
    from rsfast.deblora.comparison.ablation import ablate
    from rsfast.deblora.comparison.table import table

    sweeps = None if args.sweep is None else [name.strip() for name in args.sweep.split(",") if name.strip()]
    bars, report = sys.stderr.isatty(), _report("setting")
    with _flags():
        result = ablate(_config(args), sweeps=sweeps, progress=bars, report=report, embedding=args.embedding)
    for method in dict.fromkeys(row["method"] for row in result.rows):
        print(table([row for row in result.rows if row["method"] == method], "setting", method))
    _print_noise(result.clusters)
    _print_files(result.files)
    return 0


def _report(key: str):
    """A line on the way for each row, where the table does not stand yet."""

    def report(row: dict) -> None:
        cells = (f"{n} {'-' if row[n] is None else format(row[n], '.1f')}" for n in ("head", "middle", "tail", "mean"))
        name = row["method"] if key == "method" else f"{row['setting']}, {row['method']}"
        print(f"{name}, seed {row['seed']}: {', '.join(cells)} ({row['seconds']:.1f} s)", file=sys.stderr, flush=True)

    return report


def _print_noise(clusters) -> None:
    """Rows that clusters leave out, and classes that they know nothing of."""
    for found in clusters:
        if found["noise"]:
            name = f"{found['setting']}, {found['method']}" if "setting" in found else found["method"]
            alone = ", ".join(found["classes_of_noise"])
            more = f"; its own rows alone make the de-biased centre of {alone}, which no cluster has" if alone else ""
            print(f"{name}, seed {found['seed']}: {found['noise']} of {found['rows']} training rows are noise{more}")


def _print_files(files) -> None:
    print(f"written: {', '.join(map(str, files))}")
