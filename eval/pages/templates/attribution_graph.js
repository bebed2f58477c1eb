// Drawing of the graph, with hover, search and keyboard navigation.

const data = readData('data'), tokens = data.tokens.map(visible), targets = data.targets.map(visible);
const KIND = ['latent', 'error', 'token', 'logit'], STEP = 23, GAP = 16, LINE = 22, LOGIT_LINE = 30;
// Number of edges drawn initially, about; margins for the names of rows and columns; least width of a column.
const FIRST = 60, LISTED = 12, LEFT = 58, LOW = 70, COLUMN = 34;
const svg = $('graph');
const nodes = data.nodes.map(([kind, layer, position, index, share, value, total, constant], id) =>
  ({id, kind: KIND[kind], layer, position, index, share, value, total, constant, into: [], from: []}));
const edges = data.edges.map(([source, target, weight, share, size], id) =>
  ({source: nodes[source], target: nodes[target], weight, share, size, via: data.edge_heads && data.edge_heads[id]}));
for (const edge of edges) { edge.target.into.push(edge); edge.source.from.push(edge); }
const note = node => node.kind === 'latent' ? data.notes[node.layer + '.' + node.index] : undefined;
const row = node => node.kind === 'token' ? 0 : node.kind === 'logit' ? data.layers + 1 : node.layer + 1;
const rowName = at => at === 0 ? 'embed' : at === data.layers + 1 ? 'logits' : 'layer ' + (at - 1);
let view = {x: 0, y: 0, k: 1}, selected = null, hovered = null, matches = null, moved = false, own = false;
let drawn = [], shown = new Set(), revealed = [];

const signed = value => (value > 0 ? '+' : value < 0 ? '\u2212' : '') + number(Math.abs(value));
const percent = value => (Math.abs(100 * value) >= 10 ? Math.round(100 * value) : +(100 * value).toPrecision(2)) + '%';
const short = (text, length) => text.length > length ? text.slice(0, length - 1) + '\u2026' : text;
const placed = position => '\u201c' + tokens[position].trim() + '\u201d ' + position;
function name(node) {
  const at = ' \u00b7 ' + placed(node.position);
  if (node.kind === 'latent') return 'latent ' + node.layer + '/' + node.index + at;
  if (node.kind === 'error') return 'error of layer ' + node.layer + at;
  if (node.kind === 'token') return 'token \u201c' + tokens[node.position] + '\u201d at ' + node.position;
  return 'logit of \u201c' + targets[node.index] + '\u201d';
}

const rows = data.layers + 2, LOGITS = rows - 1;
// Logit nodes contain their tokens.
const WORD = Math.max(44, Math.min(170, 18 + 9 * Math.max(...targets.map(text => Math.min(18, text.trim().length)))));
const most = Math.max(...nodes.filter(n => n.kind === 'latent').map(n => n.share), 1e-9);
// Nodes shrink less than distances when the graph is zoomed out, so that words stay readable.
const glyph = k => Math.min(1.3, Math.max(0.8, k));
let lefts = [], widths = [], middles = [], width = 1, height = 1;

// Bands and edges are below nodes; row and column names stay at the border when the graph is moved.
const moving = draw('g', {}, svg), bands = draw('g', {}, moving), wires = draw('g', {'class': 'wires'}, moving);
const dots = draw('g', {}, moving), frame = draw('g', {'class': 'frame'}, svg);
for (const node of nodes) {
  const shape = draw('g', {'class': 'node ' + node.kind}, dots);
  const r = 3.5 + 7 * Math.sqrt(Math.min(1, node.share / most));
  const full = (0.35 + 0.65 * Math.sqrt(Math.min(1, node.share / most))).toFixed(3);
  if (node.kind === 'latent') draw('circle', {r, 'fill-opacity': full, 'class': 'latent'}, shape);
  if (node.kind === 'error') draw('path', {d: `M0 ${-r}L${r} 0 0 ${r} ${-r} 0Z`, 'class': 'error'}, shape);
  if (node.kind === 'token') draw('rect', {x: -6, y: -6, width: 12, height: 12, 'class': 'token'}, shape);
  if (node.kind === 'logit') {
    draw('rect', {x: -WORD / 2, y: -13, width: WORD, height: 26, rx: 8, 'class': 'logit'}, shape);
    const text = short(targets[node.index].trim() || '\u2423', 18);
    draw('text', {y: 5, 'text-anchor': 'middle', 'class': 'name'}, shape, text);
  }
  draw('title', {}, shape, name(node) + (note(node) && note(node).label ? '\n' + note(node).label : ''));
  node.shape = shape;
  shape.addEventListener('pointerenter', () => { hovered = node; if (!selected) detail(node); paint(); });
  shape.addEventListener('pointerleave', () => { hovered = null; if (!selected) detail(null); paint(); });
  shape.addEventListener('click', event => { if (!moved) { select(node); event.stopPropagation(); } });
}
const rowNames = Array.from({length: rows}, (_, at) => draw('text', {'class': 'row'}, frame, rowName(at)));
const floor = draw('rect', {x: 0, width: 1e5, height: 200, 'class': 'floor'}, frame);
const columnNames = tokens.map(token => draw('text', {'class': 'column'}, frame, short(token.trim() || '\u2423', 11)));

