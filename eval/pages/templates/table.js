// Tables with sortable columns and a filter field. The URL fragment holds the view's state.
// Number cells have a data-value, empty if missing; the headers of text columns have the class "text".

const LIMIT = /^(\w+)([<>])(-?[\d.]+(?:e-?\d+)?)$/;

// Rows sorted by value(row), a number or text; null values come last in both directions.
function ordered(rows, value, down) {
  const order = (a, b) => typeof a === "string" ? a.localeCompare(b, undefined, {numeric: true}) : a - b;
  const compare = ([a], [b]) => a === null || b === null ? (a === null) - (b === null) : (down ? -1 : 1) * order(a, b);
  return rows.map(row => [value(row), row]).sort(compare).map(([, row]) => row);
}

// Returns a predicate on rows: each word of the query occurs in the row, or is a limit on a column such as fvu<0.1.
function matching(query, columns, has, value) {
  const tests = query.toLowerCase().split(/\s+/).filter(Boolean).map(word => {
    const limit = LIMIT.exec(word), column = limit ? columns.get(limit[1]) : undefined;
    if (column === undefined) return row => has(row, word);
    return row => {
      const held = value(row, column);
      return held !== null && (limit[2] === "<" ? held < Number(limit[3]) : held > Number(limit[3]));
    };
  });
  return row => tests.every(test => test(row));
}

// Starts the page's tables. A page may hide further rows, update other parts, and keep more state in the URL.
function startTables({hides = () => false, shows = () => {}, keeps = () => {}} = {}) {
  const tables = all("table.sortable"), find = $("find");
  let sorted = "";
  const heads = table => [...table.tHead.rows[0].cells];
  const value = (row, at) => {
    const cell = row.cells[at], text = heads(row.closest("table"))[at].classList.contains("text");
    return text ? cell.textContent.toLowerCase() : cell && cell.dataset.value ? Number(cell.dataset.value) : null;
  };
  // Columns can be named by key or by label.
  const columns = table => new Map(heads(table).flatMap((head, at) => head.classList.contains("text") ? [] : [
    [head.dataset.key, at],
    [head.textContent.trim().toLowerCase().replace(/%$/, "").replaceAll(" ", "_"), at],
  ]));

  function sortBy(key) {
    sorted = key;
    const down = key.startsWith("-"), name = key.replace(/^-/, "");
    for (const table of tables) {
      const at = heads(table).findIndex(head => head.dataset.key === name);
      for (const head of heads(table)) head.removeAttribute("aria-sort");
      if (at < 0) continue;
      heads(table)[at].setAttribute("aria-sort", down ? "descending" : "ascending");
      table.tBodies[0].append(...ordered([...table.tBodies[0].rows], row => value(row, at), down));
    }
  }
  function filter() {
    let shown = 0, total = 0;
    for (const table of tables) {
      const fits = matching(find ? find.value : "", columns(table),
        (row, word) => row.textContent.toLowerCase().includes(word), value);
      for (const row of table.tBodies[0].rows) {
        row.hidden = hides(row) || !fits(row);
        shown += row.hidden ? 0 : 1;
        total += 1;
      }
    }
    if (find) $("shown").textContent = shown < total ? `${shown} of ${total}` : "";
    shows();
  }
  function remember() {
    const view = new URLSearchParams();
    keeps(view);
    if (find && find.value) view.set("q", find.value);
    if (sorted) view.set("sort", sorted);
    history.replaceState(null, "", "#" + view);
  }
  const change = () => { filter(); remember(); };

  for (const head of tables.flatMap(heads)) head.firstElementChild.addEventListener("click", () => {
    sortBy((head.getAttribute("aria-sort") === "ascending" ? "-" : "") + head.dataset.key);
    remember();
  });
  const view = new URLSearchParams(location.hash.slice(1));
  if (find) {
    find.value = view.get("q") || "";
    find.addEventListener("input", change);
    if (find.form) find.form.addEventListener("submit", event => event.preventDefault());
  }
  if (view.get("sort")) sortBy(view.get("sort"));
  filter();
  return change;
}
