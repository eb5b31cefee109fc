"""Tensors are where the computation is, also where that is another device than the CPU: a meta tensor stands for it."""

import pytest
import torch
from torch import nn

from rsfast.deblora import LowRankMap, learn_classes, learn_towards
from rsfast.deblora.learning import learn

WEIGHTS = torch.linspace(1, 2, 6)


@pytest.mark.parametrize(
    "learns",
    [
        lambda x, **where: learn_towards(LowRankMap(4, r=2), x, x + 1, weights=WEIGHTS, **where),
        lambda x, **where: learn_classes(
            LowRankMap(4, r=2), nn.Linear(4, 3), x, torch.arange(6) % 3, loss="reweight", **where
        ),
        lambda x, **where: learn_classes(
            LowRankMap(4, r=2), nn.Linear(4, 3), x, torch.arange(6) % 3, loss="logit-adjust", **where
        ),
    ],
    ids=["weighted", "reweight", "logit-adjust"],
)
def test_the_first_batch_is_where_the_modules_come_on_and_the_others_where_they_go(monkeypatch, learns):
    taken = []
    monkeypatch.setattr(learn, "train", lambda *args: taken.append(args))
    learns(torch.ones(6, 4), device="meta")
    modules, inputs, loss_of, run, _ = taken[0]
    rows = torch.tensor([0, 4])
    assert loss_of(inputs.batch(rows, "cpu"), rows).isfinite()
    modules.to(run.device_of(modules))
    assert loss_of(inputs.batch(rows, "meta"), rows).device.type == "meta"
