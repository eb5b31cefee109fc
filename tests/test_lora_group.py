"""Layers that share their input: one product, the same numbers, and weights that stay the layers' own."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import rsfast
from rsfast.lora import group as module

WIDTHS = (4, 12, 8)
X = torch.randint(-4, 5, (2, 5, 6), generator=torch.Generator().manual_seed(0)).float()


def whole_numbers(*parameters):
    """Sums of products of few of them are exact, in whatever order."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in parameters:
            p.copy_(torch.randint(-3, 4, p.shape, generator=g))


class Blocks(nn.Module):
    """Calls its layers one after another with the same tensor, as cross-attentions do."""

    def __init__(self, **options):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, width, bias=width != 8) for width in WIDTHS)
        whole_numbers(*self.parameters())
        self.group = rsfast.LoRALinearGroup(self.blocks, r=2, alpha=4, **options)
        whole_numbers(self.group.lora_A, self.group.lora_B)

    def forward(self, x):
        return [block(x) for block in self.blocks]


@pytest.fixture
def model():
    return Blocks()


@pytest.fixture
def products(monkeypatch):
    """How many outputs every product that was taken has."""
    widths = []

    def counted(x, weight, *args, **options):
        widths.append(len(weight))
        return rsfast.lora_linear(x, weight, *args, **options)

    monkeypatch.setattr(module, "lora_linear", counted)
    return widths


def alone(model):
    """Each layer by itself with its share of the factors, and that share's gradient after backward."""
    outputs, factors = [], []
    for i, (block, (start, end)) in enumerate(zip(model.blocks, model.group.slices, strict=True)):
        layer = rsfast.LoRALinear(nn.Linear(6, block.out_features, bias=block.bias is not None), r=2, alpha=4)
        layer.load_state_dict({
            **nn.Linear.state_dict(block),
            "lora_A": model.group.lora_A[2 * i : 2 * i + 2], "lora_B": model.group.lora_B[start:end],
        })  # fmt: skip
        factors.append((layer.lora_A, layer.lora_B))
        outputs.append(layer(X))
    return outputs, factors


def assert_equal(actual, expected):
    assert len(actual) == len(expected)
    for one, two in zip(actual, expected, strict=True):
        assert torch.equal(one, two)


def backward(outputs):
    sum((i + 1) * y.sum() for i, y in enumerate(outputs)).backward()


def expected_grads(model):
    outputs, factors = alone(model)
    backward(outputs)
    return [torch.cat([f.grad for f in each]) for each in zip(*factors, strict=True)]


def test_equals_the_layers_one_by_one(model):
    outputs = model.group(X)
    assert_equal(outputs, alone(model)[0])
    backward(outputs)
    assert_equal([model.group.lora_A.grad, model.group.lora_B.grad], expected_grads(model))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"group.lora_A", "group.lora_B"}


def test_weights_are_in_memory_once_and_under_their_names(model):
    storages = {p.untyped_storage().data_ptr() for p in model.parameters() if not p.requires_grad}
    assert len(storages) == 2  # weights, biases
    before = {name for name in Blocks().state_dict() if name.startswith("blocks")}
    assert {f"blocks.{i}.{name}" for i in range(3) for name in ("weight", "bias")} - {"blocks.2.bias"} == before


def changed(model):
    return {name: t + 1 for name, t in model.state_dict().items() if name.startswith("blocks")}


@pytest.mark.parametrize("assign", [False, True])
def test_loading_into_layers_reaches_the_group(model, assign):
    before = model.group(X)
    model.load_state_dict(changed(model), strict=False, assign=assign)
    for p in model.blocks.parameters():
        p.requires_grad_(False)
    assert_equal(model.group(X), alone(model)[0])
    assert not torch.equal(model.group(X)[1], before[1])
    assert len({p.untyped_storage().data_ptr() for p in (model.group.weight, *[b.weight for b in model.blocks])}) == 1


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, saved], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("attached", [False, True])
def test_a_copy_is_a_group_of_its_own(model, again, attached):
    if attached:
        model.group.attach()
        model.blocks[0](X)  # the others wait
    twin, expected = again(model), alone(model)[0]
    assert_equal(twin.group(X), expected)
    whole_numbers(twin.blocks[0].weight, twin.group.lora_B)
    twin.blocks[1].weight.data.zero_()
    assert_equal(twin.group(X), alone(twin)[0])
    assert_equal(model.group(X), expected)
    if attached:
        assert_equal(twin(X), alone(twin)[0])
        assert_equal(model(X), expected)


def test_another_dtype(model):
    model.double()
    assert model.blocks[0].weight.dtype == torch.float64
    assert model.blocks[0].weight.data_ptr() == model.group.weight.data_ptr()
    assert_equal([y.float() for y in model.group(X.double())], alone(model.float())[0])


def test_attached_layers_take_their_part_of_one_product(model, products):
    model.group.attach()
    for _ in range(2):  # the second time nothing is left of the first
        outputs = model(X)
        assert model.group._held is None
    assert products == [24] * 2
    backward(outputs)
    assert_equal(outputs, alone(model)[0])
    assert_equal([model.group.lora_A.grad, model.group.lora_B.grad], expected_grads(model))
    assert all(isinstance(block, nn.Linear) for block in model.blocks)
    model.blocks[0](X)
    model.group.detach()
    assert model.group._held is None
    assert_equal(model(X), [nn.functional.linear(X, block.weight, block.bias) for block in model.blocks])


def change_input(model, x):
    x += 1


