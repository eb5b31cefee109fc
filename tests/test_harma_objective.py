"""What a training step minimises: its parts by hand, the frozen features, and that weights of 0 leave no trace."""

import pytest
import torch

from rsfast import harma_loss
from rsfast.harma import CaptionedImages, TrainConfig, training
from rsfast.harma import model as models
from rsfast.harma import objective as objectives
from tests.harma_world import MODEL, in_memory
from tests.test_harma_train import assert_same, assert_same_runs, lines, run

ALL = {"uniformity_weight": 0.5, "affiliation_weight": 0.25, "drift_weight": 3.0}
REPORTED = ["uniformity_image", "uniformity_text", "alignment", "drift_image", "drift_text"]
DROPPING = MODEL | {"vision_cfg": MODEL["vision_cfg"] | {"patch_dropout": 0.5}}  # draws, where it trains


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def by_hand(c, images, texts, scale, ids, labels, start_images, start_texts):
    """Every number of a step, pair by pair."""
    n, s = len(ids), images @ texts.T
    found = {}
    log_p = [(scale * logits).log_softmax(1) for logits in (s, s.T)]
    positives = [[j for j in range(n) if ids[j] == ids[i]] for i in range(n)]
    found["contrastive"] = (
        -sum(p[i, j] / len(positives[i]) for p in log_p for i in range(n) for j in positives[i]) / 2 / n
    )
    cost = [c.margin + s[i, j] - s[k, k] for i in range(n) for j in range(n) if i != j for k in (i, j)]
    found["triplet"] = sum((1 - torch.exp(-x)) ** c.gamma * x for x in cost if x > 0) / 2
    for name, x in (("image", images), ("text", texts)):
        near = [torch.exp(-4 * (1 - x[i] @ x[j])) for i in range(n) for j in range(i)]
        found[f"uniformity_{name}"] = (sum(near) / len(near)).log()
    found["alignment"] = sum((images[i] - texts[i]).square().sum() for i in range(n)) / n
    for name, x, start in (("image", images, start_images), ("text", texts, start_texts)):
        found[f"drift_{name}"] = sum((x[i] - start[i]).square().sum() for i in range(n)) / n
    classes = [[j for j in range(n) if labels[j] == labels[i]] for i in range(n)]
    centres = [torch.stack([x[own].mean(0) for own in classes]) for x in (images, texts)]
    to_text, to_image = (scale * images @ centres[1].T).log_softmax(1), (scale * centres[0] @ texts.T).log_softmax(1)
    found["affiliation"] = -sum(to_text[i, i] + to_image[i, i] for i in range(n)) / 2 / n
    for name in ("uniformity", "drift"):
        found[name] = (found[f"{name}_image"] + found[f"{name}_text"]) / 2
    extra = sum(getattr(c, f"{name}_weight") * found[name] for name in ("uniformity", "affiliation", "drift"))
    return found | {"loss": found["contrastive"] + found["triplet"] + extra}


@pytest.fixture
def seen(monkeypatch):
    """What every step handed to the objective and to the frozen model, and what came out."""
    steps, asked = [], []
    compute, encode = objectives.Objective.__call__, objectives.FrozenTowers.__call__

    def objective(self, *features, **more):
        loss, found = compute(self, *features, **more)
        steps.append(([x.detach().clone() for x in features], more, found))
        return loss, found

    def frozen(self, images, tokens):
        features = encode(self, images, tokens)
        asked.append((images, tokens, features))
        return features

    monkeypatch.setattr(objectives.Objective, "__call__", objective)
    monkeypatch.setattr(objectives.FrozenTowers, "__call__", frozen)
    return steps, asked


