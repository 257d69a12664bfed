from dmm.cli.layout import lay_out, lay_out_pairs


def test_prompts_and_seeds_go_down_where_styles_go_across():
    styles = [{"ink": 1.0}, {"ink": 0.5, "clay": 0.5}]
    assert lay_out(["a", "b"], [1], styles).row_labels == ["a", "b"]
    assert lay_out(["a"], [1, 2], styles).row_labels == ["seed 1", "seed 2"]
    layout = lay_out(["a", "b"], [1, 2], styles)
    assert layout.row_labels == ["a, seed 1", "a, seed 2", "b, seed 1", "b, seed 2"]
    assert layout.column_labels == ["ink", "ink=0.5, clay=0.5"]
    assert (layout.num_rows, layout.num_columns, layout.cells) == (4, 2, list(range(8)))
    assert lay_out_pairs(["a", "b"]).cells == [0, 1, 1, 2]
