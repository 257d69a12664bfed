import pytest
import torch
from conftest import tiny_pipeline

from dmm.evaluation.score_error import score_error
from dmm.models.styles import StylePrompts
from dmm.pipeline.styled import add_styles

STYLES = ("ink", "photo")


class HeldOut:
    """A few latents whose captions all text encoders read alike."""

    num_rows = 6
    latent_shape = (4, 8, 8)

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self._latents = torch.randn(self.num_rows, *self.latent_shape, generator=generator)
        self._text = torch.randn(self.num_rows, 5, 16, generator=generator)

    def latents(self, rows):
        return self._latents[rows]

    def conditioning(self, encoder, rows, dropped):
        assert not dropped.any()
        return {"encoder_hidden_states": self._text[rows]}


ROWS = {"ink": torch.tensor([0, 1, 2]), "photo": torch.tensor([3, 4, 5])}


def as_student(pipeline, silent=True):
    """A pipeline with styles, which say nothing."""
    torch.manual_seed(0)
    prompts = StylePrompts(STYLES, dim=32)
    if silent:
        torch.nn.init.zeros_(prompts.linear_2.weight)
        torch.nn.init.zeros_(prompts.linear_2.bias)
    add_styles(pipeline, prompts)
    return pipeline


def teacher(seed=1, prediction_type="epsilon"):
    return tiny_pipeline(seed, prediction_type)


def measure(student, teachers, **options):
    return score_error(student, teachers, tiny_pipeline(), HeldOut(), ROWS, num_bands=3, draws_per_row=8, **options)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_teacher_as_its_own_student_has_no_error(prediction_type):
    found = measure(as_student(teacher(1, prediction_type)), dict.fromkeys(STYLES, teacher(1, prediction_type)))
    assert found.by_style == dict.fromkeys(STYLES, 0.0)
    assert found.curve == [0.0] * 3
    assert found.mean == 0


def test_the_base_as_a_student_has_learnt_nothing():
    found = measure(as_student(tiny_pipeline()), {"ink": teacher(1), "photo": teacher(2, "v_prediction")})
    assert found.by_style == dict.fromkeys(STYLES, 1.0)
    assert found.by_band == dict.fromkeys(STYLES, [1.0] * 3)
    assert found.bands == [range(333), range(333, 666), range(666, 1000)]


def test_styles_are_told_apart_and_nothing_depends_on_the_batch_size():
    student = as_student(tiny_pipeline(), silent=False)
    teachers = {"ink": teacher(1), "photo": teacher(2)}
    found = measure(student, teachers)
    assert found.by_style["ink"] != found.by_style["photo"]
    assert found.mean == pytest.approx(sum(found.by_style.values()) / 2)
    assert measure(student, teachers, batch_size=5).by_style == pytest.approx(found.by_style, rel=1e-5)
    assert measure(student, teachers, seed=1).by_style != pytest.approx(found.by_style, rel=1e-5)


def test_a_band_without_samples_is_refused():
    with pytest.raises(ValueError, match="'ink': in a band"):
        score_error(as_student(tiny_pipeline()), {"ink": teacher()}, tiny_pipeline(), HeldOut(), ROWS, num_bands=500)


def test_what_teachers_and_base_said_is_not_asked_again_for_another_student():
    teachers = {"ink": teacher(1), "photo": teacher(2, "v_prediction")}
    kept = {}

    def keep(style, num_draws, references):
        if style not in kept:
            kept[style] = references(range(num_draws))
        return lambda span: {name: said[span.start : span.stop] for name, said in kept[style].items()}

    first = as_student(tiny_pipeline(), silent=False)
    assert measure(first, teachers, keep=keep).by_style == pytest.approx(measure(first, teachers).by_style, rel=1e-5)
    second = as_student(tiny_pipeline(3), silent=False)
    expected = measure(second, teachers).by_style
    for one in teachers.values():
        one.unet = Silent(one.unet)
    assert measure(second, teachers, keep=keep).by_style == pytest.approx(expected, rel=1e-5)


class Silent(torch.nn.Module):
    """A UNet that must not be asked."""

    def __init__(self, unet):
        super().__init__()
        self.config, self.device, self.dtype = unet.config, unet.device, unet.dtype
