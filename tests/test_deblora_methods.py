"""Names of methods, settings, the table and the figures of a comparison."""

import dataclasses

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from rsfast.deblora.comparison.config import RunConfig
from rsfast.deblora.comparison.figures import COLOURS, _by_rank, _plane, draw_by_class, draw_calibration
from rsfast.deblora.comparison.methods import DEFAULT, METHODS, parse_methods
from rsfast.deblora.comparison.table import table

ROW = dict(method="lora", seed=0, head=90.0, middle=80.0, tail=10.0, mean=60.0, inter=0.5, intra=0.25, seconds=1.0)


def test_names_of_methods():
    assert [m.name for m in parse_methods("all")] == list(METHODS) and len(METHODS) == 18
    assert [m.name for m in parse_methods(" LoRA , deblora,,lora")] == ["lora", "deblora"]
    assert parse_methods("zero-shot+deblora") == parse_methods("deblora")
    assert {m.name: (m.trained, m.loss, m.step) for m in parse_methods(DEFAULT)} == {
        "zero-shot": (None, "ce", None),
        "fine-tune": ("full", "ce", None),
        "lora": ("lora", "ce", None),
        "clora": ("class-wise", "ce", None),
        "reweight": ("lora", "reweight", None),
        "logit-adjust": ("lora", "logit-adjust", None),
        "deblora": (None, "ce", "deblora"),
        "lora+deblora": ("lora", "ce", "deblora"),
        "calibrate": (None, "ce", "calibrate"),
    }


@pytest.mark.parametrize("names", ["", " , ", "lora,adalora", "lora+", "deblora+deblora"])
def test_unknown_methods_are_refused(names):
    with pytest.raises(ValueError, match="method must"):
        parse_methods(names)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(features="a.npz", images="b"), "exclude"),
        (dict(images="b"), "images need a model"),
        (dict(model="ViT-B-32"), "model is for images"),
        (dict(image_root="b", features="a.npz"), "image_root is for images"),
        (dict(seeds=()), "seeds must be"),
        (dict(seeds=(0, 0)), "seeds must differ"),
        (dict(seeds=(-1,)), "seeds must be"),
        (dict(clusters=0), "clusters must be a positive integer below 2..31, got 0"),
        (dict(rank=2.0), "rank must be"),
        (dict(rho=0.5), "rho must be a number of at least 1, got 0.5"),
        (dict(imbalance=float("nan")), "imbalance must"),
        (dict(alpha=1.5), "alpha must be"),
        (dict(alpha="none"), "alpha must be"),
        (dict(lr=0.0), "lr must be"),
        (dict(weight_decay=-1.0), "weight_decay"),
        (dict(val_share=1.0), "val_share"),
        (dict(test_share=0.0), "test_share"),
        (dict(probe="svm"), "probe must be of linear, logistic, knn, got 'svm'"),
        (dict(method="x"), "method must"),
        (dict(method="zero-shot,lora", precision="fp16"), "fp32 or bf16 where something is trained, as lora"),
        (dict(method="deblora", precision="fp16"), "as deblora"),
        (dict(workers=-1), "workers must be"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(out="x", **settings)


def test_nothing_that_is_trained_may_be_in_fp16():
    assert RunConfig(out="x", method="zero-shot,calibrate", precision="fp16").precision == "fp16"


def test_settings_are_checked_when_they_are_replaced():
    with pytest.raises(ValueError, match="clusterer must be of"):
        dataclasses.replace(RunConfig(out="x"), clusterer="em")


def test_table_has_mean_and_sample_deviation():
    rows = [ROW, ROW | dict(seed=1, tail=13.0), ROW | dict(method="deblora", middle=None)]
    head, first, second = table(rows).splitlines()
    assert head.split() == ["method", "head", "middle", "tail", "macro", "F1", "inter", "intra", "seconds"]
    assert first.split()[:7] == ["lora", "90.0", "±", "0.0", "80.0", "±", "0.0"]
    assert "11.5 ± 2.1" in first  # sqrt(((10 - 11.5)^2 + (13 - 11.5)^2) / 1)
    assert second.split() == ["deblora", "90.0", "-", "10.0", "60.0", "0.500", "0.250", "1.0"]
    assert len({len(line) for line in (head, first, second)}) == 1


def test_classes_are_averaged_by_rank():
    rows = [
        dict(method="a", seed=0, train=4, f1=10.0), dict(method="a", seed=0, train=2, f1=30.0),
        dict(method="a", seed=1, train=2, f1=50.0), dict(method="a", seed=1, train=8, f1=20.0),
    ]  # fmt: skip
    sizes, scores = _by_rank(rows)
    assert sizes.tolist() == [2.0, 6.0] and scores.tolist() == [40.0, 15.0]
    rows[0]["f1"] = None
    assert _by_rank(rows)[1].tolist() == [40.0, 20.0]
    rows[3]["f1"] = None
    np.testing.assert_array_equal(_by_rank(rows)[1], [40.0, np.nan])


def test_pca_keeps_distances_of_a_plane():
    draw = np.random.default_rng(0)
    axes = np.linalg.qr(draw.normal(size=(6, 2)))[0].T
    flat = [draw.normal(size=(9, 2)), draw.normal(size=(4, 2))]
    found = _plane([part @ axes + 3 for part in flat], "pca", 0)
    for part, plane in zip(flat, found, strict=True):
        expected = np.linalg.norm(part[:, None] - flat[0], axis=-1)
        np.testing.assert_allclose(np.linalg.norm(plane[:, None] - found[0], axis=-1), expected, atol=1e-5)


def test_pictures_take_any_name_of_a_class(tmp_path, monkeypatch):
    seen, legend = [], Figure.legend

    def kept(figure, handles, names, **options):
        seen.append(legend(figure, handles, names, **options))
        return seen[0]

    monkeypatch.setattr(Figure, "legend", kept)
    z = np.arange(6.0).reshape(3, 2)
    names = ["a$_", "_hidden", "$x_$"]
    draw_calibration(tmp_path / "a.png", z, z, np.arange(3), z, z, classes=names, tail=[0, 1, 2])
    assert [text.get_text().strip() for text in seen[0].get_texts()][1:4] == names


@pytest.mark.parametrize("embedding", ["pca", "tsne"])
def test_pictures_show_the_tail_in_colour(tmp_path, embedding):
    draw = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [30, 3, 2])
    before = draw.normal(size=(35, 5))
    after, mu = before.copy(), draw.normal(size=(3, 5))
    after[30:] = 0.5 * (before[30:] + mu[labels[30:]])
    draw_calibration(
        tmp_path / "a.png", before, after, labels, draw.normal(size=(4, 5)), mu, classes=["a", "b", "c"], tail=[2, 1],
        embedding=embedding,
    )  # fmt: skip
    draw_by_class(tmp_path / "b.png", [dict(method="a", seed=0, train=n, f1=50.0) for n in (0, 5, 100)])
    for name in ("a.png", "b.png"):
        colours = {colour for _, colour in Image.open(tmp_path / name).convert("RGB").getcolors(2**24)}
        assert tuple(bytes.fromhex(COLOURS[0][1:])) in colours, name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]
