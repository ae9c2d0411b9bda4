"use strict";
// One pair at a time. Every text is put on the page as a text node, never as markup.

const PAGE = 100; // lines of the list that are made at once
const state = { lines: [], matching: [], files: new Map(), wanted: null, current: null, made: 0 };
const byId = (id) => document.getElementById(id);
const filters = () => byId("filters").elements;

/** An element: h("p", {class: "small"}, "text", child, ...). Only known attributes are set. */
function h(name, attributes, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === true) node.setAttribute(key, "");
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined && child !== "") node.append(child);
  }
  return node;
}

// Controls and formatting characters that nobody sees; the joiners of emoji and Persian stay.
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g;

const codeOf = (character) => `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;

/** A foreign text as a string, characters that nobody sees by their numbers. */
const plain = (text) => text.replace(UNSEEN, codeOf);

/** A foreign text as nodes, characters that nobody sees by their numbers. */
function shown(text) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(UNSEEN)) {
    if (match.index > end) nodes.push(text.slice(end, match.index));
    nodes.push(h("span", { class: "unseen", title: "a character that is not seen" }, codeOf(match[0])));
    end = match.index + 1;
  }
  if (end < text.length) nodes.push(text.slice(end));
  return nodes;
}

const number = (value, digits = 4) => (value === null || value === undefined ? "–" : String(Number(value.toPrecision(digits))));
const count = (value) => value.toLocaleString("en");

// -- data: the index at once, pairs file by file ------------------------------------------------

function loadIndex(lines) {
  state.lines = lines;
  fillChoices();
  readAddress();
}

function loadPairs(file, entries) {
  state.files.set(file, new Map(entries.map((entry) => [entry.id, entry])));
  if (state.wanted) showPair(state.wanted);
}

function need(file) {
  if (file === undefined || file < 0 || state.files.has(file)) return;
  state.files.set(file, null);
  document.head.append(h("script", { src: `data/pairs-${String(file).padStart(3, "0")}.js` }));
}

// -- filters and the list -----------------------------------------------------------------------

function fillChoices() {
  const add = (name, values) => {
    const select = filters()[name];
    for (const [value, label, many] of values) select.append(h("option", { value }, `${plain(label).slice(0, 80)} (${count(many)})`));
    select.disabled = values.length === 0;
  };
  const tally = (valuesOf, labelOf = (value) => value) => {
    const counts = new Map();
    for (const line of state.lines) {
      for (const value of valuesOf(line)) {
        const [, , many] = counts.get(value) || ["", "", 0];
        counts.set(value, [value, labelOf(value, line), many + 1]);
      }
    }
    return [...counts.values()];
  };
  add("fate", tally((line) => [line.fate], (_, line) => line.label));
  add("source", tally((line) => (line.source ? [line.source] : [])));
  add("tag", tally((line) => line.tags));
}

const ORDERS = {
  "margin-down": (line) => (line.margin === null ? Infinity : -line.margin),
  "margin-up": (line) => (line.margin === null ? Infinity : line.margin),
  "words-down": (line) => (line.words ? -line.words[0] - line.words[1] : Infinity),
  "words-up": (line) => (line.words ? line.words[0] + line.words[1] : Infinity),
};

function applyFilters() {
  const { text, fate, source, tag, sort, least, most } = filters();
  const sought = text.value.trim().toLowerCase();
  state.matching = state.lines.filter(
    (line) =>
      (!sought || line.text.includes(sought) || line.id === sought || line.idx.toLowerCase() === sought) &&
      (!fate.value || line.fate === fate.value) &&
      (!source.value || line.source === source.value) &&
      (!tag.value || line.tags.includes(tag.value)) &&
      (least.value === "" || (line.margin !== null && line.margin >= Number(least.value))) &&
      (most.value === "" || (line.margin !== null && line.margin <= Number(most.value))),
  );
  const order = ORDERS[sort.value];
  if (order) state.matching = state.matching.map((line) => [order(line), line]).sort((a, b) => a[0] - b[0]).map(([, line]) => line);
  byId("count").textContent = `${count(state.matching.length)} of ${count(state.lines.length)} match`;
  state.made = 0;
  byId("list").querySelector("ol").replaceChildren();
  byId("list").scrollTop = 0;
  makeLines(PAGE);
}

function makeLines(upTo) {
  const list = byId("list").querySelector("ol");
  byId("more")?.remove();
  for (; state.made < Math.min(upTo, state.matching.length); state.made += 1) {
    list.append(lineNode(state.matching[state.made]));
  }
  if (state.made < state.matching.length) {
    const more = h("button", { type: "button", id: "more", class: "more" }, `Show more (${count(state.matching.length - state.made)} left)`);
    more.addEventListener("click", () => makeLines(state.made + PAGE));
    byId("list").append(more);
  }
}

function lineNode(line) {
  const picture = line.thumb
    ? h("img", { class: "thumb", src: line.thumb.file, width: line.thumb.width, height: line.thumb.height, alt: "", loading: "lazy" })
    : h("span", { class: "thumb", "aria-hidden": "true" });
  const measure = line.margin === null ? line.label : `margin ${number(line.margin, 3)} · ${line.words[0]} / ${line.words[1]} words`;
  const status = line.margin !== null && line.fate !== "kept" ? ` · ${line.label}` : "";
  const link = h("a", { href: address(line.id), "data-id": line.id },
    picture,
    h("span", { class: "what", dir: "auto" }, line.question || "(no text)"),
    h("span", { class: "how" }, plain(measure + status)));
  if (line.id === state.wanted) link.setAttribute("aria-current", "true");
  return h("li", null, link);
}

// -- the address: which pair, under which filters -----------------------------------------------

const FIELDS = ["text", "fate", "source", "tag", "sort", "least", "most"];

function address(id) {
  const words = new URLSearchParams();
  if (id) words.set("pair", id);
  for (const name of FIELDS) if (filters()[name].value) words.set(name, filters()[name].value);
  return `#${words}`;
}

