"""Whose an address is."""

from __future__ import annotations

import errno

import pytest

from socks5srv import locality

from .conftest import LOCALHOST, address_of, eventually, needs_ipv6, needs_neighbour
from .networks import LO, add_address, be_a_router, let_any_address_be_bound


@pytest.fixture(params=["asked", "guessed"])
def asked_or_guessed(request, monkeypatch):
    """Both ways to know an own address: the second is that of systems other than Linux, and of some sandboxes."""
    if request.param == "guessed":
        monkeypatch.setattr(locality, "kernel_answers", lambda: False)
    elif not locality.kernel_answers():
        pytest.skip("not on this platform: routes to ask the kernel for")
    return request.param


@pytest.mark.usefixtures("asked_or_guessed")
@pytest.mark.parametrize(("host", "own"), [
    (LOCALHOST, True), ("0.0.0.0", True), pytest.param("::1", True, marks=needs_ipv6), pytest.param("::", True, marks=needs_ipv6),
    pytest.param("127.0.0.2", True, marks=needs_neighbour), ("::ffff:127.0.0.1", True), ("192.0.2.1", False), ("2001:db8::1", False),
    ("fe80::1", False), ("fe80::1%nowhere", False),
])
def test_own_addresses_are_those_that_this_computer_answers_to(host, own):
    assert locality.is_own_address(host) is own


@pytest.mark.usefixtures("own_network")
def test_an_address_is_not_an_own_one_because_the_system_lets_programs_bind_it(asked_or_guessed):
    add_address(LO, "fd66::1", 64)
    let_any_address_be_bound()
    eventually(lambda: locality.is_own_address("fd66::1"))
    assert locality.is_own_address(LOCALHOST)
    assert locality.is_own_address("127.0.0.2") is (asked_or_guessed == "asked")     # it would go out from 127.0.0.1
    for host in ("192.0.2.1", "2001:db8::1", "fd66::2"):
        assert locality.can_be_bound(address_of((host, 0)))
        assert not locality.is_own_address(host)


@pytest.mark.usefixtures("own_network")
def test_the_anycast_addresses_of_a_router_are_its_own():
    be_a_router()
    add_address(LO, "fd66::1", 64)
    eventually(lambda: locality.is_own_address("fd66::1"))
    assert locality.is_own_address("fd66::")
    assert not locality.is_own_address("fd66::2")


@pytest.mark.usefixtures("asked_or_guessed")
@pytest.mark.parametrize(("host", "heard"), [
    (LOCALHOST, True), pytest.param("::1", True, marks=needs_ipv6), ("192.0.2.1", False), ("2001:db8::1", False), ("255.255.255.255", True),
    pytest.param("127.255.255.255", True, marks=needs_neighbour),
])
def test_what_is_sent_to_all_of_a_network_is_heard_here_too(host, heard):
    assert locality.is_heard_here(host) is heard
    assert locality.is_own_address(host) is (heard and not host.endswith("255"))


@pytest.mark.parametrize(("code", "answers"), [(errno.EAFNOSUPPORT, False), (errno.EPERM, False), (errno.EMFILE, None)])
def test_a_sandbox_that_keeps_the_routes_from_us_is_no_failure_but_a_lack_of_descriptors_is(monkeypatch, code, answers):
    def refuse(_address):
        raise OSError(code, "")

    monkeypatch.setattr(locality, "ask_kernel", refuse)
    locality.kernel_answers.cache_clear()
    try:
        if answers is None:
            with pytest.raises(OSError, match=str(code)):       # or an own address would be taken for a foreign one
                locality.is_own_address(LOCALHOST)
        else:
            assert locality.kernel_answers() is answers
            assert locality.is_own_address(LOCALHOST)
    finally:
        locality.kernel_answers.cache_clear()
