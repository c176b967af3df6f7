// Everything that makes a view, and its form in the URL's fragment: whoever opens the address sees
// the same, and with the seed gets the same text.

/** Sampling fields of POST /generate, with the bounds that the interface documents. */
export const PARAMETERS = {
  max_tokens: { label: "Tokens at most", initial: 96, min: 1, max: null, step: 1 },
  temperature: {
    label: "Temperature",
    initial: 0.8,
    min: 0,
    max: 2,
    step: 0.05,
    hint: "0: always the likeliest",
  },
  top_k: { label: "Top k", initial: 0, min: 0, max: null, step: 1, hint: "0: off" },
  top_p: { label: "Top p", initial: 1, min: 0.01, max: 1, step: 0.01, hint: "1: off" },
  min_p: { label: "Min p", initial: 0, min: 0, max: 0.99, step: 0.01, hint: "0: off" },
  repetition_penalty: {
    label: "Repetition penalty",
    initial: 1,
    min: 0.01,
    max: 2,
    step: 0.01,
    hint: "1: off",
  },
  presence_penalty: {
    label: "Presence penalty",
    initial: 0,
    min: -2,
    max: 2,
    step: 0.1,
    hint: "0: off",
  },
  frequency_penalty: {
    label: "Frequency penalty",
    initial: 0,
    min: -2,
    max: 2,
    step: 0.1,
    hint: "0: off",
  },
};

/** A new view. `seed` is the one asked for ("": the server draws), `drawn` the one it drew; both
 * are strings, as they go to 2^63 and a number of this language does not. */
export function initialState() {
  return {
    prompt: "",
    parameters: Object.fromEntries(
      Object.entries(PARAMETERS).map(([name, one]) => [name, one.initial]),
    ),
    seed: "",
    drawn: "",
    shown: "", // "text": it was continued; "prompt": it was looked into as it is
    token: null, // the chosen one, by position
    look: "from", // "from" the chosen token, or "for": to choose it
    arcs: true, // over the text, to what was looked at
    head: null, // [layer, head]; null: the mean over all
    upto: null, // explain so many tokens only; null: all
    offHeads: [],
    offEdges: [], // [query, key]
  };
}

const isCount = (text) => /^\d{1,9}$/.test(text);
const pairs = (text) =>
  text
    .split(",")
    .map((pair) => pair.split("."))
    .filter((pair) => pair.length === 2 && pair.every(isCount))
    .map((pair) => pair.map(Number));
const joined = (list) => list.map((pair) => pair.join(".")).join(",");

/** The fragment of a view, without the #. What is as usual is left out. */
export function toFragment(state) {
  const words = new URLSearchParams();
  if (state.prompt) words.set("prompt", state.prompt);
  for (const [name, { initial }] of Object.entries(PARAMETERS)) {
    if (state.parameters[name] !== initial) words.set(name, String(state.parameters[name]));
  }
  for (const name of ["seed", "drawn", "shown"]) if (state[name]) words.set(name, state[name]);
  if (state.token !== null) words.set("token", state.token);
  if (state.look !== "from") words.set("look", state.look);
  if (!state.arcs) words.set("arcs", "off");
  if (state.head) words.set("head", state.head.join("."));
  if (state.upto !== null) words.set("upto", state.upto);
  if (state.offHeads.length) words.set("off", joined(state.offHeads));
  if (state.offEdges.length) words.set("cut", joined(state.offEdges));
  return words.toString();
}

/** The view that a fragment describes. What is not understood is as usual. */
export function fromFragment(fragment) {
  const state = initialState();
  const words = new URLSearchParams(fragment.replace(/^#/, ""));
  state.prompt = words.get("prompt") ?? "";
  for (const name of Object.keys(PARAMETERS)) {
    const text = words.get(name);
    if (text !== null && text.trim() !== "" && Number.isFinite(Number(text)))
      state.parameters[name] = Number(text);
  }
  for (const name of ["seed", "drawn"])
    if (/^\d{1,19}$/.test(words.get(name) ?? "")) state[name] = words.get(name);
  if (["text", "prompt"].includes(words.get("shown"))) state.shown = words.get("shown");
  if (words.get("look") === "for") state.look = "for";
  state.arcs = words.get("arcs") !== "off";
  for (const name of ["token", "upto"])
    if (isCount(words.get(name) ?? "")) state[name] = Number(words.get(name));
  state.head = pairs(words.get("head") ?? "")[0] ?? null;
  state.offHeads = pairs(words.get("off") ?? "").slice(0, 64);
  state.offEdges = pairs(words.get("cut") ?? "").slice(0, 256);
  return state;
}

/** The body of POST /generate as JSON text: a seed has more digits than a number here can hold. */
export function generateBody(state, { seed = state.seed, extra = {}, indent = undefined } = {}) {
  const body = { prompt: state.prompt };
  for (const [name, { initial }] of Object.entries(PARAMETERS)) {
    const always = name === "max_tokens" || name === "temperature";
    if (always || state.parameters[name] !== initial) body[name] = state.parameters[name];
  }
  Object.assign(body, extra);
  const text = JSON.stringify(body, null, indent);
  if (!seed) return text;
  return indent
    ? `${text.slice(0, -2)},\n${" ".repeat(indent)}"seed": ${seed}\n}`
    : `${text.slice(0, -1)},"seed":${seed}}`;
}

/** `list` with `pair` in it if it was not, and without it if it was. */
export function toggled(list, pair) {
  const without = list.filter(([a, b]) => a !== pair[0] || b !== pair[1]);
  return without.length < list.length ? without : [...list, pair];
}

export const includesPair = (list, pair) => list.some(([a, b]) => a === pair[0] && b === pair[1]);
