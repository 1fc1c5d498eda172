"""
The status page in a real browser: Chromium, driven by chromedriver through Selenium.

Nothing is downloaded, and the page is all that the browser may visit.
"""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest
from tests.clients.harness import need, need_module
from tests.conftest import LOCALHOST, Client, eventually, exchange
from tests.monitor.watched import Watched

from socks5srv.protocol import Command

# A browser takes its time to start.
pytestmark = pytest.mark.timeout(180)

SWITCHES = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--disable-features=NetworkTimeServiceQuerying,OptimizationHints", "--hide-scrollbars", "--window-size=1280,900",
]

Show = Callable[[Watched], "Browser"]
Talk = Callable[..., Client]


class Browser:
    """A page as it is shown."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def script(self, text: str, *arguments: Any) -> Any:
        return self.driver.execute_script(text, *arguments)

    def texts(self, selector: str) -> List[str]:
        return self.of_all(selector, "e.textContent.trim()")

    def of_all(self, selector: str, expression: str) -> List[Any]:
        """This of all elements `e` that are so selected."""
        return list(self.script(f"return [...document.querySelectorAll(arguments[0])].map((e) => {expression})", selector))

    def text(self, selector: str) -> str:
        return self.texts(selector)[0]

    def labels(self) -> List[str]:
        """Of the arrows, for those who cannot see them."""
        return self.of_all("[data-step]", "e.getAttribute('aria-label')")

    def arrow(self, words: str) -> Any:
        """The arrow with these words in its label, as soon as it is there."""
        eventually(lambda: [label for label in self.labels() if words in label])
        return self.find(f"[data-step][aria-label*={json.dumps(words)}]")

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def press(self, *keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(*keys)

    def emulate(self, width: int = 1280, height: int = 900, **features: str) -> None:
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in features.items()]})
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500})

    def complaints(self) -> List[Dict[str, Any]]:
        """What it has written into its console."""
        return list(self.driver.get_log("browser"))


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chromium, chromedriver = need("chromium"), need("chromedriver")
    webdriver, service_module = need_module("selenium.webdriver"), need_module("selenium.webdriver.chrome.service")
    directory = tmp_path_factory.mktemp("browser")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for switch in [*SWITCHES, f"--user-data-dir={directory / 'data'}"]:
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = service_module.Service(chromedriver, env={**os.environ, "HOME": str(directory)})
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture
def show(driver: Any) -> Iterator[Show]:
    """Have the browser show a page; whatever its console complains of is a failure."""
    browser = Browser(driver)

    def shown(page: Watched) -> Browser:
        browser.emulate()
        driver.get(page.page.url)
        eventually(lambda: browser.text("#state-text") == "live")
        return browser

    yield shown
    complaints = browser.complaints()
    driver.get("about:blank")       # or the page would go on to look for a server that has gone
    assert complaints == []


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> None:
    """The driver's connection stays open from test to test, so that here nobody counts."""


@pytest.fixture
def talk(new_client: Any, echo: Any) -> Talk:
    """A client that has a tunnel: ``talk(page, user, host=)``."""
    def talking(page: Watched, user: str = "", host: str = LOCALHOST) -> Client:
        client: Client = new_client(page)
        assert client.log_in(user, "sesame") if user else client.greet()
        assert client.request(Command.CONNECT, (host, echo[1])).code == 0
        return client

    return talking


def test_the_page_loads_and_says_whose_it_is(page: Watched, show: Show) -> None:
    browser = show(page)
    address = f"socks5h://127.0.0.1:{page.server_address[1]}"
    assert browser.text("h1") == address
    assert address in browser.driver.title
    assert re.match(r"up \d+ s · no authentication · CONNECT, BIND, UDP ASSOCIATE$", browser.text("#about"))
    assert re.match(r"\d+\.\d+\.\d+$", browser.text("#version"))
    assert browser.text("#try") == f"curl -x {address} example.com"
    visited = browser.script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert visited
    assert all(name.startswith(page.page.url) for name in visited)