def change_factor(model, x):
    whole_numbers(model.group.lora_A)


def change_weight(model, x):
    with torch.no_grad():
        model.blocks[1].weight += 1


def change_mode(model, x):
    model.eval()


def want_a_gradient(model, x):
    x.requires_grad_()


@pytest.mark.parametrize("change", [change_input, change_factor, change_weight, change_mode, want_a_gradient])
def test_no_part_outlives_what_it_was_computed_from(model, products, change):
    model.group.attach()
    x = X.clone()
    model.blocks[0](x)
    change(model, x)
    y = model.blocks[1](x)
    assert products == [24] * 2
    assert torch.equal(y, model.group(x)[1]) and y.requires_grad
    equal = x.clone()
    model.blocks[2](equal)
    assert len(products) == 4 and model.group._held.x() is equal


def test_parts_without_and_with_gradients(model, products):
    model.group.attach()
    with torch.no_grad():
        assert not model.blocks[0](X).requires_grad
    assert model.blocks[1](X).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert model.blocks[2](X).dtype == torch.bfloat16
    assert products == [24] * 3


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointed_blocks(reentrant, dropout):
    """Recomputation drops the same elements as the forward pass."""
    model, x = Blocks(dropout=dropout), X.clone().requires_grad_()
    model.group.attach()

    def run(call):
        torch.manual_seed(0)
        model.zero_grad()
        outputs = [call(block) for block in model.blocks]
        backward(outputs)
        return [y.detach() for y in outputs] + [model.group.lora_A.grad, model.group.lora_B.grad]

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        expected = run(lambda block: block(x))
    assert_equal(run(lambda block: checkpoint(block, x, use_reentrant=reentrant)), expected)
    if not dropout:
        assert_equal(expected, run(lambda block: block(x)))
        assert_equal(expected[-2:], expected_grads(model))
    assert model.group._held is None


def test_inference_mode(model, products):
    model.group.attach()
    with torch.inference_mode():
        x = X.clone()
        first = model.blocks[1](x)
        x += 1  # which nobody counts
        assert not torch.equal(model.blocks[1](x), first)
        assert torch.equal(model.blocks[2](x), model.group(x)[2])
    assert products == [12, 12, 8, 24]


@pytest.mark.parametrize("attached", [False, True])
def test_compiles_whole(model, attached):
    torch._dynamo.reset()
    if attached:
        model.group.attach()
    run = torch.compile(model if attached else model.group, fullgraph=True, backend="aot_eager")
    outputs = run(X)
    assert_equal(outputs, alone(model)[0])
    backward(outputs)
    assert_equal([model.group.lora_A.grad, model.group.lora_B.grad], expected_grads(model))


def test_merging(model):
    model.group.attach()
    adapted, before = alone(model)[0], [block.weight.clone() for block in model.blocks]
    model.group.merge()
    assert_equal(model(X), adapted)
    assert_equal([nn.Linear.forward(block, X) for block in model.blocks], adapted)
    model.group.unmerge()
    assert_equal([block.weight for block in model.blocks], before)
    assert_equal(model(X), adapted)


def test_merging_a_copy(model):
    """A copy's layers and group hold weights apart until either is used; merging is a use."""
    adapted, plain = alone(model)[0], [nn.Linear.forward(block, X) for block in model.blocks]
    twin = copy.deepcopy(model)
    twin.group.merge()
    assert_equal(twin(X), adapted)
    twin = copy.deepcopy(twin)
    twin.group.unmerge()
    assert_equal(twin(X), plain)
    assert_equal(twin.group(X), adapted)


def test_one_interpreted_product(device):
    pytest.importorskip("triton")
    model = Blocks(impl="fused").to(device)
    x = X.to(device)
    model.group.attach()
    outputs = model(x)
    backward(outputs)
    actual = [model.group.lora_A.grad.cpu(), model.group.lora_B.grad.cpu()]
    model.to("cpu")
    model.group.impl = "reference"
    assert_equal([y.cpu() for y in outputs], alone(model)[0])
    assert_equal(actual, expected_grads(model))


def test_bad_input(model):
    layer = nn.Linear(6, 4)
    for layers, error, message in (
        ([], ValueError, "one or more, each once, got 0"),
        ([layer, layer], ValueError, "each once, got 2"),
        ([layer, nn.Conv1d(6, 4, 1)], TypeError, "plain nn.Linear, got Conv1d at 1"),
        ([rsfast.LoRALinear(nn.Linear(6, 4))], TypeError, "got LoRALinear at 0"),
        ([layer, nn.Linear(7, 4)], ValueError, r"got \(6, .* at 0 and \(7, .* at 1"),
        ([layer, nn.Linear(6, 4, dtype=torch.float64)], ValueError, "float64.* at 1"),
    ):
        with pytest.raises(error, match=message):
            rsfast.LoRALinearGroup(layers)
    tied = nn.Linear(6, 4)
    tied.weight = layer.weight
    with pytest.raises(ValueError, match="two share one"):
        rsfast.LoRALinearGroup([layer, tied])
    with pytest.raises(ValueError, match="r must be a positive integer"):
        rsfast.LoRALinearGroup([layer], r=0)
    assert layer.weight.requires_grad  # nothing was changed
    with pytest.raises(ValueError, match="not attached"):
        model.group.detach()
    model.group.attach()
    with pytest.raises(ValueError, match="attached already"):
        model.group.attach()
    with pytest.raises(TypeError, match="got _Member at 0"):
        rsfast.LoRALinearGroup(model.blocks)
