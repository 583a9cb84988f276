"""Object stores that fail: servers killed, slow, busy, silent or wrong, answers that are lost, bad credentials.

Real servers, and before them a proxy that does as it is told.
"""

import json
import re
import sys
import threading
import time

import numpy as np
import pytest
import torch
from harness.job import Launch
from harness.object_servers import S3Bucket, moto, opened, shared_access
from harness.proxy import Rule
from harness.rank import Rank
from harness.runtime import Runtime
from harness.stored import Run, Tensor, cli

import ckptsvc
from ckptsvc.errors import CkptsvcError, Damaged, StoreDenied, StoreError, StoreFull, StoreUnavailable
from ckptsvc.format.commit import epoch_key
from ckptsvc.pipeline.catalog import find, list_refs, newest_epoch, take_epoch
from ckptsvc.storage import connect
from ckptsvc.storage.testing import content_of, pages_with, put
from ckptsvc.storage.wrappers import Retrying

MiB = 1 << 20
BUSY = (503, b"<Error><Code>SlowDown</Code><Message>Reduce your request rate</Message></Error>")


@pytest.fixture
def store(s3_bucket, between):
    store = opened(s3_bucket, endpoint=between.endpoint, timeout=20)
    yield store
    store.close()


def refused(status: int, code: str) -> tuple[int, bytes]:
    return status, f"<Error><Code>{code}</Code><Message>secret-signature</Message></Error>".encode()


# --- servers that are away, slow or busy ---------------------------------------------------------------------------


def test_a_server_that_is_killed_in_mid_upload_and_comes_back_gets_the_whole_object(tmp_path, s3_bucket):
    """Also one that has forgotten the upload: moto forgets everything."""
    content = content_of(40 * MiB)
    with moto(tmp_path) as server:
        bucket = S3Bucket(server.endpoint)
        store = Retrying(opened(bucket, part=5 * MiB, connections=2), attempts=20, first_wait=0.3, longest_wait=1.0)

        def come_back():
            time.sleep(1.0)
            server.start()
            bucket.client.create_bucket(Bucket=bucket.name)

        back = threading.Thread(target=come_back)
        seen = []

        def progress(nbytes):
            if not seen:
                server.kill()
                back.start()
            seen.append(nbytes)

        with pages_with(content) as data:
            try:
                store.write("step/a", data, len(content), progress=progress)
            except StoreError:  # the server was there again, and its bucket not yet
                back.join()
                store.write("step/a", data, len(content))
        back.join()
        assert bucket.read("step/a") == content
        store.close()


def test_a_server_that_is_away_is_unavailable_at_once(s3_bucket, tmp_path):
    store = opened(s3_bucket, endpoint="http://127.0.0.1:9", timeout=5)
    operations = [
        lambda: put(store, "a", b"1"),
        lambda: put(store, "a", content_of(20 * MiB)),
        lambda: store.put_if_absent("a", b"1"),
        lambda: store.read("a"),
        lambda: store.read_into("a", 0, memoryview(bytearray(9 * MiB))),
        lambda: store.size("a"),
        lambda: list(store.list()),
        lambda: store.children(),
        lambda: store.delete("a"),
        lambda: store.capabilities(),
    ]
    for operation in operations:
        with pytest.raises(StoreUnavailable) as caught:
            operation()
        assert caught.value.retryable
        assert "s3://" in str(caught.value)


def test_a_slow_server_is_waited_for(store, s3_bucket, between):
    between.rules.append(Rule("PUT", delay=0.7))
    put(store, "a", content_of(20 * MiB))
    assert s3_bucket.read("a") == content_of(20 * MiB)


def test_a_part_that_a_busy_server_refuses_is_sent_again_and_no_other(store, s3_bucket, between):
    between.rules.append(Rule("PUT .*partNumber=2&", answer=BUSY, times=2))
    put(store, "a", content_of(20 * MiB))
    assert s3_bucket.read("a") == content_of(20 * MiB)
    parts = [int(part) for each in between.seen for part in re.findall(r"PUT .*partNumber=(\d+)", each)]
    assert sorted(parts) == [1, 2, 2, 2, 3]