def test_a_session_appears_while_it_is_open_and_goes_when_it_closes(watch: Any, show: Show, talk: Talk, echo: Any) -> None:
    page = watch(users={"anna": "sesame"})
    browser = show(page)
    assert browser.texts("#rows tr") == []
    client = talk(page, "anna", "localhost")
    eventually(lambda: browser.texts("#rows .destination") == [f"localhost:{echo[1]}"])
    eventually(lambda: browser.text("#rows .peer") == "→ {}:{}".format(*echo))
    assert browser.text("#rows .client") == "{}:{}".format(*client.socket.getsockname())
    assert browser.text("#rows .user") == "anna"
    exchange(client, b"x" * 1500)
    eventually(lambda: browser.texts("#rows .up span") == ["1.5 kB"])
    client.close()
    eventually(lambda: browser.texts("#rows tr") == [])
    assert not browser.find("#sessions").is_displayed()
    assert browser.find("#sessions-empty").is_displayed()


def test_rates_change_and_so_does_the_plot(page: Watched, show: Show, talk: Talk) -> None:
    browser = show(page)
    before = browser.find("#line-up").get_attribute("d")
    client = talk(page)
    assert browser.text("#rate-up") == "0 B/s"

    def moving() -> bool:
        exchange(client, b"x" * 30000)
        return browser.text("#rate-up") != "0 B/s" and browser.texts("#rows .up.moving small") not in ([], ["0 B/s"])

    eventually(moving)
    assert browser.find("#line-up").get_attribute("d") != before
    assert re.match(r"Up at most .*B/s, now .*B/s\. Down at most .*B/s", browser.text("#plot-text"))
    eventually(lambda: browser.text("#rate-up") == "0 B/s")


def test_a_click_on_an_arrow_shows_the_fields_of_its_message(page: Watched, show: Show, talk: Talk, echo: Any) -> None:
    browser = show(page)
    talk(page, host="localhost")
    browser.arrow("REQUEST").click()
    assert browser.text("#detail h3") == "REQUEST"
    assert browser.texts(".picture thead th") == ["VER", "CMD", "RSV", "ATYP", "DST.ADDR", "DST.PORT"]
    *first, _host, port = browser.texts(".picture tbody tr:last-child td")
    assert [*first, port] == ["05", "01", "00", "03", echo[1].to_bytes(2, "big").hex(" ")]
    assert "localhost" in browser.texts(".fields td")
    assert browser.find("[data-step][aria-pressed=true]").get_attribute("aria-label") == browser.arrow("REQUEST").get_attribute("aria-label")


def test_the_resolver_has_a_lane_if_it_was_asked(page: Watched, show: Show, talk: Talk) -> None:
    talk(page)
    browser = show(page)
    browser.arrow("REPLY")
    assert browser.texts("#diagram .head") == ["client", "proxy", "target"]
    talk(page, host="localhost")
    eventually(lambda: len(browser.texts("nav li")) == 2)
    browser.find("nav li:first-child button").click()
    eventually(lambda: browser.texts("#diagram .head") == ["client", "proxy", "resolver", "target"])
    assert [label.partition(": ")[0].partition(", ")[2] for label in browser.labels()][3:6] == ["proxy to resolver", "resolver to proxy", "proxy to target"]
    starts = browser.of_all("#diagram .arrow", "Math.round(e.getBBox().x)")
    lanes = [round(float(x)) for x in browser.of_all("#diagram .lane", "e.getAttribute('x1')")]
    assert lanes == sorted(lanes)
    assert all(lanes[1] < x < lanes[2] for x in starts[3:6])        # of the look-up and of the connection, from the proxy's lane
    widths = browser.of_all("#diagram .arrow", "Math.round(e.getBBox().width)")
    assert widths[3] == widths[4] < lanes[2] - lanes[1] < widths[5]


