"""What the benchmarks of the in-batch losses are judged by, and who takes part."""

import itertools
import pathlib
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import rsfast
from benchmarks import bench_losses, harma_losses, losses, oracle, peers
from benchmarks.losses import LOSSES
from rsfast.similarity import reference
from tests.cases import BF16, CASES, FP32

FP64 = torch.float64
ROW = {case.name: case for case in CASES}
N, D, ROWS = 23, 16, 5  # several chunks, the last one short


REMEMBERED = losses.truth, losses.prepared


@pytest.fixture(autouse=True)
def _nothing_remembered():
    for function in REMEMBERED:
        function.cache_clear()


def by_autograd(fn, tensors, kwargs, dy):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = fn(*leaves, **kwargs)
    y = y if isinstance(y, tuple) else (y,)
    return [
        *(loss.detach() for loss in y),
        *torch.autograd.grad(y, leaves, [g.to(a) for g, a in zip(dy, y, strict=True)]),
    ]


def a_batch(name, dtype):
    tensors = losses.inputs(name, (N, D), dtype)
    dy = [torch.tensor(w) for w in losses.weights(name, N)]
    return tensors, ROW[name].pack(tensors)[1], dy


@pytest.mark.parametrize("name", LOSSES)
def test_chunks_add_up_to_the_reference(name):
    tensors, kwargs, dy = a_batch(name, FP64)
    found, scales = oracle.results(LOSSES[name].oracle, tensors, kwargs, dy, FP64, rows=ROWS)
    for a, g in zip(found, by_autograd(getattr(reference, LOSSES[name].op), tensors, kwargs, dy), strict=True):
        torch.testing.assert_close(a, g, rtol=1e-12, atol=1e-15)
    dy = torch.stack(dy) if len(dy) > 1 else dy[0]
    assert scales == pytest.approx(ROW[name].scale(tensors, dy))


@pytest.mark.parametrize("name", LOSSES)
def test_chunks_are_as_wrong_as_plain_pytorch(name):
    tensors, kwargs, dy = a_batch(name, BF16)
    plain = by_autograd(getattr(reference, LOSSES[name].op), tensors, kwargs, dy)
    exact, scales = oracle.results(LOSSES[name].oracle, tensors, kwargs, dy, FP64, rows=N)
    chunked, _ = oracle.results(LOSSES[name].oracle, tensors, kwargs, dy, BF16, rows=ROWS)
    for like, label, *results in zip(
        plain, (*["loss"] * len(dy), *ROW[name].names), plain, exact, chunked, strict=True
    ):
        assert results[2].dtype == like.dtype
        theirs, ours = ((r.double() - results[1]).norm() for r in (results[0], results[2]))
        noise = torch.finfo(FP32).eps * max(scales.get(label, 0), results[1].norm())
        assert theirs / 2 <= ours + noise and ours <= 2 * theirs + noise, label


def test_triplets_of_all_negatives_in_chunks():
    tensors = losses.inputs("adaptive_triplet_loss", (N, D), FP64)
    found, _ = oracle.results(oracle.triplet, tensors, {}, [torch.tensor(0.5)], FP64, rows=ROWS)
    for a, g in zip(found, by_autograd(reference.triplet_loss, tensors, {}, [torch.tensor(0.5)]), strict=True):
        torch.testing.assert_close(a, g, rtol=1e-12, atol=1e-15)


def test_a_sample_of_the_gradients_is_the_references():
    tensors, some = losses.inputs("contrastive_loss", (N, D), FP32), torch.tensor([3, 0, 22])
    gold = by_autograd(reference.contrastive_loss, [t.double() for t in tensors], {}, [torch.tensor(1.0)])
    exact, rounded = oracle.sampled_contrastive(*tensors, some, (FP32, BF16), rows=ROWS)
    for a, b, g in zip(exact, rounded, (gold[0], gold[1][some], gold[2][some]), strict=True):
        assert (a - g).norm() < 1e-6 * g.norm()
        assert b.dtype == FP64 or 1e-4 < (b.double() - g).norm() / g.norm() < 3e-2


