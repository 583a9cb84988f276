"""`ckptsvc bench store`: the numbers it makes of samples."""

import pytest
from harness.stored import cli

from ckptsvc.cli.benchmarks.store.command import Found, Table
from ckptsvc.cli.benchmarks.store.systems import RAW, systems
from ckptsvc.errors import ConfigError

MiB = 1 << 20


def samples(*seconds, cpu=0.1, memory=0):
    return [{"seconds": s, "cpu": cpu, "memory": memory} for s in seconds]


def table(**changes):
    found = Found(notes=dict.fromkeys(("ckptsvc", "raw O_DIRECT", "raw buffered", "fsspec"), ""))
    for word in ("write", "read"):
        found.samples["ckptsvc", word] = changes.get("ours", samples(1.0, 2.0, 1.0))
        found.samples["raw O_DIRECT", word] = samples(1.0, 1.0, 3.0)
        found.samples["raw buffered", word] = samples(2.0, 4.0, 0.5)
    return Table("file", 512 * MiB, found)


def test_the_limit_is_the_raw_client_with_the_best_median():
    """Each repetition beside its own: what another client did once, by luck, is no limit."""
    assert table().limit("write") == "raw O_DIRECT"
    ratio = table().of_raw("ckptsvc", "write")
    assert (ratio.median, ratio.low, ratio.high) == (1.0, 0.5, 3.0)
    assert table().of_raw("raw buffered", "write").high == 6.0
    assert table().rate("ckptsvc", "read").median == 512.0


def test_bars_are_met_or_not():
    found = {what: met for what, _, _, met in table(ours=samples(1.0, 1.0, 0.5, cpu=0.1, memory=65 * MiB)).bars()}
    assert found == {
        "write: of the raw limit": True, "read: of the raw limit": True, "write: CPU s/GiB": True,
        "memory: MiB beyond the object": False,
    }  # fmt: skip
    assert not table(ours=samples(9.0, 9.0, 9.0, cpu=0.2)).bars()[0][3]
    assert table(ours=samples(1.0, cpu=0.2)).cpu("ckptsvc", "write") == pytest.approx(0.4)


def test_a_raw_client_that_is_not_there_is_no_limit():
    found = Found(samples={("ckptsvc", word): samples(1.0) for word in ("write", "read")}, notes={"ckptsvc": ""})
    alone = Table("file", MiB, found)
    assert alone.of_raw("ckptsvc", "write") is None
    assert [what for what, *_ in alone.bars()] == ["write: CPU s/GiB", "memory: MiB beyond the object"]
    assert alone.document()["rows"][0]["of_raw"] is None


def test_every_scheme_has_a_raw_client():
    assert all(next(iter(systems(scheme, ("fsspec",)))) == "ckptsvc" for scheme in RAW)
    with pytest.raises(ConfigError, match="tape"):
        systems("tape", ())


@pytest.mark.parametrize(
    "arguments",
    [["memory://x"], ["/tmp/x", "--vs", "rsync"], ["/tmp/x", "--size", "0"], ["/tmp/x", "--size", "1000TB"]],
)
def test_wrong_arguments(arguments):
    assert cli("bench", "store", *arguments).status == 2