// The most influential latents, and the strongest path through each of them from a token or an error to a logit.
const listed = nodes.filter(n => n.kind === 'latent').sort((a, b) => b.share - a.share).slice(0, LISTED), paths = new Set();
const heaviest = list => list.reduce((best, edge) => edge.size > best.size ? edge : best);
for (const node of listed) {
  for (let at = node; at.kind === 'latent' && at.into.length; at = heaviest(at.into).source) paths.add(heaviest(at.into));
  for (let at = node; at.from.length; at = heaviest(at.from).target) paths.add(heaviest(at.from));
}
// Those paths and the strongest edges, less the edges of latents and errors that lead nowhere, or latents without inputs.
function pruned(count) {
  let some = edges.filter((edge, at) => at < count || (count > 0 && paths.has(edge))), before = -1;
  while (some.length !== before) {
    before = some.length;
    const sources = new Set(some.map(edge => edge.source)), ends = new Set(some.map(edge => edge.target));
    some = some.filter(({source, target}) => (target.kind === 'logit' || sources.has(target)) &&
      (source.kind !== 'latent' || ends.has(source)));
  }
  return some;
}
// Places the nodes that are shown: those of one layer and position in lines, in descending order of influence.
function arrange() {
  const box = svg.getBoundingClientRect(), cap = box.width < 560 ? 4 : 7, cells = new Map(), lines = Array(rows).fill(1);
  const roomX = Math.max(200, box.width - LEFT - 16), roomY = Math.max(200, box.height - LOW - 8);
  for (const node of nodes) {
    node.shape.toggleAttribute('hidden', !shown.has(node));
    if (!shown.has(node)) continue;
    const key = row(node) === LOGITS ? LOGITS : row(node) + ' ' + node.position;
    if (!cells.has(key)) cells.set(key, []);
    cells.get(key).push(node);
  }
  for (const cell of cells.values()) cell.sort((a, b) => b.share - a.share || a.id - b.id);
  widths = tokens.map((_, position) => {
    let widest = 1;
    for (let at = 0; at < LOGITS; at++) {
      const cell = cells.get(at + ' ' + position) || [];
      widest = Math.max(widest, Math.min(cell.length, cap));
      lines[at] = Math.max(lines[at], Math.ceil(cell.length / cap));
    }
    return Math.max(COLUMN, widest * STEP + GAP);
  });
  lefts = [];
  width = widths.reduce((sum, wide) => { lefts.push(sum); return sum + wide; }, 0);
  // All logits are at the last position; their row takes as much of the width as it needs once the graph is fitted.
  const k = Math.min(1.5, roomX / width), grown = glyph(k) / k, pitch = (WORD + 6) * grown;
  const logits = cells.get(LOGITS) || [], perLine = Math.max(1, Math.min(logits.length, Math.floor(width / pitch)));
  lines[LOGITS] = Math.max(1, Math.ceil(logits.length / perLine));
  const tall = lines.map((count, at) => at === LOGITS ? count * LOGIT_LINE * grown : count * LINE);
  const filled = tall.reduce((sum, part) => sum + part, 20);
  const apart = Math.min(190, Math.max(34, (roomY / k - filled) / (rows - 1)));
  const bottoms = [];
  tall.reduce((sum, part) => { bottoms.push(sum); return sum + part + apart; }, 0);
  height = bottoms[LOGITS] + tall[LOGITS] + 20;
  middles = tall.map((part, at) => height - bottoms[at] - part / 2 - 3);
  bands.replaceChildren(...tall.map((part, at) =>
    draw('rect', {x: -8000, y: middles[at] - part / 2 - 8, width: width + 16000, height: part + 16, 'class': 'band'})));
  for (const [key, cell] of cells) {
    const isLogits = key === LOGITS, many = isLogits ? perLine : cap, across = isLogits ? pitch : STEP;
    const line = isLogits ? LOGIT_LINE * grown : LINE, at = row(cell[0]), position = cell[0].position;
    cell.forEach((node, rank) => {
      const inLine = Math.min(many, cell.length - many * Math.floor(rank / many)), half = across * (inLine - 1) / 2;
      const middle = lefts[position] + widths[position] / 2, edge = half + across / 2;
      const center = isLogits ? Math.max(edge, Math.min(width - edge, middle)) : middle;
      node.x = center + across * (rank % many) - half;
      node.y = height - bottoms[at] - line * (Math.floor(rank / many) + 0.5) - 3;
    });
  }
}

