"""What each user of a node may take."""

from hypothesis import given
from hypothesis import strategies as st

from ckptsvc.control.shares import Node, Share, share_of

SIZES = st.integers(0, 1 << 50)


def test_one_user_gets_what_one_may_and_several_an_even_part() -> None:
    node = Node(memory=100, user_memory=60, write_rate=90, jobs=4, ranks=8)
    assert share_of(node, 0) == share_of(node, 1) == Share(60, 90, 4, 8)
    assert share_of(node, 2) == Share(50, 45, 4, 8)
    assert share_of(node, 1000) == Share(0, 1, 4, 8)  # a rate of 0 would be no limit
    assert share_of(Node(100, 60, 0, 4, 8), 3).write_rate == 0
    assert [share_of(Node(100, 60, 0, 4, 8, local=90), users).local for users in (1, 2, 1000)] == [90, 45, 1]
    assert share_of(Node(100, 60, 0, 4, 8), 3).local == 0


@given(SIZES, SIZES, SIZES, st.integers(0, 5000))
def test_all_together_never_get_more_than_there_is(memory: int, most: int, rate: int, users: int) -> None:
    node = Node(memory, most, rate, 1, 1)
    share = share_of(node, users)
    assert share.memory <= most
    assert share.memory * max(users, 1) <= memory
    assert share.write_rate * users <= max(rate, users)