@pytest.mark.parametrize("form", (harma_losses.as_written, harma_losses.cleaned))
def test_harmas_losses_are_harmas(form):
    file = np.load(pathlib.Path(__file__).parent / "data" / "harma_losses.npz")
    image, text, temp = (torch.from_numpy(file[key]).double() for key in ("image", "text", "temp"))
    ids = torch.from_numpy(file["idx"])
    found = form(image, text, 1 / temp, image_ids=ids)
    for name, loss in zip(("contrastive_idx", "ada_triplet"), found, strict=True):
        assert loss.item() == pytest.approx(float(file[f"{name}.loss"]), rel=1e-6)
    tensors, kwargs, dy = [image, text, 1 / temp], dict(image_ids=ids), torch.ones(2)
    for a, g in zip(*(by_autograd(f, tensors, kwargs, dy) for f in (form, reference.harma_loss)), strict=True):
        torch.testing.assert_close(a, g, rtol=1e-9, atol=1e-12)


class Products(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_harmas_products_are_its_own():
    tensors, kwargs, _ = a_batch("harma_loss_ids", BF16)
    with Products() as written:
        harma_losses.as_written(*tensors, **kwargs)
    with Products() as cleaned:
        harma_losses.cleaned(*tensors, **kwargs)
    assert written.dtypes == [FP32] * 3 and cleaned.dtypes == [BF16]


# --- other libraries, pretended: what they are called with is what their own documentation asks for


def cross_entropy(x, weight, target):
    return F.cross_entropy((x @ weight.mT).float(), target)


class MemoryEfficientCLIPLoss:
    def __init__(self, temperature, normalized_inputs, stable):
        assert normalized_inputs and not stable and isinstance(temperature, float)
        self.scale = 1 / temperature

    def __call__(self, image, text):
        return reference.contrastive_loss(image, text, torch.tensor(self.scale))


def cal_flash_loss(q, k, *, scale):
    return F.cross_entropy((scale * q @ k.mT).float(), torch.arange(len(q)), reduction="none")


def chunked_linear_cross_entropy(x, weight, target, *, chunk_size, use_scaled_exp):
    assert chunk_size in (4096, 8192) and isinstance(use_scaled_exp, bool)
    return cross_entropy(x, weight, target)


def linear_cross_entropy(e, c, targets, *, filter_eps):
    assert filter_eps in (None, "auto")
    return cross_entropy(e, c, targets)


def liger_fused_linear_cross_entropy(x, weight, target, *, accum_dtype):
    assert accum_dtype is FP32
    return cross_entropy(x, weight, target)


class LigerFusedLinearScaledCrossEntropyFunction:
    @staticmethod
    def apply(x, weight, target):
        return F.cross_entropy((x @ weight.mT).float(), target, reduction="none")


def fused_siglip_loss(image, text, log_temperature, bias):
    return reference.sigmoid_loss(image, text, log_temperature.exp(), bias).to(image.dtype)


PRETENDED = {
    "memeff": MemoryEfficientCLIPLoss,
    "inf_cl": cal_flash_loss,
    "quack.linear_cross_entropy": chunked_linear_cross_entropy,
    "cut_cross_entropy": linear_cross_entropy,
    "liger_kernel.transformers.functional": liger_fused_linear_cross_entropy,
    "liger_kernel.ops.fused_linear_scaled_cross_entropy": LigerFusedLinearScaledCrossEntropyFunction,
    "siglip_kernel": fused_siglip_loss,
}


@pytest.fixture
def installed(monkeypatch):
    for name, thing in PRETENDED.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**{thing.__name__: thing}))


PEERS = [(name, impl) for name, loss in LOSSES.items() for impl in loss.peers]


@pytest.mark.parametrize("name, impl", PEERS)
def test_peers_are_called_for_the_same_loss(installed, name, impl):
    calls, errors = losses.prepared(name, (N, D), BF16, impl)
    learned = LOSSES[name].peers[impl].learns_scale
    assert len(calls[0].leaves) == (len(ROW[name].names) if learned else 2)
    calls[0].both()
    assert set(errors) == {f"error_{label}" for label in ("loss", *ROW[name].names[: len(calls[0].leaves)])}
    assert all(0 < error < 0.02 for error in errors.values()), errors


