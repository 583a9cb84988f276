"""A status document that is asked for again and again."""

from ckptsvc.agent.status.sparing import SHARE, Sparing


class World:
    """Making a document takes so much."""

    def __init__(self, takes: float) -> None:
        self.now = self.spent = 0.0
        self.made, self._takes = 0, takes
        self.sparing = Sparing(self._make, lambda: self.now, lambda: self.spent)

    def _make(self) -> bytes:
        self.made += 1
        self.spent += self._takes
        return str(self.made).encode()


def test_who_asks_now_and_then_gets_it_as_it_is() -> None:
    world = World(takes=0.001)
    assert [world.sparing.get() for _ in range(20)] == [str(n).encode() for n in range(1, 21)]


def test_a_flood_of_questions_takes_a_share_of_the_time_and_is_answered() -> None:
    world = World(takes=0.05)
    answers = []
    for number in range(10_000):
        world.now = number / 1000
        answers.append(world.sparing.get())
    assert 0 < world.spent <= 10 * (SHARE + 0.05)
    assert answers[-1] == str(world.made).encode()
    for number in range(1000, 10_000):  # none is of more than a second before
        assert int(answers[number]) > int(answers[number - 1000])
