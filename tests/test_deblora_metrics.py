"""Grouped F1 against scikit-learn and by hand; distances of classes by hand and by the plain formula."""

import math

import numpy as np
import pytest
import torch

from rsfast.deblora import ClassCounts, class_distances, class_f1, grouped_f1

GROUPS = {"head": [0, 3], "middle": [1], "tail": [2, 4]}


def drawn(seed=0, size=200, classes=5):
    rng = np.random.default_rng(seed)
    true = rng.choice(classes, size, p=np.arange(classes, 0, -1) / sum(range(classes + 1)))
    return true, np.where(rng.random(size) < 0.6, true, rng.integers(0, classes, size))


@pytest.mark.parametrize("seed", range(5))
def test_both_styles_are_those_of_scikit_learn(seed):
    from sklearn.metrics import f1_score

    true, predicted = drawn(seed, size=40)  # few enough that a class is missing now and then
    strict, deblora = (grouped_f1(true, predicted, GROUPS, style=style) for style in ("strict", "deblora"))
    for group, ids in GROUPS.items():
        rows = np.isin(true, ids)
        expected = 100 * f1_score(true, predicted, labels=ids, average="macro", zero_division=np.nan)
        assert strict[group] == pytest.approx(expected, rel=1e-12)
        expected = 100 * f1_score(true[rows], predicted[rows], average="macro", zero_division=0)
        assert deblora[group] == pytest.approx(expected, rel=1e-12) and deblora[group] != strict[group]
    single = 100 * f1_score(true, predicted, labels=range(7), average=None, zero_division=np.nan)
    np.testing.assert_allclose(class_f1(true, predicted, 7), single, rtol=1e-12)
    assert strict["mean"] == deblora["mean"]
    assert strict["mean"] == pytest.approx(100 * f1_score(true, predicted, average="macro"), rel=1e-12)


def test_f1_by_hand():
    true, predicted = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 0]
    # class 0: 2 hits of 3 true and 4 predicted, class 1: 1 hit of 2 and 2, class 2: none of 1 and 0
    expected = {"head": 400 / 7, "middle": 50.0, "tail": 0.0, "mean": 100 * (4 / 7 + 1 / 2) / 3}
    groups = {"head": [0], "middle": [1], "tail": [2]}
    assert grouped_f1(true, predicted, groups) == pytest.approx(expected, rel=1e-15)
    # head: 0 0 0 as 0 0 1; middle: 1 1 as 1 0; tail: 2 as 0
    expected = {"head": 40.0, "middle": 100 / 3, "tail": 0.0, "mean": expected["mean"]}
    assert grouped_f1(true, predicted, groups, style="deblora") == pytest.approx(expected, rel=1e-15)


def test_classes_without_rows():
    counts = ClassCounts.from_labels(
        [0, 0, 0, 1, 1, 2], classes=["a", "b", "c", "never"], groups=GROUPS | {"tail": [2]}
    )
    found = grouped_f1([0, 0, 1], [0, 2, 1], counts)
    assert found["head"] == pytest.approx(200 / 3) and found["middle"] == 100.0  # class 3 is nowhere: left out
    assert found["tail"] == 0.0 and found["mean"] == pytest.approx(500 / 9)  # class 2 was only predicted: F1 of 0
    found = grouped_f1([0, 0, 1], [0, 2, 1], counts, style="deblora")
    assert found["head"] == pytest.approx(100 / 3) and math.isnan(found["tail"])  # no row is truly of class 2
    empty = grouped_f1([0], [0], {"head": [0], "tail": [9]})
    assert empty["head"] == empty["mean"] == 100.0 and math.isnan(empty["middle"]) and math.isnan(empty["tail"])


