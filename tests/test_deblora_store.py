"""FeatureStore: all of an append or nothing of it, checked, by one writer at a time."""

import json
import multiprocessing
import os
import pickle
import signal
import zlib

import numpy as np
import pytest
import torch

from rsfast.deblora import FeatureStore
from rsfast.deblora.features import files as files
from tests.scenes import contents

FORK = multiprocessing.get_context("fork")  # quick, and safe where a child only uses NumPy


def rows(count, dim=3, start=0):
    return np.arange(start * dim, (start + count) * dim, dtype=np.float32).reshape(count, dim)


@pytest.fixture
def store(tmp_path):
    """Two appends: rows 0 to 3, rows 4 to 6."""
    with FeatureStore.create(tmp_path / "store", 3, classes=["ship", "plane"], metadata={"of": [1]}) as store:
        store.append(rows(4), [0, 1, -1, 0], ["a", "b\n", "ü", "\udcff"], "train")
        store.append(torch.from_numpy(rows(3, start=4)), torch.tensor([1, 1, 0]), splits=["", "val", "test"])
    return FeatureStore(tmp_path / "store")


def test_what_went_in_comes_out(store):
    assert isinstance(store.features, np.memmap) and not store.features.flags.writeable
    assert np.array_equal(store.features, rows(7)) and store.features.dtype == np.float32
    assert store.labels.tolist() == [0, 1, -1, 0, 1, 1, 0] and store.labels.dtype == np.int64
    assert store.names == ["a", "b\n", "ü", "\udcff", "", "", ""]
    assert store.splits == ["train"] * 4 + ["", "val", "test"]
    assert (len(store), store.dim, store.classes, store.metadata) == (7, 3, ("ship", "plane"), {"of": [1]})
    store.verify()
    assert np.array_equal(pickle.loads(pickle.dumps(store)).features, store.features)


def test_plain_numpy_reads_it(store):
    assert np.array_equal(np.fromfile(store.folder / "features.bin", "<f4").reshape(-1, 3), rows(7))
    assert np.array_equal(np.memmap(store.folder / "features.bin", "<f4", "r").reshape(-1, 3), rows(7))
    assert np.fromfile(store.folder / "labels.bin", "<i8").tolist() == store.labels.tolist()


def test_a_store_without_rows(tmp_path):
    FeatureStore.create(tmp_path, 2).close()
    store = FeatureStore(tmp_path)
    assert store.features.shape == (0, 2) and len(store.labels) == len(store.names) == 0
    store.append(np.empty((0, 2), np.float32), left_out=[(5, "x", "broken")])
    store.append(rows(1, 2))
    reopened = FeatureStore(tmp_path)
    assert len(reopened) == 1 and reopened.left_out == [(5, "x", "broken")]


def test_dtypes(tmp_path):
    value = torch.tensor([[1 / 3, -2.5e-5]])
    for dtype in ("float32", "float16"):
        with FeatureStore.create(tmp_path / dtype, 2, dtype=dtype) as store:
            for given in (value, value.bfloat16(), value.half(), value.double()):
                store.append(given)
            wanted = torch.cat([value, value.bfloat16().float(), value.half().float(), value])
            assert torch.equal(torch.tensor(np.array(store.features)), wanted.to(getattr(torch, dtype)))


def test_a_view_stays_what_it_was_while_rows_are_added(store):
    before = store.features
    store.append(rows(2, start=7))
    assert before.shape == (7, 3) and np.array_equal(before, rows(7)) and np.array_equal(store.features, rows(9))


