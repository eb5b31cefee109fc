"""What ``rsfast tune`` believes, and how it times; with a GPU that is only pretended."""

import itertools

import pytest
import torch

from rsfast import tune
from rsfast.lora.kernels import launch, plan
from tests.case import BF16, FP32
from tests.test_measure import Pretended

CPU = torch.device("cpu")
SMALL = plan.Facts(40, 32, 48, 8, 1, 0, False, FP32)


def combinations(facts, stages):
    return list(itertools.product(*(plan.candidates(stage, facts) for stage in stages)))


@pytest.mark.parametrize("stages", tune.GROUPS)
def test_everything_that_can_run_is_right(stages, device):
    choices = combinations(SMALL, stages)
    found, reasons = tune.check(SMALL, stages, choices, torch.device(device))
    assert reasons == {} and len(found) == len(choices)
    assert all(0 < error < 1e-6 for errors in found.values() for error in errors)
    assert tune.agree(tune.Layer(SMALL, stages, torch.device(device)), choices, found) == {}


@pytest.mark.parametrize("facts", (
    plan.Facts(40, 32, 48, 8, 3, 0, False, BF16), plan.Facts(40, 32, 48, 8, 1, 0, True, BF16),
    plan.Facts(150, 32, 48, 8, 1, 3, False, BF16),
), ids=("slices", "dropout", "several"))  # fmt: skip
def test_layers_of_every_kind_can_be_run(facts, device):
    for stages in tune.GROUPS[:2]:
        chosen = combinations(facts, stages)[:2]
        found, reasons = tune.check(facts, stages, chosen, torch.device(device))
        assert reasons == {} and all(1e-4 < error < 1e-2 for errors in found.values() for error in errors)


def off(monkeypatch, factor, beyond=0):
    """Our kernel of the base's product, off where it has more rows than ``beyond``."""
    linear = launch.linear
    monkeypatch.setattr(launch, "linear", lambda x, *a, **k: linear(x, *a, **k) * (factor if len(x) > beyond else 1))


def ours(choices):
    """Where our kernel of the base's product runs."""
    return {i for i, (choice,) in enumerate(choices) if choice.arm in ("expand", "inside")}


def test_an_arm_that_is_wrong_is_not_believed(monkeypatch, device):
    off(monkeypatch, 1.001)
    choices = combinations(SMALL, ("forward",))
    found, reasons = tune.check(SMALL, ("forward",), choices, torch.device(device))
    assert [choices[i][0].arm for i in found] == ["composed", "augmented"]
    assert all("error" in reason for reason in reasons.values()) and set(reasons) == ours(choices)


def test_an_arm_that_is_wrong_at_its_full_size_only_is_not_believed(monkeypatch, device):
    monkeypatch.setattr(tune, "CHECKED_ROWS", 16)
    off(monkeypatch, 1.001, beyond=16)
    choices = combinations(SMALL, ("forward",))
    found, reasons = tune.check(SMALL, ("forward",), choices, torch.device(device))
    assert reasons == {}
    reasons = tune.agree(tune.Layer(SMALL, ("forward",), torch.device(device)), choices, found)
    assert set(reasons) == ours(choices) and reasons[2].startswith("at 40 rows it is 1.0e-03 from")
    off(monkeypatch, float("nan"), beyond=16)
    assert set(tune.agree(tune.Layer(SMALL, ("forward",), torch.device(device)), choices, found)) == ours(choices)


def test_an_arm_that_cannot_run_is_not_believed(monkeypatch, device):
    def broken(*args, **options):
        raise RuntimeError("out of resource:\n shared memory")

    monkeypatch.setattr(launch, "linear", broken)
    found, reasons = tune.check(SMALL, ("forward",), combinations(SMALL, ("forward",)), torch.device(device))
    assert set(found) == {0, 1} and reasons[2] == "RuntimeError: out of resource: shared memory"


