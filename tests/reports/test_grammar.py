import pytest

from medalign_jax.reports.grammar import Literal, Shuffle, distinct, fill


def test_alternatives_nest_and_may_be_empty():
    texts = set(fill("a(b|c(d|))e").expand({}))
    assert texts == {"abe", "acde", "ace"}


def test_slots_are_filled_and_marks_in_values_mean_nothing():
    assert list(fill("<{x}>", x="(1|2) {y}").expand({})) == ["<(1|2) {y}>"]


def test_shuffle_gives_every_order_once():
    node = Shuffle(tuple(map(Literal, "abc")))
    assert sorted(node.expand({})) == sorted(
        ["a, b and c", "a, c and b", "b, a and c", "b, c and a", "c, a and b", "c, b and a"]
    )


def test_distinct_finds_all_that_exist_and_no_more():
    node = fill("(a|b|c|d)(1|2|3)")
    assert len(distinct(node, 12, 0)) == len(distinct(node, 100, 0)) == 12
    assert distinct(node, 5, 1) == distinct(node, 5, 1) != distinct(node, 5, 2)


def test_distinct_does_not_walk_through_a_huge_space():
    node = fill("(a|b|c|d)" * 200)
    assert len(distinct(node, 50, 0)) == 50


@pytest.mark.parametrize("template", ["a(b", "a)b", "a{b", "{b c}"])
def test_a_broken_template_is_an_error(template):
    with pytest.raises(ValueError, match="template with"):
        fill(template)
