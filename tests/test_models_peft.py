"""PEFT's linear LoRA layers on the fused path, PEFT being the oracle."""

import ast
import copy
import io
import pathlib
import sys
import warnings

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rsfast.models
from rsfast.models import patch_peft, peft_layers, unpatch
from rsfast.testing import assert_within_budget
from tests.tiny_peft import LINEAR, NAMES, Net, assert_same, example, gradients, make, stir

PATHS = tuple(f"base_model.model.{name}" for name in LINEAR)


def patched(model, **options):
    twin = copy.deepcopy(model)
    patch_peft(twin, **options)
    return twin


@pytest.fixture
def fused_only(monkeypatch):
    """Where PEFT's own forward would be an error."""

    def forward(*_, **__):
        raise AssertionError("PEFT's own forward")

    monkeypatch.setattr(Linear, "forward", forward)


@pytest.mark.parametrize(
    "configs",
    [
        [{}],
        [{"lora_alpha": 24, "use_rslora": True, "rank_pattern": {"v": 5}, "alpha_pattern": {"fc": 1}}],
        [{"lora_dropout": 0.5}, {"r": 2, "lora_alpha": 5, "target_modules": ["q"]}],  # dropout is off in eval
    ],
    ids=["plain", "patterns", "two active"],
)
def test_values_and_gradients(configs, monkeypatch):
    model = make(*configs)
    theirs, twin = gradients(model, example()), patched(model)
    calls = []
    monkeypatch.setattr(peft_layers, "lora_linear", lambda *a, **k: calls.append(1) or rsfast.lora_linear(*a, **k))
    monkeypatch.setattr(Linear, "forward", None)
    assert_same(gradients(twin, example()), theirs)
    assert len(calls) == len(LINEAR)


def test_injected_model():
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=3, target_modules=["fc"]), Net().double())
    stir(model.double())
    theirs = gradients(model, example())
    assert patch_peft(model).swapped == ("fc",)
    assert_same(gradients(model, example()), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"], ids=str)
def test_precision(dtype, fused_only, monkeypatch):
    """fp32 adapters beside any base, within the budget of PEFT's adapters in the base's own dtype."""
    base = torch.float32 if dtype == "autocast" else dtype
    model = make({}, {"r": 2}, dtype=base)
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "lora_" in n)
    twin, narrow = patched(model), copy.deepcopy(model).to(base)
    call = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast")
    ours = gradients(twin, example(base), call=call(twin))
    monkeypatch.undo()
    theirs, eager = (gradients(m, example(base), call=call(m)) for m in (model, narrow))
    gold = gradients(model.double(), example(base).double())
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert_within_budget(ours[name], gold[name], eager[name].to(ours[name]), terms=20, name=name)


def test_kernels(device, fused_only, monkeypatch):
    """Two active adapters, and a batch of both, in one kernel each."""
    model = make({}, {"r": 2}, dtype=torch.float32).to(device)
    x, names = example(torch.float32).to(device), ["one", "two", "__base__"]
    twin = patched(model, impl="fused")
    ours = gradients(twin, x)
    ours["mixed"] = twin(x, adapter_names=names).detach()
    monkeypatch.undo()
    eager, gold = gradients(model, x), gradients(copy.deepcopy(model).double(), x.double())
    eager["mixed"] = model(x, adapter_names=names).detach()
    gold["mixed"] = model.double()(x.double(), adapter_names=names).detach()
    for name in ours:
        assert_within_budget(ours[name], gold[name], eager[name], terms=20, name=name)


def test_no_fp32_copy_of_the_input(fused_only):
    model = patched(make(dtype=torch.bfloat16))

    class NoCopy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            y = func(*args, **(kwargs or {}))
            is_copy = isinstance(y, torch.Tensor) and y.dtype == torch.float32 and y.shape[:2] == (3, 5)
            assert not is_copy, func
            return y

    x = example(torch.bfloat16)
    with NoCopy():
        model(x).sum().backward()


