"""Crops of large images: how often an image is decoded, and in which order crops come."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from rsfast.deblora import ImageInputs, LabelledImages, learn_classes
from rsfast.deblora.data import labelled
from tests.deblora_world import picture
from tests.test_deblora_labelled import CountingStore

SIDE, CROPS = 4000, 40


def large(tmp_path, count, side=SIDE, crops=CROPS):
    """Images of one colour each, and crops of all of them in turn."""
    for number in range(count):
        Image.new("RGB", (side, side), (40 * number, 80, 20)).save(tmp_path / f"{number}.png", compress_level=1)
    draw = np.random.default_rng(0)
    corners = draw.integers(0, side - 16, (count * crops, 1, 2))
    boxes = corners + np.array([[0, 0], [12, 0], [12, 12], [0, 12]])
    names = [f"{row % count}.png" for row in range(count * crops)]
    return LabelledImages(names, np.arange(len(names)) % 2, ["x", "y"], CountingStore(tmp_path), boxes=boxes)


def pixels(image):
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 255).mean((0, 1))


def train(data, **more):
    torch.manual_seed(0)
    head = nn.Linear(3, 2)
    options = dict(epochs=2, batch_size=8, seed=3) | more
    return learn_classes(nn.Linear(3, 3), head, ImageInputs(data, pixels), data.labels, **options), head


def test_a_large_image_is_decoded_once_for_all_its_shuffled_crops(tmp_path, monkeypatch):
    data = large(tmp_path, 3)
    train(data)
    assert sorted(data.store.opened) == ["0.png", "1.png", "2.png"]  # all three have room, in both epochs
    monkeypatch.setattr(labelled, "TOGETHER", 2 * 3 * SIDE**2)
    again = data.subset(range(len(data)))
    data.store.opened.clear()
    order = again.shuffled()
    for row in order.tolist():
        again.load(row)
    assert sorted(data.store.opened) == ["0.png", "1.png", "2.png"]  # of which two have room
    assert len(again._decoded._kept) == 2
    data.store.opened.clear()
    for row in torch.randperm(len(data)).tolist()[:CROPS]:
        again.load(row)
    assert len(data.store.opened) > 6  # what any order would cost


def test_an_image_larger_than_the_room_is_kept_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(labelled, "TOGETHER", 100)
    data = large(tmp_path, 2, side=64, crops=4)
    for row in data.shuffled().tolist():
        data.load(row)
        assert len(data._decoded._kept) == 1
    assert sorted(data.store.opened) == ["0.png", "1.png"]


def test_the_order_mixes_images_that_have_room_and_depends_on_the_seed_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(labelled, "TOGETHER", 2 * 3 * 64**2)
    data = large(tmp_path, 6, side=64, crops=10)

    def order(seed):
        torch.manual_seed(seed)
        return data.shuffled().tolist()

    first = order(0)
    assert sorted(first) == list(range(60)) and first == order(0) != order(1)
    groups = [{row % 6 for row in first[start : start + 20]} for start in range(0, 60, 20)]
    assert [len(group) for group in groups] == [2, 2, 2] and set.union(*groups) == set(range(6))
    assert len({row % 6 for row in first[:6]}) == 2  # and not one image after the other
    whole = LabelledImages([picture(k) for k in range(9)], [0] * 9, ["x"])
    torch.manual_seed(5)
    found = whole.shuffled()
    torch.manual_seed(5)
    assert found.equal(torch.randperm(9)) and ImageInputs(whole, pixels).order().sort().values.equal(torch.arange(9))


def test_training_on_crops_is_resumed_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(labelled, "TOGETHER", 3 * 64**2)
    data = large(tmp_path, 3, side=64, crops=8)
    losses, head = train(data, epochs=3)
    assert len(data.store.opened) <= 2 + 3 * 3  # two looks at the first row, and each image in each epoch
    batches = ImageInputs.batches

    def killed(self, ahead, device, *, seed):
        if len(epochs) == 2:
            raise KeyboardInterrupt
        epochs.append(seed)
        return batches(self, ahead, device, seed=seed)

    epochs = []
    monkeypatch.setattr(ImageInputs, "batches", killed)
    with pytest.raises(KeyboardInterrupt):
        train(data, epochs=3, checkpoint=tmp_path / "c.pt")
    monkeypatch.setattr(ImageInputs, "batches", batches)
    resumed, other = train(data, epochs=3, checkpoint=tmp_path / "c.pt")
    assert resumed == losses and all(map(torch.equal, head.parameters(), other.parameters()))
    monkeypatch.setattr(labelled, "TOGETHER", 3 * 64**2 + 1)
    with pytest.raises(ValueError, match="is of another training, which differs in inputs"):
        train(data, epochs=3, checkpoint=tmp_path / "c.pt")


def test_workers_get_no_decoded_image(tmp_path):
    data = large(tmp_path, 2, side=64, crops=4)
    for row in range(len(data)):
        data.load(row)
    assert len(data._decoded._kept) == 2 and not pickle.loads(pickle.dumps(data))._decoded._kept
