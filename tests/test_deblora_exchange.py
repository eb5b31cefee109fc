"""debLoRA's .pt files in, clip-retrieval's layout out."""

import argparse
import sys

import numpy as np
import pyarrow.parquet
import pytest
import torch

from rsfast.deblora import FeatureStore, export_parquet, import_pt
from rsfast.deblora.features import exchange
from tests.scenes import contents

CROPS = ["train/plane/b_1", "train/plane/b_2", "train/ship/a", "val/ship/c.d", "val/ship/e"]


def tensor(index):
    return torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(index))


@pytest.fixture
def folder(tmp_path):
    for index, name in enumerate(CROPS):
        path = tmp_path / "pt" / f"{name}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(tensor(index), path)
    return tmp_path / "pt"


def test_rows_names_classes_and_splits(folder, tmp_path):
    store = import_pt(folder, tmp_path / "mean", batch_size=2)
    pool = torch.nn.AdaptiveAvgPool2d(1)
    wanted = torch.stack([pool(tensor(i)).flatten() for i in range(5)])
    torch.testing.assert_close(torch.tensor(np.array(store.features)), wanted)
    assert store.names == CROPS and store.splits == ["train"] * 3 + ["val"] * 2
    assert store.classes == ("plane", "ship") and store.labels.tolist() == [0, 0, 1, 1, 1]
    flat = import_pt(folder, tmp_path / "flat", pooling="flatten", classes=["x", "ship", "plane"])
    assert torch.equal(torch.tensor(np.array(flat.features)), torch.stack([tensor(i).flatten() for i in range(5)]))
    assert flat.labels.tolist() == [2, 2, 1, 1, 1]


@pytest.mark.parametrize("shape", [(1, 4, 2, 2), (1, 1, 4, 2, 2)])
def test_leading_ones(folder, tmp_path, shape):
    torch.save(tensor(0).reshape(shape).half(), folder / "train/plane/b_1.pt")
    row = import_pt(folder, tmp_path / "out").features[0]
    assert np.array_equal(row, tensor(0).half().float().mean((1, 2)).numpy())


@pytest.mark.parametrize("pooling", ["mean", "flatten"])
def test_flat_tensors_stay_as_they_are(tmp_path, pooling):
    (tmp_path / "ship").mkdir()
    torch.save(torch.arange(3.0), tmp_path / "ship/a.pt")
    torch.save(torch.arange(3.0)[None], tmp_path / "ship/b.pt")
    store = import_pt(tmp_path / "ship", tmp_path / "out", pooling=pooling)
    assert store.features.tolist() == [[0, 1, 2]] * 2
    assert (store.classes, store.names, store.splits) == (("ship",), ["a", "b"], ["", ""])


def test_train_can_be_a_class(tmp_path):
    (tmp_path / "pt/train").mkdir(parents=True)
    torch.save(torch.zeros(3), tmp_path / "pt/train/a.pt")
    store = import_pt(tmp_path / "pt", tmp_path / "out")
    assert store.classes == ("train",) and store.splits == [""]


