// The chat page. `state` holds all that it shows, and is kept in localStorage; `draw` makes the page from it.

import { render } from "/page/markdown.js";
import { shuffled } from "/page/shuffled.js";

const $ = (id) => document.getElementById(id);
const DEFAULTS = { temperature: 0.7, top_p: 1, top_k: 0, repetition_penalty: 1, max_tokens: "", seed: "", system: "", theme: "" };
const SUGGESTIONS = ["Who are you?", "Explain what a prime number is.", "Write a short poem about rain.", "Give me three ideas for dinner."];
const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
const STORE = "posttrain-chat";

const fresh = { mode: "chat", model: "", compared: null, hideNames: false, chat: [], compare: [], settings: { ...DEFAULTS } };
const state = { ...fresh, ...load() };
state.settings = { ...DEFAULTS, ...state.settings };
for (const turn of [...state.chat, ...state.compare.flatMap((one) => one.answers)]) {
  if (turn.model && !turn.done && !turn.error) turn.note ??= "interrupted"; // the page was left while the answer came
}
let models = []; // [{id, chat, system_prompt, ...}]
let running = null; // the AbortController of the answers that are being generated; null while there are none
let leaving = false; // whether the page is being left, which breaks them off

function load() {
  try {
    return JSON.parse(localStorage.getItem(STORE)) ?? {};
  } catch {
    return {};
  }
}

function save() {
  try {
    localStorage.setItem(STORE, JSON.stringify(state));
  } catch {
    // storage is full or forbidden: the page works, but forgets everything when it is closed
  }
}

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

// ---- the server -------------------------------------------------------------------------------------------------------------------

function headers() {
  const key = sessionStorage.getItem("posttrain-key");
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

/** Returns the response; throws an Error with the server's own message. */
async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers() });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const error = new Error(body.error?.message ?? `The server answered ${response.status}.`);
  error.status = response.status;
  throw error;
}

/** Streams one answer into `answer` = {text, done, note, error}, calling `changed` as it grows. */
async function stream(model, messages, answer, changed, signal) {
  const { temperature, top_p, top_k, repetition_penalty, max_tokens, seed } = state.settings;
  const body = { model, messages, temperature, top_p, top_k, repetition_penalty, stream: true };
  if (max_tokens !== "") body.max_tokens = max_tokens;
  if (seed !== "") body.seed = seed;
  const began = performance.now();
  try {
    const response = await ask("/v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let buffer = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      buffer += value;
      const events = buffer.split("\n\n");
      buffer = events.pop();
      for (const event of events) {
        const data = event.replace(/^data: /, "");
        if (data === "[DONE]") continue;
        const content = JSON.parse(data);
        if (content.error) throw new Error(content.error.message);
        answer.text += content.choices[0]?.delta?.content ?? "";
        if (content.choices[0]?.finish_reason === "length") answer.note = "cut off: the answer may be no longer, by the settings or by what the model reads";
        answer.tokens = (answer.tokens ?? 0) + 1;
        answer.first ??= performance.now() - began;
        changed();
      }
    }
    answer.done = true;
  } catch (error) {
    if (error.name === "AbortError") answer.note = "stopped";
    else if (leaving) answer.note = "interrupted";
    else answer.error = error instanceof TypeError ? "The connection to the server broke." : error.message;
    if (error.status === 401) openSettings("key");
  }
  changed();
}

async function loadModels() {
  try {
    models = (await (await ask("/v1/models")).json()).data;
  } catch (error) {
    if (error.status === 401) openSettings("key");
    return;
  }
  const able = models.filter((model) => model.chat).map((model) => model.id);
  if (!able.includes(state.model)) state.model = able[0] ?? "";
  state.compared = (state.compared ?? able).filter((id) => able.includes(id));
  if (state.compared.length < 2) state.compared = able;
  $("model").replaceChildren(...able.map((id) => make("option", { value: id, textContent: id, selected: id === state.model })));
  $("compared").replaceChildren(
    ...able.map((id) => make("label", {}, make("input", { type: "checkbox", value: id, checked: state.compared.includes(id) }), id)),
  );
  $("mode-compare").disabled = able.length < 2;
  $("mode-compare").title = able.length < 2 ? "Start the server with two or more --checkpoint to compare them" : "";
  if (able.length < 2) state.mode = "chat";
  draw();
}

