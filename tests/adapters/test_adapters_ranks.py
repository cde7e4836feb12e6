"""Adapters over several processes, see tests/support/rank_adapters.py."""

from importlib.util import find_spec


def test_a_given_scale_has_the_gradient_of_one_process(over_ranks):
    for errors in over_ranks(2, "open_clip"):
        assert errors.keys() == {"ours", *(["theirs"] if find_spec("open_clip") else [])}
        for name, found in errors.items():
            assert max(found) < 1e-5, name


def test_the_world_is_that_of_the_group(over_ranks):
    for message in over_ranks(2, "a world of another size"):
        assert "world_size must be 2, as in the process group, got 3" in message


def test_a_scale_is_given_on_all_ranks_or_on_none(over_ranks):
    for message in over_ranks(2, "a scale on one rank"):
        assert "logit_scale given must be the same on all ranks" in message


def test_unlike_scales_are_named(over_ranks):
    for message in over_ranks(2, "open_clip, unlike scales"):
        assert "log_scale must be the same on all ranks" in message
