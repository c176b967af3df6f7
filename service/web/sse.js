// Server-sent events out of a fetch, as the HTML standard parses them. EventSource cannot POST.

/** An incremental parser: `feed(text)` gives the events that are complete. */
export class EventParser {
  #rest = "";
  #event = "";
  #data = [];
  #id = "";

  feed(text) {
    const events = [];
    this.#rest += text;
    // A CR at the end may be the first half of CRLF: it waits for what comes.
    const lines = this.#rest.split(/\r\n|\n|\r(?!$)/);
    this.#rest = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (this.#data.length)
          events.push({
            event: this.#event || "message",
            data: this.#data.join("\n"),
            id: this.#id,
          });
        this.#event = "";
        this.#data = [];
        continue;
      }
      const colon = line.indexOf(":");
      if (colon === 0) continue; // a comment
      const field = colon < 0 ? line : line.slice(0, colon);
      const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
      if (field === "event") this.#event = value;
      else if (field === "data") this.#data.push(value);
      else if (field === "id") this.#id = value;
    }
    return events;
  }
}

/** The events of a response, as they come. */
export async function* eventsOf(response) {
  const parser = new EventParser();
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      yield* parser.feed(value);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
