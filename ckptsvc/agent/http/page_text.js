"use strict";
// How things are said, and how elements are made. Text goes in as text: nothing here makes markup of a value.

const WORDS = {  // what a rank does: [sign in its cell, what it means]
  dead: ["×", "ended out of order"], stalled: ["!", "makes no progress"], away: ["?", "its agent is out of reach"],
  waiting: ["○", "has not come yet"], restoring: ["↑", "restores a checkpoint"], starting: ["…", "starts"],
  saving: ["↓", "copies a snapshot"], training: ["•", "trains"], ended: ["✓", "has ended in order"],
};
const TROUBLE = ["dead", "stalled", "away"];
const KINDS = {"died": "rank died", "hung": "rank hung", "slow": "slow", "node-lost": "node lost"};

const sign = word => (WORDS[word] || ["~"])[0];
const meaning = word => (WORDS[word] || ["", `in the phase “${word}”`])[1];
const count = n => Number(n).toLocaleString("en");
const plural = (n, noun) => `${count(n)} ${noun}${n === 1 ? "" : "s"}`;

function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (bytes >= 1023.95 && at < units.length - 1) { bytes /= 1024; at += 1; }
  return `${at ? bytes.toFixed(1) : bytes} ${units[at]}`;
}

function duration(seconds) {
  seconds = Math.max(seconds, 0);
  if (seconds > 0 && seconds < 0.0995) return `${Math.max(Math.round(1000 * seconds), 1)} ms`;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 100) return `${Math.round(seconds)} s`;
  if (seconds < 6000) return `${Math.round(seconds / 60)} min`;
  if (seconds < 48 * 3600) return `${Math.round(seconds / 3600)} h`;
  return `${count(Math.round(seconds / 86400))} d`;
}

const ago = seconds => seconds < 1 ? "just now" : `${duration(seconds < 10 ? Math.floor(seconds) : seconds).replace(".0 ", " ")} ago`;

function clock(unix) {  // the time of day, with the day where it is another one
  const then = new Date(unix * 1000), time = then.toLocaleTimeString("en-GB");
  return then.toDateString() === new Date().toDateString() ? time
    : `${then.toLocaleDateString("en-GB", {day: "numeric", month: "short"})} ${time.slice(0, 5)}`;
}

// An element: names of attributes that are properties of none are set as attributes; children are elements or text.
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "rect", "line", "text", "path", "title"].includes(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null && value !== false) made.setAttribute(name, value);
  made.append(...children.flat().filter(child => child !== null && child !== ""));
  return made;
}

// The time since a moment, kept up to date by `tick`; null is a dash.
const since = unix => unix === null ? make("span", {}, "–") : make("time", {"data-at": unix, datetime: new Date(unix * 1000).toISOString(),
  title: new Date(unix * 1000).toLocaleString("en-GB")}, ago(now() - unix));

let skew = 0;  // seconds that the agent's clock is ahead of ours
const now = () => Date.now() / 1000 + skew;

function say(element, text) {  // without disturbing who reads it, if it is the same
  if (element.textContent !== text) element.textContent = text;
}

// Put children into a place, if they would differ from what is there: `key` says what they were made of.
function fill(place, key, build) {
  const made = JSON.stringify(key);
  if (place.dataset.madeOf === made) return;
  place.dataset.madeOf = made;
  const kept = place.contains(document.activeElement) ? document.activeElement.dataset.keep : undefined;
  place.replaceChildren(...build().flat().filter(Boolean));
  if (kept) place.querySelector(`[data-keep="${CSS.escape(kept)}"]`)?.focus();
}
