"""From one tag to a talking page, in a real browser: three origins and a microphone that hums.

The site is on localhost, the frame begins at the broker's 127.0.0.1 and is redirected to
viewer.localhost, as the vendor's frame is redirected to another host.
"""

import json
import re
import secrets
import time
from collections.abc import Iterator

import jwt
import pytest
from browsing import Visit
from playwright.sync_api import Browser, FrameLocator, Page, Route, expect
from running import Broker, broker, until
from website import AGENT, Answer, Website, refusal, token_answer, website

from broker.web.pages.embed_script import FOLDER

pytestmark = pytest.mark.parts

LABEL = "Talk to the avatar"

ALLOWED = "microphone *; camera *; autoplay *"

SIGNING_KEY = secrets.token_urlsafe(48)
"""The broker's key, so that a test can sign what the broker would not."""


BLOCKED_ADVERTISEMENT = """() => new Promise((done) => {
  document.addEventListener("securitypolicyviolation", done);
  const other = document.createElement("iframe");
  other.src = "https://advertisement.example/";
  document.body.append(other);
}).then(() => undefined)"""
"""Adds another frame, and waits until the page's policy has blocked it."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """Run one development broker."""
    settings = {"issuer.local.keys.dev.secret": SIGNING_KEY, "log.format": "json"}
    with broker(tmp_path_factory.mktemp("broker"), settings) as started:
        yield started


@pytest.fixture
def site(running: Broker) -> Iterator[Website]:
    """Run a site of its own for each test."""
    with website(running) as started:
        yield started


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """Be somebody new."""
    visitor = Visit(browser)
    yield visitor
    visitor.close()


def token(life: int) -> str:
    """Sign a token of an hour as the broker does; `life` is the seconds that are left of it."""
    ends = int(time.time()) + life
    claims = {"iss": "embed-token-broker", "aud": "embed", "sub": AGENT, "agent_id": AGENT}
    claims |= {"fingerprint": "beefbeef", "sid": "signed-here", "jti": "signed-here"}
    times = {"iat": ends - 3600, "nbf": ends - 3600, "exp": ends}
    return jwt.encode({**claims, **times}, SIGNING_KEY, "HS256")


def talk(page: Page) -> FrameLocator:
    """Click, and return the frame."""
    page.get_by_role("button", name=LABEL).click()
    return page.frame_locator("iframe")


def connected(page: Page) -> str:
    """Wait until the viewer in the page has had its token verified; returns the session."""
    session = page.frame_locator("iframe[allow]").locator("#session")
    expect(session).to_have_text(re.compile("[0-9a-f]{32}|signed-here"))
    return session.inner_text()


def without_stars(site: Website) -> str:
    """Publish the script with the bare form of `allow`; returns its address."""
    script = (FOLDER / "embed.js").read_text(encoding="utf-8")
    assert script.count(ALLOWED) == 1
    bare = script.replace(ALLOWED, "microphone; camera; autoplay")
    site.pages["/bare.js"] = Answer(bare, {"Content-Type": "text/javascript; charset=utf-8"})
    return "/bare.js"


class TestOneTag:
    @pytest.mark.parametrize("mode", ["button", "dialog", "inline"])
    def test_a_click_makes_a_frame_whose_token_is_verified_and_that_hears(
        self, site: Website, visit: Visit, mode: str
    ) -> None:
        """One tag, one click: agent and session as handed out, and microphone samples arrive."""
        page = visit.page
        page.goto(site.show(f"<h1>Welcome</h1>{site.tag(mode=mode)}"))
        expect(page.get_by_role("button", name=LABEL)).to_be_visible()
        assert page.frames == [page.main_frame]  # nothing that is billed before the click
        assert site.asked == []
        frame = talk(page)
        expect(frame.locator("#heard")).to_have_text(re.compile(r"heard \d+ samples"))
        expect(frame.locator("#agent")).to_have_text(AGENT)
        assert connected(page) == site.sessions[0]
        inner = page.locator("iframe")
        assert inner.get_attribute("allow") == ALLOWED
        assert inner.get_attribute("referrerpolicy") == "no-referrer"
        assert inner.get_attribute("title") == "Talking avatar"
        assert page.frames[1].url == f"{site.viewer_origin}/demo/viewer"  # the token is gone
        page.get_by_role("button", name="Close").click()
        expect(inner).to_have_count(0)
        assert len(page.frames) == 1
        assert visit.complaints == []
        assert visit.foreign(site.url, site.embed_origin, site.viewer_origin) == []

    def test_the_bare_form_of_allow_is_deaf_after_the_redirect(
        self, site: Website, visit: Visit
    ) -> None:
        """Which is why the stars are there: the same page, the same frame, only without them."""
        page = visit.page
        page.goto(site.show(site.tag(src=without_stars(site))))
        frame = talk(page)
        assert connected(page) == site.sessions[0]
        expect(frame.locator("#heard")).to_have_text("blocked: NotAllowedError")
        assert frame.locator("#level").get_attribute("value") == "0"

    def test_the_bare_form_hears_where_nothing_redirects_to_another_origin(
        self, site: Website, visit: Visit
    ) -> None:
        """So it is the redirect that makes the difference, not this browser."""
        src = without_stars(site)
        visit.page.goto(site.show(site.tag(src=src, embed_origin=site.viewer_origin)))
        frame = talk(visit.page)
        expect(frame.locator("#heard")).to_have_text(re.compile(r"heard \d+ samples"))

    def test_the_pinned_address_works_with_integrity_from_another_origin(
        self, site: Website, visit: Visit
    ) -> None:
        """What /embed.json says goes into the tag; with another digest the browser refuses it."""
        pinned = visit.page.request.get(f"{site.broker.url}/embed.json").json()
        src = f"{site.broker.url}{pinned['src']}"
        tag = site.tag(src=src).replace(
            "<script", f'<script integrity="{pinned["integrity"]}" crossorigin="anonymous"'
        )
        visit.page.goto(site.show(tag))
        expect(visit.page.get_by_role("button", name=LABEL)).to_be_visible()
        assert visit.complaints == []
        other = tag.replace("sha384-", "sha384-AAAA")
        visit.page.goto(site.show(other))
        visit.page.wait_for_load_state("networkidle")
        assert visit.page.get_by_role("button", name=LABEL).count() == 0

    def test_a_token_minted_with_the_page_needs_no_route(self, site: Website, visit: Visit) -> None:
        """`data-token`: the frame opens with it, and nobody is asked."""
        visit.page.goto(site.show(site.tag(token=token(600), token_url="")))
        talk(visit.page)
        assert connected(visit.page) == "signed-here"
        assert site.asked == []

    def test_two_tags_are_two_avatars(self, site: Website, visit: Visit) -> None:
        """The second load of the script finds the first one's work and adds to it."""
        tags = site.tag(mode="inline", label="One") + site.tag(mode="dialog", label="Two")
        visit.page.goto(site.show(tags))
        for label in ("One", "Two"):
            expect(visit.page.get_by_role("button", name=label)).to_have_count(1)

    def test_what_was_removed_can_be_mounted_again(self, site: Website, visit: Visit) -> None:
        """The page of an application comes and goes; each time there is one button that works."""
        page = visit.page
        page.goto(site.show(site.tag()))
        button = page.get_by_role("button", name=LABEL)
        button.wait_for()
        page.evaluate(
            """() => {
              const tag = document.querySelector("script");
              window.mounted = () => EmbedBroker.mount(tag, tag.dataset);
            }"""
        )
        page.evaluate("mounted().remove()")
        assert button.count() == 0
        page.evaluate("void mounted()")
        assert button.count() == 1
        talk(page)
        connected(page)

    def test_a_running_call_is_never_loaded_again(self, site: Website, visit: Visit) -> None:
        """Not by another click, another token, or a new attribute: its window stays the same."""
        page = visit.page
        page.goto(site.show(site.tag()))
        talk(page)
        assert connected(page) == site.sessions[0]
        page.frames[1].evaluate("window.marked = true")
        page.evaluate(
            """async () => {
              const tag = document.querySelector("script");
              await EmbedBroker.getToken({ ...tag.dataset, agent: "B1" });
              tag.dataset.agent = "C1";
              EmbedBroker.start(tag);
              EmbedBroker.mount(tag, tag.dataset).open();
            }"""
        )
        page.wait_for_timeout(300)
        assert page.frames[1].evaluate("window.marked") is True
        assert len(page.frames) == 2

    def test_leaving_the_page_ends_the_call(self, site: Website, visit: Visit) -> None:
        """A page that the browser keeps for its back button must not keep a billed connection."""
        page = visit.page
        page.goto(site.show(site.tag()))
        talk(page)
        assert connected(page) == site.sessions[0]
        page.evaluate("dispatchEvent(new PageTransitionEvent('pagehide', { persisted: true }))")
        expect(page.locator("iframe")).to_have_count(0)

    @pytest.mark.parametrize("mode", ["button", "dialog", "inline"])
    def test_closed_and_opened_at_once_it_stays_open(
        self, site: Website, visit: Visit, mode: str
    ) -> None:
        """The browser tells later that a dialog was closed: that is not about the new opening."""
        page = visit.page
        page.goto(site.show(site.tag(mode=mode)))
        talk(page)
        connected(page)
        page.evaluate(
            """async () => {
              const tag = document.querySelector("script");
              const widget = EmbedBroker.mount(tag, tag.dataset);
              widget.close();
              await widget.open();
              await new Promise((done) => setTimeout(done, 100));
            }"""
        )
        connected(page)
        expect(page.get_by_role("button", name="Close")).to_be_visible()
        page.get_by_role("button", name="Close").click()
        expect(page.locator("iframe")).to_have_count(0)


