from dmm.cli.layout import lay_out, lay_out_pairs
from dmm.pipeline.style_schedule import StyleSchedule


def test_prompts_and_seeds_go_down_where_styles_go_across():
    styles = [{"ink": 1.0}, {"ink": 0.5, "clay": 0.5}]
    assert lay_out(["a", "b"], [1], styles).row_labels == ["a", "b"]
    assert lay_out(["a"], [1, 2], styles).row_labels == ["seed 1", "seed 2"]
    layout = lay_out(["a", "b"], [1, 2], styles)
    assert layout.row_labels == ["a, seed 1", "a, seed 2", "b, seed 1", "b, seed 2"]
    assert layout.column_labels == ["ink", "ink 0.5\nclay 0.5"]
    assert (layout.num_rows, layout.num_columns, layout.cells) == (4, 2, list(range(8)))
    assert lay_out_pairs(["a", "b"]).cells == [0, 1, 1, 2]


def test_labels_are_for_people():
    over_time = StyleSchedule([(0, 0.4, {"ink": 1.0}), (0.4, 1, {"ink": 0.5, "clay": 0.5})])
    third = {"ink": 1 / 3, "clay": 2 / 3}
    assert lay_out(["a"], [1], [third, over_time]).column_labels == [
        "ink 0.333\nclay 0.667",
        "0-0.4: ink\n0.4-1: ink=0.5\nclay=0.5",
    ]
