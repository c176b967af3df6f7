// Every call to the server: the key, the problems, and nothing else.

const KEY = "vitrine-key"; // the page that asks for the key at the door keeps it there too

/** What went wrong, with the server's own words. */
export class Problem extends Error {
  constructor(status, body, retryAfterS = null) {
    super(body.detail || body.title || `The server answered ${status}.`);
    this.status = status;
    this.title = body.title || `Status ${status}`;
    this.field = body.field ?? null;
    this.requestId = body.instance ?? null;
    this.retryAfterS = retryAfterS;
  }
}

/** Nobody answered, or the answer broke off. */
export class ConnectionLost extends Error {}

export const currentKey = () => sessionStorage.getItem(KEY);

let askForKey = null;

/** `ask(words)` resolves to a key, or to null when there is none to be had. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

/** A response that is ok; asks for a key on 401. Raises `Problem`, `ConnectionLost`, AbortError. */
export async function call(path, { body, signal, headers = {}, quiet = false } = {}) {
  for (;;) {
    const key = currentKey();
    const response = await send(path, {
      method: body === undefined ? "GET" : "POST",
      body,
      signal,
      headers: {
        ...(body === undefined ? {} : { "content-type": "application/json" }),
        ...(key ? { authorization: `Bearer ${key}` } : {}),
        ...headers,
      },
    });
    if (response.ok) return response;
    const problem = await problemOf(response);
    if (response.status !== 401 || quiet) throw problem;
    const given = await askOnce(key ? "The server does not know this key." : problem.message);
    if (!given) throw problem;
    sessionStorage.setItem(KEY, given);
  }
}

export async function callJson(path, options = {}) {
  const body = options.body === undefined ? undefined : JSON.stringify(options.body);
  const response = await call(path, { ...options, body });
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ConnectionLost("The connection was lost while the answer came.");
  }
}

async function send(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ConnectionLost("The server cannot be reached.");
  }
}

async function problemOf(response) {
  let body = {};
  try {
    body = await response.json();
  } catch {
    // A proxy's own page: the status says what there is to say.
  }
  const seconds = Number(response.headers.get("retry-after"));
  return new Problem(response.status, body, seconds > 0 ? seconds : null);
}

let asking = null;

function askOnce(words) {
  asking ??= Promise.resolve(askForKey?.(words)).finally(() => (asking = null));
  return asking;
}
