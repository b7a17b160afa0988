// Everything that a model or an environment said is put on the page as text (textContent), never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
data.rows = data.rows.map((row) => Object.fromEntries(data.fields.map((name, index) => [name, row[index]])));
const PAGE_SIZE = 100;
const columns = ["item", "run", "category", "sample", "outcome", "reward", "rounds", "invalid", "tokens", "seconds"]
  .filter((key) => !(key === "run" && data.runs.length === 1) && !(key === "category" && data.rows.every((row) => !row.category)));
const numeric = new Set(["sample", "reward", "rounds", "invalid", "tokens", "seconds"]);
const at = (id) => document.getElementById(id);
const state = { shown: [], page: 0, sort: null, down: false, open: null };

// Characters that turn the direction of writing, and others that cannot be seen, are shown as what they are.
const UNSEEN = /[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069]/g;
const visible = (text) => String(text).replace(UNSEEN, (one) => "\\u" + one.charCodeAt(0).toString(16).padStart(4, "0"));

function make(tag, text, className) {
  const node = document.createElement(tag);
  if (text !== undefined && text !== null) node.textContent = visible(text);
  if (className) node.className = className;
  return node;
}

function cell(row, key) {
  if (key === "run") return data.runs[row.run];
  if (key === "reward") return row.reward === null ? "–" : row.reward.toFixed(2);
  if (key === "seconds") return row.seconds.toFixed(1);
  return row[key];
}

function option(select, value, text) {
  const node = make("option", text === undefined ? value : text);
  node.value = value;
  select.append(node);
}

function filter() {
  const text = at("text").value.toLowerCase();
  const run = at("run").value, outcome = at("outcome").value, category = at("category").value;
  state.shown = [];
  data.rows.forEach((row, number) => {
    if (text && !row.item.toLowerCase().includes(text)) return;
    if (run !== "" && row.run !== Number(run)) return;
    if (outcome && (outcome === "errors" ? !["env_error", "model_error", "timeout"].includes(row.outcome) : row.outcome !== outcome)) return;
    if (category && row.category !== category) return;
    state.shown.push(number);
  });
  if (state.sort !== null) {
    const key = state.sort, sign = state.down ? -1 : 1;
    state.shown.sort((a, b) => {
      const x = data.rows[a][key], y = data.rows[b][key];
      if (x === y) return a - b;
      if (x === null || y === null) return x === null ? 1 : -1;
      return (x < y ? -1 : 1) * sign;
    });
  }
  state.page = 0;
  draw();
}

function draw() {
  const pages = Math.max(1, Math.ceil(state.shown.length / PAGE_SIZE));
  state.page = Math.min(Math.max(state.page, 0), pages - 1);
  const body = document.createDocumentFragment();
  for (const number of state.shown.slice(state.page * PAGE_SIZE, (state.page + 1) * PAGE_SIZE)) {
    const row = data.rows[number], line = make("tr");
    line.dataset.number = number;
    if (number === state.open) line.className = "open";
    for (const key of columns) {
      const place = make("td", null, numeric.has(key) ? "number" : key === "outcome" ? row.outcome : "");
      if (key === "item") {
        const button = make("button", row.item);
        button.type = "button";
        button.addEventListener("click", () => { location.hash = link(number); });
        place.append(button);
      } else place.textContent = visible(cell(row, key));
      line.append(place);
    }
    body.append(line);
  }
  document.querySelector("#table tbody").replaceChildren(body);
  at("shown").textContent = `${state.shown.length} of ${data.rows.length} attempts`;
  at("page").textContent = `${state.page + 1} of ${pages}`;
  at("before").disabled = state.page === 0;
  at("after").disabled = state.page === pages - 1;
}

function header() {
  const line = document.querySelector("#table thead tr");
  for (const key of columns) {
    const place = make("th", null, numeric.has(key) ? "number" : ""), button = make("button", key);
    place.scope = "col";
    button.type = "button";
    button.addEventListener("click", () => {
      state.down = state.sort === key ? !state.down : false;
      state.sort = key;
      for (const other of line.children) other.removeAttribute("aria-sort");
      place.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      filter();
    });
    place.append(button);
    line.append(place);
  }
}

function link(number) {
  const row = data.rows[number];
  return new URLSearchParams({ run: row.run, item: row.item, sample: row.sample }).toString();
}

const places = new Map(data.rows.map((row, number) => [link(number), number]));
const chunks = new Map();

async function details(number) {
  const chunk = Math.floor(number / data.chunk);
  if (!chunks.has(chunk)) {
    chunks.set(chunk, (async () => {
      const packed = Uint8Array.from(atob(at("chunk-" + chunk).textContent), (letter) => letter.charCodeAt(0));
      const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
      return new Response(stream).json();
    })());
  }
  return (await chunks.get(chunk))[number % data.chunk];
}

function part(turn, title, text, className) {
  if (text === undefined || text === null || text === "") return;
  turn.append(make("h4", title), make("pre", text, className));
}

