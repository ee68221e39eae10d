// The page: asks the API as any client would, and shows what its stream tells.
//
// What is shown is a pure function of the events so far (`shownAfter`), so a replay is the same
// function of fewer events, and an event that is told twice changes nothing. Text from the server
// reaches the document as `textContent` only.

const $ = (id) => document.getElementById(id);

// What the events say

const noText = () => ({ cells: [], blocks: [], text: "", offsets: [] });
const mask = () => ({ token: null, text: "", confidence: null, step: null, block: null, isFresh: false });

/** The text after some events: its cells, one a token or mask, and its blocks. */
function shownAfter(events) {
  const shown = noText();
  for (const event of events) {
    if (event.denoised) addStep(shown, event.denoised);
    else addBlock(shown, event);
  }
  return shown;
}

function addStep(shown, { offset, length, step, places, tokens, confidences }) {
  if (step === 0) shown.cells.length = offset; // a block that begins, perhaps anew
  while (shown.cells.length < offset + length) shown.cells.push(mask());
  for (const cell of shown.cells) cell.isFresh = false;
  places.forEach((place, i) => {
    const block = shown.blocks.length + 1;
    shown.cells[offset + place] = tokens[i] === null
      ? mask()
      : { token: tokens[i], text: asWritten(tokens[i]), confidence: confidences[i], step, block, isFresh: true };
  });
}

/** Half a character has no text of its own yet. */
const asWritten = (token) => (token.startsWith("bytes:") ? "\ufffd" : token);

function addBlock(shown, { text, logprobs, block: counts, seconds }) {
  const begin = shown.offsets.length;
  const known = shown.cells.slice(begin);
  shown.cells.length = begin;
  logprobs.token_logprobs.forEach((logprob, i) => {
    const [token, step] = [logprobs.tokens[i], known[i]?.step ?? null];
    const [confidence, block] = [Math.exp(logprob), shown.blocks.length + 1];
    shown.cells.push({ token, text: "", confidence, step, block, isFresh: false });
  });
  shown.offsets.push(...logprobs.text_offset);
  shown.text += text;
  shown.blocks.push({ ...counts, tokens: logprobs.tokens.length, seconds });
  // A token's text is from its first character to the next one's; what is certain may reach back.
  const characters = Array.from(shown.text);
  shown.offsets.forEach((from, i) => {
    shown.cells[i].text = characters.slice(from, shown.offsets[i + 1] ?? characters.length).join("");
  });
}

const sum = (values) => values.reduce((total, value) => total + value, 0);

// What the API says

class ApiError extends Error {}

let key = null; // in memory only

async function ask(path, body, signal) {
  const headers = key === null ? {} : { Authorization: `Bearer ${key}` };
  const options = { headers, signal };
  if (body !== undefined) {
    options.method = "POST";
    options.body = JSON.stringify(body);
    headers["Content-Type"] = "application/json";
  }
  const response = await fetch(path, options);
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  throw Object.assign(new ApiError(told?.error?.message ?? `The server answered ${response.status}.`), {
    status: response.status,
  });
}

/** The bodies of a stream's events, up to [DONE]. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ApiError("The connection ended before the answer was whole.");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.slice("data: ".length);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(event.error.message);
      yield event;
    }
  }
}

// The page's own state

let model = null;
let run = { events: [], prefix: "", suffix: "", began: 0 };
let stopping = null; // an AbortController while a request is under way
let replaying = null; // the timer of a replay
let chosen = null; // the place of the token that is read
let frame = null; // the drawing that is to come

const say = (id, text) => {
  if ($(id).textContent !== text) $(id).textContent = text;
};

function tell(error) {
  $("error").hidden = error === null;
  say("error", error === null ? "" : error.message);
}

// Drawing

/** Draw with the screen's next picture, however many events come before it. */
function draw() {
  frame ??= requestAnimationFrame(drawNow);
}

function drawNow() {
  cancelAnimationFrame(frame);
  frame = null;
  const count = stopping === null ? Number($("scrub").value) : run.events.length;
  drawText(shownAfter(run.events.slice(0, count)));
  drawMoment(count);
}

function drawText(shown) {
  const text = $("text");
  const wanted = shown.cells.length + 2;
  while (text.childElementCount > wanted) text.lastElementChild.remove();
  while (text.childElementCount < wanted) text.append(document.createElement("span"));
  const spans = text.children;
  drawGiven(spans[0], run.prefix);
  shown.cells.forEach((cell, place) => drawCell(spans[place + 1], cell, place));
  drawGiven(spans[wanted - 1], run.suffix);
  drawCounts(shown);
}

function drawGiven(span, text) {
  span.className = "given";
  if (span.textContent !== text) span.textContent = text;
}

