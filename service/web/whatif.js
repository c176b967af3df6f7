// The text as it is and with heads or glances switched off, side by side.

import { bar } from "./card.js";
import { h, number, percent, shown } from "./dom.js";

/** `answer` is of /explain with `ablate`; null: nothing was asked yet. */
export function drawWhatIf(element, { offHeads, offEdges, tokens, answer, problem, events }) {
  if (!offHeads.length && !offEdges.length) {
    element.replaceChildren(
      h(
        "p",
        { class: "quiet" },
        "Nothing is switched off. Switch the chosen head off with the button above its large map, any head with the dot in the corner of its small one; a click in the large map cuts one glance.",
      ),
    );
    return;
  }
  const chips = [
    ...offHeads.map((pair) =>
      chip(`layer ${pair[0]} · head ${pair[1]}`, () => events.toggleHead(pair)),
    ),
    ...offEdges.map((pair) =>
      chip(`“${name(tokens, pair[0])}” → “${name(tokens, pair[1])}”`, () =>
        events.toggleEdge(pair),
      ),
    ),
    h(
      "button",
      { type: "button", class: "plain small", onclick: events.switchAllOn },
      "Switch everything on",
    ),
  ];
  element.replaceChildren(
    h(
      "div",
      { class: "choices", role: "group", "aria-label": "Switched off" },
      h("span", { class: "label" }, "Switched off"),
      chips,
    ),
    problem
      ? h("p", { class: "notice", role: "alert" }, problem)
      : answer
        ? compared(answer)
        : h("p", { class: "quiet", role: "status" }, "The model is asked …"),
  );
}

const name = (tokens, position) => shown(tokens[position]?.name ?? "?");

const chip = (text, remove) =>
  h(
    "button",
    { type: "button", class: "chip", onclick: remove, "aria-label": `${text}: switch on again` },
    text,
    h("span", { "aria-hidden": "true" }, " ×"),
  );

function compared(answer) {
  const { next, ablated } = answer;
  const before = new Map(next.map((one) => [one.token_id, one.logprob]));
  const after = new Map(ablated.next.map((one) => [one.token_id, one.logprob]));
  for (const change of ablated.changes) {
    before.set(change.token_id, change.logprob);
    after.set(change.token_id, change.logprob_ablated);
  }
  const most = Math.exp(Math.max(next[0]?.logprob ?? -9, ablated.next[0]?.logprob ?? -9));
  return h(
    "div",
    {},
    h(
      "p",
      { class: "divergence" },
      h("b", {}, number(ablated.kl, ablated.kl < 0.01 ? 5 : 3)),
      h(
        "span",
        { class: "quiet" },
        " nats apart (Kullback–Leibler divergence of the next token's distribution, as it is from as it would be)",
      ),
    ),
    h(
      "div",
      { class: "pair" },
      side("As it is", next, after, most, answer.continuation),
      side("With these switched off", ablated.next, before, most, ablated.continuation, true),
    ),
  );
}

function side(title, candidates, other, most, continuation, isAblated = false) {
  return h(
    "section",
    { class: isAblated ? "ablated" : null },
    h("h3", {}, title),
    h("p", { class: "label" }, "The next token"),
    h(
      "ol",
      { class: "bars" },
      candidates.map((one) => {
        const probability = Math.exp(one.logprob);
        const elsewhere = other.has(one.token_id) ? Math.exp(other.get(one.token_id)) : null;
        return bar(shown(one.text), probability / most, percent(probability), {
          remark: isAblated ? trend(probability, elsewhere) : null,
        });
      }),
    ),
    continuation ? h("p", { class: "label" }, "It goes on, always with the likeliest") : null,
    continuation
      ? h("p", { class: "continuation" }, continuation.text.trimStart() || "(the text ends here)")
      : null,
  );
}

function trend(now, before) {
  if (before === null) return "new";
  const difference = (now - before) * 100;
  if (Math.abs(difference) < 0.05) return "=";
  return `${difference > 0 ? "▲" : "▼"} ${Math.abs(difference).toFixed(1)}`;
}
