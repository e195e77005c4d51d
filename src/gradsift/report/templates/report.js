"use strict";
// Texts of the data enter the page as textContent only. The script makes no request and stores nothing.
const $ = (id) => document.getElementById(id);
const whole = new Intl.NumberFormat("en");

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function number(value) {
  if (value === undefined || Number.isNaN(value)) return "none";
  if (Number.isInteger(value)) return whole.format(value);
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(3) : String(Number(value.toPrecision(4)));
}

// ------------------------------------------------------------------------------------ colours and sections

const dark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";

function nameTheme() {
  $("theme").textContent = isDark() ? "Light" : "Dark";
  $("theme").setAttribute("aria-label", `Show the page in ${isDark() ? "light" : "dark"} colours`);
}

$("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  nameTheme();
});
dark.addEventListener("change", nameTheme);
nameTheme();
$("theme").hidden = false;

const places = [...document.querySelectorAll(".side li a")];
const seen = new Set();
const sections = new IntersectionObserver((entries) => {
  for (const entry of entries) entry.isIntersecting ? seen.add(entry.target.id) : seen.delete(entry.target.id);
  const current = places.find((place) => seen.has(place.hash.slice(1)));
  for (const place of places) place === current ? place.setAttribute("aria-current", "true") : place.removeAttribute("aria-current");
  const strip = current?.closest("nav");
  if (strip && strip.scrollWidth > strip.clientWidth) strip.scrollTo({ left: current.offsetLeft - strip.offsetLeft - 24 });
}, { rootMargin: "-12% 0px -70% 0px" });
for (const section of document.querySelectorAll("main section")) sections.observe(section);

// -------------------------------------------------------------------------------------- the judged answers

const pairs = [...document.querySelectorAll(".pair")];
if (pairs.length) {
  const keys = ["method", "benchmark", "outcome"];
  const texts = pairs.map((pair) => pair.textContent.toLowerCase());
  const filter = () => {
    const sought = $("pair-query").value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    pairs.forEach((pair, place) => {
      const passes = keys.every((key) => ["", pair.dataset[key]].includes($(`pair-${key}`).value));
      pair.hidden = !(passes && sought.every((word) => texts[place].includes(word)));
      shown += !pair.hidden;
    });
    $("pair-matches").textContent = `${shown} of ${pairs.length} pairs`;
  };
  for (const key of ["query", ...keys]) $(`pair-${key}`).addEventListener("input", filter);
  $("pair-tools").hidden = false;
  filter();
}

// ------------------------------------------------------------------------------------------- the examples
// N examples of one pool. Columns are typed arrays over one unpacked buffer; the search runs over all texts as one string.

const ROW = 60; // px, the height of .example
const END = "\x1e"; // between the texts of two examples
const FIELD = "\x1f"; // between an example's fields
const TYPES = { f4: Float32Array, u4: Uint32Array, u2: Uint16Array, u1: Uint8Array };
const HEADS = 20; // examples in the views "Best" and "Worst"
const MEANINGS = {
  G_s: "mean norm, early", G_t: "mean norm, late", V_s: "variance over members, early", V_t: "variance over members, late",
  loss_s: "mean loss, early", loss_t: "mean loss, late", ifd: "loss ratio with and without the prompt", drop: "fall of the mean norm",
};

async function unpack(about, packed) {
  const decoded = atob(packed);
  const bytes = new Uint8Array(decoded.length);
  for (let at = 0; at < bytes.length; at++) bytes[at] = decoded.charCodeAt(at);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  return new Pool(about, buffer);
}

class Pool {
  constructor(about, buffer) {
    this.about = about;
    this.count = about.rows;
    this.buffer = buffer;
    this.texts = new TextDecoder().decode(new Uint8Array(buffer, about.texts)).split(END);
    const lowered = this.texts.map((text) => text.toLowerCase());
    this.haystack = lowered.join(END);
    this.ends = new Uint32Array(this.count);
    let end = -1;
    for (let row = 0; row < this.count; row++) this.ends[row] = end += lowered[row].length + 1;
    this.hits = new Map(); // word -> Uint8Array (N): 1 for the examples that contain the word
    this.orders = new Map();
    this.numbers = this.column(about.row_index);
  }

  column([type, at]) {
    return new TYPES[type](this.buffer, at, this.count);
  }

  fields(row) {
    const [prompt, input, response, before] = this.texts[row].split(FIELD);
    return { prompt, input, response, before };
  }

