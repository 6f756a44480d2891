/*! embed-token-broker, MIT licence. Documented in embed.d.ts. */
(() => {
  "use strict";

  // It might be an <img name="currentScript">.
  const current = document.currentScript;
  const tag = current instanceof HTMLScriptElement && current;
  const { EmbedBroker } = window;
  if (typeof EmbedBroker?.start === "function") return tag && EmbedBroker.start(tag);

  // Without stars only the origin in src may listen, which redirects.
  const ALLOW = "microphone *; camera *; autoplay *";
  const MARGIN = 60_000; // ms that must be left
  const PATIENCE = 30; // s that may be waited
  const EXPIRED = "TOKEN_EXPIRED";

  const DEFAULTS = { agent: "", token: "", tokenUrl: "", mode: "button",
    embedOrigin: "https://www.bithuman.ai", viewerOrigins: "" };

  const texts = {
    label: "Talk to the avatar",
    title: "Talking avatar",
    close: "Close",
    connecting: "Connecting\u2026",
    busy: "The avatar is busy. Next try in {seconds} s.",
    refused: "The avatar is not available.",
    expired: "This page was open for too long.",
    again: "Try again",
  };

  const STYLE = `
    :host { all: initial; color-scheme: inherit; display: block; font: 1rem/1.4 system-ui }
    * { box-sizing: border-box }
    [hidden], .panel:not([open]) { display: none !important }
    button { min-height: 2.75rem; padding: 0 1.25rem; border: 0; border-radius: 2rem; font: inherit;
      background: var(--embed-broker-accent, #1d4ed8); color: var(--embed-broker-ink, #fff) }
    button:disabled { opacity: .6 }
    button:focus-visible { outline: 3px solid CanvasText; outline-offset: -5px }
    .panel { display: flex; flex-direction: column; padding: 0; border: 1px solid GrayText;
      border-radius: 1rem; overflow: hidden; background: Canvas; color: CanvasText }
    header { display: flex; align-items: center; padding-left: 1rem }
    header button { margin-left: auto; background: none; color: inherit }
    .stage { flex: 1; position: relative; display: grid; gap: 1rem; place-content: center }
    p { margin: 1rem }
    iframe { position: absolute; width: 100%; height: 100%; border: 0 }
    .panel.inline { height: var(--embed-broker-height, 32rem) }
    .panel.dialog { width: 60rem; height: 44rem }
    .button { position: fixed; z-index: 9999999; inset: auto 1rem 1rem auto }
    .panel.button { width: 24rem; height: 38rem; max-height: calc(100% - 2rem) }
    @media (max-width: 30rem) {
      .panel:not(.inline) { inset: 0; width: 100%; height: 100%; max-width: none; max-height: none }
    }
    ::backdrop { background: #0009 }`;

  const emit = (name, detail) =>
    document.dispatchEvent(new CustomEvent(`embed-broker:${name}`, { detail }));

  const failure = (code, message, more) => Object.assign(new Error(message), { code, ...more });

  function report({ code, status, retryAfter, message }, agent, retrying = false) {
    emit("error", { agent, code, status, retryAfter, message, retrying });
    if (code === "CONFIG") console.error(`embed.js: ${message}`);
  }

  const PATTERNS = {
    agent: /^[\w-]{1,64}$/,
    token: /^[\w.~+/=-]{0,4096}$/,
    mode: /^(button|dialog|inline|none)$/,
  };

  // The origin of a URL that is https, of this page or of this machine.
  function safeOrigin(text) {
    try {
      const { protocol, hostname, origin } = new URL(text, location);
      const near = origin === location.origin || /^(.+\.)?localhost$|^127\.0\.0\.1$/.test(hostname);
      return (protocol === "https:" || (protocol === "http:" && near)) && origin;
    } catch {
      return false;
    }
  }

  function check(given) {
    const options = { ...DEFAULTS, ...texts, ...given };
    const { agent, token, tokenUrl, embedOrigin, viewerOrigins } = options;
    const demand = (fine, name, value, rule) => {
      if (!fine) throw failure("CONFIG", `data-${name}: ${value ? `must ${rule}` : "missing"}`);
    };
    for (const name in PATTERNS) {
      demand(PATTERNS[name].test(options[name]), name, options[name], `match ${PATTERNS[name]}`);
    }
    const route = tokenUrl ? safeOrigin(tokenUrl) : token;
    demand(route, "token-url", tokenUrl, "be https or of this origin");
    options.origins = `${embedOrigin} ${viewerOrigins}`.trim().split(/\s+/);
    options.origins.forEach((origin, index) => {
      const name = index ? "viewer-origins" : "embed-origin";
      demand(safeOrigin(origin) === origin, name, 1, "be an origin: https or localhost");
    });
    options.slot = slots[[agent, tokenUrl, token]] ??= {
      token, skew: 0, ends: endOf(token, !tokenUrl) };
    return options;
  }

  let device;

  function fingerprint() {
    try {
      device ??= localStorage.getItem("avatar-device");
    } catch {}
    if (!/^[0-9a-f]{32}$/.test(device)) {
      const bytes = crypto.getRandomValues(new Uint8Array(16));
      device = Array.from(bytes, (byte) => (byte + 256).toString(16).slice(1)).join("");
      try {
        localStorage.setItem("avatar-device", device);
      } catch {}
    }
    return device;
  }

  const slots = {};

  // In ms; `alone`: by its life, for the device's clock may be off.
  function endOf(token, alone) {
    try {
      const claims = token.split(".")[1].replace(/-/g, "+").replace(/_/g, "/");
      const { exp, iat } = JSON.parse(atob(claims));
      return (alone && Date.now() + (exp - iat) * 1000) || exp * 1000 || Infinity;
    } catch {
      return Infinity;
    }
  }

  // `waiting` is told the seconds.
  async function obtain(options, waiting) {
    const { slot } = options;
    if (slot.token && slot.ends - Date.now() - slot.skew > MARGIN) return slot.token;
    if (!options.tokenUrl) throw failure(EXPIRED, "data-token has expired");
    const retryAfter = Math.ceil((slot.free - Date.now()) / 1000);
    if (!slot.flight) {
      if (retryAfter > 0) throw Object.assign(slot.error, { retryAfter });
      slot.waiting = [];
      slot.flight = request(options).finally(() => (slot.flight = null));
    }
    if (retryAfter > 0) waiting?.(retryAfter);
    slot.waiting.push(waiting);
    return slot.flight;
  }

  async function request(options, retried = false) {
    const { agent, slot } = options;
    try {
      Object.assign(slot, await ask(options));
      emit("token", { agent, session: slot.session, expires: slot.ends });
      return slot.token;
    } catch (error) {
      const wait = error.retryAfter;
      Object.assign(slot, { error, free: Date.now() + wait * 1000 });
      const retrying = !retried && wait <= PATIENCE;
      report(error, agent, retrying);
      if (!retrying) throw error;
      for (const waiting of slot.waiting) waiting?.(wait);
      await new Promise((done) => setTimeout(done, (wait + Math.random()) * 1000));
      return request(options, true);
    }
  }

  async function ask({ agent, tokenUrl }) {
    let answer, body;
    try {
      answer = await fetch(tokenUrl, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ agent_id: agent, fingerprint: fingerprint() }),
        cache: "no-store",
        signal: AbortSignal.timeout(20_000),
      });
      body = await answer.json().catch(() => null);
    } catch {
      throw failure("NETWORK", `no answer from ${tokenUrl}`, { retryAfter: 2 });
    }
    const { ok, status, headers } = answer;
    const { token, session_id: session, expires_at: expires } = body?.data ?? body ?? {};
    const skew = Date.parse(headers.get("Date")) - Date.now() || 0;
    if (ok && token) return { token, session, skew, ends: expires * 1000 || endOf(token) };
    const code = ok ? "NO_TOKEN" : body?.error?.code ?? `HTTP_${status}`;
    const wait = Number(headers.get("Retry-After")) || 2;
    const retryAfter = /429|50[0234]/.test(status) ? wait : undefined;
    throw failure(code, `${status} ${code} from ${tokenUrl}`, { status, retryAfter });
  }

  function make(name, properties, ...children) {
    const element = Object.assign(document.createElement(name), properties);
    element.append(...children);
    return element;
  }

  const widgets = new WeakMap();

  function mount(target, given) {
    if (widgets.has(target)) return widgets.get(target);
    const options = check(given);
    const { agent, mode, label, title, tokenUrl, embedOrigin, origins } = options;
    const inline = mode === "inline";
    let frame, shown, loaded, retried, timer;
    let turn = 0;

    const launcher = make("button", { className: mode, onclick: () => open() }, label);
    const closer = make("button", { ariaLabel: texts.close, onclick: close }, "\u2715");
    const bar = make("header", { hidden: true }, title, closer);
    const status = make("p", { role: "status" });
    const again = make("button", { hidden: true }, texts.again);
    const stage = make("div", { className: "stage" }, status, again);
    const panel = make(inline ? "section" : "dialog", {
      className: `panel ${mode}`,
      ariaLabel: title,
      onclose: () => panel.open || close(),
      onkeydown({ key }) {
        if (key === "Escape") close();
      },
    }, bar, stage);

    function show(visible) {
      shown = visible;
      bar.hidden = !visible;
      launcher.style.visibility = visible ? "hidden" : "";
      const way = mode === "dialog" ? "showModal" : "show";
      panel[visible ? way : "close"]?.();
      (visible ? closer : launcher).focus();
    }

    function say(text, wait = 0, onclick) {
      status.textContent = text.replace("{seconds}", wait);
      Object.assign(again, { hidden: !onclick, disabled: wait, onclick });
      clearTimeout(timer);
      timer = setTimeout(() => (again.disabled = false), wait * 1000);
    }

    async function open(second = false) {
      retried = second;
      const mine = ++turn;
      if (!shown) show(true);
      say(texts.connecting);
      try {
        const token = await obtain(options, (wait) => mine === turn && say(texts.busy, wait));
        if (mine === turn) play(token);
      } catch (error) {
        if (error.code === EXPIRED) report(error, agent);
        if (mine === turn) fail(error);
      }
    }

    function play(token) {
      loaded = false;
      frame = make("iframe", {
        title,
        allow: ALLOW,
        referrerPolicy: "no-referrer",
        src: `${embedOrigin}/embed/${agent}?token=${encodeURIComponent(token)}`,
        onload() {
          loaded = true;
          say("");
        },
      });
      stage.append(frame);
      emit("open", { agent });
    }

    function fail({ code, retryAfter }) {
      frame = frame?.remove();
      const retry = () => (tokenUrl ? open(true) : location.reload());
      if (code === EXPIRED) say(texts.expired, 0, retry);
      else if (retryAfter) say(texts.busy, retryAfter, retry);
      else say(texts.refused);
    }

    function close() {
      if (!shown) return;
      turn++;
      frame = frame?.remove();
      say("");
      show(false);
      emit("close", { agent });
    }

    // Anybody can post to a page.
    function hear({ source, origin, data }) {
      if (source !== frame?.contentWindow || !origins.includes(origin)) return;
      if (data?.type === "embed-broker:close") close();
      if (data?.type !== "embed-broker:expired") return;
      const retrying = !!tokenUrl && !retried;
      options.slot.ends = 0;
      stop(EXPIRED, "the viewer refuses the token", retrying);
      if (retrying) open(true);
    }

      function blocked({ effectiveDirective, disposition, blockedURI }) {
      if (disposition !== "enforce" || effectiveDirective !== "frame-src") return;
      if (!frame || loaded || !origins.includes(safeOrigin(blockedURI))) return;
      stop("FRAME_BLOCKED", "frame-src must allow the viewer");
    }

    function stop(code, message, retrying) {
      const error = failure(code, message);
      report(error, agent, retrying);
      fail(error);
    }

    const sheet = new CSSStyleSheet(); // free of style-src
    sheet.replaceSync(STYLE);
    const host = make("div");
    const root = host.attachShadow({ mode: "open" });
    root.adoptedStyleSheets = [sheet];
    (inline ? stage : root).append(launcher);
    root.append(panel);
    panel.toggleAttribute("open", inline);

    const life = new AbortController();
    addEventListener("message", hear, life);
    addEventListener("pagehide", close, life); // "back" may keep the page
    document.addEventListener("securitypolicyviolation", blocked, life);
    if (target.localName !== "script") target.append(host);
    else if (mode !== "button" && document.body.contains(target)) target.after(host);
    else document.body.append(host);

    function remove() {
      close();
      host.remove();
      life.abort();
      widgets.delete(target);
    }

    const widget = { open: () => shown || open(), close, remove };
    widgets.set(target, widget);
    return widget;
  }

  let first; // for getToken() without options
  const getToken = async (given = first) => obtain(check(given));

  function start(script) {
    const { dataset } = script;
    let known;
    for (const name in dataset) {
      if (name in { ...DEFAULTS, ...texts }) known = true;
      else console.warn(`embed.js: data-${name.replace(/[A-Z]/g, "-$&").toLowerCase()}: unknown`);
    }
    if (!known) return; // for its functions
    first ??= dataset;
    try {
      if (check(dataset).mode !== "none") mount(script, dataset);
      emit("ready", { agent: dataset.agent });
    } catch (error) {
      report(error);
    }
  }

  window.EmbedBroker = Object.freeze({ fingerprint, getToken, mount, start, texts });
  if (!tag) return;
  if (document.body) start(tag);
  else addEventListener("DOMContentLoaded", () => start(tag));
})();