BAD = {
    "features must be a NumPy array": (TypeError, lambda: dict(features=[[1.0, 2, 3]])),
    r"features must be \(n, 3\), got \(2, 4\)": (ValueError, lambda: dict(features=rows(2, 4))),
    "features must be floating point, got int64": (TypeError, lambda: dict(features=np.ones((2, 3), np.int64))),
    "row 1 holds NaN or infinity": (ValueError, lambda: dict(features=np.float32([[0, 0, 0], [0, np.inf, 0]]))),
    "row 0 holds NaN": (ValueError, lambda: dict(features=torch.full((2, 3), torch.nan))),
    "row 0 is too large for float32": (ValueError, lambda: dict(features=np.full((2, 3), 1e39))),
    "labels must be one a row": (ValueError, lambda: dict(labels=[0])),
    "labels must be integers": (TypeError, lambda: dict(labels=[0.0, 1.0])),
    "labels: row 1 is 2": (ValueError, lambda: dict(labels=[0, 2])),
    "labels: row 0 is -2": (ValueError, lambda: dict(labels=np.array([-2, 0]))),
    "names must be one a row": (ValueError, lambda: dict(names=["a"])),
    r"names\[1\] must be str, got int": (TypeError, lambda: dict(names=["a", 1])),
    "names must be several": (TypeError, lambda: dict(names="ab")),
    "splits must be one a row": (ValueError, lambda: dict(splits=["a"] * 3)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_rows_change_nothing(store, message):
    kind, bad = BAD[message]
    before = contents(store.folder)
    with pytest.raises(kind, match=message):
        store.append(**{"features": rows(2), **bad()})
    assert contents(store.folder) == before and len(store) == 7
    store.append(rows(1))


def test_float16_names_the_row_that_does_not_fit(tmp_path):
    with (
        FeatureStore.create(tmp_path, 1, dtype="float16") as store,
        pytest.raises(ValueError, match="row 1 is too larg"),
    ):
        store.append(np.float32([[65504], [70000]]))


def test_bad_stores_are_not_created(tmp_path, store):
    for message, options in {
        "dim must be": dict(dim=0), "dtype must be float32 or float16": dict(dtype="bfloat16"),
        "classes must be different": dict(classes=["a", "a"]),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            FeatureStore.create(tmp_path / "new", **{"dim": 3, **options})
    with pytest.raises(TypeError, match="metadata must be"):
        FeatureStore.create(tmp_path / "new", 3, metadata={"a": (1, 2)})
    assert not (tmp_path / "new").exists()
    with pytest.raises(FileExistsError, match=r"holds store.json already"):
        FeatureStore.create(store.folder, 3)
    with pytest.raises(FileNotFoundError, match="there is no feature store"):
        FeatureStore(tmp_path / "new")


def append_a_row(folder):
    FeatureStore(folder).append(rows(1))


def test_one_writer(store):
    store.lock()
    with pytest.raises(ValueError, match="one writer at a time"):
        FeatureStore(store.folder).append(rows(1))
    with pytest.raises(ValueError, match="one writer at a time"), FORK.Pool(1) as pool:
        pool.apply(append_a_row, (store.folder,))
    assert len(FeatureStore(store.folder)) == 7
    store.close()
    second = FeatureStore(store.folder)
    second.append(rows(1, start=7))
    second.close()
    store.append(rows(1, start=8))  # knows what came in between
    assert np.array_equal(store.features, rows(9))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_that_outlives_its_parent_holds_no_lock(store):
    store.lock()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    try:
        store.close()
        FeatureStore(store.folder).append(rows(1))
    finally:
        os.close(writing)
        os.waitpid(child, 0)
        os.close(reading)


def die_in_an_append(folder, name, part):
    """Killed when ``part`` of what ``name`` was to get is written."""
    put = files.put

    def dies(path, at, content):
        if path.name == name:
            put(path, at, content[: int(part * len(content))])
            os.kill(os.getpid(), signal.SIGKILL)
        put(path, at, content)

    files.put = dies
    FeatureStore(folder).append(np.full((5, 3), 9.0), [1] * 5, ["late"] * 5)


@pytest.mark.parametrize("name,part", [(files.FEATURES, 0.5), (files.TEXT, 0.5), (files.LOG, 0.0), (files.LOG, 0.9)])
def test_killed_in_the_middle_of_an_append(store, name, part):
    before = contents(store.folder)
    process = FORK.Process(target=die_in_an_append, args=(store.folder, name, part))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    after = contents(store.folder)
    assert any(len(after[k]) > len(before[k]) for k in before)  # stray bytes are there
    opened = FeatureStore(store.folder)
    opened.verify()
    assert np.array_equal(opened.features, rows(7)) and opened.names == store.names
    opened.append(rows(1, start=7), [0], ["next"])
    store.close()
    clean = FeatureStore.create(store.folder.parent / "clean", 3, classes=["ship", "plane"], metadata={"of": [1]})
    clean.append(rows(4), [0, 1, -1, 0], ["a", "b\n", "ü", "\udcff"], "train")
    clean.append(rows(3, start=4), [1, 1, 0], splits=["", "val", "test"])
    clean.append(rows(1, start=7), [0], ["next"])
    assert contents(store.folder) == contents(clean.folder)


@pytest.mark.parametrize("name,at,rows", [
    (files.FEATURES, 0, "0 to 3"), (files.FEATURES, 7 * 12 - 1, "4 to 6"), (files.LABELS, 4 * 8, "4 to 6"),
    (files.TEXT, 3, "0 to 3"),
])  # fmt: skip
def test_verify_names_a_damaged_byte(store, name, at, rows):
    damage(store.folder / name, at)
    with pytest.raises(ValueError, match=f"{name}, rows {rows}$"):
        FeatureStore(store.folder).verify()


def test_checksums_go_on_from_block_to_block(store):
    content = (store.folder / files.FEATURES).read_bytes()
    assert files.crc32_of(store.folder / files.FEATURES, 3, 50, block=7) == zlib.crc32(content[3:53])
    with pytest.raises(ValueError, match="features.bin is damaged: it ends 1 bytes too early"):
        files.crc32_of(store.folder / files.FEATURES, 3, len(content) - 2)


def damage(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [files.HEADER, files.LOG, *files.DATA])
def test_opening_finds_cheap_damage(store, name):
    path = store.folder / name
    content = path.read_bytes()
    if name == files.HEADER:
        path.write_bytes(content.replace(b'"dim": 3', b'"dim": 2'))
    elif name == files.LOG:
        damage(path, content.index(b"rows") + 8)
    else:
        path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        FeatureStore(store.folder)


def test_a_lost_line_of_the_log_is_damage(store):
    path = store.folder / files.LOG
    path.write_bytes(path.read_bytes().split(b"\n", 1)[1])
    with pytest.raises(ValueError, match=f"{files.LOG} is damaged: line 1"):
        FeatureStore(store.folder)


def test_headers_of_others(store):
    path = store.folder / files.HEADER
    header = json.loads(path.read_text())
    for change, message in (({"version": 2}, "of version 2"), ({"format": "other"}, "no header of a feature store")):
        path.write_text(json.dumps(header | change))
        with pytest.raises(ValueError, match=message):
            FeatureStore(store.folder)