  holding(word) {
    let hits = this.hits.get(word);
    if (hits) return hits;
    hits = new Uint8Array(this.count);
    let row = 0;
    for (let at = this.haystack.indexOf(word); at !== -1; at = this.haystack.indexOf(word, this.ends[row])) {
      while (this.ends[row] <= at) row++;
      hits[row] = 1;
    }
    if (this.hits.size > 40) this.hits.clear();
    this.hits.set(word, hits);
    return hits;
  }

  // Returns the examples sorted by a key (N,), lowest first, ties by row; leaves out those without a key (NaN).
  order(name, key) {
    let order = this.orders.get(name);
    if (order) return order;
    const values = key();
    order = Uint32Array.from({ length: this.count }, (_, row) => row).filter((row) => !Number.isNaN(values[row]));
    order.sort((one, other) => values[one] - values[other] || one - other);
    if (this.orders.size > 40) this.orders.clear();
    this.orders.set(name, order);
    return order;
  }

  ranks(method) {
    const ranks = this.column(this.about.methods[method].rank);
    return Float64Array.from(ranks, (rank) => rank || NaN);
  }
}

const words = (text) => text.toLowerCase().split(/\s+/).filter(Boolean);

// Puts `text` into `parent` and marks the search hits.
function marked(parent, text, sought) {
  const lowered = text.toLowerCase();
  parent.replaceChildren();
  if (!sought.length || lowered.length !== text.length) return void (parent.textContent = text);
  for (let at = 0; at < text.length; ) {
    const next = sought.map((word) => [lowered.indexOf(word, at), word.length]).filter(([place]) => place !== -1);
    if (!next.length) return void parent.append(text.slice(at));
    const [start, length] = next.reduce((one, other) => (other[0] < one[0] ? other : one));
    parent.append(text.slice(at, start), element("mark", "", text.slice(start, start + length)));
    at = start + length;
  }
}

// Returns the part of a text to show in a single line: its beginning, or the surroundings of the first hit.
function glimpse(text, sought) {
  const flat = text.replace(/\s+/g, " ");
  const lowered = flat.toLowerCase();
  const first = Math.min(...sought.map((word) => lowered.indexOf(word)).filter((at) => at !== -1));
  return Number.isFinite(first) && first > 50 ? "\u2026" + flat.slice(first - 30) : flat;
}

const choices = (select, names) => select.replaceChildren(...names.map(([value, name]) => new Option(name, value)));

class Browser {
  constructor() {
    this.pools = [...document.querySelectorAll("script[data-pool]")];
    this.ready = new Map();
    this.list = $("list");
    this.space = this.list.querySelector(".space");
    this.rows = new Uint32Array();
    this.active = 0; // index into `rows`
    this.head = 0; // largest number of examples to show; 0: all
    $("examples-ready").hidden = false;
    const changed = () => this.refresh();
    $("query").addEventListener("input", changed);
    for (const id of ["kept", "label", "family", "sort", "other"]) $(id).addEventListener("change", () => { this.leaveView(id); changed(); });
    $("run").addEventListener("change", () => { if (this.pool) this.describe(); changed(); });
    $("pool").addEventListener("change", () => this.show(Number($("pool").value)));
    $("turn").addEventListener("click", () => { this.leaveView("sort"); this.turned = !this.turned; changed(); });
    for (const button of document.querySelectorAll("[data-view]")) button.addEventListener("click", () => this.view(button.dataset.view));
    this.list.addEventListener("scroll", () => this.draw());
    new ResizeObserver(() => this.draw()).observe(this.list);
    this.list.addEventListener("keydown", (event) => this.key(event));
    this.list.addEventListener("click", (event) => {
      const row = event.target.closest(".example");
      if (row) this.move(Number(row.dataset.place), true);
    });
    $("close").addEventListener("click", () => this.close());
    $("detail").addEventListener("keydown", (event) => { if (event.key === "Escape") this.close(); });
    $("query").addEventListener("keydown", (event) => {
      if (event.key === "Escape") { $("query").value = ""; this.refresh(); }
      else if (event.key === "Enter" || event.key === "ArrowDown") { event.preventDefault(); this.list.focus(); }
    });
    addEventListener("keydown", (event) => this.shortcut(event));
  }

  async show(index) {
    const about = JSON.parse($(`about-${index}`).textContent);
    if (!this.ready.has(index)) {
      $("matches").textContent = "Unpacking the examples \u2026";
      this.ready.set(index, await unpack(about, this.pools[index].textContent.trim()));
    }
    this.pool = this.ready.get(index);
    choices($("run"), about.selections.map((one, place) => [place, one.name]));
    for (const [id, names] of [["label", about.labels], ["family", about.families]]) {
      choices($(id), [["", "all"], ...names.map((name, place) => [place, name])]);
      $(id).parentElement.hidden = !names.length;
    }
    this.describe();
    this.view("all");
  }