const strongest = edges.length ? edges[0].size : 1;
const slider = $('count');
const toCount = part => Math.round(edges.length ** (part / 100)) - (part > 0 ? 0 : 1);
function wire(edge, strong) {
  const a = edge.source, b = edge.target, bend = Math.max(14, (a.y - b.y) * 0.42);
  const thick = 0.5 + 5 * Math.sqrt(strong ? edge.share : edge.size / strongest);
  return draw('path', {
    d: `M${a.x} ${a.y}C${a.x} ${a.y - bend} ${b.x} ${b.y + bend} ${b.x} ${b.y}`,
    'stroke-width': thick.toFixed(2),
    'stroke-opacity': strong ? 0.85 : (0.14 + 0.5 * Math.sqrt(edge.size / strongest)).toFixed(3),
    'class': edge.weight > 0 ? 'up' : 'down', 'vector-effect': 'non-scaling-stroke',
  }, wires);
}
function paint() {
  const focus = hovered || selected;
  wires.replaceChildren();
  const beside = focus && [...focus.into, ...focus.from].filter(edge => shown.has(edge.source) && shown.has(edge.target));
  if (focus) {
    for (const edge of beside.sort((a, b) => a.share - b.share)) wire(edge, true);
  } else {
    for (const edge of [...drawn].reverse()) wire(edge, false);
  }
  const near = focus && new Set([focus, ...focus.into.map(e => e.source), ...focus.from.map(e => e.target)]);
  for (const node of nodes) {
    const lit = matches ? matches.has(node) : !near || near.has(node);
    node.shape.classList.toggle('dim', !lit);
    node.shape.classList.toggle('chosen', node === selected);
    node.shape.classList.toggle('found', Boolean(matches) && matches.has(node));
  }
  $('drawn').textContent = focus ? `${beside.length} of ${focus.into.length + focus.from.length} edges of this node`
    : `${drawn.length} of ${edges.length} edges, ${shown.size} of ${nodes.length} nodes`;
}
// Chooses what is drawn: the pruned graph, and nodes that were searched for or selected.
function choose() {
  drawn = pruned(toCount(+slider.value));
  const kept = drawn.flatMap(edge => [edge.source, edge.target]);
  const always = nodes.filter(node => node.kind === 'token' || (node.kind === 'logit' && node.index === 0));
  shown = new Set([...kept, ...always, ...revealed, ...(matches || [])]);
  arrange();
  if (own) place(); else fit();
}
function place() {
  const box = svg.getBoundingClientRect(), base = box.height - 64, size = glyph(view.k) / view.k;
  moving.setAttribute('transform', `translate(${view.x},${view.y}) scale(${view.k})`);
  // Without words, the others may be smaller, so that neighbors do not cover each other.
  const bare = Math.min(size, Math.max(0.6, view.k) / view.k);
  for (const node of shown) node.shape.setAttribute('transform',
    `translate(${node.x},${node.y}) scale(${node.kind === 'logit' ? size : bare})`);
  rowNames.forEach((text, at) => {
    text.setAttribute('x', 8);
    text.setAttribute('y', view.y + view.k * middles[at] + 4);
  });
  floor.setAttribute('y', base);
  const xs = tokens.map((_, at) => view.x + view.k * (lefts[at] + widths[at] / 2));
  const apart = Math.min(...xs.slice(1).map((x, at) => x - xs[at]), 1e3);
  // Names are steeper the closer they are; where even vertical ones would overlap, some are left out.
  const turn = apart >= 22 ? -38 : -90;
  let last = -Infinity;
  columnNames.forEach((text, at) => {
    const fits = xs[at] - last >= (turn === -90 ? 13 : 20);
    text.toggleAttribute('hidden', !fits);
    if (fits) last = xs[at];
    text.setAttribute('transform', `translate(${xs[at] + 4},${base + 14}) rotate(${turn})`);
  });
}
function fit() {
  own = false;
  const box = svg.getBoundingClientRect();
  const k = Math.max(0.2, Math.min((box.width - LEFT - 16) / width, (box.height - LOW - 8) / height, 1.5));
  const [right, under] = [(box.width - LEFT - 16 - k * width) / 2, (box.height - LOW - 8 - k * height) / 2];
  view = {k, x: LEFT + right, y: 6 + Math.max(0, under)};
  place();
}
function zoom(factor, x, y) {
  own = true;
  const box = svg.getBoundingClientRect(), k = Math.min(6, Math.max(0.15, view.k * factor));
  const cx = x === undefined ? box.width / 2 : x, cy = y === undefined ? box.height / 2 : y;
  view = {k, x: cx - (cx - view.x) * k / view.k, y: cy - (cy - view.y) * k / view.k};
  place();
}
function show(node) {
  // Scroll only as far as needed to make the node visible.
  const box = svg.getBoundingClientRect(), x = view.x + view.k * node.x, y = view.y + view.k * node.y;
  const to = (value, low, high) => Math.min(high, Math.max(low, value)) - value;
  view.x += to(x, 80, box.width - 40);
  view.y += to(y, 24, box.height - 90);
  place();
}