async function checkHealth() {
  let status, text;
  try {
    const response = await fetch("/health");
    const health = await response.json();
    const active = Object.values(health.models).reduce((sum, count) => sum + count, 0);
    status = health.status === "ok" ? "ok" : "bad";
    text = status === "bad" ? "failing" : active ? `ready, ${active} running` : "ready";
    $("health").title = status === "bad" ? Object.values(health.problems).join("\n") : "";
    if (status === "ok" && !models.length) loadModels();
  } catch {
    [status, text] = ["bad", "not reachable"];
  }
  $("health").className = status;
  $("health").lastElementChild.textContent = text;
}

// ---- conversations ----------------------------------------------------------------------------------------------------------------

const system = () => (state.settings.system.trim() ? [{ role: "system", content: state.settings.system.trim() }] : []);

async function run(work) {
  running = new AbortController();
  save();
  draw();
  try {
    await work(running.signal);
  } finally {
    running = null;
    save();
    draw();
    checkHealth();
  }
}

/** Returns the messages of a chat. A question without an answer is left out: the model would continue from an empty turn of its own. */
function answered(turns) {
  const told = turns.filter((turn, index) => (turn.role === "user" ? turns[index + 1] : turn)?.text !== "");
  return told.map(({ role, text }) => ({ role, content: text }));
}

async function answerChat() {
  const turn = { role: "assistant", model: state.model, text: "" };
  const messages = [...system(), ...answered(state.chat)];
  state.chat.push(turn);
  await run((signal) => stream(state.model, messages, turn, drawSoon, signal));
  announce(turn.error ?? turn.text);
}

/** Returns the messages before a comparison's prompt: those earlier turns in which a vote says which answer it continues. */
function voted(turns) {
  return turns.flatMap((turn) => (turn.vote == null ? [] : [
    { role: "user", content: turn.prompt }, { role: "assistant", content: turn.answers[turn.vote].text },
  ]));
}

async function answerCompare(turn) {
  const order = state.hideNames ? shuffled(state.compared) : state.compared;
  turn.answers = order.map((model) => ({ model, text: "" }));
  turn.hidden = state.hideNames;
  turn.messages = [...system(), ...voted(state.compare.slice(0, state.compare.indexOf(turn))), { role: "user", content: turn.prompt }];
  await run((signal) => Promise.all(turn.answers.map((answer) => stream(answer.model, turn.messages, answer, drawSoon, signal))));
  announce("All answers are there.");
}

async function vote(turn, index) {
  const chosen = turn.answers[index];
  const others = turn.answers.filter((answer) => answer !== chosen && answer.done && answer.text && answer.text !== chosen.text);
  turn.voting = true; // a turn gets one vote, however often the button is clicked
  draw();
  try {
    for (const other of others) {
      if (other.beaten === chosen.model) continue; // saved by an earlier try that failed later
      const cast = { messages: turn.messages, chosen: chosen.text, rejected: other.text, chosen_model: chosen.model, rejected_model: other.model };
      await ask("/votes", { method: "POST", body: JSON.stringify(cast) });
      other.beaten = chosen.model;
    }
    turn.vote = index;
    turn.hidden = false;
    turn.note = others.length ? `Vote saved (${others.length} ${others.length === 1 ? "pair" : "pairs"}). The next prompt continues from this answer.`
      : "The answers are the same, so nothing was saved. The next prompt continues from this answer.";
  } catch (error) {
    turn.note = `The vote was not saved: ${error.message}`;
  }
  delete turn.voting;
  save();
  draw();
}

function send(text) {
  text = text.trim();
  if (!text || running || !models.length) return;
  $("input").value = "";
  grow();
  if (state.mode === "chat") {
    state.chat.push({ role: "user", text });
    answerChat();
  } else {
    const turn = { prompt: text, answers: [] };
    state.compare.push(turn);
    answerCompare(turn);
  }
  $("log").scrollTop = $("log").scrollHeight;
}