  get selection() { return this.pool.about.selections[Number($("run").value)]; }
  get method() { return this.selection.method; }

  // Fills the menus of sort keys and of methods to compare with, for the chosen run.
  describe() {
    const { methods } = this.pool.about;
    const own = methods[this.method];
    const before = [$("sort").value, $("other").value];
    choices($("sort"), [["score", "score"], ["row", "place in the data"], ["apart", "distance of two ranks"],
      ...own.parts.map(([name], place) => [`part-${place}`, name])]);
    choices($("other"), methods.map((one, place) => [place, one.name]).filter(([place]) => place !== this.method));
    for (const [index, id] of ["sort", "other"].entries()) if ([...$(id).options].some((one) => one.value === before[index])) $(id).value = before[index];
    const several = methods.length > 1;
    document.querySelector('[data-view="apart"]').hidden = !several;
    if (!several) $("sort").querySelector('[value="apart"]').remove();
  }

  view(name) {
    if (!this.pool) return;
    const set = { all: ["score", false, 0], best: ["score", false, HEADS], worst: ["score", true, HEADS], apart: ["apart", false, 0] }[name];
    if (name !== "all") for (const id of ["query", "kept", "label", "family"]) $(id).value = "";
    [$("sort").value, this.turned, this.head] = set;
    this.named = name;
    this.refresh();
  }

  leaveView(id) {
    if (id !== "other") { this.head = 0; this.named = "all"; }
  }

  // Returns the examples in the chosen order, before any filter.
  ordered() {
    const { pool, method } = this;
    const sort = $("sort").value;
    let order;
    if (sort === "row") order = pool.order("row", () => pool.numbers);
    else if (sort === "score") order = pool.order(`score ${method}`, () => pool.ranks(method));
    else if (sort === "apart") {
      const other = Number($("other").value);
      order = pool.order(`apart ${method} ${other}`, () => {
        const theirs = pool.ranks(other);
        return pool.ranks(method).map((rank, row) => -Math.abs(rank - theirs[row]));
      });
    } else {
      const [name, column] = pool.about.methods[method].parts[Number(sort.slice(5))];
      order = pool.order(`part ${method} ${name}`, () => pool.column(column).map((value) => -value));
    }
    if (!this.turned && order.length === pool.count) return order;
    if (!this.turned && this.head) return order;
    const without = new Uint8Array(pool.count).fill(1); // examples without a value come last in either direction
    for (const row of order) without[row] = 0;
    const rest = this.head ? [] : Uint32Array.from({ length: pool.count }, (_, row) => row).filter((row) => without[row]);
    const all = new Uint32Array(order.length + rest.length);
    all.set(this.turned ? order.slice().reverse() : order);
    all.set(rest, order.length);
    return all;
  }

  refresh() {
    if (!this.pool) return; // not unpacked yet
    const { pool, selection } = this;
    const about = pool.about;
    const sought = words($("query").value);
    const hits = [];
    for (const word of [...sought].sort((one, other) => other.length - one.length)) {
      hits.push(pool.holding(word));
      if (!hits.at(-1).includes(1)) break; // no example contains this word, so skip the other words
    }
    const kept = $("kept").value;
    const place = pool.column(selection.place);
    const status = pool.column(about.methods[this.method].status);
    const label = $("label").value === "" ? null : [pool.column(about.label), Number($("label").value)];
    const family = $("family").value === "" ? null : [pool.column(about.family), Number($("family").value)];
    const tests = hits.map((hit) => (row) => hit[row]);
    if (kept === "kept") tests.push((row) => place[row]);
    else if (kept === "dropped") tests.push((row) => !place[row]);
    else if (kept) tests.push((row) => about.statuses[status[row]] === kept);
    if (label) tests.push((row) => label[0][row] === label[1]);
    if (family) tests.push((row) => family[0][row] === family[1]);
    const passes = (row) => tests.every((test) => test(row));
    let rows = this.ordered().filter(passes);
    if (this.head) rows = rows.subarray(0, this.head);
    this.rows = rows;
    this.sought = sought;
    this.active = 0;
    this.list.scrollTop = 0;
    this.space.style.height = `${rows.length * ROW}px`;
    for (const button of document.querySelectorAll("[data-view]")) button.setAttribute("aria-pressed", String(button.dataset.view === this.named));
    const apart = $("sort").value === "apart";
    $("other").parentElement.hidden = !apart;
    $("turn").setAttribute("aria-pressed", String(this.turned));
    $("matches").textContent = `${whole.format(rows.length)} of ${whole.format(pool.count)} examples${about.total > pool.count ? ` (a part of ${whole.format(about.total)})` : ""}`;
    this.draw();
    if (!$("detail").hidden) rows.length ? this.detail() : this.close();
  }

