// The request of the page as something to run elsewhere.

import { generateBody } from "./state.js";

const KEY_VARIABLE = "API_KEY";

/** A curl command that streams the same text; the key comes from the environment. */
export function asCurl(state, base, { withKey }) {
  const body = generateBody(state, { seed: state.seed || state.drawn });
  const key = withKey ? ` \\\n  -H "authorization: Bearer $${KEY_VARIABLE}"` : "";
  return `curl -N ${quoted(`${base}generate`)}${key} \\\n  -H 'content-type: application/json' \\\n  -d ${quoted(body)}`;
}

/** A Python program that prints the same text as it comes, with httpx. */
export function asPython(state, base, { withKey }) {
  const body = generateBody(state, { seed: state.seed || state.drawn, indent: 4 });
  const headers = withKey
    ? `headers = {"authorization": f"Bearer {os.environ['${KEY_VARIABLE}']}"}\n`
    : "";
  return `import json
${withKey ? "import os\n" : ""}
import httpx

body = ${body}
${headers}with httpx.stream("POST", ${JSON.stringify(`${base}generate`)}, json=body, ${withKey ? "headers=headers, " : ""}timeout=600) as answer:
    answer.raise_for_status()
    event = ""
    for line in answer.iter_lines():
        if line.startswith("event: "):
            event = line.removeprefix("event: ")
        elif line.startswith("data: "):
            data = json.loads(line.removeprefix("data: "))
            if event == "token":
                print(data["text"], end="", flush=True)
            elif event == "error":
                raise SystemExit(data["detail"])
print()
`;
}

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