@pytest.mark.parametrize("method", ["harma", "full"])
def test_a_step_is_what_it_says(tmp_path, seen, method):
    run(tmp_path / "run", method=method, epochs=1, **ALL)
    config = TrainConfig(out="", **ALL)
    start = models.create(MODEL, seed=3407).model.eval()
    logged = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert len(seen[0]) == len(seen[1]) == len(logged) == 2
    for (features, more, found), (images, tokens, frozen), line in zip(*seen, logged, strict=True):
        # fp32 sums of 64 terms, and exponents of scale times their errors
        wide = [x.double() for x in (*features, *more["frozen"])]
        expected = by_hand(config, *wide[:3], more["image_ids"], more["labels"], *wide[3:])
        assert found.keys() == expected.keys() and found.keys() <= line.keys()
        for name, value in expected.items():
            assert found[name].item() == line[name] == pytest.approx(value.item(), rel=2e-5, abs=1e-7), name
        assert not any(value.requires_grad for value in found.values())
        with torch.no_grad(), training._one_attention():
            model = objectives.Towers(start)(images, tokens)[:2]
        assert_same(list(frozen), list(model))
        assert_same(list(frozen), list(more["frozen"]))
        assert len(set(more["labels"].tolist())) == 3 and len(set(more["image_ids"].tolist())) < 8
    drifts = [(line["drift_image"], line["drift_text"]) for line in logged]
    assert drifts[0] == (0.0, 0.0) and min(drifts[1]) > 1e-6


def test_the_gradient_is_that_of_the_weighed_sum():
    config = TrainConfig(out="", **ALL)
    ids, labels = torch.tensor([0, 0, 1, 2, 3, 4]), torch.tensor([0, 0, 1, 1, 2, 0])
    torch.manual_seed(0)
    images, texts, *frozen = (torch.nn.functional.normalize(torch.randn(6, 8).double(), dim=1) for _ in range(4))
    scale, grads = torch.tensor(14.0).double(), []
    compute = objectives.Objective(config)
    for loss in (
        lambda *x: compute(*x, image_ids=ids, labels=labels, frozen=frozen, report=False)[0],
        lambda *x: compute(*x, image_ids=ids, labels=labels, frozen=frozen, report=True)[0],
        lambda *x: by_hand(config, *x, ids, labels, *frozen)["loss"],
    ):
        inputs = [x.clone().requires_grad_() for x in (images, texts, scale)]
        grads.append(torch.autograd.grad(loss(*inputs), inputs))
    assert_same(grads[0], grads[1])
    for ours, hand in zip(grads[0], grads[2], strict=True):
        assert torch.allclose(ours, hand, rtol=1e-9, atol=1e-12)  # fp64
    for name in ALL:  # each part has a gradient of its own
        compute.config = TrainConfig(out="", **(ALL | {name: 0.0}))
        inputs = [x.clone().requires_grad_() for x in (images, texts, scale)]
        loss, found = compute(*inputs, image_ids=ids, labels=labels, frozen=frozen, report=False)
        assert name.removesuffix("_weight") not in found
        assert not torch.allclose(torch.autograd.grad(loss, inputs)[0], grads[0][0])


@pytest.mark.parametrize(
    "changes", [{}, {"method": "full", "model": DROPPING}, {"precision": "bf16", "skip_padding": True}]
)
def test_without_weights_reporting_leaves_no_trace(tmp_path, seen, changes, monkeypatch):
    often, seldom = tmp_path / "often", tmp_path / "seldom"
    run(often, **changes)
    assert len(seen[1]) == 4
    run(seldom, log_every_n_steps=3, **changes)
    assert len(seen[1]) == 4 + 3  # steps 2 and 4 end an epoch
    assert_same(torch.load(often / "last.pt", weights_only=True), torch.load(seldom / "last.pt", weights_only=True))
    kept = {line["step"]: line for line in lines(often) if "loss" in line}
    assert list(kept) == [1, 2, 3, 4] and kept.pop(1)
    assert list(kept.values()) == [line for line in lines(seldom) if "loss" in line]
    assert not {"uniformity", "affiliation", "drift"} & kept[2].keys() and set(REPORTED) <= kept[2].keys()

    def two_losses(self, images, texts, scale, *, image_ids, **more):
        loss = sum(harma_loss(images, texts, scale, image_ids=image_ids, margin=0.2, gamma=2.0))
        return loss, {"loss": loss.detach()}

    monkeypatch.setattr(objectives.Objective, "__call__", two_losses)
    monkeypatch.setattr(objectives.FrozenTowers, "__call__", lambda *a: (torch.zeros(1), torch.zeros(1)))
    run(tmp_path / "before", **changes)
    a, b = (torch.load(folder / "last.pt", weights_only=True) for folder in (often, tmp_path / "before"))
    assert_same(a, b)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "full", "precision": "bf16", "grad_checkpointing": True},
        {"method": "full", "model": DROPPING, "drift_weight": 0.0},
        {"precision": "fp16", "skip_padding": True, "grad_checkpointing": True},
    ],
)
def test_resume_is_bit_equal_with_all_weights(tmp_path, changes):
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    changes = ALL | changes
    run(straight, **changes)
    for steps in (1, 3):  # inside an epoch
        assert run(parts, max_steps=steps, resume="latest" if steps > 1 else None, **changes).steps == steps
        torch.rand(3)
    run(parts, resume="latest", **changes)
    assert_same_runs(straight, parts)
    logged = [line for line in lines(straight) if "loss" in line]
    assert (logged[0]["drift_image"] < 1e-3) == ("model" not in changes) and logged[-1]["drift_image"] > 1e-3
    with pytest.raises(ValueError, match="other settings: affiliation_weight was 0.25, now 0.5"):
        run(parts, resume="latest", **(changes | {"affiliation_weight": 0.5}))