def test_a_server_that_stays_busy_is_unavailable_and_keeps_no_upload(store, s3_bucket, between):
    between.rules.append(Rule("PUT .*partNumber=2&", answer=BUSY))
    with pytest.raises(StoreUnavailable, match=r"s3://.*/step/a.*503 SlowDown"):
        put(store, "step/a", content_of(20 * MiB))
    assert s3_bucket.uploads() == []


@pytest.mark.parametrize("size", [1, 20 * MiB])
def test_a_server_that_hangs_ends_as_unavailable_and_the_memory_is_free(s3_bucket, between, size):
    """As a full Ceph cluster does: it takes the request and never answers."""
    store = opened(s3_bucket, endpoint=between.endpoint, timeout=1)
    between.rules.append(Rule("PUT", hang=True))
    with pages_with(content_of(size)) as data, pytest.raises(StoreUnavailable):  # closing the pages would fail
        store.write("a", data, size)
    with pytest.raises(StoreUnavailable):
        store.put_if_absent("b", b"1")
    store.close()


@pytest.mark.parametrize(
    ("timeout", "seconds"), [(1.5, 2), pytest.param(60, 70, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_a_store_that_hangs_for_a_while_gets_the_whole_object_and_gives_it_back(
    s3_bucket, moto_server, timeout, seconds
):
    """For longer than a request may take; what was acknowledged before is not lost."""
    content = content_of(40 * MiB)
    inner = opened(s3_bucket, timeout=timeout, part=5 * MiB, connections=2)
    store = Retrying(inner, attempts=20, first_wait=0.1, timeout=600.0)
    over = threading.Event()

    def hang():
        with moto_server.paused():
            over.wait(seconds)

    hanging = [threading.Thread(target=hang) for _ in range(2)]
    try:
        with pages_with(content) as data:
            begun = iter(hanging[:1])
            store.write("a", data, len(content), progress=lambda nbytes: [each.start() for each in begun])
        assert s3_bucket.read("a") == content
        hanging[1].start()
        buffer = bytearray(len(content))
        store.read_into("a", 0, memoryview(buffer))
        assert buffer == content
    finally:
        over.set()
        for each in hanging:
            each.join()
    store.close()


# --- lost answers --------------------------------------------------------------------------------------------------


def test_a_commit_whose_answer_is_lost_was_a_commit(store, s3_bucket, between):
    between.rules.append(Rule("PUT .*COMMIT", lose_answer=True, times=1))
    assert store.put_if_absent("step/COMMIT", b"ours") is True
    assert s3_bucket.read("step/COMMIT") == b"ours"


@pytest.mark.parametrize("theirs", [b"them", b"them, and longer"])
def test_a_commit_whose_answer_is_lost_behind_another_was_none(store, s3_bucket, between, theirs):
    s3_bucket.write("step/COMMIT", theirs)
    between.rules.append(Rule("PUT .*COMMIT", lose_answer=True, times=1))
    assert store.put_if_absent("step/COMMIT", b"ours") is False


def test_a_commit_that_never_arrived_is_tried_again(store, s3_bucket, between):
    between.rules.append(Rule("PUT .*COMMIT", lose_request=True, times=1))
    with pytest.raises(StoreUnavailable):
        store.put_if_absent("step/COMMIT", b"ours")
    assert store.put_if_absent("step/COMMIT", b"ours") is True


def test_a_conflict_of_two_requests_is_no_defeat(store, between):
    """S3 answers 409 while another conditional request is under way, whatever becomes of that one."""
    between.rules.append(Rule("PUT .*COMMIT", answer=refused(409, "ConditionalRequestConflict"), times=1))
    with pytest.raises(StoreUnavailable):
        store.put_if_absent("step/COMMIT", b"ours")
    assert Retrying(store).put_if_absent("step/COMMIT", b"ours") is True


def test_a_completed_upload_whose_answer_is_lost_is_written_again(store, s3_bucket, between):
    between.rules.append(Rule("POST .*uploadId", lose_answer=True, times=1))
    put(Retrying(store, first_wait=0.1), "a", content_of(20 * MiB))
    assert s3_bucket.read("a") == content_of(20 * MiB)
    assert s3_bucket.uploads() == []


# --- credentials ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (refused(400, "ExpiredToken"), StoreDenied, "expired"),
        (refused(403, "InvalidAccessKeyId"), StoreDenied, "credentials"),
        (refused(403, "SignatureDoesNotMatch"), StoreDenied, "credentials"),
        (refused(403, "RequestTimeTooSkewed"), StoreDenied, "clock"),
        (refused(404, "NoSuchBucket"), StoreError, "no such bucket"),
        (refused(400, "QuotaExceeded"), StoreFull, "quota"),
        (refused(507, ""), StoreFull, "space"),
        (refused(429, "TooManyRequests"), StoreUnavailable, "429"),
        (refused(500, "InternalError"), StoreUnavailable, "InternalError"),
        (refused(418, "Teapot"), StoreError, "Teapot"),
    ],
)
def test_what_a_server_refuses_is_told_with_the_object_and_without_secrets(store, between, answer, error, says):
    between.rules.append(Rule("", answer=answer))
    for operation in (
        lambda: put(store, "step/a", b"1"),
        lambda: store.put_if_absent("step/a", b"1"),
        lambda: store.read("step/a"),
    ):
        with pytest.raises(StoreError) as caught:
            operation()
        assert type(caught.value) is error
        assert caught.value.retryable == (error is StoreUnavailable)
        for part in (store.url, "step/a", says):
            assert part in str(caught.value)
        assert "secret" not in str(caught.value)
        assert caught.value.__cause__ is None  # a traceback would show what obstore says


def test_a_wrong_key_is_refused_by_a_server_that_checks_it(azure_container, monkeypatch):
    put(opened(azure_container), "a", b"1")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "d3Jvbmc=")
    store = opened(azure_container)
    for operation in (lambda: store.read("a"), lambda: put(store, "b", b"1"), lambda: store.put_if_absent("b", b"1")):
        with pytest.raises(StoreDenied, match="az://"):
            operation()
    assert not store.capabilities().exclusive_create