@pytest.mark.parametrize("stages, wanted", (
    (("forward",), "FFF"), (("dgrad", "low"), "TFT"), (("factor",), "FTF"),
), ids=str)  # fmt: skip
def test_only_what_a_stage_is_for_is_computed(stages, wanted, device):
    layer = tune.Layer(SMALL, stages, torch.device(device))
    for one in (layer, layer.widened(torch.float64)):
        assert "".join("FT"[t.requires_grad] for t in (*one.x, *one.factors)) == wanted


def test_forced_are_the_stages_asked_for_and_no_other():
    chosen = plan.candidates("dgrad", SMALL)[-1], plan.Choice("once")
    with tune.forced(("dgrad", "low"), chosen):
        assert [plan.choose(stage, SMALL, CPU, True) for stage in plan.STAGES] == [
            plan.COMPOSED, *chosen, plan.COMPOSED,
        ]  # fmt: skip
    assert not plan.FORCED


# --- how it is timed


interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is pretended, and kernels run on the CPU")


class World(Pretended):
    def empty_cache(self):
        pass


@pytest.fixture
def world(monkeypatch):
    world = World()
    monkeypatch.setattr(torch, "cuda", world)
    return world


@interpreted
@pytest.mark.parametrize("stages", tune.GROUPS)
def test_a_graph_of_all_inputs_for_each_candidate(monkeypatch, world, stages):
    choices = combinations(SMALL, stages)
    backward = stages != ("forward",)
    best, seconds, reasons = tune.on_gpu(SMALL, stages, choices, CPU)
    assert best == 0 and reasons == {}, "where all are as fast the composed one stays"
    # two events are one millisecond apart; 40 rows of 32 numbers are 5120 bytes, so four inputs
    assert seconds == {i: pytest.approx(1e-3 / 4) for i in range(len(choices))}
    assert (
        world.log.count("new graph 0") == 1 and sum(e.startswith("new") for e in world.log) == len(choices) + backward
    )
    replays = [entry for entry in world.log if entry.startswith("replay")]
    rounds = (tune.ROUNDS + 2) * [f"replay graph {i + backward}" for i in range(len(choices))]
    assert replays == ["replay graph 0"] * backward + rounds, "in turn"


@interpreted
@pytest.mark.parametrize("again, chosen", (((9.0, 8.0), 3), ((9.0, 9.5), 2)))
def test_the_winner_has_to_win_twice(monkeypatch, world, again, chosen):
    """Timed first: 10, 11, 8, 7 for the four; then the fastest against the composed one, then the next."""
    asked = []

    def in_turn(runs, junk):
        asked.append(list(runs))
        if len(runs) == 4:
            return dict(zip(runs, (10.0, 11.0, 8.0, 7.0), strict=True))
        return dict(zip(runs, again if 3 in runs else (9.0, 8.5), strict=True))

    monkeypatch.setattr(tune, "_in_turn", in_turn)
    choices = combinations(SMALL, ("forward",))
    best, seconds, _ = tune.on_gpu(SMALL, ("forward",), (choices + choices[-1:] * 2)[:4], CPU)
    assert best == chosen and asked[:2] == [[0, 1, 2, 3], [0, 3]]
    assert seconds == {0: 2.5, 1: 2.75, 2: 2.0, 3: 1.75}, "a call"


@interpreted
def test_what_does_not_fit_is_a_reason(monkeypatch, world):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")

    monkeypatch.setattr(tune, "agree", full)
    best, seconds, reasons = tune.on_gpu(SMALL, ("forward",), combinations(SMALL, ("forward",)), CPU)
    assert best is None and reasons == {0: "out of memory: CUDA out of memory. Tried to allocate 9 GiB"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stages", tune.GROUPS)
@pytest.mark.parametrize("dropout", (False, True))
def test_a_gpu_is_really_timed(stages, dropout):
    facts = plan.Facts(5000, 320, 384, 16, 1, 0, dropout, BF16)
    choices = combinations(facts, stages)
    best, seconds, reasons = tune.on_gpu(facts, stages, choices)
    assert reasons == {} and best in seconds and set(seconds) == set(range(len(choices)))
    assert all(1e-7 < took < 1e-2 for took in seconds.values()) and seconds[best] <= seconds[0]
