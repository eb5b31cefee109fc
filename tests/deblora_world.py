"""Small images of noise that differ from each other."""

import numpy as np
from PIL import Image


def picture(number, size=(12, 8)):
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    return Image.fromarray(pixels)


def write(root, *names, size=(12, 8)):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number, size).save(root / name)
    return root
