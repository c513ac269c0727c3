// Tables of text, each in a frame of its own that scrolls where it is too wide.

function scrollingTable(table) {
  const numeric = new Set(table.numeric);
  const marked = new Set(table.marked);
  const kind = (column) => (numeric.has(column) ? "number" : null);
  const head = h("tr", {}, table.columns.map((name, column) =>
    h(name === "" ? "td" : "th", name === "" ? {} : { scope: "col", class: kind(column) }, name)));
  const body = table.rows.map((row, index) =>
    h("tr", { class: marked.has(index) ? "differs" : null }, row.map((cell, column) => {
      if (column > 0) return h("td", { class: kind(column) }, cell);
      const name = marked.has(index) ? [h("span", { class: "mark", title: "differs" }, "≠ "), cell] : [cell];
      return h("th", { scope: "row", class: kind(column) }, name);
    })));
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": table.title },
    h("table", {}, h("thead", {}, head), h("tbody", {}, body)));
}

function tableCard(table, open) {
  const note = table.note ? h("p", { class: "muted" }, table.note) : null;
  if (open) return h("div", { class: "card" }, h("h3", {}, table.title), note, scrollingTable(table));
  return h("details", { class: "card" }, h("summary", {}, h("h3", {}, table.title), h("span", { class: "muted" }, ` ${plural(table.rows.length, "row")}`)),
    note, scrollingTable(table));
}

function renderTables(place, tables, message, isOpen) {
  const known = new Map([...place.querySelectorAll("details")].map((each) => [each.querySelector("h3").textContent, each.open]));
  const cards = tables.map((table) => tableCard(table, isOpen(table)));
  for (const card of cards) {
    if (card.tagName === "DETAILS" && known.get(card.querySelector("h3").textContent)) card.open = true;
  }
  place.replaceChildren(...(cards.length ? cards : [empty(message)]));
}

function renderOverview(data) {
  byId("overview-title").textContent = data.title;
  byId("made").textContent = `switchkd ${data.version} · made ${data.made.replace("T", " ").replace("+00:00", " UTC")}`;
  byId("facts").replaceChildren(...data.runs.map((run) => h("div", { class: "card" },
    h("h2", { class: "run-name" }, run.name, run.facts.length ? h("span", { class: "state" }, run.finished ? "finished" : "not finished") : null),
    run.facts.length
      ? h("dl", {}, run.facts.map(([label, value]) => h("div", {}, h("dt", {}, label), h("dd", {}, value))))
      : h("p", { class: "muted" }, "Only rollouts, no run."))));
}
