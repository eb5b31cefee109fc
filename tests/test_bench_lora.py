"""What the benchmarks of LoRA layers are judged by, and who takes part."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import rsfast
from benchmarks import bench_lora, lora, lora_attention, lora_memory
from benchmarks import lora_peers as peers
from benchmarks.arms import TIMED
from rsfast.lora import reference
from tests.case import BF16, FP32

FP64 = torch.float64
ONE, SEVERAL = (24, 32, 48), (4, 6, 32, 48)
SINGLE, DROPOUT, RANDOM, SORTED = (
    "lora_linear_r16", "lora_linear_r16_dropout", "batched_lora_linear_g4_random", "batched_lora_linear_g8_sorted",
)  # fmt: skip
EXACT = [  # plain or ours in float64, which every implementation but these takes
    (name, impl)
    for name in (SINGLE, DROPOUT, RANDOM, SORTED)
    for impl in lora.implementations(lora.ROWS[name])
    if impl not in ("fused", "grouped_mm") and not impl.endswith("compiled")
]
REMEMBERED = lora.tensors, lora.truth, lora.prepared, lora_attention.tensors, lora_attention.truth


@pytest.fixture(autouse=True)
def _nothing_remembered():
    for function in (*REMEMBERED, lora_attention.prepared):
        function.cache_clear()


def shape_of(name):
    return SEVERAL if lora.ROWS[name].adapters else ONE


@pytest.mark.parametrize("name, impl", EXACT)
def test_everyone_computes_the_same_layer(name, impl):
    found = lora.judge(name, shape_of(name), FP64, impl)
    count = 1 if impl in lora.FORWARD_ONLY else 2 if impl == "frozen" else 4
    assert list(found) == [f"error_{label}" for label in lora.NAMES[:count]]
    assert all(error < 1e-14 for error in found.values()) if impl == "frozen" else max(found.values()) < 1e-12, found


@pytest.mark.parametrize("name", (RANDOM, SORTED))
def test_grouped_products_compute_the_same_layer(name):
    assert max(lora.judge(name, SEVERAL, FP32, "grouped_mm").values()) < 1e-6


def test_one_adapter_after_the_other_is_the_reference():
    x, layer, _ = lora.tensors(RANDOM, SEVERAL, FP64)
    factors = [t.double() for t in (layer.lora_A, layer.lora_B)]
    scaling, ids = torch.tensor(layer.scaling, dtype=FP64).to(x), torch.tensor(layer.ids).to(x.device)
    whole = reference.batched_lora_linear(x, layer.weight, layer.bias, *factors, scaling, ids)
    torch.testing.assert_close(lora.equation(layer, x, *factors), whole, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "name, impl", [(SINGLE, "composed"), (DROPOUT, "composed"), (SORTED, "loop"), (RANDOM, "loop")]
)
def test_compositions_of_our_own_are_within_the_budget_in_16_bits(name, impl):
    lora.judge(name, shape_of(name), BF16, impl)


class Products(TorchDispatchMode):
    NAMES = ("mm", "addmm", "addmm_")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += [func.__name__.split(".")[0]] * (func.__name__.split(".")[0] in self.NAMES)
        return func(*args, **(kwargs or {}))


def test_composed_takes_as_few_products_as_there_are():
    x, layer, dy = lora.tensors(SINGLE, ONE, FP32)
    run, factors = peers.composed(layer)
    with Products() as forward:
        y = run(x.requires_grad_())
    with Products() as backward:
        torch.autograd.grad(y, [x, *factors], dy)
    assert forward.seen == ["addmm", "mm", "addmm_"]
    assert backward.seen == ["mm"] * 4 + ["addmm_"], "dY B once, dB, dA, dx; no gradient of the weight"


@pytest.mark.parametrize("impl", ("auto", "composed", "peft"))
def test_what_is_timed_draws_its_own_dropout(impl):
    x, layer, _ = lora.tensors(DROPOUT, ONE, FP32)
    run, _ = lora.build(lora.ROWS[DROPOUT], layer, ONE, impl)
    exact, _ = lora.build(lora.ROWS[DROPOUT], lora.exact(layer), ONE, impl)
    assert not torch.equal(run(x), run(x)) and torch.equal(exact(x), exact(x))


def test_peft_has_the_factors_it_is_timed_with():
    layer = replace(lora.tensors(DROPOUT, ONE, BF16)[1], scaling=(3.0,))
    for cast, dtype in ((True, FP32), (False, BF16)):
        module, factors = peers.peft(layer, cast)
        assert [f.dtype for f in factors] == [dtype] * 2 and module.scaling == {"0": 3.0}
        assert type(module.lora_dropout["0"]) is torch.nn.Dropout, "its own, not what judges it"
        assert torch.equal(factors[1].float(), layer.lora_B.to(dtype).float()) and factors[1].any()


def test_batches_have_as_many_samples_of_each_adapter():
    shuffled, ordered = (lora.ROWS[f"batched_lora_linear_g64_{order}"].ids(256) for order in ("random", "sorted"))
    assert sorted(shuffled) == list(ordered) == [g for g in range(64) for _ in range(4)] != list(shuffled)


# --- who is timed, in which order


def test_shapes_of_the_rows_are_those_of_the_table_of_operations():
    assert lora.ROWS[SINGLE].shapes == TIMED["lora_linear"].large == rsfast.tune.SHAPES
    row = lora.ROWS["batched_lora_linear_g8_random"]
    assert row.shapes == TIMED["batched_lora_linear"].large
    m, k, n = 256 * 197, 768, 768
    assert row.case.flops(row.shapes[0]) == 2 * m * k * n + 2 * m * 16 * (k + n)


def everything():
    return lora.grid(main=True) + lora.grid(main=False)


def test_without_a_gpu_everything_runs_once_at_a_small_shape(monkeypatch):
    monkeypatch.setattr(lora, "DEVICE", "cpu")
    rows = everything()
    found = {(row.name, impl) for row in lora.ROWS.values() for impl in lora.implementations(row)}
    assert {row[::2] for row in rows} == found
    assert len(rows) == len(set(rows)) and {shape for _, shape, _, _ in rows} == {ONE, SEVERAL}


def test_the_grid_of_a_gpu(monkeypatch):
    monkeypatch.setattr(lora, "DEVICE", "cuda")
    rows = everything()
    assert len(rows) == len(set(rows)) and len(lora.grid(main=True)) < len(rows) / 4
    first = list(itertools.takewhile(lambda row: row[0] == SINGLE, rows))
    assert {row[3] for row in first} == {"forward+backward"}
    assert {row[1] for row in first} == set(lora.SQUARE) and [row[2] for row in first[:4]] == [
        "auto", "frozen", "peft-bf16", "composed",
    ]  # fmt: skip
    for name, _, impl, which in rows:
        assert which == "forward" or impl not in lora.FORWARD_ONLY
        assert impl != "merged" or not lora.ROWS[name].dropout_p
    whole = {row[:3] for row in rows}
    for shape, impl in itertools.product(rsfast.tune.SHAPES, ("auto", "frozen", "peft-bf16", "composed", "fused")):
        assert (SINGLE, shape, impl) in whole
    assert (SINGLE, lora.SQUARE[0], "peft-bf16-tuned") in whole


def test_every_target_is_aimed_at_by_a_row(monkeypatch):
    monkeypatch.setattr(lora, "DEVICE", "cuda")
    aims = {}
    for name, shape, impl, which in lora.grid(main=True):
        if (aim := lora.target(name, shape, impl, which)) is not None:
            aims[name, impl, shape[-1]] = (aim, which)
    wanted = {
        (name, impl, width): aim
        for name, by_impl in lora.TARGETS.items()
        for impl, by_width in by_impl.items()
        for width, aim in by_width.items()
    }
    assert {key: aim for key, (aim, _) in aims.items()} == wanted
    assert aims[SINGLE, "peft-bf16", 320] == (2.8, "forward+backward")
    assert aims["batched_lora_linear_g64_random", "peft-mixed", 768] == (5.0, "forward")
    assert lora.target(SINGLE, (50432, 768, 3072), "composed", "forward+backward") is None


def test_what_cannot_run_says_why(monkeypatch):
    row = lora.ROWS[RANDOM]
    assert lora.why_not(row, BF16, "grouped_mm") is None
    monkeypatch.setattr(lora, "DEVICE", "cuda")
    assert lora.why_not(row, FP32, "grouped_mm") == "F.grouped_mm takes bf16 on a GPU, not torch.float32"
    monkeypatch.setattr(lora, "DEVICE", "cpu")
    monkeypatch.setattr(lora, "INTERPRET", False)
    assert "need a GPU" in lora.why_not(row, FP32, "fused")


# --- what is let through


def wrong(monkeypatch, factor=1.01):
    """Every implementation, off in the gradient of B."""
    build = lora.build

    def broken(*args):
        run, factors = build(*args)
        factors[-1].register_hook(lambda grad: grad * factor)
        return run, factors

    monkeypatch.setattr(lora, "build", broken)


def test_nothing_of_ours_is_timed_that_is_wrong(monkeypatch):
    lora.prepared(SINGLE, ONE, FP32, "auto")
    lora.prepared.cache_clear()
    wrong(monkeypatch)
    for impl in ("auto", "composed"):
        with pytest.raises(AssertionError, match=f"{impl} {SINGLE} lora_B"):
            lora.prepared(SINGLE, ONE, FP32, impl)


def test_an_error_of_others_is_a_number_in_their_row(monkeypatch):
    wrong(monkeypatch)
    _, found = lora.prepared(SINGLE, ONE, FP32, "peft")
    assert found["error_lora_B"] == pytest.approx(0.01, rel=1e-3) and found["error_lora_A"] < 1e-6
    wrong(monkeypatch, float("nan"))
    with pytest.raises(AssertionError, match="peft-bf16 is not finite"):
        lora.prepared(SINGLE, ONE, FP32, "peft-bf16")


def test_a_compiled_one_with_dropout_is_judged_uncompiled(monkeypatch):
    built = []
    monkeypatch.setattr(lora, "build", lambda row, layer, shape, impl: built.append(impl) or peers.composed(layer))
    for name in (DROPOUT, SINGLE):
        lora.judge(name, ONE, FP32, "peft-bf16-compiled")
    assert built == ["peft-bf16", "peft-bf16-compiled"]


def test_what_fails_is_a_skipped_row_unless_it_is_ours():
    def broken(impl):
        raise RuntimeError("no kernel image")

    with pytest.raises(pytest.skip.Exception, match="peft failed: RuntimeError: no kernel image"):
        bench_lora._ready("peft", None, broken)
    for impl in ("auto", "fused", "composed"):
        with pytest.raises(RuntimeError):
            bench_lora._ready(impl, None, broken)
    with pytest.raises(pytest.skip.Exception, match="not today"):
        bench_lora._ready("auto", "not today", broken)


@pytest.mark.parametrize(
    "impl, other, aim", (("auto", "frozen", 1.22), ("composed", "auto", 1.25), ("merged", "auto", None))
)
def test_a_row_says_what_ran_beside_it_and_its_target(monkeypatch, impl, other, aim):
    rows = []
    monkeypatch.setattr(bench_lora, "prepared", lambda name, shape, dtype, impl: ([impl], {"error_y": 0.5}))
    monkeypatch.setattr(
        bench_lora, "measure", lambda b, c, calls, which, beside: {"seconds": 9.0, "calls": calls, "with": beside}
    )
    which = "forward" if impl == "merged" else "forward+backward"
    shape = (65792, 1024, 1024)
    bench_lora.bench_lora(
        lambda key, run, moved, flops: rows.append(key | run(None, None) | dict(bytes=moved, flops=flops)),
        SINGLE, shape, impl, which,
    )  # fmt: skip
    (row,) = rows
    assert (row["family"], row["op"], row["shape"], row["impl"], row["pass"]) == (
        "lora", SINGLE, "65792x1024x1024", impl, which,
    )  # fmt: skip
    assert row["calls"] == [impl] and row["with"] == [other] and row["beside"] == other
    assert row["error_y"] == 0.5 and row.get("target") == aim
    assert row["flops"] >= 2 * 65792 * 1024 * 1024


# --- attention, and memory

HEADS = (2, 5, 2 * lora_attention.HEAD)


def test_attention_is_pytorchs_with_lora():
    x, _, state, factors = lora_attention.tensors(HEADS, FP64)
    alone, _ = lora_attention.build("frozen", state, factors)
    expected = lora_attention.equation(x, state, [f * (i % 2 == 0) for i, f in enumerate(factors)])
    torch.testing.assert_close(alone(x), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(lora_attention.equation(x, state, factors), expected, rtol=0.1)


def test_pefts_attention_is_right_but_for_the_output_projection():
    _, found = lora_attention.prepared(HEADS, FP64, "peft-mha")
    assert found["error_y"] > 0.1, "PEFT counts it once now: say so in NOTES"
    x, _, state, factors = lora_attention.tensors(HEADS, FP64)
    without = [*factors[:3], torch.zeros_like(factors[3])]
    run, _ = lora_attention.build("peft-mha", state, without)
    torch.testing.assert_close(run(x), lora_attention.equation(x, state, without), rtol=1e-12, atol=1e-12)


def test_our_attention_is_held_to_the_budget(monkeypatch):
    _, found = lora_attention.prepared(HEADS, FP32, "auto")
    assert max(found.values()) < 1e-5 and len(found) == 5
    for function in (lora_attention.prepared, lora_attention.truth):
        function.cache_clear()
    monkeypatch.setattr(lora_attention, "SCALING", 1.501)
    known = lora_attention.truth(HEADS, FP32)
    monkeypatch.setattr(lora_attention, "truth", lambda *_: known)
    monkeypatch.setattr(lora_attention, "SCALING", 1.5)
    with pytest.raises(AssertionError, match="lora_attention y"):
        lora_attention.prepared(HEADS, FP32, "auto")


def test_kept_bytes_are_counted_once_and_without_what_is_there_anyway():
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)

    def run(x):
        h = x.exp()  # keeps its result, which the product keeps too
        return F.linear(h, weight).sigmoid()  # keeps its result, which is the output

    assert lora_memory.kept_bytes(run, x, [weight]) == 5 * 8 * 4
    assert lora_memory.kept_bytes(run, x, []) == 5 * 8 * 4 + 3 * 8 * 4
    assert lora_memory.kept_bytes(lambda x: F.linear(x, weight.detach()), x, [weight]) == 0, "frozen, it keeps nothing"


def test_a_layer_keeps_x_s_and_a_bit_for_each_element(device):
    x = torch.randn(64, 32, device=device, requires_grad=True)
    base = torch.nn.Linear(32, 48, device=device)
    layer = rsfast.LoRALinear(base, 16, 16, 0.1, impl="fused").train()
    kept = lora_memory.kept_bytes(lambda t: layer(t * 2), x, [*layer.parameters()])
    assert kept <= 64 * 32 * 4 + 64 * 16 * 4 + 64 * 32 // 8 + 8, "x, s, bits, seed"


def test_memory_kept_for_lora_is_what_is_above_the_frozen_tower(monkeypatch):
    kept = {impl: lora_memory.of_tower(impl, (2, 5, 32, 1, 16))[0] for impl in ("frozen", "fused", "peft-bf16")}
    assert kept["frozen"] < kept["fused"] < kept["peft-bf16"]
    s, bits = 6 * lora_memory.RANK * lora.DTYPE.itemsize, 9 * 32 // 8
    assert kept["fused"] - kept["frozen"] == 2 * 5 * (s + bits), "no input of a layer"
    assert kept["peft-bf16"] - kept["frozen"] > 5 * (kept["fused"] - kept["frozen"])
    rows = []
    monkeypatch.setattr(bench_lora.lora_memory, "of_tower", lambda impl, shape: (kept[impl], torch.ones(1)))

    class Benchmark:
        pedantic = staticmethod(lambda function, args: function(*args))

    bench_lora.bench_lora_memory(
        lambda key, run, moved, flops: rows.append(key | run(Benchmark, None)), "peft-bf16"
    )  # fmt: skip
    assert rows[0]["kept_for_lora"] == kept["peft-bf16"] - kept["frozen"] and rows[0]["kept_without"] == kept["frozen"]
    assert rows[0]["target"] == 10.0 and rows[0]["pass"] == "memory"
