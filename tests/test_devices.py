"""Tensors are where the computation is, also where that is another device than the CPU: meta tensors stand for it."""

import pytest
import torch
from torch import nn

from rsfast.deblora import LowRankMap, learn_classes, learn_towards

ROWS, LABELS = torch.ones(6, 4), torch.arange(6) % 3


def towards(encoder, **options):
    learn_towards(encoder, ROWS, ROWS + 1, **options)


def classes(encoder, **options):
    learn_classes(encoder, nn.Linear(4, 3), ROWS, LABELS, **options)


@pytest.mark.parametrize("start", ["cpu", "meta"])
@pytest.mark.parametrize(
    "learn, options",
    [
        (towards, {}),
        (towards, {"weights": torch.linspace(1, 2, 6)}),
        (classes, {}),
        (classes, {"loss": "reweight"}),
        (classes, {"loss": "logit-adjust"}),
    ],
)
def test_training_goes_to_the_device_from_wherever_the_modules_are(start, learn, options):
    encoder = nn.Sequential(nn.Linear(4, 4).to(start), LowRankMap(4, r=2))
    with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta tensors"):  # the mean loss of an epoch
        learn(encoder, epochs=1, batch_size=4, device="meta", **options)
    assert {p.device.type for p in encoder.parameters()} == {"meta"}