function readAddress() {
  const words = new URLSearchParams(location.hash.slice(1));
  for (const name of FIELDS) filters()[name].value = words.get(name) || "";
  applyFilters();
  const id = words.get("pair");
  if (id) showPair(id);
  else if (state.matching.length) go(state.matching[0].id, true);
  else showPair(null);
}

function go(id, quietly = false) {
  if (quietly) history.replaceState(null, "", address(id));
  else history.pushState(null, "", address(id));
  showPair(id);
}

function step(by) {
  const at = state.matching.findIndex((line) => line.id === state.wanted);
  const next = state.matching[at < 0 ? 0 : at + by];
  if (next) go(next.id);
}

// -- one pair -----------------------------------------------------------------------------------

function showPair(id) {
  state.wanted = id;
  const at = state.matching.findIndex((line) => line.id === id);
  byId("previous").disabled = at <= 0;
  byId("next").disabled = at < 0 ? !state.matching.length : at >= state.matching.length - 1;
  byId("position").textContent = at < 0 ? "not in this list" : `${count(at + 1)} of ${count(state.matching.length)}`;
  if (at >= state.made) makeLines(at + PAGE);
  for (const link of byId("list").querySelectorAll("a")) {
    if (link.dataset.id === id) {
      link.setAttribute("aria-current", "true");
      link.scrollIntoView({ block: "nearest" });
    } else link.removeAttribute("aria-current");
  }
  const line = state.lines.find((one) => one.id === id);
  if (!line) return showMissing(id);
  need(line.file);
  for (const near of [state.matching[at + 1], state.matching[at - 1]]) need(near?.file);
  const entry = state.files.get(line.file)?.get(id);
  if (!entry || state.current === entry) return undefined;
  state.current = entry;
  byId("pair").replaceChildren(...pairNodes(entry, line));
  byId("main").scrollTop = 0;
  return undefined;
}

function showMissing(id) {
  state.current = null;
  const said = id
    ? ["This page shows a part of the pairs, and ", h("code", null, plain(id.slice(0, 200))), " is none of them. It can be printed by ", h("code", null, "stream-engine show WORK_DIR ID"), "."]
    : ["No pair matches these filters."];
  byId("pair").replaceChildren(h("h1", { id: "question" }, id ? "Not on this page" : "Nothing matches"), h("p", null, ...said));
}

function pairNodes(entry, line) {
  const parts = [askedNode(entry, line)];
  const answers = new Map(entry.answers.map((answer) => [answer.index, answer]));
  if (entry.detail) parts.push(h("p", { class: "note" }, ...shown(entry.detail)));
  if (entry.chosen) {
    parts.push(h("div", { class: "sides" }, sideNode("chosen", entry, answers), sideNode("rejected", entry, answers)));
    if (entry.chosen.heat.length || entry.rejected.heat.length) parts.push(heatNode(entry));
  }
  if (entry.answers.some((answer) => answer.facts.length)) parts.push(factsNode(entry, answers));
  if (entry.verdicts.length) parts.push(criticNode(entry));
  if (entry.answers.length) parts.push(answersNode(entry));
  return parts;
}

