// One job: its card, made once, and brought up to date by every document.

const EATS = {useful: "useful", blocked: "blocked by saves", detection: "detecting failures", restart: "restarting", redone: "done again", other: "other"};
const OUTCOMES = {committed: "ok", running: "going", local: "going", failed: "no", fenced: "no", skipped: "no", deleted: "", "": ""};
const TIERS = {memory: "memory", disk: "local disk", store: "store"};
const ROWS = 6;  // of the list of checkpoints, until more are wanted

class JobCard {
  constructor(name) {
    const id = `job-${JobCard.made = (JobCard.made || 0) + 1}`;
    this.name = name;
    this.pill = make("span", {class: "pill"});
    this.says = make("p", {class: "says"});
    this.where = make("p", {class: "where"});
    this.tiles = make("dl", {class: "tiles"});
    this.grid = new Grid(name);
    this.good = make("div");
    this.chart = make("div");
    this.table = make("div");
    this.events = make("ol", {class: "events"});
    this.notes = make("ul", {class: "trouble"});
    this.parts = {};
    const part = (key, title, ...content) => this.parts[key] = make("div", {}, make("h3", {}, title), ...content);
    this.card = make("section", {class: "job", "aria-labelledby": id}, make("header", {}, make("h2", {id}, name), this.pill), this.says, this.where,
      this.notes, this.tiles, part("ranks", "Ranks", ...this.grid.all), part("good", "Goodput", this.good),
      part("checkpoints", "Checkpoints", this.chart, this.table), part("events", "Restarts and incidents", this.events));
  }

  update(job, incidents) {
    const [kind, word] = stateOf(job);
    this.pill.className = `pill ${kind}`;
    say(this.pill, word);
    say(this.says, sentence(job));
    say(this.where, [job.attempt > 1 || job.restarts ? `attempt ${job.attempt}` : "", job.store || ""].filter(Boolean).join(" · "));
    const notes = [pauseOf(job), ...Object.entries(job.aside || {}).map(([node, why]) => `${node}: ${why}`), ...(job.nics || []),
      ...(job.drains || []).map(each => `step ${count(each.step)} waits on local disks for the durable store for ${duration(each.age)}`)].filter(Boolean);
    fill(this.notes, notes, () => notes.map(note => make("li", {}, note)));
    this.notes.hidden = !notes.length;
    this.fillTiles(job, incidents);
    this.parts.ranks.hidden = !job.grid || !job.live_ranks && (!job.launch || job.launch.phase === "ended");
    if (!this.parts.ranks.hidden) this.grid.update(job.grid, job.told, job.steps_per_second || 0);
    this.fillGoodput(job.goodput);
    this.fillCheckpoints(job.checkpoints || [], job.attempts || [], incidents);
    this.fillEvents(job.attempts || [], incidents);
  }

  fillTiles(job, incidents) {
    const done = (job.checkpoints || []).find(each => each.outcome === "committed");
    const tile = (name, value, small = "", kind = "") => ({name, value, small, kind});
    const tiles = [tile("step", count(job.step ?? 0), job.steps_per_second && job.live_ranks ? ` ${Number(job.steps_per_second.toPrecision(2))}/s` : "")];
    if (done) tiles.push(tile("newest checkpoint", count(done.step)));
    if (done && job.live_ranks) tiles.push(tile("steps at risk", count(Math.max((job.step ?? 0) - done.step, 0))));
    if (!done) tiles.push(tile("newest checkpoint", "none", "", job.live_ranks && job.step > 0 ? "doubt" : ""));
    if (job.goodput && job.goodput.share !== null) tiles.push(tile("goodput", `${(100 * job.goodput.share).toFixed(1)} %`));
    tiles.push(tile("restarts", count(job.restarts ?? 0), "", job.restarts ? "doubt" : ""));
    tiles.push(tile("incidents", count(incidents.length), "", incidents.length ? "doubt" : ""));
    fill(this.tiles, tiles, () => tiles.map(({name, value, small, kind}) => make("div", {class: kind}, make("dt", {}, name),
      make("dd", {}, value, small ? make("small", {}, small) : ""))));
  }

  fillGoodput(goodput) {
    this.parts.good.hidden = !goodput || goodput.share === null;
    if (this.parts.good.hidden) return;
    const seconds = goodput.seconds, kinds = Object.keys(EATS).filter(kind => seconds[kind] > 0), all = kinds.reduce((sum, kind) => sum + seconds[kind], 0);
    const shares = kinds.map(kind => [kind, 100 * seconds[kind] / all]);
    fill(this.good, kinds.map(kind => [kind, Math.round(seconds[kind])]), () => {
      const bar = make("div", {class: "good-bar", role: "img", "aria-label": shares.map(([kind, share]) => `${EATS[kind]} ${share.toFixed(1)} %`).join(", ")},
        shares.map(([kind, share]) => { const piece = make("i", {class: `g-${kind}`}); piece.style.flexGrow = share; return piece; }));
      return [bar, make("ul", {class: "good-list"}, shares.map(([kind, share]) => make("li", {}, make("i", {class: `g-${kind}`, "aria-hidden": "true"}),
        `${EATS[kind]} `, make("b", {}, `${share.toFixed(1)} %`), ` ${duration(seconds[kind])}`)))];
    });
  }

