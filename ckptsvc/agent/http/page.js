// The page: listens to /events, and says so when there is nothing to hear.

const SILENT = 12;  // seconds after which what is shown counts as old
const place = id => document.getElementById(id);
const cards = new Map();
let latest = null, heard = null, connected = false, closed = "", source = null, wasStale = false;

function refresh() { if (latest) show(latest); }

// The jobs of this agent: those it coordinates, those it only has ranks of, and those that are about to begin.
function jobsOf(status) {
  const jobs = new Map(), local = new Map();
  for (const rank of status.ranks) local.set(`${rank.job} ${rank.rank}`, rank);
  const told = name => rank => {
    const found = local.get(`${name} ${rank}`);
    return found ? [`process ${found.pid}${found.heartbeat_age === null ? "" : `, last sign of life ${duration(found.heartbeat_age)} ago`}`] : [];
  };
  const launches = new Map(status.launches.map(each => [each.job, each]));
  for (const job of status.coordinates) jobs.set(job.job, {...job, launch: launches.get(launchedAs(job.job)), told: told(job.job)});
  for (const rank of status.ranks) if (!jobs.has(rank.job)) jobs.set(rank.job, elsewhere(status, rank.job, told(rank.job)));
  const shown = new Set([...jobs.keys()].map(launchedAs));
  for (const launch of launches.values()) if (!shown.has(launch.job)) jobs.set(launch.job, {job: launch.job, launch, attempt: launch.attempt,
    restarts: launch.restarts, live_ranks: 0, told: () => []});
  for (const job of jobs.values()) job.paused = (status.paused || []).find(each => each.job === job.job);
  const ended = job => job.launch ? job.launch.phase === "ended" : !job.live_ranks;
  return [...jobs.values()].sort((a, b) => ended(a) - ended(b) || (a.job < b.job ? -1 : 1));
}

const launchedAs = job => job.lastIndexOf("@") > 0 ? job.slice(0, job.lastIndexOf("@")) : job;

function elsewhere(status, name, told) {  // of a job that another agent coordinates, only the ranks here are known
  const ranks = status.ranks.filter(each => each.job === name), front = Math.max(...ranks.map(each => each.step));
  const phases = {step: "training", save: "saving", restore: "restoring", attach: "starting", "first step": "starting", "": "starting"};
  const word = each => phases[each.phase] ?? each.phase, words = [...new Set(ranks.map(word))];
  const counts = Object.fromEntries(words.map(each => [each, ranks.filter(rank => word(rank) === each).length]));
  const grid = {front, counts, words, nodes: [status.node], ranks: [ranks.map(each => each.rank).join(", ")], state: [0], behind: [0], left_out: 0,
    odd: ranks.map(each => [each.rank, words.indexOf(word(each)), front - each.step])};
  const saves = status.saves.filter(each => each.job === name).sort((a, b) => b.epoch - a.epoch || b.step - a.step).map(each => (
    {...each, outcome: each.outcome === "unspecified" ? "running" : each.outcome, tiers: each.outcome === "committed" ? ["store"] : [],
      reason: each.outcome === "committed" ? "" : each.reason, began: null, ended: null}));
  const by = status.elections.find(each => each.job === launchedAs(name));
  return {job: name, attempt: ranks[0].attempt, restarts: 0, live_ranks: ranks.length, world_size: ranks[0].world_size, step: front, grid, told,
    elsewhere: true, checkpoints: saves, store: `${ranks[0].store} · coordinated by ${by && by.coordinator ? by.coordinator : "another agent"}`};
}

