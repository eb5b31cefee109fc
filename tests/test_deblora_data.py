"""Labelled images of every kind, what is left out, and what is refused."""

import json
import shutil
import zipfile

import numpy as np
import pytest

from rsfast.deblora import load_labelled
from rsfast.deblora.data.counts import DOTA_GROUPS
from tests.deblora_world import picture, write

DOTA15 = tuple(name for names in DOTA_GROUPS.values() for name in names)


def zipped(folder, into, prefix=""):
    with zipfile.ZipFile(into, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, prefix + file.relative_to(folder).as_posix())
    return into


def rows(data):
    splits = data.splits or [None] * len(data)
    return [(data.name(k), data.classes[data.label(k)], splits[k]) for k in range(len(data))]


# ---- class folders


def test_class_folders(tmp_path):
    root = write(tmp_path / "f", "b/2.png", "b/deep/1.JPG", "a/1.png", "c/1.png", "top.png", "a/.hidden.png")
    (root / "a" / "notes.txt").write_text("no image")
    expected = [("a/1.png", "a", None), ("b/2.png", "b", None), ("b/deep/1.JPG", "b", None), ("c/1.png", "c", None)]
    for path in (root, zipped(root, tmp_path / "f.zip")):
        data = load_labelled(path)
        assert rows(data) == expected and data.classes == ("a", "b", "c")
        assert data.left_out == {"top.png": "top.png has no label"}
        assert data.labels.dtype == np.int64 and data.labels.tolist() == [0, 1, 1, 2]
        np.testing.assert_array_equal(np.asarray(data.load(1)), np.asarray(picture(0)))
    wrapped = zipped(root, tmp_path / "w.zip", "around/")
    with zipfile.ZipFile(wrapped, "a") as archive:
        archive.writestr("__MACOSX/around/a/._1.png", b"")
    data = load_labelled(wrapped)
    assert rows(data) == [(f"around/{name}", label, None) for name, label, _ in expected]
    assert list(data.left_out) == ["around/top.png"]
    one = load_labelled(write(tmp_path / "one", "a/1.png", "a/2.png", "a/deep/1.png", "a/deep/2.png"))
    assert one.classes == ("a",) and len(one) == 4
    data = load_labelled(root, classes=["c", "A", "missing"])
    assert rows(data) == [("a/1.png", "A", None), ("c/1.png", "c", None)] and data.classes == ("c", "A", "missing")
    assert data.left_out["b/2.png"] == "b is none of the classes"
    assert load_labelled(root, classes=["B", "-b"]).labels.tolist() == [0, 0]  # the first of those that are alike


def test_folders_of_splits(tmp_path):
    root = write(tmp_path / "f", "train/x/1.png", "train/y/1.png", "validation/x/1.png", "Test/z/1.png")
    data = load_labelled(root)
    assert data.classes == ("x", "y", "z")
    assert rows(data.part("train")) == [("train/x/1.png", "x", "train"), ("train/y/1.png", "y", "train")]
    assert rows(data.part("val")) == [("validation/x/1.png", "x", "val")]
    assert data.part("test").classes == data.classes and data.part("test").labels.tolist() == [2]
    with pytest.raises(ValueError, match="no split 'dev', it has test, train, val"):
        data.part("dev")
    with pytest.raises(ValueError, match="it has none"):
        load_labelled(write(tmp_path / "g", "x/1.png")).part("test")


def test_fusrs_has_its_own_order(tmp_path):
    names = ["Cargo", "dredger", "fishing", "other", "tanker"]
    root = write(tmp_path / "f", *(f"train/{name}/1.png" for name in names))
    data = load_labelled(root)
    assert data.classes == ("cargo", "other", "fishing", "tanker", "dredger") and data.labels.tolist() == [
        0,
        4,
        2,
        1,
        3,
    ]
    shutil.rmtree(root / "train" / "other")
    assert load_labelled(root).classes == ("Cargo", "dredger", "fishing", "tanker")  # cannot be known for FUSRS
    assert load_labelled(root, format="fusrs").labels.tolist() == [0, 4, 2, 3]
    assert load_labelled(root, format="fusrs").classes == data.classes


# ---- DOTA

LINES = """imagesource:GoogleEarth
gsd:0.15
2 1 6 1 6 5 2 5 plane 0

0.0 0.0 3.5 0.0 3.5 2.5 0.0 2.5 Small-Vehicle 1
20 20 24 20 24 24 20 24 ship 0
1 1 5 5 9 9 3 3 ship 0
10 6 14 6 14 9 10 9 helipad 0
"""


