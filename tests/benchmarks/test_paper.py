"""What the benchmark beside the paper's own way asks of `dmm merge`, and how it reads what came of it."""

import importlib.util
from pathlib import Path

import pytest

from dmm.demo import story
from dmm.recipes.recipe import load_recipe

PATH = Path(__file__).parents[2] / "benchmarks" / "paper.py"
CURVE = [(40, 0.9), (80, 0.5), (120, 0.6), (160, 0.1)]


@pytest.fixture(scope="module")
def paper():
    spec = importlib.util.spec_from_file_location("paper_benchmark", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_way_is_a_recipe_and_the_papers_is_the_papers(paper, tmp_path):
    found = {}
    for name, way in paper.ways(24_000).items():
        recipe = story.write_recipe(tmp_path / name, way.method)
        found[name] = load_recipe(recipe, [f"{key}={value}" for key, value in way.changes.items()])
    for rate in paper.RATES:
        of_paper = found[f"paper-{rate:g}"]
        assert (of_paper.start, of_paper.styles.rank, of_paper.losses.feature) == ("base", 0, 0.001)
        assert (of_paper.training.learning_rate, of_paper.training.lr_schedule) == (rate, "constant")
        assert of_paper.training.steps * of_paper.training.batch_size == 24_000
    assert found["rank-0"].training.steps == 600
    assert found["adapters-untrained"].styles.train == "none"


@pytest.mark.parametrize(("error", "samples"), [(0.9, 40), (0.7, 60), (0.5, 80), (0.35, 140), (0.05, None)])
def test_a_curve_comes_down_to_an_error_between_its_points(paper, error, samples):
    assert paper.reached(CURVE, error) == (None if samples is None else pytest.approx(samples))


def test_the_best_of_the_papers_is_what_others_are_measured_by(paper):
    ended = paper.Ended
    found = {
        "paper-0.1": ended(200, 10.0, 0.6, [(100, 0.9), (200, 0.6)]),
        "paper-0.2": ended(200, 10.0, 0.5, [(100, 0.8), (200, 0.5)]),
        "rank-0": ended(160, 10.0, 0.1, CURVE),
        "adapters": ended(0, 5.0, 0.2, []),
    }
    lines = paper.table(found).splitlines()
    assert "at their best, paper-0.2, end at a score error of 0.500" in lines[0]
    assert lines[-3].endswith("| 200 samples | 1.00 |")
    assert lines[-2].endswith("| 80 samples | 0.40 |")
    assert lines[-1].endswith("| 0 samples | 0.00 |")
    assert lines[-4].endswith("| never |  |")