class TestByKeyboard:
    @pytest.mark.parametrize("mode", ["button", "dialog", "inline"])
    def test_it_opens_and_closes_and_the_focus_comes_back(
        self, site: Website, visit: Visit, mode: str
    ) -> None:
        """Tab, Enter, Escape: no pointer is needed, and the focus is never lost or caught."""
        page = visit.page
        page.goto(site.show(site.tag(mode=mode)))
        launcher = page.get_by_role("button", name=LABEL)
        close = page.get_by_role("button", name="Close")
        expect(launcher).to_be_visible()
        page.keyboard.press("Tab")
        expect(launcher).to_be_focused()
        page.keyboard.press("Enter")
        expect(close).to_be_focused()
        connected(page)
        page.keyboard.press("Tab")
        expect(page.locator("iframe")).to_be_focused()
        page.keyboard.press("Shift+Tab")
        for key in ("Escape", "Enter"):
            expect(close).to_be_focused()  # out of the frame it takes a message to another process
            page.keyboard.press(key)
            expect(page.locator("iframe")).to_have_count(0)
            expect(launcher).to_be_focused()
            page.keyboard.press("Enter")
            connected(page)


class TestSessions:
    def test_a_visitor_keeps_the_session_and_another_has_another(
        self, site: Website, browser: Browser, visit: Visit
    ) -> None:
        """Reload and second tab: the same session and fingerprint; somebody else: others."""
        url = site.show(site.tag())
        visit.page.goto(url)
        talk(visit.page)
        assert connected(visit.page) == site.sessions[0]
        visit.page.reload()
        talk(visit.page)
        connected(visit.page)
        second = visit.tab()
        second.goto(url)
        talk(second)
        connected(second)
        other = Visit(browser)
        other.page.goto(url)
        talk(other.page)
        connected(other.page)
        other.close()
        first, *again, stranger = site.sessions
        assert again == [first, first]
        assert stranger != first
        prints = [body["fingerprint"] for body in site.asked]
        assert prints[0] == prints[1] == prints[2] != prints[3]
        assert all(re.fullmatch("[0-9a-f]{32}", value) for value in prints)

    def test_reopening_uses_the_token_that_is_held(self, site: Website, visit: Visit) -> None:
        """No second request while it has a minute left; a new one as soon as it has not."""
        site.prepared.append(token_answer(token(100), int(time.time()) + 100))
        page = visit.page
        page.goto(site.show(site.tag()))
        for expected in (1, 1):
            talk(page)
            connected(page)
            page.get_by_role("button", name="Close").click()
            assert len(site.asked) == expected
        page.clock.install()
        page.clock.fast_forward(50_000)
        page.get_by_role("button", name=LABEL).click()
        page.clock.run_for(1_000)
        connected(page)
        assert len(site.asked) == 2

    def test_a_wrong_clock_of_the_device_changes_nothing(self, site: Website, visit: Visit) -> None:
        """Two hours ahead: tokens are measured by the site's clock, so this one is held."""
        page = visit.page
        page.clock.install(time=time.time() + 7200)
        page.goto(site.show(site.tag()))
        for _ in range(2):
            page.get_by_role("button", name=LABEL).click()
            page.clock.run_for(1_000)
            connected(page)
            page.get_by_role("button", name="Close").click()
        assert len(site.asked) == 1

    @pytest.mark.parametrize("hours", [-2, 2])
    def test_a_wrong_clock_of_the_device_leaves_the_page_s_token_its_life(
        self, site: Website, visit: Visit, hours: int
    ) -> None:
        """Nobody tells the time: it is good for as long as it was made for, from the page on."""
        page = visit.page
        page.clock.install(time=time.time() + hours * 3600)
        page.goto(site.show(site.tag(token=token(600), token_url="")))  # made for an hour
        page.get_by_role("button", name=LABEL).click()
        page.clock.run_for(1_000)
        assert connected(page) == "signed-here"
        page.get_by_role("button", name="Close").click()
        page.clock.fast_forward(3_545_000)
        page.get_by_role("button", name=LABEL).click()
        expect(page.get_by_role("status")).to_have_text("This page was open for too long.")
        assert len(page.frames) == 1

    def test_calls_at_the_same_time_share_a_request(self, site: Website, visit: Visit) -> None:
        """Twenty callers and a click: one request, one token."""
        page = visit.page
        page.goto(site.show(site.tag()))
        expect(page.get_by_role("button", name=LABEL)).to_be_visible()
        tokens = page.evaluate(
            "Promise.all(Array.from({ length: 20 }, () => EmbedBroker.getToken()))"
        )
        talk(page)
        connected(page)
        assert len(set(tokens)) == 1
        assert len(site.asked) == 1

    def test_blocked_storage_costs_the_memory_only(self, site: Website, visit: Visit) -> None:
        """Where `localStorage` throws, the fingerprint lives as long as the page."""
        page = visit.page
        page.add_init_script(
            "Object.defineProperty(window, 'localStorage', { get() { throw Error('blocked') } })"
        )
        page.goto(site.show(site.tag()))
        talk(page)
        connected(page)
        first, again = (page.evaluate("EmbedBroker.fingerprint()") for _ in range(2))
        assert first == again == site.asked[0]["fingerprint"]

    def test_a_page_that_sends_the_client_secret_is_refused_and_reported(
        self, site: Website, visit: Visit
    ) -> None:
        """The broker under the site's origin, the secret in the page: 403, and an error event."""
        page = visit.page
        page.goto(site.show("<h1>A mistake</h1>"))
        script = """async ([url, secret]) => {
          const headers = { "api-secret": secret, "Content-Type": "application/json" };
          const body = JSON.stringify({ agent_id: "A78WKV4515", fingerprint: "beefbeef" });
          try {
            const answer = await fetch(url, { method: "POST", headers, body });
            return [answer.status, (await answer.json()).error.code];
          } catch (error) {
            return [0, error.name];
          }
        }"""
        path, secret = "/v1/embed-tokens/request", site.broker.secret
        assert page.evaluate(script, [path, secret]) == [403, "SECRET_IN_BROWSER"]
        until(lambda: "secret_in_browser" in site.broker.log, "the event")
        (line,) = [s for s in site.broker.log.splitlines() if "secret_in_browser" in s]
        event = json.loads(line)
        assert (event["event"], event["level"]) == ("broker.secret_in_browser", "error")
        assert event["client"] == "dev"
        # straight to the broker it is not even sent: there is no CORS
        assert page.evaluate(script, [site.broker.token_url, secret]) == [0, "TypeError"]


