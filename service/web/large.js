// One head's attention, large: rows look, columns are looked at. Point to read a weight, click to
// cut that glance in every layer and head and see below what the model makes of it.

import { colourOf, mixed, strength } from "./colours.js";
import { h, percent, shown } from "./dom.js";
import { includesPair } from "./state.js";

const MAX_NAMED = 48; // tokens; more names than that could not be read

export class LargeMap {
  #element;
  #events;
  #canvas = h("canvas", {
    tabindex: "0",
    role: "application",
    "aria-roledescription": "attention map",
    "aria-describedby": "large-said",
  });
  #said = h("p", { id: "large-said", class: "large-said", role: "status" });
  #title = h("p", { class: "label" });
  #off = h("button", { type: "button", class: "small", onclick: () => this.#events.toggleHead() });
  #view = null; // {attention, head, tokens, query, offEdges}
  #at = null; // [query, key]
  #layout = null;

  /** `events.toggleEdge([query, key])`, `events.toggleHead()`, `events.chooseQuery(query)`. */
  constructor(element, events) {
    this.#element = element;
    this.#events = events;
    element.append(
      h("div", { class: "grid-head" }, this.#title, this.#off),
      h("div", { class: "large-frame" }, this.#canvas),
      this.#said,
    );
    this.#canvas.addEventListener("pointermove", (event) => this.#move(this.#cellAt(event)));
    this.#canvas.addEventListener("pointerleave", () => this.#move(null));
    this.#canvas.addEventListener("click", (event) => this.#click(event));
    this.#canvas.addEventListener("keydown", (event) => this.#key(event));
    this.#canvas.addEventListener("blur", () => this.#move(null));
    new ResizeObserver(() => this.repaint()).observe(element);
  }

  draw(view) {
    this.#view = view;
    if (this.#at && this.#at[0] >= view.attention.numTokens) this.#at = null;
    this.#title.textContent = view.head
      ? `Layer ${view.head[0]} · head ${view.head[1]}`
      : "The mean of all heads and layers";
    this.#canvas.setAttribute(
      "aria-label",
      `Attention map: ${this.#title.textContent}. Arrow keys move, Enter cuts a glance or restores it.`,
    );
    this.#off.hidden = !view.head;
    this.#off.textContent = view.isOff ? "Switch this head on again" : "Switch this head off";
    this.repaint();
    this.#say();
  }

  repaint() {
    if (!this.#view || !this.#element.clientWidth) return;
    const { attention, head, query: chosen, offEdges } = this.#view;
    const layout = this.#measure();
    const context = this.#canvas.getContext("2d");
    context.setTransform(layout.scale, 0, 0, layout.scale, 0, 0);
    const [paper, ink, quiet, text, red] = [
      "--map-paper",
      "--map-ink",
      "--quiet",
      "--ink",
      "--cut",
    ].map(colourOf);
    const css = (colour) => `rgb(${colour.join(" ")})`;
    context.clearRect(0, 0, layout.width, layout.height);
    const { left, top, cell } = layout;
    for (let query = 0; query < attention.numTokens; query += 1) {
      const row = attention.row(head, query) ?? [];
      for (let key = 0; key <= query; key += 1) {
        context.fillStyle = mixed(paper, ink, strength(row[key] ?? 0));
        const gap = cell > 8 ? 1 : 0;
        context.fillRect(left + key * cell, top + query * cell, cell - gap, cell - gap);
      }
    }
    context.strokeStyle = css(red);
    context.lineWidth = 2;
    for (const [query, key] of offEdges) {
      const [x, y] = [left + key * cell, top + query * cell];
      context.beginPath();
      context.moveTo(x, y);
      context.lineTo(x + cell, y + cell);
      context.moveTo(x + cell, y);
      context.lineTo(x, y + cell);
      context.stroke();
    }
    if (chosen !== null && chosen < attention.numTokens) {
      context.strokeStyle = css(text);
      context.lineWidth = 1.5;
      context.strokeRect(left - 0.5, top + chosen * cell - 0.5, (chosen + 1) * cell, cell);
    }
    if (this.#at) {
      context.strokeStyle = css(text);
      context.lineWidth = 2;
      context.strokeRect(
        left + this.#at[1] * cell - 1,
        top + this.#at[0] * cell - 1,
        cell + 1,
        cell + 1,
      );
    }
    if (layout.isNamed) this.#names(context, layout, css(text), css(quiet));
  }

  /** Sizes in CSS pixels: as large as the room allows, cells of a whole number of device pixels. */
  #measure() {
    const { attention } = this.#view;
    const scale = window.devicePixelRatio || 1;
    const room = Math.min(this.#element.clientWidth, 620);
    const isNamed = attention.numTokens <= MAX_NAMED && room / attention.numTokens > 9;
    const margin = isNamed ? Math.min(92, room * 0.24) : 2;
    const cell =
      Math.max(Math.floor(((room - margin - 2) * scale) / attention.numTokens), 1) / scale;
    const side = cell * attention.numTokens;
    const layout = {
      scale,
      left: margin,
      top: margin,
      cell,
      isNamed,
      width: margin + side + 2,
      height: margin + side + 2,
    };
    const [width, height] = [Math.round(layout.width * scale), Math.round(layout.height * scale)];
    if (this.#canvas.width !== width || this.#canvas.height !== height) {
      Object.assign(this.#canvas, { width, height });
      Object.assign(this.#canvas.style, {
        width: `${layout.width}px`,
        height: `${layout.height}px`,
      });
    }
    this.#layout = layout;
    return layout;
  }

  #names(context, { left, top, cell }, ink, quiet) {
    const { tokens, attention, query: chosen } = this.#view;
    const size = Math.min(13, Math.max(8, cell * 0.85));
    context.font = `${size}px "Source Serif 4", serif`;
    context.textBaseline = "middle";
    const room = left - 8;
    for (let i = 0; i < attention.numTokens; i += 1) {
      const name = fitted(context, shown(tokens[i].name), room);
      context.fillStyle = i === (this.#at?.[0] ?? chosen) ? ink : quiet;
      context.textAlign = "right";
      context.fillText(name, left - 6, top + (i + 0.5) * cell);
      context.fillStyle = i === this.#at?.[1] ? ink : quiet;
      context.save();
      context.translate(left + (i + 0.5) * cell, top - 6);
      context.rotate(-Math.PI / 2);
      context.textAlign = "left";
      context.fillText(name, 0, 0);
      context.restore();
    }
  }

  #cellAt(event) {
    if (!this.#layout) return null;
    const box = this.#canvas.getBoundingClientRect();
    const { left, top, cell } = this.#layout;
    const key = Math.floor((event.clientX - box.left - left) / cell);
    const query = Math.floor((event.clientY - box.top - top) / cell);
    const { numTokens } = this.#view.attention;
    return query >= 0 && query < numTokens && key >= 0 && key <= query ? [query, key] : null;
  }

  #click(event) {
    const cell = this.#cellAt(event);
    if (cell) {
      this.#at = cell;
      this.#events.toggleEdge(cell);
      return;
    }
    const box = this.#canvas.getBoundingClientRect();
    const query = Math.floor((event.clientY - box.top - this.#layout.top) / this.#layout.cell);
    if (query >= 0 && query < this.#view.attention.numTokens) this.#events.chooseQuery(query);
  }

  #key(event) {
    if (!this.#view || event.ctrlKey || event.metaKey || event.altKey) return;
    const [query, key] = this.#at ?? [this.#view.query ?? this.#view.attention.numTokens - 1, 0];
    const last = this.#view.attention.numTokens - 1;
    const target = {
      ArrowRight: [query, Math.min(key + 1, query)],
      ArrowLeft: [query, Math.max(key - 1, 0)],
      ArrowDown: [Math.min(query + 1, last), key],
      ArrowUp: [Math.max(query - 1, 0), Math.min(key, Math.max(query - 1, 0))],
    }[event.key];
    if (target) this.#move(target);
    else if ((event.key === "Enter" || event.key === " ") && this.#at)
      this.#events.toggleEdge(this.#at);
    else return;
    event.preventDefault();
  }

  #move(cell) {
    if (String(cell) === String(this.#at)) return;
    this.#at = cell;
    this.repaint();
    this.#say();
  }

  #say() {
    if (!this.#view) return;
    if (!this.#at) {
      this.#said.textContent =
        "Rows look, columns are looked at. Click a cell to cut that glance in every layer and head; click a row's name to choose it.";
      return;
    }
    const { attention, head, tokens, offEdges } = this.#view;
    const [query, key] = this.#at;
    const weight = attention.row(head, query)?.[key] ?? 0;
    const { head: most, weight: strongest } = attention.strongestHead(query, key);
    const elsewhere = `; most of all in layer ${most[0]} · head ${most[1]}, ${percent(strongest)}`;
    const cut = includesPair(offEdges, this.#at) ? "; cut, a click restores it" : "";
    this.#said.textContent = `“${shown(tokens[query].name)}” (${query}) gives “${shown(tokens[key].name)}” (${key}) ${percent(weight)} of its attention${elsewhere}${cut}`;
  }
}

function fitted(context, text, room) {
  if (context.measureText(text).width <= room) return text;
  let cut = text;
  while (cut.length > 1 && context.measureText(`${cut}…`).width > room) cut = cut.slice(0, -1);
  return `${cut}…`;
}
