"""What settings follow from what was measured."""

import pytest

from ckptsvc.cli.store_probe.advice import MiB, advise, noise, percentile, speed, speeds
from ckptsvc.cli.store_probe.probe import Spec


def stage(rates, count=3):
    """Samples of {(size, parallel): MiB a second}; the slowest of each is 5 % slower."""
    samples = []
    for (size, parallel), rate in rates.items():
        seconds = [size * parallel / (rate * MiB)] * (count - 1) + [size * parallel / (0.95 * rate * MiB)]
        samples.append({"size": size, "parallel": parallel, "objects": parallel, "seconds": seconds})
    return {"samples": samples}


def measured(**changes):
    found = {
        "about": {"url": "file:///x", "direct_io": "", "exclusive_create": True, "notes": []},
        "race": {"writers": 8, "winners": [1] * 10},
        "metadata": {"listed": 60, "calls": {"delete": [0.001] * 60}},
        "copy": {"size": 128 * MiB, "seconds": [0.02] * 3},
        "write": stage({(MiB, 1): 500, (128 * MiB, 1): 1000, (128 * MiB, 4): 2000}),
        "read": stage({(MiB, 1): 900, (128 * MiB, 1): 1000}),
        "tune": {"size": 128 * MiB, "ways": [[{}, [0.1, 0.1]], [{"threads": 8}, [0.1, 0.099]]]},
    }
    return found | changes


def settings(found, cores=64, nbytes=None):
    return {each.setting: each for each in advise(found, cores, 8, nbytes)}


def test_a_good_store_needs_no_other_settings():
    advice = settings(measured())
    assert "" not in advice, "no warning"
    assert not any(each.change for each in advice.values())
    assert "no other threads is clearly better" in advice["store.options.file"].why
    assert advice["save.extent"].value == "1MiB"
    assert advice["retention.rate"].value == "100"
    assert "64 cores" in advice["save.early_cores"].why


def test_what_is_clearly_faster_is_recommended_and_noise_is_not():
    ways = [[{}, [0.2, 0.21]], [{"threads": 8}, [0.1, 0.11]], [{"block": 8 * MiB}, [0.19, 0.3]]]
    found = settings(measured(tune={"size": 128 * MiB, "ways": ways}))
    assert found["store.options.file.threads"].value == "8"
    assert found["store.options.file.threads"].change
    noisy = [[{}, [0.2, 0.1]], [{"threads": 8}, [0.1, 0.21]]]
    assert not settings(measured(tune={"size": 1, "ways": noisy}))["store.options.file"].change
    block = [[{}, [0.2]], [{"block": 32 * MiB}, [0.1]]]
    assert settings(measured(tune={"size": 1, "ways": block}))["store.options.file.block"].value == "32MiB"


@pytest.mark.parametrize(("latency", "extent"), [(0.0001, "1MiB"), (0.003, "4MiB"), (0.1, "16MiB")])
def test_extents_are_so_large_that_the_way_to_a_store_does_not_count(latency, extent):
    rates = {(size, 1): size / MiB / (latency + size / MiB / 1000) for size in (MiB, 128 * MiB)}
    assert settings(measured(read=stage(rates)))["save.extent"].value == extent


def test_a_store_that_deletes_slowly_is_spared():
    advice = settings(measured(metadata={"listed": 9, "calls": {"delete": [0.05] * 9}}))["retention.rate"]
    assert (advice.value, advice.change) == ("10", True)


def test_a_state_that_takes_long_wants_a_tier():
    assert settings(measured(), nbytes=2000 * MiB)["tiers"].value == "-"
    assert settings(measured(), nbytes=2000 * 100 * MiB)["tiers"].value == "local"
    assert "over a minute" in settings(measured())["tiers"].why


@pytest.mark.parametrize("winners", [[1] * 9 + [2], [0] + [1] * 9, [-1] * 10])
def test_a_store_that_lets_two_writers_win_is_warned_of(winners):
    advice = advise(measured(race={"writers": 8, "winners": winners}), 4, 8, None)
    assert "two jobs could both commit" in advice[0].why
    assert advice[0].setting == ""


def test_a_store_without_direct_writes_is_told():
    about = {"url": "file:///x", "direct_io": "the file system refuses it", "exclusive_create": True}
    assert any("the file system refuses it" in each.why for each in advise(measured(about=about), 4, 8, None))


@pytest.mark.parametrize("missing", ["race", "metadata", "copy", "write", "read", "tune", "about"])
def test_what_was_not_measured_is_not_spoken_of(missing):
    found = measured()
    del found[missing]
    advise(found, 4, 8, None)
    assert advise({}, 4, 8, None) == []


def test_noise_is_said():
    assert noise(measured()) == ""
    samples = [{"size": MiB, "parallel": 1, "objects": 1, "seconds": [0.1, 0.2, 0.4]}]
    assert "differ by" in noise(measured(write={"samples": samples}, read={"samples": samples}))
    assert noise({}) == ""


def test_percentiles_and_speeds():
    assert percentile([5, 1, 4, 2, 3], 0.5) == 3
    assert percentile([1], 0.99) == 1
    assert speed(10, []) is None
    assert speeds(None) == {}
    assert speed(10, [1, 2, 5]).median == 5


def test_no_sample_moves_more_than_allowed():
    spec = Spec(url="x", folder="y", most=100 * MiB)
    assert spec.grid()
    assert all(size * objects <= 100 * MiB for size, _, objects in spec.grid())
    assert all(objects >= parallel for _, parallel, objects in spec.grid())
