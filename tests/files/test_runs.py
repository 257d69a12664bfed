"""A run's folder tells what it is and how far it has come."""

import pytest

from dmm.errors import UserError
from dmm.files.runs import check_finished, find_run


def begin(folder, *steps, of=30):
    for step in steps:
        (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(f"training:\n  steps: {of}\n")


def refusal(folder):
    with pytest.raises(UserError) as caught:
        check_finished(folder)
    return str(caught.value).replace(str(folder), "run")


def test_a_folder_without_a_run_is_left_to_others(tmp_path):
    (tmp_path / "recipe.yaml").write_text("training: {steps: 3}\n")  # a recipe by itself is anyone's
    assert find_run(tmp_path) is None
    check_finished(tmp_path)
    check_finished(tmp_path / "recipe.yaml")


def test_the_newest_step_is_told(tmp_path):
    begin(tmp_path)
    assert refusal(tmp_path) == (
        "run is a merge that has not ended: no checkpoint is saved yet. Go on with `dmm merge run/recipe.yaml --output "
        "run --resume`."
    )
    begin(tmp_path, 9, 10)
    assert refusal(tmp_path) == (
        "run is a merge that has not ended: step 10 of 30 is saved. Go on with `dmm merge run/recipe.yaml --output run "
        "--resume`; `dmm generate --from-checkpoint` paints with what is saved."
    )


def test_a_first_stage_goes_on_with_the_whole_recipe(tmp_path):
    begin(tmp_path / "first-stage", 4, of=8)
    assert "step 4 of 8 of its first stage is saved. Go on with the recipe that it began with" in refusal(tmp_path)
    begin(tmp_path, 3, of=5)
    assert "step 3 of 5 is saved" in refusal(tmp_path)


def test_a_finished_run_is_a_model(tmp_path):
    begin(tmp_path, 30)
    (tmp_path / "model_index.json").touch()
    check_finished(tmp_path)
    assert find_run(tmp_path).is_finished
