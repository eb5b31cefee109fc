"""Gradients of many layers added up in one launch: the same bits, whatever autograd is asked to do."""

import contextlib
import copy
import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import rsfast

NEEDED = ("launch", "outer", "plan", "sums")
launch, outer, plan, sums = (pytest.importorskip(f"rsfast.lora.kernels.{name}") for name in NEEDED)
CALLS = 4  # of layers of a Stack


def lora(width, outputs, dtype=torch.float32, **options):
    layer = rsfast.LoRALinear(nn.Linear(width, outputs, dtype=dtype), r=4, impl="fused", **options)
    nn.init.normal_(layer.lora_B)
    return layer


class Stack(nn.Module):
    """A layer used three times, one with slices and dropout, and one never used."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.square, self.wide = lora(24, 24, dtype), lora(24, 40, dtype, slices=((0, 7), (16, 40)), dropout=0.25)
        self.unused = lora(24, 24, dtype)

    def forward(self, x):
        torch.manual_seed(3)  # of dropout
        for _ in range(3):
            x = nn.functional.gelu(self.square(x))
        return self.wide(x)


@pytest.fixture
def model(device):
    torch.manual_seed(0)
    return Stack().to(device)


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that add up, in the order of their launches."""
    names = []

    class Counted:
        def __init__(self, kernel, name):
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid):
            names.append(self.name)
            return self.kernel[grid]

    for name in ("reduce_kernel", "reduce_all_kernel"):
        monkeypatch.setattr(sums, name, Counted(getattr(sums, name), name))
    return names


