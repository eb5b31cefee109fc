"""Features of a data set's images: of any backbone, resumable to the byte, broken images named."""

import functools
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from rsfast.deblora import FeatureStore, image_encoder, sample_seed
from rsfast.deblora.features.backbones import described
from rsfast.harma import CaptionedImages
from rsfast.models import add_lora, lora_layers
from tests.scenes import Mean, Scenes, contents, extract, pixels
from tests.tiny_clip import tiny_clip, tiny_custom_text_clip


@torch.no_grad()
def test_rows_are_the_models_features(tmp_path):
    model = Mean().train()
    model.norm.eval()
    store = extract(tmp_path, model=model)
    assert model.training and model.linear.training and not model.norm.training
    wanted = torch.cat([model.eval()(pixels(Scenes().load(i))[None]) for i in range(10)])
    torch.testing.assert_close(torch.tensor(np.array(store.features)), wanted)
    assert store.names == [f"{i}.png" for i in range(10)] and store.labels.tolist() == [i % 3 - 1 for i in range(10)]
    assert store.classes == ("ship", "plane") and store.splits == ["train"] * 7 + ["test"] * 3 and not store.left_out
    store.verify()
    FeatureStore(tmp_path).append(wanted[:1])  # the lock is given up


@pytest.mark.parametrize("make", [tiny_clip, tiny_custom_text_clip])
def test_open_clip_model_and_tower(make):
    model, images = make(), torch.rand(2, 3, 16, 16)
    for given in (model, model.visual):
        encoder, transform = image_encoder(given)
        assert torch.equal(encoder(images), model.encode_image(images))
        assert transform(Image.new("RGB", (40, 30))).shape == (3, 16, 16)
    model.visual.output_tokens = True
    assert torch.equal(encoder(images), model.encode_image(images)[0])


def test_open_clips_own_preprocessing_is_the_default():
    model = tiny_clip()
    model.visual.preprocess_cfg = dict(size=(16, 16), mean=(0.0, 0.0, 0.0), std=(0.5, 0.5, 0.5))
    _, transform = image_encoder(model)
    assert torch.equal(transform(Image.new("RGB", (20, 20), (255, 255, 255))), torch.full((3, 16, 16), 2.0))


def test_what_is_compared_after_a_restart_does_not_change_with_the_process():
    assert described(pixels) == "tests.scenes.pixels"
    assert described(functools.partial(pixels, 3)) == "functools.partial(<function pixels>, 3)"


@pytest.mark.parametrize("options", [
    dict(model_name="vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5), dict(model_name="test_resnet"),
])  # fmt: skip
def test_timm_models(options):
    model = timm.create_model(pretrained=False, **options).eval()
    encoder, transform = image_encoder(model)
    image = transform(Image.new("RGB", (90, 70)))
    features = encoder(image[None])
    assert features.shape == (1, model.num_features)
    assert torch.equal(model.get_classifier()(features), model(image[None]))


@pytest.mark.parametrize("make", [
    tiny_clip, lambda: tiny_clip().visual, lambda: timm.create_model("test_vit", pretrained=False),
])  # fmt: skip
def test_lora_in_the_encoder_is_trained(make):
    encoder, transform = image_encoder(make().eval())
    image = transform(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)))
    before = encoder(image[None])
    add_lora(encoder, r=2)
    torch.testing.assert_close(encoder(image[None]), before)
    for layer in lora_layers(encoder).values():
        nn.init.normal_(layer.lora_B)
    encoder(image[None]).square().sum().backward()
    trained = [p for p in encoder.parameters() if p.requires_grad]
    assert len(trained) >= 8 and all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)


def test_any_callable_and_no_other():
    model = Mean()
    assert image_encoder(model) == (model, None) and image_encoder(pixels) == (pixels, None)
    with pytest.raises(TypeError, match="model must be a module or a callable"):
        image_encoder(3)


KILLED = """
import os, signal, sys
from tests.scenes import Scenes, extract
class Deadly(Scenes):
    def load(self, index):
        return os.kill(os.getpid(), signal.SIGKILL) if index == 9 else super().load(index)
extract(sys.argv[1], Deadly(broken=(1, 5)))
"""


