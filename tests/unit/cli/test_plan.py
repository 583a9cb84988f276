"""`ckptsvc plan`: the formulas, and what is said of them."""

import json
import math
import random

import pytest
from harness.stored import cli

from ckptsvc.cli.plan import count, decimal, rate, seconds
from ckptsvc.cli.plan_examples import EXAMPLES, LLAMA
from ckptsvc.cli.plan_model import Job, daly, doubts, memory, plans, useful_share
from ckptsvc.errors import ConfigError
from ckptsvc.interop.naming.shapes import MODELS


def job(**changes):
    given = {"nbytes": 14e12, "ranks": 6144, "nodes": 512, "copy": 10e9, "store": 650e9, "read": 650e9,
        "mtbf": 10800.0, "restart": 60.0, "soft": 0.7}  # fmt: skip
    return Job(**(given | changes))


@pytest.mark.parametrize(("cost", "mtbf"), [(1.0, 10800.0), (30.0, 3600.0), (300.0, 86400.0)])
def test_the_interval_is_the_best_there_is(cost, mtbf):
    best = daly(cost, mtbf)
    assert best == pytest.approx(math.sqrt(2 * cost * mtbf), rel=0.1), "Young's, nearly"
    at = useful_share(best, cost, 60.0, mtbf)
    assert all(useful_share(factor * best, cost, 60.0, mtbf) <= at + 1e-6 for factor in (0.5, 0.8, 1.25, 2.0))


def test_beyond_the_formula_the_interval_is_the_time_between_failures():
    assert daly(100.0, 50.0) == 50.0
    assert daly(20.0, 5.0) == 5.0


def test_the_useful_time_is_what_a_simulation_finds():
    interval, cost, down, mtbf = 300.0, 20.0, 100.0, 3600.0
    rng, now, done = random.Random(4), 0.0, 0.0
    failure = rng.expovariate(1 / mtbf)
    while done < 20_000:
        if now + interval + cost <= failure:
            now, done = now + interval + cost, done + 1
            continue
        now = failure
        while True:  # a failure may strike again while the job is restarted
            failure = now + rng.expovariate(1 / mtbf)
            if failure >= now + down:
                break
            now = failure
        now += down
    assert done * interval / now == pytest.approx(useful_share(interval, cost, down, mtbf), rel=0.01)


def test_no_interval_is_shorter_than_a_save_takes():
    (first, *_) = found = plans(job(store=20e9))
    assert first.limited
    assert first.interval == job(store=20e9).to_store
    (said,) = [each for each in doubts(job(store=20e9), found) if "limit" in each]
    needed = float(said.rpartition("; ")[2].split()[0].replace(",", "")) * 1e9
    assert plans(job(store=1.05 * needed))[0].interval == pytest.approx(first.best, rel=0.1)


def test_memory_and_disks_help_and_none_is_said_to_be_there_that_is_not():
    store, memory = plans(job())
    assert (store.name, memory.name) == ("store", "store + memory")
    assert memory.useful > store.useful
    assert [each.name for each in plans(job(local=5e9))] == ["store", "store + memory", "disk + memory"]
    assert plans(job(soft=0.0))[0].useful == plans(job(soft=0.0))[1].useful


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"mtbf": 0.1}, "does not hold"),
        ({"mtbf": 1.0}, "rough"),
        ({"mtbf": 20.0}, "never completed"),
        ({"restart": 9000.0}, "restarting"),
        ({"store": 10e9}, "the store is the limit"),
    ],
)
def test_where_the_formula_does_not_hold_it_is_said(changes, word):
    found = plans(job(**changes))
    assert any(word in each for each in doubts(job(**changes), found))
    assert all(0 <= plan.useful <= 1 and math.isfinite(plan.interval) for plan in found)
    assert doubts(job(), plans(job())) == []


@pytest.mark.parametrize("name", ["8b", "405b"])
def test_parameters_are_those_of_the_tensors(name):
    shapes, config = MODELS[f"llama3-{name}"]
    assert LLAMA[name].params == sum(math.prod(shape) for _, shape in shapes(config))