def test_a_conversation_that_is_chosen_stays_while_others_come(page: Watched, show: Show, talk: Talk, echo: Any, new_client: Any, refusing: Any) -> None:
    new_client(page).ask(Command.CONNECT, refusing())
    talk(page)
    browser = show(page)
    eventually(lambda: browser.texts("nav strong span") == [f"#2 127.0.0.1:{echo[1]}", browser.texts("nav strong span")[-1]])
    assert all(re.match(r"\d\d:\d\d:\d\d$", text) for text in browser.texts("nav time"))
    browser.find("nav li:last-child button").click()
    browser.arrow("REPLY connection refused")
    talk(page)
    eventually(lambda: len(browser.texts("nav li")) == 3)
    assert browser.of_all("nav [aria-current=true]", "e.parentNode.dataset.id") == ["1"]
    assert browser.find("#diagram svg").get_attribute("aria-label").startswith("Conversation 1 in ")
    assert re.match("(?i)connection refused · failed \\(reply 05\\)$", browser.texts("nav small")[-1])      # the reason first, without the address
    assert re.match("(?i)#1 · .* · client 127.* · CONNECT 127.* · failed .* connection refused$", browser.text("#told"))
    assert [text.partition(" ")[0] for text in browser.texts("#diagram .bad .label")] == ["not", "REPLY"]


def test_the_keyboard_does_as_well(page: Watched, show: Show, talk: Talk) -> None:
    talk(page)
    browser = show(page)
    browser.arrow("REPLY")
    browser.find("body").click()
    for _ in range(30):
        browser.press("\ue004")     # Tab
        if browser.script("return document.activeElement.dataset.step") == "0":
            break
    else:
        raise AssertionError("Tab does not lead to the arrows")
    browser.press("\ue007")         # Enter
    assert browser.text("#detail h3") == "GREETING"
    browser.press("\ue015")         # the arrow key down
    browser.press(" ")
    assert browser.text("#detail h3") == "METHOD SELECTION"
    assert browser.script("return getComputedStyle(document.activeElement.querySelector('.hit')).strokeWidth") == "2px"


def test_an_update_takes_neither_the_focus_nor_the_place(page: Watched, show: Show, talk: Talk) -> None:
    talk(page)
    browser = show(page)
    browser.emulate(height=400)
    browser.arrow("REPLY")
    browser.script("document.querySelector('[data-step=\"1\"]').focus(); scrollTo(0, 500)")
    place = browser.script("return scrollY")
    browser.script("window.kept = document.querySelector('#rows tr')")
    before = browser.text("#about")
    exchange(talk(page))
    eventually(lambda: len(browser.texts("nav li")) == 2 and browser.text("#about") != before)
    assert browser.script("return document.activeElement.dataset.step") == "1"
    assert browser.script("return window.kept === document.querySelector('#rows tr')")
    assert abs(browser.script("return scrollY") - place) < 120      # what has become longer above it


@pytest.mark.parametrize("text", ["<img src=x onerror=document.title='pwned'>", "</script><script>document.title='pwned'</script>", "\"'><svg/onload=document.title='pwned'>"])
def test_a_hostile_name_is_text(watch: Any, show: Show, talk: Talk, text: str) -> None:
    page = watch(users={text: "sesame"})
    client = talk(page, text)
    browser = show(page)
    eventually(lambda: browser.texts("#rows .user") == [text])
    browser.arrow(text[:4])
    browser.arrow("PASSWORD").click()
    assert browser.text("#detail h3") == "USERNAME/PASSWORD"
    client.close()
    eventually(lambda: any(text in line for line in browser.texts("nav small")))
    assert browser.script("return [document.images.length, document.scripts.length]") == [1, 1]     # the page's own
    assert "pwned" not in browser.driver.title


def test_the_counters_are_shown(watch: Any, show: Show, talk: Talk, new_client: Any) -> None:
    page = watch(users={"anna": "sesame"})
    assert not new_client(page).log_in("anna", "wrong")
    stranger = new_client(page)
    stranger.send(b"GET / HTTP/1.0\r\n\r\n")
    stranger.rest()
    talk(page, "anna").close()
    browser = show(page)

    def tiles() -> Dict[str, str]:
        return dict(zip(browser.texts("#counters dt"), browser.texts("#counters dd")))

    eventually(lambda: tiles()["Connections"] == "3" and tiles()["Open now"] == "0")
    assert tiles()["Failed logins"] == "1"
    eventually(lambda: sorted(browser.texts("#by-event dt")) == ["bad protocol", "login failed", "served"])
    assert browser.texts("#by-failure dt") == ["http"]
    assert browser.texts("#by-reply dt") == ["succeeded"]


