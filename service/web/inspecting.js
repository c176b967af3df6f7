// Asking for explanations when they are needed, and putting the answers where they belong.

import { callJson, Problem } from "./api.js";
import { chosenQuery, lastToken, page, stepsHead, update } from "./page.js";

/** Whether the server does not explain at all (`--no-explain`). */
export const isExplanationOff = (error) => error instanceof Problem && error.status === 403;

export class Inspector {
  #exhibit;
  #rooms;
  #fail;

  /** `fail(error, retry)` shows what went wrong. */
  constructor(exhibit, rooms, fail) {
    this.#exhibit = exhibit;
    this.#rooms = rooms;
    this.#fail = fail;
  }

  /** The whole text, or as much of it as is asked for and as the server takes. */
  async inspect() {
    const { state, tokens, explainer } = page;
    if (page.missing || !tokens.length) return this.#rooms.redraw();
    const count = Math.min(state.upto || tokens.length, tokens.length);
    let limit = count;
    this.#rooms.setWaiting(true);
    try {
      const info = (page.info ??= await callJson("info"));
      limit = info.limits.max_explain_tokens;
      const ids = tokens.slice(0, Math.min(count, limit)).map((token) => token.id);
      await explainer.open(ids, { numLayers: info.num_layers, numHeads: info.num_heads });
    } catch (error) {
      if (error.name === "AbortError") return;
      if (isExplanationOff(error)) this.setMissing(error.message);
      else this.#fail(error, () => this.inspect());
      return;
    } finally {
      this.#rooms.setWaiting(false);
    }
    if (count > limit) this.#exhibit.say(`The first ${limit} of ${count} tokens are explained.`);
    else if (state.shown === "prompt") this.#exhibit.sayNext(explainer.next);
    this.#take(explainer.tokens);
    update(possible(state, tokens.length, explainer.attention));
    this.#exhibit.refresh();
    this.#rooms.open();
    await Promise.all([this.focus(), this.compare()]);
  }

  /** What belongs to the chosen head and token. */
  async focus() {
    const { state, explainer } = page;
    if (!explainer.attention) return;
    const token = state.token ?? lastToken();
    await this.#asked(
      () => explainer.focus(state.head, chosenQuery(), token, stepsHead()),
      (error) => this.#fail(error, () => this.focus()),
    );
  }

  /** The text with some of it switched off. */
  async compare() {
    const { state, explainer } = page;
    if (!explainer.attention) return;
    page.whatIfProblem = null;
    const heads = state.offHeads;
    const edges = state.offEdges.filter(([query]) => query < explainer.numTokens);
    if (!heads.length && !edges.length) return;
    await this.#asked(
      () => explainer.compare(heads, edges),
      (error) => (page.whatIfProblem = error.message),
    );
  }

  setMissing(words) {
    page.missing = words;
    this.#rooms.redraw();
  }

  /** Given tokens have probabilities too, once the text was explained. */
  #take(explained) {
    explained.forEach(({ logprob, rank, text }, position) => {
      const token = page.tokens[position];
      Object.assign(token, { logprob, rank, name: text || token.name });
    });
  }

  async #asked(question, failed) {
    try {
      await question();
    } catch (error) {
      if (error.name === "AbortError") return;
      failed(error);
    }
    this.#exhibit.redraw();
    this.#rooms.redraw();
  }
}

/** Of what is chosen and switched off, what there is: an address may name anything. */
function possible({ token, head, upto, offHeads, offEdges }, numTokens, attention) {
  return {
    token: token !== null && token < numTokens ? token : null,
    head: head && attention.has(head) ? head : null,
    upto: upto !== null && upto < numTokens ? upto : null,
    offHeads: offHeads.filter((pair) => attention.has(pair)),
    offEdges: offEdges.filter(([query, key]) => key <= query && query < numTokens),
  };
}
