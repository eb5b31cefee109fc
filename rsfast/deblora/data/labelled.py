"""Images with a class each, whole or cut out of larger ones."""

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rsfast.deblora.arrays import as_integers
from rsfast.deblora.data.crops import cut
from rsfast.harma.images import BrokenImageError, ImageStore, decoded

TOGETHER = 2**28  # bytes of decoded images that are kept


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images, or crops of images, and their classes.

    Args:
        images: For each row a PIL image, or a name to be looked up in ``store``; several rows may name one image.
        labels: For each row its class, 0..C-1; kept as int64 (N,).
        classes: C names, no two alike; a class may be without rows.
        store: Needed where ``images`` are names.
        boxes: For each row the four corners of its oriented box, (N, 4, 2) in pixels (x right, y down); only that part
            of the image is loaded. None: whole images.
        splits: For each row the part it belongs to, e.g. train, val, test.
        names: For each row a name that no other row has. Default: the image's, with ``#`` and a number where it is cut
            or named by rows before.
        crop: ``"bounds"``: the smallest upright rectangle around the box, out of whole pixels, nothing resampled.
            ``"rotated"``: the box itself turned upright, its first corner at the top left, by bicubic interpolation,
            black where the image ends.
        margin: Grows crops on each side by this share of their width and height.
        source: Named in messages.
        left_out: What of the source is not in here, and why.

    Raises:
        ValueError: A length, a class or a box does not fit.

    Images that crops were cut from last are kept decoded, up to 256 MiB of them and the last one always, by each
    process for itself. So rows in the order of their images decode each image once, and so do rows in the order of
    :meth:`shuffled`.

    Example:
        >>> import rsfast.deblora
        >>> from PIL import Image
        >>> harbor = Image.new("RGB", (100, 50))
        >>> box = [[10, 10], [30, 20], [25, 30], [5, 20]]
        >>> data = rsfast.deblora.LabelledImages([harbor, harbor], [0, 1], ["ship", "crane"], boxes=[box, box])
        >>> len(data), data.load(0).size, data.name(1), data.label(1)
        (2, (25, 20), 'image 1#0', 1)
    """

    images: Sequence
    labels: Sequence[int] | np.ndarray
    classes: Sequence[str]
    store: ImageStore | None = None
    boxes: Sequence | np.ndarray | None = None
    splits: Sequence[str] | None = None
    names: Sequence[str] | None = None
    crop: Literal["bounds", "rotated"] = "bounds"
    margin: float = 0.0
    source: str = "the data"
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    _decoded: "_Decoded" = dataclasses.field(default_factory=lambda: _Decoded(), init=False, repr=False)
    _sizes: dict[str, int] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        count = len(self.images)
        if not count:
            raise ValueError(f"{self.source} holds no images")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"{self.source}: classes must differ from each other")
        if isinstance(self.labels, Sequence) and len(self.labels) != count:
            raise ValueError(f"{self.source}: {count} images but {len(self.labels)} labels")
        labels = as_integers(self.labels, f"{self.source}: labels", count, most=len(self.classes) - 1)
        object.__setattr__(self, "labels", labels.numpy(force=True))
        object.__setattr__(self, "classes", tuple(self.classes))
        if self.store is None and any(isinstance(image, str) for image in self.images):
            raise ValueError(f"{self.source}: images given by name need a store to find them in")
        if self.boxes is not None:
            boxes = np.asarray(self.boxes, np.float64)
            if boxes.shape != (count, 4, 2) or not np.isfinite(boxes).all():
                raise ValueError(f"{self.source}: boxes must be ({count}, 4, 2) finite numbers, got {boxes.shape}")
            object.__setattr__(self, "boxes", boxes)
        if self.crop not in ("bounds", "rotated"):
            raise ValueError(f"crop must be bounds or rotated, got {self.crop!r}")
        if not 0 <= self.margin < float("inf"):
            raise ValueError(f"margin must be a number of at least 0, got {self.margin!r}")
        if self.names is None:
            object.__setattr__(self, "names", self._default_names())
        for name in ("splits", "names"):
            given = getattr(self, name)
            if given is not None and len(given) != count:
                raise ValueError(f"{self.source}: {count} images but {len(given)} {name}")
        if len(set(self.names)) < count:
            twice = Counter(self.names).most_common(1)[0][0]
            raise ValueError(f"{self.source}: names must differ from each other, {twice} is there more than once")

    def _default_names(self) -> list[str]:
        names, seen = [], Counter()
        for row, image in enumerate(self.images):
            name = image if isinstance(image, str) else f"image {row}"
            number = seen[name]
            seen[name] += 1
            names.append(f"{name}#{number}" if self.boxes is not None or number else name)
        return names

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Image.Image:
        """Image or crop ``index`` in RGB.

        Raises:
            BrokenImageError: It is missing or does not decode, or the box has no pixel of it.
        """
        if self.boxes is None:
            return self._open(index)
        whole = self.images[index]
        image = self._decoded.get(_key(whole), self._size(whole), lambda: self._open(index))
        try:
            return cut(image, self.boxes[index], crop=self.crop, margin=self.margin)
        except ValueError as error:
            raise BrokenImageError(self.name(index), str(error)) from error

    def shuffled(self) -> Tensor:
        """Rows in an order drawn from torch's random state: any order, but for crops, which stay near each other.

        Images are shuffled, and the crops of as many of them as may be kept decoded together are shuffled among each
        other; then those of the images that follow. A process that loads rows in this order decodes each image once.
        """
        if not self.together:
            return torch.randperm(len(self))
        rows: dict[str | int, list[int]] = {}
        for row, image in enumerate(self.images):
            rows.setdefault(_key(image), []).append(row)
        order, window, held = [], [], 0
        own = list(rows.values())
        for number in torch.randperm(len(own)).tolist():
            size = self._size(self.images[own[number][0]])
            if window and held + size > self.together:
                order.append(_mixed(window))
                window, held = [], 0
            window, held = window + own[number], held + size
        return torch.cat([*order, _mixed(window)])

    @property
    def together(self) -> int:
        """Bytes of decoded images whose crops :meth:`shuffled` mixes; 0 for whole images, of which all are mixed."""
        return 0 if self.boxes is None else TOGETHER

    def _size(self, image) -> int:
        """Bytes of an image when it is decoded; 0 of one that is broken, which is told of when it is loaded."""
        if not isinstance(image, str):
            return _bytes_of(image)
        if image not in self._sizes:
            try:
                wide, high = self.store.size(image)
            except BrokenImageError:
                wide = high = 0
            self._sizes[image] = 3 * wide * high
        return self._sizes[image]

    def _open(self, index: int) -> Image.Image:
        image = self.images[index]
        return self.store.open(image) if isinstance(image, str) else decoded(image, self.name(index))

    def name(self, index: int) -> str:
        """Of row ``index`` alone, also in a part or subset."""
        return self.names[index]

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def part(self, split: str) -> "LabelledImages":
        """The rows of a split, in their order.

        Raises:
            ValueError: There is no such split; those that there are are named.
        """
        rows = [row for row, name in enumerate(self.splits or ()) if name == split]
        if not rows:
            known = ", ".join(sorted(filter(None, set(self.splits or ())))) or "none"
            raise ValueError(f"{self.source} has no split {split!r}, it has {known}")
        return self.subset(rows)

    def subset(self, indices: Iterable[int]) -> "LabelledImages":
        """These rows, in this order, with all classes.

        Raises:
            ValueError: An index is out of range, is there twice, or there are none.
        """
        indices = list(indices)
        rows = as_integers(indices, "indices", len(indices), most=len(self) - 1).tolist() if indices else []
        few = {
            name: None if getattr(self, name) is None else [getattr(self, name)[row] for row in rows]
            for name in ("images", "splits", "names")
        }
        boxes = None if self.boxes is None else self.boxes[rows]
        return dataclasses.replace(self, **few, labels=self.labels[rows], boxes=boxes)


def _key(image) -> str | int:
    return image if isinstance(image, str) else id(image)


def _mixed(rows: list[int]) -> Tensor:
    return torch.tensor(rows)[torch.randperm(len(rows))]


class _Decoded:
    """Decoded images up to :data:`TOGETHER` bytes, the last one always; empty in every process that it is sent to."""

    def __init__(self):
        self._kept: dict[str | int, Image.Image] = {}  # the one asked for last stands last
        self._lock = threading.Lock()

    def __reduce__(self):
        return _Decoded, ()

    def get(self, key: str | int, size: int, decode: Callable[[], Image.Image]) -> Image.Image:
        """The image of this key, of ``size`` bytes; room is made before it is decoded, not after."""
        with self._lock:
            image = self._kept.pop(key, None)
            if image is None:
                while self._kept and sum(map(_bytes_of, self._kept.values())) + size > TOGETHER:
                    del self._kept[next(iter(self._kept))]
            else:
                self._kept[key] = image
        if image is None:
            image = decode()  # others may go on meanwhile
            with self._lock:
                self._kept[key] = image
        return image


def _bytes_of(image: Image.Image) -> int:
    return 3 * image.width * image.height
