// What stands around the exhibit: the theme button, the key dialog, the examples, the model's name.

import { byId, h, number } from "./dom.js";
import { EXAMPLES } from "./examples.js";

const THEMES = ["auto", "light", "dark"];

/** The button that changes the colours; `changed()` after each change, the system's too. */
export function setUpTheme(changed) {
  const button = byId("theme");
  const root = document.documentElement;
  const show = () => {
    const now = root.dataset.theme ?? "auto";
    button.textContent = { auto: "Auto", light: "Light", dark: "Dark" }[now];
    button.setAttribute(
      "aria-label",
      `Colours: ${now === "auto" ? "as the system has them" : now}`,
    );
  };
  button.addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(root.dataset.theme ?? "auto") + 1) % THEMES.length];
    if (next === "auto") delete root.dataset.theme;
    else root.dataset.theme = next;
    localStorage.setItem("vitrine-theme", next);
    show();
    changed();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
  show();
}

/** Ask for an API key; resolves to it, or to null. */
export function askForKey(words) {
  const dialog = byId("key-dialog");
  byId("key-said").textContent = words;
  byId("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener(
      "close",
      () => resolve(dialog.returnValue === "ok" ? byId("key").value.trim() || null : null),
      { once: true },
    );
  });
}

/** `choose(example)` when one is clicked. */
export function drawExamples(choose) {
  const made = EXAMPLES.map((example) =>
    h(
      "button",
      { type: "button", class: "chip", onclick: () => choose(example) },
      example.look ? example.text : `${example.text} …`,
    ),
  );
  byId("examples").replaceChildren(h("span", { class: "label" }, "Or one of these"), ...made);
}

/** The model in one line, and the version. */
export function showModel(info) {
  const parameters =
    info.parameters >= 1e9
      ? `${number(info.parameters / 1e9, 1)} B`
      : `${number(info.parameters / 1e6, 1)} M`;
  byId("model").textContent =
    `${info.model} · ${parameters} parameters · ${info.num_layers} layers of ${info.num_heads} heads · ${info.dtype} on ${info.device}`;
  byId("version").textContent =
    `Vitrine ${info.versions.vitrine} · context ${info.context_length} tokens`;
  document.title = `Vitrine · ${info.model}`;
}

/** Buttons of which one is pressed: [{name, value, isOff}]. Drawn anew, the same one has the focus. */
export function choices(element, label, options, chosen, choose) {
  const focused = [...element.children].indexOf(document.activeElement);
  element.replaceChildren(
    h("span", { class: "label" }, label),
    ...options.map(({ name, value, isOff = false }) =>
      h(
        "button",
        {
          type: "button",
          class: "choice",
          "aria-pressed": String(value === chosen),
          disabled: isOff,
          onclick: () => choose(value),
        },
        name,
      ),
    ),
  );
  if (focused >= 0) element.children[focused]?.focus();
}
