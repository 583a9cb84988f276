import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptsvc.errors import InvalidInput
from ckptsvc.storage.arguments import check_key, check_prefix, check_size, check_target, is_key
from ckptsvc.storage.testing import BAD_KEYS, ODD_KEYS


@pytest.mark.parametrize("key", BAD_KEYS)
def test_bad_keys_are_refused(key):
    assert not is_key(key)
    with pytest.raises(InvalidInput):
        check_key(key)


@pytest.mark.parametrize("key", ODD_KEYS)
def test_odd_keys_are_keys(key):
    assert check_key(key) == key
    assert check_prefix(key) == key


@given(st.text())
def test_a_key_never_leads_out(key):
    """Whatever is accepted stays below the root when its parts are taken one by one."""
    if is_key(key):
        parts = key.split("/")
        assert all(part not in ("", ".", "..") and "\0" not in part for part in parts)
        assert len(key.encode()) <= 1024
        assert all(len(part.encode()) <= 255 for part in parts)


def test_the_empty_prefix_is_everything():
    assert check_prefix("") == ""


@pytest.mark.parametrize(("nbytes", "size"), [(4, 5), (0, 1), (4, -1)])
def test_a_size_must_be_there(nbytes, size):
    with pytest.raises(InvalidInput, match=str(size)):
        check_size(memoryview(bytes(nbytes)), size)


def test_scattered_memory_is_refused():
    with pytest.raises(InvalidInput, match="contiguous"):
        check_size(memoryview(bytes(8))[::2], 2)
    with pytest.raises(InvalidInput, match="contiguous"):
        check_target(memoryview(bytearray(8))[::2], 0)
    with pytest.raises(InvalidInput, match="writable"):
        check_target(memoryview(bytes(8)), 0)
    with pytest.raises(InvalidInput, match="-1"):
        check_target(memoryview(bytearray(8)), -1)


def test_elements_become_bytes():
    assert bytes(check_size(memoryview(b"12345678").cast("I"), 5)) == b"12345"
    assert check_target(memoryview(bytearray(8)).cast("I"), 0).nbytes == 8
    assert len(check_size(memoryview(b""), 0)) == 0
