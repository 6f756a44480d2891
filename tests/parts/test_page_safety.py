"""The script where somebody means harm, and where a policy forbids everything that can be."""

import html
from pathlib import Path

import pytest
from browsing import Visit, without_foreign_cookies
from playwright.sync_api import Browser, Route, expect
from website import AGENT, Website

pytestmark = pytest.mark.parts

LABEL = "Talk to the avatar"

EVIL = "evil.example"

HOSTILE = [
    "javascript:pwned=1",
    "JaVaScRiPt:pwned=1",
    " javascript:pwned=1",
    "java\tscript:pwned=1",
    "javascript://localhost/%0apwned=1",
    "data:text/html,<script>parent.pwned=1</script>",
    "data:text/javascript,pwned=1",
    "blob:http://localhost/1",
    "vbscript:pwned",
    "file:///etc/passwd",
    "about:blank",
    "about:srcdoc",
    '"><script>pwned=1</script>',
    "'><script>pwned=1</script>",
    "<img src=x onerror=pwned=1>",
    "<svg onload=pwned=1>",
    '" onload="pwned=1',
    "' onerror='pwned=1",
    "</script><script>pwned=1</script>",
    "${pwned=1}",
    "{{pwned=1}}",
    "../",
    "../../evil",
    "..%2f..%2fevil",
    "a/../../../evil",
    "?x=",
    "a?token=stolen",
    "a#fragment",
    "a&token=stolen",
    "a\\..\\..\\evil",
    f"//{EVIL}",
    f"\\\\{EVIL}",
    f"http://{EVIL}",
    f"https://{EVIL}/path",
    f"https://localhost@{EVIL}",
    f"https://user:password@{EVIL}/",
    f"http://localhost.{EVIL}",
    f"http://127.0.0.1.{EVIL}",
    "https://www.bithuman.ai.evil.example/x",
    "\u202ea78\u0000\r\nX: y",
]


def many_tags(site: Website, attribute: str, values: list[str]) -> str:
    """Return a tag for each value of one attribute, everything else about it being right."""
    good = {"token": "header.payload.signature", "token_url": "", "mode": "inline"}
    return "".join(
        site.tag(**{**good, "label": f"Talk {number}", attribute: html.escape(value)})
        for number, value in enumerate(values)
    )


PRESS_EVERYTHING = """
for (const host of document.querySelectorAll("div")) {
  for (const button of host.shadowRoot?.querySelectorAll("button") ?? []) button.click();
}
"""

COUNT = "document.querySelectorAll('div').length"


class Watch:
    """What a page asked for; nothing of it leaves, but what the site and the script are made of."""

    def __init__(self, visit: Visit, site: Website) -> None:
        self.asked: list[str] = []
        self._known = (f"{site.url}/", f"{site.broker.url}/embed.js")
        visit.page.route("**/*", self._answer)

    def _answer(self, route: Route) -> None:
        url = route.request.url
        if url.startswith(self._known):
            route.continue_()
            return
        self.asked.append(url)
        route.fulfill(status=200, content_type="text/html", body="<p>a frame</p>")


def loaded(visit: Visit, site: Website, content: str) -> Watch:
    """Load a page until all of its scripts have run, press what is there, and wait."""
    watch = Watch(visit, site)
    page = visit.page
    page.on("dialog", lambda dialog: visit.complaints.append(f"a dialog: {dialog.message}"))
    page.goto(site.show(content), wait_until="load")
    page.evaluate(PRESS_EVERYTHING)
    page.wait_for_timeout(300)
    return watch


