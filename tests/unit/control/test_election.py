"""What an agent believes about who coordinates: its own tenure, others', orders of old terms; all of it simulated."""

import random
from dataclasses import dataclass, field

import pytest

from ckptsvc.control.election import MARGIN, Campaign, Election, Follow, Holder, Lead, Resign

TTL = 3.0


def holder(term, mark="other", node="b"):
    return Holder(term, node, "127.0.0.1:1", mark, lease=1000 + term)


def leading(term=5, now=0.0):
    election = Election("job", "me")
    assert election.won(holder(term, "me", "a"), TTL, now, now).steps == [Lead(term)]
    return election


# ---- following


def test_without_a_coordinator_an_agent_stands_for_election():
    assert Election("job", "me").seen(None, 0).steps == [Campaign()]


def test_a_coordinator_is_followed_once():
    election = Election("job", "me")
    verdict = election.seen(holder(7), 0)
    assert verdict.steps == [Follow(holder(7))]
    assert verdict.reasons == ["job job: b coordinates, term 7"]
    assert election.seen(holder(7), 1).steps == ()
    assert election.seen(holder(9), 2).steps == [Follow(holder(9))]


def test_orders_of_older_terms_are_refused_and_counted():
    election = Election("job", "me")
    assert election.admits(0)
    election.seen(holder(7), 0)
    assert election.admits(7)
    assert not election.admits(6)
    assert not election.admits(0)
    election.seen(None, 1)  # gone, and still nobody older may speak
    assert not election.admits(6)
    assert election.refused == 3


def test_terms_begin_anew_where_etcd_was_emptied():
    election = Election("job", "me")
    election.seen(holder(700), 0)
    assert "terms begin anew" in election.seen(holder(2), 1).reasons[-1]
    assert election.admits(2)


def test_a_key_of_ours_that_we_do_not_know_of_is_given_up():
    election = Election("job", "me")
    assert election.seen(holder(7, "me", "a"), 0).steps == [Resign(1007)]
    assert not election.may_act(7, 0)


# ---- leading


def test_a_coordinator_decides_until_a_margin_before_its_lease_ends():
    election = leading(now=10.0)
    end = 10.0 + TTL * (1 - MARGIN)
    assert election.may_act(5, end - 0.001)
    assert not election.may_act(5, end)
    assert not election.may_act(4, 10.0)


def test_the_time_counts_from_when_the_renewal_was_sent_not_from_its_answer():
    election = leading()
    election.renewed(1005, TTL, asked_at=1.0, now=2.0)
    assert election.may_act(5, 1.0 + TTL * (1 - MARGIN) - 0.001)
    assert not election.may_act(5, 1.0 + TTL * (1 - MARGIN))


def test_an_answer_that_comes_too_late_does_not_bring_the_tenure_back():
    election = leading()
    verdict = election.renewed(1005, TTL, asked_at=1.0, now=50.0)
    assert verdict.steps == [Resign(1005)]
    assert not election.may_act(5, 1.1)
    assert election.renewed(1005, TTL, asked_at=51.0, now=51.1).steps == ()


def test_an_answer_that_was_overtaken_does_not_shorten_the_tenure():
    election = leading()
    election.renewed(1005, TTL, asked_at=2.0, now=2.1)
    election.renewed(1005, TTL, asked_at=1.0, now=2.2)
    assert election.may_act(5, 4.0)


@pytest.mark.parametrize(
    ("end", "why"),
    [
        (lambda e: e.renewed(1005, 0, 1, 1), "its lease has ended"),
        (lambda e: e.tick(TTL), "was not renewed in time"),
        (lambda e: e.seen(None, 1), "its key is gone"),
        (lambda e: e.seen(holder(8), 1), "b holds term 8"),
        (lambda e: e.seen(holder(8, "me", "a"), 1), "a holds term 8"),
    ],
)
def test_a_tenure_ends_once_with_a_reason(end, why):
    election = leading()
    verdict = end(election)
    assert verdict.steps[0] == Resign(1005)
    assert why in verdict.reasons[0]
    assert not election.may_act(5, 1)
    assert election.tick(100).steps == ()


def test_to_see_oneself_in_office_changes_nothing():
    election = leading()
    assert election.seen(holder(5, "me", "a"), 1).steps == ()
    assert election.may_act(5, 1)


def test_who_hears_too_late_that_it_has_won_does_not_begin():
    election = Election("job", "me")
    assert election.won(holder(5, "me"), TTL, asked_at=0.0, now=TTL).steps == [Resign(1005)]
    assert not election.may_act(5, 0.1)


# ---- simulated: clocks that run at other rates, calls that take long or are lost, agents that freeze


