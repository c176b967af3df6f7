// Every head of every layer as a small map. Choose one to see it large; switch any of them off.

import { colourOf, mixed, strength } from "./colours.js";
import { h, number } from "./dom.js";
import { includesPair } from "./state.js";

const PIXELS = 64;

export class HeadGrid {
  #element;
  #events;
  #attention = null;
  #cells = new Map(); // "layer.head" -> {button, off, canvas}

  /** `events.choose([layer, head] | null)`, `events.toggle([layer, head])`. */
  constructor(element, events) {
    this.#element = element;
    this.#events = events;
    element.addEventListener("keydown", (event) => this.#key(event));
  }

  /** Draw all maps anew. `entropy[layer][head]` in nats. */
  draw(attention, entropy) {
    this.#attention = attention;
    this.#cells.clear();
    const table = h("div", { class: "grid-table", style: { "--columns": attention.heads.length } });
    table.append(
      h("span", { class: "grid-corner" }),
      ...attention.heads.map((head) => h("span", { class: "grid-name" }, head)),
    );
    attention.layers.forEach((layer, i) => {
      table.append(h("span", { class: "grid-name" }, layer));
      attention.heads.forEach((head, j) => table.append(this.#cell(layer, head, entropy[i][j])));
    });
    this.#element.replaceChildren(
      h(
        "div",
        { class: "grid-head" },
        h("p", { class: "label" }, "Heads across, layers down"),
        h(
          "button",
          {
            type: "button",
            class: "plain small",
            id: "all-heads",
            onclick: () => this.#events.choose(null),
          },
          "Mean of all heads",
        ),
      ),
      table,
    );
    this.repaint();
  }

  /** Show which head is chosen and which are off. */
  mark(chosen, off) {
    for (const [name, cell] of this.#cells) {
      const isChosen = Boolean(chosen) && chosen.join(".") === name;
      const isOff = includesPair(off, name.split(".").map(Number));
      cell.button.setAttribute("aria-pressed", String(isChosen));
      cell.off.setAttribute("aria-pressed", String(isOff));
      cell.box.classList.toggle("is-off", isOff);
      cell.box.classList.toggle("is-chosen", isChosen);
    }
    document.getElementById("all-heads")?.setAttribute("aria-pressed", String(!chosen));
  }

  /** Paint the maps again, as when the colours change. */
  repaint() {
    if (!this.#attention) return;
    const [paper, blue] = [colourOf("--map-paper"), colourOf("--map-ink")];
    for (const [name, { canvas }] of this.#cells)
      paintMap(canvas, this.#attention, name.split(".").map(Number), paper, blue);
  }

  #cell(layer, head, entropy) {
    const canvas = h("canvas", { width: PIXELS, height: PIXELS, "aria-hidden": "true" });
    const name = `layer ${layer}, head ${head}`;
    const button = h(
      "button",
      {
        type: "button",
        class: "map",
        "aria-pressed": "false",
        "aria-label": `${name}, entropy ${number(entropy, 2)} nats`,
        title: `${name} · entropy ${number(entropy, 2)} nats`,
        onclick: () => this.#events.choose([layer, head]),
      },
      canvas,
    );
    const off = h("button", {
      type: "button",
      class: "off",
      "aria-pressed": "false",
      "aria-label": `Switch off ${name}`,
      title: `Switch off ${name}`,
      onclick: () => this.#events.toggle([layer, head]),
    });
    const box = h("div", { class: "grid-cell", "data-head": `${layer}.${head}` }, button, off);
    this.#cells.set(`${layer}.${head}`, { button, off, canvas, box });
    return box;
  }

  /** Arrow keys go from map to map, x switches one off. */
  #key(event) {
    const box = event.target.closest?.("[data-head]");
    if (!box || event.ctrlKey || event.metaKey || event.altKey) return;
    const [layer, head] = box.dataset.head.split(".").map(Number);
    const { layers, heads } = this.#attention;
    const [i, j] = [layers.indexOf(layer), heads.indexOf(head)];
    const target = {
      ArrowRight: [i, j + 1],
      ArrowLeft: [i, j - 1],
      ArrowDown: [i + 1, j],
      ArrowUp: [i - 1, j],
    }[event.key];
    if (target) this.#cells.get(`${layers[target[0]]}.${heads[target[1]]}`)?.button.focus();
    else if (event.key === "x") this.#events.toggle([layer, head]);
    else return;
    event.preventDefault();
  }
}

/** One head's triangle on a small canvas. */
function paintMap(canvas, attention, head, paper, ink) {
  const context = canvas.getContext("2d");
  const { width, height } = canvas;
  context.fillStyle = mixed(paper, ink, 0);
  context.fillRect(0, 0, width, height);
  const size = width / attention.numTokens;
  for (let query = 0; query < attention.numTokens; query += 1) {
    const row = attention.row(head, query);
    for (let key = 0; key <= query; key += 1) {
      if (row[key] < 0.01) continue;
      context.fillStyle = mixed(paper, ink, strength(row[key]));
      context.fillRect(key * size, query * size, Math.max(size, 1), Math.max(size, 1));
    }
  }
}