  fillCheckpoints(checkpoints, attempts, incidents) {
    this.parts.checkpoints.hidden = !checkpoints.length;
    if (!checkpoints.length) return;
    const width = Math.max(this.chart.clientWidth || 600, 260);
    this.chart.replaceChildren(chart(checkpoints, attempts, incidents, width));
    const shown = this.all ? checkpoints : checkpoints.slice(0, ROWS);
    fill(this.table, [shown.map(each => ({...each, seconds: each.seconds.toFixed(1)})), checkpoints.length, this.all], () => [
      make("table", {class: "list", role: "table", "aria-label": "checkpoints, newest first"},
        make("thead", {role: "rowgroup"}, make("tr", {role: "row"}, ["step", "outcome", "size", "took", "when", "held by"].map(name => make("th", {scope: "col", role: "columnheader"}, name)))),
        make("tbody", {role: "rowgroup"}, shown.map(checkpointRow))),
      checkpoints.length > ROWS ? this.moreButton(checkpoints.length) : null]);
  }

  moreButton(total) {
    const button = make("button", {type: "button", class: "more", "data-keep": "more", "aria-expanded": String(Boolean(this.all))},
      this.all ? "Show the newest only" : `Show all ${total}`);
    button.addEventListener("click", () => { this.all = !this.all; refresh(); });
    return button;
  }

  fillEvents(attempts, incidents) {
    const begun = attempts.map((each, i) => ({at: each.began, attempt: each.attempt, ranks: each.ranks, first: i === 0 && attempts.length < 64}));
    const events = [...begun, ...incidents.map(each => ({at: Date.parse(each.opened) / 1000, ...each}))].sort((a, b) => b.at - a.at).slice(0, 20);
    this.parts.events.hidden = incidents.length + attempts.length < 2 && !incidents.length;
    fill(this.events, events, () => events.map(each => each.id ? incidentItem(each)
      : make("li", {}, since(each.at), make("p", {}, make("b", {class: "begun"}, each.first ? "began" : "restarted"), ` attempt ${each.attempt} with ${plural(each.ranks, "rank")}`))));
  }
}

function incidentItem(incident, ofJob = "") {
  const sure = incident.confidence > 0 && incident.confidence < 0.995 ? ` (${Math.round(100 * incident.confidence)} % sure)` : "";
  return make("li", {}, since(Date.parse(incident.opened) / 1000 || null), make("div", {},
    make("p", {}, make("b", {class: "kind"}, KINDS[incident.kind] || incident.kind), ": ", incident.sentence, `${sure} `,
      make("a", {href: `/incidents/${encodeURIComponent(incident.id)}`, "data-keep": incident.id, "aria-label": `evidence of incident ${incident.id}`}, "evidence")),
    ofJob || incident.actions.length ? make("p", {class: "did"}, [ofJob ? `job ${ofJob}` : "", ...incident.actions].filter(Boolean).join("; ")) : ""));
}

function checkpointRow(each) {
  const words = {running: each.ranks ? `${each.durable} of ${each.ranks} durable` : "begins", "": "known from memory or disk"};
  const cell = (...content) => make("td", {role: "cell"}, ...content);
  return make("tr", {role: "row"}, cell(count(each.step)), cell(make("span", {class: OUTCOMES[each.outcome] ?? "no"}, words[each.outcome] ?? each.outcome)),
    cell(each.bytes ? size(each.bytes) : "–"), cell(each.seconds ? duration(each.seconds) : "–"), cell(since(each.ended ?? each.began ?? null)),
    cell(each.tiers.map(tier => make("span", {class: "chip"}, TIERS[tier] || tier)), each.reason ? make("span", {class: "why"}, each.reason) : "",
      each.tiers.length || each.reason ? "" : "–"));
}

