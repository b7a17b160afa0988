// Everything that a model or an environment said is put on the page as text (textContent), never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
data.rows = data.rows.map((row) => Object.fromEntries(data.fields.map((name, index) => [name, row[index]])));
const PAGE_SIZE = 100;
const LONG = 4000, HEAD = 1500;  // characters: what is longer is folded to its head
const BLOCK = 50_000;  // characters that the browser lays out together, once they are in sight
const numeric = new Set(["sample", "reward", "rounds", "invalid", "tokens", "seconds"]);
const errors = new Set(["env_error", "model_error", "timeout"]);
const at = (id) => document.getElementById(id);
const state = { view: "attempts", shown: [], entries: [], page: 0, sort: null, down: false, open: null, filtering: 0, finds: null };

// Characters that turn the direction of writing, and others that cannot be seen, are shown as what they are.
const UNSEEN = /[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069]/g;
const visible = (text) => String(text).replace(UNSEEN, (one) => "\\u" + one.charCodeAt(0).toString(16).padStart(4, "0"));

function make(tag, text, className) {
  const node = document.createElement(tag);
  if (text !== undefined && text !== null) node.textContent = visible(text);
  if (className) node.className = className;
  return node;
}

function pressed(text, action) {
  const button = make("button", text);
  button.type = "button";
  button.addEventListener("click", action);
  return button;
}

function option(select, value, text) {
  const node = make("option", text === undefined ? value : text);
  node.value = value;
  select.append(node);
}

// The two tables: an attempt's row number is an entry of the first, a group of attempts at one item of the second.

const byItem = new Map();
data.rows.forEach((row, number) => byItem.set(row.item, [...(byItem.get(row.item) || []), number]));

function solved(numbers) {
  const scored = numbers.filter((number) => data.rows[number].reward !== null);
  const won = scored.filter((number) => data.rows[number].outcome === "success").length;
  return { won, scored: scored.length, spoilt: numbers.length - scored.length };
}

function solvedText(numbers) {
  const { won, scored, spoilt } = solved(numbers);
  return `${won} of ${scored}${spoilt ? `, ${spoilt} without a score` : ""}`;
}

function share(numbers) {
  const { won, scored } = solved(numbers);
  return scored ? won / scored : null;
}

function mean(numbers) {
  const rewards = numbers.map((number) => data.rows[number].reward).filter((reward) => reward !== null);
  return rewards.length ? rewards.reduce((sum, one) => sum + one, 0) / rewards.length : null;
}

const reward = (value) => value === null ? "–" : value.toFixed(2);

function attemptText(row, key) {
  if (key === "run") return data.runs[row.run];
  if (key === "reward") return reward(row.reward);
  if (key === "seconds") return row.seconds.toFixed(1);
  return row[key];
}

const categorized = data.rows.some((row) => row.category);
const views = {
  attempts: {
    columns: ["item", "run", "category", "sample", "outcome", "reward", "rounds", "invalid", "tokens", "seconds"]
      .filter((key) => !(key === "run" && data.runs.length === 1) && !(key === "category" && !categorized))
      .map((key) => ({
        title: key, number: numeric.has(key), value: (number) => data.rows[number][key],
        text: (number) => attemptText(data.rows[number], key), outcome: key === "outcome",
      })),
    entries: (shown) => shown,
    link: (number) => link(number),
  },
  items: {
    columns: [
      { title: "item", value: (group) => group.item, text: (group) => group.item },
      ...(categorized ? [{ title: "category", value: (group) => group.category, text: (group) => group.category }] : []),
      ...data.runs.map((name, run) => {
        const own = (group) => group.numbers.filter((number) => data.rows[number].run === run);
        return { title: data.runs.length === 1 ? "solved" : `solved by ${name}`, number: true,
                 value: (group) => share(own(group)), text: (group) => own(group).length ? solvedText(own(group)) : "" };
      }),
      { title: "reward", number: true, value: (group) => mean(group.numbers), text: (group) => reward(mean(group.numbers)) },
    ],
    entries(shown) {
      const groups = new Map();
      for (const number of shown) {
        const { item, category } = data.rows[number];
        if (!groups.has(item)) groups.set(item, { item, category, numbers: [] });
        groups.get(item).numbers.push(number);
      }
      return [...groups.values()];
    },
    link: (group) => itemLink(group.item),
  },
};

