"""Probes against scikit-learn, brute force and hand-made cases; what they choose, and by which rows."""

import importlib.machinery
import sys
import types

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from rsfast.deblora import PROBES, hold_out, knn_probe, linear_probe, logistic_probe
from rsfast.deblora.probes.probe import macro_f1


def blobs(counts, dim=5, spread=1.0, seed=0):
    """Rows around a centre for each class, moved so that the mean is far from zero."""
    draw = np.random.default_rng(seed)
    centers = np.random.default_rng(9).normal(size=(len(counts), dim)) + 3
    labels = np.repeat(np.arange(len(counts)), counts)
    return centers[labels] + spread * draw.normal(size=(len(labels), dim)), labels


@pytest.fixture
def no_faiss(monkeypatch):
    """Whether it is installed or not, it is not there."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


@pytest.fixture
def fake_faiss(monkeypatch):
    """Flat indices by NumPy, under faiss's names; notes what was asked of them."""
    asked = []

    class Flat:
        def __init__(self, dim):
            self.dim = dim

        def add(self, rows):
            assert rows.dtype == np.float32 and rows.flags.c_contiguous and rows.shape[1] == self.dim
            self.rows = rows

        def search(self, x, k):
            asked.append((type(self).__name__, k))
            far = self.far(x)
            order = np.argsort(far, axis=1, kind="stable")[:, :k]
            return np.take_along_axis(far, order, 1), order

    class IndexFlatIP(Flat):
        def far(self, x):
            return -x @ self.rows.T

    class IndexFlatL2(Flat):
        def far(self, x):
            return ((x[:, None] - self.rows) ** 2).sum(-1)

    module = types.ModuleType("faiss")
    module.__spec__ = importlib.machinery.ModuleSpec("faiss", None)
    module.IndexFlatIP, module.IndexFlatL2 = IndexFlatIP, IndexFlatL2
    monkeypatch.setitem(sys.modules, "faiss", module)
    return asked


# ------------------------------------------------------------------ logistic regression
@pytest.mark.parametrize("C", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("weight", [None, "balanced"])
def test_logistic_regression_is_that_of_sklearn(C, weight):
    x, labels = blobs([40, 15, 6])
    theirs = LogisticRegression(C=C, class_weight=weight, tol=1e-8, max_iter=10000).fit(x, labels)
    ours = logistic_probe(x, labels, Cs=[C], loss="reweight" if weight else "ce", tol=1e-8, max_iter=10000)
    other, _ = blobs([20, 20, 20], seed=1)
    expected = theirs.predict_log_proba(other)
    found = torch.from_numpy(ours.scores(other)).log_softmax(1).numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.array_equal(ours.predict(other), theirs.predict(other))


def test_adjusting_afterwards_is_where_the_adjusted_loss_ends():
    """Trained with logits + log prior, by adding it as a feature that nothing scales: an offset in the objective."""
    x, labels = blobs([40, 15, 6])
    prior = np.log(np.array([40, 15, 6]) / 61)
    plain = logistic_probe(x, labels, Cs=[0.1], tol=1e-9, max_iter=10000)
    adjusted = logistic_probe(x, labels, Cs=[0.1], tol=1e-9, max_iter=10000, loss="logit-adjust")
    weight = adjusted.weight.clone().requires_grad_()
    bias = adjusted.bias.clone().requires_grad_()
    logits = torch.from_numpy(x) @ weight.T + bias + torch.from_numpy(prior)
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)) + weight.square().sum() / (2 * 0.1 * 61)
    loss.backward()
    least = (64 * np.finfo(np.float64).eps) ** 0.5  # where the loss stops to fall by more than the solver can tell
    assert weight.grad.abs().max() < least and bias.grad.abs().max() < least  # a minimum of the adjusted objective
    assert np.allclose(plain.scores(x) - prior, adjusted.scores(x), atol=1e-12)
    twice = logistic_probe(x, labels, Cs=[0.1], tol=1e-9, max_iter=10000, loss="logit-adjust", tau=2.0)
    assert np.allclose(plain.scores(x) - 2 * prior, twice.scores(x), atol=1e-12)