@dataclass
class Cluster:
    """etcd: one key, and leases that end when its own clock says so."""

    revision: int = 10
    key: Holder | None = None
    leases: dict[int, float] = field(default_factory=dict)  # -> end

    def expire(self, now):
        self.leases = {lease: end for lease, end in self.leases.items() if now < end}
        if self.key and self.key.lease not in self.leases:
            self.key, self.revision = None, self.revision + 1

    def handle(self, call, now):
        kind, sender, value = call
        if kind == "get":
            return self.key
        if kind == "grant":
            lease = 1 + max([*self.leases, self.revision * 100])
            self.leases[lease] = now + TTL
            if self.key is not None:
                return None
            self.revision += 1
            self.key = Holder(self.revision, sender, "127.0.0.1:1", sender, lease)
            return self.key
        if kind == "revoke":
            return self.leases.pop(value, None)
        if value in self.leases:
            self.leases[value] = now + TTL
            return TTL
        return 0


@dataclass
class Agent:
    """One agent: its clock, what it waits for, and what is on its way to it."""

    name: str
    rate: float
    offset: float
    election: Election = field(init=False)
    frozen_until: float = 0.0
    cut_until: float = 0.0
    next_at: float = 0.0
    inbox: list = field(default_factory=list)  # (arrives, call, asked_at, answer)
    looked_at: float = 0.0  # when it sent the look (or campaign) whose answer it waits for; it gives up older ones

    def __post_init__(self):
        self.election = Election("job", self.name)

    def clock(self, now):
        return self.offset + now * self.rate


class World:
    """Agents and etcd; a step is 50 ms."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.now, self.etcd, self.calls = 0.0, Cluster(), []
        self.agents = [Agent(n, self.random.uniform(0.99, 1.01), self.random.uniform(0, 1e5)) for n in "abcd"]
        self.terms, self.took_over, self.quiet = set(), 0, False

    def ask(self, agent, kind, value=0):
        lost = self.now < agent.cut_until or self.chance(0.05)
        if kind in ("get", "grant"):
            agent.looked_at = agent.clock(self.now)
        if not lost:
            delay = self.delay(0.001, 0.01, 0.2, self.random.uniform(0, 4))
            self.calls.append((self.now + delay, agent, (kind, agent.name, value), agent.clock(self.now)))

    def chance(self, share):
        return not self.quiet and self.random.random() < share

    def delay(self, *seconds):
        return seconds[0] if self.quiet else self.random.choice(seconds)

    def act(self, agent, verdict):
        for step in verdict.steps:
            if isinstance(step, Campaign):
                self.ask(agent, "grant")
            elif isinstance(step, Resign):
                self.ask(agent, "revoke", step.lease)
            elif isinstance(step, Lead):
                self.took_over += 1

    def step(self):
        self.now += 0.05
        self.etcd.expire(self.now)
        for call in [c for c in self.calls if c[0] <= self.now]:
            self.calls.remove(call)
            _, agent, what, asked_at = call
            answer = self.etcd.handle(what, self.now)
            if self.now >= agent.cut_until:
                agent.inbox.append((self.now + self.delay(0.001, 0.1, 3), what, asked_at, answer))
        for agent in self.agents:
            self.run(agent)
        deciding = [a for a in self.agents if a.election.tenure and self.may(a)]
        assert len(deciding) <= 1, f"at {self.now:.2f}: {[a.name for a in deciding]} both decide"
        for agent in deciding:
            term = agent.election.tenure.term
            assert term == max(self.terms | {term}), "an older term decides after a newer one"
            self.terms.add(term)

    def may(self, agent):
        """A frozen agent decides nothing; but one that wakes decides with what it knew, so that counts at any time."""
        return agent.election.may_act(agent.election.tenure.term, agent.clock(self.now))

    def run(self, agent):
        if self.chance(0.002):
            agent.frozen_until = self.now + self.random.uniform(0, 10)
        if self.chance(0.002):
            agent.cut_until = self.now + self.random.uniform(0, 10)
        if self.now < agent.frozen_until:
            return
        clock, election = agent.clock(self.now), agent.election
        for message in [m for m in agent.inbox if m[0] <= self.now]:
            agent.inbox.remove(message)
            _, (kind, _, value), asked_at, answer = message
            if kind in ("get", "grant") and asked_at != agent.looked_at:
                continue
            if kind == "get":
                self.act(agent, election.seen(answer, clock))
            elif kind == "grant" and answer is not None:
                self.act(agent, election.won(answer, TTL, asked_at, clock))
            elif kind == "renew":
                self.act(agent, election.renewed(value, answer, asked_at, clock))
        self.act(agent, election.tick(clock))
        if self.now >= agent.next_at:
            agent.next_at = self.now + 1.0
            self.ask(agent, "get")
            if election.tenure:
                self.ask(agent, "renew", election.tenure.lease)


@pytest.mark.parametrize("seed", range(20))
def test_two_live_terms_never_both_decide(seed):
    world = World(seed)
    for _ in range(6000):
        world.step()
    assert world.took_over >= 10, "hardly anything happened"
    # Once all is quiet there is a coordinator, and everybody believes in it.
    world.quiet = True
    for agent in world.agents:
        agent.frozen_until = agent.cut_until = 0.0
    for _ in range(400):
        world.step()
    assert {a.election.holder.term for a in world.agents} == {world.etcd.key.term}
    assert sum(1 for a in world.agents if a.election.tenure) == 1
