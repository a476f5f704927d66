"""Network errors: which are worth another try, and how long to wait before it."""

import errno
import socket
import time

import httpx
import httpx2
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from groupsae.data.hub import HubSource
from groupsae.runtime.errors import UserError
from groupsae.runtime.retry import (
    hub_is_unknown,
    is_network_error,
    is_transient,
    network_cause,
    retrying,
)
from tests.helpers.lms import frozen


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


# ---- no network at all ------------------------------------------------------------------------


def look_up(monkeypatch, *answers):
    """Answer the look-ups of names in this order, the last one for ever: an error is raised."""
    left = list(answers)

    def getaddrinfo(*_, **__):
        if (answer := left.pop(0) if len(left) > 1 else left[0]) is not None:
            raise answer
        return []

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


LOST = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


def test_the_hub_is_unknown_if_its_name_is_not_found_twice(monkeypatch, pauses):
    look_up(monkeypatch, LOST, LOST)
    assert hub_is_unknown()
    assert sum(pauses) == 1
    look_up(monkeypatch, LOST, None)  # a glitch
    assert not hub_is_unknown()
    look_up(monkeypatch, None)
    assert not hub_is_unknown()


def test_a_proxy_looks_names_up_itself(monkeypatch, pauses):
    look_up(monkeypatch, LOST)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert not hub_is_unknown()


def test_without_network_a_model_and_a_data_set_are_refused_at_once(monkeypatch, pauses):
    look_up(monkeypatch, LOST)
    with pytest.raises(UserError, match="cannot load model 'no-one/no-model'"):
        frozen("no-one/no-model")
    with pytest.raises(UserError, match="no-one/no-data: there is no network"):
        next(HubSource(name="no-one/no-data").documents())
    assert pauses == [1, 0] * 2  # no other library waits
