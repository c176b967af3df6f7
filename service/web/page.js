// What the page knows: what was asked for (`state`, which the address holds too) and what came back.

import { Explainer } from "./explaining.js";
import { fromFragment, toFragment } from "./state.js";

export const page = {
  state: fromFragment(location.hash),
  tokens: [], // {id, text, name, logprob, rank, top?, attended?, isPrompt, isSpecial}
  pointed: null, // position of the token that is pointed at
  explainer: new Explainer(),
  info: null, // answer of /info
  running: null, // {controller, id} of the stream
  missing: null, // why this server does not explain
  whatIfProblem: null,
};

/** Change what is asked for, and the address with it. */
export function update(patch) {
  Object.assign(page.state, patch);
  history.replaceState(null, "", `#${toFragment(page.state)}`);
}

/** Position of the last token that is explained, or of the last one that there is. */
export const lastToken = () =>
  (page.explainer.attention ? page.explainer.numTokens : page.tokens.length) - 1;

/** The query that belongs to a token: its own, or the one that chose it. */
export const queryOf = (token) =>
  Math.min(page.state.look === "for" ? token - 1 : token, lastToken());

/** The query that the maps, the lens and the steps are about. */
export const chosenQuery = () => Math.max(queryOf(page.state.token ?? lastToken()), 0);

/** The head whose steps are shown: the chosen one, or one to begin with. */
export const stepsHead = () => {
  const { attention } = page.explainer;
  return page.state.head ?? [attention.layers.at(-1), attention.heads[0]];
};