// ---- drawing ----------------------------------------------------------------------------------------------------------------------

let due = false;
function drawSoon() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => {
    due = false;
    draw();
  });
}

function said(answer, going) {
  let shown;
  try {
    shown = render(answer.text);
  } catch {
    shown = [answer.text]; // no answer may keep the page from opening
  }
  const node = make("div", { className: "said" }, ...shown);
  if (going && !answer.done && !answer.error && !answer.note) (node.lastElementChild ?? node).classList.add("waiting");
  return node;
}

function speed(answer) {
  return answer.done && answer.first != null && answer.tokens ? [make("span", {}, `first token after ${Math.round(answer.first)} ms`)] : [];
}

function notes(answer) {
  return [
    ...(answer.note ? [make("span", {}, answer.note)] : []),
    ...(answer.error ? [make("span", { className: "error" }, answer.error)] : []),
  ];
}

function drawMine(text) {
  return make("div", { className: "turn mine" }, make("div", { className: "said" }, text));
}

function drawChat() {
  return state.chat.map((turn, index) => {
    if (turn.role === "user") return drawMine(turn.text);
    const last = index === state.chat.length - 1;
    const going = last && running;
    const tools = make("div", { className: "tools" });
    if (last && !going) tools.append(make("button", { onclick: retryChat }, "Retry"));
    if (!going && turn.text) tools.append(copyButton(turn.text));
    tools.append(...notes(turn), ...(last ? speed(turn) : []));
    return make("div", { className: "turn theirs" }, make("span", { className: "who" }, turn.model), said(turn, going), tools);
  });
}

function drawCompare() {
  return state.compare.map((turn, index) => {
    const going = index === state.compare.length - 1 && running;
    const columns = turn.answers.map((answer, i) => {
      const name = turn.hidden ? `Answer ${LETTERS[i]}` : answer.model;
      const tools = make("div", { className: "tools" });
      const able = !going && !turn.voting && turn.vote == null && answer.done && answer.text;
      if (able) tools.append(make("button", { onclick: () => vote(turn, i), ariaLabel: `${name} is better`, className: "better" }, "This one is better"));
      if (turn.vote === i) tools.append(make("span", {}, "preferred"));
      tools.append(...notes(answer));
      const column = make("section", { className: "answer" }, make("span", { className: "who" }, name), said(answer, going), tools);
      column.setAttribute("aria-label", name);
      if (turn.vote === i) column.classList.add("preferred");
      return column;
    });
    const below = make("div", { className: "tools" });
    if (index === state.compare.length - 1 && !going && turn.vote == null) {
      below.append(make("button", { onclick: () => answerCompare(turn) }, "Retry"));
      if (!turn.note) below.append(make("span", {}, "Without a vote, the next prompt does not continue from this one."));
    }
    if (turn.note) below.append(make("span", {}, turn.note));
    return make("div", { className: "turn" }, drawMine(turn.prompt), make("div", { className: "answers" }, ...columns), below);
  });
}

/** Returns the sample prompts of the checkpoints' training; where they have none, general ones. */
function suggestions() {
  const own = models.filter((model) => (state.mode === "chat" ? model.id === state.model : state.compared?.includes(model.id)));
  const known = [...new Set(own.flatMap((model) => model.suggestions))].slice(0, 6);
  return known.length ? known : SUGGESTIONS;
}

function welcome() {
  const about = state.mode === "chat" ? "Talk to the checkpoint." : "One prompt, and every checkpoint answers. Votes become training pairs.";
  return make("div", { className: "welcome" }, make("p", { className: "note" }, about),
    make("div", { className: "suggestions" }, ...suggestions().map((text) => make("button", { onclick: () => send(text) }, text))));
}