function show(status) {
  const jobs = jobsOf(status), used = new Set();
  for (const job of jobs) {
    if (!cards.has(job.job)) { cards.set(job.job, new JobCard(job.job)); place("jobs").append(cards.get(job.job).card); }
    const mine = status.incidents.filter(each => each.job === launchedAs(job.job));
    mine.forEach(each => used.add(each.id));
    cards.get(job.job).update(job, mine);
  }
  for (const [name, card] of cards) if (!jobs.some(job => job.job === name)) { card.card.remove(); cards.delete(name); }
  jobs.forEach((job, i) => { const card = cards.get(job.job).card; if (place("jobs").children[i] !== card) place("jobs").insertBefore(card, place("jobs").children[i]); });
  const alive = jobs.filter(job => job.live_ranks || (job.launch && job.launch.phase !== "ended"));
  say(place("node"), `agent of ${status.node}`);
  say(place("title"), alive.length ? plural(alive.length, "job") : "No job is running");
  place("title").classList.toggle("quiet", alive.length > 0);
  say(place("lead"), "A job appears here as soon as its first rank attaches.");
  place("lead").hidden = alive.length > 0;
  document.title = alive.length === 1 ? `${stateOf(alive[0])[1]} · ${alive[0].job}` : `${alive.length} jobs · ckptsvc`;
  const rest = status.incidents.filter(each => !used.has(each.id)).slice(0, 20);
  place("incidents").hidden = !rest.length;
  fill(place("incidents-list"), rest, () => rest.map(each => incidentItem(each, each.job)));
  showAgent(status);
}

function showAgent(status) {
  place("vacated").hidden = !status.vacated;
  say(place("vacated"), status.vacated ? `This node takes no new jobs: ${status.vacated}` : "");
  const used = status.arenas.reduce((sum, each) => sum + each.bytes, 0), disk = status.local_disk;
  const facts = [["up since", clock(status.started)], ["version", status.version], ["process", status.pid], ["listens on", status.address],
    ["memory for snapshots", `${size(used)} of ${size(status.arena_limit)}`]];
  if (status.max_write_rate) facts.push(["writes at most", `${size(status.max_write_rate)}/s`]);
  if (disk) {
    const waiting = disk.snapshots.filter(each => each.stage === "pending").length;
    facts.push(["local disk", `${plural(disk.snapshots.length, "snapshot")}, ${size(disk.snapshots.reduce((sum, each) => sum + each.bytes, 0))}${waiting ? `, ${waiting} to be drained` : ""}`]);
  }
  if (status.nics.length) facts.push(["network cards", plural(status.nics.length, "card")]);
  fill(place("agent"), facts, () => facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  const notes = [...status.nics.flatMap(each => each.findings), ...(disk ? [disk.problem, disk.store_problem] : []),
    ...status.elections.map(each => each.problem)].filter(Boolean);
  fill(place("notes"), notes, () => notes.map(note => make("li", {}, note)));
  place("notes").hidden = !notes.length;
}

function tick() {
  for (const each of document.querySelectorAll("time[data-at]")) say(each, ago(now() - Number(each.dataset.at)));
  const quiet = heard === null ? null : Date.now() / 1000 - heard, stale = Boolean(closed) || !connected && heard !== null || quiet > SILENT;
  say(place("live-text"), stale ? "no connection" : heard === null ? "connecting" : "live");
  place("live").classList.toggle("on", heard !== null && !stale);
  place("live").classList.toggle("off", stale);
  document.body.classList.toggle("is-stale", stale);
  place("stale").hidden = !stale;
  if (stale) say(place("stale"), `${closed || "The agent does not answer."}${heard === null ? "" : ` What you see is from ${clock(heard + skew)}.`}${closed ? "" : " Trying again."}`);
  if (stale && !wasStale) document.title = `(no connection) ${document.title}`;
  else if (!stale && wasStale) refresh();
  wasStale = stale;
}

function listen() {
  source = new EventSource("/events");
  const hear = unix => { heard = Date.now() / 1000; skew = unix - heard; connected = true; closed = ""; };
  source.addEventListener("status", event => { latest = JSON.parse(event.data); hear(latest.time); show(latest); tick(); });
  source.addEventListener("alive", event => { hear(Number(event.data)); tick(); });
  source.onerror = () => { connected = false; tick(); if (source.readyState === EventSource.CLOSED) ask(); };
}

async function ask() {  // the browser has given up: is it the agent, or does it not know us any more?
  let status = 0;
  try { status = (await fetch("/status.json")).status; } catch { /* nobody is there */ }
  if (status === 401) closed = "You are not signed in any more: `ckptsvc status --url` prints a new address.";
  tick();
  setTimeout(listen, closed ? 15000 : 3000);
}

let resized = 0;
addEventListener("resize", () => { clearTimeout(resized); resized = setTimeout(refresh, 150); });
setInterval(tick, 1000);
listen();