def test_credentials_that_expire_are_refused_by_a_server_that_checks_them_until_they_are_renewed(
    azure_container, monkeypatch
):
    content = content_of(9 * MiB)
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_KEY")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", shared_access(5.0))
    store = opened(azure_container)
    put(store, "a", content)
    assert store.read("a", len(content)) == content
    store.read_into("a", 0, memoryview(bytearray(len(content))))  # such credentials cannot sign addresses
    time.sleep(5.5)
    for operation in (
        lambda: store.read("a"),
        lambda: put(store, "b", content),
        lambda: put(store, "b", b"1"),
        lambda: store.put_if_absent("b", b"1"),
        lambda: store.read_into("a", 0, memoryview(bytearray(len(content)))),
    ):
        with pytest.raises(StoreDenied, match=r"az://.*credentials"):
            operation()
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", shared_access(600.0))
    renewed = opened(azure_container)
    assert renewed.read("a", len(content)) == content
    assert [entry.key for entry in renewed.list()] == ["a"]


def test_no_credentials_at_all_are_told_as_such(s3_bucket, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/none")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/none")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StoreDenied, match="no credentials"):
        opened(s3_bucket).read("a")


def test_a_clock_that_is_wrong_does_not_age_objects(s3_bucket):
    """What an object's age is computed from is the server's time, not the writer's."""
    store = opened(s3_bucket)
    put(store, "a", b"1")
    (entry,) = store.list()
    served = s3_bucket.client.head_object(Bucket=s3_bucket.name, Key="a")["LastModified"].timestamp()
    assert abs(entry.modified - served) < 2