function drawCell(span, cell, place) {
  const isMask = cell.confidence === null;
  const names = ["cell", isMask && "mask", cell.isFresh && "fresh", place === chosen && "chosen"];
  const name = names.filter(Boolean).join(" ");
  if (span.className !== name) span.className = name;
  if (span.textContent !== cell.text) span.textContent = cell.text;
  span.style.setProperty("--confidence", isMask ? 0 : cell.confidence);
  span.told = cell;
}

function drawCounts({ blocks }) {
  const tokens = sum(blocks.map((each) => each.tokens));
  const passes = sum(blocks.map((each) => each.passes));
  const steps = blocks.map((each) => each.steps);
  say("tokens", String(tokens));
  say("passes", String(passes));
  say("blocks", String(blocks.length));
  say("per-pass", passes ? (tokens / passes).toFixed(2) : "\u2013");
  say("per-second", blocks.length ? (tokens / blocks.at(-1).seconds).toFixed(1) : "\u2013");
  say("per-block", blocks.length ? (sum(steps) / blocks.length).toFixed(2) : "\u2013");
  const bars = $("bars");
  while (bars.childElementCount > steps.length) bars.lastElementChild.remove();
  while (bars.childElementCount < steps.length) bars.append(document.createElement("span"));
  const most = Math.max(1, ...steps);
  steps.forEach((count, i) => bars.children[i].style.setProperty("--share", count / most));
  say("scale", blocks.length ? `Steps of each block, ${most} at most` : "");
  bars.setAttribute("aria-label", `Steps of each block: ${steps.join(", ") || "none yet"}`);
}

function drawMoment(count) {
  const event = run.events[count - 1];
  const words = event?.denoised ? `step ${event.denoised.step}` : event ? "block done" : "";
  say("moment", words && `${words} \u00b7 ${count} / ${run.events.length}`);
  $("scrub").setAttribute("aria-valuetext", words || "nothing yet");
}

// Reading a token

function choose(place) {
  chosen = place;
  const cell = $("text").children[place + 1]?.told;
  if (cell) say("token", tokenInWords(cell, place));
  draw();
}

function tokenInWords({ token, confidence, step, block }, place) {
  if (confidence === null) return `Place ${place + 1}: a mask.`;
  const when = step === null ? "" : `, step ${step}`;
  return `Token ${place + 1} is ${JSON.stringify(token)}: confidence ${confidence.toFixed(3)}, block ${block}${when}.`;
}

$("text").addEventListener("click", ({ target }) => {
  if (target.told) choose([...$("text").children].indexOf(target) - 1);
});

$("text").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const last = $("text").childElementCount - 3;
  if (!step || last < 0) return;
  event.preventDefault();
  choose(Math.min(last, Math.max(0, (chosen ?? -1) + step)));
});

// Asking for text

const settings = ["rule", "temperature", "max_tokens", "steps_per_block"];
const ofRules = ["confidence_threshold", "factor", "entropy_bound"];

function request(seed) {
  const rule = $("rule").value;
  const names = [...settings, ...ofRules.filter((name) => name === rule)];
  const body = { model: model.id, prompt: $("prompt").value };
  if (!$("after").hidden && $("suffix").value) body.suffix = $("suffix").value;
  for (const name of names) {
    const value = $(name).value;
    if (value !== "") body[name] = name === "rule" ? value : Number(value);
  }
  return { ...body, seed };
}

/** A number that a JSON reader keeps exactly. */
const drawnSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

async function start() {
  if (stopping !== null || model === null) return;
  endReplay();
  tell(null);
  const body = request($("seed").value === "" ? drawnSeed() : Number($("seed").value));
  stopping = new AbortController();
  const after = body.suffix ?? "";
  run = { events: [], prefix: body.prompt, suffix: after, began: performance.now() };
  chosen = null;
  $("scrub").max = 0;
  lock(true);
  say("status", `seed ${body.seed}, waiting`);
  drawNow();
  let end = "stopped by you";
  try {
    end = await follow(body);
  } catch (error) {
    if (error.name !== "AbortError") {
      end = "failed";
      tell(error instanceof ApiError ? error : new ApiError("The server cannot be reached."));
      if (error.status === 401) askForKey();
    }
  }
  stopping = null;
  drawNow();
  lock(false);
  say("status", `seed ${body.seed}, ${end}`);
}

