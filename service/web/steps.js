// One head and one query, in numbers: from the query vector to the weighted sum of values.

import { colourOf, mixed } from "./colours.js";
import { h, number, percent, shown } from "./dom.js";

const FIRST_KEYS = 8; // shown at once, strongest first
const SHOWN_NUMBERS = 4; // of a vector, in the table

/** `steps` is the "head" of an answer of /explain. */
export function drawSteps(element, steps, tokens) {
  if (!steps) {
    element.replaceChildren(
      h("p", { class: "quiet" }, "Choose a head in the grid above, and a token in the text."),
    );
    return;
  }
  const query = tokens[steps.query];
  const strips = [];
  const strip = (vector, words) => {
    const canvas = h("canvas", {
      class: "strip",
      role: "img",
      "aria-label": `${words}: ${vector.map((value) => number(value, 2)).join(", ")}`,
    });
    strips.push([canvas, vector]);
    return canvas;
  };
  const order = steps.weights
    .map((weight, key) => ({ weight, key }))
    .sort((a, b) => b.weight - a.weight);
  const most = order[0]?.weight || 1;

  const line = ({ weight, key }) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, shown(tokens[key].name), h("span", { class: "remark" }, ` ${key}`)),
      h("td", {}, strip(steps.keys[key], `key of token ${key}`)),
      h("td", { class: "number" }, number(steps.scores[key], 2)),
      h("td", { class: "number" }, number(steps.scaled[key], 2)),
      h(
        "td",
        { class: "number" },
        h(
          "span",
          { class: "weight", style: { "--share": `${(weight / most) * 100}%` } },
          number(weight, 4),
        ),
      ),
      h("td", {}, strip(steps.values[key], `value of token ${key}`)),
      h(
        "td",
        { class: "number vector" },
        vectorWords(steps.values[key].map((value) => value * weight)),
      ),
    );
  const body = h("tbody", {}, order.slice(0, FIRST_KEYS).map(line));
  const rest = order.slice(FIRST_KEYS);
  const restWeight = rest.reduce((sum, { weight }) => sum + weight, 0);
  const more = rest.length
    ? h(
        "button",
        {
          type: "button",
          class: "plain small",
          onclick: () => {
            body.append(...rest.map(line));
            more.remove();
            paint(strips);
          },
        },
        `Show the other ${rest.length === 1 ? "one" : `${rest.length} keys`} too: ${percent(restWeight)} of the weight`,
      )
    : null;

  element.replaceChildren(
    h(
      "p",
      { class: "label" },
      `Layer ${steps.layer} · head ${steps.head} · keys and values of KV head ${steps.kv_head} · query “${shown(query.name)}” (${steps.query})`,
    ),
    h(
      "ol",
      { class: "steps" },
      step(
        "The query",
        `What “${shown(query.name)}” asks for: ${steps.head_dim} numbers, its vector through this head's query matrix, turned by its position where the model does that.`,
        h(
          "div",
          { class: "wide" },
          strip(steps.q, "query"),
          h("p", { class: "number vector" }, "q = ", vectorWords(steps.q, 8)),
        ),
      ),
      step(
        "Scores",
        `Each earlier token has a key of the same length. Its score is q · k; divided by √d = √${steps.head_dim} = ${number(Math.sqrt(steps.head_dim), 3)}, so that long vectors do not decide alone.`,
        null,
      ),
      step(
        "Softmax",
        `The scores become weights that are positive and sum to ${number(
          steps.weights.reduce((sum, weight) => sum + weight, 0),
          3,
        )}.`,
        null,
      ),
      step(
        "Values",
        "Each token also has a value: what it hands over when it is looked at. Weight times value, added up, is what this head says.",
        null,
      ),
    ),
    h(
      "div",
      {
        class: "scroll",
        tabindex: "0",
        role: "region",
        "aria-label": "Keys, scores, weights and values",
      },
      h(
        "table",
        { class: "numbers" },
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            ...["token", "key k", "q · k", "/ √d", "softmax", "value v", "weight × v"].map((name) =>
              h("th", { scope: "col" }, name),
            ),
          ),
        ),
        body,
        h(
          "tfoot",
          {},
          h(
            "tr",
            {},
            h("th", { scope: "row", colspan: "5" }, "The head's output: the sum over all keys"),
            h("td", {}, strip(steps.output, "output")),
            h("td", { class: "number vector" }, vectorWords(steps.output)),
          ),
        ),
      ),
    ),
    ...(more ? [more] : []),
  );
  paint(strips);
}

const step = (title, words, content) =>
  h("li", {}, h("b", {}, `${title}. `), h("span", { class: "quiet" }, words), content);

const vectorWords = (vector, count = SHOWN_NUMBERS) =>
  `(${vector
    .slice(0, count)
    .map((value) => number(value, 2))
    .join(", ")}${vector.length > count ? ", …" : ""})`;

/** Vectors as strips of cells: ochre above zero, blue below, all on one scale. */
function paint(strips) {
  const [paper, above, below] = ["--map-paper", "--bar", "--map-ink"].map(colourOf);
  const most = Math.max(...strips.flatMap(([, vector]) => vector.map(Math.abs)), 1e-9);
  for (const [canvas, vector] of strips) {
    Object.assign(canvas, { width: vector.length, height: 1 });
    const context = canvas.getContext("2d");
    vector.forEach((value, i) => {
      context.fillStyle = mixed(
        paper,
        value >= 0 ? above : below,
        Math.sqrt(Math.abs(value) / most),
      );
      context.fillRect(i, 0, 1, 1);
    });
  }
}