function askedNode(entry, line) {
  const pictures = entry.pictures.map((picture, i) =>
    h("img", { src: picture.file, width: picture.width, height: picture.height, class: Math.max(picture.width, picture.height) < 100 ? "tiny" : null, alt: `Picture ${i + 1} of the question` }));
  const rows = [
    ["status", line.label],
    ["margin", entry.margin === null ? null : number(entry.margin)],
    ["marked", entry.tags.length ? entry.tags.join(", ") : null],
    ["round", entry.round],
    ["source", entry.source],
    ["id", entry.idx],
    [entry.chosen ? "pair" : "key", entry.id],
  ].filter(([, value]) => value);
  return h("div", { class: "asked" },
    h("div", { class: "pictures" }, pictures),
    h("div", null,
      h("h1", { id: "question", dir: "auto", tabindex: entry.question.length > 400 ? "0" : null }, ...shown(entry.question || "(no text)")),
      h("dl", { class: "facts-of-it" }, rows.map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, ...shown(value)))))));
}

function sideNode(name, entry, answers) {
  const side = entry[name];
  const answer = answers.get(side.index);
  const cut = answer.finish === "length" ? " · cut off" : "";
  return h("section", { class: `card side ${name}`, "aria-label": `${name} answer` },
    h("header", null,
      h("h2", null, name === "chosen" ? "Chosen" : "Rejected"),
      h("span", { class: "small" }, `answer ${side.index} · score ${number(answer.score)} · rank ${answer.rank} of ${entry.answers.length} · ${count(answer.words)} words${cut}`, ...shown(answer.origin ? ` · ${answer.origin}` : ""))),
    h("p", { class: "text", dir: "auto", tabindex: answer.text.length > 1200 ? "0" : null },
      side.segments.map(([own, text]) => (own ? h("mark", null, ...shown(text)) : shown(text)))));
}

/** Tokens coloured by log p_reward - log p_instruct; hovering or arrow keys tell both. */
function heatNode(entry) {
  const gain = ([, reward, instruct]) => reward - instruct;
  const tokens = [...entry.chosen.heat, ...entry.rejected.heat];
  const most = Math.max(0.5, ...tokens.map((token) => Math.abs(gain(token))));
  const readout = h("p", { class: "readout", role: "status" }, "Hover over a token, or focus an answer and use the arrow keys.");
  const make = (name) => {
    const box = h("div", { class: "heat", tabindex: "0", role: "group", dir: "auto", "aria-label": `Tokens of the ${name} answer, coloured by their reward` });
    entry[name].heat.forEach((token) => {
      const value = gain(token);
      const span = h("span", { class: value >= 0 ? "up" : "down", "data-reward": token[1], "data-instruct": token[2] }, ...shown(token[0].replace(/\n/g, "↵\n")));
      span.style.setProperty("--share", Math.sqrt(Math.abs(value) / most).toFixed(3));
      box.append(span);
    });
    const tell = (span) => {
      box.querySelector(".here")?.classList.remove("here");
      if (!span || span === box || span.parentNode !== box) return;
      span.classList.add("here");
      const reward = Number(span.dataset.reward);
      const instruct = Number(span.dataset.instruct);
      readout.textContent = `“${span.textContent}”: log p reward ${number(reward)}, log p instruct ${number(instruct)}, difference ${number(reward - instruct)}`;
    };
    box.addEventListener("pointerover", (event) => tell(event.target.closest(".heat > span")));
    box.addEventListener("keydown", (event) => {
      if (event.key !== "ArrowRight" && event.key !== "ArrowLeft") return;
      const here = box.querySelector(".here");
      const next = event.key === "ArrowRight" ? (here ? here.nextElementSibling : box.firstElementChild) : here?.previousElementSibling;
      if (next) {
        tell(next);
        next.scrollIntoView({ block: "nearest" });
      }
      event.preventDefault();
      event.stopPropagation();
    });
    const sum = entry[name].heat.reduce((total, token) => total + gain(token), 0);
    return h("section", { class: `card side ${name}` }, h("header", null, h("h2", null, name === "chosen" ? "Chosen" : "Rejected"), h("span", { class: "small" }, `sum ${number(sum)} over ${entry[name].heat.length} tokens`)), box);
  };
  return h("section", { class: "block", "aria-labelledby": "heat" },
    h("header", null, h("h2", { id: "heat" }, "Reward of each token"),
      h("span", { class: "legend-of-heat" }, `log p reward − log p instruct: −${number(most, 2)}`, h("span", { class: "scale", "aria-hidden": "true" }), `+${number(most, 2)}`)),
    h("div", { class: "sides" }, make("chosen"), make("rejected")),
    readout);
}

