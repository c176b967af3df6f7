// Two scales, each of one hue and of one direction of lightness, so that they can be read without
// telling hues apart: ochre for how unlikely a token was, blue for attention.

/** Lower bounds of the shades of a token's probability; the last is below all of them. */
export const PROBABILITY_STEPS = [0.8, 0.5, 0.2, 0.05, 0.01];

/** 0 for a token that was nearly certain .. 5 for one that was a surprise. */
export function shadeOf(probability) {
  const step = PROBABILITY_STEPS.findIndex((bound) => probability >= bound);
  return step < 0 ? PROBABILITY_STEPS.length : step;
}

/** How strongly a weight is drawn, 0 .. 1: small ones would be lost on a straight scale. */
export const strength = (weight) => Math.sqrt(Math.min(Math.max(weight, 0), 1));

/** What a CSS variable is now, as [r, g, b]: canvases need numbers. */
export function colourOf(name) {
  const probe = document.createElement("span");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const context = new OffscreenCanvas(1, 1).getContext("2d");
  context.fillStyle = getComputedStyle(probe).color;
  context.fillRect(0, 0, 1, 1);
  probe.remove();
  return [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)];
}

/** `share` of `over` on `under`, as a CSS colour. */
export const mixed = (under, over, share) =>
  `rgb(${under.map((value, i) => Math.round(value + (over[i] - value) * share)).join(" ")})`;