def test_peers_that_cannot_run_say_why(monkeypatch):
    inf_cl, memeff = peers.CONTRASTIVE["inf-cl"], peers.CONTRASTIVE["memeff"]
    assert "multiple of 256, not 384" in inf_cl.why_not(384, BF16)
    assert "does not compute in torch.float32" in memeff.why_not(512, FP32)
    monkeypatch.setitem(sys.modules, "memeff", None)
    assert "memeff cannot be imported" in memeff.why_not(512, BF16)
    monkeypatch.setattr(peers.importlib, "import_module", lambda name: 1 / 0)
    assert "cannot be imported: division by zero" in memeff.why_not(512, BF16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of a machine without a GPU")
def test_an_installed_peer_waits_for_a_gpu(installed):
    assert losses.why_not("contrastive_loss", (8, 512), BF16, "memeff") == "memeff needs a GPU"


# --- who is timed, in which order


def test_without_a_gpu_every_implementation_runs_once_at_a_small_shape():
    rows = losses.grid()
    assert {(name, impl) for name, _, _, impl, _ in rows} == {
        (name, impl) for name in LOSSES for impl in losses.implementations(name)
    }
    assert all(shape == ROW[name].small[0] and dtype is FP32 for name, shape, dtype, _, _ in rows)


def test_the_grid_of_a_gpu(monkeypatch):
    monkeypatch.setattr(losses, "DEVICE", "cuda")
    rows = losses.grid()
    assert len(rows) == len(set(rows))
    assert {row[0] for row in itertools.takewhile(lambda row: row[3] == "fused", rows)} == set(LOSSES), "ours first"
    million = [row for row in rows if row[1] == (1 << 20, 512)]
    assert [row[3:] for row in million] == [("fused", "forward+backward")], "ours only, one pass"
    assert rows.index(million[0]) > rows.index(("contrastive_loss", (65536, 512), BF16, "memeff", "forward+backward"))
    both = {row[:4] for row in rows if row[4] == "forward+backward"}
    for name, shape in (
        ("contrastive_loss", (65536, 512)), ("contrastive_loss", (65536, 1024)), ("contrastive_loss", (428, 512)),
        ("triplet_loss_hardest", (65536, 512)), ("sigmoid_loss", (65536, 768)), ("uniformity_loss", (65536, 512)),
    ):  # fmt: skip
        assert (name, shape, BF16, "fused") in both
    for dtype, shape, impl in itertools.product(
        (BF16, FP32), ((32768, 512), (428, 512)), ("fused", "harma", "harma-cleaned", "harma-cleaned-compiled")
    ):
        assert ("harma_loss_ids", shape, dtype, impl) in both
    for impl in ("open_clip", "open_clip-compiled", "reference-compiled", *peers.CONTRASTIVE):
        assert ("contrastive_loss", (65536, 512), BF16, impl) in both
    assert ("contrastive_loss", (65536, 512), BF16, "memeff", "backward") not in rows
    assert ("contrastive_loss", (65536, 512), BF16, "fused", "backward") in rows


# --- what is let through


def wrong(monkeypatch, factor=1.01):
    """Every implementation of the contrastive loss, off in the gradients of the texts."""
    build = losses.build

    class Scaled(torch.autograd.Function):
        forward = staticmethod(lambda ctx, t: t.clone())
        backward = staticmethod(lambda ctx, g: factor * g)

    def broken(*args):
        run = build(*args)
        return lambda image, text, *others: run(image, Scaled.apply(text), *others)

    monkeypatch.setattr(losses, "build", broken)


def test_nothing_of_ours_is_timed_that_is_wrong(monkeypatch):
    losses.prepared("contrastive_loss", (N, D), FP32, "reference")
    losses.prepared.cache_clear()
    wrong(monkeypatch)
    with pytest.raises(AssertionError, match="reference contrastive_loss text_features"):
        losses.prepared("contrastive_loss", (N, D), FP32, "reference")


def test_an_error_of_others_is_a_number_in_their_row(monkeypatch):
    wrong(monkeypatch)
    _, errors = losses.prepared("contrastive_loss", (N, D), FP32, "open_clip")
    assert errors["error_text_features"] == pytest.approx(0.01, rel=1e-3) and errors["error_image_features"] < 1e-6
    wrong(monkeypatch, float("nan"))
    losses.prepared.cache_clear()
    with pytest.raises(AssertionError, match="open_clip is not finite"):
        losses.prepared("contrastive_loss", (N, D), FP32, "open_clip")


def test_of_a_million_rows_a_sample_is_judged(monkeypatch):
    monkeypatch.setattr(losses, "WHOLE_UP_TO", N - 1)
    monkeypatch.setattr(losses, "SAMPLE", 6)
    known = losses.truth("contrastive_loss", (N, D), FP32)
    assert [t.shape for t in known.gold] == [(), (6, D), (6, D)]
    _, errors = losses.prepared("contrastive_loss", (N, D), FP32, "reference")
    assert set(errors) == {"error_loss", "error_image_features", "error_text_features"}
    losses.prepared.cache_clear()
    wrong(monkeypatch, 1.01)
    with pytest.raises(AssertionError, match="text_features"):
        losses.prepared("contrastive_loss", (N, D), FP32, "reference")


def test_what_would_not_fit_is_not_begun(monkeypatch):
    monkeypatch.setattr(losses, "PROBE", N)
    small = losses.truth("harma_loss_ids", (N, D), FP32)
    for name, value in dict(
        DEVICE="cuda", truth=lambda *_: small, memory=lambda *_: ({"peak_memory": 60 * N**2}, 0.0)
    ).items():
        monkeypatch.setattr(losses, name, value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100e9, 141e9))
    fits, not_fits = (losses.too_large("harma_loss_ids", (n, D), FP32, "harma") for n in (32768, 65536))
    assert fits is None and not_fits == "harma needs 258 GB (60 a pair), 100 are free"
    assert losses.too_large("harma_loss_ids", (65536, D), FP32, "fused") is None


