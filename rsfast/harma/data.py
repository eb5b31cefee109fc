"""Images with captions, and the caption files they are read from."""

import dataclasses
import hashlib
import json
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image

from rsfast.harma.images import ImageStore, decoded
from rsfast.harma.tables import csv_rows, described, read_json, require


@dataclasses.dataclass(frozen=True)
class CaptionedImages:
    """Images, their captions, and which belongs to which: what training and evaluation read.

    Args:
        images: PIL images, or names to be looked up in ``store``.
        texts: The captions as the tokenizer will see them.
        text_to_image: For each caption the index of its image.
        image_ids: For each image an integer; images of equal id are positives of each other's captions in the loss.
            Default: every image is its own.
        store: Needed where ``images`` are names.
        source: Named in messages.
        left_out: What of the source is not in here, and why.
        labels: For each image its scene class, an integer, negative where it is unknown; for the affiliation loss.

    Raises:
        ValueError: A length or an index does not fit, or there are no captions.

    Example:
        >>> import rsfast.harma
        >>> from PIL import Image
        >>> data = rsfast.harma.CaptionedImages([Image.new("RGB", (8, 8))], ["a field", "green"], [0, 0])
        >>> len(data.texts), data.load(0).size
        (2, (8, 8))
    """

    images: Sequence
    texts: Sequence[str]
    text_to_image: Sequence[int]
    image_ids: Sequence[int] | None = None
    store: ImageStore | None = None
    source: str = "the data"
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    labels: Sequence[int] | None = None

    def __post_init__(self):
        if not len(self.texts):
            raise ValueError(f"{self.source} holds no captions")
        for name in ("text_to_image", "image_ids", "labels"):
            self._as_integers(name)
        if len(self.texts) != len(self.text_to_image):
            raise ValueError(f"{self.source}: {len(self.texts)} texts but {len(self.text_to_image)} text_to_image")
        for name in ("image_ids", "labels"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.images):
                raise ValueError(f"{self.source}: {len(self.images)} images but {len(given)} {name}")
        if not 0 <= min(self.text_to_image) <= max(self.text_to_image) < len(self.images):
            raise ValueError(f"{self.source}: text_to_image must be from 0 to {len(self.images) - 1}, one an image")
        if self.store is None and any(isinstance(image, str) for image in self.images):
            raise ValueError(f"{self.source}: images given by name need a store to find them in")

    def _as_integers(self, name: str) -> None:
        """Tensors and arrays are as welcome as lists."""
        given = getattr(self, name)
        if given is None:
            return
        try:
            object.__setattr__(self, name, [operator.index(number) for number in given])
        except TypeError as error:
            raise ValueError(f"{self.source}: {name} must hold integers: {error}") from error

    def load(self, index: int) -> Image.Image:
        """Image ``index`` in RGB; raises :class:`BrokenImageError` where it is missing or does not decode."""
        image = self.images[index]
        return self.store.open(image) if self.store is not None else decoded(image, self.name(index))

    def name(self, index: int) -> str:
        return self.images[index] if self.store is not None else f"image {index}"

    def image_id(self, index: int) -> int:
        return index if self.image_ids is None else self.image_ids[index]

    def label(self, index: int) -> int:
        """Scene class of image ``index``; negative where it is unknown."""
        return -1 if self.labels is None else self.labels[index]

    def missing(self) -> list[str]:
        """Names that the store does not hold; cheap, nothing is decoded."""
        return [] if self.store is None else [name for name in self.images if name not in self.store]

    def refuse_left_out(self) -> None:
        """For those who want all or nothing: refuses captions without words and images that are not there."""
        for name in self.missing():
            raise ValueError(f"{self.source}: an image cannot be used: {name}: not in {self.store.root}")
        for where, why in self.left_out.items():
            raise ValueError(f"{where}: {why}")

    def refuse_unlabelled(self) -> None:
        """For the affiliation loss: refuses images whose scene class is unknown."""
        unknown = [self.name(index) for index in range(len(self.images)) if self.label(index) < 0]
        if unknown:
            raise ValueError(
                f"affiliation_weight above 0 needs a scene label of every image, but {self.source} has none, or more "
                f"than one, of {len(unknown)} of its {len(self.images)} images, for example of {unknown[0]}"
            )

    def fingerprint(self) -> str:
        """Changes with captions, their order, the images' names, ids and labels (not with the images' content)."""
        names, numbers = list(self.images) if self.store is not None else len(self.images), range(len(self.images))
        ids, labels = [self.image_id(i) for i in numbers], [self.label(i) for i in numbers]
        parts = (names, list(self.texts), list(self.text_to_image), ids, labels)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def clean_caption(caption: str, max_words: int = 30) -> str:
    """Lower case, without punctuation, hyphens and slashes as spaces, at most ``max_words`` words.

    Upstream: HarMA ``dataset/utils.py::pre_caption``. Differs from upstream: an empty result is returned, not raised;
    tabs and newlines are spaces wherever they stand.

    Example:
        >>> from rsfast.harma.data import clean_caption
        >>> clean_caption("A semi-circular  Harbor, with ships.")
        'a semi circular harbor with ships'
    """
    caption = re.sub(r"[,.'!?\"()*#:;~]", "", caption.lower())
    caption = caption.replace("-", " ").replace("/", " ").replace("<person>", "person")
    return " ".join(caption.split()[:max_words])


