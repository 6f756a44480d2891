/* A viewer in outline: has its token verified, opens the microphone, tells its page the end. */
"use strict";

const $ = (id) => document.getElementById(id);

/** To whatever page this is in: nothing that is said here is a secret. */
const say = (type) => parent.postMessage({ type: `embed-broker:${type}` }, "*");

const token = new URLSearchParams(location.search).get("token") ?? "";
history.replaceState(null, "", location.pathname); // it stays in no history and in no referrer

/** When the token ends by its own word: only to tell "too late" from "not good". */
function endOf(jwt) {
  try {
    return JSON.parse(atob(jwt.split(".")[1].replace(/-/g, "+").replace(/_/g, "/"))).exp;
  } catch {
    return Infinity;
  }
}

async function verify() {
  const answer = await fetch("/demo/verify", {
    method: "POST",
    headers: { Authorization: `Bearer ${token}` },
  });
  if (answer.ok) return answer.json();
  const late = endOf(token) <= Date.now() / 1000;
  if (late) say("expired");
  throw new Error(late ? "The token has expired." : "The broker refuses the token.");
}

function count(expires) {
  const left = Math.max(Math.round(expires - Date.now() / 1000), 0);
  $("left").textContent = `${Math.floor(left / 60)} min ${left % 60} s`;
}

async function listen() {
  const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  const audio = new AudioContext();
  await audio.resume();
  const analyser = audio.createAnalyser();
  audio.createMediaStreamSource(stream).connect(analyser);
  const samples = new Float32Array(analyser.fftSize);
  let heard = 0;
  $("heard").textContent = "silence so far";
  setInterval(() => {
    analyser.getFloatTimeDomainData(samples);
    const level = samples.reduce((peak, sample) => Math.max(peak, Math.abs(sample)), 0);
    heard += samples.reduce((sum, sample) => sum + (sample === 0 ? 0 : 1), 0);
    $("level").value = level;
    if (heard) $("heard").textContent = `heard ${heard} samples`;
  }, 100);
}

async function run() {
  $("end").addEventListener("click", () => say("close"));
  try {
    const { agent, session, expires } = await verify();
    $("agent").textContent = agent;
    $("session").textContent = session;
    count(expires);
    setInterval(count, 1000, expires);
    $("state").textContent = "The broker has verified the token.";
  } catch (error) {
    $("state").textContent = error.message;
    return;
  }
  try {
    await listen();
  } catch (error) {
    $("heard").textContent = `blocked: ${error.name}`;
  }
}

run();
