/* The demonstration's own script: shows what the token route answers and what embed.js tells. */
"use strict";

const ROUTE = "/demo/token";
const AGENT = "A78WKV4515";

const $ = (id) => document.getElementById(id);

function tell(text, refused = false) {
  const item = document.createElement("li");
  item.textContent = `${new Date().toLocaleTimeString()}  ${text}`;
  item.className = refused ? "refused" : "";
  $("log").prepend(item);
}

/** Show what one answer of the token route says: about the limit, and about the token. */
async function show(answer) {
  const body = await answer.json();
  const limit = answer.headers.get("X-RateLimit-Limit");
  if (limit) {
    const left = answer.headers.get("X-RateLimit-Remaining");
    const full = new Date(answer.headers.get("X-RateLimit-Reset") * 1000);
    Object.assign($("left"), { max: limit, value: left, low: limit / 4 });
    $("count").textContent = `${left} of ${limit}, all of them at ${full.toLocaleTimeString()}`;
  }
  if (answer.ok) {
    const reused = answer.headers.get("Cache-Status").endsWith("hit");
    const session = body.data.session_id.slice(0, 8);
    tell(`${reused ? "the same token again" : "a new token"}, session ${session}`);
  } else {
    const wait = answer.headers.get("Retry-After");
    tell(`${answer.status} ${body.error.code}${wait ? `, again in ${wait} s` : ""}`, true);
  }
}

// Before embed.js runs, so that its requests are seen, too.
const send = window.fetch;
window.fetch = async (url, options) => {
  const answer = await send(url, options);
  if (new URL(url, location.href).pathname === ROUTE) show(answer.clone());
  return answer;
};

const ask = () =>
  fetch(ROUTE, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ agent_id: AGENT, fingerprint: EmbedBroker.fingerprint() }),
  });

document.addEventListener("DOMContentLoaded", () => {
  $("ask").addEventListener("click", ask);
  $("many").addEventListener("click", async () => {
    for (let count = 0; count < 25; count += 1) await ask();
  });
  $("forget").addEventListener("click", () => {
    localStorage.clear();
    location.reload();
  });
});

document.addEventListener("embed-broker:open", () => tell("the frame is there"));
document.addEventListener("embed-broker:close", () => tell("the frame is gone"));
document.addEventListener("embed-broker:error", ({ detail }) =>
  tell(`embed.js: ${detail.code}${detail.retrying ? ", trying once more" : ""}`, true));
