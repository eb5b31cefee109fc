"""A few small drawn images with captions, as files and in memory, and an open_clip model that is small enough."""

import json
import zipfile

import numpy as np
from PIL import Image

from rsfast.harma import CaptionedImages, TrainConfig

MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32},
    "text_cfg": {"layers": 2, "width": 32, "heads": 2, "vocab_size": 49408, "context_length": 12},
}
WORDS = ("river", "road", "field", "harbor", "forest", "beach", "bridge", "airport")


def image(number):
    """Stripes whose colour and width go with the number."""
    rng = np.random.default_rng(number)
    pixels = np.full((40, 48, 3), rng.integers(0, 255, 3), np.uint8)
    pixels[:: number % 3 + 2] = rng.integers(0, 255, 3)
    return Image.fromarray(pixels)


def captions(number):
    return [f"a {WORDS[number % 8]} number {number}", f"one {WORDS[number % 8]}."]


def in_memory(first=0, count=10):
    numbers = range(first, first + count)
    texts = [text for n in numbers for text in captions(n)]
    labels = [n % 3 for n in numbers]
    return CaptionedImages([image(n) for n in numbers], texts, [k // 2 for k in range(2 * count)], labels=labels)


def write_files(folder, count=10):
    """images/ and images.zip, train.json (a row a caption), val.json (a row an image), model.json."""
    (folder / "images" / "a").mkdir(parents=True)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for n in range(count):
            image(n).save(folder / "images" / "a" / f"{n}.png")
            archive.write(folder / "images" / "a" / f"{n}.png", f"a/{n}.png")
    names = [f"a/{n}.png" for n in range(count)]
    train = [
        {"caption": text, "image": names[n], "image_id": n, "label_name": f"scene {n % 3}", "label": n % 3}
        for n in range(count)
        for text in captions(n)
    ]
    val = [{"image": names[n], "caption": captions(n)} for n in range(count)]
    for name, content in (("train", train), ("val", val), ("model", MODEL)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def config(out, **changes):
    settings = dict(
        model=MODEL, epochs=2, batch_size=8, lr=1e-2, workers=0, bottleneck=32, num_heads=4, log_every_n_steps=1,
        report_to="none", device="cpu", precision="fp32",
    )  # fmt: skip
    return TrainConfig(out=str(out), **(settings | changes))