// A bar a checkpoint: when it was taken, and how long until it was committed; attempts are lines, incidents triangles.
function chart(checkpoints, attempts, incidents, width) {
  const H = 132, TOP = 22, BASE = 104, L = 44, R = 10, timed = checkpoints.filter(each => each.began !== null);
  const drawn = make("svg", {class: "chart", viewBox: `0 0 ${width} ${H}`, role: "img"});
  if (!timed.length) { drawn.setAttribute("aria-label", "no times are known"); drawn.classList.add("empty"); drawn.setAttribute("hidden", ""); return drawn; }
  const end = now(), start = Math.min(...timed.map(each => each.began), end - 60), longest = Math.max(...timed.map(each => each.seconds), 0.001);
  const x = at => L + (at - start) / (end - start) * (width - L - R), tall = seconds => Math.max(seconds / longest * (BASE - TOP), 2);
  const put = (tag, attributes, ...text) => drawn.append(make(tag, attributes, ...text));
  put("line", {class: "axis", x1: L, x2: width - R, y1: BASE + 0.5, y2: BASE + 0.5});
  put("line", {class: "axis", x1: L, x2: width - R, y1: TOP + 0.5, y2: TOP + 0.5});
  put("text", {x: L - 6, y: TOP + 4, "text-anchor": "end"}, duration(longest));
  put("text", {x: L - 6, y: BASE + 4, "text-anchor": "end"}, "0");
  put("text", {x: L, y: H - 8}, clock(start));
  put("text", {x: width - R, y: H - 8, "text-anchor": "end"}, "now");
  let said = -99;
  for (const each of attempts.filter(each => each.began > start && attempts.indexOf(each) > 0)) {
    const at = x(each.began);
    put("line", {class: "attempt", x1: at, x2: at, y1: 12, y2: BASE});
    if (at - said > 66) { put("text", {class: "attempt-text", x: Math.min(at + 3, width - 60), y: 12}, `attempt ${each.attempt}`); said = at; }
  }
  const wide = Math.max(3, Math.min(12, (width - L - R) / timed.length * 0.5));
  for (const each of timed) {
    const high = tall(each.seconds), at = Math.min(Math.max(x(each.began) - wide / 2, L), width - R - wide), bar = make("rect", {class: `b ${each.outcome || "local"}`, x: at, y: BASE - high, width: wide, height: high, rx: 1.5});
    bar.append(make("title", {}, `step ${count(each.step)}: ${each.outcome || "in memory"}, ${duration(each.seconds)}`));
    drawn.append(bar);
    if (["failed", "fenced", "skipped"].includes(each.outcome)) put("path", {class: "cross", d: `M${at} ${BASE - high - 9}l6 6m-6 0l6 -6`});
  }
  for (const each of incidents) {
    const opened = Date.parse(each.opened) / 1000;
    if (!(opened > start)) continue;
    const mark = make("path", {class: "incident", d: `M${x(opened)} ${BASE + 2}l5 9h-10z`});
    mark.append(make("title", {}, each.sentence));
    drawn.append(mark);
  }
  const bad = timed.filter(each => ["failed", "fenced", "skipped"].includes(each.outcome)).length;
  drawn.setAttribute("aria-label", `${plural(timed.length, "checkpoint")} since ${clock(start)}, the longest took ${duration(longest)}${bad ? `, ${bad} not committed` : ""}; the list below has the numbers`);
  return drawn;
}

function stateOf(job) {  // [kind of pill, word]
  const counts = job.grid ? job.grid.counts : {}, launch = job.launch;
  if (launch && launch.phase === "ended") return launch.status ? ["bad", `ended with status ${launch.status}`] : ["", "ended"];
  if (launch && launch.phase === "stopping") return ["doubt", "restarting"];
  if (launch && launch.phase === "gathering") return ["begin", "waiting for nodes"];
  if (counts.dead) return ["bad", counts.dead === 1 ? "a rank died" : `${count(counts.dead)} ranks died`];
  if (counts.stalled) return ["doubt", counts.stalled === 1 ? "a rank is stalled" : `${count(counts.stalled)} ranks are stalled`];
  if (!job.live_ranks) return ["", "ended"];
  const most = Object.keys(counts).sort((a, b) => counts[b] - counts[a])[0];
  if (job.running_saves && job.running_saves.length) return ["busy", `saving step ${count(job.running_saves.at(-1))}`];
  if (most === "restoring" || most === "starting") return ["begin", most];
  if (counts.waiting) return ["begin", `waiting for ${plural(counts.waiting, "rank")}`];
  if (job.paused) return ["doubt", "saves are paused"];
  return ["good", most && most !== "training" ? most : "training"];
}

function pauseOf(job) {
  const pause = job.paused;
  if (!pause) return "";
  const until = pause.until ? `, for ${duration(pause.until - now())} more` : "";
  return `Paused by ${pause.by}: no automatic snapshots from step ${count(pause.step)} on${until}${pause.reason ? `; ${pause.reason}` : ""}`;
}

function sentence(job) {
  const launch = job.launch, nodes = job.grid ? job.grid.nodes.filter(Boolean).length : 0;
  if (launch && launch.phase === "ended") return launch.reason;
  if (launch && launch.phase === "gathering" && !job.live_ranks) return `${count(launch.nodes)} of ${plural(launch.min_nodes, "node")} ${launch.nodes === 1 ? "has" : "have"} come.`;
  if (!job.live_ranks) return "Its ranks have ended.";
  if (job.elsewhere) return `${count(job.live_ranks)} of its ${plural(job.world_size, "rank")} ${job.live_ranks === 1 ? "is" : "are"} here.`;
  const ranks = job.live_ranks < job.world_size ? `${count(job.live_ranks)} of ${plural(job.world_size, "rank")}` : plural(job.world_size, "rank");
  const stop = launch && launch.stop_wanted ? ` It was asked to stop: ${launch.stop_wanted}.` : "";
  return `${ranks} on ${plural(nodes, "node")}.${stop}`;
}
