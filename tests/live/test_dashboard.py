"""The dashboard in headless Chromium, in front of a real cluster that has work: what it shows is what the cluster says, in
light and dark, wide and narrow, and it goes on when the cluster comes back."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from tests.live.chromium import open_browser, set_screen
from tests.live.harness import Client, Cluster

OPTIONS = ("--engine", "simulated", "--prefill", "1", "--decode", "2", "--slo-ttft-s", "5", "--cors-origins", "*")
WAIT_S = 30.0


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    opened = open_browser(tmp_path_factory.mktemp("chromium"))
    try:
        yield opened
    finally:
        opened.quit()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(*OPTIONS) as started:
        yield started


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.1)
    return found


def text(browser: Chrome, selector: str) -> str:
    return browser.find_element(By.CSS_SELECTOR, selector).text


def numbers(browser: Chrome) -> dict[str, str]:
    script = "return [...document.querySelectorAll('#numbers > div')].map(e => [...e.children].map(c => c.textContent))"
    return {name: value.strip() for name, value in browser.execute_script(script)}


def rows(browser: Chrome, table: str) -> dict[str, dict[str, str]]:
    """Cells by their label, of each row by its first cell."""
    script = (
        "return [...document.querySelectorAll(`#${arguments[0]} tbody tr`)]"
        ".map(r => Object.fromEntries([...r.children].map(c => [c.dataset.label, c.textContent])))"
    )
    return {row["Name"]: row for row in browser.execute_script(script, table)}


def errors(browser: Chrome) -> list[Any]:
    return [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def serve(cluster: Cluster, count: int, num_tokens: int) -> None:
    async def scenario() -> None:
        async with Client(cluster) as client:
            streams = [client.complete([100] * 600 + [at] * 40, num_tokens, seed=at) for at in range(count)]
            for found in await asyncio.gather(*streams):
                assert found.error == ""

    asyncio.run(scenario())


def test_the_page_shows_what_the_cluster_says(browser: Chrome, cluster: Cluster) -> None:
    set_screen(browser, 1280, 900, dark=False)
    browser.get(f"{cluster.url}/dashboard")
    until(lambda: text(browser, "#state") == "ready", "the state")
    serve(cluster, 6, 120)
    until(lambda: numbers(browser)["TTFT met"] == "100 % of 6", "the requests")
    status = httpx.get(f"{cluster.url}/admin/status").json()
    assert text(browser, "h1") == f"Mooncake {cluster.name}" and status["model"] in text(browser, "#about")
    assert numbers(browser)["Not served"] == "0 of 6" and not numbers(browser)["Prompt reused"].startswith("–")
    shown = rows(browser, "instances")
    assert list(shown) == ["prefill-0", "decode-0", "decode-1"]
    assert {row["State"] for row in shown.values()} == {"ready"}
    assert "of the last 5 min" in text(browser, "#ttft-note") and "objective 5 s" in text(browser, "#ttft")
    assert "computed" in text(browser, "#reuse") and "HBM" in text(browser, "#reuse")
    assert "node-0" in rows(browser, "nodes") and "placed\n6" in text(browser, "#answers")
    for chart in ("ttft", "tbt", "queue", "output"):
        path = browser.find_element(By.CSS_SELECTOR, f"#{chart} path.series").get_attribute("d")
        assert path and path.startswith("M"), chart
        labels = [each.text for each in browser.find_elements(By.CSS_SELECTOR, f"#{chart} text")]
        assert "now" in labels and "−5 min" in labels and len(labels) == 11, chart
    assert errors(browser) == []


_ASK = """
const [url, done] = arguments;
const body = {model: "MODEL", prompt: "Hello", max_tokens: 8, stream: true, ignore_eos: true};
const asked = {method: "POST", headers: {"content-type": "application/json"}, body: JSON.stringify(body)};
(async () => {
  const answer = await fetch(`${url}/v1/completions`, asked);
  const text = await answer.text();
  const admin = await fetch(`${url}/admin/status`);
  done([answer.status, answer.headers.get("x-mooncake-decode"), text.trim().split("\\n\\n").length, admin.status]);
})().catch(error => done([String(error)]));
"""


def test_a_page_of_another_origin_may_generate_and_not_operate(
    browser: Chrome, cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "page.html").write_text("elsewhere")
    elsewhere = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
    try:
        browser.get(f"http://127.0.0.1:{elsewhere.server_port}/page.html")
        script = _ASK.replace("MODEL", cluster.config["model_name"])
        status, decode, num_events, admin = browser.execute_async_script(script, cluster.url)
    finally:
        elsewhere.shutdown()
        elsewhere.server_close()
    assert (status, admin) == (200, 403) and decode.startswith("decode-") and num_events >= 3
    browser.get_log("browser")  # it notes the 403


def test_it_follows_an_instance_that_is_drained(browser: Chrome, cluster: Cluster) -> None:
    browser.get(f"{cluster.url}/dashboard")
    httpx.post(f"{cluster.url}/admin/drain/decode-1").raise_for_status()
    until(lambda: rows(browser, "instances").get("decode-1", {}).get("State") == "drained", "the drained instance")
    httpx.post(f"{cluster.url}/admin/undrain/decode-1").raise_for_status()
    until(lambda: rows(browser, "instances")["decode-1"]["State"] == "ready", "the instance")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_can_be_read_wide_and_narrow_light_and_dark(
    browser: Chrome, cluster: Cluster, tmp_path: Path, width: int, dark: bool
) -> None:
    set_screen(browser, width, 900, dark=dark)
    browser.get(f"{cluster.url}/dashboard")
    until(lambda: text(browser, "#state") == "ready" and rows(browser, "instances"), "the page")
    page = "const page = document.documentElement; return [innerWidth, page.scrollWidth - page.clientWidth]"
    assert browser.execute_script(page) == [width, 0], "nothing is cut off"
    outside = browser.execute_script(
        "return [...document.querySelectorAll('main *')].filter(e => { const r = e.getBoundingClientRect();"
        "return r.width && (r.right > innerWidth + 1 || r.left < -1); }).map(e => e.outerHTML.slice(0, 80))"
    )
    assert outside == []
    assert contrast(browser, "body", "body") >= 7 and contrast(browser, ".note", "section") >= 4.5
    picture = tmp_path / "dashboard.png"
    browser.get_screenshot_as_file(str(picture))
    assert picture.stat().st_size > 10_000


def contrast(browser: Chrome, foreground: str, background: str) -> float:
    """As WCAG defines it."""
    script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]].match(/[0-9]+/g).map(Number)"
    lights = []
    for selector, name in ((foreground, "color"), (background, "backgroundColor")):
        parts = [value / 255 for value in browser.execute_script(script, selector, name)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_it_asks_nobody_else(browser: Chrome, cluster: Cluster) -> None:
    browser.get(f"{cluster.url}/dashboard")
    until(lambda: rows(browser, "instances"), "the page")
    fetched = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert len(fetched) >= 5 and all(name.startswith(cluster.url) for name in fetched)


def test_from_elsewhere_it_asks_for_the_token(browser: Chrome, cluster: Cluster) -> None:
    """Reached by a name that is not this machine's, as through a proxy or a tunnel."""
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.setExtraHTTPHeaders", {"headers": {"x-forwarded-for": "203.0.113.7"}})
    try:
        browser.get(f"{cluster.url}/dashboard")
        until(lambda: browser.find_element(By.ID, "door").is_displayed(), "the form")
        assert "this machine only" in text(browser, "#problem") and text(browser, "#instances") == ""
        browser.find_element(By.ID, "key").send_keys(cluster.config["token"])
        browser.find_element(By.CSS_SELECTOR, "#door button").click()
        until(lambda: rows(browser, "instances"), "the instances")
        assert not browser.find_element(By.ID, "door").is_displayed()
    finally:
        browser.execute_cdp_cmd("Network.setExtraHTTPHeaders", {"headers": {}})
        browser.execute_script("sessionStorage.clear()")
    errors(browser)


def test_it_says_when_nobody_answers_and_goes_on_when_somebody_does(browser: Chrome, cluster: Cluster) -> None:
    browser.get(f"{cluster.url}/dashboard")
    until(lambda: text(browser, "#state") == "ready", "the page")
    pid = cluster.pids()["frontend-0"]
    os.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: text(browser, "#state") == "no answer", "the loss to show")
        assert browser.find_element(By.ID, "problem").is_displayed()
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: text(browser, "#state") == "ready", "the state")
    assert not browser.find_element(By.ID, "problem").is_displayed() and rows(browser, "instances")
