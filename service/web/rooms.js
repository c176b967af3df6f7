// The rooms below the case: maps, lens, steps, what if.

import { choices } from "./chrome.js";
import { byId, shown } from "./dom.js";
import { HeadGrid } from "./grid.js";
import { LargeMap } from "./large.js";
import { drawLens } from "./lens.js";
import { chosenQuery, page } from "./page.js";
import { includesPair } from "./state.js";
import { drawSteps } from "./steps.js";
import { drawWhatIf } from "./whatif.js";

export class Rooms {
  #grid;
  #large;
  #events;

  /** `events`: chooseToken, chooseHead, toggleHead, toggleEdge, switchAllOn, setLook, setUpto. */
  constructor(events) {
    this.#events = events;
    this.#grid = new HeadGrid(byId("grid"), {
      choose: events.chooseHead,
      toggle: events.toggleHead,
    });
    this.#large = new LargeMap(byId("large"), {
      toggleEdge: events.toggleEdge,
      toggleHead: () => events.toggleHead(page.state.head),
      chooseQuery: (query) => events.chooseToken(page.state.look === "for" ? query + 1 : query),
    });
  }

  close() {
    byId("rooms").hidden = true;
    byId("look-choice").hidden = true;
  }

  /** A new text is explained. */
  open() {
    byId("rooms").hidden = false;
    this.#grid.draw(page.explainer.attention, page.explainer.entropy);
    this.redraw();
  }

  setWaiting(isWaiting) {
    byId("rooms").classList.toggle("waiting", isWaiting);
  }

  /** The colours are others now. */
  repaint() {
    this.#grid.repaint();
    this.#large.repaint();
    this.redraw();
  }

  redraw() {
    const { state, tokens, explainer, missing } = page;
    byId("missing").hidden = !missing;
    byId("missing").textContent = missing
      ? `This server does not explain: ${missing}. The text streams all the same, with its ` +
        "probabilities; the attention, the maps, the lens and the steps are missing."
      : "";
    if (!explainer.attention) return;
    const query = chosenQuery();
    const explained = tokens.slice(0, explainer.numTokens);
    this.#grid.mark(state.head, state.offHeads);
    this.#large.draw({
      attention: explainer.attention,
      head: state.head,
      tokens: explained,
      query,
      offEdges: state.offEdges.filter(([row]) => row < explained.length),
      isOff: Boolean(state.head) && includesPair(state.offHeads, state.head),
    });
    drawLens(byId("lens"), {
      rows: explainer.lensAt(query) ?? [],
      after: explained[query].name,
      actual: tokens[query + 1]?.id ?? null,
      numLayers: explainer.numLayers,
    });
    drawSteps(byId("steps"), explainer.steps, explained);
    drawWhatIf(byId("whatif"), {
      offHeads: state.offHeads,
      offEdges: state.offEdges,
      tokens,
      answer: explainer.whatIf,
      problem: page.whatIfProblem,
      events: this.#events,
    });
    this.#redrawChoices();
  }

  #redrawChoices() {
    const { state, tokens } = page;
    const numGiven = tokens.filter((token) => token.isPrompt).length;
    const upto = [{ name: "the whole text", value: null }];
    const add = (name, value) => {
      if (!upto.some((option) => option.value === value)) upto.push({ name, value });
    };
    if (numGiven < tokens.length) add("the beginning alone", numGiven);
    if (state.token !== null && state.token + 1 < tokens.length) {
      add(`up to “${shown(tokens[state.token].name)}”`, state.token + 1);
    }
    if (state.upto !== null) add(`the first ${state.upto} tokens`, state.upto);
    choices(byId("upto"), "Look into", upto, state.upto, this.#events.setUpto);
    const look = [
      { name: "from the token", value: "from" },
      { name: "that chose it", value: "for" },
    ];
    choices(byId("look-choice"), "Attention", look, state.look, this.#events.setLook);
    byId("look-choice").hidden = false;
  }
}
