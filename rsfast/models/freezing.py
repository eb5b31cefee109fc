"""What of a model was trainable before adapters or LoRA were put in, whatever leaves first."""

from torch import nn

STATES = ("_rsfast_adapters", "_rsfast_lora")  # attributes of a model, each with a dict ``requires_grad``


def give_back(model: nn.Module, name: str) -> None:
    """Put ``requires_grad`` back as it was before what the attribute ``name`` describes, which is about to go.

    If the other of ``STATES`` came later, what is trainable is its to say, and its to put back.
    """
    mine = getattr(model, name).requires_grad
    for other in (getattr(model, other, None) for other in STATES if other != name):
        if other is not None and other.requires_grad.keys() > mine.keys():
            other.requires_grad.update(mine)
            return
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(mine.get(path, parameter.requires_grad))
