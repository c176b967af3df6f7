// From a prompt to tokens on the page: POST /tokenize for what is given, POST /generate for the rest.

import { call, callJson, ConnectionLost, Problem } from "./api.js";
import { eventsOf } from "./sse.js";

const ALTERNATIVES = 8;
/** Fields that a server without explanations does not take. */
export const EXPLAIN_FIELDS = { explain: true };
export const STREAM_FIELDS = { logprobs: ALTERNATIVES };

/** The tokens of a prompt. */
export async function promptTokens(prompt, signal) {
  const { tokens } = await callJson("tokenize", { body: { text: prompt }, signal });
  const characters = Array.from(prompt); // the server counts code points
  let end = 0;
  return tokens.map((token) => {
    const text = characters.slice(Math.max(token.start, end), token.end).join("");
    end = Math.max(end, token.end);
    return {
      id: token.id,
      text,
      name: token.text,
      logprob: null,
      rank: null,
      isPrompt: true,
      isSpecial: token.start === token.end,
    };
  });
}

/**
 * Stream a continuation. `bodyText` is JSON. Tells `onStart({id, seed})`, `onTokens(tokens, held)` and
 * returns the data of the `done` event. `held` is text that belongs to the token before.
 *
 * Raises `Problem` for a refusal and for an error event, `ConnectionLost` when the stream breaks off.
 */
export async function streamText(bodyText, { signal, onStart, onTokens }) {
  const response = await call("generate", { body: bodyText, signal });
  let done = null;
  try {
    for await (const { event, data } of eventsOf(response)) {
      if (event === "start")
        onStart({ id: JSON.parse(data).id, seed: /"seed":\s*(\d+)/.exec(data)[1] });
      else if (event === "token") onTokens(...tokensOf(JSON.parse(data)));
      else if (event === "done") done = JSON.parse(data);
      else if (event === "error") {
        const problem = JSON.parse(data);
        throw new Problem(problem.status, problem);
      }
    }
  } catch (error) {
    if (error instanceof Problem || error.name === "AbortError") throw error;
    throw new ConnectionLost("The stream broke off; what came is shown.");
  }
  if (!done) throw new ConnectionLost("The stream ended before the text did; what came is shown.");
  return done;
}

/** End a request in good order: it then says `done`, with what there is. */
export const cancel = (id) => callJson(`generate/${encodeURIComponent(id)}/cancel`, { body: {} });

/** The tokens of an event, and text that was held back until now when it has no token of its own. */
function tokensOf({ text, token_ids: ids, logprobs = [], explain = [] }) {
  if (!ids.length) return [[], text];
  const names = ids.map((_, i) => logprobs[i]?.text ?? "");
  // Several tokens in one event: their own texts where they make up the event's, else all of it on the last.
  const pieces =
    ids.length > 1 && names.join("") === text
      ? names
      : ids.map((_, i) => (i === ids.length - 1 ? text : ""));
  const tokens = ids.map((id, i) => ({
    id,
    text: pieces[i],
    name: names[i] || pieces[i],
    logprob: logprobs[i]?.logprob ?? null,
    rank: logprobs[i]?.rank ?? null,
    top: logprobs[i]?.top ?? explain[i]?.top ?? null,
    attended: explain[i]?.attended ?? null,
    isPrompt: false,
    isSpecial: false,
  }));
  return [tokens, ""];
}
