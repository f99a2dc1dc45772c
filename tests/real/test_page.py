"""The chat page in a real browser. `make test-browser` installs what it needs."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from serving import Served, wait_until
from tabagent_model import AsyncModelManager, Model

if TYPE_CHECKING:
    from selenium import webdriver
    from selenium.webdriver.common.keys import Keys
else:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    Keys = webdriver.Keys

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromium-driver"),
]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with Model.load(n_ctx=512, max_parallel=4, n_threads=1) as model, Served(model) as served:
        yield served


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1000,800"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: webdriver.Chrome, served: Served) -> Iterator[Page]:
    browser.get(served.url)
    browser.execute_script("localStorage.clear(); sessionStorage.clear()")
    browser.get(served.url)
    page = Page(browser)
    wait_until(lambda: page.text("#model"))
    yield page
    problems = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert problems == []


class Page:
    """What a person sees and does."""

    def __init__(self, browser: webdriver.Chrome) -> None:
        self.browser = browser

    def find(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        found = self.all(selector)
        return found[-1].text if found else ""

    def write(self, text: str) -> None:
        self.find("#prompt").send_keys(text)

    def wait_for_answers(self, number: int) -> None:
        wait_until(lambda: len(self.all("article:not(.user) footer")) == number)


def test_a_question_is_answered_with_its_figures(page: Page):
    page.write("What is the capital of France?" + Keys.ENTER)
    page.wait_for_answers(1)
    assert "Paris" in page.text("article:not(.user) .said")
    assert page.text("article.user .said") == "What is the capital of France?"
    footer = page.text("article:not(.user) footer")
    assert "tokens/s" in footer and "cached" in footer
    assert page.find("#prompt").get_attribute("value") == ""


def test_a_conversation_goes_on_and_can_begin_anew(page: Page):
    for number, question in enumerate(("Italy", "Spain"), 1):
        page.write(f"What is the capital of {question}?" + Keys.ENTER)
        page.wait_for_answers(number)
    assert len(page.all("article")) == 4
    page.find("#new").click()
    assert page.all("article") == []


ENDLESSLY = """
    const real = window.fetch;
    window.fetch = (path, options = {}) => {
      const wishes = { ...JSON.parse(options.body), ignore_eos: true, overflow: "shift" };
      return real(path, { ...options, body: JSON.stringify(wishes) });
    };
"""


def test_an_answer_can_be_stopped(page: Page, served: Served):
    page.browser.execute_script(ENDLESSLY)
    page.write("Tell me a story." + Keys.ENTER)
    wait_until(lambda: len(page.text("article:not(.user) .said")) > 20)
    page.find("#stop").click()
    page.wait_for_answers(1)
    assert "stopped" in page.text("article:not(.user) footer")
    wait_until(lambda: served.client.get("/slots").json()[0]["is_processing"] is False)


def test_the_keyboard_is_enough(page: Page):
    assert page.browser.switch_to.active_element.get_attribute("id") == "prompt"
    page.write("one" + Keys.SHIFT + Keys.ENTER + Keys.NULL + "two")
    assert page.find("#prompt").get_attribute("value") == "one\ntwo"
    page.write(Keys.ENTER)
    page.wait_for_answers(1)
    assert page.text("article.user .said") == "one\ntwo"


def test_settings_are_kept_and_sent(page: Page):
    page.find("#open-settings").click()
    page.find("[name=max_tokens]").send_keys("3")
    page.find("[name=look]").send_keys("dark")
    page.find("#settings [type=submit]").click()
    page.browser.refresh()
    wait_until(lambda: page.text("#model"))
    assert page.find("[name=max_tokens]").get_attribute("value") == "3"
    assert page.find("html").get_attribute("data-look") == "dark"
    page.write("Tell me a story." + Keys.ENTER)
    page.wait_for_answers(1)
    assert "cut short" in page.text("article:not(.user) footer")


def test_a_question_can_be_changed(page: Page):
    page.write("What is the capital of Italy?" + Keys.ENTER)
    page.wait_for_answers(1)
    page.find("article.user footer button").click()
    assert page.all("article") == []
    assert page.find("#prompt").get_attribute("value") == "What is the capital of Italy?"


MARKDOWN = """# Title

