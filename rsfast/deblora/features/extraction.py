"""Features of a data set's images, into a store, a batch at a time."""

import contextlib
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from tqdm import tqdm

from rsfast.deblora.features.backbones import described, fingerprint, image_encoder
from rsfast.deblora.features.diffusion import sample_seed
from rsfast.deblora.features.files import HEADER
from rsfast.deblora.features.items import Items, collate
from rsfast.deblora.features.store import FeatureStore
from rsfast.harma.config import PRECISIONS
from rsfast.harma.loading import loader


def extract_features(
    model: nn.Module | Callable,
    dataset,
    folder: str | os.PathLike,
    *,
    transform: Callable | None = None,
    batch_size: int = 64,
    workers: int = 0,
    device: str | torch.device | None = None,
    precision: str | None = None,
    dtype: str = "float32",
    strict: bool = False,
    progress: bool = False,
) -> FeatureStore:
    """Encode the images of a data set into a :class:`FeatureStore`; killed at any moment and started again, it goes on.

    A batch is one append. Started again, the rows there must be the first ones of the data set, and model, transform,
    batch size, precision and device those of before; then the finished store is, byte by byte, what one run gives.
    Compared are the model's layers and weights, the text (``repr``) of the transform, and names and labels, not images.

    Args:
        model: What :func:`image_encoder` knows. It is put into evaluation mode for the time being.
        dataset: :class:`LabelledImages`, :class:`rsfast.harma.CaptionedImages`, anything else with ``load(i)``,
            ``name(i)``, ``label(i)`` and a length; or a data set of PyTorch whose items are ``(image or tensor,
            label)``, or TorchGeo's dicts of ``image`` and ``label``, named by their index. ``classes`` and ``splits``
            go along where it has them. Labels of rows already there are compared, but for data sets of PyTorch, which
            would have to load every image to tell.
        folder: Of the store: a new one, or one that was begun.
        transform: From a PIL image to (3, H, W). Default: the model's own where it is known. A data set's tensors go
            through it only if it is given here.
        batch_size: Images at once.
        workers: Processes that decode images. Results do not depend on it.
        device: Where to compute; the model is moved there and stays. Default: where the model is.
        precision: ``fp32``, ``bf16`` or ``fp16`` autocast. Default: bf16 on a GPU, fp32 elsewhere.
        dtype: Of the store, ``float32`` or ``float16``.
        strict: Raise at the first broken image. Otherwise it is left out, a warning says so at the end, and
            ``left_out`` of the store names it.
        progress: Show a bar.

    Returns:
        The store, open for reading. What was done before an error is kept.

    Raises:
        ValueError: An option does not fit; the store in ``folder`` was begun with something else (the message says what
            it was and what it is); an image is broken and ``strict``, or all are; features are not finite (the image is
            named), or no (B, D).
        TypeError: ``dataset`` or ``model`` cannot be used, or a transform is needed.

    Precision: features come as the model computes them under autocast, and are rounded to ``dtype``. Deterministic on
    one device and version of PyTorch as far as the model's operations are.

    Example:
        >>> import tempfile, torch, rsfast.deblora, rsfast.harma
        >>> from PIL import Image
        >>> data = rsfast.harma.CaptionedImages([Image.new("RGB", (8, 8))], ["a field"], [0])
        >>> size = lambda image: torch.tensor(image.size, dtype=torch.float)
        >>> store = rsfast.deblora.extract_features(torch.nn.Linear(2, 4), data, tempfile.mkdtemp(), transform=size)
        >>> store.features.shape, store.names
        ((1, 4), ['image 0'])
    """
    for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0)):
        if type(value) is not int or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    if precision not in (*PRECISIONS, None):
        raise ValueError(f"precision must be of {', '.join(PRECISIONS)}, got {precision!r}")
    encoder, own = image_encoder(model)
    items = Items(dataset, own if transform is None else transform, tensors=transform is not None)
    if not len(items):
        raise ValueError("dataset holds no images")
    device = _move(encoder, device)
    precision = precision or ("bf16" if device.type == "cuda" else "fp32")
    settings = {
        "made_by": "rsfast.deblora.extract_features", "model": type(model).__name__, "weights": fingerprint(encoder),
        "transform": described(items.transform), "images": len(items), "batch_size": batch_size,
        "precision": precision, "device": device.type,
    }  # fmt: skip
    folder = Path(folder)
    writer = _Writer(
        lambda dim: FeatureStore.create(folder, dim, dtype=dtype, classes=items.classes, metadata=settings)
    )
    with writer, _evaluating(encoder):
        if (folder / HEADER).exists():
            writer.store = FeatureStore(folder)
            _check_begun(writer.store, items, settings, dtype, strict)
        start = 0 if writer.store is None else len(writer.store) + len(writer.store.left_out)
        batches = loader(
            Subset(items, range(start, len(items))), workers=workers, pin_memory=device.type == "cuda",
            batch_size=batch_size, collate_fn=collate,
        )  # fmt: skip
        for indices, images, labels, broken in tqdm(batches, "features", leave=False, disable=not progress):
            broken = [(index, items.name(index), reason) for index, reason in broken]
            if broken and strict:
                raise ValueError("an image cannot be used: {}: {}".format(*broken[0][1:]))
            names, features = [items.name(i) for i in indices], None
            if indices:
                with torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32"):
                    features = _encode(encoder, images.to(device, non_blocking=True), names)
            writer.put(features, labels, names, [items.split(i) for i in indices], broken)
    left_out = writer.left_out()
    if left_out:
        example = f"e.g. {left_out[0][1]}: {left_out[0][2]}"
        if len(left_out) == len(items):
            raise ValueError(f"none of the {len(items)} images can be used, {example}")
        warnings.warn(f"{len(left_out)} of {len(items)} images are left out, {example}", stacklevel=2)
    return writer.store


