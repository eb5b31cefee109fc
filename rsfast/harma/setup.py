"""From settings to everything a run needs, checked before anything is written."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import torch
from torch import nn

from rsfast._files import write_json
from rsfast.harma import checkpoint
from rsfast.harma import model as models
from rsfast.harma.config import FREE, TrainConfig
from rsfast.harma.data import CaptionedImages, load_captions
from rsfast.harma.distributed import Processes
from rsfast.harma.loading import mixed_seed


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run that may begin.

    Attributes:
        state: Of the checkpoint to continue from.
        summary_writer: TensorBoard's class, or None.
    """

    config: TrainConfig
    run: Path
    model: nn.Module
    tokenizer: object
    train_data: CaptionedImages | None
    val_data: CaptionedImages | None
    steps_per_epoch: int
    warmup_steps: int
    state: dict | None
    summary_writer: type | None

    @property
    def left_out(self) -> dict[str, str]:
        """Captions without words."""
        return {
            k: why for data in (self.train_data, self.val_data) if data is not None for k, why in data.left_out.items()
        }


def prepare(
    config: TrainConfig,
    processes: Processes,
    train_data: CaptionedImages | None,
    val_data: CaptionedImages | None,
    model: nn.Module | None,
    tokenizer,
) -> Setup:
    """Read the data, make the model, claim the run folder."""
    run = Path(config.out)
    begun = (run / checkpoint.CONFIG).is_file()
    if config.resume is None and begun:
        raise FileExistsError(
            f"out: {run} holds a run already; --resume latest continues it, another --out starts anew"
        )
    if config.resume == "latest" and not begun:
        raise FileNotFoundError(f"resume: there is no run in {run}")
    summary_writer = _find_summary_writer(config.report_to) if processes.rank == 0 else None
    if train_data is None and config.method != "frozen":
        train_data = _read(config, "train_data", "train")
    if val_data is None and (config.val_data is not None or config.method == "frozen"):
        val_data = _read(config, "val_data", "val")
    for data in (train_data, val_data):
        if config.strict and data is not None:
            data.refuse_left_out()
    if config.affiliation_weight and config.method != "frozen":
        train_data.refuse_unlabelled()
    steps = _steps_per_epoch(config, train_data, processes.world)

    saved = checkpoint.read_config(run) if begun else None
    made = _make(config, model, tokenizer, saved)
    record = {
        "settings": dataclasses.asdict(config),
        "model": made.config,
        "name": made.name,
        "tag": made.tag,
        "processes": processes.world,
        "train_data": None if train_data is None else train_data.fingerprint(),
        "val_data": None if val_data is None else val_data.fingerprint(),
    }
    record = json.loads(json.dumps(record))  # as it will be read again
    if begun:
        _refuse_changes(saved, record, run)
    state = checkpoint.load_last(run) if begun and config.method != "frozen" else None
    base = None
    if not begun and made.tag is None:
        base = {name: t.detach().cpu().clone() for name, t in made.model.state_dict().items()}
    _make_trainable(made.model, config)
    made.model.to(processes.device)
    processes.wait()  # every process has looked into the folder
    if not begun and processes.rank == 0:
        run.mkdir(parents=True, exist_ok=True)
        if base is not None:
            checkpoint.save_tensors(base, run / checkpoint.BASE)
        write_json(run / checkpoint.CONFIG, record)
    warmup = math.ceil(config.warmup * config.epochs * steps)
    return Setup(
        config, run, made.model, made.tokenizer, train_data, val_data, steps, warmup, state, summary_writer
    )  # fmt: skip


def _read(config: TrainConfig, what: str, split: str) -> CaptionedImages:
    for name in (what, "images"):
        if getattr(config, name) is None:
            raise ValueError(f"{name} is needed: a {'caption file' if name == what else 'folder or zip'}")
    return load_captions(
        getattr(config, what), config.images, split=split, max_words=config.max_words,
        csv_img_key=config.csv_img_key, csv_caption_key=config.csv_caption_key,
        csv_separator=config.csv_separator, csv_encoding=config.csv_encoding,
    )  # fmt: skip


