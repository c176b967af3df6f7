// The case: the tokens, the card beside them, and what is said below.

import { Arcs } from "./arcs.js";
import { strongest } from "./attention.js";
import { drawCard } from "./card.js";
import { choices } from "./chrome.js";
import { byId, percent, shown } from "./dom.js";
import { page, queryOf, update } from "./page.js";
import { TokenView } from "./tokens.js";

const ATTENDED = 8;
const ENDINGS = {
  stop: "the model ended it",
  length: "the limit was reached",
  cancelled: "stopped",
  timeout: "its time was over",
};

export class Exhibit {
  #view;
  #arcs;
  #choose;

  /** `choose(position | null)` when a token is to be kept. */
  constructor(choose) {
    this.#choose = choose;
    this.#view = new TokenView(byId("tokens"), {
      choose,
      point: (position) => {
        page.pointed = position;
        this.redraw();
      },
    });
    this.#arcs = new Arcs(byId("arcs"), byId("tokens"));
    this.#drawChoice();
  }

  /** Show these tokens instead of the ones that are there. */
  show(tokens) {
    page.tokens = tokens;
    page.pointed = null;
    this.#view.show(tokens);
    this.#view.choose(page.state.token);
    byId("placeholder").hidden = tokens.length > 0;
    this.redraw();
  }

  /** New tokens at the end, and text that belongs to the one before them. */
  add(tokens, held) {
    const from = page.tokens.length;
    if (held && from) page.tokens[from - 1].text += held;
    page.tokens.push(...tokens);
    this.#view.show(page.tokens, held ? Math.max(from - 1, 0) : from);
  }

  /** Show what is known of the tokens by now. */
  refresh() {
    this.#view.show(page.tokens);
    this.choose();
  }

  /** Show which token is kept, and see that a narrow page's card does not stand in front of it. */
  choose() {
    this.#view.choose(page.state.token);
    this.redraw();
    // Where the case begins low on the page, the card comes along for a part of the way.
    for (let tries = 0; tries < 3; tries += 1) {
      const top = this.#hiddenBy(byId("card"));
      if (top === 0) return;
      scrollBy({ top, behavior: "instant" });
    }
  }

  /** By how much to scroll so that the kept token is seen above the card; 0 where it is seen. */
  #hiddenBy(card) {
    const token = this.#view.boxOf(page.state.token);
    const box = card.getBoundingClientRect();
    const isBeside = !token || token.right <= box.left;
    if (isBeside || !box.height || token.bottom <= box.top || token.top >= box.bottom) return 0;
    return token.bottom - box.top + 24;
  }

  /** The shades, the arcs and the card. */
  redraw() {
    const { state, tokens, explainer } = page;
    const position = page.pointed ?? state.token;
    const token = position === null ? undefined : tokens[position];
    const attended = token ? attendedBy(token, position) : null;
    this.#view.shade(attended?.weights ?? null, attended?.query ?? null);
    byId("tokens").classList.toggle("with-arcs", state.arcs);
    const rows = state.arcs ? (attended?.rows ?? null) : null;
    this.#arcs.show(rows, attended?.query, (at) => this.#view.inkOf(at));
    drawCard(byId("card"), {
      token,
      position,
      tokens,
      alternatives: token ? (token.top ?? explainer.candidatesAfter(position - 1)) : null,
      attended,
      isChosen: position !== null && position === state.token,
      unchoose: () => this.#choose(null),
    });
  }

  #drawChoice() {
    const options = [
      { name: "on", value: true },
      { name: "off", value: false },
    ];
    choices(byId("arcs-choice"), "Arcs", options, page.state.arcs, (arcs) => {
      update({ arcs });
      this.#drawChoice();
      this.redraw();
    });
  }

  /** Say how a stream ended, from its `done` event. */
  sayOutcome({ finish_reason: reason, usage, timing }) {
    const firstS = timing.time_to_first_token_s;
    const words = [
      `${usage.completion_tokens} tokens, ${ENDINGS[reason] ?? reason}`,
      `${timing.tokens_per_s.toFixed(0)} tokens a second`,
    ];
    if (firstS !== null) words.push(`first after ${(firstS * 1000).toFixed(0)} ms`);
    if (usage.cached_prompt_tokens) {
      const share = percent(usage.cached_prompt_tokens / usage.prompt_tokens);
      words.push(`${share} of the prompt was in the cache`);
    }
    this.say(words.join(" · "));
  }

  /** Say what would come next. */
  sayNext(candidates) {
    const names = candidates
      .slice(0, 4)
      .map((one) => `“${shown(one.text)}” ${percent(Math.exp(one.logprob))}`);
    this.say(`Next, most likely: ${names.join(", ")}`);
  }

  say(words) {
    byId("outcome").textContent = words;
  }
}

/** Where a token looked: from /explain once that is there, before that from the stream. */
function attendedBy(token, position) {
  const { state, tokens, explainer } = page;
  const query = queryOf(position);
  const row = explainer.attention?.row(state.head, query);
  if (row) {
    const of = state.head ? `layer ${state.head[0]}, head ${state.head[1]}` : "mean of all heads";
    const verb =
      state.look === "for"
        ? `To choose it, “${shown(tokens[query].name)}” looked at`
        : "From here it looks at";
    return { title: `${verb} (${of})`, rows: strongest(row, ATTENDED), weights: row, query };
  }
  if (explainer.attention || !token.attended) return null;
  const weights = new Array(position).fill(0);
  for (const { position: key, weight } of token.attended) weights[key] = weight;
  const title = "To choose it, looked at (mean of all heads)";
  return { title, rows: token.attended, weights, query: position };
}