// What an attempt's rows are asked for: "reward < 0.5, rounds >= 10".
const CONDITION = /^\s*([a-z]+)\s*(<=|>=|!=|=|<|>)\s*(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*$/i;
const HOLDS = { "<": (a, b) => a < b, "<=": (a, b) => a <= b, ">": (a, b) => a > b, ">=": (a, b) => a >= b,
                "=": (a, b) => a === b, "!=": (a, b) => a !== b };

function conditions(text) {
  return text.split(/,|\band\b/).filter((part) => part.trim()).map((part) => {
    const found = CONDITION.exec(part);
    if (!found || !numeric.has(found[1].toLowerCase())) throw new Error(part.trim());
    const key = found[1].toLowerCase(), holds = HOLDS[found[2]], limit = Number(found[3]);
    return (row) => row[key] !== null && holds(row[key], limit);
  });
}

function asked() {
  const field = at("where"), note = at("where-note");
  try {
    const all = conditions(field.value);
    field.removeAttribute("aria-invalid");
    note.hidden = true;
    return all;
  } catch (error) {
    field.setAttribute("aria-invalid", "true");
    note.hidden = false;
    note.textContent = visible(`"${error.message}" is left out: a name (${[...numeric].join(", ")}), one of < <= > >= = !=, and a number`);
    return [];
  }
}

const literal = (text, flags) => new RegExp(text.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"), flags);

async function filter() {
  const mine = ++state.filtering;
  const text = at("text").value.toLowerCase(), words = at("said").value;
  const run = at("run").value, outcome = at("outcome").value, category = at("category").value, where = asked();
  let shown = [];
  data.rows.forEach((row, number) => {
    if (text && !row.item.toLowerCase().includes(text)) return;
    if (run !== "" && row.run !== Number(run)) return;
    if (outcome && (outcome === "errors" ? !errors.has(row.outcome) : row.outcome !== outcome)) return;
    if (category && row.category !== category) return;
    if (where.every((holds) => holds(row))) shown.push(number);
  });
  if (words) {
    at("shown").textContent = "searching …";
    shown = await saying(literal(words, "giu"), shown, () => mine === state.filtering);
    if (shown === null) return;  // something else is asked for by now
  }
  state.finds = words ? literal(words, "iu") : null;
  state.shown = shown;
  arrange();
}

function arrange() {
  const view = views[state.view];
  state.entries = [...view.entries(state.shown)];
  if (state.sort !== null) {
    const { value } = view.columns[state.sort], sign = state.down ? -1 : 1;
    const keyed = state.entries.map((entry, place) => [value(entry), place, entry]);
    keyed.sort(([x, i], [y, j]) => {
      if (x === y) return i - j;
      if (x === null || y === null) return x === null ? 1 : -1;
      return (x < y ? -1 : 1) * sign;
    });
    state.entries = keyed.map(([, , entry]) => entry);
  }
  state.page = 0;
  draw();
}

function draw() {
  const view = views[state.view], pages = Math.max(1, Math.ceil(state.entries.length / PAGE_SIZE));
  state.page = Math.min(Math.max(state.page, 0), pages - 1);
  const body = document.createDocumentFragment();
  for (const entry of state.entries.slice(state.page * PAGE_SIZE, (state.page + 1) * PAGE_SIZE)) {
    const line = make("tr"), where = view.link(entry);
    line.dataset.link = where;
    if (where === state.open) line.className = "open";
    for (const column of view.columns) {
      const place = make("td", null, column.number ? "number" : column.outcome ? column.text(entry) : "");
      if (column.title === "item") {
        const button = pressed(column.text(entry), () => { location.hash = where; });
        button.title = visible(column.text(entry));
        place.className = "item";
        place.append(button);
      } else place.textContent = visible(column.text(entry));
      line.append(place);
    }
    body.append(line);
  }
  document.querySelector("#table tbody").replaceChildren(body);
  at("shown").textContent = state.view === "items"
    ? `${state.entries.length} of ${byItem.size} items, ${state.shown.length} of ${data.rows.length} attempts`
    : `${state.shown.length} of ${data.rows.length} attempts`;
  at("page").textContent = `${state.page + 1} of ${pages}`;
  at("before").disabled = state.page === 0;
  at("after").disabled = state.page === pages - 1;
}

function header() {
  const line = make("tr");
  views[state.view].columns.forEach((column, index) => {
    const place = make("th", null, column.number ? "number" : "");
    place.scope = "col";
    place.append(pressed(column.title, () => {
      state.down = state.sort === index ? !state.down : false;
      state.sort = index;
      for (const other of line.children) other.removeAttribute("aria-sort");
      place.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      arrange();
    }));
    line.append(place);
  });
  document.querySelector("#table thead").replaceChildren(line);
}

function link(number) {
  const row = data.rows[number];
  return new URLSearchParams({ run: row.run, item: row.item, sample: row.sample }).toString();
}

const itemLink = (item) => new URLSearchParams({ item }).toString();
const places = new Map(data.rows.map((row, number) => [link(number), number]));

// What was said, packed; `data.chunks` has the number of each chunk's first attempt.

function chunkOf(number) {
  let low = 0, high = data.chunks.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (data.chunks[middle] <= number) low = middle;
    else high = middle - 1;
  }
  return low;
}

// A line of JSON, the attempts with the lengths of their words in place of these, and the words one after the other.
async function unpack(chunk) {
  const letters = atob(at("chunk-" + chunk).textContent), packed = new Uint8Array(letters.length);
  for (let index = 0; index < letters.length; index++) packed[index] = letters.charCodeAt(index);
  const text = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"))).text();
  const line = text.indexOf("\n"), attempts = JSON.parse(text.slice(0, line)), starts = [];
  let place = line + 1;
  for (const one of attempts) {
    starts.push(place);
    place += one.first + one.error + 2;
    for (const turn of one.turns) {
      for (const key of WORDS) if (typeof turn[key] === "number") place += turn[key] + 1;
    }
  }
  return { text, attempts, starts };
}

const WORDS = ["completion", "action", "observation", "reasoning", "refusal", "extras"];  // as they follow each other
const unpacked = new Map(), unpacking = new Map();

function opened(chunk) {
  if (!unpacking.has(chunk)) unpacking.set(chunk, unpack(chunk).then((all) => { unpacked.set(chunk, all); return all; }));
  return unpacking.get(chunk);
}

async function details(number) {
  const chunk = chunkOf(number), { text, attempts, starts } = await opened(chunk), index = number - data.chunks[chunk];
  let place = starts[index];
  const take = (length) => { place += length + 1; return text.slice(place - length - 1, place - 1); };
  const one = attempts[index], first = take(one.first), error = take(one.error);
  const turns = one.turns.map((turn) => {
    const words = WORDS.filter((key) => typeof turn[key] === "number").map((key) => [key, take(turn[key])]);
    const whole = { ...turn, ...Object.fromEntries(words) };
    return whole.extras ? { ...whole, extras: JSON.parse(whole.extras) } : whole;
  });
  return { ...one, first, error, turns };
}

// The numbers of those attempts, among `numbers` in rising order, in which somebody said what `pattern` finds.
async function saying(pattern, numbers, current) {
  const found = [];
  let ahead = null;  // the next place of it, which may lie in a later attempt
  for (const number of numbers) {
    const chunk = chunkOf(number);
    if (!unpacked.has(chunk)) await opened(chunk);
    if (!current()) return null;
    const { text, starts } = unpacked.get(chunk), index = number - data.chunks[chunk];
    const end = index + 1 < starts.length ? starts[index + 1] : text.length;
    if (!ahead || ahead.chunk !== chunk || ahead.place < starts[index]) {
      pattern.lastIndex = starts[index];
      ahead = { chunk, place: pattern.test(text) ? pattern.lastIndex : Infinity };
    }
    if (ahead.place <= end) found.push(number);
  }
  return found;
}

// An attempt, turn by turn.

function whole(text) {
  const place = make("pre");
  for (let begin = 0; begin < text.length;) {
    let end = Math.min(begin + BLOCK, text.length);
    const line = end < text.length ? text.lastIndexOf("\n", end) : -1;
    if (line > begin) end = line;
    place.append(make("div", text.slice(begin, end), "block"));
    begin = line > begin ? end + 1 : end;
  }
  return place;
}

function words(text, open) {
  if (text.length <= LONG) return make("pre", text);
  if (open) return whole(text);
  const place = make("div"), all = text.length.toLocaleString("en");
  place.append(make("pre", text.slice(0, HEAD) + " …"), pressed(`Show all ${all} characters`, () => { place.replaceChildren(whole(text)); }));
  return place;
}

function part(turn, title, text, folded) {
  if (text === undefined || text === null || text === "") return;
  const match = state.finds !== null && state.finds.test(text), place = words(text, match);
  if (match) turn.classList.add("match");
  if (folded) {
    const fold = make("details"), summary = make("summary", `${title} (${text.length.toLocaleString("en")} characters)`);
    fold.open = match;
    fold.append(summary, place);
    turn.append(fold);
  } else turn.append(make("h4", title), place);
}

function spent(one) {
  const facts = [];
  if (one.reward !== undefined) facts.push(`reward ${one.reward}`);
  if (one.tokens) facts.push(`${one.tokens[1].toLocaleString("en")} tokens after ${one.tokens[0].toLocaleString("en")}`);
  if (one.seconds !== undefined) facts.push(`${one.seconds.toFixed(1)} s`);
  return facts.join(" · ");
}

async function transcript(number) {
  const { first, turns, error, tries_before: tries, reward: won, seed, task, started } = await details(number);
  const row = data.rows[number], column = make("article");
  column.append(make("h3", `${data.runs[row.run]}, sample ${row.sample}`));
  const facts = make("p", null, "facts");
  facts.append(make("strong", row.outcome, row.outcome));
  facts.append(visible(` · reward ${won === null ? "none" : won} · ${row.rounds} rounds · ${row.tokens} tokens · ` +
    `${row.seconds.toFixed(1)} s · seed ${seed === null ? "none" : seed} · task ${task} · ${started}`));
  column.append(facts);
  if (error) column.append(make("p", `Error: ${error}`, "problem"));
  for (const one of tries) column.append(make("p", `Earlier try, ${one.outcome}: ${one.error}`, "problem"));
  const start = make("section", null, "turn");
  part(start, "First observation", first);
  column.append(start);
  turns.forEach((one, index) => {
    const turn = make("section", null, one.invalid ? "turn invalid" : "turn");
    turn.setAttribute("aria-label", `Round ${index + 1}`);
    turn.dataset.turn = index + 1;
    const title = make("h3"), here = make("a", `Round ${index + 1}`);
    here.href = `#${link(number)}&turn=${index + 1}`;
    title.append(here);
    turn.append(title);
    if (one.invalid) turn.append(make("p", one.action === null ? "Invalid action: refused, not sent" : "Invalid action: none found", "mark"));
    if (one.finish) turn.append(make("p", `The completion ended with ${one.finish}`, "mark"));
    part(turn, "Reasoning", one.reasoning, true);
    part(turn, "Thought and action", one.completion === one.action && one.completion ? "" : one.completion || "(empty)");
    part(turn, "Refusal", one.refusal);
    part(turn, "Beside the answer", one.extras && JSON.stringify(one.extras, null, 1));
    if (one.cut) turn.append(make("p", `The answer was limited to ${one.cut} tokens: the context had no more`, "mark"));
    part(turn, "Action", one.action);
    part(turn, "Observation", one.observation);
    if (spent(one)) turn.append(make("p", spent(one), "facts"));
    column.append(turn);
  });
  return column;
}

// All attempts at one item: one trunk where they act alike, a branch wherever their actions part.

async function grown(numbers) {
  const root = { numbers: [], ends: [], children: new Map() };
  for (const number of numbers) {
    let node = root;
    node.numbers.push(number);
    for (const turn of (await details(number)).turns) {
      const action = turn.action === null ? "(no valid action)" : turn.action;
      if (!node.children.has(action)) node.children.set(action, { action, numbers: [], ends: [], children: new Map() });
      node = node.children.get(action);
      node.numbers.push(number);
    }
    node.ends.push(number);
  }
  return root;
}

function branch(node) {
  const place = make("li"), steps = [];
  if (node.action !== undefined) steps.push(node.action);
  while (node.children.size === 1 && !node.ends.length) {
    [node] = node.children.values();
    steps.push(node.action);
  }
  place.append(make("p", `${node.numbers.length} ${node.numbers.length === 1 ? "attempt" : "attempts"}, solved ${solvedText(node.numbers)}`, "facts"));
  const list = make("ol", null, "steps");
  for (const step of steps) list.append(make("li", step.length > 200 ? step.slice(0, 200) + " …" : step));
  if (steps.length > 8) {
    const fold = make("details");
    fold.append(make("summary", `${steps.length} actions: ${steps[0].slice(0, 60)} … ${steps.at(-1).slice(0, 60)}`), list);
    place.append(fold);
  } else if (steps.length) place.append(list);
  const inner = make("ul", null, "tree");
  for (const number of node.ends) {
    const row = data.rows[number], end = make("li"), there = make("a", `${data.runs[row.run]}, sample ${row.sample}`);
    there.href = "#" + link(number);
    end.append("ends here: ", there, " ", make("strong", row.outcome, row.outcome), ` ${reward(row.reward)}`);
    inner.append(end);
  }
  for (const child of node.children.values()) inner.append(branch(child));
  if (inner.children.length) place.append(inner);
  return place;
}

async function tree(item) {
  const column = make("article"), top = make("ul", null, "tree");
  column.append(make("h3", "Where the attempts part"));
  top.append(branch(await grown(byItem.get(item))));
  column.append(top);
  return column;
}

// The place below the tables that shows an attempt or an item.

async function show(where, title, column, focus) {
  state.open = where;
  const made = await column;
  if (state.open !== where) return false;  // another one was opened meanwhile
  at("viewer").hidden = false;
  at("viewer-title").textContent = visible(title);
  at("copied").textContent = "";
  at("columns").replaceChildren(made);
  draw();
  if (focus) {
    at("viewer-title").focus();
    at("viewer").scrollIntoView();
  }
  return true;
}

async function showAttempt(number, turn) {
  const where = link(number), { item } = data.rows[number];
  if (state.open !== where || at("viewer").hidden) {
    const beside = at("beside");
    beside.replaceChildren();
    option(beside, "", "nothing");
    for (const index of byItem.get(item)) {
      const other = data.rows[index];
      if (index !== number) option(beside, index, `${data.runs[other.run]}, sample ${other.sample} (${other.outcome})`);
    }
    for (const label of [beside.parentElement, at("whole-item")]) label.hidden = beside.options.length === 1;
    at("copy").hidden = false;
    if (!await show(where, item, transcript(number), true)) return;
  }
  at("copied").textContent = "";
  const place = document.querySelector(turn ? `#columns [data-turn="${Number(turn)}"]` : state.finds ? "#columns .match" : "#none");
  if (place) place.scrollIntoView();
  else if (turn) {
    const { length } = document.querySelectorAll("#columns article:first-child [data-turn]");
    at("copied").textContent = visible(`the link is to round ${turn}, and this attempt has ${length}`);
  }
}

function showItem(item) {
  at("beside").parentElement.hidden = at("whole-item").hidden = at("copy").hidden = true;
  return show(itemLink(item), item, tree(item), true);
}

async function copy() {
  const number = places.get(state.open), row = data.rows[number];
  const text = JSON.stringify({ ...row, run: data.runs[row.run], ...await details(number), scaled: row.reward }, null, 1);
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // a page that came over plain HTTP has no clipboard of its own
    const place = make("textarea");
    place.value = text;
    document.body.append(place);
    place.select();
    document.execCommand("copy");
    place.remove();
  }
  at("copied").textContent = `copied, ${text.length.toLocaleString("en")} characters`;
}

