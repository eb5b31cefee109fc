"""Class sizes, head, middle and tail, weights and priors, and tails made on purpose; by hand, and at the borders."""

import math

import numpy as np
import pytest
import torch

from rsfast.deblora import ClassCounts, make_long_tailed
from rsfast.deblora.data.counts import DOTA_GROUPS


def labels_of(*counts):
    return np.repeat(np.arange(len(counts)), counts)


def test_counts_by_hand():
    found = ClassCounts.from_labels(labels_of(5, 0, 1, 20), classes=["a", "b", "c", "d"])
    assert found.classes == ("a", "b", "c", "d") and found.counts.tolist() == [5, 0, 1, 20]
    assert found.imbalance == 20.0  # class b has no samples and does not count
    assert found.ratios.tolist() == [4.0, math.inf, 20.0, 1.0]
    assert found.groups == {"head": (3,), "middle": (0, 2), "tail": (1,)}


def test_kind_of_the_labels_is_the_kind_of_the_answer():
    labels = labels_of(3, 1)
    for given, kind in ((labels, np.ndarray), (labels.tolist(), np.ndarray), (torch.from_numpy(labels), torch.Tensor)):
        found = ClassCounts.from_labels(given)
        values = (found.counts, found.ratios)
        assert all(isinstance(value, kind) for value in values) and found.classes == ("0", "1")
        assert [str(v.dtype).removeprefix("torch.") for v in values] == ["int64", "float64"]
        assert found.ratios.tolist() == [1.0, 3.0]


@pytest.mark.parametrize(
    ("counts", "head", "middle", "tail"),
    [
        ((7,), (0,), (), ()),
        ((1, 7), (1,), (), (0,)),
        ((4, 4), (0,), (), (1,)),  # of equal ones the lower id is the larger
        ((2, 9, 4), (1,), (2,), (0,)),
        ((1, 2, 3, 4), (3,), (2, 1), (0,)),
        ((1, 2, 3, 4, 5), (4, 3), (2,), (1, 0)),
        ((3, 3, 3, 3, 3, 3), (0, 1), (2, 3), (4, 5)),
        (tuple(range(15, 0, -1)), tuple(range(5)), tuple(range(5, 10)), tuple(range(10, 15))),
        ((0, 6, 5), (1,), (2,), (0,)),
    ],
)
def test_groups_by_rank(counts, head, middle, tail):
    found = ClassCounts.from_labels(labels_of(*counts), classes=range(len(counts)))
    assert found.groups == {"head": head, "middle": middle, "tail": tail}


def test_groups_of_dota_by_name():
    names = ["Ground Track Field", "small_vehicle", "harbor", "PLANE"]
    found = ClassCounts.from_labels(labels_of(1, 2, 3, 9), classes=names, groups="dota")
    assert found.groups == {"head": (3, 1), "middle": (2,), "tail": (0,)}
    assert [len(names) for names in DOTA_GROUPS.values()] == [4, 5, 6]
    with pytest.raises(ValueError, match="groups='dota' knows ship, .*; it has no class 'container-crane'"):
        ClassCounts.from_labels([0], classes=["container-crane"], groups="dota")


def test_groups_as_given():
    groups = {"tail": ["b", 0], "head": [np.int64(2)]}
    found = ClassCounts.from_labels(labels_of(1, 5, 9, 2), classes=["a", "b", "c", "d"], groups=groups)
    assert found.groups == {"head": (2,), "middle": (), "tail": (1, 0)}  # d is in none


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(labels=[]), "labels must hold one label at least"),
        (dict(labels=[0, -1]), "labels must be at least 0, got -1 at index 1"),
        (dict(labels=[0.0, 1.0]), "labels must be integers"),
        (dict(labels=[0, 2], classes=["a", "b"]), "labels must be below 2, the number of classes, got 2"),
        (dict(labels=[0], classes=["a", "a"]), "classes must differ, got 'a' more than once"),
        (dict(labels=[0], groups="thirds"), "groups must be 'auto', 'dota' or a mapping"),
        (dict(labels=[0], groups={"many": [0]}), "groups must be named head, middle, tail, got 'many'"),
        (dict(labels=[0], groups={"head": "0"}), "head must be a sequence"),
        (dict(labels=[0], groups={"head": ["ship"]}), "head has 'ship', which is no class"),
        (dict(labels=[0], groups={"head": [1]}), "head has 1, which is no class: there are 1"),
        (dict(labels=[0, 1], groups={"head": [0], "tail": ["0"]}), "class '0' of tail is in head already"),
        (dict(labels=[0, 1], groups={"head": [0, 0]}), "class 0 of head is in head already"),
    ],
)
def test_bad_counts(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClassCounts.from_labels(**arguments)


def test_a_tail_has_the_sizes_of_the_profile():
    labels = np.random.default_rng(0).permutation(labels_of(300, 200, 250, 400, 1000))
    seen = set()
    for seed in range(6):
        indices = make_long_tailed(labels, 16, seed)
        assert indices.dtype == np.int64 and (np.diff(indices) > 0).all()
        counts = np.bincount(labels[indices], minlength=5)
        assert sorted(counts.tolist(), reverse=True) == [200, 100, 50, 25, 13]  # 12.5 is rounded up
        seen.add(tuple(counts.tolist()))
        np.testing.assert_array_equal(indices, make_long_tailed(labels, 16.0, np.int64(seed)))
    assert len(seen) > 3
    assert len(np.unique(labels[make_long_tailed(labels, 1, 0)], return_counts=True)[1]) == 5
    # any class can be the head, whatever its size
    assert {int(np.bincount(labels[make_long_tailed(labels, 16, s)]).argmax()) for s in range(40)} == set(range(5))


def test_a_tail_at_the_borders():
    assert len(make_long_tailed(labels_of(7), 100, 0)) == 7  # one class is all head
    two = labels_of(0, 50, 0, 80)  # classes without samples have no rank
    assert sorted(np.bincount(two[make_long_tailed(two, 100, 0)]).tolist()) == [0, 0, 1, 50]
    assert make_long_tailed([0, 1, 2], 1e9, 3).tolist() == [0, 1, 2]  # at least one of each
    tensor = torch.from_numpy(two)
    found = make_long_tailed(tensor, 5, 1)
    assert isinstance(found, torch.Tensor) and found.tolist() == make_long_tailed(two, 5, 1).tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 10, 0), "labels must hold one label at least"),
        (([0, -2], 10, 0), "labels must be at least 0, got -2 at index 1"),
        (([0], 0.5, 0), "imbalance must be a number of at least 1, got 0.5"),
        (([0], math.inf, 0), "imbalance must be"),
        (([0], math.nan, 0), "imbalance must be"),
        (([0], "10", 0), "imbalance must be"),
        (([0], True, 0), "imbalance must be"),
        (([0], 10, -1), "seed must be an integer of at least 0, got -1"),
        (([0], 10, 1.5), "seed must be"),
    ],
)
def test_bad_tails(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_long_tailed(*arguments)
