import pytest

from dmm.maths.buckets import bucket_sizes, nearest_bucket

USUAL = {"step": 64, "least": 512, "most": 2048}


def test_all_are_of_about_one_area_in_both_directions():
    sizes = bucket_sizes(1024, **USUAL)
    assert (1024, 1024) in sizes
    assert {(832, 1216), (1216, 832), (896, 1152), (640, 1600)} <= set(sizes)
    assert all((height, width) in sizes for width, height in sizes)
    assert all(width % 64 == height % 64 == 0 for width, height in sizes)
    assert all(0.9 * 1024**2 < width * height <= 1024**2 for width, height in sizes)
    assert all(512 <= side <= 2048 for size in sizes for side in size)


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((3000, 3000), (1024, 1024)),
        ((1600, 2400), (832, 1216)),
        ((1920, 1080), (1344, 768)),
        ((9000, 900), (2048, 512)),
    ],
)
def test_a_picture_goes_where_it_keeps_the_most(size, bucket):
    assert nearest_bucket(size, bucket_sizes(1024, **USUAL)) == bucket
