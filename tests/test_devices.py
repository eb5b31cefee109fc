"""Tensors are where the computation is, also where that is another device than the CPU: meta tensors stand for it."""

import numpy as np
import pytest
import torch
from torch import nn

from rsfast.deblora import LabelledFeatures, LowRankMap, RunConfig, learn_classes, learn_towards, run
from rsfast.deblora.comparison.sources import backbone
from rsfast.deblora.comparison.tasks import FeatureTask
from rsfast.harma import train
from tests.harma_world import config, in_memory

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


def classes_of_features(folder):
    z = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    data = LabelledFeatures(z, np.arange(60) % 2, np.arange(60) >= 40, ["a", "b"], "noise")
    settings = RunConfig(out=str(folder), method="lora", imbalance=2.0, epochs=1, rank=2, seeds=(0,), device="cpu")
    run(settings, FeatureTask(data, settings))


@pytest.mark.filterwarnings("ignore:.*random weights")
@pytest.mark.parametrize(
    "work",
    [
        lambda folder: train(
            config(folder / "run", max_steps=1), train_data=in_memory(), val_data=in_memory(), progress=False
        ),
        lambda folder: classes_of_features(folder / "run"),
        lambda folder: backbone("vit_tiny_patch16_224", None),
    ],
    ids=["harma", "deblora", "backbone"],
)
def test_generators_of_other_gpus_are_left_alone(monkeypatch, tmp_path, work):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    monkeypatch.setattr(torch.cuda, "manual_seed", seeded.append)
    work(tmp_path)
    assert not seeded
