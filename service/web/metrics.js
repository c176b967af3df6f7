// The server's own numbers: Prometheus text read in the page, each second while someone looks.

import { call } from "./api.js";
import { byId, h } from "./dom.js";

// A label's value may hold braces: a route's does.
const SAMPLE = /^([a-zA-Z_:][\w:]*)(\{(?:[^"}]|"(?:\\.|[^"\\])*")*\})? (\S+)/;
const EVERY_MS = 1000;

/** name or name{labels} -> value. */
export function parseMetrics(text) {
  const values = new Map();
  for (const line of text.split("\n")) {
    const match = line.startsWith("#") ? null : SAMPLE.exec(line);
    if (match) values.set(match[1] + (match[2] ?? ""), Number(match[3]));
  }
  return values;
}

/** What the tiles show: [name, value, unit or remark]; null where the server does not tell. */
export function tilesOf(now, before, elapsedS) {
  const generated = now.get("vitrine_engine_generated_tokens_total");
  const rate =
    before && generated !== undefined
      ? (generated - before.get("vitrine_engine_generated_tokens_total")) / elapsedS
      : undefined;
  const total = now.get("vitrine_kv_blocks_capacity");
  const used = now.get('vitrine_kv_blocks{state="referenced"}');
  const cached = now.get('vitrine_kv_blocks{state="cached"}');
  return [
    ["Tokens a second", rate === undefined ? null : Math.max(0, rate).toFixed(0), ""],
    ["In the batch", now.get("vitrine_engine_sequences_running") ?? null, ""],
    ["Waiting", now.get("vitrine_engine_sequences_waiting") ?? null, ""],
    [
      "KV cache in use",
      total ? `${((used / total) * 100).toFixed(0)} %` : null,
      total ? `${((cached / total) * 100).toFixed(0)} % kept` : "",
    ],
  ];
}

/** Keep the tiles fresh for as long as they are seen. */
export function startTiles() {
  const list = byId("tiles");
  let before = null;
  let beforeAt = 0;
  let onScreen = true;
  let timer = 0;
  let busy = false;

  async function refresh() {
    if (busy) return;
    busy = true;
    try {
      const now = parseMetrics(
        await (await call("metrics", { quiet: true, signal: AbortSignal.timeout(4000) })).text(),
      );
      const at = performance.now();
      draw(list, tilesOf(now, before, (at - beforeAt) / 1000));
      [before, beforeAt] = [now, at];
      list.classList.remove("stale");
    } catch {
      list.classList.add("stale"); // the tiles are no place to complain: what is asked for does
      before = null;
    } finally {
      busy = false;
    }
  }

  function schedule() {
    clearInterval(timer);
    before = null;
    if (document.hidden || !onScreen) return;
    refresh();
    timer = setInterval(refresh, EVERY_MS);
  }

  new IntersectionObserver(([entry]) => {
    if (entry.isIntersecting === onScreen) return;
    onScreen = entry.isIntersecting;
    schedule();
  }).observe(list);
  document.addEventListener("visibilitychange", schedule);
  schedule();
}

function draw(list, tiles) {
  if (!list.children.length) {
    for (const [name] of tiles) list.append(h("div", {}, h("dt", {}, name), h("dd", {})));
  }
  tiles.forEach(([, value, remark], i) => {
    const text = value === null ? "–" : String(value);
    const cell = list.children[i].lastElementChild;
    cell.replaceChildren(text, remark ? h("span", { class: "remark" }, ` ${remark}`) : "");
  });
}
