"""Labelled images: crops, what is decoded when, parts and subsets, and what is refused."""

import pickle

import numpy as np
import pytest
from torch.utils.data import DataLoader

from rsfast.deblora import LabelledImages
from rsfast.harma import BrokenImageError, ImageStore
from tests.deblora_world import picture, write


class CountingStore(ImageStore):
    def __init__(self, root):
        super().__init__(root)
        self.opened = []

    def open(self, name):
        self.opened.append(name)
        return super().open(name)


def test_an_image_is_decoded_once_for_the_crops_that_follow_each_other(tmp_path):
    store = CountingStore(write(tmp_path, "a.png", "b.png", size=(40, 30)))
    box = [[1, 1], [4, 1], [4, 3], [1, 3]]
    names = ["a.png", "".join("a.png"), "b.png", "a.png"]  # equal, and two objects
    data = LabelledImages(names, [0, 1, 0, 1], ["x", "y"], store, boxes=[box] * 4)
    assert [data.load(k).size for k in range(4)] == [(3, 2)] * 4 and store.opened == ["a.png", "b.png"]
    assert data.names == ["a.png#0", "a.png#1", "b.png#0", "a.png#2"]
    assert len(pickle.dumps(data)) < 3000  # the image is not sent along
    assert pickle.loads(pickle.dumps(data)).load(2).size == (3, 2)
    loaded = DataLoader(range(4), batch_size=None, num_workers=2, collate_fn=lambda k: np.asarray(data.load(k)))
    for index, crop in enumerate(loaded):
        np.testing.assert_array_equal(crop, np.asarray(data.load(index)))
    with pytest.raises(BrokenImageError, match="c.png: not in"):
        LabelledImages(["c.png"], [0], ["x"], store, boxes=[box]).load(0)


def test_a_crop_with_a_margin_and_a_crop_turned_upright():
    image = picture(0, (40, 30))
    box = [[10, 10], [20, 10], [20, 14], [10, 14]]
    pixels = np.asarray(image)

    def crop(box, **options):
        return np.asarray(LabelledImages([image], [0], ["x"], boxes=[box], **options).load(0))

    np.testing.assert_array_equal(crop(box, margin=0.5), pixels[8:16, 5:25])
    np.testing.assert_array_equal(crop(box, margin=9.0), pixels)
    np.testing.assert_array_equal(crop(box, crop="rotated"), pixels[10:14, 10:20])
    np.testing.assert_array_equal(crop(box, crop="rotated", margin=0.5), pixels[8:16, 5:25])
    # by a quarter and a half: the first corner goes to the top left
    quarter, half = box[1:] + box[:1], box[2:] + box[:2]
    np.testing.assert_array_equal(crop(quarter, crop="rotated"), np.rot90(pixels[10:14, 10:20]))
    np.testing.assert_array_equal(crop(half, crop="rotated"), pixels[10:14, 10:20][::-1, ::-1])
    over = crop([[-5, 0], [5, 0], [5, 4], [-5, 4]], crop="rotated")
    assert over.shape == (4, 10, 3) and not over[:, :5].any() and (over[:, 5:] == pixels[:4, :5]).all()
    # a square of side sqrt(32) on its corner
    diamond = [[10, 6], [14, 10], [10, 14], [6, 10]]
    assert crop(diamond).shape == (8, 8, 3) and crop(diamond, crop="rotated").shape == (6, 6, 3)
    for box, reason in (
        ([[50, 5], [60, 5], [60, 9], [50, 9]], "lies outside"),
        ([[5, -9], [9, -9], [9, 0], [5, 0]], "lies outside"),  # and touches
        ([[1, 1]] * 4, "has no area"),
    ):
        with pytest.raises(BrokenImageError, match=f"image 0#0: the box .* {reason}"):
            crop(box)


def test_parts_and_subsets_keep_names_and_classes():
    images = [picture(k) for k in range(4)]
    data = LabelledImages(images, np.array([2, 0, 2, 1]), ["a", "b", "c"], splits=["train", "test", "train", "test"])
    few = data.subset(np.array([3, 0]))
    assert few.names == ["image 3", "image 0"] and few.labels.tolist() == [1, 2] and few.splits == ["test", "train"]
    assert few.classes == ("a", "b", "c") and (np.asarray(few.load(1)) == np.asarray(images[0])).all()
    assert data.part("test").subset([1]).names == ["image 3"]
    for indices, message in (
        ([4], "in 0..3, got 4"),
        ([], "holds no images"),
        ([1, 1], "image 1 is there more than once"),
    ):
        with pytest.raises(ValueError, match=message):
            data.subset(indices)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(images=[]), "the data holds no images"),
        (dict(images=["a.png"]), "need a store"),
        (dict(labels=[0, 0]), "1 images but 2 labels"),
        (dict(labels=[1]), r"labels must be in 0..0, got 1 at index 0"),
        (dict(labels=["x"]), "labels must be integers"),
        (dict(classes=["x", "x"]), "classes must differ"),
        (dict(boxes=[[1, 2, 3, 4]]), r"boxes must be \(1, 4, 2\) finite numbers, got \(1, 4\)"),
        (dict(boxes=np.full((1, 4, 2), np.nan)), "finite numbers"),
        (dict(splits=[]), "1 images but 0 splits"),
        (dict(names=["a", "b"]), "1 images but 2 names"),
        (dict(crop="square"), "crop must be bounds or rotated, got 'square'"),
        (dict(margin=-1), "margin must be a number of at least 0"),
    ],
)
def test_bad_labelled_images(changes, message):
    with pytest.raises(ValueError, match=message):
        LabelledImages(**({"images": [picture(0)], "labels": [0], "classes": ["x"]} | changes))
