// Small helpers to make elements. Text is always set as text, never as HTML.

/** An element: `h("p", {class: "quiet", onclick: f, "aria-label": "x"}, "text", child)`. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style")
      for (const [key, one] of Object.entries(value)) element.style.setProperty(key, one);
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(
    ...children.flat().filter((child) => child !== null && child !== undefined && child !== false),
  );
  return element;
}

export const byId = (id) => document.getElementById(id);

/** A token's text as a label: spaces and line ends are seen, nothing is empty. */
export function shown(text) {
  if (text === "") return "∅";
  return text
    .replaceAll("\n", "↵")
    .replaceAll("\t", "⇥")
    .replace(/^ +| +$/g, (spaces) => "·".repeat(spaces.length));
}

/** A probability as a percentage that is never a false 0 or 100. */
export function percent(probability) {
  const value = probability * 100;
  if (value >= 99.95 && probability < 1) return "> 99.9 %";
  if (value < 0.1 && probability > 0) return "< 0.1 %";
  return `${value >= 9.95 ? value.toFixed(0) : value.toFixed(1)} %`;
}

/** A number for a table: as many digits as can be read. */
export const number = (value, digits = 3) => value.toFixed(digits).replace("-", "−");

/** Calls `action` once, `ms` after the last of many calls. */
export function debounced(action, ms) {
  let timer = 0;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(...given), ms);
  };
}
