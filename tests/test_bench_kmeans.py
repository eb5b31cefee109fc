"""What the benchmarks of k-means are judged by, and who takes part."""

import importlib.metadata
import types

import pytest
import torch

import rsfast
from benchmarks import arms, floors, kmeans, kmeans_cpu, lora, report, sanitize
from benchmarks import kmeans_peers as peers
from benchmarks import kmeans_truth as truth
from benchmarks.kmeans_peers import Found
from rsfast._dispatch import INTERPRET
from tests.case import BF16, FP32

SHAPE = (96, 32, 5)


@pytest.fixture
def given():
    return kmeans.setting("kmeans_step", SHAPE, FP32)


def test_labels_are_judged_by_float64(given):
    x, centers, _ = given
    distances = torch.cdist(x.double(), centers.double()).square()
    labels = distances.argmin(1)
    assert truth.wrong(x, centers, labels) == 0
    assert truth.inertia(x, centers) == pytest.approx(distances.min(1).values.sum().item(), rel=1e-12)
    moved = labels.clone()
    moved[7] = (moved[7] + 1) % 5
    assert truth.wrong(x, centers, moved) == pytest.approx(1 / 96)
    with pytest.raises(AssertionError, match="of exact labels"):
        truth.of_step(given, Found(moved, centers), own=True, fast=False)
    tied = torch.cat([centers, centers[:1]])
    assert truth.wrong(x, tied, torch.where(labels == 0, 5, labels)) == 0


def test_centres_of_ours_are_held_to_the_budget(given):
    x, centers, _ = given
    found = kmeans.ours_step(x, centers)()
    assert truth.of_step(given, found, own=True, fast=False)["error_centers"] < 1e-6
    with pytest.raises(AssertionError, match="centres"):
        truth.of_step(given, found._replace(centers=found.centers * 1.001), own=True, fast=False)


@pytest.mark.parametrize("one_hot", (True, False))
def test_compositions_are_the_same_step_in_pieces_too(given, one_hot, monkeypatch):
    x, centers = given.x.double(), given.centers.double()
    whole = peers.lloyd_step(x, centers, one_hot)
    gold = truth._means(x, whole.labels, centers)
    torch.testing.assert_close(whole.centers, gold, rtol=1e-13, atol=1e-13)
    assert truth.wrong(x, centers, whole.labels) == 0
    monkeypatch.setattr(peers, "AT_ONCE", 35)
    parts = peers.lloyd_step(x, centers, one_hot)
    assert torch.equal(parts.labels, whole.labels)
    torch.testing.assert_close(parts.centers, whole.centers, rtol=1e-13, atol=1e-13)


def test_mini_batches_of_one_are_running_means():
    x, centers = torch.tensor([[1.0], [3.0], [10.0]]).double(), torch.tensor([[0.0], [9.0]]).double()
    found = peers.composed_minibatch(x, centers, torch.tensor([[0], [1], [2]]))()
    assert found.centers.tolist() == [[2.0], [10.0]]
    given = kmeans.Setting(x, centers, (torch.tensor([[0], [1], [2]]),))
    assert truth.of_minibatch(given, found, own=False, fast=False)["error_inertia"] < 1e-12


@pytest.mark.skipif(not (INTERPRET or torch.cuda.is_available()), reason="launches a Triton kernel")
@pytest.mark.parametrize("n, width, k", [(600, 130, 5), (3, 7, 9)])
def test_our_update_for_flash_kmeans_is_the_mean_of_each_cluster(device, n, width, k):
    generator = torch.Generator().manual_seed(0)
    x, old = (torch.randn(size, width, generator=generator).to(device) for size in (n, k))
    labels = torch.randint(k - 1, (n,), generator=generator).to(device)  # the last cluster stays empty
    new = peers.sorted_update(x[None], labels[None], old[None])[0]
    torch.testing.assert_close(new.double(), truth._means(x, labels, old), rtol=1e-5, atol=1e-6)
    assert torch.equal(new[-1], old[-1])