def _steps_per_epoch(config: TrainConfig, data: CaptionedImages | None, world: int) -> int:
    if config.method == "frozen":
        return 0
    steps = len(data.texts) // (config.batch_size * world)
    if steps == 0:
        raise ValueError(
            f"batch_size {config.batch_size} x {world} processes is more than the {len(data.texts)} captions of "
            f"{data.source}; only full batches are used"
        )
    return steps


def _make(config: TrainConfig, model: nn.Module | None, tokenizer, saved: dict | None) -> models.Model:
    """The model to start from, without adapters; a resumed run's comes from its own folder."""
    from_run = config.pretrained is not None and Path(config.pretrained).is_dir()
    if config.model is not None:
        model_config, name = models.read_config(config.model)
    elif from_run:
        model_config = name = None
    else:
        raise ValueError("model is needed: a name of open_clip or a config; only a run as pretrained brings its own")
    if model is not None:
        if model_config is None:
            raise ValueError("model: config.model must be the config of the model that is handed over")
        if saved is not None and saved["tag"] is None:
            models.load_weights(model, Path(config.out) / checkpoint.BASE)
        return models.Model(model, tokenizer or models.tokenizer(model_config, name), model_config, name, None)
    if saved is not None:
        made = checkpoint.base_model(config.out)
        return made if model_config is None else made._replace(config=model_config, name=name)
    if not from_run:
        return models.create(config.model, weights=config.pretrained, seed=config.seed)
    earlier = checkpoint.read_config(config.pretrained)
    if model_config is not None and model_config != earlier["model"]:
        raise ValueError(f"model: {config.model} is not the model of the run {config.pretrained}; leave it out")
    if earlier["settings"]["method"] != "harma":
        return checkpoint.load_run(config.pretrained)
    if config.method != "harma":
        raise NotImplementedError(
            f"pretrained: {config.pretrained} has adapters, and method {config.method} cannot start from those; "
            "rsfast harma eval measures the run as it is"
        )
    checkpoint.refuse_unfinished(config.pretrained)
    return checkpoint.base_model(config.pretrained)


def _make_trainable(model: nn.Module, config: TrainConfig) -> None:
    """Adapters, or all weights, or none; the temperature; training mode."""
    from rsfast.models import add_adapters, load_adapters

    model.requires_grad_(config.method == "full").train(config.method == "full")  # a frozen tower drops nothing
    if config.method == "harma":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mixed_seed(config.seed, 3))
            add_adapters(
                model, bottleneck=config.bottleneck, num_heads=config.num_heads, share=config.share,
                skip_padding=config.skip_padding,
            )  # fmt: skip
        earlier = Path(config.pretrained or "") / checkpoint.ADAPTERS
        if config.pretrained is not None and earlier.is_dir():
            load_adapters(model, earlier)
    if getattr(model, "logit_bias", None) is not None:
        model.logit_bias.requires_grad_(False)  # the losses have no use for it
    if config.temperature is not None and config.method != "frozen":
        model.logit_scale.data.fill_(math.log(1 / config.temperature))
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)


def _refuse_changes(saved: dict, now: dict, run: Path) -> None:
    """A resumed run must be the run it was."""
    before, after = ({**r["settings"], **{k: v for k, v in r.items() if k != "settings"}} for r in (saved, now))
    skip = (FREE - {"model", "train_data", "val_data"}) | {"tag"}  # those three are compared by content
    changed = [
        f"{name} was {before.get(name)!r}, now {after.get(name)!r}" if name != "model" else "model is another"
        for name in sorted(before.keys() | after.keys())
        if name not in skip and before.get(name) != after.get(name)
    ]
    if changed:
        raise ValueError(f"resume: {run} was begun with other settings: {'; '.join(changed)}")


def _find_summary_writer(report_to: str | None):
    """TensorBoard's writer, or None; complains where it was asked for and says so where it could be had."""
    if report_to == "none":
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        if report_to == "tensorboard":
            raise ValueError("report_to: tensorboard is not installed; pip install 'rsfast[tensorboard]'") from error
        print(
            "TensorBoard is not installed (pip install 'rsfast[tensorboard]'); metrics.jsonl is written",
            file=sys.stderr,
        )
        return None
    return SummaryWriter
