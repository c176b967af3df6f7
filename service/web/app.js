// The page: what is asked for goes into `state` (and the address), what came back into `text` and
// `explainer`; `redraw*` puts both on the page.

import { callJson, currentKey, onKeyNeeded, Problem } from "./api.js";
import { strongest } from "./attention.js";
import { drawCard } from "./card.js";
import { askForKey, choices, drawExamples, setUpTheme, showModel } from "./chrome.js";
import { copy } from "./clipboard.js";
import { byId, debounced, percent, shown } from "./dom.js";
import { Explainer } from "./explaining.js";
import { cancel, EXPLAIN_FIELDS, promptTokens, STREAM_FIELDS, streamText } from "./generating.js";
import { HeadGrid } from "./grid.js";
import { LargeMap } from "./large.js";
import { drawLens } from "./lens.js";
import { startTiles } from "./metrics.js";
import { clearNotices, notice } from "./notices.js";
import { makeFields, markField, showDrawn, showFields } from "./settings.js";
import { asCurl, asPython } from "./snippets.js";
import { fromFragment, generateBody, includesPair, toFragment, toggled } from "./state.js";
import { drawSteps } from "./steps.js";
import { drawLegend, TokenView } from "./tokens.js";
import { drawWhatIf } from "./whatif.js";

const state = fromFragment(location.hash);
const text = { tokens: [], pointed: null };
const explainer = new Explainer();
let info = null;
let running = null; // {controller, id} of the stream
let missing = null; // why this server does not explain
let whatIfProblem = null;

const tokenView = new TokenView(byId("tokens"), {
  point: (position) => { text.pointed = position; redrawText(); },
  choose: (position) => chooseToken(position),
});
const grid = new HeadGrid(byId("grid"), { choose: chooseHead, toggle: toggleHead });
const large = new LargeMap(byId("large"), {
  toggleEdge,
  toggleHead: () => state.head && toggleHead(state.head),
  chooseQuery: (query) => chooseToken(state.look === "for" ? query + 1 : query),
});

// ---- what is asked for -------------------------------------------------------------------------

function update(patch) {
  Object.assign(state, patch);
  history.replaceState(null, "", `#${toFragment(state)}`);
}

function chooseToken(position) {
  update({ token: position !== null && position < text.tokens.length ? position : null });
  tokenView.choose(state.token);
  redrawText();
  redrawRooms();
  focusSoon();
}

function chooseHead(head) {
  update({ head });
  redrawText();
  redrawRooms();
  focusSoon();
}

function toggleHead(pair) {
  update({ offHeads: toggled(state.offHeads, pair) });
  whatIfChanged();
}

function toggleEdge(pair) {
  update({ offEdges: toggled(state.offEdges, pair) });
  whatIfChanged();
}

function whatIfChanged() {
  explainer.whatIf = null;
  redrawRooms();
  compareSoon();
}

// ---- generating --------------------------------------------------------------------------------

/** Stream a continuation. `isReplay`: of an address, with its seed and its choices. */
async function generate({ isReplay = false } = {}) {
  if (!beginNew({ isReplay })) return;
  const controller = new AbortController();
  const mine = (running = { controller, id: null });
  showRunning();
  try {
    showTokens(await promptTokens(state.prompt, controller.signal), 0);
    const done = await stream(controller.signal, isReplay ? state.seed || state.drawn : state.seed);
    sayOutcome(done);
    update({ shown: "text" });
  } catch (error) {
    if (error.name !== "AbortError") fail(error, () => generate({ isReplay }));
    else byId("outcome").textContent = "Stopped.";
  } finally {
    if (running === mine) running = null;
    showRunning();
  }
  if (running === null && text.tokens.some((token) => !token.isPrompt)) await explain();
}