function factsNode(entry, answers) {
  const table = (answer) => h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": `Facts of answer ${answer.index}` }, h("table", { class: "facts" },
    h("thead", null, h("tr", null, ...["Fact and question", "p(yes)", "p(no)", "verdict"].map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", null, answer.facts.map((fact) => h("tr", null,
      h("td", null, h("div", { dir: "auto" }, ...shown(fact.fact)), h("div", { class: "q", dir: "auto" }, ...shown(fact.question))),
      h("td", { class: "number" }, meter(fact.p_yes)),
      h("td", { class: "number" }, meter(fact.p_no)),
      h("td", { class: fact.holds ? "yes" : "no" }, fact.holds ? "holds" : "denied"))))));
  const names = entry.chosen ? ["chosen", "rejected"] : [];
  const sides = names.map((name) => {
    const answer = answers.get(entry[name].index);
    return h("section", { class: `card side ${name}` },
      h("header", null, h("h2", null, name === "chosen" ? "Chosen" : "Rejected"), h("span", { class: "small" }, `${answer.facts.length} facts, ${answer.facts.filter((fact) => !fact.holds).length} denied`)),
      table(answer));
  });
  const rest = entry.answers.filter((answer) => answer.facts.length && !names.some((name) => entry[name].index === answer.index));
  return h("section", { class: "block", "aria-labelledby": "facts" },
    h("header", null, h("h2", { id: "facts" }, "Facts and their checks")),
    h("div", { class: "sides" }, sides),
    rest.length ? h("details", { class: "card block" }, h("summary", null, `Facts of the other ${rest.length} answers`), rest.map((answer) => h("div", { class: "block" }, h("h3", null, `Answer ${answer.index}`), table(answer)))) : null);
}

function meter(value) {
  const bar = h("span");
  bar.style.setProperty("--share", value);
  return [h("span", { class: "meter", "aria-hidden": "true" }, bar), value.toFixed(3)];
}

function criticNode(entry) {
  const words = { first: "the first is better", second: "the second is better", equal: "equal", unparsed: "no verdict could be read" };
  const sides = entry.critiques.map((one) => h("section", { class: "card" },
    h("header", null, h("h3", null, `Answer ${one.first} first, answer ${one.second} second`)),
    h("p", null, h("strong", null, words[one.verdict] || plain(one.verdict))),
    h("p", { class: "text", dir: "auto", tabindex: one.reply.length > 1200 ? "0" : null }, ...shown(one.reply))));
  const told = entry.chosen && !sides.length ? h("p", { class: "small" }, "These two answers were not compared with each other; their scores come from other matches.") : null;
  return h("section", { class: "block", "aria-labelledby": "critic" },
    h("header", null, h("h2", { id: "critic" }, "What the critic said, in both orders"), entry.is_flip ? h("span", { class: "warn" }, "flip: it named the same place both times") : null),
    told, h("div", { class: "sides" }, sides), matrixNode(entry));
}

/** Who won against whom when it stood first. */
function matrixNode(entry) {
  const indices = [...new Set(entry.verdicts.flatMap(([first, second]) => [first, second]))].sort((a, b) => a - b);
  const verdicts = new Map(entry.verdicts.map(([first, second, verdict]) => [`${first}/${second}`, verdict]));
  const signs = { first: ["W", "win", "wins"], second: ["L", "loss", "loses"], equal: ["=", "", "equal"], unparsed: ["?", "", "no verdict"] };
  const cell = (first, second) => {
    const verdict = verdicts.get(`${first}/${second}`);
    if (first === second || !verdict) return h("td", null, first === second ? "" : "·");
    const back = verdicts.get(`${second}/${first}`);
    const isFlip = verdict === back && (verdict === "first" || verdict === "second");
    const [sign, kind, said] = signs[verdict] || ["?", "", plain(verdict)];
    return h("td", { class: kind, title: `answer ${first} before ${second}: ${said}${isFlip ? ", a flip" : ""}` }, sign + (isFlip ? "*" : ""));
  };
  return h("details", { class: "card block" }, h("summary", null, `All ${entry.verdicts.length} comparisons`),
    h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "All comparisons" },
      h("table", { class: "matrix" },
        h("caption", { class: "small" }, "Row first, column second: the row's answer W wins, L loses, = ties, ? no verdict, * flip"),
        h("thead", null, h("tr", null, h("td", null, ""), indices.map((index) => h("th", { scope: "col" }, String(index))))),
        h("tbody", null, indices.map((first) => h("tr", null, h("th", { scope: "row" }, String(first)), indices.map((second) => cell(first, second))))))));
}

