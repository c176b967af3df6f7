// The label beside the text, as in a museum: one token, its chances, its rivals, what was looked at.

import { h, number, percent, shown } from "./dom.js";

const MAX_ATTENDED = 8;

/**
 * Draw the card of a token, or what to do when there is none.
 *
 * `attended` is {title, rows: [{position, weight}]} or null, `tokens` the whole text's, `alternatives`
 * the likeliest tokens at its place, or null where they are not known.
 */
export function drawCard(
  element,
  { token, position, tokens, alternatives, attended, isChosen, unchoose },
) {
  if (!token) {
    element.replaceChildren(h("p", { class: "quiet" }, "Nothing is looked at yet."));
    element.classList.add("empty");
    return;
  }
  element.classList.remove("empty");
  const known = token.logprob !== null && token.logprob !== undefined;
  element.replaceChildren(
    ...[
      h(
        "header",
        {},
        h(
          "p",
          { class: "label" },
          `${token.isPrompt ? "Given" : "Drawn"} · token ${position} · id ${token.id}`,
        ),
        h("p", { class: "exhibit-name" }, shown(token.name)),
        known
          ? h(
              "p",
              {},
              h("b", {}, percent(Math.exp(token.logprob))),
              h(
                "span",
                { class: "quiet" },
                ` likely${token.rank ? `, ${ordinal(token.rank)} choice` : ""}, log-probability ${number(token.logprob, 2)}`,
              ),
            )
          : h(
              "p",
              { class: "quiet" },
              position === 0
                ? "The first one: nothing came before it."
                : "How likely it was is not known yet.",
            ),
        isChosen
          ? h("button", { type: "button", class: "plain small", onclick: unchoose }, "Let go")
          : null,
      ),
      alternatives ? section("In its place", bars(alternatives, token.id)) : null,
      attended?.rows.length
        ? section(attended.title, attendedBars(attended.rows.slice(0, MAX_ATTENDED), tokens))
        : null,
    ].filter(Boolean),
  );
}

const section = (title, content) => h("section", {}, h("h3", { class: "label" }, title), content);

/** Candidates as bars; `chosenId` is marked. */
export function bars(candidates, chosenId = null) {
  const most = Math.max(...candidates.map((one) => Math.exp(one.logprob)), 1e-9);
  return h(
    "ol",
    { class: "bars" },
    candidates.map((one) => {
      const probability = Math.exp(one.logprob);
      return bar(shown(one.text), probability / most, percent(probability), {
        isMarked: one.token_id === chosenId,
      });
    }),
  );
}

function attendedBars(rows, tokens) {
  const most = Math.max(...rows.map((row) => row.weight), 1e-9);
  return h(
    "ol",
    { class: "bars blue" },
    rows.map((row) =>
      bar(shown(tokens[row.position]?.name ?? "?"), row.weight / most, percent(row.weight), {
        remark: row.position,
      }),
    ),
  );
}

/** One line: a name, a bar, a number. */
export function bar(name, share, value, { isMarked = false, remark = null, kind = "" } = {}) {
  return h(
    "li",
    { class: `${isMarked ? "marked" : ""} ${kind}`.trim() || null },
    h(
      "span",
      { class: "bar-name" },
      name,
      remark === null ? null : h("span", { class: "remark" }, ` ${remark}`),
    ),
    h(
      "span",
      { class: "bar-track" },
      h("span", { class: "bar-fill", style: { width: `${Math.max(share * 100, 0.5)}%` } }),
    ),
    h("span", { class: "bar-value" }, value),
  );
}

function ordinal(rank) {
  const tail =
    rank % 100 > 10 && rank % 100 < 14 ? "th" : ({ 1: "st", 2: "nd", 3: "rd" }[rank % 10] ?? "th");
  return `${rank}${tail}`;
}