@pytest.fixture
def dota(tmp_path):
    root = write(
        tmp_path / "dota", *(f"{s}/images/{n}.png" for s, n in (("train", "P1"), ("train", "P2"), ("val", "P1")))
    )
    for split, name, text in (("train", "P1", LINES), ("train", "P2", ""), ("val", "P1", "0 0 3 0 3 3 0 3 ship 0\n")):
        (root / split / "labelTxt").mkdir(exist_ok=True)
        (root / split / "labelTxt" / f"{name}.txt").write_text(text)
    return root


def test_dota(dota, tmp_path):
    for path in (dota, zipped(dota, tmp_path / "d.zip"), zipped(dota, tmp_path / "e.zip", "DOTA/")):
        prefix = "DOTA/" if path.name == "e.zip" else ""
        data = load_labelled(path)
        assert data.classes == (*DOTA15, "helipad")
        assert rows(data) == [
            (f"{prefix}train/images/P1.png#0", "plane", "train"),
            (f"{prefix}train/images/P1.png#1", "small-vehicle", "train"),
            (f"{prefix}train/images/P1.png#4", "helipad", "train"),
            (f"{prefix}val/images/P1.png#0", "ship", "val"),
        ]
        where = f"{path}/{prefix}train/labelTxt/P1.txt"
        assert data.left_out == {
            f"{where}, line 6": "ship: the box 20 20 24 20 24 24 20 24 lies outside of the image of 12 x 8 pixels",
            f"{where}, line 7": "ship: the box 1 1 5 5 9 9 3 3 has no area",
        }
        image = np.asarray(picture(0))
        for index, part in ((0, image[1:5, 2:6]), (1, image[0:3, 0:4]), (2, image[6:8, 10:12])):
            np.testing.assert_array_equal(np.asarray(data.load(index)), part)
        np.testing.assert_array_equal(np.asarray(data.part("val").load(0)), np.asarray(picture(2))[:3, :3])


def test_dota_as_it_is_unpacked(dota):
    plain = rows(load_labelled(dota))
    for split in ("train", "val"):
        (dota / split / "labelTxt-v1.0").mkdir()
        (dota / split / "labelTxt").rename(dota / split / "labelTxt-v1.0" / "labelTxt")
    assert rows(load_labelled(dota)) == plain
    assert rows(load_labelled(dota, label_folder="labelTxt-v1.0/labelTxt/")) == plain


def test_dota_without_what_is_difficult_or_of_other_classes(dota):
    data = load_labelled(dota, difficult=False, classes=DOTA15)
    assert [data.name(k).split("/")[-1] for k in range(2)] == ["P1.png#0", "P1.png#0"] and data.classes == DOTA15
    assert sorted(why for why in data.left_out.values() if not why.startswith("ship")) == [
        "Small-Vehicle is marked difficult", "helipad is none of the classes",
    ]  # fmt: skip


def test_dota_in_one_part_and_images_elsewhere(dota, tmp_path):
    flat = tmp_path / "flat"
    shutil.copytree(dota / "train" / "labelTxt", flat / "labelTxt-v1.5" / "train")
    (flat / "labelTxt-v1.5" / "train" / "P9.txt").write_text("0 0 3 0 3 3 0 3 ship 0\n")
    data = load_labelled(flat, dota / "train" / "images", label_folder="labelTxt-v1.5/train")
    assert data.splits is None and data.name(0) == "P1.png#0" and len(data) == 3
    missing = f"no image, or more than one, of the name P9 in {dota / 'train' / 'images'}"
    assert data.left_out[f"{flat}/labelTxt-v1.5/train/P9.txt"] == missing
    with pytest.raises(ValueError, match=r"found no labelled images; looked for labelTxt/\*\.txt"):
        load_labelled(flat, dota / "train" / "images")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 2 3 4 5 6 7 8 ship", "got 9 words in"),
        ("1 2 3 4 5 6 7 8 ship 0 x", "got 11 words in"),
        ("1 2 3 4 5 6 seven 8 ship 0", "could not convert string to float: 'seven'"),
        ("1 2 3 4 5 6 nan 8 ship 0", "got a coordinate that is not finite"),
        ("1 2 3 4 5 6 7 8 ship maybe", "got difficult 'maybe'"),
    ],
)
def test_dota_lines_that_are_malformed(dota, line, message):
    file = dota / "val" / "labelTxt" / "P1.txt"
    file.write_text(f"gsd:1\n0 0 3 0 3 3 0 3 ship 0\n{line}\n")
    with pytest.raises(ValueError, match=message) as caught:
        load_labelled(dota)
    assert str(caught.value).startswith(f"{file}, line 3: expected 'x1 y1 x2 y2 x3 y3 x4 y4 category difficult'")
    (dota / "val" / "images" / "P1.png").unlink()
    with pytest.raises(ValueError, match="line 3"):  # also where there is no image to cut
        load_labelled(dota)