def test_groups_of_counts_and_tensors_are_the_same():
    true, predicted = drawn()
    counts = ClassCounts.from_labels(true)
    assert counts.groups == {"head": (0, 1), "middle": (2,), "tail": (3, 4)}
    as_mapping = grouped_f1(true, predicted, counts.groups)
    assert as_mapping == grouped_f1(torch.from_numpy(true), torch.from_numpy(predicted), counts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], GROUPS), "y_true must hold one class at least"),
        (([0, 1], [0], GROUPS), r"y_pred must be of shape \(2,\)"),
        (([0, 1], [0, -1], GROUPS), "y_pred must be at least 0, got -1 at index 1"),
        (([0, 2], [0, 1], ClassCounts.from_labels([0, 1])), r"y_true must be in 0..1, got 2 at index 1"),
        (([0], [0], {"many": [0]}), "groups must be named head, middle, tail, got 'many'"),
        (([0], [0], {"head": ["a"]}), "groups: head must be integers"),
    ],
)
def test_bad_f1(arguments, message):
    with pytest.raises(ValueError, match=message):
        grouped_f1(*arguments)
    with pytest.raises(ValueError, match="style must be strict or deblora, got 'loose'"):
        grouped_f1([0], [0], GROUPS, style="loose")


def test_distances_by_hand():
    # centres: 0 along x, 1 along y, 2 along -x, 4 at 45 degrees; class 3 has no rows
    features = np.array([[3, 4], [3, -4], [0, 2], [-1, 0], [0.5, 0.5]], np.float32)
    groups = {"head": [0], "middle": [1, 3], "tail": [2, 4]}
    found = class_distances(features, [0, 0, 1, 2, 4], groups=groups)
    near, far = 1 - math.sqrt(0.5), 1 + math.sqrt(0.5)
    expected = {
        "inter": (1 + 2 + near + 1 + near + far) / 6,
        "intra": 0.4 / 4,  # rows of class 0 have a cosine of 0.6 to their centre
        "inter_head_head": math.nan,
        "inter_head_middle": 1.0,
        "inter_head_tail": (2 + near) / 2,
        "inter_middle_middle": math.nan,
        "inter_middle_tail": (1 + near) / 2,
        "inter_tail_tail": far,
        "intra_head": 0.4,
        "intra_middle": 0.0,
        "intra_tail": 0.0,
    }
    assert found == pytest.approx(expected, abs=1e-6, nan_ok=True) and list(found) == list(expected)
    assert {name: found[name] for name in ("inter", "intra")} == class_distances(features, [0, 0, 1, 2, 4])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_distances_are_those_of_the_formula_in_any_portions(dtype):
    rng = np.random.default_rng(0)
    labels = np.r_[0, rng.integers(1, 6, 99)]  # class 0 has one row
    features = torch.from_numpy(rng.normal(size=(100, 7)) + labels[:, None]).to(dtype)
    centers = torch.stack([features[labels == c].double().mean(0) for c in range(6)])
    cosine = torch.nn.functional.cosine_similarity
    intra = [1 - cosine(features[labels == c].double(), centers[c][None]).mean() for c in range(6)]
    inter = [1 - cosine(centers[a], centers[b], dim=0) for a in range(6) for b in range(a)]
    expected = {"inter": float(sum(inter) / 15), "intra": float(sum(intra) / 6)}
    allowed = 1e-14 if dtype == torch.float64 else 8 * torch.finfo(torch.float32).eps
    for batch_size in (None, 100, 33, 1):
        assert class_distances(features, labels, batch_size=batch_size) == pytest.approx(expected, abs=allowed)
    assert class_distances(features.numpy(), labels) == pytest.approx(expected, abs=allowed)


def test_distances_at_the_borders():
    one = class_distances(torch.tensor([[1.0, 1.0], [2.0, 2.0]]), [2, 2], groups={"tail": [2]})
    assert math.isnan(one["inter"]) and one["intra"] == pytest.approx(0, abs=1e-6) and one["intra"] >= 0
    for width in range(1, 30):  # a row is at no distance from itself, also where its cosine is rounded up
        row = torch.linspace(0.1, 1, width)[None]
        assert (
            class_distances(row, [0])["intra"] == pytest.approx(0, abs=1e-6) and class_distances(row, [0])["intra"] >= 0
        )
    zeros = class_distances(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), [0, 1])
    assert zeros == {"inter": 1.0, "intra": 0.5}
    with pytest.raises(ValueError, match=r"NaN or infinity in 1 row\(s\): 1"):
        class_distances(torch.tensor([[0.0], [math.nan]]), [0, 1])
    with pytest.raises(ValueError, match=r"labels must be of shape \(2,\)"):
        class_distances(torch.ones(2, 2), [0])