/** Take a stream to its end; what ended the text, in words. */
async function follow(body) {
  const more = { stream: true, stream_steps: true, logprobs: 0 };
  const response = await ask("v1/completions", { ...body, ...more }, stopping.signal);
  let [last, count] = [null, 0];
  for await (const event of eventsOf(response)) {
    for (const piece of event.choices) {
      run.events.push({ ...piece, seconds: (performance.now() - run.began) / 1000 });
      if (piece.denoised) continue;
      last = run.events.at(-1);
      count += 1;
      say("spoken", piece.text);
    }
    say("status", `seed ${body.seed}, block ${count + 1}`);
    $("scrub").max = run.events.length; // before the value, which it bounds
    $("scrub").value = run.events.length;
    draw();
  }
  const words = { length: "as long as asked for", stop: "ended by the model" };
  return `${words[last.finish_reason]} after ${last.seconds.toFixed(2)} s`;
}

function lock(isRunning) {
  $("run").disabled = isRunning || model === null;
  $("stop").disabled = !isRunning;
  const hasEvents = run.events.length > 0;
  for (const id of ["scrub", "play"]) $(id).disabled = isRunning || !hasEvents;
  $("text").setAttribute("aria-busy", String(isRunning));
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});
$("stop").addEventListener("click", () => stopping?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stopping?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
});

// Replay

const STEP_SECONDS = 0.14;

function endReplay() {
  clearInterval(replaying);
  replaying = null;
  say("play", "Replay");
}

$("play").addEventListener("click", () => {
  if (replaying !== null) return endReplay();
  if ($("scrub").value === $("scrub").max) $("scrub").value = 0;
  say("play", "Pause");
  replaying = setInterval(() => {
    $("scrub").value = Number($("scrub").value) + 1;
    if ($("scrub").value === $("scrub").max) endReplay();
    draw();
  }, 1000 * STEP_SECONDS);
});
$("scrub").addEventListener("input", () => {
  endReplay();
  draw();
});

// A hole

$("hole").addEventListener("click", () => {
  const prompt = $("prompt");
  const opens = $("after").hidden;
  if (opens) {
    $("suffix").value = prompt.value.slice(prompt.selectionEnd);
    prompt.value = prompt.value.slice(0, prompt.selectionStart);
  } else {
    prompt.value += $("suffix").value;
    $("suffix").value = "";
  }
  $("after").hidden = !opens;
  say("hole", opens ? "Close the hole" : "Mark a hole at the cursor");
  say("prompt-label", opens ? "Before the hole" : "Prompt");
  (opens ? $("suffix") : prompt).focus();
  showCurl();
});

// Settings

function showSettings() {
  const { value, selectedOptions } = $("rule");
  say("rule-told", selectedOptions[0].dataset.told);
  for (const part of document.querySelectorAll("[data-rule]")) part.hidden = part.dataset.rule !== value;
  for (const output of document.querySelectorAll("label output")) {
    output.textContent = Number($(output.htmlFor[0]).value).toFixed(2);
  }
  showCurl();
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function showCurl() {
  if (model === null) return;
  const body = request(Number($("seed").value || 0));
  if ($("seed").value === "") delete body.seed;
  const url = new URL("v1/completions", location.href);
  const lines = [`curl ${url}`, ` -H "Authorization: Bearer $CASCADE_API_KEY"`, ` -H 'Content-Type: application/json'`];
  if (key === null) lines.splice(1, 1);
  say("curl", `${lines.join(" \\\n ")} \\\n  -d ${quoted(JSON.stringify(body))}`);
}

document.addEventListener("input", showSettings);

// The key and the model

function askForKey() {
  key = null;
  model = null;
  $("key-form").hidden = false;
  $("forget").hidden = true;
  $("prompt").disabled = true;
  lock(false);
  $("key").focus();
}

async function open() {
  try {
    model = (await (await ask("v1/models")).json()).data[0];
  } catch (error) {
    tell(error instanceof ApiError ? error : new ApiError("The server cannot be reached."));
    if (error.status === 401) askForKey();
    return;
  }
  tell(null);
  const { id, block_size, max_model_len, infill } = model;
  const blocks = block_size === 1 ? "a token at a time" : `blocks of ${block_size}`;
  say("model", `${id} \u00b7 ${blocks} \u00b7 context of ${max_model_len} tokens`);
  document.title = `${id} \u00b7 CASCADE`;
  $("hole").hidden = infill !== "psm";
  $("no-hole").hidden = infill === "psm";
  say("no-hole", "No holes to fill: this model was trained without an infill_rate, so it cannot see what follows one.");
  $("key-form").hidden = true;
  $("key").value = "";
  $("forget").hidden = key === null;
  $("prompt").disabled = false;
  $("max_tokens").max = max_model_len;
  lock(false);
  showSettings();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value;
  open();
});
$("forget").addEventListener("click", askForKey);

showSettings();
if (document.documentElement.dataset.key === "needed") askForKey();
else open();
