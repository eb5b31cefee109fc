"""Retrieval metrics: HarMA's own numbers, the definition by sorting, ties, blocks, bad input."""

import pathlib

import numpy as np
import pytest
import torch

from rsfast.harma import retrieval_metrics
from rsfast.harma.retrieval import scores

SEVEN = ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10", "r_mean")
GOLDEN = pathlib.Path(__file__).parent / "data" / "harma_retrieval_metrics.npz"


def by_sorting(scores, own, texts):
    """The definition, with a stable sort and two loops; ``own`` holds for each text its image."""

    def recalls(matrix, right):
        orders = enumerate(np.argsort(-matrix, axis=1, kind="stable"))
        ranks = np.array([next(k for k, j in enumerate(order) if right(i, j)) for i, order in orders])
        return [100 * (ranks < k).mean() for k in (1, 5, 10)]

    words = [{texts[t] for t in range(len(texts)) if own[t] == i} for i in range(len(scores))]
    plain = recalls(scores, lambda i, t: own[t] == i) + recalls(scores.T, lambda t, i: own[t] == i)
    same = recalls(scores, lambda i, t: texts[t] in words[i]) + recalls(scores.T, lambda t, i: texts[t] in words[i])
    keys = [*SEVEN, *(f"{name}_same_words" for name in SEVEN)]
    return dict(zip(keys, [*plain, np.mean(plain), *same, np.mean(same)], strict=True))


def test_golden():
    golden = np.load(GOLDEN)
    scores = torch.from_numpy(golden["scores"])
    owner = torch.arange(300) // int(golden["captions_per_image"])
    found = retrieval_metrics(scores, torch.eye(300), owner)
    assert tuple(found) == SEVEN
    assert {name: round(found[name], 2) for name in SEVEN} == {name: golden[name].item() for name in SEVEN}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_sorting_for_any_block(dtype, device):
    generator = torch.Generator().manual_seed(0)
    # few small integers: every product is exact, and ties are everywhere
    image = torch.randint(-1, 2, (23, 5), generator=generator).to(device, dtype)
    text = torch.randint(-1, 2, (61, 5), generator=generator).to(device, dtype)
    owner = torch.cat([torch.arange(23), torch.randint(23, (38,), generator=generator)])
    texts = [f"text {k}" for k in torch.randint(20, (61,), generator=generator).tolist()]
    expected = by_sorting((image.double() @ text.double().T).cpu().numpy(), owner.tolist(), texts)
    for block in (None, 1, 4, 7, 61, 1000):
        found = retrieval_metrics(image, text, owner.to(device), texts=texts, block=block)
        assert found == pytest.approx(expected, rel=1e-12)  # means of the same six numbers in another order
        assert {name: found[name] for name in SEVEN} == retrieval_metrics(image, text, owner.to(device), block=block)


def test_equal_features_tie_wherever_they_stand():
    generator = torch.Generator().manual_seed(1)
    image = torch.nn.functional.normalize(torch.randn(40, 64, generator=generator), dim=1)
    text = image[:1].repeat(1, 1).expand(200, 64) + 0.0  # one caption, 200 times
    found = [retrieval_metrics(image, text, torch.arange(200) % 40, block=block) for block in (None, 1, 3, 64)]
    assert all(f == found[0] for f in found)
    # image 0..4 own one of the first five texts, and so on: ties go by index
    assert found[0]["txt_r5"] == 100 * 5 / 40


def test_a_score_does_not_depend_on_its_block(device):
    image, text = torch.randn(300, 512, device=device), torch.randn(700, 512, device=device)
    whole = scores(image, text)
    assert all(torch.equal(scores(image[i : i + 1], text)[0], whole[i]) for i in range(0, 300, 7))
    assert all(torch.equal(scores(text[t : t + 3], image).T, whole[:, t : t + 3]) for t in range(0, 697, 50))


def test_a_collapsed_model_earns_what_guessing_earns():
    found = retrieval_metrics(torch.ones(50, 8), torch.ones(250, 8), torch.arange(250) % 50)
    assert (found["img_r1"], found["img_r10"], found["txt_r1"]) == (2.0, 20.0, 2.0)


def test_features_are_used_as_given():
    image, text = torch.eye(2), torch.tensor([[1.0, 0.9], [10.0, 1.0]])  # long text 1 wins image 0 unless normalised
    assert retrieval_metrics(image, text, torch.tensor([0, 1]))["txt_r1"] == 50.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_features": torch.ones(3)}, "image_features must be floating point"),
        ({"text_features": torch.ones(4, 5)}, "text_features must be 2 wide"),
        ({"text_features": torch.ones(4, 2).double()}, "text_features must have dtype"),
        ({"text_features": torch.full((4, 2), torch.nan)}, "text_features must be finite, 4 of its rows"),
        ({"text_to_image": torch.tensor([0, 1, 2, 3])}, "text_to_image must be from 0 to 2, got 0 to 3"),
        ({"text_to_image": torch.tensor([0, 1, 2])}, "text_to_image must be 4 integers"),
        ({"text_to_image": torch.zeros(4)}, "text_to_image must be 4 integers"),
        ({"text_to_image": torch.tensor([0, 0, 2, 2])}, "1 images without a text, the first is 1"),
        ({"texts": ["a"]}, "texts must be 4 captions"),
        ({"block": 0}, "block must be 1 or more"),
    ],
)
def test_bad_input(change, message):
    good = dict(
        image_features=torch.ones(3, 2), text_features=torch.ones(4, 2), text_to_image=torch.tensor([0, 1, 2, 2])
    )
    arguments = good | change
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(
            arguments.pop("image_features"), arguments.pop("text_features"), arguments.pop("text_to_image"), **arguments
        )
