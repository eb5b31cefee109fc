"""Learning towards targets and by classes: what moves, where to, and that stopping in between changes nothing."""

import math

import numpy as np
import pytest
import torch
from open_clip.transformer import VisionTransformer
from PIL import Image
from torch import nn

from rsfast.deblora import (
    ClassMaps,
    FeatureInputs,
    FullMap,
    ImageInputs,
    LowRankMap,
    class_loss,
    encode,
    learn_classes,
    learn_towards,
)
from rsfast.deblora.learning import steps
from rsfast.deblora.learning.losses import balanced_weights, log_prior
from rsfast.models import add_lora


def rows(count=24, dim=6, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def low_rank(dim=6, r=2, seed=0):
    torch.manual_seed(seed)
    return LowRankMap(dim, r)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


class Pictures:
    """Images of one colour each."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def load(self, i):
        return Image.new("RGB", (16, 16), (i * 20, 255 - i * 20, 100))


def pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def tower():
    torch.manual_seed(0)
    return VisionTransformer(16, 8, 16, 1, 2, 2.0, output_dim=8).eval()


class Noisy(nn.Module):
    """Something that draws, something with statistics, something frozen."""

    def __init__(self):
        super().__init__()
        self.frozen, self.norm, self.map = nn.BatchNorm1d(6), nn.BatchNorm1d(6), LowRankMap(6, 2)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        x = self.norm(self.frozen(x))
        return self.map(x + 0.1 * torch.randn_like(x) if self.norm.training else x)


# ------------------------------------------------------------------ towards targets
def test_nothing_moves_where_targets_are_the_features():
    """Every distance is 0, where the norm has no gradient of its own."""
    z, encoder = rows(), low_rank()
    before = {name: p.clone() for name, p in encoder.named_parameters()}
    assert learn_towards(encoder, z, z, epochs=2, weight_decay=0.0) == [0.0, 0.0]
    assert all(torch.equal(p, before[name]) for name, p in encoder.named_parameters())


def test_losses_are_mean_distances():
    """The first step sees the start: 3-4-5 triangles, of which the last batch has one row."""
    z, shift = torch.zeros(3, 2), torch.tensor([3.0, 4.0])
    options = dict(epochs=1, batch_size=3, lr=1e-9)
    assert learn_towards(FullMap(2), z, z + shift, **options) == [5.0]
    assert learn_towards(FullMap(2), z, z + shift, squared=True, **options) == [25.0]
    targets = z + shift * torch.tensor([[1.0], [2.0], [3.0]])
    assert learn_towards(FullMap(2), z, targets, **options | {"batch_size": 2}) == pytest.approx([10.0], abs=1e-6)


def test_weights_of_rows():
    """Distances 0, 5 and 10 with weights of 2, 1 and 1, which are scaled to 3/2, 3/4 and 3/4."""
    z, targets = torch.zeros(3, 2), torch.tensor([[0.0, 0], [3, 4], [6, 8]])
    options = dict(epochs=1, batch_size=3, lr=1e-9)
    assert learn_towards(FullMap(2), z, targets, weights=[2, 1, 1], **options) == [3.75]
    for weights, text in (([1, 1], "must be .3,.,"), ([1, -1, 1], "row 1 is -1"), ([0] * 3, "not all be 0")):
        with pytest.raises(ValueError, match=text):
            learn_towards(FullMap(2), z, targets, weights=weights, **options)


def test_least_squares_are_found():
    """Squared distances of a full map have one minimum, which lstsq gives; from features with a column of ones."""
    z = rows(40, 3).double()
    there = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.5, 0.0], [0.3, 0.0, 1.0]]).double()
    targets = z @ there + 0.1 * rows(40, 3, seed=1)
    encoder = FullMap(3).double()
    losses = learn_towards(encoder, z, targets, epochs=150, batch_size=40, lr=0.05, weight_decay=0.0, squared=True)
    augmented = torch.cat([z, torch.ones(40, 1).double()], 1)
    best = torch.linalg.lstsq(augmented, targets).solution
    least = (augmented @ best - targets).square().sum(1).mean().item()
    assert least * (1 - 1e-9) <= losses[-1] <= least * 1.001
    torch.testing.assert_close(torch.cat([encoder.weight + torch.eye(3).double(), encoder.bias[:, None]], 1), best.T,
                               rtol=0, atol=1e-2)  # fmt: skip


def test_the_norm_finds_a_median_where_its_square_finds_a_mean():
    """One map for features that are all alike; two of three targets agree. So do tail rows against head rows."""
    z, targets = torch.zeros(3, 1), torch.tensor([[0.0], [0.0], [3.0]])
    found = {}
    for squared in (False, True):
        encoder = FullMap(1)
        learn_towards(encoder, z, targets, epochs=400, batch_size=3, lr=0.05, weight_decay=0.0, squared=squared)
        found[squared] = encoder.bias.item()
    assert found[False] == pytest.approx(0.0, abs=1e-3) and found[True] == pytest.approx(1.0, abs=1e-3)


def test_only_what_requires_a_gradient_learns_and_frozen_statistics_stay():
    encoder, z = Noisy(), rows() + 2
    before = {name: t.clone() for name, t in encoder.state_dict().items()}
    encoder.train()
    modes = {name: m.training for name, m in encoder.named_modules()}
    learn_towards(encoder, z, z + 1, epochs=2, batch_size=8)
    changed = {name for name, t in encoder.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {"norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked",
                       "map.lora_A", "map.lora_B"}  # fmt: skip
    assert {name: m.training for name, m in encoder.named_modules()} == modes


def test_seed_decides_and_the_callers_random_state_stays():
    z = rows()
    made = []
    for caller, seed in ((1, 0), (2, 0), (1, 5)):
        encoder = low_rank()
        torch.manual_seed(caller)
        before = torch.get_rng_state()
        made.append((learn_towards(encoder, z, z + 1, epochs=2, batch_size=5, seed=seed), encoder))
        assert torch.equal(before, torch.get_rng_state())
    (first, one), (second, two), (third, other) = made
    assert first == second and same(one, two) and first != third and not same(one, other)


def test_every_row_is_seen_once_an_epoch_in_an_order_of_its_own():
    seen = []

    class Watching(FeatureInputs):
        def batch(self, indices, device):
            seen.append(torch.as_tensor(indices).tolist())
            return super().batch(indices, device)

    inputs = Watching(rows(7))
    learn_towards(low_rank(), inputs, rows(7) + 1, epochs=2, batch_size=3)
    trained = seen[1:]  # the first looks whether shapes fit
    assert [len(batch) for batch in trained] == [3, 3, 1] * 2
    first, second = sum(trained[:3], []), sum(trained[3:], [])
    assert sorted(first) == sorted(second) == list(range(7)) and first != second


def test_learning_rate_is_a_cosine():
    rates = [steps.cosine(step, lr=2.0, total=4) for step in range(5)]
    assert rates == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5), 0.0])


# ------------------------------------------------------------------ by the classes
def test_losses_by_hand():
    """Counts 6, 3, 0, 1 of 10 rows and 3 classes that have any; logits ln 2, 0, 0, 0 give 2/5, 1/5, 1/5, 1/5."""
    counts, logits = [6, 3, 0, 1], torch.tensor([[math.log(2.0), 0, 0, 0]] * 2, dtype=torch.float64)
    labels = torch.tensor([0, 3])
    assert balanced_weights(counts).tolist() == pytest.approx([10 / 18, 10 / 9, 0, 10 / 3])
    assert log_prior(counts).tolist() == pytest.approx([math.log(0.6), math.log(0.3), 0, math.log(0.1)])
    plain = -(math.log(2 / 5) + math.log(1 / 5)) / 2
    weighted = -(10 / 18 * math.log(2 / 5) + 10 / 3 * math.log(1 / 5)) / 2
    total = 2 * 0.6 + 0.3 + 1 + 0.1  # exp of logits + log prior; a class without rows is not adjusted
    adjusted = -(math.log(1.2 / total) + math.log(0.1 / total)) / 2
    squared = 2 * 0.6**2 + 0.3**2 + 1 + 0.1**2
    assert class_loss("ce")(logits, labels).item() == pytest.approx(plain)
    assert class_loss("reweight", counts)(logits, labels).item() == pytest.approx(weighted)
    assert class_loss("logit-adjust", counts)(logits, labels).item() == pytest.approx(adjusted)
    with_tau = class_loss("logit-adjust", counts, tau=2.0)(logits, labels).item()
    assert with_tau == pytest.approx(-(math.log(2 * 0.36 / squared) + math.log(0.01 / squared)) / 2)


def test_counts_may_be_an_object():
    class Counts:
        counts = np.array([3, 1])

    assert torch.equal(log_prior(Counts()), log_prior(torch.tensor([3, 1])))


@pytest.mark.parametrize("loss", ["ce", "reweight", "logit-adjust"])
def test_a_head_learns_what_the_loss_says(loss):
    """Features that say nothing: the biases alone fit the labels, 6 of class 0 and 2 of class 1."""
    labels, head = torch.tensor([0] * 6 + [1] * 2), nn.Linear(2, 2)
    nn.init.zeros_(head.weight)
    learn_classes(FullMap(2), head, torch.zeros(8, 2), labels, loss=loss, epochs=200, batch_size=8, lr=0.1,
                  weight_decay=0.0)  # fmt: skip
    gap = (head.bias[0] - head.bias[1]).item()
    assert gap == pytest.approx({"ce": math.log(3), "reweight": 0.0, "logit-adjust": 0.0}[loss], abs=1e-3)


def test_counts_are_those_of_the_labels_unless_given():
    z, labels, losses = rows(8), torch.tensor([0] * 6 + [1] * 2), []
    for counts in (None, [6, 2], [4, 4]):
        encoder = low_rank()
        head = nn.Linear(6, 2)
        nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
        losses += learn_classes(encoder, head, z, labels, loss="logit-adjust", counts=counts, epochs=1)
    assert losses[0] == losses[1] != losses[2]


def test_class_maps_learn_with_their_own_head():
    z = rows(30)
    labels = z[:, :3].argmax(1)
    torch.manual_seed(0)
    maps = ClassMaps(6, 3, r=2)
    losses = learn_classes(maps, None, z, labels, epochs=60, batch_size=10, lr=0.03)
    assert losses[-1] < 0.1 and torch.equal(maps.logits(z).argmax(1), labels)
    assert encode(maps, z).shape == (30, 6)


# ------------------------------------------------------------------ stopping and going on
@pytest.mark.parametrize("task", ["towards", "classes"])
def test_resumed_is_uninterrupted(tmp_path, monkeypatch, task):
    z, path = rows(), tmp_path / "last.pt"

    def learn(encoder, checkpoint):
        if task == "towards":
            return learn_towards(encoder, z, z + 1, epochs=4, batch_size=7, checkpoint=checkpoint)
        torch.manual_seed(8)
        encoder.head = nn.Linear(6, 3)
        labels = torch.arange(24) % 3
        return learn_classes(encoder, encoder.head, z, labels, loss="reweight", epochs=4, batch_size=7,
                             checkpoint=checkpoint)  # fmt: skip

    def fresh():
        torch.manual_seed(0)
        return Noisy()

    whole = fresh()
    expected = learn(whole, None)
    save, saved = steps._save, []

    def interrupted(*args):
        save(*args)
        saved.append(1)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(steps, "_save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learn(fresh(), path)
    resumed = fresh()
    assert learn(resumed, path) == expected and same(resumed, whole) and len(saved) == 4
    finished = fresh()  # all is done: only the weights are read
    assert learn(finished, path) == expected and same(finished, whole) and len(saved) == 4


def test_a_checkpoint_of_other_settings_or_data_is_refused(tmp_path):
    z, path = rows(), tmp_path / "last.pt"
    learn_towards(low_rank(), z, z + 1, epochs=1, checkpoint=path)
    for change, named in (
        (dict(lr=0.5), "lr"),
        (dict(epochs=2), "epochs"),
        (dict(squared=True), "squared"),
        (dict(targets=z + 2), "targets"),
        (dict(inputs=z + 1), "inputs"),
        (dict(encoder=low_rank(r=3)), "parameters"),
    ):
        options = dict(encoder=low_rank(), inputs=z, targets=z + 1, epochs=1) | change
        before = {name: p.clone() for name, p in options["encoder"].named_parameters()}
        with pytest.raises(ValueError, match=f"another training, which differs in {named};"):
            learn_towards(checkpoint=path, **options)
        assert all(torch.equal(p, before[name]) for name, p in options["encoder"].named_parameters())
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="is damaged"):
        learn_towards(low_rank(), z, z + 1, epochs=1, checkpoint=path)


# ------------------------------------------------------------------ images
def test_images_through_a_tower_with_lora():
    """LoRA alone learns; a model without anything to train is refused."""
    visual = tower()
    with pytest.raises(ValueError, match="nothing of encoder requires a gradient"):
        learn_towards(visual.requires_grad_(False), ImageInputs(Pictures(6), pixels), torch.zeros(6, 8), epochs=1)
    start = encode(visual, ImageInputs(Pictures(6), pixels))
    add_lora(visual, r=2)
    before = {name: t.clone() for name, t in visual.state_dict().items()}
    losses = learn_towards(visual, ImageInputs(Pictures(6), pixels), start + 0.5, epochs=3, batch_size=4, lr=1e-2)
    changed = {name for name, t in visual.state_dict().items() if not torch.equal(t, before[name])}
    assert losses[-1] < losses[0] and changed and all("lora_" in name for name in changed)
    assert {name.rpartition(".")[2] for name in changed} == {"lora_A", "lora_B"}


def test_random_transforms_depend_on_seed_and_index_not_on_workers():
    def draws(workers=0):
        return ImageInputs(Pictures(4), lambda image: torch.rand(2), workers)

    batches = [torch.tensor([0, 3]), torch.tensor([1])]
    found = [list(draws(workers).batches(batches, "cpu", seed=7)) for workers in (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert torch.equal(found[0][0], draws().batch([0, 3], "cpu", seed=7)) and found[0][0].unique().numel() == 4
    assert not torch.equal(found[0][0], draws().batch([0, 3], "cpu", seed=8))


# ------------------------------------------------------------------ encoding, inputs, refusals
@pytest.mark.parametrize("form", ["numpy", "memmap", "tensor", "store", "half"])
def test_features_in_every_form(tmp_path, form):
    array = rows(5, 3).numpy()
    array.tofile(tmp_path / "rows")
    store = type("Store", (), {"features": array})
    given = {"numpy": array, "tensor": torch.from_numpy(array), "store": store(), "half": array.astype(np.float16),
             "memmap": np.memmap(tmp_path / "rows", np.float32, "r", shape=(5, 3))}[form]  # fmt: skip
    found = encode(FullMap(3), given, batch_size=2)
    assert found.dtype == np.float32
    assert np.array_equal(found, array.astype(np.float16) if form == "half" else array)
    assert FeatureInputs(given).batch([1], "cpu").dtype == torch.float32


def test_encoding_leaves_modes_and_takes_precision():
    encoder = Noisy().train()
    encoder.frozen.eval()
    one = encode(encoder, rows(), batch_size=7)
    assert np.array_equal(one, encode(encoder, rows(), batch_size=24))  # statistics of the batch are not used
    assert encoder.training and encoder.map.training and not encoder.frozen.training
    linear = nn.Linear(6, 4)
    half = encode(linear, rows(), precision="bf16")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(half, linear(rows()).float().numpy())


def test_a_loss_that_is_not_finite_stops_training():
    encoder = FullMap(2)
    with torch.no_grad():
        encoder.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) in epoch 1; a lower lr may help"):
        learn_towards(encoder, rows(4, 2), rows(4, 2), epochs=1)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (dict(inputs=[1, 2]), TypeError, "inputs must be a tensor, a NumPy array"),
        (dict(inputs=torch.ones(4)), ValueError, "shape .N, D."),
        (dict(inputs=torch.ones(4, 2).long()), ValueError, "of fp16, bf16, fp32"),
        (
            dict(inputs=torch.tensor([[0.0, 1], [1, torch.nan], [2, 2], [torch.inf, 0]])),
            ValueError,
            "inputs must be finite.*2 row.s.: 1, 3",
        ),
        (dict(targets=torch.ones(3, 2)), ValueError, "targets must be 4 rows"),
        (dict(targets=torch.ones(4, 3)), ValueError, "width 3 as targets have, got 2"),
        (dict(targets=torch.full((4, 2), -torch.inf)), ValueError, "targets must be finite.*: 0, 1"),
        (dict(epochs=0), ValueError, "epochs must be a whole number of at least 1"),
        (dict(batch_size=2.0), ValueError, "batch_size must be"),
        (dict(lr=0.0), ValueError, "lr must be a number above 0"),
        (dict(weight_decay=-1), ValueError, "weight_decay must be"),
        (dict(precision="fp16"), ValueError, "precision must be one of fp32, bf16"),
        (dict(checkpoint="/nowhere/at/all.pt"), FileNotFoundError, "no folder /nowhere/at"),
        (dict(encoder=nn.Flatten(0)), ValueError, "must give features"),
    ],
)
def test_what_learning_towards_refuses(change, error, text):
    options = dict(encoder=FullMap(2), inputs=torch.ones(4, 2), targets=torch.ones(4, 2), epochs=1) | change
    if isinstance(options["encoder"], nn.Flatten):
        options["encoder"].extra = nn.Parameter(torch.ones(1))
    with pytest.raises(error, match=text):
        learn_towards(**options)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(loss="focal"), "loss must be one of ce, reweight, logit-adjust"),
        (dict(head=None), "head must be given, because a FullMap"),
        (dict(labels=torch.tensor([0, 1, 2, 1])), "labels must be in 0..1, got 2 at index 2"),
        (dict(labels=torch.tensor([0, -1, 0, 1])), "got -1 at index 1"),
        (dict(labels=[0, 1]), "labels must be of shape .4,."),
        (dict(labels=[0.0, 1, 0, 1]), "labels must be integers"),
        (dict(loss="reweight", counts=[0, 0]), "one above 0 at least"),
    ],
)
def test_what_learning_classes_refuses(change, text):
    options = dict(encoder=FullMap(2), head=nn.Linear(2, 2), inputs=torch.ones(4, 2), labels=[0, 1, 0, 1]) | change
    with pytest.raises(ValueError, match=text):
        learn_classes(epochs=1, **options)