def test_bf16_adapters_beside_an_fp32_base():
    model = make(dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    ours, eager = gradients(patched(model), example(torch.float32)), gradients(model, example(torch.float32))
    gold = gradients(model.double(), example())
    for name in ours:
        assert_within_budget(ours[name], gold[name], eager[name], terms=20, name=name)


def test_dropout(fused_only):
    """Each adapter drops inputs of its own; what it keeps is divided by the share that is kept."""
    net = nn.Sequential(nn.Linear(64, 64, bias=False))
    config = {"r": 64, "lora_alpha": 64, "lora_dropout": 0.25, "target_modules": ["0"]}
    model = make(config, config, module=net, dtype=torch.float32)
    layer = model.base_model.model[0]
    with torch.no_grad():
        for j, name in enumerate(NAMES[:2]):
            layer.lora_A[name].weight.copy_(torch.eye(64))
            layer.lora_B[name].weight.copy_(torch.eye(64) * 100**j)
        net[0].weight.zero_()
    patch_peft(model)
    x = torch.ones(200, 64)
    assert torch.equal(model(x), torch.full_like(x, 101.0))
    y = model.train()(x).detach() * 0.75
    seen, counts = y.round().unique(return_counts=True)
    assert seen.tolist() == [0, 1, 100, 101]
    shares = counts / counts.sum() - torch.tensor([1, 3, 3, 9]) / 16
    assert shares.abs().max() < 0.02  # five standard deviations
    layer.set_adapter(["one"])
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    seed = torch.randint(-(2**63), 2**63 - 1, ())
    eye = torch.eye(64)
    assert torch.equal(y, rsfast.lora_linear(x, 0 * eye, None, eye, eye, 1.0, dropout_p=0.25, seed=seed))


def test_states_of_peft():
    """Disabled and merged layers, other scales, other adapters: whatever PEFT's functions do still does it."""
    model = make({}, {"r": 2})
    twin, x = patched(model), example()
    with model.disable_adapter(), twin.disable_adapter():
        assert torch.equal(twin(x), model(x))
    for m in (model, twin):
        m.set_adapter("two")
        m.base_model.model.q.set_scale("two", 3.0)
    assert_same(gradients(twin, x), gradients(model, x))
    for m in (model, twin):
        m.merge_adapter()
    assert torch.equal(twin(x), model(x))
    for m in (model, twin):
        m.unmerge_adapter()
        m.delete_adapter("one")
        m.add_adapter("three", peft.LoraConfig(r=1, target_modules=list(LINEAR)))
        m.set_adapter("three")
        stir(m.double())
    assert_same(gradients(twin, x), gradients(model, x))
    assert torch.equal(twin.merge_and_unload()(x), model.merge_and_unload()(x))


def test_scaling_as_tensor(fused_only):
    """What peft's prepare_model_for_compiled_hotswap makes of it."""
    model = patched(make({"r": 4}))  # the scale is 2, whatever the dtype
    expected = model(example())
    for name in LINEAR:
        layer = getattr(model.base_model.model, name)
        layer.scaling["one"] = torch.tensor(layer.scaling["one"])
    torch.testing.assert_close(model(example()), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_mixed_batch(dtype, monkeypatch):
    model = make({}, {"r": 2, "lora_alpha": 5, "target_modules": ["q", "fc"]}, {"use_rslora": True}, dtype=dtype)
    names = ["two", "one", "__base__", "three", "one", "two"]
    with torch.no_grad():
        expected = model(example(dtype, 6), adapter_names=names)
        twin = patched(model)
        monkeypatch.setattr(Linear, "_mixed_batch_forward", None)
        y = twin(example(dtype, 6), adapter_names=names)
        monkeypatch.undo()
        base = twin(example(dtype, 6), adapter_names=["__base__"] * 6)
        gold = model.double()(example(dtype, 6).double(), adapter_names=names)
    if dtype is torch.float64:
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    assert_within_budget(y, gold, expected, terms=20)
    with torch.no_grad(), twin.disable_adapter():
        assert torch.equal(base, twin(example(dtype, 6)))


def test_mixed_batch_refuses_what_peft_refuses():
    twin = patched(make({}, {}))
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        twin(example(), adapter_names=["one"])
    with pytest.raises(ValueError, match="adapter"):
        twin(example(), adapter_names=["one", "nobody", "one"])


def test_report_and_what_is_left_alone():
    net = nn.ModuleDict({
        "fine": nn.Linear(4, 4), "hooked": nn.Linear(4, 4), "own": nn.Linear(4, 4), "kind": Odd(4, 4),
        "embedding": nn.Embedding(4, 4), "conv": nn.Conv2d(4, 4, 1), "int8": nn.Linear(4, 4),
    })  # fmt: skip
    net["hooked"].register_forward_hook(lambda *_: None)
    net["own"].forward = net["own"].forward
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=list(net)), net)
    model["int8"].base_layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    report = patch_peft(model)
    assert report.swapped == ("fine",) and report.dead == ()
    assert list(report.skipped) == ["hooked", "own", "kind", "embedding", "conv", "int8"]
    for path, reason in {"hooked": "hooks", "own": "wrapped", "kind": "Odd", "embedding": "Embedding over a Embedding",
                         "conv": "Conv2d", "int8": "torch.int8 (quantised)"}.items():  # fmt: skip
        assert reason in report.skipped[path] and f"skipped {path}: " in str(report)
    assert str(report).startswith("fused path in 1 LoRA layers\n")


