"""What travels, from where and which way: each decision alone."""

from __future__ import annotations

import pytest

from launcher.delta import SMALL, Batch, batches, choose_source, choose_way, next_source, order

CHAIN = ("a", "b", "c", "d", "e")


def test_nodes_that_lack_the_same_are_sent_it_together_and_the_quick_ones_first() -> None:
    assert batches({"a": 0, "b": 7, "c": 0, "d": 3}) == (
        Batch(have=7, nodes=("b",)),
        Batch(have=3, nodes=("d",)),
        Batch(have=0, nodes=("a", "c")),
    )
    assert batches({}) == ()


@pytest.mark.parametrize(
    ("new", "compressed", "source"),
    [
        (1000, 1000, "save"),  # nobody has seen anything of it
        (1, 1, "push"),  # the other layers have been pushed before
        (250, 250, "push"),
        (251, 251, "save"),
        (125, 1000, "push"),  # they have been here, but were never pushed: once
        (126, 1000, "save"),
        (0, 0, "push"),
    ],
)
def test_a_push_is_for_what_is_little_and_a_save_for_what_is_much(new: int, compressed: int, source: str) -> None:
    assert choose_source(size=1000, new=new, compressed=compressed) == source


@pytest.mark.parametrize(
    ("size", "nodes", "way"),
    [
        (1, 100, "direct"),
        (SMALL, 1, "direct"),
        (SMALL + 1, 1, "relay"),  # kept on the node, so that a broken transfer goes on
        (SMALL // 4, 8, "relay"),
        (SMALL * 100, 0, "direct"),
    ],
)
def test_much_for_many_goes_from_node_to_node(size: int, nodes: int, way: str) -> None:
    assert choose_way(size, [f"gpu-{n}" for n in range(nodes)]) == way


def test_who_has_most_is_first_and_otherwise_the_order_stays() -> None:
    assert order({"a": 0, "b": 5, "c": 0, "d": 9, "e": 5}) == ("d", "b", "e", "a", "c")


@pytest.mark.parametrize(
    ("node", "able", "tried", "source"),
    [
        ("a", "bcde", "", None),  # the first is fed from here
        ("b", "abcde", "", "a"),
        ("d", "abcde", "", "c"),
        ("d", "abde", "", "b"),  # c is gone
        ("d", "abcde", "c", "b"),  # c has failed it
        ("d", "de", "", None),
        ("d", "abcde", "cb", None),  # two have failed it: something keeps it from its neighbours
        ("e", "ae", "d", "a"),
    ],
)
def test_a_node_takes_from_the_nearest_before_it_that_can_give(
    node: str, able: str, tried: str, source: str | None
) -> None:
    assert next_source(node, CHAIN, able=set(able), tried=set(tried)) == source
