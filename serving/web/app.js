// The page: queries the model server's REST API and shows what was retrieved, read and answered.
// Everything from the server or the address is inserted as text, never as HTML.
"use strict";

const MODEL = document.body.dataset.model;
const TIMEOUT_MS = 40000; // longer than the time limit of `python -m serving.web`, whose error says more
const LOOK_MS = 2000; // between two checks of a model server that is not ready
const $ = (id) => document.getElementById(id);
const VIEWS = {
  ask: {form: $("ask-form"), input: $("question"), link: $("to-ask"), run: ask, empty: askEmpty},
  fill: {form: $("fill-form"), input: $("text"), link: $("to-fill"), run: fill, empty: fillEmpty},
};
let running = new AbortController();

// ------------------------------------------------------------------------------------------------------------ elements

/** Creates an element with attributes; children are elements or text. */
function element(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const percent = (p) => (p > 0 && p < 0.001 ? "<0.1 %" : `${(100 * p).toFixed(1)} %`);
const score = (value) => value.toFixed(2).replace("-", "−");

/** Creates a bar from zero to `value` on an axis from `low` to `high`. */
function bar(value, low, high) {
  const at = (x) => `${(100 * (Math.min(Math.max(x, low), high) - low)) / (high - low || 1)}%`;
  const node = element("span", {class: value < 0 ? "bar negative" : "bar", "aria-hidden": "true"}, element("i", {}));
  node.style.setProperty("--zero", at(0));
  node.style.setProperty("--from", at(Math.min(value, 0)));
  node.style.setProperty("--to", at(Math.max(value, 0)));
  return node;
}

/** Creates a named number with its bar. */
function measure(name, text, ...bars) {
  return element("div", {}, element("dt", {}, name), element("dd", {}, element("span", {class: "number"}, text), ...bars));
}

/** Returns the range of an axis that includes zero and all `values`. */
const axis = (values) => [Math.min(0, ...values), Math.max(0, ...values)];

/** Returns `text` with its UTF-8 bytes from `start` to `end` marked. */
function marked(text, start, end, kind) {
  const bytes = new TextEncoder().encode(text);
  const decode = (from, to) => new TextDecoder().decode(bytes.slice(from, to));
  if (start >= end) return [text];
  return [decode(0, start), element("mark", {class: kind}, decode(start, end)), decode(end)];
}

function goTo(id) {
  const node = $(id);
  node.scrollIntoView({block: "center", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth"});
  node.focus({preventScroll: true});
}

function button(label, kind, action) {
  const node = element("button", {type: "button", class: kind}, label);
  node.addEventListener("click", action);
  return node;
}

// -------------------------------------------------------------------------------------------------------------- server

class ServerError extends Error {
  constructor(title, detail) {
    super(title);
    this.detail = detail;
  }
}

const TITLES = {
  400: "The model cannot process this input.", 404: "There is no such model.", 413: "The text is too long.",
  502: "The model server cannot be reached.", 503: "The model server is not ready.", 504: "The model server did not answer in time.",
};

/** Returns the JSON of a call under /v1/models/MODEL. Throws ServerError. */
async function call(path, options) {
  const timeout = AbortSignal.timeout(TIMEOUT_MS);
  let response;
  let body;
  try {
    response = await fetch(`/v1/models/${encodeURIComponent(MODEL)}${path}`, {
      ...options, signal: options.signal ? AbortSignal.any([options.signal, timeout]) : timeout});
    body = await response.text();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (error.name === "TimeoutError") throw new ServerError(TITLES[504], `No answer within ${TIMEOUT_MS / 1000} s.`);
    throw new ServerError("The server of this page cannot be reached.", "Restart it: python -m serving.web");
  }
  let json;
  try {
    json = JSON.parse(body);
  } catch {
    json = {error: body.slice(0, 500) || "The answer is not JSON."};
    if (response.ok) throw new ServerError("The answer cannot be read.", json.error);
  }
  if (!response.ok) throw new ServerError(TITLES[response.status] || `The server failed (${response.status}).`, json.error || "");
  return json;
}

/** Returns the first row of every output of a signature. */
async function predict(signature, inputs, signal) {
  const body = JSON.stringify({signature_name: signature, instances: [inputs]});
  const {predictions} = await call(":predict", {method: "POST", headers: {"Content-Type": "application/json"}, body, signal});
  return predictions[0];
}

// ----------------------------------------------------------------------------------------------------------------- ask

async function ask(question, signal) {
  const row = await predict("answer", {question}, signal);
  const answers = row.answer
    .map((text, n) => ({text, score: row.score[n], rank: row.answer_rank[n]}))
    .filter((answer) => answer.text);
  const passages = row.passage_number
    .map((number, n) => ({
      number, title: row.title[n], text: row.text[n], probability: row.probability[n], reader: row.reader_score[n],
      start: row.answer_start[n], end: row.answer_end[n], hasSpan: row.answer_start[n] < row.answer_end[n]}))
    .filter((passage) => passage.number >= 0);
  const best = answers[0];
  return {
    words: best ? `Answer: ${best.text}.` : "No answer.",
    title: best ? `${best.text} · ${question}` : question,
    nodes: [answerPart(answers, passages), shelf(passages, best), passageList(passages, best)],
  };
}

function answerPart(answers, passages) {
  const [best, ...others] = answers;
  if (!best) return element("p", {class: "best none"}, "No answer was found in these passages.");
  const from = ({rank}) => button(`${rank + 1}. ${passages[rank].title}`, "link", () => goTo(`passage-${rank + 1}`));
  const part = element("div", {class: "answer"}, element("h2", {class: "label"}, "Answer"), element("p", {class: "best", id: "best"}, best.text),
    element("p", {class: "small"}, `score ${score(best.score)}, read in `, from(best)));
  if (others.length) {
    part.append(element("h2", {class: "label"}, "Other answers"), element("ol", {class: "others"}, ...others.map((answer) =>
      element("li", {}, element("span", {class: "other"}, answer.text), element("span", {class: "small"}, `${score(answer.score)}, in `, from(answer))))));
  }
  return part;
}

/** Shows the passages as books, with p(z|x) as width and the reader's score as height; passages retrieved but not read are at the end. */
function shelf(passages, best) {
  const readable = passages.filter((passage) => passage.hasSpan).map((passage) => passage.reader);
  const [low, high] = [Math.min(...readable), Math.max(...readable)];
  const books = passages.map((passage, n) => {
    const book = button(`${n + 1}\u2003${passage.title}`, best && n === best.rank ? "book source" : "book", () => goTo(`passage-${n + 1}`));
    book.setAttribute("aria-label", `Go to passage ${n + 1}, ${passage.title}, p(z|x) ${percent(passage.probability)}`);
    book.style.setProperty("--share", passage.probability);
    book.style.setProperty("--height", passage.hasSpan ? 0.35 + (0.65 * (passage.reader - low)) / (high - low || 1) : 0.2);
    return book;
  });
  const rest = 1 - passages.reduce((sum, passage) => sum + passage.probability, 0);
  if (rest > 0.0005) {
    const unread = element("span", {class: "unread", title: `${percent(rest)} on passages retrieved but not read`});
    unread.style.setProperty("--share", rest);
    books.push(unread);
  }
  return element("figure", {class: "shelf"}, element("div", {class: "books"}, ...books), element("figcaption", {},
    "Each book is a passage. Width: p(z|x). Height: the reader’s score.", rest > 0.0005 ? ` Hatched: ${percent(rest)} not read.` : ""));
}

function passageList(passages, best) {
  const [low, high] = axis(passages.filter((passage) => passage.hasSpan).map((passage) => passage.reader));
  return element("ol", {class: "passages"}, ...passages.map((passage, n) => {
    const source = best && n === best.rank;
    return element("li", {id: `passage-${n + 1}`, tabindex: "-1", class: source ? "source" : ""},
      element("dl", {class: "measures"},
        measure("p(z|x)", percent(passage.probability), bar(passage.probability, 0, 1)),
        passage.hasSpan ? measure("reader", score(passage.reader), bar(passage.reader, low, high)) : measure("reader", "no span")),
      element("div", {class: "text"}, element("h3", {}, element("span", {class: "rank"}, `${n + 1}`), passage.title),
        element("p", {}, ...marked(passage.text, passage.start, passage.end, source ? "evidence" : "span"))));
  }));
}

function askEmpty() {
  const term = (formula, words) => element("div", {}, element("dt", {}, formula), element("dd", {}, words));
  return element("dl", {class: "formula"}, term("p(y|x)", "the answer y to your question x"), term("= Σ", "over passages z"),
    term("p(y|z,x)", "the answer read in a passage"), term("p(z|x)", "the relevance of the passage"));
}

// ---------------------------------------------------------------------------------------------------------------- fill

async function fill(text, signal) {
  if (!text.includes("[MASK]")) throw new ServerError("There is no blank.", "Put [MASK] where a word is missing.");
  const row = await predict("fill_mask", {text}, signal);
  const blanks = Array.from({length: row.num_masks}, (_, n) => element("section", {class: "blank"},
    element("h2", {class: "label"}, row.num_masks > 1 ? `Blank ${n + 1}` : "The blank"),
    element("div", {class: "sides"},
      tokenList("with retrieval", row.token[n], row.token_probability[n], "with"),
      tokenList("without", row.token_without_retrieval[n], row.token_probability_without_retrieval[n], "without"))));
  return {
    words: `Filled: ${row.filled}`, title: row.filled,
    nodes: [element("p", {class: "best filled", id: "best"}, ...filledParts(text, row.filled)), ...blanks, candidateList(row)],
  };
}

function tokenList(name, tokens, probabilities, kind) {
  return element("div", {class: kind}, element("h3", {}, name), element("ol", {}, ...tokens.map((token, n) =>
    element("li", {}, element("span", {class: "token"}, token), element("span", {class: "number"}, percent(probabilities[n])),
      bar(probabilities[n], 0, 1)))));
}

/** Returns `filled` with the words in place of each [MASK] of `text` marked. */
function filledParts(text, filled) {
  const pieces = text.split("[MASK]").map((piece) => piece.trim());
  const parts = [];
  let end = 0;
  pieces.forEach((piece, n) => {
    const start = piece ? filled.indexOf(piece, end) : n === pieces.length - 1 ? filled.length : end;
    const [, before, token, after] = filled.slice(end, start).match(/^(\s*)(.*?)(\s*)$/s);
    parts.push(before, token && n ? element("mark", {class: "evidence"}, token) : token, after, piece);
    end = start + piece.length;
  });
  return parts;
}

function candidateList(row) {
  const [low, high] = axis(row.retrieval_utility.map((utility) => 1.05 * utility));
  const limit = Math.max(-low, high);
  return element("section", {}, element("h2", {class: "label"}, "What was retrieved, and whether it helped"),
    element("ol", {class: "passages candidates"}, ...row.passage_number.map((number, n) =>
      element("li", {class: number < 0 ? "null" : ""},
        element("dl", {class: "measures"}, measure("p(z|x)", percent(row.probability[n]), bar(row.probability[n], 0, 1)),
          measure("utility", (row.retrieval_utility[n] < 0 ? "" : "+") + score(row.retrieval_utility[n]), bar(row.retrieval_utility[n], -limit, limit))),
        element("div", {class: "text"}, element("h3", {}, number < 0 ? "No passage" : row.title[n]), element("p", {}, number < 0 ?
          "The null passage: the text without a passage, the baseline for the others." : row.text[n]))))));
}

function fillEmpty() {
  return element("p", {class: "lead"},
    "Each blank is filled twice: with the passages retrieved, and without any. Utility is how much more likely a passage makes the word.");
}

// ---------------------------------------------------------------------------------------------------------------- page

function show(...nodes) {
  $("results").replaceChildren(...nodes);
}

/** Shows the view and the text given in the address: #ask=TEXT or #fill=TEXT. */
async function route() {
  const address = new URLSearchParams(location.hash.slice(1));
  const name = address.has("fill") ? "fill" : "ask";
  const view = VIEWS[name];
  for (const other of Object.values(VIEWS)) {
    other.form.hidden = other !== view;
    if (other === view) other.link.setAttribute("aria-current", "page");
    else other.link.removeAttribute("aria-current");
  }
  running.abort();
  running = new AbortController();
  document.title = "REALM";
  document.body.classList.remove("busy");
  $("announcement").textContent = "";
  const text = address.get(name)?.trim();
  if (!text) {
    show(view.empty());
    view.input.focus();
    return;
  }
  view.input.value = text;
  await run(view, text, running.signal);
}

async function run(view, text, signal) {
  document.body.classList.add("busy");
  $("results").setAttribute("aria-busy", "true");
  $("announcement").textContent = "Searching …";
  const started = performance.now();
  try {
    const {words, title, nodes} = await view.run(text, signal);
    show(...nodes);
    document.title = `${title} · REALM`;
    $("announcement").replaceChildren(element("span", {class: "unseen"}, `${words} `), `${((performance.now() - started) / 1000).toFixed(2)} s`);
  } catch (error) {
    if (signal.aborted) return; // a newer text is under way
    const detail = error instanceof ServerError ? error.detail : `The model is not a REALM servable (${error.message}).`;
    const title = error instanceof ServerError ? error.message : "The answer cannot be read.";
    $("announcement").textContent = "";
    show(element("div", {class: "error", role: "alert"}, element("h2", {}, title), element("p", {}, detail),
      button("Try again", "link", route)));
  }
  document.body.classList.remove("busy");
  $("results").removeAttribute("aria-busy");
}

function submit(name, event) {
  event.preventDefault();
  const text = VIEWS[name].input.value.trim().replace(/\s+/g, " ");
  const hash = `#${text ? new URLSearchParams({[name]: text}) : name}`;
  if (location.hash === hash) route();
  else location.hash = hash; // hashchange shows it
}

async function showServer() {
  const node = $("server");
  try {
    const status = await call("", {});
    const versions = status.model_version_status.filter(({state}) => state === "AVAILABLE").map(({version}) => version);
    node.textContent = versions.length ? `${MODEL}, version ${versions.join(", ")}` : `${MODEL} is not ready`;
    node.className = versions.length ? "up" : "down";
  } catch (error) {
    node.textContent = error.message;
    node.className = "down";
  }
  if (node.className === "down") setTimeout(showServer, LOOK_MS); // it may still be starting
}

for (const [name, {form, input}] of Object.entries(VIEWS)) {
  form.addEventListener("submit", (event) => submit(name, event));
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // input methods use Enter to end a word
    event.preventDefault();
    form.requestSubmit();
  });
}
$("mask").addEventListener("click", () => {
  const input = $("text");
  input.setRangeText("[MASK]", input.selectionStart, input.selectionEnd, "end");
  input.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || event.target.matches("textarea")) return;
  event.preventDefault();
  const {input} = Object.values(VIEWS).find(({form}) => !form.hidden);
  input.focus();
  input.select();
});
addEventListener("hashchange", route);
route();
showServer();