class TestHostileAttributes:
    def test_there_are_forty_of_them(self) -> None:
        """As promised."""
        assert len(set(HOSTILE)) == 40

    @pytest.mark.parametrize("attribute", ["agent", "embed_origin", "viewer_origins", "mode"])
    def test_what_has_a_rule_is_refused_and_draws_nothing(
        self, browser: Browser, site: Website, attribute: str
    ) -> None:
        """No button, no frame, no request, no script: one line in the console for each."""
        visit = Visit(browser)
        watch = loaded(visit, site, many_tags(site, attribute, HOSTILE))
        page = visit.page
        assert page.evaluate("typeof pwned") == "undefined"
        assert page.evaluate(COUNT) == 0
        assert watch.asked == []
        assert len(page.frames) == 1
        assert len(visit.complaints) == len(HOSTILE)
        assert all(line.startswith("embed.js: data-") for line in visit.complaints)
        visit.close()

    def test_control_the_same_tags_work_with_good_values(
        self, browser: Browser, site: Website
    ) -> None:
        """So it is the values that were refused."""
        visit = Visit(browser)
        watch = loaded(visit, site, many_tags(site, "agent", ["A1", "A2", "A3"]))
        assert visit.page.evaluate(COUNT) == 3
        assert len(watch.asked) == 3
        visit.close()

    @pytest.mark.parametrize("attribute", ["label", "title", "token"])
    def test_what_may_be_any_text_stays_text(
        self, browser: Browser, site: Website, attribute: str
    ) -> None:
        """Labels and titles are shown as they are; a token stays the value of one parameter."""
        visit = Visit(browser)
        watch = loaded(visit, site, many_tags(site, attribute, HOSTILE))
        page = visit.page
        assert page.evaluate("typeof pwned") == "undefined"
        start = f"{site.embed_origin}/embed/{AGENT}?token="
        assert watch.asked
        for url in watch.asked:
            assert url.startswith(start)
            assert set(url.removeprefix(start)).isdisjoint("&#/?<\"'")
        if attribute != "token":
            assert page.evaluate(COUNT) == len(watch.asked) == len(HOSTILE)
            assert visit.complaints == []
        visit.close()

    def test_a_token_url_is_asked_over_https_or_not_at_all(
        self, browser: Browser, site: Website
    ) -> None:
        """Whatever it answers, the frame is the embed origin's, and no script runs."""
        visit = Visit(browser)
        tags = many_tags(site, "token_url", HOSTILE).replace('data-token="', 'data-x="')
        watch = loaded(visit, site, tags)
        assert visit.page.evaluate("typeof pwned") == "undefined"
        assert all(url.startswith("https://") for url in watch.asked)
        assert len(visit.page.frames) == 1
        visit.close()

    def test_elements_that_stand_in_for_globals_change_nothing(
        self, browser: Browser, site: Website
    ) -> None:
        """`<img name=currentScript>`, `<form id=EmbedBroker>`: markup that others put in."""
        visit = Visit(browser)
        clobber = (
            '<img name="currentScript" data-agent="evil" data-token="x" alt="">'
            '<form id="EmbedBroker"><input name="start"><input name="mount"></form>'
        )
        watch = loaded(visit, site, clobber + site.tag(token="t", token_url=""))
        assert visit.page.evaluate("typeof EmbedBroker.mount") == "function"
        assert visit.page.evaluate(COUNT) == 0
        assert watch.asked == []
        visit.close()


class TestStrictPolicy:
    def test_everything_works_under_the_strictest_policy_without_foreign_cookies(
        self, browser: Browser, site: Website, tmp_path: Path
    ) -> None:
        """Button, token, frame, microphone, close; and not one line in the console.

        No inline code or style, Trusted Types without a single policy, third-party storage blocked.
        """
        policy = (
            f"default-src 'none'; script-src {site.broker.url}; connect-src 'self'; img-src data:;"
            f" frame-src {site.embed_origin} {site.viewer_origin}; base-uri 'none';"
            " form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
        )
        with without_foreign_cookies(browser, tmp_path / "profile") as context:
            visit = Visit(context)
            page = visit.page
            for mode in ("button", "dialog", "inline"):
                page.goto(site.show(site.tag(mode=mode), {"Content-Security-Policy": policy}))
                launcher = page.get_by_role("button", name=LABEL)
                launcher.click()
                expect(page.frame_locator("iframe").locator("#heard")).to_contain_text("heard")
                blocked = page.frames[1].evaluate(
                    "(() => { try { return !localStorage } catch (error) { return error.name } })()"
                )
                assert blocked == "SecurityError"  # so the browser does block what is foreign
                page.get_by_role("button", name="Close").click()
                expect(page.locator("iframe")).to_have_count(0)
                colour = launcher.evaluate("button => getComputedStyle(button).backgroundColor")
                assert colour == "rgb(29, 78, 216)"  # and the style is there
            assert visit.complaints == []

    @pytest.mark.parametrize("mode", ["button", "dialog", "inline"])
    def test_the_demonstration_has_such_a_policy_and_complains_of_nothing(
        self, browser: Browser, site: Website, mode: str
    ) -> None:
        """Its page, its viewer, its limits that move: nobody else is asked for anything."""
        visit = Visit(browser)
        page = visit.page
        answer = page.goto(f"{site.broker.url}/demo?mode={mode}")
        assert answer is not None
        policy = answer.headers["content-security-policy"]
        assert "require-trusted-types-for 'script'" in policy
        assert "unsafe" not in policy
        page.get_by_role("button", name="Ask for a token").click()
        expect(page.locator("#count")).to_contain_text("19 of 20")
        page.get_by_role("button", name=LABEL).click()
        expect(page.frame_locator("iframe").locator("#heard")).to_contain_text("heard")
        page.get_by_role("button", name="Close").click()
        expect(page.locator("#log")).to_contain_text("the same token again")
        if mode == "button":
            page.get_by_role("button", name="Ask 25 times").click()
            expect(page.locator("#log")).to_contain_text("429 RATE_LIMITED")
            visit.complaints = [line for line in visit.complaints if "429" not in line]
        assert visit.complaints == []
        names = ("localhost", "127.0.0.1", "viewer.localhost")
        port = site.broker.url.rpartition(":")[2]
        assert visit.foreign(*(f"http://{name}:{port}" for name in names)) == []
        visit.close()
