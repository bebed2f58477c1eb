"""Style and script of circuits.html: choosing what is shown, and pointing at nodes."""

from .recipes import CSS as COMPARISON_CSS

CSS = (
    COMPARISON_CSS
    + """
.tiles{grid-template-columns:repeat(6,1fr)} @media (max-width:1080px){.tiles{grid-template-columns:repeat(3,1fr)}}
.dictionaries{grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));margin-top:-8px}
.task{margin-top:30px;scroll-margin-top:130px} .task>h2{font-size:20px} h3{font-size:14px;margin:16px 0 8px}
.task>div{margin:0 0 16px} [hidden]{display:none!important}
.plots svg{max-width:640px} .sample{display:inline-block;width:34px;height:10px;margin:0 7px 0 0;vertical-align:1px}
.bar{position:sticky;top:0;z-index:2;margin:0 0 8px;padding:10px 14px;box-shadow:0 2px 8px rgb(0 0 0/.07)}
.line{display:flex;flex-wrap:wrap;gap:6px 20px;align-items:center;font-size:13.5px} .families{gap:6px;margin-top:8px}
.bar nav a{color:var(--accent);margin-right:10px}
.bar fieldset{border:0;margin:0;padding:0;display:flex;flex-wrap:wrap;gap:4px 12px}
.bar legend{float:left;color:var(--muted);font-size:12.5px;padding:2px 10px 0 0} .bar label{white-space:nowrap}
.bar input[type=radio]{accent-color:var(--accent);margin:0 5px 0 0;vertical-align:-1px}
.find{display:flex;gap:8px;align-items:center;flex:1 1 220px} .find label{color:var(--muted);font-size:12.5px}
.find input{flex:1;min-width:110px;max-width:280px;font:inherit;padding:3px 8px;border:1px solid var(--rule);border-radius:6px;
background:var(--page);color:var(--ink)}
.families button{font:inherit;font-size:12.5px;color:var(--ink);background:none;border:1px solid var(--rule);border-radius:14px;
padding:2px 10px 2px 8px;cursor:pointer;text-align:left}
.families button[aria-pressed=false]{color:var(--muted);text-decoration:line-through;border-style:dashed}
.families button[aria-pressed=false] .sample{opacity:.3}
:is(button,input,a,.scroll,.canvas):focus-visible{outline:2px solid var(--accent);outline-offset:1px}
.plots .faint{opacity:.14} .figures thead button{all:unset;cursor:pointer}
.figures thead button:focus-visible{outline:2px solid var(--accent)} .task .scroll{padding-top:8px}
main{max-width:1360px} .figures th:first-child{white-space:nowrap} .figures strong{font-weight:600;font-size:13px}
.figures .sample{width:27px} .figures .none{font-size:12.5px} .scroll .figures th+td{width:auto}
.figures :is(th,td){padding-left:9px!important}
.figures th:first-child{padding-left:0!important} .scroll .figures .method,.scroll .figures .refused{text-align:left}
.scroll .figures .refused{white-space:normal;color:var(--muted);max-width:0}
.scroll .figures thead th+th.method{text-align:left}
th[aria-sort=ascending] button::after{content:" \\2191"} th[aria-sort=descending] button::after{content:" \\2193"}
.circuit{margin-bottom:16px} .circuit svg{max-width:none;min-width:680px} .canvas{overflow-x:auto;min-width:0}
.pair{display:grid;grid-template-columns:minmax(0,1fr) 235px;gap:18px}
.detail{font-size:13px;border-left:1px solid var(--rule);padding-left:14px;overflow-wrap:anywhere}
.detail h3{margin:0 0 2px;font-size:14px} .detail h4{margin:10px 0 2px;font-size:12.5px;font-weight:400;color:var(--muted)}
.detail p{margin:0} .detail ul{list-style:none;margin:0;padding:0;font-variant-numeric:tabular-nums}
.detail li{display:flex;justify-content:space-between;gap:10px}
@media (max-width:900px){.pair{grid-template-columns:minmax(0,1fr)} .detail{border:0;border-top:1px solid var(--rule);
padding:10px 0 0;min-height:120px} .bar{position:static} .figures th:first-child{white-space:normal;min-width:128px}
.figures tbody th .note{display:none} .task{scroll-margin-top:8px}}
.controls{display:flex;flex-wrap:wrap;gap:4px 10px;align-items:center;margin:0 0 8px;font-size:13px;color:var(--muted)}
.controls input{accent-color:var(--accent);width:150px} .key{margin-left:auto} .key i{display:inline-block;width:22px;height:0;
border-top:3px solid var(--accent);margin:0 3px 0 10px;vertical-align:4px} .key .minus{border-top:3px dashed var(--bad)}
.key .dashed{height:11px;border:1.5px dashed var(--muted);border-radius:4px;vertical-align:-1px}
.hook{fill:var(--muted);font-size:11.5px} .edge{fill:none;stroke:var(--accent);opacity:var(--strength)}
.edge.minus{stroke:var(--bad);stroke-dasharray:5 3} .edge.weak{display:none}
.node{cursor:pointer;outline:none} .node .back{fill:var(--card)}
.node .mark{fill:var(--accent);stroke:var(--accent);stroke-width:1.2}
.node.minus .mark{fill:var(--bad);stroke:var(--bad)} .node.error .mark{stroke-dasharray:3 2}
.node.output .mark{fill:none;stroke:var(--ink)}
.node text{fill:var(--ink);font-size:11px;text-anchor:middle} .node.error text{font-style:italic}
.node:focus-visible .mark,.node.on .mark{stroke:var(--ink);stroke-width:2.4}
.picked .edge{opacity:.06} .picked .edge.on{opacity:.9;display:inline} .picked .node:not(.on,.near){opacity:.35}
.circuit summary{cursor:pointer;font-size:13px;margin-top:8px} .circuit .scroll td{white-space:normal;vertical-align:top}
"""
)
SCRIPT = r"""
"use strict";
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const find = document.getElementById("find"), radios = all('.bar input[type=radio]'), chips = all(".families button");
const tables = all("table.figures"), names = new Map();
let sorted = "";
for (const head of all("table.figures thead th")) {
  names.set(head.dataset.key, head.dataset.key);
  names.set(head.textContent.trim().toLowerCase().replace(/ %$/, "").replaceAll(" ", "_"), head.dataset.key);
}
const place = (table, key) => [...table.tHead.rows[0].cells].findIndex(head => head.dataset.key === key);
const held = (row, at) => at < 2 ? row.cells[at].textContent.toLowerCase() : row.cells[at]?.dataset.value ?? "";
function sortBy(key) {
  sorted = key;
  const down = key.startsWith("-"), name = key.replace(/^-/, "");
  for (const table of tables) {
    const at = place(table, name);
    all("th", table.tHead).forEach(head => head.removeAttribute("aria-sort"));
    if (at < 0) continue;
    table.tHead.rows[0].cells[at].setAttribute("aria-sort", down ? "descending" : "ascending");
    const order = (a, b) => at < 2 ? a.localeCompare(b, undefined, {numeric: true}) : a - b;
    // What has no value stays at the end, whichever way.
    [...table.tBodies[0].rows].map(row => [held(row, at), row]).sort(([a], [b]) =>
      (a === "") - (b === "") || (down ? -1 : 1) * order(a, b)).forEach(([, row]) => table.tBodies[0].append(row));
  }
}
function matches(table, row, word) {
  const limit = /^(\w+)([<>])(-?[\d.]+(?:e-?\d+)?)$/.exec(word), at = limit ? place(table, names.get(limit[1])) : -1;
  if (at < 2) return row.textContent.toLowerCase().includes(word);
  const value = held(row, at);
  return value !== "" && (limit[2] === "<" ? +value < +limit[3] : +value > +limit[3]);
}
function show() {
  const words = find.value.toLowerCase().split(/\s+/).filter(Boolean), method = radios.find(radio => radio.checked)?.value;
  const off = new Set(chips.filter(chip => chip.getAttribute("aria-pressed") === "false").map(chip => chip.dataset.family));
  let shown = 0, total = 0;
  for (const table of tables) for (const row of table.tBodies[0].rows) {
    row.hidden = off.has(row.dataset.family) || !words.every(word => matches(table, row, word));
    shown += !row.hidden; total += 1;
  }
  document.getElementById("shown").textContent = shown < total ? `${shown} of ${total}` : "";
  all("div[data-method]").forEach(part => { part.hidden = part.dataset.method !== method; });
  all(".plots [id]").forEach(mark => {
    if (/^(line|band|dot)-/.test(mark.id)) mark.style.display = off.has(mark.id.split("-").pop()) ? "none" : "";
  });
}
function remember() {
  const view = new URLSearchParams(), method = radios.findIndex(radio => radio.checked);
  const off = chips.filter(chip => chip.getAttribute("aria-pressed") === "false").map(chip => chip.dataset.family);
  if (method > 0) view.set("method", radios[method].value);
  if (off.length) view.set("off", off.join("."));
  if (find.value) view.set("q", find.value);
  if (sorted) view.set("sort", sorted);
  history.replaceState(null, "", "#" + view);
}
const change = () => { show(); remember(); };
radios.forEach(radio => radio.addEventListener("change", change));
find.addEventListener("input", change);
find.form.addEventListener("submit", event => event.preventDefault());
function faint(chosen) {
  all(".plots [id]").forEach(mark => {
    if (/^(line|band|dot)-/.test(mark.id))
      mark.classList.toggle("faint", chosen !== null && mark.id.split("-").pop() !== chosen);
  });
}
for (const chip of chips) {
  chip.addEventListener("click", () => {
    chip.setAttribute("aria-pressed", chip.getAttribute("aria-pressed") === "false");
    change();
  });
  for (const name of ["mouseenter", "focus"]) chip.addEventListener(name, () => faint(chip.dataset.family));
  for (const name of ["mouseleave", "blur"]) chip.addEventListener(name, () => faint(null));
}
for (const head of all("table.figures thead th")) head.firstElementChild.addEventListener("click", () => {
  sortBy((head.getAttribute("aria-sort") === "ascending" ? "-" : "") + head.dataset.key);
  remember();
});

function element(name, text, ...children) {
  const made = document.createElement(name);
  made.textContent = text;
  made.append(...children);
  return made;
}
function strongest(edges, own, other, name) {
  const list = element("ul", "");
  for (const edge of edges.filter(edge => edge.dataset[own] === name).slice(0, 5))
    list.append(element("li", "", element("span", edge.dataset[other]), element("span", edge.dataset.weight)));
  return list.children.length ? list : element("p", "none");
}
for (const figure of all("figure.circuit")) {
  const svg = figure.querySelector(".canvas svg"), detail = figure.querySelector(".detail"), empty = detail.innerHTML;
  const nodes = all(".node", svg), edges = all(".edge", svg), slider = figure.querySelector("input[type=range]");
  let pinned = null;
  slider.addEventListener("input", () => {
    edges.forEach((edge, rank) => edge.classList.toggle("weak", rank >= +slider.value));
    figure.querySelector("output").textContent = `${slider.value} of ${edges.length}`;
  });
  const pick = node => {
    const name = node?.dataset.name, near = new Set();
    svg.classList.toggle("picked", node !== null);
    for (const edge of edges) {
      const on = node !== null && (edge.dataset.from === name || edge.dataset.to === name);
      edge.classList.toggle("on", on);
      if (on) near.add(edge.dataset.from).add(edge.dataset.to);
    }
    for (const other of nodes) {
      other.classList.toggle("on", other === node);
      other.classList.toggle("near", near.has(other.dataset.name));
    }
    if (node === null) { detail.innerHTML = empty; return; }
    detail.replaceChildren(element("h3", name), element("p", node.dataset.score && "score " + node.dataset.score),
      element("h4", "strongest edges in"), strongest(edges, "to", "from", name),
      element("h4", "strongest edges out"), strongest(edges, "from", "to", name));
  };
  const distance = (a, b) => Math.abs(a.dataset.x - b.dataset.x);
  const nearest = (node, some) => some.sort((a, b) => distance(a, node) - distance(b, node))[0];
  const moves = {
    ArrowLeft: node => nearest(node, nodes.filter(n => n.dataset.row === node.dataset.row && +n.dataset.x < +node.dataset.x)),
    ArrowRight: node => nearest(node, nodes.filter(n => n.dataset.row === node.dataset.row && +n.dataset.x > +node.dataset.x)),
    ArrowUp: node => nearest(node, nodes.filter(n => +n.dataset.row === +node.dataset.row + 1)),
    ArrowDown: node => nearest(node, nodes.filter(n => +n.dataset.row === +node.dataset.row - 1)),
  };
  for (const node of nodes) {
    node.addEventListener("mouseenter", () => pick(node));
    node.addEventListener("mouseleave", () => pick(pinned));
    node.addEventListener("focus", () => {
      nodes.forEach(other => other.setAttribute("tabindex", other === node ? 0 : -1));
      pick(pinned = node);
    });
    node.addEventListener("blur", () => { pinned = null; pick(null); });
    node.addEventListener("keydown", event => {
      if (event.key === "Escape") node.blur();
      const next = moves[event.key]?.(node);
      if (next) { event.preventDefault(); next.focus(); }
    });
  }
}

if (location.hash.includes("=")) {
  const view = new URLSearchParams(location.hash.slice(1)), off = (view.get("off") || "").split(".");
  find.value = view.get("q") || "";
  radios.forEach(radio => { if (radio.value === view.get("method")) radio.checked = true; });
  chips.forEach(chip => chip.setAttribute("aria-pressed", !off.includes(chip.dataset.family)));
  if (view.get("sort")) sortBy(view.get("sort"));
}
show();
"""
