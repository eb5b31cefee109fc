"""The authors' probe: one linear layer by SGD."""

import torch
from torch import nn
from tqdm import tqdm

from rsfast.deblora.learning.losses import Loss, class_loss
from rsfast.deblora.learning.steps import Run
from rsfast.deblora.probes.probe import LinearProbe, given, macro_f1
from rsfast.harma.loading import mixed_seed


def linear_probe(
    features, labels, *, n_classes: int | None = None, val: tuple | None = None, loss: Loss = "ce", tau: float = 1.0,
    epochs: int = 30, batch_size: int = 512, lr: float = 1e-3, momentum: float = 0.9, seed: int = 0,
    device: torch.device | str | None = None, progress: bool = False,
) -> LinearProbe:  # fmt: skip
    """The debLoRA authors' probe: one linear layer trained by SGD.

    Source: debLoRA's released code: cross-entropy, SGD with momentum 0.9 at a constant rate of 1e-3, batches of 512, 30
    epochs. Differs from upstream: the epoch is chosen on ``val``, never on the rows that are reported. The few
    steps that 30 epochs of a small set have leave the layer far from a minimum; raise ``epochs`` or ``lr`` there, or
    take :func:`logistic_probe`.

    Args:
        features: ``(N, D)`` array, tensor or store.
        labels: ``(N,)`` integers, 0 to C - 1.
        n_classes: C; None: one more than the highest label.
        val: Features and labels; the epoch of the best macro F1 on them is kept (the first of equals), else the last.
        loss: As in :func:`class_loss`, with the counts of ``labels``.
        tau: Of logit adjustment.
        epochs: Passes over the rows.
        batch_size: Rows a step.
        lr: Learning rate.
        momentum: Of SGD.
        seed: Of the layer's start and the order of rows. The caller's random state stays as it was.
        device: Where it is trained; None: where the features are.
        progress: Show a bar.

    Raises:
        TypeError: ``features`` is no array, tensor or store.
        ValueError: A setting, a label or a length does not fit, or a value is not finite; the row is named.

    Deterministic: for a seed, on a CPU.

    Example:
        >>> import torch
        >>> from rsfast.deblora import linear_probe
        >>> z = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
        >>> linear_probe(z, torch.tensor([0, 1]), epochs=500).predict(z)
        tensor([0, 1])
    """
    inputs, labels, val, n_classes, device = given(features, labels, n_classes, val, loss, device)
    Run(epochs, batch_size, lr, seed=seed)
    head = nn.Linear(inputs.dim, n_classes)
    generator = torch.Generator().manual_seed(mixed_seed(seed, 0))
    with torch.no_grad():
        for p in head.parameters():
            p.uniform_(-(inputs.dim**-0.5), inputs.dim**-0.5, generator=generator)  # as nn.Linear starts
    head.to(device)
    counts = torch.bincount(labels, minlength=n_classes)
    measure, known = class_loss(loss, counts, tau=tau).to(device), (counts > 0).to(device)
    optimizer = torch.optim.SGD(head.parameters(), lr=lr, momentum=momentum)
    where, best = labels.to(device), None
    for epoch in tqdm(range(epochs), unit="epoch", disable=not progress):
        order = torch.randperm(len(inputs), generator=generator).split(batch_size)
        for x, rows in zip(inputs.batches(order, device), order, strict=True):
            optimizer.zero_grad(set_to_none=True)
            measure(head(x.float()), where[rows.to(device)]).backward()
            optimizer.step()
        if not head.weight.isfinite().all():
            raise ValueError(f"the weights of the probe are not finite in epoch {epoch + 1}; a lower lr may help")
        bias = torch.where(known, head.bias.detach(), -torch.inf)
        probe = LinearProbe(head.weight.detach(), bias, {"epoch": epoch + 1})
        if val is not None:
            probe.chosen["val_f1"] = macro_f1(val[1], probe.guess(val[0]), n_classes)
        if best is None or val is None or probe.chosen["val_f1"] > best.chosen["val_f1"]:
            best = LinearProbe(probe.weight.clone(), probe.bias.clone(), probe.chosen)
    return best
