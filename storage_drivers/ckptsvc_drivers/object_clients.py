"""Addresses and settings of object stores, and obstore's clients made from them.

Credentials come from where each cloud's own tools take them (environment, files, the instance, the workload), never
from an address or a setting, so that neither can give them away. obstore is imported and its clients are made at the
first request, not before: they hang in a process that was forked from one that has them.
"""

from __future__ import annotations

import configparser
import ipaddress
import math
import os
import re
import ssl
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple
from urllib.parse import urlsplit

import msgspec

from ckptsvc.errors import ConfigError, InvalidInput, StoreError
from ckptsvc.storage.arguments import check_prefix

if TYPE_CHECKING:
    from obstore.store import AzureStore, GCSStore, S3Store

    Client = S3Store | AzureStore | GCSStore

LEAST_PART = 5 << 20
"""Bytes; S3 takes no smaller part but the last (Amazon S3 User Guide, "multipart upload limits")."""

CONNECT_TIMEOUT = 5.0
"""Seconds until a connection must stand."""

RENEW_EVERY = 10.0
"""Seconds for which credentials that were read anew are not read again, whatever the server says."""

PART_RETRIES = 3
"""Further tries of one part: what failed once must not cost all the other parts of the object."""

_ADDRESS = re.compile(r"(s3|gs|az)://([A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9])(?:/(.*))?", re.DOTALL)
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
    "gs": (),
}
_OTHER_AWS_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)


