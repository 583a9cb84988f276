"""An error raised in a servicer arrives at the caller as what it is."""

from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from ckptsvc.errors import BY_CODE, EXIT_STATUS, GRPC_STATUS, AgentUnavailable, CkptsvcError
from ckptsvc.rpc.channel import ERROR_KEY, OPTIONS, error_of, trailers_of

CODES = sorted(BY_CODE)


class Failing(grpc.GenericRpcHandler):
    """Ends every call with the error that the test has set."""

    error: CkptsvcError | None = None

    def service(self, details):
        def fail(request, context):
            if self.error is None:
                raise RuntimeError("a bug")
            status, details, trailers = trailers_of(self.error)
            context.set_trailing_metadata(trailers)
            context.abort(status, details)

        return grpc.unary_unary_rpc_method_handler(fail)


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    """(handler, call): a server and how to call it."""
    path = tmp_path_factory.mktemp("s") / "s"
    handler = Failing()
    server = grpc.server(ThreadPoolExecutor(2), handlers=[handler], options=OPTIONS)
    server.add_insecure_port(f"unix:{path}")
    server.start()
    with grpc.insecure_channel(f"unix:{path}", options=OPTIONS) as channel:
        yield handler, channel.unary_unary("/any/method")
    server.stop(0)


def failure_of(failing, error):
    handler, call = failing
    handler.error = error
    with pytest.raises(grpc.RpcError) as caught:
        call(b"", timeout=5)
    return caught.value


@pytest.mark.parametrize("code", CODES)
def test_every_error_arrives_as_itself(failing, code):
    sent = BY_CODE[code]("rank 3 cannot be read: größer als 5 €", hint="look at /a path")
    failure = failure_of(failing, sent)
    received = error_of(failure)
    assert type(received) is type(sent)
    assert (received.code, received.what, received.hint) == (code, sent.what, sent.hint)
    assert received.retryable == sent.retryable
    assert failure.code().name == GRPC_STATUS[code]


@pytest.mark.parametrize("code", ["damaged", "internal"])
def test_an_error_with_a_very_long_message_arrives(failing, code):
    for letter in ("w", "\0", "ü", "𝄞", "\ud800"):
        received = error_of(failure_of(failing, BY_CODE[code](letter * 100_000, hint=letter * 100_000)))
        assert type(received) is BY_CODE[code]
        assert len(received.what) >= 500


def test_a_bug_in_the_servicer_is_an_error_too(failing):
    received = error_of(failure_of(failing, None))
    assert received.code == "internal"
    assert "UNKNOWN" in received.what


def test_nobody_there(tmp_path):
    with (
        grpc.insecure_channel(f"unix:{tmp_path}/nobody", options=OPTIONS) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        channel.unary_unary("/any/method")(b"", timeout=5)
    assert isinstance(error_of(caught.value), AgentUnavailable)
    assert error_of(caught.value).retryable


class Ended(grpc.RpcError):
    """A call that has ended in some way."""

    def __init__(self, status, trailers=(), details="details"):
        self._status, self._trailers, self._details = status, trailers, details

    def code(self):
        return self._status

    def details(self):
        return self._details

    def trailing_metadata(self):
        return self._trailers


@pytest.mark.parametrize("status", ["UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED"])
def test_a_lost_connection_is_an_agent_that_is_not_there(status):
    assert error_of(Ended(grpc.StatusCode[status])).code == "agent-unavailable"


def test_and_so_is_what_grpc_says_when_it_breaks_under_a_stream():
    """Seen when an agent is killed while its launcher reads from it."""
    failure = Ended(grpc.StatusCode.INTERNAL, details="Internal error from Core")
    assert isinstance(error_of(failure), AgentUnavailable)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"{}", b'{"code": "damaged"}', b"\xff"])
def test_trailers_that_make_no_sense_are_passed_over(body):
    error = error_of(Ended(grpc.StatusCode.INTERNAL, ((ERROR_KEY, body),)))
    assert (error.code, error.what) == ("internal", "call failed: INTERNAL: details")


def test_a_code_of_a_newer_version_is_an_error_of_the_base_class():
    error = error_of(Ended(grpc.StatusCode.INTERNAL, ((ERROR_KEY, b'{"code": "new", "what": "w", "hint": "h"}'),)))
    assert (type(error), error.what, error.hint) == (CkptsvcError, "w", "h")


def test_every_code_has_a_status_of_each_kind():
    assert set(GRPC_STATUS) == set(EXIT_STATUS) == set(CODES)
    assert all(hasattr(grpc.StatusCode, status) for status in GRPC_STATUS.values())
