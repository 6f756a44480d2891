"""The script under other people's tools: an accessibility checker, React, TypeScript."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from browsing import Visit
from documents import of
from playwright.sync_api import Browser, Frame, Page, expect
from running import output_of
from website import AGENT, Answer, Website, refusal

from broker.web.pages.embed_script import FOLDER

pytestmark = pytest.mark.parts

LABEL = "Talk to the avatar"

NODE = Path(__file__).with_name("node")


@pytest.fixture(scope="module")
def checker(packages: Path) -> str:
    """Return axe-core as text: run by the browser itself, past the page's policy."""
    return (packages / "node_modules/axe-core/axe.min.js").read_text(encoding="utf-8")


class TestAccessibility:
    def violations(self, where: Page | Frame, checker: str) -> list[str]:
        """Return what the checker finds, with all of its rules but those for whole sites."""
        where.evaluate(checker)
        found: list[dict[str, Any]] = where.evaluate(
            "axe.run(document, { iframes: false }).then((result) => result.violations)"
        )
        return [f"{v['id']}: {[node['target'] for node in v['nodes']]}" for v in found]

    @pytest.mark.parametrize(
        ("mode", "scheme"),
        [("button", "light"), ("button", "dark"), ("dialog", "dark"), ("inline", "light")],
    )
    def test_the_checker_finds_nothing(
        self, browser: Browser, site: Website, checker: str, mode: str, scheme: str
    ) -> None:
        """Closed, waiting, refused, open; the page's side and the viewer's; light and dark."""
        visit = Visit(browser, scheme=scheme)
        page = visit.page
        content = f"<main><h1>A site</h1>{site.tag(mode=mode)}</main>"
        style = ":root { color-scheme: light dark; background: Canvas; color: CanvasText }"
        page.goto(site.show(f"<style>{style}</style>{content}"))
        launcher = page.get_by_role("button", name=LABEL)
        expect(launcher).to_be_visible()
        assert self.violations(page, checker) == []
        site.prepared.append(refusal(429, "RATE_LIMITED", 31))
        launcher.click()
        expect(page.get_by_role("button", name="Try again")).to_be_visible()
        assert self.violations(page, checker) == []
        page.reload()
        launcher.click()
        expect(page.frame_locator("iframe").locator("#heard")).to_contain_text("heard")
        assert self.violations(page, checker) == []
        assert self.violations(page.frames[1], checker) == []
        visit.close()

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_the_checker_finds_nothing_in_the_demonstration(
        self, browser: Browser, site: Website, checker: str, scheme: str
    ) -> None:
        """With lines of both kinds in its log."""
        visit = Visit(browser, scheme=scheme)
        page = visit.page
        page.goto(f"{site.broker.url}/demo")
        page.get_by_role("button", name="Ask 25 times").click()
        expect(page.locator("#log")).to_contain_text("429")
        assert self.violations(page, checker) == []
        visit.close()

    def test_the_checker_can_find_something(
        self, browser: Browser, site: Website, checker: str
    ) -> None:
        """Also in the shadow tree in which the script draws."""
        visit = Visit(browser)
        visit.page.goto(site.show(f"<main><h1>A site</h1>{site.tag()}</main>"))
        expect(visit.page.get_by_role("button", name=LABEL)).to_be_visible()
        visit.page.evaluate(
            "document.querySelector('div').shadowRoot.querySelector('button').textContent = ''"
        )
        assert any("button-name" in line for line in self.violations(visit.page, checker))
        visit.close()