function link(node) {
  const button = make('button', 'link', name(node));
  button.type = 'button';
  button.onclick = () => { select(node); svg.focus({preventScroll: true}); };
  return button;
}
const labelled = node => [link(node), note(node) && note(node).label ? make('em', 'note', note(node).label) : null];
// The heads that carry an edge, and the position each attends to.
function carriers({via, weight}) {
  if (!via || !via[1].length) return null;
  const [direct, heads] = via, sum = heads.reduce((total, part) => total + part[3], direct), rest = weight - sum;
  const words = heads.map(([layer, head, key, part]) => `head ${layer}.${head} at ${placed(key)} ${signed(part)}`);
  if (direct) words.push('direct ' + signed(direct));
  if (Math.abs(rest) > 0.005 * Math.abs(weight)) words.push('others ' + signed(rest));
  return make('em', 'note heads', 'through ' + words.join(', '));
}
const sourceName = part => part === null ? 'constant'
  : name({kind: KIND[part[0]], layer: part[1], position: part[2], index: part[3]});
// Scores of the heads that carry edges into a node, each with its largest terms.
function scoreList(node) {
  const used = new Set(node.into.flatMap(edge => (edge.via ? edge.via[1] : []).map(part => part.slice(0, 3).join())));
  const list = (data.attention_scores || []).filter(({place: [layer, head, query, key]}) =>
    query === node.position && used.has([layer, head, key].join()));
  if (!list.length) return null;
  const items = make('ol', 'plain scores');
  for (const {place: [layer, head, query, key], weight, score, cap, terms, rest} of list) {
    const said = `head ${layer}.${head} \u00b7 ${placed(query)} to ${placed(key)}`;
    items.append(make('li', 'place', make('span', 'who', said), make('span', 'weight', percent(weight))));
    const kept = cap === null ? '' : `, before a soft cap at ${number(cap)}`;
    items.append(make('li', '', make('span', 'note', `score${kept}`), make('span', 'weight', signed(score))));
    for (const [one, other, value] of terms) items.append(make('li', '',
      make('span', 'who', make('em', 'note', 'query: ' + sourceName(one)), make('em', 'note', 'key: ' + sourceName(other))),
      make('span', 'weight', signed(value))));
    items.append(make('li', '', make('span', 'note', 'all other terms'), make('span', 'weight', signed(rest))));
  }
  return make('div', 'edges', make('h3', '', 'Attention of the heads that carry its inputs'), items);
}
function edgeList(title, list, other) {
  if (!list.length) return null;
  const ordered = [...list].sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight)), items = make('ol', '');
  for (const edge of ordered.slice(0, 12)) {
    const bar = make('i', edge.weight > 0 ? 'up' : 'down');
    bar.style.width = Math.max(2, 100 * Math.abs(edge.weight) / Math.abs(ordered[0].weight)) + '%';
    items.append(make('li', '', make('span', 'who', ...labelled(edge[other]), carriers(edge)), make('span', 'bar', bar),
      make('span', 'weight', signed(edge.weight))));
  }
  const rest = ordered.length > 12 ? make('p', 'note', (ordered.length - 12) + ' more, weaker') : null;
  return make('div', 'edges', make('h3', '', title), items, rest);
}
function context([words, shades, peak]) {
  const line = make('p', '');
  words.forEach((token, at) => {
    const space = at && gapped && !/^\s/.test(token) ? ' ' : '', shade = Math.round(10 + 0.55 * shades[at]);
    const piece = make('span', at === peak ? 'peak' : '', visible(token));
    if (shades[at]) piece.style.background = `color-mix(in srgb, var(--accent) ${shade}%, transparent)`;
    line.append(space, piece);
  });
  return line;
}
const gapped = !Object.values(data.notes).some(entry => entry.windows.some(([words]) => words.some(word => /^\s/.test(word))));
// Clusters of each level, those of largest effect first, and the circuit found along them; a click marks their nodes.
function levelList() {
  const found = data.levels;
  if (!found) return null;
  const line = (text, places, value, extra) => {
    const button = make('button', 'link', text);
    button.type = 'button';
    button.onclick = () => mark(places.map(at => nodes[at]), text);
    return make('li', '', make('span', 'who', button, make('em', 'note', extra)), make('span', 'weight', value));
  };
  const circuit = make('ol', 'plain', line(`circuit of ${found.size} latents`, found.circuit, percent(found.faithfulness),
    `faithfulness; ${found.passes} passes, ${found.flat_passes} without levels`));
  const parts = found.levels.map(level => {
    const items = make('ol', 'plain');
    const order = level.map((cluster, id) => [...cluster, id]).sort((a, b) => (b[1] ?? -1e9) - (a[1] ?? -1e9));
    for (const [, effect, opened, size, places, id] of order.slice(0, 12)) {
      const best = places.map(at => nodes[at]).sort((a, b) => b.share - a.share)[0];
      const label = best && note(best) && note(best).label ? note(best).label + ' \u00b7 ' : '';
      const said = best ? label + name(best) : 'none of them shown';
      items.append(line(`cluster ${id}: ${size} latents${opened ? ', opened' : ''}`, places,
        effect === null ? 'not tried' : percent(effect), said));
    }
    const rest = order.length > 12 ? make('p', 'note', (order.length - 12) + ' more, of smaller effect') : null;
    return make('div', 'level', make('h3', '', `Level of ${level.length} clusters`), items, rest);
  });
  return make('div', 'levels', make('h3', '', 'Supernodes'),
    make('p', 'note', 'Drop of the targets when a cluster is ablated, as a fraction of the drop when all latents are.'),
    circuit, ...parts);
}
function mark(some, title) {
  matches = new Set(some);
  selected = null;
  choose();
  detail(null);
  paint();
  document.body.dataset.shown = title;
}
function detail(node) {
  const panel = $('detail');
  if (!node) {
    const list = matches ? [...matches].slice(0, data.levels ? LISTED : 40) : listed, items = make('ol', 'plain');
    for (const one of list) {
      items.append(make('li', '', make('span', 'who', ...labelled(one)), make('span', 'weight', percent(one.share))));
    }
    panel.replaceChildren(make('h2', '', matches ? matches.size + ' nodes found' : 'Most influential latents'),
      make('p', 'note', 'Fraction of influence that passes through each. Select a node to see its inputs.'), items,
      ...[levelList()].filter(Boolean));
    return;
  }
  const known = note(node), facts = [['influence', percent(node.share)]];
  if (node.kind === 'latent') facts.unshift(['activation', number(node.value)]);
  if (node.kind === 'logit') facts.unshift(['probability', percent(node.value)]);
  if (known && known.maximum) facts.push(['maximum on text', number(known.maximum)]);
  if (known && known.density !== null && known.density !== undefined) facts.push(['fires on', percent(known.density)]);
  const list = make('dl', 'facts');
  for (const [key, value] of facts) list.append(make('div', '', make('dt', '', key), make('dd', '', value)));
  const parts = [make('h2', '', name(node)), known && known.label ? make('p', 'said', known.label) : null, list];
  if (node.total !== null) {
    const kept = node.into.reduce((sum, edge) => sum + edge.weight, 0);
    const what = node.kind === 'logit' ? 'Logit minus the mean or the foil: ' : 'Pre-activation: ';
    const hidden = signed(node.total - node.constant - kept);
    parts.push(make('p', 'note', `${what}${number(node.total)} = edges kept ${signed(kept)}, other edges ${hidden}, `
      + `constant ${signed(node.constant)}.`));
  }
  if (known && known.promoted.length) parts.push(make('p', 'note', 'Promotes directly: ' + known.promoted.map(visible).join(' \u00b7 ')),
    make('p', 'note', 'Suppresses: ' + known.suppressed.map(visible).join(' \u00b7 ')));
  if (known) {
    const none = 'No contexts recorded.';
    parts.push(make('h3', '', known.windows.length ? 'Top activating contexts' : none),
      make('div', 'contexts', ...known.windows.map(context)));
  }
  parts.push(edgeList('Inputs', node.into, 'source'), scoreList(node), edgeList('Outputs', node.from, 'target'));
  panel.replaceChildren(...parts.filter(Boolean));
  panel.scrollTop = 0;
}
function select(node) {
  selected = node;
  if (node && !shown.has(node)) { revealed.push(node); choose(); }
  if (node) show(node);
  detail(node);
  paint();
  document.body.dataset.shown = node ? name(node) : '';
}
function search() {
  const text = $('search').value.trim().toLowerCase();
  const said = node => note(node) ? [note(node).label, ...note(node).promoted] : [];
  const found = nodes.filter(node => [name(node), ...said(node)].join(' ').toLowerCase().includes(text));
  matches = text ? new Set(found.sort((a, b) => b.share - a.share)) : null;
  selected = null;
  choose();
  detail(null);
  paint();
}
function step(dx, dy) {
  if (!selected) return select([...shown].reduce((best, node) => node.share > best.share ? node : best));
  let best = null, least = Infinity;
  for (const node of shown) {
    const x = node.x - selected.x, y = node.y - selected.y;
    const along = x * dx + y * dy, aside = Math.abs(x * dy) + Math.abs(y * dx);
    if (node === selected || along <= 0.5) continue;
    const cost = along + 2.5 * aside;
    if (cost < least) [best, least] = [node, cost];
  }
  if (best) select(best);
}

