import pytest
import torch
from conftest import tiny_pipeline
from safetensors.torch import load_file

from dmm.cli import main
from dmm.formats.single_file import save_single_file


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """Three models and a recipe of two of them, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *_: tmp_path / "cache")
    for seed, name in enumerate("abc"):
        save_single_file(tiny_pipeline(seed), tmp_path / f"{name}.safetensors", dtype=torch.float16)
    (tmp_path / "recipe.yaml").write_text(
        "method: soup\nteachers:\n  - {name: ink, model: a.safetensors}\n  - {name: photo, model: b.safetensors}\n"
        "shards: {ink: drawings}\n"
    )
    return tmp_path


def test_making_telling_changing_and_making_again(shelf, capsys):
    assert main(["soup", "recipe.yaml", "--output", "soup.safetensors"]) == 0
    assert "Wrote soup.safetensors: soup of ink, photo" in capsys.readouterr().out
    assert main(["soup", "soup.safetensors"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("soup.safetensors: 2 models by the method soup (the uniform average)\n")
    assert "a.safetensors  trained on: drawings" in told
    change = ["--add", "clay=c.safetensors", "--remove", "photo", "--remove", "ink"]
    assert main(["soup", "soup.safetensors", *change[:4], "--output", "changed.safetensors"]) == 0
    assert main(["soup", "changed.safetensors", "--remove", "ink", "--output", "c2.safetensors"]) == 0
    one, other = load_file("c.safetensors"), load_file("c2.safetensors")
    assert all(one[name].equal(other[name]) for name in one)
    assert main(["soup", "soup.safetensors", "--output", "again.safetensors", "--threads", "1"]) == 0
    assert (shelf / "again.safetensors").read_bytes() == (shelf / "soup.safetensors").read_bytes()


def test_overrides_and_weights_of_additions(shelf):
    sets = ["--set", "method=weighted_sum", "--set", "weights.ink=3"]
    assert main(["soup", "recipe.yaml", "--output", "soup.safetensors", *sets]) == 0
    added = ["soup", "soup.safetensors", "--add", "clay=c.safetensors:4", "--output", "more.safetensors"]
    assert main(added) == 0
    a, b, c, more = (load_file(f"{name}.safetensors") for name in ("a", "b", "c", "more"))
    name = "model.diffusion_model.input_blocks.0.0.weight"
    expected = (3 * a[name].double() + b[name].double() + 4 * c[name].double()) / 8
    torch.testing.assert_close(more[name], expected.half())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe.yaml"], "Name the --output"),
        (["recipe.yaml", "--output", "a.safetensors"], "'a.safetensors' exists"),
        (["recipe.yaml", "--output", "s.safetensors", "--remove", "ink"], "change a soup"),
        (["a.safetensors"], "has no ledger"),
        (["a.safetensors", "--set", "method=ties"], "--set changes a recipe"),
        (["nothing.safetensors"], "no such file"),
        (["recipe.yaml", "--output", "s.safetensors", "--set", "method=tie"], "did you mean 'ties'"),
        (["recipe.yaml", "--output", "s.safetensors", "--set", "method=ties"], "name a base"),
        (
            ["recipe.yaml", "--output", "s.safetensors", "--set", "weights.inc=1"],
            "no teacher 'inc'; did you mean",
        ),
        (["recipe.yaml", "--output", "s.safetensors", "--threads", "0"], "--threads must be at least 1"),
        (["a.safetensors", "--add", "clay", "--output", "s.safetensors"], "is not NAME=MODEL"),
    ],
)
def test_mistakes_are_told_in_a_sentence_and_nothing_is_written(shelf, capsys, arguments, message):
    before = sorted(path.name for path in shelf.iterdir())
    assert main(["soup", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in shelf.iterdir()) == before


def test_a_soup_starts_a_merge(shelf, sd1_folder):
    """A file and a folder alike: `start:` checks and opens them."""
    from dmm.models.teachers import ModelSource, open_pipeline

    assert main(["soup", "recipe.yaml", "--output", "soup.safetensors"]) == 0
    assert main(["soup", "recipe.yaml", "--output", "soup", "--set", f"config={sd1_folder}"]) == 0
    file = open_pipeline(ModelSource("soup.safetensors", config=sd1_folder), name="start")
    folder = open_pipeline(ModelSource("soup"), name="start")
    for name, tensor in file.unet.state_dict().items():
        assert tensor.equal(folder.unet.state_dict()[name])
