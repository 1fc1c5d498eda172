"""Which warnings may be logged now."""

from __future__ import annotations

from socks5srv.ratelimit import RateLimit


def test_of_too_many_kinds_the_one_that_was_logged_longest_ago_is_forgotten() -> None:
    limit = RateLimit()
    limit.kinds_kept = 3
    for kind in "abc":
        assert limit.allows(kind) == 0
        assert limit.allows(kind) is None
    limit.interval = 0.0
    assert limit.allows("a") == 1       # which is the newest now
    limit.interval = 60.0
    assert limit.allows("d") == 0       # and b goes
    assert set(limit.kinds) == {"c", "a", "d"}
    assert limit.allows("c") is None
    assert limit.allows("b") == 0
    for number in range(1000):
        limit.allows(str(number))
    assert len(limit.kinds) == 3


def test_what_another_process_has_logged_is_not_logged_here_and_changes_no_count() -> None:
    limit = RateLimit()
    limit.logged("a")
    assert limit.allows("a") is None
    limit.logged("a")
    assert limit.allows("a") is None
    limit.interval = 0.0
    assert limit.allows("a") == 2