def test_dota_with_a_broken_image(dota):
    (dota / "train" / "images" / "P1.png").write_text("no image")
    data = load_labelled(dota)
    assert len(data) == 1 and "UnidentifiedImageError" in data.left_out[f"{dota}/train/labelTxt/P1.txt"]
    (dota / "val" / "images" / "P1.png").unlink()
    with pytest.raises(ValueError, match="holds no labelled images; .*P1.txt"):
        load_labelled(dota)


# ---- CSV, json, lists


def test_csv(tmp_path):
    write(tmp_path, "i/1.png", "i/2.png", "i/3.png")
    text = "path,label,split\ni/1.png,river,train\ni/2.png,field,validation\ni/3.png,,train\ni/4.png,field,train\n"
    (tmp_path / "c.csv").write_text(text)
    data = load_labelled(tmp_path / "c.csv")
    assert rows(data) == [("i/1.png", "river", "train"), ("i/2.png", "field", "val")] and data.classes == (
        "field",
        "river",
    )
    assert list(data.left_out.items()) == [
        (f"{tmp_path}/c.csv, line 4", "i/3.png has no label"),
        (f"{tmp_path}/c.csv, line 5", f"i/4.png is not in {tmp_path}"),
    ]
    (tmp_path / "ids.tsv").write_text("img\tkind\n1.png\t2\n2.png\t0\n1.png\t2\n")
    keys = dict(csv_path_key="img", csv_label_key="kind")
    data = load_labelled(tmp_path / "ids.tsv", tmp_path / "i", **keys)
    assert rows(data) == [("1.png", "2", None), ("2.png", "0", None), ("1.png#1", "2", None)]
    assert data.classes == ("0", "1", "2")
    both = load_labelled({"train": tmp_path / "ids.tsv", "testing": tmp_path / "ids.tsv"}, tmp_path / "i", **keys)
    assert both.splits == ["train"] * 3 + ["test"] * 3 and both.part("test").labels.tolist() == [2, 0, 2]
    with pytest.raises(ValueError, match="no column path and no column label in its header"):
        load_labelled(tmp_path / "ids.tsv")
    with pytest.raises(ValueError, match=r"ids\.tsv, line 2: label must be in 0\.\.1, got 2"):
        load_labelled(tmp_path / "ids.tsv", tmp_path / "i", classes=["a", "b"], **keys)
    for other in ("-1", "0"):  # no name of a class
        (tmp_path / "c.csv").write_text(f"path,label\ni/1.png,-1\ni/2.png,{other}\n")
        with pytest.raises(ValueError, match=r"c\.csv, line 2: label must be in 0\.\.0, got -1"):
            load_labelled(tmp_path / "c.csv")


def test_harma_json(tmp_path):
    write(tmp_path, *(f"{k}.png" for k in range(4)))
    made = [
        {"image": "0.png", "caption": "x", "label": 2, "label_name": "river"},
        {"image": "0.png", "caption": "y", "label": 2, "label_name": "river"},
        {"image": "1.png", "caption": ["z"], "label": 0},
    ]
    (tmp_path / "train.json").write_text(json.dumps(made))
    (tmp_path / "test.json").write_text(json.dumps([made[0], {"image": "3.png"}]))
    (tmp_path / "other.json").write_text("{}")
    data = load_labelled(tmp_path)
    assert data.classes == ("0", "1", "river")
    assert rows(data) == [("0.png", "river", "test"), ("0.png#1", "river", "train"), ("1.png", "0", "train")]
    assert data.left_out == {f"{tmp_path}/test.json, row 1": "3.png has no label"}
    named = [
        {"image": "0.png", "label": 0, "label_name": "Port"},
        {"image": "1.png", "label": 1, "label_name": "Field"},
    ]
    (tmp_path / "o.json").write_text(json.dumps(named))
    for classes, labels in ((None, [0, 1]), (["field", "ice", "port"], [2, 0])):  # names count then, not ids
        assert load_labelled(tmp_path / "o.json", classes=classes).labels.tolist() == labels
    names = [{"image": f"{k}.png", "label_name": name} for k, name in enumerate(("Port", "Field", "Port"))]
    (tmp_path / "n.json").write_text(json.dumps(names))
    data = load_labelled(tmp_path / "n.json")
    assert data.classes == ("Field", "Port") and data.labels.tolist() == [1, 0, 1] and data.splits is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "must hold a list of rows, got dict"),
        ([3], "row 0: expected a dictionary, got int"),
        ([{"label": 1}], "row 0: missing image; it has label"),
        ([{"image": 3}], "row 0: the image's name must be text, got 3"),
        (
            [{"image": "0.png", "label": 1}, {"image": "0.png", "label": 2}],
            "row 1: image 0.png has the label 2, and 1 in",
        ),
        (
            [{"image": "0.png", "label": 1, "label_name": "a"}, {"image": "1.png", "label": 1, "label_name": "b"}],
            "row 1: label 1 is named 'b', and 'a' further up",
        ),
        (
            [{"image": "0.png", "label": 1}, {"image": "1.png", "label_name": "b"}],
            "all ids or all names, got 1 in .*row 0",
        ),
        ([{"image": "0.png", "label": -1}], r"row 0: label must be in 0\.\."),
    ],
)
def test_bad_json(tmp_path, content, message):
    write(tmp_path, "0.png", "1.png")
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        load_labelled(tmp_path / "t.json")
    assert str(tmp_path / "t.json") in str(caught.value)