def test_c_is_chosen_on_val_and_fitted_again_on_both():
    x, labels = blobs([30, 30, 30], spread=2.0)
    other, truth = blobs([20, 20, 20], spread=2.0, seed=1)
    grid = np.logspace(-6, 4, 40)
    probe = logistic_probe(x, labels, val=(other, truth), tol=1e-8, max_iter=10000)
    scores = [
        f1_score(
            truth, LogisticRegression(C=C, tol=1e-8, max_iter=10000).fit(x, labels).predict(other), average="macro"
        )
        for C in grid
    ]
    best = int(np.argmax(scores))  # the first of equals: the smallest
    assert probe.chosen["C"] == pytest.approx(grid[best]) and probe.chosen["val_f1"] == pytest.approx(
        100 * scores[best]
    )
    both = LogisticRegression(C=grid[best], tol=1e-8, max_iter=10000)
    both.fit(np.concatenate([x, other]), np.concatenate([labels, truth]))
    assert np.abs(probe.weight.numpy() - both.coef_).max() <= 1e-5 * np.abs(both.coef_).max()


def test_of_equally_good_the_first_is_chosen():
    """The smallest C, however they are given, and the first epoch: classes far apart, which nearly any probe tells."""
    x, labels = blobs([9, 9], spread=0.01)
    probe = logistic_probe(x, labels, val=(x, labels), Cs=[10.0, 0.1, 1.0])
    assert probe.chosen["C"] == 0.1 and probe.chosen["val_f1"] == 100
    probe = linear_probe(x, labels, val=(x, labels), lr=0.1, epochs=60)
    assert probe.chosen["val_f1"] == 100 and probe.chosen["epoch"] < 60


def test_a_class_without_rows_is_never_predicted():
    x, labels = blobs([10, 0, 10])
    for loss in ("ce", "reweight", "logit-adjust"):
        for probe in (
            logistic_probe(x, labels, n_classes=4, Cs=[1.0], loss=loss),
            knn_probe(x, labels, n_classes=4, loss=loss),
            linear_probe(x, labels, n_classes=4, loss=loss, epochs=200, lr=0.1),
        ):
            assert probe.scores(x).shape == (20, 4) and set(probe.predict(x)) == {0, 2}
    scores = logistic_probe(x, labels, n_classes=4, Cs=[1.0]).scores(x)
    assert np.isneginf(scores[:, [1, 3]]).all() and np.isfinite(scores[:, [0, 2]]).all()


def test_one_class_alone():
    x, _ = blobs([4])
    assert all(set(PROBES[name](x, [1] * 4, n_classes=3, **more).predict(x)) == {1}
               for name, more in (("logistic", dict(Cs=[1.0])), ("knn", dict(k=3)),
                                  ("linear", dict(lr=0.1, epochs=100))))  # fmt: skip


# ------------------------------------------------------------------ linear probe
def test_linear_probe_is_sgd_with_momentum():
    """One batch an epoch, so that order decides nothing: v = 0.9 v + g, w = w - lr v."""
    x, labels = blobs([6, 4], dim=3)
    x, target = torch.from_numpy(x).float(), torch.from_numpy(labels)
    ours = [linear_probe(x, target, epochs=n, lr=0.1) for n in (1, 2, 3)]
    weight, bias = ours[0].weight.double(), ours[0].bias.double()

    def gradient(weight, bias):
        d = (x.double() @ weight.T + bias).softmax(1)
        d[torch.arange(10), target] -= 1
        return torch.cat([d.T @ x.double(), d.sum(0)[:, None]], 1) / 10

    then = torch.cat([ours[1].weight, ours[1].bias[:, None]], 1).double()
    first = torch.cat([weight, bias[:, None]], 1)
    velocity = (first - then) / 0.1  # 0.9 v1 + g2
    third = then - 0.1 * (0.9 * velocity + gradient(then[:, :-1], then[:, -1]))
    torch.testing.assert_close(torch.cat([ours[2].weight, ours[2].bias[:, None]], 1), third.float())
    assert linear_probe(x, target, epochs=3, lr=0.1, seed=1).weight.ne(ours[2].weight).all()


