"""What has been found out, as sentences."""

from __future__ import annotations

import errno
import os
from typing import Any, List, Optional

import pytest

from socks5srv.explain import reasons
from socks5srv.observer import Attempt
from socks5srv.protocol import Address, LoginFailed, Method, ReplyCode, RequestFailed, Socks5Error
from socks5srv.rules import Rule, Verdict

PLACE = Address.numeric("192.0.2.1", 80)
REFUSED = os.strerror(errno.ECONNREFUSED)


@pytest.mark.parametrize(("attempt", "words"), [
    (Attempt(PLACE, 0.0, 0.0125, connected=True), "192.0.2.1:80 connected after 12.5 ms"),
    (Attempt(PLACE, 0.0, 0.001, OSError(errno.ECONNREFUSED, REFUSED)), f"192.0.2.1:80 ECONNREFUSED ({REFUSED}) after 1.0 ms"),
    (Attempt(PLACE, 0.0, 0.001, ValueError("\n")), "192.0.2.1:80 \\n after 1.0 ms"),
    *[(Attempt(PLACE, 0.0, seconds), "192.0.2.1:80 did not answer before this was decided") for seconds in (0.001, None)],
    (Attempt(PLACE, 0.0, None, RequestFailed(ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED, "no IPv6")), "192.0.2.1:80 impossible (no IPv6)"),
])
def test_what_became_of_an_attempt(attempt: Attempt, words: str) -> None:
    assert reasons.about_attempts([attempt]) == [f"Tried: {words}"]


def test_many_addresses_are_shortened() -> None:
    attempts = [Attempt(PLACE, 0.0)] * 9
    assert reasons.about_attempts(attempts)[0].endswith(" ..")
    assert reasons.about_attempts([]) == []
    assert " and 2 more (" in reasons.about_look_up("example.com", [f"192.0.2.{n}" for n in range(10)], 0.1)
    verdicts = [Verdict(PLACE._replace(port=port), "no") for port in range(9)]
    assert reasons.about_rules(verdicts)[0].endswith(" ..")
    assert reasons.about_rules([verdicts[0]] * 9) == ["Rules: 192.0.2.1:0 refused (no)"]


def test_which_rule_has_decided() -> None:
    assert reasons.about_rules([Verdict(PLACE)]) == ["Rules: allowed, as no rule forbids it."]
    allowed = Verdict(PLACE, rule=Rule.parse("allow :80"))
    both = "192.0.2.1:80 allowed (rule: allow :80), 192.0.2.1:80 allowed (no rule forbids it)"
    assert reasons.about_rules([allowed, Verdict(PLACE)]) == [f"Rules: {both}"]


@pytest.mark.parametrize(("method", "facts", "words"), [
    (0x00, {}, "this proxy has no users"), (0x00, {"trusted": True, "has_users": True}, "clients of this network need no authentication"),
    (0x00, {"has_users": True}, None), (0x02, {"trusted": True}, None), (0x80, {}, None),
    (0x02, {"has_users": True}, "it never picks 00"),
    (0xFF, {"wanted": Method.USERNAME_PASSWORD, "error": Socks5Error("why")}, "wanted 02, which METHODS has not got: why."),
    (0xFF, {"error": Socks5Error("why")}, "Why: why."),
])
def test_why_a_method_is_selected(method: int, facts: Any, words: Optional[str]) -> None:
    facts = {"trusted": False, "has_users": False, "wanted": None, "error": None, **facts}
    found: List[str] = reasons.about_method(method, **facts)
    assert [words in text for text in found[:1]] == [True] * (words is not None)     # type: ignore[operator]


def test_the_wrong_name_and_the_wrong_password_are_told_alike() -> None:
    assert "Both get the same answer" in reasons.about_login(None, LoginFailed(reasons.WRONG, "anna"))[0]
    assert reasons.about_login(None, None)[0] == "Why: its method says so."