BAD = {
    "b_2.pt is damaged": lambda path: path.write_bytes(path.read_bytes()[:300]),
    "b_2.pt is damaged or holds more": lambda path: torch.save(argparse.Namespace(), path),
    "b_2.pt must hold one tensor of floating point, holds dict": lambda path: torch.save({"a": tensor(0)}, path),
    "b_2.pt must hold one tensor of floating point, holds torch.int64": lambda path: torch.save(
        torch.ones(4).long(), path
    ),
    r"b_2.pt must hold a tensor .* holds \(4, 4\)": lambda path: torch.save(torch.ones(4, 4), path),
    r"b_2.pt must hold a tensor .* holds \(\)": lambda path: torch.save(torch.ones(()), path),
    "b_2.pt gives 5 features, others give 4": lambda path: torch.save(torch.ones(5, 2, 2), path),
    "b_2.pt holds NaN": lambda path: torch.save(torch.full((4, 2, 2), torch.nan), path),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_files_are_named_and_what_was_done_is_kept(folder, tmp_path, message):
    path = folder / "train/plane/b_2.pt"
    BAD[message](path)
    with pytest.raises(ValueError, match=message):
        import_pt(folder, tmp_path / "out", batch_size=1)
    assert FeatureStore(tmp_path / "out").names == CROPS[:1]
    torch.save(tensor(1), path)
    import_pt(folder, tmp_path / "out", batch_size=1)
    import_pt(folder, tmp_path / "once", batch_size=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "once")


def test_what_was_begun_with_something_else_is_refused(folder, tmp_path):
    import_pt(folder, tmp_path / "out")
    for options in (
        dict(pooling="flatten"),
        dict(dtype="float16"),
        dict(classes=["ship", "plane"]),
        dict(batch_size=9),
    ):
        with pytest.raises(ValueError, match=f"begun with {next(iter(options))}"):
            import_pt(folder, tmp_path / "out", **options)
    (folder / "val/ship/e.pt").rename(folder / "val/ship/f.pt")
    with pytest.raises(ValueError, match="begun with files"):
        import_pt(folder, tmp_path / "out")


def test_bad_arguments(folder, tmp_path):
    for kind, message, options in (
        (FileNotFoundError, "there is no folder", dict(folder=tmp_path / "none")),
        (FileNotFoundError, "holds no .pt files", dict(folder=tmp_path)),
        (ValueError, "pooling must be", dict(pooling="max")),
        (ValueError, "batch_size must be", dict(batch_size=0)),
        (ValueError, "dtype must be", dict(dtype="int8")),
        (ValueError, "classes lack that of .*a.pt", dict(classes=["plane"])),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        given = {"folder": folder, **options}
        if given["folder"] == tmp_path:
            given["folder"] = tmp_path / "empty"
        with pytest.raises(kind, match=message):
            import_pt(out=tmp_path / "out", **given)
        assert not (tmp_path / "out").exists()


@pytest.fixture
def store(tmp_path):
    with FeatureStore.create(tmp_path / "store", 3, dtype="float16", classes=["ship", "plane"]) as store:
        for start in (0, 4, 8):
            count = min(4, 11 - start)
            rows = np.arange(start * 3, (start + count) * 3, dtype=np.float32).reshape(count, 3)
            names = [f"{i}\udcff.png" if i == 5 else f"{i}.png" for i in range(start, start + count)]
            store.append(rows, [i % 3 - 1 for i in range(start, start + count)], names, "train")
    return FeatureStore(tmp_path / "store")


@pytest.mark.parametrize("rows,parts", [(100, ["0"]), (4, ["0", "1", "2"]), (1, [f"{i:02}" for i in range(11)])])
def test_export(store, tmp_path, monkeypatch, rows, parts):
    monkeypatch.setattr(exchange, "BLOCK", 3)
    monkeypatch.setattr(exchange, "BLOCK_BYTES", 7)
    written = export_parquet(store, tmp_path / "out", rows=rows)
    arrays, tables = written[::2], written[1::2]
    assert arrays == [tmp_path / "out/img_emb" / f"img_emb_{p}.npy" for p in parts] and sorted(arrays) == arrays
    assert tables == [tmp_path / "out/metadata" / f"metadata_{p}.parquet" for p in parts]
    pairs = [(np.load(a), pyarrow.parquet.read_table(t).to_pydict()) for a, t in zip(arrays, tables, strict=True)]
    assert np.array_equal(np.concatenate([a for a, _ in pairs]), store.features) and pairs[0][0].dtype == np.float16
    assert all(len(a) == len(t["label"]) <= rows for a, t in pairs)
    found = {key: sum((t[key] for _, t in pairs), []) for key in pairs[0][1]}
    assert found == {
        "image_path": [name if i != 5 else "5\\udcff.png" for i, name in enumerate(store.names)],
        "label": [i % 3 - 1 for i in range(11)],
        "class": [[None, "ship", "plane"][i % 3] for i in range(11)],
        "split": ["train"] * 11,
    }


def test_export_writes_all_or_nothing(store, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        export_parquet(store, tmp_path / "full")
    with pytest.raises(ValueError, match="rows must be"):
        export_parquet(store, tmp_path / "out", rows=0)
    with pytest.raises(ValueError, match="has no rows"):
        export_parquet(FeatureStore.create(tmp_path / "none", 2), tmp_path / "out")
    monkeypatch.setattr(exchange, "_encodable", lambda name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_parquet(store, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "none", "store"]


def test_the_extra_is_named(store, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"rsfast\[parquet\]"):
        export_parquet(store, tmp_path / "out")