def test_linear_probe_keeps_the_best_epoch_on_val():
    """Against the probes of fewer epochs, which are the same run cut short."""
    x, labels = blobs([30, 10, 5], spread=2.0)
    other, truth = blobs([20, 20, 20], spread=2.0, seed=1)
    options = dict(lr=0.3, batch_size=16)
    short = [linear_probe(x, labels, epochs=n, **options) for n in range(1, 9)]
    scores = [f1_score(truth, probe.predict(other), average="macro") for probe in short]
    best = int(np.argmax(scores))
    assert best not in (0, 7)  # or the test would not tell
    found = linear_probe(x, labels, val=(other, truth), epochs=8, **options)
    assert found.chosen == {"epoch": best + 1, "val_f1": pytest.approx(100 * scores[best])}
    assert torch.equal(found.weight, short[best].weight) and short[7].chosen == {"epoch": 8}


# ------------------------------------------------------------------ nearest neighbours
@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("search", ["torch", "faiss"])
@pytest.mark.parametrize("k", [1, 4])
def test_neighbours_against_brute_force(fake_faiss, metric, search, k):
    x, labels = blobs([20, 9, 4], spread=2.0)
    other, _ = blobs([10, 10, 10], spread=2.0, seed=1)
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) if metric == "cosine" else v for v in (other, x))
    near = ((a[:, None] - b) ** 2).sum(-1).argsort(1)[:, :k]
    expected, shares = [], np.zeros((30, 3))
    for row, found in enumerate(labels[near]):
        votes = np.bincount(found, minlength=3)
        shares[row] = votes / k
        expected.append(next(c for c in found if votes[c] == votes.max()))  # nearest first
    probe = knn_probe(x, labels, k=k, metric=metric, search=search)
    assert probe.predict(other).tolist() == expected and np.allclose(probe.scores(other), shares, atol=1e-15)
    assert probe.chosen == {"k": k, "metric": metric, "search": search}
    assert set(fake_faiss) == (
        {({"cosine": "IndexFlatIP", "l2": "IndexFlatL2"}[metric], k)} if search == "faiss" else set()
    )


def test_fewer_rows_than_neighbours_asked_for(no_faiss):
    x, labels = blobs([4, 3])
    assert knn_probe(x, labels).chosen["k"] == 5 and knn_probe(x[:3], labels[:3]).chosen["k"] == 3


def test_tiles_change_nothing(monkeypatch, no_faiss):
    x, labels = blobs([20, 9, 4], spread=2.0)
    whole = knn_probe(x, labels).predict(x)
    monkeypatch.setattr("rsfast.deblora.probes.neighbours.TILE", 70)  # two queries at a time
    assert np.array_equal(knn_probe(x, labels).predict(x), whole)


def test_votes_of_rare_classes_weigh_more():
    """Two of three votes are of the class of four rows, one of that of one row."""
    x, labels = torch.tensor([[0.0], [1.0], [2.2], [9.0], [9.0]]), [0, 0, 1, 0, 0]
    query = torch.tensor([[1.0]])
    plain = knn_probe(x, labels, k=3, metric="l2")
    assert plain.predict(query).tolist() == [0] and plain.scores(query).tolist() == [[2 / 3, 1 / 3]]
    for loss in ("reweight", "logit-adjust"):
        probe = knn_probe(x, labels, k=3, metric="l2", loss=loss)
        assert probe.predict(query).tolist() == [1]
        assert probe.scores(query)[0].tolist() == pytest.approx([1 / 3, 2 / 3])  # 2/4 against 1/1


def test_which_search_is_taken(no_faiss, monkeypatch):
    x, labels = blobs([5, 5])
    assert knn_probe(x, labels).chosen["search"] == "torch"
    with pytest.raises(ImportError, match=r"rsfast\[faiss\]"):
        knn_probe(x, labels, search="faiss")


def test_faiss_is_taken_where_it_is(fake_faiss):
    x, labels = blobs([5, 5])
    assert knn_probe(x, labels).chosen["search"] == "faiss"