function closeViewer() {
  history.replaceState(null, "", location.pathname + location.search);
  hide();
}

function hide() {
  const where = state.open;
  state.open = null;
  at("viewer").hidden = true;
  draw();
  const line = [...document.querySelectorAll("#table tbody tr")].find((one) => one.dataset.link === where);
  (line ? line.querySelector("button") : at("text")).focus();
}

function follow() {
  const asked = new URLSearchParams(location.hash.slice(1)), item = asked.get("item"), lost = at("lost");
  const one = Object.fromEntries(["run", "item", "sample"].map((name) => [name, asked.get(name) ?? ""]));
  const number = places.get(new URLSearchParams(one).toString()), all = byItem.has(item) && !asked.has("run");
  lost.hidden = item === null || number !== undefined || all;
  lost.textContent = visible(`The link is to an attempt that this report does not have: ${location.hash.slice(1)}`);
  if (number !== undefined) showAttempt(number, asked.get("turn"));
  else if (all) showItem(item);
  else if (state.open !== null) hide();  // the way back led to the page itself
  if (!lost.hidden) lost.scrollIntoView({ block: "center" });
}

function step(by) {
  if (!state.entries.length) return;
  const { link: where } = views[state.view];
  const here = state.entries.findIndex((entry) => where(entry) === state.open);
  const next = here < 0 ? 0 : Math.min(Math.max(here + by, 0), state.entries.length - 1);
  state.page = Math.floor(next / PAGE_SIZE);
  location.hash = where(state.entries[next]);
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
for (const id of ["text", "said", "where"]) at(id).addEventListener("input", filter);
at("said").addEventListener("focus", () => data.chunks.forEach((first, chunk) => opened(chunk)), { once: true });
at("view").addEventListener("change", () => {
  Object.assign(state, { view: at("view").value, sort: null, down: false });
  header();
  arrange();
});
at("filters").addEventListener("submit", (event) => event.preventDefault());
at("before").addEventListener("click", () => { state.page -= 1; draw(); });
at("after").addEventListener("click", () => { state.page += 1; draw(); });
at("close").addEventListener("click", closeViewer);
at("copy").addEventListener("click", copy);
at("whole-item").addEventListener("click", () => { location.hash = itemLink(data.rows[places.get(state.open)].item); });
at("beside").addEventListener("change", async (event) => {
  const wanted = event.target.value, where = state.open;
  const both = [await transcript(places.get(where))];
  if (wanted !== "") both.push(await transcript(Number(wanted)));
  if (state.open === where) at("columns").replaceChildren(...both);
});
addEventListener("hashchange", follow);
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape" && state.open !== null) return closeViewer();
  if (/^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)) return;
  if (event.key === "/") { event.preventDefault(); at("text").focus(); }
  if (event.key === "j") step(1);
  if (event.key === "k") step(-1);
});
filter();
follow();
document.documentElement.dataset.ready = "yes";
