// The list of latents and the detail view of one. Details are decompressed on demand.

const PAGE = 40, CACHED = 16, settings = readData('settings'), cache = new Map();
let index, words, order = [], page = 0, current = -1, wanted = -1;

async function unpack(id) {
  const bytes = Uint8Array.from(atob(readData(id)), c => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'))).json();
}
function chunk(number) {
  if (!cache.has(number)) {
    // Small cache: going back and forth is fast, and memory stays bounded.
    if (cache.size > CACHED) cache.delete(cache.keys().next().value);
    cache.set(number, unpack('chunk-' + number));
  }
  return cache.get(number);
}
const token = id => make('span', 'token', visible(words[id]));
function link(latent) {
  const node = make('a', '', String(latent));
  node.href = '#' + latent;
  return node;
}
function label(latent) {
  return index.explanation[latent] || index.predicate[latent] || '';
}

// A query's words match a latent's texts or number, or are limits on its figures.
const COLUMNS = new Map(['density', 'max', 'predicate_f1', 'example_embedding', 'logit_lens'].map(key => [key, key]));
COLUMNS.set('f1', 'predicate_f1');
const valueOf = (i, column) => index[column][i];

function search() {
  const dead = $('dead').checked, sort = $('sort').value;
  const fits = matching($('search').value, COLUMNS, (i, word) => String(i) === word || index.text[i].includes(word), valueOf);
  order = index.density.flatMap((density, i) => (dead || density !== 0) && fits(i) ? [i] : []);
  if (sort !== 'latent') order = ordered(order, i => valueOf(i, sort.replace('-', '')), sort.startsWith('-'));
  page = 0;
  list();
}
function list() {
  const pages = Math.max(1, Math.ceil(order.length / PAGE)), rows = [];
  for (const i of order.slice(page * PAGE, (page + 1) * PAGE)) {
    const tops = make('td', '', ...index.top[i].slice(0, 3).flatMap(id => [token(id), ' ']));
    if (label(i)) tops.append(make('span', 'note', label(i)));
    const row = make('tr', '', make('td', '', link(i)), tops, make('td', '', number(index.density[i])),
      make('td', '', number(index.predicate_f1[i])));
    row.dataset.latent = i;
    if (i === current) row.setAttribute('aria-current', 'true');
    rows.push(row);
  }
  $('rows').replaceChildren(...rows);
  $('count').textContent = order.length.toLocaleString('en') + ' of ' + index.density.length.toLocaleString('en') + ' latents';
  $('page').textContent = (page + 1) + ' / ' + pages;
  $('back').disabled = page === 0;
  $('on').disabled = page + 1 >= pages;
}

function context([ids, shades, peak, place, leftOut = [], roles = []], maximum) {
  const shade = new Map();
  for (let i = 0; i < shades.length; i += 2) shade.set(shades[i], shades[i + 1]);
  const line = make('p');
  line.title = 'document ' + place;
  const outside = new Set(leftOut), starts = new Map(), spoken = [];
  for (const [role, count] of roles) {
    if (role && role !== 'template') starts.set(spoken.length, role);
    for (let i = 0; i < count; i++) spoken.push(role);
  }
  ids.forEach((id, i) => {
    if (starts.has(i)) line.append(make('span', 'role', starts.get(i)));
    const node = make('span', i === peak ? 'peak' : '', visible(words[id])), value = shade.get(i);
    const told = [spoken[i], value && number(value / 1000 * maximum)];
    if (outside.has(i)) {
      node.classList.add('outside');
      told.push('left out of training and evaluation');
    }
    if (value) node.style.background = 'color-mix(in srgb, var(--warn) ' + (8 + value * 0.062).toFixed(1) + '%, transparent)';
    if (told.some(Boolean)) node.title = told.filter(Boolean).join(' \u00b7 ');
    line.append(node);
    if (settings.gapped) line.append(' ');
  });
  return line;
}
function histogram([edges, counts]) {
  const width = 340, height = 130, base = 108, most = Math.max(...counts), step = width / counts.length;
  const picture = draw('svg', {viewBox: '0 0 ' + width + ' ' + height, role: 'img',
    'aria-label': 'Histogram of activations from ' + number(edges[0]) + ' to ' + number(edges[edges.length - 1])});
  counts.forEach((count, i) => {
    const tall = count / most * (base - 6);
    const bar = draw('rect', {class: 'bar', x: i * step + 0.5, y: base - tall, width: Math.max(1, step - 1), height: tall}, picture);
    draw('title', {}, bar, count + ' from ' + number(edges[i]) + ' to ' + number(edges[i + 1]));
  });
  draw('line', {class: 'axis', x1: 0, x2: width, y1: base, y2: base}, picture);
  for (const [share, anchor] of [[0, 'start'], [0.5, 'middle'], [1, 'end']]) draw('text',
    {x: share * width, y: height - 6, 'text-anchor': anchor}, picture, number(edges[Math.round(share * counts.length)]));
  return picture;
}
function listed(entries, first) {
  return make('ol', '', ...entries.map(entry => make('li', '', first(entry[0]), make('span', '', number(entry[1])))));
}
function card(title, className, ...children) {
  return make('div', className, make('h2', '', title), ...children);
}
const none = text => make('p', 'none', text || 'undefined');

const DEFINITIONS = settings.definitions;
function head(i, latent) {
  const figure = (name, value, note) => {
    const term = make('div', 'label', DEFINITIONS[name] ? make('abbr', '', name) : name);
    if (DEFINITIONS[name]) term.firstChild.title = DEFINITIONS[name];
    const node = make('div', '', term, make('b', '', number(value)));
    node.title = note || '';
    if (note && value !== null) node.append(make('div', 'note', note));
    return node;
  };
  const step = (by, text) => {
    const button = make('button', '', text), at = order.indexOf(i) + by;
    button.type = 'button';
    button.disabled = order.indexOf(i) < 0 || at < 0 || at >= order.length;
    button.onclick = () => { location.hash = order[at]; };
    return button;
  };
  const d = latent.details.predicate_f1, reasons = latent.reasons;
  const box = make('div', 'head', make('div', 'row', make('h2', '', 'latent ' + i),
    make('span', '', step(-1, '\u2190'), ' ', step(1, '\u2192'))));
  box.append(make('div', 'figures', figure('density', index.density[i]), figure('firings', latent.firings),
    figure('max activation', index.max[i]), figure('mean activation', latent.mean),
    figure('predicate F1', index.predicate_f1[i], d ? 'chance ' + number(d.chance) : reasons['scores.predicate_f1']),
    figure('example embedding', index.example_embedding[i], reasons['scores.example_embedding']),
    figure('logit lens', index.logit_lens[i], reasons['scores.logit_lens'])));
  if (latent.sites) {
    const term = make('abbr', '', 'decoder norms');
    term.title = DEFINITIONS['decoder norms'];
    box.append(make('p', 'said', make('span', 'label', term, ': '), settings.sites.map((site, j) => site + ' ' + number(latent.sites[j])).join(', ')));
  }
  if (d) box.append(make('p', 'said', make('span', 'label', 'best predicate: '), d.predicate,
    d.threshold ? ' (above ' + d.threshold + ' of the maximum)' : ''));
  if (latent.explanation && latent.explanation.text) {
    const scores = ['detection', 'fuzzing', 'intervention', 'surprisal'].filter(name => Number.isFinite(latent.explanation[name]))
      .map(name => name + ' ' + number(latent.explanation[name])).join(', ');
    box.append(make('p', 'said', make('span', 'label', 'explanation: '), latent.explanation.text,
      make('span', 'note', scores ? '  ' + scores : '')));
  }
  if (latent.name) box.append(make('p', 'said', make('span', 'label', 'name: '), latent.name[0],
    make('span', 'note', '  cosine ' + number(latent.name[1]) + ', margin ' + number(latent.name[2]))));
  return box;
}
async function show(i) {
  wanted = i;
  const began = performance.now(), latent = (await chunk(Math.floor(i / settings.chunk)))[i % settings.chunk];
  if (wanted !== i) return;
  current = i;
  const parts = [head(i, latent)];
  parts.push(card('Activations', '', latent.histogram ? histogram(latent.histogram) : none(latent.reasons.histogram),
    make('p', 'note', 'Bins are equal on a logarithmic scale.')));
  parts.push(card('Tokens it fires on', '', latent.tokens.length ? listed(latent.tokens, token) : none('none'),
    make('p', 'note', 'Fraction of its summed activation.')));
  // A crosscoder of two models writes to both.
  const both = latent.base !== undefined;
  const sides = (logits, reason, of) => logits ? ['promoted', 'suppressed'].map((name, j) =>
    make('div', '', make('h3', '', name + of), listed(logits[j], token))) : [none(reason)];
  parts.push(card('Direct effect on logits', both ? 'wide' : 'effect', make('div', both ? 'pair four' : 'pair',
    ...(both ? sides(latent.base, latent.reasons.logits_base, ', base model') : []),
    ...sides(latent.logits, latent.reasons.logits, both ? ', tuned model' : ''))));
  const near = make('div', 'pair four');
  for (const title in latent.near) near.append(make('div', '', make('h3', '', title),
    latent.near[title].length ? listed(latent.near[title], other => {
      const node = link(other);
      node.title = label(other);
      return node;
    }) : none('none')));
  parts.push(card('Neighbors', 'wide', near));
  const contexts = card('Contexts', 'contexts wide');
  if (!latent.top.length) contexts.append(none('It never fired.'));
  else contexts.append(make('h3', '', 'strongest'), ...latent.top.map(c => context(c, index.max[i])));
  for (const [low, high, some] of latent.quantiles)
    contexts.append(make('h3', '', 'one fifth of all contexts: maximum from ' + number(low) + ' to ' + number(high)),
      ...some.map(c => context(c, index.max[i])));
  parts.push(contexts);
  $('detail').replaceChildren(...parts);
  document.querySelectorAll('#rows tr').forEach(row => row.toggleAttribute('aria-current', +row.dataset.latent === i));
  document.body.dataset.shown = i;
  document.body.dataset.milliseconds = (performance.now() - began).toFixed(1);
}
// Turns to the list's page of a latent; a latent that the search leaves out ends the search.
function reveal(i) {
  if (!order.includes(i)) {
    $('search').value = '';
    if (index.density[i] === 0) $('dead').checked = true;
    search();
  }
  page = Math.floor(order.indexOf(i) / PAGE);
  list();
  const row = document.querySelector(`#rows tr[data-latent="${i}"]`), box = row.closest('.list');
  row.setAttribute('aria-current', 'true');
  const at = row.getBoundingClientRect(), around = box.getBoundingClientRect();
  if (at.top < around.top || at.bottom > Math.min(around.bottom, innerHeight)) box.scrollTop += at.top - around.top - 160;
}
function follow() {
  const i = parseInt(location.hash.slice(1), 10);
  if (!(i >= 0 && i < index.density.length)) return;
  reveal(i);
  // On narrow screens the details are below the list.
  show(i).then(() => { if (innerWidth <= 900) $('detail').scrollIntoView(); });
}

async function start() {
  [index, words] = await Promise.all([unpack('index'), unpack('words')]);
  index.text = index.top.map((ids, i) => [...ids, ...index.promoted[i]].map(id => words[id]).concat(
    index.predicate[i] || '', index.explanation[i] || '').join('\u0001').toLowerCase());
  let waiting = 0;
  $('search').oninput = () => { clearTimeout(waiting); waiting = setTimeout(search, 60); };
  $('sort').onchange = $('dead').onchange = search;
  $('back').onclick = () => { page--; list(); };
  $('on').onclick = () => { page++; list(); };
  $('rows').onclick = event => {
    const row = event.target.closest('tr');
    if (row) location.hash = row.dataset.latent;
  };
  onhashchange = follow;
  if (index.density.every(density => density === 0)) $('dead').checked = true;
  search();
  if (location.hash.length > 1) follow(); else if (order.length) await show(order[0]);
  document.body.dataset.ready = 'yes';
}
start();
