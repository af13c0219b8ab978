"""The chat page in a real browser: Debian's chromium, driven by playwright; skipped where either is missing."""

import re
import shutil
import subprocess
import time
from io import BytesIO

import pytest
from hostile import HEADS
from local_server import EMPTY, Server
from PIL import Image

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def tab():
    """One tab for all tests: to open another takes seconds."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None or subprocess.run([CHROMIUM, "--version"], capture_output=True).returncode:
        pytest.skip("there is no chromium that runs on this machine")
    with playwright.sync_playwright() as driver:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser.new_page(viewport={"width": 900, "height": 700})
        browser.close()


@pytest.fixture
def page(tab, server):
    """The page as a user opens it; the test fails if the browser reports a fault or asks for any other address."""
    faults = []
    listeners = {
        "pageerror": lambda error: faults.append(str(error)),
        "console": lambda message: message.type == "error" and faults.append(message.text),
        "request": lambda request: request.url.startswith((server.url, "data:")) or faults.append(request.url),
    }
    for event, listener in listeners.items():
        tab.on(event, listener)
    tab.goto(server.url)
    tab.wait_for_selector("#choose:visible")
    yield tab
    server.pause = 0.0
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    assert [fault for fault in faults if "400 (Bad Request)" not in fault] == []


def png(color="red") -> dict:
    file = BytesIO()
    Image.new("RGB", (40, 30), color).save(file, "PNG")
    return {"name": "a.png", "mimeType": "image/png", "buffer": file.getvalue()}


def set_tokens(page, number: int):
    page.click("#toggle")
    page.fill("[name=max_tokens]", str(number))
    page.click("#toggle")


def wait_until(page, condition):
    """Wait until a function is true. (The browser cannot poll for us: the page's policy forbids eval.)"""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        page.wait_for_timeout(10)


def ask(page, question: str):
    page.fill("#question", question)
    page.press("#question", "Enter")


def wait_for_answers(page, number: int) -> list[str]:
    answers = page.locator(".turn.assistant:not(.busy) .text")
    wait_until(page, lambda: answers.count() == number)
    return answers.all_inner_texts()


def expected(server: Server, *contents) -> str:
    """The answer to the last of some contents, which alternate between user and assistant, asked over HTTP."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return server.ask("", messages=messages)["choices"][0]["message"]["content"].strip()


def test_images_and_turns(page, server):
    """Two images, one of them removed again; an answer that is the API's; a second turn that knows the first."""
    set_tokens(page, 12)
    page.set_input_files("#file", [png("red"), png("blue")])
    page.wait_for_selector("#images img:nth-child(1)")
    page.locator("#images button").first.click()
    assert page.locator("#images img").count() == 1
    url = page.locator("#images img").get_attribute("src")
    page.fill("#question", "What is it?")
    page.press("#question", "Shift+Enter")
    assert page.input_value("#question") == "What is it?\n"
    page.press("#question", "Enter")
    (first,) = wait_for_answers(page, 1)
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    assert first.strip() == expected(server, content)
    assert page.input_value("#question") == "" and page.locator("#images img").count() == 0
    page.fill("#question", "And now?")
    page.click("#send")
    assert wait_for_answers(page, 2)[1].strip() == expected(server, content, first, "And now?")


def test_a_click_on_a_word_shows_where_the_model_looked(page, server):
    set_tokens(page, 12)
    ask(page, "Hello")
    wait_for_answers(page, 1)
    assert page.locator(".word").count() == 0  # there is no image to look at
    page.set_input_files("#file", [png("white")])
    page.wait_for_selector("#images img")
    ask(page, "What is it?")
    text = wait_for_answers(page, 2)[1]
    page.locator(".word").nth(1).click()
    page.wait_for_selector(".turn.assistant img")
    word = page.locator(".word.chosen").inner_text()
    assert page.locator(".caption").inner_text() == f"Bright: where “{word}” comes from (attention)."
    assert re.findall(r"\w+(?:['’-]\w+)*", text)[1] == word


def test_drop_and_paste(page):
    script = """([kind, target]) => {
        const data = new DataTransfer();
        data.items.add(new File([Uint8Array.from(atob("R0lGODlhAQABAAAAACw="), c => c.charCodeAt(0))], "a.gif"));
        document.dispatchEvent(kind === "drop" ? new DragEvent(kind, { dataTransfer: data, bubbles: true })
            : new ClipboardEvent(kind, { clipboardData: data, bubbles: true }));
    }"""
    for number, kind in enumerate(("drop", "paste"), 1):
        page.evaluate(script, [kind, None])
        wait_until(page, lambda: page.locator("#images img").count() == number)  # noqa: B023


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_streams_and_stops(page, server, way):
    server.pause = 0.02
    set_tokens(page, 900)
    ask(page, "Hello")
    text = page.locator(".turn.assistant .text")
    wait_until(page, lambda: len(text.inner_text()) > 5)
    first = text.inner_text()
    wait_until(page, lambda: len(text.inner_text()) > len(first) + 5)
    assert page.locator("#send").inner_text() == "Stop"
    page.click("#send") if way == "button" else page.keyboard.press("Escape")
    (stopped,) = wait_for_answers(page, 1)
    assert stopped.startswith(first) and page.locator(".turn.assistant .note").inner_text() == "Stopped."
    assert server.wait_until_empty(2) == EMPTY


def test_edit_and_regenerate(page, server):
    set_tokens(page, 12)
    for number, question in enumerate(("One", "Two"), 1):
        ask(page, question)
        before = wait_for_answers(page, number)
    page.click("text=Regenerate")
    assert wait_for_answers(page, 2) == before  # greedy
    page.locator("text=Edit").first.click()
    assert page.input_value("#question") == "One"
    page.keyboard.press("Escape")
    assert page.input_value("#question") == "" and page.locator(".turn").count() == 4
    page.locator("text=Edit").first.click()
    ask(page, "Three")
    (text,) = wait_for_answers(page, 1)
    assert text.strip() == expected(server, "Three") and page.locator(".turn").count() == 2


def test_an_error_is_one_line_and_the_chat_goes_on(page, server):
    heic = {"name": "a.heic", "mimeType": "image/heic", "buffer": HEADS["heic"]}
    page.set_input_files("#file", [heic])
    page.wait_for_selector("#images img")
    ask(page, "What is it?")
    wait_for_answers(page, 1)
    assert page.locator(".turn .error").inner_text().startswith("image 1: not an image that can be read (HEIC")
    set_tokens(page, 12)
    ask(page, "Hello")
    assert wait_for_answers(page, 2)[1].strip() == expected(server, "Hello")  # without the turn that failed


def test_text_of_the_model_is_never_html(page, server, monkeypatch):
    text = "<img src=x onerror=document.title='hacked'><b>bold</b>"
    monkeypatch.setattr(server.engine.tokenizer, "decode", lambda ids: text)
    set_tokens(page, 2)
    ask(page, text)
    assert wait_for_answers(page, 1) == [text]
    assert page.locator(".turn.user .text").inner_text() == text
    assert page.locator(".turn img, .turn b").count() == 0 and page.title() == "babbler"


def test_scripts_of_others_do_not_run(tab, server):
    """The policy in force: neither inline code nor another origin."""
    tab.goto(server.url)
    tab.wait_for_selector("h1:text('babbler')")
    tab.evaluate("""() => {
        const code = "document.title = 'hacked'";
        document.body.append(Object.assign(document.createElement("script"), { textContent: code }));
        document.body.insertAdjacentHTML("beforeend", `<img src="data:," onerror="${code}">`);
    }""")
    tab.wait_for_timeout(100)
    assert tab.title() == "babbler"
    reached = tab.evaluate("fetch('http://localhost:1/').then(() => 'reached', (error) => error.message)")
    assert reached == "Failed to fetch"


def test_a_decoder_alone_has_no_image_button(tab, tiny):
    server = Server(tiny.decoder)
    try:
        tab.goto(server.url)
        tab.wait_for_selector("h1:text('babbler')")
        assert not tab.locator("#choose").is_visible()
    finally:
        server.close()


def test_dark_light_and_a_phone(page):
    page.set_viewport_size({"width": 360, "height": 640})
    page.fill("#question", "a " * 200)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    for part in ("#send", "#choose", "#question", "#toggle"):
        box = page.locator(part).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["y"] + box["height"] <= 640
    for scheme, back in (("light", "rgb(246, 247, 249)"), ("dark", "rgb(20, 23, 27)")):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == back
