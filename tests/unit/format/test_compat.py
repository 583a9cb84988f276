from __future__ import annotations

import pytest

from ckptsvc.errors import Damaged, IncompatibleVersion
from ckptsvc.format.compat import FORMAT, check_version


def test_what_is_written_is_read():
    assert check_version(FORMAT, "x") == (1, 0)


def test_newer_minor_versions_are_read():
    assert check_version("1.73", "x") == (1, 73)


@pytest.mark.parametrize("version", ["3.0", "3.7", "10.0"])
def test_newer_majors_are_refused_by_name_with_what_to_do(version):
    with pytest.raises(IncompatibleVersion, match=rf"the shard r0 has format {version}.*newer ckptsvc"):
        check_version(version, "the shard r0")


@pytest.mark.parametrize(
    "version",
    [None, 1, 1.0, "", "1", "1.", "v1.0", "1.0 ", "1.0\n", "01.0", "1.0.0", "1٠.0", "0.9", "9" * 5000 + ".0"],
)
def test_what_is_no_version_is_damage(version):
    with pytest.raises(Damaged):
        check_version(version, "x")
