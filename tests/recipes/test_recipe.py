import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from dmm.errors import UserError
from dmm.recipes.data import Data, Synthesize
from dmm.recipes.recipe import Recipe, load_recipe, save_recipe
from dmm.recipes.styles import Styles
from dmm.recipes.teacher import Teacher
from dmm.recipes.training import Logging, Losses, Training

RECIPES = Path(__file__).parents[2] / "recipes"

PLAIN = """\
base: base
teachers:
  - {name: noto, model: models/noto}
  - name: ink
    lora: ink.safetensors
data: {images: pictures}
training:
  steps: 10
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A recipe's folder, with all that PLAIN names."""
    for name in ("base", "models/noto", "pictures"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("ink.safetensors", "noto.safetensors", "prompts.txt"):
        (tmp_path / name).write_text("a cat")
    (tmp_path / "merge.yaml").write_text(PLAIN)
    return tmp_path


def load(folder: Path, text: str, *overrides: str) -> Recipe:
    (folder / "merge.yaml").write_text(text)
    return load_recipe(folder / "merge.yaml", overrides)


def mistake(folder: Path, text: str, *overrides: str) -> str:
    """The sentence with which a recipe is refused, its folder's name left out."""
    with pytest.raises(UserError) as caught:
        load(folder, text, *overrides)
    said = str(caught.value)
    assert "\n" not in said
    assert said.endswith(".")
    return said.replace(f"{folder.resolve()}{os.sep}", "")


def test_a_recipe_that_names_nothing_else_merges_with_adapters_in_a_night(folder):
    recipe = load(folder, PLAIN.replace("training:\n  steps: 10\n", ""))
    assert (recipe.styles.rank, recipe.styles.trained) == (16, "adapters")
    training = recipe.training
    assert (training.steps, training.batch_size, training.micro_batch_size) == (1000, 8, 4)
    assert (training.learning_rate, training.lr_schedule) == (1e-4, "cosine")
    assert recipe.losses == Losses(feature=0.001, adversarial=0)
    # what is said stays, and the rest is filled in around it
    recipe = load(folder, PLAIN + "losses: {adversarial: 0.02}\nstyles: {train: none}\n")
    assert (recipe.training.steps, recipe.training.batch_size, recipe.losses.adversarial) == (10, 8, 0.02)
    assert (recipe.styles.rank, recipe.styles.trained) == (16, "none")
    assert load(folder, PLAIN, "styles.error=0.1").styles.rank is None
    finetune = load(folder, PLAIN + "finetune: {synthesize: {prompts: prompts.txt}}\n").finetune
    assert (finetune.training.steps, finetune.training.batch_size, finetune.synthesize.count) == (300, 8, 1500)


def test_with_a_rank_of_0_a_recipe_that_names_nothing_else_has_the_papers_values(folder):
    recipe = load(folder, PLAIN.replace("training:\n  steps: 10\n", "styles: {rank: 0}\n"))
    assert (recipe.kind, recipe.start, recipe.size, recipe.seed) == ("unet", "base", None, 0)
    training = recipe.training
    assert (training.steps, training.batch_size, training.micro_batch_size) == (100_000, 320, 20)
    assert (training.learning_rate, training.style_learning_rate, training.caption_dropout) == (1e-5, None, 0.1)
    assert recipe.losses == Losses(feature=0.001, adversarial=0.01)
    assert (recipe.checkpoint.every, recipe.checkpoint.keep) == (2500, 3)


def test_size_may_be_buckets(folder):
    recipe = load(folder, PLAIN + "size: {buckets: 1024, step: 32}\n")
    assert (recipe.size, recipe.buckets.step, recipe.buckets.least) == (1024, 32, None)
    save_recipe(recipe, folder / "saved.yaml")
    assert load_recipe(folder / "saved.yaml") == recipe
    assert load(folder, PLAIN + "size: 512\n").buckets is None
    assert "frame says one size" in mistake(folder, PLAIN + "size: {buckets: 64}\nframe: {corner: [1, 1]}\n")
    assert "buckets.stepp: there is no such key; did you mean 'step'" in mistake(
        folder, PLAIN + "size: {buckets: 64, stepp: 8}\n"
    )
    painted = PLAIN.replace("{images: pictures}", "{synthesize: {prompts: prompts.txt}}")
    assert "size has buckets, which are for images" in mistake(folder, painted + "size: {buckets: 64}\n")


def test_a_short_run_shows_four_samples_and_a_long_one_many(folder):
    def interval(*overrides):
        return load(folder, PLAIN, *overrides).sample_interval

    assert interval() == 3  # of 10 steps
    assert interval("training.steps=1") == 1
    assert interval("training.steps=9000") == 2250
    assert interval("training.steps=100000") == 2500
    assert interval("logging.sample_every=7") == 7
    assert interval("logging.sample_every=null") is None
    assert interval("styles={rank: 4, train: none}") is None  # nothing changes that would be looked at
    for wrong in ("0", "often", "1.5"):
        assert "expected a number of steps, auto or null." in mistake(folder, PLAIN, f"logging.sample_every={wrong}")


def test_paths_come_out_absolute_and_hub_ids_as_they_are(folder, monkeypatch):
    recipe = load(folder, PLAIN + "start: owner/name.v1-5\n")
    assert recipe.base == str(folder.resolve() / "base")
    assert recipe.teachers[0].model == str(folder.resolve() / "models" / "noto")
    assert recipe.teachers[1].model is None
    assert recipe.teachers[1].lora == folder.resolve() / "ink.safetensors"
    assert recipe.data.images == folder.resolve() / "pictures"
    assert recipe.start == "owner/name.v1-5"
    # the same, from wherever it is read
    monkeypatch.chdir(folder / "models")
    assert load_recipe(Path("../merge.yaml")) == recipe


def test_a_link_is_not_followed_to_where_its_name_is_lost(folder):
    (folder / "blob").write_text("")
    (folder / "linked.safetensors").symlink_to("blob")
    recipe = load(folder, PLAIN, "teachers.1.lora=linked.safetensors")
    assert recipe.teachers[1].lora == folder.resolve() / "linked.safetensors"


def test_a_home_folder_is_found(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert load(folder, PLAIN, "base=~/models").base == str(folder.resolve() / "models")


@pytest.mark.parametrize("text", [PLAIN, PLAIN + "start: average\nlogging: {sample_every: null, trackers: [wandb]}\n"])
def test_a_saved_recipe_reloads_equal_from_elsewhere(folder, tmp_path_factory, text):
    recipe = load(folder, text, "training.max_grad_norm=null", "training.learning_rate=1e-5")
    assert recipe.training.max_grad_norm is None
    saved = tmp_path_factory.mktemp("elsewhere") / "recipe.yaml"
    save_recipe(recipe, saved)
    assert load_recipe(saved) == recipe
    save_recipe(recipe, saved)  # as a resumed run does
    assert load_recipe(saved) == recipe


def test_numbers_work_however_people_write_them(folder):
    text = PLAIN.replace("steps: 10", "steps: 1e5\n  learning_rate: 1e-5\n  batch_size: 1_000\n  weight_decay: 0")
    training = load(folder, text).training
    assert (training.steps, training.learning_rate, training.batch_size) == (100_000, 1e-5, 1000)
    assert type(training.steps) is int
    assert type(training.weight_decay) is float


def test_overrides_are_set_over_the_file_in_order(folder):
    recipe = load(
        folder,
        PLAIN,
        "training.steps=20",
        "training.steps=30",
        "teachers.1.lora_scale=0.5",
        "teachers.0={name: ö, model: noto.safetensors, config: base}",
        "losses.feature=1e-2",
        "data={synthesize: {prompts: prompts.txt, count: 4}}",
    )
    assert recipe.training.steps == 30
    assert recipe.teachers[0] == Teacher(
        name="ö", model=str(folder.resolve() / "noto.safetensors"), config=folder.resolve() / "base"
    )
    assert recipe.teachers[1].lora_scale == 0.5
    assert recipe.losses.feature == 0.01
    assert recipe.data == Data(synthesize=Synthesize(prompts=folder.resolve() / "prompts.txt", count=4))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.steps"], "--set 'training.steps': expected key=value, such as training.steps=10."),
        (["=3"], "--set '=3': expected key=value, such as training.steps=10."),
        (["training.steps=ten"], "--set training.steps: found 'ten', expected a whole number."),
        (["training.stpes=3"], "--set training.stpes: there is no such key; did you mean 'steps'."),
        (["trainin.steps=3"], "merge.yaml: trainin: there is no such key; did you mean 'training'."),
        (["training=3"], "--set training: found 3, expected keys and values."),
        (["training.steps.x=3"], "--set training.steps.x: 'x' is no key, since what is before it is 10."),
        (["teachers.2.name=a"], "--set teachers.2.name: found '2', expected a number from 0 to 1 as the list has it."),
        (["teachers.noto.lora=a"], "--set teachers.noto.lora: found 'noto', expected a number from 0 to 1 as the"),
        (["teachers.0={model: base}"], "--set teachers.0: teachers.0.name: this key is missing."),
        (["training.steps=[1"], "--set training.steps, line 1: this is not valid YAML:"),
        (["data.dataset=mnist"], "merge.yaml, line 6: data: found images and dataset, expected one of images,"),
        (["teachers.1.name=noto"], "merge.yaml, line 2: teachers: teachers 0 and 1 are both named 'noto'; rename one."),
        (["teachers.0.weight=0"], "--set teachers.0.weight: found 0, expected a number above 0."),
        (
            ["styles.rank=0", "training.batch_size=1"],
            "merge.yaml: training.batch_size is 1, expected at least 2: every teacher needs",
        ),
    ],
)
def test_mistakes_in_overrides(folder, overrides, message):
    assert mistake(folder, PLAIN, *overrides).startswith(message.removesuffix(".*"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # keys
        ("steps: 10", "batchsize: 3", "line 8: training.batchsize: there is no such key; did you mean 'batch_size'."),
        ("base: base", "bse: base", "line 1: bse: there is no such key; did you mean 'base'."),
        (
            "data: {images",
            "data: {qqq",
            "line 6: data.qqq: there is no such key; the keys are images, dataset,",
        ),
        ("base: base\n", "", "merge.yaml: base: this key is missing."),
        ("name: ink", "lora_scale: 1", "line 4: teachers.1.name: this key is missing."),
        ("  steps: 10", "  steps: 10\n  steps: 12", "line 9: the key 'steps' is there twice; remove one."),
        ("\n  steps: 10", "", "line 7: training: found nothing, expected keys and values."),
        ("{images: pictures}", "[images", "line 7: this is not valid YAML: "),
        # kinds of values
        ("steps: 10", "steps: '10'", "line 8: training.steps: found '10', expected a whole number."),
        ("steps: 10", "steps: 1.5", "line 8: training.steps: found 1.5, expected a whole number."),
        ("steps: 10", "steps: true", "line 8: training.steps: found true, expected a whole number."),
        ("steps: 10", "learning_rate: fast", "line 8: training.learning_rate: found 'fast', expected a number."),
        ("steps: 10", "learning_rate: .nan", "line 8: training.learning_rate: found nan, expected a finite number."),
        ("steps: 10", "compile: 1", "line 8: training.compile: found 1, expected true or false."),
        ("steps: 10", "compile: yes", "line 8: training.compile: found 'yes', expected true or false."),
        ("name: ink", "name: 12", "line 4: teachers.1.name: found 12, expected a text."),
        ("images: pictures", "images: 3", "line 6: data.images: found 3, expected a path."),
        ("images: pictures", "images: ''", "line 6: data.images: found '', expected a path."),
        ("base: base", "base: ''", "line 1: base: found '', expected a path."),
        ("{images: pictures}", "pictures", "line 6: data: found 'pictures', expected keys and values."),
        ("training:\n  steps: 10", "teachers2: 1", "line 7: teachers2: there is no such key; did you mean 'teachers'."),
        # ranges
        ("steps: 10", "steps: 0", "line 8: training.steps: found 0, expected a number at least 1."),
        (
            "steps: 10",
            "caption_dropout: 10",
            "line 8: training.caption_dropout: found 10, expected a number at least 0 and at most 1.",
        ),
        ("steps: 10", "ema_decay: 1", "line 8: training.ema_decay: found 1, expected a number above 0 and below 1."),
        ("steps: 10", f"batch_size: -{10**400}", f"line 8: training.batch_size: found -{10**400}, expected a number"),
        ("base: base", "base: base\nseed: -1", "line 2: seed: found -1, expected a number at least 0 and at most"),
        (
            "base: base",
            "base: base\nsize: 500",
            "line 2: size: found 500, expected a multiple of 8; 496 and 504 are near.",
        ),
        # choices
        ("steps: 10", "precision: bf61", "line 8: training.precision: found 'bf61', expected 'fp32', 'fp16' or 'bf16'"),
        (
            "base: base",
            "base: base\nkind: controlnet",
            "merge.yaml: teacher 'ink' is a ControlNet, which has a model and no more; found lora.",
        ),
        ("base: base", "base: base\nkind: unit", "line 2: kind: found 'unit', expected 'unet' or 'controlnet'; did"),
        (
            "base: base",
            "base: base\nlogging: {trackers: [tensorbord]}",
            "line 2: logging.trackers.0: found 'tensorbord', expected 'aim', 'clearml', 'comet_ml', 'dvclive', "
            "'mlflow', 'swanlab', 'tensorboard', 'trackio' or 'wandb'; did you mean 'tensorboard'.",
        ),
        # files
        (
            "model: models/noto",
            "model: models/nota",
            "line 3: teachers.0.model: there is no file or folder 'models/nota'",
        ),
        (
            "model: models/noto",
            "model: ./x/y",
            "line 3: teachers.0.model: there is no file or folder 'x/y'; check the path.",
        ),
        ("model: models/noto", "model: x.ckpt", "line 3: teachers.0.model: there is no file or folder 'x.ckpt';"),
        (
            "model: models/noto",
            "model: noto",
            "line 3: teachers.0.model: found 'noto', expected a path that exists or a hub id",
        ),
        ("base: base", f"base: {'x' * 300}/{'y' * 300}.ckpt", "line 1: base: there is no file or folder"),
        ("base: base", "base: ~nobody-of-that-name/x", "line 1: base: '~nobody-of-that-name/x' cannot be looked up: "),
        ("lora: ink.safetensors", "lora: a/b", "line 5: teachers.1.lora: there is no file or folder 'a/b'; check"),
        ("images: pictures", "images: prompts.txt", "line 6: data.images: 'prompts.txt' is a file, expected a folder."),
        (
            "images: pictures",
            "synthesize: {prompts: base}",
            "line 6: data.synthesize.prompts: 'base' is a folder, expected a file.",
        ),
        (
            "base: base",
            "base: base\nstart: avarage",
            "line 2: start: found 'avarage', expected a path that exists or a hub id such as 'owner/name'; did you "
            "mean 'average'.",
        ),
        # what goes together
        (
            "images: pictures",
            "synthesize: {prompts: prompts.txt, own: 0.6, student: 0.5}",
            "line 6: data.synthesize: own 0.6 and student 0.5 are shares of one whole; lower one.",
        ),
        ("name: noto", "name: ink", "line 2: teachers: teachers 0 and 1 are both named 'ink'; rename one."),
        ("    lora: ink.safetensors\n", "", "line 4: teachers.1: 'ink' has neither a model nor a lora; name at"),
        (
            "/noto}",
            "/noto, lora: ink.safetensors, loras: [{path: ink.safetensors}]}",
            "line 3: teachers.0: 'noto' has a lora and",
        ),
        ("/noto}", "/noto, loras: [{path: nowhere.safetensors}]}", "line 3: teachers.0.loras.0.path: there is no file"),
        ("/noto}", "/noto, lora_scale: 2}", "line 3: teachers.0: 'noto' has a lora_scale but no lora for it to"),
        ("/noto}", "/noto, config: base}", "line 3: teachers.0: 'noto' has a config, which only a model that is a"),
        ("{images: pictures}", "{}", "line 6: data: found nothing, expected one of images, dataset, synthesize."),
        (
            "steps: 10",
            "warmup_steps: 5\n  lr_schedule: constant",
            "line 7: training: warmup_steps is 5, but the lr_schedule 'constant' has no warm-up",
        ),
        (
            "steps: 10",
            "steps: 10\n  warmup_steps: 10\n  lr_schedule: linear",
            "line 7: training: warmup_steps is 10, expected fewer than the 10 steps.",
        ),
        (
            "base: base",
            "base: base\nlosses: {adversarial: -1}",
            "line 2: losses.adversarial: found -1, expected a number at least 0.",
        ),
    ],
)
def test_every_mistake_is_one_sentence(folder, old, new, message):
    assert PLAIN.count(old) == 1
    said = mistake(folder, PLAIN.replace(old, new))
    assert said.removeprefix("merge.yaml, ").startswith(message)


