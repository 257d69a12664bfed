"""Which pictures: every seed a function of style, prompt and batch, whatever else is asked for."""

from dmm.data.rows import Place
from dmm.evaluation.painting import share_of


def test_more_pictures_and_more_prompts_change_no_seed():
    one = share_of(["cat", "dog"], 4, "ink", "reference", 0)
    assert list(one.prompts) == ["cat", "dog", "cat", "dog"]
    assert len(set(one.seeds)) == 4
    longer = share_of(["cat", "dog"], 100, "ink", "reference", 0)
    assert list(longer.seeds[:4]) == list(one.seeds)
    with_another = share_of(["cat", "dog", "fox"], 6, "ink", "reference", 0)
    assert [with_another.seeds[i] for i in (0, 1, 3, 4)] == list(one.seeds)


def test_batches_styles_and_seeds_share_no_noise():
    asked = [("ink", "reference", 0), ("photo", "reference", 0), ("ink", "second", 0), ("ink", "reference", 1)]
    seeds = [seed for how in asked for seed in share_of(["cat"], 50, *how).seeds]
    assert len(set(seeds)) == 200


def test_processes_see_to_all_rows_between_them():
    for count in (1, 2, 3, 8):
        for rows in (1, 64, 130, 1000):
            assert sum(Place(index, count).rows(rows) for index in range(count)) == rows
