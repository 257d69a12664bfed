"""The recipe of a few-step distillation: the paper's values, and what does not go together."""

import pytest

from dmm.errors import UserError
from dmm.files.yaml import write_yaml
from dmm.recipes.accelerating import load_few_step_recipe, save_few_step_recipe

GIVEN = {"model": "o/m", "data": {"dataset": "o/d"}}


def load(tmp_path, **changes):
    path = tmp_path / "fast.yaml"
    path.write_text(write_yaml({**GIVEN, **changes}))
    return load_few_step_recipe(path)


def test_defaults_are_the_papers_but_for_the_method(tmp_path):
    recipe = load(tmp_path)
    training = recipe.training
    assert (recipe.method, recipe.rank, recipe.guidance) == ("lcm", 0, (7.0, 7.0))
    assert (training.steps, training.batch_size) == (6000, 8 * 50)
    assert (training.learning_rate, training.ema_decay) == (8e-6, 0.95)


def test_a_lora_is_lcms_with_other_defaults(tmp_path):
    recipe = load(tmp_path, rank=64, training={"steps": 10})
    assert (recipe.method, recipe.training.learning_rate, recipe.training.ema_decay) == ("lcm", 1e-4, None)
    assert load(tmp_path, rank=64, training={"ema_decay": 0.9}).training.ema_decay == 0.9


def test_guidance_is_a_number_or_a_range(tmp_path):
    assert load(tmp_path, guidance=2).guidance == (2.0, 2.0)
    drawn = load(tmp_path, method="lcm", guidance=[3, 12])
    assert drawn.guidance == (3.0, 12.0)
    assert drawn.draws_guidance


def test_what_is_written_is_read(tmp_path):
    recipe = load(tmp_path, method="lcm", guidance=[3, 12], skip=10)
    save_few_step_recipe(recipe, tmp_path / "saved.yaml")
    assert load_few_step_recipe(tmp_path / "saved.yaml") == recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 4, "guidance": [3, 12]}, "a LoRA, which has no place for one; give one number, or leave rank out"),
        ({"guidance": [12, 3]}, "expected a number of at least 1, which is no guidance, or two"),
        ({"guidance": "strong"}, "expected a number of at least 1"),
        ({"guidance": 0.5}, "expected a number of at least 1"),
        ({"method": "lmc"}, "expected 'lcm' or 'splam'"),
        ({"training": {"style_learning_rate": 1e-3}}, "a merge's styles are not trained here; leave it out"),
        ({"size": 20}, "expected a multiple of 8"),
        ({"teachers": []}, "there is no such key"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_mistake_is_a_sentence(tmp_path, changes, message):
    with pytest.raises(UserError) as caught:
        load(tmp_path, **changes)
    assert message in str(caught.value)


def test_the_model_paints_in_its_styles_and_not_as_a_student(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    recipe = load(tmp_path, data={"synthesize": {"prompts": "prompts.txt"}})
    assert recipe.data.synthesize.own == 1
    with pytest.raises(UserError, match="the model that paints is the student's start"):
        load(tmp_path, data={"synthesize": {"prompts": "prompts.txt", "own": 0.5, "student": 0.5}})