async function stream(signal, seed) {
  const options = {
    signal,
    onStart: (start) => {
      running.id = start.id;
      update({ drawn: state.seed ? "" : start.seed });
      showDrawn(state.drawn, keepSeed);
    },
    onTokens: (tokens, held) => addTokens(tokens, held),
  };
  const body = (extra) => generateBody(state, { seed, extra: { ...STREAM_FIELDS, ...extra } });
  if (missing) return streamText(body({}), options);
  try {
    return await streamText(body(EXPLAIN_FIELDS), options);
  } catch (error) {
    if (isExplanationOff(error)) setMissing(error.message);
    else if (error.field !== "explain") throw error;
    else byId("outcome").textContent = `Without attention while it streams: ${error.message}`;
    return streamText(body({}), options);
  }
}

const isExplanationOff = (error) => error instanceof Problem && error.status === 403;

async function stop() {
  const current = running;
  if (!current) return;
  if (!current.id) return current.controller.abort();
  try {
    await cancel(current.id);
  } catch {
    current.controller.abort(); // whoever goes away cancels too
  }
}

/** Tokens of the prompt alone, to look into; the last that is `word` is chosen. */
async function look({ isReplay = false, word = null } = {}) {
  if (!beginNew({ isReplay })) return;
  try {
    showTokens(await promptTokens(state.prompt), 0);
    update({ shown: "prompt", drawn: "" });
    showDrawn("", keepSeed);
    const found = text.tokens.findLastIndex((token) => token.name.trim() === word);
    if (found >= 0) update({ token: found });
    await explain();
  } catch (error) {
    fail(error, () => look({ isReplay }));
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
  running?.controller.abort();
  explainer.clear();
  whatIfProblem = null;
  if (!isReplay) update({ token: null, upto: null, offEdges: [] });
  byId("outcome").textContent = "";
  byId("rooms").hidden = true;
  showTokens([], 0);
  return true;
}

function showTokens(tokens, from) {
  text.tokens = tokens;
  if (from === 0) text.pointed = null;
  tokenView.show(tokens, from);
  byId("placeholder").hidden = tokens.length > 0;
  redrawText();
}

function addTokens(tokens, held) {
  const from = text.tokens.length;
  if (held && from) text.tokens[from - 1].text += held;
  text.tokens.push(...tokens);
  tokenView.show(text.tokens, held ? from - 1 : from);
}

// ---- explaining --------------------------------------------------------------------------------

async function explain() {
  if (missing || !text.tokens.length) return redrawRooms();
  const limit = info?.limits.max_explain_tokens ?? Infinity;
  const count = Math.min(state.upto ?? text.tokens.length, text.tokens.length, limit);
  byId("rooms").classList.add("waiting");
  try {
    await explainer.open(text.tokens.slice(0, count).map((token) => token.id), { numLayers: info.num_layers, numHeads: info.num_heads });
  } catch (error) {
    if (error.name === "AbortError") return;
    if (isExplanationOff(error)) setMissing(error.message);
    else fail(error, explain);
    return;
  } finally {
    byId("rooms").classList.remove("waiting");
  }
  explainer.tokens.forEach((told, position) => Object.assign(text.tokens[position], { logprob: told.logprob, rank: told.rank, name: told.text || text.tokens[position].name }));
  tokenView.show(text.tokens, 0);
  tokenView.choose(state.token);
  if (state.head && !explainer.attention.has(state.head)) update({ head: null });
  byId("rooms").hidden = false;
  grid.draw(explainer.attention, explainer.entropy);
  redrawText();
  redrawRooms();
  await Promise.all([focus(), compare()]);
}

async function focus() {
  if (!explainer.attention) return;
  const query = Math.max(rowOf(state.token ?? lastToken()), 0);
  await asked(() => explainer.focus(state.head, query, state.token ?? lastToken(), stepsHead()));
}

async function compare() {
  if (!explainer.attention) return;
  const edges = state.offEdges.filter(([query]) => query < explainer.numTokens);
  const heads = state.offHeads.filter((head) => explainer.attention.has(head));
  if (!edges.length && !heads.length) return;
  whatIfProblem = null;
  await asked(() => explainer.compare(heads, edges), (error) => (whatIfProblem = error.message));
}

async function asked(question, failed = (error) => fail(error, redrawRooms)) {
  try {
    await question();
  } catch (error) {
    if (error.name === "AbortError") return;
    failed(error);
  }
  redrawText();
  redrawRooms();
}

const focusSoon = debounced(focus, 120);
const compareSoon = debounced(compare, 200);

const lastToken = () => (explainer.attention ? explainer.numTokens : text.tokens.length) - 1;
const rowOf = (token) => Math.min(state.look === "for" ? token - 1 : token, lastToken());
const stepsHead = () => state.head ?? [explainer.attention.layers.at(-1), explainer.attention.heads[0]];

// ---- on the page -------------------------------------------------------------------------------

function redrawText() {
  const position = text.pointed ?? state.token;
  const token = position === null ? null : text.tokens[position];
  const attended = token ? attendedBy(token, position) : null;
  tokenView.shade(attended?.weights ?? null, attended?.query ?? null);
  drawCard(byId("card"), {
    token,
    position,
    tokens: text.tokens,
    alternatives: token ? (token.top ?? explainer.candidatesAfter(position - 1)) : null,
    attended,
    isChosen: position !== null && position === state.token,
    unchoose: () => chooseToken(null),
  });
}

/** Where a token looked: from /explain once that is there, before that from the stream. */
function attendedBy(token, position) {
  const query = rowOf(position);
  const row = explainer.attention?.row(state.head, query);
  if (row) {
    const of = state.head ? `layer ${state.head[0]}, head ${state.head[1]}` : "mean of all heads";
    const title = state.look === "for" ? `To choose it, “${shown(text.tokens[query].name)}” looked at` : "From here it looks at";
    return { title: `${title} (${of})`, rows: strongest(row, 8), weights: row, query };
  }
  if (explainer.attention || !token.attended) return null;
  const weights = [];
  for (const { position: key, weight } of token.attended) weights[key] = weight;
  return { title: "To choose it, looked at (mean of all heads)", rows: token.attended, weights: Array.from(weights, (weight) => weight ?? 0), query: position };
}

function redrawRooms() {
  byId("missing").hidden = !missing;
  byId("missing").textContent = missing ? `This server does not explain (${missing}) The text streams all the same; the maps, the lens and the steps are missing.` : "";
  if (!explainer.attention) return;
  const token = state.token ?? lastToken();
  const query = Math.max(rowOf(token), 0);
  const shownTokens = text.tokens.slice(0, explainer.numTokens);
  grid.mark(state.head, state.offHeads);
  large.draw({
    attention: explainer.attention,
    head: state.head,
    tokens: shownTokens,
    query,
    offEdges: state.offEdges,
    isOff: Boolean(state.head) && includesPair(state.offHeads, state.head),
  });
  const rows = explainer.lensAt(query) ?? [];
  drawLens(byId("lens"), { rows, after: shownTokens[query].name, actual: text.tokens[query + 1]?.id ?? null, numLayers: explainer.numLayers });
  drawSteps(byId("steps"), explainer.steps, shownTokens);
  drawWhatIf(byId("whatif"), {
    offHeads: state.offHeads,
    offEdges: state.offEdges,
    tokens: text.tokens,
    answer: explainer.whatIf,
    isWaiting: true,
    problem: whatIfProblem,
    events: { toggleHead, toggleEdge, clear: () => { update({ offHeads: [], offEdges: [] }); whatIfChanged(); } },
  });
  redrawChoices();
}

function redrawChoices() {
  const given = text.tokens.filter((token) => token.isPrompt).length;
  const here = state.token === null ? null : state.token + 1;
  const options = [{ name: "the whole text", value: null }];
  if (given < text.tokens.length) options.push({ name: "the beginning alone", value: given });
  if (here !== null && here !== given && here < text.tokens.length) options.push({ name: `up to “${shown(text.tokens[state.token].name)}”`, value: here });
  if (![...options].some(({ value }) => value === state.upto)) options.push({ name: `the first ${state.upto} tokens`, value: state.upto });
  choices(byId("upto"), "Look into", options, state.upto, (upto) => { update({ upto }); explain(); });
  choices(byId("look-choice"), "Attention", [{ name: "from the token", value: "from" }, { name: "that chose it", value: "for" }], state.look, (look) => {
    update({ look });
    redrawText();
    redrawRooms();
    focus();
  });
  byId("look-choice").hidden = false;
}

function setMissing(words) {
  missing = words;
  redrawRooms();
}

function sayOutcome({ finish_reason: reason, usage, timing }) {
  const ended = { stop: "the model ended it", length: "the limit was reached", cancelled: "stopped", timeout: "its time was over" }[reason] ?? reason;
  const first = timing.time_to_first_token_s === null ? "" : ` · first after ${(timing.time_to_first_token_s * 1000).toFixed(0)} ms`;
  const cached = usage.cached_prompt_tokens ? ` · ${percent(usage.cached_prompt_tokens / usage.prompt_tokens)} of the prompt was in the cache` : "";
  byId("outcome").textContent = `${usage.completion_tokens} tokens, ${ended} · ${timing.tokens_per_s.toFixed(0)} tokens a second${first}${cached}`;
}

function fail(error, retry) {
  notice(error, retry);
  if (error instanceof Problem && error.field) markField(error.field);
}

function keepSeed(seed) {
  update({ seed, drawn: "" });
  showFields(state, info);
  showDrawn("", keepSeed);
}

function showRunning() {
  byId("stop").hidden = !running;
  byId("go").hidden = Boolean(running);
  byId("look").hidden = Boolean(running);
  byId("tokens").classList.toggle("running", Boolean(running));
}

// ---- wiring ------------------------------------------------------------------------------------

async function start() {
  onKeyNeeded(askForKey);
  setUpTheme(() => { grid.repaint(); large.repaint(); redrawRooms(); });
  drawLegend(byId("legend"));
  drawExamples(chooseExample);
  makeFields(byId("fields"), (name, value) => {
    if (name === "seed") update({ seed: value, drawn: "" });
    else update({ parameters: { ...state.parameters, [name]: value } });
    showFields(state, info);
    showDrawn(state.drawn, keepSeed);
  });
  byId("prompt").value = state.prompt;
  showFields(state, info);
  showDrawn(state.drawn, keepSeed);
  redrawText();
  listen();
  await loadInfo();
  startTiles();
  if (!info) return;
  if (state.shown === "text") await generate({ isReplay: true });
  else if (state.shown === "prompt") await look({ isReplay: true });
}

async function loadInfo() {
  try {
    info = await callJson("info");
  } catch (error) {
    fail(error, start_again);
    return;
  }
  showModel(info);
  showFields(state, info);
}

const start_again = () => location.reload();

function chooseExample(example) {
  update({ prompt: example.text });
  byId("prompt").value = example.text;
  if (!example.look) return generate();
  return look({ word: example.look });
}

function listen() {
  byId("form").addEventListener("submit", (event) => { event.preventDefault(); generate(); });
  byId("look").addEventListener("click", () => look());
  byId("stop").addEventListener("click", stop);
  byId("prompt").addEventListener("input", (event) => update({ prompt: event.target.value, shown: "", token: null, upto: null, offEdges: [] }));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); generate(); }
    else if (event.key === "Escape" && !document.querySelector("dialog[open]")) running ? stop() : state.token !== null && chooseToken(null);
  });
  const base = () => new URL(".", location.href).href;
  const withKey = () => ({ withKey: currentKey() !== null });
  byId("copy-curl").addEventListener("click", () => copy(asCurl(state, base(), withKey()), "curl command"));
  byId("copy-python").addEventListener("click", () => copy(asPython(state, base(), withKey()), "Python program"));
  byId("copy-link").addEventListener("click", () => copy(location.href, "Link"));
  addEventListener("hashchange", () => location.reload());
}

start();
