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
      oninput: ({ target }) => {
        markInput(target);
        if (isReadable(target)) changed(name, Number(target.value));
      },
    });
    element.append(field(name, one.label, input, one.hint));
  }
  const seed = h("input", {
    type: "text",
    id: "field-seed",
    inputmode: "numeric",
    pattern: "\\d{0,19}",
    placeholder: "a new one each time",
    oninput: ({ target }) => {
      markInput(target);
      if (isReadable(target)) changed("seed", target.value);
    },
  });
  const box = field("seed", "Seed", seed, null);
  box.classList.add("wide");
  box.lastElementChild.replaceWith(h("p", { class: "remark", id: "drawn" }));
  element.append(box);
}

/** The first field whose content is no number, by its name; null when all can be sent. */
export function unreadableField() {
  const found = [...document.querySelectorAll("#fields input")].find((input) => !isReadable(input));
  return found ? found.id.replace("field-", "") : null;
}

/** Numbers out of bounds are readable: the server says what it thinks of them. */
const isReadable = (input) =>
  input.type === "number" ? input.value.trim() !== "" : input.validity.valid;

function markInput(input) {
  if (isReadable(input) && input.validity.valid) input.removeAttribute("aria-invalid");
  else input.setAttribute("aria-invalid", "true");
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
  else
    words.push(state.drawn ? `seed ${state.drawn}, drawn by the server` : "a new seed each time");
  byId("settings-now").textContent = words.join(" · ");
}

/** Tell the seed that the server drew, and offer to keep it. */
export function showDrawn(drawn, keep) {
  const words = drawn
    ? [
        "last drawn: ",
        h("output", { id: "drawn-seed" }, drawn),
        h(
          "button",
          { type: "button", class: "plain small", onclick: () => keep(drawn) },
          "Keep it",
        ),
      ]
    : ["empty: the server draws one, and says it"];
  byId("drawn").replaceChildren(...words);
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