function draw() {
  const log = $("log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  const focused = log.contains(document.activeElement) ? document.activeElement.textContent : null;
  const turns = state.mode === "chat" ? drawChat() : drawCompare();
  log.replaceChildren(make("div", { className: state.mode === "chat" ? "column" : "column wide" }, ...(turns.length ? turns : [welcome()])));
  if (atEnd) log.scrollTop = log.scrollHeight;
  if (focused) ([...log.querySelectorAll("button")].findLast((button) => button.textContent === focused) ?? $("input")).focus({ preventScroll: true });
  $("mode-chat").setAttribute("aria-pressed", state.mode === "chat");
  $("mode-compare").setAttribute("aria-pressed", state.mode === "compare");
  $("model-label").hidden = state.mode !== "chat";
  $("compare-bar").hidden = state.mode !== "compare";
  $("hide-names").checked = state.hideNames;
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  for (const id of ["mode-chat", "clear", "model"]) $(id).disabled = Boolean(running);
  $("mode-compare").disabled = Boolean(running) || models.filter((model) => model.chat).length < 2;
  if (state.settings.theme) document.documentElement.dataset.theme = state.settings.theme;
  else delete document.documentElement.dataset.theme;
}

function announce(text) {
  $("announce").textContent = text.slice(0, 2000);
}

function copyButton(text) {
  const button = make("button", {}, "Copy");
  button.onclick = () => copy(button, text);
  return button;
}

async function copy(button, text) {
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Copying is not allowed here";
  }
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

function grow() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

// ---- settings ---------------------------------------------------------------------------------------------------------------------

function fillSettings(values) {
  for (const name of Object.keys(DEFAULTS)) $(name).value = values[name];
}

function openSettings(focus) {
  if ($("settings").open) return;
  fillSettings(state.settings);
  $("key").value = sessionStorage.getItem("posttrain-key") ?? "";
  const own = models.find((model) => model.id === state.model)?.system_prompt;
  $("system").placeholder = own ?? "";
  $("settings").showModal();
  if (focus) $(focus).focus();
}

$("settings").addEventListener("close", () => {
  if ($("settings").returnValue !== "save") return;
  $("settings").returnValue = "";
  for (const [name, value] of Object.entries(DEFAULTS)) {
    const field = $(name);
    const isNumber = typeof value === "number" || name === "seed" || name === "max_tokens";
    state.settings[name] = isNumber && field.value !== "" ? Number(field.value) : field.value;
  }
  if ($("key").value) sessionStorage.setItem("posttrain-key", $("key").value);
  else sessionStorage.removeItem("posttrain-key");
  save();
  draw();
  loadModels();
});

// ---- the user's input -------------------------------------------------------------------------------------------------------------

function retryChat() {
  if (running) return;
  state.chat.pop();
  answerChat();
}

function setMode(mode) {
  state.mode = mode;
  save();
  draw();
  $("input").focus();
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send($("input").value);
});
$("input").addEventListener("input", grow);
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send($("input").value);
  }
});
for (const event of ["beforeunload", "pagehide"]) {
  window.addEventListener(event, () => {
    leaving = true;
    save();
  });
}
window.addEventListener("pageshow", () => (leaving = false));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !$("settings").open) running.abort();
});
$("stop").onclick = () => running?.abort();
$("clear").onclick = () => {
  state[state.mode] = [];
  save();
  draw();
  $("input").focus();
};
$("open-settings").onclick = () => openSettings();
$("cancel").onclick = () => $("settings").close("");
$("defaults").onclick = () => fillSettings(DEFAULTS);
$("mode-chat").onclick = () => setMode("chat");
$("mode-compare").onclick = () => setMode("compare");
$("model").onchange = () => {
  state.model = $("model").value;
  save();
  draw();
};
$("hide-names").onchange = () => {
  state.hideNames = $("hide-names").checked;
  save();
};
$("compared").onchange = (event) => {
  const picked = [...$("compared").querySelectorAll("input:checked")].map((box) => box.value);
  if (picked.length < 2) event.target.checked = true; // there must be two to compare
  else state.compared = picked;
  save();
};
$("log").addEventListener("click", (event) => {
  const button = event.target.closest("pre > button");
  if (button) copy(button, button.previousElementSibling.textContent);
});

draw();
loadModels();
checkHealth();
setInterval(() => document.hidden || checkHealth(), 5000);
$("input").focus();
