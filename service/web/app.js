// The page put together: what each button and key does.

import { callJson, ConnectionLost, currentKey, onKeyNeeded, Problem } from "./api.js";
import { askForKey, drawExamples, setUpTheme, showModel } from "./chrome.js";
import { copy } from "./clipboard.js";
import { byId, debounced } from "./dom.js";
import { Exhibit } from "./exhibit.js";
import { cancel, EXPLAIN_FIELDS, promptTokens, STREAM_FIELDS, streamText } from "./generating.js";
import { Inspector, isExplanationOff } from "./inspecting.js";
import { startTiles } from "./metrics.js";
import { clearNotices, notice } from "./notices.js";
import { page, update } from "./page.js";
import { Rooms } from "./rooms.js";
import { makeFields, markField, showDrawn, showFields, unreadableField } from "./settings.js";
import { asCurl, asPython } from "./snippets.js";
import { generateBody, toggled } from "./state.js";
import { drawLegend } from "./tokens.js";

const { state } = page;

// ---- choosing ------------------------------------------------------------------------------

const exhibit = new Exhibit(chooseToken);
const rooms = new Rooms({
  chooseToken,
  chooseHead: (head) => choose({ head }),
  setLook: (look) => choose({ look }),
  setUpto: (upto) => {
    update({ upto });
    inspector.inspect();
  },
  toggleHead: (pair) => switchOff({ offHeads: toggled(state.offHeads, pair) }),
  toggleEdge: (pair) => switchOff({ offEdges: toggled(state.offEdges, pair) }),
  switchAllOn: () => switchOff({ offHeads: [], offEdges: [] }),
});
const inspector = new Inspector(exhibit, rooms, fail);
const focusSoon = debounced(() => inspector.focus(), 120);
const compareSoon = debounced(() => inspector.compare(), 200);

function chooseToken(position) {
  choose({ token: position !== null && position < page.tokens.length ? position : null });
}

function choose(patch) {
  update(patch);
  exhibit.choose();
  rooms.redraw();
  focusSoon();
}

function switchOff(patch) {
  update(patch);
  page.explainer.whatIf = null;
  rooms.redraw();
  compareSoon();
}

// ---- generating ----------------------------------------------------------------------------

/** Stream a continuation. `isReplay`: of an address, with its seed and its choices. */
async function generate({ isReplay = false } = {}) {
  if (!beginNew({ isReplay })) return;
  const mine = (page.running = { controller: new AbortController(), id: null });
  const { signal } = mine.controller;
  showRunning();
  let isLost = false;
  try {
    exhibit.show(await promptTokens(state.prompt, signal));
    const done = await stream(signal, isReplay ? state.seed || state.drawn : state.seed);
    exhibit.sayOutcome(done);
    update({ shown: "text" });
  } catch (error) {
    if (error.name === "AbortError") exhibit.say("Stopped.");
    else fail(error, () => generate({ isReplay }));
    isLost = error instanceof ConnectionLost; // then there is nobody to ask about what came
  }
  if (page.running !== mine) return; // another one has begun
  page.running = null;
  showRunning();
  if (!isLost && page.tokens.some((token) => !token.isPrompt)) await inspector.inspect();
}

/** The stream itself: with explanations, or without where the server has none for it. */
async function stream(signal, seed) {
  const options = {
    signal,
    onTokens: (tokens, held) => exhibit.add(tokens, held),
    onStart: (start) => {
      page.running.id = start.id;
      update({ drawn: state.seed ? "" : start.seed });
      showSettings();
    },
  };
  const streamed = (extra) =>
    streamText(generateBody(state, { seed, extra: { ...STREAM_FIELDS, ...extra } }), options);
  if (page.missing) return streamed({});
  try {
    return await streamed(EXPLAIN_FIELDS);
  } catch (error) {
    if (isExplanationOff(error)) inspector.setMissing(error.message);
    else if (error.status === 422 && error.field === "explain") {
      exhibit.say(`Without attention while it streams: ${error.message}`);
    } else throw error;
    return streamed({});
  }
}

async function stop() {
  const { running } = page;
  if (!running?.id) return running?.controller.abort();
  try {
    await cancel(running.id); // it then ends in good order
  } catch {
    running.controller.abort(); // who goes away cancels too
  }
}

