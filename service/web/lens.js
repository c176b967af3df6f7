// The logit lens as a table: what each layer would say next.

import { h, percent, shown } from "./dom.js";

/** `rows` are those of one position: [{layer, candidates}], from the embedding to the last layer. */
export function drawLens(element, { rows, after, actual, numLayers }) {
  const count = Math.max(...rows.map((row) => row.candidates.length), 0);
  if (!count) {
    element.replaceChildren(h("p", { class: "quiet" }, "No row yet: choose a token."));
    return;
  }
  const name = (layer) =>
    layer === 0
      ? "embedding"
      : layer === numLayers
        ? `layer ${layer - 1}, the answer`
        : `layer ${layer - 1}`;
  const head = h(
    "tr",
    {},
    h("th", { scope: "col" }, "after"),
    ...Array.from({ length: count }, (_, i) =>
      h("th", { scope: "col" }, i === 0 ? "first choice" : `${i + 1}`),
    ),
  );
  const body = [...rows]
    .sort((a, b) => a.layer - b.layer)
    .map(({ layer, candidates }) =>
      h(
        "tr",
        {},
        h("th", { scope: "row" }, name(layer)),
        candidates.map((one) => cell(one, actual)),
      ),
    );
  element.replaceChildren(
    h(
      "p",
      { class: "label" },
      `After “${shown(after)}”`,
      actual === null ? "" : ", marked: what came",
    ),
    h(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": "What each layer would say" },
      h("table", { class: "lens" }, h("thead", {}, head), h("tbody", {}, body)),
    ),
  );
}

function cell(candidate, actual) {
  const probability = Math.exp(candidate.logprob);
  return h(
    "td",
    {
      class: candidate.token_id === actual ? "marked" : null,
      style: { "--weight": `${(Math.sqrt(probability) * 100).toFixed(1)}%` },
    },
    h("span", {}, shown(candidate.text)),
    h("span", { class: "remark" }, ` ${percent(probability)}`),
  );
}
