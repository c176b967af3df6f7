// The text as tokens: each in the shade of its probability, or, while one is looked at, of the
// attention that goes to it. One list for screen readers and keys: arrows move, Enter keeps.

import { PROBABILITY_STEPS, shadeOf, strength } from "./colours.js";
import { h, percent, shown } from "./dom.js";

// Where the card lies over the text (text.css), it would come between the pointer and a token that is
// pointed at, go away for that, and come again.
const isUnderCard = window.matchMedia("(max-width: 60rem)");

export class TokenView {
  #list;
  #events;
  #tokens = [];
  #active = null; // pointed at or stepped to
  #chosen = null; // kept
  #elements = [];

  /** `events.point(position | null)` is told what is looked at, `events.choose(position | null)` what is kept. */
  constructor(list, events) {
    this.#list = list;
    this.#events = events;
    list.addEventListener("pointerover", (event) => this.#pointed(event, true));
    list.addEventListener("pointerleave", () => this.#setActive(null));
    list.addEventListener("click", (event) => this.#clicked(event));
    list.addEventListener("keydown", (event) => this.#key(event));
    list.addEventListener("focus", () => {
      if (this.#active === null && list.matches(":focus-visible"))
        this.#setActive(this.#chosen ?? this.#firstNew());
    });
    list.addEventListener("blur", () => this.#setActive(null));
  }

  /** Show these tokens from `from` on; what stands before stays. */
  show(tokens, from = 0) {
    this.#tokens = tokens;
    for (const element of this.#elements.splice(from)) element.remove();
    for (let position = from; position < tokens.length; position += 1) this.#append(position);
  }

  /** Keep a token chosen, or none. */
  choose(position) {
    this.#chosen = position !== null && position < this.#tokens.length ? position : null;
    this.#elements.forEach((element, i) =>
      element.setAttribute("aria-selected", String(i === this.#chosen)),
    );
  }

  /** Shade by attention: `weights[key]` for the row of `query`; null: by probability again. */
  shade(weights, query = null) {
    const strongest = weights ? Math.max(...weights, 1e-9) : 1;
    this.#list.closest(".exhibit").classList.toggle("attention", Boolean(weights));
    this.#elements.forEach((element, i) => {
      element.classList.toggle("query", Boolean(weights) && i === query);
      element.style.setProperty(
        "--weight",
        weights ? `${(strength((weights[i] ?? 0) / strongest) * 100).toFixed(1)}%` : "0%",
      );
    });
  }

  /** Where a token stands in the window; null when there is none. */
  boxOf(position) {
    return this.#elements[position]?.getBoundingClientRect() ?? null;
  }

  /** Where its ink stands, and of a token that is broken over two lines the beginning. */
  inkOf(position) {
    return this.#elements[position]?.querySelector(".ink").getClientRects()[0] ?? null;
  }

  #append(position) {
    const token = this.#tokens[position];
    const element = h(
      "span",
      {
        role: "option",
        id: `token-${position}`,
        class: classOf(token),
        "aria-selected": "false",
        "aria-label": labelOf(token),
        "data-position": position,
      },
      ...inkOf(token),
    );
    if (position === this.#chosen) element.setAttribute("aria-selected", "true");
    if (position === this.#active) element.classList.add("active");
    this.#elements.push(element);
    this.#list.append(element);
  }

  #pointed(event) {
    if (event.pointerType === "touch" || isUnderCard.matches) return; // a click chooses
    const position = positionOf(event.target);
    if (position !== null) this.#setActive(position);
  }

  #clicked(event) {
    const position = positionOf(event.target);
    if (position === null) return;
    this.#events.choose(position === this.#chosen ? null : position);
  }

  #key(event) {
    const last = this.#tokens.length - 1;
    if (last < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    const at = this.#active ?? this.#chosen ?? 0;
    const target = {
      ArrowRight: Math.min(at + 1, last),
      ArrowLeft: Math.max(at - 1, 0),
      ArrowDown: this.#vertical(at, 1),
      ArrowUp: this.#vertical(at, -1),
      Home: 0,
      End: last,
    }[event.key];
    if (target !== undefined) this.#setActive(target);
    else if (event.key === "Enter" || event.key === " ")
      this.#events.choose(at === this.#chosen ? null : at);
    else return;
    event.preventDefault();
  }

  /** The nearest token a line below or above. */
  #vertical(at, direction) {
    const here = this.#elements[at].getBoundingClientRect();
    let best = at;
    let bestDistance = Infinity;
    this.#elements.forEach((element, i) => {
      const there = element.getBoundingClientRect();
      const lines = direction * (there.top - here.top);
      if (lines < 4) return;
      const distance = lines * 100 + Math.abs(there.left - here.left);
      if (distance < bestDistance) [best, bestDistance] = [i, distance];
    });
    return best;
  }

  #setActive(position) {
    if (position === this.#active) return;
    if (this.#active !== null) this.#elements[this.#active]?.classList.remove("active");
    this.#active = position;
    if (position === null) this.#list.removeAttribute("aria-activedescendant");
    else {
      const element = this.#elements[position];
      element.classList.add("active");
      this.#list.setAttribute("aria-activedescendant", element.id);
      if (this.#list.matches(":focus-visible")) element.scrollIntoView({ block: "nearest" });
    }
    this.#events.point(position);
  }

  #firstNew() {
    const first = this.#tokens.findIndex((token) => !token.isPrompt);
    return first >= 0 ? first : this.#tokens.length ? 0 : null;
  }
}

/** A token's text, its spaces outside of what is shaded: they would stick out at the ends of lines. */
function inkOf(token) {
  const text = token.text === "" && token.isSpecial ? shown(token.name) : token.text;
  const [, before, word] = /^(\s*)([^]*)$/.exec(text);
  return word ? [before, h("span", { class: "ink" }, word)] : [h("span", { class: "ink" }, text)];
}

function positionOf(target) {
  const element = target.closest?.("[data-position]");
  return element ? Number(element.dataset.position) : null;
}

function classOf(token) {
  const classes = ["token", token.isPrompt ? "given" : "new"];
  if (token.logprob !== null && token.logprob !== undefined)
    classes.push(`shade-${shadeOf(Math.exp(token.logprob))}`);
  if (token.isSpecial) classes.push("special");
  return classes.join(" ");
}

function labelOf(token) {
  const chance =
    token.logprob === null || token.logprob === undefined
      ? ""
      : `, ${percent(Math.exp(token.logprob))}`;
  return `${shown(token.name)}${token.isPrompt ? ", given" : ""}${chance}`;
}

/** The key to the shades. */
export function drawLegend(element) {
  const steps = [
    ...PROBABILITY_STEPS.map((bound) => `≥ ${bound * 100} %`),
    `< ${PROBABILITY_STEPS.at(-1) * 100} %`,
  ];
  element.replaceChildren(
    h(
      "span",
      { class: "legend-probability" },
      h("span", { class: "quiet" }, "How likely it was "),
      ...steps.map((text, i) =>
        h("span", { class: `token new shade-${i}` }, h("span", { class: "ink" }, text)),
      ),
    ),
    h(
      "span",
      { class: "legend-attention" },
      h("span", { class: "quiet" }, "Attention, none to most "),
      h("span", { class: "ramp" }),
      h("span", { class: "quiet" }, " from "),
      h("span", { class: "token query" }, h("span", { class: "ink" }, "here")),
    ),
  );
}
