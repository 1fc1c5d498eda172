"""Which warnings may be logged now."""

from __future__ import annotations

from typing import Any

from socks5srv.ratelimit import RateLimit

from .conftest import eventually


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


# --- in the server ---

def test_the_same_mistake_is_logged_once_and_the_next_line_of_it_says_how_many_were_left_out(
        start_server: Any, new_client: Any, caplog: Any) -> None:
    caplog.set_level("INFO", "socks5srv")
    server = start_server()

    def come() -> None:
        client = new_client(server)
        client.send(b"GET / HTTP/1.1\r\n\r\n")
        client.rest()
        server.next_ended()

    for _ in range(5):
        come()
    assert caplog.text.count("this is HTTP") == 1
    server.rate_limit.interval = 0.0
    come()
    come()
    first, second, third = [record for record in caplog.records if "this is HTTP" in record.getMessage()]
    assert second.getMessage().endswith(" (and 4 more since the last line like this)")
    assert [record.left_out for record in (first, second, third)] == [0, 4, 0]
    for record in (first, third):
        assert "more" not in record.getMessage()


def test_trouble_with_clients_that_are_turned_away_is_counted_as_well(start_server: Any, new_client: Any, caplog: Any) -> None:
    server = start_server(max_clients=1)
    new_client(server).greet()
    for _ in range(4):
        assert new_client(server).rest() == b""
    server.rate_limit.interval = 0.0
    assert new_client(server).rest() == b""
    first, second = eventually(lambda: [record for record in caplog.records if "limit of" in record.getMessage()][1:] and caplog.records[-2:])
    assert "since" not in first.getMessage()
    assert second.getMessage().endswith(" (and 3 more since the last line like this)")
    assert second.facts == {"left_out": 3}