def test_a_constraint_needs_its_proof():
    given = kmeans.setting("kmeans_constrained_rho1.25", SHAPE, FP32)
    found = kmeans.ours_constrained(*given[:2], *given.more)()
    assert truth.of_constrained(given, found, own=True, fast=False) == {"error_cost": 0.0}
    for wrong in (found.subsidies + 1, found.subsidies.roll(1) + torch.arange(5)):
        with pytest.raises(AssertionError, match="least cost|without need"):
            truth.of_constrained(given, found._replace(subsidies=wrong), own=True, fast=False)
    with pytest.raises(AssertionError, match="are wanted"):
        truth.of_constrained(given, found._replace(labels=found.labels * 0), own=True, fast=False)


def test_results_that_do_not_repeat_are_refused():
    runs = iter(range(20))
    with pytest.raises(AssertionError, match="another result"):
        truth.assert_repeats(lambda: Found(torch.tensor(next(runs))), Found(torch.tensor(0)))


def test_every_target_is_a_row_that_comes_first():
    assert {target.name for target in kmeans.TARGETS} == {f"T{i}" for i in range(1, 10)}
    for target in kmeans.TARGETS:
        row = kmeans.ROWS[target.op]
        assert target.shape in row.shapes[: row.main] and set(target.dtypes) <= set(row.dtypes)
        assert set(target.times) - {"torch"} <= set(row.arms)
        if target.seconds:
            ideal = min(floors.kmeans_floor(target.op, target.shape, dtype) for dtype in target.dtypes)
            assert ideal < target.seconds


def test_targets_go_to_whom_they_are_for():
    square = (kmeans.MILLION, 1280, 32)
    assert kmeans.aims("kmeans_step", square, FP32, "auto") == {"target_seconds": 1.45e-3, "target_name": "T2"}
    for impl, times in (("torch-index-add", 2.5), ("torch-one-hot-tf32", 1.8), ("torch-one-hot-tuned", 2.5)):
        assert kmeans.aims("kmeans_step", square, FP32, impl) == {"target": times, "target_name": "T2"}
    assert kmeans.aims("kmeans_step", (kmeans.MILLION, 1024, 32), BF16, "torch-one-hot-tf32") == {}
    assert kmeans.aims("kmeans_step", square, BF16, "auto") == kmeans.aims("kmeans_step", square, FP32, "fast") == {}


@pytest.mark.parametrize(
    "op, shape, dtype, milliseconds",
    [
        ("kmeans_step", (kmeans.MILLION, 1280, 32), FP32, 1.19),
        ("kmeans_step", (kmeans.MILLION, 1024, 32), BF16, 0.476),
        ("kmeans_step", (kmeans.MILLION, 1024, 64), BF16, 0.498),
        ("kmeans_step_many", (kmeans.MILLION, 1024, 1024), BF16, 3.13),
        ("kmeans_assign", (kmeans.MILLION, 1024, 65_536), BF16, 170),
        ("kmeans_plusplus", (kmeans.MILLION, 1024, 64), BF16, 1.43),
        ("kmeans_step_wide", (7_000, 81_920, 32), FP32, 1.07),
    ],
)
def test_floors(op, shape, dtype, milliseconds):
    assert 1e3 * floors.kmeans_floor(op, shape, dtype) == pytest.approx(milliseconds, rel=5e-3)


def test_a_library_of_another_version_is_left_out(monkeypatch):
    library = peers.Library("some-kmeans", "1.0", "json", needs_gpu=False, dtypes=(FP32,))
    assert library.why_not(FP32) == "some-kmeans 1.0 is not installed"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.0")
    assert library.why_not(FP32) == "some-kmeans 2.0 is installed, and the row is for 1.0"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
    assert library.why_not(FP32) is None and "does not take" in library.why_not(BF16)
    assert "cannot be imported" in library._replace(module="no_such_module").why_not(FP32)