async function transcript(number) {
  const { first, turns, error, tries_before: tries, reward, seed, task, started } = await details(number);
  const row = data.rows[number], column = make("article");
  column.append(make("h3", `${data.runs[row.run]}, sample ${row.sample}`));
  const facts = make("p", null, "facts");
  facts.append(make("strong", row.outcome, row.outcome));
  facts.append(` · reward ${reward === null ? "none" : reward} · ${row.rounds} rounds · ${row.tokens} tokens · ` +
    `${row.seconds.toFixed(1)} s · seed ${seed === null ? "none" : seed} · task ${task} · ${started}`);
  column.append(facts);
  if (error) column.append(make("p", `Error: ${error}`, "problem"));
  for (const one of tries) column.append(make("p", `Earlier try, ${one.outcome}: ${one.error}`, "problem"));
  const start = make("section", null, "turn");
  part(start, "First observation", first);
  column.append(start);
  turns.forEach((one, index) => {
    const turn = make("section", null, one.invalid ? "turn invalid" : "turn");
    turn.setAttribute("aria-label", `Round ${index + 1}`);
    turn.append(make("h3", `Round ${index + 1}`));
    if (one.invalid) turn.append(make("p", one.action === null ? "Invalid action: refused, not sent" : "Invalid action: none found", "mark"));
    if (one.finish) turn.append(make("p", `The completion ended with ${one.finish}`, "mark"));
    part(turn, "Reasoning", one.reasoning);
    part(turn, "Thought and action", one.completion === one.action && one.completion ? "" : one.completion || "(empty)");
    part(turn, "Refusal", one.refusal);
    part(turn, "Beside the answer", one.extras && JSON.stringify(one.extras, null, 1));
    if (one.cut) turn.append(make("p", `The answer was limited to ${one.cut} tokens: the context had no more`, "mark"));
    part(turn, "Action", one.action);
    part(turn, "Observation", one.observation);
    if (one.reward !== undefined) turn.append(make("p", `Reward ${one.reward}`, "facts"));
    column.append(turn);
  });
  return column;
}

async function showAttempt(number, focus) {
  state.open = number;
  const row = data.rows[number];
  at("viewer").hidden = false;
  at("viewer-title").textContent = visible(row.item);
  const beside = at("beside");
  beside.replaceChildren();
  option(beside, "", "nothing");
  data.rows.forEach((other, index) => {
    if (index !== number && other.item === row.item) option(beside, index, `${data.runs[other.run]}, sample ${other.sample} (${other.outcome})`);
  });
  beside.parentElement.hidden = beside.options.length === 1;
  const column = await transcript(number);
  if (state.open !== number) return;  // another one was opened meanwhile
  at("columns").replaceChildren(column);
  draw();
  if (focus) {
    at("viewer-title").focus();
    at("viewer").scrollIntoView();
  }
}

function closeAttempt() {
  history.replaceState(null, "", location.pathname + location.search);
  hide();
}

function hide() {
  const number = state.open;
  state.open = null;
  at("viewer").hidden = true;
  draw();
  const button = document.querySelector(`#table tr[data-number="${number}"] button`);
  (button || at("text")).focus();
}

function follow() {
  const number = places.get(new URLSearchParams(location.hash.slice(1)).toString());
  if (number !== undefined) showAttempt(number, true);
  else if (state.open !== null) hide();  // the way back led to the page itself
}

function step(by) {
  if (!state.shown.length) return;
  const here = state.shown.indexOf(state.open);
  const next = here < 0 ? 0 : Math.min(Math.max(here + by, 0), state.shown.length - 1);
  state.page = Math.floor(next / PAGE_SIZE);
  location.hash = link(state.shown[next]);
}

header();
data.runs.forEach((name, number) => option(at("run"), number, name));
at("run-label").hidden = data.runs.length === 1;
for (const outcome of new Set(data.rows.map((row) => row.outcome))) option(at("outcome"), outcome);
option(at("outcome"), "errors", "all errors");
const categories = [...new Set(data.rows.map((row) => row.category).filter(Boolean))].sort();
for (const category of categories) option(at("category"), category);
at("category-label").hidden = !categories.length;
for (const id of ["run", "outcome", "category"]) at(id).addEventListener("change", filter);
at("text").addEventListener("input", filter);
at("filters").addEventListener("submit", (event) => event.preventDefault());
at("before").addEventListener("click", () => { state.page -= 1; draw(); });
at("after").addEventListener("click", () => { state.page += 1; draw(); });
at("close").addEventListener("click", closeAttempt);
at("beside").addEventListener("change", async (event) => {
  const wanted = event.target.value, number = state.open;
  const both = [await transcript(number)];
  if (wanted !== "") both.push(await transcript(Number(wanted)));
  if (state.open === number) at("columns").replaceChildren(...both);
});
addEventListener("hashchange", follow);
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape" && state.open !== null) return closeAttempt();
  if (/^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)) return;
  if (event.key === "/") { event.preventDefault(); at("text").focus(); }
  if (event.key === "j") step(1);
  if (event.key === "k") step(-1);
});
filter();
follow();
document.documentElement.dataset.ready = "yes";