def test_it_says_when_the_server_is_gone_and_when_it_is_back(page: Watched, driver: Any) -> None:
    browser = Browser(driver)
    driver.get(page.page.url)
    for again in range(2):
        eventually(lambda: browser.text("#state-text") == "live")
        if again:
            page.page.socket.shutdown(socket.SHUT_RDWR)
        page.page.hang_up()
        eventually(lambda: browser.text("#state-text") == "disconnected")
    driver.get("about:blank")
    browser.complaints()            # it tells of each attempt


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 820, 360])
def test_it_fits_and_can_be_read(page: Watched, show: Show, talk: Talk, scheme: str, width: int, tmp_path: Path) -> None:
    exchange(talk(page, host="localhost"))
    browser = show(page)
    browser.emulate(width, color_scheme=scheme, reduced_motion="reduce")
    drawn = "const svg = document.querySelector('#diagram svg'); return svg && svg.viewBox.baseVal.width === svg.parentNode.clientWidth"
    eventually(lambda: browser.script(drawn))       # it is drawn again where there is less room
    browser.arrow("REQUEST").click()
    assert browser.script("return document.documentElement.scrollWidth") <= width
    # Labels are whole, within the diagram, and no lane runs through one: each has a ground of its own.
    assert browser.texts("#diagram g:not(.note) .label") == browser.texts("#diagram g:not(.note) title")
    boxes = browser.of_all("#diagram g", "['.label', '.ground'].flatMap((name) => { const box = e.querySelector(name).getBBox(); return [box.x, box.x + box.width, box.y, box.y + box.height]; })")
    drawn_width = browser.script("return document.querySelector('#diagram svg').viewBox.baseVal.width")
    for left, right, top, bottom, *ground in boxes:
        assert 0 <= ground[0] < left < right < ground[1] <= drawn_width
        assert ground[2] < top < bottom <= ground[3] + 1
    colors = browser.script("""
        const lightness = (text) => text.match(/[0-9.]+/g).slice(0, 3).map(Number).map((c) => c / 255)
            .map((c) => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4).reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
        const back = getComputedStyle(document.querySelector(".card")).backgroundColor;
        return ["h1", ".muted", ".legend b", "#rows .up small", "#rows .peer", ".fields td", "nav small", ".diagram .label"].map((selector) => {
            const style = getComputedStyle(document.querySelector(selector));
            const [a, b] = [lightness(selector.includes("diagram") ? style.fill : style.color), lightness(back)].sort((x, y) => y - x);
            return [selector, (a + .05) / (b + .05)];
        });
    """)
    assert [selector for selector, contrast in colors if contrast < 4.5] == []
    assert (browser.script("return getComputedStyle(document.body).backgroundColor") == "rgb(16, 19, 22)") == (scheme == "dark")
    assert browser.script("return getComputedStyle(document.querySelector('#rows tr')).animationName") == "none"
    assert browser.script("return document.getAnimations().length") == 0
    picture = tmp_path / f"{scheme}-{width}.png"
    browser.driver.save_screenshot(str(picture))
    assert picture.stat().st_size > 10_000


def test_a_screen_reader_finds_its_way(page: Watched, show: Show, talk: Talk) -> None:
    talk(page)
    browser = show(page)
    browser.arrow("REQUEST")
    tree = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    found = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node.get("ignored") and "role" in node]
    for role, name in [
        ("banner", ""), ("main", ""), ("contentinfo", ""), ("navigation", "The last conversations"), ("complementary", "The chosen message"),
        ("table", "Open connections"), ("columnheader", "Destination"), ("columnheader", "Up"),
    ]:
        assert (role, name) in found, (role, name)
    assert next(name for role, name in found if role == "heading").startswith("socks5h://")
    assert any(role in ("img", "image", "graphics-document") and name.startswith("Throughput") for role, name in found)
    buttons = [name for role, name in found if role in ("button", "togglebutton", "ToggleButton")]
    assert any(re.match(r"1, client to proxy: GREETING .*, after [0-9.]+ ms", name) for name in buttons)
    assert all(name for name in buttons)
    unnamed = browser.script("return [...document.querySelectorAll('a, button, [role=button], [role=img]')].filter((e) => !(e.textContent.trim() || e.getAttribute('aria-label') || e.getAttribute('aria-labelledby'))).length")
    assert unnamed == 0