def test_killed_and_started_again_gives_the_same_bytes(tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert subprocess.run([sys.executable, "-c", KILLED, str(twice)]).returncode == -9
    assert len(FeatureStore(twice)) in (3, 6)  # the second batch may have been on its way
    with pytest.warns(UserWarning, match="2 of 10 images are left out, e.g. 1.png: no image"):
        assert extract(once, Scenes(broken=(1, 5))).left_out == [(1, "1.png", "no image"), (5, "5.png", "no image")]
    with pytest.warns(UserWarning, match="left out"):
        store = extract(twice, Scenes(broken=(1, 5)))
    assert contents(once) == contents(twice) and len(store) == 8
    with pytest.warns(UserWarning, match="left out"):
        extract(once, Scenes(broken=(1, 5)))  # there is nothing left to do
    assert contents(once) == contents(twice)


class Stops(Scenes):
    def load(self, index):
        if index == 5:
            raise KeyboardInterrupt
        return super().load(index)


@pytest.fixture
def begun(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        extract(tmp_path, Stops())
    return tmp_path


class Renamed(Scenes):
    def name(self, index):
        return "other.png" if index == 2 else super().name(index)


class Relabelled(Scenes):
    def label(self, index):
        return 1 if index == 3 else super().label(index)


def other_weights():
    model = Mean()
    model.linear.bias.data[1] += 1e-6
    return model


@pytest.mark.parametrize("message,options", [
    ("begun with weights", dict(model=other_weights)),
    ("begun with batch_size 4, now it is 5", dict(batch_size=5)),
    ("begun with transform '.*pixels', now it is '.*neg", dict(transform=torch.neg)),
    ("begun with precision 'fp32', now it is 'bf16'", dict(precision="bf16")),
    ("begun with dtype 'float32', now it is 'float16'", dict(dtype="float16")),
    ("begun with images 10, now it is 11", dict(dataset=lambda: Scenes(11))),
    ("row 2 is '2.png' of label 1, but image 2 is 'other.png'", dict(dataset=Renamed)),
    ("row 3 is '3.png' of label -1, but image 3 is '3.png' of label 1", dict(dataset=Relabelled)),
])  # fmt: skip
def test_what_was_begun_with_something_else_is_refused(begun, message, options):
    before = contents(begun)
    made = {k: v() if k in ("model", "dataset") else v for k, v in options.items()}
    with pytest.raises(ValueError, match=message) as caught:
        extract(begun, **made)
    assert contents(begun) == before and caught
    assert len(extract(begun)) == 10  # though the error is still held


def test_settings_of_the_model_are_part_of_it(begun):
    model = Mean()
    model.norm.p = 0.1
    with pytest.raises(ValueError, match="begun with weights"):
        extract(begun, model=model)


@pytest.mark.parametrize("broken", [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9), (0, 1, 2, 3, 9)])
def test_batches_without_an_image(tmp_path, broken):
    with pytest.warns(UserWarning, match=f"{len(broken)} of 10 images are left out"):
        store = extract(tmp_path, Scenes(broken=broken))
    assert [item.index for item in store.left_out] == list(broken)
    assert store.names == [f"{i}.png" for i in range(10) if i not in broken]


def test_broken_images_can_be_refused(tmp_path):
    with pytest.raises(ValueError, match="an image cannot be used: 5.png: no image"):
        extract(tmp_path / "a", Scenes(broken=(5,)), strict=True)
    assert len(FeatureStore(tmp_path / "a")) == 4
    with pytest.raises(ValueError, match="none of the 10 images can be used, e.g. 0.png: no image"):
        extract(tmp_path / "b", Scenes(broken=range(10)))
    assert not (tmp_path / "b").exists()
    with pytest.warns(UserWarning):
        extract(tmp_path / "c", Scenes(broken=(5,)))
    with pytest.raises(ValueError, match="5.png: no image; it is left out of"):
        extract(tmp_path / "c", Scenes(broken=(5,)), strict=True)


class Pairs(torch.utils.data.Dataset):
    """The scenes as a data set of PyTorch."""

    def __init__(self, convert=lambda image: image, broken=()):
        self.convert, self.broken = convert, broken

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index in self.broken:
            raise OSError("truncated")
        return self.convert(Scenes().load(index)), torch.tensor(index % 3 - 1)


class Samples(Pairs):
    """As TorchGeo's data sets for classification."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return {"image": image, "label": label, "bounds": None}


def test_data_sets_of_torchgeo(tmp_path):
    wanted = extract(tmp_path / "pairs", Pairs(pixels), transform=None)
    store = extract(tmp_path / "samples", Samples(pixels), transform=None)
    assert np.array_equal(store.features, wanted.features) and np.array_equal(store.labels, wanted.labels)
    with pytest.raises(TypeError, match=r"dataset\[0\] must have label, has image, mask"):
        extract(tmp_path / "masks", [{"image": torch.ones(3, 4, 4), "mask": 0}], transform=None)


def test_data_sets_of_pytorch(tmp_path):
    wanted = extract(tmp_path / "scenes")
    store = extract(tmp_path / "pil", Pairs())
    assert store.names == [str(i) for i in range(10)] and store.classes is None
    assert np.array_equal(store.features, wanted.features) and np.array_equal(store.labels, wanted.labels)
    assert np.array_equal(extract(tmp_path / "tensor", Pairs(pixels), transform=None).features, wanted.features)
    halved = extract(tmp_path / "both", Pairs(pixels), transform=lambda t: t / 2).features
    assert not np.array_equal(halved, wanted.features)
    with pytest.warns(UserWarning, match="e.g. 3: OSError: truncated"):
        extract(tmp_path / "broken", Pairs(broken=(3,)))


def test_rows_of_no_split(tmp_path):
    scenes = Scenes()
    scenes.splits[1] = None
    assert extract(tmp_path, scenes).splits[:3] == ["train", "", "train"]


def test_captioned_images(tmp_path):
    images = [Scenes().load(i) for i in range(3)]
    data = CaptionedImages(images, ["a", "b", "c"], [0, 1, 2], labels=[4, -1, 2])
    store = extract(tmp_path, data)
    assert store.labels.tolist() == [4, -1, 2] and store.names == ["image 0", "image 1", "image 2"]


def test_workers_change_nothing(tmp_path):
    noisy = NoisyTransform()
    extract(tmp_path / "0", transform=noisy)
    extract(tmp_path / "2", transform=noisy, workers=2)
    assert contents(tmp_path / "0") == contents(tmp_path / "2")


class NoisyTransform:
    def __call__(self, image):
        return pixels(image) + torch.rand(())

    def __repr__(self):
        return "noise"


class Seeded:
    """Gives its seeds as features, and has a transform of its own."""

    takes_seeds = True

    def default_transform(self):
        return pixels

    def __call__(self, images, seeds):
        return torch.tensor([[seed % 1000, 0.0] for seed in seeds])


def test_noise_is_seeded_by_name(tmp_path):
    store = extract(tmp_path, model=Seeded(), transform=None)
    assert store.features[:, 0].tolist() == [sample_seed(f"{i}.png") % 1000 for i in range(10)]
    assert len(set(store.features[:, 0].tolist())) > 5


@pytest.mark.parametrize("kind,message,options", [
    (ValueError, r"model must give \(B, D\) features, gave \(4, 3, 9, 7\)", dict(model=nn.Identity())),
    (ValueError, "the features of 0.png hold NaN", dict(model=lambda x: x.mean((2, 3)).log() / 0 * 0)),
    (TypeError, "transform is needed", dict(transform=None)),
    (TypeError, "transform must give a tensor, gave Image for 0.png", dict(transform=lambda image: image)),
    (ValueError, "image 0 became", dict(transform=lambda image: torch.rand(int(torch.randint(2, 90, ())), 2))),
    (TypeError, "dataset must have load, name and label", dict(dataset=iter([]))),
    (TypeError, r"dataset\[0\] must be \(image, label\)", dict(dataset=[1, 2])),
    (ValueError, "dataset holds no images", dict(dataset=[])),
    (ValueError, "batch_size must be an integer", dict(batch_size=0)),
    (ValueError, "workers must be an integer", dict(workers=-1)),
    (ValueError, "precision must be of fp32, bf16, fp16", dict(precision="int8")),
])  # fmt: skip
def test_bad_input(tmp_path, kind, message, options):
    with pytest.raises(kind, match=message):
        extract(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_precision(tmp_path):
    full, half = extract(tmp_path / "a"), extract(tmp_path / "b", precision="bf16", dtype="float16")
    assert half.features.dtype == np.float16 and full.metadata["precision"] == "fp32"
    rounded = torch.tensor(np.array(half.features)).bfloat16().float().numpy()
    assert np.array_equal(rounded, half.features) and not np.array_equal(full.features, half.features)
