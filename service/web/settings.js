// The sampling fields, and what they say in one line.

import { byId, h } from "./dom.js";
import { PARAMETERS } from "./state.js";

/** Make the fields; `changed(name, value)` is told of each change, with "seed" among the names. */
export function makeFields(element, changed) {
  for (const [name, one] of Object.entries(PARAMETERS)) {
    const input = h("input", {
      type: "number",
      id: `field-${name}`,
      inputmode: "decimal",
      min: one.min,
      max: one.max,
      step: one.step,
      oninput: (event) => {
        if (event.target.value.trim() === "" || !event.target.validity.valid)
          return event.target.setAttribute("aria-invalid", "true");
        event.target.removeAttribute("aria-invalid");
        changed(name, Number(event.target.value));
      },
    });
    element.append(field(name, one.label, input, one.hint));
  }
  const seed = h("input", {
    type: "text",
    id: "field-seed",
    inputmode: "numeric",
    pattern: "\\d{0,19}",
    placeholder: "drawn by the server",
    oninput: (event) => {
      if (!event.target.validity.valid) return event.target.setAttribute("aria-invalid", "true");
      event.target.removeAttribute("aria-invalid");
      changed("seed", event.target.value.trim());
    },
  });
  element.append(field("seed", "Seed", seed, "empty: a new one each time"));
  element.append(h("div", { class: "field drawn", id: "drawn", hidden: true }));
}

function field(name, label, input, hint) {
  return h(
    "div",
    { class: "field" },
    h("label", { for: input.id }, label),
    input,
    h("span", { class: "remark", id: `hint-${name}` }, hint ?? ""),
  );
}

/** Put a state's values into the fields, and the line that sums them up. */
export function showFields(state, limits) {
  for (const name of Object.keys(PARAMETERS)) {
    const input = byId(`field-${name}`);
    if (document.activeElement !== input) input.value = state.parameters[name];
  }
  const seed = byId("field-seed");
  if (document.activeElement !== seed) seed.value = state.seed;
  if (limits) {
    byId("field-max_tokens").max = limits.context_length;
    byId("field-top_k").max = limits.vocab_size;
  }
  const words = Object.entries(PARAMETERS)
    .filter(
      ([name, one]) =>
        ["temperature", "max_tokens"].includes(name) || state.parameters[name] !== one.initial,
    )
    .map(([name, one]) => `${one.label.toLowerCase()} ${state.parameters[name]}`);
  if (state.seed) words.push(`seed ${state.seed}`);
  else words.push(state.drawn ? `seed ${state.drawn}, drawn by the server` : "a new seed each time");
  byId("settings-now").textContent = words.join(" · ");
}

/** Tell the seed that the server drew, and offer to keep it. */
export function showDrawn(drawn, keep) {
  const element = byId("drawn");
  element.hidden = !drawn;
  if (!drawn) return;
  element.replaceChildren(
    h("span", { class: "remark" }, "drawn last: "),
    h("output", { id: "drawn-seed" }, drawn),
    " ",
    h("button", { type: "button", class: "plain small", onclick: () => keep(drawn) }, "Keep it"),
  );
}

/** Mark the field that the server did not like; none when `name` is none of them. */
export function markField(name) {
  for (const input of document.querySelectorAll("#fields input, #prompt"))
    input.removeAttribute("aria-invalid");
  const input = name === "prompt" ? byId("prompt") : byId(`field-${name}`);
  if (!input) return;
  input.setAttribute("aria-invalid", "true");
  if (name !== "prompt") byId("settings").open = true;
}