def load_captions(
    path: str | Path,
    images: str | Path | ImageStore,
    *,
    split: str = "test",
    max_words: int = 30,
    csv_img_key: str = "filepath",
    csv_caption_key: str = "title",
    csv_separator: str | None = None,
    csv_encoding: str | None = None,
) -> CaptionedImages:
    """Read a caption file; what it is is told from its name and content.

    HarMA's json (a row a caption for training, a row an image with a list of captions for evaluation; either is read
    for either), Karpathy's json (``{"images": [{"filename", "split", "sentences": [{"raw"}]}]}``), and CSV or TSV with
    a header line. Images are known by name; HarMA's ``image_id``, where given, says which images are one for the loss,
    and ``label`` or else ``label_name``, a key of a row (or a column), says of which scene class its image is.

    Args:
        path: ``.json``, ``.csv``, ``.tsv`` or ``.txt``.
        images: Folder or zip of the images, or an :class:`ImageStore`.
        split: Which part of a Karpathy json; other files are one split each.
        max_words: Longer captions are cut. Captions without a word are left out, and named in the result.
        csv_img_key: Column of image names.
        csv_caption_key: Column of captions.
        csv_separator: Default: whichever of tab, comma and semicolon gives the header both columns.
        csv_encoding: Default: UTF-8, or where that fails GB18030, in which RSICD's CSV circulates.

    Raises:
        FileNotFoundError: No such file, or none of its images is in ``images``.
        ValueError: The file cannot be read as any of these; the message names file, row and what is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no caption file {path}")
    if path.suffix.lower() == ".json":
        rows = _json_rows(path, split)
    elif path.suffix.lower() in (".csv", ".tsv", ".txt"):
        rows = _csv_rows(path, csv_img_key, csv_caption_key, csv_separator, csv_encoding)
    else:
        raise ValueError(f"{path}: a caption file ends in .json, .csv, .tsv or .txt")

    index, ids, numbers, texts, text_to_image, left_out, labels = {}, [], {}, [], [], {}, {}
    for where, name, captions, given, label in rows:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{where}: the image's name must be text, got {name!r}")
        cleaned = []
        for number, caption in enumerate(captions):
            if not isinstance(caption, str):
                raise ValueError(f"{where}: a caption of {name} must be text, got {caption!r}")
            cleaned.append(clean_caption(caption, max_words))
            if not cleaned[-1]:  # RSICD has captions that are a full stop
                place = f", caption {number}" if len(captions) > 1 else ""
                left_out[f"{where}{place}"] = f"{caption!r} of {name} has no words"
        if not any(cleaned):
            continue
        if index.setdefault(name, len(index)) == len(ids):
            key = ("name", name) if given is None else ("id", str(given))
            ids.append((numbers.setdefault(key, len(numbers)), given))
        elif ids[index[name]][1] != given:
            raise ValueError(f"{where}: image {name} has image_id {given!r}, and {ids[index[name]][1]!r} further up")
        labels[name] = label if labels.setdefault(name, label) == label else None  # one that changes is none
        for text in filter(None, cleaned):
            texts.append(text)
            text_to_image.append(index[name])
    if not texts:
        raise ValueError(f"{path} holds no captions")
    store = images if isinstance(images, ImageStore) else ImageStore(images)
    classes: dict[str, int] = {}
    data = CaptionedImages(
        list(index), texts, text_to_image, [i for i, _ in ids], store, str(path), left_out,
        [-1 if labels[name] is None else classes.setdefault(labels[name], len(classes)) for name in index],
    )  # fmt: skip
    missing = data.missing()
    if len(missing) == len(data.images):
        raise FileNotFoundError(
            f"none of the {len(missing)} images that {path} names is in {store.root}, for example {missing[0]}"
        )
    return data


Row = tuple[str, str, list[str], object, str | None]  # where it stands, image name, captions, image id, scene class


def _json_rows(path: Path, split: str) -> Iterator[Row]:
    content = read_json(path)
    if isinstance(content, dict) and "images" in content:
        return _karpathy_rows(path, content["images"], split)
    if not isinstance(content, list):
        raise ValueError(f"{path} must hold a list of rows, or a dictionary with 'images', got {described(content)}")
    return _harma_rows(path, content)


def _harma_rows(path: Path, rows: list) -> Iterator[Row]:
    for number, row in enumerate(rows):
        where = f"{path}, row {number}"
        require(row, ("image", "caption"), where)
        captions = row["caption"] if isinstance(row["caption"], list) else [row["caption"]]
        if not captions:
            raise ValueError(f"{where}: the list of captions of {row['image']} is empty")
        yield where, row["image"], captions, row.get("image_id"), _label(row)


def _karpathy_rows(path: Path, rows: list, split: str) -> Iterator[Row]:
    if not isinstance(rows, list):
        raise ValueError(f"{path}: 'images' must be a list, got {described(rows)}")
    splits = set()
    for number, row in enumerate(rows):
        where = f"{path}, images[{number}]"
        require(row, ("filename", "split", "sentences"), where)
        splits.add(str(row["split"]))
        if row["split"] != split:
            continue
        if not isinstance(row["sentences"], list) or not row["sentences"]:
            raise ValueError(
                f"{where}: 'sentences' must be a list that is not empty, got {described(row['sentences'])}"
            )
        for sentence in row["sentences"]:
            require(sentence, ("raw",), f"{where}, sentences")
        # COCO's file keeps the folder apart from the name
        name = f"{row['filepath']}/{row['filename']}" if row.get("filepath") else row["filename"]
        yield where, name, [sentence["raw"] for sentence in row["sentences"]], None, _label(row)
    if split not in splits:
        raise ValueError(f"{path} has no split {split!r}, it has {', '.join(sorted(splits)) or 'no images'}")


def _csv_rows(path: Path, img_key: str, caption_key: str, separator: str | None, encoding: str | None) -> Iterator[Row]:
    for where, row in csv_rows(path, (img_key, caption_key), separator, encoding):
        yield where, row[img_key], [row[caption_key]], None, _label(row)


def _label(row: dict) -> str | None:
    """The scene class that a row gives its image."""
    return next((str(row[key]) for key in ("label", "label_name") if row.get(key) not in (None, "")), None)
