"""The training loop: AdamW over what requires a gradient, a cosine learning rate, checkpoints at the ends of epochs."""

import contextlib
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rsfast._files import load_state, replace
from rsfast.harma.config import PRECISIONS
from rsfast.harma.loading import mixed_seed, seed_generators

KEYS = {"settings", "epoch", "weights", "optimizer", "losses"}  # what a checkpoint holds


class DivergedError(ValueError):
    """A loss that is not finite any more, ``loss`` in ``epoch``, counted from 1."""

    def __init__(self, loss: float, epoch: int, kept: Path | None):
        more = f" The checkpoint {kept} is of the epoch before." if kept is not None and epoch > 1 else ""
        super().__init__(f"the loss is {loss} in epoch {epoch}; a lower lr may help.{more}")
        self.loss, self.epoch = loss, epoch


@dataclass(frozen=True)
class Run:
    """Settings of one training, or of one encoding, which scales no gradients and so may be in fp16."""

    epochs: int = 1
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.0
    seed: int = 0
    device: torch.device | str | None = None
    precision: str = "fp32"
    progress: bool = False
    checkpoint: str | Path | None = None
    scaled: bool = True

    def __post_init__(self):
        for name, least in (("epochs", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        for name, fits, wanted in (
            ("lr", lambda v: v > 0, "above 0"),
            ("weight_decay", lambda v: v >= 0, "of 0 or more"),
        ):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value) or not fits(value):
                raise ValueError(f"{name} must be a number {wanted}, got {value!r}")
        allowed = ("fp32", "bf16") if self.scaled else tuple(PRECISIONS)
        if self.precision not in allowed:
            raise ValueError(f"precision must be one of {', '.join(allowed)}; got {self.precision!r}")
        if self.checkpoint is not None and not Path(self.checkpoint).absolute().parent.is_dir():
            raise FileNotFoundError(f"checkpoint: there is no folder {Path(self.checkpoint).absolute().parent}")

    def device_of(self, modules: nn.Module) -> torch.device:
        return self.current_device(modules) if self.device is None else torch.device(self.device)

    def current_device(self, modules: nn.Module) -> torch.device:
        return next((p.device for p in modules.parameters()), torch.device("cpu"))

    def start(self, modules: nn.Module) -> torch.device:
        """Where a first batch can be tried: where the modules are; those of several places are moved for it."""
        if len({p.device for p in modules.parameters()}) > 1:
            modules.to(self.device_of(modules))
        return self.current_device(modules)

    def autocast(self, device: torch.device):
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(device.type, PRECISIONS[self.precision])


def train(modules: nn.Module, inputs, loss_of: Callable[[Tensor, Tensor], Tensor], run: Run, what: dict) -> list[float]:
    """Mean loss of each epoch; ``loss_of(batch, indices)`` is the mean over a batch's rows, on the batch's device.

    The first batch is on the device that the modules come on, the others on the one that they are trained on.
    """
    device = run.device_of(modules)
    learned = [p for p in modules.parameters() if p.requires_grad]
    if not learned:
        raise ValueError(
            "nothing of encoder requires a gradient; give it LoRA by rsfast.models.add_lora, or take a map"
        )
    for name, p in modules.named_parameters():
        if p.requires_grad and p.dtype == torch.float16:
            part, _, name = name.partition(".")
            raise ValueError(
                f"{('encoder', 'head')[int(part)]}: what is trained must be fp32, bf16 or fp64, as gradients are not "
                f"scaled; {name} is fp16"
            )
    path = None if run.checkpoint is None else Path(run.checkpoint)
    state = _load(path, what) if path is not None and path.exists() else None
    with evaluating(modules), torch.no_grad():  # what does not fit shows before anything is changed
        loss_of(inputs.batch([0], run.start(modules)), torch.tensor([0]))
    modules.to(device)
    optimizer = torch.optim.AdamW(learned, lr=run.lr, weight_decay=run.weight_decay)
    losses: list[float] = []
    if state is not None:
        _restore(modules, optimizer, state)
        losses = list(state["losses"])
    steps = math.ceil(len(inputs) / run.batch_size)
    forked = [device] if device.type == "cuda" else []
    bar = tqdm(total=run.epochs * steps, initial=len(losses) * steps, unit="step", disable=not run.progress)
    with bar, _training(modules), torch.random.fork_rng(devices=forked):
        for epoch in range(len(losses), run.epochs):
            seed_generators(mixed_seed(run.seed, epoch, 0), device)  # order and dropout do not know of resuming
            order = inputs.order().split(run.batch_size)
            total = torch.zeros((), dtype=torch.float64, device=device)
            batches = inputs.batches(order, device, seed=mixed_seed(run.seed, epoch, 1))
            for step, (x, rows) in enumerate(zip(batches, order, strict=True)):
                for group in optimizer.param_groups:
                    group["lr"] = cosine(epoch * steps + step, lr=run.lr, total=run.epochs * steps)
                loss = loss_of(x, rows)
                if device.type == "cpu" and not loss.isfinite():  # where it costs nothing to look
                    raise DivergedError(loss.item(), epoch + 1, path)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total += loss.detach() * len(rows)
                bar.update()
            losses.append(total.item() / len(inputs))
            if not math.isfinite(losses[-1]):
                raise DivergedError(losses[-1], epoch + 1, path)
            bar.set_postfix(loss=f"{losses[-1]:.4g}")
            if path is not None:
                _save(path, {"settings": what, "epoch": epoch + 1, "losses": losses, "weights": _weights(modules),
                             "optimizer": optimizer.state_dict()})  # fmt: skip
    return losses


def cosine(step: int, *, lr: float, total: int) -> float:
    """Learning rate of step ``step``, counted from 0: from ``lr`` down to 0 after the last."""
    return lr * 0.5 * (1 + math.cos(math.pi * step / total))


def settings(run: Run, inputs, modules: nn.Module, *, data, adjusted=(), **more) -> dict:
    """What a checkpoint must agree with; empty where none is kept."""
    if run.checkpoint is None:
        return {}
    names = sorted((name, tuple(p.shape)) for name, p in modules.named_parameters() if p.requires_grad)
    own = {"epochs": run.epochs, "batch_size": run.batch_size, "lr": run.lr, "weight_decay": run.weight_decay,
           "seed": run.seed, "precision": run.precision}  # fmt: skip
    found = {"inputs": inputs.digest(), "targets": data.digest() if hasattr(data, "digest") else _digest(data)}
    found["parameters"] = _digest(names)
    if adjusted:
        more["counts"] = _digest([None if t is None else t.tolist() for t in adjusted])
    return own | more | found


def _digest(thing) -> str:
    thing = thing.tolist() if isinstance(thing, Tensor) else thing
    return hashlib.blake2b(repr(thing).encode()).hexdigest()


def _weights(modules: nn.Module) -> dict[str, Tensor]:
    """All that training changes: parameters, and the buffers beside them."""
    kept = {name: p for name, p in modules.named_parameters() if p.requires_grad}
    for path, module in modules.named_modules():
        if _learns(module):
            kept |= {f"{path}.{name}": b for name, b in module.named_buffers(recurse=False)}
    return {name: t.detach() for name, t in kept.items()}


def _save(path: Path, state: dict) -> None:
    replace(path, lambda temporary: torch.save(state, temporary))


def _load(path: Path, what: dict) -> dict:
    state = load_state(path, KEYS, "checkpoint")
    other = [name for name in what.keys() | state["settings"].keys() if what.get(name) != state["settings"].get(name)]
    if other:
        raise ValueError(
            f"checkpoint: {path} is of another training, which differs in {', '.join(sorted(other))}; "
            "remove it, or name another file"
        )
    return state


@torch.no_grad()
def _restore(modules: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    for name, tensor in _weights(modules).items():
        tensor.copy_(state["weights"][name])
    optimizer.load_state_dict(state["optimizer"])


def _learns(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=False))


@contextlib.contextmanager
def evaluating(modules: nn.Module):
    """Evaluation mode, and back to what was."""
    before = {module: module.training for module in modules.modules()}
    modules.eval()
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


@contextlib.contextmanager
def _training(modules: nn.Module):
    """Training mode where something is trained, evaluation mode elsewhere: frozen statistics stay as they are."""
    with evaluating(modules):
        for module in modules.modules():
            module.training = _learns(module)
        yield
