"""``rsfast demo``: HarMA from nothing to a picture of what it retrieves, without a download and without a GPU."""

import argparse
import json
import math
import shutil
import time
import zipfile
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from rsfast._files import replace, write_json
from rsfast.harma import checkpoint
from rsfast.harma import model as models
from rsfast.harma.config import TrainConfig
from rsfast.harma.data import CaptionedImages, clean_caption
from rsfast.harma.evaluation import Evaluation, evaluate
from rsfast.harma.figure import draw
from rsfast.harma.measure import Measure
from rsfast.harma.scenes import draw_scene
from rsfast.harma.training import TrainResult, train

RECALLS = ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10", "r_mean")
NAMES = {"zero_shot": "zero-shot", "harma": "HarMA", "full": "full fine-tuning"}
RESULTS, PICTURE, SHEET, CAPTIONS, IMAGES = "results.json", "retrieval.png", "scenes.png", "test.json", "test.zip"
FOUNDATION, HARMA, FULL, ADAPTERS = "foundation", "harma", "full", "adapters"

# a CLIP small enough to train from nothing while one waits
MODEL = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 40, "patch_size": 8, "width": 128, "layers": 3, "head_width": 32},
    "text_cfg": {"context_length": 18, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 3},
}
TRAIN_SIZE, TEST_SIZE = 96, 160  # pixels a side as drawn; the model resizes, and people look at the test scenes
BATCH_SIZE = 64
SCENES_A_BATCH = math.ceil(BATCH_SIZE / 5)  # five captions each
ADAPTER_SIZE = {"bottleneck": 64, "num_heads": 4}
# full's is better on the val scenes than its half and its double; HarMA's is half of what is best there, because at
# the best some training runs lose their way; all else is the same
LR = {"foundation": 1e-3, "harma": 8e-3, "full": 1e-3}


def add_parser(subparsers) -> None:
    """Add ``demo`` to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="three minutes: draw aerial scenes, adapt a tiny CLIP with HarMA, compare, save, reload, show",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", default="rsfast-demo", metavar="DIR", help="folder for all that is written")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other scenes and other weights")
    parser.add_argument("--everyday-scenes", type=int, default=2500, metavar="N", help="to train the stand-in for CLIP")
    parser.add_argument("--scenes", type=int, default=500, metavar="N", help="aerial scenes to adapt to")
    parser.add_argument("--test-scenes", type=int, default=200, metavar="N", help="aerial scenes to measure on")
    parser.add_argument("--foundation-epochs", type=int, default=3, metavar="N", help="on the everyday scenes")
    parser.add_argument("--epochs", type=int, default=6, metavar="N", help="on the aerial scenes, of each method")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; auto is a GPU if there is one")
    parser.set_defaults(run=demo_command)


def demo_command(args: argparse.Namespace) -> int:
    results = run_demo(
        args.out, seed=args.seed, everyday_scenes=args.everyday_scenes, scenes=args.scenes,
        test_scenes=args.test_scenes, foundation_epochs=args.foundation_epochs, epochs=args.epochs,
        device=None if args.device == "auto" else args.device,
    )  # fmt: skip
    return 0 if results["reload"]["bit_equal"] else 1


def run_demo(
    out: str | Path,
    *,
    seed: int = 0,
    everyday_scenes: int = 2500,
    scenes: int = 500,
    test_scenes: int = 200,
    foundation_epochs: int = 3,
    epochs: int = 6,
    device: str | None = None,
) -> dict:
    """Draw, train a stand-in foundation model, adapt it with HarMA and by full fine-tuning, measure, save, reload.

    Both methods see the same scenes in the same order for the same number of epochs, and their best epoch on the
    validation scenes is measured once on the test scenes.

    Args:
        out: Folder for the runs, ``results.json`` and the pictures. An earlier demo in it is replaced; a folder that
            holds anything else is refused.
        seed: Of scenes and weights.
        everyday_scenes: How many upright everyday scenes the stand-in foundation model learns from.
        scenes: How many aerial scenes it is adapted to.
        test_scenes: How many aerial scenes it is measured on; half as many choose the epoch.
        foundation_epochs: Of the stand-in foundation model; an epoch shows a scene five times, once a caption.
        epochs: Of each method.
        device: Default: a GPU if there is one.

    Returns:
        What ``results.json`` holds.

    Raises:
        ValueError: A number is too small, or ``out`` holds something else.
    """
    from rsfast.models import load_adapters, save_adapters  # open_clip takes its time to import

    began = time.perf_counter()
    least = {
        "everyday_scenes": SCENES_A_BATCH, "scenes": SCENES_A_BATCH, "test_scenes": SCENES_A_BATCH,
        "foundation_epochs": 1, "epochs": 1, "seed": 0,
    }  # fmt: skip
    given = (everyday_scenes, scenes, test_scenes, foundation_epochs, epochs, seed)
    for (name, low), value in zip(least.items(), given, strict=True):
        if value < low:
            raise ValueError(f"{name} must be {low} or more, got {value}")
    out = Path(out)
    device = TrainConfig(out=str(out), device=device).resolved().device
    _claim(out)

    _say(f"1/5  Drawing {everyday_scenes} everyday and {scenes} aerial scenes to train on, others to test on")
    drawn = {
        ("everyday", "train"): everyday_scenes, ("everyday", "val"): test_scenes // 2,
        ("aerial", "train"): scenes, ("aerial", "val"): test_scenes // 2, ("aerial", "test"): test_scenes,
    }  # fmt: skip
    with tqdm(total=sum(drawn.values()), unit="scene") as bar:
        data = {key: _captioned(*key, count, seed, bar) for key, count in drawn.items()}
    test = data["aerial", "test"]
    _contact_sheet(out / SHEET, seed)
    _write_test(out, test)

    def fit(run: str, domain: str, **more) -> tuple[TrainResult, Measure]:
        config = TrainConfig(
            out=str(out / run), model=MODEL, lr=LR[run], batch_size=BATCH_SIZE, seed=seed, device=device,
            precision="fp32", workers=0, augment=False, report_to="none", **ADAPTER_SIZE, **more,
        )  # fmt: skip
        with Measure(device) as measure:
            result = train(config, train_data=data[domain, "train"], val_data=data[domain, "val"])
        if result.stopped is not None:
            raise KeyboardInterrupt
        return result, measure

    def tested(made: models.Model) -> Evaluation:
        return evaluate(made.model.to(device), made.tokenizer, test, device=device, progress=False)

    _say("2/5  Training a tiny CLIP on the everyday scenes, the stand-in for a foundation model")
    result, _ = fit(FOUNDATION, "everyday", method="full", epochs=foundation_epochs)
    foundation = {"parameters": result.trainable_parameters, "everyday_val_r_mean": result.best["val_r_mean"]}
    rows = {"zero_shot": _row(tested(checkpoint.load_run(out / FOUNDATION)))}

    _say("3/5  Adapting it to the aerial scenes: full fine-tuning, then HarMA")
    start = dict(pretrained=str(out / FOUNDATION), temperature=None, epochs=epochs)
    result, measure = fit(FULL, "aerial", method="full", **start)
    rows["full"] = _row(tested(checkpoint.load_run(out / FULL)), result, measure)
    result, measure = fit(HARMA, "aerial", method="harma", **start)
    load_adapters(result.model, out / HARMA / ADAPTERS)  # the best epoch instead of the last
    found = tested(models.Model(result.model, result.tokenizer, MODEL, None, None))
    rows["harma"] = _row(found, result, measure)

    _say("4/5  Saving the adapters, loading them into a fresh copy of the foundation model")
    save_adapters(result.model, out / ADAPTERS)
    fresh = checkpoint.load_run(out / FOUNDATION)
    load_adapters(fresh.model, out / ADAPTERS)
    again = tested(fresh)
    equal = {
        name: torch.equal(getattr(found, name), getattr(again, name)) for name in ("image_features", "text_features")
    }
    size = sum(file.stat().st_size for file in (out / ADAPTERS).iterdir())

    _say("5/5  Drawing what HarMA retrieves\n")
    draw(out / PICTURE, found, test)
    results = {
        "rows": {name: rows[name] for name in NAMES},
        "chance": _chance(len(test.images), len(test.texts)),
        "foundation": foundation,
        "reload": {"bit_equal": all(equal.values()), **equal, "adapter_bytes": size},
        "scenes": {f"{domain}_{split}": count for (domain, split), count in drawn.items()},
        "lr": LR, "epochs": epochs, "foundation_epochs": foundation_epochs, "batch_size": BATCH_SIZE, "seed": seed,
        "device": device, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "seconds": time.perf_counter() - began,
    }  # fmt: skip
    write_json(out / RESULTS, results)
    _print(out, results)
    return results


def _say(text: str) -> None:
    print(text, flush=True)  # progress bars go to the other stream and must not overtake it


def _row(found: Evaluation, result: TrainResult | None = None, measure: Measure | None = None) -> dict:
    """A method's recalls on the test scenes, and what training it took; nothing was trained without a result."""
    return {name: found.metrics[name] for name in RECALLS} | {
        "trainable_parameters": 0 if result is None else result.trainable_parameters,
        "seconds": 0.0 if measure is None else measure.seconds,
        "peak_memory_bytes": 0 if measure is None else measure.peak_memory,
        "best_epoch": None if result is None else result.best["epoch"],
    }


def _claim(out: Path) -> None:
    """Make the folder, or clear it of an earlier demo; anything else is left alone."""
    if out.is_dir() and any(out.iterdir()) and not (out / RESULTS).is_file():
        raise ValueError(f"out: {out} holds something else than an earlier demo; choose another folder")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file, a folder is needed")
    for run in (FOUNDATION, HARMA, FULL, ADAPTERS):
        shutil.rmtree(out / run, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / RESULTS, {"unfinished": True})  # marks the folder as a demo's from the start