def test_what_fails_is_a_skipped_row_unless_it_is_ours(monkeypatch, installed):
    def ready(impl, error):
        def prepared(*_):
            raise error

        monkeypatch.setattr(bench_losses, "prepared", prepared)
        monkeypatch.setattr(bench_losses, "why_not", lambda *_: None)
        return bench_losses._ready("contrastive_loss", (8, 16), BF16, impl)

    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")
    for impl, error, said in (
        ("reference-compiled", full, "ran out of memory: CUDA out of memory. Tried to allocate 9 GiB"),
        ("memeff", RuntimeError("no kernel image"), "memeff failed: RuntimeError: no kernel image"),
    ):
        with pytest.raises(pytest.skip.Exception, match=said):
            ready(impl, error)
    for impl, error in (("fused", full), ("reference", RuntimeError("no kernel image"))):
        with pytest.raises((type(error), pytest.skip.Exception)) as found:
            ready(impl, error)
        assert found.type is type(error), "ours is not skipped"


class Facts:
    def __init__(self):
        self.found = {}

    def facts(self, found):
        self.found |= found


@pytest.mark.parametrize("which, gemms", (("forward", 1.0), ("backward", 3.0), ("forward+backward", 4.0)))
def test_a_row_holds_its_errors_and_the_products_of_its_pass(monkeypatch, which, gemms):
    rows, writer = [], Facts()
    monkeypatch.setattr(bench_losses, "gemm_seconds", lambda n, d: {"forward": 1.0, "backward": 3.0})
    monkeypatch.setattr(bench_losses, "measure", lambda *args, **options: {"seconds": 9.0, "options": options})
    bench_losses.bench_loss(
        lambda key, run, moved, flops: rows.append(key | run(None, None) | dict(bytes=moved, flops=flops)),
        writer, "harma_loss_ids", (N, D), BF16, "harma", which,
    )  # fmt: skip
    (row,) = rows
    assert (row["family"], row["op"], row["shape"], row["dtype"]) == (
        "similarity",
        "harma_loss_ids",
        "23x16",
        "bfloat16",
    )
    assert row["gemm_seconds"] == gemms and row["pass"] == which and "error_logit_scale" in row
    assert row["options"]["graph"] and row["options"]["hot"] and row["options"]["rounds"] == 50
    assert writer.found == {"gemms_23x16_forward_seconds": 1.0, "gemms_23x16_backward_seconds": 3.0}
    passes = {"forward": 1, "backward": 2, "forward+backward": 3}[which]
    assert row["flops"] == passes * 2 * N * N * D and row["bytes"] == passes * 2 * N * D * 2


def test_inputs_have_a_cone_and_violate_the_margin():
    image, text = losses.inputs("adaptive_triplet_loss", (512, 64), FP32)
    cosines = image @ text.T
    assert cosines.diagonal().mean().item() == pytest.approx(0.3, abs=0.03)
    assert cosines.mean().item() == pytest.approx(0.2, abs=0.03)
    assert (0.2 + cosines > cosines.diagonal()).float().mean() > 0.6
    assert rsfast.adaptive_triplet_loss(image, text, impl="reference") > 0


def test_the_sample_of_a_large_batch_keeps_no_scores(monkeypatch):
    """At a million pairs a chunk of them is 4 GB, and there are a thousand chunks."""
    tensors, cat = losses.inputs("contrastive_loss", (64, D), FP32), torch.cat

    def alone(parts, *args):
        assert all(part.untyped_storage().nbytes() == part.nbytes for part in parts)
        return cat(parts, *args)

    monkeypatch.setattr(oracle.torch, "cat", alone)
    assert len(oracle.sampled_contrastive(*tensors, torch.arange(3), (FP32,), rows=16)) == 1
