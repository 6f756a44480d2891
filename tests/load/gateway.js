// A gateway's traffic: many visitors on a few agents, at a constant rate.
//
//   k6 run --no-usage-report -e URL=http://127.0.0.1:8080 -e SECRET=... tests/load/gateway.js
//
// or tests/load/run, which also starts the broker.  Settings, each as -e NAME=VALUE:
//
//   RATE      1000   requests a second, kept up whatever the answers take (open loop)
//   DURATION  60s    how long
//   VISITORS  10000  distinct fingerprints
//   AGENTS    50     agents; a visitor always comes to the same one
//   EACH      0      1: every visitor comes exactly once, in order, as fast as it goes; RATE,
//                    DURATION do not count then (VISITORS=200000 is 200,000 fingerprints)
//   APART     0      1: brokers that share nothing are behind the URL, or one that restarts without
//                    a snapshot: a visitor may have several sessions
//
// Every token is decoded and must belong to its visitor, and a visitor's session must stay the
// same.  Fails (exit code 99) on any 5xx and on any answer that is not its visitor's.  A 429 is an
// answer, not a failure: config/load.toml keeps the limits out of the way.

import { check } from "k6";
import encoding from "k6/encoding";
import exec from "k6/execution";
import http from "k6/http";
import { Counter, Rate } from "k6/metrics";

const url = `${__ENV.URL || "http://127.0.0.1:8080"}/v1/embed-tokens/request`;
const visitors = Number(__ENV.VISITORS || 10000);
const agents = Number(__ENV.AGENTS || 50);
const rate = Number(__ENV.RATE || 1000);
const each = __ENV.EACH === "1";
const apart = __ENV.APART === "1";
const salt = (__ENV.SALT || "c0ffee00").slice(0, 8); // other visitors than in an earlier run
const headers = { "api-secret": __ENV.SECRET, "Content-Type": "application/json" };

const reused = new Rate("reused");
const refused = new Counter("refused");
const failed = new Counter("failed");

export const options = {
  scenarios: {
    gateway: each
      ? { executor: "shared-iterations", vus: 32, iterations: visitors, maxDuration: "20m" }
      : {
          executor: "constant-arrival-rate",
          rate,
          timeUnit: "1s",
          duration: __ENV.DURATION || "60s",
          preAllocatedVUs: 64,
          maxVUs: 512,
        },
  },
  thresholds: { failed: ["count==0"], checks: ["rate==1"] },
  summaryTrendStats: ["med", "p(95)", "p(99)", "p(99.9)", "max"],
  discardResponseBodies: false,
};

const sessions = {}; // of this virtual user: visitor -> session

export default function () {
  const visitor = each ? exec.scenario.iterationInTest : Math.floor(Math.random() * visitors);
  const agent = `agent-${visitor % agents}`;
  const fingerprint = salt + visitor.toString(16).padStart(8, "0");
  const body = JSON.stringify({ agent_id: agent, fingerprint });
  const answer = http.post(url, body, { headers, tags: { name: "token" } });

  failed.add(answer.status >= 500 || answer.status === 0 ? 1 : 0);
  refused.add(answer.status === 429 ? 1 : 0);
  if (answer.status !== 200) {
    check(answer, { "200 or 429": () => answer.status === 429 });
    return;
  }
  reused.add(answer.headers["Cache-Status"] === "embed-token-broker; hit");
  const data = answer.json("data");
  const claims = JSON.parse(encoding.b64decode(data.token.split(".")[1], "rawurl", "s"));
  const left = claims.exp - Date.now() / 1000;
  const known = sessions[visitor] || data.session_id;
  check(answer, {
    "the token is this visitor's": () =>
      claims.fingerprint === fingerprint && claims.sub === agent && claims.agent_id === agent,
    "the answer is the token's": () => data.sid === claims.sid && data.session_id === claims.sid
      && data.expires_at === claims.exp,
    "it lives long enough": () => left > 299 && left < 3601,
    "the session stays, but for a renewal": () => apart || known === claims.sid || left > 3500,
  });
  sessions[visitor] = claims.sid;
}