class Odd(nn.Linear):
    pass


@pytest.mark.parametrize("option", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_adapters_that_are_not_plain_are_peft_s_own(option):
    config = {**option, "target_modules": ["q"]}
    model = make({}, config)
    twin = copy.deepcopy(model)
    report = patch_peft(twin)
    assert report.swapped == PATHS[1:] and list(report.skipped) == [PATHS[0]]
    assert ("Dora" if "use_dora" in option else "lora_bias") in report.skipped[PATHS[0]]
    assert_same(gradients(twin, example()), gradients(model, example()))

    model = make()
    twin = patched(model)  # and one that comes later
    for m in (model, twin):
        m.add_adapter("z", peft.LoraConfig(r=2, **config))
        m.base_model.set_adapter(["one", "z"])
        stir(m.double())
    assert_same(gradients(twin, example()), gradients(model, example()))


def test_hooks_that_come_later_fire():
    model = patched(make())
    seen = []
    layer = model.base_model.model.q
    for part in (layer.base_layer, layer.lora_A["one"], layer.lora_B["one"], layer.lora_dropout["one"]):
        handle = part.register_forward_hook(lambda *_: seen.append(1))
        model(example())
        handle.remove()
    assert len(seen) == 4


def test_fan_in_fan_out_is_left_alone():
    from transformers.pytorch_utils import Conv1D

    net = nn.Sequential(Conv1D(6, 4))
    model = make({"target_modules": ["0"], "fan_in_fan_out": True}, module=net)
    assert patch_peft(model).swapped == ()


def test_unpatch_restores_and_files_stay(tmp_path):
    model = make()
    names, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    attributes = [sorted(vars(m)) for m in model.modules()]
    model.save_pretrained(tmp_path / "before")
    patch_peft(model)
    assert list(model.state_dict()) == names
    layer = model.base_model.model.q
    assert isinstance(layer, Linear) and type(layer) is not Linear and repr(layer).startswith("lora.")
    model.save_pretrained(tmp_path / "patched")
    unpatch(model)
    assert [type(m) for m in model.modules()] == classes and [sorted(vars(m)) for m in model.modules()] == attributes
    model.save_pretrained(tmp_path / "after")
    files = [p.relative_to(tmp_path / "before") for p in (tmp_path / "before").rglob("*.*")]
    assert {"adapter_config.json", "adapter_model.safetensors"} < {p.name for p in files}
    for name in files:
        before = (tmp_path / "before" / name).read_bytes()
        assert before == (tmp_path / "patched" / name).read_bytes() == (tmp_path / "after" / name).read_bytes(), name


def test_copies_pickles_and_compiles():
    model = patched(make())
    x = example()
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-12)


def test_loading_into_a_patched_model(tmp_path):
    trained, fresh = make(), make({"r": 3})
    trained.save_pretrained(tmp_path)
    patch_peft(fresh)
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            if "lora_" in name:
                parameter.zero_()
    fresh.load_adapter(tmp_path / "one", "one", is_trainable=True)
    assert_same({"y": fresh(example())}, {"y": trained(example())})


def test_errors():
    with pytest.raises(ValueError, match="no LoRA layer of PEFT"):
        patch_peft(nn.Linear(2, 2))
    model = make()
    with pytest.raises(ValueError, match="impl must be"):
        patch_peft(model, impl="fast")
    with pytest.raises(ValueError, match="not patched"):
        unpatch(model)
    patch_peft(model)
    with pytest.raises(ValueError, match="patched already"):
        patch_peft(model)
    unpatch(model)
    with pytest.raises(ValueError, match="not patched"):
        unpatch(model)
    patch_peft(model, impl="fused")
    with pytest.raises(NotImplementedError, match="cannot run"):
        model(example())


def test_peft_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft.tuners.lora.layer", None)
    monkeypatch.delitem(sys.modules, "rsfast.models.peft_layers")
    monkeypatch.delattr(rsfast.models, "peft_layers")
    with pytest.raises(ImportError, match="need peft, which cannot be imported"):
        patch_peft(nn.Linear(2, 2))
    for path in pathlib.Path(rsfast.models.__file__).parent.glob("*.py"):
        top = {name for node in ast.parse(path.read_text()).body for name in imported(node)}
        assert not top & {"peft", "peft_layers"} or path.stem == "peft_layers", path


def imported(node):
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {node.module.split(".")[0], node.module.split(".")[-1], *(alias.name for alias in node.names)}
    return set()