def inputs(device, dtype=torch.float32, rows=5):
    return torch.randn(rows, 24, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def grads(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        if grad is None:
            assert actual[name] is None, name
        else:
            assert grad.any(), name
            assert actual[name].dtype == grad.dtype and torch.equal(actual[name], grad), name


def together(model, x, **options):
    with rsfast.reduce_together(model, **options):
        return model(x)


def plain_grads(model, x, run=lambda y: y.square().sum().backward()):
    twin = copy.deepcopy(model)
    run(twin(x))
    return grads(twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_in_one_launch(device, launches, dtype):
    torch.manual_seed(0)
    model, x = Stack(dtype).to(device), inputs(device, dtype, rows=70).requires_grad_()
    expected = plain_grads(model, x)
    dx, x.grad = x.grad, None
    assert launches == ["reduce_kernel"] * 2 * CALLS
    launches.clear()
    together(model, x).square().sum().backward()
    assert launches == ["reduce_all_kernel"]
    assert torch.equal(x.grad, dx)
    assert_same(grads(model), expected)
    assert model.unused.lora_A.grad is None
    assert len({g.untyped_storage().data_ptr() for g in grads(model).values() if g is not None}) == 1


def test_factors_of_two_dtypes_take_a_launch_each(device, launches):
    torch.manual_seed(0)
    model, x = Stack(torch.bfloat16).to(device), inputs(device, torch.bfloat16)
    model.square.bfloat16()  # the factors too
    expected = plain_grads(model, x)
    launches.clear()
    together(model, x).square().sum().backward()
    assert launches == ["reduce_all_kernel"] * 2
    assert_same(grads(model), expected)


def test_adapters_of_a_batch(device, launches):
    """Two layers share a batch, one has another, one has none."""
    torch.manual_seed(0)
    several = [rsfast.BatchedLoRALinear(nn.Linear(24, 24), num_adapters=3, r=4, impl="fused") for _ in range(3)]
    model = nn.Sequential(*several, lora(24, 17)).to(device)
    given = [torch.tensor(ids, device=device) for ids in ([2, -1, 0, 2, 0], [1, 1, 1, -1, 2])]
    one, two = (rsfast.AdapterBatch(ids, 3) for ids in given)
    for layer, batch in zip(several, (one, two, one), strict=True):
        nn.init.normal_(layer.lora_B)
        layer.adapter_ids = batch
    x = inputs(device, rows=5 * 7).view(5, 7, 24)
    expected = plain_grads(model, x)
    launches.clear()
    together(model, x).square().sum().backward()
    assert launches == ["reduce_all_kernel"]
    assert_same(grads(model), expected)
    assert not model[0].lora_A.grad[1].any() and model[0].lora_A.grad[0].any()


def test_several_runs_of_one_graph(model, device):
    x = inputs(device)

    def twice(y):
        y.square().sum().backward(retain_graph=True)
        (3 * y).sum().backward()

    expected = plain_grads(model, x, twice)
    twice(together(model, x))
    assert_same(grads(model), expected)


def test_two_forwards_that_accumulate(model, device):
    x, twin = inputs(device), copy.deepcopy(model)
    for factor in (1, 2):
        twin(factor * x).square().sum().backward()
    with rsfast.reduce_together(model):
        losses = [model(factor * x).square().sum() for factor in (1, 2)]
    for loss in losses:
        loss.backward()
    assert_same(grads(model), grads(twin))


def test_only_what_is_asked_for(model, device, launches, monkeypatch):
    x = inputs(device).requires_grad_()
    factors = [model.square.lora_A, model.wide.lora_B]
    expected = torch.autograd.grad(model(x).sum(), [x, *factors])
    y = together(model, x)
    launches.clear()
    with monkeypatch.context() as patch:
        patch.setattr(outer, "outer_kernel", None)  # not even partial sums
        (dx,) = torch.autograd.grad(y.sum(), [x], retain_graph=True)
    assert not launches and torch.equal(dx, expected[0])
    actual = torch.autograd.grad(y.sum(), [x, *factors], retain_graph=True)
    assert all(torch.equal(one, two) for one, two in zip(actual, expected, strict=True))
    assert launches == ["reduce_all_kernel"]
    y.sum().backward(inputs=factors)
    assert torch.equal(factors[0].grad, expected[1]) and model.square.lora_B.grad is None


@pytest.mark.parametrize("stage", ["low", "factor"])
def test_products_of_cublas_beside_partial_sums(model, device, launches, stage):
    x = inputs(device)
    with plan.forced({stage: plan.COMPOSED}):
        expected = plain_grads(model, x)
        launches.clear()
        together(model, x).square().sum().backward()
    assert launches == ["reduce_all_kernel"]
    assert_same(grads(model), expected)


@pytest.mark.parametrize("whole", range(3))
def test_one_factor_by_both_ways(device, launches, monkeypatch, whole):
    """Of three calls of one layer cuBLAS takes one, whose gradient is still added in its turn."""
    model, rows = lora(24, 24).to(device), (3, 5, 6)

    def choose(stage, facts, *others):
        return plan.COMPOSED if facts.rows == rows[whole] else plan.choose(stage, facts, *others)

    monkeypatch.setattr(launch, "choose", choose)

    def run(model):
        return sum(model(inputs(device, rows=n)).square().sum() for n in rows)

    twin = copy.deepcopy(model)
    run(twin).backward()
    launches.clear()
    with rsfast.reduce_together(model):
        loss = run(model)
    loss.backward()
    assert launches == ["reduce_all_kernel"]
    assert_same(grads(model), grads(twin))


@pytest.mark.parametrize("max_bytes", [0, 2_000])
def test_no_more_memory_than_allowed(model, device, launches, max_bytes):
    x = inputs(device)
    expected = plain_grads(model, x)
    launches.clear()
    together(model, x, max_bytes=max_bytes).square().sum().backward()
    assert 2 * CALLS * (not max_bytes) <= launches.count("reduce_kernel") <= 2 * CALLS
    assert launches.count("reduce_all_kernel") == bool(max_bytes)
    assert_same(grads(model), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_checkpointing(model, device, reentrant, inside):
    x = inputs(device).requires_grad_()
    expected = plain_grads(model, x)
    with rsfast.reduce_together(model):
        loss = checkpoint(model, x, use_reentrant=reentrant).square().sum()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    assert_same(grads(model), expected)


def test_frozen_factors(model, device, launches):
    model.square.lora_A.requires_grad_(False)
    x = inputs(device)
    expected = plain_grads(model, x)
    together(model, x).square().sum().backward()
    assert launches[-1] == "reduce_all_kernel"
    assert_same(grads(model), expected)


def test_hooks_of_parameters_see_the_whole_gradient(model, device):
    seen, factor = [], model.square.lora_B
    factor.register_hook(lambda grad: seen.append(grad.clone()))
    together(model, inputs(device)).square().sum().backward()
    assert len(seen) == 1 and torch.equal(seen[0], factor.grad)


def test_an_error_leaves_everything_usable(model, device):
    x = inputs(device)
    expected = plain_grads(model, x)
    with pytest.raises(ZeroDivisionError), rsfast.reduce_together(model):
        model(x)
        raise ZeroDivisionError
    y = together(model, x)

    def fail(grad):
        raise ZeroDivisionError

    handle = model.square.lora_A.register_hook(fail)
    with pytest.raises(ZeroDivisionError):
        y.square().sum().backward(retain_graph=True)
    handle.remove()
    model.zero_grad()
    y.square().sum().backward()
    assert_same(grads(model), expected)


def test_a_copy_is_not_the_model(model, device):
    x, twin = inputs(device), copy.deepcopy(model)
    expected = plain_grads(model, x)
    with rsfast.reduce_together(model):
        copy.deepcopy(twin)(x).sum().backward()
        y = twin(x)
    y.square().sum().backward()
    assert_same(grads(twin), expected)


def test_nothing_is_kept(model, device):
    y = together(model, inputs(device))
    node = weakref.ref(y)
    y.sum().backward(retain_graph=True)
    first = weakref.ref(model.square.lora_A.grad)
    model.zero_grad()
    del y
    gc.collect()
    assert node() is None and first() is None


def test_without_gradients(model, device):
    x = inputs(device)
    expected = plain_grads(model, x)
    with torch.no_grad(), rsfast.reduce_together(model):
        assert not model(x).requires_grad
        with torch.enable_grad():
            y = model(x)
    y.square().sum().backward()
    assert_same(grads(model), expected)
    with torch.inference_mode(), rsfast.reduce_together(model):
        model(x)


def test_no_second_derivative(model, device):
    loss = together(model, inputs(device)).square().sum()
    (dA,) = torch.autograd.grad(loss, [model.square.lora_A], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        dA.sum().backward()


def test_changes_nothing_in_plain_pytorch(device):
    model = nn.Sequential(*[rsfast.LoRALinear(nn.Linear(8, 8), r=2, impl="reference") for _ in range(2)]).to(device)
    x = torch.randn(3, 8, device=device)
    expected = plain_grads(model, x)
    together(model, x).square().sum().backward()
    assert all(torch.equal(grad, expected[name]) for name, grad in grads(model).items())


@pytest.mark.parametrize("outside", [False, True])
def test_compiled_regions_are_left_alone(device, outside):
    torch._dynamo.reset()
    model = nn.Sequential(lora(24, 17), lora(17, 24)).to(device)
    x = inputs(device)
    expected = plain_grads(model, x)
    if outside:
        run = torch.compile(model, fullgraph=True, backend="aot_eager")
        with rsfast.reduce_together(model):
            y = run(x)
    else:
        y = torch.compile(lambda x: together(model, x), fullgraph=True, backend="aot_eager")(x)
    y.square().sum().backward()
    assert_same(grads(model), expected)


def test_distributed_data_parallel(model, device, tmp_path):
    x = inputs(device)
    del model.unused
    expected = plain_grads(model, x)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # buckets are made anew after the first step
            model.zero_grad()
            together(parallel, x).square().sum().backward()
            assert_same(grads(model), expected)
    finally:
        dist.destroy_process_group()


def test_bad_input(model):
    with pytest.raises(ValueError, match="must have LoRA layers, but Linear has no lora_A"):
        together(nn.Linear(2, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match="the factors of LoRA layers, got none"):
        together([], None)
    with pytest.raises(ValueError, match=r"got \['str'\]"):
        together(["lora_A"], None)
    for wrong in (-1, 1.5, True):
        with pytest.raises(ValueError, match="max_bytes must be a number of bytes"):
            together(model, None, max_bytes=wrong)
    with rsfast.reduce_together(model), pytest.raises(RuntimeError, match="active already"):
        together(model, None)
    with rsfast.reduce_together(model):
        pass


def test_inputs_that_are_computed_again(device, launches):
    """The function's input is wider than its output, so the sums of lora_A have more chunks."""
    torch.manual_seed(0)
    layer, h = lora(24, 24, torch.bfloat16).to(device), inputs(device, rows=70)
    factors, grads = [layer.lora_A, layer.lora_B], []
    for around in (contextlib.nullcontext(), rsfast.reduce_together(factors)):
        launches.clear()
        with around:
            x, source = nn.functional.gelu(h).bfloat16(), rsfast.Source("gelu", h)
            y = rsfast.lora_linear(x, layer.weight, layer.bias, *factors, 2.0, source=source, impl="fused")
        grads.append(torch.autograd.grad(y.square().sum(), factors))
    assert launches == ["reduce_all_kernel"]
    assert all(torch.equal(*pair) and pair[0].any() for pair in zip(*grads, strict=True))
