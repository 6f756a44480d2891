// A site's crowd before a relay: visitors who come back, newcomers, pairs of tabs, one who hammers,
// requests for a fresh token, agents with limits of their own, mistakes, wrong secrets; and once a
// surge of newcomers beyond the vendor's budget.
//
//   k6 run --no-usage-report -e URL=... -e SECRET=... -e SECONDS=40 -e COUNTED=counts.json crowd.js
//
// Open loop: what arrives does not depend on how the answers fare.  Writes how many answers ended
// how, by the names of the broker's own metrics, so that the two can be held against each other.

import http from "k6/http";
import { Counter } from "k6/metrics";

const url = `${__ENV.URL}/v1/embed-tokens/request`;
const seconds = Number(__ENV.SECONDS || 40);
const surge = { at: Number(__ENV.SURGE_AT || 4), for: Number(__ENV.SURGE_FOR || 3) };
const regulars = 200;

const outcomes = ["minted", "reused", "coalesced", "limited", "invalid", "unauthorized", "forbidden", "shed", "failed"];
const limits = ["fingerprint", "fingerprint_mints", "agent", "client", "auth", "budget"];
const counters = {};
for (const name of outcomes) counters[`requests:${name}`] = new Counter(`requests_${name}`);
for (const name of limits) counters[`rejections:${name}`] = new Counter(`rejections_${name}`);
counters.unanswered = new Counter("unanswered");

const steady = (rate, exec) => ({
  executor: "constant-arrival-rate", rate, exec, timeUnit: "1s", duration: `${seconds}s`,
  preAllocatedVUs: 8 + 2 * rate, maxVUs: 40 + 6 * rate, gracefulStop: "20s",
});

export const options = {
  scenarios: {
    regular: steady(60, "regular"),
    newcomer: steady(8, "newcomer"),
    tabs: steady(2, "tabs"),
    hammer: steady(8, "hammer"),
    fresh: steady(3, "fresh"),
    tight: steady(3, "tight"),
    rehearsed: steady(3, "rehearsed"),
    mistake: steady(2, "mistake"),
    stranger: steady(3, "stranger"),
    browser: steady(1, "browser"),
    surge: {
      executor: "constant-arrival-rate", rate: 70, exec: "newcomer", timeUnit: "1s",
      startTime: `${surge.at}s`, duration: `${surge.for}s`, preAllocatedVUs: 150, maxVUs: 400,
      gracefulStop: "20s",
    },
  },
  noCookiesReset: true,
};

const hex = (length) => {
  let text = "";
  while (text.length < length) text += Math.floor(Math.random() * 0x10000).toString(16).padStart(4, "0");
  return text.slice(0, length);
};
const asked = (visitor, more = {}, headers = {}) => ({
  method: "POST",
  url,
  body: JSON.stringify({ agent_id: "A78WKV4515", fingerprint: visitor, ...more }),
  params: { headers: { "api-secret": __ENV.SECRET, "Content-Type": "application/json", ...headers }, timeout: "30s" },
});
const ask = (...what) => {
  const { body, params } = asked(...what);
  note(http.post(url, body, params));
};

export const regular = () => ask(`beef${Math.floor(Math.random() * regulars).toString(16).padStart(12, "0")}`);
export const newcomer = () => ask(hex(32));
export const tabs = () => {
  const visitor = hex(32);
  http.batch([asked(visitor), asked(visitor), asked(visitor)]).forEach(note);
};
export const hammer = () => ask("0000feed0000feed");
export const fresh = () => ask(`fade${Math.floor(Math.random() * 3).toString(16).padStart(12, "0")}`, { fresh: true });
export const tight = () => ask(hex(32), { agent_id: "TIGHT" });
export const rehearsed = () => ask("cafe0000cafe0000", { agent_id: "REHEARSED" });
export const mistake = () => ask("not hex");
export const stranger = () => ask(hex(32), {}, { "api-secret": "nobody has this secret" });
export const browser = () => ask(hex(32), {}, { Origin: "https://example.com" });

const byStatus = { 400: "invalid", 401: "unauthorized", 503: "shed" };
const byCacheStatus = {
  "embed-token-broker; hit": "reused",
  "embed-token-broker; fwd=miss": "minted",
  "embed-token-broker; fwd=miss; collapsed": "coalesced",
};

function note(answer) {
  if (answer.status === 0) {
    counters.unanswered.add(1);
    return;
  }
  if (answer.status === 200) {
    counters[`requests:${byCacheStatus[answer.headers["Cache-Status"]]}`].add(1);
    return;
  }
  const { code, message } = answer.json("error");
  const limit = /^limit (\w+) reached/.exec(message);
  if (limit) counters[`rejections:${limit[1]}`].add(1);
  if (answer.status === 503 && /budget|slow down/.test(message)) counters["rejections:budget"].add(1);
  const forbidden = code === "SECRET_IN_BROWSER" || code === "AGENT_NOT_ALLOWED";
  const outcome = limit ? "limited" : forbidden ? "forbidden" : byStatus[answer.status] || "failed";
  counters[`requests:${outcome}`].add(1);
}

export function handleSummary({ metrics }) {
  const count = (name) => (metrics[name] ? metrics[name].values.count : 0);
  const counted = {
    requests: Object.fromEntries(outcomes.map((name) => [name, count(`requests_${name}`)])),
    rejections: Object.fromEntries(limits.map((name) => [name, count(`rejections_${name}`)])),
    unanswered: count("unanswered"),
    dropped: count("dropped_iterations"),
    asked: count("http_reqs"),
  };
  return { [__ENV.COUNTED]: JSON.stringify(counted) };
}