class TestTrouble:
    def opened(self, site: Website, visit: Visit, **attributes: str) -> Page:
        """Load a page that notes the errors it is told, and click."""
        page = visit.page
        page.add_init_script(
            """window.told = [];
            document.addEventListener("embed-broker:error", ({ detail }) =>
              told.push([detail.code, detail.status ?? 0, detail.retrying]));"""
        )
        page.goto(site.show(site.tag(**attributes)))
        talk(page)
        return page

    def told(self, page: Page) -> list[list[object]]:
        told: list[list[object]] = page.evaluate("told")
        return told

    @pytest.mark.parametrize(
        ("status_code", "code"),
        [
            (429, "RATE_LIMITED"),
            (503, "SERVICE_UNAVAILABLE"),
            (500, "INTERNAL_ERROR"),
            (502, "BAD_GATEWAY"),
            (504, "TIMEOUT"),
        ],
    )
    def test_a_passing_refusal_is_tried_once_more(
        self, site: Website, visit: Visit, status_code: int, code: str
    ) -> None:
        """The visitor reads when, waits `Retry-After`, and talks: two requests."""
        site.prepared.append(refusal(status_code, code, 1))
        page = self.opened(site, visit)
        expect(page.get_by_role("status")).to_have_text("The avatar is busy. Next try in 1 s.")
        connected(page)
        assert len(site.asked) == 2
        assert self.told(page) == [[code, status_code, True]]

    @pytest.mark.parametrize("chance", [0.0, 0.4, 0.9])
    def test_the_second_try_comes_up_to_a_second_later_by_chance(
        self, site: Website, visit: Visit, chance: float
    ) -> None:
        """All pages of a site are refused at the same moment: they must not come again at one."""
        site.prepared.append(refusal(503, "SERVICE_UNAVAILABLE", 5))
        page = visit.page
        page.clock.install()
        page.add_init_script(f"Math.random = () => {chance};")
        page.goto(site.show(site.tag()))
        page.clock.pause_at(page.evaluate("Date.now()") + 1000)
        page.get_by_role("button", name=LABEL).click()
        expect(page.get_by_role("status")).to_have_text("The avatar is busy. Next try in 5 s.")
        page.clock.run_for(5000 + round(chance * 1000) - 50)
        page.wait_for_timeout(300)  # what must not be asked would be on its way
        assert len(site.asked) == 1
        with page.expect_request("**/avatar-token"):
            page.clock.run_for(100)
        page.clock.resume()
        connected(page)
        assert len(site.asked) == 2

    def test_an_unwell_backend_is_asked_twice_and_no_more(
        self, site: Website, visit: Visit
    ) -> None:
        """500 without `Retry-After`, again and again: two requests, then a button."""
        site.prepared += [Answer("", {}, 500)] * 3
        page = self.opened(site, visit)
        expect(page.get_by_role("button", name="Try again")).to_be_visible(timeout=30_000)
        assert len(site.asked) == 2
        assert self.told(page) == [["HTTP_500", 500, True], ["HTTP_500", 500, False]]

    def test_closing_while_it_waits_opens_nothing_later(self, site: Website, visit: Visit) -> None:
        """The retry that was under way ends, and its token is kept for the next click."""
        site.prepared.append(refusal(429, "RATE_LIMITED", 1))
        page = self.opened(site, visit)
        expect(page.get_by_role("status")).to_have_text("The avatar is busy. Next try in 1 s.")
        page.get_by_role("button", name="Close").click()
        page.evaluate("EmbedBroker.getToken()")
        page.wait_for_timeout(200)
        assert len(page.frames) == 1
        talk(page)
        connected(page)
        assert len(site.asked) == 2

    def test_closed_and_opened_while_it_waits_it_is_one_frame(
        self, site: Website, visit: Visit
    ) -> None:
        """The token that comes is for both openings, and the one that was closed plays no more."""
        site.prepared.append(refusal(429, "RATE_LIMITED", 1))
        page = self.opened(site, visit)
        expect(page.get_by_role("status")).to_have_text("The avatar is busy. Next try in 1 s.")
        page.get_by_role("button", name="Close").click()
        talk(page)
        page.locator("iframe").first.wait_for()
        assert page.locator("iframe").count() == 1
        connected(page)
        assert len(site.asked) == 2

    def test_a_second_refusal_is_left_to_the_visitor(self, site: Website, visit: Visit) -> None:
        """Two requests and no third; until `Retry-After` has passed the button does nothing."""
        site.prepared += [refusal(429, "RATE_LIMITED", 1), refusal(429, "RATE_LIMITED", 2)]
        page = self.opened(site, visit)
        again = page.get_by_role("button", name="Try again")
        expect(again).to_be_disabled()
        expect(page.get_by_role("status")).to_have_text("The avatar is busy. Next try in 2 s.")
        failed = page.evaluate("EmbedBroker.getToken().catch((error) => error.code)")
        assert failed == "RATE_LIMITED"  # also for callers from the page, without a request
        assert len(site.asked) == 2
        expect(again).to_be_enabled()
        again.click()
        connected(page)
        assert len(site.asked) == 3

    def test_a_long_wait_is_not_waited_out(self, site: Website, visit: Visit) -> None:
        """A `Retry-After` of minutes: one request, a clear word, and nothing goes on behind it."""
        site.prepared.append(refusal(503, "SERVICE_UNAVAILABLE", 120))
        page = self.opened(site, visit)
        expect(page.get_by_role("status")).to_have_text("The avatar is busy. Next try in 120 s.")
        expect(page.get_by_role("button", name="Try again")).to_be_disabled()
        page.wait_for_timeout(1500)
        assert len(site.asked) == 1

    @pytest.mark.parametrize(("seconds", "is_waited_out"), [(30, True), (31, False)])
    def test_half_a_minute_is_the_longest_wait_for_a_second_try(
        self, site: Website, visit: Visit, seconds: int, *, is_waited_out: bool
    ) -> None:
        """Of what is longer the page is told that nobody tries again."""
        site.prepared.append(refusal(503, "SERVICE_UNAVAILABLE", seconds))
        page = self.opened(site, visit)
        said = f"The avatar is busy. Next try in {seconds} s."
        expect(page.get_by_role("status")).to_have_text(said)
        assert self.told(page) == [["SERVICE_UNAVAILABLE", 503, is_waited_out]]

    def test_a_wait_stays_a_wait_for_who_opens_again(self, site: Website, visit: Visit) -> None:
        """The button that was enabled for the last opening is not for this one."""
        site.prepared.append(refusal(503, "SERVICE_UNAVAILABLE", 120))
        page = self.opened(site, visit)
        expect(page.get_by_role("button", name="Try again")).to_be_disabled()
        page.get_by_role("button", name="Close").click()
        talk(page)
        expect(page.get_by_role("status")).to_have_text(re.compile("Next try in 1[12][0-9] s"))
        page.wait_for_timeout(200)
        expect(page.get_by_role("button", name="Try again")).to_be_disabled()
        assert len(site.asked) == 1

    def test_everybody_who_waits_for_the_same_request_reads_so(
        self, site: Website, visit: Visit
    ) -> None:
        """Two avatars, opened before and while it waits, and a caller from the page between."""
        site.prepared.append(refusal(429, "RATE_LIMITED", 3))
        tags = [site.tag(mode="inline", label=label) for label in ("One", "Two", "Three")]
        page = visit.page
        page.goto(site.show("".join(tags)))
        expect(page.get_by_role("button", name="Three")).to_be_visible()
        page.evaluate(
            """() => {
              const [one, two] = document.querySelectorAll("script");
              EmbedBroker.mount(one, one.dataset).open();
              EmbedBroker.mount(two, two.dataset).open();
              EmbedBroker.getToken();
            }"""
        )
        busy = re.compile("The avatar is busy. Next try in [23] s.")
        said = page.get_by_role("status").filter(visible=True)
        expect(said.nth(0)).to_have_text(busy)
        expect(said.nth(1)).to_have_text(busy)
        page.get_by_role("button", name="Three").click()
        expect(said.nth(2)).to_have_text(busy)
        expect(page.locator("iframe")).to_have_count(3)
        assert len(site.asked) == 2

    @pytest.mark.parametrize("status_code", [401, 403, 409, 501])
    def test_a_refusal_that_stays_is_not_tried_again(
        self, site: Website, visit: Visit, status_code: int
    ) -> None:
        """One request, one message, no button that could only fail."""
        site.prepared.append(Answer("<h1>Sorry</h1>", {"Content-Type": "text/html"}, status_code))
        page = self.opened(site, visit)
        expect(page.get_by_role("status")).to_have_text("The avatar is not available.")
        expect(page.get_by_role("button", name="Try again")).to_have_count(0)
        page.wait_for_timeout(500)
        assert len(site.asked) == 1
        assert self.told(page) == [[f"HTTP_{status_code}", status_code, False]]

    def test_an_answer_without_a_token_opens_no_frame(self, site: Website, visit: Visit) -> None:
        """A login page with status 200, as a proxy may send it."""
        site.prepared.append(Answer("<h1>Log in</h1>", {"Content-Type": "text/html"}))
        page = self.opened(site, visit)
        expect(page.get_by_role("status")).to_have_text("The avatar is not available.")
        assert self.told(page) == [["NO_TOKEN", 200, False]]
        assert len(page.frames) == 1

    def test_the_broker_s_own_limit_as_a_visitor_sees_it(
        self, visit: Visit, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        """A real 429: one token every five seconds, asked for twice by reloading."""
        folder = tmp_path_factory.mktemp("limited")
        settings = {"limits.fingerprint.rate": 12, "limits.fingerprint.burst": 1}
        with broker(folder, settings) as limited, website(limited) as site:
            page = self.opened(site, visit)
            connected(page)
            page.reload()
            talk(page)
            expect(page.get_by_role("status")).to_have_text(re.compile("Next try in [1-5] s"))
            expect(page.locator("iframe")).to_be_visible(timeout=15_000)
            connected(page)
            assert len(site.asked) == 3
            assert self.told(page) == [["RATE_LIMITED", 429, True]]

    def test_a_page_that_is_too_old_says_so(self, site: Website, visit: Visit) -> None:
        """`data-token` of a cached page, no route: the viewer tells; the way out is a reload."""
        page = self.opened(site, visit, token=token(-60), token_url="")
        expect(page.get_by_role("status")).to_have_text("This page was open for too long.")
        expect(page.locator("iframe")).to_have_count(0)
        assert self.told(page) == [["TOKEN_EXPIRED", 0, False]]
        site.show(site.tag(token=token(600), token_url=""))
        page.get_by_role("button", name="Try again").click()
        talk(page)
        assert connected(page) == "signed-here"

    def test_an_expired_page_token_is_replaced_where_there_is_a_route(
        self, site: Website, visit: Visit
    ) -> None:
        """One request, and the visitor notices nothing."""
        page = self.opened(site, visit, token=token(-10))
        assert connected(page) == site.sessions[0]
        assert len(site.asked) == 1
        assert self.told(page) == []

    def test_a_token_that_the_viewer_finds_expired_is_replaced_once(
        self, site: Website, visit: Visit
    ) -> None:
        """The viewer says so, the script asks once more, and the call begins."""
        site.prepared.append(token_answer(token(-60), int(time.time()) + 3600))
        page = self.opened(site, visit)
        connected(page)
        assert len(site.asked) == 2
        assert self.told(page) == [["TOKEN_EXPIRED", 0, True]]

    def test_expired_tokens_do_not_loop(self, site: Website, visit: Visit) -> None:
        """Expired again: a message and a button; two requests, however long one looks at it."""
        expired = token_answer(token(-60), int(time.time()) + 3600)
        site.prepared += [expired] * 5
        page = self.opened(site, visit)
        expect(page.get_by_role("button", name="Try again")).to_be_visible()
        expect(page.get_by_role("status")).to_have_text("This page was open for too long.")
        page.wait_for_timeout(2000)
        assert len(site.asked) == 2
        assert self.told(page) == [["TOKEN_EXPIRED", 0, True], ["TOKEN_EXPIRED", 0, False]]

    def test_a_frame_that_the_page_s_policy_blocks_is_told(
        self, site: Website, visit: Visit
    ) -> None:
        """The usual blank frame: `frame-src` without the viewer. A message, and a code."""
        page = visit.page
        page.add_init_script(
            """window.told = [];
            document.addEventListener("embed-broker:error", ({ detail }) => told.push(detail.code))
            """
        )
        for allowed in ("'self'", f"'self' {site.embed_origin}"):  # at once, and after the redirect
            page.goto(site.show(site.tag(), {"Content-Security-Policy": f"frame-src {allowed}"}))
            talk(page)
            expect(page.get_by_role("status")).to_have_text("The avatar is not available.")
            assert page.evaluate("told") == ["FRAME_BLOCKED"]
            assert len(page.frames) == 1

    def test_a_policy_that_only_reports_blocks_nothing(self, site: Website, visit: Visit) -> None:
        """`Report-Only`: the browser complains and loads the frame, so the call begins."""
        page = visit.page
        header = "Content-Security-Policy-Report-Only"
        page.goto(site.show(site.tag(), {header: "frame-src 'none'"}))
        talk(page)
        connected(page)
        assert any("Report Only" in line or "report-only" in line for line in visit.complaints)

    def test_a_call_that_begins_is_not_ended_by_another_frame_s_trouble(
        self, site: Website, visit: Visit
    ) -> None:
        """The policy blocks an advertisement while the viewer is still loading."""
        page = visit.page
        policy = f"frame-src {site.embed_origin} {site.viewer_origin}"
        page.goto(site.show(site.tag(), {"Content-Security-Policy": policy}))
        held: list[Route] = []
        page.route(f"{site.embed_origin}/embed/**", lambda route: held.append(route))  # noqa: PLW0108 - playwright marks it
        talk(page)
        expect(page.locator("iframe")).to_have_count(1)
        page.evaluate(BLOCKED_ADVERTISEMENT)
        (viewer,) = held
        viewer.continue_()
        connected(page)

    def test_a_running_call_is_not_ended_by_another_frame_s_trouble(
        self, site: Website, visit: Visit
    ) -> None:
        """An advertisement that the policy blocks has nothing to do with the avatar."""
        page = visit.page
        policy = f"frame-src {site.embed_origin} {site.viewer_origin}"
        page.goto(site.show(site.tag(), {"Content-Security-Policy": policy}))
        talk(page)
        connected(page)
        page.evaluate(BLOCKED_ADVERTISEMENT)
        connected(page)


class TestMessages:
    def test_the_viewer_may_end_the_call(self, site: Website, visit: Visit) -> None:
        """Its own button, in its own frame."""
        page = visit.page
        page.goto(site.show(site.tag()))
        talk(page).get_by_role("button", name="End the call").click()
        expect(page.locator("iframe")).to_have_count(0)

    @pytest.mark.parametrize("said", ["close", "expired"])
    def test_nobody_else_may(self, site: Website, visit: Visit, said: str) -> None:
        """Not the page itself, not another frame of the viewer, not the frame when it moved on."""
        page = visit.page
        site.pages["/elsewhere"] = Answer("<p>elsewhere", {"Content-Type": "text/html"})
        stranger = f'<iframe src="{site.viewer_origin}/demo/viewer" title="stranger"></iframe>'
        page.goto(site.show(f"{stranger}{site.tag(mode='inline')}"))
        page.get_by_role("button", name=LABEL).click()
        connected(page)
        known, frame = (
            page.locator(f"iframe{which}").element_handle().content_frame()
            for which in ("[title=stranger]", "[allow]")
        )
        say = f"parent.postMessage({{ type: 'embed-broker:{said}' }}, '*')"
        page.evaluate(say)
        known.evaluate(say)
        page.evaluate("dispatchEvent(new MessageEvent('message', { data: { type: 'x' } }))")
        frame.evaluate("url => location.assign(url)", f"{site.url}/elsewhere")
        page.frame_locator("iframe[allow]").get_by_text("elsewhere").wait_for()
        page.frame_locator("iframe[allow]").locator("body").evaluate(say)
        page.evaluate("new Promise((done) => setTimeout(done))")  # messages come in their order
        assert len(page.frames) == 3
        assert len(site.asked) == 1


ATTRIBUTES = {
    'data-agent="A1" data-token-uri="/t"': [
        "data-token-uri: unknown",
        "data-token-url: missing",
    ],
    'data-agent="A1" data-tokenUrl="/t" data-token="x.y.z"': ["data-tokenurl: unknown"],
    'data-token-url="/t"': ["data-agent: missing"],
    'data-agnt="A1" data-token-url="/t"': [
        "data-agnt: unknown",
        "data-agent: missing",
    ],
    'data-agnt="A1"': ["data-agnt: unknown"],
    'data-agent="" data-token-url="/t"': ["data-agent: missing"],
    'data-agent="A 1" data-token-url="/t"': ["data-agent: must match /^[\\w-]{1,64}$/"],
    'data-agent="A1"': ["data-token-url: missing"],
    'data-agent="A1" data-token-url="http://x.example/"': [
        "data-token-url: must be https or of this origin"
    ],
    'data-agent="A1" data-token-url="/t" data-mode="Dialog"': [
        "data-mode: must match /^(button|dialog|inline|none)$/"
    ],
    'data-agent="A1" data-token="a b"': ["data-token: must match /^[\\w.~+/=-]{0,4096}$/"],
    'data-agent="A1" data-token-url="/t" data-embed-origin="https://x/"': [
        "data-embed-origin: must be an origin: https or localhost"
    ],
    'data-agent="A1" data-token-url="/t" data-viewer-origins="y"': [
        "data-viewer-origins: must be an origin: https or localhost"
    ],
    "": [],
    'nonce="n" id="x" data-agent="A1" data-token-url="/t"': [],
}
"""What a page may get wrong, and what its console says of it."""


@pytest.mark.parametrize("attributes", ATTRIBUTES)
def test_the_console_names_the_attribute_that_is_unknown_missing_or_wrong(
    site: Website, visit: Visit, attributes: str
) -> None:
    """One line for each; nothing where nothing is wrong, nor for a tag that wants the functions."""
    page = visit.page
    page.goto(
        site.show(f'<script src="{site.broker.url}/embed.js" {attributes}></script>'),
        wait_until="load",
    )
    page.evaluate("EmbedBroker.fingerprint()")
    assert visit.complaints == [f"embed.js: {told}" for told in ATTRIBUTES[attributes]]