def test_faiss_is_asked_for_every_row_from_the_same_start(monkeypatch):
    x, centers, _ = kmeans.setting("kmeans_step", SHAPE, FP32)
    seen = []

    class Kmeans:
        def __init__(self, width, k, **options):
            seen.append((width, k, options))

        def train(self, rows, init_centroids):
            assert rows.shape == SHAPE[:2] and rows.dtype == init_centroids.dtype == "float32"
            self.centroids = init_centroids

    monkeypatch.setattr(peers.Library, "load", lambda library: types.SimpleNamespace(Kmeans=Kmeans))
    found = peers.faiss_fit(x, centers, 7)()
    options = dict(niter=7, gpu=True, min_points_per_centroid=1, max_points_per_centroid=96)
    assert seen == [(32, 5, options)] and torch.equal(found.centers, centers.cpu()) and found.labels is None


def test_sanitizers_see_every_kernel(monkeypatch, device):
    monkeypatch.setattr(sanitize, "KMEANS", ((20, 16, 3),))
    seen = []
    step = rsfast.kmeans_step
    monkeypatch.setattr(rsfast, "kmeans_step", lambda *args, **options: seen.append(options) or step(*args, **options))
    sanitize.sample_kmeans(device)
    assert [options["impl"] for options in seen] == ["fused"] * 4


def test_the_table_tells_ours_targets_and_wrong_labels():
    common = dict(family="kmeans", op="kmeans_step", shape="1000x64x32", dtype="float32", commit="abcdef0123")
    common |= {"pass": "forward", "peak_memory": 2e6, "floor_seconds": 1e-3}
    rows = [
        common | dict(impl="auto", seconds=2e-3, target_seconds=1.5e-3, error_labels=0.0, error_centers=1e-7),
        common | dict(impl="theirs", seconds=5e-3, beside_seconds=2.5e-3, target=3.0, error_labels=0.005),
        common | dict(impl="broken", seconds=1e-3, error_labels=0.5),
    ]
    head, _, broken, ours, theirs = report.kmeans_table(rows)
    assert head.startswith("| k-means, shape, dtype | implementation | ms | times ours | target | floor, ms |")
    assert "| **auto** | **2.000** | 1.00 | ≤ 1.5 ms | 1 | 0 % | 1e-07 | 2 | abcdef01 |" in ours
    assert "| theirs | 5.000 | 2.00 | ≥ 3 |  | 0.5 % |" in theirs
    assert "| broken | 1.000 | 0.50 |" in broken and ", wrong |" in broken


def test_the_step_on_the_cpu_is_timed_beside_scikit_learns(monkeypatch):
    found = kmeans_cpu.compare((300, 8, 3), rounds=1)
    assert len(found) == 3 and all(row["ms"] > 0 for row in found.values())
    monkeypatch.setattr(kmeans_cpu, "ours", lambda x, centers, exact=True: lambda: torch.zeros(len(x)).long())
    with pytest.raises(AssertionError, match="of the labels differ"):
        kmeans_cpu.compare((300, 8, 3), rounds=1)


def test_what_autotunes_comes_last_whatever_is_timed(monkeypatch):
    for module in (arms, kmeans, lora):
        monkeypatch.setattr(module, "DEVICE", "cuda")
    for rows in (arms.grid(), *(module.grid(main) for module in (kmeans, lora) for main in (True, False))):
        tuned = [any(str(value).endswith("-tuned") for value in row) for row in rows]
        assert tuned == sorted(tuned)
    assert any(tuned) and any("-tuned" in row[3] for row in kmeans.grid(True)), "they are timed"
    compiled = [row[3].endswith(("-compiled", "-tuned")) for row in kmeans.grid(True)]
    assert compiled == sorted(compiled)
    waiting = [row[3] in kmeans.WAITING for row in kmeans.grid(True) if not row[3].endswith(("-compiled", "-tuned"))]
    assert waiting == sorted(waiting), "fits on the CPU take seconds"