@pytest.mark.parametrize(("hours", "older_than", "left"), [(2, "1h", [1, 2]), (-2, "1s", [1])])
def test_a_clock_that_is_wrong_deletes_no_running_save(s3_bucket, monkeypatch, hours, older_than, left):
    monkeypatch.setenv("CKPTSVC_STORE_OPTIONS", json.dumps({"s3": s3_bucket.options}))
    run = Run(s3_bucket.url, s3_bucket.options)
    run.save(1)
    run.save(2, commit=False)  # in another node's memory is the rest of it
    time.sleep(2.1 if older_than == "1s" else 0)  # S3 dates by the second
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + hours * 3600)
    status, _, err = cli("gc", run.url, "--delete", "--older-than", older_than)
    assert (status, "the store's, which counts" in err) == (0, True)
    assert sorted(ref.step for ref in list_refs(run.store)) == left
    assert run.store.children("retired") == []


# --- what is read --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 1000, 5 * MiB])
def test_an_answer_that_ends_too_early_is_an_outage_and_read_again(store, s3_bucket, between, kept):
    s3_bucket.write("a", content_of(20 * MiB))
    between.rules.append(Rule("GET .*/a", cut_body=kept, times=1))
    buffer = bytearray(20 * MiB)
    Retrying(store, first_wait=0.1).read_into("a", 0, memoryview(buffer))
    assert buffer == content_of(20 * MiB)
    assert Retrying(store).read("a", 20 * MiB) == buffer


