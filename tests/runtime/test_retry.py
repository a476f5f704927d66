"""Network errors: which are worth another try, and how long to wait before it."""

import errno
import time

import httpx
import httpx2
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from groupsae.runtime.retry import is_network_error, is_transient, network_cause, retrying


@pytest.fixture
def pauses(monkeypatch):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def answered(status, library=httpx2, **headers):
    request = library.Request("GET", "http://localhost")
    answer = library.Response(status, headers=headers, request=request)
    return library.HTTPStatusError("", request=request, response=answer)


def fail(error, retries):
    """Raise the error at every try; return what was reported before each pause."""
    reported = []

    def call():
        raise error

    with pytest.raises(type(error)) as raised:
        retrying(retries, is_transient, lambda s: reported.append(s.attempt_number))(call)
    assert raised.value is error
    return reported


def test_pauses_grow_to_a_minute(pauses):
    assert fail(ConnectionError(), 8) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]


def test_a_permanent_error_is_not_tried_again(pauses):
    assert fail(FileNotFoundError(), 8) == pauses == []


@pytest.mark.parametrize(
    ("wish", "pause"), [("30", 30), ("0", 2), ("99999", 3600), ("soon", 2), ("", 2)]
)
def test_the_server_decides_the_pause_up_to_an_hour(wish, pause, pauses):
    error = ConnectionError()
    error.__cause__ = answered(503, **{"Retry-After": wish})
    fail(error, 2)
    assert pauses[1] == pause


def test_a_network_error_is_found_behind_other_errors():
    lost, gone = httpx2.ReadTimeout(""), answered(404)
    for inner, found in ((lost, lost), (gone, None), (None, None)):
        error = OSError("cannot load")
        error.__cause__ = inner
        assert network_cause(error) is found
    assert is_transient(lost)
    assert is_network_error(lost)
    assert is_network_error(httpx.ReadTimeout(""))
    assert not is_network_error(OSError())


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (httpx.ReadTimeout(""), True),
        (answered(503, httpx), True),
        (answered(429, httpx), True),
        (answered(404, httpx), False),
        (answered(401, httpx), False),
        (OfflineModeIsEnabled(""), False),
        (FileNotFoundError(), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (OSError(errno.EMFILE, "Too many open files"), False),
        (OSError(errno.EIO, "Input/output error"), True),
        (ValueError(), False),
    ],
)
def test_only_errors_that_may_pass_are_transient(error, transient):
    assert is_transient(error) is transient
