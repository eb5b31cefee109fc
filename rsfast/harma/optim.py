"""HarMA's optimiser and learning rate."""

from torch import nn
from torch.optim import AdamW


def adamw(model: nn.Module, *, lr: float, wd: float, betas: tuple[float, float], eps: float) -> AdamW:
    """AdamW over what requires a gradient; no decay for names with "bias", decay for gates and the temperature too.

    Upstream: HarMA ``optim.py``. Differs from upstream: PyTorch's AdamW decays before the step, that of transformers
    after it, which is a difference of second order in ``lr``.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if "bias" not in name], "weight_decay": wd},
        {"params": [p for name, p in named if "bias" in name], "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=lr, betas=betas, eps=eps)


def learning_rate(step: int, *, lr: float, warmup_steps: int, total_steps: int) -> float:
    """Rate of step ``step``, counted from 0: up in a line over the warm-up, then down in a line to 0 after the last.

    Differs from upstream: the first step has lr / warmup_steps, upstream's has 0 and so does nothing.

    Example:
        >>> from rsfast.harma.optim import learning_rate
        >>> [learning_rate(step, lr=1.0, warmup_steps=2, total_steps=6) for step in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    return lr * (total_steps - step) / max(1, total_steps - warmup_steps)