def test_a_student_without_styles_paints_in_none(folder):
    data = "{synthesize: {prompts: prompts.txt, student: 0.5}}"
    told = "data.synthesize.student is 0.5, but the student starts without the styles that it should paint in"
    for start in ("base", "average"):
        assert told in mistake(folder, PLAIN.replace("{images: pictures}", data) + f"start: {start}\n")
    earlier = "earlier: {model: models/noto}\n"
    assert told in mistake(folder, PLAIN.replace("{images: pictures}", data) + earlier)


def test_a_list_of_teachers_must_hold_one(folder):
    data = "data: {images: pictures}\n"
    assert "the list is empty" in mistake(folder, f"base: base\nteachers: []\n{data}")
    assert "found nothing, expected a list" in mistake(folder, f"base: base\nteachers:\n{data}")
    assert "teachers.0: found 'noto', expected keys" in mistake(folder, f"base: base\nteachers: [noto]\n{data}")


@pytest.mark.parametrize("name", ["noto", "noto-v", "v1.5", "my style", "a_b", "7", "мультик", "हिन्दी", "墨"])
def test_names_that_can_be_typed(name):
    assert Teacher(name=name, model="owner/name").name == name


@pytest.mark.parametrize(
    "name", ["", " ", "a=b", "a,b", "a;b", "a:b", "-a", ".a", "a ", " a", "a/b", "a\nb", "a\tb", "all"]
)
def test_names_that_the_command_line_would_take_apart(name):
    with pytest.raises(ValueError, match=r"expected a name of letters|every style"):
        Teacher(name=name, model="owner/name")


def test_parts_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Training().steps = 3


def test_trackers_are_those_of_accelerate():
    from accelerate.utils import LoggerType

    trackers = typing.get_args(Logging.model_fields["trackers"].annotation)[0]
    assert sorted(typing.get_args(trackers)) == sorted(kind.value for kind in LoggerType if kind.value != "all")


def test_schedules_are_those_of_diffusers():
    from diffusers.optimization import SchedulerType

    schedules = typing.get_args(Training.model_fields["lr_schedule"].annotation)
    # piecewise_constant wants rules of its own
    assert {*schedules, "piecewise_constant"} == {kind.value for kind in SchedulerType}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_parses(path):
    assert load_recipe(path).teachers


def test_the_papers_recipe_is_what_the_defaults_are():
    recipe = load_recipe(RECIPES / "paper.yaml")
    assert recipe == Recipe(
        base=recipe.base, teachers=recipe.teachers, data=recipe.data, size=512, styles=Styles(rank=0)
    )


def test_nothing_heavy_is_imported():
    code = (
        "import sys, dmm.recipes.recipe; sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