def test_lists(tmp_path):
    write(tmp_path / "i", "a b/1.png", "2.png")
    (tmp_path / "LT_train.txt").write_text("a b/1.png 1\n\n2.png 0\n2.png 0\n")
    (tmp_path / "LT_test.txt").write_text("2.png 3\n")
    data = load_labelled(tmp_path, tmp_path / "i")
    assert rows(data.part("train")) == [
        ("a b/1.png", "1", "train"),
        ("2.png#1", "0", "train"),
        ("2.png#2", "0", "train"),
    ]
    assert data.classes == tuple("0123") and rows(data.part("test")) == [("2.png", "3", "test")]
    for name, text in (
        ("names.txt", "field\nriver bed\nport\nice\n"),
        ("before.txt", "0 field\n1 river bed\n2 port\n3 ice\n"),
        ("after.txt", "field 0\nriver bed 1\nice 3\nport 2\n"),
        ("c.json", '["field", "river bed", "port", "ice"]'),
        ("d.json", json.dumps([{"id": 3 - k, "name": n} for k, n in enumerate(("ice", "port", "river bed", "field"))])),
    ):
        (tmp_path / "classes").mkdir(exist_ok=True)
        (tmp_path / "classes" / name).write_text(text)
        named = load_labelled(tmp_path / "LT_train.txt", tmp_path / "i", classes=tmp_path / "classes" / name)
        assert named.classes == ("field", "river bed", "port", "ice") and named.labels.tolist() == [1, 0, 0]
    for text, message in (("1.png", "line 1: expected a path and a label"), ("a 0\nb -1", "line 2: expected")):
        (tmp_path / "bad.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_labelled(tmp_path / "bad.txt", tmp_path / "i")


def test_what_cannot_be_told(tmp_path):
    root = write(tmp_path / "f", "1.png")
    with pytest.raises(ValueError, match=r"looked for labelTxt/\*\.txt \(dota\), .* it holds 1\.png$"):
        load_labelled(root)
    (tmp_path / "x.dat").write_text("")
    with pytest.raises(ValueError, match=r"x\.dat: what this is cannot be told from its name; looked for .*\.json"):
        load_labelled(tmp_path / "x.dat")
    for name in ("a_train.txt", "b_train.txt"):
        (root / name).write_text("1.png 0\n")
    with pytest.raises(ValueError, match="a_train.txt and b_train.txt are of one split"):
        load_labelled(root)
    (root / "b_train.txt").rename(root / "test.csv")
    with pytest.raises(ValueError, match="are of different kinds; format= says"):
        load_labelled(root)
    assert load_labelled(root, format="list").splits == ["train"]
    with pytest.raises(ValueError, match="format must be one of auto, .*, got 'voc'"):
        load_labelled(root, format="voc")
    with pytest.raises(ValueError, match="format='dota' needs a folder or zip"):
        load_labelled(root / "a_train.txt", format="dota")
    with pytest.raises(ValueError, match="images= is for files and DOTA"):
        load_labelled(write(tmp_path / "g", "a/1.png"), root)
    for path in (tmp_path / "no", {"train": tmp_path / "no.csv"}):
        with pytest.raises(FileNotFoundError, match="there is no"):
            load_labelled(path)
    with pytest.raises(ValueError, match=r"splits that differ, got \['val', 'validation'\]"):
        load_labelled(dict.fromkeys(("val", "validation"), root / "test.csv"))
    with pytest.raises(ValueError, match="crop must be bounds or rotated, got 'square'"):
        load_labelled(tmp_path / "g", crop="square")
    with pytest.raises(FileNotFoundError, match=r"none of the 1 images that .* for example 1\.png; images= says"):
        load_labelled(root / "a_train.txt", tmp_path / "g")
    with pytest.raises(ValueError, match="classes must be names that differ"):
        load_labelled(root, classes=["a", "a"])
    with pytest.raises(FileNotFoundError, match="classes: there is no file"):
        load_labelled(root, classes=tmp_path / "no.txt")