# ------------------------------------------------------------------ what all share
@pytest.mark.parametrize("name", list(PROBES))
def test_all_probes_are_called_alike(name, no_faiss):
    x, labels = blobs([9, 9, 9], spread=0.1)
    other, truth = blobs([5, 5, 5], spread=0.1, seed=1)
    more = dict(lr=0.1) if name == "linear" else {}
    probe = PROBES[name](x, labels, n_classes=3, val=(other, truth), loss="reweight", device="cpu", **more)
    scores, found = probe.scores(other), probe.predict(other)
    assert type(scores) is np.ndarray and found.dtype == np.int64 and np.array_equal(found, truth)
    tensor = torch.from_numpy(other)
    assert torch.equal(probe.predict(tensor), torch.from_numpy(found)) and isinstance(
        probe.scores(tensor), torch.Tensor
    )
    store = type("Store", (), {"features": other.astype(np.float16)})()
    assert np.array_equal(probe.predict(store), truth)
    with pytest.raises(ValueError, match="features must be 5 wide"):
        probe.predict(other[:, :4])


@pytest.mark.parametrize("name", list(PROBES))
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(labels=[0, 1, 2]), "labels must be of shape .4,."),
        (dict(labels=[0, 1, 2, 1], n_classes=2), "got 2 at index 2"),
        (dict(features=np.array([[0.0], [1.0], [np.nan], [2.0]])), "features must be finite.*: 2"),
        (dict(val=(np.ones((2, 2)), [0, 1])), "val must have features of width 1"),
        (dict(val=(np.array([[np.inf]]), [0])), "val's features must be finite.*: 0"),
        (dict(val=(np.ones((2, 1)), [0])), "val's labels must be of shape .2,."),
        (dict(loss="focal"), "loss must be one of"),
    ],
)
def test_what_every_probe_refuses(name, change, text):
    options = dict(features=np.arange(4.0)[:, None], labels=[0, 1, 0, 1]) | change
    with pytest.raises(ValueError, match=text):
        PROBES[name](options.pop("features"), options.pop("labels"), **options)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x, y: logistic_probe(x, y, Cs=[0.1, 1.0]), "val must be given to choose among 2"),
        (lambda x, y: logistic_probe(x, y, Cs=[0.0]), "Cs must be how many"),
        (lambda x, y: logistic_probe(x, y, Cs=0), "Cs must be how many"),
        (lambda x, y: linear_probe(x, y, epochs=0), "epochs must be"),
        (lambda x, y: linear_probe(x, y, lr=1e38), "not finite in epoch"),
        (lambda x, y: knn_probe(x, y, k=11), "k must be a whole number from 1 to 10"),
        (lambda x, y: knn_probe(x, y, metric="dot"), "metric must be one of cosine, l2"),
        (lambda x, y: knn_probe(x, y, search="ivf"), "search must be one of"),
    ],
)
def test_settings_that_do_not_fit(call, text):
    with pytest.raises(ValueError, match=text):
        call(*blobs([5, 5]))


def test_macro_f1_is_sklearns_over_the_classes_there_are():
    truth, found = torch.tensor([0, 0, 1, 1, 3]), torch.tensor([0, 2, 1, 0, 3])
    expected = 100 * f1_score(truth, found, labels=[0, 1, 3], average="macro")
    assert macro_f1(truth, found, 5) == pytest.approx(expected)


def test_hold_out_splits_every_class():
    labels = np.array([0] * 10 + [1] * 4 + [2] * 2 + [3])
    train, val = hold_out(labels, 0.25, seed=3)
    assert np.bincount(labels[val], minlength=4).tolist() == [2, 1, 1, 0]
    assert np.array_equal(np.sort(np.concatenate([train, val])), np.arange(17))
    again, other = hold_out(labels, 0.25, seed=3)[1], hold_out(labels, 0.25, seed=4)[1]
    assert np.array_equal(again, val) and not np.array_equal(other, val)
    assert len(hold_out([0, 1, 2])[1]) == 0
    with pytest.raises(ValueError, match="share must be above 0 and below 1"):
        hold_out(labels, 1.0)