def test_a_corrupted_object_is_never_loaded(s3_bucket, monkeypatch):
    monkeypatch.setenv("CKPTSVC_STORE_OPTIONS", json.dumps({"s3": s3_bucket.options}))
    run = Run(s3_bucket.url, s3_bucket.options)
    values = np.arange(1 << 20, dtype=np.float32)
    run.save(1, {"model/w": Tensor(values)})
    assert torch.equal(ckptsvc.load(s3_bucket.url)["model"]["w"], torch.from_numpy(values))
    key = max(run.store.list(), key=lambda entry: entry.size).key
    content = bytearray(s3_bucket.read(key))
    content[len(content) // 2] ^= 1
    s3_bucket.write(key, bytes(content))
    with pytest.raises(Damaged, match="checksum"):
        ckptsvc.load(s3_bucket.url)
    s3_bucket.write(key, bytes(content[:-1]))
    with pytest.raises(Damaged):
        ckptsvc.load(s3_bucket.url)


def without(name: str):
    """A listing that does not know of an object yet."""

    def change(content: bytes) -> bytes:
        entry = rf"<(Contents|CommonPrefixes)>(?:(?!</\1>).)*{re.escape(name)}(?:(?!</\1>).)*</\1>"
        return re.sub(entry.encode(), b"", content, flags=re.DOTALL)

    return change


def test_a_listing_that_is_behind_stops_no_commit_and_hands_out_no_epoch_twice(s3_bucket, between):
    run = Run(s3_bucket.url, {**s3_bucket.options, "endpoint": between.endpoint})
    assert take_epoch(run.store, "job", 1, "one", "now") == 1
    between.rules += [
        Rule("GET .*list-type=2.*epochs", change=without(epoch_key(1))),
        Rule("GET .*list-type=2", change=without(".safetensors")),
    ]
    assert newest_epoch(run.store) == 0
    assert take_epoch(run.store, "job", 2, "two", "now") == 2
    run.save(3, {"model/w": Tensor(np.arange(9.0))}, epoch=2)
    assert [ref.step for ref, _ in find(run.store)] == [3]


# --- a job ---------------------------------------------------------------------------------------------------------


def train(rank: Rank, store: str, steps: int) -> dict[str, object]:
    """Restores, forks as a data loader does, trains and saves."""
    rank.join()
    weight = torch.zeros(3 * MiB)
    run = ckptsvc.attach({"weight": weight}, store=store, every="off")
    begun = run.steps_done
    rows = torch.utils.data.DataLoader(range(8), batch_size=4, num_workers=2)
    seen = int(sum(batch.sum() for batch in rows))
    for _ in range(steps):
        weight += 1
        run.step()
    saved = run.save(wait=True)
    run.close()
    return {
        "begun": begun,
        "seen": seen,
        "saved": saved,
        "value": weight[0].item(),
        "obstore": "obstore" in sys.modules,
    }


def save_twice(rank: Rank, store: str) -> int:
    """Where it has begun."""
    weight = torch.zeros(1000)
    run = ckptsvc.attach({"weight": weight}, store=store, every="off")
    begun = run.steps_done
    for _ in range(2):
        weight += 1
        run.step()
        run.save(wait=True)
    run.close()
    return begun


@pytest.mark.slow
def test_a_step_that_a_listing_hides_is_restored_where_the_job_knows_of_it(
    s3_bucket: S3Bucket, between, launch: Launch, runtime: Runtime, moto_server
) -> None:
    url = f"{s3_bucket.url}/run"
    options = {"s3": {**s3_bucket.options, "endpoint": between.endpoint}}
    runtime.environ.update(moto_server.environ, CKPTSVC_STORE_OPTIONS=json.dumps(options))
    assert launch.plain(1, save_twice, url, CKPTSVC_JOB="again", CKPTSVC_ATTEMPT="1").results() == [0]
    between.rules.append(Rule("GET .*list-type=2", change=without("step-000000000002.")))
    assert [ref.step for ref in list_refs(connect(url, options["s3"]))] == [1]
    for arena in runtime.arenas.rglob("*"):  # what is in memory would be newer
        if arena.is_file() and arena.stat().st_size > 4096:
            arena.write_bytes(b"\xff" * arena.stat().st_size)
    again = launch.plain(1, save_twice, url, CKPTSVC_JOB="again", CKPTSVC_ATTEMPT="2")
    assert again.results() == [2]
    assert "the listing is behind, step-000000000002.e00001 is there all the same" in again.story()


def test_a_job_saves_to_s3_and_is_restored_from_it(
    s3_bucket: S3Bucket, launch: Launch, runtime: Runtime, moto_server, monkeypatch
) -> None:
    """Its ranks fork after the restore, and hold no client; the command line sees the checkpoints."""
    url = f"{s3_bucket.url}/run"
    runtime.environ.update(moto_server.environ, CKPTSVC_STORE_OPTIONS=json.dumps({"s3": s3_bucket.options}))
    for begun, steps in ((0, 3), (3, 2)):
        results = launch.plain(2, train, url, steps).results()
        expected = {"begun": begun, "seen": 28, "saved": True, "value": float(begun + steps), "obstore": False}
        assert results == [expected, expected]
        runtime.kill_agents()  # so that nothing is in memory

    for name in ("AGENT_SOCKET_DIR", "STORE_OPTIONS"):
        monkeypatch.setenv(f"CKPTSVC_{name}", runtime.environ[f"CKPTSVC_{name}"])
    assert [entry["step"] for entry in json.loads(cli("ls", url, "--json").out)["checkpoints"]] == [5, 3]
    assert cli("verify", url, "--step", "5").status == 0
    s3_bucket.begin_upload("run/step-000000000009.e00001/r00000-00000000.safetensors")
    assert json.loads(cli("gc", url, "--delete", "--json", "--older-than", "0s").out)["removed"]["objects"] == 1
    assert s3_bucket.uploads() == []
    shard = max(opened(s3_bucket).list("run/step-000000000005.e00002"), key=lambda entry: entry.size).key
    content = bytearray(s3_bucket.read(shard))
    content[len(content) // 2] ^= 1
    s3_bucket.write(shard, bytes(content))
    assert cli("verify", url, "--step", "5").status == 12


def save_in_vain(rank: Rank, store: str) -> str:
    run = ckptsvc.attach({"weight": torch.zeros(9)}, store=store, every="off")
    try:
        run.step()
        run.save(wait=True, timeout=20)
    except CkptsvcError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        run.close()
    return "saved"


def test_a_job_is_told_that_nothing_can_be_committed(s3_bucket, launch, runtime, moto_server, between):
    """The server replaces what it was asked to create: no save is begun, no training is ended."""
    between.rules.append(Rule("PUT", headers={"if-none-match": "x"}))
    options = {"s3": {"endpoint": between.endpoint}}
    runtime.environ.update(moto_server.environ, CKPTSVC_STORE_OPTIONS=json.dumps(options))
    (said,) = launch.plain(1, save_in_vain, s3_bucket.url).results()
    assert said.startswith("SaveFailed: ")
    assert "exactly one of several writers" in said
    assert list(opened(s3_bucket).list()) == []