def test_the_issue_s_own_example():
    status, out, err = cli("plan", "--params", "1e12", "--ranks", 6144, "--store-bandwidth", "650GB/s", "--mtbf", "3h")
    assert (status, err) == (0, "")
    assert "14.0 TB" in out
    assert "durable      after 22 s, at 650.0 GB/s in all" in out
    assert "save.every =" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_has_a_plan(name):
    status, out, _ = cli(
        "plan", "--example", name, "--store-bandwidth", "100GB/s", "--local-bandwidth", "5GB/s", "--json"
    )
    assert status == 0
    document = json.loads(out)
    assert document["bytes"] == pytest.approx(EXAMPLES[name].params * EXAMPLES[name].state)
    assert document["nodes"] == EXAMPLES[name].nodes
    assert len(document["plans"]) == 3
    assert name in cli("plan", "--examples").out
    assert name in json.loads(cli("plan", "--examples", "--json").out)["examples"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_says_what_the_store_must_take_where_it_names_none(name):
    status, out, err = cli("plan", "--example", name)
    assert (status, err) == (0, "")
    document = json.loads(cli("plan", "--example", name, "--json").out)
    assert document["assumed"] == (EXAMPLES[name].store == 0) == ("--store-bandwidth" in out)
    assert document["store_bandwidth"] == (EXAMPLES[name].store or document["store_bandwidth"])
    assert not document["plans"][0]["limited"]
    if document["assumed"]:
        less = f"{document['store_bandwidth'] * 0.9:.0f}B/s"
        found = json.loads(cli("plan", "--example", name, "--store-bandwidth", less, "--json").out)
        assert found["plans"][0]["limited"], "and not more"


def test_what_other_nodes_keep_takes_memory():
    found = memory(job(nbytes=32e12, nodes=16), 2, 4)
    assert found == pytest.approx({"snapshots": 4e12, "copy": 2e12, "xor": 2e12 / 3, "rs": 2e12})
    assert memory(job(nodes=2), 2, 4).keys() == {"snapshots", "copy"}
    assert memory(job(nodes=1), 2, 4).keys() == {"snapshots"}
    out = cli("plan", "--params", "2B", "--ranks", 16, "--store-bandwidth", "1GB/s").out
    assert "memory       28.0 GB a node\nof partners  14.0 GB (copy) more" in out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "--params"),
        (["--params", "1e12"], "--ranks"),
        (["--params", "1e12", "--ranks", "8", "--mtbf", "1min"], "--store-bandwidth"),
        (["--params", "many", "--ranks", "8", "--store-bandwidth", "1GB/s"], "'many'"),
        (["--params", "1B", "--ranks", "8", "--store-bandwidth", "fast"], "'fast'"),
        (["--params", "1B", "--ranks", "8", "--store-bandwidth", "0"], "'0'"),
        (["--example", "llama3-1t", "--mtbf", "0"], "is 0"),
        (["--example", "llama3-1t", "--mtbf", "3h", "--node-mtbf", "1d"], "twice"),
    ],
)
def test_what_is_missing_or_wrong_is_said(arguments, word):
    status, _, err = cli("plan", *arguments)
    assert status == 2
    assert word in err


def test_numbers_as_people_write_them():
    assert [count(text) for text in ("1e12", "405B", "1.5T", "7 b", "1e+9", "12")] == [
        1e12,
        405e9,
        1.5e12,
        7e9,
        1e9,
        12,
    ]
    assert [rate(text) for text in ("650GB/s", "2GiB/s", "1.4 TB")] == [650e9, 2**31, 1.4e12]
    with pytest.raises(ConfigError):
        count("1e99")
    assert [decimal(n) for n in (12, 1.5e9, 17e12, 2e15)] == ["12 B", "1.5 GB", "17.0 TB", "2.0 PB"]
    assert [seconds(s) for s in (0.234, 5, 70, 300, 10_800, 5e5)] == [
        "0.23 s", "5.0 s", "70 s", "5.0 min", "3.0 h", "5.8 d",
    ]  # fmt: skip
