"""Slurm's lists of nodes: what they stand for, what is refused, and the same as `scontrol show hostnames` says."""

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsvc.errors import InvalidInput
from ckptsvc.launch.hostlist import MAX_HOSTS, MAX_TEXT, expand


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", "n1"),
        ("n1,login,n1", "n1 login n1"),
        ("n[1-3,7]", "n1 n2 n3 n7"),
        ("n[08-11]", "n08 n09 n10 n11"),
        ("n[9-10],gpu[1-2]", "n9 n10 gpu1 gpu2"),
        ("n[5,07]", "n5 n07"),
        ("[1-2]", "1 2"),
        ("rack[0-1]node[1-2]", "rack0node1 rack0node2 rack1node1 rack1node2"),
        ("a-b.c_d[1-2]-ib", "a-b.c_d1-ib a-b.c_d2-ib"),
        ("nid[001000-001002]", "nid001000 nid001001 nid001002"),
    ],
)
def test_lists_as_slurm_writes_them(text: str, names: str) -> None:
    assert expand(text) == names.split()


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "n1,",
        ",n1",
        "n1,,n2",
        "n[1-3",
        "n1-3]",
        "n[]",
        "n[1,]",
        "n[3-1]",
        "n[-1]",
        "n[1-2-3]",
        "n[a-b]",
        "n[1 - 2]",
        "n 1",
        "n[[1]]",
        "n;rm",
        "n\n",
        "é[1-2]",
        "n[²]",
        "n[1-9999999999]",
    ],
)
def test_what_is_no_list_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        expand(text)


@pytest.mark.parametrize(
    "text",
    [
        f"n[1-{MAX_HOSTS + 1}]",
        "n[0-999999999]",
        "a[0-999]b[0-999]",
        "a[0-999]b[0-999]c[0-999]d[0-999]",
        f"n[1-{MAX_HOSTS}],n1",
        "n[" + ",".join(["0-9999"] * 7) + "]",
        "n" * (MAX_TEXT + 1),
    ],
)
def test_a_list_without_end_costs_nothing(text: str) -> None:
    with pytest.raises(InvalidInput):
        expand(text)


def test_the_largest_list() -> None:
    assert len(expand(f"n[1-{MAX_HOSTS}]")) == MAX_HOSTS


@given(st.text(alphabet="n0129[]-,. é", max_size=30))
def test_any_text_is_a_list_of_names_or_refused(text: str) -> None:
    try:
        names = expand(text)
    except InvalidInput:
        return
    assert names
    assert not any(set(name) & set("[], é") for name in names)


NUMBERS = st.integers(0, 120)
RANGES = st.builds(
    lambda first, more, width: f"{first:0{width}d}" + (f"-{first + more:0{width}d}" if more else ""),
    NUMBERS,
    st.integers(0, 12),
    st.integers(1, 4),
)
BRACKETS = st.lists(RANGES, min_size=1, max_size=3).map(lambda found: f"[{','.join(found)}]")
WORDS = st.sampled_from(["n", "gpu", "nid", "a-b"])
ITEMS = st.one_of(
    WORDS,
    st.builds(lambda word, number: f"{word}{number}", WORDS, NUMBERS),
    st.builds(lambda word, brackets: f"{word}{brackets}", WORDS, BRACKETS),
    st.builds(lambda word, one, other: f"{word}{one}x{other}", WORDS, BRACKETS, BRACKETS),
)
LISTS = st.lists(ITEMS, min_size=1, max_size=4).map(",".join)


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="scontrol is not installed (apt-get install slurm-client)")
def test_the_same_as_scontrol(tmp_path_factory: pytest.TempPathFactory) -> None:
    configuration: Path = tmp_path_factory.mktemp("slurm") / "slurm.conf"
    configuration.write_text("ClusterName=x\nSlurmctldHost=localhost\nNodeName=localhost\nPartitionName=p Nodes=ALL\n")

    @settings(max_examples=40, deadline=None)
    @given(LISTS)
    def compare(text: str) -> None:
        command = ["scontrol", "show", "hostnames", text]
        environ = {"SLURM_CONF": str(configuration), "PATH": "/usr/bin:/bin"}
        shown = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=20, check=True).stdout
        assert expand(text) == shown.split()

    compare()
