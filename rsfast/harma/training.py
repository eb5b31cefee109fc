"""HarMA's training: adapters, or everything, on image-caption pairs."""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rsfast.harma import checkpoint
from rsfast.harma.config import PRECISIONS, TrainConfig
from rsfast.harma.data import CaptionedImages
from rsfast.harma.distributed import Processes
from rsfast.harma.evaluation import Evaluation, evaluate
from rsfast.harma.loading import TrainBatches, TrainCollate, TrainPairs, loader, mixed_seed, seed_generators
from rsfast.harma.log import Log
from rsfast.harma.model import image_settings
from rsfast.harma.objective import FrozenTowers, Objective, Towers
from rsfast.harma.optim import adamw, learning_rate
from rsfast.harma.setup import Setup, prepare


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What :func:`train` did.

    Attributes:
        out: The run folder.
        model: The model with its last weights; :func:`load_run` gives the best.
        tokenizer: Its tokenizer.
        best: Epoch and validation metrics of the best epoch, None if none is finished.
        steps: Optimiser steps done in all.
        trainable_parameters: How many numbers were trained.
        stopped: None, or why training ended early: ``max_steps``, ``SIGINT`` or ``SIGTERM``.
        broken: Reasons by name of the images and captions that could not be used.
    """

    out: Path
    model: nn.Module
    tokenizer: object
    best: dict | None
    steps: int
    trainable_parameters: int
    stopped: str | None
    broken: dict[str, str]


def train(
    config: TrainConfig,
    *,
    train_data: CaptionedImages | None = None,
    val_data: CaptionedImages | None = None,
    model: nn.Module | None = None,
    tokenizer=None,
    progress: bool = True,
) -> TrainResult:
    """Train by ``config``; see :class:`TrainConfig`.

    Source: HarMA, arXiv 2404.18253; upstream ``Retrieval.py``. Differs from upstream: the best epoch is chosen on the
    validation data, never on the test data; the same seed gives the same bits; the learnable temperature is
    open_clip's ``logit_scale``, the logarithm of its inverse. Uniformity and drift, which the paper has and the code
    has not, are reported; their weights, and that of the affiliation loss, make them part of the loss.

    Args:
        config: Settings.
        train_data: Instead of ``config.train_data``.
        val_data: Instead of ``config.val_data``; without either, the last epoch is the best.
        model: An open_clip model without adapters to start from, instead of one made by ``config.model`` and
            ``config.pretrained``; ``config.model`` must be its config. It is trained in place.
        tokenizer: Of ``model``; default the one that goes with ``config.model``.
        progress: Show bars.

    Raises:
        FileNotFoundError, ValueError: Before anything is written: a setting, a file or the data does not fit. While
            training: an image is broken and ``strict``, or the loss is not finite; the last checkpoint is kept.
        FileExistsError: ``config.out`` holds a run already, and ``resume`` is not asked for.
    """
    config = config.resolved()
    processes = Processes(config.device)
    try:
        setup = prepare(config, processes, train_data, val_data, model, tokenizer)
        return Trainer(setup, processes, progress and processes.rank == 0).run()
    finally:
        processes.close()


class Trainer:
    """The loop, and what it carries from step to step."""

    def __init__(self, setup: Setup, processes: Processes, progress: bool):
        self.config, self.setup, self.processes, self.progress = setup.config, setup, processes, progress
        self.model, self.device = setup.model, processes.device
        self.named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        towers = Towers(self.model)
        self.towers = processes.wrap(towers)
        self.step, self.best, self.broken = 0, None, dict(setup.left_out)
        self.signal, self.last_loss = None, None
        if not self.named:
            return
        c = self.config
        self.frozen, self.objective = FrozenTowers(towers, c), Objective(c)  # frozen before any step, done or restored
        self.optimizer = adamw(self.model, lr=c.lr, wd=c.wd, betas=(c.beta1, c.beta2), eps=c.eps)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=c.precision == "fp16")
        if setup.state is not None:
            self._restore(setup.state)

    def run(self) -> TrainResult:
        stopped = None
        with Log(self.setup, self.step, on=self.processes.rank == 0) as log:
            if not self.named:
                self._finish_epoch(0, log)
            else:
                with self._signals(), _deterministic(), torch.random.fork_rng(self._gpus()):
                    stopped = self._loop(log)
            if self.broken:
                log.write({"step": self.step, "broken": self.broken})
        trainable = sum(p.numel() for p in self.named.values())
        return TrainResult(
            self.setup.run, self.model, self.setup.tokenizer, self.best, self.step, trainable, stopped, self.broken
        )

    def _loop(self, log: Log) -> str | None:
        c, per_epoch = self.config, self.setup.steps_per_epoch
        total = c.epochs * per_epoch
        batches = self._batches(range(self.step, total))
        if self.step == 0:
            self._save()  # from here on there is something to resume
        bar, waited, since, rows = None, 0.0, time.perf_counter(), 0
        for step in range(self.step, total):
            if bar is None:
                epoch = step // per_epoch
                bar = tqdm(
                    total=per_epoch, initial=step % per_epoch, desc=f"epoch {epoch + 1}/{c.epochs}", unit="step",
                    disable=not self.progress,
                )  # fmt: skip
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            end_of_epoch = (step + 1) % per_epoch == 0
            report = (step + 1) % c.log_every_n_steps == 0 or end_of_epoch
            with _one_attention():
                found = self._step(step, batch, report)
            rows += c.batch_size * self.processes.world
            self.step = step + 1
            bar.update()
            if report:
                values = {name: value.item() for name, value in found.items()}
                now = time.perf_counter()
                speed = {"samples_per_second": rows / (now - since), "data_wait": waited / (now - since)}
                waited, since, rows = 0.0, now, 0
                bar.set_postfix_str(
                    f"loss {values['loss']:.3f}, {speed['samples_per_second']:.0f} samples/s, "
                    f"waiting for data {speed['data_wait']:.0%}"
                )
                self._check_finite()
                rate, temperature = self.optimizer.param_groups[0]["lr"], (-self.model.logit_scale).exp().item()
                log.write(
                    {"step": self.step, "epoch": epoch + 1, **values, "lr": rate, "temperature": temperature, **speed}
                )
            if end_of_epoch:
                bar.close()
                bar = None
                self._finish_epoch(epoch + 1, log)
                since, waited, rows = time.perf_counter(), 0.0, 0
            stop = self._stop()
            if end_of_epoch or stop or (c.save_every_steps and self.step % c.save_every_steps == 0):
                self._check_finite()
                self._save()
            if stop and self.step < total:
                if bar is not None:
                    bar.close()
                return stop
        return None

    def _step(self, step: int, batch, report: bool) -> dict[str, Tensor]:
        images, tokens, ids, labels, broken = batch
        self._note_broken(broken, images)
        c, gather = self.config, self.processes.gather
        images, tokens, ids, labels = (t.to(self.device, non_blocking=True) for t in (images, tokens, ids, labels))
        frozen = None
        if c.drift_weight or report:  # first, while no activations are held
            with self._autocast():
                frozen = self.frozen(images, tokens)
            frozen = [gather(x) for x in frozen]
        # what a model draws does not know of resuming
        seed_generators(mixed_seed(c.seed, step, 2, self.processes.rank), self.device)
        with self._autocast():
            image_features, text_features, logit_scale = self.towers(images, tokens)
        if logit_scale.device.type == "cpu" and not 0 < logit_scale.item() < math.inf:  # where it costs nothing to look
            raise ValueError(self._diverged(f"1 / temperature is {logit_scale.item()}", step + 1))
        loss, found = self.objective(
            gather(image_features), gather(text_features), logit_scale, image_ids=gather(ids),
            labels=gather(labels) if c.affiliation_weight else None, frozen=frozen, report=report,
        )  # fmt: skip
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(
                step, lr=c.lr, warmup_steps=self.setup.warmup_steps, total_steps=c.epochs * self.setup.steps_per_epoch
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.last_loss = found["loss"]
        return found

    def _autocast(self) -> torch.autocast:
        precision = self.config.precision
        return torch.autocast(self.device.type, PRECISIONS[precision], enabled=precision != "fp32")

    def _finish_epoch(self, epoch: int, log: Log) -> None:
        """Measure on the validation data; keep the weights if they are the best so far."""
        if self.processes.rank == 0:
            record = {"step": self.step, "epoch": epoch}
            if self.setup.val_data is not None:
                found = self._evaluate()
                self.broken |= found.broken
                record |= {f"val_{name}": value for name, value in found.metrics.items()}
                log.write(record)
            if self.best is None or record.get("val_r_mean", math.inf) > self.best.get("val_r_mean", -math.inf):
                self.best = record
                checkpoint.save_best(self.setup.run, self.model, self.config.method, record)
        self.processes.wait()

    def _evaluate(self) -> Evaluation:
        c = self.config
        return evaluate(
            self.model, self.setup.tokenizer, self.setup.val_data, device=self.device, precision=c.precision,
            batch_size=c.eval_batch_size, workers=c.workers, strict=c.strict, progress=self.progress,
        )  # fmt: skip

    def _batches(self, steps: range):
        from rsfast.harma.transforms import train_transform  # torchvision takes its time to import

        c, data = self.config, self.setup.train_data
        transform = train_transform(**image_settings(self.model), augment=c.augment)
        batches = TrainBatches(
            len(data.texts),
            c.batch_size,
            steps=steps,
            seed=c.seed,
            rank=self.processes.rank,
            world=self.processes.world,
        )
        return iter(
            loader(
                TrainPairs(data, transform, seed=c.seed),
                workers=c.workers,
                pin_memory=self.device.type == "cuda",
                batch_sampler=batches,
                collate_fn=TrainCollate(self.setup.tokenizer),
            )  # fmt: skip
        )

    def _note_broken(self, broken: dict[int, str], images: Tensor | None) -> None:
        data = self.setup.train_data
        named = {data.name(number): reason for number, reason in broken.items()}
        if named and self.config.strict:
            raise ValueError("an image cannot be used: {}: {}".format(*next(iter(named.items()))))
        if images is None:
            raise ValueError(
                f"{len(named)} images in a row of {data.source} cannot be used, e.g. {{}}: {{}}".format(
                    *next(iter(named.items()))
                )
            )
        self.broken |= named

    def _check_finite(self) -> None:
        if not self.last_loss.isfinite():
            raise ValueError(self._diverged(f"the loss is {self.last_loss.item()}", self.step))

    def _diverged(self, what: str, step: int) -> str:
        return (
            f"{what} at step {step}; a lower lr or another precision may help. "
            f"The checkpoint of before is kept in {self.setup.run}"
        )

    def _save(self) -> None:
        if self.processes.rank == 0:
            checkpoint.save_last(
                self.setup.run,
                {
                    "step": self.step,
                    "weights": {name: p.detach() for name, p in self.named.items()},
                    "optimizer": self.optimizer.state_dict(),
                    "scaler": self.scaler.state_dict(),
                    "best": self.best,
                    "broken": self.broken,
                },
            )

    @torch.no_grad()
    def _restore(self, state: dict) -> None:
        if state["weights"].keys() != self.named.keys():
            raise ValueError(f"resume: the checkpoint in {self.setup.run} is of another model")
        for name, p in self.named.items():
            p.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.best, self.broken = state["step"], state["best"], state["broken"]

    def _stop(self) -> str | None:
        if self.step == self.config.max_steps:
            return "max_steps"
        return (self.signal or "a signal to another process") if self.processes.any(self.signal is not None) else None

    def _gpus(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []

    @contextlib.contextmanager
    def _signals(self):
        """Ctrl-C and SIGTERM end training after the step that is running; a second Ctrl-C ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number, frame):
            self.signal = signal.Signals(number).name
            signal.signal(signal.SIGINT, signal.default_int_handler)

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _one_attention():
    """PyTorch has other attention for inputs without gradients, which rounds otherwise: drift would not start at 0."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _deterministic():
    """Bit-equal resuming needs deterministic kernels; where PyTorch has none, it warns."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        False,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill
