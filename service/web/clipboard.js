// Copy, and say so.

import { byId } from "./dom.js";

let fading = 0;

/** Put a text on the clipboard; where the browser forbids it, show it to be copied by hand. */
export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    byId("copy-text").value = text;
    byId("copy-dialog").showModal();
    byId("copy-text").select();
    return;
  }
  const said = byId("copied");
  said.textContent = `${what} copied`;
  clearTimeout(fading);
  fading = setTimeout(() => (said.textContent = ""), 4000);
}