function answersNode(entry) {
  const names = [...new Set(entry.answers.flatMap((answer) => Object.keys(answer.scores)))];
  const badge = (answer) => {
    for (const name of ["chosen", "rejected"]) {
      if (entry[name]?.index === answer.index) return h("span", { class: `badge ${name}` }, name);
    }
    return null;
  };
  const row = (answer) => h("tr", null,
    h("td", { class: "number" }, answer.rank === null ? "–" : String(answer.rank)),
    h("td", { class: "number" }, answer.score === null ? plain(answer.unscored.replaceAll("_", " ")) : number(answer.score)),
    names.map((name) => h("td", { class: "number" }, number(answer.scores[name]))),
    h("td", { class: "number" }, count(answer.words)),
    h("td", { class: "number" }, count(answer.tokens)),
    h("td", null, answer.finish === "length" ? "cut off" : answer.finish),
    h("td", { class: "number" }, String(answer.index)),
    h("td", { class: "answer" },
      h("details", null, h("summary", { dir: "auto" }, badge(answer), ...shown(answer.text.slice(0, 160) || "(empty)")),
        h("p", { class: "text", dir: "auto" }, ...shown(answer.text)),
        answer.same_as === null ? null : h("p", { class: "small" }, `the same text as answer ${answer.same_as}`),
        answer.origin ? h("p", { class: "small" }, ...shown(answer.origin)) : null,
        answer.details ? h("p", { class: "text small" }, ...shown(answer.details)) : null)));
  const heads = [["rank", 1], ["score", 1], ...names.map((name) => [name, 1]), ["words", 1], ["tokens", 1], ["end", 0], ["no.", 1], ["answer", 0]];
  return h("section", { class: "block", "aria-labelledby": "answers" },
    h("header", null, h("h2", { id: "answers" }, `All ${entry.answers.length} answers`)),
    h("div", { class: "card scroll", tabindex: "0", role: "group", "aria-label": "Table of all answers" },
      h("table", { class: "answers" },
        h("thead", null, h("tr", null, heads.map(([name, isNumber]) => h("th", { scope: "col", class: isNumber ? "number" : null }, plain(name).slice(0, 40))))),
        h("tbody", null, entry.answers.map(row)))),
    Object.entries(entry.unread).length ? h("details", { class: "card block" }, h("summary", null, "Replies that could not be read"),
      Object.entries(entry.unread).map(([name, reply]) => h("div", null, h("h3", null, plain(name)), h("p", { class: "text", dir: "auto" }, ...shown(reply))))) : null);
}

// -- events -------------------------------------------------------------------------------------

function changed() {
  applyFilters();
  const isThere = state.matching.some((line) => line.id === state.wanted);
  if (isThere || !state.matching.length) {
    history.replaceState(null, "", address(isThere ? state.wanted : null));
    showPair(isThere ? state.wanted : null);
  } else go(state.matching[0].id, true);
}

byId("filters").addEventListener("input", changed);
byId("filters").addEventListener("submit", (event) => event.preventDefault());
byId("filters").addEventListener("reset", () => setTimeout(changed));
byId("previous").addEventListener("click", () => step(-1));
byId("next").addEventListener("click", () => step(1));
byId("list").addEventListener("click", (event) => {
  const link = event.target.closest("a[data-id]");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  go(link.dataset.id);
});
byId("copy").addEventListener("click", async () => {
  const button = byId("copy");
  const link = `${location.href.split("#")[0]}#${new URLSearchParams({ pair: state.wanted || "" })}`;
  try {
    await navigator.clipboard.writeText(link);
    button.textContent = "Copied";
  } catch {
    history.replaceState(null, "", link);
    button.textContent = "It is in the address bar";
  }
  setTimeout(() => { button.textContent = "Copy link"; }, 2000);
});
window.addEventListener("popstate", readAddress);
window.addEventListener("hashchange", readAddress);
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("input, select, textarea")) return;
  if (event.key === "j" || event.key === "ArrowRight") step(1);
  else if (event.key === "k" || event.key === "ArrowLeft") step(-1);
  else if (event.key === "/") {
    filters().text.focus();
    event.preventDefault();
  }
});
