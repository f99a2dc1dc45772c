// The chat page. It talks to the server that it came from, and to nobody else.

import { Growing } from "./markdown.js";

const find = (id) => document.getElementById(id);
const [talk, prompt, state, settings, models] = ["talk", "prompt", "state", "settings", "model"].map(find);
const fields = settings.querySelector("form").elements;

/** What was said: { role, content, node }. An answer that failed is shown and not kept. */
let said = [];
let answering = null; // the AbortController of the answer on its way

// Settings: a browser keeps them; the key stays with this tab.

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repeat_penalty", "max_tokens", "seed"];
const KEPT = [...NUMBERS, "system", "enable_thinking", "look"];

function restore() {
  const kept = JSON.parse(localStorage.getItem("settings") ?? "{}");
  for (const name of KEPT) fields[name].value = kept[name] ?? "";
  fields.key.value = sessionStorage.getItem("key") ?? "";
  applyLook();
}

function keep() {
  const kept = Object.fromEntries(KEPT.map((name) => [name, fields[name].value]).filter(([, value]) => value));
  localStorage.setItem("settings", JSON.stringify(kept));
  sessionStorage.setItem("key", fields.key.value);
  applyLook();
}

function applyLook() {
  document.documentElement.dataset.look = fields.look.value;
}

function wishes() {
  const chosen = {};
  for (const name of NUMBERS) if (fields[name].value !== "") chosen[name] = Number(fields[name].value);
  if (fields.enable_thinking.value) chosen.enable_thinking = fields.enable_thinking.value === "true";
  return chosen;
}

// The server.

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (fields.key.value) headers.authorization = `Bearer ${fields.key.value}`;
  const answer = await fetch(path, { ...options, headers });
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  const message = body?.error?.message ?? body?.status ?? answer.statusText;
  throw Object.assign(new Error(message), { status: answer.status });
}

function post(path, body, options = {}) {
  const headers = { "content-type": "application/json" };
  return ask(path, { method: "POST", headers, body: JSON.stringify(body), ...options });
}

async function listModels() {
  try {
    const { data } = await (await ask("v1/models")).json();
    const chosen = data.find(({ id }) => id === models.value) ?? data.find(({ status }) => status.is_default);
    known = new Map(data.map((model) => [model.id, model]));
    models.replaceChildren(...data.map(({ id, status }) => new Option(isLoaded(id) ? id : `${id} (${status.value})`, id)));
    models.value = chosen?.id ?? "";
    find("place").textContent = chosen?.context_window ? `${chosen.context_window} tokens of context` : "";
    find("unload").hidden = data.length < 2 || !isLoaded(chosen?.id);
    tell("");
  } catch (error) {
    tell(error.message);
    if (error.status === 401) openSettings(fields.key);
    if (error.status === 503) setTimeout(listModels, 1000);
  }
}

let known = new Map();

function isLoaded(id) {
  return known.get(id)?.status.value === "loaded";
}

/** Have the chosen model loaded or unloaded. */
async function control(verb) {
  const id = models.value;
  const watching = new AbortController();
  tellProgress(id, watching.signal);
  try {
    await post(`models/${verb}`, { model: id, wait: true });
    await listModels();
  } catch (error) {
    tell(error.message);
  }
  watching.abort();
}

async function tellProgress(id, signal) {
  try {
    for await (const { model, data } of eventsOf(await ask("models/sse", { signal })))
      if (model === id && data.progress) tell(`Loading ${id}: ${Math.round(100 * data.progress.value)} %`);
  } catch {
    // who waits for the model is told what is wrong
  }
}

async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

// The conversation.

async function answer() {
  const messages = said.map(({ role, content }) => ({ role, content }));
  if (fields.system.value.trim()) messages.unshift({ role: "system", content: fields.system.value });
  const body = { model: models.value, messages, stream: true, stream_options: { include_usage: true }, ...wishes() };
  const shown = new Answer();
  const mine = (answering = new AbortController());
  showBusy(true);
  try {
    const stream = await post("v1/chat/completions", body, { signal: mine.signal });
    for await (const event of eventsOf(stream)) {
      if (event.error) throw new Error(event.error.message);
      shown.take(event);
    }
    tell("");
    if (!isLoaded(body.model)) listModels(); // it is by now
  } catch (error) {
    if (error.name === "AbortError") {
      shown.facts.push("stopped");
      tell("Stopped");
    } else shown.fail(error.message);
  }
  shown.finish();
  if (answering === mine) showBusy(false);
}

/** One answer as it grows on the page; it is drawn once per frame at most. */
class Answer {
  facts = [];
  #content = "";
  #reasoning = "";
  #isDrawn = true;

  constructor() {
    this.node = document.createElement("article");
    this.said = document.createElement("div");
    this.said.className = "said";
    this.growing = new Growing(this.said);
    this.node.append(this.said);
    talk.append(this.node);
    scroll(true);
  }

