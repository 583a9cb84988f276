import pytest

from ckptsvc.control.nodes import Node, choose, too_slow


def nodes(*names, **wanted):
    return [Node(name, wanted.get(name, -1), arrival, "", 1) for arrival, name in enumerate(names)]


def chosen(found, least, most, bad="", places=None):
    return "".join(n.name for n in choose(found, least, most, lambda name: name in bad, places or {}))


def test_they_come_in_the_order_of_arrival():
    assert chosen(nodes("b", "a", "c"), 2, 2) == "ba"


def test_or_in_the_order_their_user_gave():
    assert chosen(nodes("a", "b", "c", a=2, b=0, c=1), 2, 3) == "bca"


def test_there_may_be_too_few():
    assert chosen(nodes("a"), 2, 3) == "a"


def test_those_of_the_last_attempt_keep_their_places():
    assert chosen(nodes("a", "b", "c"), 2, 3, places={"c": 0, "b": 1, "a": 2}) == "cba"


@pytest.mark.parametrize(("lost", "order"), [("a", "xbc"), ("b", "axc"), ("c", "abx"), ("", "abc")])
def test_a_spare_takes_the_place_of_the_lost_one(lost, order):
    found = [n for n in nodes("a", "b", "c", "x") if n.name != lost]
    assert chosen(found, 3, 3, places={"a": 0, "b": 1, "c": 2}) == order


def test_without_a_spare_the_others_move_up():
    assert chosen(nodes("a", "c"), 2, 3, places={"a": 0, "b": 4, "c": 8}) == "ac"


def test_more_nodes_than_before_come_behind():
    assert chosen(nodes("x", "a", "b", "y"), 2, 4, places={"a": 0, "b": 1}) == "abxy"


def test_an_excluded_node_is_not_taken_while_there_are_enough():
    assert chosen(nodes("a", "b", "c"), 2, 3, bad="a") == "bc"
    assert chosen(nodes("a", "b", "c"), 3, 3, bad="a") == "bca"


def test_nor_if_it_ran_the_last_attempt():
    assert chosen(nodes("a", "b", "c"), 2, 2, bad="a", places={"a": 0, "b": 1}) == "cb"


def test_of_too_many_excluded_nodes_as_many_are_taken_as_are_needed():
    assert chosen(nodes("a", "b", "c", "d"), 3, 4, bad="abc") == "dab"


class TestBandwidth:
    def judge(self, own, *others):
        found = [Node(str(number), -1, number, "", 1, bandwidth=rate) for number, rate in enumerate((own, *others))]
        return too_slow(found).get("0", "")

    def test_ten_times_slower_than_the_median_is_too_slow(self):
        said = "network: 9.9 MB/s between it and the coordinator's node, where the median of 3 others is 100.0 MB/s"
        assert self.judge(9.9e6, 1e6, 100e6, 900e6) == said
        assert self.judge(10e6, 1e6, 100e6, 900e6) == ""

    @pytest.mark.parametrize("others", [(), (100e6,), (100e6, 0.0)])
    def test_nobody_can_say_which_of_two_is_slow(self, others):
        assert self.judge(1.0, *others) == ""

    def test_what_was_not_measured_is_not_judged(self):
        assert self.judge(0.0, 100e6, 100e6) == ""