def _captioned(domain: str, split: str, count: int, seed: int, bar) -> CaptionedImages:
    size, shrunk = (TRAIN_SIZE, MODEL["vision_cfg"]["image_size"]) if split == "train" else (TEST_SIZE, None)
    images, texts, text_to_image = [], [], []
    for index in range(count):
        scene = draw_scene(domain, split, index, seed=seed, size=size)
        # nobody looks at training scenes, and shrinking them here spares it in every epoch
        image = scene.image if shrunk is None else scene.image.resize((shrunk, shrunk), Image.Resampling.BICUBIC)
        images.append(image)
        texts += [clean_caption(caption) for caption in scene.captions]
        text_to_image += [index] * len(scene.captions)
        bar.update()
    return CaptionedImages(images, texts, text_to_image, source=f"the {domain} {split} scenes")


def _write_test(out: Path, test: CaptionedImages) -> None:
    """The test scenes as files, so that ``rsfast harma eval`` can be tried on them."""
    rows = [{"image": f"{index:04}.png", "caption": []} for index in range(len(test.images))]
    for text, index in zip(test.texts, test.text_to_image, strict=True):
        rows[index]["caption"].append(text)
    (out / CAPTIONS).write_text(json.dumps(rows, indent=1) + "\n")
    with zipfile.ZipFile(out / IMAGES, "w") as archive:
        for row, image in zip(rows, test.images, strict=True):
            with archive.open(row["image"], "w") as file:
                image.save(file, "PNG", compress_level=1)


def _contact_sheet(path: Path, seed: int, *, columns: int = 8, rows: int = 2, size: int = 160) -> None:
    """Some everyday scenes above some aerial ones."""
    sheet = Image.new("RGB", (columns * size, 2 * rows * size + 8), (255, 255, 255))
    for block, domain in enumerate(("everyday", "aerial")):
        for k in range(columns * rows):
            scene = draw_scene(domain, "train", k, seed=seed, size=size)
            sheet.paste(scene.image, (k % columns * size, (block * rows + k // columns) * size + 8 * block))
    replace(path, lambda temporary: sheet.save(temporary, "PNG"))


def _chance(images: int, texts: int) -> dict[str, float]:
    """Expected recalls of a random order; every image has texts / images captions."""
    own = texts // images
    found = {}
    for k in (1, 5, 10):
        found[f"txt_r{k}"] = 100 * (1 - math.comb(texts - own, k) / math.comb(texts, k))
        found[f"img_r{k}"] = 100 * min(1.0, k / images)
    return {name: found[name] for name in RECALLS[:6]} | {"r_mean": sum(found.values()) / 6}


def _print(out: Path, results: dict) -> None:
    print(f"{'':17}{'image to text':>20} {'text to image':>20}{'':8}{'trained':>12}{'training':>10}{'training':>10}")
    heads = ("R@1", "R@5", "R@10") * 2
    print(f"{'':17}{''.join(f'{h:>7}' for h in heads)}{'mR':>7}{'parameters':>12}{'seconds':>10}{'memory':>10}")
    print(f"{'chance':17}{_recalls(results['chance'])}")
    for name, shown in NAMES.items():
        row = results["rows"][name]
        seconds = memory = "-"
        if row["best_epoch"] is not None:
            seconds = f"{row['seconds']:.1f}"
        if row["peak_memory_bytes"]:
            memory = f"{row['peak_memory_bytes'] / 2**20:.0f} MiB"
        print(f"{shown:17}{_recalls(row)}{row['trainable_parameters']:>12,}{seconds:>10}{memory:>10}")
    scenes, reload = results["scenes"], results["reload"]
    print(
        f"\n{scenes['aerial_test']} test scenes with five captions each, recalls in percent, of whichever of "
        f"{results['epochs']} epochs was best on {scenes['aerial_val']} validation scenes.\n"
        f"Learning rates: HarMA {results['lr'][HARMA]:g}, full fine-tuning {results['lr'][FULL]:g}. Memory: the peak "
        "during training above what the process held before."
    )
    verdict = "equal bit for bit" if reload["bit_equal"] else "NOT EQUAL: this is a bug"
    print(f"Adapters saved ({reload['adapter_bytes'] / 1e6:.1f} MB) and reloaded: features {verdict}.")
    print(f"Pictures: {out / PICTURE} and {out / SHEET}. Numbers: {out / RESULTS}. {results['seconds']:.0f} s in all.")
    print(
        f"Next: rsfast harma eval --data {out / CAPTIONS} --images {out / IMAGES} --checkpoint {out / HARMA} "
        "--figure out.png"
    )


def _recalls(row: dict) -> str:
    return "".join(f"{row[name]:7.1f}" for name in RECALLS)