  take({ choices = [], usage, timings }) {
    for (const { delta, finish_reason: end } of choices) {
      this.#content += delta.content ?? "";
      this.#reasoning += delta.reasoning_content ?? "";
      if (end === "length") this.facts.push("cut short by the limit of tokens or of the context");
    }
    if (timings?.predicted_per_second) this.facts.push(`${timings.predicted_per_second.toFixed(1)} tokens/s`);
    if (usage) {
      const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
      this.facts.push(`${usage.completion_tokens} tokens`, `prompt ${usage.prompt_tokens}, ${cached} cached`);
      if (usage.dropped_messages) this.facts.push(`${usage.dropped_messages} old messages left out`);
    }
    if (this.#isDrawn) {
      this.#isDrawn = false;
      requestAnimationFrame(() => this.#draw());
    }
  }

  fail(message) {
    this.node.classList.add("wrong");
    this.#content += `${this.#content ? "\n\n" : ""}${message}`;
    tell(message);
  }

  finish() {
    this.#draw();
    if (this.thoughts && this.#content) this.thoughts.parentElement.open = false;
    const isKept = this.node.isConnected && !this.node.classList.contains("wrong");
    if (isKept) said.push({ role: "assistant", content: this.#content, node: this.node });
    const foot = document.createElement("footer");
    foot.append(
      button("Copy", () => navigator.clipboard.writeText(this.#content)),
      button("Again", () => again(this.node)),
      text("span", this.facts.join(" · "), "quiet"),
    );
    this.node.append(foot);
    scroll();
  }

  #draw() {
    if (this.#isDrawn) return;
    this.#isDrawn = true;
    if (this.#reasoning && !this.thoughts) {
      const fold = document.createElement("details");
      this.thoughts = document.createElement("div");
      fold.append(text("summary", "Thoughts"), this.thoughts);
      this.thinking = new Growing(this.thoughts);
      this.node.prepend(fold);
    }
    this.thinking?.show(this.#reasoning);
    this.growing.show(this.#content);
    scroll();
  }
}

function showUser(content) {
  find("welcome")?.remove();
  const node = document.createElement("article");
  node.className = "user";
  const foot = document.createElement("footer");
  foot.append(button("Edit", () => edit(node)));
  node.append(text("div", content, "said"), foot);
  talk.append(node);
  said.push({ role: "user", content, node });
}

/** Forget a message and everything after it, here and on the page. */
function forgetFrom(node) {
  answering?.abort();
  while (node.nextElementSibling) node.nextElementSibling.remove();
  node.remove();
  said = said.filter((one) => one.node.isConnected);
}

function again(node) {
  forgetFrom(node);
  answer();
}

function edit(node) {
  const { content } = said.find((one) => one.node === node);
  forgetFrom(node);
  prompt.value = content;
  grow();
  prompt.focus();
}

// Small things of the page.

function text(tag, content, name = "") {
  const node = document.createElement(tag);
  node.textContent = content;
  node.className = name;
  return node;
}

function button(name, act) {
  const node = text("button", name);
  node.type = "button";
  node.addEventListener("click", act);
  return node;
}

function tell(message) {
  state.textContent = message;
}

function showBusy(isBusy) {
  if (!isBusy) answering = null;
  find("stop").hidden = !isBusy;
  find("send").hidden = isBusy;
  talk.setAttribute("aria-busy", String(isBusy));
  if (isBusy) tell("Answering …");
}

let isAtEnd = true;
talk.addEventListener("scroll", () => {
  isAtEnd = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 60;
});

function scroll(always = false) {
  if (always || isAtEnd) talk.scrollTop = talk.scrollHeight;
}

function grow() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

function openSettings(first) {
  settings.showModal();
  first?.focus();
}

find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const content = prompt.value.trim();
  if (!content || answering) return;
  prompt.value = "";
  grow();
  showUser(content);
  answer();
});

prompt.addEventListener("input", grow);
prompt.addEventListener("keydown", (event) => {
  const isSending = event.key === "Enter" && !event.shiftKey && !event.isComposing;
  if (!isSending || matchMedia("(pointer: coarse)").matches) return;
  event.preventDefault();
  find("ask").requestSubmit();
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !settings.open) answering?.abort();
  if (event.key.toLowerCase() === "o" && event.ctrlKey && event.shiftKey) {
    event.preventDefault();
    begin();
  }
});

function begin() {
  answering?.abort();
  said = [];
  talk.replaceChildren();
  tell("");
  prompt.focus();
}

models.addEventListener("change", () => (isLoaded(models.value) ? listModels() : control("load")));
find("unload").addEventListener("click", () => control("unload"));
find("stop").addEventListener("click", () => answering?.abort());
find("new").addEventListener("click", begin);
find("open-settings").addEventListener("click", () => openSettings());
find("reset").addEventListener("click", () => {
  for (const name of [...KEPT, "key"]) fields[name].value = "";
  keep();
});
settings.addEventListener("input", keep);
settings.addEventListener("close", () => {
  keep();
  listModels();
  prompt.focus();
});

restore();
listModels();
