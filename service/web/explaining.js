// Questions to POST /explain about the text on the page, the newest of each kind only.

import { callJson } from "./api.js";
import { Attention, kindFor, TOP_K } from "./attention.js";

const CANDIDATES = 10;
const LENS = 5;
const CONTINUATION_TOKENS = 24;

export class Explainer {
  #asking = new Map(); // kind of question -> AbortController
  #ids = [];
  attention = null;
  entropy = null;
  tokens = []; // with logprob and rank, given ones too
  next = []; // the likeliest tokens after the last
  #lens = new Map(); // position -> rows
  steps = null;
  whatIf = null;
  numLayers = 0;

  get numTokens() {
    return this.attention?.numTokens ?? 0;
  }

  /** Forget everything and everything that is under way. */
  clear() {
    for (const controller of this.#asking.values()) controller.abort();
    this.#asking.clear();
    this.#lens.clear();
    Object.assign(this, {
      attention: null,
      entropy: null,
      tokens: [],
      next: [],
      steps: null,
      whatIf: null,
    });
  }

  /** Attention of these tokens in all heads. Raises as `callJson`; AbortError when asked anew. */
  async open(ids, { numLayers, numHeads }) {
    this.clear();
    this.#ids = ids;
    this.numLayers = numLayers;
    const kind = kindFor(ids.length, numLayers * numHeads);
    const answer = await this.#ask("open", {
      attention: kind,
      ...(kind === "top" ? { top_k: TOP_K } : {}),
      lens: 0,
    });
    const attention = new Attention(answer.attention);
    if (kind === "top")
      attention.setMean((await this.#ask("open", { attention: "mean", lens: 0 })).attention.mean);
    this.attention = attention;
    this.entropy = answer.entropy;
    this.tokens = answer.tokens;
    this.next = answer.next;
  }

  /** What belongs to one head and one query: its steps, the lens there and before `token`. */
  async focus(head, query, token, stepsHead) {
    const positions = [...new Set([query, token - 1])].filter((position) => position >= 0);
    const needsRows = head && !this.attention.isComplete(head);
    const answer = await this.#ask("focus", {
      attention: needsRows ? "full" : "none",
      layers: [stepsHead[0]],
      heads: [stepsHead[1]],
      lens: LENS,
      lens_positions: positions,
      head: { layer: stepsHead[0], head: stepsHead[1], query },
    });
    if (needsRows) this.attention.setHead(head, answer.attention.full[0][0]);
    for (const position of positions)
      this.#lens.set(
        position,
        answer.lens.filter((row) => row.position === position),
      );
    this.steps = answer.head;
  }

  /** The text with and without some heads and edges. */
  async compare(heads, edges) {
    this.whatIf = await this.#ask("compare", {
      attention: "none",
      layers: [0],
      heads: [0],
      lens: 0,
      candidates: CANDIDATES,
      ablate: { heads, edges },
      max_tokens: CONTINUATION_TOKENS,
    });
  }

  /** Rows of the logit lens at a position, where they were asked for. */
  lensAt(position) {
    return this.#lens.get(position) ?? null;
  }

  /** The likeliest tokens after a position, where they are known. */
  candidatesAfter(position) {
    return this.lensAt(position)?.find((row) => row.layer === this.numLayers)?.candidates ?? null;
  }

  async #ask(kind, question) {
    this.#asking.get(kind)?.abort();
    const controller = new AbortController();
    this.#asking.set(kind, controller);
    return callJson("explain", {
      body: { prompt: this.#ids, ...question },
      signal: controller.signal,
    });
  }
}
