// Selection of methods and families, and details of circuit nodes on hover or focus.

const radios = all(".bar input[type=radio]"), chips = all(".families button");
const isOff = chip => chip.getAttribute("aria-pressed") === "false";
const offFamilies = () => chips.filter(isOff).map(chip => chip.dataset.family);
const isOffRow = row => row.dataset.family !== undefined && isOff(chips[row.dataset.family]);
// Lines, bands and dots of the plots; their ids end with the family's number.
const marks = all(".plots [id]").filter(mark => /^(line|band|dot)-/.test(mark.id));
const familyOf = mark => mark.id.split("-").pop();

function show() {
  const method = radios.find(radio => radio.checked)?.value, off = new Set(offFamilies());
  for (const part of all("div[data-method]")) part.hidden = part.dataset.method !== method;
  for (const mark of marks) mark.style.display = off.has(familyOf(mark)) ? "none" : "";
  for (const entry of all(".legend [data-family]")) entry.hidden = off.has(entry.dataset.family);
}
function keep(view) {
  const method = radios.findIndex(radio => radio.checked), off = offFamilies();
  if (method > 0) view.set("method", radios[method].value);
  if (off.length) view.set("off", off.join("."));
}
function faint(chosen) {
  for (const mark of marks) mark.classList.toggle("faint", chosen !== null && familyOf(mark) !== chosen);
}

const kept = new URLSearchParams(location.hash.slice(1)), off = (kept.get("off") || "").split(".");
for (const radio of radios) if (radio.value === kept.get("method")) radio.checked = true;
for (const chip of chips) chip.setAttribute("aria-pressed", !off.includes(chip.dataset.family));
const change = startTables({hides: isOffRow, shows: show, keeps: keep});
for (const radio of radios) radio.addEventListener("change", change);
for (const chip of chips) {
  chip.addEventListener("click", () => {
    chip.setAttribute("aria-pressed", isOff(chip));
    change();
  });
  for (const name of ["mouseenter", "focus"]) chip.addEventListener(name, () => faint(chip.dataset.family));
  for (const name of ["mouseleave", "blur"]) chip.addEventListener(name, () => faint(null));
}

function strongest(edges, own, other, name) {
  const some = edges.filter(edge => edge.dataset[own] === name).slice(0, 5);
  if (!some.length) return make("p", "", "none");
  return make("ul", "", ...some.map(edge =>
    make("li", "", make("span", "", edge.dataset[other]), make("span", "", edge.dataset.weight))));
}
for (const figure of all("figure.circuit")) {
  const svg = figure.querySelector(".canvas svg"), detail = figure.querySelector(".detail"), empty = [...detail.childNodes];
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
    if (node === null) { detail.replaceChildren(...empty); return; }
    const link = make("a", "", "feature");
    link.href = node.dataset.href || "";
    detail.replaceChildren(make("h3", "", name), make("p", "", node.dataset.score && "score " + node.dataset.score),
      node.dataset.tokens ? make("p", "", "fires on " + node.dataset.tokens) : "", node.dataset.href ? link : "",
      make("h4", "", "strongest edges in"), strongest(edges, "to", "from", name),
      make("h4", "", "strongest edges out"), strongest(edges, "from", "to", name));
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
    // The details stay while their link has the focus.
    node.addEventListener("blur", event => { if (!detail.contains(event.relatedTarget)) { pinned = null; pick(null); } });
    const open = () => { if (node.dataset.href) location.href = node.dataset.href; };
    node.addEventListener("dblclick", open);
    node.addEventListener("keydown", event => {
      if (event.key === "Escape") node.blur();
      if (event.key === "Enter") open();
      const next = moves[event.key]?.(node);
      if (next) { event.preventDefault(); next.focus(); }
    });
  }
}