Some *text* with **weight**, `code` and <b>no</b> <img src=x onerror=alert(1)>.

- one
- two
  - deep

1. first
2. second

```python
print("<script>alert(1)</script>")
```

| a | b |
|---|---|
| 1 | 2 |

> said

[good](https://example.org/) [bad](javascript:alert(1)) [worse](data:text/html,x)
"""


def test_markdown_is_shown_safely_however_it_arrives(page: Page):
    script = """
        const [text, step, done] = arguments;
        import("./markdown.js").then(({ Growing }) => {
          const home = document.createElement("div");
          const growing = new Growing(home);
          for (let at = step; at < text.length + step; at += step) growing.show(text.slice(0, at));
          done(home.innerHTML);
        });
    """
    page.browser.set_script_timeout(30)
    at_once = page.browser.execute_async_script(script, MARKDOWN, 10_000)
    assert page.browser.execute_async_script(script, MARKDOWN, 1) == at_once
    assert page.browser.execute_async_script(script, MARKDOWN, 7) == at_once
    for tag in ("<h1>Title", "<em>text", "<strong>weight", "<code>code", "<table>", "<blockquote>"):
        assert tag in at_once
    assert "<ul><li>one</li><li>two<ul><li>deep</li></ul></li></ul>" in at_once
    assert '<ol start="1"><li>first</li><li>second</li></ol>' in at_once
    for harm in ("<script", "<img", "<b>", 'href="javascript', 'href="data'):
        assert harm not in at_once
    assert 'href="https://example.org/"' in at_once


def test_a_phone_shows_everything_without_scrolling_sideways(page: Page):
    page.browser.set_window_size(500, 700)  # as narrow as a headless window gets
    script = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    page.write("What is the capital of France?" + Keys.ENTER)
    page.wait_for_answers(1)
    assert page.browser.execute_script(script) == 0
    page.browser.set_window_size(1000, 800)


def test_a_model_is_loaded_when_it_is_chosen_and_can_be_unloaded(browser: webdriver.Chrome):
    manager = AsyncModelManager(max_loaded=1)
    for name in ("one", "two"):
        manager.register_model(name, n_ctx=256, max_parallel=1, n_threads=1)
    with Served(manager) as served:
        browser.get(served.url)
        page = Page(browser)

        def shows(*names: str) -> None:
            script = "return [...document.querySelectorAll('#model option')].map((o) => o.text)"
            wait_until(lambda: browser.execute_script(script) == [*names])

        shows("one (unloaded)", "two (unloaded)")
        page.find("#model option[value=two]").click()
        shows("one (unloaded)", "two")
        page.find("#model option[value=one]").click()
        shows("one", "two (unloaded)")
        page.find("#unload").click()
        shows("one (unloaded)", "two (unloaded)")
        page.write("What is the capital of France?" + Keys.ENTER)
        page.wait_for_answers(1)
        shows("one", "two (unloaded)")
        assert browser.get_log("browser") == []
    asyncio.run(manager.close())


def test_a_key_is_asked_for_where_one_is_needed(browser: webdriver.Chrome):
    with (
        Model.load(n_ctx=256, max_parallel=1, n_threads=1) as model,
        Served(model, api_keys=["hush"]) as served,
    ):
        browser.get(served.url)
        page = Page(browser)
        wait_until(lambda: page.find("#settings").get_attribute("open"))
        page.find("[name=key]").send_keys("hush")
        page.find("#settings [type=submit]").click()
        wait_until(lambda: page.text("#model") == "tiny-chat")
        browser.get_log("browser")  # the 401 is in it
