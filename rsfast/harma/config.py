"""The settings of a training run."""

import dataclasses
import math
from typing import Literal

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FREE = {  # what may differ when a run is resumed: none of these changes a number of the run
    "train_data", "val_data", "images", "model", "out", "resume", "workers", "device", "save_every_steps",
    "log_every_n_steps", "report_to", "max_steps", "eval_batch_size", "csv_img_key", "csv_caption_key",
    "csv_separator", "csv_encoding", "max_words",
}  # fmt: skip  # data and model are compared by their content


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of :func:`rsfast.harma.train`; the defaults are HarMA's (arXiv 2404.18253, released code).

    Args:
        out: Run folder.
        train_data: Caption file, unless data are handed to ``train``.
        val_data: Caption file on which the best epoch is chosen.
        images: Folder or zip of the images.
        model: open_clip's name, path of a ``.json`` config, or the config; not needed with a run as ``pretrained``.
        pretrained: open_clip's tag, a weights file, or a run folder.
        method: ``harma`` trains gated adapters and the temperature, ``full`` all weights, ``frozen`` none.
        epochs: Passes over the captions.
        batch_size: Pairs a step, and a process where there are several.
        lr: Peak learning rate.
        wd: Weight decay.
        warmup: Share of all steps.
        seed: Of weights, order and augmentation.
        precision: ``fp32``, ``bf16`` or ``fp16``; default bf16 on a GPU, fp32 elsewhere. The losses are in fp32.
        workers: Processes that decode images; 0 decodes in this one. Results do not depend on it.
        grad_checkpointing: Recompute activations in backward.
        resume: ``latest`` continues the run in ``out`` bit for bit.
        temperature: Start of the learnable temperature, 0.07 in HarMA whatever the checkpoint's was; None keeps the
            checkpoint's.
        margin: Of the adaptive triplet loss.
        gamma: Of the adaptive triplet loss.
        uniformity_weight: Of the uniformity of images and of texts, half each, which spreads a modality's features out.
        affiliation_weight: Of the affiliation loss, which draws a feature to the other modality's centre of its scene
            class; the training data must name the class of every image.
        drift_weight: Of the mean squared distance to the frozen model's features of the same inputs, images and texts
            half each; the paper's constraint on leaving that model, as a penalty. The frozen model is this one without
            its adapters, or for ``full`` a copy of the weights the run starts from.
        bottleneck: Of the adapters.
        num_heads: Of the adapters.
        share: As in :func:`rsfast.models.add_adapters`.
        skip_padding: As in :func:`rsfast.models.add_adapters`.
        augment: HarMA's augmentation; False resizes only.
        max_words: Longer captions are cut.
        device: Default: a GPU if there is one.
        strict: Stop at the first image that is missing or does not decode, or caption without words.
        save_every_steps: Checkpoint inside epochs too.
        log_every_n_steps: Lines of ``metrics.jsonl``.
        report_to: ``tensorboard`` insists on it, ``none`` turns it off, None uses it if it is installed.
        max_steps: Stop after this many steps in all, as if interrupted; the schedule is that of all epochs.
        eval_batch_size: Images or texts at once in evaluation.
    """

    out: str
    train_data: str | None = None
    val_data: str | None = None
    images: str | None = None
    model: str | dict | None = None
    pretrained: str | None = None
    method: Literal["harma", "full", "frozen"] = "harma"
    epochs: int = 10
    batch_size: int = 214
    lr: float = 4e-4
    wd: float = 0.04
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    warmup: float = 0.1
    seed: int = 3407
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    workers: int = 4
    grad_checkpointing: bool = False
    resume: Literal["latest"] | None = None
    temperature: float | None = 0.07
    margin: float = 0.2
    gamma: float = 2.0
    uniformity_weight: float = 0.0
    affiliation_weight: float = 0.0
    drift_weight: float = 0.0
    bottleneck: int = 128
    num_heads: int = 8
    share: Literal["both", "text"] | None = "both"
    skip_padding: bool = False
    augment: bool = True
    max_words: int = 30
    device: str | None = None
    strict: bool = False
    save_every_steps: int | None = None
    log_every_n_steps: int = 50
    report_to: Literal["tensorboard", "none"] | None = None
    max_steps: int | None = None
    eval_batch_size: int = 128
    csv_img_key: str = "filepath"
    csv_caption_key: str = "title"
    csv_separator: str | None = None
    csv_encoding: str | None = None

    def resolved(self) -> "TrainConfig":
        """The same with device and precision decided; raises ValueError naming the first setting that is wrong."""
        choices = {
            "method": ("harma", "full", "frozen"), "precision": (*PRECISIONS, None), "resume": ("latest", None),
            "report_to": ("tensorboard", "none", None), "share": ("both", "text", None),
        }  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {getattr(self, name)!r}")
        at_least = {
            "epochs": 1, "batch_size": 2, "workers": 0, "wd": 0, "gamma": 0, "bottleneck": 1, "num_heads": 1,
            "seed": 0, "max_words": 1, "save_every_steps": 1, "log_every_n_steps": 1, "max_steps": 1,
            "eval_batch_size": 1, "uniformity_weight": 0, "affiliation_weight": 0, "drift_weight": 0,
        }  # fmt: skip
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise ValueError(f"{name} must be {least} or more, got {value}")
        for name in ("lr", "eps", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0, got {value}")
        for name in ("beta1", "beta2", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to below 1, got {getattr(self, name)}")
        if not math.isfinite(self.margin):
            raise ValueError(f"margin must be finite, got {self.margin}")
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_device(device)
        precision = self.precision or ("bf16" if device.startswith("cuda") else "fp32")
        return dataclasses.replace(self, device=device, precision=precision)


def check_device(device: str) -> None:
    """Refuse a device that is not there."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device} was asked for, but torch sees no GPU")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # unknown to this build of torch, or not in this machine
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