svg.addEventListener('wheel', event => {
  const box = svg.getBoundingClientRect();
  event.preventDefault();
  zoom(Math.exp(-event.deltaY * 0.0015), event.clientX - box.left, event.clientY - box.top);
}, {passive: false});
svg.addEventListener('pointerdown', event => {
  const start = {x: event.clientX - view.x, y: event.clientY - view.y, at: [event.clientX, event.clientY]};
  moved = false;
  const move = next => {
    if (Math.hypot(next.clientX - start.at[0], next.clientY - start.at[1]) > 3) moved = own = true;
    if (moved) { view.x = next.clientX - start.x; view.y = next.clientY - start.y; place(); }
  };
  const done = new AbortController(), until = {signal: done.signal};
  addEventListener('pointermove', move, until);
  for (const end of ['pointerup', 'pointercancel']) addEventListener(end, () => done.abort(), until);
});
svg.addEventListener('click', () => { if (!moved) select(null); });
svg.addEventListener('keydown', event => {
  const act = {
    ArrowLeft: () => step(-1, 0), ArrowRight: () => step(1, 0), ArrowUp: () => step(0, -1), ArrowDown: () => step(0, 1),
    Escape: () => select(null), '+': () => zoom(1.25), '=': () => zoom(1.25), '-': () => zoom(0.8), '0': fit,
  }[event.key];
  if (act) { event.preventDefault(); act(); }
});
$('in').onclick = () => zoom(1.25);
$('out').onclick = () => zoom(0.8);
$('fit').onclick = fit;
$('search').oninput = search;
slider.oninput = () => { revealed = []; choose(); paint(); };
// As many edges as leave FIRST of them once the graph is pruned.
let first = Math.min(FIRST, edges.length);
while (first < edges.length && pruned(first).length < FIRST) first = Math.min(edges.length, first + 10);
slider.value = edges.length > 1 ? 100 * Math.log(first) / Math.log(edges.length) : 100;
new ResizeObserver(() => { arrange(); if (own) place(); else fit(); paint(); }).observe(svg);
choose();
select(null);
document.body.dataset.ready = 'yes';
