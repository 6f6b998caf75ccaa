"""The page in a real browser: drop, type, read both answers; stop, unlock; narrow and wide, light and dark."""

from __future__ import annotations

import base64
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Running, running, wait_for
from test_api import png, wav

from masquant.conversation import Message, Part, Sampling

playwright_api = pytest.importorskip("playwright.sync_api")


# The microphone beeps, and may be used without asking
ARGUMENTS = ("--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium of the system, or playwright's own."""
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next((found for name in names if (found := shutil.which(name))), None)
    with playwright_api.sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(executable_path=executable, args=[*ARGUMENTS])
        except playwright_api.Error as error:
            pytest.skip(f"no browser: {error.message.splitlines()[0]}")
        yield found
        found.close()


@pytest.fixture
def problems() -> list[str]:
    """What the page complains of."""
    return []


@pytest.fixture
def page(browser: Any, server: Running, problems: list[str]) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    found = context.new_page()
    found.set_default_timeout(30_000)
    found.on("console", lambda message: problems.append(message.text))
    found.on("pageerror", lambda error: problems.append(str(error)))
    found.goto(server.url)
    found.wait_for_selector("#models li")
    yield found
    context.close()


def drop(page: Any, name: str, kind: str, content: bytes) -> None:
    """Drop a file on the page, as a mouse would."""
    page.evaluate(
        """([name, type, content]) => {
            const transfer = new DataTransfer();
            const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
            transfer.items.add(new File([bytes], name, { type }));
            document.body.dispatchEvent(new DragEvent("dragover", { dataTransfer: transfer, bubbles: true }));
            document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true }));
        }""",
        [name, kind, base64.b64encode(content).decode()],
    )


def answered(page: Any) -> list[str]:
    page.wait_for_selector("#send:visible")
    return page.locator(".turn:last-child .said").all_text_contents()


def expected(server: Running, messages: list[Message]) -> list[str]:
    """What the models say, cut off after the page's number of tokens."""
    sampling = Sampling(256, temperature=0)
    return ["".join(model.responder.answer(messages, sampling)) + " …" for model in server.models.values()]


def test_drop_type_and_read_both_answers(page: Any, server: Running, problems: list[str]) -> None:
    assert page.locator("#models li").all_inner_texts() == ["tiny W4A8", "base float"]
    assert page.title() == "tiny · masquant" and page.locator("#welcome").is_visible()
    drop(page, "red <b>.png", "image/png", png())
    page.wait_for_selector("#attachments li")
    assert page.locator("#attachments li").inner_text().startswith("red <b>.png")
    assert page.locator("#drop").is_hidden()
    page.fill("#text", "What is <i>it</i>?")
    page.press("#text", "Enter")
    first = Message("user", (Part("image", png()), Part("text", "What is <i>it</i>?")))
    answers = answered(page)
    assert answers == expected(server, [first]) and answers[0] != answers[1]
    assert page.locator(".mine p").inner_text() == "What is <i>it</i>?"  # as text, not as markup
    assert page.locator(".mine img").evaluate("image => image.naturalWidth") == 42
    footers = page.locator(".answer footer").all_inner_texts()
    assert len(footers) == 2 and all("→ 256 tokens" in text and "tokens/s" in text for text in footers)

    drop(page, "tone.wav", "audio/wav", wav())
    page.wait_for_selector("#attachments li")
    page.fill("#text", "And this?")
    page.click("#send")
    assert len(answered(page)) == 2 and page.locator(".turn").count() == 2
    wait_for(lambda: page.locator(".mine audio").evaluate("audio => audio.duration") == 0.5)
    assert not page.locator(".error").count()
    page.click("#reset")
    assert page.locator(".turn").count() == 0 and page.locator("#welcome").is_visible()
    assert problems == []


def test_answers_appear_while_they_are_written_and_can_be_stopped(page: Any, server: Running) -> None:
    models = [served.responder.model for served in server.models.values()]
    hooks = [model.register_forward_pre_hook(lambda *_: time.sleep(0.02)) for model in models]  # as larger models are
    try:
        page.fill("#text", "Hello")
        page.press("#text", "Enter")
        wait_for(lambda: all(len(text) > 3 for text in page.locator(".said").all_text_contents()))
        assert page.locator("#stop").is_visible() and page.locator(".said.writing").count() == 2
        page.click("#stop")
        assert all(text and not text.endswith("…") for text in answered(page))
        assert page.locator(".answer footer").all_inner_texts() == ["stopped", "stopped"]
    finally:
        for hook in hooks:
            hook.remove()
    wait_for(lambda: server.metric("masquant_requests_admitted") == 0)


def test_record(page: Any, problems: list[str]) -> None:
    page.click("#record")
    page.wait_for_selector("#record[aria-pressed='true']")
    page.wait_for_timeout(700)
    page.click("#record")
    page.wait_for_selector("#attachments li")
    assert page.locator("#attachments span").inner_text() == "recording"
    assert page.locator("#record").get_attribute("aria-pressed") == "false"
    page.fill("#text", "What do you hear?")
    page.press("#text", "Enter")
    assert all(answered(page)) and page.locator(".mine audio").evaluate("audio => audio.duration") > 0.3
    assert problems == []


def test_what_cannot_be_read_is_said(page: Any) -> None:
    drop(page, "broken.png", "image/png", b"GIF89a")
    page.wait_for_selector("#notice:has-text('broken.png cannot be read')")
    drop(page, "notes.txt", "text/plain", b"words")
    page.wait_for_selector("#notice:has-text('notes.txt is neither a picture nor a sound')")
    drop(page, "tone.wav", "audio/wav", wav(5))  # this model hears one second
    page.wait_for_selector("#attachments li")
    page.press("#text", "Enter")
    page.wait_for_selector(".answer .error")
    assert page.locator(".answer .error").all_inner_texts() == [
        "message 1 has 5.0 s of audio; this model hears at most 1 s, cut it"
    ] * 2  # fmt: skip
    page.fill("#text", "Hello")  # the conversation goes on without it
    page.press("#text", "Enter")
    assert all(answered(page)) and page.locator(".turn:last-child .error").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_and_wide_light_and_dark(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.fill("#text", "W" * 300)
    page.press("#text", "Enter")
    answered(page)
    for width, columns in ((1400, 2), (400, 1), (320, 1)):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        lefts = page.locator(".answer").evaluate_all("nodes => nodes.map((node) => node.getBoundingClientRect().left)")
        assert len(set(lefts)) == columns
        assert page.locator("#send").bounding_box()["y"] + 40 <= 800
    brightness = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
    assert (brightness > 200) == (scheme == "light")


def test_the_key_is_asked_for(browser: Any) -> None:
    with running(api_key="secret") as server:
        context = browser.new_context()
        page = context.new_page()
        page.goto(server.url)
        for key in ("wrong", "secret"):
            page.wait_for_selector("#unlock:visible")
            page.fill("#key", key)
            page.press("#key", "Enter")
        page.wait_for_selector("#models li")
        page.fill("#text", "Hello")
        page.press("#text", "Enter")
        assert all(answered(page))
        context.close()
