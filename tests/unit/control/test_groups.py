from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from ckptsvc.control.groups import group

NODES = st.dictionaries(
    st.integers(0, 200).map("n{}".format), st.sampled_from(["", "a", "b", "c", "d"]), min_size=1, max_size=40
)


def rack(*sizes):
    """Domains of so many nodes."""
    return {f"{chr(97 + d)}{i}": chr(97 + d) for d, size in enumerate(sizes) for i in range(size)}


def shared(groups, domains):
    """The most nodes of one known domain in one group."""
    return max(max(Counter(d for n in g if (d := domains[n])).values(), default=1) for g in groups)


def test_a_pair_is_of_two_racks():
    groups = group(rack(3, 3), 2)
    assert len(groups) == 3
    assert all({node[0] for node in members} == {"a", "b"} for members in groups)


def test_nodes_that_are_left_over_are_dealt_out():
    assert sorted(map(len, group(rack(9), 4))) == [4, 5]
    assert sorted(map(len, group(rack(3), 4))) == [3]
    assert group({}, 4) == []


def test_a_spare_takes_the_place_of_a_lost_node_and_all_others_stay():
    before = group(rack(4, 4), 2)
    after = {node: domain for node, domain in rack(4, 4).items() if node != "a2"} | {"z": "a"}
    groups = group(after, 2, before)
    assert sum(one == other for one, other in zip(before, groups, strict=True)) == 3
    assert sorted(n for g in groups for n in g) == sorted(after)


def test_a_spare_that_would_put_two_of_a_rack_together_is_no_reason_to_leave_things_as_they_were():
    before = group(rack(2, 2), 2)
    after = {"a0": "a", "b0": "b", "b1": "b", "z": "b"}
    assert shared(group(after, 2, before), after) == 2  # it cannot be had better
    after = {"a0": "a", "b0": "b", "b1": "b", "z": "a"}
    assert shared(group(after, 2, [["a0", "a1"], ["b0", "b1"]]), after) == 1


@given(NODES, st.integers(2, 9))
def test_every_node_is_in_one_group_and_domains_are_apart_as_far_as_they_can_be(domains, size):
    groups = group(domains, size)
    assert sorted(node for members in groups for node in members) == sorted(domains)
    assert all(len(members) >= min(size, len(domains)) for members in groups)
    largest = max(Counter(d for d in domains.values() if d).values(), default=1)
    assert shared(groups, domains) <= -(-largest // len(groups))
    assert groups == group(dict(sorted(domains.items(), reverse=True)), size)


@given(NODES, NODES, st.integers(2, 5))
def test_whatever_was_before_all_that_are_there_are_in_one_group(domains, others, size):
    groups = group(domains, size, group(others, size))
    assert sorted(node for members in groups for node in members) == sorted(domains)
    assert all(len(members) >= min(size, len(domains)) for members in groups)
