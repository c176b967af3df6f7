// Prices and watts may be edited; what they cost a million tokens follows.
"use strict";
const number = (kind, lane) => Number(document.querySelector(`[data-${kind}="${lane}"]`).value);
const shown = (value) => (Number.isFinite(value) ? value.toPrecision(3) : "?");
function update() {
  for (const row of document.querySelectorAll("tr[data-lane]")) {
    const seconds = 1e6 / Number(row.dataset.speed);
    const { lane } = row.dataset;
    row.querySelector(".dollars").textContent = shown((number("price", lane) / 3600) * seconds);
    row.querySelector(".energy").textContent = shown((number("watts", lane) * seconds) / 3.6e6);
  }
}
document.querySelector("#prices").addEventListener("input", update);