class TestReact:
    PAGE = """
    import { createRoot } from "react-dom/client";
    import { StrictMode, useState } from "react";

    window.mounts = 0;
    const { mount } = EmbedBroker;
    const options = OPTIONS;

    function Token() {
      const [token, setToken] = useState("");
      useEffect(() => {
        window.mounts += 1;
        EmbedBroker.getToken(options).then(setToken);
      }, []);
      return <output>{token}</output>;
    }

    function Site() {
      const [there, setThere] = useState(true);
      return (
        <main>
          {there && <Avatar {...options} />}
          <Token />
          <button onClick={() => setThere(false)}>Take it away</button>
        </main>
      );
    }

    const root = document.body.appendChild(document.createElement("div"));
    createRoot(root).render(<StrictMode><Site /></StrictMode>);
    """

    def test_the_page_s_component_mints_once_in_strict_mode(
        self, browser: Browser, site: Website, packages: Path
    ) -> None:
        """React mounts everything twice: one button, one request, and nothing left behind."""
        (component,) = [block.text for block in of("jsx")]
        options = {
            "agent": AGENT,
            "tokenUrl": "/avatar-token",
            "embedOrigin": site.embed_origin,
            "mode": "inline",
        }
        source = packages / "site.jsx"
        page_source = self.PAGE.replace("OPTIONS", json.dumps(options))
        source.write_text(f"{component}\n{page_source}", encoding="utf-8")
        bundle = output_of(
            [
                str(packages / "node_modules/.bin/esbuild"),
                str(source),
                "--bundle",
                "--jsx=automatic",
                "--define:process.env.NODE_ENV='development'",
            ]
        )
        site.pages["/site.js"] = Answer(bundle, {"Content-Type": "text/javascript; charset=utf-8"})
        site.asked.clear()
        visit = Visit(browser)
        page = visit.page
        page.goto(
            site.show(
                f'<script src="{site.broker.url}/embed.js"></script>'
                '<script src="/site.js"></script>'
            )
        )
        launcher = page.get_by_role("button", name=LABEL)
        expect(launcher).to_have_count(1)
        expect(page.locator("output")).to_contain_text(".")
        launcher.click()
        expect(page.frame_locator("iframe").locator("#agent")).to_have_text(AGENT)
        assert page.evaluate("mounts") == 2  # so React did mount twice
        assert len(site.asked) == 1
        page.get_by_role("button", name="Take it away").click()
        expect(page.locator("iframe")).to_have_count(0)
        expect(launcher).to_have_count(0)
        assert visit.complaints == []
        visit.close()

    def test_without_a_clean_up_there_is_still_one(self, browser: Browser, site: Website) -> None:
        """Two mounts into one element are one avatar."""
        visit = Visit(browser)
        visit.page.goto(site.show(f'<script src="{site.broker.url}/embed.js"></script><p></p>'))
        same = visit.page.evaluate(
            """() => {
              const target = document.querySelector("p");
              const options = { agent: "A1", tokenUrl: "/avatar-token" };
              return EmbedBroker.mount(target, options) === EmbedBroker.mount(target, options);
            }"""
        )
        assert same is True
        expect(visit.page.get_by_role("button", name=LABEL)).to_have_count(1)
        visit.close()


class TestTypes:
    def complaints(self, packages: Path, *sources: Path) -> str:
        """Return what the compiler says, strictly."""
        command = [str(packages / "node_modules/.bin/tsc"), "--noEmit", "--strict"]
        command += ["--lib", "es2022,dom", "--types", "", *map(str, sources)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=False, cwd=packages
        )
        return done.stdout + done.stderr

    def test_they_say_what_a_page_may_write(self, packages: Path) -> None:
        """Right calls compile; wrong ones are refused, or `@ts-expect-error` is an error."""
        assert self.complaints(packages, FOLDER / "embed.d.ts", NODE / "types.ts") == ""

    def test_they_name_what_there_is(self, browser: Browser, site: Website, packages: Path) -> None:
        """Every member of the API and every text, and none that is not there."""
        visit = Visit(browser)
        visit.page.goto(site.show(f'<script src="{site.broker.url}/embed.js"></script>'))
        members, texts = visit.page.evaluate(
            "[Object.keys(EmbedBroker), Object.keys(EmbedBroker.texts)]"
        )
        visit.close()
        names = packages / "names.ts"
        names.write_text(
            "const api: Record<keyof EmbedBroker.Api, 0> ="
            f" {json.dumps(dict.fromkeys(members, 0))};\n"
            f"const texts: EmbedBroker.Api['texts'] = {json.dumps(dict.fromkeys(texts, ''))};\n"
            "console.log(api, texts);",
            encoding="utf-8",
        )
        assert self.complaints(packages, FOLDER / "embed.d.ts", names) == ""