class _Writer:
    """Appends a batch while the next one is computed; makes the store as soon as it is known how wide it must be."""

    def __init__(self, create: Callable[[int], FeatureStore]):
        self.store, self._create = None, create
        self._waiting: list[list] = []  # what was left out of batches without one whole image, before there is a store
        self._thread, self._pending = ThreadPoolExecutor(1), None

    def put(self, features: Tensor | None, labels, names, splits, left_out: list) -> None:
        if self.store is None and features is None:
            self._waiting.append(left_out)
            return
        if self.store is None:
            self.store = self._create(features.shape[1])
            for others in self._waiting:
                self.store.append(torch.empty(0, self.store.dim), left_out=others)
        self._finish()
        rows = torch.empty(0, self.store.dim) if features is None else features
        self._pending = self._thread.submit(self.store.append, rows, labels, names, splits, left_out=left_out)

    def left_out(self) -> list:
        return self.store.left_out if self.store is not None else [item for part in self._waiting for item in part]

    def _finish(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self._thread.shutdown()
            if error is None:
                self._finish()
        finally:
            if self.store is not None:
                self.store.close()


def _move(encoder, device: str | torch.device | None) -> torch.device:
    first = next(encoder.parameters(), None) if isinstance(encoder, nn.Module) else None
    if device is None:
        return torch.device("cpu") if first is None else first.device
    if isinstance(encoder, nn.Module):
        encoder.to(device)
    return torch.device(device)


@contextlib.contextmanager
def _evaluating(encoder):
    training = {m: m.training for m in encoder.modules()} if isinstance(encoder, nn.Module) else {}
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _encode(encoder, images: Tensor, names: list[str]) -> Tensor:
    if getattr(encoder, "takes_seeds", False):
        features = encoder(images, [sample_seed(name) for name in names])
    else:
        features = encoder(images)
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"model must give (B, D) features, gave {got} for images {tuple(images.shape)}")
    features = features.cpu()
    bad = (~features.isfinite()).any(1).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(
            f"the features of {names[bad[0]]} hold NaN or infinity ({len(bad)} of a batch of {len(names)})"
        )
    return features


def _check_begun(store: FeatureStore, items: Items, settings: dict, dtype: str, strict: bool) -> None:
    """Refuse a store where going on would not give what one run would have given."""
    store.lock()
    begun, now = {**store.metadata, "dtype": store.dtype.name}, {**settings, "dtype": dtype}
    for key in now:
        if begun.get(key) != now[key]:
            raise ValueError(
                f"{store.folder} was begun with {key} {begun.get(key)!r}, now it is {now[key]!r}; "
                "take another folder, or what it was begun with"
            )
    left_out = {item.index: item for item in store.left_out}
    if left_out and strict:
        _, name, reason = next(iter(left_out.values()))
        raise ValueError(f"an image cannot be used: {name}: {reason}; it is left out of {store.folder}")
    present = (i for i in range(len(store) + len(left_out)) if i not in left_out)
    for row, (index, name, label) in enumerate(zip(present, store.names, store.labels.tolist(), strict=True)):
        if items.name(index) != name or items.label(index) not in (None, label):
            raise ValueError(
                f"{store.folder} was begun with other data: its row {row} is {name!r} of label {label}, "
                f"but image {index} is {items.name(index)!r} of label {items.label(index)}"
            )