  draw() {
    if (!this.pool) return;
    const first = Math.max(0, Math.floor(this.list.scrollTop / ROW) - 4);
    const last = Math.min(this.rows.length, first + Math.ceil(this.list.clientHeight / ROW) + 8);
    const made = [];
    for (let place = first; place < last; place++) made.push(this.line(place));
    if (!this.rows.length) made.push(element("p", "example soft", "No example passes these filters."));
    this.space.replaceChildren(...made);
    if (!this.rows.length) this.space.style.height = `${ROW}px`;
    this.rows.length ? this.list.setAttribute("aria-activedescendant", `example-${this.active}`) : this.list.removeAttribute("aria-activedescendant");
  }

  line(place) {
    const { pool, sought } = this;
    const row = this.rows[place];
    const method = pool.about.methods[this.method];
    const made = element("div", "example");
    made.id = `example-${place}`;
    made.dataset.place = place;
    made.style.transform = `translateY(${place * ROW}px)`;
    made.setAttribute("role", "option");
    made.setAttribute("aria-selected", String(place === this.active));
    made.setAttribute("aria-setsize", this.rows.length);
    made.setAttribute("aria-posinset", place + 1);
    const rank = pool.column(method.rank)[row];
    made.append(element("span", "rank", rank ? `#${whole.format(rank)}` : "\u2013"), this.badge(row));
    const { prompt, input, response } = pool.fields(row);
    const lines = element("span", "lines");
    const shown = [[prompt, input].filter(Boolean).join(" \u00b7 "), response].map((text, line) => {
      const one = element("span", line ? "second" : "first");
      one.dir = "auto";
      marked(one, glimpse(text, sought), sought);
      return one;
    });
    lines.append(...shown);
    made.append(lines, element("span", "value", this.value(row, method)));
    return made;
  }

  value(row, method) {
    const sort = $("sort").value;
    if (sort === "apart") {
      const theirs = this.pool.column(this.pool.about.methods[Number($("other").value)].rank)[row];
      return theirs ? `there #${whole.format(theirs)}` : "there none";
    }
    const column = sort.startsWith("part-") ? method.parts[Number(sort.slice(5))][1] : method.score;
    return number(this.pool.column(column)[row]);
  }

  badge(row) {
    const [kind, name] = this.state(this.selection, row);
    return element("span", `badge ${kind}`, name);
  }

  state(selection, row) {
    const { about } = this.pool;
    if (this.pool.column(selection.place)[row]) return ["kept", "kept"];
    const status = about.statuses[this.pool.column(about.methods[selection.method].status)[row]];
    return status === "scored" ? ["", "dropped"] : ["none", status];
  }

  // Returns a sentence on why this selection keeps the example or not.
  why(selection, row) {
    const { about } = this.pool;
    const method = about.methods[selection.method];
    const rank = this.pool.column(method.rank)[row];
    const place = this.pool.column(selection.place)[row];
    const status = about.statuses[this.pool.column(method.status)[row]];
    const of = `${method.name} ranks it ${whole.format(rank)} of ${whole.format(method.scored)}`;
    const budget = `the budget of ${whole.format(selection.budget)} (${selection.share})`;
    if (selection.everything) return "Kept: this run keeps every example.";
    if (status !== "scored") return `Not kept: ${method.name} gives it no score that counts (${status}: ${method.reasons[this.pool.column(method.reason)[row]] || "no reason given"}).`;
    if (selection.selector === "topk") return place ? `Kept: ${of}, within ${budget}.` : `Dropped: ${of}, beyond ${budget}.`;
    if (place) return `Kept: ${of}; selector ${selection.selector} took it as number ${whole.format(place)} of ${whole.format(selection.size)}.`;
    const beyond = rank > selection.budget ? "beyond" : "which by the score alone is within";
    return `Dropped: ${of}, ${beyond} ${budget}, and selector ${selection.selector} did not take it.`;
  }

