"""What is watched is the relative score error: 1 for the base, 0 for the teachers, measured without training."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import tiny_unet
from toy import ALPHAS_CUMPROD, STYLES, ToyData, toy_student, toy_teachers

from dmm.families.sd1 import SD1
from dmm.maths.processes import VariancePreserving
from dmm.maths.sharing import share_batch
from dmm.models.student import StyledStudent
from dmm.models.styles import StylePrompts
from dmm.training.batches import Batches, Role
from dmm.training.watch import Watch, watched_groups


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def new_watch(prediction_type="epsilon"):
    roles = [Role([i], name, 0.5) for i, name in enumerate(STYLES)]
    settings = {"caption_dropout": 0.0, "micro_batch_size": 6, "seed": 7, "device": torch.device("cpu")}
    groups = share_batch(16, [0.5, 0.5], 1, 0)
    batches = Batches(ToyData(), STYLES, roles, groups=groups, process=VariancePreserving(ALPHAS_CUMPROD), **settings)
    torch.manual_seed(0)
    watch = Watch(batches, tiny_unet(), prediction_type, list(STYLES))
    watch.ask(toy_teachers())
    return watch


def silent(unet):
    """A student whose styles say nothing."""
    prompts = StylePrompts(STYLES, dim=32)
    torch.nn.init.zeros_(prompts.linear_2.weight)
    torch.nn.init.zeros_(prompts.linear_2.bias)
    return StyledStudent(unet, prompts, SD1).eval()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_base_is_at_one(accelerator, prediction_type):
    torch.manual_seed(0)
    base = silent(tiny_unet())
    measured = new_watch(prediction_type).measure(base, accelerator)
    assert measured == pytest.approx({"score_error": 1, **{f"score_error/{name}": 1 for name in STYLES}}, abs=1e-5)


def test_a_teacher_is_at_nought_in_its_own_style(accelerator):
    ink = silent(toy_teachers()[0].denoiser)
    measured = new_watch().measure(ink, accelerator)
    assert measured["score_error/ink"] == pytest.approx(0, abs=1e-6)
    assert measured["score_error/photo"] > 0.5
    assert measured["score_error"] == pytest.approx((measured["score_error/ink"] + measured["score_error/photo"]) / 2)


def test_it_asks_the_same_every_time(accelerator):
    watch, student = new_watch(), toy_student().eval()
    assert watch.measure(student, accelerator) == watch.measure(student, accelerator)


def test_every_style_is_watched_alike():
    kept_and_new = [7, 1]
    for num_processes in (1, 2, 128):
        groups = [watched_groups(kept_and_new, num_processes, process) for process in range(num_processes)]
        sizes = [sum(len(g.indices) for mine in groups for g in mine if g.teacher == teacher) for teacher in (0, 1)]
        assert sizes[0] == 7 * sizes[1] >= 7 * 32
        assert all(len(group.indices) for mine in groups for group in mine)
