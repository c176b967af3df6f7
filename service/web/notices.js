// What went wrong, in words, where it is seen; with what can be done about it.

import { ConnectionLost, Problem } from "./api.js";
import { byId, h } from "./dom.js";

let countdown = 0;

export function clearNotices() {
  clearInterval(countdown);
  byId("notices").replaceChildren();
}

/** Show a failure. `retry` is offered where trying again makes sense. */
export function notice(error, retry = null) {
  clearNotices();
  const title = h(
    "b",
    {},
    error instanceof Problem
      ? `${error.title}. `
      : error instanceof ConnectionLost
        ? "Connection lost. "
        : "Something went wrong. ",
  );
  const details =
    error instanceof Problem
      ? [
          error.field ? `${error.field}: ` : "",
          error.message.replace(error.field ? `${error.field}: ` : "", ""),
        ]
      : [error.message];
  const box = h("div", { class: "notice", role: "alert" }, h("p", {}, title, ...details));
  if (error instanceof Problem && error.requestId)
    box.append(
      h("p", { class: "quiet small" }, `Status ${error.status}, request ${error.requestId}`),
    );
  const worthIt = error instanceof ConnectionLost || [429, 503].includes(error.status);
  if (retry && worthIt) box.append(retryButton(error.retryAfterS, retry));
  box.append(
    h("button", { type: "button", class: "plain small", onclick: clearNotices }, "Put away"),
  );
  byId("notices").replaceChildren(box);
}

function retryButton(waitS, retry) {
  const button = h(
    "button",
    {
      type: "button",
      class: "small",
      onclick: () => {
        clearNotices();
        retry();
      },
    },
    "Try again",
  );
  if (!waitS) return button;
  const until = Date.now() + waitS * 1000;
  const tick = () => {
    const left = Math.ceil((until - Date.now()) / 1000);
    button.disabled = left > 0;
    button.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    if (left <= 0) clearInterval(countdown);
  };
  tick();
  countdown = setInterval(tick, 250);
  return button;
}
