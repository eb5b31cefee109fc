"""Learning an adapter: towards calibrated features, or by the classes; and encoding with what was learned."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rsfast.deblora.arrays import as_integers
from rsfast.deblora.learning.inputs import FeatureInputs, as_inputs
from rsfast.deblora.learning.losses import Loss, check_loss, class_loss
from rsfast.deblora.learning.steps import Run, evaluating, settings, train


def learn_towards(
    encoder: nn.Module, inputs, targets, *, weights=None, epochs: int = 30, batch_size: int = 128, lr: float = 1e-3,
    weight_decay: float = 1e-2, squared: bool = False, seed: int = 0, device: torch.device | str | None = None,
    precision: str = "fp32", progress: bool = False, checkpoint: str | Path | None = None,
) -> list[float]:  # fmt: skip
    r"""Train an encoder so that it gives the calibrated features, debLoRA's last stage.

    .. math:: \min_\phi \frac{1}{N} \sum_i \lVert g_\phi(f_\theta(x_i)) - \tilde z_i \rVert_2

    Source: debLoRA (NeurIPS 2024, OpenReview mwN1bbD5DQ), the authors' slides, equation 4. Their released code has no
    such training. The norm is not squared there; at distance 0, where every row of a head class starts, its
    gradient is taken as 0.

    AdamW with a cosine learning rate over all steps, no warm-up. What requires a gradient is trained: the parameters of
    a :class:`LowRankMap`, or the LoRA that :func:`rsfast.models.add_lora` put into a backbone. A module without such
    parameters of its own is in evaluation mode meanwhile, so that a frozen backbone keeps its statistics.

    Args:
        encoder: Module whose output for a batch of ``inputs`` is ``(B, D)``.
        inputs: :class:`FeatureInputs`, :class:`ImageInputs`, or features ``(N, D')`` themselves.
        targets: ``(N, D)`` features, row i for input i.
        weights: ``(N,)`` how much each row counts, at least 0; scaled to a mean of 1. None: all the same, as in the
            paper, where rows of head classes, whose targets are the features they start with, can outweigh the tail.
        epochs: Passes over the inputs.
        batch_size: Rows a step; the last step of an epoch takes what is left.
        lr: Peak learning rate.
        weight_decay: AdamW's.
        squared: Minimise the mean of squared distances instead.
        seed: Of the order of rows and of what is drawn while training. The caller's random state stays as it was.
        device: Where the encoder is moved and trained; None: where it is.
        precision: ``fp32``, or ``bf16`` by autocast; distances are in fp32 (fp64 of such targets). Inputs of another
            dtype than the encoder's parameters are cast to it; 16-bit features come as fp32.
        progress: Show a bar.
        checkpoint: File written after each epoch, from which the same call continues, bit for bit on a CPU.

    Returns:
        Mean distance (squared if so asked) of each epoch, over its rows as they were seen.

    Raises:
        TypeError: ``inputs`` or ``targets`` is no array, tensor or store.
        ValueError: Lengths or widths differ, a value is not finite (the row is named), a setting does not fit, nothing
            requires a gradient, or the checkpoint is damaged or of other settings or data; nothing was changed then. Or
            the loss is not finite any more.

    Deterministic: for a seed, on a CPU.

    Example:
        >>> import torch
        >>> from rsfast.deblora import LowRankMap, learn_towards
        >>> z = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
        >>> losses = learn_towards(LowRankMap(8, r=2), z, z + 1, epochs=3, batch_size=8)
        >>> len(losses), losses[-1] < losses[0]
        (3, True)
    """
    run = Run(epochs, batch_size, lr, weight_decay, seed, device, precision, progress, checkpoint)
    inputs, goal = as_inputs(inputs), FeatureInputs(targets, "targets")
    if len(goal) != len(inputs):
        raise ValueError(f"targets must be {len(inputs)} rows, one for each input, got {len(goal)}")
    inputs.check()
    goal.check()
    share = None if weights is None else _shares(weights, len(inputs))
    modules = nn.ModuleList([encoder])

    def loss_of(x: Tensor, indices: Tensor) -> Tensor:
        aim = goal.batch(indices, x.device)
        with run.autocast(x.device):
            found = _features(encoder, x)
        if found.shape != aim.shape:
            raise ValueError(f"encoder must give features of width {goal.dim} as targets have, got {found.shape[1]}")
        difference = found.to(aim.dtype) - aim
        # the gradient of the norm at 0 is 0
        far = difference.square().sum(1) if squared else torch.linalg.vector_norm(difference, dim=1)
        return far.mean() if share is None else (far * share[indices].to(far)).mean()

    what = settings(run, inputs, modules, task="towards", squared=squared, data=goal, adjusted=[share])
    return train(modules, inputs, loss_of, run, what)


def learn_classes(
    encoder: nn.Module, head: nn.Module | None, inputs, labels, *, loss: Loss = "ce", counts=None, tau: float = 1.0,
    epochs: int = 30, batch_size: int = 128, lr: float = 1e-3, weight_decay: float = 1e-2, seed: int = 0,
    device: torch.device | str | None = None, precision: str = "fp32", progress: bool = False,
    checkpoint: str | Path | None = None,
) -> list[float]:  # fmt: skip
    """Train an encoder and the head on it to tell the classes: the plain LoRA, cLoRA and fine-tuning.

    Training itself, the arguments that are not here and the errors are those of :func:`learn_towards`.

    Args:
        encoder: Module whose output for a batch of ``inputs`` is ``(B, D)``.
        head: Features to logits ``(B, C)``, e.g. ``nn.Linear(D, C)``; trained too where it requires gradients; it gets
            features in the dtype of its parameters. None: ``encoder.logits(batch)`` gives them, as :class:`ClassMaps`
            does.
        labels: ``(N,)`` integers, 0 to C - 1.
        loss: ``ce``, ``reweight`` or ``logit-adjust``, see :func:`class_loss`.
        counts: Rows of each class, for the loss; None: those of ``labels``.
        tau: Of logit adjustment.

    Returns:
        Mean loss of each epoch.

    Example:
        >>> import torch
        >>> from rsfast.deblora import LowRankMap, learn_classes
        >>> z = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
        >>> losses = learn_classes(LowRankMap(8, r=2), torch.nn.Linear(8, 2), z, z[:, 0] > 0, epochs=2, batch_size=8)
        Traceback (most recent call last):
        ValueError: labels must be integers, got torch.bool
        >>> labels = (z[:, 0] > 0).long()
        >>> losses = learn_classes(LowRankMap(8, r=2), torch.nn.Linear(8, 2), z, labels, epochs=2, batch_size=8)
        >>> losses[1] < losses[0]
        True
    """
    run = Run(epochs, batch_size, lr, weight_decay, seed, device, precision, progress, checkpoint)
    check_loss(loss)
    if head is None and not callable(getattr(encoder, "logits", None)):
        raise ValueError(f"head must be given, because a {type(encoder).__name__} has no logits of its own")
    inputs = as_inputs(inputs)
    inputs.check()
    modules = nn.ModuleList([encoder] if head is None else [encoder, head])

    def logits_of(x: Tensor) -> Tensor:
        with run.autocast(x.device):
            return encoder.logits(_as_in(encoder, x)) if head is None else head(_as_in(head, _features(encoder, x)))

    with evaluating(modules), torch.no_grad():
        classes = logits_of(inputs.batch([0], run.start(modules))).shape[1]
    labels = as_integers(labels, "labels", len(inputs), most=classes - 1).cpu()
    counts = torch.bincount(labels, minlength=classes) if counts is None else counts
    measure = class_loss(loss, counts, tau=tau)
    what = settings(
        run,
        inputs,
        modules,
        task="classes",
        loss=loss,
        tau=tau,
        data=labels,
        adjusted=[measure.weight, measure.adjustment],
    )

    def loss_of(x: Tensor, indices: Tensor) -> Tensor:
        return measure.to(x.device)(logits_of(x), labels[indices].to(x.device))

    return train(modules, inputs, loss_of, run, what)


@torch.no_grad()
def encode(
    encoder: nn.Module, inputs, *, batch_size: int = 1024, device: torch.device | str | None = None,
    precision: str = "fp32", progress: bool = False,
) -> np.ndarray:  # fmt: skip
    """The features that an encoder gives, in evaluation mode.

    Args:
        encoder: Module whose output for a batch of ``inputs`` is ``(B, D)``; left in the mode it is in.
        inputs: As in :func:`learn_towards`.
        batch_size: Rows at a time.
        device: Where the encoder is moved; None: where it is.
        precision: ``fp32``, ``bf16`` or ``fp16``; inputs are cast as in :func:`learn_towards`.
        progress: Show a bar.

    Returns:
        ``(N, D)`` fp32, on the CPU.

    Raises:
        ValueError: A setting does not fit, or the encoder does not give ``(B, D)``.

    Example:
        >>> import torch
        >>> from rsfast.deblora import LowRankMap, encode
        >>> encode(LowRankMap(8, r=2), torch.ones(3, 8)).shape
        (3, 8)
    """
    from tqdm import tqdm

    run = Run(batch_size=batch_size, device=device, precision=precision, scaled=False)
    inputs, modules = as_inputs(inputs), nn.ModuleList([encoder])
    device = run.device_of(modules)
    modules.to(device)
    done, features = 0, None
    with evaluating(modules), tqdm(total=len(inputs), unit="row", disable=not progress) as bar:
        for x in inputs.batches(torch.arange(len(inputs)).split(batch_size), device):
            with run.autocast(device):
                found = _features(encoder, x)
            if features is None:
                features = np.empty((len(inputs), found.shape[1]), np.float32)
            features[done : done + len(found)] = found.float().cpu().numpy()
            done += len(found)
            bar.update(len(found))
    return features


def _shares(weights, count: int) -> Tensor:
    """Weights of rows with a mean of 1, fp32."""
    found = torch.as_tensor(weights).detach().cpu().double()
    if found.shape != (count,):
        raise ValueError(f"weights must be ({count},), one for each input, got {tuple(found.shape)}")
    wrong = (~(found.isfinite() & (found >= 0))).nonzero()
    if len(wrong) or not found.any():
        raise ValueError(
            f"weights must be finite, at least 0 and not all 0; that of row {int(wrong[0])} is {found[wrong[0]].item()}"
            if len(wrong)
            else "weights must not all be 0"
        )
    return (found / found.mean()).float()


def _as_in(module: nn.Module, x: Tensor) -> Tensor:
    """``x`` in the dtype of the module's parameters; as it is where one of them has its dtype, or none has any."""
    kinds = [p.dtype for p in module.parameters() if p.is_floating_point()]
    return x if not kinds or x.dtype in kinds or not x.is_floating_point() else x.to(kinds[0])


def _features(encoder: nn.Module, x: Tensor) -> Tensor:
    found = encoder(_as_in(encoder, x))
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(x):
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"encoder must give features (B, D), one row for each of the {len(x)} inputs, got {got}")
    return found
