// The ranks of a job as cells: one a rank, or one for several nodes where there are many. Arrows move, Enter tells more.

const MOST_RANKS = 512;   // of a job whose ranks have a cell each
const mostCells = () => innerWidth < 640 ? 336 : 2048;

function ranksOf(spans) {  // "0-2, 5" -> [0, 1, 2, 5]
  return spans.split(", ").flatMap(part => {
    const [first, last] = part.split("-").map(Number);
    return Array.from({length: (last ?? first) - first + 1}, (_, i) => first + i);
  });
}

const sizeOf = spans => spans.split(", ").reduce((sum, part) => {
  const [first, last] = part.split("-").map(Number);
  return sum + (last ?? first) - first + 1;
}, 0);

// The node of a rank, as a number: most jobs count their ranks node by node.
function nodeOf(grid, rank) {
  const firsts = grid.firsts ||= grid.ranks.map(spans => parseInt(spans, 10));
  let low = 0, high = firsts.length - 1;
  while (low < high) { const middle = (low + high + 1) >> 1; if (firsts[middle] <= rank) low = middle; else high = middle - 1; }
  return ranksOf(grid.ranks[low]).includes(rank) ? low : grid.ranks.findIndex(spans => ranksOf(spans).includes(rank));
}

// [{name, cells: [{id, word, behind, label, ...}]}]: the rows; one without a name where a cell is more than a rank.
function rowsOf(grid) {
  const odd = new Map(grid.odd.map(([rank, word, behind]) => [rank, [grid.words[word], behind]]));
  const total = grid.words.reduce((sum, word) => sum + grid.counts[word], 0);
  if (total <= MOST_RANKS) return grid.nodes.map((node, i) => ({name: node || "not here yet", cells: ranksOf(grid.ranks[i]).map(rank => {
    const [word, behind] = odd.get(rank) || [grid.words[grid.state[i]], grid.behind[i]];
    return {id: `rank ${rank}`, word, behind, label: `rank ${rank}: ${word}${behind ? `, ${plural(behind, "step")} behind` : ""}`,
      node, rank};
  })}));
  const differ = new Map();
  for (const rank of odd.keys()) { const at = nodeOf(grid, rank); differ.set(at, [...(differ.get(at) || []), rank]); }
  const together = Math.ceil(grid.nodes.length / mostCells()), cells = [];
  for (let at = 0; at < grid.nodes.length; at += together) {
    const members = Array.from({length: Math.min(together, grid.nodes.length - at)}, (_, i) => at + i), words = {};
    let behind = 0;
    for (const i of members) {
      const others = differ.get(i) || [], usual = sizeOf(grid.ranks[i]) - others.length;
      if (usual) { words[grid.words[grid.state[i]]] = (words[grid.words[grid.state[i]]] || 0) + usual; behind = Math.max(behind, grid.behind[i]); }
      for (const rank of others) { const [word, late] = odd.get(rank); words[word] = (words[word] || 0) + 1; behind = Math.max(behind, late); }
    }
    const word = TROUBLE.find(each => words[each]) || Object.keys(words).sort((a, b) => words[b] - words[a])[0];
    const name = members.length > 1 ? `${grid.nodes[at]} to ${grid.nodes[members.at(-1)]}` : grid.nodes[at] || "not here yet";
    const does = Object.entries(words).map(([each, n]) => `${n} ${each}`).join(", ");
    const ranks = members.length > 1 ? `${plural(members.length, "node")}` : `rank${grid.ranks[at].match(/\D/) ? "s" : ""} ${grid.ranks[at]}`;
    cells.push({id: `node ${grid.nodes[at]}`, word, behind, label: `${name}, ${ranks}: ${does}${behind ? `, ${plural(behind, "step")} behind` : ""}`,
      node: name, ranks, does});
  }
  return [{name: "", cells}];
}

class Grid {
  constructor(job) {
    this.job = job;
    this.cells = new Map();
    this.legend = make("ul", {class: "legend", "aria-label": "how many ranks do what"});
    this.grid = make("div", {class: "grid", role: "grid", "aria-label": `ranks of job ${job}`});
    this.detail = make("div", {class: "detail", role: "group", tabindex: "-1", hidden: ""});
    this.trouble = make("ul", {class: "trouble", "aria-label": "ranks in trouble"});
    this.rest = make("p", {class: "aside"});
    this.all = [this.legend, this.grid, this.detail, this.trouble, this.rest];
    this.grid.addEventListener("keydown", event => this.key(event));
    this.grid.addEventListener("click", event => { const cell = event.target.closest(".cell"); if (cell) this.choose(cell.dataset.id); });
    this.detail.addEventListener("keydown", event => { if (event.key === "Escape") this.leave(); });
  }