  detail() {
    const { pool, sought } = this;
    const { about } = pool;
    const row = this.rows[this.active];
    const { prompt, input, response, before } = pool.fields(row);
    $("detail-name").textContent = `Row ${whole.format(pool.numbers[row])}`;
    const body = $("detail-body");
    body.replaceChildren(this.badge(row));
    if (about.labels.length) body.append(" ", element("span", "badge", about.labels[pool.column(about.label)[row]]));
    if (about.families.length) body.append(" ", element("span", "badge", about.families[pool.column(about.family)[row]]));
    body.append(element("p", "why", this.why(this.selection, row)));
    for (const [name, text] of [["Earlier turns", before], ["Prompt", prompt], ["Input", input], ["Response", response]]) {
      if (!text && (name === "Input" || name === "Earlier turns")) continue;
      const shown = element("div", "text");
      shown.dir = "auto";
      marked(shown, text || "(empty)", sought);
      body.append(element("h4", "", name), shown);
    }
    const hidden = pool.column(about.hidden)[row];
    if (hidden) body.append(element("p", "soft", `${whole.format(hidden)} more characters are cut here; the data has them.`));
    body.append(element("h4", "", "Under every method"), this.standings(row));
    const values = this.values(row);
    if (values.length) body.append(element("h4", "", "Values"), table(["", "value", "of"], values));
  }

  standings(row) {
    const { about } = this.pool;
    const lines = about.methods.map((method, index) => {
      const rank = this.pool.column(method.rank)[row];
      const by = about.selections.filter((one) => one.method === index);
      const kept = by.filter((one) => this.pool.column(one.place)[row]).map((one) => one.share);
      const status = about.statuses[this.pool.column(method.status)[row]];
      return [method.name, rank ? `${whole.format(rank)} of ${whole.format(method.scored)}` : status,
        number(this.pool.column(method.score)[row]), !by.length ? "not asked" : kept.length ? [...new Set(kept)].join(", ") : "no"];
    });
    return table(["method", "rank", "score", "kept at"], lines);
  }

  values(row) {
    const shown = new Map();
    for (const method of this.pool.about.methods) for (const [name, column] of method.parts) {
      const key = `${name} ${column}`;
      if (shown.has(key)) shown.get(key)[2] += `, ${method.name}`;
      else shown.set(key, [MEANINGS[name] ? `${name}, ${MEANINGS[name]}` : name, number(this.pool.column(column)[row]), method.name]);
    }
    return [...shown.values()];
  }

  move(place, open) {
    if (!this.rows.length) return;
    this.active = Math.max(0, Math.min(this.rows.length - 1, place));
    const top = this.active * ROW;
    if (top < this.list.scrollTop) this.list.scrollTop = top;
    else if (top + ROW > this.list.scrollTop + this.list.clientHeight) this.list.scrollTop = top + ROW - this.list.clientHeight;
    this.draw();
    if (open) this.open();
    else if (!$("detail").hidden) this.detail();
  }

  open() {
    if (!this.rows.length) return;
    $("detail").hidden = false;
    document.querySelector(".panes").classList.add("open");
    this.detail();
    $("detail").scrollTop = 0;
    if (matchMedia("(max-width: 62rem)").matches) $("close").focus();
  }

  close() {
    $("detail").hidden = true;
    document.querySelector(".panes").classList.remove("open");
    this.list.focus({ preventScroll: true });
  }

  key(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const page = Math.floor(this.list.clientHeight / ROW);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (Object.hasOwn(steps, event.key)) this.move(this.active + steps[event.key], false);
    else if (event.key === "Enter") this.open();
    else if (event.key === "Escape") this.close();
    else return;
    event.preventDefault();
  }

  shortcut(event) {
    if (event.ctrlKey || event.altKey || event.metaKey || event.target.matches?.("input, select, textarea")) return;
    if (event.key === "/") {
      event.preventDefault();
      $("query").focus();
      $("examples").scrollIntoView();
      return;
    }
    const { top, bottom } = this.list.getBoundingClientRect();
    const step = { j: 1, k: -1 }[event.key];
    if (step && this.pool && (event.target === this.list || (top < innerHeight && bottom > 0))) this.move(this.active + step, false);
  }
}

function table(head, lines) {
  const made = element("table");
  const row = (cells, name) => {
    const one = element("tr");
    one.append(...cells.map((cell, place) => element(place ? name : "th", place ? "number" : "", cell)));
    return one;
  };
  const top = element("thead");
  top.append(row(head, "th"));
  const body = element("tbody");
  body.append(...lines.map((cells) => row(cells, "td")));
  made.append(top, body);
  return made;
}

if ($("list")) {
  const browser = new Browser();
  browser.show(0).catch((error) => { $("matches").textContent = `The examples cannot be shown: ${error.message}`; });
}
