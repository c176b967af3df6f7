// Arcs over the text, from a token to those it looked at most: the heavier the weight, the thicker
// and the darker. They say nothing that the card does not say, and are hidden from screen readers.

import { strength } from "./colours.js";

const NAMESPACE = "http://www.w3.org/2000/svg";
const MAX_ARCS = 6;
const LEAST_SHARE = 0.03; // of the strongest; what is less would be a hair
const LINE_GAP = 6; // pixels: less between two tops is the same line
const MAX_RISE = 26; // pixels
const DESCENT = 0.3; // of the type size: below the letters there is room in the line above

export class Arcs {
  #svg;
  #list;
  #drawn = null;

  /** `svg` lies over `list`, whose tokens move when the page gets wider or a font comes. */
  constructor(svg, list) {
    this.#svg = svg;
    this.#list = list;
    new ResizeObserver(() => this.#draw()).observe(list);
  }

  /** Arcs from `query` to the strongest of `rows`, [{position, weight}]; `boxOf(position)` is where a
   * token's ink stands in the window. Null rows: none. */
  show(rows, query, boxOf) {
    this.#drawn = rows?.length ? { rows, query, boxOf } : null;
    this.#draw();
  }

  #draw() {
    this.#svg.replaceChildren();
    if (!this.#drawn) return;
    const { rows, query, boxOf } = this.#drawn;
    const from = boxOf(query);
    if (!from) return;
    const origin = this.#svg.getBoundingClientRect();
    const most = Math.max(...rows.map(({ weight }) => weight));
    const rise = this.#rise(from, boxOf(0));
    const kept = rows.filter(({ weight }) => weight >= most * LEAST_SHARE).slice(0, MAX_ARCS);
    for (const { position, weight } of kept.reverse()) {
      const to = boxOf(position); // the weakest first: the strongest lies on top
      if (!to) continue;
      const share = strength(weight / most);
      const { path, end } = curve(from, to, { origin, rise, isSelf: position === query });
      const arc = element("g", { class: "arc", "data-key": position, opacity: 0.25 + 0.75 * share });
      arc.append(
        element("path", { d: path, "stroke-width": (0.75 + 3.25 * share).toFixed(2) }),
        element("circle", { cx: end.x, cy: end.y, r: (1.5 + 2 * share).toFixed(2) }),
      );
      this.#svg.append(arc);
    }
  }

  /** How high an arc within a line may be: over a line it would strike its letters through. */
  #rise(from, first) {
    if (from.top - first.top < LINE_GAP) return MAX_RISE;
    const style = getComputedStyle(this.#list);
    const gap = parseFloat(style.lineHeight) - from.height;
    return Math.min(gap + parseFloat(style.fontSize) * DESCENT, MAX_RISE);
  }
}

/** From above a token to above another in its line, or to below one in a line before. */
function curve(from, to, { origin, rise, isSelf }) {
  const start = { x: middle(from) - origin.left, y: from.top - origin.top };
  const end = { x: middle(to) - origin.left, y: to.top - origin.top };
  if (isSelf) {
    const [left, right, top] = [start.x - 6, start.x + 6, start.y - Math.min(rise, 14) * 1.33];
    end.x = right;
    return { end, path: `M ${left} ${start.y} C ${left - 4} ${top} ${right + 4} ${top} ${right} ${end.y}` };
  }
  if (Math.abs(start.y - end.y) < LINE_GAP) {
    // Near ones low, far ones high, so that they can be told apart.
    const top = start.y - Math.min(rise, (rise * (70 + Math.abs(start.x - end.x))) / 320) * 1.33;
    const lean = (end.x - start.x) / 4;
    return {
      end,
      path: `M ${start.x} ${start.y} C ${start.x + lean} ${top} ${end.x - lean} ${top} ${end.x} ${end.y}`,
    };
  }
  const isUpwards = end.y < start.y;
  if (isUpwards) end.y = to.bottom - origin.top;
  else start.y = from.bottom - origin.top;
  const bend = Math.max(Math.abs(end.y - start.y) / 2, 14) * (isUpwards ? 1 : -1);
  return {
    end,
    path: `M ${start.x} ${start.y} C ${start.x} ${start.y - bend} ${end.x} ${end.y + bend} ${end.x} ${end.y}`,
  };
}

const middle = (box) => (box.left + box.right) / 2;

function element(tag, attributes) {
  const made = document.createElementNS(NAMESPACE, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}
