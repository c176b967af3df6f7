// The attention weights of a text, however many of them the server gave.
//
// For a short text all weights of all heads are asked for at once. For a longer one there would be
// millions: then each row has its strongest keys, and the rows of the mean and of the chosen head are
// asked for in full besides.

/** All weights are asked for up to so many; beyond, the strongest of each row. */
export const MAX_FULL_WEIGHTS = 400_000;
export const TOP_K = 32;

/** Which kind of answer to ask for. */
export function kindFor(numTokens, numHeads) {
  return (numHeads * numTokens * (numTokens + 1)) / 2 <= MAX_FULL_WEIGHTS ? "full" : "top";
}

export class Attention {
  #answer; // "attention" of /explain
  #mean = null;
  #heads = new Map(); // "layer.head" -> rows

  constructor(answer) {
    this.#answer = answer;
    this.layers = answer.layers;
    this.heads = answer.heads;
    this.numTokens = (answer.full ?? answer.top)[0][0].length;
    if (answer.kind === "full") this.#mean = meanOf(answer.full);
  }

  /** Rows of the mean over all heads; needed where not all weights are there. */
  setMean(rows) {
    this.#mean = rows;
  }

  setHead([layer, head], rows) {
    this.#heads.set(`${layer}.${head}`, rows);
  }

  /** Whether a head's (null: the mean's) rows are complete. */
  isComplete(head) {
    if (this.#answer.kind === "full") return true;
    return head ? this.#heads.has(head.join(".")) : this.#mean !== null;
  }

  has([layer, head]) {
    return this.layers.includes(layer) && this.heads.includes(head);
  }

  /** The head that looks most from `query` at `key`: {head, weight}. */
  strongestHead(query, key) {
    const all = this.layers.flatMap((layer) =>
      this.heads.map((head) => {
        const weight = this.row([layer, head], query)[key];
        return { head: [layer, head], weight };
      }),
    );
    return all.reduce((best, one) => (one.weight > best.weight ? one : best));
  }

  /** Weights of one query over the keys up to it: of `head`, [layer, head], or of the mean (null).
   * Null where the server was not asked for them. */
  row(head, query) {
    if (query < 0 || query >= this.numTokens) return null;
    if (!head) return this.#mean?.[query] ?? null;
    const [i, j] = [this.layers.indexOf(head[0]), this.heads.indexOf(head[1])];
    if (i < 0 || j < 0) return null;
    if (this.#answer.kind === "full") return this.#answer.full[i][j][query];
    const complete = this.#heads.get(head.join("."));
    if (complete) return complete[query];
    const { keys, weights } = this.#answer.top[i][j][query];
    const row = new Array(query + 1).fill(0);
    keys.forEach((key, at) => (row[key] = weights[at]));
    return row;
  }
}

function meanOf(full) {
  const count = full.length * full[0].length;
  return full[0][0].map((_, query) => {
    const row = new Array(query + 1).fill(0);
    for (const layer of full)
      for (const head of layer)
        for (let key = 0; key <= query; key += 1) row[key] += head[query][key] / count;
    return row;
  });
}

/** The strongest keys of a row: [{position, weight}]. */
export function strongest(row, count) {
  return row
    .map((weight, position) => ({ position, weight }))
    .sort((a, b) => b.weight - a.weight)
    .slice(0, count)
    .filter(({ weight }) => weight >= 0.0005);
}
