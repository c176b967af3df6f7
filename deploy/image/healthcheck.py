"""Exit 0 when this container's server is ready, 1 with the reason when not.

Reads the port and TLS from the same environment variables as the server: set them there, not by
flags. A server that asks clients for certificates (VITRINE_TLS_CLIENT_CA) cannot be asked like
this: run it with `--no-healthcheck`. Nothing but the standard library, which starts fast.
"""

import os
import ssl
import sys
import urllib.request


def main() -> int:
    """Ask /health/ready."""
    scheme = "https" if os.environ.get("VITRINE_TLS_CERT") else "http"
    url = f"{scheme}://127.0.0.1:{os.environ.get('VITRINE_PORT', '8000')}/health/ready"
    # The certificate is for the name that clients use; this is the loopback.
    context = ssl._create_unverified_context() if scheme == "https" else None
    try:
        urllib.request.urlopen(url, timeout=4, context=context).close()
    except OSError as error:  # HTTP errors too
        print(f"{url}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
