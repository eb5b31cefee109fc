"""The settings of a comparison."""

import dataclasses
import math
from typing import Literal

import torch

from rsfast.deblora.comparison.methods import DEFAULT, parse_methods
from rsfast.harma.config import check_device

CHOICES = {
    "clusterer": ("kmeans", "minibatch", "dbscan", "hdbscan"),
    "center": ("debiased", "class-mean", "global-mean"),
    "target_set": ("all", "balanced", "tail"),
    "groups": ("auto", "dota"),
    "f1_style": ("strict", "deblora"),
    "probe": ("linear", "logistic", "knn"),
    "precision": ("fp32", "bf16", "fp16"),
}
MOST = 2**31  # above any number of rows, epochs or processes


class SettingError(ValueError):
    """A setting that does not fit. ``{}`` in ``text`` is where its name stands, which a command writes as a flag."""

    def __init__(self, setting: str, text: str):
        super().__init__(text.replace("{}", setting))
        self.setting, self.text = setting, text


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of :func:`rsfast.deblora.run`; K and the rank are debLoRA's (arXiv 2410.04546).

    Args:
        out: Folder of the results.
        features: An ``.npz`` with ``features``, ``label``, ``is_test``, ``classes``, or the folder of a
            :class:`FeatureStore` with splits. Neither features nor images: scikit-learn's digits. Of a store whose
            rows take more than 1 GiB in fp32, what a step needs is read from the disk, through files in ``out`` that
            are removed. Held in memory are what a trained map made of the rows, all rows for the clusterers but
            ``minibatch`` and the probes but ``linear``, rows and calibrated ones together for ``calibrate``, and K
            numbers a row under ``rho``.
        images: What :func:`load_labelled` reads: a folder, a list file.
        image_root: Where the images are that a file names.
        image_format: As in :func:`load_labelled`.
        model: open_clip's or timm's name, for images.
        pretrained: Weights of the model, see :func:`rsfast.deblora.comparison.sources.backbone`.
        method: Names of methods, see :data:`rsfast.deblora.METHODS`.
        seeds: A run of every method for each: of the long tail drawn, of clustering, of training.
        clusters: K.
        rho: Balance of clusters, n_k >= N / (K rho); 2 since the paper's value is unknown to us. None: no constraint.
        clusterer: ``kmeans``, ``minibatch``, ``dbscan`` or ``hdbscan``.
        alpha: ``"auto"`` is the paper's min(1, 10 / ir_c), or one number for all tail classes.
        center: What tail features are moved to: ``"debiased"`` centres; or, to see what these do, the ``"class-mean"``
            or the ``"global-mean"`` of the training features.
        target_set: What the LoRA is learned on: ``"all"`` training rows, as the paper's equation 4 reads, of which the
            head's targets are the features themselves; ``"balanced"``: all, each class with the same weight in total;
            ``"tail"``: rows of the classes that are moved.
        imbalance: Training rows are drawn so that the largest class has so many times the smallest's. None: all rows;
            100 for the digits.
        groups: ``"auto"`` (thirds by size) or ``"dota"``, as in :class:`ClassCounts`.
        f1_style: As in :func:`grouped_f1`.
        rank: Of LoRA.
        lora_alpha: LoRA is scaled by ``lora_alpha / rank``.
        epochs: Of training with labels. None: 30 on features, 10 on images.
        lr: Peak learning rate of that. None: 1e-3 on features, 1e-4 on images, a tenth for fine-tuning.
        deblora_epochs: Of learning towards calibrated features. None: 60 on features, 10 on images.
        deblora_lr: Peak learning rate of that. None: 3e-3 on features, 1e-4 on images.
        weight_decay: Of both.
        batch_size: Rows a step. None: 128 features, 64 images.
        probe: ``linear`` (the authors'), ``logistic`` or ``knn``.
        val_share: Share of each class's training rows on which the probe's settings are chosen, as :func:`hold_out`
            draws them, where the data have no validation rows of their own. 0: none.
        test_share: Share of each class's rows that become test rows, where the data have none of their own.
        device: Default: a GPU if there is one.
        precision: Of a backbone, ``fp32``, ``bf16`` or ``fp16``; default bf16 on a GPU, fp32 elsewhere.
        workers: Processes that decode images.
    """

    out: str
    features: str | None = None
    images: str | None = None
    image_root: str | None = None
    image_format: str = "auto"
    model: str | None = None
    pretrained: str | None = None
    method: str = ",".join(DEFAULT)
    seeds: tuple[int, ...] = (0, 1, 2)
    clusters: int = 32
    rho: float | None = 2.0
    clusterer: Literal["kmeans", "minibatch", "dbscan", "hdbscan"] = "kmeans"
    alpha: str | float = "auto"
    center: Literal["debiased", "class-mean", "global-mean"] = "debiased"
    target_set: Literal["all", "balanced", "tail"] = "balanced"
    imbalance: float | None = None
    groups: Literal["auto", "dota"] = "auto"
    f1_style: Literal["strict", "deblora"] = "strict"
    rank: int = 8
    lora_alpha: float = 8.0
    epochs: int | None = None
    lr: float | None = None
    deblora_epochs: int | None = None
    deblora_lr: float | None = None
    weight_decay: float = 0.01
    batch_size: int | None = None
    probe: Literal["linear", "logistic", "knn"] = "logistic"
    val_share: float = 0.2
    test_share: float | None = None
    device: str | None = None
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    workers: int = 0

    def __post_init__(self):
        try:
            methods = parse_methods(self.method)
        except ValueError as error:
            raise SettingError("method", "{}" + str(error).removeprefix("method")) from error
        trained = [m.name for m in methods if m.trained is not None or m.step == "deblora"]
        if self.features is not None and self.images is not None:
            raise ValueError("features and images exclude each other: give one of them")
        if self.images is not None and self.model is None:
            raise ValueError("images need a model: open_clip's name or timm's")
        for name in ("model", "pretrained", "image_root"):
            if self.images is None and getattr(self, name) is not None:
                raise SettingError(name, "{} is for images, which are not given; features need none")
        if not self.seeds or any(type(seed) is not int or seed < 0 for seed in self.seeds):
            raise SettingError("seeds", f"{{}} must be integers of at least 0, one or more, got {_shown(*self.seeds)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise SettingError("seeds", f"{{}} must differ from each other, got {_shown(*self.seeds)}")
        for name in ("clusters", "rank", "epochs", "deblora_epochs", "batch_size"):
            whole = type(getattr(self, name)) is int and 0 < getattr(self, name) < MOST
            self._check(name, whole, "a positive integer below 2**31", none=name not in ("clusters", "rank"))
        whole = type(self.workers) is int and 0 <= self.workers < MOST
        self._check("workers", whole, "an integer of at least 0, below 2**31")
        for name in ("rho", "imbalance"):
            self._check(name, self._number(name) >= 1, "a number of at least 1", none=True)
        for name in ("lora_alpha", "lr", "deblora_lr"):
            self._check(name, self._number(name) > 0, "a positive number", none=name != "lora_alpha")
        self._check("weight_decay", self._number("weight_decay") >= 0, "a number of at least 0")
        part = self.alpha == "auto" or 0 <= self._number("alpha") <= 1
        self._check("alpha", part, "'auto' or a number from 0 to 1")
        self._check("val_share", 0 <= self._number("val_share") < 1, "at least 0 and below 1")
        self._check("test_share", 0 < self._number("test_share") < 1, "between 0 and 1", none=True)
        for name, choices in CHOICES.items():
            self._check(name, getattr(self, name) in choices, f"of {', '.join(choices)}", none=name == "precision")
        if self.precision == "fp16" and trained:
            raise SettingError(
                "precision", f"{{}} must be fp32 or bf16 where something is trained, as {trained[0]}; got 'fp16'"
            )

    def _number(self, name: str) -> float:
        """A setting that is a finite number, else NaN, which is in no range."""
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
        return value if number else math.nan

    def _check(self, name: str, fits: bool, wanted: str, none: bool = False) -> None:
        value = getattr(self, name)
        if not (fits or (none and value is None)):
            raise SettingError(name, f"{{}} must be {wanted}, got {_shown(value)}")

    def place(self) -> str:
        """The device to compute on; ValueError if it is not there."""
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_device(device)
        return device


def _shown(*values) -> str:
    """Values as they were given; a long number in short."""
    return ", ".join(f"{v:.3g}" if type(v) is int and abs(v) > MOST else repr(v) for v in values) or "none"
