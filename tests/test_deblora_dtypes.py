"""Features, encoders and heads of different dtypes."""

import pytest
import torch
from torch import nn

from rsfast.deblora import ClassMaps, FullMap, LowRankMap, encode, learn_classes, learn_towards

ENCODERS = {
    "low rank": lambda: LowRankMap(8, r=2),
    "full": lambda: FullMap(8),
    "class-wise": lambda: ClassMaps(8, 3, r=2),
    "linear": lambda: nn.Linear(8, 8),
    "none": nn.Identity,
}
FEW = dict(epochs=2, batch_size=8, lr=1e-2)


def rows(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return torch.randn(24, 8, generator=g).half().to(dtype), torch.randint(0, 3, (24,), generator=g)  # fit every dtype


def classes(name, dtype, kind, precision="fp32"):
    torch.manual_seed(0)
    encoder = ENCODERS[name]().to(kind)
    head = None if name == "class-wise" else nn.Linear(8, 3)
    x, labels = rows(dtype)
    return learn_classes(encoder, head, x, labels, precision=precision, **FEW), encoder, head


def towards(name, dtype, kind, precision="fp32"):
    torch.manual_seed(0)
    encoder, x = ENCODERS[name]().to(kind), rows(dtype)[0]
    return learn_towards(encoder, x, 2 * x, precision=precision, **FEW), encoder, None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16], ids=lambda kind: str(kind)[6:])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", ENCODERS)
def test_any_features_train_any_encoder(name, dtype, kind, precision):
    for learn in (classes, towards) if name != "none" else (classes,):
        losses, encoder, head = learn(name, dtype, kind, precision)
        assert losses[1] < losses[0]
        assert all(p.dtype == kind and p.isfinite().all() for p in encoder.parameters())
        assert head is None or head.weight.dtype == torch.float32
    assert encode(encoder, rows(dtype)[0], precision=precision).shape == (24, 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", ENCODERS)
def test_features_are_cast_to_the_encoder_and_nothing_else_changes(name, dtype):
    for learn in (classes, towards) if name != "none" else (classes,):
        expected, found = learn(name, torch.float32, torch.float32), learn(name, dtype, torch.float32)
        assert found[0] == pytest.approx(expected[0], rel=1e-6)
        for one, other in zip(expected[1].parameters(), found[1].parameters(), strict=True):
            torch.testing.assert_close(one, other)


def test_fp64_throughout_stays_fp64():
    class Seen(nn.Linear):
        def forward(self, x):
            assert x.dtype == torch.float64
            return super().forward(x)

    x, labels = rows(torch.float64)
    learn_classes(Seen(8, 8).double(), Seen(8, 3).double(), x, labels, **FEW)
    learn_towards(Seen(8, 8).double(), x, x, **FEW)
    encode(Seen(8, 8).double(), x)


def test_fp32_inputs_of_a_model_of_both_kinds_stay_fp32():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.other = nn.Parameter(torch.ones(8, dtype=torch.bfloat16), requires_grad=False)
            self.map = LowRankMap(8, r=2)

        def forward(self, z):
            assert z.dtype == torch.float32
            return self.map(z) * self.other

    learn_towards(Mixed(), rows()[0], rows()[0], **FEW)


@pytest.mark.parametrize("part", ["encoder", "head"])
def test_what_is_trained_in_fp16_is_refused(part):
    encoder, head = nn.Linear(8, 8), nn.Linear(8, 3)
    (encoder if part == "encoder" else head).half()
    before = [p.clone() for p in (*encoder.parameters(), *head.parameters())]
    with pytest.raises(ValueError, match=f"^{part}: what is trained must be fp32, bf16 or fp64, .*; weight is fp16"):
        learn_classes(encoder, head, *rows(), **FEW)
    assert all(torch.equal(p, b) for p, b in zip((*encoder.parameters(), *head.parameters()), before, strict=True))