def test_the_weights_do_what_they_are_for(tmp_path):
    """With a weight less of its part than without, on the same batches from the same start."""
    last = {}
    for name, weights in (("", {}), ("uniformity", {"uniformity_weight": 30.0}), ("drift", {"drift_weight": 300.0})):
        run(tmp_path / name / "run", epochs=3, **weights)
        last[name] = [line for line in lines(tmp_path / name / "run") if "loss" in line][-1]
    for name in ("uniformity", "drift"):
        sums = {run: line[f"{name}_image"] + line[f"{name}_text"] for run, line in last.items()}
        assert min(sums, key=sums.get) == name, sums


def test_the_frozen_copy_stands_aside():
    towers = objectives.Towers(models.create(DROPPING, seed=1).model.train())
    images, tokens = torch.randn(2, 3, 32, 32), torch.randint(1, 100, (2, 12))
    for weight in (0.0, 1.0):
        frozen = objectives.FrozenTowers(towers, TrainConfig(out="", method="full", drift_weight=weight))
        state = torch.get_rng_state()
        before = frozen(images, tokens)
        assert torch.equal(torch.get_rng_state(), state) and all(m.training for m in towers.modules())
        with torch.no_grad():
            towers.model.visual.proj.add_(1)
        assert_same(frozen(images, tokens), before)
        assert all(p.requires_grad for p in towers.model.visual.parameters())


def test_a_loss_that_is_nan_is_not_saved(tmp_path, monkeypatch):
    compute = objectives.Objective.__call__

    def broken(self, *features, **more):
        loss, found = compute(self, *features, **more)
        return loss * torch.nan, found | {"loss": found["loss"] * torch.nan}

    run(tmp_path / "run", max_steps=1)
    before = (tmp_path / "run" / "last.pt").read_bytes()
    monkeypatch.setattr(objectives.Objective, "__call__", broken)
    with pytest.raises(ValueError, match="the loss is nan at step 2; .* checkpoint of before is kept"):
        run(tmp_path / "run", resume="latest")
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_weights_that_are_none(tmp_path, name, weight):
    with pytest.raises(ValueError, match=f"{name} must be 0 or more, got {weight}"):
        run(tmp_path / "run", **{name: weight})
    assert not (tmp_path / "run").exists()


def test_affiliation_needs_labels(tmp_path):
    data = in_memory()
    bare = CaptionedImages(data.images, data.texts, data.text_to_image)
    with pytest.raises(ValueError, match="affiliation_weight above 0 needs .* the data has none, .* of 10 of its 10"):
        run(tmp_path / "run", train_data=bare, affiliation_weight=1.0)
    assert not (tmp_path / "run").exists()
    run(tmp_path / "run", train_data=bare, epochs=1)
    with pytest.raises(ValueError, match="train_data was"):  # labels are part of the data
        run(tmp_path / "run", resume="latest", epochs=1)