/** Tokens of the prompt alone, to look into. The last that is `word` is chosen, and the head that
 * looks most from there at the token `at`. */
async function look({ isReplay = false, word = null, at = null } = {}) {
  if (!beginNew({ isReplay })) return;
  try {
    const tokens = await promptTokens(state.prompt);
    const find = (name) => tokens.findLastIndex((token) => token.name.trim() === name);
    const pair = [find(word), find(at)];
    update({ shown: "prompt", drawn: "", ...(pair[0] < 0 ? {} : { token: pair[0], head: null }) });
    exhibit.show(tokens);
    showSettings();
    await inspector.inspect();
    const { attention } = page.explainer;
    if (attention && Math.min(...pair) >= 0)
      choose({ head: attention.strongestHead(...pair).head });
  } catch (error) {
    fail(error, () => look({ isReplay, word, at }));
  }
}

/** Clear the case for a new text; false when there is no prompt. */
function beginNew({ isReplay }) {
  clearNotices();
  markField(null);
  if (!state.prompt) {
    markField("prompt");
    byId("prompt").focus();
    return false;
  }
  const unreadable = unreadableField();
  if (unreadable) {
    const title = "A field is no number";
    fail(new Problem(0, { title, detail: "It must be one.", field: unreadable }));
    return false;
  }
  page.running?.controller.abort();
  page.explainer.clear();
  page.whatIfProblem = null;
  if (!isReplay) update({ token: null, upto: null, offEdges: [] });
  exhibit.say("");
  exhibit.show([]);
  rooms.close();
  return true;
}

function showRunning() {
  const isRunning = page.running !== null;
  byId("stop").hidden = !isRunning;
  byId("go").hidden = byId("look").hidden = isRunning;
  byId("tokens").classList.toggle("running", isRunning);
}

function fail(error, retry) {
  notice(error, retry);
  if (error instanceof Problem && error.field) markField(error.field);
}

// ---- wiring --------------------------------------------------------------------------------

function showSettings() {
  showFields(state, page.info);
  showDrawn(state.drawn, (seed) => {
    update({ seed, drawn: "" });
    showSettings();
  });
}

function chooseExample(example) {
  update({ prompt: example.text });
  byId("prompt").value = example.text;
  if (example.look) look({ word: example.look, at: example.at });
  else generate();
}

function listen() {
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    generate();
  });
  byId("look").addEventListener("click", () => look());
  byId("stop").addEventListener("click", stop);
  byId("prompt").addEventListener("input", (event) => {
    update({ prompt: event.target.value, shown: "", token: null, upto: null, offEdges: [] });
  });
  document.addEventListener("keydown", onKey);
  addEventListener("hashchange", () => location.reload());
  const base = new URL(".", location.href).href;
  const snippet = (make) => make(state, base, { withKey: currentKey() !== null });
  byId("copy-curl").addEventListener("click", () => copy(snippet(asCurl), "curl command"));
  byId("copy-python").addEventListener("click", () => copy(snippet(asPython), "Python program"));
  byId("copy-link").addEventListener("click", () => copy(location.href, "Link"));
}

function onKey(event) {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    generate();
  } else if (event.key === "Escape") {
    if (page.running) stop();
    else if (state.token !== null) chooseToken(null);
  }
}

async function start() {
  onKeyNeeded(askForKey);
  setUpTheme(() => rooms.repaint());
  drawLegend(byId("legend"));
  drawExamples(chooseExample);
  makeFields(byId("fields"), (name, value) => {
    // The text that is shown was made with other values: the address no longer promises it.
    if (name === "seed") update({ seed: value, shown: "" });
    else update({ parameters: { ...state.parameters, [name]: value }, shown: "" });
    showSettings();
  });
  byId("prompt").value = state.prompt;
  showSettings();
  exhibit.redraw();
  listen();
  try {
    page.info = await callJson("info");
  } catch (error) {
    fail(error, () => location.reload());
    return;
  }
  showModel(page.info);
  showSettings();
  startTiles();
  if (page.info.limits.max_explain_tokens === 0) {
    inspector.setMissing("explanations are switched off (--no-explain)");
  }
  if (state.shown === "text") await generate({ isReplay: true });
  else if (state.shown === "prompt") await look({ isReplay: true });
}

start();
