"""The driver of object stores, on servers that the tests start: the conformance suite, and what it cannot know.

CKPTSVC_TEST_S3 adds another S3 server: a JSON object such as {"url": "s3://bucket", "options": {"endpoint": "http://..."}}
for an existing bucket; each test uses a prefix of its own in it. Credentials come from the environment as usual.
"""

import contextlib
import json
import os
import threading
import uuid
from collections.abc import Iterator
from urllib.parse import parse_qs, urlsplit

import pytest
from ckptsvc_drivers import object_uploads
from ckptsvc_drivers.object_clients import Clients, Options, parse
from ckptsvc_drivers.object_names import Upload, key_of, name_of, upload_of
from ckptsvc_drivers.object_parts import MOST_PARTS, Parts, cut
from harness.object_servers import AzureContainer, Bucket, S3Bucket, azurite, moto, opened

from ckptsvc.errors import ConfigError, StoreError
from ckptsvc.storage import connect
from ckptsvc.storage.testing import StoreTests, content_of, pages_with, put

MiB = 1 << 20


@pytest.fixture(scope="session")
def moto_server(tmp_path_factory):
    with moto(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture(scope="session")
def azurite_server(tmp_path_factory):
    with azurite(tmp_path_factory.mktemp("azurite")) as server:
        yield server


@pytest.fixture
def s3_bucket(moto_server, monkeypatch) -> S3Bucket:
    set_environ(monkeypatch, moto_server.environ)
    return S3Bucket(moto_server.endpoint)


def set_environ(monkeypatch, environ):
    for name in [name for name in os.environ if name.startswith(("AWS_", "AZURE_"))]:
        monkeypatch.delenv(name)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)


class ObjectTests(StoreTests):
    """What all object stores share: a fixture `bucket`."""

    @pytest.fixture
    def store(self, bucket):
        store = opened(bucket)
        self.bucket: Bucket = bucket
        yield store
        store.close()

    def another(self, store):
        return opened(self.bucket)

    def raw_read(self, store, key):
        return self.bucket.read(name_of("", key))

    def raw_write(self, store, key, content):
        self.bucket.write(name_of("", key), content)

    def test_exclusive_creation_is_found_out_once(self, store):
        assert store.capabilities() is store.capabilities()


class TestMoto(ObjectTests):
    @pytest.fixture
    def bucket(self, s3_bucket):
        return s3_bucket


class TestAzurite(ObjectTests):
    @pytest.fixture
    def bucket(self, azurite_server, monkeypatch):
        set_environ(monkeypatch, azurite_server.environ)
        return AzureContainer(azurite_server.endpoint)


if "CKPTSVC_TEST_S3" in os.environ:

    class TestOtherS3(ObjectTests):
        @pytest.fixture
        def bucket(self) -> Iterator[S3Bucket]:
            given = json.loads(os.environ["CKPTSVC_TEST_S3"])
            prefix = uuid.uuid4().hex[:3]  # short: the longest keys are as long as S3 takes
            bucket = S3Bucket(name=parse(given["url"]).bucket, prefix=prefix, **given.get("options", {}))
            yield bucket
            for entry in opened(bucket).list():
                opened(bucket).delete(entry.key)