_USED_IN: dict[str, int] = {}  # the process whose threads obstore has: they do not survive a fork


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of an object store.

    Attributes:
        endpoint: address of the server, for other than the cloud's own; "" means what the environment says.
        region: of the bucket (S3); "" means what the environment or the profile says.
        profile: of ~/.aws/config (S3); "" means $AWS_PROFILE.
        account: the storage account (Azure); "" means $AZURE_STORAGE_ACCOUNT_NAME.
        anonymous: send no credentials.
        virtual_host: `endpoint` has the bucket's name in its host's (S3).
        allow_http: speak without encryption; to this machine itself that is always allowed.
        ca_file: certificates (PEM) of those who may sign the server's, besides the usual ones.
        timeout: seconds one request may take, from its connection to the last byte of the answer.
        part: bytes of one request of a large object; 0 chooses by the object's size.
        connections: requests at a time, of one object when writing and of all together when reading; 0 chooses.
        sign_payload: sign what is sent, too (S3). It costs half a second of CPU time per GB, and adds nothing to
            TLS and to the checksums of our own.
    """

    endpoint: str = ""
    region: str = ""
    profile: str = ""
    account: str = ""
    anonymous: bool = False
    virtual_host: bool = False
    allow_http: bool = False
    ca_file: str = ""
    timeout: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 60.0
    part: Annotated[int, msgspec.Meta(ge=0, le=1 << 30)] = 0
    connections: Annotated[int, msgspec.Meta(ge=0, le=256)] = 0
    sign_payload: bool = False

    def __post_init__(self) -> None:
        if 0 < self.part < LEAST_PART:
            raise ValueError(f"`part` is {self.part}, less than {LEAST_PART} bytes")


class Place(NamedTuple):
    """Where objects are: scheme, bucket (container), and what stands before every key ("" or a key)."""

    scheme: str
    bucket: str
    prefix: str

    @property
    def url(self) -> str:
        """The address in one spelling."""
        return f"{self.scheme}://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")


def parse(url: str) -> Place:
    """The place an address names.

    Raises:
        ConfigError: it names none.
    """
    hint = f"write {url.partition('://')[0]}://bucket/prefix; everything else is an option"
    match = _ADDRESS.fullmatch(url)
    prefix = (match[3] or "").rstrip("/") if match else ""
    if match is None or "?" in prefix or "#" in prefix:  # the address is not repeated: it may hold a password
        raise ConfigError(f"the address of a {url.partition('://')[0]}:// store names no bucket and prefix", hint=hint)
    try:
        return Place(match[1], match[2], check_prefix(prefix))
    except InvalidInput as error:
        raise ConfigError(f"{match[1]}://{match[2]}/...: {error}", hint=hint) from None


class Clients:
    """obstore's clients for one place, made at the first use.

    Args:
        place: the bucket.
        options: settings.

    Attributes:
        generation: how often credentials were read anew.

    Raises:
        ConfigError: an endpoint without encryption that is not allowed, a file that is not there, and the like.
    """

    def __init__(self, place: Place, options: Options) -> None:
        self.place, self.options = place, options
        self.endpoint = options.endpoint or _from_environment(_ENDPOINTS[place.scheme])
        self._http = options.allow_http or _is_loopback(self.endpoint)
        if self.endpoint and not _is_server(self.endpoint, self._http):
            hint = "it must begin with https://; with the option allow_http = true also with http://"
            raise ConfigError(f"the endpoint of {place.url} cannot be used", hint=hint)
        self._authorities = _read(options.ca_file) if options.ca_file else b""
        self._made: dict[int, Client] = {}
        self._lock = threading.Lock()
        self.generation = 0
        self._renewed_at = -math.inf

    @property
    def plain(self) -> Client:
        """For single requests: none is sent twice, so that its outcome is known."""
        return self._client(0)

    @property
    def patient(self) -> Client:
        """For the parts of an upload."""
        return self._client(PART_RETRIES)

    def renew(self, generation: int) -> bool:
        """Have the credentials read anew, those of a generation having been refused: somebody may have renewed them.

        Returns:
            whether there are others than those; False if that was done just now, in vain.
        """
        with self._lock:
            if generation != self.generation:
                return True
            if time.monotonic() < self._renewed_at + RENEW_EVERY:
                return False
            self._renewed_at = time.monotonic()
            self.generation += 1
            self._made.clear()
            return True

    def tls(self) -> ssl.SSLContext:
        """What a connection of our own is checked with."""
        context = ssl.create_default_context()
        if self._authorities:
            context.load_verify_locations(cadata=self._authorities.decode("ascii", "replace"))
        return context

    def for_query(self, url: str) -> S3Store:
        """A client of which only signatures are asked, for requests to the bucket that obstore cannot make itself.

        Args:
            url: of the bucket with a query; what is signed adds "/" and a name, the value of its last parameter.
        """
        client = self._make(0, endpoint=url, virtual_host=True)
        from obstore.store import S3Store

        assert isinstance(client, S3Store)
        return client

    def _client(self, retries: int) -> Client:
        with self._lock:
            if _USED_IN.setdefault("process", os.getpid()) != os.getpid():
                raise StoreError(
                    f"{self.place.url} cannot be used in a process forked from one that has used an object store",
                    hint="open it with ckptsvc.storage.opening.open_apart",
                )
            if retries not in self._made:
                self._made[retries] = self._make(retries, self.endpoint, self.options.virtual_host)
            return self._made[retries]

    def _make(self, retries: int, endpoint: str, virtual_host: bool) -> Client:
        from obstore.exceptions import BaseError
        from obstore.store import AzureStore, GCSStore, S3Store

        options, seconds = self.options, self.options.timeout
        client: dict[str, Any] = {
            "allow_http": self._http,
            "timeout": timedelta(seconds=seconds),
            "connect_timeout": timedelta(seconds=min(CONNECT_TIMEOUT, seconds)),
        }
        if self._authorities:
            client["root_certificate"] = self._authorities
        shared: dict[str, Any] = {
            "client_options": client,
            "retry_config": {
                "max_retries": retries,
                "retry_timeout": timedelta(seconds=seconds),
                "backoff": {
                    "init_backoff": timedelta(seconds=0.2),
                    "max_backoff": timedelta(seconds=5),
                    "base": 2,
                },
            },
        }
        given = {"endpoint": endpoint, "region": options.region, "account_name": options.account}
        shared |= {"skip_signature": True} if options.anonymous else {}
        try:
            if self.place.scheme == "gs":
                shared |= {"base_url": endpoint} if endpoint else {}
                return GCSStore(self.place.bucket, **shared)
            if self.place.scheme == "az":
                shared |= {name: given[name] for name in ("endpoint", "account_name") if given[name]}
                return AzureStore(self.place.bucket, **shared)
            shared |= {name: given[name] for name in ("endpoint", "region") if given[name]}
            shared |= {"unsigned_payload": not options.sign_payload, "virtual_hosted_style_request": virtual_host}
            shared["disable_bulk_delete"] = True  # not every server has it
            return S3Store(self.place.bucket, **_aws_credentials(options), **shared)
        except (BaseError, ValueError, TypeError, OSError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{self.place.url}: {str(error).partition(chr(10))[0][:200]}") from None


def _aws_credentials(options: Options) -> dict[str, Any]:
    """What obstore does not find itself: profiles of ~/.aws, with boto3 where they are more than a pair of keys."""
    profile = options.profile or os.environ.get("AWS_PROFILE", "")
    if options.anonymous or (not profile and any(os.environ.get(name) for name in _OTHER_AWS_CREDENTIALS)):
        return {}
    path = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials").expanduser()
    config = Path(os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config").expanduser()
    if not profile and not path.exists() and not config.exists():
        return {}  # the instance's own
    try:
        import boto3
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        return _keys_in(path, profile)
    try:
        return {"credential_provider": Boto3CredentialProvider(boto3.Session(profile_name=profile or None))}
    except (BotoCoreError, ValueError) as error:
        if not profile:  # the files hold no credentials: the instance's own
            return {}
        raise ConfigError(f"the AWS profile {profile} cannot be used: {error}") from None


def _keys_in(path: Path, profile: str) -> dict[str, Any]:
    parser = configparser.RawConfigParser()
    try:
        parser.read(path)
        section = parser[profile or "default"]
        keys = {"access_key_id": section["aws_access_key_id"], "secret_access_key": section["aws_secret_access_key"]}
        token = section.get("aws_session_token")
    except (KeyError, configparser.Error, OSError, ValueError):
        if not profile:
            return {}
        raise ConfigError(
            f"the AWS profile {profile} has no keys in {path}", hint="install boto3 for other kinds of profiles"
        ) from None
    return keys | ({"session_token": token} if token else {})


def _from_environment(names: tuple[str, ...]) -> str:
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


def _is_server(endpoint: str, http: bool) -> bool:
    try:
        parts = urlsplit(endpoint)
        _ = parts.port
    except ValueError:
        return False
    named = bool(parts.hostname) and parts.username is None and not parts.query and not parts.fragment
    return named and parts.scheme in (("https", "http") if http else ("https",))


def _is_loopback(endpoint: str) -> bool:
    try:
        host = urlsplit(endpoint).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read(path: str) -> bytes:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"ca_file {path}: {error.strerror}") from None
    if b"-----BEGIN CERTIFICATE-----" not in content:
        raise ConfigError(f"ca_file {path} holds no certificate", hint="PEM is expected")
    return content


def options_from(url: str, options: Mapping[str, object]) -> Options:
    """The settings, checked.

    Raises:
        ConfigError: one is unknown or out of range.
    """
    try:
        return msgspec.convert(dict(options), Options, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"options of {url}: {error}") from error
