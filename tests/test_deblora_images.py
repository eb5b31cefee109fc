"""Comparisons on images: the backbone's own LoRA, and features kept between methods."""

import dataclasses
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from rsfast import cli
from rsfast.deblora import FeatureStore, RunConfig, ablate, run
from rsfast.deblora.comparison import experiment
from rsfast.deblora.comparison.sources import backbone, opened
from rsfast.models import lora_layers

pytestmark = pytest.mark.filterwarnings("ignore:.*random weights")
TINY = dict(
    embed_dim=8,
    vision_cfg=dict(layers=1, width=16, head_width=8, patch_size=8, image_size=16),
    text_cfg=dict(layers=1, width=8, heads=1, context_length=6),
)


@pytest.fixture
def scene(tmp_path):
    """Three classes of colour, 12 training and 4 test images each, and a config of open_clip."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 4)):
        for c, name in enumerate(("field", "river", "tank")):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 120, (16, 16, 3), dtype=np.uint8)
                pixels[..., c] += 120
                Image.fromarray(pixels).save(folder / f"{i}.png")
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    return tmp_path


def settings(scene, **more):
    quick = dict(clusters=3, epochs=1, deblora_epochs=1, rank=2, probe="knn", seeds=(0,), batch_size=8, alpha=0.5)
    return RunConfig(
        out=str(scene / "run"), images=str(scene / "images"), model=str(scene / "tiny.json"), imbalance=12.0,
        **quick | more,
    )  # fmt: skip


def test_every_method_on_images(scene):
    methods = "zero-shot,fine-tune,lora,clora,deblora,fine-tune+deblora,clora+deblora"
    result = run(settings(scene, method=methods, precision="fp32"))  # one epoch changes less than bf16, of GPUs, shows
    assert len(result.rows) == 7
    by_name = {row["method"]: row for row in result.rows}
    assert len({row["inter"] for row in result.rows}) == 7  # every one has changed the features in its way
    store = FeatureStore(scene / "run" / "features")
    assert len(store) == 48 and store.dim == 8
    assert by_name["zero-shot"]["mean"] > 50  # colours are easy


def test_images_are_encoded_a_few_at_a_time(scene, monkeypatch):
    seen, encode = [], experiment.encode

    def few(*args, batch_size, **options):
        seen.append(batch_size)
        return encode(*args, batch_size=batch_size, **options)

    monkeypatch.setattr(experiment, "encode", few)
    run(settings(scene, method="lora"))
    assert seen == [8, 8, 8]  # training, validation and test images


def test_lora_is_in_the_backbone_and_nothing_else_learns(scene):
    _, task = opened(settings(scene))
    place = settings(scene).place()
    frozen = task.encoder(None)
    assert not any(p.requires_grad for p in frozen.parameters())
    for encoder in (task.encoder("lora"), task.with_lora(task.encoder("full"), "full"), task.with_lora(frozen, None)):
        names = [name for name, p in encoder.named_parameters() if p.requires_grad]
        assert names and all("lora_" in name for name in names) and len(lora_layers(encoder)) == 2
    assert all(p.requires_grad for p in task.encoder("full").parameters())
    assert not lora_layers(task.backbone)  # methods work on copies
    images = next(iter(task.inputs(np.arange(4)).batches([torch.arange(4)], place)))
    wise = task.encoder("class-wise").eval().to(place)
    with torch.no_grad():
        every, logits = wise.forward_all(images), wise.logits(images)
        expected = torch.stack([wise.head(every[:, c])[:, c] for c in range(3)], 1)
        torch.testing.assert_close(logits, expected)
        mixed = torch.einsum("bc,bcd->bd", expected.softmax(1), every)
        torch.testing.assert_close(wise(images), mixed)


def test_class_wise_lora_equals_one_lora_a_class(scene):
    _, task = opened(settings(scene))
    wise, single = task.encoder("class-wise").eval(), task.encoder("lora").eval()
    draw = torch.Generator().manual_seed(0)
    images = next(iter(task.inputs(np.arange(5)).batches([torch.arange(5)], settings(scene).place())))
    with torch.no_grad():
        for layer in lora_layers(wise.backbone).values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=draw))
        every = wise.forward_all(images)
        for c in range(3):
            for one, many in zip(lora_layers(single).values(), lora_layers(wise.backbone).values(), strict=True):
                one.lora_A.copy_(many.lora_A[c])
                one.lora_B.copy_(many.lora_B[c])
            torch.testing.assert_close(every[:, c], single(images), rtol=1e-5, atol=1e-5)


def test_broken_images_are_left_out_of_all(scene):
    (scene / "images" / "train" / "field" / "3.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="left out"):
        _, task = opened(settings(scene))
    assert len(task.labels) == len(task.dataset) == len(task.frozen) == 47
    store = FeatureStore(scene / "run" / "features")
    assert [task.dataset.name(i) for i in range(47)] == store.names


def test_images_without_a_test_part_are_refused_before_they_are_encoded(scene):
    (scene / "images" / "test").rename(scene / "away")
    with pytest.raises(ValueError, match="names no test rows: its splits are train; test_share draws some"):
        opened(settings(scene))
    assert not (scene / "run").exists()
    _, task = opened(dataclasses.replace(settings(scene, test_share=0.25), imbalance=9.0))
    assert np.bincount(task.labels[task.is_test]).tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dict(clusters=40), "^clusters must be at most 13, the training rows, got 40"),
        (dict(rank=2**30), "^rank must be at most 16, of the model's widest layer; got"),
    ],
)
def test_numbers_too_large_are_refused_before_images_are_encoded(scene, change, told):
    with pytest.raises(ValueError, match=told):
        opened(settings(scene, **change))
    assert not (scene / "run").exists()


def test_a_sweep_may_mend_the_number_of_clusters(scene):
    many = settings(scene, method="calibrate", clusters=40)
    with pytest.warns(UserWarning, match="is left out: clusters must be at most 13"):
        assert {row["setting"] for row in ablate(many, sweeps=["clusters"]).rows} == {"clusters=8"}


def test_weights_of_timm_from_a_file(tmp_path):
    whole = timm.create_model("test_vit", num_classes=5)
    torch.save(whole.state_dict(), tmp_path / "whole.pt")
    found = backbone("test_vit", str(tmp_path / "whole.pt")).state_dict()
    assert found and all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in found.items())
    other = dict(whole.state_dict())
    other["blocks.0.other"] = other.pop("blocks.0.norm1.bias")
    torch.save(other, tmp_path / "other.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    for name, why in (("other", "differs in blocks.0.norm1.bias and 1 more"), ("junk", "does not fit test_vit")):
        with pytest.raises(ValueError, match=why):
            backbone("test_vit", str(tmp_path / f"{name}.pt"))
    with pytest.raises(ValueError, match="junk.pt is damaged"):
        backbone("satmae", str(tmp_path / "junk.pt"))


def test_random_weights_are_told_of_and_the_same_when_a_run_goes_on(scene):
    one, other = (backbone("test_vit", None).state_dict() for _ in range(2))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    with pytest.warns(UserWarning, match="tiny.json has random weights"):
        opened(settings(scene))


def test_a_backbone_without_attention_is_refused_before_images_are_encoded(scene):
    with pytest.raises(ValueError, match="match nothing that can have LoRA"):
        opened(dataclasses.replace(settings(scene, method="zero-shot,deblora"), model="test_resnet"))
    assert not (scene / "run").exists()


def test_models_that_are_not_there(scene, capsys):
    with pytest.raises(ValueError, match="neither knows 'resnet-9000'"):
        backbone("resnet-9000", None)
    with pytest.raises(ValueError, match="pretrained must name the file of satmae"):
        backbone("satmae", None)
    with pytest.raises(FileNotFoundError, match="no weights file w.pt"):
        backbone("vit_tiny_patch16_224", "w.pt")
    command = [
        "deblora",
        "run",
        "--images",
        str(scene / "images"),
        "--model",
        "resnet-9000",
        "--clusters",
        "3",
        "--out",
        str(scene / "o"),
    ]
    assert cli.main(command) == 2
    assert "rsfast: --model must be of open_clip or timm" in capsys.readouterr().err