  update(grid, told, pace) {  // what is told of a rank here; steps a second
    this.data = grid; this.told = told;
    this.usual = 1 + pace * (1 + grid.nodes.length / 500);  // nodes do not all report at the same moment
    const rows = rowsOf(grid), many = rows.length === 1 && !rows[0].name;
    fill(this.legend, [grid.counts, grid.words], () => grid.words.map(word => make("li", {title: meaning(word)},
      make("i", {class: `sign ${word in WORDS ? word : "phase"}`, "aria-hidden": "true"}, sign(word)), `${count(grid.counts[word])} ${word}`)));
    fill(this.grid, [many, rows.map(row => [row.name, row.cells.map(cell => cell.id)])], () => {
      this.cells.clear();
      this.grid.classList.toggle("many", many);
      return rows.map(row => make("div", {class: "row", role: "row"}, row.name ? make("span", {class: "name", role: "rowheader", title: row.name}, row.name) : null,
        make("div", {class: "cells", role: "presentation"}, row.cells.map(cell => {
          const made = make("button", {type: "button", role: "gridcell", tabindex: "-1", "data-id": cell.id, "data-keep": cell.id});
          this.cells.set(cell.id, made);
          return made;
        }))));
    });
    this.info = new Map();
    for (const cell of rows.flatMap(row => row.cells)) this.draw(cell);
    const first = this.cells.has(this.at) ? this.at : this.cells.keys().next().value;
    if (first !== undefined) { this.at = first; this.cells.get(first).tabIndex = 0; }
    const bad = grid.odd.filter(([, word]) => TROUBLE.includes(grid.words[word])).slice(0, 12);
    fill(this.trouble, [bad, grid.words, many], () => many ? bad.map(([rank, word, late]) => make("li", {},
      `rank ${rank} on ${grid.nodes[nodeOf(grid, rank)]} is ${grid.words[word]}${late ? `, ${plural(late, "step")} behind` : ""}`)) : []);
    say(this.rest, grid.left_out ? `${count(grid.left_out)} more differ from their node and are not listed.` : "");
    this.rest.hidden = !grid.left_out;
    if (this.chosen) this.tell();
  }

  draw(cell) {
    this.info.set(cell.id, cell);
    const made = this.cells.get(cell.id), lags = cell.behind > this.usual && ["training", "saving"].includes(cell.word);
    const kind = `cell ${cell.word in WORDS ? cell.word : "phase"}${lags ? " lag" : ""}${cell.id === this.chosen ? " chosen" : ""}`;
    if (made.className !== kind) made.className = kind;
    say(made, lags ? (cell.behind > 99 ? "−99" : `−${cell.behind}`) : sign(cell.word));
    if (made.getAttribute("aria-label") !== cell.label) { made.setAttribute("aria-label", cell.label); made.title = cell.label; }
    made.setAttribute("aria-selected", cell.id === this.chosen);
  }

  key(event) {
    const here = event.target.closest(".cell");
    if (!here || event.altKey || event.metaKey) return;
    const cells = [...this.cells.values()], at = cells.indexOf(here);
    let to = null;
    if (event.key === "ArrowRight") to = cells[at + 1];
    else if (event.key === "ArrowLeft") to = cells[at - 1];
    else if (event.key === "ArrowDown" || event.key === "ArrowUp") to = this.beside(cells, here, event.key === "ArrowDown");
    else if (event.key === "Home") to = event.ctrlKey ? cells[0] : cells.find(each => each.offsetTop === here.offsetTop);
    else if (event.key === "End") to = event.ctrlKey ? cells.at(-1) : cells.findLast(each => each.offsetTop === here.offsetTop);
    else if (event.key === "Escape" && this.chosen) this.leave();
    else return;
    event.preventDefault();
    if (to) { here.tabIndex = -1; to.tabIndex = 0; this.at = to.dataset.id; to.focus(); }
  }

  beside(cells, here, down) {  // the nearest cell of the next line
    const lines = cells.map(each => each.offsetTop).filter(top => down ? top > here.offsetTop : top < here.offsetTop);
    if (!lines.length) return null;
    const line = down ? Math.min(...lines) : Math.max(...lines), far = cell => Math.abs(cell.offsetLeft - here.offsetLeft);
    return cells.filter(each => each.offsetTop === line).sort((a, b) => far(a) - far(b))[0];
  }

  choose(id) {
    const before = this.chosen;
    this.chosen = this.at = id;
    for (const each of this.cells.values()) each.tabIndex = each.dataset.id === id ? 0 : -1;
    for (const each of [before, id]) if (this.info.has(each)) this.draw(this.info.get(each));
    this.tell();
    this.detail.focus();
  }

  leave() {
    const id = this.chosen;
    this.chosen = undefined;
    this.detail.hidden = true;
    if (this.info.has(id)) this.draw(this.info.get(id));
    this.cells.get(id)?.focus();
  }

  tell() {
    const cell = this.info.get(this.chosen);
    this.detail.hidden = !cell;
    if (!cell) { this.chosen = undefined; return; }
    this.detail.setAttribute("aria-label", cell.id);
    const lines = cell.rank === undefined ? [cell.label] : [
      `${cell.word}: ${meaning(cell.word)}`,
      ["training", "saving", "stalled"].includes(cell.word) || !(cell.word in WORDS)
        ? `at step ${count(this.data.front - cell.behind)}, ${cell.behind ? `${plural(cell.behind, "step")} behind the fastest` : "as far as the fastest"}` : "",
      ...this.told(cell.rank),
    ];
    const title = cell.rank === undefined ? cell.node : `Rank ${cell.rank}${cell.node ? ` on ${cell.node}` : ""}`;
    fill(this.detail, [title, lines], () => [make("h4", {}, title), ...lines.filter(Boolean).map(line => make("p", {}, line)),
      make("p", {class: "hint"}, "Escape goes back to the ranks.")]);
  }
}
